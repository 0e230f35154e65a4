//! What can go wrong while measuring.

use crate::ir::IrError;
use crate::onnx::OnnxError;
use crate::runtime::RuntimeError;

/// Everything that keeps a model from being measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A model cannot be opened or run.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A model file cannot be read.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The base's graph cannot be cut.
    #[error(transparent)]
    Ir(#[from] IrError),
    /// Models or settings that cannot be compared.
    #[error("{0}")]
    Input(String),
    /// A model's process ended, or said something that is no reply.
    #[error("{model}: {reason}")]
    Worker {
        /// Which model.
        model: String,
        /// What happened.
        reason: String,
    },
}

/// Result of measuring.
pub type Result<T> = std::result::Result<T, BenchError>;
