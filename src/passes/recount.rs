//! Token counts that an exporter baked into a graph, brought up to date.

use std::collections::HashSet;

use crate::ir::cone::{ancestors, descendants};
use crate::ir::{Model, Node, NodeId, Patch, ValueId, consts};

/// A number of tokens that changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recount {
    /// Tokens as the exporter saw them.
    pub(super) old: i64,
    /// Tokens now.
    pub(super) new: i64,
    /// Width of a token, where it is known.
    pub(super) width: Option<i64>,
}

impl Recount {
    /// Shape targets, ends and parts of `node` with the new count, if it states
    /// the old one; with the slot that they are in.
    fn of(self, model: &Model, node: &Node) -> Option<(usize, Vec<i64>)> {
        let slot = match node.op_type.as_str() {
            // Where a list of features ends.
            "Slice" => 2,
            // A target shape; the parts that a list is cut into.
            "Reshape" | "Expand" | "Split" => 1,
            _ => return None,
        };
        let dims = consts::ints(model, node.input(slot)?)?;
        let mut new = dims.clone();
        if matches!(node.op_type.as_str(), "Reshape" | "Expand") {
            // The last dimension is the width, which may happen to equal N; only a
            // flat list of all elements has no other.
            let wide = self.width.unwrap_or(0);
            let rows = dims.len().saturating_sub(1);
            if let Some(axis) = dims[..rows].iter().position(|d| *d == self.old) {
                new[axis] = self.new;
            } else if dims.len() == 1 && wide > 0 && dims[0] == self.old * wide {
                new[0] = self.new * wide;
            }
        } else if token_axis(model, node) {
            let end = |d: &i64| if *d == self.old { self.new } else { *d };
            new = dims.iter().map(end).collect();
        }
        (new != dims).then_some((slot, new))
    }

    /// Products of the old count and a number known only at run time (the frames of a
    /// clip, say) that make up the target shape of `node` and nothing else: with the slot
    /// of the count and the count.
    fn products(
        self,
        model: &Model,
        node: &Node,
        behind: &HashSet<ValueId>,
    ) -> Vec<(NodeId, usize, ValueId)> {
        let shape = matches!(node.op_type.as_str(), "Reshape" | "Expand").then(|| node.input(1));
        let Some(shape) = shape.flatten() else {
            return Vec::new();
        };
        let cone = ancestors(model, &[shape], false);
        let only_here = |v: ValueId| {
            let reached = descendants(model, &[v], false);
            reached
                .iter()
                .all(|d| *d == v || cone.contains(d) || behind.contains(d))
        };
        let mut products: Vec<_> = cone
            .iter()
            .filter_map(|&v| model.producer_of(v))
            .filter(|id| model.node(*id).is("Mul"))
            .filter(|id| model.node(*id).output(0).is_some_and(only_here))
            .filter_map(|id| {
                let product = model.node(id);
                let states = |slot: &usize| {
                    let value = product.input(*slot).and_then(|v| consts::int(model, v));
                    value == Some(self.old)
                };
                let slot = [0, 1].into_iter().find(states)?;
                Some((id, slot, product.input(slot)?))
            })
            .collect();
        products.sort_unstable();
        products
    }

    /// Replaces the count behind `entry`, and withdraws the types that the file
    /// states there; with `until`, only on the way to it.
    pub(super) fn behind(self, patch: &mut Patch<'_>, entry: ValueId, until: Option<ValueId>) {
        let model: &Model = patch.model();
        let mut behind = descendants(model, &[entry], false);
        if let Some(until) = until {
            let ahead = ancestors(model, &[until], false);
            behind.retain(|v| ahead.contains(v) && *v != until);
        }
        patch.scope("shape");
        for &id in &model.graph().nodes {
            let node = model.node(id);
            if !node.input(0).is_some_and(|v| behind.contains(&v)) {
                continue;
            }
            if let Some((slot, dims)) = self.of(model, node) {
                let dims = patch.i64s(&dims);
                patch.rewire(id, slot, dims);
            }
            for (product, slot, factor) in self.products(model, node, &behind) {
                let count = match consts::dims(model, factor).is_some_and(|d| !d.is_empty()) {
                    true => patch.i64s(&[self.new]),
                    false => patch.i64(self.new),
                };
                patch.rewire(product, slot, count);
            }
        }
        for &value in &behind {
            if model.value(value).ty.is_some() && !model.is_output(value) && value != entry {
                patch.forget_type(value);
            }
        }
    }
}

/// Whether a `Slice` or `Split` works on the tokens: on axis 1 of features, or
/// on axis 0 of a list of them.
fn token_axis(model: &Model, node: &Node) -> bool {
    let axis = match node.op_type.as_str() {
        "Split" => Some(node.attr_int("axis").unwrap_or(0)),
        _ => node.input(3).and_then(|a| consts::int(model, a)),
    };
    matches!(axis, Some(0 | 1))
}
