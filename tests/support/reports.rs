//! What `duet validate` finds, without the command line.

use duet_onnx::arch::Vlm;
use duet_onnx::validate::{Options, Report, check};

use super::models::{options, recipe, runtime};

/// What is found of a model that is said to be what the recipe makes of `base`; `seed` makes the inputs.
pub(crate) fn validated(base: &Vlm, made: &Vlm, text: &str, seed: u64) -> Report {
    runtime();
    let options = Options {
        session: options(),
        seed,
    };
    let report = check(base, made, &recipe(text), &options, &mut |_| ());
    report.unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// The checks that failed, and how.
pub(crate) fn failures(report: &Report) -> Vec<String> {
    let failed = report.findings.iter().filter(|f| !f.passed);
    failed
        .map(|f| format!("{}: {}", f.check, f.detail))
        .collect()
}
