//! Types and shapes that operators give, for shapes of known numbers.
//!
//! Source: the operator specification of ONNX.

use super::fact::{Call, Fact, axis_of, broadcast};
use super::fused;
use crate::ir::DataType;
use crate::ir::model::AttrValue;

/// What is known of a node's outputs, elements apart. Shorter than the list of outputs where nothing is.
pub(super) fn infer(call: &Call<'_>) -> Vec<Fact> {
    let several = match call.standard() {
        true => several(call),
        false => fused::infer(call),
    };
    if let Some(facts) = several {
        return facts;
    }
    if !call.standard() {
        return Vec::new();
    }
    vec![Fact {
        dtype: dtype(call),
        shape: shape(call),
        ..Fact::default()
    }]
}

fn stated(call: &Call<'_>, attribute: &str) -> Option<DataType> {
    let code = i32::try_from(call.node.attr_int(attribute)?).ok()?;
    Some(DataType::from_code(code))
}

/// Element type of a node's only output.
fn dtype(call: &Call<'_>) -> Option<DataType> {
    match call.node.op_type.as_str() {
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => Some(DataType::Int64),
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Xor"
        | "Not" | "IsNaN" | "IsInf" => Some(DataType::Bool),
        "Cast" => stated(call, "to"),
        "CastLike" | "Where" => call.dtype(1),
        "MatMulInteger" | "ConvInteger" => Some(DataType::Int32),
        "ConstantOfShape" => Some(match call.node.attr("value") {
            Some(AttrValue::Tensor(t)) => t.dtype,
            _ => DataType::Float,
        }),
        "QuantizeLinear" => stated(call, "output_dtype")
            .filter(|d| *d != DataType::Undefined)
            .or_else(|| call.dtype(2))
            .or(Some(DataType::Uint8)),
        "DequantizeLinear" => stated(call, "output_dtype")
            .filter(|d| *d != DataType::Undefined)
            .or_else(|| call.dtype(1)),
        "Constant" => None,
        _ => call.dtype(0),
    }
}

