//! What a schedule would cost if its layers cost what the unmodified model's cost at the same lengths.
//!
//! The unmodified decoder takes T(s) for a prompt of s tokens, of which its head (what turns the last layer's output
//! into logits) takes H(s) for s rows, measured alone. All its L layers do the same work, so one of them takes
//!
//! ```text
//! layer(s) = (T(s) − H(s)) / L
//! ```
//!
//! (masks and rotary tables, which are computed once, are spread over the layers). T and H are measured at several
//! lengths in the same round as the model that they are compared with, and taken in between by straight lines. A
//! rewritten model in whose layer ℓ there are s(ℓ) tokens, and whose head runs on r rows, then ideally takes
//!
//! ```text
//! Σ_ℓ layer(s(ℓ)) + H(r)
//! ```
//!
//! and a decode step, with D(c) the unmodified model's step on a cache of c tokens,
//!
//! ```text
//! Σ_ℓ (D(s(ℓ)) − H(1)) / L + H(1)
//! ```
//!
//! Nothing is in this for what the passes add: ranking, gathering, masks of each stage.

/// Seconds at some count of tokens, in between by straight lines, beyond the last point by the last two.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curve(Vec<(usize, f64)>);

impl Curve {
    /// Through these points.
    pub fn new(mut points: Vec<(usize, f64)>) -> Self {
        points.sort_by_key(|p| p.0);
        points.dedup_by_key(|p| p.0);
        Self(points)
    }

    /// The value at `at`; NaN of a curve without points.
    pub fn at(&self, at: usize) -> f64 {
        let (a, b) = match self.0.as_slice() {
            [] => return f64::NAN,
            [only] => return only.1,
            points => {
                let next = points
                    .partition_point(|p| p.0 < at)
                    .clamp(1, points.len() - 1);
                (points[next - 1], points[next])
            }
        };
        let share = (at as f64 - a.0 as f64) / (b.0 - a.0) as f64;
        a.1 + share * (b.1 - a.1)
    }
}

/// What one round measured of the unmodified model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Base {
    /// Layers.
    pub depth: usize,
    /// T: the prompt.
    pub prefill: Curve,
    /// H: the head, by rows.
    pub head: Curve,
    /// D: a decode step, by tokens in the cache. No points where there is no cache.
    pub step: Curve,
}

impl Base {
    /// Ideal seconds of a prompt, with `tokens` in each layer and `rows` in the head.
    pub fn prefill(&self, tokens: &[usize], rows: usize) -> f64 {
        let layer = |s: &usize| (self.prefill.at(*s) - self.head.at(*s)) / self.depth as f64;
        tokens.iter().map(layer).sum::<f64>() + self.head.at(rows)
    }

    /// Ideal seconds of a decode step on caches of `tokens`.
    pub fn step(&self, tokens: &[usize]) -> f64 {
        let head = self.head.at(1);
        let layer = |c: &usize| (self.step.at(*c) - head) / self.depth as f64;
        tokens.iter().map(layer).sum::<f64>() + head
    }
}

/// The lengths at which the unmodified model is measured: all that some layer has, or `most` of them, the shortest and
/// the longest among them and the others as evenly spread (by ratio) as they are.
pub fn lengths(needed: impl IntoIterator<Item = usize>, most: usize) -> Vec<usize> {
    let mut all: Vec<usize> = needed.into_iter().filter(|n| *n > 0).collect();
    all.sort_unstable();
    all.dedup();
    while all.len() > most.max(2) {
        let gap = |i: usize| all[i + 1] as f64 / all[i - 1] as f64;
        let inner = 1..all.len() - 1;
        match inner.min_by(|a, b| gap(*a).total_cmp(&gap(*b))) {
            Some(closest) => all.remove(closest),
            None => break,
        };
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model whose layers take 2 ms a token and a head of 1 ms a row, and 3 ms for one decode step of each layer.
    fn linear(depth: usize) -> Base {
        let at = |s: usize| (s, (depth * 2 * s + s) as f64);
        Base {
            depth,
            prefill: Curve::new(vec![at(100), at(10), at(40)]),
            head: Curve::new(vec![(1, 1.0), (100, 100.0)]),
            step: Curve::new(vec![
                (10, (depth * 10) as f64 + 1.0),
                (100, (depth * 100) as f64 + 1.0),
            ]),
        }
    }

    #[test]
    fn ideals_are_sums_over_layers_and_the_head() {
        let base = linear(4);
        // The unmodified model is its own ideal.
        assert_eq!(base.prefill(&[100; 4], 100), 900.0);
        // 2 · (100 + 100 + 40 + 20) + 20 rows.
        assert!((base.prefill(&[100, 100, 40, 20], 20) - 540.0).abs() < 1e-9);
        // The last row's logits only.
        assert!((base.prefill(&[100, 100, 40, 20], 1) - 521.0).abs() < 1e-9);
        assert!((base.step(&[100, 100, 40, 20]) - 261.0).abs() < 1e-9);
        assert_eq!(base.step(&[100; 4]), 401.0);
    }

    #[test]
    fn curves_are_straight_between_and_beyond_their_points() {
        let curve = Curve::new(vec![(30, 9.0), (10, 1.0), (20, 3.0), (20, 3.0)]);
        let found = [10, 15, 20, 25, 30, 32, 5].map(|n| curve.at(n));
        let want = [1.0, 2.0, 3.0, 6.0, 9.0, 10.2, 0.0];
        assert!(
            found.iter().zip(want).all(|(f, w)| (f - w).abs() < 1e-12),
            "{found:?}"
        );
        assert_eq!(Curve::new(vec![(4, 2.0)]).at(99), 2.0);
        assert!(Curve::default().at(1).is_nan());
    }

    #[test]
    fn few_lengths_are_measured_and_the_ends_are_among_them() {
        assert_eq!(lengths([608, 32, 608, 0, 339], 6), [32, 339, 608]);
        let all = [608, 339, 185, 32, 234, 133, 134, 83];
        // 133 and 134 are as good as one; then 185, between 133 and 234.
        assert_eq!(lengths(all, 7), [32, 83, 133, 185, 234, 339, 608]);
        assert_eq!(lengths(all, 6), [32, 83, 133, 234, 339, 608]);
        assert_eq!(lengths(all, 2), [32, 608]);
        assert_eq!(lengths([5], 6), [5]);
    }
}
