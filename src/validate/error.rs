//! Errors of validation (not of the models: those are findings).

/// Why a validation could not be carried out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ValidateError {
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error(transparent)]
    Oracle(#[from] super::oracle::OracleError),
    #[error(transparent)]
    Graph(#[from] crate::ir::IrError),
    #[error(transparent)]
    Onnx(#[from] crate::onnx::OnnxError),
    #[error(transparent)]
    Pass(#[from] crate::passes::PassError),
    #[error("{0}")]
    Model(String),
}
