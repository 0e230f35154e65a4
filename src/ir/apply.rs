//! Carrying a patch out: the one function that mutates a model.

use std::collections::HashSet;

use super::model::{Def, MetadataEntry, Model, Use};
use super::patch::{Edit, PatchPlan};
use super::{GraphId, IrError, NodeId, ValueId, ValueType};

impl Model {
    /// Applies a patch and returns the changed model.
    ///
    /// What the patch leaves without a reader is removed: nodes that were live
    /// before and are dead now, and initializers that had a reader before or are
    /// the patch's own. What nothing read before stays. Nodes are
    /// then ordered topologically, keeping the file's order wherever it is one.
    ///
    /// # Errors
    /// A patch planned on another model, a rewire that names a slot the node
    /// does not have, a name that exists already, or a cycle. The model is
    /// consumed: after an error there is nothing half-changed to go on with.
    pub fn apply(mut self, plan: PatchPlan) -> Result<Model, IrError> {
        let at = |what: String| IrError::Patch {
            pass: plan.pass.clone(),
            reason: what,
        };
        if plan.base != (self.values.len(), self.nodes.len(), self.generation) {
            return Err(at("it was planned on another state of the model".into()));
        }
        if plan.is_empty() {
            return Ok(self);
        }
        self.generation += 1;
        let graph = plan.graph;
        let structural = !plan.nodes.is_empty()
            || plan
                .edits
                .iter()
                .any(|e| !matches!(e, Edit::Metadata { .. }));
        let dead_before = self.dead_nodes(graph);
        let unread_before = self.unread_initializers(graph);

        let mut names: HashSet<String> = self
            .values
            .iter()
            .filter(|v| v.graph == graph)
            .map(|v| v.name.clone())
            .collect();
        for value in plan.values {
            if !names.insert(value.name.clone()) {
                return Err(at(format!("the name '{}' exists already", value.name)));
            }
            let id = ValueId::new(self.values.len());
            if value.initializer.is_some() && value.def == Def::Initializer {
                self.graphs[graph.index()].initializers.push(id);
            }
            self.values.push(value);
        }
        for node in plan.nodes {
            let id = NodeId::new(self.nodes.len());
            for (slot, input) in node.inputs.iter().enumerate() {
                if let Some(value) = input {
                    self.values[value.index()].uses.push(Use { node: id, slot });
                }
            }
            self.graphs[graph.index()].nodes.push(id);
            self.nodes.push(Some(node));
        }
        let mut gone = Vec::new();
        let mut stated = Vec::new();
        for edit in plan.edits {
            match &edit {
                Edit::RemoveInput { value } => gone.push(*value),
                Edit::StateType { value, .. } => stated.push(*value),
                _ => {}
            }
            self.edit(graph, edit).map_err(at)?;
        }
        if structural {
            self.touch(graph);
            self.remove_newly_dead(graph, &dead_before);
            self.state(graph, &stated);
            for value in gone {
                self.remove_input(graph, value).map_err(at)?;
            }
            let unread = self.unread_initializers(graph);
            self.graphs[graph.index()]
                .initializers
                .retain(|v| !unread.contains(v) || unread_before.contains(v));
            self.sort(graph)?;
        } else {
            self.source = None;
        }
        Ok(self)
    }

