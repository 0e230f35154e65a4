//! Each invariant is broken alone, and exactly its number has to be reported.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::load::{Loader, NodeDraft};
use super::super::model::Attribute;
use super::super::{DataType, Dim, ExternalRef, NoExternal, ValueType};
use super::*;

fn f32s(dims: &[i64]) -> Option<ValueType> {
    Some(ValueType::tensor(
        DataType::Float,
        dims.iter().map(|d| Dim::Known(*d)).collect(),
    ))
}

fn add(
    loader: &mut Loader,
    graph: GraphId,
    op: &str,
    reads: &[&str],
    writes: &str,
    held: &[GraphId],
) {
    let reads: Vec<String> = reads.iter().map(ToString::to_string).collect();
    let attributes = held.iter().enumerate().map(|(i, g)| Attribute {
        name: format!("body_{i}"),
        value: AttrValue::Graph(*g),
    });
    let draft = NodeDraft {
        name: format!("{op}_{writes}"),
        op_type: op.into(),
        domain: if op == "Twice" {
            "local".into()
        } else {
            String::new()
        },
        inputs: &reads,
        outputs: &[writes.to_owned()],
        attributes: attributes.collect(),
        overload: String::new(),
        origin: None,
        edited: false,
    };
    loader.node(graph, draft).unwrap();
}

/// ```text
/// main: h = Add(x, w); i = If(c) { a: Neg(h); b: own = Constant, Neg(own) }; y = Twice(i)
/// function Twice(a) = Add(a, a)
/// ```
fn model() -> Model {
    let mut loader = Loader::new(Arc::new(NoExternal));
    let main = loader.header().main();
    loader.header().opset_imports.push((String::new(), 17));
    loader.rename_graph(main, "main".into());
    loader.input(main, "x", f32s(&[2]), None).unwrap();
    loader.input(main, "c", f32s(&[1]), None).unwrap();
    loader
        .initializer(main, Tensor::raw("w", DataType::Float, vec![2], vec![0; 8]))
        .unwrap();
    let outside = ExternalRef {
        location: "w.bin".into(),
        offset: None,
        length: Some(16),
    };
    let mut far = Tensor::raw("far", DataType::Float, vec![2, 2], vec![]);
    far.data = TensorData::External(outside);
    loader.initializer(main, far).unwrap();
    add(&mut loader, main, "Add", &["x", "w"], "h", &[]);
    let a = loader.graph("a".into(), GraphKind::Body { parent: main });
    add(&mut loader, a, "Neg", &["h"], "in_a", &[]);
    loader.output(a, "in_a", f32s(&[2]), None);
    let b = loader.graph("b".into(), GraphKind::Body { parent: main });
    loader
        .initializer(b, Tensor::raw("own", DataType::Float, vec![2], vec![0; 8]))
        .unwrap();
    add(&mut loader, b, "Neg", &["own"], "in_b", &[]);
    loader.output(b, "in_b", f32s(&[2]), None);
    add(&mut loader, main, "If", &["c"], "i", &[a, b]);
    add(&mut loader, main, "Twice", &["i"], "y", &[]);
    loader.output(main, "y", f32s(&[2]), None);
    let body = loader.graph("Twice".into(), GraphKind::Function);
    loader.input(body, "a", None, None).unwrap();
    add(&mut loader, body, "Add", &["a", "a"], "r", &[]);
    loader.output(body, "r", None, None);
    loader.function(super::super::Function {
        domain: "local".into(),
        name: "Twice".into(),
        overload: String::new(),
        opset_imports: vec![("ai.onnx".into(), 17)],
        body,
        defaults: Vec::new(),
    });
    loader.finish()
}

fn value(model: &Model, name: &str) -> ValueId {
    let found = model.values.iter().position(|v| v.name == name);
    ValueId::new(found.unwrap_or_else(|| panic!("no value '{name}'")))
}

fn producer(model: &Model, name: &str) -> NodeId {
    model.producer_of(value(model, name)).unwrap()
}

fn body(model: &Model, name: &str) -> GraphId {
    model
        .graphs()
        .find(|(_, g)| g.name == name && g.kind != GraphKind::Main)
        .unwrap()
        .0
}

fn violations(model: &Model) -> Vec<Violation> {
    match verify(model) {
        Ok(_) => Vec::new(),
        Err(IrError::Invalid { violations }) => violations,
        Err(other) => panic!("{other}"),
    }
}

