//! Malformed and hostile input: always an error that says what and where, never
//! a panic, and never a byte written.

mod common;

use std::fs;
use std::path::Path;

use bytes::Bytes;
use common::*;
use duet_onnx::arch::Role;
use duet_onnx::ir::{TensorData, text, verify};
use duet_onnx::onnx::{OnnxError, read, read_bytes, serialize};
use duet_onnx::proto::{ModelProto, TensorProto};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

/// Puts a file through all that reads files. What is accepted has to come out
/// as it went in. Whether it was accepted.
fn digest(file: &[u8]) -> Result<bool, TestCaseError> {
    let Ok(model) = read_bytes("hostile", Bytes::copy_from_slice(file)) else {
        return Ok(false);
    };
    text(&model);
    let Ok(proof) = verify(&model) else {
        return Ok(false);
    };
    Role::of(&model);
    prop_assert!(
        serialize(proof).to_vec() == file,
        "an accepted file was changed"
    );
    Ok(true)
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20_260_218),
        ..ProptestConfig::default()
    })
}

#[track_caller]
fn refused(file: &[u8], variant: &str, fragments: &[&str]) {
    let error = match read_bytes("hostile.onnx", Bytes::copy_from_slice(file)) {
        Err(e) => e,
        Ok(_) => panic!("accepted"),
    };
    let message = error.to_string();
    assert_eq!(kind(&error), variant, "{message}");
    assert!(message.starts_with("hostile.onnx: "), "{message}");
    for fragment in fragments {
        assert!(
            message.contains(fragment),
            "'{fragment}' is not in: {message}"
        );
    }
}

// ---- bytes ----

#[test]
fn a_file_cut_off_anywhere_is_refused_or_a_whole_smaller_model() {
    let file = encode(&nested());
    let mut accepted = Vec::new();
    for end in 0..file.len() {
        if digest(&file[..end]).unwrap() {
            accepted.push(end);
        }
    }
    // Only cuts between the fields behind the graph leave a model.
    let mut at = 0;
    let mut boundaries = Vec::new();
    for field in walk(&file) {
        at += field.whole.len();
        boundaries.push(at);
    }
    assert!(
        accepted.iter().all(|end| boundaries.contains(end)),
        "{accepted:?} of {boundaries:?}"
    );
    refused(
        &file[..file.len() / 2],
        "Malformed",
        &["ModelProto", "truncated file?"],
    );
}

#[test]
fn flipped_bytes_never_panic() {
    let file = encode(&nested()).to_vec();
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8);
    let mut rejected = 0;
    let result = runner(4000).run(&flips, |flips| {
        let mut bytes = file.clone();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        digest(&bytes).map(|_| ())
    });
    result.unwrap();
    // The test would prove nothing if everything were accepted.
    for at in 0..file.len() {
        let mut bytes = file.clone();
        bytes[at] ^= 0x80;
        rejected += usize::from(!digest(&bytes).unwrap());
    }
    assert!(rejected > file.len() / 2, "{rejected} of {}", file.len());
}

#[test]
fn flipped_bytes_in_the_nodes_of_real_exports_never_panic() {
    for name in ["decoder_model_merged", "vision_encoder", "embed_tokens"] {
        let path = fixture_dirs()[1].join("onnx").join(format!("{name}.onnx"));
        let file = fs::read(&path).unwrap();
        // Everything but the weights: where a flip hits the structure.
        let (mut places, mut start) = (Vec::new(), 0);
        for outer in walk(&file) {
            let mut at = start + outer.whole.len() - outer.contents.len();
            start += outer.whole.len();
            if outer.number == 7 {
                for field in walk(&outer.contents) {
                    if field.number != 5 {
                        places.extend(at..at + field.whole.len());
                    }
                    at += field.whole.len();
                }
            }
        }
        assert!(places.len() > 500, "{}", places.len());
        let flips = prop::collection::vec((prop::sample::select(places), any::<u8>()), 1..4);
        let result = runner(150).run(&flips, |flips| {
            let mut bytes = file.clone();
            for (at, byte) in flips {
                bytes[at] = byte;
            }
            digest(&bytes).map(|_| ())
        });
        result.unwrap();
    }
}