    fn edit(&mut self, graph: GraphId, edit: Edit) -> Result<(), String> {
        match edit {
            Edit::Rewire { node, slot, to } => {
                let Some(old) = self.try_node(node).map(|n| n.input(slot)) else {
                    return Err(format!("rewire of {node}, which does not exist"));
                };
                let Some(old) = old else {
                    return Err(format!(
                        "rewire of input {slot} of {}, which it does not have",
                        self.describe(node)
                    ));
                };
                let here = Use { node, slot };
                self.values[old.index()].uses.retain(|u| *u != here);
                self.values[to.index()].uses.push(here);
                let owner = self.node(node).graph;
                let target = self.node_mut(node);
                target.inputs[slot] = Some(to);
                target.edited = true;
                self.touch(owner);
            }
            Edit::Connect { node, slot, to } => {
                if self.try_node(node).is_none() {
                    return Err(format!("an input for {node}, which does not exist"));
                }
                let here = Use { node, slot };
                if let Some(old) = self.node(node).input(slot) {
                    self.values[old.index()].uses.retain(|u| *u != here);
                }
                self.values[to.index()].uses.push(here);
                let owner = self.node(node).graph;
                let target = self.node_mut(node);
                if target.inputs.len() <= slot {
                    target.inputs.resize(slot + 1, None);
                }
                target.inputs[slot] = Some(to);
                target.edited = true;
                self.touch(owner);
            }
            Edit::SetAttribute { node, attribute } => {
                if self.try_node(node).is_none() {
                    return Err(format!("an attribute for {node}, which does not exist"));
                }
                let owner = self.node(node).graph;
                let target = self.node_mut(node);
                let same = |a: &&mut super::Attribute| a.name == attribute.name;
                match target.attributes.iter_mut().find(same) {
                    Some(old) => *old = attribute,
                    None => target.attributes.push(attribute),
                }
                // What the file says of the node is no longer so: it is written anew.
                target.origin = None;
                self.touch(owner);
            }
            Edit::ReplaceOutput { index, to } => {
                let Some(&old) = self.graphs[graph.index()].outputs.get(index) else {
                    return Err(format!("there is no graph output {index}"));
                };
                for value in [old, to] {
                    let v = self.value(value);
                    let problem = match v.def {
                        Def::Input => "is a graph input, whose name has to stay",
                        _ if v.graph != graph => "belongs to another graph",
                        _ if value == to && self.is_output(to) => "is a graph output already",
                        _ => continue,
                    };
                    return Err(format!(
                        "replacing graph output {index}: '{}' {problem}",
                        v.name
                    ));
                }
                let inner = format!("{}:inner", self.values[to.index()].name);
                let outer = std::mem::replace(&mut self.values[old.index()].name, inner);
                self.values[to.index()].name = outer;
                self.values[old.index()].ty = None;
                self.values[old.index()].info_origin = None;
                self.graphs[graph.index()].outputs[index] = to;
                // Every node that writes or reads a renamed value changes.
                for value in [old, to] {
                    let users = self.values[value.index()].uses.clone();
                    for u in users {
                        self.node_mut(u.node).edited = true;
                        let owner = self.node(u.node).graph;
                        self.touch(owner);
                    }
                    if let Some(producer) = self.producer_of(value) {
                        self.node_mut(producer).edited = true;
                    }
                    // A body may give out what it captured.
                    let givers = self.graphs().filter(|(_, g)| g.outputs.contains(&value));
                    let givers: Vec<GraphId> = givers.map(|(id, _)| id).collect();
                    givers.into_iter().for_each(|id| self.touch(id));
                    let renamed = &mut self.values[value.index()];
                    if let Some(tensor) = &mut renamed.initializer {
                        tensor.origin = None;
                        tensor.name.clone_from(&renamed.name);
                    }
                }
            }
            Edit::SetType { value, ty } => self.set_type(value, ty),
            Edit::StateType { value, ty } => self.set_type(value, Some(ty)),
            // It goes when all edits are made: what reads it may be removed by them.
            Edit::RemoveInput { .. } => {}
            Edit::Disconnect { node, slot } => {
                let Some(old) = self.try_node(node).and_then(|n| n.input(slot)) else {
                    return Err(format!("input {slot} of {node}, which it does not have"));
                };
                let here = Use { node, slot };
                self.values[old.index()].uses.retain(|u| *u != here);
                let owner = self.node(node).graph;
                let target = self.node_mut(node);
                target.inputs[slot] = None;
                // Nothing is written for what is left out at the end.
                while target.inputs.last() == Some(&None) {
                    target.inputs.pop();
                }
                target.edited = true;
                self.touch(owner);
            }
            Edit::AddInput { value } => self.graphs[graph.index()].inputs.push(value),
            Edit::AddOutput { value } => self.graphs[graph.index()].outputs.push(value),
            Edit::Metadata { key, value } => {
                let origin = None;
                let entry = MetadataEntry { key, value, origin };
                match self.metadata.iter_mut().find(|m| m.key == entry.key) {
                    Some(old) => *old = entry,
                    None => self.metadata.push(entry),
                }
            }
        }
        Ok(())
    }

    fn set_type(&mut self, value: ValueId, ty: Option<ValueType>) {
        let v = &mut self.values[value.index()];
        v.ty = ty;
        v.info_origin = None;
    }

    /// Lists intermediate values among those whose type the file states.
    fn state(&mut self, graph: GraphId, values: &[ValueId]) {
        let listed: HashSet<ValueId> = self.subgraph(graph).typed.iter().copied().collect();
        let inner = |v: &ValueId| matches!(self.value(*v).def, Def::Node { .. });
        let new: Vec<ValueId> = values
            .iter()
            .copied()
            .filter(|v| inner(v) && !self.is_output(*v) && !listed.contains(v))
            .collect();
        self.graphs[graph.index()].typed.extend(new);
    }

