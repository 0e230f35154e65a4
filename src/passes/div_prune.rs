//! DivPrune: the K of an image's N tokens that are least alike, chosen greedily.
//!
//! ```text
//!  d[i, j] = 1 − cos(f[i], f[j])            of the projected features f, fp32
//!  first:   the token whose nearest other token is farthest,  argmaxᵢ min_{j≠i} d[i, j]
//!  then:    the token whose nearest chosen token is farthest, argmaxᵢ min_{j chosen} d[i, j]
//!  of equal ones the first; K times
//! ```
//!
//! Every image is chosen from by itself. In the graph the K choices lie one after the other, three operators each:
//! `ArgMax`, its row of d by `GatherND`, `Min`. d's diagonal is set far below any distance, so what was chosen is never
//! chosen again.
//!
//! Source: DivPrune (CVPR 2025, arXiv 2503.02175) and its public implementation, which chooses among the projected
//! tokens in front of the decoder, in the model's precision. There a token may be chosen twice where only tokens equal
//! to chosen ones are left; here it is not, and distances are fp32.

use serde::Deserialize;

use super::recipe::Count;
use super::selection::Selection;
use super::{Entry, Stage};
use crate::ir::{Patch, Size, ValueId, int};

pub(super) const ENTRY: Entry = Entry {
    name: "div_prune",
    about: "keeps the tokens of an image that are least alike (DivPrune)",
    stage: Stage::Encoder,
    keys: &["keep"],
    parse: super::parse::<DivPrune>,
    keep_everything: "{keep: 1.0}",
    samples: &["{keep: 12}", "{keep: 0.3}"],
};

/// Beyond any distance, which are 0 to 2.
const BEYOND: f32 = 4.0;

/// Parameters of the pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DivPrune {
    /// Tokens of an image that stay.
    pub keep: Count,
}

impl Selection for DivPrune {
    const ENTRY: Entry = ENTRY;

    fn keep(&self) -> Count {
        self.keep
    }

    fn places(&self, all: i64, keep: i64) -> Option<Vec<i64>> {
        // Nothing is to be chosen.
        (keep >= all).then(|| (0..all).collect())
    }

    fn choose(
        &self,
        patch: &mut Patch<'_>,
        features: ValueId,
        (all, keep): (i64, i64),
    ) -> Option<ValueId> {
        let square = patch.op("Mul", &[features, features]);
        let sum = patch.reduce_sum(square, &[2], true);
        let norm = patch.op("Sqrt", &[sum]);
        let tiny = patch.f32(1e-12);
        let norm = patch.op("Max", &[norm, tiny]);
        let unit = patch.op("Div", &[features, norm]);
        let across = patch.transpose(unit, &[0, 2, 1]);
        let cosine = patch.op("MatMul", &[unit, across]);
        let one = patch.f32(1.0);
        let distance = patch.op("Sub", &[one, cosine]);
        // [N, N]: the diagonal.
        let places: Vec<i64> = (0..all).collect();
        let across = patch.i64s(&places);
        let down = patch.unsqueeze(across, &[1]);
        let itself = patch.op("Equal", &[down, across]);
        let far = patch.f32(BEYOND);
        let others = patch.op("Where", &[itself, far, distance]);
        // Nearest other token, [n, 1, N] (distances are symmetric).
        let mut nearest = patch.reduce("ReduceMin", others, &[1], true);
        let near = patch.f32(-BEYOND);
        let distance = patch.op("Where", &[itself, near, distance]);
        let mut chosen = Vec::new();
        for step in 0..keep {
            // [n, 1, 1]: the first of equal ones.
            let attributes = vec![int("axis", 2), int("keepdims", 1)];
            let best = patch.op_with("ArgMax", &[nearest], attributes);
            chosen.push(best);
            if step + 1 < keep {
                let batch = vec![int("batch_dims", 1)];
                let row = patch.op_with("GatherND", &[distance, best], batch);
                nearest = match step {
                    0 => row,
                    _ => patch.op("Min", &[nearest, row]),
                };
            }
        }
        let order = patch.concat(&chosen, 1);
        let order = patch.squeeze(order, &[2]);
        patch.name_value(order, "order");
        Some(patch.sort_ascending(order, Size::Known(keep)))
    }

    fn how(&self) -> String {
        "the least alike".into()
    }
}
