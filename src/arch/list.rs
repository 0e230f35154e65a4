//! What is put beside a tower's patches, and what reads its tokens as more than a list:
//! with fewer of them, that would be something else.

use std::collections::HashSet;

use crate::ir::cone::descendants;
use crate::ir::{Model, Node, NodeId, ValueId, consts};

/// From here on the end of a slice is that of any list of tokens.
const OPEN: i64 = i32::MAX as i64;

/// What lies between a tower's tokens and the features.
pub(super) struct Way<'a> {
    entry: ValueId,
    behind: HashSet<ValueId>,
    needed: &'a HashSet<ValueId>,
}

impl<'a> Way<'a> {
    /// From `entry` on; `needed`: what the features are made of.
    pub(super) fn new(model: &Model, entry: ValueId, needed: &'a HashSet<ValueId>) -> Self {
        Self {
            entry,
            behind: descendants(model, &[entry], true),
            needed,
        }
    }

    /// Whether a node lies on it.
    fn leads(&self, node: &Node) -> bool {
        let mut outputs = node.outputs.iter().flatten();
        outputs.any(|v| *v != self.entry && self.behind.contains(v) && self.needed.contains(v))
    }
}

/// The first node between a tower's tokens and the features that splits or reorders the
/// token axis; `tokens`: how many there are, where that is no width.
pub(super) fn grid_node(model: &Model, way: &Way, tokens: Option<i64>) -> Option<String> {
    let rearranges = |node: &Node| match node.op_type.as_str() {
        "Conv" | "AveragePool" | "MaxPool" | "DepthToSpace" | "SpaceToDepth" | "Resize" => true,
        "Transpose" => node.attr_ints("perm").is_some_and(|p| p.len() >= 4),
        "Reshape" => {
            let shape = node.input(1);
            let length = |s: ValueId| consts::ints(model, s).map(|d| d.len());
            let built = shape
                .and_then(|s| model.producer_node(s))
                .filter(|n| n.is("Concat"));
            // Each part of a target that is put together is one size, or a list that is known.
            let parts = built.map(|n| {
                let sizes = n.inputs.iter().flatten();
                sizes.map(|part| length(*part).unwrap_or(1)).sum()
            });
            // A channel after the other, as a convolution leaves them.
            let last = shape.and_then(|s| consts::ints(model, s)?.get(2).copied());
            let known = shape.and_then(length);
            (last.is_some() && last == tokens)
                || known.or(parts).is_some_and(|rank: usize| rank >= 4)
        }
        _ => false,
    };
    let found: Vec<NodeId> = model
        .graph()
        .nodes
        .iter()
        .copied()
        .filter(|n| {
            let node = model.node(*n);
            way.leads(node) && rearranges(node)
        })
        .collect();
    // What is done with the grid says more than how it is laid out.
    let moves = |n: &NodeId| matches!(model.node(*n).op_type.as_str(), "Transpose" | "Reshape");
    let named = found.iter().find(|n| !moves(n)).or(found.first());
    named.map(|n| model.describe(*n))
}

/// Whether a slice of one axis goes on to the end.
pub(super) fn to_the_end(model: &Model, node: &Node) -> bool {
    let constant = |slot: usize| consts::ints(model, node.input(slot)?);
    let (Some(ends), Some(axes)) = (constant(2), constant(3)) else {
        return false;
    };
    let size = |axis: i64| {
        let shape = model.value(node.input(0)?).ty.as_ref()?.shape()?;
        shape.get(usize::try_from(axis).ok()?)?.known()
    };
    let mut each = ends.iter().zip(axes);
    each.all(|(end, axis)| *end >= OPEN || size(axis).is_some_and(|n| *end >= n))
}

/// The first node between a tower's tokens and the features that takes some of the tokens by their
/// place in the list.
pub(super) fn cut_node(model: &Model, way: &Way) -> Option<String> {
    let cuts = |node: &Node| {
        let list = node.input(0).filter(|v| way.behind.contains(v));
        let rank = list.map(|v| consts::known_rank(model, v).unwrap_or(3));
        let axis = |axis: i64| axis == 1 || axis == -2;
        rank == Some(3)
            && match node.op_type.as_str() {
                "Slice" => {
                    let constant = |slot: usize| consts::ints(model, node.input(slot)?);
                    let axes = constant(3).unwrap_or_default();
                    let from_the_start = constant(1).is_some_and(|s| s.iter().all(|s| *s == 0));
                    let whole = from_the_start && to_the_end(model, node);
                    !whole && axes.into_iter().any(axis)
                }
                "Gather" | "Split" => node.attr_int("axis").is_some_and(axis),
                _ => false,
            }
    };
    let mut nodes = model.graph().nodes.iter().copied();
    let found = nodes.find(|n| {
        let node = model.node(*n);
        way.leads(node) && cuts(node)
    });
    found.map(|n| model.describe(n))
}

/// What is put beside the tokens without depending on the pixels (CLS, registers): at which
/// place on the line, and how many rows it has where the file says it.
pub(super) fn added_rows(
    model: &Model,
    line: &[ValueId],
    reached: &HashSet<ValueId>,
) -> Vec<(usize, Option<i64>)> {
    let joins = line
        .iter()
        .enumerate()
        .filter_map(|(at, v)| Some((at, model.producer_node(*v)?)))
        .filter(|(_, n)| n.is("Concat") && n.attr_int("axis") == Some(1));
    let inputs = joins.flat_map(|(at, n)| n.inputs.iter().flatten().map(move |v| (at, *v)));
    let added = inputs.filter(|(_, v)| !reached.contains(v));
    let count = |value: ValueId| {
        let repeated = model.producer_node(value).filter(|n| n.is("Expand"));
        let learned = repeated.and_then(|n| n.input(0)).unwrap_or(value);
        consts::dims(model, learned)?.iter().rev().nth(1).copied()
    };
    added.map(|(at, value)| (at, count(value))).collect()
}
