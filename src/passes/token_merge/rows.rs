//! The merge behind a tower of patch rows (Qwen2-VL, Qwen2.5-VL), among the merger's tokens.
//!
//! How many there are only the run tells, so counts are computed in the graph, and every
//! operator has to be right for any of them, one token among them. Where there is no contextual
//! token, one is made of what is there all the same, and left out at the end: an `ArgMax` over
//! nothing is an error.

use super::build::Build;
use super::place::Rows;
use super::sizes::Sizes;
use crate::arch::PatchRows;
use crate::ir::{DataType, Dim, Patch, Size, ValueId, ValueType};
use crate::passes::marker::wider;

/// What is left of the tokens of one call.
pub(super) struct MergedRows {
    /// Merged features `[1, K, width]`, by ascending place.
    pub(super) rows: ValueId,
    /// Their places among the N features, ascending: `[1, K]`, int64.
    pub(super) kept: ValueId,
    /// N.
    pub(super) all: Size,
}

impl MergedRows {
    /// `placement: encoder`: features `[K, width]` in place of the graph's, and the places
    /// `[K]` as one more output.
    pub(super) fn come_out(&self, patch: &mut Patch<'_>, output: usize, total: Option<i64>) {
        patch.scope("output");
        let features = patch.squeeze(self.rows, &[0]);
        patch.name_value(features, "features");
        let kept = patch.squeeze(self.kept, &[0]);
        let count = || total.map_or_else(|| Dim::param("merged_tokens"), Dim::Known);
        let model = patch.model();
        let stated = model.value(model.graph().outputs[output]).ty.clone();
        let ty = match stated {
            Some(ValueType::Tensor { dtype, shape }) => ValueType::Tensor {
                dtype,
                shape: shape.map(|mut dims| {
                    if let Some(first) = dims.first_mut() {
                        *first = count();
                    }
                    dims
                }),
            },
            _ => ValueType::tensor(DataType::Float, vec![count(), Dim::Unknown]),
        };
        patch.replace_output(output, features, ty);
        let ty = ValueType::tensor(DataType::Int64, vec![count()]);
        patch.publish(kept, super::KEPT_OUTPUT, ty);
    }

    /// `placement: decoder`: N features as before, each in its place, with the marker channel.
    pub(super) fn stay(self, patch: &mut Patch<'_>, output: usize) {
        let model = patch.model();
        let stated = model.value(model.graph().outputs[output]).ty.clone();
        let stated = stated.unwrap_or(ValueType::Tensor {
            dtype: DataType::Float,
            shape: None,
        });
        patch.scope("place");
        let rows = Rows {
            features: self.rows,
            places: self.kept,
            slots: self.all,
            dtype: stated.dtype().unwrap_or(DataType::Float),
        };
        let placed = rows.placed(patch);
        let features = patch.squeeze(placed, &[0]);
        patch.name_value(features, "features");
        patch.replace_output(output, features, wider(&stated));
    }
}

impl Build<'_, '_> {
    /// The merged tokens of a tower of patch rows: dominant and contextual together, by
    /// ascending place, a contextual token at its anchor's.
    pub(super) fn in_place(&mut self) -> MergedRows {
        self.patch.scope("score");
        let (k, probabilities, score) = self.received();
        let (dominant, pool) = self.select(score);
        if let Some(dominant) = dominant {
            self.patch.name_value(dominant, "dominant_indices");
        }
        let contextual = pool.map(|pool| self.contextual(k, pool, probabilities));
        self.patch.scope("gather");
        let (rows, kept) = match (dominant, contextual) {
            (Some(dominant), Some((anchors, tokens))) => {
                let tokens = [self.rows(dominant), tokens];
                let tokens = self.patch.concat(&tokens, 1);
                let places = self.patch.concat(&[dominant, anchors], 1);
                self.by_place(places, tokens)
            }
            (None, Some((anchors, tokens))) => self.by_place(anchors, tokens),
            (Some(dominant), None) => {
                let kept = self.patch.sort_ascending(dominant, self.sizes.dominant);
                (self.rows(kept), kept)
            }
            // `requires` refuses recipes that leave nothing.
            (None, None) => {
                let nothing = self.patch.i64s(&[]);
                let kept = self.patch.unsqueeze(nothing, &[0]);
                (self.rows(kept), kept)
            }
        };
        self.patch.name_value(rows, "merged_tokens");
        self.patch.name_value(kept, "kept_indices");
        MergedRows {
            rows,
            kept,
            all: self.sizes.all,
        }
    }

