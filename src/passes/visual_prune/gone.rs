//! Discarded features that come into the decoder (`token_merge: placement: decoder`).
//!
//! ```text
//!  embeds ─ mark 2 ─▶ gone [b, L]
//!  mask [b, S], 0 where gone ─▶ layer 0 ─ H ─┐ drop the gone ─ H' ─▶ layer 1 …
//!  keys of layer 0, zeros where gone ─▶ present.0   (the cache remembers them)
//!  past.0 [b, h, P, d]: a key of zeros ─▶ its column is masked in this step too
//! ```
//!
//! Layer 0 sees all columns but those of gone tokens; they leave where layer 1 is
//! entered, so the cache of layer 0 has the length that the client counts. It gives a
//! mask of ones for all columns in later steps; which are gone is told by the cache: the
//! keys that were written for them are zeros, which a computed key is in all columns of
//! a head only where the hidden state is (a token whose embedding is zeros, in a decoder
//! without a bias on its keys: it is taken for one in later steps).
//!
//! All rows of a batch lose the same number of tokens, the smallest that is gone in any
//! of them. What a row has left over stays, masked in the same way in every stage, and
//! is the first to leave at later drops.
//!
//! An attention that goes by the length of each row (`GroupQueryAttention`) takes no mask
//! of columns. There gone tokens count as keys in layer 0, and in later layers where a
//! batch leaves some over; they are zeros with positions.

use super::stage::{Job, Plan, Stage, plan as plan_stages};
use super::{RankLayer, RankMask, RatioBase, TextQueries, VisualPrune};
use crate::arch::{Decoder, Layout, Vlm};
use crate::ir::cone::descendants;
use crate::ir::{DataType, Dim, Model, PatchPlan, Size, Tensor, ValueId, ValueType};
use crate::passes::Context;

/// Layers that gone tokens go through.
pub(super) const LAYERS: usize = 1;

/// Plans the patch of a decoder that drops gone tokens and nothing else.
pub(in crate::passes) fn plan(
    pass: &'static str,
    model: &Model,
    decoder: &Decoder,
    context: &Context,
) -> Result<PatchPlan, String> {
    let none = VisualPrune {
        drops: Vec::new(),
        text: TextQueries::All,
        positions: None,
        keeps_if_told: false,
        rank_mask: RankMask::Causal,
        rank_layer: RankLayer::Next,
        ratio_base: RatioBase::Entered,
    };
    let job = Job {
        pass,
        prune: &none,
        placed: true,
    };
    plan_stages(&job, model, decoder, context)
}

/// What the decoders of `vlm` do with gone tokens, for people.
pub(in crate::passes) fn summary(vlm: &Vlm) -> String {
    let all = vlm.decoders().all(|(_, d)| d.hides_columns());
    let first = match all {
        true => "masked in the decoder's first layer",
        false => {
            "attended to in the decoder's first layer, whose attention takes lengths and no mask of columns,"
        }
    };
    format!("the discarded ones are {first} and dropped before the second")
}

/// A scalar of the mask's type.
fn number(dtype: DataType, n: u8) -> Tensor {
    let raw = |bytes: Vec<u8>| Tensor::raw("", dtype, vec![], bytes);
    match dtype {
        DataType::Int64 => Tensor::i64_scalar("", n.into()),
        DataType::Int32 => raw(i32::from(n).to_le_bytes().to_vec()),
        DataType::Bool => Tensor::bool_scalar("", n != 0),
        _ => Tensor::float_scalar("", dtype, n.into()),
    }
}

impl Plan<'_, '_> {
    fn mask_type(&self) -> DataType {
        let mask = self.decoder.attention_mask;
        let ty = mask.and_then(|m| self.model.value(m).ty.as_ref()?.dtype());
        ty.unwrap_or(DataType::Int64)
    }

    /// Refuses a graph that counts tokens by the mask, where masked columns would change
    /// the positions of those behind them.
    fn counts_nothing(&self, mask: ValueId) -> Result<(), String> {
        let model = self.model;
        let of_mask = descendants(model, &[mask], true);
        let of_tokens = descendants(model, &[self.decoder.embeds], true);
        let counts = model.graph().nodes.iter().find(|&&id| {
            let node = model.node(id);
            let reads = |v: &ValueId| of_mask.contains(v) && !of_tokens.contains(v);
            matches!(node.op_type.as_str(), "CumSum" | "ReduceSum")
                && node.input(0).is_some_and(|v| reads(&v))
        });
        match counts {
            None => Ok(()),
            Some(&id) => Err(format!(
                "{} counts tokens by '{}', where placement: decoder masks the columns of discarded features, \
                 so that the positions of the others would change; export with the input position_ids, or \
                 use placement: encoder",
                model.describe(id),
                model.name(mask)
            )),
        }
    }

    /// Masks the columns of gone tokens for layer 0: the whole mask `[b, S]`, and that of
    /// the tokens processed now, of which `gone` `[b, L]` are gone.
    pub(super) fn hide(
        &mut self,
        gone: ValueId,
        now: Option<ValueId>,
        past: Size,
    ) -> Result<(Option<ValueId>, Option<ValueId>), String> {
        let (Some(mask), Some(now)) = (self.decoder.attention_mask, now) else {
            return Ok((None, None));
        };
        self.counts_nothing(mask)?;
        let dtype = self.mask_type();
        let p = &mut *self.patch;
        let (zero, one) = (p.constant(number(dtype, 0)), p.constant(number(dtype, 1)));
        let now = p.op("Where", &[gone, zero, now]);
        if let Some(before) = self.mask_before {
            // Some clients give ones for the new tokens only.
            let rows = p.size_of(before, 0);
            let given = p.size_of(before, 1);
            let missing = p.size_sub(past, given);
            let missing = p.size_max(missing, Size::Known(0));
            let (rows, missing) = (p.size_value(rows), p.size_value(missing));
            let shape = p.concat(&[rows, missing], 0);
            let ones = p.op("Expand", &[one, shape]);
            self.mask_before = Some(p.concat(&[before, ones], 1));
        }
        let hidden = match self.mask_of_past(0, past) {
            Some(earlier) => self.patch.concat(&[earlier, now], 1),
            None => now,
        };
        self.patch.rewire_all(mask, hidden);
        Ok((Some(hidden), Some(now)))
    }