#[test]
fn random_bytes_never_panic() {
    let bytes = prop::collection::vec(any::<u8>(), 0..400);
    runner(3000)
        .run(&bytes, |bytes| digest(&bytes).map(|_| ()))
        .unwrap();
    // Random contents in the right places get further.
    let inside = (
        prop::collection::vec(any::<u8>(), 0..60),
        1u64..16,
        1u64..14,
    );
    let wrapped = inside.prop_map(|(bytes, inner, outer)| {
        delimited(7, &delimited(outer, &delimited(inner, &bytes)))
    });
    runner(3000)
        .run(&wrapped, |bytes| digest(&bytes).map(|_| ()))
        .unwrap();
}

#[test]
fn files_that_are_no_models_are_refused() {
    refused(
        b"",
        "Malformed",
        &[
            "it holds no graph",
            "is this an ONNX model, or a data file?",
        ],
    );
    refused(b"{\"model_type\": \"llava\"}", "Malformed", &["ModelProto"]);
    refused(
        &[0; 64],
        "Malformed",
        &["field number 0 (not a protobuf file?)"],
    );
    refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Malformed",
        &["ModelProto"],
    );
    refused(&number(1, 8), "Malformed", &["it holds no graph"]);
}

#[test]
fn a_second_graph_is_refused() {
    let file = encode(&nested());
    let again = walk(&file)
        .into_iter()
        .find(|f| f.number == 7)
        .unwrap()
        .whole;
    refused(
        &[&file[..], &again].concat(),
        "Malformed",
        &["it holds two graphs"],
    );
}

#[test]
fn lengths_beyond_the_file_are_refused_at_every_level() {
    let claims = |number: u64, length: u64| {
        let mut out = Vec::new();
        prost::encoding::encode_varint(number << 3 | 2, &mut out);
        prost::encoding::encode_varint(length, &mut out);
        out.extend([0; 8]);
        out
    };
    for length in [9, 1 << 31, 1 << 40, u64::MAX] {
        refused(
            &claims(7, length),
            "Malformed",
            &["ModelProto", "byte 0", "longer than the message"],
        );
        refused(
            &delimited(7, &claims(1, length)),
            "Malformed",
            &["GraphProto", "longer than the message"],
        );
        let node = delimited(7, &delimited(1, &claims(5, length)));
        refused(
            &node,
            "Malformed",
            &["NodeProto", "longer than the message"],
        );
        refused(
            &delimited(7, &delimited(5, &claims(9, length))),
            "Malformed",
            &["initializer"],
        );
    }
}

#[test]
fn text_that_is_no_text_is_refused() {
    let bad = [0xff, 0xfe];
    refused(
        &delimited(7, &delimited(2, &bad)),
        "Malformed",
        &["graph name", "UTF-8"],
    );
    refused(
        &delimited(7, &delimited(1, &delimited(4, &bad))),
        "Malformed",
        &["node op_type", "UTF-8"],
    );
    refused(
        &delimited(7, &number(1, 3)),
        "Malformed",
        &["node", "length-delimited"],
    );
}

#[test]
fn nodes_without_an_operator_and_tensors_without_a_name_are_refused() {
    let nameless = delimited(7, &delimited(1, &delimited(3, b"lonely")));
    refused(
        &nameless,
        "Malformed",
        &["node 'lonely'", "it has no op_type"],
    );
    let tensor = TensorProto {
        name: None,
        ..floats("", &[1], &[1.0])
    };
    let proto = model(graph("g", &[], &[], &[tensor], &[]));
    refused(
        &encode(&proto),
        "Malformed",
        &["initializer", "it has no name"],
    );
}