    /// Tokens `[1, K, D]` that stand at `places [1, K]`, sorted by these.
    fn by_place(&mut self, places: ValueId, tokens: ValueId) -> (ValueId, ValueId) {
        let count = self
            .patch
            .size_add(self.sizes.dominant, self.sizes.contextual);
        let (kept, order) = self.patch.top_k(places, count, false);
        (self.patch.gather_rows(tokens, order), kept)
    }

    /// Places `[1, k₂]` and contents `[1, k₂, D]` of the contextual tokens.
    fn contextual(
        &mut self,
        k: ValueId,
        pool: ValueId,
        probabilities: ValueId,
    ) -> (ValueId, ValueId) {
        let (anchors, tokens) = self.clusters(k, pool, probabilities);
        let Size::Value(_) = self.sizes.contextual else {
            return (anchors, tokens);
        };
        let mut cut = |x| {
            self.patch
                .slice(x, Size::Known(0), self.sizes.contextual, 1)
        };
        (cut(anchors), cut(tokens))
    }

    /// Contextual tokens and pool members, each at least one.
    fn served(&mut self) -> (Size, Size) {
        let one = Size::Known(1);
        let contextual = self.patch.size_max(self.sizes.contextual, one);
        (contextual, self.patch.size_max(self.sizes.pool, one))
    }

    /// Tokens of the pool, at least one.
    pub(super) fn pool_size(&mut self) -> Size {
        match self.sizes.pool {
            Size::Known(n) => Size::Known(n),
            Size::Value(_) => self.served().1,
        }
    }

    /// The pool of run-time counts: what follows the dominant tokens in `order`, or the last of
    /// these where nothing follows.
    pub(super) fn computed_pool(&mut self, order: ValueId) -> ValueId {
        let end = self.patch.size_add(self.sizes.dominant, self.sizes.pool);
        let (_, pool) = self.served();
        let start = self.patch.size_sub(end, pool);
        self.patch.slice(order, start, end, 1)
    }

    /// [`assigned`](Build::assigned) for counts that the run tells: the anchors `[1, k₂]` and
    /// their tokens `[1, k₂, D]`, at least one.
    pub(super) fn assigned_open(&mut self, k: ValueId, pool: ValueId) -> (ValueId, ValueId) {
        self.patch.scope("contextual");
        let (contextual, size) = self.served();
        let step = self.patch.size_div(size, contextual);
        let (step, most) = (
            self.patch.size_value(step),
            self.patch.size_value(contextual),
        );
        let every = self.patch.iota(contextual);
        let at = self.patch.op("Mul", &[every, step]);
        let anchor = self.patch.gather(pool, at, 1);
        self.patch.name_value(anchor, "anchor_indices");
        let nearest = self.nearest(k, anchor, pool);
        // Places 0, step, 2·step … of the pool are the anchors, and nobody's members.
        let place = self.patch.iota(size);
        let nth = self.patch.op("Div", &[place, step]);
        let whole = self.patch.op("Mul", &[nth, step]);
        let whole = self.patch.op("Equal", &[whole, place]);
        let first = self.patch.op("Less", &[nth, most]);
        let is_anchor = self.patch.op("And", &[whole, first]);
        let nobody = self.patch.i64(-1);
        let nearest = self.patch.op("Where", &[is_anchor, nobody, nearest]);
        self.patch.name_value(pool, "member_indices");
        self.patch.name_value(nearest, "member_anchors");
        let nearest = self.patch.unsqueeze(nearest, &[1]);
        let mean = self.means(nearest, every, pool);
        let anchor_rows = self.rows(anchor);
        let anchor_rows = self.in_f32(anchor_rows);
        let token = self.patch.op("Add", &[anchor_rows, mean]);
        (anchor, self.in_model_type(token))
    }

