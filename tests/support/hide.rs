//! Hiding an exported decoder: in the branches of an `If`, in functions, in a loop.

use super::common::{self, holder, int, longs, node, opset, value};
use duet_onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto,
    attribute_proto::AttributeType,
};

fn past(name: &str) -> bool {
    name.starts_with("past_key_values.")
}

/// The graph's nodes without a cache coming in: each past is an empty tensor that
/// the nodes make from the embeddings' batch size.
fn without_past(graph: &GraphProto) -> Vec<NodeProto> {
    let constant = |name: &str, values: &[i64]| {
        let mut made = node("Constant", &[], &[name]);
        made.attribute.push(AttributeProto {
            name: Some("value".into()),
            t: Some(longs("", values)),
            r#type: Some(AttributeType::Tensor.into()),
            ..Default::default()
        });
        made
    };
    let fresh = |name: &str| format!("empty/{name}");
    let mut nodes = vec![
        node("Shape", &["inputs_embeds"], &["empty/shape"]),
        constant("empty/zero", &[0]),
    ];
    let mut batch = node("Gather", &["empty/shape", "empty/zero"], &["empty/batch"]);
    batch.attribute.push(int("axis", 0));
    nodes.push(batch);
    for input in graph.input.iter().filter(|i| past(i.name())) {
        let shape = duet_shape(input);
        let (rest, all) = (
            fresh(&format!("{}/rest", input.name())),
            fresh(&format!("{}/shape", input.name())),
        );
        nodes.push(constant(&rest, &[shape[1], 0, shape[3]]));
        let mut joined = node("Concat", &["empty/batch", &rest], &[&all]);
        joined.attribute.push(int("axis", 0));
        nodes.push(joined);
        nodes.push(node("ConstantOfShape", &[&all], &[&fresh(input.name())]));
    }
    let renamed = graph.node.iter().cloned().map(|mut n| {
        for input in n.input.iter_mut().filter(|i| past(i)) {
            *input = fresh(input);
        }
        n
    });
    nodes.extend(renamed);
    nodes
}

/// Dimensions of an input; −1 where they are not known.
fn duet_shape(input: &duet_onnx::proto::ValueInfoProto) -> Vec<i64> {
    use duet_onnx::proto::{tensor_shape_proto::dimension::Value, type_proto};
    let Some(type_proto::Value::TensorType(t)) =
        input.r#type.as_ref().and_then(|t| t.value.as_ref())
    else {
        panic!("{} is no tensor", input.name());
    };
    let dims = t.shape.iter().flat_map(|s| &s.dim);
    dims.map(|d| match d.value {
        Some(Value::DimValue(n)) => n,
        _ => -1,
    })
    .collect()
}

/// The decoder merged as old exporters do: one `If` on `use_cache_branch`, a
/// branch without a past and one with, weights in the outer graph.
pub(crate) fn merged(plain: &ModelProto) -> ModelProto {
    let mut file = plain.clone();
    let graph = file.graph.as_mut().unwrap();
    let body = |name: &str, nodes: Vec<NodeProto>| GraphProto {
        name: Some(name.into()),
        node: nodes,
        output: graph.output.clone(),
        ..Default::default()
    };
    let branches = [
        ("else_branch", body("no_past", without_past(graph))),
        ("then_branch", body("with_past", graph.node.clone())),
    ];
    let outputs: Vec<&str> = graph.output.iter().map(|o| o.name()).collect();
    let mut choice = holder("If", &["use_cache_branch"], &outputs, &branches);
    choice.name = Some("optimum::if".into());
    graph.node = vec![choice];
    graph.value_info.clear();
    graph
        .input
        .push(value("use_cache_branch", common::BOOL, &[1]));
    file
}

/// The decoder without its past inputs.
pub(crate) fn starting(plain: &ModelProto) -> ModelProto {
    let mut file = plain.clone();
    let graph = file.graph.as_mut().unwrap();
    graph.node = without_past(graph);
    graph.input.retain(|i| !past(i.name()));
    file
}

/// A function of these nodes, and its call.
pub(crate) fn function(graph: &GraphProto, domain: &str, name: &str) -> (FunctionProto, NodeProto) {
    let inputs = graph.input.iter().map(|i| i.name().to_owned());
    let weights = graph.initializer.iter().map(|t| t.name().to_owned());
    let inputs: Vec<String> = inputs.chain(weights).collect();
    let outputs: Vec<String> = graph.output.iter().map(|o| o.name().to_owned()).collect();
    let call = NodeProto {
        name: Some(format!("call_{name}")),
        op_type: Some(name.into()),
        domain: Some(domain.into()),
        input: inputs.clone(),
        output: outputs.clone(),
        ..Default::default()
    };
    let made = FunctionProto {
        name: Some(name.into()),
        domain: Some(domain.into()),
        input: inputs,
        output: outputs,
        node: graph.node.clone(),
        ..Default::default()
    };
    (made, call)
}

