//! Rotary embeddings that the attention operator applies inside.
//!
//! The ranking applies them with standard operators. `positions: keep` takes them
//! out of the operators behind a drop point, since `GroupQueryAttention` computes
//! its positions from lengths, and those of the tokens that stay are no longer
//! contiguous:
//!
//! ```text
//! before:  q, k, v ──▶ GroupQueryAttention(do_rotary=1, seqlens_k)
//! after:   q, k ──▶ RotaryEmbedding(kept positions) ──▶ GroupQueryAttention(do_rotary=0)
//!          (packed q, k, v are split first)
//! ```
//!
//! Source: ONNX Runtime, `GroupQueryAttention` and `RotaryEmbedding` of
//! `com.microsoft`. (The operator's own input `position_ids` would not do: its CPU
//! kernel reads only the first element of it in the first prompt.)

use super::stage::{Plan, Stage};
use crate::arch::{DecoderLayer, Layout, Rotary};
use crate::ir::cone::descendants;
use crate::ir::{DataType, Model, Patch, Size, Substitution, ValueId, int};
use crate::passes::Positions;

/// The clone of a value with a stage's roots.
pub(super) fn clone(
    patch: &mut Patch<'_>,
    value: ValueId,
    subst: &mut Substitution,
) -> Result<ValueId, String> {
    patch.clone_cone(value, subst).map_err(|at| {
        format!("{at} holds a sub-graph between the residual stream and the keys of the next layer")
    })
}

/// Positions at which the operator rotates, int64 `[b, L]`.
pub(super) fn places(
    patch: &mut Patch<'_>,
    rotary: Rotary,
    subst: &mut Substitution,
    length: Size,
) -> Result<ValueId, String> {
    if let Some(positions) = rotary.positions {
        return clone(patch, positions, subst);
    }
    let lengths = clone(patch, rotary.lengths, subst)?;
    Ok(from_lengths(patch, lengths, length))
}

/// Positions of the tokens processed now from the operator's `seqlens_k` (length
/// with the past, less 1), int64 `[b, L]`. A row padded on the right has a shorter
/// length, and its first prompt still starts at 0.
fn from_lengths(p: &mut Patch<'_>, lengths: ValueId, length: Size) -> ValueId {
    let total = p.cast(lengths, DataType::Int64);
    let total = p.reshape(total, &[-1, 1]);
    let new = p.size_value(length);
    let one = p.i64s(&[1]);
    let new = p.op("Sub", &[new, one]);
    let past = p.op("Sub", &[total, new]);
    let zero = p.i64s(&[0]);
    let past = p.op("Max", &[past, zero]);
    let places = p.iota(length);
    p.op("Add", &[past, places])
}

/// What rotates `x [b, H, L, d]` as x·cos + x[partner]·sin.
pub(super) struct Turn {
    /// Cosines of the tokens' current positions, `[b, 1, L, d]` fp32.
    cos: ValueId,
    /// Sines with the sign of the column.
    sin: ValueId,
    /// Column that each is paired with, int64 `[d]`.
    partner: ValueId,
}