/// Shape of a node's only output.
fn shape(call: &Call<'_>) -> Option<Vec<i64>> {
    let node = call.node;
    let own = || call.shape(0).map(<[i64]>::to_vec);
    match node.op_type.as_str() {
        "Identity"
        | "Cast"
        | "CastLike"
        | "Neg"
        | "Abs"
        | "Sqrt"
        | "Exp"
        | "Log"
        | "Erf"
        | "Cos"
        | "Sin"
        | "Tanh"
        | "Sigmoid"
        | "Reciprocal"
        | "Gelu"
        | "Softmax"
        | "LogSoftmax"
        | "Not"
        | "Relu"
        | "IsNaN"
        | "IsInf"
        | "CumSum"
        | "Clip"
        | "Floor"
        | "Ceil"
        | "Round"
        | "Sign"
        | "Softplus"
        | "HardSigmoid"
        | "HardSwish"
        | "Elu"
        | "LeakyRelu"
        | "Trilu"
        | "Swish"
        | "RMSNormalization"
        | "SimplifiedLayerNormalization"
        | "InstanceNormalization"
        | "GroupNormalization"
        | "RotaryEmbedding"
        | "QuantizeLinear"
        | "DequantizeLinear"
        | "ScatterND"
        | "ScatterElements"
        | "LpNormalization" => own(),
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "And" | "Or" | "Xor" | "Equal" | "Less"
        | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Where" | "Min" | "Max" | "Sum"
        | "Mean" | "PRelu" => {
            let shapes: Option<Vec<&[i64]>> =
                (0..call.inputs.len()).map(|i| call.shape(i)).collect();
            broadcast(&shapes?)
        }
        "MatMul" | "MatMulInteger" => matmul(call.shape(0)?, call.shape(1)?),
        "Gemm" => {
            let side = |slot: usize, transposed: &str| match call.shape(slot)? {
                [a, b] if call.attribute(transposed, 0) == 0 => Some((*a, *b)),
                [a, b] => Some((*b, *a)),
                _ => None,
            };
            Some(vec![side(0, "transA")?.0, side(1, "transB")?.1])
        }
        "Conv" | "ConvInteger" => convolution(call),
        "Shape" => {
            let rank = call.shape(0)?.len();
            let (start, end) = span(call, rank);
            Some(vec![i64::try_from(end.saturating_sub(start)).ok()?])
        }
        "Size" => Some(Vec::new()),
        "Reshape" => reshape(call),
        "Flatten" => {
            let shape = call.shape(0)?;
            let rank = i64::try_from(shape.len()).ok()?;
            let axis = call.attribute("axis", 1);
            let at = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()?;
            let (front, back) = shape.split_at_checked(at)?;
            Some(vec![front.iter().product(), back.iter().product()])
        }
        "Squeeze" => squeeze(call),
        "Unsqueeze" => {
            let axes = call.ints_of("axes", 1)?;
            let shape = call.shape(0)?;
            let rank = shape.len() + axes.len();
            let axes: Option<Vec<usize>> = axes.iter().map(|a| axis_of(*a, rank)).collect();
            let axes = axes?;
            let mut rest = shape.iter();
            (0..rank)
                .map(|at| {
                    if axes.contains(&at) {
                        Some(1)
                    } else {
                        rest.next().copied()
                    }
                })
                .collect()
        }
        "Transpose" => {
            let shape = call.shape(0)?;
            let perm = permutation(call, shape.len())?;
            Some(perm.into_iter().map(|p| shape[p]).collect())
        }
        "Concat" => {
            let mut out = own()?;
            let axis = axis_of(call.attribute("axis", 0), out.len())?;
            out[axis] = 0;
            for slot in 0..call.inputs.len() {
                out[axis] += *call.shape(slot)?.get(axis)?;
            }
            Some(out)
        }
        "Slice" => {
            let mut out = own()?;
            for (axis, range) in slices(call)? {
                out[axis] = range.count;
            }
            Some(out)
        }
        "Gather" => {
            let (data, indices) = (call.shape(0)?, call.shape(1)?);
            let axis = axis_of(call.attribute("axis", 0), data.len())?;
            Some([&data[..axis], indices, &data[axis + 1..]].concat())
        }
        "GatherElements" => call.shape(1).map(<[i64]>::to_vec),
        "GatherND" => {
            let (data, indices) = (call.shape(0)?, call.shape(1)?);
            let batch = usize::try_from(call.attribute("batch_dims", 0)).ok()?;
            let (last, lead) = indices.split_last()?;
            let rest = data.get(batch + usize::try_from(*last).ok()?..)?;
            Some([lead, rest].concat())
        }
        "Expand" => broadcast(&[call.shape(0)?, call.ints(1)?]),
        "Tile" => {
            let (shape, times) = (call.shape(0)?, call.ints(1)?);
            (shape.len() == times.len())
                .then(|| shape.iter().zip(times).map(|(d, t)| d * t).collect())
        }
        "Range" => super::values::range_length(call).map(|n| vec![n]),
        "ConstantOfShape" => call.ints(0).map(<[i64]>::to_vec),
        "Pad" => {
            let pads = call.ints_of("pads", 1)?;
            let shape = call.shape(0)?;
            let axes = match call.ints(3) {
                Some(axes) => axes
                    .iter()
                    .map(|a| axis_of(*a, shape.len()))
                    .collect::<Option<Vec<_>>>()?,
                None => (0..shape.len()).collect(),
            };
            let (front, back) = pads.split_at_checked(axes.len())?;
            let mut out = shape.to_vec();
            for ((axis, a), b) in axes.iter().zip(front).zip(back) {
                out[*axis] += a + b;
            }
            Some(out)
        }
        "ReduceSum" | "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1"
        | "ReduceL2" | "ReduceSumSquare" | "ReduceLogSumExp" => {
            let shape = call.shape(0)?;
            let axes = reduced(call)?;
            let keep = call.attribute("keepdims", 1) != 0;
            let each = shape.iter().enumerate();
            Some(
                each.filter_map(|(at, d)| match (axes.contains(&at), keep) {
                    (false, _) => Some(*d),
                    (true, keep) => keep.then_some(1),
                })
                .collect(),
            )
        }
        "ArgMax" | "ArgMin" => {
            let mut out = own()?;
            let axis = axis_of(call.attribute("axis", 0), out.len())?;
            if call.attribute("keepdims", 1) != 0 {
                out[axis] = 1;
            } else {
                out.remove(axis);
            }
            Some(out)
        }
        _ => None,
    }
}

