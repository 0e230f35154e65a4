//! The one error type of the runtime.

use std::path::{Path, PathBuf};

/// Everything that can go wrong while finding ONNX Runtime, preparing inputs or running a model.
///
/// Each message says what was expected, what was found, where, and, where there is something to do, what
/// to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// No usable ONNX Runtime library in any of the places looked at.
    #[error(
        "ONNX Runtime's shared library was not found. Install it with `pip install onnxruntime` or \
         `duet runtime install`, or set ORT_DYLIB_PATH to the library file. Searched:\n  {}",
        searched.join("\n  ")
    )]
    LibraryNotFound {
        /// One line for each place looked at, saying what was (not) there.
        searched: Vec<String>,
    },
    /// A library was found but cannot be used.
    #[error(
        "cannot use {} ({origin}) as ONNX Runtime: {reason}. ONNX Runtime 1.{minimum} or newer is \
         needed: `pip install --upgrade onnxruntime` or `duet runtime install`",
        path.display()
    )]
    LibraryLoad {
        /// The library file.
        path: PathBuf,
        /// How it was found.
        origin: String,
        /// What the loader said.
        reason: String,
        /// Oldest usable minor version.
        minimum: u32,
    },
    /// `duet runtime install` (or an automatic install asked for by a caller) failed.
    #[error("cannot install ONNX Runtime: {reason}. {hint}")]
    Install {
        /// What failed.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A model could not be opened.
    #[error("ONNX Runtime cannot open {model}: {reason}")]
    Open {
        /// Path or description of the model.
        model: String,
        /// ONNX Runtime's words.
        reason: String,
    },
    /// An execution provider is unknown or not in the loaded library.
    #[error("execution provider `{name}` cannot be used: {reason}")]
    Provider {
        /// The name as given.
        name: String,
        /// Why not, and what there is.
        reason: String,
    },
    /// A model lacks an input or output, or has one nobody can fill.
    #[error("{model}: expected {expected}; found {found}")]
    Interface {
        /// Path or description of the model.
        model: String,
        /// What is needed.
        expected: String,
        /// What the model has.
        found: String,
    },
    /// A tensor given to a model does not fit its declared input.
    #[error("{model}: input `{input}` expects {expected}; got {found}")]
    Input {
        /// Path or description of the model.
        model: String,
        /// Name of the input.
        input: String,
        /// Declared element type and shape.
        expected: String,
        /// Given element type and shape.
        found: String,
    },
    /// A run failed inside the engine.
    #[error("{model}: run failed: {reason}")]
    Run {
        /// Path or description of the model.
        model: String,
        /// The engine's words.
        reason: String,
    },
    /// A tensor is not what an operation needs.
    #[error("tensor: {0}")]
    Tensor(String),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A configuration file is missing something or says something unusable.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file (or the directory that should hold it).
        path: PathBuf,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// An image cannot be decoded or resized.
    #[error("image {name}: {reason}")]
    Image {
        /// File name or description.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The prompt does not fit the images or the model.
    #[error("prompt: {0}")]
    Prompt(String),
    /// A chat template cannot be parsed or rendered.
    #[error("chat template of {}: {reason}", path.display())]
    Template {
        /// File that the template came from.
        path: PathBuf,
        /// The template engine's words.
        reason: String,
    },
    /// The tokenizer failed.
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// Its words.
        reason: String,
    },
    /// The decoder's logits hold NaN, so no token can be chosen.
    #[error(
        "{model}: the last row of the logits holds NaN at step {step} (row {row} of the batch); \
         some exports do so for left-padded batches even unmodified"
    )]
    NotANumber {
        /// Path or description of the decoder.
        model: String,
        /// 0 is prefill, then one for each decoded token.
        step: usize,
        /// Row of the batch.
        row: usize,
    },
    /// tract cannot parse, type or run a graph.
    #[error("tract, {stage}: {reason}")]
    Tract {
        /// What it was doing.
        stage: &'static str,
        /// Its words.
        reason: String,
    },
}

/// Result of the runtime.
pub type Result<T> = std::result::Result<T, RuntimeError>;

impl RuntimeError {
    pub(super) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(super) fn config(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Config {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }
}
