//! `kv: padded`: every output has the shape that the unmodified decoder gives it.
//!
//! ```text
//!  past.ℓ [b, h, P, d]                                  present.ℓ [b, h, P + L, d]
//!    │ d₀ columns of filler in front ─▶ counted               ▲ as many in front as the
//!    └─▶ cut off ─▶ past.ℓ [b, h, P − d₀, d] ─▶ the same graph ┘ cache of layer 0 is longer
//!                                              ─▶ logits, rows of zeros in front ─▶ [b, L, V]
//! ```
//!
//! Clients that preallocate one length for all layers (ONNX Runtime GenAI) cannot take caches of unequal length, nor
//! logits of fewer rows than the prompt has tokens. For them the rewritten graph stays what it is, and each cache
//! behind a drop point is filled up in front to the length of layer 0's, which is never pruned: attention reads as
//! few columns as before, and a prompt costs what it costs with ragged caches; but the caches take the memory of the
//! unmodified model's, and each step copies what it cuts off and fills up.
//!
//! All rows of a batch lose the same number of tokens at a drop point, so the filler is a block. A past tells how
//! much of it is filler by its contents, since nothing else comes back from the client: filler is [`FILLER`] in all
//! columns of a key, which no key is that a layer computes. What a client cuts off at the end (going back in a
//! conversation) are the last tokens, as in the unmodified model, as long as none of them was dropped.

use super::{Context, KvLayout, Recipe, TokenMerge, VisualPrune};
use crate::arch::{Decoder, Vlm};
use crate::ir::{DataType, Dim, Model, Patch, PatchPlan, Size, Tensor, ValueId, ValueType};

/// What filler columns hold: a number that fp32, fp16 and bf16 have, far beyond keys and values.
pub const FILLER: f32 = 32768.0;

/// Name of the step in what is inserted.
pub(super) const NAME: &str = "padded";

/// What it does, for people.
pub(super) const SUMMARY: &str = "caches behind drop points filled up to the length of the first layer's, logits to \
    that of the prompt: prompts cost less, caches take as much memory as in the unmodified model";

/// Why a model cannot be given padded caches, if so.
pub(super) fn refused(vlm: &Vlm, context: &Context) -> Option<String> {
    if context.kv != KvLayout::Padded {
        return None;
    }
    let (index, _) = vlm
        .decoders()
        .find(|(_, d)| d.layers.iter().any(|l| l.present.is_none()))?;
    Some(format!(
        "{}: kv: padded is about caches, and this decoder gives none; use kv: ragged",
        vlm.parts[index].label()
    ))
}

/// First layers of the stages behind drop points, in order.
fn stages(vlm: &Vlm, recipe: &Recipe) -> Vec<usize> {
    let placed = recipe.pass::<TokenMerge>().is_some() && recipe.placed(vlm);
    let drops = recipe
        .pass::<VisualPrune>()
        .map(|p| p.drops.iter().map(|d| d.after_layer));
    let mut stages: Vec<usize> = placed
        .then_some(1)
        .into_iter()
        .chain(drops.into_iter().flatten())
        .collect();
    stages.dedup();
    stages
}

/// Where a decoder's outputs are, found before passes change what is behind them.
#[derive(Debug)]
pub(super) struct Outputs {
    part: usize,
    logits: Option<usize>,
    /// Key and value of each layer.
    presents: Vec<Option<(usize, usize)>>,
}

/// The outputs of every decoder.
pub(super) fn outputs(vlm: &Vlm) -> Vec<Outputs> {
    let each = vlm.decoders().map(|(part, decoder)| {
        let all = &vlm.parts[part].model.graph().outputs;
        let place = |value: ValueId| all.iter().position(|o| *o == value);
        let presents = decoder.layers.iter().map(|layer| {
            let (key, value) = layer.present?;
            Some((place(key)?, place(value)?))
        });
        Outputs {
            part,
            logits: place(decoder.logits),
            presents: presents.collect(),
        }
    });
    each.collect()
}

