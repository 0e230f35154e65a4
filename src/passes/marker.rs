//! How a decoder knows which of its tokens are visual.
//!
//! A decoder sees embeddings, not ids. By default the rewritten model marks them
//! itself: features leave the vision encoder with one more channel that is 1,
//! text embeddings with one that is 0, and the decoder splits it off at its
//! entry. Clients only scatter and copy, so this survives them.
//!
//! ```text
//! vision:  features [n, K, D] ──Concat(1)──▶ [n, K, D+1]
//! embed:   embeds   [b, L, D] ──Concat(0)──▶ [b, L, D+1]
//! decoder: [b, L, D+1] ──Slice──▶ embeds [b, L, D]
//!                      └─Slice──▶ > 0.5 ──▶ visual [b, L] bool
//! ```
//!
//! An embedding graph that takes the features and puts them in their places
//! itself (ONNX Runtime GenAI's) is widened inside: the features' channel is split
//! off, and what moves the features moves the marks a second time, with zeros in
//! place of the text. All four tensors between the files are then one wider, as
//! GenAI needs, which allocates them all by one `hidden_size`:
//!
//! ```text
//! embed:   features [n, K, D+1] ─┬─Slice──▶ [n, K, D] ──▶ the graph as it was ──▶ [b, L, D] ─┐
//!                                └─Slice─▶ Expand ──▶ its copying nodes, again ──▶ [.., :1] ─┴─Concat─▶
//! ```
//!
//! A whole model in one file sees the ids: visual is where they are the image
//! token, the constant that the graph itself compares them with.
//!
//! With `placement: decoder` features come out that a merge has discarded. Their mark
//! is 2: gone is what is > 1.5, visual what lies between 0.5 and 1.5.

use serde::{Deserialize, Serialize};

use super::{Context, PassError};
use crate::arch::{Decoder, Embedding, Vlm};
use crate::ir::cone::Substitution;
use crate::ir::{DataType, Dim, Model, Patch, Size, Tensor, ValueId, ValueType};

/// Name of the extra decoder input with `marker: input`.
pub const VISUAL_MASK_INPUT: &str = "visual_token_mask";

/// Where the visual mask comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Marker {
    /// A marker channel through all three graphs.
    #[default]
    Channel,
    /// The graph has `input_ids`.
    TokenId,
    /// An extra decoder input, bool `[batch, sequence]`.
    Input,
    /// Fixed start and count.
    Static,
}

impl Marker {
    /// What a recipe means for a decoder: what it says, else the ids where the
    /// decoder has them, else the channel.
    pub fn for_decoder(stated: Option<Self>, decoder: &Decoder) -> Self {
        let default = match decoder.ids {
            Some(_) => Self::TokenId,
            None => Self::Channel,
        };
        stated.unwrap_or(default)
    }
}

/// The decoder's entry once visual tokens are known.
pub(super) struct Entry {
    /// Embeddings `[batch, sequence, width]` that the layers are to read.
    pub(super) embeds: ValueId,
    /// Bool `[batch, sequence]`.
    pub(super) visual: ValueId,
    /// Bool `[batch, sequence]`: features that a merge discarded and left in their
    /// places, for the decoder to drop.
    pub(super) gone: Option<ValueId>,
}

/// Checks that the marker can be made for this model.
pub(super) fn requires(pass: &'static str, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
    let fail = |problem: &str| {
        Err(PassError::Requires {
            pass,
            problem: problem.to_owned(),
        })
    };
    let placed = context.placed(vlm);
    for (index, decoder) in vlm.decoders() {
        let file = vlm.parts[index].file.display();
        let marker = Marker::for_decoder(context.marker, decoder);
        if placed && marker != Marker::Channel {
            return fail(&format!(
                "{file}: 'placement: decoder' tells discarded features from kept ones by the marker channel, \
                 and {}; use 'placement: encoder'{}",
                match marker {
                    Marker::TokenId =>
                        "this file holds the whole model, which knows visual tokens by their id",
                    _ => "'marker: input' and 'marker: static' say only where visual tokens are",
                },
                if decoder.ids.is_some() {
                    ""
                } else {
                    " or 'marker: channel'"
                }
            ));
        }
        match marker {
            Marker::Channel if decoder.ids.is_some() => {
                return fail(&format!(
                    "{file}: 'marker: channel' marks embeddings on their way from one file to another, and \
                     this file holds the whole model: its embeddings never come out. Leave 'marker' out or \
                     use 'marker: token-id'"
                ));
            }
            Marker::Channel => {
                let encoder = vlm.features().next().is_some();
                let missing = match (encoder, vlm.embeddings().next()) {
                    (false, _) => "vision encoder",
                    (_, None) => "token embedding",
                    _ => continue,
                };
                let instead = match placed {
                    true => "'placement: encoder'",
                    false => "'marker: input' or 'marker: static'",
                };
                return fail(&format!(
                    "no {missing} was recognised beside the decoder, so visual tokens cannot be marked in the \
                     embeddings; give the whole model directory, or use {instead}"
                ));
            }
            Marker::TokenId if decoder.ids.is_none() => {
                return fail(
                    "'marker: token-id' needs a decoder that takes input_ids, and this one takes embeddings; \
                     use 'marker: channel'",
                );
            }
            Marker::TokenId | Marker::Input | Marker::Static => {}
        }
    }
    Ok(())
}

