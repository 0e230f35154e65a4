//! Reading constants: initializers, `Constant` nodes and what merely passes
//! them on.

use super::model::{AttrValue, Model};
use super::{DataType, Tensor, ValueId};

/// The constant a value holds, seen through `Identity` and `Cast`-free chains.
pub fn constant(model: &Model, value: ValueId) -> Option<Tensor> {
    let mut at = value;
    for _ in 0..16 {
        if let Some(tensor) = &model.value(at).initializer {
            return Some(tensor.clone());
        }
        let node = model.producer_node(at)?;
        if node.is("Identity") {
            at = node.input(0)?;
            continue;
        }
        if !node.is("Constant") {
            return None;
        }
        let attribute = node.attributes.first()?;
        return Some(match &attribute.value {
            AttrValue::Tensor(t) => t.clone(),
            AttrValue::Int(i) => Tensor::i64_scalar("", *i),
            AttrValue::Ints(list) => Tensor::i64s("", list),
            AttrValue::Float(f) => Tensor::f32_scalar("", *f),
            _ => return None,
        });
    }
    None
}

/// Integers a value holds, if it is a constant of an integer type, or what an exporter that folds
/// nothing makes of several: other axes, another integer type, one after the other.
pub fn ints(model: &Model, value: ValueId) -> Option<Vec<i64>> {
    unfolded(model, value, &mut { MOST_NODES })
}

/// Nodes that are looked at behind a value: a shape takes a few, and a graph made to be slow would have one read many
/// times over.
const MOST_NODES: usize = 64;

fn unfolded(model: &Model, value: ValueId, left: &mut usize) -> Option<Vec<i64>> {
    if let Some(tensor) = constant(model, value) {
        return tensor.to_i64s(model.external()).ok();
    }
    *left = left.checked_sub(1)?;
    let node = model.producer_node(value)?;
    let mut part = |value: ValueId| unfolded(model, value, left);
    let to = |code: i64| {
        let dtype = i32::try_from(code).map(DataType::from_code);
        matches!(dtype, Ok(DataType::Int32 | DataType::Int64))
    };
    match node.op_type.as_str() {
        "Unsqueeze" | "Squeeze" => part(node.input(0)?),
        "Cast" if node.attr_int("to").is_some_and(to) => part(node.input(0)?),
        "Concat" if node.attr_int("axis") == Some(0) => {
            let mut all = Vec::new();
            for input in &node.inputs {
                all.extend(part((*input)?)?);
            }
            Some(all)
        }
        _ => None,
    }
}

/// The integer a value holds, if it is a constant of one element.
pub fn int(model: &Model, value: ValueId) -> Option<i64> {
    match ints(model, value)?.as_slice() {
        [one] => Some(*one),
        _ => None,
    }
}

/// The number a value holds, if it is a floating-point constant of one element.
pub fn float(model: &Model, value: ValueId) -> Option<f64> {
    match constant(model, value)?
        .to_f64s(model.external())
        .ok()?
        .as_slice()
    {
        [one] => Some(*one),
        _ => None,
    }
}

/// Dimensions of a constant, without loading its data.
pub fn dims(model: &Model, value: ValueId) -> Option<Vec<i64>> {
    Some(constant(model, value)?.dims)
}

/// Dimensions of a value where they are all known from the file.
pub fn known_rank(model: &Model, value: ValueId) -> Option<usize> {
    if let Some(dims) = dims(model, value) {
        return Some(dims.len());
    }
    model.value(value).ty.as_ref()?.shape().map(<[_]>::len)
}
