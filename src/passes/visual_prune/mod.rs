//! T2V: dropping visual tokens inside the decoder, chosen by the text.
//!
//! ```text
//!  … layer ℓ ─ H [b, L, D] ────────────────────────────┐
//!              └─ q, k of layer ℓ+1 (cloned, current     │
//!                 positions) ─▶ score of visual tokens   ▼
//!                 ─▶ TopK ─▶ ascending indices ─▶ GatherND ─ H' [b, L', D] ─ layer ℓ+1 …
//!                                            └─▶ mask', positions', visual', text'
//!  everything else that later layers read (causal mask, rotary tables, reshape
//!  targets) is cloned with these as its roots
//! ```
//!
//! A schedule is a list of (layer ℓ, ratio r): after ℓ layers have run, ⌊r·n⌋ of
//! the n visual tokens that entered the decoder stay. All rows of a batch lose
//! the same number, the smallest of theirs. In a decode step nothing is visual,
//! so nothing is dropped; how much earlier steps dropped is read off the lengths
//! of the caches.
//!
//! Source: DUET-VLM (arXiv 2602.18846), section on text-to-vision pruning; the
//! drop schedule is PyramidDrop's.

mod current;
mod gone;
mod rank;
mod reuse;
mod rotary;
mod stage;
mod types;

pub(super) use gone::{plan as plan_gone, summary as gone_summary};

use serde::Deserialize;

use super::recipe::Positions;
use super::{Context, Entry, Pass, PassError, Stage, marker};
use crate::arch::{Decoder, NoMatch, Role, Vlm};
use crate::ir::PatchPlan;

/// Name of the extra decoder input with `text: salient`.
pub const SALIENT_MASK_INPUT: &str = "salient_token_mask";

pub(super) const ENTRY: Entry = Entry {
    name: "visual_prune",
    about: "drops visual tokens at chosen decoder layers, ranked by the text's attention (T2V)",
    stage: Stage::Decoder,
    keys: &[
        "drops",
        "text",
        "positions",
        "rank_mask",
        "rank_layer",
        "ratio_base",
    ],
    parse: super::parse::<VisualPrune>,
    keep_everything: "{drops: [{after_layer: 2, keep: 1.0}]}",
    samples: &[
        "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}",
        "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.25}, {after_layer: 6, keep: 0.125}], \
         text: last, positions: keep}",
        "{drops: [{after_layer: 1, keep: 0.3}], text: salient}",
        "{drops: [{after_layer: 2, keep: 0.4}, {after_layer: 4, keep: 0.2}], rank_layer: previous}",
    ],
};

/// Which tokens ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TextQueries {
    /// Every token after the last visual token that entered the decoder.
    #[default]
    All,
    /// The last token of the prompt (PyramidDrop).
    Last,
    /// A given subset of the text tokens, and the last one.
    Salient,
}

/// Which keys an asking token weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RankMask {
    /// Those up to itself, as in the layer's own attention.
    #[default]
    Causal,
    /// All but padding, those behind it too: what the public code does for
    /// Qwen2.5-VL.
    None,
}

/// Whose attention ranks at a drop point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RankLayer {
    /// The layer that comes next, as it would attend if nothing was dropped.
    #[default]
    Next,
    /// The layer that has just run, as it attended to what entered it (FastV).
    Previous,
}

impl RankLayer {
    /// The layer, counted from 0, that ranks after `after_layer` layers have run.
    pub fn at(self, after_layer: usize) -> usize {
        match self {
            Self::Next => after_layer,
            Self::Previous => after_layer.saturating_sub(1),
        }
    }
}

/// What the ratios of drop points are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RatioBase {
    /// The visual tokens that entered the decoder.
    #[default]
    Entered,
    /// Those that count as visual at the drop point, as the public code does for Qwen2.5-VL:
    /// of c, with r the ratio before the drop (1 at the first), the first ⌊c·r⌋ are ranked
    /// and ⌊c·r′⌋ of these stay, while the others stay and count as text from there on.
    /// [0.5, 0.25] so ends at 37.5 %, [0.5, 0.0] at 25 %.
    Current,
}

