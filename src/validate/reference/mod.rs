//! The layer-exact reference: the *unmodified* model, stopped where the recipe
//! merges or drops, with the oracle choosing the tokens.
//!
//! ```text
//! base tower ─▶ H, q, k ─▶ oracle::merge ─▶ base projector
//! base layers 1..ℓ ─▶ H, q, k of ℓ+1 ─▶ oracle::rank, select ─▶ base layers ℓ+1.. from H'
//! ```
//!
//! Nothing that the passes inserted runs here, and the selection shares no code
//! with them, so agreement means that the rewritten graph computes what the
//! recipe says, in the precision that the base model has.

mod decoder;
mod operands;
mod projection;
mod projector;
mod rows;
mod schedule;
mod selection;
mod step;
mod ties;
mod vision;

pub use decoder::ReferenceDecoder;
pub use rows::{ReferenceRows, RowsOut};
pub(in crate::validate) use rows::{feed as row_feed, grid_tensor};
pub use selection::Fewer;
pub(in crate::validate) use selection::{ORDER, features_in, order_of};
pub use step::{State, StepIn, StepOut};
pub use ties::{Choice, Ranking, Tolerance};
pub(in crate::validate) use vision::per_image;
pub use vision::{ReferenceFeatures, ReferenceVision};
