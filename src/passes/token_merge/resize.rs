//! Bringing a graph up to date with the number of features that come out of its
//! tower.

use crate::arch::VisionTower;
use crate::ir::cone::{ancestors, descendants};
use crate::ir::{Dim, Model, Node, Patch, ValueId, ValueType, consts};

/// Length of `[batch, sequence]`, where the file fixes it.
pub(super) fn fixed_length(model: &Model, ids: ValueId) -> Option<i64> {
    model.value(ids).ty.as_ref()?.shape()?.get(1)?.known()
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

/// Brings what the file states about the token count behind the merge up to
/// date: the output's shape, stated types, and counts that the exporter baked
/// into reshape targets.
pub(super) fn resize(
    patch: &mut Patch<'_>,
    tower: &VisionTower,
    embeds: Option<ValueId>,
    count: i64,
) -> Result<(), String> {
    let model: &Model = patch.model();
    let Some(old) = tower.features_per_image() else {
        return Err("the number of features is not fixed".into());
    };
    let mut behind = descendants(model, &[tower.entry], false);
    if tower.features_index.is_none() {
        // In a whole model the sequence takes over: what lies behind its first
        // tensor counts tokens, not features.
        let Some(embeds) = embeds else {
            return Err("the file's decoder was not recognised".into());
        };
        let ahead = ancestors(model, &[embeds], false);
        behind.retain(|v| ahead.contains(v) && *v != embeds);
    }
    patch.scope("shape");
    for &id in &model.graph().nodes {
        let node = model.node(id);
        if !node.input(0).is_some_and(|v| behind.contains(&v)) {
            continue;
        }
        let (slot, first) = match node.op_type.as_str() {
            "Reshape" | "Expand" => (1, true),
            // Where a list of features ends, and into what parts it is cut.
            "Slice" => (2, false),
            "Split" => (1, false),
            _ => continue,
        };
        let Some(dims) = node.input(slot).and_then(|s| consts::ints(model, s)) else {
            continue;
        };
        // The last dimension is the width, which may happen to equal N; only a
        // flat list of all elements has no other.
        let wide = tower.feature_width.unwrap_or(0);
        let rows = if first {
            dims.len().saturating_sub(1)
        } else {
            dims.len()
        };
        let mut new = dims.clone();
        if first {
            if let Some(axis) = dims[..rows].iter().position(|d| *d == old) {
                new[axis] = count;
            } else if dims.len() == 1 && dims[0] == old * wide {
                new[0] = count * wide;
            }
        } else if token_axis(model, node) {
            let end = |d: &i64| if *d == old { count } else { *d };
            new = dims.iter().map(end).collect();
        }
        if new != dims {
            let new = patch.i64s(&new);
            patch.rewire(id, slot, new);
        }
    }
    for &value in &behind {
        if model.value(value).ty.is_some() && !model.is_output(value) && value != tower.entry {
            patch.forget_type(value);
        }
    }
    let Some(ValueType::Tensor { dtype, shape }) = &model.value(tower.features).ty else {
        return Ok(());
    };
    let shape = shape.clone().map(|mut dims| {
        match dims.len() {
            3 => dims[1] = Dim::Known(count),
            2 => dims[0] = Dim::param("merged_tokens"),
            _ => {}
        }
        dims
    });
    let ty = ValueType::Tensor {
        dtype: *dtype,
        shape,
    };
    patch.set_type(tower.features, ty);
    Ok(())
}
