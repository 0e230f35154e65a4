//! A vision encoder whose tower is of no known structure: convolutions alone, learned queries that
//! read the patches, two towers side by side, features of several layers.
//!
//! Nothing inside can be merged, but what comes out is features all the same, and marking them is
//! all that pruning in the decoder needs.

use super::pixels::{pixels_of, second_pixels, takes_clips};
use super::tower::{closed, float_output, projection_width};
use super::{Decoder, NoMatch};
use crate::ir::cone::descendants;
use crate::ir::{Dim, Model, ValueId};

/// A vision encoder that is known by what goes in and comes out alone.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// `[images, channels, height, width]` pixels.
    pub pixels: ValueId,
    /// Features for the language model, `[images, N, width]` or `[images·N, width]`.
    pub features: ValueId,
    /// Position of the features among the graph outputs.
    pub features_index: usize,
    /// Width of the features, where the file states it.
    pub feature_width: Option<i64>,
    /// Why no tower was recognised.
    pub why: NoMatch,
}

impl Encoder {
    /// What takes the pixels of images and gives a list of features, though it is no known tower
    /// for the reason `why`.
    pub(super) fn recognise(model: &Model, why: &NoMatch) -> Option<Self> {
        let pixels = pixels_of(model)?;
        let strange = Decoder::has_interface(model)
            || closed(model, "the pixels").is_some()
            || second_pixels(model, pixels).is_some()
            || takes_clips(model);
        if strange {
            return None;
        }
        let reached = descendants(model, &[pixels], true);
        let features_index = float_output(model, &reached)?;
        let features = model.graph().outputs[features_index];
        let shape = model.value(features).ty.as_ref()?.shape()?;
        if !(2..=3).contains(&shape.len()) {
            return None;
        }
        let stated = shape.last().and_then(Dim::known);
        Some(Self {
            pixels,
            features,
            features_index,
            feature_width: stated.or_else(|| projection_width(model, features)),
            why: why.clone(),
        })
    }
}
