//! Errors of the graph core.

/// What can go wrong with a model in memory.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum IrError {
    #[error(
        "the name '{name}' is defined twice in graph '{graph}'; in ONNX every value has one definition"
    )]
    Duplicate { name: String, graph: String },
    #[error("tensor '{tensor}': {reason}")]
    Tensor { tensor: String, reason: String },
    #[error("external data '{location}': {reason}")]
    External { location: String, reason: String },
    #[error("patch of pass '{pass}': {reason}")]
    Patch { pass: String, reason: String },
    #[error("the graph has a cycle through {node}")]
    Cycle { node: String },
    #[error("{}", report(violations))]
    Invalid { violations: Vec<super::Violation> },
}

fn report(violations: &[super::Violation]) -> String {
    use std::fmt::Write;
    let mut text = format!("the model breaks {} invariant(s):", violations.len());
    for v in violations.iter().take(20) {
        let _ = write!(text, "\n  {v}");
    }
    if violations.len() > 20 {
        let _ = write!(text, "\n  … and {} more", violations.len() - 20);
    }
    text
}
