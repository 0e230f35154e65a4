//! What several test binaries share: small models made from protobuf types,
//! walking serialised messages, the committed fixtures, and file comparisons.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use duet_onnx::arch::Vlm;
use duet_onnx::ir::{IrError, Model, NodeId, Patch, PatchPlan, ValueId, Violation, verify};
use duet_onnx::onnx::{OnnxError, read, read_bytes, serialize};
use duet_onnx::passes::{Recipe, Rewritten, rewrite};
use duet_onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    attribute_proto::AttributeType, tensor_proto::DataLocation, tensor_shape_proto, type_proto,
};
use prost::Message;

/// `elem_type` numbers of the file format.
pub(crate) const FLOAT: i32 = 1;
pub(crate) const INT64: i32 = 7;
pub(crate) const BOOL: i32 = 9;

/// A typed value; a negative dimension is left unknown.
pub(crate) fn value(name: &str, dtype: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = |n: &i64| tensor_shape_proto::Dimension {
        value: (*n >= 0).then_some(tensor_shape_proto::dimension::Value::DimValue(*n)),
        denotation: None,
    };
    let shape = TensorShapeProto {
        dim: dims.iter().map(dim).collect(),
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(dtype),
        shape: Some(shape),
    };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            denotation: None,
        }),
        ..Default::default()
    }
}

/// A node named `op_firstoutput`.
pub(crate) fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let all = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    NodeProto {
        name: Some(format!("{op}_{}", outputs.first().unwrap_or(&""))),
        op_type: Some(op.into()),
        input: all(inputs),
        output: all(outputs),
        ..Default::default()
    }
}

/// A node with sub-graphs, one attribute each.
pub(crate) fn holder(
    op: &str,
    inputs: &[&str],
    outputs: &[&str],
    bodies: &[(&str, GraphProto)],
) -> NodeProto {
    let attribute = |(name, body): &(&str, GraphProto)| AttributeProto {
        name: Some((*name).into()),
        g: Some(body.clone()),
        r#type: Some(AttributeType::Graph.into()),
        ..Default::default()
    };
    NodeProto {
        attribute: bodies.iter().map(attribute).collect(),
        ..node(op, inputs, outputs)
    }
}

/// An attribute of integers.
pub(crate) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        ints: values.to_vec(),
        r#type: Some(AttributeType::Ints.into()),
        ..Default::default()
    }
}

/// An integer attribute.
pub(crate) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        i: Some(value),
        r#type: Some(AttributeType::Int.into()),
        ..Default::default()
    }
}

/// A float tensor of raw data.
pub(crate) fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto {
        name: Some(name.into()),
        data_type: Some(FLOAT),
        dims: dims.to_vec(),
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

/// An int64 tensor of raw data, one dimension.
pub(crate) fn longs(name: &str, values: &[i64]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    TensorProto {
        name: Some(name.into()),
        data_type: Some(INT64),
        dims: vec![values.len() as i64],
        raw_data: Some(raw.into()),
        ..Default::default()
    }
}

/// A float tensor in an external file.
pub(crate) fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> TensorProto {
    let entry = |(key, value): &(&str, &str)| StringStringEntryProto {
        key: Some((*key).into()),
        value: Some((*value).into()),
    };
    TensorProto {
        name: Some(name.into()),
        data_type: Some(FLOAT),
        dims: dims.to_vec(),
        external_data: entries.iter().map(entry).collect(),
        data_location: Some(DataLocation::External.into()),
        ..Default::default()
    }
}

/// A graph.
pub(crate) fn graph(
    name: &str,
    inputs: &[ValueInfoProto],
    outputs: &[ValueInfoProto],
    initializers: &[TensorProto],
    nodes: &[NodeProto],
) -> GraphProto {
    GraphProto {
        name: Some(name.into()),
        input: inputs.to_vec(),
        output: outputs.to_vec(),
        initializer: initializers.to_vec(),
        node: nodes.to_vec(),
        ..Default::default()
    }
}

/// A model of IR version 8 and operator set 17.
pub(crate) fn model(graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        producer_name: Some("tests".into()),
        opset_import: vec![opset("", 17)],
        graph: Some(graph),
        ..Default::default()
    }
}

/// An operator set.
pub(crate) fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto {
        domain: Some(domain.into()),
        version: Some(version),
    }
}

/// Two floats.
pub(crate) fn two(name: &str) -> ValueInfoProto {
    value(name, FLOAT, &[2])
}

