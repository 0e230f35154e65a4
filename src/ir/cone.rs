//! Cones: what a value depends on, and cloning that with other roots.
//!
//! "Cut and re-root" rests on this: whatever an exporter computes from the
//! sequence (masks, rotary tables, reshape targets) is cloned with its roots
//! substituted, so that no exporter's way of computing it has to be known.

use std::collections::{HashMap, HashSet};

use super::model::Model;
use super::{NodeId, Patch, ValueId};

/// Old value → new value. Cloning extends it with everything it cloned.
pub type Substitution = HashMap<ValueId, ValueId>;

/// Which inputs of a node count as carrying data rather than sizes.
///
/// `Shape` and `Size` turn data into sizes; everything behind them describes
/// how much there is, not what it is.
pub fn carries_data(model: &Model, node: NodeId) -> bool {
    let node = model.node(node);
    !(node.is("Shape") || node.is("Size"))
}

/// Values of one graph that depend on `roots`, the roots included.
///
/// With `data_only`, dependence through `Shape`/`Size` does not count.
pub fn descendants(model: &Model, roots: &[ValueId], data_only: bool) -> HashSet<ValueId> {
    descendants_up_to(model, roots, &[], data_only)
}

/// As [`descendants`], not looking behind the values of `stop`.
pub fn descendants_up_to(
    model: &Model,
    roots: &[ValueId],
    stop: &[ValueId],
    data_only: bool,
) -> HashSet<ValueId> {
    let mut seen: HashSet<ValueId> = roots.iter().copied().collect();
    let mut stack: Vec<ValueId> = roots.to_vec();
    while let Some(value) = stack.pop() {
        if stop.contains(&value) {
            continue;
        }
        for u in &model.value(value).uses {
            if data_only && !carries_data(model, u.node) {
                continue;
            }
            for out in holder_outputs(model, u.node) {
                if seen.insert(out) {
                    stack.push(out);
                }
            }
        }
    }
    seen
}

/// Values that depend on what a run is given, the inputs without a default included.
pub fn varying(model: &Model) -> HashSet<ValueId> {
    let inputs = model.graph().inputs.iter().copied();
    let given: Vec<ValueId> = inputs
        .filter(|v| model.value(*v).initializer.is_none())
        .collect();
    descendants(model, &given, false)
}

/// Outputs of a node and, if it sits in a body, of the nodes that hold it.
fn holder_outputs(model: &Model, node: NodeId) -> Vec<ValueId> {
    let n = model.node(node);
    let mut outputs: Vec<ValueId> = n.outputs.iter().flatten().copied().collect();
    if model.subgraph(n.graph).kind != super::GraphKind::Main {
        // A captured value influences whatever the holding node computes.
        if let Some(holder) = holder_of(model, n.graph) {
            outputs.extend(holder_outputs(model, holder));
        }
    }
    outputs
}

/// The node whose attribute holds a body.
pub fn holder_of(model: &Model, graph: super::GraphId) -> Option<NodeId> {
    let super::GraphKind::Body { parent } = model.subgraph(graph).kind else {
        return None;
    };
    let found = |&&n: &&NodeId| model.node(n).subgraphs().any(|g| g == graph);
    model.subgraph(parent).nodes.iter().find(found).copied()
}

/// Values that `targets` depend on, the targets included.
///
/// With `data_only`, the walk does not pass through `Shape`/`Size`.
pub fn ancestors(model: &Model, targets: &[ValueId], data_only: bool) -> HashSet<ValueId> {
    ancestors_up_to(model, targets, |_| false, data_only)
}