/// Plans the last change of every decoder of a rewritten model: (position of the file, patch).
pub(super) fn plan(vlm: &Vlm, recipe: &Recipe, outputs: &[Outputs]) -> Vec<(usize, PatchPlan)> {
    let stages = stages(vlm, recipe);
    if stages.is_empty() {
        return Vec::new();
    }
    let decoder = |place: &Outputs| vlm.decoders().find(|(part, _)| *part == place.part);
    let plans = outputs.iter().filter_map(|place| {
        let (part, decoder) = decoder(place)?;
        Some((
            part,
            decoder_plan(&vlm.parts[part].model, decoder, place, &stages),
        ))
    });
    plans.collect()
}

fn decoder_plan(model: &Model, decoder: &Decoder, place: &Outputs, stages: &[usize]) -> PatchPlan {
    let mut patch = Patch::new(model, NAME);
    let output = |at: usize| model.graph().outputs[at];
    let present = |layer: usize| place.presents[layer].map(|(k, v)| (output(k), output(v)));
    let (past_of_all, present_of_all) = (decoder.layers[0].past, present(0));
    let whole = present_of_all.map(|(key, _)| patch.size_of(key, 2));
    for (number, &first) in stages.iter().enumerate() {
        let end = stages.get(number + 1).copied().unwrap_or(decoder.depth());
        patch.scope(&format!("stage{}", number + 1));
        if let Some((key, _)) = decoder.layers[first].past {
            let filled = count_filler(&mut patch, key);
            let layers = decoder.layers[first..end].iter();
            for (past, like) in layers
                .filter_map(|l| l.past)
                .flat_map(|p| pair(p, past_of_all))
            {
                let length = patch.size_of(past, 2);
                let rest = patch.slice(past, filled, length, 2);
                patch.rewire_all(past, rest);
                if let Some(ty) = model.value(past).ty.clone() {
                    patch.set_type(past, as_long(model, ty, like, 2));
                }
            }
        }
        let (Some(whole), Some((key, _))) = (whole, present(first)) else {
            continue;
        };
        let short = patch.size_of(key, 2);
        let missing = patch.size_sub(whole, short);
        // Layers of one shape share a block.
        let mut blocks: Vec<(Vec<Dim>, ValueId)> = Vec::new();
        let layers = (first..end).filter_map(present);
        for (present, like) in layers.flat_map(|p| pair(p, present_of_all)) {
            let kind = kind(model, present);
            let known = blocks.iter().find(|(k, _)| Some(k) == kind.as_ref());
            let block = match known {
                Some((_, block)) => *block,
                None => {
                    let block = block_like(&mut patch, present, decoder.dtype, missing);
                    blocks.extend(kind.map(|kind| (kind, block)));
                    block
                }
            };
            let longer = patch.concat(&[block, present], 2);
            replace(&mut patch, present, longer, like, 2);
        }
    }
    if let Some(at) = place.logits {
        logits(&mut patch, model, output(at), decoder.embeds);
    }
    patch.finish()
}

/// Key and value, each with that of the full cache.
fn pair(
    own: (ValueId, ValueId),
    full: Option<(ValueId, ValueId)>,
) -> [(ValueId, Option<ValueId>); 2] {
    [(own.0, full.map(|f| f.0)), (own.1, full.map(|f| f.1))]
}

/// What a cache's shape is besides batch and length, where the file says so.
fn kind(model: &Model, cache: ValueId) -> Option<Vec<Dim>> {
    let shape = model.value(cache).ty.as_ref()?.shape()?;
    let fixed = [shape.get(1)?, shape.get(3)?];
    fixed
        .iter()
        .all(|d| d.known().is_some())
        .then(|| fixed.map(Clone::clone).to_vec())
}

