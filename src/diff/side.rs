//! One side of a comparison: a model with everything that matching and comparing
//! look up.

use std::collections::HashMap;
use std::path::Path;

use super::DiffError;
use super::content::{Constant, Opener};
use super::defaults;
use crate::ir::{
    AttrValue, Attribute, DataType, Def, GraphId, GraphKind, Model, Node, NodeId, Tensor, ValueId,
};
use crate::onnx::details::{self, GraphDetails, ModelDetails, Sparse, Unusual};

/// Index of a constant of one side.
pub(super) type ConstId = usize;

/// A model, ready to be compared.
pub(super) struct Side<'m> {
    pub(super) model: &'m Model,
    pub(super) details: ModelDetails,
    /// By graph.
    pub(super) graphs: Vec<GraphDetails>,
    /// Initializers, `Constant` nodes, sparse initializers, tensors in attributes.
    pub(super) constants: Vec<Constant>,
    /// By value: the constant that it is.
    pub(super) constant_of: Vec<Option<ConstId>>,
    /// By value: the default of an input.
    pub(super) default_of: HashMap<ValueId, ConstId>,
    /// Tensors in attributes, by node and position of the attribute.
    pub(super) attribute_constants: HashMap<(NodeId, usize), ConstId>,
    /// By node: a `Constant` node, whose output is a constant like any initializer.
    pub(super) is_constant: Vec<bool>,
    /// By graph: the node that holds it.
    pub(super) holder: Vec<Option<NodeId>>,
    /// By graph: the function in whose body it lies.
    function: Vec<Option<usize>>,
}

impl<'m> Side<'m> {
    pub(super) fn new(model: &'m Model, path: Option<&Path>) -> Result<Self, DiffError> {
        let graphs: Vec<GraphDetails> = model.graphs().map(|(_, g)| details::of_graph(g)).collect();
        let count = graphs.len();
        let mut side = Self {
            model,
            details: details::of_model(model),
            graphs,
            constants: Vec::new(),
            constant_of: vec![None; model.value_count()],
            default_of: HashMap::new(),
            attribute_constants: HashMap::new(),
            is_constant: vec![false; model.node_count()],
            holder: vec![None; count],
            function: vec![None; count],
        };
        let mut opener = Opener::new(model, path);
        for (id, graph) in model.graphs() {
            for value in &graph.initializers {
                if let Some(tensor) = &model.value(*value).initializer {
                    let constant = side.add(opener.constant(tensor)?);
                    match model.value(*value).def {
                        Def::Input => drop(side.default_of.insert(*value, constant)),
                        _ => side.constant_of[value.index()] = Some(constant),
                    }
                }
            }
            for sparse in &side.graphs[id.index()].sparse.clone() {
                let constant = pack(sparse, &mut opener)?;
                let constant = side.add(constant);
                let named = |v: &ValueId| {
                    let value = model.value(*v);
                    value.graph == id
                        && value.def == Def::Opaque
                        && value.name == sparse.values.name
                };
                // They are rare; their values are found by looking through all uses.
                let graphs = model.graphs().map(|(_, g)| g);
                let read = graphs.flat_map(|g| {
                    let inputs = g
                        .nodes
                        .iter()
                        .flat_map(|n| model.node(*n).inputs.iter().flatten());
                    inputs.chain(&g.outputs)
                });
                let all: Vec<ValueId> = read.copied().filter(named).collect();
                for value in all {
                    side.constant_of[value.index()] = Some(constant);
                }
            }
            for &node in &graph.nodes {
                side.node(node, &mut opener)?;
            }
        }
        for (index, function) in model.functions.iter().enumerate() {
            side.function[function.body.index()] = Some(index);
        }
        for (id, graph) in model.graphs() {
            if let GraphKind::Body { .. } = graph.kind {
                let mut at = id;
                while let GraphKind::Body { parent } = model.subgraph(at).kind {
                    at = parent;
                }
                side.function[id.index()] = side.function[at.index()];
            }
        }
        Ok(side)
    }

    fn add(&mut self, constant: Constant) -> ConstId {
        self.constants.push(constant);
        self.constants.len() - 1
    }