/// A body that gives out `Neg(read)`.
pub(crate) fn negates(name: &str, read: &str, out: &str) -> GraphProto {
    graph(name, &[], &[two(out)], &[], &[node("Neg", &[read], &[out])])
}

/// ```text
/// o = Abs(x)                                 output 1, captured twice
/// y = If(c) { t: If(c) { tt: Neg(o) } { te: Neg(x) } }
///           { e: own weight, Neg(own) }      captures nothing
/// l = Loop(n, c, x) { body(i, cond, s): cond, Add(s, o) }
/// z = Twice(l)                               model-local function
/// ```
pub(crate) fn nested() -> ModelProto {
    let inner = holder(
        "If",
        &["c"],
        &["t_out"],
        &[
            ("then_branch", negates("tt", "o", "tt_out")),
            ("else_branch", negates("te", "x", "te_out")),
        ],
    );
    let then = graph("t", &[], &[two("t_out")], &[], &[inner]);
    let mut other = negates("e", "own", "e_out");
    other.initializer.push(floats("own", &[2], &[1.0, 2.0]));
    let turn = graph(
        "body",
        &[value("i", INT64, &[]), value("cond", BOOL, &[]), two("s")],
        &[value("go", BOOL, &[]), two("s_next")],
        &[],
        &[
            node("Identity", &["cond"], &["go"]),
            node("Add", &["s", "o"], &["s_next"]),
        ],
    );
    let mut proto = model(graph(
        "main",
        &[value("c", BOOL, &[]), value("n", INT64, &[]), two("x")],
        &[two("y"), two("o"), two("z")],
        &[],
        &[
            node("Abs", &["x"], &["o"]),
            holder(
                "If",
                &["c"],
                &["y"],
                &[("then_branch", then), ("else_branch", other)],
            ),
            holder("Loop", &["n", "c", "x"], &["l"], &[("body", turn)]),
            NodeProto {
                domain: Some("local".into()),
                ..node("Twice", &["l"], &["z"])
            },
        ],
    ));
    proto.opset_import.push(opset("local", 1));
    proto.functions.push(FunctionProto {
        name: Some("Twice".into()),
        domain: Some("local".into()),
        input: vec!["a".into()],
        output: vec!["r".into()],
        opset_import: vec![opset("", 17)],
        node: vec![node("Add", &["a", "a"], &["r"])],
        ..Default::default()
    });
    proto
}

/// ```text
/// a = Add(x, w); b = Mul(a, v); y = Neg(b); z = Abs(a); unread = Exp(old)
/// ```
/// `unread` is dead and `spare` has no reader, before any patch.
pub(crate) fn chain() -> ModelProto {
    let two = |name: &str| floats(name, &[2], &[1.0, 2.0]);
    model(graph(
        "chain",
        &[value("x", FLOAT, &[2])],
        &[value("y", FLOAT, &[2]), value("z", FLOAT, &[2])],
        &[two("w"), two("v"), two("old"), two("spare")],
        &[
            node("Add", &["x", "w"], &["a"]),
            node("Exp", &["old"], &["unread"]),
            node("Mul", &["a", "v"], &["b"]),
            node("Neg", &["b"], &["y"]),
            node("Abs", &["a"], &["z"]),
        ],
    ))
}

/// The model's file.
pub(crate) fn encode(model: &ModelProto) -> Bytes {
    model.encode_to_vec().into()
}

/// The model as the library reads it.
#[track_caller]
pub(crate) fn load(model: &ModelProto) -> Model {
    read_bytes("test.onnx", encode(model)).unwrap_or_else(|e| panic!("{e}"))
}

/// Verified bytes of a model.
#[track_caller]
pub(crate) fn bytes_of(model: &Model) -> Vec<u8> {
    serialize(verify(model).unwrap_or_else(|e| panic!("{e}"))).to_vec()
}

/// A model's serialised form, decoded.
#[track_caller]
pub(crate) fn decode(bytes: &[u8]) -> ModelProto {
    ModelProto::decode(bytes).expect("what was written is protobuf")
}

/// What the verifier finds.
pub(crate) fn violations(model: &Model) -> Vec<Violation> {
    match verify(model) {
        Ok(_) => Vec::new(),
        Err(IrError::Invalid { violations }) => violations,
        Err(other) => panic!("{other}"),
    }
}

