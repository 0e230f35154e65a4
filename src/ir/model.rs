//! The model: arenas of nodes, values and graphs with def–use links.
//!
//! One arena serves the main graph, the sub-graphs that attributes hold (`If`,
//! `Loop`, `Scan` bodies) and the bodies of model-local functions, so that a
//! captured value is simply a [`ValueId`] of an enclosing graph.
//!
//! Nothing outside this module tree can change a model, except by applying a
//! [`Patch`](super::Patch).

use std::sync::Arc;

use bytes::Bytes;

use super::{ExternalSource, GraphId, NodeId, Tensor, ValueId, ValueType};

/// Where a value is used.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Use {
    /// The reading node (possibly in a sub-graph, then the value is captured).
    pub node: NodeId,
    /// Position among the node's inputs.
    pub slot: usize,
}

/// What defines a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Def {
    /// Nothing does: the model is invalid (the verifier reports it).
    Missing,
    /// An input of the graph (it may have an initializer as default).
    Input,
    /// An initializer.
    Initializer,
    /// A sparse initializer, which is carried through unread.
    Opaque,
    /// An output of a node.
    Node {
        /// The node.
        node: NodeId,
        /// Position among its outputs.
        slot: usize,
    },
}

/// A value (edge).
#[derive(Clone, Debug)]
pub struct Value {
    /// Name, unique in its graph.
    pub name: String,
    /// Graph that defines it.
    pub graph: GraphId,
    /// What defines it.
    pub def: Def,
    /// Its constant, for initializers and inputs with a default.
    pub initializer: Option<Tensor>,
    /// Type, if the file states one.
    pub ty: Option<ValueType>,
    /// Readers, in no particular order.
    pub uses: Vec<Use>,
    /// Serialised type information; dropped when the type changes.
    pub(crate) info_origin: Option<Bytes>,
}

/// An attribute value.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the variants are ONNX's own attribute types")]
pub enum AttrValue {
    Float(f32),
    Int(i64),
    String(Bytes),
    Tensor(Tensor),
    Graph(GraphId),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Bytes>),
    Graphs(Vec<GraphId>),
    /// A reference to an attribute of the enclosing function.
    Ref(String),
    /// Any other type (sparse tensors, type protos, tensor lists), serialised.
    Other(Bytes),
}

/// A named attribute.
#[derive(Clone, Debug)]
pub struct Attribute {
    /// Name.
    pub name: String,
    /// Value.
    pub value: AttrValue,
}

/// An operator call.
#[derive(Clone, Debug)]
pub struct Node {
    /// Name; may be empty in files, never for nodes that passes insert.
    pub name: String,
    /// Operator.
    pub op_type: String,
    /// Operator domain; empty for the standard operators.
    pub domain: String,
    /// Which of several functions of one name is called; empty for operators.
    pub overload: String,
    /// Inputs; `None` for an omitted optional input.
    pub inputs: Vec<Option<ValueId>>,
    /// Outputs; `None` for an omitted optional output.
    pub outputs: Vec<Option<ValueId>>,
    /// Attributes.
    pub attributes: Vec<Attribute>,
    /// Graph that holds it.
    pub graph: GraphId,
    /// The pass that inserted it.
    pub pass: Option<String>,
    /// The serialised form it was read from.
    pub(crate) origin: Option<Bytes>,
    /// Inputs or output names differ from `origin`.
    pub(crate) edited: bool,
}

impl Node {
    /// Whether this is the standard operator `op_type`.
    pub fn is(&self, op_type: &str) -> bool {
        self.op_type == op_type && (self.domain.is_empty() || self.domain == "ai.onnx")
    }

    /// Whether this is `com.microsoft::op_type`.
    pub fn is_ms(&self, op_type: &str) -> bool {
        self.op_type == op_type && self.domain == "com.microsoft"
    }

    /// Attribute by name.
    pub fn attr(&self, name: &str) -> Option<&AttrValue> {
        self.attributes
            .iter()
            .find(|a| a.name == name)
            .map(|a| &a.value)
    }

    /// Integer attribute by name.
    pub fn attr_int(&self, name: &str) -> Option<i64> {
        match self.attr(name) {
            Some(AttrValue::Int(i)) => Some(*i),
            _ => None,
        }
    }

    /// Integer list attribute by name.
    pub fn attr_ints(&self, name: &str) -> Option<&[i64]> {
        match self.attr(name) {
            Some(AttrValue::Ints(list)) => Some(list),
            _ => None,
        }
    }