/// Outputs of standard operators that have several.
fn several(call: &Call<'_>) -> Option<Vec<Fact>> {
    let known = |shape: Vec<i64>| Fact::of(call.dtype(0), shape);
    match call.node.op_type.as_str() {
        "Split" => {
            let shape = call.shape(0)?;
            let axis = axis_of(call.attribute("axis", 0), shape.len())?;
            let parts = i64::try_from(call.node.outputs.len()).ok()?;
            let sizes = call.ints_of("split", 1).or_else(|| {
                let each = (shape[axis] + parts - 1) / parts;
                let size = |at: i64| each.min(shape[axis] - at * each);
                Some((0..parts).map(size).collect())
            })?;
            let part = |size: i64| {
                let mut out = shape.to_vec();
                out[axis] = size;
                known(out)
            };
            Some(sizes.into_iter().map(part).collect())
        }
        "TopK" => {
            let mut out = call.shape(0)?.to_vec();
            let axis = axis_of(call.attribute("axis", -1), out.len())?;
            let k = call.int(1)?;
            let all = out[axis] == k && axis + 1 == out.len();
            out[axis] = k;
            let mut indices = Fact::of(Some(DataType::Int64), out.clone());
            indices.permutes = all;
            let mut values = known(out);
            values.permutes = all && call.fact(0)?.permutes;
            Some(vec![values, indices])
        }
        "LayerNormalization" => Some(vec![known(call.shape(0)?.to_vec())]),
        "DynamicQuantizeLinear" => {
            let shape = call.shape(0)?.to_vec();
            Some(vec![
                Fact::of(Some(DataType::Uint8), shape),
                Fact::of(Some(DataType::Float), Vec::new()),
                Fact::of(Some(DataType::Uint8), Vec::new()),
            ])
        }
        "Attention" => attention(call),
        _ => None,
    }
}

/// `Attention` of the standard operators.
fn attention(call: &Call<'_>) -> Option<Vec<Fact>> {
    let (query, key, value) = (call.shape(0)?, call.shape(1)?, call.shape(2)?);
    let past = match call.shape(4) {
        Some(past) => *past.get(2)?,
        None => 0,
    };
    let known = |shape: Vec<i64>| Fact::of(call.dtype(0), shape);
    let heads = |shape: &[i64], name: &str| match *shape {
        [b, h, t, d] => Some((b, h, t, d)),
        [b, t, all] => {
            let h = call.node.attr_int(name).filter(|h| *h > 0)?;
            Some((b, h, t, all / h))
        }
        _ => None,
    };
    let (b, hq, s, _) = heads(query, "q_num_heads")?;
    let (_, hk, t, dk) = heads(key, "kv_num_heads")?;
    let (_, _, _, dv) = heads(value, "kv_num_heads")?;
    let out = match query.len() {
        4 => vec![b, hq, s, dv],
        _ => vec![b, s, hq * dv],
    };
    Some(vec![
        known(out),
        known(vec![b, hk, past + t, dk]),
        known(vec![b, hk, past + t, dv]),
        known(vec![b, hq, s, past + t]),
    ])
}

/// Shape of a matrix product.
pub(super) fn matmul(a: &[i64], b: &[i64]) -> Option<Vec<i64>> {
    let (left, right): (Vec<i64>, Vec<i64>) = match (a.len(), b.len()) {
        (0, _) | (_, 0) => return None,
        (1, 1) => return Some(Vec::new()),
        (1, _) => (vec![1, a[0]], b.to_vec()),
        (_, 1) => (a.to_vec(), vec![b[0], 1]),
        _ => (a.to_vec(), b.to_vec()),
    };
    let (m, n) = (left[left.len() - 2], right[right.len() - 1]);
    let mut out = broadcast(&[&left[..left.len() - 2], &right[..right.len() - 2]])?;
    if a.len() > 1 {
        out.push(m);
    }
    if b.len() > 1 {
        out.push(n);
    }
    Some(out)
}

fn convolution(call: &Call<'_>) -> Option<Vec<i64>> {
    let (data, weight) = (call.shape(0)?, call.shape(1)?);
    let kernel = weight.get(2..)?;
    let sizes = data.get(2..)?;
    let list = |name: &str, default: i64, n: usize| {
        let stated = call.node.attr_ints(name).map(<[i64]>::to_vec);
        stated.unwrap_or_else(|| vec![default; n])
    };
    let strides = list("strides", 1, kernel.len());
    let dilations = list("dilations", 1, kernel.len());
    let pads = list("pads", 0, 2 * kernel.len());
    let mode = match call.node.attr("auto_pad") {
        Some(AttrValue::String(text)) => text.clone(),
        _ => "NOTSET".into(),
    };
    let mut out = vec![*data.first()?, *weight.first()?];
    for at in 0..kernel.len() {
        let (size, stride) = (*sizes.get(at)?, *strides.get(at)?);
        let reach = dilations.get(at)? * (kernel[at] - 1) + 1;
        out.push(match &mode[..] {
            b"SAME_UPPER" | b"SAME_LOWER" => (size + stride - 1) / stride,
            b"VALID" => (size - reach) / stride + 1,
            _ => {
                let padded = size + pads.get(at)? + pads.get(at + kernel.len())?;
                (padded - reach) / stride + 1
            }
        });
    }
    Some(out)
}

