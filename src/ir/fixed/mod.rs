//! Fixing shapes: a graph for inputs of given sizes, in which every size is a number.
//!
//! Types and shapes of all values follow from those of the inputs, operator by operator, and so do the elements of
//! integer tensors that are computed from shapes. What is known is written as a constant, so that the arithmetic of
//! sizes (`Shape`, `Gather`, `Range`, …) goes, and what then changes nothing goes with it:
//!
//! ```text
//!  Concat(past of no columns, new) ─▶ new          Expand, Slice, Reshape, Tile to the shape that is there ─▶ –
//!  TopK of all, sorted, then GatherND ─▶ –         attention's past of no columns ─▶ no past
//! ```
//!
//! Inputs of no elements are taken off the interface: no runtime for fixed shapes takes them.

mod fact;
mod fused;
mod shapes;
#[cfg(test)]
mod tests;
mod values;

use std::collections::{HashMap, HashSet};

use self::fact::{Call, Data, FEW, Fact, count};
use super::model::{Def, Model, Node};
use super::{DataType, Dim, NodeId, Patch, PatchPlan, Tensor, ValueId, ValueType, consts, int};

/// Metadata entry of decoders: `left` or `right`, where short prompts and caches are padded.
pub const PADDING_KEY: &str = "duet.static.padding";

/// Metadata entry of decoders: the visual tokens that each row of a prompt has to have.
pub const VISUAL_KEY: &str = "duet.static.visual";

/// A value whose shape does not follow from those of the inputs, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The node, for messages.
    pub node: String,
    /// Why.
    pub why: String,
}

impl std::fmt::Display for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.node, self.why)
    }
}

/// What a graph computes of inputs of given shapes.
struct Facts<'m> {
    model: &'m Model,
    facts: Vec<Fact>,
}

impl<'m> Facts<'m> {
    fn of(model: &'m Model, inputs: &HashMap<ValueId, Vec<i64>>) -> Self {
        let mut facts = vec![Fact::default(); model.value_count()];
        let graph = model.graph();
        for &value in &graph.initializers {
            if let Some(tensor) = &model.value(value).initializer {
                facts[value.index()] = of_tensor(model, tensor);
            }
        }
        for &value in &graph.inputs {
            let ty = model.value(value).ty.as_ref();
            let stated = || {
                let dims = ty.and_then(|t| t.shape())?;
                dims.iter().map(Dim::known).collect::<Option<Vec<i64>>>()
            };
            let shape = inputs.get(&value).cloned().or_else(stated);
            let data = match &shape {
                Some(shape) if shape.contains(&0) => Some(Data::Ints([].into())),
                _ => None,
            };
            facts[value.index()] = Fact {
                dtype: ty.and_then(ValueType::dtype),
                shape,
                data,
                permutes: false,
            };
        }
        let mut all = Self { model, facts };
        for &id in &graph.nodes {
            all.node(id);
        }
        all
    }

    fn get(&self, value: ValueId) -> &Fact {
        &self.facts[value.index()]
    }

    fn node(&mut self, id: NodeId) {
        let model = self.model;
        let node = model.node(id);
        if node.is("Constant") {
            if let Some(value) = node.output(0)
                && let Some(tensor) = consts::constant(model, value)
            {
                self.facts[value.index()] = of_tensor(model, &tensor);
            }
            return;
        }
        if node.subgraphs().next().is_some() || model.is_function(node) {
            return;
        }
        let call = Call {
            node,
            inputs: node.inputs.iter().map(|v| v.map(|v| self.get(v))).collect(),
        };
        let mut found = shapes::infer(&call);
        if let Some(first) = found.first_mut() {
            first.data = values::evaluate(&call, first);
            if first.is_empty() {
                first.data = Some(Data::Ints([].into()));
            }
        }
        for (value, mut fact) in node.outputs.iter().zip(found) {
            let Some(value) = value else { continue };
            if fact.dtype.is_none() {
                fact.dtype = model.value(*value).ty.as_ref().and_then(ValueType::dtype);
            }
            self.facts[value.index()] = fact;
        }
    }

