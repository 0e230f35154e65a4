//! What is done to one side of a case: what the textual syntax has no words for, and
//! what is done everywhere at once.

use std::collections::HashMap;

use duet_onnx::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, StringStringEntryProto,
    TensorAnnotation, TensorProto, attribute_proto::AttributeType,
};

use crate::common::{floats, longs};

/// Carries out a line such as `metadata node n1: key = value`.
pub(crate) fn edit(model: &mut ModelProto, line: &str) {
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (target, text) = rest.split_once(": ").unwrap_or((rest, ""));
    let pair = || {
        let (key, value) = text.split_once(" = ").expect("key = value");
        StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value.into()),
        }
    };
    match (command, target) {
        ("rename", "all") => rename(model, "renamed"),
        ("shuffle", seed) => shuffle(model, seed.parse().expect("a seed")),
        ("typed", "data") => typed(graph(model)),
        ("typed", "defaults") => {
            let all = model
                .functions
                .iter_mut()
                .flat_map(|f| &mut f.attribute_proto);
            all.filter_map(|a| a.t.as_mut()).for_each(typed_tensor);
        }
        ("constants", "as nodes") => as_nodes(graph(model)),
        ("doc", "model") => model.doc_string = Some(text.into()),
        ("doc", "graph") => graph(model).doc_string = Some(text.into()),
        ("doc", name) => node(model, name).doc_string = Some(text.into()),
        ("metadata", "model") => model.metadata_props.push(pair()),
        ("metadata", "graph") => graph(model).metadata_props.push(pair()),
        ("metadata", name) => match name.split_once(' ') {
            Some(("initializer", name)) => {
                let mut all = graph(model).initializer.iter_mut();
                let tensor = all.find(|t| t.name() == name).expect("an initializer");
                tensor.metadata_props.push(pair());
            }
            Some(("value", name)) => {
                let g = graph(model);
                let mut all = g
                    .value_info
                    .iter_mut()
                    .chain(&mut g.input)
                    .chain(&mut g.output);
                let info = all.find(|v| v.name() == name).expect("a typed value");
                info.metadata_props.push(pair());
            }
            _ => node(model, name).metadata_props.push(pair()),
        },
        ("quantization", tensor) => graph(model).quantization_annotation.push(TensorAnnotation {
            tensor_name: Some(tensor.into()),
            quant_parameter_tensor_names: vec![pair()],
        }),
        ("sparse", name) => {
            let all: Vec<f32> = text
                .split(' ')
                .map(|n| n.parse().expect("a number"))
                .collect();
            let places: Vec<i64> = (0..all.len() as i64).map(|i| i * 2).collect();
            graph(model).sparse_initializer.push(SparseTensorProto {
                values: Some(floats(name, &[all.len() as i64], &all)),
                indices: Some(longs("", &places)),
                dims: vec![16],
            });
        }
        ("tensors", name) => {
            let all = text
                .split(' ')
                .map(|n| floats("", &[], &[n.parse().expect("a number")]));
            let attribute = AttributeProto {
                name: Some("all".into()),
                r#type: Some(AttributeType::Tensors.into()),
                tensors: all.collect(),
                ..Default::default()
            };
            node(model, name).attribute.push(attribute);
        }
        other => panic!("unknown edit {other:?}"),
    }
}

fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().expect("a graph")
}

fn node<'m>(model: &'m mut ModelProto, name: &str) -> &'m mut NodeProto {
    let nodes = &mut graph(model).node;
    let found = nodes.iter_mut().find(|n| n.name() == name);
    found.unwrap_or_else(|| panic!("no node {name}"))
}

/// A number from a seed, for shuffling.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        // xorshift64*, enough for tests.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides.max(1)
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.roll(i + 1));
        }
    }
}

/// Another order of everything that has none.
pub(crate) fn shuffle(model: &mut ModelProto, seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    dice.shuffle(&mut model.opset_import);
    dice.shuffle(&mut model.functions);
    dice.shuffle(&mut model.metadata_props);
    for function in &mut model.functions {
        dice.shuffle(&mut function.node);
    }
    shuffle_graph(graph(model), &mut dice);
}

fn shuffle_graph(g: &mut GraphProto, dice: &mut Dice) {
    dice.shuffle(&mut g.node);
    dice.shuffle(&mut g.initializer);
    dice.shuffle(&mut g.value_info);
    for node in &mut g.node {
        dice.shuffle(&mut node.attribute);
        for body in node.attribute.iter_mut().filter_map(|a| a.g.as_mut()) {
            shuffle_graph(body, dice);
        }
    }
}

