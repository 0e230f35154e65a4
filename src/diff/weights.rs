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

/// Elements that are decoded at once: a multiple of eight, and few enough that all
/// buffers stay in the fastest cache.
const BATCH: usize = 512;

/// Consecutive elements of a tensor, decoded: what type they are of is asked once for
/// all of them.
struct Batch {
    bits: [u128; BATCH],
    numbers: [f64; BATCH],
}

impl Batch {
    const EMPTY: Self = Self {
        bits: [0; BATCH],
        numbers: [0.0; BATCH],
    };

    /// Decodes the first `count` elements (at most [`BATCH`]) of `bytes`.
    fn read(&mut self, dtype: DataType, bytes: &[u8], count: usize) {
        let bits = &mut self.bits[..count];
        match self::bits(dtype).unwrap_or(8) {
            8 => whole::<1>(bytes, bits),
            16 => whole::<2>(bytes, bits),
            32 => whole::<4>(bytes, bits),
            64 => whole::<8>(bytes, bits),
            128 => whole::<16>(bytes, bits),
            narrow => {
                let (width, per) = (narrow as usize, 8 / narrow as usize);
                for (i, into) in bits.iter_mut().enumerate() {
                    let byte = bytes.get(i / per).copied().unwrap_or(0);
                    *into = u128::from((byte >> (i % per * width)) & ((1u16 << width) - 1) as u8);
                }
            }
        }
        numbers(dtype, bits, &mut self.numbers[..count]);
    }
}

/// The bits of elements of `N` bytes.
fn whole<const N: usize>(bytes: &[u8], into: &mut [u128]) {
    for (bits, element) in into.iter_mut().zip(bytes.chunks_exact(N)) {
        let mut all = [0; 16];
        all[..N].copy_from_slice(element);
        *bits = u128::from_le_bytes(all);
    }
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
    let (mut of_a, mut of_b) = (Batch::EMPTY, Batch::EMPTY);
    for start in (0..count).step_by(BATCH) {
        let n = (count - start).min(BATCH);
        let (a, b) = (bytes_of(ta, a, start, n), bytes_of(tb, b, start, n));
        of_a.read(ta, a, n);
        if ta == tb && a == b {
            for x in of_a.numbers[..n].iter().filter(|x| x.is_finite()) {
                part.squares_a += x * x;
                part.squares_b += x * x;
            }
            continue;
        }
        of_b.read(tb, b, n);
        for i in 0..n {
            let (x, y) = (of_a.numbers[i], of_b.numbers[i]);
            let same_bits = if ta == tb {
                of_a.bits[i] == of_b.bits[i]
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
            part.first.get_or_insert(first + (start + i) as u64);
            if x.is_finite() && y.is_finite() {
                let distance = if wide {
                    let (p, q) = (integer(ta, of_a.bits[i]), integer(ta, of_b.bits[i]));
                    (q - p).unsigned_abs() as f64
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
    }
    part
}

/// Bytes of `count` elements from `start` on, a multiple of eight.
fn bytes_of(dtype: DataType, bytes: &[u8], start: usize, count: usize) -> &[u8] {
    let bits = bits(dtype).unwrap_or(8) as usize;
    let (from, length) = (start * bits / 8, (count * bits).div_ceil(8));
    bytes.get(from..from + length).unwrap_or(&[])
}

fn integer(dtype: DataType, bits: u128) -> i128 {
    match dtype {
        DataType::Int64 => i128::from(bits as u64 as i64),
        _ => bits as i128,
    }
}

/// Elements as doubles. Of a complex number the real part.
fn numbers(dtype: DataType, bits: &[u128], into: &mut [f64]) {
    use DataType as D;
    // A loop of its own for each type.
    fn each(bits: &[u128], into: &mut [f64], number: impl Fn(u128) -> f64) {
        for (into, bits) in into.iter_mut().zip(bits) {
            *into = number(*bits);
        }
    }
    let small = |e, m, bias, special| move |b: u128| small(b as u8, e, m, bias, special);
    match dtype {
        D::Float | D::Complex64 => each(bits, into, |b| f64::from(f32::from_bits(b as u32))),
        D::Double | D::Complex128 => each(bits, into, |b| f64::from_bits(b as u64)),
        D::Float16 => each(bits, into, |b| half::f16::from_bits(b as u16).to_f64()),
        D::Bfloat16 => each(bits, into, |b| half::bf16::from_bits(b as u16).to_f64()),
        D::Int8 => each(bits, into, |b| f64::from(b as u8 as i8)),
        D::Int16 => each(bits, into, |b| f64::from(b as u16 as i16)),
        D::Int32 => each(bits, into, |b| f64::from(b as u32 as i32)),
        D::Int64 => each(bits, into, |b| b as u64 as i64 as f64),
        D::Int4 => each(bits, into, |b| f64::from(((b as u8) << 4) as i8 >> 4)),
        D::Int2 => each(bits, into, |b| f64::from(((b as u8) << 6) as i8 >> 6)),
        D::Float8E4M3FN => each(bits, into, small(4, 3, 7, Special::Nan(0x7f))),
        D::Float8E4M3FNUZ => each(bits, into, small(4, 3, 8, Special::NegativeZero)),
        D::Float8E5M2 => each(bits, into, small(5, 2, 15, Special::Ieee)),
        D::Float8E5M2FNUZ => each(bits, into, small(5, 2, 16, Special::NegativeZero)),
        D::Float4E2M1 => {
            let number = small(2, 1, 1, Special::None);
            each(bits, into, |b| number((b & 8) << 4 | b & 7));
        }
        D::Float8E8M0 => each(bits, into, |b| match b {
            0xff => f64::NAN,
            b => 2f64.powi(b as i32 - 127),
        }),
        // Unsigned numbers and booleans.
        _ => each(bits, into, |b| b as f64),
    }
}

/// What the bit patterns at the upper end of a small float mean.
#[derive(Clone, Copy)]
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

/// Elements in words; of no more than [`BATCH`].
pub(super) fn texts(dtype: DataType, bytes: &[u8], count: usize) -> Vec<String> {
    let mut batch = Batch::EMPTY;
    let count = count.min(BATCH);
    batch.read(dtype, bytes, count);
    let elements = batch.bits[..count].iter().zip(&batch.numbers);
    let text = |(bits, number): (&u128, &f64)| match dtype {
        DataType::Bool => (*bits != 0).to_string(),
        DataType::Float => format!("{:?}", f32::from_bits(*bits as u32)),
        DataType::Int64 | DataType::Uint64 => integer(dtype, *bits).to_string(),
        _ if number.is_nan() => "NaN".to_owned(),
        _ if dtype.is_float() => format!("{number:?}"),
        _ => number.to_string(),
    };
    elements.map(text).collect()
}