#[test]
fn a_name_defined_twice_is_refused() {
    let twice = |nodes: &[duet_onnx::proto::NodeProto], weights: &[TensorProto]| {
        encode(&model(graph(
            "main",
            &[two("x")],
            &[two("y")],
            weights,
            nodes,
        )))
    };
    let weight = floats("w", &[1], &[1.0]);
    let cases = [
        (
            "y",
            twice(
                &[node("Neg", &["x"], &["y"]), node("Abs", &["x"], &["y"])],
                &[],
            ),
        ),
        ("w", twice(&[], &[weight.clone(), weight.clone()])),
        (
            "w",
            twice(
                &[node("Neg", &["x"], &["w"])],
                std::slice::from_ref(&weight),
            ),
        ),
        ("x", twice(&[node("Neg", &["x"], &["x"])], &[])),
        ("z", twice(&[node("Split", &["x"], &["z", "z"])], &[])),
    ];
    for (name, file) in cases {
        refused(
            &file,
            "Duplicate",
            &[&format!("'{name}' is defined twice in graph 'main'")],
        );
    }
}

// ---- depth ----

/// A model whose main graph holds `depth` nested sub-graphs, in bytes.
fn nested_bodies(depth: usize) -> Vec<u8> {
    let leaf = delimited(1, &[delimited(2, b"v"), delimited(4, b"Constant")].concat());
    let mut graph = leaf;
    for _ in 0..depth {
        let attribute = [delimited(1, b"body"), delimited(6, &graph)].concat();
        graph = delimited(1, &[delimited(4, b"If"), delimited(5, &attribute)].concat());
    }
    [delimited(8, &number(2, 17)), delimited(7, &graph)].concat()
}

#[test]
fn sub_graphs_nested_too_deeply_are_refused_not_followed() {
    let deepest = read_bytes("deep", nested_bodies(32).into()).unwrap();
    assert_eq!(deepest.graphs().count(), 33);
    assert_eq!(violations(&deepest), []);
    for depth in [33, 500, 4000] {
        refused(
            &nested_bodies(depth),
            "Malformed",
            &["GraphProto", "nested too deeply"],
        );
    }
}

#[test]
fn types_nested_deeply_are_refused_not_followed() {
    // sequence(sequence(…)) as the type of a graph input.
    for (depth, fine) in [(10, true), (3000, false)] {
        let mut ty = delimited(1, &number(1, 1));
        for _ in 0..depth {
            ty = delimited(4, &delimited(1, &ty));
        }
        let input = delimited(11, &[delimited(1, b"x"), delimited(2, &ty)].concat());
        let file = delimited(7, &input);
        if fine {
            assert!(digest(&file).unwrap());
        } else {
            refused(&file, "Malformed", &["graph input", "recursion"]);
        }
    }
}

// ---- tensors ----

fn with_tensor(tensor: TensorProto) -> ModelProto {
    let mut proto = nested();
    proto.graph.as_mut().unwrap().initializer.push(tensor);
    proto
}

#[test]
fn negative_dimensions_are_refused() {
    let file = encode(&with_tensor(TensorProto {
        dims: vec![2, -3],
        ..floats("w", &[], &[1.0])
    }));
    refused(
        &file,
        "Malformed",
        &["initializer", "tensor 'w'", "dimension -3 is negative"],
    );
}

#[test]
fn dimensions_that_overflow_are_reported_and_nothing_is_allocated() {
    for dims in [
        vec![i64::MAX, 2],
        vec![1 << 32, 1 << 32],
        vec![i64::MAX],
        vec![1 << 62],
    ] {
        let model = load(&with_tensor(TensorProto {
            dims: dims.clone(),
            ..floats("w", &[], &[1.0])
        }));
        let found = violations(&model);
        assert_eq!(
            found.iter().map(|v| v.invariant).collect::<Vec<_>>(),
            [7],
            "{dims:?}"
        );
        assert!(found[0].place.contains("initializer 'w'"), "{}", found[0]);
        let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
        let error = tensor.bytes(model.external()).unwrap_err().to_string();
        assert!(
            error.contains("tensor 'w'") && error.contains("found 4"),
            "{error}"
        );
    }
}