/// Appends the marker channel to a graph output of embeddings or features.
pub(super) fn append_channel(patch: &mut Patch<'_>, index: usize, mark: f64) {
    let model = patch.model();
    let output = model.graph().outputs[index];
    let (dtype, shape) = match &model.value(output).ty {
        Some(ValueType::Tensor { dtype, shape }) => (*dtype, shape.clone()),
        _ => (DataType::Float, None),
    };
    // [..., D] → [..., 1] of the mark.
    let all = patch.op("Shape", &[output]);
    let lead = patch.slice(all, Size::Known(0), Size::Known(-1), 0);
    let one = patch.i64s(&[1]);
    let channel_shape = patch.concat(&[lead, one], 0);
    let value = patch.constant(Tensor::float_scalar("", dtype, mark));
    let channel = patch.op("Expand", &[value, channel_shape]);
    let marked = patch.concat(&[output, channel], -1);
    let ty = wider(&ValueType::Tensor { dtype, shape });
    patch.replace_output(index, marked, ty);
}

/// The type with one more channel.
pub(super) fn wider(ty: &ValueType) -> ValueType {
    let mut ty = ty.clone();
    if let ValueType::Tensor {
        shape: Some(dims), ..
    } = &mut ty
        && let Some(last) = dims.last_mut()
    {
        *last = match &*last {
            Dim::Known(n) => Dim::Known(n + 1),
            _ => Dim::Unknown,
        };
    }
    ty
}

/// Makes an embedding graph give out the marker channel: 0 for every token that
/// it looks up, and for features it takes in what they carry.
///
/// # Errors
/// A node on the features' way that holds a sub-graph.
pub(super) fn mark_embedding(patch: &mut Patch<'_>, embedding: &Embedding) -> Result<(), String> {
    let Some(scatter) = &embedding.scatter else {
        append_channel(patch, 0, 0.0);
        return Ok(());
    };
    let model = patch.model();
    let features = scatter.features;
    let axis = i64::try_from(scatter.rank).unwrap_or(i64::MAX) - 1;
    let width = Size::Known(-1);
    let plain = patch.slice(features, Size::Known(0), width, axis);
    let mark = patch.slice(features, width, Size::Known(i64::MAX), axis);
    let shape = patch.op("Shape", &[plain]);
    let marks = patch.op("Expand", &[mark, shape]);
    let mut subst: Substitution = scatter.steering.iter().map(|&v| (v, v)).collect();
    subst.insert(features, marks);
    for &(other, dtype) in &scatter.others {
        let zero = patch.constant(Tensor::float_scalar("", dtype, 0.0));
        let shape = patch.op("Shape", &[other]);
        subst.insert(other, patch.op("Expand", &[zero, shape]));
    }
    let placed = patch
        .clone_cone(embedding.output, &mut subst)
        .map_err(|node| format!("{node} holds a sub-graph on the image features' way"))?;
    let channel = patch.slice(placed, Size::Known(0), Size::Known(1), 2);
    let marked = patch.concat(&[embedding.output, channel], -1);
    patch.rewire_all(features, plain);
    if let Some(ty) = &model.value(features).ty {
        patch.set_type(features, wider(ty));
    }
    let ty = model.value(embedding.output).ty.clone();
    let ty = ty.unwrap_or(ValueType::Tensor {
        dtype: embedding.dtype,
        shape: None,
    });
    patch.replace_output(0, marked, wider(&ty));
    Ok(())
}

