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
//! Source: DUET-VLM (arXiv 2602.18846), section on vision-to-vision merging, and
//! its public implementation, which adds the anchor to the mean.

use serde::Deserialize;

use super::recipe::Count;
use super::resize::{fixed_length, resize};
use super::{Context, Entry, Pass, PassError};
use crate::arch::{NoMatch, VisionTower, Vlm};
use crate::ir::{DataType, Patch, PatchPlan, Size, ValueId, int};

pub(super) const ENTRY: Entry = Entry {
    name: "token_merge",
    about: "merges the vision encoder's tokens into dominant and contextual ones (V2V)",
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
};

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

/// Where the shorter list comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// The vision encoder gives fewer features.
    #[default]
    Encoder,
    /// The vision encoder gives all features, the decoder drops them.
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
    /// What happens to CLS.
    #[serde(default)]
    pub cls: Cls,
    /// Where the shorter list comes out.
    #[serde(default)]
    pub placement: Placement,
}

fn default_width() -> i64 {
    4
}

/// Token counts of a merge, clamped to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeBudget {
    /// Patch tokens of the tower, N.
    pub patches: i64,
    /// Patch tokens kept as they are.
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

/// The counts for a tower of `patches` patch tokens.
pub fn merge_budget(merge: &TokenMerge, patches: i64, has_cls: bool) -> MergeBudget {
    let cls = has_cls && merge.cls == Cls::Keep;
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
    /// Tokens that come out of `tower` per image, if their number is fixed.
    pub fn tokens_out(&self, tower: &VisionTower) -> Option<i64> {
        Some(merge_budget(self, tower.patches()?, tower.cls).total())
    }
}

impl Pass for TokenMerge {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn requires(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        let fail = |problem: String| {
            Err(PassError::Requires {
                pass: ENTRY.name,
                problem,
            })
        };
        if self.cluster_width < 1 {
            return fail(format!(
                "cluster_width is {}; expected 1 or more",
                self.cluster_width
            ));
        }
        if self.placement == Placement::Decoder {
            return fail("placement: decoder is not available yet; use placement: encoder".into());
        }
        if vlm.towers().next().is_none() {
            let vision = |m: &NoMatch| m.looked_for.contains("vision");
            let why = vlm.missing("vision tower", vision);
            return fail(why.to_string());
        }
        for (index, tower) in vlm.towers() {
            let file = vlm.parts[index].file.display();
            if let Some(node) = &tower.grid {
                return fail(format!(
                    "{file}: behind the tower, {node} treats the tokens as a grid (pixel shuffle or pooling), \
                     which fewer tokens do not fill; merging in front of it is not supported. visual_prune \
                     alone works on such models"
                ));
            }
            let ids = vlm.decoders().find(|(i, _)| *i == index);
            let ids = ids.and_then(|(_, decoder)| decoder.ids);
            if let Some(ids) = ids.filter(|_| tower.features_index.is_none())
                && let Some(length) = fixed_length(&vlm.parts[index].model, ids.value)
            {
                return fail(format!(
                    "{file}: '{}' holds {length} tokens, always, and fewer features need fewer of them; export \
                     with a sequence of any length (dynamic axes)",
                    vlm.parts[index].model.name(ids.value)
                ));
            }
            let Some(patches) = tower.patches() else {
                return fail(format!(
                    "{file}: the number of patch tokens is not fixed in the file (neither by the shape of \
                     '{}' nor by a position table)",
                    vlm.parts[index].model.name(tower.features)
                ));
            };
            if tower.cls && self.cls == Cls::Keep && self.dominant.of(patches) < 1 {
                return fail(format!(
                    "{file}: dominant is 0, but the CLS token counts as dominant; use 1 or more, or 'cls: drop'"
                ));
            }
            let budget = merge_budget(self, patches, tower.cls);
            if budget.total() == 0 {
                return fail(format!(
                    "{file}: dominant and contextual leave no token; keep at least one"
                ));
            }
        }
        Ok(())
    }