    /// Whether a value is known and computed, so that a constant can take its place.
    fn folds(&self, value: ValueId) -> bool {
        let fact = self.get(value);
        let computed = match self.model.value(value).def {
            Def::Node { node, .. } => !self.model.node(node).is("Constant"),
            Def::Input => fact.is_empty(),
            _ => false,
        };
        computed && fact.data.is_some() && fact.tensor().is_some()
    }

    /// The input that a node passes on unchanged.
    fn passed_on(&self, node: &Node) -> Option<ValueId> {
        let source = node.input(0)?;
        let out = node.output(0)?;
        let (from, to) = (self.get(source), self.get(out));
        let same = from.shape.is_some() && from.shape == to.shape && from.dtype == to.dtype;
        let idle = match node.op_type.as_str() {
            "Expand" | "Tile" | "Reshape" => true,
            "Slice" => node.input(4).is_none_or(|s| {
                let steps = self.ints(s);
                steps.is_some_and(|s| s.iter().all(|s| *s == 1))
            }),
            "GatherND" => self.every_row(node),
            "Add" | "Sub" => node
                .input(1)
                .and_then(|v| self.ints(v))
                .is_some_and(|all| all.iter().all(|v| *v == 0)),
            _ => false,
        };
        (node.domain.is_empty() && same && idle).then_some(source)
    }

    fn ints(&self, value: ValueId) -> Option<&[i64]> {
        match self.get(value).data.as_ref()? {
            Data::Ints(all) => Some(all),
            Data::Floats(_) => None,
        }
    }

    /// Whether a `GatherND` takes all rows in their order.
    fn every_row(&self, node: &Node) -> bool {
        let gathers = || {
            let rows = *self.get(node.input(0)?).shape.as_ref()?.get(1)?;
            let indices = self.ints(node.input(1)?)?;
            let each = indices.iter().zip((0..rows).cycle());
            Some(rows > 0 && each.into_iter().all(|(index, row)| *index == row))
        };
        node.attr_int("batch_dims") == Some(1) && gathers() == Some(true)
    }

    /// Live values without a shape: the first of each chain.
    fn open(&self, live: &HashSet<NodeId>) -> Vec<Open> {
        let model = self.model;
        let mut open = Vec::new();
        for &id in model.graph().nodes.iter().filter(|id| live.contains(id)) {
            let node = model.node(id);
            let known = |v: &ValueId| self.get(*v).shape.is_some() && self.get(*v).dtype.is_some();
            let outputs = node.outputs.iter().flatten();
            let bad = outputs.filter(|v| !known(v) && self.is_read(**v)).count();
            if bad == 0 || !node.inputs.iter().flatten().all(known) {
                continue;
            }
            let why = if node.subgraphs().next().is_some() {
                "holds a sub-graph, whose result may have any shape".to_owned()
            } else if model.is_function(node) {
                "calls a model-local function, which is not looked into".to_owned()
            } else if node.is("Range") {
                "gives as many numbers as its inputs say, which only the run tells".to_owned()
            } else if node.is("NonZero") {
                "gives as many rows as there are elements that are not zero, which only the run tells".to_owned()
            } else {
                let of =
                    node.inputs
                        .iter()
                        .map(|v| match v.and_then(|v| self.get(v).shape.as_ref()) {
                            Some(shape) => format!("{shape:?}"),
                            None => "–".into(),
                        });
                format!(
                    "gives a shape that does not follow from those of its inputs ({})",
                    of.collect::<Vec<_>>().join(", ")
                )
            };
            open.push(Open {
                node: model.describe(id),
                why,
            });
        }
        open
    }

    fn is_read(&self, value: ValueId) -> bool {
        !self.model.value(value).uses.is_empty() || self.model.is_output(value)
    }
}

