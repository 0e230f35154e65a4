//! What is known of a value before anything runs.

use std::sync::Arc;

use crate::ir::model::Node;
use crate::ir::{DataType, Tensor};

/// Elements that are worked out here at most: enough for shapes, ranges and causal masks, not for weights.
pub(super) const LIMIT: usize = 1 << 16;

/// Floating-point numbers of a tensor that are looked at or worked out at most.
pub(super) const FEW: usize = 64;

/// Elements, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// Of an integer type or bool.
    Ints(Arc<[i64]>),
    /// Of fp32.
    Floats(Arc<[f32]>),
}

/// What is known of a value.
#[derive(Clone, Debug, Default)]
pub(super) struct Fact {
    /// Element type.
    pub(super) dtype: Option<DataType>,
    /// Dimensions, all of them.
    pub(super) shape: Option<Vec<i64>>,
    /// Elements.
    pub(super) data: Option<Data>,
    /// Whether each row along the last axis holds every number from 0 to its length.
    pub(super) permutes: bool,
}

impl Fact {
    /// Of a type and a shape.
    pub(super) fn of(dtype: Option<DataType>, shape: Vec<i64>) -> Self {
        Self {
            dtype,
            shape: Some(shape),
            data: None,
            permutes: false,
        }
    }

    /// Whether it holds no elements.
    pub(super) fn is_empty(&self) -> bool {
        self.shape.as_ref().is_some_and(|s| s.contains(&0))
    }

    /// As a constant, where that can be written.
    pub(super) fn tensor(&self) -> Option<Tensor> {
        let (dtype, dims) = (self.dtype?, self.shape.clone()?);
        if dims.contains(&0) {
            dtype.byte_len(0)?;
            return Some(Tensor::raw("", dtype, dims, Vec::new()));
        }
        let bytes: Vec<u8> = match (self.data.as_ref()?, dtype) {
            (Data::Ints(all), DataType::Int64) => {
                all.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            (Data::Ints(all), DataType::Int32) => {
                let narrow = all.iter().map(|v| i32::try_from(*v).ok());
                let narrow: Option<Vec<i32>> = narrow.collect();
                narrow?.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            (Data::Ints(all), DataType::Bool) => all.iter().map(|v| u8::from(*v != 0)).collect(),
            (Data::Floats(all), DataType::Float) => {
                all.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            _ => return None,
        };
        Some(Tensor::raw("", dtype, dims, bytes))
    }
}

/// Number of elements of a shape, up to [`LIMIT`].
pub(super) fn count(shape: &[i64]) -> Option<usize> {
    let product = |n: usize, d: &i64| n.checked_mul(usize::try_from(*d).ok()?);
    let count = shape.iter().try_fold(1usize, product)?;
    (count <= LIMIT).then_some(count)
}

/// An operator call with what is known of its inputs.
pub(super) struct Call<'a> {
    pub(super) node: &'a Node,
    pub(super) inputs: Vec<Option<&'a Fact>>,
}

impl<'a> Call<'a> {
    pub(super) fn fact(&self, slot: usize) -> Option<&'a Fact> {
        self.inputs.get(slot).copied().flatten()
    }

    pub(super) fn shape(&self, slot: usize) -> Option<&'a [i64]> {
        self.fact(slot)?.shape.as_deref()
    }

    pub(super) fn dtype(&self, slot: usize) -> Option<DataType> {
        self.fact(slot)?.dtype
    }

    pub(super) fn data(&self, slot: usize) -> Option<&'a Data> {
        self.fact(slot)?.data.as_ref()
    }

    /// Elements of an integer input.
    pub(super) fn ints(&self, slot: usize) -> Option<&'a [i64]> {
        match self.data(slot)? {
            Data::Ints(all) => Some(all),
            Data::Floats(_) => None,
        }
    }

    /// The one element of an integer input.
    pub(super) fn int(&self, slot: usize) -> Option<i64> {
        match self.ints(slot)? {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// Integers of an attribute, or of an input that has taken its place.
    pub(super) fn ints_of(&self, attribute: &str, slot: usize) -> Option<Vec<i64>> {
        let stated = self.node.attr_ints(attribute).map(<[i64]>::to_vec);
        stated.or_else(|| self.ints(slot).map(<[i64]>::to_vec))
    }

    pub(super) fn attribute(&self, name: &str, default: i64) -> i64 {
        self.node.attr_int(name).unwrap_or(default)
    }

    /// Whether the node is of the standard operators.
    pub(super) fn standard(&self) -> bool {
        self.node.domain.is_empty() || self.node.domain == "ai.onnx"
    }
}

/// An axis counted from the front.
pub(super) fn axis_of(axis: i64, rank: usize) -> Option<usize> {
    let rank_i = i64::try_from(rank).ok()?;
    let axis = if axis < 0 { axis + rank_i } else { axis };
    usize::try_from(axis).ok().filter(|a| *a < rank)
}

/// The shape that shapes broadcast to.
pub(super) fn broadcast(shapes: &[&[i64]]) -> Option<Vec<i64>> {
    let rank = shapes.iter().map(|s| s.len()).max()?;
    let mut out = vec![1; rank];
    for shape in shapes {
        let offset = rank - shape.len();
        for (at, &d) in shape.iter().enumerate() {
            let o = &mut out[offset + at];
            match (*o, d) {
                (a, b) if a == b => {}
                (1, b) => *o = b,
                (_, 1) => {}
                _ => return None,
            }
        }
    }
    Some(out)
}
