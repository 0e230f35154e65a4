//! Malformed and hostile input: always an error that says what and where, never
//! a panic, and never a byte written.

mod common;

use std::fs;
use std::path::Path;

use bytes::Bytes;
use common::*;
use duet_onnx::arch::Role;
use duet_onnx::ir::consts::ints as ints_of;
use duet_onnx::ir::{TensorData, text, verify};
use duet_onnx::onnx::{read, read_bytes, serialize};
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

#[test]
fn lists_put_together_of_lists_a_million_times_over_are_not_read() {
    // Ten lists of ten lists, each a hundred times the one before: 10²⁰ numbers, none of which is there.
    let mut nodes = Vec::new();
    for level in 0..10 {
        let before = if level == 0 {
            "none".to_owned()
        } else {
            format!("list{}", level - 1)
        };
        let mut joined = node(
            "Concat",
            &[before.as_str(); 100],
            &[&format!("list{level}")],
        );
        joined.attribute.push(int("axis", 0));
        nodes.push(joined);
    }
    let end = [value("list9", INT64, &[0])];
    let made = graph("lists", &[], &end, &[longs("none", &[])], &nodes);
    let model = load(&model(made));
    assert_eq!(ints_of(&model, find(&model, "list9")), None);
    assert_eq!(ints_of(&model, find(&model, "none")), Some(vec![]));
}
