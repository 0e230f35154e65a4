//! What every pass has to do that makes an image's features fewer: refuse the towers where it cannot be done, and
//! bring the graph up to date with the number that comes out.

use super::recount::Recount;
use crate::arch::{NoMatch, VisionTower, Vlm};
use crate::ir::{Dim, Model, Patch, PatchPlan, ValueId, ValueType};

/// Length of `[batch, sequence]`, where the file fixes it.
fn fixed_length(model: &Model, ids: ValueId) -> Option<i64> {
    model.value(ids).ty.as_ref()?.shape()?.get(1)?.known()
}

/// Checks that there is a tower.
pub(super) fn requires_tower(vlm: &Vlm) -> Result<(), String> {
    if let Some((index, encoder)) = vlm.encoders().next() {
        return Err(format!(
            "{}: its tower is of no structure that is known ({}), so tokens cannot be merged or left out in it; \
             visual_prune alone works on such models",
            vlm.parts[index].label(),
            encoder.why.found
        ));
    }
    match vlm.towers().next() {
        Some(_) => Ok(()),
        None => {
            let vision = |m: &NoMatch| m.looked_for.contains("vision");
            Err(vlm.missing("vision tower", vision).to_string())
        }
    }
}

/// Checks that fewer features can come out of a tower that sees a fixed number of tokens, that of part `index`, and
/// returns how many there are to choose among.
///
/// # Errors
/// What in the file does not allow it, and what to do.
pub(super) fn fits(vlm: &Vlm, index: usize, tower: &VisionTower) -> Result<i64, String> {
    let model = &vlm.parts[index].model;
    let stated = model.value(tower.features).ty.as_ref();
    let stated = stated.and_then(|t| t.shape()).map(<[_]>::len);
    if let Some(rank) = stated.filter(|rank| !(2..=3).contains(rank)) {
        return Err(format!(
            "'{}' has {rank} axes; features of merged crops are expected as [crops, N, width] or \
             [crops · N, width]. Export without splitting the crops into batches again (what the projector \
             gives), or use visual_prune alone, which takes any layout",
            model.name(tower.features)
        ));
    }
    if let Some(node) = &tower.grid {
        return Err(format!(
            "behind the tower, {node} treats the tokens as a grid (pooling, convolution, \
             resizing), which fewer tokens do not fill; merging in front of it is not supported. \
             visual_prune alone works on such models"
        ));
    }
    if let Some(node) = &tower.cut {
        return Err(format!(
            "behind the tower, {node} takes tokens by their place in the list (register tokens are left out \
             so), and fewer tokens have other places; merging in front of it is not supported. visual_prune \
             alone works on such models"
        ));
    }
    let ids = vlm.decoders().find(|(i, _)| *i == index);
    let ids = ids.and_then(|(_, decoder)| decoder.ids);
    if let Some(ids) = ids.filter(|_| tower.features_index.is_none())
        && let Some(length) = fixed_length(model, ids.value)
    {
        return Err(format!(
            "'{}' holds {length} tokens, always, and fewer features need fewer of them; export \
             with a sequence of any length (dynamic axes)",
            model.name(ids.value)
        ));
    }
    tower.candidates().ok_or_else(|| {
        format!(
            "the number of patch tokens is not fixed in the file (neither by the shape of \
             '{}' nor by a position table or the image size)",
            model.name(tower.features)
        )
    })
}

/// What the tokens of a tower are called.
pub(super) fn kind(tower: &VisionTower) -> String {
    match &tower.shuffle {
        Some(shuffle) => format!("shuffled tokens ({} patches each)", shuffle.per),
        None if tower.rows.is_some() => {
            format!("tokens of {} patches each", tower.patches_per_token())
        }
        None if tower.video => "patch tokens of each frame".into(),
        None => "patch tokens".into(),
    }
}

/// Brings what the file of part `index` states about the token count behind `from` up to date: stated types, and
/// counts that the exporter baked into reshape targets.
///
/// # Errors
/// How many tokens there were, or where the decoder begins, is not known.
pub(super) fn resize(
    patch: &mut Patch<'_>,
    vlm: &Vlm,
    (index, tower): (usize, &VisionTower),
    from: ValueId,
    count: i64,
) -> Result<(), String> {
    let Some(old) = tower.features_per_image() else {
        return Err("the number of features is not fixed".into());
    };
    // In a whole model the sequence takes over: what lies behind its first
    // tensor counts tokens, not features.
    let until = match tower.features_index {
        Some(_) => None,
        None => {
            let decoder = vlm.decoders().find(|(i, _)| *i == index);
            let (_, decoder) = decoder.ok_or("the file's decoder was not recognised")?;
            Some(decoder.embeds)
        }
    };
    let recount = Recount {
        old,
        new: count,
        width: tower.feature_width,
    };
    recount.behind(patch, from, until);
    Ok(())
}

/// The stated type of a tower's features, with `count` of them for each image.
pub(super) fn counted(model: &Model, tower: &VisionTower, count: i64) -> Option<ValueType> {
    let old = tower.features_per_image()?;
    let Some(ValueType::Tensor { dtype, shape }) = &model.value(tower.features).ty else {
        return None;
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
    Some(ValueType::Tensor {
        dtype: *dtype,
        shape,
    })
}

/// Checks that the output of part `index` says `want` features for each image, if it says how many.
///
/// # Errors
/// What it says.
pub(super) fn says(
    vlm: &Vlm,
    (index, tower): (usize, &VisionTower),
    want: Option<i64>,
) -> Result<(), String> {
    let model = &vlm.parts[index].model;
    let output = match tower.features_index {
        Some(index) => model.graph().outputs[index],
        None => tower.features,
    };
    let shape = model.value(output).ty.as_ref().and_then(|t| t.shape());
    // The frames of a clip may come out as one list, of any length.
    let joined = |n: i64| want.is_some_and(|w| w > 0 && n % w == 0);
    let found = shape.filter(|s| s.len() == 3).map(|s| s[1].known());
    let frames = |f: Option<i64>| tower.video && f.is_none_or(joined);
    match found {
        Some(found) if found != want && !frames(found) => Err(format!(
            "expected {want:?} features, the output says {found:?}"
        )),
        _ => Ok(()),
    }
}

/// Embedding graphs that take the features in and state how many of them an
/// image has are told the number that is `left`.
pub(super) fn fed_embeddings(
    pass: &'static str,
    vlm: &Vlm,
    left: impl Fn(&VisionTower) -> Option<i64>,
) -> Vec<(usize, PatchPlan)> {
    let Some((_, tower)) = vlm.towers().next() else {
        return Vec::new();
    };
    let (Some(old), Some(new)) = (tower.features_per_image(), left(tower)) else {
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
        if dims.len() != 3 || dims[1].known() != Some(old) || old == new {
            continue;
        }
        let width = dims[2].known().or(embedding.width);
        dims[1] = Dim::Known(new);
        let mut patch = Patch::new(model, pass);
        Recount { old, new, width }.behind(&mut patch, scatter.features, None);
        patch.set_type(scatter.features, ValueType::tensor(*dtype, dims));
        plans.push((index, patch.finish()));
    }
    plans
}