impl Turn {
    /// For tokens at `positions [b, L]`, heads of `width` columns.
    pub(super) fn of(
        p: &mut Patch<'_>,
        rotary: Rotary,
        width: i64,
        positions: ValueId,
        subst: &mut Substitution,
    ) -> Result<Self, String> {
        let pairs = Pairs::of(rotary, width);
        let mut rows = |p: &mut Patch<'_>, table: ValueId| -> Result<ValueId, String> {
            let table = clone(p, table, subst)?;
            let row = p.gather(table, positions, 0);
            let row = p.cast(row, DataType::Float);
            let columns = p.i64s(&pairs.pair);
            let row = p.gather(row, columns, 2);
            Ok(p.unsqueeze(row, &[1]))
        };
        let (mut cos, sin) = (rows(p, rotary.cos)?, rows(p, rotary.sin)?);
        if pairs.sign.contains(&0.0) {
            // Columns that are not rotated: their cosine is 1.
            let rotated: Vec<f32> = pairs.sign.iter().map(|s| s.abs()).collect();
            let others: Vec<f32> = rotated.iter().map(|r| 1.0 - r).collect();
            let (rotated, others) = (floats(p, &rotated), floats(p, &others));
            cos = p.op("Mul", &[cos, rotated]);
            cos = p.op("Add", &[cos, others]);
        }
        let sign = floats(p, &pairs.sign);
        let sin = p.op("Mul", &[sin, sign]);
        let partner = p.i64s(&pairs.partner);
        Ok(Self { cos, sin, partner })
    }

    /// Rotates `x [b, H, L, d]`.
    pub(super) fn rotate(&self, p: &mut Patch<'_>, x: ValueId) -> ValueId {
        let partner = p.gather(x, self.partner, 3);
        let own = p.op("Mul", &[x, self.cos]);
        let other = p.op("Mul", &[partner, self.sin]);
        p.op("Add", &[own, other])
    }
}

/// How a head's columns are paired for rotation: (a, b) → (a·cos − b·sin,
/// b·cos + a·sin). By column.
struct Pairs {
    /// Column of the table.
    pair: Vec<i64>,
    /// The other column of the pair.
    partner: Vec<i64>,
    /// Sign of the sine; 0 where nothing is rotated.
    sign: Vec<f32>,
}

impl Pairs {
    fn of(rotary: Rotary, width: i64) -> Self {
        let half = rotary.width / 2;
        let each = |column: i64| -> (i64, i64, f32) {
            let (pair, second) = if rotary.interleaved {
                (column / 2, column % 2 == 1)
            } else {
                (column % half, column >= half)
            };
            let step = if rotary.interleaved { 1 } else { half };
            match (column < 2 * half, second) {
                (false, _) => (0, column, 0.0),
                (true, false) => (pair, column + step, -1.0),
                (true, true) => (pair, column - step, 1.0),
            }
        };
        let all: Vec<(i64, i64, f32)> = (0..width).map(each).collect();
        Self {
            pair: all.iter().map(|c| c.0).collect(),
            partner: all.iter().map(|c| c.1).collect(),
            sign: all.iter().map(|c| c.2).collect(),
        }
    }
}

/// A vector of constants.
fn floats(p: &mut Patch<'_>, values: &[f32]) -> ValueId {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let dims = vec![values.len() as i64];
    p.constant(crate::ir::Tensor::raw("", DataType::Float, dims, bytes))
}

impl Plan<'_, '_> {
    /// With `positions: keep`: the positions that attention operators count for
    /// themselves, as they are before any drop.
    pub(super) fn keep_places(&mut self, stage: &mut Stage) -> Result<(), String> {
        if self.positions != Positions::Keep {
            return Ok(());
        }
        let behind = self.decoder.layers.iter().skip(self.points[0]);
        if let Some(rotary) = behind.filter_map(|l| l.rotary).next() {
            let mut subst = stage.subst.clone();
            stage.rotary = Some(places(self.patch, rotary, &mut subst, stage.length)?);
        }
        Ok(())
    }

    /// With `positions: keep`: takes rotary embeddings out of the attention
    /// operators of a stage.
    pub(super) fn unfuse(&mut self, number: usize, stage: &mut Stage) -> Result<(), String> {
        let layers: Vec<DecoderLayer> = self.decoder.layers[self.span(number)].to_vec();
        if self.positions == Positions::Keep {
            self.lengths_from_mask(&layers)?;
        }
        let Some(positions) = stage
            .rotary
            .filter(|_| layers.iter().any(|l| l.rotary.is_some()))
        else {
            return Ok(());
        };
        let p = &mut *self.patch;
        // Each row's length less 1, and the longest.
        let past = p.size_value(stage.past);
        let count = match stage.mask {
            Some(mask) => {
                let mask = p.cast(mask, DataType::Int64);
                p.reduce_sum(mask, &[1], false)
            }
            None => {
                let here = match stage.gone {
                    Some(gone) => p.op("Or", &[stage.real, gone]),
                    None => stage.real,
                };
                let real = p.cast(here, DataType::Int64);
                let real = p.reduce_sum(real, &[1], false);
                p.op("Add", &[real, past])
            }
        };
        let one = p.i64s(&[1]);
        let lengths = p.op("Sub", &[count, one]);
        let lengths = p.cast(lengths, DataType::Int32);
        let total = p.size_add(stage.past, stage.length);
        let total = p.size_scalar(total);
        let total = p.cast(total, DataType::Int32);
        for layer in &layers {
            unfuse(
                p,
                layer,
                self.decoder.head_dim,
                positions,
                (lengths, total),
                stage,
            )?;
        }
        Ok(())
    }

