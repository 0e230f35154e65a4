//! Looking inside a model: the same graph with more outputs.

use crate::ir::{DataType, Model, Patch, ValueId, ValueType, verify};
use crate::onnx::serialize;
use crate::runtime::{Session, SessionOptions};

use super::ValidateError;

/// For probed outputs: the type is the runtime's to infer.
pub(super) const INFERRED: ValueType = ValueType::Tensor {
    dtype: DataType::Undefined,
    shape: None,
};

/// The model with further outputs, in a patch named `probe`.
pub(super) fn with_outputs(model: &Model, values: &[ValueId]) -> Result<Model, ValidateError> {
    let mut patch = Patch::new(model, "probe");
    for (i, &value) in values.iter().enumerate() {
        if !model.is_output(value) && !values[..i].contains(&value) {
            patch.add_output(value, INFERRED);
        }
    }
    let plan = patch.finish();
    Ok(model.clone().apply(plan)?)
}

/// Opens a model that exists only in memory; external data is found where the
/// original's is.
pub(super) fn open(
    model: &Model,
    name: &str,
    options: &SessionOptions,
) -> Result<Session, ValidateError> {
    let bytes = serialize(verify(model)?).to_vec();
    let mut options = options.clone();
    options.data_dir = model.external().directory();
    Ok(Session::from_bytes(&bytes, name, &options)?)
}

/// The same of the rewritten model.
pub(super) fn open_rewritten(
    model: &Model,
    name: &str,
    options: &SessionOptions,
) -> Result<Session, ValidateError> {
    open(model, name, options).map_err(ValidateError::of_rewritten)
}
