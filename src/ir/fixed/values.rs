//! What integer arithmetic over shapes gives, element by element.
//!
//! Of floating-point numbers only few are worked out, by operations that IEEE 754 rounds correctly, so that a folded
//! number is the one that a runtime would compute.

use std::sync::Arc;

use super::fact::{Call, Data, FEW, Fact, LIMIT, axis_of, count};
use super::shapes::{permutation, reduced, slices, span};
use crate::ir::DataType;
use crate::ir::model::AttrValue;

/// Elements of a node's first output, of the type and shape in `fact`, where they follow from what is known.
pub(super) fn evaluate(call: &Call<'_>, fact: &Fact) -> Option<Data> {
    if !call.standard() {
        return None;
    }
    let shape = fact.shape.as_deref()?;
    let n = count(shape)?;
    let dtype = fact.dtype?;
    let data = match dtype {
        DataType::Int64 | DataType::Int32 | DataType::Bool => {
            Data::Ints(ints(call, shape, n, dtype)?.into())
        }
        DataType::Float if n <= FEW => Data::Floats(floats(call, shape, n)?.into()),
        _ => return None,
    };
    let length = match &data {
        Data::Ints(all) => all.len(),
        Data::Floats(all) => all.len(),
    };
    (length == n).then_some(data)
}

/// Length of a `Range`.
pub(super) fn range_length(call: &Call<'_>) -> Option<i64> {
    match (call.data(0)?, call.data(1)?, call.data(2)?) {
        (Data::Ints(a), Data::Ints(b), Data::Ints(d)) => {
            let (a, b, d) = (*a.first()?, *b.first()?, *d.first()?);
            match d {
                0 => None,
                1.. => Some((b - a + d - 1).max(0) / d),
                _ => Some((a - b - d - 1).max(0) / -d),
            }
        }
        (Data::Floats(a), Data::Floats(b), Data::Floats(d)) => {
            let (a, b, d) = (
                f64::from(*a.first()?),
                f64::from(*b.first()?),
                f64::from(*d.first()?),
            );
            let n = ((b - a) / d).ceil().max(0.0);
            #[allow(clippy::cast_possible_truncation, reason = "bounded in the line below")]
            (n < LIMIT as f64).then_some(n as i64)
        }
        _ => None,
    }
}

