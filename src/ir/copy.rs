//! Copying nodes and graphs of a model into another one under construction.
//!
//! Whole-model transformations (inlining functions, taking the branches of an
//! `If` apart and putting them together) build a new model through the
//! [`Loader`], as a reader does: names decide what is connected to what. What
//! keeps its names keeps the bytes that it was read from.

use std::collections::HashMap;

use super::load::{Loader, NodeDraft};
use super::model::{AttrValue, Attribute, Def, Function, Graph, GraphKind, Model};
use super::{GraphId, IrError, NodeId, Tensor, ValueId};

/// `ModelProto.functions`.
const FUNCTION_FIELD: u32 = 25;

/// What names become: those listed get a name of their own (empty: the value
/// does not exist), all others a prefix.
#[derive(Debug, Default)]
pub(in crate::ir) struct Names {
    pub(in crate::ir) prefix: String,
    pub(in crate::ir) listed: HashMap<ValueId, String>,
    /// Values of the enclosing function's attributes; `None` outside functions.
    pub(in crate::ir) attributes: Option<HashMap<String, AttrValue>>,
    /// What becomes of the names that passes gave.
    pub(in crate::ir) scope: Option<Scope>,
}

/// A scope inside every pass's: `duet/<pass>/…` ⇄ `duet/<pass>/<name>/…`.
#[derive(Debug)]
pub(in crate::ir) struct Scope {
    pub(in crate::ir) name: String,
    /// Into the scope, or out of it.
    pub(in crate::ir) enter: bool,
}

impl Scope {
    /// The other name, of what has one.
    fn of(&self, name: &str) -> Option<String> {
        let (pass, rest) = name.strip_prefix("duet/")?.split_once('/')?;
        Some(match self.enter {
            true => format!("duet/{pass}/{}/{rest}", self.name),
            false => {
                let rest = rest.strip_prefix(&self.name)?.strip_prefix('/')?;
                format!("duet/{pass}/{rest}")
            }
        })
    }
}

impl Names {
    /// The new name of a value.
    pub(in crate::ir) fn of(&self, model: &Model, value: ValueId) -> String {
        match self.listed.get(&value) {
            Some(name) => name.clone(),
            None => self.plain(model.name(value)),
        }
    }

    /// The new name of a node; a node without one stays without.
    pub(in crate::ir) fn node(&self, name: &str) -> String {
        if name.is_empty() {
            String::new()
        } else {
            self.plain(name)
        }
    }

    fn plain(&self, name: &str) -> String {
        let scoped = self.scope.as_ref().and_then(|scope| scope.of(name));
        scoped.unwrap_or_else(|| format!("{}{name}", self.prefix))
    }

    fn list(&self, model: &Model, values: &[Option<ValueId>]) -> Vec<String> {
        let mut names: Vec<String> = values
            .iter()
            .map(|v| v.map_or(String::new(), |v| self.of(model, v)))
            .collect();
        // Omitted inputs at the end are left out.
        while values.len() > 1 && names.last().is_some_and(String::is_empty) {
            names.pop();
        }
        names
    }
}

/// A copy in progress.
pub(in crate::ir) struct Copier<'a> {
    pub(in crate::ir) from: &'a Model,
    pub(in crate::ir) into: Loader,
    /// Name of the transformation, for messages.
    pub(in crate::ir) what: &'static str,
}

impl<'a> Copier<'a> {
    /// Starts a model with the header of `from`: versions, producer, metadata and
    /// what the file holds besides.
    pub(in crate::ir) fn new(from: &'a Model, what: &'static str) -> Self {
        let mut into = Loader::new(from.external.clone());
        let header = into.header();
        header.ir_version = from.ir_version;
        header.opset_imports.clone_from(&from.opset_imports);
        header.producer.clone_from(&from.producer);
        header.metadata.clone_from(&from.metadata);
        header.provenance = from.provenance.clone();
        Self { from, into, what }
    }

    /// Goes on with what another copier has begun.
    pub(in crate::ir) fn onto(from: &'a Model, into: Loader, what: &'static str) -> Self {
        Self { from, into, what }
    }

