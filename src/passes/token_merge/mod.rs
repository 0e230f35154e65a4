//! V2V: merging the vision encoder's tokens into a few dominant and contextual
//! ones, between tower and projector.
//!
//! ```text
//!  before:  tower ─ H ─[drop CLS]─▶ projector ─▶ features [n, N, D]
//!
//!  after:   tower ─ H ──────────────┬───────────┐
//!             └ q, k of the last    │           │
//!               live attention      ▼           ▼
//!                 └─▶ score ─▶ TopK ─▶ dominant, contextual ─▶ projector ─▶ [n, K, D]
//! ```
//!
//! Score of patch j: the attention that CLS pays to it, summed over heads; for
//! towers without CLS the attention it receives (sum over queries, mean over
//! heads). Contextual token = H[anchor] + mean of the H of the pool members whose
//! key metric is nearest to the anchor's (cosine). The tower's own attention is
//! not touched: only the rows that are needed are computed again beside it.
//!
//! **Behind a pixel shuffle** (Idefics3, SmolVLM, InternVL) the merge works on the
//! shuffled tokens `[n, N/r², r²·D]`: N in the budgets is N/r², H is the shuffled
//! row, and score and metric of a token are the means over its r² patches, as
//! Qwen2.5-VL's merge groups have them. Which patches make up a token is known
//! from the re-arrangement itself (see [`Shuffle`](crate::arch::Shuffle)).
//!
//! **Images of several crops** (LLaVA-NeXT, LLaVA-OneVision) are as many images to the
//! tower, `[crops, 3, h, w]` or `[batch, crops, 3, h, w]`: each crop's N tokens become
//! K. They are no grid any more, so no newline tokens belong between their rows, and
//! no padding can be cut off by rows: clients put them one after the other.
//!
//! **Towers of patch rows** (Qwen2-VL, Qwen2.5-VL) take the patches of a grid that only the run
//! tells, and a merger behind them makes one token of each 2×2. What the public code does is
//! followed, which merges the *features*: the merger's rows, put back into the image's order. So
//! the merger runs on all of them, other than projectors do.
//!
//! ```text
//!  before:  blocks ─ hidden ─ merger ─ Gather(order) ─▶ features [N, D]
//!
//!  after:   blocks ─ hidden ─ merger ─ Gather(order) ─▶ H [N, D] ────────┬───────────┐
//!             └ q, k of the last attention, behind the rotary embedding  ▼           ▼
//!               └─▶ score, metric ─ mean of 2×2 ─ Gather(order) ─▶ dominant, contextual
//!                                                                        └─ by place ┘
//!                                      features [K, D], kept_token_indices [K] ◀─┘
//! ```
//!
//! Score: as of other towers without CLS, under the mask of the last block. Score and metric are
//! averaged over each merge group and put into order as the features are. Dominant and contextual
//! tokens come out together, by ascending place, a contextual token at its anchor's. Counts are
//! computed in the graph: `dominant` = min(k₁, N), `contextual` = min(k₂, N − k₁); an image with
//! fewer tokens than the budget keeps all. Several images in one call are one list to the encoder
//! and are merged as one; for a budget for each, call once for each.
//!
//! **Placement.** With `placement: decoder` the features keep their number and order (see
//! [`place`]); the decoder masks the discarded ones in its first layer and drops them
//! before its second.
//!
//! **Masks** that the tower applies (images padded to a common size, position
//! biases) apply to the scores too.
//!
//! Source: DUET-VLM (arXiv 2602.18846), section on vision-to-vision merging, and
//! its public implementation, which adds the anchor to the mean.

mod build;
mod place;
mod rows;
mod sizes;

pub use place::placement_in;

use serde::Deserialize;

use self::build::Build;
use self::sizes::Sizes;
use super::recipe::{Count, MAX_COUNT};
use super::{Context, Entry, Pass, PassError, Stage, fewer, marker, visual_prune};
use crate::arch::{NoMatch, VisionTower, Vlm};
use crate::ir::{Model, Patch, PatchPlan};

