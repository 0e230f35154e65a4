//! Uniform dropping: K of an image's N tokens at even steps.
//!
//! ```text
//!  place i = ⌊(2·i + 1) · N / (2·K)⌋,  i = 0 … K−1
//! ```
//!
//! Steps go through the rows of the image one after the other, each place in the middle of its step; they are the same
//! for every image. K = N keeps all.

use serde::Deserialize;

use super::recipe::Count;
use super::selection::Selection;
use super::{Entry, Stage};
use crate::ir::{Patch, ValueId};

pub(super) const ENTRY: Entry = Entry {
    name: "uniform_drop",
    about: "keeps some of an image's tokens, at even steps",
    stage: Stage::Encoder,
    keys: &["keep"],
    parse: super::parse::<UniformDrop>,
    keep_everything: "{keep: 1.0}",
    samples: &["{keep: 30}", "{keep: 0.4}"],
};

/// Parameters of the pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UniformDrop {
    /// Tokens of an image that stay.
    pub keep: Count,
}

impl Selection for UniformDrop {
    const ENTRY: Entry = ENTRY;

    fn keep(&self) -> Count {
        self.keep
    }

    fn places(&self, all: i64, keep: i64) -> Option<Vec<i64>> {
        Some((0..keep).map(|i| (2 * i + 1) * all / (2 * keep)).collect())
    }

    fn choose(&self, _: &mut Patch<'_>, _: ValueId, _: (i64, i64)) -> Option<ValueId> {
        None
    }

    fn how(&self) -> String {
        "at even steps".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_even() {
        for all in [1, 2, 81, 196, 576, 729] {
            for keep in 1..=all {
                let drop = UniformDrop {
                    keep: Count::Tokens(keep),
                };
                let places = drop.places(all, keep).unwrap();
                assert!(places.windows(2).all(|p| p[0] < p[1]), "{all} {keep}");
                assert!(places[0] >= 0 && places[places.len() - 1] < all);
                let steps: Vec<i64> = places.windows(2).map(|p| p[1] - p[0]).collect();
                let uneven = |s: &i64| *s != all / keep && *s != all / keep + 1;
                assert!(!steps.iter().any(uneven), "{all} {keep}: {steps:?}");
                // As far from one end as from the other, to a place.
                let (before, behind) = (places[0], all - 1 - places[places.len() - 1]);
                assert!((before - behind).abs() <= 1, "{all} {keep}");
            }
        }
    }
}
