//! Evaluating the small scalar expressions that exporters build for attention
//! scales: constants, roots and quotients, and the head width read off a shape.

use crate::ir::{Model, ValueId, consts};

/// Expressions nested deeper than this are not scales.
const DEPTH: usize = 16;

/// The number that `value` holds, if it is a scalar computed from constants and
/// from the size of the last axis of some tensor, which `last_axis` supplies.
pub(super) fn evaluate(model: &Model, value: ValueId, last_axis: Option<i64>) -> Option<f64> {
    eval(model, value, last_axis, DEPTH)
}

fn eval(model: &Model, value: ValueId, last: Option<i64>, depth: usize) -> Option<f64> {
    let depth = depth.checked_sub(1)?;
    if let Some(number) = consts::float(model, value) {
        return Some(number);
    }
    if let Some(number) = consts::int(model, value) {
        return Some(number as f64);
    }
    let node = model.producer_node(value)?;
    let arg = |slot: usize| eval(model, node.input(slot)?, last, depth);
    Some(match node.op_type.as_str() {
        "Sqrt" => arg(0)?.sqrt(),
        "Reciprocal" => 1.0 / arg(0)?,
        "Mul" => arg(0)? * arg(1)?,
        "Div" => arg(0)? / arg(1)?,
        "Pow" => arg(0)?.powf(arg(1)?),
        "Cast" | "Squeeze" | "Unsqueeze" | "Identity" | "Reshape" | "CastLike" => arg(0)?,
        "Gather" | "Slice" if shape_of(model, node.input(0)?) => {
            let at = *consts::ints(model, node.input(1)?)?.first()?;
            if at == -1 || at == 3 {
                last? as f64
            } else {
                return None;
            }
        }
        "Shape" if node.attr_int("start") == Some(-1) || node.attr_int("start") == Some(3) => {
            last? as f64
        }
        _ => return None,
    })
}

fn shape_of(model: &Model, value: ValueId) -> bool {
    model.producer_node(value).is_some_and(|n| n.is("Shape"))
}
