//! What is not touched is not moved: reading and writing keep every byte that
//! no patch was about.

mod common;

use std::collections::{BTreeSet, HashMap, HashSet};

use common::*;
use duet_onnx::ir::{DataType, Dim, GraphKind, Model, ValueType, cone, verify};
use duet_onnx::onnx::{read, read_bytes, serialize};
use duet_onnx::proto::{ModelProto, TensorProto};

/// Field numbers: of `ModelProto` and `GraphProto`.
const GRAPH: u64 = 7;
const METADATA: u64 = 14;
const NODE: u64 = 1;
const INITIALIZER: u64 = 5;
const VALUE_INFO: u64 = 13;

fn main_graph(model: &[u8]) -> Vec<u8> {
    contents(model, GRAPH).pop().expect("a graph")
}

#[test]
fn every_fixture_is_written_as_it_was_read() {
    for path in fixture_files() {
        let file = std::fs::read(&path).unwrap();
        let model = read(&path).unwrap_or_else(|e| panic!("{e}"));
        let written =
            serialize(verify(&model).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
        assert_eq!(written.len(), file.len() as u64, "{}", path.display());
        assert!(written.to_vec() == file, "{} changed", path.display());
    }
}

#[test]
fn a_metadata_patch_changes_the_metadata_alone() {
    for path in fixture_files() {
        let file = std::fs::read(&path).unwrap();
        let after = patched(&read(&path).unwrap(), |p| p.metadata("duet.test", "value"));
        let written = walk(&bytes_of(&after));
        let (new, kept): (Vec<_>, Vec<_>) = written
            .into_iter()
            .partition(|f| f.number == METADATA && text_of(&f.contents, 1) == "duet.test");
        assert_eq!(new.len(), 1);
        assert_eq!(text_of(&new[0].contents, 2), "value");
        assert!(kept == walk(&file), "{} changed elsewhere", path.display());
    }
}

#[test]
fn an_existing_metadata_entry_is_replaced_in_its_place() {
    let mut proto = small();
    for (key, value) in [("a", "1"), ("b", "2"), ("c", "3")] {
        proto
            .metadata_props
            .push(duet_onnx::proto::StringStringEntryProto {
                key: Some(key.into()),
                value: Some(value.into()),
            });
    }
    let after = patched(&load(&proto), |p| p.metadata("b", "new"));
    proto.metadata_props[1].value = Some("new".into());
    assert_eq!(decode(&bytes_of(&after)), proto);
}

/// Elements of one kind by name, with the order they come in.
fn named(graph: &[u8], number: u64, name_field: u64) -> Vec<(String, Vec<u8>)> {
    contents(graph, number)
        .into_iter()
        .map(|c| (text_of(&c, name_field), c))
        .collect()
}

/// Whether `part` is `whole` with elements left out.
fn is_subsequence(part: &[&str], whole: &[&str]) -> bool {
    let mut rest = whole.iter();
    part.iter().all(|p| rest.any(|w| w == p))
}

/// A node's fields without inputs, outputs and name.
fn rest_of(node: &[u8]) -> Vec<Vec<u8>> {
    walk(node)
        .into_iter()
        .filter(|f| !(1..=3).contains(&f.number))
        .map(|f| f.whole)
        .collect()
}

#[test]
fn a_rewrite_keeps_the_bytes_of_everything_it_does_not_touch() {
    for dir in fixture_dirs() {
        let result = rewritten(&dir, RECIPE);
        for part in &result.vlm.parts {
            let at = dir.join(&part.file).display().to_string();
            let (old, new) = (
                std::fs::read(dir.join(&part.file)).unwrap(),
                bytes_of(&part.model),
            );
            assert_ne!(old, new, "{at}: the recipe changes every file");
            untouched_elements_are_the_same(&at, &old, &new, &needed_by_inserted(&part.model));
        }
    }
}

/// Names of the nodes that an inserted node depends on: these may move up.
fn needed_by_inserted(model: &Model) -> HashSet<&str> {
    let nodes = model.graph().nodes.iter().map(|n| model.node(*n));
    let inserted: Vec<_> = nodes
        .filter(|n| n.pass.is_some())
        .flat_map(|n| n.outputs.iter().flatten().copied())
        .collect();
    let above = cone::ancestors(model, &inserted, false);
    above
        .into_iter()
        .filter_map(|v| model.producer_node(v))
        .map(|n| n.name.as_str())
        .collect()
}

fn untouched_elements_are_the_same(at: &str, old: &[u8], new: &[u8], may_move: &HashSet<&str>) {
    let head = |bytes: &[u8]| -> Vec<Field> {
        walk(bytes)
            .into_iter()
            .filter(|f| f.number != GRAPH && f.number != METADATA)
            .collect()
    };
    assert_eq!(head(old), head(new), "{at}: the model's other fields");
    let (old, new) = (main_graph(old), main_graph(new));
    // Nodes: the same bytes, or the same node with other inputs or outputs.
    let (before, after) = (named(&old, NODE, 3), named(&new, NODE, 3));
    let originals: HashMap<&str, &Vec<u8>> = before.iter().map(|(n, b)| (n.as_str(), b)).collect();
    let (mut kept, mut edited, mut inserted) = (Vec::new(), 0, 0);
    for (name, bytes) in &after {
        if name.starts_with("duet/") {
            inserted += 1;
        } else if originals.get(name.as_str()) == Some(&bytes) {
            kept.push(name.as_str());
        } else {
            edited += 1;
            let original = originals
                .get(name.as_str())
                .unwrap_or_else(|| panic!("{at}: '{name}' is new"));
            assert_eq!(
                rest_of(original),
                rest_of(bytes),
                "{at}: '{name}' beyond its inputs and outputs"
            );
        }
    }
    let all: Vec<&str> = before.iter().map(|(n, _)| n.as_str()).collect();
    // A node comes before one that preceded it only if an inserted node needs it.
    let place: HashMap<&str, usize> = all.iter().enumerate().map(|(i, n)| (*n, i)).collect();
    let mut first_behind = usize::MAX;
    for name in kept.iter().rev() {
        let moved_up = place[name] > first_behind;
        assert!(
            !moved_up || may_move.contains(name),
            "{at}: '{name}' need not move"
        );
        first_behind = first_behind.min(place[name]);
    }
    assert!(
        kept.len() >= before.len() / 2,
        "{at}: {} of {} nodes were kept",
        kept.len(),
        before.len()
    );
    assert!(inserted > 0, "{at}");
    let share = before.len() / 4 + 1;
    assert!(
        edited <= share,
        "{at}: {edited} of {} nodes were edited",
        before.len()
    );
    // Initializers and types.
    for (what, number, name_field) in [
        ("initializer", INITIALIZER, 8),
        ("value_info", VALUE_INFO, 1),
    ] {
        let (before, after) = (
            named(&old, number, name_field),
            named(&new, number, name_field),
        );
        let originals: HashSet<&Vec<u8>> = before.iter().map(|(_, b)| b).collect();
        for (name, bytes) in &after {
            let mine = name.starts_with("duet/");
            assert!(
                mine || originals.contains(bytes),
                "{at}: {what} '{name}' was changed"
            );
        }
        let order = |list: &[(String, Vec<u8>)]| -> Vec<String> {
            list.iter()
                .map(|(n, _)| n.clone())
                .filter(|n| !n.starts_with("duet/"))
                .collect()
        };
        let (before, after) = (order(&before), order(&after));
        let (before, after): (Vec<&str>, Vec<&str>) = (
            before.iter().map(String::as_str).collect(),
            after.iter().map(String::as_str).collect(),
        );
        assert!(
            is_subsequence(&after, &before),
            "{at}: {what}s changed places"
        );
    }
    // Nothing else of the graph is lost or made up.
    let others = |graph: &[u8]| -> Vec<Field> {
        walk(graph)
            .into_iter()
            .filter(|f| ![1, 5, 11, 12, 13].contains(&f.number))
            .collect()
    };
    assert_eq!(others(&old), others(&new), "{at}: the graph's other fields");
}

#[test]
fn a_rewrite_leaves_no_unread_initializer_behind() {
    for dir in fixture_dirs() {
        for part in &rewritten(&dir, RECIPE).vlm.parts {
            let old = decode(&std::fs::read(dir.join(&part.file)).unwrap())
                .graph
                .unwrap();
            let new = decode(&bytes_of(&part.model)).graph.unwrap();
            let unread = |g: &duet_onnx::proto::GraphProto| -> BTreeSet<String> {
                let read: HashSet<&String> = g.node.iter().flat_map(|n| &n.input).collect();
                let all = g.initializer.iter().filter_map(|t| t.name.clone());
                all.filter(|n| !read.contains(n)).collect()
            };
            let fresh: Vec<String> = unread(&new).difference(&unread(&old)).cloned().collect();
            assert_eq!(fresh, [""; 0], "{}", dir.join(&part.file).display());
        }
    }
}

#[test]
fn two_rewrites_give_the_same_bytes() {
    for dir in fixture_dirs() {
        let (one, two) = (rewritten(&dir, RECIPE), rewritten(&dir, RECIPE));
        for (a, b) in one.vlm.parts.iter().zip(&two.vlm.parts) {
            let same = bytes_of(&a.model) == bytes_of(&b.model);
            assert!(same, "{}", dir.join(&a.file).display());
        }
    }
}

#[test]
fn what_is_written_reads_back_as_the_same_model() {
    for dir in fixture_dirs() {
        for part in &rewritten(&dir, RECIPE).vlm.parts {
            let written = bytes_of(&part.model);
            let again = read_bytes("again", written.clone().into()).unwrap();
            assert_eq!(listing(&again), listing(&part.model));
            assert_eq!(bytes_of(&again), written);
            // Which nodes were inserted is read off their names.
            let stamped = |m: &Model| {
                let pass = |n: &duet_onnx::ir::NodeId| m.node(*n).pass.clone();
                m.graph().nodes.iter().map(pass).collect::<Vec<_>>()
            };
            assert_eq!(stamped(&again), stamped(&part.model));
        }
    }
}

// ---- unknown fields ----

/// `y = Neg(Add(x, w))` and `z = Abs(x)`.
fn small() -> ModelProto {
    let mut proto = model(graph(
        "small",
        &[value("x", FLOAT, &[2])],
        &[value("y", FLOAT, &[2]), value("z", FLOAT, &[2])],
        &[
            floats("w", &[2], &[1.0, 2.0]),
            floats("v", &[2], &[3.0, 4.0]),
        ],
        &[
            node("Add", &["x", "w"], &["a"]),
            node("Neg", &["a"], &["y"]),
            node("Abs", &["x"], &["z"]),
        ],
    ));
    let main = proto.graph.as_mut().unwrap();
    main.value_info.push(value("a", FLOAT, &[2]));
    main.node[1].attribute.push(int("k", 1));
    main.node[2].attribute.push(int("k", 2));
    proto
}

/// An unknown field: a number and a text that says where it is.
fn strange(place: &str) -> Vec<u8> {
    [number(1001, 7), delimited(1002, place.as_bytes())].concat()
}

/// Appends unknown fields to the model, its graph and everything in it.
fn with_unknown_fields(model: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in walk(model) {
        if field.number == GRAPH {
            let mut inner = Vec::new();
            for element in walk(&field.contents) {
                let place = match element.number {
                    NODE => "node",
                    INITIALIZER => "tensor",
                    11..=13 => "value",
                    _ => {
                        inner.extend(element.whole);
                        continue;
                    }
                };
                let mut contents = Vec::new();
                for part in walk(&element.contents) {
                    if place == "node" && part.number == 5 {
                        contents.extend(delimited(
                            5,
                            &[part.contents, strange("attribute")].concat(),
                        ));
                    } else {
                        contents.extend(part.whole);
                    }
                }
                contents.extend(strange(place));
                inner.extend(delimited(element.number, &contents));
            }
            inner.extend(strange("graph"));
            out.extend(delimited(GRAPH, &inner));
        } else {
            out.extend(field.whole);
        }
    }
    out.extend(strange("model"));
    out
}

fn occurrences(bytes: &[u8], place: &str) -> usize {
    let needle = strange(place);
    bytes.windows(needle.len()).filter(|w| *w == needle).count()
}

#[test]
fn fields_of_a_newer_format_survive() {
    let file = with_unknown_fields(&encode(&small()));
    let counts = [
        ("model", 1),
        ("graph", 1),
        ("node", 3),
        ("attribute", 2),
        ("tensor", 2),
        ("value", 4),
    ];
    for (place, count) in counts {
        assert_eq!(occurrences(&file, place), count, "{place}");
    }
    let before = read_bytes("strange", file.clone().into()).unwrap();
    assert_eq!(bytes_of(&before), file);
    // An edited node and a changed type next to the rest.
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[find(&before, "a")]);
        p.rewire(producer(&before, "y"), 0, new);
        p.set_type(
            find(&before, "y"),
            ValueType::tensor(DataType::Float, vec![Dim::Known(3)]),
        );
        p.metadata("k", "v");
    });
    let written = bytes_of(&after);
    for (place, count) in counts {
        // The output whose type is another is described anew.
        let count = if place == "value" { count - 1 } else { count };
        assert_eq!(occurrences(&written, place), count, "{place}");
    }
    assert_eq!(
        listing(&read_bytes("again", written.into()).unwrap()),
        listing(&after)
    );
}

