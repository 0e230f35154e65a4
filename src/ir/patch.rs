//! A patch: the only way to change a model.
//!
//! A pass reads the model and describes what to add and what to reconnect;
//! [`Patch::finish`] detaches the description, and
//! [`Model::apply`](super::Model::apply) carries it out. New elements
//! have ids that continue the model's own, so a patch can mix old and new
//! values freely. Every inserted name lives under `duet/<pass>/<scope>/`.

use std::collections::HashMap;

use super::model::{AttrValue, Attribute, Def, Model, Node, Value};
use super::{DataType, GraphId, NodeId, Tensor, TensorData, ValueId, ValueType};

/// A change to what exists.
#[derive(Clone, Debug)]
pub(in crate::ir) enum Edit {
    Rewire {
        node: NodeId,
        slot: usize,
        to: ValueId,
    },
    Connect {
        node: NodeId,
        slot: usize,
        to: ValueId,
    },
    SetAttribute {
        node: NodeId,
        attribute: Attribute,
    },
    ReplaceOutput {
        index: usize,
        to: ValueId,
    },
    SetType {
        value: ValueId,
        ty: Option<ValueType>,
    },
    AddInput {
        value: ValueId,
    },
    AddOutput {
        value: ValueId,
    },
    /// As `SetType`, and the file states it also where it stated none.
    StateType {
        value: ValueId,
        ty: ValueType,
    },
    Disconnect {
        node: NodeId,
        slot: usize,
    },
    RemoveInput {
        value: ValueId,
    },
    Metadata {
        key: String,
        value: String,
    },
}

/// A patch under construction for one graph of a model.
pub struct Patch<'m> {
    model: &'m Model,
    graph: GraphId,
    pass: String,
    scope: String,
    values: Vec<Value>,
    nodes: Vec<Node>,
    edits: Vec<Edit>,
    constants: HashMap<(DataType, Vec<i64>, Vec<u8>), ValueId>,
    counters: HashMap<String, usize>,
}

/// A finished patch, detached from the model it was planned on.
#[derive(Clone, Debug)]
pub struct PatchPlan {
    pub(in crate::ir) pass: String,
    pub(in crate::ir) graph: GraphId,
    pub(in crate::ir) base: (usize, usize, usize),
    pub(in crate::ir) values: Vec<Value>,
    pub(in crate::ir) nodes: Vec<Node>,
    pub(in crate::ir) edits: Vec<Edit>,
}

impl PatchPlan {
    /// Name of the pass that planned it.
    pub fn pass(&self) -> &str {
        &self.pass
    }

    /// Number of nodes it inserts.
    pub fn inserted(&self) -> usize {
        self.nodes.len()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.edits.is_empty() && self.values.is_empty()
    }
}

impl<'m> Patch<'m> {
    /// An empty patch of the main graph; `pass` names the scope of new names.
    pub fn new(model: &'m Model, pass: &str) -> Self {
        Self {
            model,
            graph: model.main(),
            pass: pass.to_owned(),
            scope: String::new(),
            values: Vec::new(),
            nodes: Vec::new(),
            edits: Vec::new(),
            constants: HashMap::new(),
            counters: HashMap::new(),
        }
    }

    /// The model that the patch is planned on.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Sets the scope of the names that follow: `duet/<pass>/<scope>/…`.
    pub fn scope(&mut self, scope: &str) {
        scope.clone_into(&mut self.scope);
    }

    /// The model's version of the standard operator set (0 if it has none).
    pub fn opset(&self) -> i64 {
        self.model.opset("").unwrap_or(0)
    }

    /// Any value, of the model or of the patch.
    pub fn value(&self, id: ValueId) -> &Value {
        match id.index().checked_sub(self.model.value_count()) {
            None => self.model.value(id),
            Some(new) => &self.values[new],
        }
    }

    fn unique(&mut self, stem: &str) -> String {
        let scope = if self.scope.is_empty() {
            format!("duet/{}/{stem}", self.pass)
        } else {
            format!("duet/{}/{}/{stem}", self.pass, self.scope)
        };
        let n = self.counters.entry(scope.clone()).or_insert(0);
        *n += 1;
        if *n == 1 {
            scope
        } else {
            format!("{scope}_{n}")
        }
    }