pub(super) const ENTRY: Entry = Entry {
    name: "token_merge",
    about: "merges the vision encoder's tokens into dominant and contextual ones (V2V)",
    stage: Stage::Encoder,
    keys: &[
        "dominant",
        "contextual",
        "cluster_width",
        "selector",
        "cls",
        "placement",
    ],
    parse: super::parse::<TokenMerge>,
    keep_everything: "{dominant: 1.0, contextual: 0, cls: drop}",
    samples: &[
        "{dominant: 30, contextual: 6}",
        "{dominant: 0.3, contextual: 5, selector: uniform, cls: drop}",
        "{dominant: 24, contextual: 5, selector: local, cluster_width: 3}",
        "{dominant: 7, contextual: 0}",
    ],
};

/// The output of a rewritten encoder of patch rows that says which tokens its features are:
/// int64 `[merged_tokens]`, the place of each row among the tokens that the unmodified encoder
/// gives for the call, ascending. Clients need it for positions in the image's grid.
pub const KEPT_OUTPUT: &str = "kept_token_indices";

/// Which tokens become contextual, and of what they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Selector {
    /// DUET: anchors at even steps through the best-scored residual tokens.
    #[default]
    Attention,
    /// VisionZip: anchors at even steps through all residual tokens.
    Uniform,
    /// The paper's text: anchors by attention received, nearest neighbours.
    Local,
}

/// What happens to the CLS token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cls {
    /// It goes to the language model and counts as dominant.
    #[default]
    Keep,
    /// It is left out; `dominant` counts patches.
    Drop,
}

/// Where discarded tokens leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// The vision encoder gives fewer features.
    Encoder,
    /// The vision encoder gives as many as before, in their places; the decoder drops the
    /// discarded ones behind its first layer.
    Decoder,
}

/// Parameters of the pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenMerge {
    /// Tokens kept as they are (CLS counted where the tower has one and keeps it).
    pub dominant: Count,
    /// Tokens that the rest is merged into.
    pub contextual: Count,
    /// Residual tokens considered for each contextual token.
    #[serde(default = "default_width")]
    pub cluster_width: i64,
    /// How contextual tokens are made.
    #[serde(default)]
    pub selector: Selector,
    /// What happens to CLS. Left out: see [`keeps_cls`](Self::keeps_cls).
    #[serde(default)]
    pub cls: Option<Cls>,
    /// Where discarded tokens leave. Left out: see [`placement_in`].
    #[serde(default)]
    pub placement: Option<Placement>,
}

fn default_width() -> i64 {
    4
}

/// Token counts of a merge, clamped to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeBudget {
    /// Tokens chosen among, N: the tower's patches, or what a shuffle made of them.
    pub patches: i64,
    /// Of these, tokens kept as they are.
    pub dominant: i64,
    /// Contextual tokens.
    pub contextual: i64,
    /// Whether CLS comes first.
    pub cls: bool,
    /// Residual tokens that take part.
    pub pool: i64,
}

impl MergeBudget {
    /// Tokens that come out.
    pub fn total(&self) -> i64 {
        i64::from(self.cls) + self.dominant + self.contextual
    }
}

/// The counts for a tower of `patches` patch tokens; `has_cls`: whether it has a CLS token
/// that may come out.
pub fn merge_budget(merge: &TokenMerge, patches: i64, has_cls: bool) -> MergeBudget {
    let cls = has_cls && merge.cls != Some(Cls::Drop);
    let asked = merge.dominant.of(patches) - i64::from(cls);
    let dominant = asked.clamp(0, patches);
    let residual = patches - dominant;
    let contextual = merge.contextual.of(patches).clamp(0, residual);
    let pool = match merge.selector {
        Selector::Attention => (merge.cluster_width.saturating_mul(contextual))
            .max(1)
            .min(residual),
        Selector::Uniform | Selector::Local => residual,
    };
    MergeBudget {
        patches,
        dominant,
        contextual,
        cls,
        pool: if contextual == 0 { 0 } else { pool },
    }
}

