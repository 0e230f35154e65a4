//! Errors of an evaluation (not of the models: a wrong answer is a result).

use std::path::{Path, PathBuf};

use crate::runtime::RuntimeError;

/// Why an evaluation could not be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A line of a file does not hold what it should.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A model cannot answer a question.
    #[error("{model}, question {id}: {source}")]
    Question {
        /// Name of the model.
        model: String,
        /// The question's id.
        id: String,
        /// What the runtime says.
        source: Box<RuntimeError>,
    },
    /// What was given does not go together.
    #[error("{0}")]
    Mismatch(String),
}

/// Result of an evaluation.
pub(super) type Result<T> = std::result::Result<T, EvalError>;

impl EvalError {
    pub(super) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(super) fn file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::File {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }

    pub(super) fn line(path: impl AsRef<Path>, line: usize, reason: impl Into<String>) -> Self {
        Self::Line {
            path: path.as_ref().to_path_buf(),
            line,
            reason: reason.into(),
        }
    }
}