    fn plan(&self, vlm: &Vlm, _: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        let mut plans = Vec::new();
        for (index, tower) in vlm.towers() {
            let part = &vlm.parts[index];
            let unsupported = |problem: String| PassError::Unsupported {
                pass: ENTRY.name,
                file: part.file.display().to_string(),
                problem,
            };
            let patches = tower
                .patches()
                .ok_or_else(|| unsupported("the token count is not fixed".into()))?;
            let budget = merge_budget(self, patches, tower.cls);
            let mut patch = Patch::new(&part.model, ENTRY.name);
            let mut build = Build {
                merge: self,
                tower,
                budget,
                patch: &mut patch,
            };
            let merged = build.tokens();
            patch.rewire_all(tower.entry, merged);
            let embeds = vlm.decoders().find(|(i, _)| *i == index);
            let embeds = embeds.map(|(_, decoder)| decoder.embeds);
            resize(&mut patch, tower, embeds, budget.total()).map_err(unsupported)?;
            plans.push((index, patch.finish()));
        }
        Ok(plans)
    }

    fn ensures(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        for (index, tower) in vlm.towers() {
            let part = &vlm.parts[index];
            let output = match tower.features_index {
                Some(index) => part.model.graph().outputs[index],
                None => tower.features,
            };
            let shape = part.model.value(output).ty.as_ref().and_then(|t| t.shape());
            let want = self.tokens_out(tower);
            let found = shape.filter(|s| s.len() == 3).map(|s| s[1].known());
            if found.is_some_and(|f| f != want) {
                return Err(PassError::Ensures {
                    pass: ENTRY.name,
                    file: part.file.display().to_string(),
                    problem: format!("expected {want:?} features, the output says {found:?}"),
                });
            }
        }
        Ok(())
    }

    fn summary(&self, vlm: &Vlm) -> String {
        let lines: Vec<String> = vlm
            .towers()
            .filter_map(|(_, tower)| {
                let b = merge_budget(self, tower.patches()?, tower.cls);
                let cls = if b.cls { "CLS + " } else { "" };
                Some(format!(
                    "{} patch tokens → {} ({cls}{} dominant + {} contextual) after block {}",
                    b.patches,
                    b.total(),
                    b.dominant,
                    b.contextual,
                    tower.layers
                ))
            })
            .collect();
        lines.join("; ")
    }
}

/// The construction for one tower. Shapes in comments: n images, T tokens with
/// CLS, N patches, h heads, d head width, D tower width.
struct Build<'a, 'm> {
    merge: &'a TokenMerge,
    tower: &'a VisionTower,
    budget: MergeBudget,
    patch: &'a mut Patch<'m>,
}

impl Build<'_, '_> {
    fn cls_rows(&self) -> i64 {
        i64::from(self.tower.cls)
    }

    /// Rows of patch tokens only.
    fn patches_only(&mut self, x: ValueId, axis: i64) -> ValueId {
        if !self.tower.cls {
            return x;
        }
        self.patch
            .slice(x, Size::Known(1), Size::Known(i64::MAX), axis)
    }

    fn in_f32(&mut self, x: ValueId) -> ValueId {
        if self.tower.dtype == DataType::Float {
            return x;
        }
        self.patch.cast(x, DataType::Float)
    }

    /// A projection as `[n, T, h, d]`, fp32.
    fn heads(&mut self, projection: ValueId) -> ValueId {
        let tokens = self.budget.patches + self.cls_rows();
        let dims = [-1, tokens, self.tower.heads, self.tower.head_dim];
        let split = self.patch.reshape(projection, &dims);
        self.in_f32(split)
    }

    /// The merged tokens `[n, K, D]`.
    fn tokens(&mut self) -> ValueId {
        let tower = self.tower;
        self.patch.scope("score");
        let q = self.heads(tower.site.query.root);
        let k = self.heads(tower.site.key.root);
        let needs_all = !tower.cls || self.merge.selector == Selector::Local;
        // [n, h, T, T] or, for the CLS row alone, [n, h, 1, T]
        let probabilities = self.attention(q, k, needs_all);
        let score = if tower.cls {
            let row = if needs_all {
                self.patch
                    .slice(probabilities, Size::Known(0), Size::Known(1), 2)
            } else {
                probabilities
            };
            let summed = self.patch.reduce_sum(row, &[1, 2], false);
            self.patches_only(summed, 1)
        } else {
            let received = self.patch.reduce_sum(probabilities, &[2], false);
            self.patch.reduce("ReduceMean", received, &[1], false)
        };
        self.patch.name_value(score, "score");
        let mut parts = Vec::new();
        if self.budget.cls {
            parts.push(
                self.patch
                    .slice(tower.hidden, Size::Known(0), Size::Known(1), 1),
            );
        }
        let (dominant, pool) = self.select(score);
        if let Some(dominant) = dominant {
            self.patch.name_value(dominant, "dominant_indices");
            parts.push(self.rows(dominant));
        }
        if let Some(pool) = pool {
            let contextual = match self.merge.selector {
                Selector::Attention | Selector::Uniform => self.assigned(k, pool),
                Selector::Local => self.neighbours(k, pool, probabilities),
            };
            parts.push(contextual);
        }
        self.patch.scope("gather");
        let merged = self.patch.concat(&parts, 1);
        self.patch.name_value(merged, "merged_tokens");
        merged
    }

