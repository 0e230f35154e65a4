//! Inserting standard operators, in the form the model's opset wants them.
//!
//! Opset 13 is the floor: from there `Squeeze`/`Unsqueeze`/`ReduceSum` take
//! their axes as inputs and `Softmax` works on one axis.

use super::patch::{Patch, int, ints};
use super::{DataType, Tensor, ValueId};

/// A size that is known when the graph is rewritten, or computed when it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// Known.
    Known(i64),
    /// An int64 tensor of shape `[1]`.
    Value(ValueId),
}

impl Patch<'_> {
    /// Inserts a standard operator with one output.
    pub fn op(&mut self, op_type: &str, inputs: &[ValueId]) -> ValueId {
        self.op_with(op_type, inputs, vec![])
    }

    /// Inserts a standard operator with attributes and one output.
    pub fn op_with(
        &mut self,
        op_type: &str,
        inputs: &[ValueId],
        attributes: Vec<super::Attribute>,
    ) -> ValueId {
        let inputs: Vec<Option<ValueId>> = inputs.iter().copied().map(Some).collect();
        self.node("", op_type, &inputs, 1, attributes)[0]
    }

    /// A 1-D int64 constant.
    pub fn i64s(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::i64s("", values))
    }

    /// A scalar int64 constant.
    pub fn i64(&mut self, value: i64) -> ValueId {
        self.constant(Tensor::i64_scalar("", value))
    }

    /// A scalar float constant.
    pub fn f32(&mut self, value: f32) -> ValueId {
        self.constant(Tensor::f32_scalar("", value))
    }

    /// `Cast`.
    pub fn cast(&mut self, x: ValueId, to: DataType) -> ValueId {
        self.op_with("Cast", &[x], vec![int("to", i64::from(to.code()))])
    }

    /// `Transpose`.
    pub fn transpose(&mut self, x: ValueId, perm: &[i64]) -> ValueId {
        self.op_with("Transpose", &[x], vec![ints("perm", perm)])
    }

    /// `Concat`.
    pub fn concat(&mut self, parts: &[ValueId], axis: i64) -> ValueId {
        match parts {
            [one] => *one,
            _ => self.op_with("Concat", parts, vec![int("axis", axis)]),
        }
    }

    /// `Gather`.
    pub fn gather(&mut self, x: ValueId, indices: ValueId, axis: i64) -> ValueId {
        self.op_with("Gather", &[x, indices], vec![int("axis", axis)])
    }

    /// `Unsqueeze`.
    pub fn unsqueeze(&mut self, x: ValueId, axes: &[i64]) -> ValueId {
        let axes = self.i64s(axes);
        self.op("Unsqueeze", &[x, axes])
    }

    /// `Squeeze`.
    pub fn squeeze(&mut self, x: ValueId, axes: &[i64]) -> ValueId {
        let axes = self.i64s(axes);
        self.op("Squeeze", &[x, axes])
    }

    /// `Reshape` to constant dims (0 keeps a dimension, −1 infers one).
    pub fn reshape(&mut self, x: ValueId, dims: &[i64]) -> ValueId {
        let dims = self.i64s(dims);
        self.op("Reshape", &[x, dims])
    }

    /// `ReduceSum`.
    pub fn reduce_sum(&mut self, x: ValueId, axes: &[i64], keep: bool) -> ValueId {
        let axes = self.i64s(axes);
        self.op_with("ReduceSum", &[x, axes], vec![int("keepdims", keep.into())])
    }

    /// `ReduceMean`, `ReduceMax` or `ReduceMin`, whose axes became an input
    /// with opset 18.
    pub fn reduce(&mut self, op_type: &str, x: ValueId, axes: &[i64], keep: bool) -> ValueId {
        let keepdims = int("keepdims", keep.into());
        if self.opset() >= 18 {
            let axes = self.i64s(axes);
            self.op_with(op_type, &[x, axes], vec![keepdims])
        } else {
            self.op_with(op_type, &[x], vec![ints("axes", axes), keepdims])
        }
    }

    /// `Softmax` over the last axis.
    pub fn softmax(&mut self, x: ValueId) -> ValueId {
        self.op_with("Softmax", &[x], vec![int("axis", -1)])
    }

    /// `TopK` over the last axis: (values, indices), sorted; equal values come
    /// with the lower index first (the operator's rule).
    pub fn top_k(&mut self, x: ValueId, k: Size, largest: bool) -> (ValueId, ValueId) {
        let k = self.size_value(k);
        let attributes = vec![
            int("axis", -1),
            int("largest", largest.into()),
            int("sorted", 1),
        ];
        let out = self.node("", "TopK", &[Some(x), Some(k)], 2, attributes);
        (out[0], out[1])
    }

    /// Sorts int64 indices `[…, k]` ascending along the last axis.
    pub fn sort_ascending(&mut self, indices: ValueId, k: Size) -> ValueId {
        self.top_k(indices, k, false).0
    }

    /// Rows of `x [B, L, …]` at `indices [B, K]` → `[B, K, …]`.
    ///
    /// `GatherND` with one batch dimension: no index is expanded over the
    /// feature width.
    pub fn gather_rows(&mut self, x: ValueId, indices: ValueId) -> ValueId {
        let indices = self.unsqueeze(indices, &[2]);
        self.op_with("GatherND", &[x, indices], vec![int("batch_dims", 1)])
    }

    /// `Slice` of one axis.
    pub fn slice(&mut self, x: ValueId, start: Size, end: Size, axis: i64) -> ValueId {
        let (start, end) = (self.size_value(start), self.size_value(end));
        let axes = self.i64s(&[axis]);
        self.op("Slice", &[x, start, end, axes])
    }

    /// A size as an int64 tensor of shape `[1]`.
    pub fn size_value(&mut self, size: Size) -> ValueId {
        match size {
            Size::Known(n) => self.i64s(&[n]),
            Size::Value(v) => v,
        }
    }

    /// A size as an int64 scalar.
    pub fn size_scalar(&mut self, size: Size) -> ValueId {
        match size {
            Size::Known(n) => self.i64(n),
            Size::Value(v) => self.squeeze(v, &[0]),
        }
    }

    /// Size of `x` along `axis`, computed when the graph runs.
    pub fn size_of(&mut self, x: ValueId, axis: i64) -> Size {
        let shape = self.op("Shape", &[x]);
        let at = self.i64s(&[axis]);
        Size::Value(self.gather(shape, at, 0))
    }

    /// `[0, 1, …, n−1]`, int64.
    pub fn iota(&mut self, n: Size) -> ValueId {
        if let Size::Known(n) = n {
            let all: Vec<i64> = (0..n).collect();
            return self.i64s(&all);
        }
        let (zero, one) = (self.i64(0), self.i64(1));
        let n = self.size_scalar(n);
        self.op("Range", &[zero, n, one])
    }

    fn arithmetic(&mut self, op: &str, a: Size, b: Size, f: fn(i64, i64) -> i64) -> Size {
        if let (Size::Known(a), Size::Known(b)) = (a, b) {
            return Size::Known(f(a, b));
        }
        let (a, b) = (self.size_value(a), self.size_value(b));
        Size::Value(self.op(op, &[a, b]))
    }

    /// a + b
    pub fn size_add(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Add", a, b, |a, b| a + b)
    }

    /// a − b
    pub fn size_sub(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Sub", a, b, |a, b| a - b)
    }

    /// a · b
    pub fn size_mul(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Mul", a, b, |a, b| a * b)
    }

    /// ⌊a / b⌋ of sizes that are not negative; b is positive.
    pub fn size_div(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Div", a, b, |a, b| a / b)
    }

    /// min(a, b)
    pub fn size_min(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Min", a, b, i64::min)
    }

    /// max(a, b)
    pub fn size_max(&mut self, a: Size, b: Size) -> Size {
        self.arithmetic("Max", a, b, i64::max)
    }
}
