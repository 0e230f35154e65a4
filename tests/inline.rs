//! Inlining model-local functions: the same numbers, names that do not meet, and
//! nothing moved that cannot be.

mod common;
mod support;

use std::collections::BTreeSet;

use common::*;
use duet_onnx::ir::{Model, inline, verify};
use duet_onnx::proto::{
    AttributeProto, FunctionProto, ModelProto, NodeProto, attribute_proto::AttributeType,
};
use duet_onnx::runtime::{Tensor, Value};

fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: &[NodeProto]) -> FunctionProto {
    let all = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    FunctionProto {
        name: Some(name.into()),
        domain: Some("local".into()),
        input: all(inputs),
        output: all(outputs),
        opset_import: vec![opset("", 17)],
        node: nodes.to_vec(),
        ..Default::default()
    }
}

fn call(name: &str, function: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        name: Some(name.into()),
        domain: Some("local".into()),
        ..node(function, inputs, outputs)
    }
}

/// `x → y` of two floats by these nodes and functions.
fn file(nodes: &[NodeProto], functions: &[FunctionProto]) -> ModelProto {
    let mut proto = model(graph("main", &[two("x")], &[two("y")], &[], nodes));
    proto.opset_import.push(opset("local", 1));
    proto.functions = functions.to_vec();
    proto
}

fn refer(name: &str, parameter: &str, ty: AttributeType) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        r#type: Some(ty.into()),
        ref_attr_name: Some(parameter.into()),
        ..Default::default()
    }
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        f: Some(value),
        r#type: Some(AttributeType::Float.into()),
        ..Default::default()
    }
}

fn with(mut node: NodeProto, attributes: &[AttributeProto]) -> NodeProto {
    node.attribute.extend_from_slice(attributes);
    node
}

fn every(model: &Model) -> BTreeSet<usize> {
    (0..model.functions.len()).collect()
}