    /// Takes an input that nothing reads off the interface.
    fn remove_input(&mut self, graph: GraphId, value: ValueId) -> Result<(), String> {
        if let Some(reader) = self.value(value).uses.first() {
            return Err(format!(
                "the input '{}' cannot go, {} reads it",
                self.name(value),
                self.describe(reader.node)
            ));
        }
        self.graphs[graph.index()].inputs.retain(|v| *v != value);
        Ok(())
    }

    /// Which nodes the outputs of a graph depend on, by index.
    fn live_nodes(&self, graph: GraphId) -> Vec<bool> {
        let mut live = vec![false; self.nodes.len()];
        let mut stack: Vec<ValueId> = self.subgraph(graph).outputs.clone();
        while let Some(value) = stack.pop() {
            let Some(id) = self.producer_of(value) else {
                continue;
            };
            if !std::mem::replace(&mut live[id.index()], true) {
                self.push_reads(id, &mut stack);
            }
        }
        live
    }

    /// Nodes of a graph that no graph output depends on.
    fn dead_nodes(&self, graph: GraphId) -> HashSet<NodeId> {
        let live = self.live_nodes(graph);
        let all = &self.subgraph(graph).nodes;
        all.iter().copied().filter(|n| !live[n.index()]).collect()
    }

    /// Everything a node reads, captured values of its bodies included.
    pub(in crate::ir) fn push_reads(&self, id: NodeId, into: &mut Vec<ValueId>) {
        let node = self.node(id);
        into.extend(node.inputs.iter().flatten());
        for body in node.subgraphs() {
            let g = self.subgraph(body);
            into.extend(g.outputs.iter());
            for &inner in &g.nodes {
                self.push_reads(inner, into);
            }
        }
    }

    fn remove_newly_dead(&mut self, graph: GraphId, dead_before: &HashSet<NodeId>) {
        let newly: HashSet<NodeId> = self
            .dead_nodes(graph)
            .difference(dead_before)
            .copied()
            .collect();
        if newly.is_empty() {
            return;
        }
        for &id in &newly {
            self.remove_node(id);
        }
        self.graphs[graph.index()]
            .nodes
            .retain(|n| !newly.contains(n));
    }

    /// Initializers of a graph that no node reads and no graph gives out.
    fn unread_initializers(&self, graph: GraphId) -> HashSet<ValueId> {
        let given: HashSet<ValueId> = self
            .graphs
            .iter()
            .flat_map(|g| g.outputs.iter().copied())
            .collect();
        let unread = |v: &ValueId| {
            let value = self.value(*v);
            value.def == Def::Initializer && value.uses.is_empty() && !given.contains(v)
        };
        self.subgraph(graph)
            .initializers
            .iter()
            .copied()
            .filter(unread)
            .collect()
    }

    fn remove_node(&mut self, id: NodeId) {
        let Some(node) = self.nodes[id.index()].take() else {
            return;
        };
        for (slot, input) in node.inputs.iter().enumerate() {
            if let Some(value) = input {
                let here = Use { node: id, slot };
                self.values[value.index()].uses.retain(|u| *u != here);
            }
        }
        let bodies: Vec<GraphId> = node.subgraphs().collect();
        for body in bodies {
            for inner in std::mem::take(&mut self.graphs[body.index()].nodes) {
                self.remove_node(inner);
            }
        }
    }

    /// Orders a graph's nodes topologically: each in its present place, unless
    /// something it reads has to come first.
    pub(in crate::ir) fn sort(&mut self, graph: GraphId) -> Result<(), IrError> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            Outside,
            Waiting,
            Open,
            Done,
        }
        let order = self.subgraph(graph).nodes.clone();
        let mut marks = vec![Mark::Outside; self.nodes.len()];
        for node in &order {
            marks[node.index()] = Mark::Waiting;
        }
        let mut sorted = Vec::with_capacity(order.len());
        let mut reads = Vec::new();
        for &root in &order {
            let mut stack = vec![(root, false)];
            while let Some((id, leaving)) = stack.pop() {
                if leaving {
                    marks[id.index()] = Mark::Done;
                    sorted.push(id);
                    continue;
                }
                match marks[id.index()] {
                    Mark::Done => continue,
                    Mark::Open => {
                        return Err(IrError::Cycle {
                            node: self.describe(id),
                        });
                    }
                    Mark::Outside | Mark::Waiting => {}
                }
                marks[id.index()] = Mark::Open;
                stack.push((id, true));
                reads.clear();
                self.push_reads(id, &mut reads);
                // A producer found open again lies on the path that led here.
                for value in reads.iter().rev() {
                    if let Some(producer) = self.producer_of(*value)
                        && matches!(marks[producer.index()], Mark::Waiting | Mark::Open)
                    {
                        stack.push((producer, false));
                    }
                }
            }
        }
        self.graphs[graph.index()].nodes = sorted;
        Ok(())
    }
}
