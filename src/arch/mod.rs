//! Recognition: which parts of a model are the vision tower, the token
//! embedding and the language decoder, found by dataflow.
//!
//! Node names differ by exporter and often lie, so none is looked at. What is
//! relied on is the interface that every exporter keeps (cache inputs and
//! outputs carry a layer number) and what the graph computes.

mod attention;
mod decoder;
mod embedding;
mod encoder;
mod head_rows;
mod hidden;
mod lanes;
mod list;
mod pixels;
mod projection;
mod residual;
mod rows;
mod scalar;
mod segments;
mod sets;
mod shuffle;
mod tower;
mod unfold;
mod vlm;
mod whole;

pub use attention::{Mask, Operand, Site, sites};
pub use decoder::{Decoder, DecoderLayer, Layout, Projection, Rotary, TokenIds, cache_heads};
pub use embedding::{Embedding, Scatter};
pub use encoder::Encoder;
pub use head_rows::HeadRows;
use hidden::too_old;
pub use hidden::{hidden_network, network_functions};
pub use pixels::{DEFAULT_FRAMES, takes_clips};
pub use projection::{Packed, PackedWeight, Quantised};
pub use rows::{PatchRows, RowMove};
pub use sets::{DecoderFiles, FileSet, Kind, RECIPE_KEY, ROLE_KEY, VERSION_KEY};
pub use shuffle::Shuffle;
pub use tower::VisionTower;
pub use unfold::Source;
pub use vlm::{FileModel, Part, Role, Vlm};
pub use whole::WholeModel;

/// Why something was not recognised: what was looked for, and what was found
/// where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{looked_for}: {found}")]
pub struct NoMatch {
    /// What was looked for.
    pub looked_for: String,
    /// What was found instead, and where.
    pub found: String,
}

impl NoMatch {
    pub(crate) fn new(looked_for: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            looked_for: looked_for.into(),
            found: found.into(),
        }
    }
}

/// Errors of reading a model into a [`Vlm`].
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ArchError {
    #[error("{file}: {problem}")]
    Unsupported { file: String, problem: String },
}

/// The lowest standard operator set that recognition and passes work on.
pub const MIN_OPSET: i64 = 13;
