//! Errors of reading and writing model files.

use std::path::PathBuf;

use crate::ir::IrError;

/// What can go wrong with a model file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum OnnxError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: not a valid ONNX file: {place}: {problem}", path.display())]
    Malformed {
        path: PathBuf,
        place: String,
        problem: String,
    },
    #[error("{}: {source}", path.display())]
    Model { path: PathBuf, source: IrError },
    #[error("{}: {problem}", path.display())]
    Directory { path: PathBuf, problem: String },
    #[error("{} exists already; nothing was written. Remove it or name another target", path.display())]
    Exists { path: PathBuf },
}

impl OnnxError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