/// Breaks a sound model and expects violations of one invariant only, one of
/// them at `place` with `problem`.
#[track_caller]
fn breaks(invariant: u8, place: &str, problem: &str, change: impl FnOnce(&mut Model)) {
    let mut m = model();
    assert_eq!(violations(&m), [], "the model is sound before it is broken");
    change(&mut m);
    let found = violations(&m);
    let numbers: BTreeSet<u8> = found.iter().map(|v| v.invariant).collect();
    assert_eq!(numbers, BTreeSet::from([invariant]), "{found:#?}");
    let named = found
        .iter()
        .any(|v| v.place.contains(place) && v.problem.contains(problem));
    assert!(named, "expected '{place}': '{problem}' in {found:#?}");
}

/// Moves input `slot` of a node to another value, uses included.
fn reconnect(m: &mut Model, node: NodeId, slot: usize, to: ValueId) {
    let here = Use { node, slot };
    let old = m.node(node).inputs[slot].unwrap();
    m.values[old.index()].uses.retain(|u| *u != here);
    m.values[to.index()].uses.push(here);
    m.node_mut(node).inputs[slot] = Some(to);
}

fn set_pass(m: &mut Model, node: NodeId, name: &str) {
    let n = m.node_mut(node);
    n.pass = Some("p".into());
    n.name = name.into();
}

#[test]
fn invariant_1_what_a_node_reads_is_defined() {
    breaks(1, "Add 'Add_h'", "reads 'x'", |m| {
        let x = value(m, "x");
        m.values[x.index()].def = Def::Missing;
        m.graphs[0].inputs.retain(|v| *v != x);
    });
}

#[test]
fn invariant_1_what_a_graph_output_names_is_defined() {
    breaks(
        1,
        "graph 'main' (g0), output 'nothing'",
        "nothing defines it",
        |m| {
            let id = ValueId::new(m.values.len());
            let y = m.value(value(m, "y")).clone();
            m.values.push(Value {
                name: "nothing".into(),
                def: Def::Missing,
                uses: vec![],
                ..y
            });
            m.graphs[0].outputs.push(id);
        },
    );
}

#[test]
fn invariant_2_bodies_are_not_read_from_outside() {
    breaks(2, "Twice 'Twice_y'", "reads 'in_a' of another graph", |m| {
        let (node, inner) = (producer(m, "y"), value(m, "in_a"));
        reconnect(m, node, 0, inner);
    });
}

#[test]
fn invariant_2_bodies_do_not_read_each_other() {
    breaks(2, "Neg 'Neg_in_b'", "reads 'in_a' of another graph", |m| {
        let (node, inner) = (producer(m, "in_b"), value(m, "in_a"));
        reconnect(m, node, 0, inner);
    });
}

#[test]
fn invariant_2_functions_capture_nothing() {
    breaks(2, "Add 'Add_r'", "reads 'h' of another graph", |m| {
        let (node, outer) = (producer(m, "r"), value(m, "h"));
        reconnect(m, node, 1, outer);
    });
}

#[test]
fn invariant_3_values_have_names() {
    breaks(3, "graph 'main' (g0), value %", "has no name", |m| {
        let h = value(m, "h");
        m.values[h.index()].name.clear();
    });
}

#[test]
fn invariant_3_value_names_are_unique_in_a_graph() {
    breaks(3, "value 'x'", "defined twice", |m| {
        let h = value(m, "h");
        m.values[h.index()].name = "x".into();
    });
}

#[test]
fn invariant_3_an_inserted_node_has_a_name_of_its_own() {
    breaks(3, "duet/p/a", "the name of another node", |m| {
        let (inserted, other) = (producer(m, "h"), producer(m, "y"));
        set_pass(m, inserted, "duet/p/a");
        m.node_mut(other).name = "duet/p/a".into();
    });
    // Files repeat node names, which breaks nothing.
    let mut m = model();
    let (one, other) = (producer(&m, "h"), producer(&m, "y"));
    m.node_mut(one).name = "same".into();
    m.node_mut(other).name = "same".into();
    assert_eq!(violations(&m), []);
}

#[test]
fn invariant_4_a_node_comes_after_what_it_reads() {
    breaks(
        4,
        "Twice 'Twice_y'",
        "reads 'i' before it is computed",
        |m| {
            let last = m.graphs[0].nodes.pop().unwrap();
            m.graphs[0].nodes.insert(1, last);
        },
    );
}

#[test]
fn invariant_4_captured_values_count_as_read() {
    breaks(4, "If 'If_i'", "reads 'h' before it is computed", |m| {
        m.graphs[0].nodes.swap(0, 1);
    });
}

#[test]
fn invariant_4_a_node_does_not_read_itself() {
    breaks(4, "Add 'Add_h'", "reads 'h' before", |m| {
        let (node, h) = (producer(m, "h"), value(m, "h"));
        reconnect(m, node, 0, h);
    });
}

#[test]
fn invariant_5_every_read_is_a_recorded_use() {
    breaks(5, "Add 'Add_h'", "input 0 ('x') is no recorded use", |m| {
        let x = value(m, "x");
        m.values[x.index()].uses.clear();
    });
}