/// One drop point.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drop {
    /// Number of layers that have run, from 1.
    pub after_layer: usize,
    /// Share of the visual tokens that entered the decoder, 0 to 1.
    pub keep: f64,
}

/// Parameters of the pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisualPrune {
    /// Drop points: layers rise, ratios fall.
    pub drops: Vec<Drop>,
    /// Which tokens ask.
    #[serde(default)]
    pub text: TextQueries,
    /// What happens to the positions of tokens that stay. Left out: see
    /// [`positions_of`](Self::positions_of).
    #[serde(default)]
    pub positions: Option<Positions>,
    /// Whether positions that are left out are kept wherever a decoder can be told so (FastV).
    #[serde(skip)]
    pub keeps_if_told: bool,
    /// Which keys an asking token weighs.
    #[serde(default)]
    pub rank_mask: RankMask,
    /// Whose attention ranks.
    #[serde(default)]
    pub rank_layer: RankLayer,
    /// What the ratios are of.
    #[serde(default)]
    pub ratio_base: RatioBase,
}

impl VisualPrune {
    /// Visual tokens that each of `layers` layers sees when `entered` enter.
    pub fn tokens_per_layer(&self, entered: i64, layers: usize) -> Vec<i64> {
        #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
        let share = |count: i64, ratio: f64| (count as f64 * ratio) as i64;
        let mut seen = vec![entered; layers];
        let (mut left, mut counted, mut ratio) = (entered, entered, 1.0);
        for drop in &self.drops {
            left = match self.ratio_base {
                RatioBase::Entered => share(entered, drop.keep),
                RatioBase::Current => left - share(counted, ratio) + share(counted, drop.keep),
            };
            (counted, ratio) = (share(counted, drop.keep), drop.keep);
            if let Some(behind) = seen.get_mut(drop.after_layer..) {
                behind.fill(left);
            }
        }
        seen
    }

    /// What happens to the positions of tokens that stay in `decoder`: what the
    /// recipe says, or [what the method does there](default_positions).
    pub fn positions_of(&self, decoder: &Decoder, placed: bool) -> Positions {
        // An attention that counts positions itself can be given kept ones.
        let counts = || decoder.layers.iter().all(|l| l.rotary.is_some());
        let told = || decoder.position_ids.is_some() || counts();
        match self.positions {
            Some(positions) => positions,
            None if self.keeps_if_told && told() => Positions::Keep,
            None => default_positions(decoder, placed),
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.drops.is_empty() {
            return Err("'drops' is empty; list at least one {after_layer, keep}".into());
        }
        for drop in &self.drops {
            if !(0.0..=1.0).contains(&drop.keep) {
                return Err(format!(
                    "keep is {} after layer {}; expected a fraction of the visual tokens, 0.0 to 1.0",
                    drop.keep, drop.after_layer
                ));
            }
            if drop.after_layer == 0 {
                return Err("after_layer is 0; layers count from 1".into());
            }
        }
        for pair in self.drops.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            if b.after_layer <= a.after_layer {
                return Err(format!(
                    "after_layer {} follows {}; list the drops by rising layer, each once",
                    b.after_layer, a.after_layer
                ));
            }
            if b.keep > a.keep {
                return Err(format!(
                    "keep rises from {} (after layer {}) to {} (after layer {}); tokens that were dropped do \
                     not come back, so ratios must fall",
                    a.keep, a.after_layer, b.keep, b.after_layer
                ));
            }
        }
        Ok(())
    }