    /// Refuses kept positions where an attention takes its rows' lengths from them.
    fn lengths_from_mask(&self, layers: &[DecoderLayer]) -> Result<(), String> {
        let model = self.model;
        let ids: Vec<ValueId> = self.decoder.position_ids.into_iter().collect();
        let told = descendants(model, &ids, false);
        let group = layers
            .iter()
            .filter(|l| l.rotary.is_none() && model.node(l.node).is_ms("GroupQueryAttention"));
        for layer in group {
            if model
                .node(layer.node)
                .input(5)
                .is_some_and(|v| told.contains(&v))
            {
                return Err(format!(
                    "{} reads lengths of rows that are computed from position_ids, which tell none once \
                     positions are kept; use positions: renumber, or export with lengths from the mask",
                    model.describe(layer.node)
                ));
            }
        }
        Ok(())
    }
}

/// Takes the rotary embedding out of a layer's operator: queries and keys are
/// rotated at `positions` (int64 `[b, L]`) before it. `lengths` (int32 `[b]`, each
/// row's length less 1) and `total` (int32 scalar) replace the operator's own, which
/// an exporter may have computed from position ids.
fn unfuse(
    p: &mut Patch<'_>,
    layer: &DecoderLayer,
    width: i64,
    positions: ValueId,
    (lengths, total): (ValueId, ValueId),
    stage: &mut Stage,
) -> Result<(), String> {
    let model: &Model = p.model();
    let Some(rotary) = layer.rotary else {
        return Ok(());
    };
    let (
        Layout::Rows { heads, .. },
        Layout::Rows {
            heads: key_heads, ..
        },
    ) = (layer.query.layout, layer.new_key.layout)
    else {
        return Err(format!(
            "{} rotates queries and keys of an unknown layout",
            model.describe(layer.node)
        ));
    };
    let given = |value: ValueId| *stage.computed.get(&value).unwrap_or(&value);
    let (mut query, mut key) = (given(layer.query.value), given(layer.new_key.value));
    let packed = query == key;
    if packed {
        let sizes = p.i64s(&[heads * width, key_heads * width, key_heads * width]);
        let inputs = [Some(query), Some(sizes)];
        let parts = p.node("", "Split", &inputs, 3, vec![int("axis", 2)]);
        (query, key) = (parts[0], parts[1]);
        p.connect(layer.node, 2, parts[2]);
    }
    let subst = &mut stage.subst;
    let (cos, sin) = (clone(p, rotary.cos, subst)?, clone(p, rotary.sin, subst)?);
    for (slot, value, heads) in [(0, query, heads), (1, key, key_heads)] {
        let attributes = vec![
            int("interleaved", rotary.interleaved.into()),
            int("num_heads", heads),
            int("rotary_embedding_dim", rotary.width),
        ];
        let inputs = [value, positions, cos, sin].map(Some);
        let turned = p.node("com.microsoft", "RotaryEmbedding", &inputs, 1, attributes)[0];
        p.connect(layer.node, slot, turned);
    }
    p.connect(layer.node, 5, lengths);
    p.connect(layer.node, 6, total);
    p.set_attribute(layer.node, int("do_rotary", 0));
    Ok(())
}
