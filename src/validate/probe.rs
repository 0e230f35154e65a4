//! Looking inside a model, with the errors of a validation.

use crate::ir::{Model, verify};
use crate::runtime::{Session, SessionOptions, probe};

use super::ValidateError;

pub(super) use crate::runtime::probe::{INFERRED, with_outputs};

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
