//! `logits: last`: logits of the last token alone.
//!
//! ```text
//!  … attention of the last layer ─ H [b, L, D] ─ MLP, norm, head ─▶ logits [b, L, V]
//!                                       └▶ Slice(−1) [b, 1, D] ─▶ logits [b, 1, V]
//! ```
//!
//! Who generates text reads the last row of the logits and no other, but a prompt computes as
//! many rows as it has tokens, of a vocabulary each. Behind the last attention tokens do not see
//! each other, so the last row is the same if it is computed alone: the row is taken there, and
//! what follows of the last layer runs on one token too. (Activations that a graph quantises with
//! one scale for all tokens get the scale of that one.) Caches are not touched.
//!
//! Not for who reads logits of the prompt: scores of given answers, speculative decoding.

use super::PassError;
use crate::arch::{Decoder, Vlm};
use crate::ir::cone::{descendants, varying};
use crate::ir::{Dim, Model, Patch, PatchPlan, Size, ValueId, ValueType};

/// Name of the step in what is inserted.
pub(super) const NAME: &str = "last_logits";

/// What it does, for people.
pub(super) const SUMMARY: &str = "logits of the last token alone, the last layer's MLP too";

/// Why a model has no logits to cut, if so.
pub(super) fn refused(vlm: &Vlm) -> Option<String> {
    let missing = "logits: last is about the decoder's logits, and no decoder was recognised";
    vlm.decoders().next().is_none().then(|| missing.to_owned())
}

/// Plans the change of every decoder that gives more than one row: (position of the file, patch).
///
/// # Errors
/// What lies behind the last attention reads something besides the residual stream, or gives
/// another output.
pub(super) fn plan(vlm: &Vlm) -> Result<Vec<(usize, PatchPlan)>, PassError> {
    let mut plans = Vec::new();
    for (index, decoder) in vlm.decoders() {
        let part = &vlm.parts[index];
        let plan = decoder_plan(&part.model, decoder);
        let plan = plan.map_err(|problem| PassError::Unsupported {
            pass: NAME,
            file: part.label(),
            problem,
        })?;
        plans.extend(plan.map(|plan| (index, plan)));
    }
    Ok(plans)
}

fn decoder_plan(model: &Model, decoder: &Decoder) -> Result<Option<PatchPlan>, String> {
    let logits = decoder.logits;
    let stated = model.value(logits).ty.clone();
    if rows(stated.as_ref()) == Some(&Dim::Known(1)) {
        return Ok(None);
    }
    let cut = behind_attention(model, decoder)?;
    let mut behind = descendants(model, cut, false);
    behind.retain(|v| !cut.contains(v));
    for &output in &model.graph().outputs {
        if output != logits && (behind.contains(&output) || cut.contains(&output)) {
            return Err(format!(
                "the output '{}' comes from behind the last attention and has a row for each token, which would \
                 be one row; leave out logits: last",
                model.name(output)
            ));
        }
    }
    let varying = varying(model);
    let mut patch = Patch::new(model, NAME);
    let last = (Size::Known(-1), Size::Known(i64::MAX));
    let rows: Vec<ValueId> = cut
        .iter()
        .map(|&value| patch.slice(value, last.0, last.1, 1))
        .collect();
    for &id in &model.graph().nodes {
        let node = model.node(id);
        if !node.outputs.iter().flatten().any(|o| behind.contains(o)) {
            continue;
        }
        for slot in 0..node.inputs.len() {
            let Some(value) = node.input(slot).filter(|v| !behind.contains(v)) else {
                continue;
            };
            match cut.iter().position(|v| *v == value) {
                Some(at) => patch.rewire(id, slot, rows[at]),
                None if varying.contains(&value) => {
                    return Err(format!(
                        "{}, behind the last attention, reads '{}' besides the residual stream, so that the last \
                         row cannot be computed alone; leave out logits: last",
                        model.describe(id),
                        model.name(value)
                    ));
                }
                None => {}
            }
        }
    }
    for &value in &behind {
        if value != logits && model.value(value).ty.is_some() {
            patch.forget_type(value);
        }
    }
    if let Some(ValueType::Tensor {
        dtype,
        shape: Some(mut dims),
    }) = stated
    {
        if let Some(dim) = dims.get_mut(1) {
            *dim = Dim::Known(1);
        }
        patch.set_type(logits, ValueType::tensor(dtype, dims));
    }
    Ok(Some(patch.finish()))
}

/// How many rows logits are stated to have.
fn rows(ty: Option<&ValueType>) -> Option<&Dim> {
    ty?.shape()?.get(1)
}

/// The first values behind the last layer's attention through which all data goes.
fn behind_attention<'a>(model: &Model, decoder: &'a Decoder) -> Result<&'a [ValueId], String> {
    let last = decoder.layers.last().map(|l| l.node);
    let made: Vec<ValueId> = last.map_or_else(Vec::new, |node| {
        model.node(node).outputs.iter().flatten().copied().collect()
    });
    let attended = descendants(model, &made, true);
    let cut = decoder
        .residuals
        .iter()
        .find(|c| c.iter().all(|v| attended.contains(v)));
    match cut {
        Some(cut) if !cut.contains(&decoder.logits) => Ok(cut),
        _ => Err(format!(
            "nothing between the last attention and '{}' carries all data; leave out logits: last",
            model.name(decoder.logits)
        )),
    }
}
