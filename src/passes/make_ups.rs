//! Make-ups of a budget: the ways to spend it that a search tries.
//!
//! A schedule of drops decides how many tokens may enter at a budget (the fewer layers see them, the more), the share of
//! contextual ones how these are made up. The grid is schedules at the first layer and at quarters of the depth, published ones
//! among them, times shares; each make-up takes as much of the budget as whole tokens allow, and never more.

use std::fmt::Write;

use super::budget::{BudgetShape, write_drops};
use super::{Recipe, TokenMerge, VisualPrune};

/// What there is to spend a budget on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Space {
    /// Tokens of an image that can be merged (patches).
    pub patches: i64,
    /// Whether the tower has a CLS token, which `dominant` counts.
    pub cls: bool,
    /// Visual tokens of an image that enter the decoder unmerged.
    pub features: i64,
    /// Images whose tokens enter together: frames, crops.
    pub images: i64,
    /// Whether tokens can be merged.
    pub merges: bool,
    /// Decoder layers.
    pub layers: usize,
    /// Whether the first layer sees all tokens.
    pub placed: bool,
}

impl Space {
    /// Of what a budget is for; none where only a run tells how many tokens an image has.
    pub fn of(shape: &BudgetShape) -> Option<Self> {
        Some(Self {
            patches: shape.patches?,
            cls: shape.cls,
            features: shape.features?,
            images: shape.images.max(1),
            merges: shape.merges,
            layers: shape.layers,
            placed: shape.placed,
        })
    }

    /// Tokens that each layer sees when `entering` are left of each image.
    fn seen(&self, entering: i64, prune: Option<&VisualPrune>) -> Vec<i64> {
        let all = self.images * entering;
        let mut seen = match prune {
            Some(prune) => prune.tokens_per_layer(all, self.layers),
            None => vec![all; self.layers],
        };
        if let (true, true, Some(first)) = (self.placed, entering < self.features, seen.first_mut())
        {
            *first = self.images * self.features;
        }
        seen
    }
}

/// One way to spend a budget.
#[derive(Clone, Debug, PartialEq)]
pub struct MakeUp {
    /// YAML text.
    pub recipe: String,
    /// Tokens of an image that keep their content, CLS counted; none without a merge.
    pub dominant: Option<i64>,
    /// Tokens that take in others; none without a merge.
    pub contextual: Option<i64>,
    /// (layers that have run, share of the entering tokens that stay).
    pub drops: Vec<(usize, f64)>,
    /// Visual tokens that each layer sees.
    pub tokens: Vec<i64>,
    /// Their mean.
    pub average: f64,
}

/// Ratios of schedules after the first layer and at a quarter, half and three quarters of the depth; 1 is no drop.
const SCHEDULES: [[f64; 4]; 20] = [
    [1.0, 1.0, 0.5, 0.0],    // DUET-VLM on LLaVA-1.5
    [1.0, 0.5, 0.25, 0.125], // PyramidDrop, and DUET-VLM on LLaVA-NeXT
    [1.0, 1.0, 0.5, 0.25],   // DUET-VLM on Qwen2.5-VL
    [1.0, 1.0, 1.0, 1.0],    // VisionZip: nothing is dropped
    // Many tokens for the first layer, as FastV has it, and few of them for the others.
    [0.5, 0.5, 0.5, 0.0],
    [0.25, 0.25, 0.25, 0.0],
    [0.125, 0.125, 0.125, 0.0],
    [0.25, 0.25, 0.25, 0.25],
    [1.0, 1.0, 1.0, 0.0],
    [1.0, 1.0, 1.0, 0.5],
    [1.0, 1.0, 0.75, 0.5],
    [1.0, 1.0, 0.5, 0.5],
    [1.0, 1.0, 0.25, 0.0],
    [1.0, 1.0, 0.25, 0.25],
    [1.0, 1.0, 0.0, 0.0],
    [1.0, 0.75, 0.5, 0.25],
    [1.0, 0.5, 0.25, 0.0],
    [1.0, 0.5, 0.5, 0.0],
    [1.0, 0.5, 0.5, 0.5],
    [1.0, 0.25, 0.25, 0.25],
];

/// Contextual tokens as shares of those that enter; published are 1/44 to 1/3.4.
const SHARES: [f64; 4] = [0.0, 0.05, 0.15, 0.3];

/// A make-up that leaves more than this of its budget unused is no rival to others.
const SPENT: f64 = 0.95;

/// Drops of a schedule. Short decoders have no quarters: what falls together or in front of the first layer is left
/// out, and so is what drops nothing.
fn drops(schedule: [f64; 4], layers: usize) -> Vec<(usize, f64)> {
    let mut drops: Vec<(usize, f64)> = Vec::new();
    let places = [1, layers / 4, layers / 2, layers * 3 / 4];
    for (after, keep) in places.into_iter().zip(schedule) {
        let (before, left) = drops.last().copied().unwrap_or((0, 1.0));
        if after > before && after < layers && keep < left {
            drops.push((after, keep));
        }
    }
    drops
}