    fn node(&mut self, id: NodeId, opener: &mut Opener<'_>) -> Result<(), DiffError> {
        let node = self.model.node(id);
        for (index, attribute) in node.attributes.iter().enumerate() {
            if let AttrValue::Tensor(tensor) = &attribute.value {
                let constant = self.add(opener.constant(tensor)?);
                self.attribute_constants.insert((id, index), constant);
            }
        }
        for body in node.subgraphs() {
            self.holder[body.index()] = Some(id);
        }
        // A function may bear the operator's name.
        let plain = node.is("Constant") && !self.model.is_function(node);
        if let (true, [Some(output)], [attribute]) =
            (plain, node.outputs.as_slice(), node.attributes.as_slice())
        {
            let constant = match self.attribute_constants.get(&(id, 0)) {
                Some(constant) => Some(*constant),
                None => literal(attribute, opener)?.map(|c| self.add(c)),
            };
            if constant.is_some() {
                self.constant_of[output.index()] = constant;
                self.is_constant[id.index()] = true;
            }
        }
        Ok(())
    }

    /// The constant that a value is.
    pub(super) fn constant(&self, value: ValueId) -> Option<&Constant> {
        self.constant_of[value.index()].map(|c| &self.constants[c])
    }

    /// Nodes that compute something: all but constants.
    pub(super) fn nodes(&self, graph: GraphId) -> Vec<NodeId> {
        let all = &self.model.subgraph(graph).nodes;
        let computing = all.iter().filter(|n| !self.is_constant[n.index()]);
        computing.copied().collect()
    }

    /// The node of `graph` in which a node lies: itself, or what holds its body.
    pub(super) fn ancestor(&self, mut node: NodeId, graph: GraphId) -> Option<NodeId> {
        loop {
            let at = self.model.node(node).graph;
            if at == graph {
                return Some(node);
            }
            node = self.holder[at.index()]?;
        }
    }

    /// Version of an operator set, as the graph's nodes mean it.
    pub(super) fn version(&self, graph: GraphId, domain: &str) -> i64 {
        let stated = self.function[graph.index()].and_then(|f| {
            let imports = &self.model.functions[f].opset_imports;
            let same = |d: &str| d == domain || d == "ai.onnx" && domain.is_empty();
            imports.iter().find(|(d, _)| same(d)).map(|(_, v)| *v)
        });
        stated.or_else(|| self.model.opset(domain)).unwrap_or(1)
    }

    /// Defaults of a node's attributes.
    pub(super) fn defaults(&self, node: &Node) -> &'static [(&'static str, defaults::Default)] {
        if self.model.is_function(node) {
            return &[];
        }
        defaults::of(
            &node.domain,
            &node.op_type,
            self.version(node.graph, &node.domain),
        )
    }

    /// Way to a graph, in words; empty for the main graph.
    pub(super) fn way(&self, graph: GraphId) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut at = graph;
        loop {
            match (self.model.subgraph(at).kind, self.holder[at.index()]) {
                (GraphKind::Body { parent }, Some(holder)) => {
                    let node = self.model.node(holder);
                    let holds = |a: &&Attribute| match &a.value {
                        AttrValue::Graph(g) => *g == at,
                        AttrValue::Graphs(list) => list.contains(&at),
                        _ => false,
                    };
                    let name = node.attributes.iter().find(holds).map_or("", |a| &a.name);
                    let of = if node.name.is_empty() {
                        node.op_type.clone()
                    } else {
                        format!("{} '{}'", node.op_type, node.name)
                    };
                    parts.push(format!("{of} {name}"));
                    at = parent;
                }
                (GraphKind::Function, _) => {
                    if let Some(f) = self.function[at.index()] {
                        let f = &self.model.functions[f];
                        parts.push(format!("function {}::{}", f.domain, f.name));
                    }
                    break;
                }
                _ => break,
            }
        }
        parts.reverse();
        parts.join(" › ")
    }

    /// Bytes that say what an attribute of an unusual type holds, whatever the
    /// layout of its tensors.
    pub(super) fn essence(&self, attribute: &bytes::Bytes) -> Vec<u8> {
        let mut out = Vec::new();
        let mut tensor = |t: &Tensor| {
            out.extend(t.dtype.code().to_le_bytes());
            out.extend((t.dims.len() as u64).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            let bytes = match &t.data {
                crate::ir::TensorData::Strings(list) => {
                    list.iter().fold(Vec::new(), |mut all, s| {
                        all.extend((s.len() as u64).to_le_bytes());
                        all.extend_from_slice(s);
                        all
                    })
                }
                // What cannot be loaded is told by where it should be.
                _ => match t.bytes(self.model.external()) {
                    Ok(bytes) => bytes.to_vec(),
                    Err(_) => format!("{:?}", t.data).into_bytes(),
                },
            };
            out.extend((bytes.len() as u64).to_le_bytes());
            out.extend(bytes);
        };
        match details::unusual(attribute) {
            Unusual::Tensors(list) => list.iter().for_each(tensor),
            Unusual::Sparse(list) => {
                for sparse in list {
                    tensor(&Tensor::i64s("", &sparse.dims));
                    tensor(&sparse.values);
                    tensor(&sparse.indices);
                }
            }
            Unusual::Types(list) => list.iter().for_each(|t| {
                out.extend((t.len() as u64).to_le_bytes());
                out.extend_from_slice(t);
            }),
            Unusual::Unknown(bytes) => out.extend_from_slice(&bytes),
        }
        out
    }
}