#[test]
fn element_types_that_have_no_data_are_refused() {
    for (code, name) in [(0, "undefined"), (99, "type#99")] {
        let tensor = TensorProto {
            data_type: Some(code),
            raw_data: None,
            ..floats("w", &[1], &[])
        };
        refused(
            &encode(&with_tensor(tensor)),
            "Malformed",
            &["tensor 'w'", name, "has no data"],
        );
    }
}

#[test]
fn strings_are_no_numbers() {
    let tensor = TensorProto {
        data_type: Some(8),
        raw_data: None,
        string_data: vec![Bytes::from_static(b"a")],
        ..floats("w", &[1], &[])
    };
    let model = load(&with_tensor(tensor));
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    assert!(matches!(&tensor.data, TensorData::Strings(list) if list.len() == 1));
    let error = tensor.bytes(model.external()).unwrap_err().to_string();
    assert!(error.contains("expected numbers, found strings"), "{error}");
}

// ---- external data ----

/// A directory with `m.onnx` that refers to external data, and 64 bytes in `w.bin`.
struct Directory {
    dir: tempfile::TempDir,
}

impl Directory {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("model")).unwrap();
        fs::write(dir.path().join("model/w.bin"), [0; 64]).unwrap();
        fs::write(dir.path().join("secret.bin"), [1; 64]).unwrap();
        Self { dir }
    }

    fn model_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("model")
    }

    /// Writes the model and reads it; nothing may change on disk.
    fn read(&self, tensors: &[TensorProto]) -> Result<duet_onnx::ir::Model, OnnxError> {
        let mut proto = nested();
        proto
            .graph
            .as_mut()
            .unwrap()
            .initializer
            .extend(tensors.iter().cloned());
        self.read_proto(&proto)
    }

    fn read_proto(&self, proto: &ModelProto) -> Result<duet_onnx::ir::Model, OnnxError> {
        let path = self.model_dir().join("m.onnx");
        fs::write(&path, encode(proto)).unwrap();
        let before = snapshot(self.dir.path());
        let result = read(&path);
        assert_eq!(
            snapshot(self.dir.path()),
            before,
            "reading changed something"
        );
        result
    }

    #[track_caller]
    fn refuses(&self, tensors: &[TensorProto], variant: &str, fragments: &[&str]) {
        let Err(error) = self.read(tensors) else {
            panic!("accepted: {fragments:?}")
        };
        let message = error.to_string();
        assert_eq!(kind(&error), variant, "{message}");
        assert!(message.contains("m.onnx: "), "{message}");
        for fragment in fragments {
            assert!(
                message.contains(fragment),
                "'{fragment}' is not in: {message}"
            );
        }
    }

    #[track_caller]
    fn refuses_location(&self, location: &str, fragments: &[&str]) {
        let tensor = external("w", &[4], &[("location", location), ("length", "16")]);
        let place = format!("external data '{location}': of tensor 'w': ");
        self.refuses(
            &[tensor],
            "External",
            &[&[place.as_str()], fragments].concat(),
        );
    }
}

fn at(name: &str, offset: &str, length: &str) -> TensorProto {
    let count: i64 = length.parse().unwrap_or(0) / 4;
    external(
        name,
        &[count],
        &[
            ("location", "w.bin"),
            ("offset", offset),
            ("length", length),
        ],
    )
}

#[test]
fn locations_outside_the_directory_are_refused() {
    let d = Directory::new();
    d.refuses_location(
        "../secret.bin",
        &["'..' is not allowed", "in or below the model's directory"],
    );
    d.refuses_location("sub/../../secret.bin", &["'..' is not allowed"]);
    // Inside after all, but no reader follows it.
    d.refuses_location("sub/../w.bin", &["'..' is not allowed"]);
    let absolute = d.dir.path().join("secret.bin");
    d.refuses_location(
        absolute.to_str().unwrap(),
        &["an absolute path is not allowed"],
    );
    let own = d.model_dir().join("w.bin");
    d.refuses_location(own.to_str().unwrap(), &["an absolute path is not allowed"]);
}

