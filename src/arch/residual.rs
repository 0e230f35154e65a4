//! The residual stream: the values through which all data must pass.
//!
//! A value is an *articulation* between a source and a sink if every data path
//! between them goes through it. In a transformer these are the residual
//! tensors: within a block the residual branch runs beside attention or MLP, so
//! nothing inside a block qualifies. No operator pattern has to be known.
//!
//! An optimiser that computes a residual sum and its norm in one operator
//! (`SkipSimplifiedLayerNormalization`) leaves no single such value, but the
//! operator is one: all data passes through its outputs *together*. So what is
//! found are cuts, each a list of values of one node.

use std::collections::{HashMap, HashSet};

use crate::ir::cone::{ancestors, ancestors_up_to, carries_data, descendants, holder_of};
use crate::ir::{GraphKind, Model, NodeId, ValueId};

/// Values that together carry everything from what is before them to what is
/// behind: one, or several outputs of one node in the order of its outputs.
pub(super) type Cut = Vec<ValueId>;

/// The residual stream of a decoder, and where in it a value is.
#[derive(Default)]
pub(super) struct Stream {
    /// Its cuts, in order.
    pub(super) cuts: Vec<Cut>,
    place: HashMap<ValueId, usize>,
}

impl Stream {
    /// The cuts between `source` and `sink`.
    pub(super) fn between(model: &Model, source: ValueId, sink: ValueId) -> Self {
        let cuts = cuts(model, source, sink);
        let values = cuts.iter().enumerate();
        let place = values.flat_map(|(i, cut)| cut.iter().map(move |v| (*v, i)));
        Self {
            place: place.collect(),
            cuts,
        }
    }

    /// The number of the cut that a value is of.
    pub(super) fn place(&self, value: ValueId) -> Option<usize> {
        self.place.get(&value).copied()
    }

    /// What a value depends on, back to the stream and not before it: whatever depends
    /// on more does so through these.
    pub(super) fn local(&self, model: &Model, value: ValueId) -> HashSet<ValueId> {
        ancestors_up_to(model, &[value], |v| self.place.contains_key(&v), true)
    }

    /// The number of the last cut that a value depends on.
    pub(super) fn entry_of(&self, model: &Model, value: ValueId) -> Option<usize> {
        let found = self.local(model, value);
        found.iter().filter_map(|v| self.place(*v)).max()
    }
}

/// Values between `source` and `sink` that carry all data alone, in order, both
/// included.
pub(super) fn articulations(model: &Model, source: ValueId, sink: ValueId) -> Vec<ValueId> {
    let single = cuts(model, source, sink)
        .into_iter()
        .filter(|c| c.len() == 1);
    single.flatten().collect()
}

/// Cuts between `source` and `sink`, in order, both included.
pub(super) fn cuts(model: &Model, source: ValueId, sink: ValueId) -> Vec<Cut> {
    let down = descendants(model, &[source], true);
    if !down.contains(&sink) {
        return Vec::new();
    }
    let up = ancestors(model, &[sink], true);
    let between: HashSet<ValueId> = down.intersection(&up).copied().collect();
    // Readers that each value still has ahead of the sweep.
    let mut open: HashMap<ValueId, usize> = HashMap::new();
    let readers = |value: ValueId| {
        model
            .value(value)
            .uses
            .iter()
            .filter(|u| {
                carries_data(model, u.node)
                    && model
                        .node(outermost(model, u.node))
                        .outputs
                        .iter()
                        .flatten()
                        .any(|o| between.contains(o))
            })
            .count()
    };
    let mut reads = Vec::new();
    open.insert(source, readers(source));
    let mut found = vec![vec![source]];
    for &id in &model.graph().nodes {
        if !carries_data(model, id) {
            continue;
        }
        let node = model.node(id);
        let made: Vec<ValueId> = node
            .outputs
            .iter()
            .flatten()
            .copied()
            .filter(|o| between.contains(o))
            .collect();
        if made.is_empty() {
            continue;
        }
        reads.clear();
        data_reads(model, id, &mut reads);
        for input in &reads {
            if let Some(left) = open.get_mut(input) {
                *left -= 1;
                if *left == 0 {
                    open.remove(input);
                }
            }
        }
        for &value in &made {
            if value == sink {
                found.push(vec![sink]);
                return found;
            }
            open.insert(value, readers(value));
        }
        // One value, or exactly what this node made.
        let cut = match open.len() {
            1 => open.keys().copied().collect(),
            n if n == made.len() && made.iter().all(|v| open.contains_key(v)) => made,
            _ => continue,
        };
        if found.last() != Some(&cut) {
            found.push(cut);
        }
    }
    found
}

/// The node of the main graph that a node is, or lies in.
fn outermost(model: &Model, node: NodeId) -> NodeId {
    let mut at = node;
    while model.subgraph(model.node(at).graph).kind != GraphKind::Main {
        match holder_of(model, model.node(at).graph) {
            Some(holder) => at = holder,
            None => break,
        }
    }
    at
}

/// What a node reads as data, once for each use, those in its bodies included.
fn data_reads(model: &Model, id: NodeId, into: &mut Vec<ValueId>) {
    if !carries_data(model, id) {
        return;
    }
    let node = model.node(id);
    into.extend(node.inputs.iter().flatten());
    for body in node.subgraphs() {
        for &inner in &model.subgraph(body).nodes {
            data_reads(model, inner, into);
        }
    }
}