fn text(merge: Option<(i64, i64)>, drops: &[(usize, f64)]) -> String {
    let mut recipe = String::from("version: 1\npasses:\n");
    if let Some((dominant, contextual)) = merge {
        let _ = write!(
            recipe,
            "  - token_merge:\n      dominant: {dominant}\n      contextual: {contextual}\n      cluster_width: 4\n      \
             selector: attention\n"
        );
    }
    write_drops(&mut recipe, drops, "all");
    recipe
}

fn parsed(recipe: &str) -> Result<Recipe, String> {
    Recipe::parse(recipe).map_err(|e| e.to_string())
}

fn mean(counts: &[i64]) -> f64 {
    counts.iter().sum::<i64>() as f64 / counts.len().max(1) as f64
}

/// The make-up of a recipe.
///
/// # Errors
/// The text is no recipe.
fn read(space: &Space, recipe: &str) -> Result<MakeUp, String> {
    let parsed = parsed(recipe)?;
    let merge = parsed.pass::<TokenMerge>();
    let prune = parsed.pass::<VisualPrune>();
    let count = |merge: &TokenMerge| {
        let (dominant, contextual) = (
            merge.dominant.of(space.patches),
            merge.contextual.of(space.patches),
        );
        (dominant, contextual)
    };
    let counts = merge.map(count);
    let entering = counts.map_or(space.features, |(dominant, contextual)| {
        dominant + contextual
    });
    let tokens = space.seen(entering, prune);
    Ok(MakeUp {
        recipe: recipe.to_owned(),
        dominant: counts.map(|c| c.0),
        contextual: counts.map(|c| c.1),
        drops: prune.map_or(Vec::new(), |p| {
            p.drops.iter().map(|d| (d.after_layer, d.keep)).collect()
        }),
        average: mean(&tokens),
        tokens,
    })
}

/// Make-ups whose layers see at most `budget` visual tokens on average: `first`, a recipe that is to be among them, and
/// then the grid, without those that repeat another or leave much of the budget unused.
///
/// # Errors
/// `first` is no recipe, or nothing fits.
pub fn make_ups(space: &Space, budget: f64, first: Option<&str>) -> Result<Vec<MakeUp>, String> {
    let first = first.map(|text| read(space, text)).transpose()?;
    // Of other passes nothing is read here, and so nothing that they leave out.
    if let Some(other) = first.as_ref().filter(|first| first.average > budget) {
        return Err(format!(
            "only token_merge and visual_prune have make-ups to search; without a search the recipe is\n{}",
            other.recipe
        ));
    }
    let mut found: Vec<MakeUp> = first.into_iter().collect();
    for schedule in SCHEDULES {
        let drops = drops(schedule, space.layers);
        let more = match space.merges {
            true => merging(space, budget, &drops)?,
            false => pruning(space, budget, &drops)?.into_iter().collect(),
        };
        for make_up in more {
            let same = |other: &MakeUp| {
                (other.dominant, other.contextual) == (make_up.dominant, make_up.contextual)
                    && other.drops == make_up.drops
            };
            if make_up.average >= SPENT * budget && !found.iter().any(same) {
                found.push(make_up);
            }
        }
    }
    match found.is_empty() {
        true => Err(format!(
            "no make-up spends {budget:.2} visual tokens per layer"
        )),
        false => Ok(found),
    }
}

/// The most tokens that may enter, in shares of contextual ones.
fn merging(space: &Space, budget: f64, drops: &[(usize, f64)]) -> Result<Vec<MakeUp>, String> {
    let only = text(None, drops);
    let recipe = parsed(&only)?;
    let prune = recipe.pass::<VisualPrune>();
    let most = (space.patches + i64::from(space.cls)).min(space.features);
    // The mean rises with what enters.
    let (mut entering, mut beyond) = (0, most + 1);
    while beyond - entering > 1 {
        let middle = entering + (beyond - entering) / 2;
        match mean(&space.seen(middle, prune)) <= budget {
            true => entering = middle,
            false => beyond = middle,
        }
    }
    if entering >= most {
        // All of them may enter: nothing is merged.
        return Ok(match drops.is_empty() {
            true => Vec::new(),
            false => vec![read(space, &only)?],
        });
    }
    let least = 1 + i64::from(space.cls);
    let mut found = Vec::new();
    for share in SHARES {
        #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
        let contextual = (entering as f64 * share).round() as i64;
        if entering - contextual >= least {
            found.push(read(
                space,
                &text(Some((entering - contextual, contextual)), drops),
            )?);
        }
    }
    Ok(found)
}