    /// [`neighbours`](Build::neighbours) for counts that the run tells.
    pub(super) fn neighbours_open(
        &mut self,
        k: ValueId,
        residual: ValueId,
        probabilities: ValueId,
    ) -> (ValueId, ValueId) {
        self.patch.scope("contextual");
        let (contextual, size) = self.served();
        let (place, anchor) = self.most_received(residual, probabilities, contextual);
        let similarity = self.likeness(k, (place, anchor), (residual, size));
        // A residual token alone has no neighbour: one is taken and counts nothing.
        let one = Size::Known(1);
        let others = self.patch.size_sub(size, one);
        let width = self
            .patch
            .size_min(others, Size::Known(self.merge.cluster_width));
        let taken = self.patch.size_max(width, one);
        let (_, nearest) = self.patch.top_k(similarity, taken, true);
        let flat = self.patch.reshape(nearest, &[1, -1]);
        let neighbour = self.patch.gather_rows(residual, flat);
        self.patch.name_value(neighbour, "member_indices");
        let rows = self.rows(neighbour);
        let rows = self.in_f32(rows);
        let shape = [one, contextual, taken, Size::Known(-1)];
        let shape = shape.map(|size| self.patch.size_value(size));
        let shape = self.patch.concat(&shape, 0);
        let rows = self.patch.op("Reshape", &[rows, shape]);
        let sum = self.patch.reduce_sum(rows, &[2], false);
        let width = self.patch.size_value(width);
        let width = self.patch.cast(width, DataType::Float);
        let unit = self.patch.f32(1.0);
        let counts = self.patch.op("Min", &[width, unit]);
        let sum = self.patch.op("Mul", &[sum, counts]);
        let anchor_rows = self.rows(anchor);
        let anchor_rows = self.in_f32(anchor_rows);
        let sum = self.patch.op("Add", &[sum, anchor_rows]);
        let count = self.patch.op("Add", &[width, unit]);
        let token = self.patch.op("Div", &[sum, count]);
        (anchor, self.in_model_type(token))
    }

    /// Mean over the patches of each of the merger's tokens, in the features' order:
    /// `[1, patches, …]` → `[1, N, …]`, `…` being `rest`.
    pub(super) fn merged_mean(&mut self, x: ValueId, rows: &PatchRows, rest: &[i64]) -> ValueId {
        let mut dims = vec![1, -1, rows.per];
        dims.extend(rest);
        let grouped = self.patch.reshape(x, &dims);
        let mean = self.patch.reduce("ReduceMean", grouped, &[2], false);
        let mean = self.patch.squeeze(mean, &[0]);
        let ordered = rows.in_order(self.patch, mean);
        self.patch.unsqueeze(ordered, &[0])
    }

    /// The features as a batch of one, `[1, N, D]`.
    pub(super) fn features_batch(&mut self) -> ValueId {
        let features = self.tower.features;
        *self
            .features
            .get_or_insert_with(|| self.patch.unsqueeze(features, &[0]))
    }
}

/// How many tokens come out of a recipe's merge where only the run tells N, for people: what is
/// asked for, an image with fewer keeping all.
pub(super) fn open_summary(sizes: &super::TokenMerge) -> String {
    use crate::passes::recipe::Count;
    // Rounded: the sum of two ratios is no round number in binary.
    let percent = |r: f64| format!("{} %", (1e4 * r).round() / 100.0);
    let each = |count: Count| match count {
        Count::Tokens(n) => n.to_string(),
        Count::Ratio(r) => percent(r),
    };
    let parts = format!(
        "{} dominant + {} contextual",
        each(sizes.dominant),
        each(sizes.contextual)
    );
    match (sizes.dominant, sizes.contextual) {
        (Count::Tokens(a), Count::Tokens(b)) => {
            format!("{} ({parts}) where an image has more", a + b)
        }
        (Count::Ratio(a), Count::Ratio(b)) => {
            format!("{} of them ({parts})", percent((a + b).min(1.0)))
        }
        _ => parts,
    }
}

/// Counts where N is known, else computed from the features.
pub(super) fn sizes(
    patch: &mut Patch<'_>,
    merge: &super::TokenMerge,
    tower: &crate::arch::VisionTower,
) -> Sizes {
    match tower.candidates() {
        Some(n) => Sizes::known(super::merge_budget(merge, n, false)),
        None => {
            patch.scope("count");
            let all = patch.size_of(tower.features, 0);
            Sizes::computed(patch, merge, all)
        }
    }
}