/// Value of the main graph by name.
#[track_caller]
pub(crate) fn find(model: &Model, name: &str) -> ValueId {
    model
        .find(name)
        .unwrap_or_else(|| panic!("no value '{name}'"))
}

/// Node of the main graph that produces a value.
#[track_caller]
pub(crate) fn producer(model: &Model, name: &str) -> NodeId {
    model
        .producer_of(find(model, name))
        .unwrap_or_else(|| panic!("'{name}' is no node's output"))
}

/// A patch of pass `t`.
pub(crate) fn plan(model: &Model, build: impl FnOnce(&mut Patch<'_>)) -> PatchPlan {
    let mut patch = Patch::new(model, "t");
    build(&mut patch);
    patch.finish()
}

/// The model after a patch, verified.
#[track_caller]
pub(crate) fn patched(model: &Model, build: impl FnOnce(&mut Patch<'_>)) -> Model {
    let after = model
        .clone()
        .apply(plan(model, build))
        .unwrap_or_else(|e| panic!("{e}"));
    if let Err(e) = verify(&after) {
        panic!("{e}");
    }
    after
}

/// Reason of a refused patch.
#[track_caller]
pub(crate) fn refusal(model: &Model, build: impl FnOnce(&mut Patch<'_>)) -> String {
    match model.clone().apply(plan(model, build)) {
        Err(IrError::Patch { pass, reason }) => {
            assert_eq!(pass, "t");
            reason
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
}

/// `op(inputs) -> outputs` of the main graph's nodes, in order.
pub(crate) fn listing(model: &Model) -> Vec<String> {
    let names = |list: &[Option<ValueId>]| -> String {
        let all: Vec<&str> = list
            .iter()
            .map(|v| v.map_or("", |v| model.name(v)))
            .collect();
        all.join(",")
    };
    let shown = |id: &NodeId| {
        let n = model.node(*id);
        format!("{}({})->{}", n.op_type, names(&n.inputs), names(&n.outputs))
    };
    model.graph().nodes.iter().map(shown).collect()
}

/// Names of the main graph's initializers, in order.
pub(crate) fn initializer_names(model: &Model) -> Vec<&str> {
    model
        .graph()
        .initializers
        .iter()
        .map(|v| model.name(*v))
        .collect()
}

// ---- the wire format, read without the library ----

/// One field of a message: number, contents (empty unless length-delimited),
/// and all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) number: u64,
    pub(crate) contents: Vec<u8>,
    pub(crate) whole: Vec<u8>,
}

fn varint(from: &[u8], at: &mut usize) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = from[*at];
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// The fields of a well-formed message.
pub(crate) fn walk(message: &[u8]) -> Vec<Field> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < message.len() {
        let start = at;
        let tag = varint(message, &mut at);
        let mut contents = Vec::new();
        match tag & 7 {
            0 => drop(varint(message, &mut at)),
            1 => at += 8,
            5 => at += 4,
            2 => {
                let length = usize::try_from(varint(message, &mut at)).unwrap();
                contents = message[at..at + length].to_vec();
                at += length;
            }
            other => panic!("wire type {other}"),
        }
        found.push(Field {
            number: tag >> 3,
            contents,
            whole: message[start..at].to_vec(),
        });
    }
    found
}

/// Contents of the fields with this number.
pub(crate) fn contents(message: &[u8], number: u64) -> Vec<Vec<u8>> {
    let all = walk(message).into_iter().filter(|f| f.number == number);
    all.map(|f| f.contents).collect()
}

/// The text of a field, empty if it is not there.
pub(crate) fn text_of(message: &[u8], number: u64) -> String {
    let last = contents(message, number).pop().unwrap_or_default();
    String::from_utf8(last).expect("text")
}

/// A length-delimited field.
pub(crate) fn delimited(number: u64, contents: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    prost::encoding::encode_varint(number << 3 | 2, &mut out);
    prost::encoding::encode_varint(contents.len() as u64, &mut out);
    out.extend(contents);
    out
}

/// A number field.
pub(crate) fn number(number: u64, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    prost::encoding::encode_varint(number << 3, &mut out);
    prost::encoding::encode_varint(value, &mut out);
    out
}

// ---- committed fixtures ----

/// Directories of the committed exports.
pub(crate) fn fixture_dirs() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/llava/fixtures");
    let entries = fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut dirs: Vec<PathBuf> = entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    dirs.sort();
    assert!(
        dirs.len() >= 8,
        "two attention kinds of four exporters: {dirs:?}"
    );
    dirs
}

/// All committed model files.
pub(crate) fn fixture_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for dir in fixture_dirs() {
        for name in ["vision_encoder", "embed_tokens", "decoder_model_merged"] {
            let path = dir.join("onnx").join(format!("{name}.onnx"));
            assert!(path.is_file(), "{}", path.display());
            files.push(path);
        }
    }
    files
}

/// Recipe text with both passes, small enough for every fixture.
pub(crate) const RECIPE: &str = "version: 1
passes:
  - token_merge: {dominant: 20, contextual: 4}
  - visual_prune: {drops: [{after_layer: 2, keep: 0.5}, {after_layer: 4, keep: 0.0}]}
";

/// A directory's models, rewritten.
#[track_caller]
pub(crate) fn rewritten(dir: &Path, recipe: &str) -> Rewritten {
    let found = duet_onnx::onnx::ModelDir::open(dir).unwrap_or_else(|e| panic!("{e}"));
    let models = found.files.iter().map(|f| {
        let model = read(&found.path(f)).unwrap_or_else(|e| panic!("{e}"));
        (f.relative.clone(), f.variant.clone(), model)
    });
    let recipe = Recipe::parse(recipe).unwrap_or_else(|e| panic!("{e}"));
    rewrite(Vlm::new(models.collect()), &recipe).unwrap_or_else(|e| panic!("{e}"))
}

// ---- files ----

/// Every file and link below a directory with its contents, by relative path.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(dir).unwrap().to_owned();
            if path.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.insert(relative, target.to_string_lossy().into_owned().into_bytes());
            } else if path.is_dir() {
                found.insert(relative, b"(directory)".to_vec());
                todo.push(path);
            } else {
                found.insert(relative, fs::read(&path).unwrap_or_default());
            }
        }
    }
    found
}

