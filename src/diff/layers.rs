//! To which layer a node belongs, for people: a change in 28 layers is one change.
//!
//! By the caches where the graph has them: a node belongs in front of the first
//! `present.N` that depends on it. Else, and before that, a number that follows a
//! word for layers in the node's name is taken. Nothing but the report's wording
//! depends on it.

use super::side::Side;
use crate::ir::{Def, ValueId};

/// Words in front of a layer's number.
const WORDS: [&str; 6] = ["layers", "layer", "blocks", "block", "h", "blk"];

/// Layers by node.
pub(super) struct Layers {
    /// As names and caches say.
    pub(super) named: Vec<Option<u32>>,
    /// The first cache that depends on the node.
    pub(super) cache: Vec<Option<u32>>,
}

/// Layers of the nodes of one side.
pub(super) fn of(side: &Side<'_>) -> Layers {
    let model = side.model;
    let mut cache: Vec<Option<u32>> = vec![None; model.node_count()];
    let graph = model.graph();
    let number = |v: &ValueId| {
        let name = model.name(*v);
        name.strip_prefix("present").and_then(first_number)
    };
    let smaller = |at: &mut Option<u32>, layer: u32| *at = Some(at.map_or(layer, |l| l.min(layer)));
    for output in &graph.outputs {
        if let (Some(layer), Def::Node { node, .. }) = (number(output), model.value(*output).def) {
            smaller(&mut cache[node.index()], layer);
        }
    }
    for &node in graph.nodes.iter().rev() {
        let Some(layer) = cache[node.index()] else {
            continue;
        };
        for value in model.node(node).inputs.iter().flatten() {
            if let Def::Node { node: producer, .. } = model.value(*value).def {
                smaller(&mut cache[producer.index()], layer);
            }
        }
    }
    let mut named = vec![None; model.node_count()];
    for (_, graph) in model.graphs() {
        for &node in &graph.nodes {
            named[node.index()] = in_name(&model.node(node).name);
            // Weights keep their names where nodes lose them.
            if named[node.index()].is_none() {
                let inputs = model.node(node).inputs.iter().flatten();
                let constants = inputs.filter(|v| side.constant_of[v.index()].is_some());
                named[node.index()] = constants.filter_map(|v| in_name(model.name(*v))).next();
            }
        }
    }
    Layers { named, cache }
}

fn first_number(text: &str) -> Option<u32> {
    let digits = |c: char| c.is_ascii_digit();
    let start = text.find(digits)?;
    let rest = &text[start..];
    let end = rest.find(|c: char| !digits(c)).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// The number behind a word for layers: `model.layers.3.mlp`, `/h.3/attn`.
fn in_name(name: &str) -> Option<u32> {
    let mut parts = name.split(['/', '.', '_']).peekable();
    while let Some(part) = parts.next() {
        if WORDS.contains(&part)
            && let Some(number) = parts.peek().and_then(|p| p.parse().ok())
        {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_off_names() {
        assert_eq!(in_name("/model/layers.12/self_attn/MatMul"), Some(12));
        assert_eq!(in_name("model.h.3.attn"), Some(3));
        assert_eq!(in_name("encoder_layer_7_mlp"), Some(7));
        assert_eq!(in_name("val_110"), None);
        assert_eq!(in_name("/layers/MatMul_3"), None);
        assert_eq!(first_number(".31.key"), Some(31));
    }
}