    fn push_value(&mut self, name: String, def: Def, tensor: Option<Tensor>) -> ValueId {
        let id = ValueId::new(self.model.value_count() + self.values.len());
        self.values.push(Value {
            name,
            graph: self.graph,
            def,
            initializer: tensor,
            ty: None,
            uses: Vec::new(),
            info_origin: None,
        });
        id
    }

    /// Inserts a node with `outputs` outputs.
    pub fn node(
        &mut self,
        domain: &str,
        op_type: &str,
        inputs: &[Option<ValueId>],
        outputs: usize,
        attributes: Vec<Attribute>,
    ) -> Vec<ValueId> {
        let name = self.unique(op_type);
        let id = NodeId::new(self.model.node_count() + self.nodes.len());
        let outputs: Vec<ValueId> = (0..outputs)
            .map(|slot| {
                let suffix = if outputs == 1 {
                    String::new()
                } else {
                    format!(":{slot}")
                };
                let def = Def::Node { node: id, slot };
                self.push_value(format!("{name}{suffix}"), def, None)
            })
            .collect();
        self.nodes.push(Node {
            name,
            op_type: op_type.to_owned(),
            domain: domain.to_owned(),
            overload: String::new(),
            inputs: inputs.to_vec(),
            outputs: outputs.iter().copied().map(Some).collect(),
            attributes,
            graph: self.graph,
            pass: Some(self.pass.clone()),
            origin: None,
            edited: false,
        });
        outputs
    }

    /// Inserts a copy of a node of the model reading other inputs. It gets an
    /// output for each one the original has.
    pub(in crate::ir) fn copy_node(
        &mut self,
        original: NodeId,
        inputs: Vec<Option<ValueId>>,
    ) -> Vec<Option<ValueId>> {
        let model = self.model;
        let source = model.node(original);
        let name = self.unique(&source.op_type);
        let id = NodeId::new(self.model.node_count() + self.nodes.len());
        let many = source.outputs.len() > 1;
        let outputs: Vec<Option<ValueId>> = source
            .outputs
            .iter()
            .enumerate()
            .map(|(slot, out)| {
                out.map(|_| {
                    let suffix = if many {
                        format!(":{slot}")
                    } else {
                        String::new()
                    };
                    self.push_value(
                        format!("{name}{suffix}"),
                        Def::Node { node: id, slot },
                        None,
                    )
                })
            })
            .collect();
        self.nodes.push(Node {
            name,
            inputs,
            outputs: outputs.clone(),
            pass: Some(self.pass.clone()),
            edited: true,
            ..source.clone()
        });
        outputs
    }

