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
//! A whole model in one file sees the ids: visual is where they are the image
//! token, the constant that the graph itself compares them with.

use serde::{Deserialize, Serialize};

use super::{Context, PassError};
use crate::arch::{Decoder, Vlm};
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
}

/// Checks that the marker can be made for this model.
pub(super) fn requires(pass: &'static str, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
    let fail = |problem: &str| {
        Err(PassError::Requires {
            pass,
            problem: problem.to_owned(),
        })
    };
    for (index, decoder) in vlm.decoders() {
        let file = vlm.parts[index].file.display();
        match Marker::for_decoder(context.marker, decoder) {
            Marker::Channel if decoder.ids.is_some() => {
                return fail(&format!(
                    "{file}: 'marker: channel' marks embeddings on their way from one file to another, and \
                     this file holds the whole model: its embeddings never come out. Leave 'marker' out or \
                     use 'marker: token-id'"
                ));
            }
            Marker::Channel => {
                let encoder = vlm.towers().any(|(_, t)| t.features_index.is_some());
                let missing = match (encoder, vlm.embeddings().next()) {
                    (false, _) => "vision encoder",
                    (_, None) => "token embedding",
                    _ => continue,
                };
                return fail(&format!(
                    "no {missing} was recognised beside the decoder, so visual tokens cannot be marked in the \
                     embeddings; give the whole model directory, or use 'marker: input' or 'marker: static'"
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
    let shape = shape.map(|mut dims| {
        if let Some(last) = dims.last_mut() {
            *last = match &*last {
                Dim::Known(n) => Dim::Known(n + 1),
                _ => Dim::Unknown,
            };
        }
        dims
    });
    patch.replace_output(index, marked, ValueType::Tensor { dtype, shape });
}

/// Inserts the decoder's side and returns its new entry.
pub(super) fn enter(patch: &mut Patch<'_>, decoder: &Decoder, context: &Context) -> Entry {
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
            Entry { embeds, visual }
        }
        Marker::Channel => {
            let width = Size::Known(-1);
            let end = Size::Known(i64::MAX);
            let split = patch.slice(embeds, Size::Known(0), width, 2);
            let channel = patch.slice(embeds, width, end, 2);
            let flat = patch.squeeze(channel, &[2]);
            let half = patch.constant(Tensor::float_scalar("", decoder.dtype, 0.5));
            let visual = patch.op("Greater", &[flat, half]);
            if let Some(ValueType::Tensor { dtype, shape }) = &model.value(embeds).ty {
                let shape = shape.clone().map(|mut dims| {
                    if let Some(last) = dims.last_mut() {
                        *last = match &*last {
                            Dim::Known(n) => Dim::Known(n + 1),
                            _ => Dim::Unknown,
                        };
                    }
                    dims
                });
                patch.set_type(
                    embeds,
                    ValueType::Tensor {
                        dtype: *dtype,
                        shape,
                    },
                );
            }
            Entry {
                embeds: split,
                visual,
            }
        }
        Marker::Input => {
            let dims = sequence_dims(model, decoder);
            let ty = ValueType::tensor(DataType::Bool, dims);
            let visual = patch.add_input(VISUAL_MASK_INPUT, ty);
            Entry { embeds, visual }
        }
        Marker::Static => {
            let span = context
                .span
                .unwrap_or(super::StaticSpan { start: 0, count: 0 });
            // Positions of the tokens processed now, counted from the start of
            // the conversation: the span lies in the first prompt only.
            let past = past_length(patch, decoder, 0);
            let length = patch.size_of(embeds, 1);
            let here = patch.iota(length);
            let past = patch.size_value(past);
            let at = patch.op("Add", &[here, past]);
            let (start, end) = (patch.i64(span.start), patch.i64(span.start + span.count));
            let from = patch.op("GreaterOrEqual", &[at, start]);
            let to = patch.op("Less", &[at, end]);
            let inside = patch.op("And", &[from, to]);
            let shape = patch.op("Shape", &[embeds]);
            let rows = patch.slice(shape, Size::Known(0), Size::Known(2), 0);
            let visual = patch.op("Expand", &[inside, rows]);
            Entry { embeds, visual }
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