    /// Float attribute by name.
    pub fn attr_float(&self, name: &str) -> Option<f32> {
        match self.attr(name) {
            Some(AttrValue::Float(f)) => Some(*f),
            _ => None,
        }
    }

    /// Input `slot`, if present and not omitted.
    pub fn input(&self, slot: usize) -> Option<ValueId> {
        self.inputs.get(slot).copied().flatten()
    }

    /// Output `slot`, if present and not omitted.
    pub fn output(&self, slot: usize) -> Option<ValueId> {
        self.outputs.get(slot).copied().flatten()
    }

    /// Sub-graphs in its attributes.
    pub fn subgraphs(&self) -> impl Iterator<Item = GraphId> + '_ {
        self.attributes.iter().flat_map(|a| match &a.value {
            AttrValue::Graph(g) => std::slice::from_ref(g).iter().copied(),
            AttrValue::Graphs(list) => list.iter().copied(),
            _ => [].iter().copied(),
        })
    }
}

/// What a graph is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GraphKind {
    /// The model's graph.
    Main,
    /// Held by an attribute of a node.
    Body {
        /// The graph that holds the node.
        parent: GraphId,
    },
    /// A model-local function's body.
    Function,
}

/// A list of nodes with inputs and outputs.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Name.
    pub name: String,
    /// What it is part of.
    pub kind: GraphKind,
    /// Inputs in order.
    pub inputs: Vec<ValueId>,
    /// Outputs in order.
    pub outputs: Vec<ValueId>,
    /// Nodes in a topological order (the file's own where nothing moved).
    pub nodes: Vec<NodeId>,
    /// Initializers in order.
    pub initializers: Vec<ValueId>,
    /// Intermediate values that the file gives a type, in order.
    pub(crate) typed: Vec<ValueId>,
    /// Parts of the serialised form that are carried through unread.
    pub(crate) provenance: Provenance,
    /// Differs from the serialised form.
    pub(crate) touched: bool,
}

/// What the reader keeps for the writer.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Field numbers in order of first appearance.
    pub(crate) order: Vec<u32>,
    /// Fields the IR does not model: number and complete serialised field.
    pub(crate) extra: Vec<(u32, Bytes)>,
    /// The whole message, for what did not change.
    pub(crate) origin: Option<Bytes>,
}

/// A model-local function.
#[derive(Clone, Debug)]
pub struct Function {
    /// Domain under which nodes call it.
    pub domain: String,
    /// Operator name under which nodes call it.
    pub name: String,
    /// Overload identifier.
    pub overload: String,
    /// Operator sets that its body uses, where it states them: domain and version.
    pub opset_imports: Vec<(String, i64)>,
    /// Attributes that have a default, with it.
    pub defaults: Vec<Attribute>,
    /// Its body.
    pub body: GraphId,
}

/// A key/value pair of the model's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataEntry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
    /// The serialised form it was read from.
    pub(crate) origin: Option<Bytes>,
}

/// A whole model file.
#[derive(Clone)]
pub struct Model {
    /// IR version of the file format.
    pub ir_version: i64,
    /// Operator sets: domain (empty for the standard one) and version.
    pub opset_imports: Vec<(String, i64)>,
    /// Name of the producing tool.
    pub producer: String,
    /// Key/value metadata, in order.
    pub metadata: Vec<MetadataEntry>,
    /// Model-local functions.
    pub functions: Vec<Function>,
    pub(in crate::ir) main: GraphId,
    pub(in crate::ir) graphs: Vec<Graph>,
    pub(in crate::ir) nodes: Vec<Option<Node>>,
    pub(in crate::ir) values: Vec<Value>,
    pub(in crate::ir) external: Arc<dyn ExternalSource>,
    /// The complete serialised form, while nothing has changed.
    pub(crate) source: Option<Bytes>,
    pub(crate) provenance: Provenance,
    /// Scope names already used by earlier patches.
    pub(in crate::ir) generation: usize,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("producer", &self.producer)
            .field("opset_imports", &self.opset_imports)
            .field("graphs", &self.graphs.len())
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

impl Model {
    /// The main graph's id.
    pub fn main(&self) -> GraphId {
        self.main
    }

    /// The main graph.
    pub fn graph(&self) -> &Graph {
        self.subgraph(self.main)
    }