/// Where nothing can be merged, the schedule's places with the largest ratio that fits, the same at each.
fn pruning(space: &Space, budget: f64, drops: &[(usize, f64)]) -> Result<Option<MakeUp>, String> {
    let ends = drops.last().is_some_and(|d| d.1 == 0.0);
    let at = |step: i32| -> Vec<(usize, f64)> {
        let ratio = f64::from(step) / 1000.0;
        let last = drops.len().saturating_sub(1);
        let keep = |i: usize| match ends && i == last {
            true => 0.0,
            false => (ratio.powi(i as i32 + 1) * 1e4).floor() / 1e4,
        };
        drops
            .iter()
            .enumerate()
            .map(|(i, d)| (d.0, keep(i)))
            .collect()
    };
    let fits = |step: i32| -> Result<bool, String> {
        Ok(read(space, &text(None, &at(step)))?.average <= budget)
    };
    if drops.is_empty() || !fits(1)? {
        return Ok(None);
    }
    let (mut step, mut beyond) = (1, 1000);
    while beyond - step > 1 {
        let middle = step + (beyond - step) / 2;
        match fits(middle)? {
            true => step = middle,
            false => beyond = middle,
        }
    }
    read(space, &text(None, &at(step))).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAVA: Space = Space {
        patches: 576,
        cls: true,
        features: 576,
        images: 1,
        merges: true,
        layers: 32,
        placed: false,
    };

    const PUBLISHED: &str = "version: 1\npasses:\n  - token_merge: {dominant: 300, contextual: 7}\n  - visual_prune: \
                             {drops: [{after_layer: 16, keep: 0.5}, {after_layer: 24, keep: 0.0}]}\n";

    #[test]
    fn every_make_up_keeps_the_budget_and_spends_it() {
        for (space, budget) in [
            (LLAVA, 192.0),
            (LLAVA, 64.0),
            (
                Space {
                    cls: false,
                    patches: 196,
                    features: 196,
                    layers: 12,
                    ..LLAVA
                },
                65.3,
            ),
            (
                Space {
                    images: 8,
                    features: 257,
                    patches: 256,
                    ..LLAVA
                },
                960.0,
            ),
            (
                Space {
                    placed: true,
                    patches: 1196,
                    features: 1196,
                    layers: 28,
                    cls: false,
                    ..LLAVA
                },
                440.0,
            ),
            (
                Space {
                    merges: false,
                    ..LLAVA
                },
                288.0,
            ),
        ] {
            let found = make_ups(&space, budget, None).unwrap();
            assert!(found.len() > 4, "{space:?}: {}", found.len());
            for one in &found {
                assert!(
                    one.average <= budget && one.average >= SPENT * budget,
                    "{space:?}: {one:?}"
                );
                // What the make-up says is what its recipe says.
                assert_eq!(&read(&space, &one.recipe).unwrap(), one);
                assert!(
                    one.drops.is_sorted_by(|a, b| a.0 < b.0 && a.1 >= b.1),
                    "{one:?}"
                );
            }
            let mut texts: Vec<&str> = found.iter().map(|m| m.recipe.as_str()).collect();
            texts.sort_unstable();
            texts.dedup();
            assert_eq!(texts.len(), found.len(), "{space:?}");
        }
    }

    #[test]
    fn the_published_make_up_is_the_first_of_many() {
        let found = make_ups(&LLAVA, 192.0, Some(PUBLISHED)).unwrap();
        assert_eq!(
            (found[0].dominant, found[0].contextual, found[0].average),
            (Some(300), Some(7), 191.75)
        );
        assert!(found.len() > 30, "{}", found.len());
        // VisionZip's: all layers see the same.
        assert!(
            found
                .iter()
                .any(|m| m.drops.is_empty() && m.dominant == Some(163) && m.contextual == Some(29))
        );
        // So does one whose drops come early.
        assert!(
            found
                .iter()
                .any(|m| m.drops == [(1, 0.5), (24, 0.0)] && m.dominant.is_some_and(|d| d > 400))
        );
        // A schedule that ends early lets more in.
        assert!(
            found
                .iter()
                .any(|m| m.drops == [(16, 0.0)] && m.dominant == Some(384))
        );
    }

    #[test]
    fn what_cannot_be_spent_is_an_error() {
        assert!(make_ups(&LLAVA, 0.1, None).unwrap_err().contains("0.10"));
        assert!(make_ups(&LLAVA, 192.0, Some("passes: []")).is_err());
        let other = make_ups(&LLAVA, 192.0, Some("version: 1\npasses: []")).unwrap_err();
        assert!(
            other.contains("only token_merge and visual_prune"),
            "{other}"
        );
        let shallow = Space { layers: 1, ..LLAVA };
        let found = make_ups(&shallow, 100.0, None).unwrap();
        assert!(found.iter().all(|m| m.drops.is_empty()), "{found:?}");
    }
}