fn of_tensor(model: &Model, tensor: &Tensor) -> Fact {
    let mut fact = Fact::of(Some(tensor.dtype), tensor.dims.clone());
    let Some(n) = count(&tensor.dims) else {
        return fact;
    };
    fact.data = match tensor.dtype {
        DataType::Int64 | DataType::Int32 | DataType::Bool => tensor
            .to_i64s(model.external())
            .ok()
            .map(|all| Data::Ints(all.into())),
        #[allow(clippy::cast_possible_truncation, reason = "they are fp32")]
        DataType::Float if n <= FEW => tensor
            .to_f64s(model.external())
            .ok()
            .map(|all| Data::Floats(all.iter().map(|v| *v as f32).collect())),
        _ => None,
    };
    fact
}

/// Where attention operators take a past: key and value, or nothing.
fn past_slots(node: &Node) -> &'static [usize] {
    match (node.domain.as_str(), node.op_type.as_str()) {
        ("com.microsoft", "GroupQueryAttention") => &[3, 4],
        ("com.microsoft", "MultiHeadAttention") => &[6, 7],
        ("" | "ai.onnx", "Attention") => &[4, 5],
        _ => &[],
    }
}

/// Plans the patch that fixes a graph's shapes for inputs of the shapes `inputs`; inputs of which nothing is said have
/// to state theirs.
///
/// # Errors
/// The values whose shapes do not follow.
pub fn fix(
    model: &Model,
    pass: &str,
    inputs: &HashMap<ValueId, Vec<i64>>,
) -> Result<PatchPlan, Vec<Open>> {
    let facts = Facts::of(model, inputs);
    let mut patch = Patch::new(model, pass);
    let mut plan = Plan {
        facts: &facts,
        patch: &mut patch,
        places: HashMap::new(),
    };
    let live = plan.live();
    let mut open = facts.open(&live);
    let graph = model.graph();
    for &value in &graph.inputs {
        if facts.get(value).shape.is_none() {
            let node = format!("input '{}'", model.name(value));
            open.push(Open {
                node,
                why: "has a shape that nothing says".into(),
            });
        }
    }
    if !open.is_empty() {
        return Err(open);
    }
    plan.rewire(&live);
    plan.interface();
    plan.types(&live);
    Ok(patch.finish())
}

struct Plan<'a, 'm> {
    facts: &'a Facts<'m>,
    patch: &'a mut Patch<'m>,
    /// What takes a value's place.
    places: HashMap<ValueId, ValueId>,
}

impl Plan<'_, '_> {
    /// Inputs of a node that hold something, where it joins them.
    fn joined(&self, node: &Node) -> Option<Vec<ValueId>> {
        if !node.is("Concat") {
            return None;
        }
        let all: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
        let some: Vec<ValueId> = all
            .iter()
            .copied()
            .filter(|v| !self.facts.get(*v).is_empty())
            .collect();
        (!some.is_empty() && some.len() < all.len()).then_some(some)
    }

    /// What a value is the same as, in the model as it is.
    fn source(&self, value: ValueId) -> ValueId {
        let mut at = value;
        while let Some(node) = self.facts.model.producer_node(at) {
            if self.facts.folds(at) || node.output(0) != Some(at) {
                break;
            }
            at = match (self.joined(node), self.facts.passed_on(node)) {
                (Some(some), _) if some.len() == 1 => some[0],
                (None, Some(source)) => source,
                _ => break,
            };
        }
        at
    }

    /// Nodes that are needed once what is known is constant.
    fn live(&self) -> HashSet<NodeId> {
        let model = self.facts.model;
        let mut live = HashSet::new();
        let mut stack: Vec<ValueId> = model.graph().outputs.clone();
        let mut seen = HashSet::new();
        while let Some(value) = stack.pop() {
            let value = self.source(value);
            if !seen.insert(value) || self.facts.folds(value) {
                continue;
            }
            let Some(id) = model.producer_of(value) else {
                continue;
            };
            if !live.insert(id) {
                continue;
            }
            let node = model.node(id);
            let past = past_slots(node);
            for (slot, input) in node.inputs.iter().enumerate() {
                let Some(input) = *input else { continue };
                if past.contains(&slot) && self.facts.get(input).is_empty() {
                    continue;
                }
                stack.push(input);
            }
            if node.subgraphs().next().is_some() {
                // What bodies capture.
                let mut reads = Vec::new();
                model.push_reads(id, &mut reads);
                reads.retain(|v| model.value(*v).graph == model.main());
                stack.extend(reads);
            }
        }
        live
    }

