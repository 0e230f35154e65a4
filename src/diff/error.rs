//! Errors of comparing.

use std::path::PathBuf;

use crate::onnx::OnnxError;

/// Why two paths cannot be compared.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DiffError {
    #[error(transparent)]
    Model(#[from] OnnxError),
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{} is a directory and {} is a file; compare two files or two directories",
        directory.display(), file.display()
    )]
    Mixed { directory: PathBuf, file: PathBuf },
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{0}")]
    Policy(String),
}

impl DiffError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