fn ints(call: &Call<'_>, shape: &[i64], n: usize, dtype: DataType) -> Option<Vec<i64>> {
    let op = call.node.op_type.as_str();
    if let Some(moved) = moved(call, shape, n) {
        let source = call.ints(moved.slot)?;
        return moved.from.iter().map(|i| source.get(*i).copied()).collect();
    }
    Some(match op {
        "Shape" => {
            let shape = call.shape(0)?;
            let (start, end) = span(call, shape.len());
            shape.get(start..end.max(start))?.to_vec()
        }
        "Size" => vec![call.shape(0)?.iter().product()],
        "Cast" | "CastLike" => cast(call.data(0)?, dtype)?,
        "Add" => binary(call, shape, i64::checked_add)?,
        "Sub" => binary(call, shape, i64::checked_sub)?,
        "Mul" => binary(call, shape, i64::checked_mul)?,
        "Div" => binary(call, shape, i64::checked_div)?,
        "Mod" if call.attribute("fmod", 0) == 0 => {
            // The sign is the divisor's.
            binary(call, shape, |a, b| {
                let rest = a.checked_rem(b)?;
                Some(if rest != 0 && (rest < 0) != (b < 0) {
                    rest + b
                } else {
                    rest
                })
            })?
        }
        "Equal" => binary(call, shape, |a, b| Some(i64::from(a == b)))?,
        "Less" => binary(call, shape, |a, b| Some(i64::from(a < b)))?,
        "LessOrEqual" => binary(call, shape, |a, b| Some(i64::from(a <= b)))?,
        "Greater" => binary(call, shape, |a, b| Some(i64::from(a > b)))?,
        "GreaterOrEqual" => binary(call, shape, |a, b| Some(i64::from(a >= b)))?,
        "And" => binary(call, shape, |a, b| Some(i64::from(a != 0 && b != 0)))?,
        "Or" => binary(call, shape, |a, b| Some(i64::from(a != 0 || b != 0)))?,
        "Xor" => binary(call, shape, |a, b| Some(i64::from((a != 0) != (b != 0))))?,
        "Min" if call.inputs.len() == 2 => binary(call, shape, |a, b| Some(a.min(b)))?,
        "Max" if call.inputs.len() == 2 => binary(call, shape, |a, b| Some(a.max(b)))?,
        "Not" => call.ints(0)?.iter().map(|v| i64::from(*v == 0)).collect(),
        "Neg" => call
            .ints(0)?
            .iter()
            .map(|v| v.checked_neg())
            .collect::<Option<_>>()?,
        "Abs" => call
            .ints(0)?
            .iter()
            .map(|v| v.checked_abs())
            .collect::<Option<_>>()?,
        "Where" => {
            let (which, yes, no) = (call.ints(0)?, call.ints(1)?, call.ints(2)?);
            let index = |slot: usize| spread(call.shape(slot)?, shape);
            let (at, a, b) = (index(0)?, index(1)?, index(2)?);
            let each = at.iter().zip(&a).zip(&b);
            each.map(|((at, a), b)| match which.get(*at)? {
                0 => no.get(*b).copied(),
                _ => yes.get(*a).copied(),
            })
            .collect::<Option<_>>()?
        }
        "Concat" => {
            let axis = axis_of(call.attribute("axis", 0), shape.len())?;
            let outer: i64 = shape[..axis].iter().product();
            let mut out = Vec::with_capacity(n);
            for row in 0..usize::try_from(outer).ok()? {
                for slot in 0..call.inputs.len() {
                    let size: i64 = call.shape(slot)?.get(axis..)?.iter().product();
                    let size = usize::try_from(size).ok()?;
                    out.extend_from_slice(call.ints(slot)?.get(row * size..(row + 1) * size)?);
                }
            }
            out
        }
        "Range" => {
            let (start, step) = (call.int(0)?, call.int(2)?);
            (0..i64::try_from(n).ok()?)
                .map(|i| start + i * step)
                .collect()
        }
        "ConstantOfShape" => match call.node.attr("value") {
            Some(AttrValue::Tensor(t)) => {
                let none: Arc<dyn crate::ir::ExternalSource> = Arc::new(crate::ir::NoExternal);
                vec![*t.to_i64s(&none).ok()?.first()?; n]
            }
            _ => return None,
        },
        "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceProd" => reduce(call, n)?,
        "CumSum" => {
            // Of one row only.
            if call.attribute("exclusive", 0) != 0
                || call.shape(0)?.iter().filter(|d| **d != 1).count() > 1
            {
                return None;
            }
            let rank = call.shape(0)?.len();
            let axis = axis_of(call.int(1)?, rank)?;
            if n > 1 && shape[axis] == 1 {
                return None;
            }
            let mut all = call.ints(0)?.to_vec();
            let back = call.attribute("reverse", 0) != 0;
            if back {
                all.reverse();
            }
            let mut sum = 0i64;
            for v in &mut all {
                sum = sum.checked_add(*v)?;
                *v = sum;
            }
            if back {
                all.reverse();
            }
            all
        }
        // Numbers from 0 up, in some order, are sorted without knowing it.
        "TopK" if call.fact(0)?.permutes && call.attribute("largest", 1) == 0 => {
            let row = *shape.last()?;
            if row != *call.shape(0)?.last()? || call.attribute("sorted", 1) == 0 {
                return None;
            }
            let n = i64::try_from(n).ok()?;
            (0..n).map(|i| i % row).collect()
        }
        _ => return None,
    })
}

