//! How two constants with other contents differ, element by element.

use super::content::{Constant, in_parallel};
use super::report::WeightChange;
use super::{DiffError, Options};
use crate::ir::DataType;

/// Elements that are compared at once; a multiple of eight, so that packed types
/// begin at a byte.
const STEP: u64 = 1 << 20;

/// Differences of some elements, to be added up in order.
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    changed: u64,
    beyond: u64,
    first: Option<u64>,
    max_abs: f64,
    max_rel: f64,
    squares_a: f64,
    squares_b: f64,
    squares_diff: f64,
    non_finite: u64,
    signs: u64,
}

/// Compares two constants; `changed` is 0 if all elements have the same bits, and
/// the numbers are left out where elements do not correspond.
pub(super) fn compare(
    a: &Constant,
    b: &Constant,
    options: &Options,
) -> Result<WeightChange, DiffError> {
    let elements = a
        .dims
        .iter()
        .try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?));
    let mut change = WeightChange {
        dtype_a: a.dtype.to_string(),
        dtype_b: b.dtype.to_string(),
        dims_a: a.dims.clone(),
        dims_b: b.dims.clone(),
        elements: elements.unwrap_or(0),
        ..WeightChange::default()
    };
    let whole = |c: &Constant, n| !c.packed && c.dtype.byte_len(n) == Some(c.data.len());
    let comparable = |n: &u64| a.dims == b.dims && whole(a, *n) && whole(b, *n);
    let readable = bits(a.dtype).is_some() && bits(b.dtype).is_some();
    let Some(count) = elements.filter(comparable).filter(|_| readable) else {
        // Strings, sparse tensors, damaged ones: the same or not.
        let same = a.dtype == b.dtype && a.dims == b.dims && same_bytes(a, b)?;
        change.changed = u64::from(!same);
        change.beyond = change.changed;
        if !same && a.packed == b.packed && a.dims == b.dims && a.dtype == b.dtype {
            change.changed = change.changed.max(1);
        }
        return Ok(change);
    };
    let jobs: Vec<u64> = (0..count.div_ceil(STEP)).collect();
    let parts = in_parallel(&jobs, options.threads, |job, buffers| {
        let first = job * STEP;
        let n = (count - first).min(STEP);
        let range = |c: &Constant| {
            let bits = bits(c.dtype).unwrap_or(8);
            let start = first * bits / 8;
            (start, (n * bits).div_ceil(8) as usize)
        };
        let (ra, rb) = (range(a), range(b));
        let (one, other) = buffers;
        let bytes_a = a.data.slice(ra.0, ra.1, one)?;
        let bytes_b = b.data.slice(rb.0, rb.1, other)?;
        Ok(elements_of(
            a.dtype, bytes_a, b.dtype, bytes_b, n as usize, first, options,
        ))
    })?;
    let mut sum = Part::default();
    for part in parts {
        sum.changed += part.changed;
        sum.beyond += part.beyond;
        sum.first = sum.first.or(part.first);
        sum.max_abs = sum.max_abs.max(part.max_abs);
        sum.max_rel = sum.max_rel.max(part.max_rel);
        sum.squares_a += part.squares_a;
        sum.squares_b += part.squares_b;
        sum.squares_diff += part.squares_diff;
        sum.non_finite += part.non_finite;
        sum.signs += part.signs;
    }
    change.changed = sum.changed;
    change.beyond = sum.beyond;
    change.first = sum.first;
    change.max_abs = Some(sum.max_abs);
    change.max_rel = Some(sum.max_rel);
    change.norm_a = Some(sum.squares_a.sqrt());
    change.norm_b = Some(sum.squares_b.sqrt());
    change.norm_diff = Some(sum.squares_diff.sqrt());
    change.non_finite = sum.non_finite;
    change.signs_of_zero = sum.signs;
    Ok(change)
}

