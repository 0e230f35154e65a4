//! Findings of a validation.

use serde::Serialize;

use super::ValidateError;

/// One check and its outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was checked.
    pub check: String,
    /// Whether it held.
    pub passed: bool,
    /// Numbers, or what was expected and found.
    pub detail: String,
}

/// The outcome of a validation.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Version of this structure.
    pub schema_version: u32,
    /// Checks in order.
    pub findings: Vec<Finding>,
    /// Largest difference of last-row logits from the reference, in units of
    /// their standard deviation.
    pub worst_logits: f64,
    /// The same for merged features.
    pub worst_features: f64,
    /// The limit that both were held to: of the least precise model, if there are several.
    pub tolerance: f64,
}

impl Report {
    pub(super) fn new() -> Self {
        Self {
            schema_version: 1,
            ..Self::default()
        }
    }

    pub(super) fn add(
        &mut self,
        check: impl Into<String>,
        passed: bool,
        detail: impl Into<String>,
    ) {
        self.findings.push(Finding {
            check: check.into(),
            passed,
            detail: detail.into(),
        });
    }

    /// What was opened to be compared; that the rewritten model cannot be opened is a finding.
    ///
    /// # Errors
    /// Everything else that came between.
    pub(super) fn opened<T>(
        &mut self,
        label: &str,
        outcome: Result<T, ValidateError>,
    ) -> Result<Option<T>, ValidateError> {
        match outcome {
            Err(problem @ ValidateError::Rewritten(_)) => {
                self.add(format!("{label}opens"), false, problem.to_string());
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    /// Whether every check held.
    pub fn passed(&self) -> bool {
        self.findings.iter().all(|f| f.passed)
    }
}