    /// An error of this transformation.
    pub(in crate::ir) fn fail(&self, place: &str, reason: &str) -> IrError {
        IrError::Patch {
            pass: self.what.to_owned(),
            reason: format!("{place}: {reason}"),
        }
    }

    /// Copies a graph's name, inputs and initializers, and what is carried
    /// through unread. `keep`: which of its values come along.
    pub(in crate::ir) fn head(
        &mut self,
        old: GraphId,
        new: GraphId,
        names: &Names,
        keep: impl Fn(ValueId) -> bool,
    ) -> Result<(), IrError> {
        let g = self.from.subgraph(old);
        self.into.rename_graph(new, g.name.clone());
        let renamed = !names.prefix.is_empty();
        let provenance = self.into.provenance(new);
        provenance.order.clone_from(&g.provenance.order);
        // What names values cannot be carried under other names: value infos of
        // nothing (13) and quantisation notes (14) are left out there.
        let named = |number: u32| renamed && matches!(number, 13 | 14);
        let extra = g.provenance.extra.iter().filter(|(n, _)| !named(*n));
        provenance.extra = extra.cloned().collect();
        provenance.origin.clone_from(&g.provenance.origin);
        let opaque = |v: &super::Value| v.graph == old && v.def == Def::Opaque;
        let opaque: Vec<String> = self
            .from
            .values
            .iter()
            .filter(|v| opaque(v))
            .map(|v| v.name.clone())
            .collect();
        for name in opaque {
            if renamed {
                let place = format!("'{name}' of graph '{}'", g.name);
                return Err(self.fail(&place, "a sparse initializer cannot be renamed"));
            }
            self.into.opaque(new, &name)?;
        }
        for &input in g.inputs.iter().filter(|v| keep(**v)) {
            let v = self.from.value(input);
            let name = names.of(self.from, input);
            let origin = v.info_origin.clone().filter(|_| name == v.name);
            self.into.input(new, &name, v.ty.clone(), origin)?;
        }
        for &value in g.initializers.iter().filter(|v| keep(**v)) {
            if let Some(tensor) = &self.from.value(value).initializer {
                let name = names.of(self.from, value);
                self.into.initializer(new, renamed_tensor(tensor, name))?;
            }
        }
        Ok(())
    }

    /// Copies a graph's outputs and stated types of intermediate values.
    pub(in crate::ir) fn tail(
        &mut self,
        old: GraphId,
        new: GraphId,
        names: &Names,
    ) -> Result<(), IrError> {
        let g = self.from.subgraph(old);
        for &output in &g.outputs {
            self.output(new, output, names)?;
        }
        self.types(g, new, names);
        Ok(())
    }

    /// Adds one output.
    pub(in crate::ir) fn output(
        &mut self,
        new: GraphId,
        output: ValueId,
        names: &Names,
    ) -> Result<(), IrError> {
        let v = self.from.value(output);
        let name = names.of(self.from, output);
        if name.is_empty() {
            return Err(self.fail(
                &format!("output '{}'", v.name),
                "it is an omitted optional input",
            ));
        }
        let origin = v.info_origin.clone().filter(|_| name == v.name);
        self.into.output(new, &name, v.ty.clone(), origin);
        Ok(())
    }

    /// Copies the stated types of a graph's intermediate values.
    pub(in crate::ir) fn types(&mut self, g: &Graph, new: GraphId, names: &Names) {
        for &value in &g.typed {
            let v = self.from.value(value);
            if v.ty.is_none() {
                continue;
            }
            let name = names.of(self.from, value);
            let origin = v.info_origin.clone().filter(|_| name == v.name);
            self.into.value_info(new, &name, v.ty.clone(), origin);
        }
    }

    /// Copies the model-local functions at the positions that `keep` takes.
    pub(in crate::ir) fn functions(&mut self, keep: impl Fn(usize) -> bool) -> Result<(), IrError> {
        let names = Names::default();
        for (index, function) in self.from.functions.iter().enumerate() {
            if !keep(index) {
                continue;
            }
            let body = self.into.graph(String::new(), GraphKind::Function);
            self.head(function.body, body, &names, |_| true)?;
            all(self, function.body, body, &names)?;
            self.tail(function.body, body, &names)?;
            self.into.function(Function {
                body,
                ..function.clone()
            });
        }
        // The serialised functions stand in the file's order.
        let mut position = 0;
        let extra = &mut self.into.header().provenance.extra;
        extra.retain(|(number, _)| {
            if *number != FUNCTION_FIELD {
                return true;
            }
            position += 1;
            keep(position - 1)
        });
        Ok(())
    }

