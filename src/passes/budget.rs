//! A recipe for a budget: how many visual tokens the layers of a decoder may see on average.
//!
//! The shape of the schedule is the published one (DUET-VLM, arXiv 2602.18846, the LLaVA-1.5 budgets): half of the
//! tokens leave after half of the layers, all of them after three quarters, so that e tokens entering a decoder of
//! L layers average 0.625·e. How many of the entering tokens are contextual is interpolated between the published
//! budgets of 192, 128 and 64 of 576. Where nothing can be merged, three drops by the same ratio at quarters of
//! the depth (PyramidDrop's shape) meet the budget alone.

use std::fmt::Write;

/// What a recipe is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetShape {
    /// Patch tokens of the tower.
    pub patches: i64,
    /// Whether the tower has a CLS token.
    pub cls: bool,
    /// Visual tokens that reach the decoder unmerged.
    pub features: i64,
    /// Whether tokens can be merged behind the tower.
    pub merges: bool,
    /// Whether discarded features would keep their places, so that the first layer sees
    /// all (`placement: decoder`).
    pub placed: bool,
    /// Decoder layers; 0 if there is no decoder to prune.
    pub layers: usize,
}

/// A recipe made for a budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// YAML text.
    pub recipe: String,
    /// Visual tokens that each decoder layer sees.
    pub tokens: Vec<i64>,
    /// Their mean: at most the budget.
    pub average: f64,
}

/// (entering tokens as a share of the patches, contextual ones as a share of the entering), published.
const PUBLISHED: [(f64, f64); 3] = [
    (102.0 / 576.0, 30.0 / 102.0),
    (202.0 / 576.0, 32.0 / 202.0),
    (307.0 / 576.0, 7.0 / 307.0),
];

/// A recipe under which decoder layers see at most `budget` visual tokens on average.
///
/// # Errors
/// A budget that is no less than what there is, or that leaves no token.
pub fn plan(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let all = shape.features;
    if !(budget > 0.0 && budget < all as f64) {
        return Err(format!(
            "the budget is {budget:.2} visual tokens per layer; expected more than 0 and less than the {all} that \
             there are"
        ));
    }
    if shape.merges {
        merging(shape, budget)
    } else {
        pruning(shape, budget)
    }
}

/// Tokens by layer under `drops`: (layers that have run, share of the entering tokens).
/// The first layer sees as many as `first`, if there are more of them.
fn by_layer(entering: i64, first: i64, drops: &[(usize, f64)], layers: usize) -> Vec<i64> {
    let kept = |layer: usize| {
        let last = drops.iter().rev().find(|(after, _)| *after <= layer);
        #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
        last.map_or(entering, |(_, keep)| (entering as f64 * keep) as i64)
    };
    let mut counts: Vec<i64> = (0..layers.max(1)).map(kept).collect();
    counts[0] = counts[0].max(first);
    counts
}

fn mean(counts: &[i64]) -> f64 {
    counts.iter().sum::<i64>() as f64 / counts.len().max(1) as f64
}

fn merging(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let layers = shape.layers;
    // Short decoders have no three quarters: what falls together or onto the end is left out.
    let mut drops: Vec<(usize, f64)> = Vec::new();
    for (after, keep) in [(layers / 2, 0.5), (layers * 3 / 4, 0.0)] {
        if after > drops.last().map_or(0, |d| d.0) && after < layers {
            drops.push((after, keep));
        }
    }
    let most = shape.patches + i64::from(shape.cls);
    let first = if shape.placed { shape.features } else { 0 };
    let fits = |entering: &i64| mean(&by_layer(*entering, first, &drops, layers)) <= budget;
    let Some(entering) = (1..=most).rev().find(fits) else {
        return Err(format!(
            "no token is left at a budget of {budget:.2} per layer"
        ));
    };
    if entering >= shape.features && layers > 1 {
        // Generous enough for every token to enter: later and weaker drops will do.
        return pruning(shape, budget);
    }
    let contextual = contextual(entering, shape.patches);
    let dominant = entering - contextual;
    let mut recipe = format!("version: 1\npasses:\n  - token_merge:\n      dominant: {dominant}");
    if shape.cls {
        recipe += " # CLS counted";
    }
    let _ = write!(
        recipe,
        "\n      contextual: {contextual}\n      cluster_width: 4\n      selector: attention\n"
    );
    Ok(finish(recipe, entering, first, &drops, layers))
}

/// Contextual tokens among `entering`, as the published budgets have them.
fn contextual(entering: i64, patches: i64) -> i64 {
    let at = entering as f64 / patches.max(1) as f64;
    let [(a, share_a), (b, share_b), (c, share_c)] = PUBLISHED;
    let between = |x0: f64, y0: f64, x1: f64, y1: f64| y0 + (at - x0) / (x1 - x0) * (y1 - y0);
    let share = if at < b {
        between(a, share_a, b, share_b)
    } else {
        between(b, share_b, c, share_c)
    };
    #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
    let count = (entering as f64 * share.clamp(0.0, 1.0 / 3.0)).round() as i64;
    count.clamp(0, (entering - 1).max(0))
}