#[test]
fn field_order_and_repeats_of_unusual_writers_are_kept() {
    // Graph first, a field given twice, value_info for what does not exist.
    let mut proto = small();
    proto
        .graph
        .as_mut()
        .unwrap()
        .value_info
        .push(value("nowhere", FLOAT, &[1]));
    let normal = encode(&proto);
    let (graph, others): (Vec<_>, Vec<_>) =
        walk(&normal).into_iter().partition(|f| f.number == GRAPH);
    let mut file = delimited(METADATA, &[delimited(1, b"k"), delimited(2, b"v")].concat());
    file.extend(graph[0].whole.clone());
    others.iter().for_each(|f| file.extend(f.whole.clone()));
    let before = read_bytes("unusual", file.clone().into()).unwrap();
    assert_eq!(bytes_of(&before), file);
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "z"), 0, find(&before, "a"))
    });
    let written = bytes_of(&after);
    let order = |bytes: &[u8]| walk(bytes).iter().map(|f| f.number).collect::<Vec<_>>();
    assert_eq!(order(&written), order(&file));
    let infos = named(&main_graph(&written), VALUE_INFO, 1);
    assert_eq!(
        infos.iter().map(|i| i.0.as_str()).collect::<Vec<_>>(),
        ["a", "nowhere"]
    );
}

