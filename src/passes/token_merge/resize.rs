//! What the file states about the number of features.

use crate::arch::VisionTower;
use crate::ir::{Dim, Model, Patch, ValueType, consts};

/// Brings what the file states about the token count behind the merge up to
/// date: the output's shape, stated types, and counts that the exporter baked
/// into reshape targets.
pub(super) fn resize(patch: &mut Patch<'_>, tower: &VisionTower, count: i64) -> Result<(), String> {
    let model: &Model = patch.model();
    let Some(old) = tower.features_per_image() else {
        return Err("the number of features is not fixed".into());
    };
    let behind = crate::ir::cone::descendants(model, &[tower.entry], false);
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