/// Columns of filler in a past key `[b, h, P, d]`: int64 `[1]`. All rows and heads have as many.
fn count_filler(patch: &mut Patch<'_>, key: ValueId) -> Size {
    let (zeros, ones, axes) = (
        patch.i64s(&[0, 0]),
        patch.i64s(&[1, 1]),
        patch.i64s(&[0, 1]),
    );
    let one = patch.op("Slice", &[key, zeros, ones, axes]);
    let one = patch.cast(one, DataType::Float);
    let filler = patch.f32(FILLER);
    let same = patch.op("Equal", &[one, filler]);
    let same = patch.cast(same, DataType::Float);
    let columns = patch.reduce("ReduceMin", same, &[3], false);
    let columns = patch.reshape(columns, &[-1]);
    // (No sum is taken over nothing.)
    let none = patch.constant(Tensor::raw(
        "",
        DataType::Float,
        vec![1],
        0f32.to_le_bytes().to_vec(),
    ));
    let columns = patch.concat(&[none, columns], 0);
    let count = patch.reduce_sum(columns, &[0], true);
    Size::Value(patch.cast(count, DataType::Int64))
}

/// A block `[b, h, length, d]` of filler beside a cache; `usual` is its element type where the file states none.
fn block_like(patch: &mut Patch<'_>, cache: ValueId, usual: DataType, length: Size) -> ValueId {
    let stated = patch.value(cache).ty.as_ref().and_then(ValueType::dtype);
    let filler = Tensor::float_scalar("", stated.unwrap_or(usual), FILLER.into());
    let filler = patch.constant(filler);
    let shape = patch.op("Shape", &[cache]);
    let (front, back) = (patch.i64s(&[0, 1]), patch.i64s(&[3]));
    let (front, back) = (patch.gather(shape, front, 0), patch.gather(shape, back, 0));
    let length = patch.size_value(length);
    let shape = patch.concat(&[front, length, back], 0);
    patch.op("Expand", &[filler, shape])
}

/// As many rows of logits as there are tokens in `embeds`, those that are missing as zeros in front, so that the last
/// row stays the last.
fn logits(patch: &mut Patch<'_>, model: &Model, logits: ValueId, embeds: ValueId) {
    let Some(ValueType::Tensor {
        dtype,
        shape: Some(dims),
    }) = &model.value(logits).ty
    else {
        return;
    };
    // Logits of the last row only stay one row.
    if matches!(dims.get(1), Some(Dim::Known(_)) | None) {
        return;
    }
    patch.scope("logits");
    let tokens = patch.size_of(embeds, 1);
    let rows = patch.size_of(logits, 1);
    let missing = patch.size_sub(tokens, rows);
    let missing = patch.size_value(missing);
    let shape = patch.op("Shape", &[logits]);
    let (front, back) = (patch.i64s(&[0]), patch.i64s(&[2]));
    let (front, back) = (patch.gather(shape, front, 0), patch.gather(shape, back, 0));
    let shape = patch.concat(&[front, missing, back], 0);
    let zero = patch.constant(Tensor::float_scalar("", *dtype, 0.0));
    let zeros = patch.op("Expand", &[zero, shape]);
    let longer = patch.concat(&[zeros, logits], 1);
    replace(patch, logits, longer, Some(embeds), 1);
}

/// Makes `new` the graph output that `old` is, as long in `axis` as the file says that `like` is.
fn replace(patch: &mut Patch<'_>, old: ValueId, new: ValueId, like: Option<ValueId>, axis: usize) {
    let model = patch.model();
    let Some(index) = model.graph().outputs.iter().position(|o| *o == old) else {
        return;
    };
    let ty = model.value(old).ty.clone();
    let ty = ty.unwrap_or_else(|| ValueType::tensor(DataType::Float, vec![Dim::Unknown; 4]));
    patch.replace_output(index, new, as_long(model, ty, like, axis));
}

/// `ty`, as long in `axis` as the file says that `like` is.
fn as_long(model: &Model, ty: ValueType, like: Option<ValueId>, axis: usize) -> ValueType {
    let ValueType::Tensor {
        dtype,
        shape: Some(mut dims),
    } = ty
    else {
        return ty;
    };
    let like = like.and_then(|v| model.value(v).ty.as_ref()?.shape()?.get(axis).cloned());
    if let (Some(dim), Some(like)) = (dims.get_mut(axis), like) {
        *dim = like;
    }
    ValueType::tensor(dtype, dims)
}