#[test]
fn an_untouched_node_keeps_the_order_of_its_fields() {
    // Operator and outputs before the inputs, and no name at all.
    let odd = |out: &[u8]| {
        let fields = [delimited(4, b"Sqrt"), delimited(2, out), delimited(1, b"x")];
        delimited(1, &fields.concat())
    };
    let mut file = Vec::new();
    for field in walk(&encode(&small())) {
        if field.number == GRAPH {
            let inner = [odd(b"odd"), field.contents, odd(b"edited")].concat();
            file.extend(delimited(GRAPH, &inner));
        } else {
            file.extend(field.whole);
        }
    }
    let before = read_bytes("odd", file.into()).unwrap();
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "edited"), 0, find(&before, "a"));
    });
    let nodes = contents(&main_graph(&bytes_of(&after)), NODE);
    assert_eq!(delimited(1, &nodes[0]), odd(b"odd"));
    assert_ne!(delimited(1, &nodes[4]), odd(b"edited"));
    assert_eq!(contents(&nodes[4], 1), [b"a"]);
}

#[test]
fn nodes_out_of_order_are_put_in_order_where_the_graph_is_written_anew() {
    let mut proto = small();
    proto.graph.as_mut().unwrap().node.swap(0, 1);
    let before = load(&proto);
    assert_eq!(violations(&before), []);
    assert_eq!(listing(&before), ["Add(x,w)->a", "Neg(a)->y", "Abs(x)->z"]);
    // What no patch touches is not put in order either.
    assert_eq!(bytes_of(&before), encode(&proto));
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "z"), 0, find(&before, "a"));
    });
    let written = decode(&bytes_of(&after)).graph.unwrap();
    let order: Vec<&str> = written.node.iter().map(|n| n.op_type()).collect();
    assert_eq!(order, ["Add", "Neg", "Abs"]);
    // A cycle has no order: the verifier says where it is.
    proto.graph.as_mut().unwrap().node[1].input[1] = "y".into();
    let found = violations(&load(&proto));
    assert!(
        !found.is_empty() && found.iter().all(|v| v.invariant == 4),
        "{found:?}"
    );
}

