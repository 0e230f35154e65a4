//! The text form of models against committed goldens, one file a case.
//! `DUET_BLESS=1 cargo test --test text` rewrites them.

mod common;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::*;
use duet_onnx::ir::{DataType, Dim, Model, Size, Tensor, ValueType, float, int, ints, text};
use duet_onnx::proto::{
    AttributeProto, ModelProto, NodeProto, TensorProto, attribute_proto::AttributeType,
};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/text")
        .join(format!("{name}.txt"))
}

#[track_caller]
fn check(name: &str, model: &Model) {
    assert_eq!(violations(model), [], "goldens show sound models");
    golden(&case(name), &text(model));
}

#[test]
fn sub_graphs_and_functions() {
    check("sub_graphs", &load(&nested()));
}

/// One node with an attribute of every kind.
fn attributes() -> ModelProto {
    let base = |name: &str, ty: AttributeType| AttributeProto {
        name: Some(name.into()),
        r#type: Some(ty.into()),
        ..Default::default()
    };
    let all = vec![
        AttributeProto {
            f: Some(0.1),
            ..base("a_float", AttributeType::Float)
        },
        AttributeProto {
            f: Some(1e-6),
            ..base("a_small_float", AttributeType::Float)
        },
        AttributeProto {
            f: Some(2.0),
            ..base("a_whole_float", AttributeType::Float)
        },
        common::int("an_int", -3),
        AttributeProto {
            s: Some(Bytes::from_static(b"say \"hi\"")),
            ..base("a_string", AttributeType::String)
        },
        AttributeProto {
            floats: vec![1.0, 0.5],
            ..base("floats", AttributeType::Floats)
        },
        common::ints("ints", &[1, -2]),
        AttributeProto {
            strings: vec![Bytes::from_static(b"a"), Bytes::from_static(b"b")],
            ..base("strings", AttributeType::Strings)
        },
        AttributeProto {
            t: Some(longs("", &[4, 5])),
            ..base("a_tensor", AttributeType::Tensor)
        },
    ];
    let named = NodeProto {
        domain: Some("com.example".into()),
        attribute: all,
        ..node(
            "Everything",
            &["x", "", "name with spaces"],
            &["y", "", "/layer.0/Out"],
        )
    };
    let mut proto = model(graph(
        "attributes",
        &[
            value("x", FLOAT, &[-1, 2]),
            value("name with spaces", INT64, &[]),
        ],
        &[value("y", FLOAT, &[])],
        &[],
        &[named],
    ));
    proto.opset_import.push(opset("com.example", 2));
    proto
}

#[test]
fn attributes_of_every_kind() {
    check("attributes", &load(&attributes()));
}

#[test]
fn constants_of_many_types() {
    let of = |name: &str, dtype: DataType, dims: &[i64], raw: Vec<u8>| TensorProto {
        name: Some(name.into()),
        data_type: Some(dtype.code()),
        dims: dims.to_vec(),
        raw_data: Some(raw.into()),
        ..Default::default()
    };
    let half = |v: f32| half::f16::from_f32(v).to_le_bytes().to_vec();
    let weights = [
        floats("scalar", &[], &[0.1]),
        floats("matrix", &[2, 2], &[1.0, -0.0, f32::INFINITY, f32::NAN]),
        floats("large", &[3, 3], &[0.0; 9]),
        floats("empty", &[0], &[]),
        longs("shape", &[0, -1, i64::MAX]),
        of(
            "half",
            DataType::Float16,
            &[2],
            [half(1.5), half(65504.0)].concat(),
        ),
        of(
            "double",
            DataType::Double,
            &[1],
            0.1f64.to_le_bytes().to_vec(),
        ),
        of("bytes", DataType::Uint8, &[2], vec![0, 255]),
        of("flags", DataType::Bool, &[2], vec![1, 0]),
        of("signed", DataType::Int8, &[1], vec![255]),
        of("narrow", DataType::Int4, &[3], vec![0x21, 3]),
        TensorProto {
            float_data: vec![2.5],
            raw_data: None,
            ..floats("typed", &[1], &[])
        },
        TensorProto {
            data_type: Some(DataType::String.code()),
            raw_data: None,
            string_data: vec![Bytes::from_static(b"a")],
            ..floats("words", &[1], &[])
        },
        external("outside", &[2], &[("location", "w.bin"), ("length", "8")]),
    ];
    let nodes = [node("Identity", &["scalar"], &["y"])];
    check(
        "constants",
        &load(&model(graph(
            "constants",
            &[],
            &[value("y", FLOAT, &[])],
            &weights,
            &nodes,
        ))),
    );
}

