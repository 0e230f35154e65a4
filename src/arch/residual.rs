//! The residual stream: the values through which all data must pass.
//!
//! A value is an *articulation* between a source and a sink if every data path
//! between them goes through it. In a transformer these are the residual
//! tensors: within a block the residual branch runs beside attention or MLP, so
//! nothing inside a block qualifies. No operator pattern has to be known.

use std::collections::{HashMap, HashSet};

use crate::ir::cone::{ancestors, carries_data, descendants};
use crate::ir::{Model, ValueId};

/// Articulations between `source` and `sink`, in order, both included.
pub(super) fn articulations(model: &Model, source: ValueId, sink: ValueId) -> Vec<ValueId> {
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
                        .node(u.node)
                        .outputs
                        .iter()
                        .flatten()
                        .any(|o| between.contains(o))
            })
            .count()
    };
    open.insert(source, readers(source));
    let mut found = vec![source];
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
        for input in node.inputs.iter().flatten() {
            if let Some(left) = open.get_mut(input) {
                *left -= 1;
                if *left == 0 {
                    open.remove(input);
                }
            }
        }
        for value in made {
            if value == sink {
                found.push(sink);
                return found;
            }
            open.insert(value, readers(value));
        }
        if open.len() == 1
            && let Some(&only) = open.keys().next()
            && found.last() != Some(&only)
        {
            found.push(only);
        }
    }
    found
}
