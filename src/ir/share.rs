//! ⌊n·r⌋ with the rounding of double precision, in integers.
//!
//! Ratios of recipes are doubles, and so is the product, as Python's `int(n * r)` has it: 0.29 of 100 is 28, since
//! the product is 28.999999999999996. Graphs compute the same without the type: ONNX Runtime's WebGPU build, which
//! transformers.js runs on in a browser, has no operator for doubles.
//!
//! Let p/q be the last convergent of r's continued fraction with q ≤ 2²⁸. For n < 2²⁴ the product with r lies too
//! near to that with p/q for ⌊n·p/q⌋ to be another number, unless n·p/q is an integer j and r is less than p/q.
//! Then the product is j − j·δ, which rounds to j or to what lies below it. The distance of doubles below j
//! doubles at powers of two, so the j that round down form a range in front of each; [`Share::bounds`] lists where
//! these ranges begin and end.

use super::ops::Size;
use super::patch::Patch;
use super::{DataType, ValueId};

/// Counts are below 2 to the power of this.
const COUNT_BITS: u32 = 24;
/// Denominators are at most 2 to the power of this.
const RATIO_BITS: u32 = 28;

/// A ratio as what a graph computes with.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Share {
    /// Numerator.
    p: i64,
    /// Denominator.
    q: i64,
    /// Ascending: a whole quotient j is one too many if an odd number of these is at most j.
    bounds: Vec<i64>,
}

impl Share {
    /// Of a ratio from 0 to 1.
    fn new(ratio: f64) -> Self {
        let whole = |p| Self {
            p,
            q: 1,
            bounds: Vec::new(),
        };
        // A share of fewer than 2²⁴ that is less than one.
        if ratio.is_nan() || ratio < 2f64.powi(-30) {
            return whole(0);
        }
        if ratio >= 1.0 {
            return whole(1);
        }
        // ratio = mantissa / 2^shift, with shift from 53 to 82.
        let bits = ratio.to_bits();
        let mantissa = u128::from(bits & ((1 << 52) - 1) | 1 << 52);
        let shift = 1075 - u32::try_from(bits >> 52).unwrap_or(1023);
        let (p, q) = convergent(mantissa, 1 << shift);
        let bounds = match (p << shift).checked_sub(mantissa * q) {
            None | Some(0) => Vec::new(),
            Some(excess) => bounds(p, excess, shift),
        };
        let number = |n: u128| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            p: number(p),
            q: number(q),
            bounds,
        }
    }
}

/// The last convergent p/q of a/b < 1 with q ≤ 2²⁸.
fn convergent(a: u128, b: u128) -> (u128, u128) {
    let (mut rest, mut divided) = (a, b);
    let ((mut p0, mut q0), (mut p, mut q)) = ((1, 0), (0, 1));
    while rest > 0 {
        let digit = divided / rest;
        let next = (p0 + digit * p, q0 + digit * q);
        if next.1 > 1 << RATIO_BITS {
            break;
        }
        (p0, q0, p, q) = (p, q, next.0, next.1);
        (rest, divided) = (divided % rest, rest);
    }
    (p, q)
}

/// Where the products that round down begin and end, of a ratio that is `excess` / (q · 2^`shift`) less than p/q.
///
/// The product for the quotient j is j − j · excess / (p · 2^shift). Below j, for j − 1 of b bits, doubles lie
/// 2^(b − 53) apart, so it rounds down if it is more than half of that away; the tie goes to j.
fn bounds(p: u128, excess: u128, shift: u32) -> Vec<i64> {
    let mut bounds: Vec<i64> = Vec::new();
    for bits in 0..=COUNT_BITS {
        let last = 1u128 << bits;
        let half = match (shift + bits).checked_sub(54) {
            Some(places) => p << places,
            None => p / 2,
        };
        let first = (half / excess + 1).max(last / 2 + 1);
        if first > last {
            continue;
        }
        let number = |n: u128| i64::try_from(n).unwrap_or(i64::MAX);
        // A range that begins where the one before ended continues it.
        match bounds.last() {
            Some(end) if *end == number(first) => drop(bounds.pop()),
            _ => bounds.push(number(first)),
        }
        bounds.push(number(last + 1));
    }
    bounds
}