#[cfg(unix)]
#[test]
fn links_out_of_the_directory_are_refused_and_links_inside_are_not() {
    use std::os::unix::fs::symlink;
    let d = Directory::new();
    symlink("../secret.bin", d.model_dir().join("link.bin")).unwrap();
    d.refuses_location(
        "link.bin",
        &["a link that leaves the directory", "secret.bin", "cp -rL"],
    );
    symlink("..", d.model_dir().join("up")).unwrap();
    d.refuses_location("up/secret.bin", &["a link that leaves the directory"]);
    symlink("nowhere", d.model_dir().join("broken.bin")).unwrap();
    d.refuses_location("broken.bin", &["is the data file beside the model?"]);
    symlink("w.bin", d.model_dir().join("alias.bin")).unwrap();
    let alias = external("w", &[4], &[("location", "alias.bin"), ("length", "16")]);
    assert!(d.read(&[alias]).is_ok());
}

#[test]
fn locations_that_name_no_file_are_refused() {
    let d = Directory::new();
    fs::create_dir(d.model_dir().join("folder")).unwrap();
    d.refuses_location(
        "missing.bin",
        &["missing.bin", "is the data file beside the model?"],
    );
    d.refuses_location("folder", &["is no file"]);
    d.refuses_location(".", &["is no file"]);
    d.refuses_location("w.bin\0.txt", &["expected a file name"]);
    d.refuses_location("w.bin/x", &["is the data file beside the model?"]);
    d.refuses(
        &[external("w", &[4], &[("location", "")])],
        "Malformed",
        &[
            "initializer",
            "tensor 'w'",
            "external data without a location",
        ],
    );
    d.refuses(
        &[external("w", &[4], &[])],
        "Malformed",
        &["external data without a location"],
    );
}

#[test]
fn ranges_outside_the_file_are_refused() {
    let d = Directory::new();
    let huge = u64::MAX.to_string();
    let last = (u64::MAX - 3).to_string();
    d.refuses(
        &[at("w", "52", "16")],
        "External",
        &["of tensor 'w'", "52..68", "has 64", "truncated?"],
    );
    d.refuses(&[at("w", "65", "0")], "External", &["65..65", "has 64"]);
    d.refuses(
        &[at("w", &last, "16")],
        "External",
        &["offset", "overflows"],
    );
    d.refuses(&[at("w", "16", &huge)], "External", &["overflows"]);
    d.refuses(&[at("w", "0", &huge)], "External", &["has 64"]);
    for (key, text) in [
        ("offset", "-1"),
        ("length", "many"),
        ("offset", "99999999999999999999999"),
    ] {
        let tensor = external("w", &[4], &[("location", "w.bin"), (key, text)]);
        d.refuses(
            &[tensor],
            "Malformed",
            &["tensor 'w'", key, text, "is no byte count"],
        );
    }
    // Without a length, the dimensions say how much is read.
    let open = |offset: &str, count: i64| {
        external("w", &[count], &[("location", "w.bin"), ("offset", offset)])
    };
    d.refuses(&[open("52", 4)], "External", &["52..68", "has 64"]);
    d.refuses(&[open(&last, 4)], "External", &["overflows"]);
    assert!(d.read(&[open("48", 4)]).is_ok());
}

#[test]
fn a_file_that_shrinks_after_reading_is_an_error_when_it_is_asked_for() {
    let d = Directory::new();
    let model = d.read(&[at("w", "32", "32")]).unwrap();
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(d.model_dir().join("w.bin"))
        .unwrap();
    file.set_len(40).unwrap();
    let error = tensor.bytes(model.external()).unwrap_err().to_string();
    assert!(
        error.contains("32..64") && error.contains("has 40"),
        "{error}"
    );
}