    /// softmax(q · kᵀ · scale): all rows or the CLS row.
    fn attention(&mut self, q: ValueId, k: ValueId, all: bool) -> ValueId {
        let q = if all {
            q
        } else {
            self.patch.slice(q, Size::Known(0), Size::Known(1), 1)
        };
        let q = self.patch.transpose(q, &[0, 2, 1, 3]);
        #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
        let scale = self.patch.f32(self.tower.site.scale() as f32);
        let q = self.patch.op("Mul", &[q, scale]);
        let k = self.patch.transpose(k, &[0, 2, 3, 1]);
        let product = self.patch.op("MatMul", &[q, k]);
        self.patch.softmax(product)
    }

    /// Indices among the patches: dominant `[n, k₁]` ascending, and the residual
    /// tokens that take part `[n, P]`, by falling score or by position.
    fn select(&mut self, score: ValueId) -> (Option<ValueId>, Option<ValueId>) {
        let b = self.budget;
        self.patch.scope("select");
        let (_, order) = self
            .patch
            .top_k(score, Size::Known(b.dominant + b.pool), true);
        let dominant = (b.dominant > 0).then(|| {
            let best = self
                .patch
                .slice(order, Size::Known(0), Size::Known(b.dominant), 1);
            self.patch.sort_ascending(best, Size::Known(b.dominant))
        });
        let pool = (b.contextual > 0).then(|| {
            let (from, to) = (Size::Known(b.dominant), Size::Known(b.dominant + b.pool));
            let pool = self.patch.slice(order, from, to, 1);
            match self.merge.selector {
                Selector::Attention => pool,
                Selector::Uniform | Selector::Local => {
                    self.patch.sort_ascending(pool, Size::Known(b.pool))
                }
            }
        });
        (dominant, pool)
    }

    /// H at patch indices `[n, m]` → `[n, m, D]`.
    fn rows(&mut self, indices: ValueId) -> ValueId {
        let indices = if self.tower.cls {
            let one = self.patch.i64(1);
            self.patch.op("Add", &[indices, one])
        } else {
            indices
        };
        self.patch.gather_rows(self.tower.hidden, indices)
    }

    /// Key metric of every patch, of unit length: `[n, N, d]`.
    fn metric(&mut self, k: ValueId) -> ValueId {
        let mean = self.patch.reduce("ReduceMean", k, &[2], false);
        let metric = self.patches_only(mean, 1);
        let square = self.patch.op("Mul", &[metric, metric]);
        let sum = self.patch.reduce_sum(square, &[2], true);
        let norm = self.patch.op("Sqrt", &[sum]);
        let tiny = self.patch.f32(1e-12);
        let norm = self.patch.op("Max", &[norm, tiny]);
        self.patch.op("Div", &[metric, norm])
    }

