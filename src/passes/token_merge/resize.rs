//! Bringing a graph up to date with the number of features that come out of its
//! tower.

use crate::arch::VisionTower;
use crate::ir::{Dim, Model, Patch, ValueId, ValueType};
use crate::passes::recount::Recount;

/// Length of `[batch, sequence]`, where the file fixes it.
pub(super) fn fixed_length(model: &Model, ids: ValueId) -> Option<i64> {
    model.value(ids).ty.as_ref()?.shape()?.get(1)?.known()
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
    // In a whole model the sequence takes over: what lies behind its first
    // tensor counts tokens, not features.
    let until = match tower.features_index {
        Some(_) => None,
        None => Some(embeds.ok_or("the file's decoder was not recognised")?),
    };
    let recount = Recount {
        old,
        new: count,
        width: tower.feature_width,
    };
    recount.behind(patch, tower.entry, until);
    let Some(ValueType::Tensor { dtype, shape }) = &model.value(tower.features).ty else {
        return Ok(());
    };
    let shape = shape.clone().map(|mut dims| {
        match dims.len() {
            // The frames of a clip in one list.
            3 if tower.video && dims[1].known() != Some(old) => {
                let frames = dims[1].known().filter(|n| old > 0 && n % old == 0);
                dims[1] = match frames {
                    Some(all) => Dim::Known(all / old * count),
                    None => Dim::param("merged_tokens"),
                };
            }
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
