//! Tiny ONNX models for tests, written byte by byte: no dependency on the crate's own writer, which is tested
//! against the engines itself.

use std::io::Read;
use std::path::Path;

/// Contents of a file that is packed by gzip where its name ends in `.gz`.
pub(crate) fn stored(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    if path.extension().is_some_and(|e| e == "gz") {
        let mut plain = Vec::new();
        let mut packed = flate2::read::GzDecoder::new(bytes.as_slice());
        packed.read_to_end(&mut plain).unwrap();
        bytes = plain;
    }
    bytes
}

/// Element type of a graph input or output, by its number in `onnx.proto`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    F32 = 1,
    I64 = 7,
    Bool = 9,
    F16 = 10,
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(byte);
            return out;
        }
        out.push(byte | 0x80);
    }
}

fn int(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn bytes(field: u64, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    [
        varint(field << 3 | 2),
        varint(value.len() as u64),
        value.to_vec(),
    ]
    .concat()
}

/// `NodeProto`; attributes are integers.
fn node(op: &str, inputs: &[&str], outputs: &[&str], attributes: &[(&str, i64)]) -> Vec<u8> {
    let mut out = Vec::new();
    inputs.iter().for_each(|name| out.extend(bytes(1, name)));
    outputs.iter().for_each(|name| out.extend(bytes(2, name)));
    out.extend(bytes(3, format!("{op} to {}", outputs[0])));
    out.extend(bytes(4, op));
    for (name, value) in attributes {
        // Attribute type 2 is INT.
        out.extend(bytes(
            5,
            [bytes(1, name), int(3, *value as u64), int(20, 2)].concat(),
        ));
    }
    out
}

/// `ValueInfoProto`; a dimension is a number or a name.
fn port(name: &str, ty: Type, dims: &[&str]) -> Vec<u8> {
    let mut shape = Vec::new();
    for dim in dims {
        let dim = match dim.parse() {
            Ok(size) => int(1, size),
            Err(_) => bytes(2, dim),
        };
        shape.extend(bytes(1, dim));
    }
    let tensor = [int(1, ty as u64), bytes(2, shape)].concat();
    [bytes(1, name), bytes(2, bytes(1, tensor))].concat()
}

/// `TensorProto` of int64.
fn ints(name: &str, values: &[i64]) -> Vec<u8> {
    let raw: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    [
        int(1, values.len() as u64),
        int(2, Type::I64 as u64),
        bytes(8, name),
        bytes(9, raw),
    ]
    .concat()
}

fn model(
    nodes: &[Vec<u8>],
    constants: &[Vec<u8>],
    inputs: &[Vec<u8>],
    outputs: &[Vec<u8>],
) -> Vec<u8> {
    let mut graph = Vec::new();
    nodes.iter().for_each(|node| graph.extend(bytes(1, node)));
    graph.extend(bytes(2, "g"));
    constants
        .iter()
        .for_each(|constant| graph.extend(bytes(5, constant)));
    inputs
        .iter()
        .for_each(|input| graph.extend(bytes(11, input)));
    outputs
        .iter()
        .for_each(|output| graph.extend(bytes(12, output)));
    [int(1, 8), bytes(7, graph), bytes(8, int(2, 17))].concat()
}

/// `y = op(x)`.
pub(crate) fn unary(op: &str, ty: Type, dims: &[&str]) -> Vec<u8> {
    let nodes = [node(op, &["x"], &["y"], &[])];
    model(&nodes, &[], &[port("x", ty, dims)], &[port("y", ty, dims)])
}

/// A decoder of two layers whose second layer keeps only the last of the new tokens, as a pruned one does.
///
/// Its cache holds the embeddings. Its logits are not computed from it but show what it was given, for each
/// token: embedding, position, visual flag, salient flag, and the sum of the attention mask.
pub(crate) fn ragged_decoder(ty: Type) -> Vec<u8> {
    let cast = ("to", ty as i64);
    let nodes = [
        node("Cast", &["none"], &["zero"], &[cast]),
        node("Unsqueeze", &["inputs_embeds", "one"], &["states"], &[]),
        node(
            "Concat",
            &["past_key_values.0.key", "states"],
            &["present.0.key"],
            &[("axis", 2)],
        ),
        node(
            "Concat",
            &["past_key_values.0.value", "states"],
            &["present.0.value"],
            &[("axis", 2)],
        ),
        node(
            "Slice",
            &["states", "minus_one", "end", "two"],
            &["last"],
            &[],
        ),
        node(
            "Concat",
            &["past_key_values.1.key", "last"],
            &["present.1.key"],
            &[("axis", 2)],
        ),
        node(
            "Concat",
            &["past_key_values.1.value", "last"],
            &["present.1.value"],
            &[("axis", 2)],
        ),
        node("Cast", &["position_ids"], &["positions"], &[cast]),
        node("Cast", &["visual_token_mask"], &["visual"], &[cast]),
        node("Cast", &["salient_token_mask"], &["salient"], &[cast]),
        node(
            "ReduceSum",
            &["attention_mask", "one"],
            &["sum"],
            &[("keepdims", 1)],
        ),
        node("Cast", &["sum"], &["total"], &[cast]),
        node("Mul", &["positions", "zero"], &["zeros"], &[]),
        node("Add", &["zeros", "total"], &["totals"], &[]),
        node("Unsqueeze", &["positions", "two"], &["a"], &[]),
        node("Unsqueeze", &["visual", "two"], &["b"], &[]),
        node("Unsqueeze", &["salient", "two"], &["c"], &[]),
        node("Unsqueeze", &["totals", "two"], &["d"], &[]),
        node(
            "Concat",
            &["inputs_embeds", "a", "b", "c", "d"],
            &["logits"],
            &[("axis", 2)],
        ),
    ];
    let constants = [
        ints("one", &[1]),
        ints("two", &[2]),
        ints("minus_one", &[-1]),
        ints("end", &[i64::MAX]),
        ints("none", &[0]),
    ];
    let cache = |kind: &str, length: &str| -> Vec<Vec<u8>> {
        let names = ["0.key", "0.value", "1.key", "1.value"];
        let port = |name: &&str| port(&format!("{kind}.{name}"), ty, &["b", "1", length, "1"]);
        names.iter().map(port).collect()
    };
    let mut inputs = vec![
        port("inputs_embeds", ty, &["b", "s", "1"]),
        port("attention_mask", Type::I64, &["b", "t"]),
        port("position_ids", Type::I64, &["b", "s"]),
        port("visual_token_mask", Type::Bool, &["b", "s"]),
        port("salient_token_mask", Type::Bool, &["b", "s"]),
    ];
    inputs.extend(cache("past_key_values", "p"));
    let mut outputs = vec![port("logits", ty, &["b", "s", "5"])];
    outputs.extend(cache("present", "q"));
    model(&nodes, &constants, &inputs, &outputs)
}

/// The project's model directory.
pub(crate) fn models_dir() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("models")
        .join("llava")
}

/// The two rows with the best scores, in order of position: what a pruning step does. Outputs `kept`
/// `[b, 2, 1]`, `places` `[b, 2]` and `length`, the shape of `rows`.
pub(crate) fn top_two_rows() -> Vec<u8> {
    let nodes = [
        node(
            "TopK",
            &["scores", "two"],
            &["best_scores", "best"],
            &[("axis", 1)],
        ),
        node(
            "TopK",
            &["best", "two"],
            &["places", "order"],
            &[("axis", 1), ("largest", 0)],
        ),
        node("Unsqueeze", &["places", "last"], &["index"], &[]),
        node(
            "GatherND",
            &["rows", "index"],
            &["kept"],
            &[("batch_dims", 1)],
        ),
        node("Shape", &["rows"], &["length"], &[]),
    ];
    model(
        &nodes,
        &[ints("two", &[2]), ints("last", &[-1])],
        &[
            port("rows", Type::F32, &["b", "n", "1"]),
            port("scores", Type::F32, &["b", "n"]),
        ],
        &[
            port("kept", Type::F32, &["b", "2", "1"]),
            port("places", Type::I64, &["b", "2"]),
            port("length", Type::I64, &["3"]),
        ],
    )
}
