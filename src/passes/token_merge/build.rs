//! The merge as operators: score, selection, contextual tokens.

use super::sizes::Sizes;
use super::{Selector, TokenMerge};
use crate::arch::{Mask, VisionTower};
use crate::ir::{DataType, Patch, Size, ValueId, int};

/// The construction for one tower. Shapes in comments: n images, T tokens with
/// CLS, N patches, h heads, d head width, D tower width.
pub(super) struct Build<'a, 'm> {
    pub(super) merge: &'a TokenMerge,
    pub(super) tower: &'a VisionTower,
    pub(super) sizes: Sizes,
    pub(super) patch: &'a mut Patch<'m>,
    /// The features of a tower of patch rows as a batch of one, once they are needed.
    pub(super) features: Option<ValueId>,
}

impl<'a, 'm> Build<'a, 'm> {
    pub(super) fn new(
        merge: &'a TokenMerge,
        tower: &'a VisionTower,
        sizes: Sizes,
        patch: &'a mut Patch<'m>,
    ) -> Self {
        Self {
            merge,
            tower,
            sizes,
            patch,
            features: None,
        }
    }

    /// Rows of patch tokens only.
    fn patches_only(&mut self, x: ValueId, axis: i64) -> ValueId {
        if !self.tower.cls {
            return x;
        }
        self.patch
            .slice(x, Size::Known(1), Size::Known(i64::MAX), axis)
    }

    pub(super) fn in_f32(&mut self, x: ValueId) -> ValueId {
        if self.tower.dtype == DataType::Float {
            return x;
        }
        self.patch.cast(x, DataType::Float)
    }

    /// Queries, or keys, as `[n, T, h, d]`, fp32; with `first` only those of the first token.
    fn heads(&mut self, key: bool, first: bool) -> ValueId {
        if let Some(rows) = &self.tower.rows {
            let split = rows.heads(self.patch, self.tower, key);
            return match rows.dtype {
                DataType::Float => split,
                _ => self.patch.cast(split, DataType::Float),
            };
        }
        let site = &self.tower.site;
        let operand = if key { &site.key } else { &site.query };
        let (projection, done) = operand.build(self.patch, first);
        let tokens = match done {
            true => 1,
            false => self.tower.tokens.unwrap_or(-1),
        };
        let dims = [-1, tokens, self.tower.heads, self.tower.head_dim];
        let mut split = self.patch.reshape(projection, &dims);
        if first && !done {
            split = self.patch.slice(split, Size::Known(0), Size::Known(1), 1);
        }
        self.in_f32(split)
    }

    /// The merged tokens `[n, K, D]`, and which of the N tokens they stand for, in their
    /// order (CLS aside): int64 `[n, ·]` each. Dominant tokens stand for themselves,
    /// contextual ones for their anchors.
    pub(super) fn tokens(&mut self) -> (ValueId, Vec<ValueId>) {
        let tower = self.tower;
        self.patch.scope("score");
        let (k, probabilities, score) = self.received();
        let (mut parts, mut stand_for) = (Vec::new(), Vec::new());
        if self.sizes.cls {
            parts.push(
                self.patch
                    .slice(tower.hidden, Size::Known(0), Size::Known(1), 1),
            );
        }
        let (dominant, pool) = self.select(score);
        if let Some(dominant) = dominant {
            self.patch.name_value(dominant, "dominant_indices");
            stand_for.push(dominant);
            parts.push(self.rows(dominant));
        }
        if let Some(pool) = pool {
            let (anchors, tokens) = self.clusters(k, pool, probabilities);
            stand_for.push(anchors);
            parts.push(tokens);
        }
        self.patch.scope("gather");
        let merged = self.patch.concat(&parts, 1);
        self.patch.name_value(merged, "merged_tokens");
        (merged, stand_for)
    }

