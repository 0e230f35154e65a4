//! Decoders of any depth, out of a fixture's own layers: an exporter's graph, in which one layer is there as
//! often as is wanted. Every copy has weights of its own, in a data file of holes.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use duet_onnx::arch::Decoder;
use duet_onnx::ir::cone::descendants;
use duet_onnx::ir::{Model, ValueId};
use duet_onnx::onnx::read_bytes;
use duet_onnx::proto::tensor_proto::DataLocation;
use duet_onnx::proto::{
    GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto,
};
use prost::Message;

/// The export that layers are taken from, and which of its eight layers is repeated.
const FIXTURE: &str = "models/llava/fixtures/dynamo23-mha/onnx/decoder_model_merged.onnx";
const REPEATED: usize = 3;
/// Tensors of at least as many bytes go to the data file, as exporters do it.
const EXTERNAL: usize = 1024;
/// Name of the data file.
const DATA: &str = "decoder.onnx_data";

/// What is there once.
struct Parts {
    graph: GraphProto,
    header: ModelProto,
    /// Nodes that are neither repeated nor behind the repeated layers.
    before: Vec<NodeProto>,
    repeated: Vec<NodeProto>,
    behind: Vec<NodeProto>,
    /// What enters the repeated layer, and what leaves it.
    enters: String,
    left: String,
    /// What enters the layers that it stands for, and what leaves them.
    begins: String,
    leaves: String,
    /// Values and weights of the repeated layer alone.
    own: HashSet<String>,
    /// Values and weights that are gone with the other layers.
    gone: HashSet<String>,
    depth: usize,
}

/// Writes a decoder of about so many nodes into `folder`; its path, and its number of layers.
pub(crate) fn decoder(folder: &Path, nodes: usize) -> (PathBuf, usize) {
    let parts = parts();
    let rest = parts.before.len() + parts.behind.len();
    let copies = nodes.saturating_sub(rest) / parts.repeated.len();
    let layers = copies.max(2) + 2;
    let path = folder.join("decoder.onnx");
    let model = parts.model(layers, folder);
    std::fs::write(&path, model.encode_to_vec()).expect("written");
    (path, layers)
}

/// The same model under other names, of nodes and of what lies between them.
pub(crate) fn renamed(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).expect("a model");
    let mut model = ModelProto::decode(bytes.as_slice()).expect("a model");
    let graph = model.graph.as_mut().expect("a graph");
    let ends = graph.input.iter().chain(&graph.output);
    let ends: HashSet<String> = ends.map(|v| v.name().to_owned()).collect();
    let name = |old: &mut String| {
        if !old.is_empty() && !ends.contains(old) {
            *old = format!("other/{old}");
        }
    };
    for node in &mut graph.node {
        node.input.iter_mut().for_each(name);
        node.output.iter_mut().for_each(name);
        node.name.iter_mut().for_each(name);
    }
    for value in &mut graph.value_info {
        value.name.iter_mut().for_each(name);
    }
    for tensor in &mut graph.initializer {
        tensor.name.iter_mut().for_each(name);
    }
    std::fs::write(to, model.encode_to_vec()).expect("written");
}

fn parts() -> Parts {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut header = ModelProto::decode(bytes.as_slice()).expect("a fixture");
    let model = read_bytes(FIXTURE, bytes.into()).expect("a fixture");
    let decoder = Decoder::recognise(&model).expect("a decoder");
    let depth = decoder.depth();
    let entry = |layer: usize| match decoder.layers[layer].boundary[..] {
        [one] => one,
        _ => panic!("layer {layer} is entered by several tensors"),
    };
    // A layer is what depends on its entry or its cache, and does not come behind the next entry. Sizes that are
    // read off a cache are everyone's.
    let names = |from: usize, to: usize| -> HashSet<String> {
        let mut roots = vec![entry(from)];
        for layer in &decoder.layers[from..to] {
            roots.extend(layer.past.map(|(k, v)| [k, v]).into_iter().flatten());
        }
        let behind = descendants(&model, &[entry(to)], true);
        let inner = |v: &ValueId| {
            let ours = *v == entry(to) || !behind.contains(v);
            ours && model.producer_of(*v).is_some() && *v != entry(from)
        };
        let all = descendants(&model, &roots, true);
        all.into_iter()
            .filter(inner)
            .map(|v| model.name(v).to_owned())
            .collect()
    };
    let mut own = names(REPEATED, REPEATED + 1);
    let mut gone = names(1, depth - 1);
    let behind: HashSet<String> = descendants(&model, &[entry(depth - 1)], true)
        .into_iter()
        .map(|v| model.name(v).to_owned())
        .collect();
    let mut graph = header.graph.take().expect("a graph");
    let nodes = std::mem::take(&mut graph.node);
    let (mut before, mut repeated, mut rest) = (Vec::new(), Vec::new(), Vec::new());
    for mut node in nodes {
        node.metadata_props.clear();
        let makes = |set: &HashSet<String>| node.output.iter().any(|o| set.contains(o));
        let kind = match (makes(&own), makes(&gone), makes(&behind)) {
            (true, ..) => &mut repeated,
            (_, true, _) => continue,
            (.., true) => &mut rest,
            _ => &mut before,
        };
        kind.push(node);
    }
    weights(&model, &mut own);
    weights(&model, &mut gone);
    Parts {
        graph,
        header,
        before,
        repeated,
        behind: rest,
        enters: model.name(entry(REPEATED)).to_owned(),
        left: model.name(entry(REPEATED + 1)).to_owned(),
        begins: model.name(entry(1)).to_owned(),
        leaves: model.name(entry(depth - 1)).to_owned(),
        own,
        gone,
        depth,
    }
}

