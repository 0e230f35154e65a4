//! Token counts that an exporter baked into a graph, brought up to date.

use super::TokenMerge;
use crate::arch::Vlm;
use crate::ir::{Dim, Model, Patch, PatchPlan, ValueId, ValueType, consts};

/// Replaces the token count `old` behind `entry` where the exporter baked it into
/// reshape targets, and withdraws the types that the file states behind it.
pub(super) fn behind(patch: &mut Patch<'_>, entry: ValueId, old: i64, count: i64) {
    let model: &Model = patch.model();
    let behind = crate::ir::cone::descendants(model, &[entry], false);
    patch.scope("shape");
    for &id in &model.graph().nodes {
        let node = model.node(id);
        if !node.is("Reshape") || !node.input(0).is_some_and(|v| behind.contains(&v)) {
            continue;
        }
        let Some(shape) = node.input(1) else { continue };
        let Some(dims) = consts::ints(model, shape) else {
            continue;
        };
        // The last dimension is the width, which may happen to equal N.
        let rows = dims.len().saturating_sub(1);
        if let Some(axis) = dims[..rows].iter().position(|d| *d == old) {
            let mut dims = dims.clone();
            dims[axis] = count;
            let new = patch.i64s(&dims);
            patch.rewire(id, 1, new);
        }
    }
    for &value in &behind {
        if model.value(value).ty.is_some() && !model.is_output(value) && value != entry {
            patch.forget_type(value);
        }
    }
}

/// Embedding graphs that take the features in and state how many of them an
/// image has are told the number that `merge` leaves.
pub(super) fn fed_embeddings(merge: &TokenMerge, vlm: &Vlm) -> Vec<(usize, PatchPlan)> {
    let Some((_, tower)) = vlm.towers().next() else {
        return Vec::new();
    };
    let (Some(old), Some(count)) = (tower.features_per_image(), merge.tokens_out(tower)) else {
        return Vec::new();
    };
    let mut plans = Vec::new();
    for (index, embedding) in vlm.embeddings() {
        let model = &vlm.parts[index].model;
        let Some(scatter) = &embedding.scatter else {
            continue;
        };
        let Some(ValueType::Tensor {
            dtype,
            shape: Some(dims),
        }) = &model.value(scatter.features).ty
        else {
            continue;
        };
        let mut dims = dims.clone();
        if dims.len() != 3 || dims[1].known() != Some(old) || old == count {
            continue;
        }
        dims[1] = Dim::Known(count);
        let mut patch = Patch::new(model, "token_merge");
        behind(&mut patch, scatter.features, old, count);
        patch.set_type(scatter.features, ValueType::tensor(*dtype, dims));
        plans.push((index, patch.finish()));
    }
    plans
}
