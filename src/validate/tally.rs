//! What the comparison of two running models adds up to.

use ndarray::{Array2, s};

use super::ValidateError;
use super::reference::{StepOut, Tolerance};
use super::report::Report;
use crate::runtime::Tensor;

/// What a comparison has seen so far.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) logits: f64,
    pub(super) feature: f64,
    pub(super) steps: usize,
    pub(super) kept: usize,
    pub(super) near_ties: usize,
    pub(super) problems: Vec<String>,
}

impl Tally {
    /// Goes on without what the rewritten model did not give: that is a finding, like other numbers.
    ///
    /// # Errors
    /// Everything else that came between.
    pub(super) fn ran(&mut self, outcome: Result<(), ValidateError>) -> Result<(), ValidateError> {
        match outcome {
            Err(problem @ ValidateError::Rewritten(_)) => {
                self.problems.push(problem.to_string());
                Ok(())
            }
            other => other,
        }
    }

    /// The finding of a scenario.
    pub(super) fn report(&self, name: String, limit: f64, ties: Tolerance, report: &mut Report) {
        report.tolerance = report.tolerance.max(limit);
        report.worst_logits = report.worst_logits.max(self.logits);
        report.worst_features = report.worst_features.max(self.feature);
        let passed = self.problems.is_empty() && self.logits <= limit && self.feature <= limit;
        let mut detail = format!(
            "features {:.1e} σ, logits {:.1e} σ over {} steps, {} kept sets equal",
            self.feature, self.logits, self.steps, self.kept
        );
        if self.near_ties > 0 {
            detail.push_str(&format!(
                ", {} near-ties (within {:.0e} of the cut-off score) decided as the graph did",
                self.near_ties, ties.0
            ));
        }
        for problem in &self.problems {
            detail.push_str("; ");
            detail.push_str(problem);
        }
        report.add(name, passed, detail);
    }

    /// Compares features; `gone` says which were discarded, where they bear marks.
    pub(super) fn features(
        &mut self,
        want: &Array2<f32>,
        found: &Tensor,
        gone: Option<&[bool]>,
    ) -> Result<(), ValidateError> {
        let all = found.to_array()?.into_dimensionality::<ndarray::Ix2>();
        let all = all.map_err(|e| ValidateError::Model(e.to_string()))?;
        let width = all.ncols() - usize::from(gone.is_some());
        if (all.nrows(), width) != want.dim() {
            self.problems.push(format!(
                "features are {:?}, expected {:?}",
                all.dim(),
                want.dim()
            ));
            return Ok(());
        }
        if let Some(gone) = gone {
            let expected = gone.iter().map(|g| if *g { 2.0 } else { 1.0 });
            let mut marks = all.column(width).into_iter().zip(expected);
            if let Some((found, want)) = marks.find(|(m, want)| (*m - want).abs() > f32::EPSILON) {
                self.problems.push(format!(
                    "the marker channel of a feature is {found}, not {want}"
                ));
            }
        }
        let (worst, _) = difference(want, &all.slice(s![.., ..width]).to_owned());
        self.feature = self.feature.max(worst);
        Ok(())
    }

    pub(super) fn step(
        &mut self,
        want: &StepOut,
        logits: &Array2<f32>,
        kept: &[Vec<Vec<usize>>],
        lengths: &[usize],
    ) {
        self.steps += 1;
        self.near_ties += want.near_ties;
        let (worst, finite) = difference(&want.logits, logits);
        self.logits = self.logits.max(worst);
        if !finite {
            self.problems
                .push(format!("step {}: logits are not finite", self.steps));
        }
        if want.lengths != lengths {
            let problem = format!(
                "step {}: cache lengths {lengths:?}, expected {:?}",
                self.steps, want.lengths
            );
            self.problems.push(problem);
        }
        for (drop, (want, found)) in want.kept.iter().zip(kept).enumerate() {
            if want == found {
                self.kept += 1;
            } else {
                self.problems.push(format!(
                    "step {}: another set is kept at drop {}",
                    self.steps,
                    drop + 1
                ));
            }
        }
        if want.kept.len() != kept.len() {
            self.problems
                .push("the kept indices cannot be read off the rewritten graph".into());
        }
    }
}

/// Largest difference in standard deviations of `want`, and whether all is
/// finite.
pub(super) fn difference(want: &Array2<f32>, found: &Array2<f32>) -> (f64, bool) {
    let mean = want.iter().map(|v| f64::from(*v)).sum::<f64>() / want.len().max(1) as f64;
    let variance = want
        .iter()
        .map(|v| (f64::from(*v) - mean).powi(2))
        .sum::<f64>();
    let deviation = (variance / want.len().max(1) as f64).sqrt().max(1e-30);
    let worst = want
        .iter()
        .zip(found)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
        .fold(0.0, f64::max);
    let finite = want.iter().chain(found).all(|v| v.is_finite());
    (
        if finite {
            worst / deviation
        } else {
            f64::INFINITY
        },
        finite,
    )
}