/// Adds the constants that only nodes of these values read.
fn weights(model: &Model, values: &mut HashSet<String>) {
    for &weight in &model.graph().initializers {
        let mut uses = model.value(weight).uses.iter();
        let inside = |node| {
            let mut outputs = model.node(node).outputs.iter().flatten();
            outputs.any(|o| values.contains(model.name(*o)))
        };
        if uses.all(|u| inside(u.node)) {
            values.insert(model.name(weight).to_owned());
        }
    }
}

/// Name of a layer's part of the cache under another number; `None` for other names.
fn cached(name: &str, from: usize, to: usize) -> Option<String> {
    ["past_key_values", "present"].iter().find_map(|kind| {
        let rest = name.strip_prefix(&format!("{kind}.{from}."))?;
        Some(format!("{kind}.{to}.{rest}"))
    })
}

impl Parts {
    /// Name inside the copy that is layer `number`.
    fn copied(&self, name: &str, number: usize) -> String {
        if let Some(name) = cached(name, REPEATED, number) {
            return name;
        }
        if name == self.enters {
            return match number {
                1 => self.begins.clone(),
                _ => self.copied(&self.left, number - 1),
            };
        }
        match self.own.contains(name) {
            true => format!("layer{number}/{name}"),
            false => name.to_owned(),
        }
    }

    fn model(mut self, layers: usize, folder: &Path) -> ModelProto {
        let last = layers - 1;
        let end = |name: &str| match name == self.leaves {
            true => self.copied(&self.left, last - 1),
            false => cached(name, self.depth - 1, last).unwrap_or_else(|| name.to_owned()),
        };
        let each = |node: &NodeProto, name: &dyn Fn(&str) -> String| {
            let mut node = node.clone();
            node.input.iter_mut().for_each(|v| *v = name(v));
            node.output.iter_mut().for_each(|v| *v = name(v));
            node
        };
        // Of any layer's cache the size is the same.
        let sized = |name: &str| {
            let mut gone = 1..self.depth - 1;
            gone.find_map(|n| cached(name, n, 0))
                .unwrap_or_else(|| name.to_owned())
        };
        let mut nodes: Vec<NodeProto> = self.before.iter().map(|n| each(n, &sized)).collect();
        for number in 1..last {
            for node in &self.repeated {
                let mut node = each(node, &|name| self.copied(name, number));
                node.name = Some(format!("layer{number}/{}", node.name()));
                nodes.push(node);
            }
        }
        nodes.extend(self.behind.iter().map(|node| each(node, &end)));
        let values = |all: &[ValueInfoProto]| -> Vec<ValueInfoProto> {
            let mut found: Vec<ValueInfoProto> = Vec::new();
            let mut add = |value: &ValueInfoProto, name: String| {
                let mut value = value.clone();
                value.metadata_props.clear();
                value.name = Some(name);
                found.push(value);
            };
            for value in all {
                let name = value.name();
                let ours = cached(name, REPEATED, REPEATED).is_some() || self.own.contains(name);
                let gone = (1..self.depth - 1).any(|n| cached(name, n, n).is_some());
                if ours {
                    (1..last).for_each(|n| add(value, self.copied(name, n)));
                } else if !gone && !self.gone.contains(name) {
                    add(value, end(name));
                }
            }
            found
        };
        let (input, output) = (values(&self.graph.input), values(&self.graph.output));
        let value_info = values(&self.graph.value_info);
        let mut weights: Vec<TensorProto> = Vec::new();
        for tensor in &self.graph.initializer {
            if self.own.contains(tensor.name()) {
                weights.extend((1..last).map(|n| TensorProto {
                    name: Some(self.copied(tensor.name(), n)),
                    ..tensor.clone()
                }));
            } else if !self.gone.contains(tensor.name()) {
                weights.push(tensor.clone());
            }
        }
        outside(&mut weights, folder);
        let graph = GraphProto {
            node: nodes,
            input,
            output,
            value_info,
            initializer: weights,
            name: self.graph.name.take(),
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..self.header
        }
    }
}

/// Takes the contents of large tensors out into a data file of holes.
fn outside(tensors: &mut [TensorProto], folder: &Path) {
    let mut offset = 0;
    for tensor in tensors {
        let Some(bytes) = tensor.raw_data.take_if(|b| b.len() >= EXTERNAL) else {
            continue;
        };
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        tensor.external_data = vec![
            entry("location", DATA.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", bytes.len().to_string()),
        ];
        tensor.data_location = Some(DataLocation::External.into());
        offset += bytes.len().next_multiple_of(4096);
    }
    let data = File::create(folder.join(DATA)).expect("a data file");
    data.set_len(offset as u64).expect("holes");
}
