//! A second implementation of the method, in plain `ndarray`, to check rewritten graphs against.
//!
//! Nothing here knows about graphs, ONNX or any runtime: the functions take the tensors that a
//! stage reads (features, queries, keys, masks) and say what the stage must select and emit. They
//! share no code with the passes that build the graphs, so that an error in one is not repeated in
//! the other, and they prefer the obvious loop to the fast one.
//!
//! | stage | module | entry point |
//! |---|---|---|
//! | V2V, token merge after the vision encoder | `merge` | [`merge()`] |
//! | V2V without merging: random, even, diverse | `select` | [`fixed_places`], [`diverse`] |
//! | T2V, text-guided pruning inside the decoder | `prune` | [`text_rows`], [`rank`], [`drop_counts`], [`select`], [`renumber`] |
//! | V2V behind a tower of patch rows (Qwen2-VL, Qwen2.5-VL) | `rows` | [`merge_rows`] |
//! | discarded tokens that the decoder drops | `place` | [`place()`], [`placed_drop_counts`], [`select_placed`] |
//! | `ratio_base: current` | `current` | [`current_drop_counts`], [`release`] |
//!
//! Numbers: inputs are `f32`, every sum runs in `f64` and in index order, scores are rounded to
//! `f32` and **ranked as `f32`**, because that is the precision in which the graphs rank. Equal
//! scores go to the lower index, ONNX `TopK`'s rule. Equal inputs give bit-equal scores, so ties
//! that are meant to be ties stay ties.
//!
//! Source of the formulas: DUET-VLM (arXiv 2602.18846) and its public implementation.

mod current;
mod math;
mod merge;
mod place;
mod prune;
mod rotary;
mod rows;
mod select;

pub use current::{current_drop_counts, release};
pub(in crate::validate) use math::descending as by_score;
pub use merge::{
    Budget, ClampedBudget, Cls, MergeInput, MergeParams, Merged, Selector, clamp_budget, merge,
    merge_by, merge_selected, merge_shuffled, metric, patch_scores, received_attention,
};
pub use place::{place, placed_drop_counts, select_placed};
pub use prune::{
    Drop, Scaling, Text, average_visual_tokens, carry_rows, check_schedule, drop_counts, rank,
    renumber, select, text_rows, visual_tokens_per_layer,
};
pub use rotary::rotate;
pub use rows::{Placed, mass_of, mass_received, merge_rows};
pub use select::{Keeping, Kept, diverse, diverse_along, fixed_places};

/// Why the oracle cannot say what a stage must compute.
///
/// Every variant names the input at fault, what it should have been and what it was.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OracleError {
    /// Two inputs do not fit together, or one has an impossible extent.
    #[error(
        "{what}: expected {expected}, found {found}; pass the tensors of one layer and one batch row"
    )]
    Shape {
        /// The input whose shape is wrong.
        what: &'static str,
        /// The shape or extent that fits the other inputs.
        expected: String,
        /// The shape or extent that was given.
        found: String,
    },
    /// A score came out as NaN or infinite, so that no order exists.
    #[error(
        "{what}: expected finite values, found {value} at index {index}; \
         check the features, queries and keys for NaN or infinity"
    )]
    NotFinite {
        /// Which score.
        what: &'static str,
        /// Position of the first offender.
        index: usize,
        /// The offending value.
        value: f32,
    },
    /// A parameter is outside of what the method defines.
    #[error("{what}: expected {expected}, found {found}; change the recipe")]
    Parameter {
        /// The parameter.
        what: &'static str,
        /// The values that are allowed.
        expected: String,
        /// The value that was given.
        found: String,
    },
    /// An index or a mask contradicts another input.
    #[error(
        "{what}: expected {expected}, found {found}; indices and masks must describe the same sequence"
    )]
    Index {
        /// The index list or mask at fault.
        what: &'static str,
        /// What the other inputs allow.
        expected: String,
        /// What was given.
        found: String,
    },
}