    /// The mask of a layer's cache, `[b, past]`: the first columns of the client's (padding
    /// lies on the left and is never dropped, so they describe a shorter past as well),
    /// where columns are hidden with 0 for keys of zeros. None without a cache.
    pub(super) fn mask_of_past(&mut self, layer: usize, past: Size) -> Option<ValueId> {
        let before = self.mask_before?;
        let dtype = self.mask_type();
        let right = self.pads_right();
        let p = &mut *self.patch;
        let mask = match right {
            true => {
                // A cache of fixed length is padded on the right there.
                let given = p.size_of(before, 1);
                let dropped = p.size_sub(given, past);
                p.slice(before, dropped, Size::Known(i64::MAX), 1)
            }
            false => p.slice(before, Size::Known(0), past, 1),
        };
        let Some((keys, _)) = self.decoder.layers[layer].past.filter(|_| self.hides) else {
            return Some(mask);
        };
        let zero = p.constant(number(dtype, 0));
        let head = p.slice(keys, Size::Known(0), Size::Known(1), 1);
        let head = p.cast(head, DataType::Float);
        let size = p.op("Abs", &[head]);
        let largest = p.reduce("ReduceMax", size, &[1, 3], false);
        let none = p.f32(0.0);
        let gone = p.op("Equal", &[largest, none]);
        Some(p.op("Where", &[gone, zero, mask]))
    }

    /// Inserts the drop point at which gone tokens leave, and returns the stage behind it.
    pub(super) fn drop_gone(&mut self, before: &Stage) -> Stage {
        let label = "drop0".to_owned();
        self.patch.scope(&label);
        let gone = before.gone.unwrap_or(before.visual);
        let count = self.count_or(gone, self.fixed.map(|run| run.gone));
        let p = &mut *self.patch;
        let lost = Size::Value(p.reduce("ReduceMin", count, &[0], true));
        let length = p.size_sub(before.length, lost);
        let (leaves, stays) = (p.f32(0.0), p.f32(1.0));
        let order = p.op("Where", &[gone, leaves, stays]);
        let (_, best) = p.top_k(order, length, true);
        let kept = p.sort_ascending(best, length);
        self.behind(1, label, before, kept, (length, lost))
    }

    /// Makes the first layer of a stage write zeros for the keys of gone tokens.
    pub(super) fn zero_keys(&mut self, number: usize, stage: &Stage) -> Result<(), String> {
        let layers = self.span(number);
        let (Some(gone), true, false) = (stage.gone, self.hides, layers.is_empty()) else {
            return Ok(());
        };
        let (model, decoder) = (self.model, self.decoder);
        let layer = &decoder.layers[stage.first];
        if layer.present.is_none() {
            // Nothing is remembered: each step runs everything again.
            return Ok(());
        }
        let key = layer.new_key;
        let stated = |v: ValueId| model.value(v).ty.as_ref().and_then(ValueType::dtype);
        self.patch.scope(match stage.label.as_str() {
            "" => "entry",
            label => label,
        });
        let p = &mut *self.patch;
        let (gone, columns) = match key.layout {
            Layout::Heads => (p.unsqueeze(gone, &[1, 3]), 0),
            Layout::Rows { start: 0, heads } => (p.unsqueeze(gone, &[2]), heads * decoder.head_dim),
            Layout::Rows { .. } => {
                return Err(format!(
                    "{} takes queries, keys and values in one tensor, in which the keys of discarded \
                     features cannot be told apart; export with separate inputs, or use placement: encoder",
                    model.describe(layer.node)
                ));
            }
        };
        let fill = match key.bias {
            // What the attention adds makes it zero.
            Some((bias, start)) => {
                let (from, to) = (Size::Known(start), Size::Known(start + columns));
                let added = p.slice(bias, from, to, 0);
                p.op("Neg", &[added])
            }
            None => match (stated(key.value), p.opset()) {
                (None, 15..) => {
                    let zero = p.f32(0.0);
                    p.op("CastLike", &[zero, key.value])
                }
                (dtype, _) => {
                    let dtype = dtype.unwrap_or(decoder.dtype);
                    p.constant(Tensor::float_scalar("", dtype, 0.0))
                }
            },
        };
        let zeroed = p.op("Where", &[gone, fill, key.value]);
        p.rewire_all(key.value, zeroed);
        let outputs = &model.graph().outputs;
        if let Some(index) = outputs.iter().position(|o| *o == key.value) {
            let ty = model.value(key.value).ty.clone();
            let mut ty = ty.unwrap_or(ValueType::Tensor {
                dtype: decoder.dtype,
                shape: None,
            });
            if let (
                1..,
                ValueType::Tensor {
                    shape: Some(dims), ..
                },
            ) = (number, &mut ty)
                && let Some(length) = dims.get_mut(2)
            {
                *length = Dim::param(format!("total_sequence_length_{}", stage.label));
            }
            p.replace_output(index, zeroed, ty);
        }
        Ok(())
    }
}