    /// Keys `[n, T, h, d]`, probabilities `[n, h, T, T]` (`[n, h, 1, T]` where the CLS row
    /// alone is needed), and the score `[n, N]` of each token to choose among.
    pub(super) fn received(&mut self) -> (ValueId, ValueId, ValueId) {
        let tower = self.tower;
        let needs_all = !tower.cls || self.merge.selector == Selector::Local;
        let q = self.heads(false, !needs_all);
        let k = self.heads(true, false);
        let probabilities = self.attention(q, k, needs_all);
        let of_patches = if tower.cls {
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
        let score = self.pooled(of_patches, &[]);
        self.patch.name_value(score, "score");
        (k, probabilities, score)
    }

    /// Anchors `[n, k₂]` and contextual tokens `[n, k₂, D]`, at least one.
    pub(super) fn clusters(
        &mut self,
        k: ValueId,
        pool: ValueId,
        probabilities: ValueId,
    ) -> (ValueId, ValueId) {
        let fixed = self.sizes.fixed();
        match (self.merge.selector, fixed) {
            (Selector::Local, Some(counts)) => self.neighbours(k, pool, probabilities, counts),
            (Selector::Local, None) => self.neighbours_open(k, pool, probabilities),
            (_, Some(counts)) => self.assigned(k, pool, counts),
            (_, None) => self.assigned_open(k, pool),
        }
    }

    /// Attention received, summed over heads and queries, of each token: `[n, N]`.
    fn received_sum(&mut self, probabilities: ValueId) -> ValueId {
        let received = self.patch.reduce_sum(probabilities, &[1, 2], false);
        let received = self.patches_only(received, 1);
        self.pooled(received, &[])
    }

    /// softmax(q · kᵀ · scale, masked as the tower's own): all rows or the CLS row.
    fn attention(&mut self, q: ValueId, k: ValueId, all: bool) -> ValueId {
        let q = self.patch.transpose(q, &[0, 2, 1, 3]);
        #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
        let scale = self.patch.f32(self.tower.site.scale() as f32);
        let q = self.patch.op("Mul", &[q, scale]);
        let k = self.patch.transpose(k, &[0, 2, 3, 1]);
        let mut scores = self.patch.op("MatMul", &[q, k]);
        let masks = &self.tower.site.masks;
        for mask in masks {
            let mut of_rows = mask.value();
            if !all && !matches!(mask, Mask::Segments(_)) {
                // The axis of the queries, which may be broadcast.
                let (from, to) = (Size::Known(0), Size::Known(1));
                of_rows = self.patch.slice(of_rows, from, to, -2);
            }
            scores = match *mask {
                Mask::Added(_) => {
                    let of_rows = self.patch.cast(of_rows, DataType::Float);
                    self.patch.op("Add", &[scores, of_rows])
                }
                Mask::Chosen { when, fill, .. } => {
                    let fill = match fill {
                        Some(fill) => self.patch.cast(fill, DataType::Float),
                        None => self.patch.f32(f32::NEG_INFINITY),
                    };
                    let (yes, no) = if when { (scores, fill) } else { (fill, scores) };
                    self.patch.op("Where", &[of_rows, yes, no])
                }
                Mask::Segments(bounds) => {
                    let tokens = self.patch.size_of(scores, 3);
                    let together = self.in_one_segment(bounds, tokens);
                    let fill = self.patch.f32(f32::NEG_INFINITY);
                    self.patch.op("Where", &[together, scores, fill])
                }
            };
        }
        let probabilities = self.patch.softmax(scores);
        if masks.is_empty() {
            return probabilities;
        }
        // A query that sees no key gives nothing.
        let undefined = self.patch.op("IsNaN", &[probabilities]);
        let zero = self.patch.f32(0.0);
        self.patch.op("Where", &[undefined, zero, probabilities])
    }

    /// Whether two of `tokens` tokens lie in the same segment, `[T, T]`: `bounds` of the segments
    /// that have begun number it.
    fn in_one_segment(&mut self, bounds: ValueId, tokens: Size) -> ValueId {
        let bounds = self.patch.cast(bounds, DataType::Int64);
        let places = self.patch.iota(tokens);
        let places = self.patch.unsqueeze(places, &[1]);
        let begun = self.patch.op("LessOrEqual", &[bounds, places]);
        let begun = self.patch.cast(begun, DataType::Float);
        let number = self.patch.reduce_sum(begun, &[1], true);
        let across = self.patch.transpose(number, &[1, 0]);
        self.patch.op("Equal", &[number, across])
    }

    /// Indices among the patches: dominant `[n, k₁]` ascending, and the residual
    /// tokens that take part `[n, P]`, by falling score or by position.
    pub(super) fn select(&mut self, score: ValueId) -> (Option<ValueId>, Option<ValueId>) {
        let Sizes {
            dominant,
            contextual,
            pool,
            ..
        } = self.sizes;
        self.patch.scope("select");
        let both = self.patch.size_add(dominant, pool);
        let (_, order) = self.patch.top_k(score, both, true);
        let best = (dominant != Size::Known(0)).then(|| {
            let best = self.patch.slice(order, Size::Known(0), dominant, 1);
            match self.tower.rows {
                // Sorted together with the contextual ones.
                Some(_) => best,
                None => self.patch.sort_ascending(best, dominant),
            }
        });
        let rest = (contextual != Size::Known(0)).then(|| {
            let rest = match pool {
                Size::Known(_) => self.patch.slice(order, dominant, both, 1),
                Size::Value(_) => self.computed_pool(order),
            };
            match self.merge.selector {
                Selector::Attention => rest,
                Selector::Uniform | Selector::Local => {
                    let count = self.pool_size();
                    self.patch.sort_ascending(rest, count)
                }
            }
        });
        (best, rest)
    }

    /// Mean over the patches of each shuffled token: `[n, patches, …]` →
    /// `[n, N, …]`, `…` being `rest`. Without a shuffle, x itself.
    fn pooled(&mut self, x: ValueId, rest: &[i64]) -> ValueId {
        if let Some(rows) = &self.tower.rows {
            return self.merged_mean(x, rows, rest);
        }
        let Some(shuffle) = &self.tower.shuffle else {
            return x;
        };
        let at = self.patch.i64s(&shuffle.patches);
        let grouped = self.patch.gather(x, at, 1);
        let mut dims = vec![-1, shuffle.tokens(), shuffle.per];
        dims.extend(rest);
        let grouped = self.patch.reshape(grouped, &dims);
        self.patch.reduce("ReduceMean", grouped, &[2], false)
    }

    /// H at patch indices `[n, m]` → `[n, m, D]`.
    pub(super) fn rows(&mut self, indices: ValueId) -> ValueId {
        if self.tower.rows.is_some() {
            let features = self.features_batch();
            return self.patch.gather_rows(features, indices);
        }
        if self.tower.shuffle.is_some() {
            return self.patch.gather_rows(self.tower.entry, indices);
        }
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
        let metric = self.pooled(metric, &[self.tower.head_dim]);
        let square = self.patch.op("Mul", &[metric, metric]);
        let sum = self.patch.reduce_sum(square, &[2], true);
        let norm = self.patch.op("Sqrt", &[sum]);
        let tiny = self.patch.f32(1e-12);
        let norm = self.patch.op("Max", &[norm, tiny]);
        self.patch.op("Div", &[metric, norm])
    }

    /// The anchor, by number, whose key metric is nearest to that of each of `members`
    /// `[n, M]`: `[n, M]`.
    pub(super) fn nearest(&mut self, k: ValueId, anchor: ValueId, members: ValueId) -> ValueId {
        let metric = self.metric(k);
        let anchor_metric = self.patch.gather_rows(metric, anchor);
        let member_metric = self.patch.gather_rows(metric, members);
        let anchor_metric = self.patch.transpose(anchor_metric, &[0, 2, 1]);
        // [n, M, k₂]: the first anchor wins a tie (ArgMax's rule).
        let similarity = self.patch.op("MatMul", &[member_metric, anchor_metric]);
        let attributes = vec![int("axis", -1), int("keepdims", 0)];
        self.patch.op_with("ArgMax", &[similarity], attributes)
    }

    /// Mean of the H of the `members` `[n, M]` that have the number of each anchor as their
    /// `nearest` `[n, 1, M]`, fp32 `[n, k₂, D]`; `every` is `[0, 1, …, k₂−1]`.
    pub(super) fn means(&mut self, nearest: ValueId, every: ValueId, members: ValueId) -> ValueId {
        let every = self.patch.reshape(every, &[1, -1, 1]);
        let belongs = self.patch.op("Equal", &[nearest, every]);
        let belongs = self.patch.cast(belongs, DataType::Float);
        let rows = self.rows(members);
        let rows = self.in_f32(rows);
        let sum = self.patch.op("MatMul", &[belongs, rows]);
        let count = self.patch.reduce_sum(belongs, &[2], true);
        let one = self.patch.f32(1.0);
        let count = self.patch.op("Max", &[count, one]);
        self.patch.op("Div", &[sum, count])
    }

    /// Each pool member goes to its nearest anchor; H[anchor] + mean of members.
    fn assigned(
        &mut self,
        k: ValueId,
        pool: ValueId,
        (contextual, size): (i64, i64),
    ) -> (ValueId, ValueId) {
        self.patch.scope("contextual");
        let step = (size / contextual).max(1);
        let anchors: Vec<i64> = (0..contextual).map(|i| i * step).collect();
        let members: Vec<i64> = (0..size).filter(|i| !anchors.contains(i)).collect();
        let at = self.patch.i64s(&anchors);
        let anchor = self.patch.gather(pool, at, 1);
        self.patch.name_value(anchor, "anchor_indices");
        let anchor_rows = self.rows(anchor);
        if members.is_empty() {
            return (anchor, anchor_rows);
        }
        let at = self.patch.i64s(&members);
        let member = self.patch.gather(pool, at, 1);
        self.patch.name_value(member, "member_indices");
        let nearest = self.nearest(k, anchor, member);
        self.patch.name_value(nearest, "member_anchors");
        let nearest = self.patch.unsqueeze(nearest, &[1]);
        let every = self.patch.iota(Size::Known(contextual));
        let mean = self.means(nearest, every, member);
        let anchor_rows = self.in_f32(anchor_rows);
        let token = self.patch.op("Add", &[anchor_rows, mean]);
        (anchor, self.in_model_type(token))
    }

    /// The `count` of the `residual` tokens `[n, M]` that receive most attention: where they
    /// are among these, and as anchors among the N, `[n, k₂]` each.
    pub(super) fn most_received(
        &mut self,
        residual: ValueId,
        probabilities: ValueId,
        count: Size,
    ) -> (ValueId, ValueId) {
        let received = self.received_sum(probabilities);
        let received = self.patch.gather_rows(received, residual);
        let (_, place) = self.patch.top_k(received, count, true);
        let anchor = self.patch.gather_rows(residual, place);
        self.patch.name_value(anchor, "anchor_indices");
        (place, anchor)
    }

    /// How alike the key metrics of the anchors, which are at `place [n, k₂]` of the `size`
    /// `residual` tokens `[n, M]`, and of these are: `[n, k₂, M]`, less than any for the
    /// anchor itself.
    pub(super) fn likeness(
        &mut self,
        k: ValueId,
        (place, anchor): (ValueId, ValueId),
        (residual, size): (ValueId, Size),
    ) -> ValueId {
        let metric = self.metric(k);
        let residual_metric = self.patch.gather_rows(metric, residual);
        let anchor_metric = self.patch.gather_rows(metric, anchor);
        let residual_metric = self.patch.transpose(residual_metric, &[0, 2, 1]);
        let similarity = self.patch.op("MatMul", &[anchor_metric, residual_metric]);
        let own = self.patch.unsqueeze(place, &[2]);
        let every = self.patch.iota(size);
        let own = self.patch.op("Equal", &[own, every]);
        let below = self.patch.f32(-4.0);
        self.patch.op("Where", &[own, below, similarity])
    }

    /// Anchors by attention received, each averaged with its w nearest.
    fn neighbours(
        &mut self,
        k: ValueId,
        residual: ValueId,
        probabilities: ValueId,
        (contextual, size): (i64, i64),
    ) -> (ValueId, ValueId) {
        self.patch.scope("contextual");
        let count = Size::Known(contextual);
        let (place, anchor) = self.most_received(residual, probabilities, count);
        let anchor_rows = self.rows(anchor);
        let width = self.merge.cluster_width.min(size - 1);
        if width == 0 {
            return (anchor, anchor_rows);
        }
        let others = (residual, Size::Known(size));
        let similarity = self.likeness(k, (place, anchor), others);
        let (_, nearest) = self.patch.top_k(similarity, Size::Known(width), true);
        let flat = self.patch.reshape(nearest, &[0, contextual * width]);
        let neighbour = self.patch.gather_rows(residual, flat);
        self.patch.name_value(neighbour, "member_indices");
        let rows = self.rows(neighbour);
        let rows = self.in_f32(rows);
        // D is inferred: the file need not state the tower's width.
        let batch = self.patch.size_of(rows, 0);
        let batch = self.patch.size_value(batch);
        let rest = self.patch.i64s(&[contextual, width, -1]);
        let shape = self.patch.concat(&[batch, rest], 0);
        let rows = self.patch.op("Reshape", &[rows, shape]);
        let sum = self.patch.reduce_sum(rows, &[2], false);
        let anchor_rows = self.in_f32(anchor_rows);
        let sum = self.patch.op("Add", &[sum, anchor_rows]);
        let count = self.patch.f32((width + 1) as f32);
        let token = self.patch.op("Div", &[sum, count]);
        (anchor, self.in_model_type(token))
    }

    pub(super) fn in_model_type(&mut self, x: ValueId) -> ValueId {
        if self.tower.dtype == DataType::Float {
            return x;
        }
        self.patch.cast(x, self.tower.dtype)
    }
}
