//! The arithmetic that both stages share.

use ndarray::ArrayView1;

use super::OracleError;

/// Dot product in `f64`, in index order.
pub(super) fn dot(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&x, &y)| f64::from(x) * f64::from(y))
        .sum()
}

/// Softmax in place. `-inf` marks a masked key and becomes 0; at least one logit must be finite.
pub(super) fn softmax(logits: &mut [f64]) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for x in logits.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in logits.iter_mut() {
        *x /= sum;
    }
}

/// Rounds to the precision in which scores are ranked; an error if one has no place in an order.
pub(super) fn to_scores(what: &'static str, sums: &[f64]) -> Result<Vec<f32>, OracleError> {
    sums.iter()
        .enumerate()
        .map(|(index, &sum)| {
            let value = sum as f32;
            if value.is_finite() {
                Ok(value)
            } else {
                Err(OracleError::NotFinite { what, index, value })
            }
        })
        .collect()
}

/// The first value that cannot be ranked, as an error.
pub(super) fn check_finite(what: &'static str, scores: &[f32]) -> Result<(), OracleError> {
    match scores.iter().position(|s| !s.is_finite()) {
        None => Ok(()),
        Some(index) => Err(OracleError::NotFinite {
            what,
            index,
            value: scores[index],
        }),
    }
}

/// Indices by falling score, the lower index first among equals (ONNX `TopK`'s order).
///
/// Scores must be finite. The sort is stable and starts from ascending indices, which is what
/// settles the ties; 0.0 and -0.0 are equal.
pub(in crate::validate) fn descending(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| {
        scores[b]
            .partial_cmp(&scores[a])
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    order
}

/// An error unless the extent of an input is what the other inputs make it.
pub(super) fn expect_extent(
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), OracleError> {
    if expected == found {
        return Ok(());
    }
    Err(OracleError::Shape {
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}
