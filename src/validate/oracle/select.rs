//! Stage 1 without merging: which tokens of an image are kept as they are, and the others left out.
//!
//! Random and even choices do not look at the image; the diverse one does, in `f64`, with distances rounded to `f32`
//! like every score here, so that equal tokens are equally far from any other.

use ndarray::{Array2, ArrayView2};

use super::OracleError;
use super::math::dot;
use super::merge::Budget;

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// Drawn from a seed, the same for every image.
    Random {
        /// The generator's first state.
        seed: u64,
    },
    /// At even steps.
    Even,
    /// The least alike (DivPrune).
    Diverse,
}

/// How many tokens of an image stay, and which.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kept {
    /// How many.
    pub keep: Budget,
    /// Which.
    pub how: Keeping,
}

/// The `keep` of `all` places that no image has a say in, ascending; none for [`Keeping::Diverse`].
pub fn fixed_places(how: Keeping, all: usize, keep: usize) -> Option<Vec<usize>> {
    match how {
        Keeping::Random { seed } => Some(drawn(seed, all, keep)),
        Keeping::Even => Some(even(all, keep)),
        Keeping::Diverse => None,
    }
}

/// SplitMix64's numbers, as a high part of a product, deal `keep` cards of a deck of `all`, which are then sorted.
fn drawn(seed: u64, all: usize, keep: usize) -> Vec<usize> {
    let mut state = seed;
    let mut deck: Vec<usize> = (0..all).collect();
    let mut hand = Vec::new();
    while hand.len() < keep.min(all) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let number = u128::from(mixed ^ (mixed >> 31));
        // The card there goes, and the top one takes its place.
        let from = ((number * deck.len() as u128) >> 64) as usize;
        hand.push(deck[from]);
        deck[from] = deck[0];
        deck.remove(0);
    }
    hand.sort_unstable();
    hand
}

/// The place in the middle of each of `keep` equal parts of `all`.
fn even(all: usize, keep: usize) -> Vec<usize> {
    let part = all as f64 / keep.max(1) as f64;
    (0..keep)
        .map(|i| ((i as f64 + 0.5) * part + 1e-9).floor() as usize)
        .collect()
}

/// Cosine distances of the rows of `features` `[N, D]`.
fn distances(features: ArrayView2<'_, f32>) -> Array2<f32> {
    let rows = features.nrows();
    let norms: Vec<f64> = features
        .outer_iter()
        .map(|row| dot(row, row).sqrt().max(1e-12))
        .collect();
    let mut all = Array2::zeros((rows, rows));
    for i in 0..rows {
        for j in i..rows {
            let cosine = dot(features.row(i), features.row(j)) / (norms[i] * norms[j]);
            let distance = (1.0 - cosine) as f32;
            all[[i, j]] = distance;
            all[[j, i]] = distance;
        }
    }
    all
}

/// Places of the `keep` rows of `features` `[N, D]` that are least alike, in the order in which they are chosen: first
/// the one that is farthest from the nearest other, then each time the one that is farthest from the nearest chosen;
/// of equal ones the first.
///
/// # Errors
/// [`OracleError::NotFinite`] for features without distances.
pub fn diverse(features: ArrayView2<'_, f32>, keep: usize) -> Result<Vec<usize>, OracleError> {
    let mut walk = Diversity::new(features)?;
    for _ in 0..keep.min(features.nrows()) {
        let (best, _) = walk.best();
        walk.choose(best);
    }
    Ok(walk.chosen)
}

/// The same along a given `order`: how many of its choices were not the oracle's, if each was as far as that to within
/// `tolerance` of a cosine; `None` if one was not, or is no choice.
///
/// # Errors
/// As [`diverse`].
pub fn diverse_along(
    features: ArrayView2<'_, f32>,
    order: &[usize],
    tolerance: f32,
) -> Result<Option<usize>, OracleError> {
    let mut walk = Diversity::new(features)?;
    let mut others = 0;
    for &choice in order {
        if choice >= features.nrows() || walk.chosen.contains(&choice) {
            return Ok(None);
        }
        let (best, far) = walk.best();
        if walk.nearest[choice] < far - tolerance {
            return Ok(None);
        }
        others += usize::from(best != choice);
        walk.choose(choice);
    }
    Ok(Some(others))
}