    fn check_decoder(&self, decoder: &Decoder, placed: bool) -> Result<(), String> {
        let depth = decoder.depth();
        if let Some(drop) = self.drops.iter().find(|d| d.after_layer >= depth) {
            return Err(format!(
                "a drop after layer {} was asked for, but the decoder has {depth} layers; the last drop \
                 point is after layer {} ('duet plan' makes a recipe for this depth)",
                drop.after_layer,
                depth.saturating_sub(1)
            ));
        }
        if placed && self.rank_layer == RankLayer::Previous && self.drops[0].after_layer == 1 {
            return Err(
                "rank_layer: previous after layer 1 ranks by the first layer, which sees features that a merge \
                 discarded and left in their places (placement: decoder); drop after layer 2 or later, or use \
                 rank_layer: next"
                    .into(),
            );
        }
        // An attention that counts positions itself can be given kept ones.
        let counts = decoder.layers.iter().all(|l| l.rotary.is_some());
        let positions = self.positions_of(decoder, placed);
        if let (Positions::Renumber, Some(rows)) = (positions, decoder.position_rows) {
            return Err(format!(
                "positions: renumber needs one position for each token, and this decoder takes {rows} \
                 (position_ids [{rows}, batch, sequence], M-RoPE), which are places in an image's grid; use \
                 positions: keep"
            ));
        }
        if positions == Positions::Keep && decoder.position_ids.is_none() && !counts {
            return Err(
                "positions: keep needs the input position_ids, and this decoder computes positions itself; \
                 use positions: renumber"
                    .into(),
            );
        }
        Ok(())
    }
}

/// What the method does with the positions of tokens that stay. With M-RoPE they stay as
/// they are (they are places in a grid), else they are contiguous again. So they stay too
/// where discarded features come into the decoder in their places (`placed`): the
/// survivors then compute what they would without the others, whatever else a batch
/// holds. An attention that rotates by itself counts positions without gaps.
pub fn default_positions(decoder: &Decoder, placed: bool) -> Positions {
    let given = decoder.position_ids.is_some() && decoder.layers.iter().all(|l| l.rotary.is_none());
    match decoder.position_rows.is_some() || placed && given {
        true => Positions::Keep,
        false => Positions::Renumber,
    }
}

/// Refuses a directory in which one decoder could be rewritten and another could not.
pub(super) fn requires_rewritable(pass: &'static str, vlm: &Vlm) -> Result<(), PassError> {
    match left_behind(vlm) {
        Some(problem) => Err(PassError::Requires { pass, problem }),
        None => Ok(()),
    }
}

/// A decoder that would stay as it is beside files that change: it would go on
/// from caches, and read embeddings, that are no longer what it expects.
fn left_behind(vlm: &Vlm) -> Option<String> {
    let changes = |variant: &str| {
        let mut parts = vlm.parts.iter();
        parts.any(|p| p.variant == variant && !matches!(p.role, Role::Unknown(_)))
    };
    vlm.parts.iter().find_map(|part| {
        let Role::Unknown(reasons) = &part.role else {
            return None;
        };
        if !changes(&part.variant) || !Decoder::has_interface(&part.model) {
            return None;
        }
        let about = |r: &&NoMatch| r.looked_for.contains("decoder");
        let reason = reasons.iter().find(about).or(reasons.first());
        Some(format!(
            "{} is a decoder too, but cannot be rewritten with the others, and would not fit them any more: \
             {}; take it out of the directory if nothing uses it",
            part.label(),
            reason.map_or_else(String::new, ToString::to_string)
        ))
    })
}

impl VisualPrune {
    /// What `pass`, which prunes so, needs of the model.
    pub(super) fn requires_for(
        &self,
        pass: &'static str,
        vlm: &Vlm,
        context: &Context,
    ) -> Result<(), PassError> {
        let fail = |problem: String| Err(PassError::Requires { pass, problem });
        if let Err(problem) = self.check() {
            return fail(problem);
        }
        if vlm.decoders().next().is_none() {
            let decoder = |m: &NoMatch| m.looked_for.contains("decoder");
            return fail(vlm.missing("decoder", decoder).to_string());
        }
        requires_rewritable(pass, vlm)?;
        let placed = context.placed(vlm);
        for (index, decoder) in vlm.decoders() {
            if let Err(problem) = self.check_decoder(decoder, placed) {
                return fail(format!("{}: {problem}", vlm.parts[index].label()));
            }
        }
        marker::requires(pass, vlm, context)
    }

