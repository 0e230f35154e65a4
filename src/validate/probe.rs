//! Looking inside a model, with the errors of a validation.

use crate::ir::{Model, ValueId, verify};
use crate::runtime::{Session, SessionOptions, probe};

use super::ValidateError;

pub(super) use crate::runtime::probe::INFERRED;

/// The model with further outputs, in a patch named `probe`.
pub(super) fn with_outputs(model: &Model, values: &[ValueId]) -> Result<Model, ValidateError> {
    Ok(probe::with_outputs(model, values)?)
}

/// Opens a model that exists only in memory; external data is found where the
/// original's is.
pub(super) fn open(
    model: &Model,
    name: &str,
    options: &SessionOptions,
) -> Result<Session, ValidateError> {
    Ok(probe::open(verify(model)?, name, options)?)
}

/// The same of the rewritten model.
pub(super) fn open_rewritten(
    model: &Model,
    name: &str,
    options: &SessionOptions,
) -> Result<Session, ValidateError> {
    open(model, name, options).map_err(ValidateError::of_rewritten)
}