    /// Each pool member goes to its nearest anchor; H[anchor] + mean of members.
    fn assigned(&mut self, k: ValueId, pool: ValueId) -> ValueId {
        let b = self.budget;
        self.patch.scope("contextual");
        let step = (b.pool / b.contextual).max(1);
        let anchors: Vec<i64> = (0..b.contextual).map(|i| i * step).collect();
        let members: Vec<i64> = (0..b.pool).filter(|i| !anchors.contains(i)).collect();
        let at = self.patch.i64s(&anchors);
        let anchor = self.patch.gather(pool, at, 1);
        self.patch.name_value(anchor, "anchor_indices");
        let anchor_rows = self.rows(anchor);
        if members.is_empty() {
            return anchor_rows;
        }
        let at = self.patch.i64s(&members);
        let member = self.patch.gather(pool, at, 1);
        let metric = self.metric(k);
        let anchor_metric = self.patch.gather_rows(metric, anchor);
        let member_metric = self.patch.gather_rows(metric, member);
        let anchor_metric = self.patch.transpose(anchor_metric, &[0, 2, 1]);
        // [n, M, k₂]: the first anchor wins a tie (ArgMax's rule).
        let similarity = self.patch.op("MatMul", &[member_metric, anchor_metric]);
        let attributes = vec![int("axis", -1), int("keepdims", 0)];
        let nearest = self.patch.op_with("ArgMax", &[similarity], attributes);
        let nearest = self.patch.unsqueeze(nearest, &[1]);
        let every: Vec<i64> = (0..b.contextual).collect();
        let every = self.patch.i64s(&every);
        let every = self.patch.reshape(every, &[1, -1, 1]);
        let belongs = self.patch.op("Equal", &[nearest, every]);
        let belongs = self.patch.cast(belongs, DataType::Float);
        let member_rows = self.rows(member);
        let member_rows = self.in_f32(member_rows);
        let sum = self.patch.op("MatMul", &[belongs, member_rows]);
        let count = self.patch.reduce_sum(belongs, &[2], true);
        let one = self.patch.f32(1.0);
        let count = self.patch.op("Max", &[count, one]);
        let mean = self.patch.op("Div", &[sum, count]);
        let anchor_rows = self.in_f32(anchor_rows);
        let token = self.patch.op("Add", &[anchor_rows, mean]);
        self.in_model_type(token)
    }

    /// Anchors by attention received, each averaged with its w nearest.
    fn neighbours(&mut self, k: ValueId, residual: ValueId, probabilities: ValueId) -> ValueId {
        let b = self.budget;
        self.patch.scope("contextual");
        let received = self.patch.reduce_sum(probabilities, &[1, 2], false);
        let received = self.patches_only(received, 1);
        let received = self.patch.gather_rows(received, residual);
        let (_, place) = self.patch.top_k(received, Size::Known(b.contextual), true);
        let anchor = self.patch.gather_rows(residual, place);
        self.patch.name_value(anchor, "anchor_indices");
        let anchor_rows = self.rows(anchor);
        let width = self.merge.cluster_width.min(b.pool - 1);
        if width == 0 {
            return anchor_rows;
        }
        let metric = self.metric(k);
        let residual_metric = self.patch.gather_rows(metric, residual);
        let anchor_metric = self.patch.gather_rows(metric, anchor);
        let residual_metric = self.patch.transpose(residual_metric, &[0, 2, 1]);
        // [n, k₂, M]; an anchor is not its own neighbour.
        let similarity = self.patch.op("MatMul", &[anchor_metric, residual_metric]);
        let own = self.patch.unsqueeze(place, &[2]);
        let every: Vec<i64> = (0..b.pool).collect();
        let every = self.patch.i64s(&every);
        let own = self.patch.op("Equal", &[own, every]);
        let below = self.patch.f32(-4.0);
        let similarity = self.patch.op("Where", &[own, below, similarity]);
        let (_, nearest) = self.patch.top_k(similarity, Size::Known(width), true);
        let flat = self.patch.reshape(nearest, &[0, b.contextual * width]);
        let neighbour = self.patch.gather_rows(residual, flat);
        let rows = self.rows(neighbour);
        let rows = self.in_f32(rows);
        // D is inferred: the file need not state the tower's width.
        let batch = self.patch.size_of(rows, 0);
        let batch = self.patch.size_value(batch);
        let rest = self.patch.i64s(&[b.contextual, width, -1]);
        let shape = self.patch.concat(&[batch, rest], 0);
        let rows = self.patch.op("Reshape", &[rows, shape]);
        let sum = self.patch.reduce_sum(rows, &[2], false);
        let anchor_rows = self.in_f32(anchor_rows);
        let sum = self.patch.op("Add", &[sum, anchor_rows]);
        let count = self.patch.f32((width + 1) as f32);
        let token = self.patch.op("Div", &[sum, count]);
        self.in_model_type(token)
    }

    fn in_model_type(&mut self, x: ValueId) -> ValueId {
        if self.tower.dtype == DataType::Float {
            return x;
        }
        self.patch.cast(x, self.tower.dtype)
    }
}
