//! Passes that keep K of each image's N tokens as they are and leave the others out, in front of the decoder.
//!
//! ```text
//!  before:  tower ─ H ─[drop CLS]─▶ projector ─▶ features [n, N, D]
//!
//!  places that no image decides:
//!           tower ─ H ─[drop CLS]─▶ Gather(places) ─▶ projector ─▶ [n, K, D]
//!
//!  places chosen by the features:
//!           … projector ─▶ features ─┬─▶ choice [n, K] ─┐
//!                                    └───▶ GatherND ◀───┘─▶ [n, K, D]
//! ```
//!
//! Tokens come out in the order of their places. Images are chosen from one by one, and so are the frames of a clip
//! and the crops of an image. CLS is never among what comes out, also where it was among the features (Video-LLaVA's
//! frames). A pass is a parameter struct with a [`Selection`]; everything else is here.

use super::recipe::Count;
use super::{Context, Entry, Pass, PassError, fewer};
use crate::arch::{VisionTower, Vlm};
use crate::ir::{DataType, Patch, PatchPlan, Size, Tensor, ValueId, ValueType};

/// What tells one such pass from another.
pub(super) trait Selection: std::fmt::Debug + 'static {
    /// Its entry in the registry.
    const ENTRY: Entry;

    /// How many tokens of an image stay.
    fn keep(&self) -> Count;

    /// Places of the `keep` tokens that stay of `all`, ascending, where they are the same for every image.
    fn places(&self, all: i64, keep: i64) -> Option<Vec<i64>>;

    /// Chooses `of` = (all, keep) the tokens of each image, where [`places`](Self::places) does not: int64 `[n, keep]`,
    /// ascending. `features`: fp32 `[n, all, D]`.
    fn choose(&self, patch: &mut Patch<'_>, features: ValueId, of: (i64, i64)) -> Option<ValueId>;

    /// How, for people: `at random (seed 0)`.
    fn how(&self) -> String;
}

/// Tokens that stay of `all`.
fn kept(selection: &impl Selection, all: i64) -> i64 {
    selection.keep().of(all).clamp(0, all)
}

/// Inserts the selection of one tower.
fn insert(
    selection: &impl Selection,
    patch: &mut Patch<'_>,
    vlm: &Vlm,
    (index, tower): (usize, &VisionTower),
) -> Result<(), String> {
    let all = tower.candidates().ok_or("the token count is not fixed")?;
    let keep = kept(selection, all);
    patch.scope("select");
    // Where patch tokens begin among the rows.
    let first = i64::from(tower.gives_cls());
    let ty = fewer::counted(patch.model(), tower, keep);
    if let Some(places) = selection.places(all, keep) {
        let rows: Vec<i64> = places.iter().map(|place| place + first).collect();
        let rows = patch.constant(Tensor::i64s("kept_rows", &rows));
        let tokens = patch.gather(tower.entry, rows, 1);
        patch.name_value(tokens, "kept_tokens");
        patch.rewire_all(tower.entry, tokens);
        fewer::resize(patch, vlm, (index, tower), tower.entry, keep)?;
        if let Some(ty) = ty {
            patch.set_type(tower.features, ty);
        }
        return Ok(());
    }
    let stated = patch.model().value(tower.features).ty.clone();
    let rank = stated.as_ref().and_then(|t| t.shape()).map(<[_]>::len);
    // One image after the other, however the file lays them out.
    let rows = tower
        .features_per_image()
        .ok_or("the number of features is not fixed")?;
    let listed = tower.video || rank != Some(3);
    let shape = listed.then(|| patch.op("Shape", &[tower.features]));
    let end = Size::Known(i64::MAX);
    let mut each = tower.features;
    let width = shape.map(|shape| patch.slice(shape, Size::Known(-1), end, 0));
    if let Some(width) = width {
        let count = patch.i64s(&[-1, rows]);
        let target = patch.concat(&[count, width], 0);
        each = patch.op("Reshape", &[each, target]);
    }
    if first > 0 {
        each = patch.slice(each, Size::Known(first), end, 1);
    }
    let dtype = stated.as_ref().and_then(ValueType::dtype);
    let single = match dtype.unwrap_or(tower.dtype) {
        DataType::Float => each,
        _ => patch.cast(each, DataType::Float),
    };
    let chosen = selection.choose(patch, single, (all, keep));
    let chosen = chosen.ok_or("it says neither places nor how to choose")?;
    patch.scope("gather");
    patch.name_value(chosen, "kept_indices");
    let mut tokens = patch.gather_rows(each, chosen);
    if let (Some(shape), Some(width)) = (shape, width) {
        let lead = patch.slice(shape, Size::Known(0), Size::Known(-2), 0);
        let count = patch.i64s(&[-1]);
        let target = patch.concat(&[lead, count, width], 0);
        tokens = patch.op("Reshape", &[tokens, target]);
    }
    patch.name_value(tokens, "kept_tokens");
    match tower.features_index {
        Some(output) => {
            let ty = ty.unwrap_or(ValueType::Tensor {
                dtype: dtype.unwrap_or(tower.dtype),
                shape: None,
            });
            patch.replace_output(output, tokens, ty);
        }
        None => {
            patch.rewire_all(tower.features, tokens);
            fewer::resize(patch, vlm, (index, tower), tower.features, keep)?;
        }
    }
    Ok(())
}