    /// Adds a constant. Equal small constants are shared.
    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let key = match &tensor.data {
            TensorData::Raw(bytes) if bytes.len() <= 256 => {
                Some((tensor.dtype, tensor.dims.clone(), bytes.to_vec()))
            }
            _ => None,
        };
        if let Some(&id) = key.as_ref().and_then(|k| self.constants.get(k)) {
            return id;
        }
        let id = self.own_constant(tensor);
        if let Some(key) = key {
            self.constants.insert(key, id);
        }
        id
    }

    /// Adds a constant that is shared with nothing.
    pub(in crate::ir) fn own_constant(&mut self, tensor: Tensor) -> ValueId {
        let scope = std::mem::take(&mut self.scope);
        let name = self.unique(if tensor.name.is_empty() {
            "const"
        } else {
            &tensor.name
        });
        self.scope = scope;
        let tensor = Tensor {
            name: name.clone(),
            origin: None,
            ..tensor
        };
        self.push_value(name, Def::Initializer, Some(tensor))
    }

    /// Adds a graph input after the existing ones.
    pub fn add_input(&mut self, name: &str, ty: ValueType) -> ValueId {
        let id = self.push_value(name.to_owned(), Def::Input, None);
        let new = id.index() - self.model.value_count();
        self.values[new].ty = Some(ty);
        self.edits.push(Edit::AddInput { value: id });
        id
    }

    /// Adds a graph output after the existing ones, under the value's name.
    pub fn add_output(&mut self, value: ValueId, ty: ValueType) {
        self.set_type(value, ty);
        self.edits.push(Edit::AddOutput { value });
    }

    /// Makes a value that the patch inserted a graph output after the existing ones, under a
    /// name that clients are to read it by, outside of the pass's scope.
    ///
    /// # Panics
    /// If the value belongs to the model (a programming error).
    pub fn publish(&mut self, value: ValueId, name: &str, ty: ValueType) {
        let new = value.index() - self.model.value_count();
        name.clone_into(&mut self.values[new].name);
        self.add_output(value, ty);
    }

    /// Gives a value that the patch inserted a name of its own choosing.
    ///
    /// # Panics
    /// If the value belongs to the model (a programming error).
    pub fn name_value(&mut self, value: ValueId, name: &str) {
        let new = value.index() - self.model.value_count();
        let name = format!("duet/{}/{name}", self.pass);
        self.values[new].name = name;
    }

    /// Makes input `slot` of a node of the model read `to`.
    pub fn rewire(&mut self, node: NodeId, slot: usize, to: ValueId) {
        self.edits.push(Edit::Rewire { node, slot, to });
    }

    /// Makes input `slot` of a node of the model read `to`, whether or not the node
    /// had that (optional) input before.
    pub fn connect(&mut self, node: NodeId, slot: usize, to: ValueId) {
        self.edits.push(Edit::Connect { node, slot, to });
    }

    /// Sets an attribute of a node of the model.
    pub fn set_attribute(&mut self, node: NodeId, attribute: Attribute) {
        self.edits.push(Edit::SetAttribute { node, attribute });
    }

    /// Makes every node of the model that reads `from` read `to`.
    pub fn rewire_all(&mut self, from: ValueId, to: ValueId) {
        let uses = self.model.value(from).uses.clone();
        for u in uses {
            self.rewire(u.node, u.slot, to);
        }
    }

    /// Makes graph output `index` be `to`, which takes over the output's name;
    /// the old value is renamed under this pass's scope.
    pub fn replace_output(&mut self, index: usize, to: ValueId, ty: ValueType) {
        self.set_type(to, ty);
        self.edits.push(Edit::ReplaceOutput { index, to });
    }

    /// States a value's type.
    pub fn set_type(&mut self, value: ValueId, ty: ValueType) {
        self.edits.push(Edit::SetType {
            value,
            ty: Some(ty),
        });
    }

    /// States the type of an intermediate value, also where the file states none so far.
    pub fn state_type(&mut self, value: ValueId, ty: ValueType) {
        self.edits.push(Edit::StateType { value, ty });
    }

    /// Leaves out input `slot`, which is optional, of a node of the model.
    pub fn disconnect(&mut self, node: NodeId, slot: usize) {
        self.edits.push(Edit::Disconnect { node, slot });
    }

    /// Takes a graph input off the interface; nothing may read it any more.
    pub fn remove_input(&mut self, value: ValueId) {
        self.edits.push(Edit::RemoveInput { value });
    }

    /// Withdraws the type that the file states for an intermediate value.
    pub fn forget_type(&mut self, value: ValueId) {
        self.edits.push(Edit::SetType { value, ty: None });
    }

    /// Sets a metadata entry of the model.
    pub fn metadata(&mut self, key: &str, value: &str) {
        self.edits.push(Edit::Metadata {
            key: key.to_owned(),
            value: value.to_owned(),
        });
    }

    /// Detaches the patch from its model.
    pub fn finish(self) -> PatchPlan {
        PatchPlan {
            pass: self.pass,
            graph: self.graph,
            base: (
                self.model.value_count(),
                self.model.node_count(),
                self.model.generation,
            ),
            values: self.values,
            nodes: self.nodes,
            edits: self.edits,
        }
    }
}

/// Integer attribute.
pub fn int(name: &str, value: i64) -> Attribute {
    Attribute {
        name: name.into(),
        value: AttrValue::Int(value),
    }
}

/// Integer list attribute.
pub fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute {
        name: name.into(),
        value: AttrValue::Ints(values.to_vec()),
    }
}

/// Float attribute.
pub fn float(name: &str, value: f32) -> Attribute {
    Attribute {
        name: name.into(),
        value: AttrValue::Float(value),
    }
}
