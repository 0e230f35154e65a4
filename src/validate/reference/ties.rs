//! Near-ties: when the rewritten graph may keep another token than the oracle.
//!
//! Both read the same queries and keys, but not to the last bit: a runtime that
//! fuses the two graphs differently rounds them differently, and in half precision
//! one bit is a thousandth. Where two scores are as close as that, either choice
//! is right. Everything after it is then compared on the graph's choice.

use super::super::oracle;

/// Largest relative distance from the cut-off score at which a token may be
/// exchanged.
///
/// A score is a mean of probabilities, and the relative error of a probability is
/// the absolute error of its logit: a few roundings of numbers of the size of the
/// logits, which are below 10 where probabilities are comparable. Half an ulp is
/// 6e-8 in fp32, 5e-4 in fp16, 4e-3 in bf16; quantised layers round to 1/127 of
/// the largest activation when an input crosses a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance(pub f32);

impl Tolerance {
    /// For single precision.
    pub const FP32: Self = Self(2e-6);
    /// For half precision.
    pub const FP16: Self = Self(2e-3);
    /// For bfloat16.
    pub const BF16: Self = Self(1.6e-2);
    /// For layers that round activations to 8 bits.
    pub const QUANTISED: Self = Self(1.6e-2);

    /// Whether two scores are as good as equal.
    pub fn covers(self, a: f32, b: f32) -> bool {
        (a - b).abs() <= self.0 * a.abs().max(b.abs())
    }
}

/// What the rewritten graph chose, for the reference to follow where it may.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Kept positions at each drop point, for each row.
    pub kept: &'a [Vec<Vec<usize>>],
    /// How close a tie has to be.
    pub tolerance: Tolerance,
}

/// The same for a merge: scores that the rewritten graph ranked by.
#[derive(Clone, Copy, Debug)]
pub struct Ranking<'a> {
    /// Score of every token, for each image.
    pub scores: &'a [Vec<f32>],
    /// How close a tie has to be.
    pub tolerance: Tolerance,
}

/// In how many of its `first` places the order by falling `found` differs from
/// the order by falling `own`, if only near-ties of `own` are exchanged; `None` if
/// a token comes before one that is clearly better.
pub(super) fn reordered(
    own: &[f32],
    found: &[f32],
    first: usize,
    tolerance: Tolerance,
) -> Option<usize> {
    if own.len() != found.len() || found.iter().any(|s| !s.is_finite()) {
        return None;
    }
    let (want, order) = (oracle::by_score(own), oracle::by_score(found));
    let mut lowest = f32::INFINITY;
    for (place, &token) in order.iter().enumerate() {
        if own[token] > lowest && !tolerance.covers(own[token], lowest) {
            return None;
        }
        if place < first {
            lowest = lowest.min(own[token]);
        }
    }
    let places = want.iter().zip(&order).take(first);
    Some(places.filter(|(a, b)| a != b).count())
}

/// How many tokens were exchanged between the oracle's set `own` and the graph's
/// set `found`, if each of them is a near-tie with the cut-off score; `None` if
/// the graph's set is wrong.
///
/// `scores` has an entry for each visual token of `visual`, in order. The cut-off
/// is the lowest score that the oracle keeps. Sets of other sizes, out of order, or
/// without a token that is not up for choice are wrong.
pub(super) fn exchanged(
    own: &[usize],
    found: &[usize],
    scores: &[f32],
    visual: &[bool],
    tolerance: Tolerance,
) -> Option<usize> {
    let rising = found.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = found.last().is_none_or(|&last| last < visual.len());
    if found.len() != own.len() || !rising || !inside {
        return None;
    }
    let mut score_at = vec![None; visual.len()];
    let places = (0..visual.len()).filter(|&i| visual[i]);
    for (place, score) in places.zip(scores) {
        score_at[place] = Some(*score);
    }
    let kept = own.iter().filter_map(|&i| score_at[i]);
    let cut = kept.fold(f32::INFINITY, f32::min);
    let mut count = 0;
    for (place, score) in score_at.into_iter().enumerate() {
        let there = (
            own.binary_search(&place).is_ok(),
            found.binary_search(&place).is_ok(),
        );
        if there.0 != there.1 {
            // Text and padding have no score: they are not up for choice.
            if !tolerance.covers(score?, cut) {
                return None;
            }
            count += usize::from(there.1);
        }
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::{Tolerance, exchanged, reordered};

    const VISUAL: [bool; 6] = [false, true, true, true, true, false];
    const SCORES: [f32; 4] = [0.3, 0.2, 0.199_9, 0.1];
    const OWN: [usize; 4] = [0, 1, 2, 5];

    fn count(found: &[usize], tolerance: f32) -> Option<usize> {
        exchanged(&OWN, found, &SCORES, &VISUAL, Tolerance(tolerance))
    }

    #[test]
    fn only_near_ties_with_the_cut_off_are_exchanged() {
        assert_eq!(count(&OWN, 0.0), Some(0));
        assert_eq!(count(&[0, 1, 3, 5], 1e-3), Some(1));
        // Nearer than the tolerance allows, the best for a close one, the worst.
        assert_eq!(count(&[0, 1, 3, 5], 1e-4), None);
        assert_eq!(count(&[0, 2, 3, 5], 1e-3), None);
        assert_eq!(count(&[0, 1, 4, 5], 1e-3), None);
    }

    #[test]
    fn a_set_that_is_no_choice_is_wrong() {
        // Text is not up for choice, nor is the number of tokens or their order.
        for found in [
            &[1, 2, 3, 5][..],
            &[0, 1, 5],
            &[0, 2, 1, 5],
            &[0, 1, 1, 5],
            &[0, 1, 2, 6],
        ] {
            assert_eq!(count(found, 1.0), None, "{found:?}");
        }
    }

    #[test]
    fn an_order_may_differ_by_near_ties_only() {
        let own = [0.1, 0.4, 0.3999, 0.2];
        let count = |found: &[f32], first| reordered(&own, found, first, Tolerance(1e-3));
        assert_eq!(count(&own, 4), Some(0));
        assert_eq!(count(&[0.1, 0.3999, 0.4, 0.2], 4), Some(2));
        assert_eq!(count(&[0.2, 0.4, 0.3999, 0.1], 4), None);
        // Behind the first places, the order does not matter.
        assert_eq!(count(&[0.2, 0.4, 0.3999, 0.1], 2), Some(0));
        assert_eq!(count(&[0.1, 0.4, 0.2, 0.3999], 2), None);
        assert_eq!(count(&[0.1, 0.4, 0.2], 2), None);
        assert_eq!(count(&[0.1, f32::NAN, 0.4, 0.2], 2), None);
    }
}
