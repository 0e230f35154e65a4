//! Building a model from a file: the one place besides
//! [`Patch`](super::Patch) that writes to the arenas.
//!
//! Names are resolved here, scope by scope: a name that an inner graph does
//! not define belongs to an enclosing one (a captured value).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use super::model::{
    Attribute, Def, Function, Graph, GraphKind, Model, Node, Provenance, Use, Value,
};
use super::{ExternalSource, GraphId, IrError, NoExternal, NodeId, Tensor, ValueId, ValueType};

/// A node as a reader found it: names instead of ids.
pub(crate) struct NodeDraft<'a> {
    pub(crate) name: String,
    pub(crate) op_type: String,
    pub(crate) domain: String,
    pub(crate) overload: String,
    pub(crate) inputs: &'a [String],
    pub(crate) outputs: &'a [String],
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) origin: Option<Bytes>,
    /// Inputs, outputs or name differ from `origin`.
    pub(crate) edited: bool,
}

impl Model {
    /// A model without anything in it.
    pub(crate) fn empty() -> Self {
        Loader::new(Arc::new(NoExternal)).finish()
    }
}

/// Accumulates a model.
pub(crate) struct Loader {
    model: Model,
    scopes: Vec<HashMap<String, ValueId>>,
    /// Inputs and outputs of each graph.
    ends: Vec<HashSet<ValueId>>,
}

impl Loader {
    /// Starts a model; the main graph is [`Model::main`].
    pub(crate) fn new(external: Arc<dyn ExternalSource>) -> Self {
        let mut loader = Self {
            model: Model {
                ir_version: 0,
                opset_imports: Vec::new(),
                producer: String::new(),
                metadata: Vec::new(),
                functions: Vec::new(),
                main: GraphId::new(0),
                graphs: Vec::new(),
                nodes: Vec::new(),
                values: Vec::new(),
                external,
                source: None,
                provenance: Provenance::default(),
                generation: 0,
            },
            scopes: Vec::new(),
            ends: Vec::new(),
        };
        loader.graph(String::new(), GraphKind::Main);
        loader
    }

    /// Adds a graph.
    pub(crate) fn graph(&mut self, name: String, kind: GraphKind) -> GraphId {
        let id = GraphId::new(self.model.graphs.len());
        self.model.graphs.push(Graph {
            name,
            kind,
            inputs: Vec::new(),
            outputs: Vec::new(),
            nodes: Vec::new(),
            initializers: Vec::new(),
            typed: Vec::new(),
            provenance: Provenance::default(),
            touched: false,
        });
        self.scopes.push(HashMap::new());
        self.ends.push(HashSet::new());
        id
    }

    /// The model's header fields, for the reader to fill.
    pub(crate) fn header(&mut self) -> &mut Model {
        &mut self.model
    }

    /// A graph's carried-through parts, for the reader to fill.
    pub(crate) fn provenance(&mut self, graph: GraphId) -> &mut Provenance {
        &mut self.model.graphs[graph.index()].provenance
    }

    /// Marks a graph as differing from the serialised form that it keeps.
    pub(in crate::ir) fn touch(&mut self, graph: GraphId) {
        self.model.touch(graph);
    }

    /// Sets a graph's name.
    pub(crate) fn rename_graph(&mut self, graph: GraphId, name: String) {
        self.model.graphs[graph.index()].name = name;
    }

    fn value(&mut self, graph: GraphId, name: &str, def: Def) -> ValueId {
        let id = ValueId::new(self.model.values.len());
        self.model.values.push(Value {
            name: name.to_owned(),
            graph,
            def,
            initializer: None,
            ty: None,
            uses: Vec::new(),
            info_origin: None,
        });
        self.scopes[graph.index()].insert(name.to_owned(), id);
        id
    }

    /// Finds a name in `graph` or a graph around it.
    fn resolve(&self, graph: GraphId, name: &str) -> Option<ValueId> {
        let mut at = graph;
        loop {
            if let Some(&id) = self.scopes[at.index()].get(name) {
                return Some(id);
            }
            match self.model.graphs[at.index()].kind {
                GraphKind::Body { parent } => at = parent,
                GraphKind::Main | GraphKind::Function => return None,
            }
        }
    }

    /// Defines a name in `graph`, or completes a forward reference to it.
    fn define(&mut self, graph: GraphId, name: &str, def: Def) -> Result<ValueId, IrError> {
        match self.scopes[graph.index()].get(name).copied() {
            None => Ok(self.value(graph, name, def)),
            Some(id) if self.model.values[id.index()].def == Def::Missing => {
                self.model.values[id.index()].def = def;
                Ok(id)
            }
            Some(_) => Err(IrError::Duplicate {
                name: name.to_owned(),
                graph: self.model.graphs[graph.index()].name.clone(),
            }),
        }
    }

    /// Adds a graph input.
    pub(crate) fn input(
        &mut self,
        graph: GraphId,
        name: &str,
        ty: Option<ValueType>,
        origin: Option<Bytes>,
    ) -> Result<ValueId, IrError> {
        let known = self.scopes[graph.index()].get(name).copied();
        let id = match known {
            // An initializer of the same name is the input's default.
            Some(id) if self.model.values[id.index()].def == Def::Initializer => {
                self.model.values[id.index()].def = Def::Input;
                id
            }
            _ => self.define(graph, name, Def::Input)?,
        };
        self.describe(id, ty, origin);
        self.model.graphs[graph.index()].inputs.push(id);
        self.ends[graph.index()].insert(id);
        Ok(id)
    }