/// How far each token is from the nearest that counts.
struct Diversity {
    distances: Array2<f32>,
    nearest: Vec<f32>,
    chosen: Vec<usize>,
}

impl Diversity {
    fn new(features: ArrayView2<'_, f32>) -> Result<Self, OracleError> {
        let distances = distances(features);
        if let Some((index, &value)) = distances.iter().enumerate().find(|(_, d)| !d.is_finite()) {
            let what = "distance of two tokens";
            return Err(OracleError::NotFinite { what, index, value });
        }
        let rows = features.nrows();
        let nearest_other = |i: usize| {
            let others = (0..rows).filter(|j| *j != i);
            others
                .map(|j| distances[[i, j]])
                .fold(f32::INFINITY, f32::min)
        };
        let nearest = (0..rows).map(nearest_other).collect();
        Ok(Self {
            distances,
            nearest,
            chosen: Vec::new(),
        })
    }

    /// The farthest token that was not chosen, and how far it is.
    fn best(&self) -> (usize, f32) {
        let left = (0..self.nearest.len()).filter(|i| !self.chosen.contains(i));
        let farther = |best: (usize, f32), i: usize| match self.nearest[i] > best.1 {
            true => (i, self.nearest[i]),
            false => best,
        };
        left.fold((0, f32::NEG_INFINITY), farther)
    }

    fn choose(&mut self, choice: usize) {
        let first = self.chosen.is_empty();
        for (i, nearest) in self.nearest.iter_mut().enumerate() {
            let distance = self.distances[[choice, i]];
            *nearest = if first {
                distance
            } else {
                nearest.min(distance)
            };
        }
        self.chosen.push(choice);
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn the_least_alike_are_chosen_one_after_the_other() {
        // Angles 0°, 10°, 88°, 100°, 200°: the last has the farthest nearest neighbour.
        let at = |degrees: f32| degrees.to_radians().sin_cos();
        let rows: Vec<[f32; 2]> = [0.0, 10.0, 88.0, 100.0, 200.0]
            .map(|d| {
                let (s, c) = at(d);
                [c * (d + 1.0), s * (d + 1.0)]
            })
            .to_vec();
        let features = Array2::from(rows);
        // From 200°, 10° is 170° away; 100° then is 90° from 10°; and 88° 12° from 100°, 0° 10° from 10°.
        let order = diverse(features.view(), 4).unwrap();
        assert_eq!(order, [4, 1, 3, 2]);
        assert_eq!(
            diverse_along(features.view(), &order, 0.0).unwrap(),
            Some(0)
        );
        assert_eq!(
            diverse_along(features.view(), &[4, 0, 3], 0.05).unwrap(),
            Some(1)
        );
        assert_eq!(
            diverse_along(features.view(), &[4, 0, 3], 1e-4).unwrap(),
            None
        );
        for wrong in [&[4, 4][..], &[5], &[0]] {
            assert_eq!(diverse_along(features.view(), wrong, 1e-3).unwrap(), None);
        }
    }

    #[test]
    fn equal_tokens_are_taken_in_order() {
        let features = array![[1.0_f32, 0.0], [2.0, 0.0], [0.0, 3.0], [5.0, 0.0]];
        assert_eq!(diverse(features.view(), 4).unwrap(), [2, 0, 1, 3]);
        let broken = array![[1.0_f32, f32::NAN], [2.0, 0.0]];
        assert!(diverse(broken.view(), 1).is_err());
    }

    #[test]
    fn places_that_no_image_decides() {
        let even = |all, keep| fixed_places(Keeping::Even, all, keep).unwrap();
        assert_eq!(even(9, 3), [1, 4, 7]);
        assert_eq!(even(10, 4), [1, 3, 6, 8]);
        assert_eq!(even(6, 6), [0, 1, 2, 3, 4, 5]);
        let drawn = |seed, keep| fixed_places(Keeping::Random { seed }, 81, keep).unwrap();
        assert_eq!(drawn(5, 81), (0..81).collect::<Vec<_>>());
        assert!(drawn(5, 9).iter().all(|p| drawn(5, 20).contains(p)));
        assert_ne!(drawn(5, 9), drawn(6, 9));
    }
}