fn inlined(proto: &ModelProto) -> Model {
    let model = load(proto);
    inline(&model, &every(&model)).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(proto: &ModelProto) -> String {
    let model = load(proto);
    inline(&model, &every(&model)).unwrap_err().to_string()
}

fn run(model: &Model) -> Vec<f32> {
    let mut session = support::models::open(model, std::path::Path::new("test"));
    let x = Value::new(Tensor::new([2], vec![0.3f32, -1.7]).unwrap()).unwrap();
    let outputs = session.run(&[("x", &x)]).unwrap_or_else(|e| panic!("{e}"));
    outputs.get("y").unwrap().f32s().unwrap().to_vec()
}

/// Inlined, it computes what ONNX Runtime makes of the functions.
fn same(proto: &ModelProto) -> Model {
    let open = inlined(proto);
    verify(&open).unwrap();
    assert!(open.functions.is_empty());
    let decoded = decode(&bytes_of(&open));
    assert!(
        decoded.functions.is_empty(),
        "no function is left in the file"
    );
    assert_eq!(run(&open), run(&load(proto)));
    // What was written is what is in memory.
    assert_eq!(bytes_of(&load(&decoded)), bytes_of(&open));
    open
}

fn names(model: &Model) -> Vec<String> {
    let nodes = model
        .graph()
        .nodes
        .iter()
        .map(|n| model.node(*n).name.clone());
    nodes.collect()
}

#[test]
fn two_calls_of_one_function_do_not_meet() {
    let add = function(
        "Scaled",
        &["a", "b"],
        &["r"],
        &[
            node("Mul", &["a", "b"], &["t"]),
            node("Add", &["t", "b"], &["r"]),
        ],
    );
    let proto = file(
        &[
            call("first", "Scaled", &["x", "x"], &["t"]),
            call("second", "Scaled", &["t", "x"], &["u"]),
            call("", "Scaled", &["u", "t"], &["y"]),
        ],
        &[add],
    );
    let open = same(&proto);
    assert_eq!(
        names(&open),
        [
            "first/Mul_t",
            "first/Add_r",
            "second/Mul_t",
            "second/Add_r",
            "Scaled/Mul_t",
            "Scaled/Add_r"
        ]
    );
    // The caller's names stay, inner ones get the call's.
    for name in ["t", "u", "y", "first/t", "second/t", "Scaled/t"] {
        assert!(open.find(name).is_some(), "{name}");
    }
}

#[test]
fn a_prefix_avoids_names_that_exist() {
    let f = function(
        "F",
        &["a"],
        &["r"],
        &[node("Neg", &["a"], &["t"]), node("Exp", &["t"], &["r"])],
    );
    let mut taken = node("Abs", &["x"], &["c/t"]);
    taken.name = Some("c/Neg_t".into());
    let open = same(&file(&[taken, call("c", "F", &["c/t"], &["y"])], &[f]));
    assert_eq!(names(&open), ["c/Neg_t", "c_2/Neg_t", "c_2/Exp_r"]);
}

#[test]
fn attributes_come_from_the_call_the_default_or_nowhere() {
    let leaky = |parameter: &str| {
        with(
            node("LeakyRelu", &["a"], &["r"]),
            &[refer("alpha", parameter, AttributeType::Float)],
        )
    };
    let mut f = function("F", &["a"], &["r"], &[leaky("slope")]);
    f.attribute_proto.push(float("slope", 0.5));
    let mut g = function("G", &["a"], &["r"], &[leaky("slope")]);
    g.attribute.push("slope".into());
    // G's attribute given on by the function around it.
    let mut h = function(
        "H",
        &["a"],
        &["r"],
        &[with(
            call("inner", "G", &["a"], &["r"]),
            &[refer("slope", "outer", AttributeType::Float)],
        )],
    );
    h.opset_import.push(opset("local", 1));
    h.attribute.push("outer".into());
    let proto = file(
        &[
            call("default", "F", &["x"], &["a"]),
            with(call("given", "F", &["a"], &["b"]), &[float("slope", 0.25)]),
            with(call("on", "H", &["b"], &["c"]), &[float("outer", 2.0)]),
            with(call("direct", "G", &["c"], &["y"]), &[float("slope", 3.0)]),
        ],
        &[f, g, h],
    );
    let open = same(&proto);
    let slopes: Vec<Option<f32>> = open
        .graph()
        .nodes
        .iter()
        .map(|n| open.node(*n).attr_float("alpha"))
        .collect();
    assert_eq!(slopes, [Some(0.5), Some(0.25), Some(2.0), Some(3.0)]);
    assert_eq!(names(&open)[2], "on/inner/LeakyRelu_r");
    // Not given and without a default: left out, so the operator's own holds.
    let mut proto = proto;
    proto.graph.as_mut().unwrap().node[3].attribute.clear();
    let open = inlined(&proto);
    let last = *open.graph().nodes.last().unwrap();
    assert!(open.node(last).attributes.is_empty());
}

#[test]
fn optional_inputs_and_outputs_may_be_left_out() {
    let clip = function(
        "Bounded",
        &["a", "low", "high"],
        &["r", "count"],
        &[
            node("Clip", &["a", "low", "high"], &["r"]),
            node("Size", &["r"], &["count"]),
        ],
    );
    let mut proto = file(
        &[call("c", "Bounded", &["x", "", "top"], &["y", ""])],
        &[clip],
    );
    let graph = proto.graph.as_mut().unwrap();
    graph.initializer.push(floats("top", &[], &[0.1]));
    let open = same(&proto);
    let clip = open.node(producer(&open, "y"));
    assert_eq!(clip.inputs.len(), 3);
    assert!(clip.input(1).is_none() && clip.input(2).is_some());
    assert!(
        open.find("c/count").is_some(),
        "an output that the call leaves out"
    );
}

#[test]
fn inputs_given_out_and_outputs_given_twice_pass_through() {
    let f = function(
        "F",
        &["a"],
        &["p", "q", "a"],
        &[node("Neg", &["a"], &["p"]), node("Exp", &["p"], &["q"])],
    );
    let mut twice = f.clone();
    twice.name = Some("Twice".into());
    twice.output = vec!["p".into(), "p".into()];
    let proto = file(
        &[
            call("f", "F", &["x"], &["m", "n", "o"]),
            call("t", "Twice", &["o"], &["v", "w"]),
            node("Sum", &["m", "n", "v", "w"], &["y"]),
        ],
        &[f, twice],
    );
    // ONNX Runtime does not take such functions, so the numbers are given here.
    let open = inlined(&proto);
    verify(&open).unwrap();
    let expected = [0.3f32, -1.7].map(|x| (-x).exp() - 3.0 * x);
    for (found, want) in run(&open).iter().zip(expected) {
        assert!((found - want).abs() < 1e-5, "{found}, expected {want}");
    }
}

#[test]
fn bodies_inside_functions_come_along() {
    let choice = holder(
        "If",
        &["c"],
        &["r"],
        &[
            ("then_branch", negates("t", "a", "then_out")),
            ("else_branch", {
                let mut other = negates("e", "own", "else_out");
                other.initializer.push(floats("own", &[2], &[1.0, 2.0]));
                other
            }),
        ],
    );
    let zero = with(
        node("Constant", &[], &["zero"]),
        &[float("value_float", 0.0)],
    );
    let f = function(
        "Chosen",
        &["a"],
        &["r"],
        &[
            node("ReduceSum", &["a"], &["total"]),
            zero,
            node("Greater", &["total", "zero"], &["many"]),
            node("Squeeze", &["many"], &["c"]),
            choice,
        ],
    );
    let proto = file(
        &[
            call("one", "Chosen", &["x"], &["u"]),
            call("two", "Chosen", &["u"], &["y"]),
        ],
        &[f],
    );
    let open = same(&proto);
    let bodies: Vec<Vec<String>> = open
        .graphs()
        .filter(|(id, _)| *id != open.main())
        .map(|(_, g)| g.outputs.iter().map(|v| open.name(*v).to_owned()).collect())
        .collect();
    let all: BTreeSet<&String> = bodies.iter().flatten().collect();
    assert_eq!(all.len(), 4, "{bodies:?}");
    assert!(
        all.iter()
            .all(|n| n.starts_with("one/") || n.starts_with("two/"))
    );
}

#[test]
fn calls_inside_bodies_are_replaced_there() {
    let proto = nested_call();
    let open = inlined(&proto);
    verify(&open).unwrap();
    let decoded = decode(&bytes_of(&open));
    let choice = &decoded.graph.as_ref().unwrap().node[1];
    let then = choice.attribute[0].g.as_ref().unwrap();
    assert_eq!(then.node[0].op_type(), "Neg");
    assert_eq!(then.node[0].name(), "inner/Neg_r");
    // The other branch has no call, and keeps its bytes.
    assert_eq!(
        choice.attribute[1],
        proto.graph.as_ref().unwrap().node[1].attribute[1]
    );
}

/// `nested` with its function called in the first branch of the `If` as well.
fn nested_call() -> ModelProto {
    let mut proto = nested();
    proto.functions[0].node = vec![node("Neg", &["a"], &["r"])];
    let main = proto.graph.as_mut().unwrap();
    let then = main.node[1].attribute[0].g.as_mut().unwrap();
    then.node = vec![call("inner", "Twice", &["o"], &["t_out"])];
    proto
}

#[test]
fn only_what_is_asked_for_is_inlined() {
    let f = function("F", &["a"], &["r"], &[node("Neg", &["a"], &["r"])]);
    let mut g = function("G", &["a"], &["r"], &[call("in_g", "F", &["a"], &["r"])]);
    g.opset_import.push(opset("local", 1));
    let dead = function("Dead", &["a"], &["r"], &[node("Exp", &["a"], &["r"])]);
    let proto = file(
        &[
            call("f", "F", &["x"], &["t"]),
            call("g", "G", &["t"], &["y"]),
        ],
        &[f, g, dead],
    );
    let model = load(&proto);
    let open = inline(&model, &BTreeSet::from([0])).unwrap();
    verify(&open).unwrap();
    // G still calls F, and what nothing called is not this change's business.
    let left: Vec<String> = decode(&bytes_of(&open))
        .functions
        .iter()
        .map(|f| f.name().to_owned())
        .collect();
    assert_eq!(left, ["F", "G", "Dead"]);
    assert_eq!(open.functions.len(), 3);
    assert_eq!(run(&open), run(&model));
    let open = inline(&model, &BTreeSet::from([0, 1])).unwrap();
    assert_eq!(open.functions.len(), 1);
    assert_eq!(run(&open), run(&model));
}

#[test]
fn overloads_are_told_apart() {
    let one = function("F", &["a"], &["r"], &[node("Neg", &["a"], &["r"])]);
    let mut two = function("F", &["a"], &["r"], &[node("Exp", &["a"], &["r"])]);
    two.overload = Some("second".into());
    let mut second = call("b", "F", &["t"], &["y"]);
    second.overload = Some("second".into());
    let mut proto = file(
        &[call("a", "F", &["x"], &["t"]), second.clone()],
        &[one, two],
    );
    proto.ir_version = Some(10);
    let open = same(&proto);
    assert_eq!(names(&open), ["a/Neg_r", "b/Exp_r"]);
    // An overload that no function has is no call of the other.
    second.overload = Some("third".into());
    proto.graph.as_mut().unwrap().node[1] = second;
    let model = load(&proto);
    assert!(!model.is_function(model.node(producer(&model, "y"))));
}

#[test]
fn operator_sets_of_functions_are_added_or_must_agree() {
    let mut f = function(
        "F",
        &["a"],
        &["r"],
        &[node("Neg", &["a"], &["t"]), {
            let mut gelu = node("FastGelu", &["t"], &["r"]);
            gelu.domain = Some("com.microsoft".into());
            gelu
        }],
    );
    f.opset_import.push(opset("com.microsoft", 1));
    f.opset_import.push(opset("unused", 9));
    let proto = file(&[call("f", "F", &["x"], &["y"])], &[f.clone()]);
    let open = same(&proto);
    let added = decode(&bytes_of(&open)).opset_import;
    let added: Vec<(&str, i64)> = added.iter().map(|o| (o.domain(), o.version())).collect();
    assert_eq!(added, [("", 17), ("local", 1), ("com.microsoft", 1)]);
    f.opset_import[0] = opset("", 13);
    let message = refused(&file(&[call("f", "F", &["x"], &["y"])], &[f]));
    for part in ["local::F", "Node 'f'", "ai.onnx 13", "the model 17"] {
        let part = part.replace("Node 'f'", "F 'f'");
        assert!(message.contains(&part), "'{part}' is not in: {message}");
    }
}

#[test]
fn what_cannot_be_inlined_is_refused_by_name() {
    let mut f = function("F", &["a"], &["r"], &[call("again", "F", &["a"], &["r"])]);
    f.opset_import.push(opset("local", 1));
    let message = refused(&file(&[call("f", "F", &["x"], &["y"])], &[f]));
    assert!(message.contains("calls itself"), "{message}");

    let f = function("F", &["a"], &["r"], &[node("Neg", &["a"], &["r"])]);
    let message = refused(&file(&[call("f", "F", &["x", "x"], &["y"])], &[f]));
    assert!(message.contains("the call has 2 and 1"), "{message}");

    let f = function("F", &["a", "b"], &["b"], &[node("Neg", &["a"], &["r"])]);
    let message = refused(&file(&[call("f", "F", &["x"], &["y"])], &[f]));
    assert!(
        message.contains("an input that the call leaves out"),
        "{message}"
    );
}
