//! `duet explain`: which visual tokens survive where.
//!
//! A rewritten graph computes which tokens it keeps, under names of its own (`duet/<pass>/…`). Opened with these values
//! as further outputs ([`Values`]), it tells for one question what each pass chose ([`explain`], [`explain_whole`]). The
//! choices are in different coordinates: a merge counts the tokens of an image, a drop point the tokens of text and
//! images that were left before it. Everything is followed back to patches here ([`Explanation`]) and drawn ([`draw`]).
//!
//! ```text
//!  dominant, anchors [K] ─▶ tokens of the prompt ─▶ kept at drop 1 ─▶ kept at drop 2
//!  (patches of an image)    (CLS, dominant, …)      (of what entered)  (of what was left)
//! ```

mod canvas;
mod error;
mod picture;
mod places;
mod run;
mod values;

pub use error::ExplainError;
pub use picture::draw;
pub use places::{
    Choice, Cluster, Explanation, Kept, Layers, Spot, Stage, Token, TokenKind, Unit, Visual,
    grid_of,
};
pub use run::{Look, Question, explain, explain_whole};
pub use values::Values;
