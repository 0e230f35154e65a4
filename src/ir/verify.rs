//! The verifier. It runs after every pass, also in release builds, and writing
//! a model takes its proof.
//!
//! Invariants:
//!
//! 1. every value that a node or a graph output reads is defined;
//! 2. a node reads only values of its own graph or of a graph around it;
//! 3. value names are not empty and unique within a graph, and a node that a
//!    pass inserted has a name that no other node has (files repeat them);
//! 4. every node comes after the nodes whose outputs it reads;
//! 5. definitions and uses agree in both directions;
//! 6. the operator set of every node's domain is imported (by the model, or by
//!    the function whose body holds the node), or the node calls a model-local
//!    function; ONNX Runtime's own domains need no import where the file itself
//!    uses them;
//! 7. an inline tensor (initializer or attribute) has as many bytes as its type
//!    and dimensions say;
//! 8. an external tensor has dimensions that can be counted, and states a length
//!    (if any) that fits likewise;
//! 9. every sub-graph belongs to one node of the graph it names as parent;
//! 10. inputs and outputs of the main graph have a type;
//! 11. what a pass inserted lies under the name scope `duet/`.
//!
//! All violations are reported, each with its place.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use super::model::{AttrValue, Def, Graph, GraphKind, Model, Node, Use, Value};
use super::{GraphId, IrError, NodeId, Tensor, TensorData, ValueId};

/// One broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number in the module documentation.
    pub invariant: u8,
    /// Node, value or graph.
    pub place: String,
    /// What was expected and what was found.
    pub problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}: {}", self.invariant, self.place, self.problem)
    }
}

/// Proof that a model was verified.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'m>(&'m Model);

impl<'m> Verified<'m> {
    /// The verified model.
    pub fn model(self) -> &'m Model {
        self.0
    }
}

/// Checks every invariant.
///
/// # Errors
/// [`IrError::Invalid`] with all violations.
pub fn verify(model: &Model) -> Result<Verified<'_>, IrError> {
    let runtime_domains = model
        .graphs()
        .flat_map(|(_, g)| &g.nodes)
        .filter_map(|&n| model.try_node(n))
        .filter(|n| n.pass.is_none() && n.domain.starts_with("com.microsoft"))
        .map(|n| n.domain.as_str())
        .collect();
    let mut check = Check {
        model,
        runtime_domains,
        inputs: Recorded::none(model),
        found: Vec::new(),
    };
    check.uses();
    for (id, graph) in model.graphs() {
        check.graph(id, graph);
    }
    check.bodies();
    if check.found.is_empty() {
        Ok(Verified(model))
    } else {
        Err(IrError::Invalid {
            violations: check.found,
        })
    }
}

struct Check<'m> {
    model: &'m Model,
    /// Domains of ONNX Runtime that the file itself uses.
    runtime_domains: HashSet<&'m str>,
    inputs: Recorded,
    found: Vec<Violation>,
}

/// Which inputs of nodes are recorded as uses of the values that they read. (Looking
/// for one in the list of uses would take as long as the list, for every reader.)
struct Recorded {
    /// Where each node's inputs begin in `seen`.
    first: Vec<usize>,
    seen: Vec<bool>,
}

impl Recorded {
    fn none(model: &Model) -> Self {
        let mut first = Vec::with_capacity(model.node_count());
        let mut count = 0;
        for index in 0..model.node_count() {
            first.push(count);
            count += model
                .try_node(NodeId::new(index))
                .map_or(0, |n| n.inputs.len());
        }
        Self {
            first,
            seen: vec![false; count],
        }
    }

    /// The mark of an input that a node has.
    fn at(&mut self, node: NodeId, slot: usize) -> &mut bool {
        &mut self.seen[self.first[node.index()] + slot]
    }
}