impl TokenMerge {
    /// Whether CLS goes to the language model: what the recipe says, or, left out, yes,
    /// unless features stay in their places and there is none for it among them.
    pub fn keeps_cls(&self, tower: &VisionTower, placement: Placement) -> bool {
        let place = placement == Placement::Encoder || tower.gives_cls();
        tower.cls && self.cls.map_or(place, |cls| cls == Cls::Keep)
    }

    /// The counts for `tower`, where its number of tokens is fixed.
    pub fn budget(&self, tower: &VisionTower, placement: Placement) -> Option<MergeBudget> {
        let cls = self.keeps_cls(tower, placement);
        Some(merge_budget(self, tower.candidates()?, cls))
    }

    /// Tokens that are left of an image of `tower`, if their number is fixed. They come
    /// out of it alone, or among the discarded ones.
    pub fn tokens_left(&self, tower: &VisionTower, placement: Placement) -> Option<i64> {
        Some(self.budget(tower, placement)?.total())
    }

    /// What `placement: decoder` needs of the tower and of the decoder.
    fn requires_placed(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
        let fail = |problem: String| {
            Err(PassError::Requires {
                pass: ENTRY.name,
                problem,
            })
        };
        if vlm.decoders().next().is_none() {
            let decoder = |m: &NoMatch| m.looked_for.contains("decoder");
            return fail(format!(
                "placement: decoder leaves it to the decoder to drop discarded features, and {}; give the \
                 whole model directory, or use placement: encoder",
                vlm.missing("decoder", decoder)
            ));
        }
        for (index, tower) in vlm.towers() {
            if self.cls == Some(Cls::Keep) && tower.cls && !tower.gives_cls() {
                return fail(format!(
                    "{}: with placement: decoder the features keep their places, and the CLS token has none \
                     among them; use 'cls: drop'",
                    vlm.parts[index].label()
                ));
            }
        }
        for (index, decoder) in vlm.decoders() {
            if decoder.depth() < 2 {
                return fail(format!(
                    "{}: placement: decoder drops discarded features behind the first layer, and there is \
                     only one; use placement: encoder",
                    vlm.parts[index].label()
                ));
            }
        }
        visual_prune::requires_rewritable(ENTRY.name, vlm)?;
        marker::requires(ENTRY.name, vlm, context)
    }

    /// The embeddings' marks and, where no other pass makes the decoder's patch, that.
    fn plan_placed(
        vlm: &Vlm,
        context: &Context,
        plans: &mut Vec<(usize, PatchPlan)>,
    ) -> Result<(), PassError> {
        let unsupported = |index: usize, problem: String| PassError::Unsupported {
            pass: ENTRY.name,
            file: vlm.parts[index].label(),
            problem,
        };
        for (index, embedding) in vlm.embeddings() {
            let mut patch = Patch::new(&vlm.parts[index].model, ENTRY.name);
            patch.scope("marker");
            marker::mark_embedding(&mut patch, embedding).map_err(|p| unsupported(index, p))?;
            plans.push((index, patch.finish()));
        }
        if context.prunes {
            return Ok(());
        }
        for (index, decoder) in vlm.decoders() {
            let model = &vlm.parts[index].model;
            let plan = visual_prune::plan_gone(ENTRY.name, model, decoder, context);
            plans.push((index, plan.map_err(|p| unsupported(index, p))?));
        }
        Ok(())
    }

