//! Errors of comparing.

use std::path::PathBuf;

use crate::onnx::OnnxError;

/// Why two paths cannot be compared.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DiffError {
    #[error("{0}")]
    Model(OnnxError),
    #[error("{}: {reason}", path.display())]
    Io {
        path: PathBuf,
        reason: std::io::Error,
    },
    #[error(
        "{} is a directory and {} is a file; compare two files or two directories",
        directory.display(), file.display()
    )]
    Mixed { directory: PathBuf, file: PathBuf },
    #[error("{}: expected a file, found {what}", path.display())]
    Special { path: PathBuf, what: &'static str },
    #[error("{}: {reason}", path.display())]
    Listing { path: PathBuf, reason: String },
    #[error("{0}")]
    Policy(String),
}

// The messages hold what caused them, so that it is no source as well: a chain of
// errors would say it twice.
impl From<OnnxError> for DiffError {
    fn from(error: OnnxError) -> Self {
        Self::Model(error)
    }
}

impl DiffError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |reason| Self::Io { path, reason }
    }
}