/// Other names for everything but inputs and outputs of the model.
pub(crate) fn rename(model: &mut ModelProto, prefix: &str) {
    let g = graph(model);
    let kept = g.input.iter().chain(&g.output).map(|v| v.name().to_owned());
    let mut names: HashMap<String, String> = kept.map(|n| (n.clone(), n)).collect();
    names.insert(String::new(), String::new());
    let mut count = 0;
    rename_graph(g, &mut names, &mut count, prefix, true);
    for function in &mut model.functions {
        let mut names = HashMap::from([(String::new(), String::new())]);
        let all = function.input.iter_mut().chain(&mut function.output);
        all.for_each(|n| *n = renamed(n, &mut names, &mut count, prefix));
        rename_nodes(&mut function.node, &mut names, &mut count, prefix);
    }
}

fn renamed(
    name: &str,
    names: &mut HashMap<String, String>,
    count: &mut usize,
    prefix: &str,
) -> String {
    *count += 1;
    let new = || format!("{prefix}_{count}");
    names.entry(name.to_owned()).or_insert_with(new).clone()
}

fn rename_graph(
    g: &mut GraphProto,
    names: &mut HashMap<String, String>,
    count: &mut usize,
    prefix: &str,
    main: bool,
) {
    if !main {
        g.name = Some(format!("{prefix}_body"));
    }
    let infos = g.input.iter_mut().chain(&mut g.output);
    let infos = infos.chain(&mut g.value_info).map(|v| &mut v.name);
    let sparse = g.sparse_initializer.iter_mut();
    let sparse = sparse.filter_map(|s| s.values.as_mut());
    let tensors = g.initializer.iter_mut().chain(sparse).map(|t| &mut t.name);
    for name in infos.chain(tensors) {
        let old = name.as_deref().unwrap_or("");
        *name = Some(renamed(old, names, count, prefix));
    }
    for annotation in &mut g.quantization_annotation {
        annotation.tensor_name = Some(renamed(annotation.tensor_name(), names, count, prefix));
        for pair in &mut annotation.quant_parameter_tensor_names {
            pair.value = Some(renamed(pair.value(), names, count, prefix));
        }
    }
    rename_nodes(&mut g.node, names, count, prefix);
}

fn rename_nodes(
    nodes: &mut [NodeProto],
    names: &mut HashMap<String, String>,
    count: &mut usize,
    prefix: &str,
) {
    // All of a scope first: bodies refer to names of any of its nodes.
    for node in nodes.iter_mut() {
        let all = node.input.iter_mut().chain(&mut node.output);
        all.for_each(|n| *n = renamed(n, names, count, prefix));
        *count += 1;
        node.name = Some(format!("{prefix}_node_{count}"));
    }
    for node in nodes {
        for body in node.attribute.iter_mut().filter_map(|a| a.g.as_mut()) {
            // A body's own names are its own.
            let mut inner = names.clone();
            let own = body.input.iter().map(|v| v.name());
            let own = own.chain(body.initializer.iter().map(TensorProto::name));
            let own = own.chain(
                body.node
                    .iter()
                    .flat_map(|n| n.output.iter().map(String::as_str)),
            );
            own.filter(|n| !n.is_empty())
                .for_each(|n| drop(inner.remove(n)));
            rename_graph(body, &mut inner, count, prefix, false);
        }
    }
}

/// Floats and integers in typed fields instead of bytes.
pub(crate) fn typed(g: &mut GraphProto) {
    g.initializer.iter_mut().for_each(typed_tensor);
}

fn typed_tensor(tensor: &mut TensorProto) {
    let Some(raw) = tensor.raw_data.take() else {
        return;
    };
    match tensor.data_type() {
        1 => {
            let all = raw
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes(c.try_into().unwrap()));
            tensor.float_data = all.collect();
        }
        7 => {
            let all = raw
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes(c.try_into().unwrap()));
            tensor.int64_data = all.collect();
        }
        _ => tensor.raw_data = Some(raw),
    }
}

/// Initializers as `Constant` nodes.
pub(crate) fn as_nodes(g: &mut GraphProto) {
    for tensor in std::mem::take(&mut g.initializer) {
        let node = NodeProto {
            op_type: Some("Constant".into()),
            output: vec![tensor.name().to_owned()],
            attribute: vec![AttributeProto {
                name: Some("value".into()),
                r#type: Some(AttributeType::Tensor.into()),
                t: Some(tensor),
                ..Default::default()
            }],
            ..Default::default()
        };
        g.node.insert(0, node);
    }
}