    /// Any graph.
    pub fn subgraph(&self, id: GraphId) -> &Graph {
        &self.graphs[id.index()]
    }

    /// All graphs, main graph, bodies and function bodies.
    pub fn graphs(&self) -> impl Iterator<Item = (GraphId, &Graph)> {
        self.graphs
            .iter()
            .enumerate()
            .map(|(i, g)| (GraphId::new(i), g))
    }

    /// A node.
    ///
    /// # Panics
    /// If the node was removed (a programming error: ids of removed nodes are
    /// not handed out).
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.index()]
            .as_ref()
            .expect("the node has not been removed")
    }

    /// A node, unless it was removed.
    pub fn try_node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.index()).and_then(Option::as_ref)
    }

    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Name of a value.
    pub fn name(&self, id: ValueId) -> &str {
        &self.value(id).name
    }

    /// Number of values ever created.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// Number of nodes ever created (removed ones included).
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// The node that produces a value.
    pub fn producer_of(&self, id: ValueId) -> Option<NodeId> {
        match self.value(id).def {
            Def::Node { node, .. } => Some(node),
            _ => None,
        }
    }

    /// The node that produces a value, if any, by reference.
    pub fn producer_node(&self, id: ValueId) -> Option<&Node> {
        self.producer_of(id).map(|n| self.node(n))
    }

    /// Input of the main graph by name.
    pub fn input(&self, name: &str) -> Option<ValueId> {
        let found = |&&v: &&ValueId| self.name(v) == name;
        self.graph().inputs.iter().find(found).copied()
    }

    /// Output of the main graph by name.
    pub fn output(&self, name: &str) -> Option<ValueId> {
        let found = |&&v: &&ValueId| self.name(v) == name;
        self.graph().outputs.iter().find(found).copied()
    }

    /// Value of the main graph by name, unless its node was removed (linear search: for tests
    /// and tools).
    pub fn find(&self, name: &str) -> Option<ValueId> {
        let there = |v: &Value| match v.def {
            Def::Node { node, .. } => self.try_node(node).is_some(),
            _ => true,
        };
        self.values
            .iter()
            .position(|v| v.graph == self.main && v.name == name && there(v))
            .map(ValueId::new)
    }

    /// Version of an operator set; the standard domain is `""`.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let same = |d: &str| d == domain || (d == "ai.onnx" && domain.is_empty());
        self.opset_imports
            .iter()
            .find(|(d, _)| same(d))
            .map(|(_, version)| *version)
    }

    /// Metadata entry by key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.value.as_str())
    }

    /// Where external data comes from.
    pub fn external(&self) -> &Arc<dyn ExternalSource> {
        &self.external
    }

    /// Whether a graph output list names the value.
    pub fn is_output(&self, id: ValueId) -> bool {
        self.subgraph(self.value(id).graph).outputs.contains(&id)
    }

    /// A node's name for messages: its name, or its operator and id.
    pub fn describe(&self, id: NodeId) -> String {
        let node = self.node(id);
        if node.name.is_empty() {
            format!("{} {id}", node.op_type)
        } else {
            format!("{} '{}'", node.op_type, node.name)
        }
    }

    /// Whether `domain::op_type` is a model-local function.
    pub fn is_function(&self, node: &Node) -> bool {
        self.function_of(node).is_some()
    }

    /// Position of the model-local function that a node calls.
    pub fn function_of(&self, node: &Node) -> Option<usize> {
        let standard = |d: &str| d.is_empty() || d == "ai.onnx";
        self.functions.iter().position(|f| {
            let same = f.domain == node.domain || (standard(&f.domain) && standard(&node.domain));
            same && f.name == node.op_type && f.overload == node.overload
        })
    }

    /// Whether a patch has changed it since it was read.
    pub fn is_patched(&self) -> bool {
        self.generation > 0
    }

    pub(in crate::ir) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.index()]
            .as_mut()
            .expect("the node has not been removed")
    }

    /// Marks a graph and everything that holds it as differing from the file.
    pub(in crate::ir) fn touch(&mut self, graph: GraphId) {
        self.source = None;
        let mut at = Some(graph);
        while let Some(id) = at {
            let g = &mut self.graphs[id.index()];
            g.touched = true;
            at = match g.kind {
                GraphKind::Body { parent } => Some(parent),
                GraphKind::Main | GraphKind::Function => None,
            };
        }
    }
}
