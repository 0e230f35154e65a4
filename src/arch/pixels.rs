//! The input of a vision tower: images, or clips.

use super::decoder::CacheNames;
use crate::ir::{DataType, Dim, Model, ValueId};

/// Frames that Video-LLaVA sees of a clip, where neither file nor configuration says
/// another number. Source: `num_frames` of the LanguageBind video processor in
/// Video-LLaVA's repository, and the example of Transformers'
/// `VideoLlavaForConditionalGeneration`.
pub const DEFAULT_FRAMES: i64 = 8;

/// Whether a model takes clips: its pixels are an input of rank 5 that is named for
/// videos. (Towers that take the crops of an image have the same rank.)
pub fn takes_clips(model: &Model) -> bool {
    let clip = |v: ValueId| {
        let shape = model.value(v).ty.as_ref().and_then(|t| t.shape());
        shape.is_some_and(|s| s.len() == 5) && model.name(v).contains("video")
    };
    pixels_of(model).is_some_and(clip)
}

/// The graph input that holds pixels.
pub(super) fn pixels_of(model: &Model) -> Option<ValueId> {
    let rank = |v: ValueId| {
        let ty = model.value(v).ty.as_ref()?;
        Some((ty.dtype()?, ty.shape()?.len()))
    };
    let is_image = |&v: &ValueId| {
        let constant = model.value(v).initializer.is_some();
        let fits = |(dtype, rank): (DataType, usize)| {
            (dtype.is_float() || dtype == DataType::Uint8) && (4..=5).contains(&rank)
        };
        // Caches have the rank of images.
        let cache = CacheNames::takes(model.name(v));
        !constant && !cache && rank(v).is_some_and(fits)
    };
    model.graph().inputs.iter().copied().find(is_image)
}

/// Another input of floating-point pixels.
pub(super) fn second_pixels(model: &Model, first: ValueId) -> Option<ValueId> {
    let is_pixels = |&v: &ValueId| {
        let ty = model.value(v).ty.as_ref();
        let rank = ty.and_then(|t| t.shape()).map_or(0, <[Dim]>::len);
        let constant = model.value(v).initializer.is_some();
        let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
        v != first
            && float
            && !constant
            && (4..=5).contains(&rank)
            && model.name(v).contains("pixel")
            && !CacheNames::takes(model.name(v))
    };
    model.graph().inputs.iter().copied().find(is_pixels)
}

/// What is missing where there are no pixels.
pub(super) fn no_pixels(model: &Model) -> String {
    let inputs = &model.graph().inputs;
    let cached = inputs.iter().any(|v| CacheNames::takes(model.name(*v)));
    let embeds = inputs.iter().any(|&v| {
        let ty = model.value(v).ty.as_ref();
        let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
        float && ty.and_then(|t| t.shape()).is_some_and(|s| s.len() == 3)
    });
    let none = "no floating-point input of rank 4 or 5 (pixel_values), or of rank 2 beside a grid (patches)";
    if cached && !embeds {
        format!("{none}; a language model that takes input_ids and no pixels has no visual tokens")
    } else {
        none.into()
    }
}