#[test]
fn invariant_5_every_recorded_use_is_a_read() {
    breaks(5, "value 'w'", "records a use by n", |m| {
        let (w, node) = (value(m, "w"), producer(m, "y"));
        m.values[w.index()].uses.push(Use { node, slot: 0 });
    });
}

#[test]
fn invariant_5_an_output_is_defined_by_its_node() {
    breaks(
        5,
        "Twice 'Twice_y'",
        "output 0 ('y') is defined elsewhere",
        |m| {
            let (y, node) = (value(m, "y"), producer(m, "h"));
            m.values[y.index()].def = Def::Node { node, slot: 1 };
        },
    );
}

#[test]
fn invariant_5_a_listed_node_exists() {
    breaks(5, "graph 'main' (g0)", "which was removed", |m| {
        let unread = NodeId::new(m.nodes.len());
        m.nodes.push(None);
        m.graphs[0].nodes.push(unread);
    });
}

#[test]
fn invariant_5_a_node_is_listed_once() {
    breaks(5, "graph 'main' (g0)", "lists a node twice", |m| {
        let last = *m.graphs[0].nodes.last().unwrap();
        m.graphs[0].nodes.push(last);
    });
}

#[test]
fn invariant_5_a_node_is_in_the_graph_that_lists_it() {
    breaks(5, "Add 'Add_h'", "says it is in g1, but g0 lists it", |m| {
        let node = producer(m, "h");
        let other = body(m, "a");
        m.node_mut(node).graph = other;
    });
}

#[test]
fn invariant_5_an_initializer_has_a_tensor() {
    breaks(5, "initializer 'w'", "has no tensor", |m| {
        let w = value(m, "w");
        m.values[w.index()].initializer = None;
    });
}

#[test]
fn invariant_6_the_operator_set_is_imported() {
    // The body of the function has its own import.
    breaks(
        6,
        "Add 'Add_h'",
        "no operator set is imported for the standard domain",
        |m| {
            m.opset_imports.clear();
        },
    );
    breaks(
        6,
        "Add 'Add_r'",
        "no operator set is imported for else.where (Add)",
        |m| {
            let node = producer(m, "r");
            m.node_mut(node).domain = "else.where".into();
        },
    );
}

#[test]
fn invariant_6_a_function_counts_under_its_own_domain_only() {
    breaks(6, "Twice 'Twice_y'", "imported for local (Twice)", |m| {
        m.functions[0].domain = "other".into();
    });
    // The function's import does not serve the main graph.
    breaks(6, "Add 'Add_h'", "imported for extra", |m| {
        m.functions[0].opset_imports.push(("extra".into(), 1));
        let (outer, inner) = (producer(m, "h"), producer(m, "r"));
        m.node_mut(outer).domain = "extra".into();
        m.node_mut(inner).domain = "extra".into();
    });
}

#[test]
fn invariant_6_runtime_operators_of_the_file_itself_are_tolerated() {
    let set_domain = |m: &mut Model, of: &str| {
        let node = producer(m, of);
        m.node_mut(node).domain = "com.microsoft".into();
        node
    };
    let mut own = model();
    set_domain(&mut own, "h");
    assert_eq!(violations(&own), []);
    // A pass may not bring them in.
    breaks(6, "duet/p/h", "imported for com.microsoft", |m| {
        let node = set_domain(m, "h");
        set_pass(m, node, "duet/p/h");
    });
}

#[test]
fn invariant_7_inline_tensors_have_the_bytes_they_declare() {
    for (dims, bytes) in [
        (vec![2], 7),
        (vec![3], 8),
        (vec![i64::MAX, 4], 8),
        (vec![-2], 8),
    ] {
        breaks(7, "initializer 'w'", "found", |m| {
            let w = value(m, "w");
            m.values[w.index()].initializer =
                Some(Tensor::raw("w", DataType::Float, dims, vec![0; bytes]));
        });
    }
    breaks(
        7,
        "initializer 'own'",
        "float[2] takes 8 bytes, found 0",
        |m| {
            let own = value(m, "own");
            m.values[own.index()].initializer =
                Some(Tensor::raw("own", DataType::Float, vec![2], vec![]));
        },
    );
}

#[test]
fn invariant_7_holds_for_attributes_and_strings() {
    breaks(
        7,
        "Add 'Add_h', attribute 'value'",
        "takes 16 bytes, found 15",
        |m| {
            let node = producer(m, "h");
            let tensor = Tensor::raw("", DataType::Int64, vec![2], vec![0; 15]);
            m.node_mut(node).attributes.push(Attribute {
                name: "value".into(),
                value: AttrValue::Tensor(tensor),
            });
        },
    );
    breaks(7, "initializer 'w'", "does not have 1 elements", |m| {
        let w = value(m, "w");
        let mut tensor = Tensor::raw("w", DataType::String, vec![2], vec![]);
        tensor.data = TensorData::Strings(vec![bytes::Bytes::from_static(b"one")]);
        m.values[w.index()].initializer = Some(tensor);
    });
}