#[test]
fn partly_overlapping_ranges_are_refused_and_tied_weights_are_not() {
    let d = Directory::new();
    d.refuses(
        &[at("b", "16", "16"), at("a", "8", "16")],
        "External",
        &["w.bin", "tensors 'a' (8..24) and 'b' (16..32) overlap"],
    );
    d.refuses(
        &[at("a", "0", "32"), at("b", "8", "8")],
        "External",
        &["overlap"],
    );
    d.refuses(
        &[at("a", "0", "16"), at("b", "0", "8")],
        "External",
        &["overlap"],
    );
    // Behind a pair that shares its bytes, and under another spelling of the path.
    let other = external(
        "c",
        &[4],
        &[("location", "./w.bin"), ("offset", "4"), ("length", "16")],
    );
    d.refuses(
        &[at("a", "0", "16"), at("b", "0", "16"), other],
        "External",
        &["overlap"],
    );
    let tied = [
        at("a", "0", "16"),
        at("b", "0", "16"),
        at("c", "16", "48"),
        at("none", "8", "0"),
    ];
    let model = d.read(&tied).unwrap();
    assert_eq!(violations(&model), []);
}

#[test]
fn external_data_in_node_attributes_and_bodies_is_checked_too() {
    let d = Directory::new();
    let outside = external("t", &[4], &[("location", "../secret.bin")]);
    let constant = duet_onnx::proto::NodeProto {
        attribute: vec![duet_onnx::proto::AttributeProto {
            name: Some("value".into()),
            t: Some(outside.clone()),
            r#type: Some(duet_onnx::proto::attribute_proto::AttributeType::Tensor.into()),
            ..Default::default()
        }],
        ..node("Constant", &[], &["k"])
    };
    let mut in_node = nested();
    in_node.graph.as_mut().unwrap().node.push(constant);
    let mut in_body = nested();
    in_body.graph.as_mut().unwrap().node[1].attribute[1]
        .g
        .as_mut()
        .unwrap()
        .initializer
        .push(outside);
    for (proto, tensor) in [(in_node, "Constant 'Constant_k'"), (in_body, "'t'")] {
        let error = d.read_proto(&proto).map(|_| ()).unwrap_err();
        let message = error.to_string();
        assert_eq!(kind(&error), "External");
        assert!(
            message.contains("'..' is not allowed") && message.contains(tensor),
            "{message}"
        );
    }
}

#[test]
fn a_length_that_does_not_fit_the_dimensions_breaks_invariant_8() {
    let d = Directory::new();
    let wrong = external("w", &[5], &[("location", "w.bin"), ("length", "16")]);
    let countless = external(
        "u",
        &[1 << 62, 1 << 62],
        &[("location", "w.bin"), ("offset", "16")],
    );
    let found = violations(&d.read(&[wrong, countless]).unwrap());
    assert_eq!(
        found.iter().map(|v| v.invariant).collect::<Vec<_>>(),
        [8, 8]
    );
    assert!(found[0].place.contains("initializer 'w'"), "{}", found[0]);
    assert_eq!(found[0].problem, "float[5] takes 20 bytes, length says 16");
    assert!(
        found[1].problem.contains("impossible number of elements"),
        "{}",
        found[1]
    );
}

#[test]
fn a_model_from_memory_has_no_external_data() {
    let model = load(&with_tensor(external(
        "w",
        &[4],
        &[("location", "w.bin"), ("length", "16")],
    )));
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    let error = tensor.bytes(model.external()).unwrap_err().to_string();
    assert!(
        error.contains("'w.bin'") && error.contains("not read from a directory"),
        "{error}"
    );
}

#[test]
fn paths_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.onnx");
    for path in [missing.as_path(), dir.path(), Path::new("")] {
        let error = read(path).map(|_| ()).unwrap_err();
        assert_eq!(kind(&error), "Io", "{error}");
        assert!(
            error.to_string().starts_with(&path.display().to_string()),
            "{error}"
        );
    }
    let empty = dir.path().join("empty.onnx");
    fs::write(&empty, b"").unwrap();
    let error = read(&empty).map(|_| ()).unwrap_err();
    assert_eq!(kind(&error), "Malformed", "{error}");
}