fn pruning(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let layers = shape.layers;
    if layers < 2 {
        return Err(
            "there is neither a tower to merge behind nor a decoder layer to prune before".into(),
        );
    }
    let mut places: Vec<usize> = [layers / 4, layers / 2, layers * 3 / 4]
        .into_iter()
        .map(|l| l.max(1))
        .collect();
    places.dedup();
    let schedule = |ratio: f64| -> Vec<(usize, f64)> {
        let keep = |power: usize| {
            (ratio.powi(i32::try_from(power).unwrap_or(i32::MAX)) * 1e4).floor() / 1e4
        };
        places
            .iter()
            .enumerate()
            .map(|(i, &after)| (after, keep(i + 1)))
            .collect()
    };
    let fits = |step: &i32| {
        let drops = schedule(f64::from(*step) / 1000.0);
        mean(&by_layer(shape.features, 0, &drops, layers)) <= budget
    };
    let Some(step) = (0..1000).rev().find(fits) else {
        return Err(format!(
            "{budget:.2} visual tokens per layer cannot be met by pruning alone: the first {} of {layers} layers see \
             all {} tokens",
            places[0], shape.features
        ));
    };
    let drops = schedule(f64::from(step) / 1000.0);
    Ok(finish(
        "version: 1\npasses:\n".into(),
        shape.features,
        0,
        &drops,
        layers,
    ))
}

fn finish(
    mut recipe: String,
    entering: i64,
    first: i64,
    drops: &[(usize, f64)],
    layers: usize,
) -> Planned {
    if !drops.is_empty() {
        recipe += "  - visual_prune:\n      drops:\n";
        for (after, keep) in drops {
            let _ = writeln!(
                recipe,
                "        - {{ after_layer: {after}, keep: {keep:?} }}"
            );
        }
        recipe += "      text: all\n";
    }
    let tokens = by_layer(entering, first, drops, layers);
    let average = mean(&tokens);
    Planned {
        recipe,
        tokens,
        average,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{Recipe, TokenMerge, VisualPrune};

    const LLAVA: BudgetShape = BudgetShape {
        patches: 576,
        cls: true,
        features: 576,
        merges: true,
        placed: false,
        layers: 32,
    };

    #[test]
    fn the_published_budgets_come_out() {
        for (budget, entering, contextual, average) in
            [(192.0, 307, 7, 191.75), (64.0, 102, 30, 63.75)]
        {
            let planned = plan(LLAVA, budget).unwrap();
            assert_eq!(planned.average, average);
            let recipe = Recipe::parse(&planned.recipe).unwrap();
            let merge = recipe.pass::<TokenMerge>().unwrap();
            assert_eq!(
                (merge.dominant.of(576), merge.contextual.of(576)),
                (entering - contextual, contextual)
            );
            let drops = &recipe.pass::<VisualPrune>().unwrap().drops;
            assert_eq!(
                drops
                    .iter()
                    .map(|d| (d.after_layer, d.keep))
                    .collect::<Vec<_>>(),
                [(16, 0.5), (24, 0.0)]
            );
        }
    }

    #[test]
    fn no_budget_is_exceeded_or_wasted() {
        for layers in [1, 2, 3, 8, 24, 28, 32] {
            for patches in [16, 81, 144, 576, 729] {
                for merges in [true, false] {
                    for percent in [5, 20, 33, 50, 80, 95] {
                        let shape = BudgetShape {
                            patches,
                            cls: merges,
                            features: patches,
                            merges,
                            placed: false,
                            layers,
                        };
                        let budget = (patches * percent) as f64 / 100.0;
                        let Ok(planned) = plan(shape, budget) else {
                            assert!(!merges || budget < 1.0, "{shape:?} {budget}");
                            continue;
                        };
                        assert!(planned.average <= budget, "{shape:?}: {planned:?}");
                        // A token more in every layer, or a slightly weaker ratio, would be too much.
                        let slack = 1.0 + 0.01 * patches as f64;
                        assert!(
                            planned.average > budget - slack,
                            "{shape:?} {budget}: {planned:?}"
                        );
                        Recipe::parse(&planned.recipe).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_layer_counts_where_features_keep_their_places() {
        let placed = BudgetShape {
            placed: true,
            ..LLAVA
        };
        let (fewer, all) = (plan(placed, 192.0).unwrap(), plan(LLAVA, 192.0).unwrap());
        assert_eq!(fewer.tokens[0], 576);
        assert!(fewer.tokens[1] < all.tokens[1] && fewer.average <= 192.0);
        // One layer of 32 sees all 576, which alone makes 18.
        assert!(plan(placed, 18.0).is_err());
    }

    #[test]
    fn what_cannot_be_met_is_an_error() {
        assert!(plan(LLAVA, 576.0).unwrap_err().contains("576"));
        assert!(plan(LLAVA, 0.0).is_err());
        assert!(plan(LLAVA, f64::NAN).is_err());
        let alone = BudgetShape {
            merges: false,
            ..LLAVA
        };
        assert!(
            plan(alone, 100.0)
                .unwrap_err()
                .contains("first 8 of 32 layers")
        );
    }
}
