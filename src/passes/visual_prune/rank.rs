//! Scoring visual tokens: what attention the text would pay them in the next
//! layer, or (`rank_layer: previous`) paid them in the one that has just run.
//!
//! The next layer's way from the residual tensor to its rotated queries and keys
//! is cloned at the current length and positions. Scores are fp32 whatever the
//! model's type; masks are built here, so no exporter's mask is relied on, and
//! the cache is not consulted. A window that the layer's attention may have
//! (sliding-window layers, `local_window_size`) is not applied: the method ranks
//! by what the text would pay each visual token, near or far. Nor is an attention
//! sink, which is no token.
//!
//! Where the attention operator itself splits a packed projection or rotates
//! queries and keys, that is done here with standard operators.

use super::RankMask;
use super::reuse::{self, Shared};
use super::rotary::{self, Turn, clone};
use super::stage::{Stage, last_real};
use crate::arch::{Decoder, DecoderLayer, Layout, Projection};
use crate::ir::cone::ancestors;
use crate::ir::{DataType, Model, Patch, Size, ValueId};

/// Scores of masked keys: far below any product, still finite in fp32.
const MASKED: f32 = -1e30;

pub(super) struct Ranking<'a, 'm> {
    pub(super) model: &'m Model,
    pub(super) patch: &'a mut Patch<'m>,
    /// The layer whose attention ranks.
    pub(super) layer: &'a DecoderLayer,
    /// Whether it is the layer that has just run, whose queries and keys are there.
    pub(super) own: bool,
    pub(super) decoder: &'a Decoder,
    pub(super) stage: &'a Stage,
    /// What the layer would be entered by here, in the order of its boundary.
    pub(super) entry: &'a [ValueId],
    /// Number of the drop point, from 1.
    pub(super) number: usize,
    /// Which keys an asking token weighs.
    pub(super) mask: RankMask,
    /// All tokens that ask are among this many at the end, if that is known.
    pub(super) text: Option<i64>,
    /// Whether the number of rows has to follow from the shapes.
    pub(super) fixed: bool,
}

impl Ranking<'_, '_> {
    /// Score of every token, `[b, L]` fp32 (meaningful for visual ones): the
    /// attention probability, averaged over heads and over the tokens that ask. With it,
    /// what the layer can take from here.
    pub(super) fn scores(mut self) -> Result<(ValueId, Vec<Shared>), String> {
        let number = self.number;
        let (query, key, shared) = self.projections()?;
        let heads = self.decoder.kv_heads;
        let width = self.decoder.head_dim;
        let length = self.stage.length;
        let rows = self.rows();
        let p = &mut *self.patch;
        let key = p.transpose(key, &[0, 1, 3, 2]);
        // Each key head serves its group of query heads: with groups both get an
        // axis for them, [b, Hkv, G, T, d] and [b, Hkv, 1, d, L].
        let grouped = self.decoder.heads != Some(heads);
        let (query, key) = if grouped {
            let query = match self.decoder.heads {
                Some(all) => p.reshape(query, &[0, heads, all / heads, -1, width]),
                None => {
                    let lead = p.i64s(&[0, heads, -1]);
                    let (length, width) = (p.size_value(length), p.i64s(&[width]));
                    let shape = p.concat(&[lead, length, width], 0);
                    p.op("Reshape", &[query, shape])
                }
            };
            (query, p.unsqueeze(key, &[2]))
        } else {
            (query, key)
        };
        // Only rows from the first token that asks on: T of L. (Gathered: tract
        // cannot run a Slice whose start only the run tells.)
        let queries = match (self.text, self.fixed) {
            (Some(text), _) => {
                let first = p.size_sub(length, Size::Known(text));
                let (first, places) = (p.size_value(first), p.iota(Size::Known(text)));
                p.op("Add", &[places, first])
            }
            (None, true) => p.iota(length),
            (None, false) => asking_rows(p, rows, length),
        };
        let query = p.gather(query, queries, if grouped { 3 } else { 2 });
        let asks = p.gather(rows, queries, 1);
        #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
        let scale = p.f32(self.layer.scale as f32);
        let query = p.op("Mul", &[query, scale]);
        let mut product = p.op("MatMul", &[query, key]);
        if self.layer.softcap != 0.0 {
            #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
            let cap = p.f32(self.layer.softcap as f32);
            let inside = p.op("Div", &[product, cap]);
            let inside = p.op("Tanh", &[inside]);
            product = p.op("Mul", &[inside, cap]);
        }
        // Token t sees key j if j ≤ t and j is no padding: [b, 1, (1,) T, L]; or
        // if it is no padding: [b, 1, (1,) 1, L].
        let real = p.unsqueeze(self.stage.real, if grouped { &[1, 2, 3] } else { &[1, 2] });
        let sees = match self.mask {
            RankMask::Causal => {
                let places = p.iota(length);
                let queries = p.unsqueeze(queries, &[1]);
                let causal = p.op("GreaterOrEqual", &[queries, places]);
                p.op("And", &[causal, real])
            }
            RankMask::None => real,
        };
        let masked = p.f32(MASKED);
        let product = p.op("Where", &[sees, product, masked]);
        let probability = p.softmax(product);
        let head_axes: &[i64] = if grouped { &[1, 2] } else { &[1] };
        let probability = p.reduce("ReduceMean", probability, head_axes, false);
        // Mean over the tokens that ask; Where, since a padding row may hold
        // anything.
        let asks_column = p.unsqueeze(asks, &[2]);
        let zero = p.f32(0.0);
        let probability = p.op("Where", &[asks_column, probability, zero]);
        let sum = p.reduce_sum(probability, &[1], false);
        let count = p.cast(asks, DataType::Float);
        let count = p.reduce_sum(count, &[1], true);
        let one = p.f32(1.0);
        let count = p.op("Max", &[count, one]);
        let scores = p.op("Div", &[sum, count]);
        p.name_value(scores, &format!("drop{number}/scores"));
        Ok((scores, shared))
    }

