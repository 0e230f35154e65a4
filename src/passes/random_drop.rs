//! Random dropping: K of an image's N tokens, drawn once.
//!
//! ```text
//!  places = the first K of a permutation of 0 … N−1 drawn from `seed`, ascending
//! ```
//!
//! The draw is made when the graph is rewritten and is a constant in it, so every image, run, batch and runtime keeps
//! the same places, and a smaller budget keeps some of what a larger one keeps. (ONNX's `RandomUniform` has a state
//! that no two runtimes share; a draw from the features would change with their last bit.) For other draws, rewrite
//! with other seeds.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): state s = seed; each number is
//! s += 0x9E3779B97F4A7C15, z = s, z = (z ⊕ z≫30) · 0xBF58476D1CE4E5B9, z = (z ⊕ z≫27) · 0x94D049BB133111EB,
//! z ⊕ z≫31, modulo 2⁶⁴. The permutation is Fisher and Yates's: step i swaps place i with
//! i + ⌊number · (N − i) / 2⁶⁴⌋.
//!
//! Random dropping is no method but what every method has to beat.

use serde::Deserialize;

use super::recipe::Count;
use super::selection::Selection;
use super::{Entry, Stage};
use crate::ir::{Patch, ValueId};
use crate::random::SplitMix64;

pub(super) const ENTRY: Entry = Entry {
    name: "random_drop",
    about: "keeps some of an image's tokens, drawn at random once",
    stage: Stage::Encoder,
    keys: &["keep", "seed"],
    parse: super::parse::<RandomDrop>,
    keep_everything: "{keep: 1.0}",
    samples: &["{keep: 30}", "{keep: 0.4, seed: 7}"],
};

/// Parameters of the pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomDrop {
    /// Tokens of an image that stay.
    pub keep: Count,
    /// What the draw is made from.
    #[serde(default)]
    pub seed: u64,
}

impl Selection for RandomDrop {
    const ENTRY: Entry = ENTRY;

    fn keep(&self) -> Count {
        self.keep
    }

    fn places(&self, all: i64, keep: i64) -> Option<Vec<i64>> {
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let mut places: Vec<i64> = (0..all).collect();
        let mut numbers = SplitMix64::new(self.seed);
        for i in 0..size(keep) {
            let left = u64::try_from(places.len() - i).unwrap_or(1);
            let other = i + usize::try_from(numbers.below(left)).unwrap_or(0);
            places.swap(i, other);
        }
        places.truncate(size(keep));
        places.sort_unstable();
        Some(places)
    }

    fn choose(&self, _: &mut Patch<'_>, _: ValueId, _: (i64, i64)) -> Option<ValueId> {
        None
    }

    fn how(&self) -> String {
        format!("drawn at random (seed {})", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_drawn_without_repetition_and_nest() {
        let draw = |keep: i64, seed| {
            let drop = RandomDrop {
                keep: Count::Tokens(keep),
                seed,
            };
            drop.places(576, keep).unwrap()
        };
        let few = draw(64, 0);
        let more = draw(192, 0);
        assert!(more.windows(2).all(|p| p[0] < p[1]) && more.len() == 192);
        assert!(more.iter().all(|p| (0..576).contains(p)));
        assert!(few.iter().all(|p| more.contains(p)));
        assert_ne!(few, draw(64, 1));
        assert_eq!(draw(576, 3), (0..576).collect::<Vec<i64>>());
        // Spread over the image: each quarter has its share, which 64 · ¼ ± 4σ bounds.
        for quarter in 0..4 {
            let inside = few.iter().filter(|p| **p / 144 == quarter).count();
            assert!((3..=29).contains(&inside), "{few:?}");
        }
    }
}