    /// What readers of `value` are to read.
    fn place(&mut self, value: ValueId) -> ValueId {
        let source = self.source(value);
        if let Some(&place) = self.places.get(&source) {
            return place;
        }
        let model = self.facts.model;
        let mut place = source;
        if self.facts.folds(source) {
            if let Some(tensor) = self.facts.get(source).tensor() {
                place = self.patch.constant(tensor);
            }
        } else if let Some(node) = model.producer_node(source)
            && let Some(some) = self.joined(node)
        {
            let axis = node.attr_int("axis").unwrap_or(0);
            let parts: Vec<ValueId> = some.into_iter().map(|v| self.place(v)).collect();
            place = self
                .patch
                .op_with("Concat", &parts, vec![int("axis", axis)]);
            if let Some(ty) = self.ty(source) {
                self.patch.state_type(place, ty);
            }
        }
        self.places.insert(source, place);
        place
    }

    fn ty(&self, value: ValueId) -> Option<ValueType> {
        let fact = self.facts.get(value);
        let dims = fact
            .shape
            .as_ref()?
            .iter()
            .map(|d| Dim::Known(*d))
            .collect();
        Some(ValueType::tensor(fact.dtype?, dims))
    }

    fn rewire(&mut self, live: &HashSet<NodeId>) {
        let model = self.facts.model;
        for &id in model.graph().nodes.iter().filter(|id| live.contains(id)) {
            let node = model.node(id);
            if self.joined(node).is_some() {
                // Another takes its place.
                continue;
            }
            let past = past_slots(node);
            for slot in 0..node.inputs.len() {
                let Some(value) = node.input(slot) else {
                    continue;
                };
                if past.contains(&slot) && self.facts.get(value).is_empty() {
                    self.patch.disconnect(id, slot);
                    continue;
                }
                let place = self.place(value);
                if place != value {
                    self.patch.rewire(id, slot, place);
                }
            }
        }
    }

    /// Outputs that are something else now, and inputs that hold nothing.
    fn interface(&mut self) {
        let graph = self.facts.model.graph();
        for (index, &output) in graph.outputs.iter().enumerate() {
            let place = self.place(output);
            let Some(ty) = self.ty(output) else { continue };
            if place == output {
                self.patch.set_type(output, ty);
            } else {
                let copy = self.patch.op("Identity", &[place]);
                self.patch.replace_output(index, copy, ty);
            }
        }
        for &input in &graph.inputs {
            match self.ty(input) {
                _ if self.facts.get(input).is_empty() => self.patch.remove_input(input),
                Some(ty) => self.patch.set_type(input, ty),
                None => {}
            }
        }
    }

    /// States what is known of values in between.
    fn types(&mut self, live: &HashSet<NodeId>) {
        let model = self.facts.model;
        for &id in model.graph().nodes.iter().filter(|id| live.contains(id)) {
            for &value in model.node(id).outputs.iter().flatten() {
                if let Some(ty) = self.ty(value).filter(|_| !model.is_output(value)) {
                    self.patch.state_type(value, ty);
                }
            }
        }
    }
}

/// What is not fixed in a graph whose inputs state their shapes: values whose shape does not follow, and nodes that
/// compute sizes.
pub fn loose(model: &Model) -> Vec<Open> {
    let facts = Facts::of(model, &HashMap::new());
    let nodes: HashSet<NodeId> = model.graph().nodes.iter().copied().collect();
    let mut open = facts.open(&nodes);
    for &id in &model.graph().nodes {
        let node = model.node(id);
        if ["Shape", "Size", "Range", "NonZero"]
            .iter()
            .any(|op| node.is(op))
        {
            let why = "computes a size or depends on one".to_owned();
            open.push(Open {
                node: model.describe(id),
                why,
            });
        }
    }
    open
}