impl Check<'_> {
    fn report(&mut self, invariant: u8, place: impl Into<String>, problem: impl Into<String>) {
        self.found.push(Violation {
            invariant,
            place: place.into(),
            problem: problem.into(),
        });
    }

    fn graph(&mut self, id: GraphId, graph: &Graph) {
        // In full, so that a new field has to be thought about here.
        let Graph {
            name,
            kind,
            inputs,
            outputs,
            nodes,
            initializers,
            typed: _,
            provenance: _,
            touched: _,
        } = graph;
        let place = format!("graph '{name}' ({id})");
        let mut names: HashMap<&str, ValueId> = HashMap::new();
        let mut defined: Vec<ValueId> = inputs.clone();
        let given: HashSet<ValueId> = inputs.iter().copied().collect();
        defined.extend(initializers.iter().filter(|v| !given.contains(v)));
        for &node in nodes {
            match self.model.try_node(node) {
                Some(n) => defined.extend(n.outputs.iter().flatten()),
                None => self.report(5, &place, format!("lists {node}, which was removed")),
            }
        }
        for value in defined {
            let name = self.model.name(value);
            if name.is_empty() {
                self.report(3, format!("{place}, value {value}"), "has no name");
            } else if let Some(other) = names.insert(name, value)
                && other != value
            {
                self.report(3, format!("{place}, value '{name}'"), "is defined twice");
            }
        }
        let mut node_names: HashMap<&str, usize> = HashMap::new();
        for node in nodes.iter().filter_map(|&n| self.model.try_node(n)) {
            *node_names.entry(node.name.as_str()).or_default() += 1;
        }
        for &node in nodes {
            if let Some(n) = self.model.try_node(node)
                && n.pass.is_some()
                && node_names[n.name.as_str()] > 1
            {
                self.report(3, self.model.describe(node), "has the name of another node");
            }
        }
        for &output in outputs {
            let value = self.model.value(output);
            if value.def == Def::Missing {
                let at = format!("{place}, output '{}'", value.name);
                self.report(1, at, "nothing defines it");
            }
        }
        if *kind == GraphKind::Main {
            for &value in inputs.iter().chain(outputs) {
                let v = self.model.value(value);
                if v.ty.is_none() {
                    self.report(10, format!("{place}, '{}'", v.name), "has no type");
                }
            }
        }
        for &value in initializers {
            self.initializer(&place, value);
        }
        self.order(&place, nodes);
        for &node in nodes {
            if self.model.try_node(node).is_some() {
                self.node(id, node);
            }
        }
    }

    fn initializer(&mut self, place: &str, value: ValueId) {
        let Some(tensor) = &self.model.value(value).initializer else {
            let at = format!("{place}, initializer '{}'", self.model.name(value));
            self.report(5, at, "has no tensor");
            return;
        };
        self.tensor(|| format!("{place}, initializer '{}'", tensor.name), tensor);
    }

    /// `at` puts the place into words, for what is wrong.
    fn tensor(&mut self, at: impl Fn() -> String, tensor: &Tensor) {
        let Tensor {
            name: _,
            dtype,
            dims,
            data,
            origin: _,
        } = tensor;
        let count = tensor.element_count();
        let expected = count.and_then(|n| dtype.byte_len(n));
        match data {
            TensorData::Raw(bytes) => {
                if expected != Some(bytes.len() as u64) {
                    let want = expected.map_or("an impossible number of".into(), |n| n.to_string());
                    let found = bytes.len();
                    self.report(
                        7,
                        at(),
                        format!("{dtype}{dims:?} takes {want} bytes, found {found}"),
                    );
                }
            }
            TensorData::External(reference) => {
                // More bytes than can be counted are no length that fits.
                let impossible = dtype.is_sized() && expected.is_none();
                if count.is_none() || impossible {
                    self.report(
                        8,
                        at(),
                        format!("{dtype}{dims:?} has an impossible number of elements"),
                    );
                } else if let (Some(length), Some(expected)) = (reference.length, expected)
                    && length != expected
                {
                    let problem =
                        format!("{dtype}{dims:?} takes {expected} bytes, length says {length}");
                    self.report(8, at(), problem);
                }
            }
            TensorData::Strings(list) => {
                if count != Some(list.len() as u64) {
                    let found = list.len();
                    self.report(
                        7,
                        at(),
                        format!("{dtype}{dims:?} does not have {found} elements"),
                    );
                }
            }
        }
    }

    fn order(&mut self, place: &str, nodes: &[NodeId]) {
        let mut position = vec![usize::MAX; self.model.node_count()];
        let mut twice = false;
        for (i, node) in nodes.iter().enumerate() {
            twice |= std::mem::replace(&mut position[node.index()], i) != usize::MAX;
        }
        if twice {
            self.report(5, place, "lists a node twice");
        }
        let mut reads = Vec::new();
        for (i, &node) in nodes.iter().enumerate() {
            if self.model.try_node(node).is_none() {
                continue;
            }
            reads.clear();
            self.model.push_reads(node, &mut reads);
            for &value in &reads {
                if let Some(producer) = self.model.producer_of(value)
                    && position[producer.index()] != usize::MAX
                    && position[producer.index()] >= i
                {
                    let name = self.model.name(value).to_owned();
                    let problem = format!("reads '{name}' before it is computed");
                    self.report(4, self.model.describe(node), problem);
                }
            }
        }
    }

    fn node(&mut self, graph: GraphId, id: NodeId) {
        let model = self.model;
        let node = model.node(id);
        let Node {
            name,
            op_type,
            domain,
            overload: _,
            inputs,
            outputs,
            attributes,
            graph: owner,
            pass,
            origin: _,
            edited: _,
        } = node;
        let place = || model.describe(id);
        if *owner != graph {
            self.report(
                5,
                place(),
                format!("says it is in {owner}, but {graph} lists it"),
            );
        }
        let tolerated = self.runtime_domains.contains(domain.as_str());
        if !self.imports(graph, domain) && !self.model.is_function(node) && !tolerated {
            let shown = if domain.is_empty() {
                "the standard domain"
            } else {
                domain
            };
            self.report(
                6,
                place(),
                format!("no operator set is imported for {shown} ({op_type})"),
            );
        }
        for attribute in attributes {
            if let AttrValue::Tensor(tensor) = &attribute.value {
                self.tensor(
                    || format!("{}, attribute '{}'", place(), attribute.name),
                    tensor,
                );
            }
        }
        for (slot, input) in inputs.iter().enumerate() {
            let Some(value) = *input else { continue };
            let v = self.model.value(value);
            if v.def == Def::Missing {
                self.report(
                    1,
                    place(),
                    format!("reads '{}', which nothing defines", v.name),
                );
            } else if !self.encloses(v.graph, graph) {
                self.report(2, place(), format!("reads '{}' of another graph", v.name));
            }
            if !*self.inputs.at(id, slot) {
                self.report(
                    5,
                    place(),
                    format!("input {slot} ('{}') is no recorded use", v.name),
                );
            }
        }
        for (slot, output) in outputs.iter().enumerate() {
            let Some(value) = *output else { continue };
            let v = self.model.value(value);
            if v.def != (Def::Node { node: id, slot }) {
                self.report(
                    5,
                    place(),
                    format!("output {slot} ('{}') is defined elsewhere", v.name),
                );
            }
        }
        if pass.is_some() && !name.starts_with("duet/") {
            self.report(
                11,
                place(),
                format!("was inserted by a pass, but is named '{name}'"),
            );
        }
    }

    /// Whether the model, or the function that `graph` belongs to, imports an
    /// operator set of `domain`.
    fn imports(&self, graph: GraphId, domain: &str) -> bool {
        let mut root = graph;
        while let GraphKind::Body { parent } = self.model.subgraph(root).kind {
            root = parent;
        }
        let standard = |d: &str| d.is_empty() || d == "ai.onnx";
        let same = |d: &str| d == domain || (standard(d) && standard(domain));
        let function = self.model.functions.iter().find(|f| f.body == root);
        self.model.opset(domain).is_some()
            || function.is_some_and(|f| f.opset_imports.iter().any(|(d, _)| same(d)))
    }

    fn encloses(&self, outer: GraphId, inner: GraphId) -> bool {
        let mut at = inner;
        loop {
            if at == outer {
                return true;
            }
            match self.model.subgraph(at).kind {
                GraphKind::Body { parent } => at = parent,
                GraphKind::Main | GraphKind::Function => return false,
            }
        }
    }

    fn uses(&mut self) {
        for index in 0..self.model.value_count() {
            let id = ValueId::new(index);
            let Value {
                name,
                graph: _,
                def: _,
                initializer: _,
                ty: _,
                uses,
                info_origin: _,
            } = self.model.value(id);
            for u in uses {
                let read = self.model.try_node(u.node).and_then(|n| n.input(u.slot));
                if read == Some(id) {
                    let Use { node, slot } = *u;
                    *self.inputs.at(node, slot) = true;
                } else {
                    let problem = format!("records a use by {} that does not exist", u.node);
                    self.report(5, format!("value '{name}'"), problem);
                }
            }
        }
    }

    fn bodies(&mut self) {
        let mut holders: BTreeMap<GraphId, usize> = BTreeMap::new();
        for (id, graph) in self.model.graphs() {
            // The body of a node that was removed is left behind empty.
            if matches!(graph.kind, GraphKind::Body { .. }) && !graph.nodes.is_empty() {
                holders.entry(id).or_default();
            }
            for &node in &graph.nodes {
                let Some(n) = self.model.try_node(node) else {
                    continue;
                };
                for body in n.subgraphs() {
                    *holders.entry(body).or_default() += 1;
                    if self.model.subgraph(body).kind != (GraphKind::Body { parent: id }) {
                        let place = self.model.describe(node);
                        self.report(
                            9,
                            place,
                            format!("holds {body}, whose parent is another graph"),
                        );
                    }
                }
            }
        }
        for (body, count) in holders {
            if count != 1 {
                self.report(9, format!("{body}"), format!("{count} nodes hold it"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