/// Inserts the decoder's side and returns its new entry; with `placed`, features that
/// were discarded are told apart.
pub(super) fn enter(
    patch: &mut Patch<'_>,
    decoder: &Decoder,
    context: &Context,
    placed: bool,
) -> Entry {
    let model = patch.model();
    let embeds = decoder.embeds;
    patch.scope("entry");
    match Marker::for_decoder(context.marker, decoder) {
        Marker::TokenId => {
            let visual = decoder.ids.map(|ids| {
                let dtype = model.value(ids.value).ty.as_ref().and_then(|t| t.dtype());
                let token = match dtype {
                    Some(DataType::Int32) => {
                        #[allow(
                            clippy::cast_possible_truncation,
                            reason = "the graph compares it so"
                        )]
                        let bytes = (ids.image as i32).to_le_bytes().to_vec();
                        patch.constant(Tensor::raw("", DataType::Int32, vec![], bytes))
                    }
                    _ => patch.i64(ids.image),
                };
                patch.op("Equal", &[ids.value, token])
            });
            // `requires` has refused decoders without ids.
            let visual = visual.unwrap_or_else(|| patch.constant(Tensor::bool_scalar("", false)));
            Entry {
                embeds,
                visual,
                gone: None,
            }
        }
        Marker::Channel => {
            let width = Size::Known(-1);
            let end = Size::Known(i64::MAX);
            let split = patch.slice(embeds, Size::Known(0), width, 2);
            let channel = patch.slice(embeds, width, end, 2);
            let flat = patch.squeeze(channel, &[2]);
            let half = patch.constant(Tensor::float_scalar("", decoder.dtype, 0.5));
            let mut visual = patch.op("Greater", &[flat, half]);
            let gone = placed.then(|| {
                let between = patch.constant(Tensor::float_scalar("", decoder.dtype, 1.5));
                let gone = patch.op("Greater", &[flat, between]);
                let kept = patch.op("Not", &[gone]);
                visual = patch.op("And", &[visual, kept]);
                gone
            });
            if let Some(ty) = &model.value(embeds).ty {
                patch.set_type(embeds, wider(ty));
            }
            Entry {
                embeds: split,
                visual,
                gone,
            }
        }
        Marker::Input => {
            let dims = sequence_dims(model, decoder);
            let ty = ValueType::tensor(DataType::Bool, dims);
            let visual = patch.add_input(VISUAL_MASK_INPUT, ty);
            Entry {
                embeds,
                visual,
                gone: None,
            }
        }
        Marker::Static => {
            let span = context
                .span
                .unwrap_or(super::StaticSpan { start: 0, count: 0 });
            // The span lies in the first prompt only: behind a cache there is
            // none, also where the prompt was shorter than the span.
            let first = decoder.layers[0].past.map(|(key, _)| {
                let past = patch.size_of(key, 2);
                let past = patch.size_value(past);
                let zero = patch.i64(0);
                patch.op("Equal", &[past, zero])
            });
            let length = patch.size_of(embeds, 1);
            let at = patch.iota(length);
            let (start, end) = (patch.i64(span.start), patch.i64(span.start + span.count));
            let from = patch.op("GreaterOrEqual", &[at, start]);
            let to = patch.op("Less", &[at, end]);
            let inside = patch.op("And", &[from, to]);
            let inside = match first {
                Some(first) => patch.op("And", &[inside, first]),
                None => inside,
            };
            let shape = patch.op("Shape", &[embeds]);
            let rows = patch.slice(shape, Size::Known(0), Size::Known(2), 0);
            let visual = patch.op("Expand", &[inside, rows]);
            Entry {
                embeds,
                visual,
                gone: None,
            }
        }
    }
}

/// Length of a layer's cache before this step: none in a decoder without a past.
pub(super) fn past_length(patch: &mut Patch<'_>, decoder: &Decoder, layer: usize) -> Size {
    match decoder.layers[layer].past {
        Some((key, _)) => patch.size_of(key, 2),
        None => Size::Known(0),
    }
}

/// `[batch, sequence]` as the embeddings or the token ids name them.
pub(super) fn sequence_dims(model: &Model, decoder: &Decoder) -> Vec<Dim> {
    let tokens = decoder.ids.map_or(decoder.embeds, |ids| ids.value);
    let shape = model.value(tokens).ty.as_ref().and_then(|t| t.shape());
    match shape {
        Some([batch, sequence, ..]) => vec![batch.clone(), sequence.clone()],
        _ => vec![Dim::Unknown, Dim::Unknown],
    }
}