fn floats(call: &Call<'_>, shape: &[i64], n: usize) -> Option<Vec<f32>> {
    let of = |slot: usize| match call.data(slot)? {
        Data::Floats(all) => Some(all),
        Data::Ints(_) => None,
    };
    if let Some(moved) = moved(call, shape, n) {
        let source = of(moved.slot)?;
        return moved.from.iter().map(|i| source.get(*i).copied()).collect();
    }
    let binary = |f: fn(f32, f32) -> f32| -> Option<Vec<f32>> {
        let (a, b) = (of(0)?, of(1)?);
        let (at, bt) = (
            spread(call.shape(0)?, shape)?,
            spread(call.shape(1)?, shape)?,
        );
        at.iter()
            .zip(&bt)
            .map(|(i, j)| Some(f(*a.get(*i)?, *b.get(*j)?)))
            .collect()
    };
    let unary =
        |f: fn(f32) -> f32| -> Option<Vec<f32>> { Some(of(0)?.iter().map(|v| f(*v)).collect()) };
    match call.node.op_type.as_str() {
        "Cast" | "CastLike" => match call.data(0)? {
            Data::Ints(all) => Some(all.iter().map(|v| *v as f32).collect()),
            Data::Floats(all) => Some(all.to_vec()),
        },
        "Add" => binary(|a, b| a + b),
        "Sub" => binary(|a, b| a - b),
        "Mul" => binary(|a, b| a * b),
        "Div" => binary(|a, b| a / b),
        "Sqrt" => unary(f32::sqrt),
        "Floor" => unary(f32::floor),
        "Ceil" => unary(f32::ceil),
        "Neg" => unary(|v| -v),
        "Range" => {
            let (start, step) = (*of(0)?.first()?, *of(2)?.first()?);
            Some((0..n).map(|i| start + i as f32 * step).collect())
        }
        _ => None,
    }
}

fn cast(data: &Data, to: DataType) -> Option<Vec<i64>> {
    let narrow = |v: i64| match to {
        DataType::Bool => Some(i64::from(v != 0)),
        DataType::Int32 => i32::try_from(v).ok().map(i64::from),
        _ => Some(v),
    };
    match data {
        Data::Ints(all) => all.iter().map(|v| narrow(*v)).collect(),
        Data::Floats(all) => all
            .iter()
            .map(|v| match to {
                DataType::Bool => Some(i64::from(*v != 0.0)),
                #[allow(
                    clippy::cast_possible_truncation,
                    reason = "in range, and truncation is the operator's"
                )]
                _ => (v.abs() < 1e9).then_some(*v as i64),
            })
            .collect(),
    }
}

fn binary(call: &Call<'_>, shape: &[i64], f: impl Fn(i64, i64) -> Option<i64>) -> Option<Vec<i64>> {
    let (a, b) = (call.ints(0)?, call.ints(1)?);
    let (at, bt) = (
        spread(call.shape(0)?, shape)?,
        spread(call.shape(1)?, shape)?,
    );
    at.iter()
        .zip(&bt)
        .map(|(i, j)| f(*a.get(*i)?, *b.get(*j)?))
        .collect()
}

fn reduce(call: &Call<'_>, n: usize) -> Option<Vec<i64>> {
    let (shape, all, axes) = (call.shape(0)?, call.ints(0)?, reduced(call)?);
    let f: fn(i64, i64) -> Option<i64> = match call.node.op_type.as_str() {
        "ReduceSum" => i64::checked_add,
        "ReduceProd" => i64::checked_mul,
        "ReduceMax" => |a, b| Some(a.max(b)),
        "ReduceMin" => |a, b| Some(a.min(b)),
        _ => return None,
    };
    let first = match call.node.op_type.as_str() {
        "ReduceSum" => Some(0),
        "ReduceProd" => Some(1),
        _ => None,
    };
    // Where each element goes: strides over the axes that stay.
    let mut stride = vec![0usize; shape.len()];
    let mut step = 1;
    for at in (0..shape.len()).rev().filter(|at| !axes.contains(at)) {
        stride[at] = step;
        step *= usize::try_from(shape[at]).ok()?;
    }
    let mut out = vec![first; n];
    for (i, index) in Indices::of(shape)?.enumerate() {
        let to = index.iter().zip(&stride).map(|(i, s)| i * s).sum::<usize>();
        let slot = out.get_mut(to)?;
        *slot = Some(match *slot {
            None => *all.get(i)?,
            Some(v) => f(v, *all.get(i)?)?,
        });
    }
    out.into_iter().collect()
}

/// An output whose elements are elements of one input.
struct Moved {
    slot: usize,
    /// For each element, where it was.
    from: Vec<usize>,
}