#[test]
fn a_patch_shows_where_it_inserted_what() {
    let mut proto = model(graph(
        "before",
        &[value("x", FLOAT, &[-1, 4, 8])],
        &[value("y", FLOAT, &[-1, 4, 8])],
        &[floats("w", &[8], &[1.0; 8])],
        &[
            node("Mul", &["x", "w"], &["scaled"]),
            node("Relu", &["scaled"], &["y"]),
        ],
    ));
    proto.graph.as_mut().unwrap().node[0].name = Some("/scale".into());
    let before = load(&proto);
    let scaled = find(&before, "scaled");
    let after = patched(&before, |p| {
        p.scope("select");
        let sum = p.reduce_sum(scaled, &[2], false);
        let (_, order) = p.top_k(sum, Size::Known(2), true);
        let kept = p.sort_ascending(order, Size::Known(2));
        p.name_value(kept, "kept_indices");
        let rows = p.gather_rows(scaled, kept);
        p.rewire(producer(&before, "y"), 0, rows);
        p.scope("tail");
        let leaky = p.op_with(
            "LeakyRelu",
            &[find(&before, "y")],
            vec![float("alpha", 0.25)],
        );
        let turned = p.op_with("Transpose", &[leaky], vec![ints("perm", &[0, 2, 1])]);
        let flat = p.op_with("Flatten", &[turned], vec![int("axis", 1)]);
        let one = p.constant(Tensor::float_scalar("", DataType::Float16, 1.0));
        let one = p.cast(one, DataType::Float);
        let plus = p.op("Add", &[flat, one]);
        let dims = vec![Dim::param("rows"), Dim::Unknown];
        p.replace_output(0, plus, ValueType::tensor(DataType::Float, dims));
    });
    check("patch", &after);
}

/// The lines that a pass inserted or redirected, in place of the whole model.
fn lines_of(model: &Model, pass: &str) -> String {
    let scope = format!("duet/{pass}/");
    let whole = text(model);
    let lines = whole.lines().filter(|l| l.contains(&scope));
    lines.map(|l| format!("{}\n", l.trim())).collect()
}

#[test]
fn token_merge_inserted_into_a_tower() {
    let dir = fixture_dirs()
        .into_iter()
        .find(|d| d.ends_with("ts-eager-mha"))
        .expect("the fixture");
    let result = rewritten(
        &dir,
        "version: 1\npasses:\n  - token_merge: {dominant: 20, contextual: 4}\n",
    );
    let (index, _) = result.vlm.towers().next().unwrap();
    let lines = lines_of(&result.vlm.parts[index].model, "token_merge");
    assert!(lines.lines().count() > 20, "{lines}");
    golden(&case("token_merge"), &lines);
}

#[test]
fn the_diff_of_a_golden_shows_what_changed_and_where() {
    let lines = |skip: usize, extra: &str| -> String {
        let all = (0..30)
            .filter(|i| *i != skip)
            .map(|i| format!("line {i}\n"));
        all.collect::<String>() + extra
    };
    assert_eq!(diff(&lines(99, ""), &lines(99, "")), "");
    let shown = diff(&lines(99, ""), &lines(10, "new\n"));
    let expected = "@@ -8 +8 @@\n line 7\n line 8\n line 9\n-line 10\n line 11\n line 12\n line 13\n\
                    @@ -28 +27 @@\n line 27\n line 28\n line 29\n+new\n";
    assert_eq!(shown, expected);
}
