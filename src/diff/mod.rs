//! `duet diff`: what changed between two models, in terms of what they compute.
//!
//! ```text
//! two paths ─▶ files, paired ─▶ configs: JSON key by key
//!                            └▶ models: contract, versions, metadata ─▶ constants by content
//!                                 ─▶ nodes matched ─▶ matched pairs compared ─▶ changes, grouped
//! ```
//!
//! Matching only proposes which node corresponds to which; whether two
//! corresponding nodes are the same is then looked at element by element (operator,
//! every attribute, every input, every constant's contents), so that no hash, name
//! or heuristic can make a changed model equal.

mod annotations;
mod attributes;
mod change;
mod compare;
mod content;
mod context;
mod defaults;
mod error;
mod files;
mod hash;
mod header;
mod json;
mod layers;
mod matching;
mod model;
pub mod policy;
mod regions;
pub mod render;
mod report;
mod side;
mod storage;
mod sweep;
mod textconv;
mod weights;

use std::path::Path;

use crate::ir::Model;

pub use error::DiffError;
pub use model::ModelDiff;
pub use report::{
    Change, Class, Context, ContextNode, FileKind, FileReport, Kind, ModelFacts, NodeState, Place,
    Presence, Renames, Report, SCHEMA_VERSION, Spot, StorageNote, Verdict, WeightChange,
};
pub use textconv::{of_model, textconv};

/// How to compare.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Relative tolerance for weights: elements with |b − a| ≤ atol + rtol·|a| are
    /// taken as equal. A weight change within tolerance is reported as ignored.
    pub rtol: f64,
    /// Absolute tolerance for weights.
    pub atol: f64,
    /// How many nodes away from a change its [`Context`] reaches; 0 leaves contexts out.
    pub context: usize,
    /// Threads that read weights; 0: one for each core.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rtol: 0.0,
            atol: 0.0,
            context: 0,
            threads: 0,
        }
    }
}

/// Compares two model files, two directories, or two files of any other kind.
///
/// # Errors
/// A path that does not exist or cannot be read, a file and a directory, or a
/// model that is damaged or whose external data is missing.
pub fn compare(a: &Path, b: &Path, options: &Options) -> Result<Report, DiffError> {
    let mut report = Report {
        schema_version: SCHEMA_VERSION,
        duet: env!("CARGO_PKG_VERSION").to_owned(),
        a: a.display().to_string(),
        b: b.display().to_string(),
        verdict: Verdict::Identical,
        counts: Default::default(),
        ignored: 0,
        policy: None,
        files: files::compare(a, b, options)?,
    };
    report.settle();
    Ok(report)
}

/// Compares two models in memory.
///
/// # Errors
/// External data that cannot be read.
pub fn compare_models(a: &Model, b: &Model, options: &Options) -> Result<ModelDiff, DiffError> {
    model::models((a, None), (b, None), options)
}