/// What operators that only move elements do with them.
fn moved(call: &Call<'_>, shape: &[i64], n: usize) -> Option<Moved> {
    let own = call.shape(0)?;
    let at = |from: Vec<usize>| Some(Moved { slot: 0, from });
    match call.node.op_type.as_str() {
        "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => at((0..n).collect()),
        "Expand" => at(spread(own, shape)?),
        "Tile" => {
            let strides = strides(own)?;
            let sizes: Option<Vec<usize>> = own.iter().map(|d| usize::try_from(*d).ok()).collect();
            let sizes = sizes?;
            let from = Indices::of(shape)?.map(|index| {
                index
                    .iter()
                    .zip(&sizes)
                    .zip(&strides)
                    .map(|((i, d), s)| i % d.max(&1) * s)
                    .sum()
            });
            at(from.collect())
        }
        "Transpose" => {
            let (perm, strides) = (permutation(call, own.len())?, strides(own)?);
            let from = Indices::of(shape)?
                .map(|index| index.iter().zip(&perm).map(|(i, p)| i * strides[*p]).sum());
            at(from.collect())
        }
        "Slice" => {
            let strides = strides(own)?;
            let mut start = vec![0i64; own.len()];
            let mut step = vec![1i64; own.len()];
            for (axis, taken) in slices(call)? {
                (start[axis], step[axis]) = (taken.start, taken.step);
            }
            let from: Option<Vec<usize>> = Indices::of(shape)?
                .map(|index| {
                    let mut sum = 0;
                    for (axis, i) in index.iter().enumerate() {
                        let place = start[axis] + i64::try_from(*i).ok()? * step[axis];
                        sum += usize::try_from(place).ok()? * strides[axis];
                    }
                    Some(sum)
                })
                .collect();
            at(from?)
        }
        "Gather" => {
            let indices = call.ints(1)?;
            let axis = axis_of(call.attribute("axis", 0), own.len())?;
            let inner: usize = count(&own[axis + 1..])?;
            let outer: usize = count(&own[..axis])?;
            let size = usize::try_from(own[axis]).ok()?;
            let mut from = Vec::with_capacity(n);
            for row in 0..outer {
                for &index in indices {
                    let index = if index < 0 { index + own[axis] } else { index };
                    let index = usize::try_from(index).ok().filter(|i| *i < size)?;
                    from.extend((0..inner).map(|i| (row * size + index) * inner + i));
                }
            }
            at(from)
        }
        _ => None,
    }
}

fn strides(shape: &[i64]) -> Option<Vec<usize>> {
    let mut out = vec![0; shape.len()];
    let mut step = 1usize;
    for at in (0..shape.len()).rev() {
        out[at] = step;
        step = step.checked_mul(usize::try_from(shape[at]).ok()?)?;
    }
    Some(out)
}

/// For each element of `to`, the element of `from` that broadcasting puts there.
fn spread(from: &[i64], to: &[i64]) -> Option<Vec<usize>> {
    let offset = to.len().checked_sub(from.len())?;
    let own = strides(from)?;
    let mut stride = vec![0; to.len()];
    for (at, d) in from.iter().enumerate() {
        if *d != 1 {
            stride[offset + at] = own[at];
        }
    }
    let each = Indices::of(to)?.map(|index| index.iter().zip(&stride).map(|(i, s)| i * s).sum());
    Some(each.collect())
}

/// All indices of a shape, in row-major order.
struct Indices {
    shape: Vec<usize>,
    next: Option<Vec<usize>>,
}

impl Indices {
    fn of(shape: &[i64]) -> Option<Self> {
        let shape: Option<Vec<usize>> = shape.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape?;
        let next = (!shape.contains(&0)).then(|| vec![0; shape.len()]);
        Some(Self { shape, next })
    }
}

impl Iterator for Indices {
    type Item = Vec<usize>;

    fn next(&mut self) -> Option<Vec<usize>> {
        let now = self.next.take()?;
        let mut after = now.clone();
        for at in (0..after.len()).rev() {
            after[at] += 1;
            if after[at] < self.shape[at] {
                self.next = Some(after);
                break;
            }
            after[at] = 0;
        }
        Some(now)
    }
}