// ---- typed data ----

fn tensor(dtype: DataType, dims: &[i64]) -> TensorProto {
    TensorProto {
        name: Some("t".into()),
        data_type: Some(dtype.code()),
        dims: dims.to_vec(),
        ..Default::default()
    }
}

#[test]
fn typed_data_fields_read_as_little_endian_elements() {
    use DataType as D;
    let int32 = |dtype, dims: &[i64], data: &[i32]| TensorProto {
        int32_data: data.to_vec(),
        ..tensor(dtype, dims)
    };
    let f16 = |v: f32| half::f16::from_f32(v).to_bits();
    let le16 = |all: &[u16]| {
        all.iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let cases: Vec<(TensorProto, Vec<u8>)> = vec![
        (
            TensorProto {
                float_data: vec![1.5, -2.0],
                ..tensor(D::Float, &[2])
            },
            [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat(),
        ),
        (
            TensorProto {
                double_data: vec![0.1],
                ..tensor(D::Double, &[])
            },
            0.1f64.to_le_bytes().to_vec(),
        ),
        (
            TensorProto {
                int64_data: vec![-1, i64::MAX],
                ..tensor(D::Int64, &[2])
            },
            [(-1i64).to_le_bytes(), i64::MAX.to_le_bytes()].concat(),
        ),
        (
            TensorProto {
                uint64_data: vec![u64::MAX],
                ..tensor(D::Uint64, &[1])
            },
            u64::MAX.to_le_bytes().to_vec(),
        ),
        (
            TensorProto {
                uint64_data: vec![u64::from(u32::MAX)],
                ..tensor(D::Uint32, &[1])
            },
            u32::MAX.to_le_bytes().to_vec(),
        ),
        (
            TensorProto {
                float_data: vec![1.0, 2.0],
                ..tensor(D::Complex64, &[1])
            },
            [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat(),
        ),
        (
            int32(D::Int32, &[2], &[-1, 5]),
            [(-1i32).to_le_bytes(), 5i32.to_le_bytes()].concat(),
        ),
        (int32(D::Int16, &[1], &[-2]), (-2i16).to_le_bytes().to_vec()),
        (int32(D::Uint16, &[1], &[65535]), vec![255, 255]),
        (int32(D::Int8, &[3], &[-1, 0, 127]), vec![255, 0, 127]),
        (int32(D::Uint8, &[2], &[200, 1]), vec![200, 1]),
        (int32(D::Bool, &[3], &[1, 0, 1]), vec![1, 0, 1]),
        // Half-precision values are stored as their bits.
        (
            int32(D::Float16, &[2], &[f16(1.5).into(), f16(-0.25).into()]),
            le16(&[f16(1.5), f16(-0.25)]),
        ),
        (int32(D::Bfloat16, &[1], &[0x3f80]), vec![0x80, 0x3f]),
        // Two of four bits to a byte.
        (int32(D::Int4, &[3], &[0x21, 0x03]), vec![0x21, 0x03]),
        (int32(D::Float, &[0], &[]), vec![]),
    ];
    for (proto, expected) in cases {
        let dtype = DataType::from_code(proto.data_type());
        let mut file = small();
        file.graph.as_mut().unwrap().initializer.push(proto);
        let model = load(&file);
        assert_eq!(violations(&model), [], "{dtype}");
        let tensor = model.value(find(&model, "t")).initializer.as_ref().unwrap();
        assert_eq!(tensor.bytes(model.external()).unwrap(), expected, "{dtype}");
        assert_eq!(bytes_of(&model), encode(&file), "{dtype}");
    }
    let halves = int32(D::Float16, &[2], &[f16(1.5).into(), f16(-0.25).into()]);
    let mut file = small();
    file.graph.as_mut().unwrap().initializer.push(halves);
    let model = load(&file);
    let tensor = model.value(find(&model, "t")).initializer.as_ref().unwrap();
    assert_eq!(tensor.to_f64s(model.external()).unwrap(), [1.5, -0.25]);
}

#[test]
fn typed_data_of_the_wrong_length_breaks_invariant_7() {
    let mut file = small();
    let short = TensorProto {
        float_data: vec![1.0],
        ..tensor(DataType::Float, &[2])
    };
    // Data in the field of another type counts as none.
    let misplaced = TensorProto {
        int64_data: vec![1],
        name: Some("u".into()),
        ..tensor(DataType::Float, &[1])
    };
    file.graph
        .as_mut()
        .unwrap()
        .initializer
        .extend([short, misplaced]);
    let found: Vec<u8> = violations(&load(&file))
        .iter()
        .map(|v| v.invariant)
        .collect();
    assert_eq!(found, [7, 7]);
}

#[test]
fn inline_data_is_a_slice_of_the_file() {
    let file = encode(&small());
    let model = read_bytes("m", file.clone()).unwrap();
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    let data = tensor.bytes(model.external()).unwrap();
    let range = file.as_ptr_range();
    assert!(range.contains(&data.as_ptr()), "the tensor was copied");
}

#[test]
fn kinds_of_graphs_are_told_apart() {
    // The fixtures hold no sub-graphs: tests/subgraphs.rs makes its own.
    for path in fixture_files() {
        let model = read(&path).unwrap();
        assert!(
            model.graphs().all(|(_, g)| g.kind == GraphKind::Main),
            "{}",
            path.display()
        );
    }
}