/// An error's kind, as the name of its variant.
pub(crate) fn kind(error: &OnnxError) -> &'static str {
    match error {
        OnnxError::Io { .. } => "Io",
        OnnxError::Malformed { .. } => "Malformed",
        OnnxError::Model {
            source: IrError::External { .. },
            ..
        } => "External",
        OnnxError::Model {
            source: IrError::Duplicate { .. },
            ..
        } => "Duplicate",
        OnnxError::Model {
            source: IrError::Invalid { .. },
            ..
        } => "Invalid",
        OnnxError::Model { .. } => "Model",
        OnnxError::Directory { .. } => "Directory",
        OnnxError::Exists { .. } => "Exists",
    }
}

// ---- goldens ----

/// Compares with a committed file; `DUET_BLESS=1` rewrites it instead.
#[track_caller]
pub(crate) fn golden(path: &Path, found: &str) {
    if std::env::var_os("DUET_BLESS").is_some_and(|v| v == "1") {
        fs::write(path, found).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        return;
    }
    let expected = fs::read_to_string(path)
        .unwrap_or_else(|e| panic!("{}: {e}; DUET_BLESS=1 cargo test writes it", path.display()));
    if expected != found {
        panic!(
            "{} differs (- expected, + found); if the change is meant, DUET_BLESS=1 cargo test rewrites it\n{}",
            path.display(),
            diff(&expected, found)
        );
    }
}

/// Unified diff of two texts with three lines of context.
pub(crate) fn diff(old: &str, new: &str) -> String {
    const CONTEXT: usize = 3;
    let (a, b): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    // Lengths of the longest common subsequences of the ends.
    let mut common = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            common[i][j] = if a[i] == b[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    // (sign, line, line numbers in both before it)
    let mut script: Vec<(char, &str, usize, usize)> = Vec::new();
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            script.push((' ', a[i], i, j));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len() || (i < a.len() && common[i + 1][j] >= common[i][j + 1]) {
            script.push(('-', a[i], i, j));
            i += 1;
        } else {
            script.push(('+', b[j], i, j));
            j += 1;
        }
    }
    let near = |at: usize| {
        let (from, to) = (
            at.saturating_sub(CONTEXT),
            (at + CONTEXT + 1).min(script.len()),
        );
        script[from..to].iter().any(|s| s.0 != ' ')
    };
    let mut out = String::new();
    let mut inside = false;
    for (at, (sign, line, i, j)) in script.iter().enumerate() {
        if near(at) {
            if !inside {
                out += &format!("@@ -{} +{} @@\n", i + 1, j + 1);
            }
            out += &format!("{sign}{line}\n");
        }
        inside = near(at);
    }
    out
}