    /// Whether the merge fits a tower of patch rows.
    fn fits_rows(
        &self,
        model: &Model,
        tower: &VisionTower,
        placement: Placement,
    ) -> Result<(), String> {
        let features = model.name(tower.features);
        let ty = model.value(tower.features).ty.as_ref();
        let rank = ty.and_then(|t| t.shape()).map(<[_]>::len);
        if let Some(rank) = rank.filter(|rank| *rank != 2) {
            return Err(format!(
                "'{features}' has {rank} axes; features of a tower of patch rows are expected as [tokens, width]"
            ));
        }
        let taken = model.find(KEPT_OUTPUT);
        if let Some(taken) = taken.filter(|_| placement == Placement::Encoder) {
            return Err(format!(
                "the merged encoder gives out '{KEPT_OUTPUT}', and the file has a value of that name ({}) already",
                model
                    .producer_of(taken)
                    .map_or_else(|| "an input".into(), |n| model.describe(n))
            ));
        }
        let none = |count: Count| matches!(count, Count::Tokens(0) | Count::Ratio(0.0));
        let total = self.tokens_left(tower, Placement::Encoder);
        if total == Some(0) || none(self.dominant) && none(self.contextual) {
            return Err("dominant and contextual leave no token; keep at least one".into());
        }
        Ok(())
    }

    fn plan_rows(&self, model: &Model, tower: &VisionTower, placement: Placement) -> PatchPlan {
        let mut patch = Patch::new(model, ENTRY.name);
        let sizes = rows::sizes(&mut patch, self, tower);
        let merged = Build::new(self, tower, sizes, &mut patch).in_place();
        if let Some(output) = tower.features_index {
            match placement {
                Placement::Encoder => {
                    let total = self.tokens_left(tower, placement);
                    merged.come_out(&mut patch, output, total);
                }
                Placement::Decoder => merged.stay(&mut patch, output),
            }
        }
        patch.finish()
    }
}

impl Pass for TokenMerge {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn requires(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
        let placement = placement_in(self.placement, vlm);
        let fail = |problem: String| {
            Err(PassError::Requires {
                pass: ENTRY.name,
                problem,
            })
        };
        if !(1..=MAX_COUNT).contains(&self.cluster_width) {
            return fail(format!(
                "cluster_width is {}; expected 1 to {MAX_COUNT}",
                self.cluster_width
            ));
        }
        if let Err(problem) = fewer::requires_tower(vlm) {
            return fail(problem);
        }
        if self.cls == Some(Cls::Keep)
            && let Some((index, _)) = vlm.towers().next()
            && vlm.towers().all(|(_, tower)| !tower.cls)
        {
            return fail(format!(
                "{}: 'cls: keep' keeps the tower's CLS token, and it has none; leave 'cls' out",
                vlm.parts[index].label()
            ));
        }
        for (index, tower) in vlm.towers() {
            let file = vlm.parts[index].label();
            let model = &vlm.parts[index].model;
            if tower.rows.is_some() {
                if let Err(problem) = self.fits_rows(model, tower, placement) {
                    return fail(format!("{file}: {problem}"));
                }
                continue;
            }
            let patches = match fewer::fits(vlm, index, tower) {
                Ok(patches) => patches,
                Err(problem) => return fail(format!("{file}: {problem}")),
            };
            if self.keeps_cls(tower, placement) && tower.shuffle.is_some() {
                return fail(format!(
                    "{file}: the projector receives tokens that a pixel shuffle made of several patches, so \
                     the CLS token cannot go with them; use 'cls: drop'"
                ));
            }
            if self.keeps_cls(tower, placement) && self.dominant.of(patches) < 1 {
                return fail(format!(
                    "{file}: dominant is 0, but the CLS token counts as dominant; use 1 or more, or 'cls: drop'"
                ));
            }
            let budget = merge_budget(self, patches, self.keeps_cls(tower, placement));
            if budget.total() == 0 {
                return fail(format!(
                    "{file}: dominant and contextual leave no token; keep at least one"
                ));
            }
        }
        match placement {
            Placement::Encoder => Ok(()),
            Placement::Decoder => self.requires_placed(vlm, context),
        }
    }