fn reshape(call: &Call<'_>) -> Option<Vec<i64>> {
    let (shape, target) = (call.shape(0)?, call.ints(1)?);
    let allow_zero = call.attribute("allowzero", 0) != 0;
    let mut out = Vec::with_capacity(target.len());
    for (at, &d) in target.iter().enumerate() {
        out.push(match d {
            0 if !allow_zero => *shape.get(at)?,
            d => d,
        });
    }
    if let Some(open) = out.iter().position(|d| *d == -1) {
        let all: i64 = shape.iter().product();
        let rest: i64 = out.iter().filter(|d| **d != -1).product();
        if rest == 0 || all % rest != 0 {
            return None;
        }
        out[open] = all / rest;
    }
    let same = out.iter().product::<i64>() == shape.iter().product::<i64>();
    (same && out.iter().all(|d| *d >= 0)).then_some(out)
}

fn squeeze(call: &Call<'_>) -> Option<Vec<i64>> {
    let shape = call.shape(0)?;
    let axes = match call.ints_of("axes", 1) {
        Some(axes) => axes
            .iter()
            .map(|a| axis_of(*a, shape.len()))
            .collect::<Option<Vec<_>>>()?,
        None if call.fact(1).is_some() => return None,
        None => (0..shape.len()).filter(|a| shape[*a] == 1).collect(),
    };
    let each = shape.iter().enumerate();
    Some(
        each.filter(|(at, _)| !axes.contains(at))
            .map(|(_, d)| *d)
            .collect(),
    )
}

/// Where a `Transpose` takes each axis from.
pub(super) fn permutation(call: &Call<'_>, rank: usize) -> Option<Vec<usize>> {
    match call.node.attr_ints("perm") {
        Some(perm) => perm
            .iter()
            .map(|p| usize::try_from(*p).ok().filter(|p| *p < rank))
            .collect(),
        None => Some((0..rank).rev().collect()),
    }
}

/// The dimensions that `Shape` gives.
pub(super) fn span(call: &Call<'_>, rank: usize) -> (usize, usize) {
    let rank_i = i64::try_from(rank).unwrap_or(i64::MAX);
    let clamp = |at: i64| {
        let at = if at < 0 { at + rank_i } else { at };
        usize::try_from(at.clamp(0, rank_i)).unwrap_or(0)
    };
    let (start, end) = (call.attribute("start", 0), call.attribute("end", rank_i));
    (clamp(start), clamp(end))
}

/// The axes that a `Reduce*` works on.
pub(super) fn reduced(call: &Call<'_>) -> Option<Vec<usize>> {
    let rank = call.shape(0)?.len();
    let given = call.fact(1).is_some();
    match call.ints_of("axes", 1) {
        None if given => None,
        Some(axes) if !axes.is_empty() => axes.iter().map(|a| axis_of(*a, rank)).collect(),
        _ if call.attribute("noop_with_empty_axes", 0) != 0 => Some(Vec::new()),
        _ => Some((0..rank).collect()),
    }
}

/// Elements that a `Slice` takes of an axis.
pub(super) struct Taken {
    pub(super) start: i64,
    pub(super) step: i64,
    pub(super) count: i64,
}

/// What a `Slice` takes, by axis.
pub(super) fn slices(call: &Call<'_>) -> Option<Vec<(usize, Taken)>> {
    let shape = call.shape(0)?;
    let (starts, ends) = (call.ints_of("starts", 1)?, call.ints_of("ends", 2)?);
    let given = |slot: usize| call.fact(slot).is_some();
    let axes = match call.ints_of("axes", 3) {
        Some(axes) => axes,
        None if given(3) => return None,
        None => (0..i64::try_from(starts.len()).ok()?).collect(),
    };
    let steps = match call.ints(4) {
        Some(steps) => steps.to_vec(),
        None if given(4) => return None,
        None => vec![1; starts.len()],
    };
    let mut all = Vec::new();
    for (((axis, start), end), step) in axes.iter().zip(starts).zip(ends).zip(steps) {
        let axis = axis_of(*axis, shape.len())?;
        let size = shape[axis];
        let from_end = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
        let (start, end) = (from_end(start), from_end(end));
        let (start, count) = match step {
            1.. => {
                let (start, end) = (start.clamp(0, size), end.clamp(0, size));
                (start, (end - start + step - 1).max(0) / step)
            }
            0 => return None,
            _ => {
                let (start, end) = (start.clamp(0, size - 1), end.clamp(-1, size - 1));
                (start, (start - end - step - 1).max(0) / -step)
            }
        };
        all.push((axis, Taken { start, step, count }));
    }
    Some(all)
}