impl Patch<'_> {
    /// ⌊n·ratio⌋ in double precision, as Python's `int(n * ratio)`, of counts `[k]` in int64 from 0 to 2²⁴ − 1;
    /// `ratio` from 0 to 1.
    pub fn share(&mut self, n: ValueId, ratio: f64) -> ValueId {
        let share = Share::new(ratio);
        if (share.p, share.q) == (1, 1) {
            return n;
        }
        let mut product = n;
        if share.p != 1 {
            let p = self.i64(share.p);
            product = self.op("Mul", &[n, p]);
        }
        if share.q == 1 {
            return product;
        }
        let q = self.i64(share.q);
        let quotient = self.op("Div", &[product, q]);
        if share.bounds.is_empty() {
            return quotient;
        }
        let back = self.op("Mul", &[quotient, q]);
        let whole = self.op("Equal", &[back, product]);
        let each = self.unsqueeze(quotient, &[1]);
        let bounds = self.i64s(&share.bounds);
        let passed = self.op("GreaterOrEqual", &[each, bounds]);
        let passed = self.cast(passed, DataType::Int64);
        let passed = self.reduce_sum(passed, &[1], false);
        let two = self.i64(2);
        let inside = self.op("Mod", &[passed, two]);
        let inside = self.cast(inside, DataType::Bool);
        let less = self.op("And", &[whole, inside]);
        let less = self.cast(less, DataType::Int64);
        self.op("Sub", &[quotient, less])
    }

    /// The same of a size.
    pub fn size_scaled(&mut self, n: Size, ratio: f64) -> Size {
        match n {
            #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
            Size::Known(n) => Size::Known((n as f64 * ratio) as i64),
            Size::Value(v) => Size::Value(self.share(v, ratio)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    impl Share {
        /// What the inserted nodes compute.
        fn of(&self, n: i64) -> i64 {
            let (j, rest) = (n * self.p / self.q, n * self.p % self.q);
            let passed = self.bounds.iter().filter(|b| j >= **b).count();
            j - i64::from(rest == 0 && passed % 2 == 1)
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "that is what is tested")]
    fn in_doubles(n: i64, ratio: f64) -> i64 {
        (n as f64 * ratio) as i64
    }

    /// Every count of a conversation, multiples of the denominator (where the rounding decides), and random ones.
    fn agrees(ratio: f64, state: &mut SplitMix64) {
        let share = Share::new(ratio);
        let some: Vec<i64> = (0..200).map(|_| (state.bits() >> 40) as i64).collect();
        let far = (1i64 << COUNT_BITS) - 1;
        let multiples = (1..=400)
            .map(|k| k * share.q)
            .chain((1..=40).map(|k| far / share.q / k * share.q));
        let counts = (0..2500).chain(some).chain(multiples).chain([far]);
        for n in counts.filter(|n| *n <= far) {
            assert_eq!(
                share.of(n),
                in_doubles(n, ratio),
                "{n} of {ratio:?}, {share:?}"
            );
        }
    }

    #[test]
    fn integers_give_what_doubles_give() {
        assert_eq!(in_doubles(100, 0.29), 28);
        assert_eq!(
            Share::new(0.5),
            Share {
                p: 1,
                q: 2,
                bounds: Vec::new()
            }
        );
        assert_eq!((Share::new(0.0).of(99), Share::new(1.0).of(99)), (0, 99));
        assert_eq!((Share::new(0.29).of(100), Share::new(0.7).of(10)), (28, 7));
        let mut state = SplitMix64::new(1);
        for k in 0..=1000 {
            agrees(f64::from(k) / 1000.0, &mut state);
        }
        for _ in 0..400 {
            let bits = state.bits() >> 11;
            let any = bits as f64 / (1u64 << 53) as f64;
            agrees(any, &mut state);
            agrees(any.powi(6), &mut state);
            agrees((any * 1e5).round() / 1e5, &mut state);
            // The doubles next to a fraction with a small denominator.
            let q = 2 + (bits % 97) as i64;
            let near = (1 + bits as i64 % (q - 1)) as f64 / q as f64;
            for step in 0..3 {
                agrees(f64::from_bits(near.to_bits() - step), &mut state);
            }
        }
    }
}