    fn plan(&self, vlm: &Vlm, context: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        let placement = placement_in(self.placement, vlm);
        let mut plans = Vec::new();
        for (index, tower) in vlm.towers() {
            let part = &vlm.parts[index];
            let unsupported = |problem: String| PassError::Unsupported {
                pass: ENTRY.name,
                file: part.label(),
                problem,
            };
            if tower.rows.is_some() {
                plans.push((index, self.plan_rows(&part.model, tower, placement)));
                continue;
            }
            let budget = self
                .budget(tower, placement)
                .ok_or_else(|| unsupported("the token count is not fixed".into()))?;
            let mut patch = Patch::new(&part.model, ENTRY.name);
            let sizes = Sizes::known(budget);
            let (merged, stand_for) = Build::new(self, tower, sizes, &mut patch).tokens();
            patch.rewire_all(tower.entry, merged);
            let total = budget.total();
            fewer::resize(&mut patch, vlm, (index, tower), tower.entry, total)
                .map_err(unsupported)?;
            if let Some(ty) = fewer::counted(&part.model, tower, total) {
                patch.set_type(tower.features, ty);
            }
            if placement == Placement::Decoder {
                place::place(&mut patch, tower, budget, &stand_for).map_err(unsupported)?;
            }
            plans.push((index, patch.finish()));
        }
        match placement {
            Placement::Encoder => plans.extend(fewer::fed_embeddings(ENTRY.name, vlm, |tower| {
                self.tokens_left(tower, Placement::Encoder)
            })),
            Placement::Decoder => Self::plan_placed(vlm, context, &mut plans)?,
        }
        Ok(plans)
    }

    fn ensures(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        for (index, tower) in vlm.towers() {
            let part = &vlm.parts[index];
            let placement = placement_in(self.placement, vlm);
            let mut outputs = part.model.graph().outputs.iter();
            let told = outputs.any(|v| part.model.name(*v) == KEPT_OUTPUT);
            if tower.rows.is_some() && told != (placement == Placement::Encoder) {
                return Err(PassError::Ensures {
                    pass: ENTRY.name,
                    file: part.label(),
                    problem: format!(
                        "expected an output '{KEPT_OUTPUT}' where fewer features come out, and only there"
                    ),
                });
            }
            let want = match placement {
                Placement::Encoder => self.tokens_left(tower, Placement::Encoder),
                Placement::Decoder => tower.features_per_image(),
            };
            fewer::says(vlm, (index, tower), want).map_err(|problem| PassError::Ensures {
                pass: ENTRY.name,
                file: part.label(),
                problem,
            })?;
        }
        Ok(())
    }

    fn left_of_image(&self, candidates: i64, cls: bool) -> Option<i64> {
        Some(merge_budget(self, candidates, cls).total())
    }

    fn summary(&self, vlm: &Vlm) -> String {
        let placement = placement_in(self.placement, vlm);
        let mut lines: Vec<String> = vlm
            .towers()
            .filter_map(|(_, tower)| {
                if let Some(rows) = tower.rows.as_ref().filter(|_| tower.open()) {
                    return Some(format!(
                        "tokens of {} patches each, as many as the run tells → {}, after block {}",
                        rows.per,
                        rows::open_summary(self),
                        tower.layers
                    ));
                }
                let b = self.budget(tower, placement)?;
                let cls = if b.cls { "CLS + " } else { "" };
                let kind = fewer::kind(tower);
                Some(format!(
                    "{} {kind} → {} ({cls}{} dominant + {} contextual) after block {}",
                    b.patches,
                    b.total(),
                    b.dominant,
                    b.contextual,
                    tower.layers
                ))
            })
            .collect();
        // The precisions of one tower say the same.
        lines.dedup();
        if placement == Placement::Decoder {
            let left = vlm.towers().filter_map(|(_, t)| t.features_per_image());
            let left: Vec<String> = left.map(|n| n.to_string()).collect();
            lines.push(format!(
                "{} features come out, in their places; {}",
                left.first().map_or("as many", String::as_str),
                visual_prune::gone_summary(vlm)
            ));
        }
        lines.join("; ")
    }
}