fn set_external(m: &mut Model, dims: Vec<i64>, length: Option<u64>) {
    let far = value(m, "far");
    let reference = ExternalRef {
        location: "w.bin".into(),
        offset: None,
        length,
    };
    let tensor = m.values[far.index()].initializer.as_mut().unwrap();
    tensor.data = TensorData::External(reference);
    tensor.dims = dims;
}

#[test]
fn invariant_8_external_lengths_fit_the_dimensions() {
    let at = "initializer 'far'";
    breaks(8, at, "float[2, 2] takes 16 bytes, length says 15", |m| {
        set_external(m, vec![2, 2], Some(15))
    });
    breaks(8, at, "impossible number", |m| {
        set_external(m, vec![i64::MAX, i64::MAX], None)
    });
    breaks(8, at, "impossible number", |m| {
        set_external(m, vec![-1], Some(4))
    });
    // Elements can be counted, their bits cannot.
    breaks(8, at, "impossible number", |m| {
        set_external(m, vec![1 << 40, 1 << 20], Some(16))
    });
    let mut unsaid = model();
    set_external(&mut unsaid, vec![2, 2], None);
    assert_eq!(violations(&unsaid), []);
}

#[test]
fn invariant_9_a_body_names_the_graph_of_its_holder() {
    breaks(9, "If 'If_i'", "whose parent is another graph", |m| {
        let (a, b) = (body(m, "a"), body(m, "b"));
        m.graphs[b.index()].kind = GraphKind::Body { parent: a };
    });
}

#[test]
fn invariant_9_a_body_has_one_holder() {
    breaks(9, "g2", "2 nodes hold it", |m| {
        let (b, node) = (body(m, "b"), producer(m, "y"));
        m.node_mut(node).attributes.push(Attribute {
            name: "again".into(),
            value: AttrValue::Graphs(vec![b]),
        });
    });
    breaks(9, "g2", "0 nodes hold it", |m| {
        let node = producer(m, "i");
        m.node_mut(node).attributes.pop();
    });
}

#[test]
fn invariant_10_the_interface_is_typed() {
    for name in ["x", "y"] {
        breaks(
            10,
            &format!("graph 'main' (g0), '{name}'"),
            "has no type",
            |m| {
                let id = value(m, name);
                m.values[id.index()].ty = None;
            },
        );
    }
}

#[test]
fn invariant_11_inserted_nodes_lie_under_the_name_scope() {
    for name in ["Add_h", "", "duet", "x/duet/p"] {
        breaks(11, "Add", "inserted by a pass", |m| {
            let node = producer(m, "h");
            set_pass(m, node, name);
        });
    }
}

#[test]
fn every_violation_is_reported_not_only_the_first() {
    let mut m = model();
    m.opset_imports.clear();
    let (w, y) = (value(&m, "w"), value(&m, "y"));
    m.values[w.index()].initializer = Some(Tensor::raw("w", DataType::Float, vec![9], vec![0; 8]));
    m.values[y.index()].ty = None;
    set_external(&mut m, vec![2, 2], Some(1));
    m.graphs[0].nodes.swap(0, 1);
    let found = violations(&m);
    let numbers: Vec<u8> = found.iter().map(|v| v.invariant).collect();
    let distinct: BTreeSet<u8> = numbers.iter().copied().collect();
    assert_eq!(distinct, BTreeSet::from([4, 6, 7, 8, 10]), "{found:#?}");
    // Add, Neg, Neg and If of the model; the function has its own import.
    assert_eq!(numbers.iter().filter(|n| **n == 6).count(), 4, "{found:#?}");
    let shown = verify(&m).unwrap_err().to_string();
    for v in &found {
        assert!(shown.contains(&v.to_string()), "{shown}");
    }
}

#[test]
fn a_long_report_says_how_much_it_leaves_out() {
    let mut m = model();
    let node = producer(&m, "h");
    for i in 0..40 {
        m.node_mut(node).attributes.push(Attribute {
            name: format!("t{i}"),
            value: AttrValue::Tensor(Tensor::raw("", DataType::Int8, vec![2], vec![0])),
        });
    }
    let shown = verify(&m).unwrap_err().to_string();
    assert!(
        shown.starts_with("the model breaks 40 invariant(s):"),
        "{shown}"
    );
    assert!(shown.ends_with("and 20 more"), "{shown}");
}
