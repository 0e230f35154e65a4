//! What can go wrong.

/// Why it cannot be told which tokens survive.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ExplainError {
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error(transparent)]
    Graph(#[from] crate::ir::IrError),
    /// The model does not say what is needed, or says something that does not fit.
    #[error("{0}")]
    Model(String),
    /// A picture cannot be made.
    #[error("{0}")]
    Picture(String),
}

pub(super) fn wrong<T>(message: impl Into<String>) -> Result<T, ExplainError> {
    Err(ExplainError::Model(message.into()))
}