/// As [`ancestors`], not looking before values of which `stop` holds.
pub fn ancestors_up_to(
    model: &Model,
    targets: &[ValueId],
    stop: impl Fn(ValueId) -> bool,
    data_only: bool,
) -> HashSet<ValueId> {
    let mut seen: HashSet<ValueId> = targets.iter().copied().collect();
    let mut stack: Vec<ValueId> = targets.to_vec();
    let mut reads = Vec::new();
    while let Some(value) = stack.pop() {
        let Some(node) = model.producer_of(value).filter(|_| !stop(value)) else {
            continue;
        };
        if data_only && !carries_data(model, node) {
            continue;
        }
        reads.clear();
        model.push_reads(node, &mut reads);
        for &read in &reads {
            if seen.insert(read) {
                stack.push(read);
            }
        }
    }
    seen
}

impl Patch<'_> {
    /// Clones what `target` depends on, with the roots in `subst` replaced,
    /// and returns the value that stands for `target`.
    ///
    /// A node is cloned only if it depends on a replaced root; everything else
    /// is shared with the original. `subst` is extended with the clones, so
    /// that later calls share them. Sub-graphs are not cloned.
    ///
    /// # Errors
    /// The node (by name) that holds a sub-graph and would have to be cloned.
    pub fn clone_cone(
        &mut self,
        target: ValueId,
        subst: &mut Substitution,
    ) -> Result<ValueId, String> {
        // Post-order over producers without recursion: graphs are deep.
        let mut stack = vec![(target, false)];
        while let Some((value, ready)) = stack.pop() {
            if subst.contains_key(&value) {
                continue;
            }
            let Some(producer) = self.model().producer_of(value) else {
                subst.insert(value, value);
                continue;
            };
            if !ready {
                stack.push((value, true));
                let mut reads = Vec::new();
                self.model().push_reads(producer, &mut reads);
                stack.extend(
                    reads
                        .into_iter()
                        .filter(|r| !subst.contains_key(r))
                        .map(|r| (r, false)),
                );
                continue;
            }
            let node = self.model().node(producer);
            let mut reads = Vec::new();
            self.model().push_reads(producer, &mut reads);
            let changed = reads.iter().any(|r| subst.get(r) != Some(r));
            if !changed {
                subst.insert(value, value);
                continue;
            }
            if node.subgraphs().next().is_some() {
                return Err(self.model().describe(producer));
            }
            let inputs = node
                .inputs
                .iter()
                .map(|input| input.map(|v| (v, subst[&v])))
                .collect::<Vec<_>>();
            let inputs = inputs
                .into_iter()
                .map(|input| input.map(|(old, new)| self.own_weight(old, new)))
                .collect();
            let outputs = self.copy_node(producer, inputs);
            for (old, new) in self.model().node(producer).outputs.iter().zip(outputs) {
                if let (Some(old), Some(new)) = (old, new) {
                    // An output that is itself a substituted root stays so.
                    subst.entry(*old).or_insert(new);
                }
            }
        }
        Ok(subst[&target])
    }

    /// A shared weight that is stored in blocks of few bits gets a
    /// `DequantizeLinear` and a tensor of its own (one that refers to the same bytes,
    /// where they are external): ONNX Runtime fuses it with its `MatMul` only where
    /// neither has another reader. Shared by original and clone, both would lose the
    /// fusion, and with it the fused kernel's rounding of activations.
    fn own_weight(&mut self, old: ValueId, new: ValueId) -> ValueId {
        let model = self.model();
        let Some(producer) = model.producer_of(old).filter(|_| old == new) else {
            return new;
        };
        let node = model.node(producer);
        let blocks = node.attr_int("block_size").unwrap_or(0) > 0;
        if !node.is("DequantizeLinear") || !blocks {
            return new;
        }
        let tensors: Option<Vec<_>> = node
            .inputs
            .iter()
            .map(|input| match input {
                Some(v) => Some(Some(model.value(*v).initializer.clone()?)),
                None => Some(None),
            })
            .collect();
        let Some(tensors) = tensors else {
            return new;
        };
        let mut inputs = Vec::new();
        for tensor in tensors {
            inputs.push(tensor.map(|t| self.own_constant(t)));
        }
        let copies = self.copy_node(producer, inputs);
        copies.first().copied().flatten().unwrap_or(new)
    }
}