impl<S: Selection> Pass for S {
    fn name(&self) -> &'static str {
        S::ENTRY.name
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn requires(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        let fail = |problem: String| {
            Err(PassError::Requires {
                pass: S::ENTRY.name,
                problem,
            })
        };
        if let Err(problem) = fewer::requires_tower(vlm) {
            return fail(problem);
        }
        for (index, decoder) in vlm.decoders() {
            if let Some(rows) = decoder.position_rows {
                return fail(format!(
                    "{}: the decoder takes {rows} positions for each token (M-RoPE), which clients compute from an \
                     image's grid, and what is left fills none; use token_merge, which leaves features in their places",
                    vlm.parts[index].label()
                ));
            }
        }
        for (index, tower) in vlm.towers() {
            let file = vlm.parts[index].label();
            if tower.rows.is_some() {
                return fail(format!(
                    "{file}: the tower takes patches that the client has cut, in grids of any size; {} works on \
                     images of a fixed number of tokens. token_merge works on both",
                    S::ENTRY.name
                ));
            }
            let all = match fewer::fits(vlm, index, tower) {
                Ok(all) => all,
                Err(problem) => return fail(format!("{file}: {problem}")),
            };
            if kept(self, all) == 0 {
                return fail(format!(
                    "{file}: keep leaves none of {all} tokens; keep at least one"
                ));
            }
        }
        Ok(())
    }

    fn plan(&self, vlm: &Vlm, _: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        let mut plans = Vec::new();
        for (index, tower) in vlm.towers() {
            let part = &vlm.parts[index];
            let mut patch = Patch::new(&part.model, S::ENTRY.name);
            insert(self, &mut patch, vlm, (index, tower)).map_err(|problem| {
                PassError::Unsupported {
                    pass: S::ENTRY.name,
                    file: part.label(),
                    problem,
                }
            })?;
            plans.push((index, patch.finish()));
        }
        let left = |tower: &VisionTower| Some(kept(self, tower.candidates()?));
        plans.extend(fewer::fed_embeddings(S::ENTRY.name, vlm, left));
        Ok(plans)
    }

    fn ensures(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        for (index, tower) in vlm.towers() {
            let Some(all) = tower.candidates() else {
                continue;
            };
            let keep = kept(self, all);
            if tower.features_index.is_none() && self.places(all, keep).is_none() {
                // Inside a whole model the features stay, and others go on in their place.
                continue;
            }
            let want = Some(keep);
            fewer::says(vlm, (index, tower), want).map_err(|problem| PassError::Ensures {
                pass: S::ENTRY.name,
                file: vlm.parts[index].label(),
                problem,
            })?;
        }
        Ok(())
    }

    fn left_of_image(&self, candidates: i64, _: bool) -> Option<i64> {
        Some(kept(self, candidates))
    }

    fn summary(&self, vlm: &Vlm) -> String {
        let each = vlm.towers().filter_map(|(_, tower)| {
            let all = tower.candidates()?;
            let kind = fewer::kind(tower);
            Some(format!(
                "{all} {kind} → {}, {}",
                kept(self, all),
                self.how()
            ))
        });
        let mut lines: Vec<String> = each.collect();
        // The precisions of one tower say the same.
        lines.dedup();
        lines.join("; ")
    }
}
