//! `placement: decoder`: merged features put back in their places, and where that is the
//! default.
//!
//! ```text
//!  merged ─▶ projector ─▶ [n, K, D] ─┬─ a row of zeros ─▶ [n, K+1, D] ─┐
//!  dominant, anchor indices [n, K] ──▶ map [n, N]: row of place i, or K ┴─▶ GatherND ─ [n, N, D] ─┐
//!                                      └─▶ < K: mark 1, else 2 ─────────────────────────────────┴─▶ [n, N, D+1]
//! ```
//!
//! The features keep their number and order, so clients that count them, or lay
//! positions out by the patch grid, see no difference. A dominant token is at its own
//! place, a contextual one at its anchor's; the others are zeros whose mark tells the
//! decoder to drop them (see `visual_prune`).

use super::{MergeBudget, Placement};
use crate::arch::{VisionTower, Vlm};
use crate::ir::{DataType, Dim, Patch, Size, Tensor, ValueId, ValueType};
use crate::passes::marker::wider;

/// What a recipe means for `vlm`: what it says, or, left out, the decoder where that
/// takes several positions for each token (M-RoPE: clients compute them from the
/// patch grid, which fewer features do not fill), else the encoder.
pub fn placement_in(stated: Option<Placement>, vlm: &Vlm) -> Placement {
    stated.unwrap_or_else(|| {
        let grid = vlm.decoders().any(|(_, d)| d.position_rows.is_some());
        match grid {
            true => Placement::Decoder,
            false => Placement::Encoder,
        }
    })
}

/// Rows of features and the places that they are to be put in.
pub(in crate::passes) struct Rows {
    /// `[n, K, D]`.
    pub(in crate::passes) features: ValueId,
    /// int64 `[n, K]`: the place of each row among the N, no place twice.
    pub(in crate::passes) places: ValueId,
    /// N.
    pub(in crate::passes) slots: Size,
    /// Element type of the features.
    pub(in crate::passes) dtype: DataType,
}

impl Rows {
    /// The N features with the marker channel, `[n, N, D + 1]`: rows in their places with
    /// mark 1, zeros with mark 2 in the others.
    pub(in crate::passes) fn placed(self, p: &mut Patch<'_>) -> ValueId {
        let count = p.size_of(self.places, 1);
        // The row of each place; K, the row of zeros, where there is none.
        let images = p.size_of(self.places, 0);
        let images = p.size_value(images);
        let slots = p.size_value(self.slots);
        let shape = p.concat(&[images, slots], 0);
        let none = p.size_scalar(count);
        let none_everywhere = p.op("Expand", &[none, shape]);
        let numbers = p.iota(count);
        let all = p.op("Shape", &[self.places]);
        let numbers = p.op("Expand", &[numbers, all]);
        let attributes = vec![crate::ir::int("axis", 1)];
        let inputs = [none_everywhere, self.places, numbers];
        let map = p.op_with("ScatterElements", &inputs, attributes);
        let width = p.size_of(self.features, 2);
        let width = p.size_value(width);
        let one = p.i64s(&[1]);
        let shape = p.concat(&[images, one, width], 0);
        let zero = p.constant(Tensor::float_scalar("", self.dtype, 0.0));
        let zeros = p.op("Expand", &[zero, shape]);
        let rows = p.concat(&[self.features, zeros], 1);
        let features = p.gather_rows(rows, map);
        let empty = p.op("Equal", &[map, none]);
        let [kept, gone] = [1.0, 2.0].map(|m| Tensor::float_scalar("", self.dtype, m));
        let (kept, gone) = (p.constant(kept), p.constant(gone));
        let marks = p.op("Where", &[empty, gone, kept]);
        let marks = p.unsqueeze(marks, &[2]);
        p.concat(&[features, marks], 2)
    }
}

/// Puts the merged features of a tower, which its output gives now, back in their
/// places. `stand_for` says which of the N tokens they stand for, CLS aside.
pub(super) fn place(
    p: &mut Patch<'_>,
    tower: &VisionTower,
    budget: MergeBudget,
    stand_for: &[ValueId],
) -> Result<(), String> {
    let (Some(index), Some(slots)) = (tower.features_index, tower.features_per_image()) else {
        return Err("the number of features is not fixed, or they do not come out".into());
    };
    let model = p.model();
    let stated = model.value(tower.features).ty.clone();
    let stated = stated.unwrap_or(ValueType::Tensor {
        dtype: tower.dtype,
        shape: None,
    });
    let dtype = stated.dtype().unwrap_or(tower.dtype);
    p.scope("place");
    let mut parts = Vec::new();
    if budget.cls {
        let images = p.size_of(tower.hidden, 0);
        let (images, one, zero) = (p.size_value(images), p.i64s(&[1]), p.i64(0));
        let shape = p.concat(&[images, one], 0);
        parts.push(p.op("Expand", &[zero, shape]));
    }
    for &tokens in stand_for {
        // Features that hold CLS have it first.
        parts.push(match tower.gives_cls() {
            true => {
                let one = p.i64(1);
                p.op("Add", &[tokens, one])
            }
            false => tokens,
        });
    }
    let places = p.concat(&parts, 1);
    // One image after the other, however the file lays them out.
    let listed = tower.video || stated.shape().is_none_or(|s| s.len() != 3);
    let features = tower.features;
    let rows = |features| Rows {
        features,
        places,
        slots: Size::Known(slots),
        dtype,
    };
    let mut ty = wider(&stated);
    let marked = if listed {
        let shape = p.op("Shape", &[features]);
        let (end, tokens) = (Size::Known(i64::MAX), Size::Known(-2));
        let width = p.slice(shape, Size::Known(-1), end, 0);
        let count = p.i64s(&[-1, budget.total()]);
        let each = p.concat(&[count, width], 0);
        let each = p.op("Reshape", &[features, each]);
        let placed = rows(each).placed(p);
        let lead = p.slice(shape, Size::Known(0), tokens, 0);
        let (all, one) = (p.i64s(&[-1]), p.i64s(&[1]));
        let width = p.op("Add", &[width, one]);
        let shape = p.concat(&[lead, all, width], 0);
        p.op("Reshape", &[placed, shape])
    } else {
        if let ValueType::Tensor {
            shape: Some(dims), ..
        } = &mut ty
        {
            dims[1] = Dim::Known(slots);
        }
        rows(features).placed(p)
    };
    p.replace_output(index, marked, ty);
    Ok(())
}
