//! What one step of a decoder reads and gives, and what is carried from step to step.

use ndarray::{Array2, Array3};

use crate::runtime::Value;

/// What one step reads. b rows, L new tokens.
#[derive(Clone, Debug)]
pub struct StepIn {
    /// `[b, L, D]`, without any marker channel.
    pub embeds: Array3<f32>,
    /// `[b, L]`: 1 for tokens, 0 for padding.
    pub mask: Array2<i64>,
    /// `[rows, b, L]`: one row, or as many as the decoder's position ids have (M-RoPE).
    pub positions: Array3<i64>,
    /// `[b, L]`: visual tokens that take part.
    pub visual: Array2<bool>,
    /// `[b, L]`: visual tokens that the merge discarded and left in their places.
    pub gone: Array2<bool>,
    /// `[b, L]`, for `text: salient`.
    pub salient: Array2<bool>,
    /// `[b, L]`, for decoders that take token ids too.
    pub ids: Option<Array2<i64>>,
}

/// What one step gives.
#[derive(Clone, Debug)]
pub struct StepOut {
    /// `[b, vocabulary]`: the last row.
    pub logits: Array2<f32>,
    /// Kept indices at each drop point, for each row, into the sequence before it.
    pub kept: Vec<Vec<Vec<usize>>>,
    /// Length of every layer's cache, where the decoder gives caches.
    pub lengths: Vec<usize>,
    /// Tokens that were exchanged because their scores tie as well as exactly.
    pub near_ties: usize,
}

/// Caches and masks of a conversation.
#[derive(Debug)]
pub struct State {
    /// Key and value of every layer; none where the decoder gives no caches.
    pub(super) caches: Vec<(Value, Value)>,
    /// Mask `[b, past]` of every stage.
    pub(super) masks: Vec<Array2<i64>>,
    /// A conversation of each row, where rows are run one by one.
    pub(super) alone: Vec<State>,
}

impl State {
    /// Whether nothing was said yet.
    pub fn is_new(&self) -> bool {
        self.masks.iter().all(|mask| mask.ncols() == 0)
    }
}