/// A sparse tensor as one constant: dimensions, indices and values.
fn pack(sparse: &Sparse, opener: &mut Opener<'_>) -> Result<Constant, DiffError> {
    let mut bytes = Vec::new();
    for tensor in [&sparse.indices, &sparse.values] {
        let part = opener.constant(tensor)?;
        bytes.extend((part.dims.len() as u64).to_le_bytes());
        part.dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        let length = part.data.len();
        bytes.extend(length.to_le_bytes());
        let mut buffer = Vec::new();
        bytes.extend_from_slice(part.data.slice(0, length as usize, &mut buffer)?);
    }
    let mut constant = Constant::small(sparse.values.dtype, sparse.dims.clone(), bytes);
    constant.packed = true;
    Ok(constant)
}

/// The constant that a `Constant` node's attribute spells out; `None` for a
/// reference to a function's attribute and what is not understood.
fn literal(attribute: &Attribute, opener: &mut Opener<'_>) -> Result<Option<Constant>, DiffError> {
    let floats = |list: &[f32]| {
        list.iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let ints = |list: &[i64]| {
        list.iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let texts = |list: &[bytes::Bytes], dims: Vec<i64>, opener: &mut Opener<'_>| {
        let mut tensor = Tensor::raw("", DataType::String, dims, Vec::new());
        tensor.data = crate::ir::TensorData::Strings(list.to_vec());
        opener.constant(&tensor)
    };
    let length = |n: usize| vec![n as i64];
    Ok(match (attribute.name.as_str(), &attribute.value) {
        ("value_float", AttrValue::Float(v)) => {
            Some(Constant::small(DataType::Float, vec![], floats(&[*v])))
        }
        ("value_floats", AttrValue::Floats(v)) => {
            Some(Constant::small(DataType::Float, length(v.len()), floats(v)))
        }
        ("value_int", AttrValue::Int(v)) => {
            Some(Constant::small(DataType::Int64, vec![], ints(&[*v])))
        }
        ("value_ints", AttrValue::Ints(v)) => {
            Some(Constant::small(DataType::Int64, length(v.len()), ints(v)))
        }
        ("value_string", AttrValue::String(v)) => {
            Some(texts(std::slice::from_ref(v), vec![], opener)?)
        }
        ("value_strings", AttrValue::Strings(v)) => Some(texts(v, length(v.len()), opener)?),
        ("sparse_value", AttrValue::Other(bytes)) => match details::unusual(bytes) {
            Unusual::Sparse(list) if list.len() == 1 => Some(pack(&list[0], opener)?),
            _ => None,
        },
        _ => None,
    })
}