fn same_bytes(a: &Constant, b: &Constant) -> Result<bool, DiffError> {
    if a.data.len() != b.data.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < a.data.len() {
        let n = (a.data.len() - at).min(STEP) as usize;
        if a.data.slice(at, n, &mut one)? != b.data.slice(at, n, &mut other)? {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

/// Bits of an element; `None` for types whose elements are no numbers here.
fn bits(dtype: DataType) -> Option<u64> {
    let known = !matches!(
        dtype,
        DataType::Other(_) | DataType::Undefined | DataType::String
    );
    let eight = dtype.byte_len(8).filter(|_| known)?;
    Some(eight)
}

fn elements_of(
    ta: DataType,
    a: &[u8],
    tb: DataType,
    b: &[u8],
    count: usize,
    first: u64,
    options: &Options,
) -> Part {
    let mut part = Part::default();
    let exact = options.rtol == 0.0 && options.atol == 0.0;
    let wide = ta == tb && matches!(ta, DataType::Int64 | DataType::Uint64);
    let complex = matches!(ta, DataType::Complex64 | DataType::Complex128);
    for i in 0..count {
        let (x, y) = (number(ta, a, i), number(tb, b, i));
        let same_bits = if ta == tb {
            raw(ta, a, i) == raw(ta, b, i)
        } else {
            x.to_bits() == y.to_bits()
        };
        if x.is_finite() {
            part.squares_a += x * x;
        }
        if y.is_finite() {
            part.squares_b += y * y;
        }
        if same_bits {
            continue;
        }
        part.changed += 1;
        part.first.get_or_insert(first + i as u64);
        if x.is_finite() && y.is_finite() {
            let distance = if wide {
                let of = |bytes: &[u8]| integer(ta, raw(ta, bytes, i));
                (of(b) - of(a)).unsigned_abs() as f64
            } else {
                (y - x).abs()
            };
            if distance == 0.0 && !complex {
                part.signs += 1;
            }
            part.max_abs = part.max_abs.max(distance);
            if x != 0.0 {
                part.max_rel = part.max_rel.max(distance / x.abs());
            }
            part.squares_diff += distance * distance;
            // Bits that differ without a distance (−0, the other half of a complex
            // number) are a change where exactness is asked for.
            let near = distance <= options.atol + options.rtol * x.abs();
            part.beyond += u64::from(exact || complex || !near);
        } else {
            part.non_finite += 1;
            let both_nan = x.is_nan() && y.is_nan();
            part.beyond += u64::from(exact || !both_nan && x != y);
        }
    }
    part
}

/// The bits of element `i`.
fn raw(dtype: DataType, bytes: &[u8], i: usize) -> u128 {
    let width = bits(dtype).unwrap_or(8) as usize;
    if width < 8 {
        let per = 8 / width;
        let byte = bytes.get(i / per).copied().unwrap_or(0);
        return u128::from((byte >> (i % per * width)) & ((1u16 << width) - 1) as u8);
    }
    let width = width / 8;
    let slice = bytes.get(i * width..(i + 1) * width).unwrap_or(&[]);
    let mut whole = [0; 16];
    whole[..slice.len()].copy_from_slice(slice);
    u128::from_le_bytes(whole)
}

fn integer(dtype: DataType, raw: u128) -> i128 {
    match dtype {
        DataType::Int64 => i128::from(raw as u64 as i64),
        _ => raw as i128,
    }
}

/// Element `i` as a double. Of a complex number the real part.
fn number(dtype: DataType, bytes: &[u8], i: usize) -> f64 {
    use DataType as D;
    let bits = raw(dtype, bytes, i);
    match dtype {
        D::Float | D::Complex64 => f64::from(f32::from_bits(bits as u32)),
        D::Double | D::Complex128 => f64::from_bits(bits as u64),
        D::Float16 => half::f16::from_bits(bits as u16).to_f64(),
        D::Bfloat16 => half::bf16::from_bits(bits as u16).to_f64(),
        D::Int8 => f64::from(bits as u8 as i8),
        D::Int16 => f64::from(bits as u16 as i16),
        D::Int32 => f64::from(bits as u32 as i32),
        D::Int64 => bits as u64 as i64 as f64,
        D::Int4 => f64::from(((bits as u8) << 4) as i8 >> 4),
        D::Int2 => f64::from(((bits as u8) << 6) as i8 >> 6),
        D::Float8E4M3FN => small(bits as u8, 4, 3, 7, Special::Nan(0x7f)),
        D::Float8E4M3FNUZ => small(bits as u8, 4, 3, 8, Special::NegativeZero),
        D::Float8E5M2 => small(bits as u8, 5, 2, 15, Special::Ieee),
        D::Float8E5M2FNUZ => small(bits as u8, 5, 2, 16, Special::NegativeZero),
        D::Float4E2M1 => small(
            ((bits as u8) & 8) << 4 | (bits as u8) & 7,
            2,
            1,
            1,
            Special::None,
        ),
        D::Float8E8M0 if bits == 0xff => f64::NAN,
        D::Float8E8M0 => 2f64.powi(bits as i32 - 127),
        // Unsigned numbers and booleans.
        _ => bits as f64,
    }
}

/// What the bit patterns at the upper end of a small float mean.
enum Special {
    /// Nothing: all are numbers.
    None,
    /// One pattern (without the sign) is NaN.
    Nan(u8),
    /// −0 is NaN.
    NegativeZero,
    /// Infinities and NaNs as in IEEE 754.
    Ieee,
}

/// A float of at most eight bits: the sign is bit 7, then `e` bits of exponent
/// and `m` of mantissa right-aligned.
fn small(bits: u8, e: u32, m: u32, bias: i32, special: Special) -> f64 {
    let sign = if bits & 0x80 != 0 { -1.0 } else { 1.0 };
    let rest = bits & 0x7f;
    let exponent = i32::from(rest >> m) & ((1 << e) - 1);
    let mantissa = f64::from(rest & ((1 << m) - 1));
    match special {
        Special::Nan(pattern) if rest == pattern => return f64::NAN,
        Special::NegativeZero if bits == 0x80 => return f64::NAN,
        Special::Ieee if exponent == (1 << e) - 1 => {
            return if mantissa == 0.0 {
                sign * f64::INFINITY
            } else {
                f64::NAN
            };
        }
        _ => {}
    }
    let scale = 2f64.powi(-(m as i32));
    if exponent == 0 {
        sign * mantissa * scale * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + mantissa * scale) * 2f64.powi(exponent - bias)
    }
}

/// Elements in words.
pub(super) fn texts(dtype: DataType, bytes: &[u8], count: usize) -> Vec<String> {
    let text = |i: usize| match dtype {
        DataType::Bool => (raw(dtype, bytes, i) != 0).to_string(),
        DataType::Float => format!("{:?}", f32::from_bits(raw(dtype, bytes, i) as u32)),
        DataType::Int64 | DataType::Uint64 => integer(dtype, raw(dtype, bytes, i)).to_string(),
        _ if number(dtype, bytes, i).is_nan() => "NaN".to_owned(),
        _ if dtype.is_float() => format!("{:?}", number(dtype, bytes, i)),
        _ => number(dtype, bytes, i).to_string(),
    };
    (0..count).map(text).collect()
}
