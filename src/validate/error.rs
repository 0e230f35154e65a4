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
    /// The rewritten model cannot be opened or run where the base can: [`check`](super::check) makes it a finding.
    #[error("the rewritten model does not run: {0}")]
    Rewritten(#[source] crate::runtime::RuntimeError),
    #[error("{0}")]
    Model(String),
}

impl ValidateError {
    /// A vision encoder for images of any size: nothing says what to ask it.
    pub(super) fn open_size(file: &str) -> Self {
        Self::Model(format!(
            "{file}: the image size is not fixed in the file; expected pixels [n, 3, height, width]"
        ))
    }

    /// What the runtime says of the rewritten model, where the same was asked of the base.
    pub(super) fn of_rewritten(error: impl Into<Self>) -> Self {
        match error.into() {
            Self::Runtime(error) => Self::Rewritten(error),
            other => other,
        }
    }
}
