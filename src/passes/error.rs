//! Errors of recipes and passes.

use crate::ir::IrError;

/// What can go wrong between a recipe and a rewritten model.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PassError {
    #[error("recipe: {0}")]
    Recipe(String),
    #[error("{pass}: {problem}")]
    Requires { pass: &'static str, problem: String },
    #[error("{pass}: {file}: {problem}")]
    Unsupported {
        pass: &'static str,
        file: String,
        problem: String,
    },
    #[error("{pass}: after the pass, {file}: {problem} (a bug in the pass; please report it)")]
    Ensures {
        pass: &'static str,
        file: String,
        problem: String,
    },
    #[error("{pass}: {file}: {source}")]
    Graph {
        pass: &'static str,
        file: String,
        source: IrError,
    },
    #[error(
        "{file} was rewritten before, by duet {version} with the recipe below; rewrite the original model \
         instead\n{recipe}"
    )]
    Rewritten {
        file: String,
        version: String,
        recipe: String,
    },
}