    /// Copies one node; `nodes` copies the nodes of its bodies.
    pub(in crate::ir) fn node(
        &mut self,
        id: NodeId,
        new: GraphId,
        names: &Names,
        nodes: &mut NodesOf<'_>,
    ) -> Result<(), IrError> {
        let from = self.from;
        let node = from.node(id);
        let mut same_attributes = true;
        let mut attributes = Vec::with_capacity(node.attributes.len());
        for attribute in &node.attributes {
            let value = match &attribute.value {
                AttrValue::Graph(g) => AttrValue::Graph(self.body(*g, new, names, nodes)?),
                AttrValue::Graphs(list) => {
                    let all = list.iter().map(|g| self.body(*g, new, names, nodes));
                    AttrValue::Graphs(all.collect::<Result<_, _>>()?)
                }
                AttrValue::Ref(name) if names.attributes.is_some() => {
                    same_attributes = false;
                    let given = names.attributes.as_ref().and_then(|a| a.get(name));
                    match given {
                        None => continue,
                        Some(AttrValue::Graph(_) | AttrValue::Graphs(_) | AttrValue::Other(_)) => {
                            let place = format!("{}, attribute '{name}'", from.describe(id));
                            return Err(self.fail(
                                &place,
                                "a graph, sparse tensor or type given to a function cannot be put in \
                                 its place; inline with onnx.inliner.inline_local_functions",
                            ));
                        }
                        Some(value) => value.clone(),
                    }
                }
                other => other.clone(),
            };
            attributes.push(Attribute {
                name: attribute.name.clone(),
                value,
            });
        }
        let (inputs, outputs) = (
            names.list(from, &node.inputs),
            names.list(from, &node.outputs),
        );
        let name = names.node(&node.name);
        let old = Names::default();
        let edited = node.edited
            || name != node.name
            || inputs != old.list(from, &node.inputs)
            || outputs != old.list(from, &node.outputs);
        let draft = NodeDraft {
            name,
            op_type: node.op_type.clone(),
            domain: node.domain.clone(),
            overload: node.overload.clone(),
            inputs: &inputs,
            outputs: &outputs,
            attributes,
            origin: node.origin.clone().filter(|_| same_attributes),
            edited,
        };
        self.into.node(new, draft)
    }

    /// Copies a body below `parent`.
    fn body(
        &mut self,
        old: GraphId,
        parent: GraphId,
        names: &Names,
        nodes: &mut NodesOf<'_>,
    ) -> Result<GraphId, IrError> {
        let new = self.into.graph(String::new(), GraphKind::Body { parent });
        self.head(old, new, names, |_| true)?;
        let changed = nodes(self, old, new, names)?;
        self.tail(old, new, names)?;
        let renamed = !names.prefix.is_empty() || !names.listed.is_empty();
        if changed || renamed || self.from.subgraph(old).touched {
            self.into.touch(new);
        }
        Ok(new)
    }
}

/// Copies the nodes of a graph into another; says whether anything but names
/// changed.
pub(in crate::ir) type NodesOf<'f> =
    dyn FnMut(&mut Copier<'_>, GraphId, GraphId, &Names) -> Result<bool, IrError> + 'f;

/// Copies every node of a graph as it is; for [`Copier::node`].
pub(in crate::ir) fn all(
    copier: &mut Copier<'_>,
    old: GraphId,
    new: GraphId,
    names: &Names,
) -> Result<bool, IrError> {
    for &id in &copier.from.subgraph(old).nodes {
        copier.node(id, new, names, &mut all)?;
    }
    Ok(false)
}

/// A tensor under another name.
pub(in crate::ir) fn renamed_tensor(tensor: &Tensor, name: String) -> Tensor {
    let origin = tensor.origin.clone().filter(|_| name == tensor.name);
    Tensor {
        name,
        origin,
        ..tensor.clone()
    }
}
