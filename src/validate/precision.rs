//! What a model computes with, and how far results may differ for it.

use super::reference::Tolerance;
use crate::ir::{DataType, Model};

/// Largest allowed difference in units of the standard deviation. Quantised
/// layers round activations, so that the last bit of an input can move a whole
/// quantisation step.
pub(super) fn tolerance(dtype: DataType, quantised: bool) -> f64 {
    match dtype {
        // Half-precision activations on top: a rewritten graph that drops nothing is
        // already 0.13 off (the q4f16 form of models/forms).
        DataType::Float16 if quantised => 4e-1,
        _ if quantised => 2e-1,
        DataType::Float16 => 2e-2,
        DataType::Bfloat16 => 1e-1,
        _ => 1e-4,
    }
}

/// How close scores have to be for either of two tokens to be right.
pub(super) fn ties(dtype: DataType, quantised: bool) -> Tolerance {
    match dtype {
        _ if quantised => Tolerance::QUANTISED,
        DataType::Float16 => Tolerance::FP16,
        DataType::Bfloat16 => Tolerance::BF16,
        _ => Tolerance::FP32,
    }
}

/// The lowest floating-point precision among a graph's weights.
pub(super) fn precision(model: &Model) -> DataType {
    let weights = model
        .graph()
        .initializers
        .iter()
        .filter_map(|&v| model.value(v).initializer.as_ref());
    let mut lowest = DataType::Float;
    for tensor in weights.filter(|t| t.dims.len() > 1) {
        match tensor.dtype {
            DataType::Bfloat16 => return DataType::Bfloat16,
            DataType::Float16 => lowest = DataType::Float16,
            _ => {}
        }
    }
    lowest
}

/// The less precise of two types.
pub(super) fn lower(a: DataType, b: DataType) -> DataType {
    match (a, b) {
        (DataType::Bfloat16, _) | (_, DataType::Bfloat16) => DataType::Bfloat16,
        (DataType::Float16, _) | (_, DataType::Float16) => DataType::Float16,
        _ => DataType::Float,
    }
}

/// Whether a graph computes with quantised numbers. (Weights that are only stored
/// so count too: the runtime may fuse `DequantizeLinear` and `MatMul` into a kernel
/// that rounds activations.)
pub(super) fn quantised(model: &Model) -> bool {
    let ops = [
        "MatMulInteger",
        "MatMulNBits",
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
    ];
    model
        .graph()
        .nodes
        .iter()
        .any(|&n| ops.contains(&model.node(n).op_type.as_str()))
}
