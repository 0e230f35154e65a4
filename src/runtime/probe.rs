//! Looking inside a model: the same graph with more outputs, opened from memory.

use super::error::Result;
use super::session::{Session, SessionOptions};
use crate::ir::{DataType, IrError, Model, Patch, ValueId, ValueType, Verified};
use crate::onnx::serialize;

/// For probed outputs: the type is the runtime's to infer.
pub const INFERRED: ValueType = ValueType::Tensor {
    dtype: DataType::Undefined,
    shape: None,
};

/// The model with further outputs, in a patch named `probe`. Values that come out already, or are named twice, are
/// added once.
///
/// # Errors
/// The patch does not fit (a value of another model).
pub fn with_outputs(model: &Model, values: &[ValueId]) -> std::result::Result<Model, IrError> {
    let mut patch = Patch::new(model, "probe");
    for (i, &value) in values.iter().enumerate() {
        if !model.is_output(value) && !values[..i].contains(&value) {
            patch.add_output(value, INFERRED);
        }
    }
    let plan = patch.finish();
    model.clone().apply(plan)
}

/// Opens a model that exists only in memory; external data is found where the original's is. `name` appears in
/// messages.
///
/// # Errors
/// ONNX Runtime is not there or refuses the model.
pub fn open(model: Verified<'_>, name: &str, options: &SessionOptions) -> Result<Session> {
    let mut options = options.clone();
    options.data_dir = model.model().external().directory();
    Session::from_bytes(&serialize(model).to_vec(), name, &options)
}