/// The decoder in a function that another function calls; one attribute of a node
/// is given by the outermost call, another by a default.
pub(crate) fn in_functions(plain: &ModelProto) -> ModelProto {
    let mut file = plain.clone();
    let imports = file.opset_import.clone();
    let graph = file.graph.as_mut().unwrap();
    let (mut inner, mut inner_call) = function(graph, "hidden", "Layers");
    inner.opset_import.clone_from(&imports);
    let mut refer = |op: &str, attribute: &str, parameter: &str| -> AttributeProto {
        let has = |n: &&mut NodeProto| {
            n.op_type() == op && n.attribute.iter().any(|a| a.name() == attribute)
        };
        let found = inner
            .node
            .iter_mut()
            .find(has)
            .unwrap_or_else(|| panic!("no {op}"));
        let own = found
            .attribute
            .iter_mut()
            .find(|a| a.name() == attribute)
            .unwrap();
        let mut given = own.clone();
        *own = AttributeProto {
            name: own.name.clone(),
            r#type: own.r#type,
            ref_attr_name: Some(parameter.into()),
            ..Default::default()
        };
        given.name = Some(parameter.into());
        given
    };
    let perm = refer("Transpose", "perm", "order");
    let axis = refer("Concat", "axis", "joined");
    inner.attribute.push("order".into());
    inner.attribute_proto.push(axis);
    inner_call.attribute.push(AttributeProto {
        name: Some("order".into()),
        r#type: perm.r#type,
        ref_attr_name: Some("given".into()),
        ..Default::default()
    });
    let (mut outer, mut call) = function(graph, "hidden", "Decoder");
    outer.node = vec![inner_call];
    outer.attribute.push("given".into());
    outer.opset_import = vec![opset("hidden", 1)];
    call.attribute.push(AttributeProto {
        name: Some("given".into()),
        ..perm
    });
    // A function that holds no network stays a function.
    let mut small = FunctionProto {
        name: Some("Same".into()),
        domain: Some("hidden".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        node: vec![node("Identity", &["x"], &["y"])],
        ..Default::default()
    };
    small.opset_import = imports;
    let mut same = node("Same", &["attention_mask"], &["the_same_mask"]);
    same.domain = Some("hidden".into());
    for input in call.input.iter_mut().filter(|i| *i == "attention_mask") {
        *input = "the_same_mask".into();
    }
    graph.node = vec![same, call];
    graph.value_info.clear();
    file.opset_import.push(opset("hidden", 1));
    file.functions = vec![small, outer, inner];
    file.ir_version = Some(file.ir_version().max(8));
    file
}

/// The nodes in eight functions, one after the other, each called once.
pub(crate) fn in_stretches(plain: &ModelProto) -> ModelProto {
    let mut file = plain.clone();
    let imports = file.opset_import.clone();
    let graph = file.graph.as_mut().unwrap();
    let given: Vec<String> = graph.output.iter().map(|o| o.name().to_owned()).collect();
    let nodes = std::mem::take(&mut graph.node);
    let length = nodes.len().div_ceil(8);
    for (number, stretch) in nodes.chunks(length).enumerate() {
        let made: Vec<&String> = stretch.iter().flat_map(|n| &n.output).collect();
        let mut reads: Vec<String> = Vec::new();
        for input in stretch.iter().flat_map(|n| &n.input) {
            if !input.is_empty() && !made.contains(&input) && !reads.contains(input) {
                reads.push(input.clone());
            }
        }
        let later: Vec<&String> = nodes[(number * length + stretch.len())..]
            .iter()
            .flat_map(|n| &n.input)
            .chain(&given)
            .collect();
        let gives: Vec<String> = made
            .iter()
            .filter(|o| later.contains(*o))
            .map(|o| (*o).clone())
            .collect();
        let name = format!("Stretch{number}");
        graph.node.push(NodeProto {
            name: Some(format!("stretch.{number}")),
            op_type: Some(name.clone()),
            domain: Some("hidden".into()),
            input: reads.clone(),
            output: gives.clone(),
            ..Default::default()
        });
        file.functions.push(FunctionProto {
            name: Some(name),
            domain: Some("hidden".into()),
            input: reads,
            output: gives,
            node: stretch.to_vec(),
            opset_import: imports.clone(),
            ..Default::default()
        });
    }
    graph.value_info.clear();
    file.opset_import.push(opset("hidden", 1));
    file.ir_version = Some(file.ir_version().max(8));
    file
}

/// A decoder that cannot be recognised: the network lies in a loop.
pub(crate) fn looped(plain: &ModelProto) -> ModelProto {
    let mut file = plain.clone();
    let graph = file.graph.as_mut().unwrap();
    let mut body = GraphProto {
        name: Some("turn".into()),
        input: vec![
            value("i", common::INT64, &[]),
            value("go_on", common::BOOL, &[]),
        ],
        node: vec![node("Identity", &["go_on"], &["go"])],
        output: vec![value("go", common::BOOL, &[])],
        ..Default::default()
    };
    body.node.extend(graph.node.clone());
    for node in &mut body.node {
        for output in &mut node.output {
            if graph.output.iter().any(|o| o.name() == output) {
                *output = format!("turn/{output}");
            }
        }
        for input in &mut node.input {
            if graph.output.iter().any(|o| o.name() == input) {
                *input = format!("turn/{input}");
            }
        }
    }
    body.output
        .extend(graph.output.iter().cloned().map(|mut o| {
            o.name = Some(format!("turn/{}", o.name()));
            o
        }));
    let outputs: Vec<&str> = graph.output.iter().map(|o| o.name()).collect();
    let mut turns = holder("Loop", &["", ""], &outputs, &[("body", body)]);
    turns.name = Some("the_loop".into());
    graph.node = vec![turns];
    graph.value_info.clear();
    file
}