    /// The tokens that ask here: those carried from the entry; if a row has none
    /// (nothing follows its image), its last token.
    fn rows(&mut self) -> ValueId {
        let p = &mut *self.patch;
        let last = last_real(p, self.stage.real);
        let count = p.cast(self.stage.text, DataType::Int64);
        let count = p.reduce_sum(count, &[1], true);
        let zero = p.i64(0);
        let none = p.op("Equal", &[count, zero]);
        let fallback = p.op("And", &[none, last]);
        p.op("Or", &[self.stage.text, fallback])
    }

    /// Rotated queries `[b, H, L, d]` and keys `[b, Hkv, L, d]` of the layer, fp32, and what
    /// they were made of.
    fn projections(&mut self) -> Result<(ValueId, ValueId, Vec<Shared>), String> {
        let (layer, number) = (self.layer, self.number);
        let mut subst = self.stage.subst.clone();
        // What enters the layer is this stage's own, but what reads it will be
        // reconnected: a new value makes its readers be cloned.
        let targets = [layer.query.value, layer.new_key.value];
        let read = ancestors(self.model, &targets, false);
        let pairs = layer.boundary.iter().zip(self.entry);
        for (&value, &own) in pairs.filter(|(v, _)| !self.own && read.contains(v)) {
            let hidden = self.patch.op("Identity", &[own]);
            subst.insert(value, hidden);
        }
        let mut operands = Vec::new();
        for (what, projection) in [("query", layer.query), ("key", layer.new_key)] {
            if self.own {
                // The layer runs in this stage, on this stage's tokens. (A copy, for a name.)
                let value = self.patch.op("Identity", &[projection.value]);
                operands.push((what, projection, value));
                continue;
            }
            let value = clone(self.patch, projection.value, &mut subst)?;
            if value == projection.value {
                return Err(format!(
                    "the {what} '{}' does not depend on '{}'",
                    self.model.name(value),
                    self.model.name(layer.boundary[0])
                ));
            }
            operands.push((what, projection, value));
        }
        let mut shared = Vec::new();
        if !self.own {
            let again = reuse::projections(self.model, layer).into_iter();
            shared.extend(again.filter_map(|v| Some((v, *subst.get(&v)?))));
        }
        let turn = match layer.rotary {
            None => None,
            Some(rotary) => {
                let positions = match self.stage.rotary {
                    Some(kept) => kept,
                    None => rotary::places(self.patch, rotary, &mut subst, self.stage.length)?,
                };
                let width = self.decoder.head_dim;
                Some(Turn::of(self.patch, rotary, width, positions, &mut subst)?)
            }
        };
        // One tensor may hold both: then the keys' name is that of a copy.
        if operands[0].2 == operands[1].2 {
            operands[1].2 = self.patch.op("Identity", &[operands[1].2]);
        }
        let mut ready = operands.into_iter().map(|(what, projection, value)| {
            self.patch
                .name_value(value, &format!("drop{number}/{what}"));
            let split = self.split(projection, value);
            match &turn {
                Some(turn) => turn.rotate(self.patch, split),
                None => split,
            }
        });
        match (ready.next(), ready.next()) {
            (Some(query), Some(key)) => Ok((query, key, shared)),
            _ => Err("no queries and keys".into()),
        }
    }

    /// The heads of a projection `[b, H, L, d]`, fp32.
    fn split(&mut self, projection: Projection, value: ValueId) -> ValueId {
        let width = self.decoder.head_dim;
        let p = &mut *self.patch;
        // Whatever precision the model computes in; runtimes remove the cast where
        // there is nothing to do.
        let value = p.cast(value, DataType::Float);
        let Layout::Rows { start, heads } = projection.layout else {
            return value;
        };
        let columns = |from: i64| (Size::Known(from), Size::Known(from + heads * width));
        let (from, to) = columns(start);
        let mut rows = p.slice(value, from, to, 2);
        if let Some((bias, start)) = projection.bias {
            let bias = p.cast(bias, DataType::Float);
            let (from, to) = columns(start);
            let bias = p.slice(bias, from, to, 0);
            rows = p.op("Add", &[rows, bias]);
        }
        let rows = p.reshape(rows, &[0, 0, heads, width]);
        p.transpose(rows, &[0, 2, 1, 3])
    }
}

/// Places from the first token of any row that asks to the last: int64 `[T]`.
/// (Not by ArgMax: tract cannot type that of a length it knows as a symbol.)
fn asking_rows(p: &mut Patch<'_>, rows: ValueId, length: Size) -> ValueId {
    let places = p.iota(length);
    let end = p.size_value(length);
    let asking = p.op("Where", &[rows, places, end]);
    let first = p.reduce("ReduceMin", asking, &[0, 1], false);
    let (length, one) = (p.size_scalar(length), p.i64(1));
    p.op("Range", &[first, length, one])
}