    /// The patches of `pass`.
    pub(super) fn plan_for(
        &self,
        pass: &'static str,
        vlm: &Vlm,
        context: &Context,
    ) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        let mut plans = Vec::new();
        let channel = |(_, decoder): (usize, &Decoder)| {
            marker::Marker::for_decoder(context.marker, decoder) == marker::Marker::Channel
        };
        let placed = context.placed(vlm);
        // The merge has marked what it placed.
        if vlm.decoders().any(channel) && !placed {
            for (index, output) in vlm.features() {
                let mut patch = crate::ir::Patch::new(&vlm.parts[index].model, pass);
                patch.scope("marker");
                marker::append_channel(&mut patch, output, 1.0);
                plans.push((index, patch.finish()));
            }
            for (index, embedding) in vlm.embeddings() {
                let part = &vlm.parts[index];
                let mut patch = crate::ir::Patch::new(&part.model, pass);
                patch.scope("marker");
                marker::mark_embedding(&mut patch, embedding).map_err(|problem| {
                    PassError::Unsupported {
                        pass,
                        file: part.file.display().to_string(),
                        problem,
                    }
                })?;
                plans.push((index, patch.finish()));
            }
        }
        for (index, decoder) in vlm.decoders() {
            let part = &vlm.parts[index];
            let job = stage::Job {
                pass,
                prune: self,
                placed,
            };
            let plan = stage::plan(&job, &part.model, decoder, context);
            let plan = plan.map_err(|problem| PassError::Unsupported {
                pass,
                file: part.label(),
                problem,
            })?;
            plans.push((index, plan));
        }
        Ok(plans)
    }

    /// What holds after the patches of `pass`.
    pub(super) fn ensures_for(&self, pass: &'static str, vlm: &Vlm) -> Result<(), PassError> {
        for (index, decoder) in vlm.decoders() {
            let model = &vlm.parts[index].model;
            let broken = |problem: String| {
                Err(PassError::Ensures {
                    pass,
                    file: vlm.parts[index].label(),
                    problem,
                })
            };
            // Clients read the past length off the first cache.
            let Some((b, _)) = decoder.layers[0].present else {
                continue;
            };
            let behind = self.drops[0].after_layer;
            for (a, _) in decoder.layers[behind..].iter().filter_map(|l| l.present) {
                let shape = |v| model.value(v).ty.as_ref().and_then(|t| t.shape());
                if shape(a).is_some() && shape(a) == shape(b) {
                    return broken(format!(
                        "'{}' states the shape of '{}', whose length it no longer has",
                        model.name(a),
                        model.name(b)
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Pass for VisualPrune {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn requires(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
        self.requires_for(ENTRY.name, vlm, context)
    }

    fn plan(&self, vlm: &Vlm, context: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        self.plan_for(ENTRY.name, vlm, context)
    }

    fn ensures(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        self.ensures_for(ENTRY.name, vlm)
    }

    fn pruning(&self) -> Option<&VisualPrune> {
        Some(self)
    }

    fn seen_by_layers(&self, entered: i64, layers: usize) -> Option<Vec<i64>> {
        Some(self.tokens_per_layer(entered, layers))
    }

    fn summary(&self, vlm: &Vlm) -> String {
        let drops: Vec<String> = self
            .drops
            .iter()
            .map(|d| format!("after layer {} keep {}", d.after_layer, d.keep))
            .collect();
        let depth = vlm.decoders().next().map_or(0, |(_, d)| d.depth());
        format!("{} of {depth} layers", drops.join(", "))
    }
}
