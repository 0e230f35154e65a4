//! Taking an `If` apart and putting it together: nothing is lost, changes of a
//! branch arrive in the outer graph, and what does not fit is refused by name.

mod common;
mod support;

use common::*;
use duet_onnx::ir::{Branch, DataType, Dim, Model, NodeId, Patch, ValueType, join, split, verify};
use duet_onnx::onnx::read_bytes;
use duet_onnx::proto::{AttributeProto, ModelProto, attribute_proto::AttributeType};
use duet_onnx::runtime::{Tensor, Value};

/// ```text
/// w, spare: weights of the outer graph; k = Constant
/// y, z = If(c) { then: p = x + w; y = p · k; z = −p } { else: y = x · k; z = e + x }
/// ```
/// `e` is a weight of the branch.
fn choice() -> ModelProto {
    let mut constant = node("Constant", &[], &["k"]);
    constant.attribute.push(AttributeProto {
        name: Some("value_float".into()),
        f: Some(3.0),
        r#type: Some(AttributeType::Float.into()),
        ..Default::default()
    });
    let then = graph(
        "t",
        &[],
        &[two("t_y"), two("t_z")],
        &[],
        &[
            node("Add", &["x", "w"], &["p"]),
            node("Mul", &["p", "k"], &["t_y"]),
            node("Neg", &["p"], &["t_z"]),
        ],
    );
    let other = graph(
        "e",
        &[],
        &[two("e_y"), two("e_z")],
        &[floats("e", &[2], &[5.0, 6.0])],
        &[
            node("Mul", &["x", "k"], &["e_y"]),
            node("Add", &["e", "x"], &["e_z"]),
        ],
    );
    let bodies = [("then_branch", then), ("else_branch", other)];
    model(graph(
        "main",
        &[two("x"), value("c", BOOL, &[])],
        &[two("y"), two("z")],
        &[
            floats("w", &[2], &[1.0, 2.0]),
            floats("spare", &[2], &[0.0, 0.0]),
        ],
        &[constant, holder("If", &["c"], &["y", "z"], &bodies)],
    ))
}

fn apart(proto: &ModelProto) -> (Model, NodeId, Vec<Branch>) {
    let model = load(proto);
    let node = producer(&model, "y");
    let branches = split(&model, node).unwrap_or_else(|e| panic!("{e}"));
    branches.iter().for_each(|b| {
        verify(&b.model).unwrap();
    });
    (model, node, branches)
}

fn together(whole: &Model, node: NodeId, branches: &[Branch]) -> Model {
    let joined = join(whole, node, branches).unwrap_or_else(|e| panic!("{e}"));
    // What is written reads back as the same.
    let bytes = bytes_of(&joined);
    assert_eq!(
        bytes_of(&read_bytes("again", bytes.clone().into()).unwrap()),
        bytes
    );
    joined
}

fn run(model: &Model, c: bool) -> Vec<Vec<f32>> {
    let mut session = support::models::open(model, std::path::Path::new("test"));
    let x = Value::new(Tensor::new([2], vec![0.5f32, -1.0]).unwrap()).unwrap();
    let c = Value::new(Tensor::new(vec![0usize; 0], vec![c]).unwrap()).unwrap();
    let outputs = session
        .run(&[("x", &x), ("c", &c)])
        .unwrap_or_else(|e| panic!("{e}"));
    let all = outputs.iter().map(|(_, v)| v.f32s().unwrap().to_vec());
    all.collect()
}

#[test]
fn branches_are_models_of_their_own() {
    let (_, _, branches) = apart(&choice());
    let names = |m: &Model, list: &[duet_onnx::ir::ValueId]| -> Vec<String> {
        list.iter().map(|v| m.name(*v).to_owned()).collect()
    };
    let [then, other] = branches.as_slice() else {
        panic!("two branches");
    };
    assert_eq!(
        (then.attribute.as_str(), other.attribute.as_str()),
        ("then_branch", "else_branch")
    );
    for (branch, weights) in [(then, "w"), (other, "e")] {
        let graph = branch.model.graph();
        assert_eq!(
            names(&branch.model, &graph.inputs),
            ["x"],
            "what it captures"
        );
        assert_eq!(
            names(&branch.model, &graph.outputs),
            ["y", "z"],
            "the outer names"
        );
        assert_eq!(names(&branch.model, &graph.initializers), [weights]);
        assert!(branch.model.find("k").is_some());
    }
}

#[test]
fn put_together_unchanged_it_is_the_same_file() {
    let proto = choice();
    let (model, node, branches) = apart(&proto);
    let joined = together(&model, node, &branches);
    assert_eq!(decode(&bytes_of(&joined)), proto);
    for c in [true, false] {
        assert_eq!(run(&joined, c), run(&model, c));
    }
}