    /// Adds an initializer.
    pub(crate) fn initializer(&mut self, graph: GraphId, tensor: Tensor) -> Result<(), IrError> {
        let name = tensor.name.clone();
        let known = self.scopes[graph.index()].get(&name).copied();
        let id = match known {
            Some(id)
                if self.model.values[id.index()].def == Def::Input
                    && self.model.values[id.index()].initializer.is_none() =>
            {
                id
            }
            _ => self.define(graph, &name, Def::Initializer)?,
        };
        self.model.values[id.index()].initializer = Some(tensor);
        self.model.graphs[graph.index()].initializers.push(id);
        Ok(())
    }

    /// Declares a name that a carried-through part of the file defines.
    pub(crate) fn opaque(&mut self, graph: GraphId, name: &str) -> Result<(), IrError> {
        self.define(graph, name, Def::Opaque).map(|_| ())
    }

    /// Adds a node; its sub-graphs must have been added before.
    pub(crate) fn node(&mut self, graph: GraphId, draft: NodeDraft<'_>) -> Result<(), IrError> {
        let id = NodeId::new(self.model.nodes.len());
        let mut inputs = Vec::with_capacity(draft.inputs.len());
        for (slot, name) in draft.inputs.iter().enumerate() {
            if name.is_empty() {
                inputs.push(None);
                continue;
            }
            let value = match self.resolve(graph, name) {
                Some(value) => value,
                None => self.value(graph, name, Def::Missing),
            };
            self.model.values[value.index()]
                .uses
                .push(Use { node: id, slot });
            inputs.push(Some(value));
        }
        let mut outputs = Vec::with_capacity(draft.outputs.len());
        for (slot, name) in draft.outputs.iter().enumerate() {
            if name.is_empty() {
                outputs.push(None);
                continue;
            }
            let def = Def::Node { node: id, slot };
            outputs.push(Some(self.define(graph, name, def)?));
        }
        // A file that was rewritten before: `duet/<pass>/…`.
        let scope = draft
            .name
            .strip_prefix("duet/")
            .and_then(|n| n.split('/').next());
        let pass = scope.map(str::to_owned);
        self.model.nodes.push(Some(Node {
            name: draft.name,
            op_type: draft.op_type,
            domain: draft.domain,
            overload: draft.overload,
            inputs,
            outputs,
            attributes: draft.attributes,
            graph,
            pass,
            origin: draft.origin,
            edited: draft.edited,
        }));
        self.model.graphs[graph.index()].nodes.push(id);
        Ok(())
    }

    /// Adds a graph output.
    pub(crate) fn output(
        &mut self,
        graph: GraphId,
        name: &str,
        ty: Option<ValueType>,
        origin: Option<Bytes>,
    ) {
        let id = match self.resolve(graph, name) {
            Some(id) => id,
            None => self.value(graph, name, Def::Missing),
        };
        // An input that is returned as it is keeps the type it has, and so does
        // a captured value.
        let known = &self.model.values[id.index()];
        let own = known.graph == graph;
        if own && (known.ty.is_none() || self.model.producer_of(id).is_some()) {
            self.describe(id, ty, origin);
        }
        self.model.graphs[graph.index()].outputs.push(id);
        self.ends[graph.index()].insert(id);
    }

    /// Types an intermediate value; `false` if the graph has no such value.
    pub(crate) fn value_info(
        &mut self,
        graph: GraphId,
        name: &str,
        ty: Option<ValueType>,
        origin: Option<Bytes>,
    ) -> bool {
        let Some(&id) = self.scopes[graph.index()].get(name) else {
            return false;
        };
        let known = &self.model.values[id.index()];
        let described = known.info_origin.is_some() || known.ty.is_some();
        if described || self.ends[graph.index()].contains(&id) {
            return false;
        }
        self.describe(id, ty, origin);
        self.model.graphs[graph.index()].typed.push(id);
        true
    }

    fn describe(&mut self, id: ValueId, ty: Option<ValueType>, origin: Option<Bytes>) {
        let value = &mut self.model.values[id.index()];
        value.ty = ty;
        value.info_origin = origin;
    }

    /// Registers a model-local function whose body was added.
    pub(crate) fn function(&mut self, function: Function) {
        self.model.functions.push(function);
    }

    /// Resolves what a body reads that a graph around it defines further on in the
    /// file, which was not there yet when the body was read.
    fn capture_later(&mut self) {
        for index in 0..self.model.values.len() {
            let value = &self.model.values[index];
            let GraphKind::Body { parent } = self.model.graphs[value.graph.index()].kind else {
                continue;
            };
            if value.def != Def::Missing {
                continue;
            }
            let Some(outer) = self.resolve(parent, &value.name) else {
                continue;
            };
            let inner = ValueId::new(index);
            let uses = std::mem::take(&mut self.model.values[index].uses);
            for at in &uses {
                if let Some(node) = &mut self.model.nodes[at.node.index()] {
                    node.inputs[at.slot] = Some(outer);
                }
            }
            self.model.values[outer.index()].uses.extend(uses);
            for graph in &mut self.model.graphs {
                for output in &mut graph.outputs {
                    if *output == inner {
                        *output = outer;
                    }
                }
            }
        }
    }

    /// The finished model.
    ///
    /// Converters leave files whose nodes are not in a topological order, and
    /// runtimes take them; here they are put in order. (A cycle stays as it is,
    /// for the verifier to report.)
    pub(crate) fn finish(mut self) -> Model {
        self.capture_later();
        let mut model = self.model;
        for index in 0..model.graphs.len() {
            let _ = model.sort(GraphId::new(index));
        }
        model
    }
}
