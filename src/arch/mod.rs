//! Recognition: which parts of a model are the vision tower, the token
//! embedding and the language decoder, found by dataflow.
//!
//! Node names differ by exporter and often lie, so none is looked at. What is
//! relied on is the interface that every exporter keeps (cache inputs and
//! outputs carry a layer number) and what the graph computes.

mod attention;
mod decoder;
mod embedding;
mod projection;
mod residual;
mod scalar;
mod shuffle;
mod tower;
mod vlm;

pub use attention::{Mask, Operand, Site, sites};
pub use decoder::{Decoder, DecoderLayer};
pub use embedding::Embedding;
pub use projection::{Packed, PackedWeight, Quantised};
pub use shuffle::Shuffle;
pub use tower::VisionTower;
pub use vlm::{Part, Role, Vlm};

use crate::ir::Model;

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

/// Constructs that no pass may skip silently: a network hidden in a sub-graph or
/// function. Returns the first one that holds learned matrices.
pub fn hidden_network(model: &Model) -> Option<String> {
    for (id, graph) in model.graphs() {
        if id == model.main() {
            continue;
        }
        let heavy = graph.nodes.iter().filter(|n| {
            let node = model.node(**n);
            matches!(
                node.op_type.as_str(),
                "MatMul" | "Gemm" | "Conv" | "MatMulNBits" | "MatMulInteger"
            )
        });
        if heavy.count() == 0 {
            continue;
        }
        if let Some(function) = model.functions.iter().find(|f| f.body == id) {
            return Some(format!(
                "the network lies in the model-local function {}::{}; inline functions first \
                 (onnx.inliner.inline_local_functions)",
                function.domain, function.name
            ));
        }
        let holder = crate::ir::cone::holder_of(model, id);
        let place = holder.map_or_else(|| id.to_string(), |n| model.describe(n));
        return Some(format!(
            "part of the network lies in a sub-graph of {place}; export the decoder without branches \
             (one graph that takes an empty cache), or rewrite decoder_model and \
             decoder_with_past_model instead of the merged file"
        ));
    }
    None
}