#[test]
fn changes_of_the_branches_arrive_in_the_outer_graph() {
    let (model, node, mut branches) = apart(&choice());
    let wide = ValueType::tensor(DataType::Float, vec![Dim::param("n")]);
    let b = ValueType::tensor(DataType::Bool, vec![Dim::Unknown]);
    for (branch, factor) in branches.iter_mut().zip([2.0, 7.0]) {
        let mut patch = Patch::new(&branch.model, "t");
        patch.set_type(branch.model.input("x").unwrap(), wide.clone());
        let mask = patch.add_input("mask", b.clone());
        let factor = patch.f32(factor);
        let y = branch.model.output("y").unwrap();
        let scaled = patch.op("Mul", &[y, factor]);
        let chosen = patch.op("Where", &[mask, scaled, y]);
        patch.replace_output(0, chosen, wide.clone());
        patch.metadata("k", "v");
        let plan = patch.finish();
        branch.model = branch.model.clone().apply(plan).unwrap();
    }
    let joined = together(&model, node, &branches);
    let file = decode(&bytes_of(&joined));
    let graph = file.graph.as_ref().unwrap();
    let inputs: Vec<&str> = graph.input.iter().map(|i| i.name()).collect();
    assert_eq!(inputs, ["x", "c", "mask"]);
    assert_eq!(
        joined.value(joined.input("x").unwrap()).ty,
        Some(wide.clone())
    );
    assert_eq!(joined.value(joined.output("y").unwrap()).ty, Some(wide));
    let untouched = joined.value(joined.output("z").unwrap()).ty.clone();
    assert_eq!(
        untouched,
        Some(ValueType::tensor(DataType::Float, vec![Dim::Known(2)]))
    );
    assert_eq!(file.metadata_props.len(), 1);
    for (attribute, own) in graph.node[1].attribute.iter().zip([vec![], vec!["e"]]) {
        let body = attribute.g.as_ref().unwrap();
        let names = body.initializer.iter().map(|t| t.name());
        let (ours, theirs): (Vec<&str>, Vec<&str>) = names.partition(|n| n.starts_with("duet/"));
        assert_eq!((ours.len(), theirs), (1, own));
    }
}

#[test]
fn weights_that_no_branch_reads_any_more_leave() {
    let (model, node, mut branches) = apart(&choice());
    let then = &mut branches[0].model;
    let (x, p) = (then.input("x").unwrap(), then.find("p").unwrap());
    let mut patch = Patch::new(then, "t");
    let same = patch.op("Abs", &[x]);
    patch.rewire_all(p, same);
    let plan = patch.finish();
    *then = then.clone().apply(plan).unwrap();
    let joined = together(&model, node, &branches);
    assert!(joined.find("w").is_none());
    assert!(joined.find("spare").is_some(), "nothing read it before");
    assert_eq!(run(&joined, true), [[1.5, 3.0], [-0.5, -1.0]]);
    assert_eq!(run(&joined, false), run(&model, false));
}

#[test]
fn further_outputs_are_the_nodes_and_the_graphs() {
    let (model, node, mut branches) = apart(&choice());
    for branch in &mut branches {
        let mut patch = Patch::new(&branch.model, "t");
        let z = branch.model.output("z").unwrap();
        let seen = patch.op("Abs", &[z]);
        patch.name_value(seen, "seen");
        patch.add_output(
            seen,
            ValueType::tensor(DataType::Float, vec![Dim::Known(2)]),
        );
        let plan = patch.finish();
        branch.model = branch.model.clone().apply(plan).unwrap();
    }
    let joined = together(&model, node, &branches);
    for c in [true, false] {
        let outputs = run(&joined, c);
        assert_eq!(outputs.len(), 3);
        assert_eq!(
            outputs[2],
            outputs[1].iter().map(|v| v.abs()).collect::<Vec<_>>()
        );
    }
    branches[1] = apart(&choice()).2.remove(1);
    let message = join(&model, node, &branches).unwrap_err().to_string();
    assert!(
        message.contains("other outputs than the other branch"),
        "{message}"
    );
}

#[test]
fn what_cannot_be_taken_apart_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut ModelProto)| {
        let mut proto = choice();
        change(&mut proto);
        let model = load(&proto);
        let is_if = |n: &&NodeId| model.node(**n).is("If");
        let node = *model.graph().nodes.iter().find(is_if).unwrap();
        split(&model, node).unwrap_err().to_string()
    };
    let outside = refused(&|p| {
        let graph = p.graph.as_mut().unwrap();
        graph.node.insert(0, node("Abs", &["x"], &["a"]));
        let then = graph.node[2].attribute[0].g.as_mut().unwrap();
        then.node[0].input[0] = "a".into();
    });
    assert!(
        outside.contains("reads 'a', which Abs 'Abs_a' computes outside"),
        "{outside}"
    );
    let behind = refused(&|p| {
        let graph = p.graph.as_mut().unwrap();
        graph.node.push(node("Neg", &["z"], &["last"]));
        graph.output.push(two("last"));
    });
    assert!(
        behind.contains("'last'") && behind.contains("outside of If"),
        "{behind}"
    );
    let given = refused(&|p| {
        let graph = p.graph.as_mut().unwrap();
        let then = graph.node[1].attribute[0].g.as_mut().unwrap();
        then.output[1] = two("x");
    });
    assert!(given.contains("'x' is not computed in it"), "{given}");
}
