//! Recipes of other published methods, at the budget that DUET's are made for, to compare with.
//!
//! | method | tokens leave | as published |
//! |---|---|---|
//! | VisionZip | behind the tower, merged | 10 of 64 contextual, anchors at even steps (arXiv 2412.04467) |
//! | PyramidDrop | in the decoder, ranked by the last token | after each quarter of the layers the same share of what was left, half of it (arXiv 2410.17247) |
//!
//! PyramidDrop's half averages 46.9 % of the tokens. Budgets below that are met as public comparisons at equal budgets
//! meet them: with one more drop after two layers, and the share that the average asks for (LLaVA-1.5: 0.581, 0.437 and
//! 0.196 at 192, 128 and 64 of 576 tokens). Where two layers alone are more than the budget, it comes after one.

use std::fmt::Write;

use super::budget::{BudgetShape, Planned, Said, by_layer, finish, mean};

/// Whose recipe is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// DUET: both stages.
    #[default]
    Duet,
    /// VisionZip: merging alone.
    VisionZip,
    /// PyramidDrop: pruning alone.
    PyramidDrop,
}

impl Method {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Duet, Self::VisionZip, Self::PyramidDrop];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Duet => "duet",
            Self::VisionZip => "visionzip",
            Self::PyramidDrop => "pyramiddrop",
        }
    }

    /// What it does, in a few words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Duet => "merging behind the tower, and pruning in the decoder",
            Self::VisionZip => "merging alone (VisionZip)",
            Self::PyramidDrop => "pruning alone, ranked by the last token (PyramidDrop)",
        }
    }

    /// The method of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|m| m.name() == name)
    }
}

/// Contextual tokens among VisionZip's: 10 of 64, 20 of 128, 30 of 192.
const VISION_ZIP: f64 = 10.0 / 64.0;

/// Layers after which the early drop comes where quarters of the depth are too late, the published one first.
const EARLY: [usize; 2] = [2, 1];

/// Above the budget by at most this share, where counts allow no nearer mean.
const SLACK: f64 = 0.01;

/// A recipe of `shape`'s method.
///
/// # Errors
/// A budget that the method cannot meet, or a model that it does not work on.
pub(super) fn make(shape: BudgetShape, budget: f64, said: Said) -> Result<Planned, String> {
    match shape.method {
        // (`budget` makes these.)
        Method::Duet | Method::VisionZip => vision_zip(shape, budget, said),
        Method::PyramidDrop => pyramid_drop(shape, budget),
    }
}

/// Of the numbers from 1 to `most`, that whose mean is nearest to the budget and hardly above it. Means rise.
fn nearest(most: i64, budget: f64, mean_of: impl Fn(i64) -> f64) -> Option<i64> {
    let (mut under, mut over) = (0, most + 1);
    while over - under > 1 {
        let middle = under + (over - under) / 2;
        match mean_of(middle) <= budget {
            true => under = middle,
            false => over = middle,
        }
    }
    let above = (over <= most).then(|| mean_of(over));
    let better = |mean: f64| {
        mean <= budget * (1.0 + SLACK) && (under == 0 || mean - budget < budget - mean_of(under))
    };
    match above.is_some_and(better) {
        true => Some(over),
        false => (under > 0).then_some(under),
    }
}

/// The largest number of tokens that an image may keep, where only a budget limits it.
fn most(shape: BudgetShape, budget: f64) -> i64 {
    #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
    let open = budget.min(1e12) as i64 + 1;
    shape.patches.unwrap_or(open)
}

fn headline(method: &str, source: &str) -> String {
    format!("# {method} ({source})\nversion: 1\npasses:\n")
}

fn vision_zip(shape: BudgetShape, budget: f64, said: Said) -> Result<Planned, String> {
    if !shape.merges {
        return Err(
            "VisionZip merges tokens behind the vision tower, which this model does not allow"
                .into(),
        );
    }
    let images = shape.images.max(1);
    let seen = |entering: i64| shape.merged(images * entering, &[]);
    let most = most(shape, budget) + i64::from(shape.cls);
    let entering = nearest(most, budget, |entering| mean(&seen(entering)));
    let entering = entering.ok_or_else(|| shape.no_token_left(budget))?;
    #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
    let contextual = ((entering as f64 * VISION_ZIP).round() as i64).clamp(0, entering - 1);
    let count = |tokens: i64| said.count(tokens);
    let mut recipe = headline("VisionZip", "arXiv 2412.04467");
    let _ = write!(
        recipe,
        "  - token_merge:\n      dominant: {}{}\n      contextual: {}\n      selector: uniform\n",
        count(entering - contextual),
        if shape.cls { " # CLS counted" } else { "" },
        count(contextual),
    );
    Ok(finish(recipe, seen(entering), &[], ""))
}

/// Shares of the entering tokens behind each place, each `step` ten-thousandths of the one before.
fn falling(places: &[usize], step: i64) -> Vec<(usize, f64)> {
    let ratio = step as f64 / 1e4;
    let power = |i: usize| ratio.powi(i32::try_from(i).unwrap_or(i32::MAX));
    let places = places.iter().enumerate();
    places
        // Six digits say a token of a million.
        .map(|(i, &after)| (after, (power(i + 1) * 1e6).floor() / 1e6))
        .collect()
}

fn pyramid_drop(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let layers = shape.layers;
    let features = shape.features.ok_or(
        "pruning keeps ratios of a number of tokens that only the run tells; ask for a reduction (67%), or say how \
         many tokens an image has (--tokens)",
    )?;
    if layers < 2 {
        return Err(
            "PyramidDrop drops tokens between decoder layers, of which there are less than two"
                .into(),
        );
    }
    let all = features * shape.images.max(1);
    let quarters = [layers / 4, layers / 2, layers * 3 / 4];
    let mut quarters: Vec<usize> = quarters.iter().map(|&l| l.max(1)).collect();
    quarters.dedup();
    let early = EARLY.into_iter().filter(|e| *e < quarters[0]);
    let early = early.map(|e| [&[e], quarters.as_slice()].concat());
    // At a quarter the published half and more; less only where nothing comes before.
    let half = match quarters[0] {
        1 => 1,
        _ => 5_000,
    };
    let schedules =
        std::iter::once((quarters.clone(), half)).chain(early.map(|places| (places, 1)));
    for (places, least) in schedules {
        let seen = |step: i64| by_layer(all, &falling(&places, step), layers);
        let step = nearest(9_999, budget, |step| mean(&seen(step)));
        if let Some(step) = step.filter(|step| *step >= least) {
            let recipe = headline("PyramidDrop", "arXiv 2410.17247");
            return Ok(finish(recipe, seen(step), &falling(&places, step), "last"));
        }
    }
    Err(format!(
        "PyramidDrop drops tokens between decoder layers: the first of {layers} sees all {all}, {:.2} per layer on \
         average, which is no less than the budget of {budget:.2}",
        all as f64 / layers as f64
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{Recipe, Style, TextQueries, TokenMerge, VisualPrune, plan, plan_share};

    const LLAVA: BudgetShape = BudgetShape {
        patches: Some(576),
        cls: true,
        features: Some(576),
        images: 1,
        merges: true,
        layers: 32,
        style: Style::Image,
        placed: false,
        method: Method::VisionZip,
    };

    fn of(method: Method) -> BudgetShape {
        BudgetShape { method, ..LLAVA }
    }

    #[test]
    fn vision_zip_is_as_published() {
        for (budget, dominant, contextual) in [(192.0, 162, 30), (128.0, 108, 20), (64.0, 54, 10)] {
            let planned = plan(LLAVA, budget).unwrap();
            assert_eq!(planned.average, budget);
            let recipe = Recipe::parse(&planned.recipe).unwrap();
            let merge = recipe.pass::<TokenMerge>().unwrap();
            assert_eq!(
                (merge.dominant.of(576), merge.contextual.of(576)),
                (dominant, contextual)
            );
            assert!(recipe.pass::<VisualPrune>().is_none());
        }
    }

    #[test]
    fn pyramid_drop_is_as_published() {
        // The paper's own setting: half after each quarter.
        let planned = plan(of(Method::PyramidDrop), 270.0).unwrap();
        let prune = |text: &str| Recipe::parse(text).unwrap();
        let recipe = prune(&planned.recipe);
        let drops = &recipe.pass::<VisualPrune>().unwrap().drops;
        let drops: Vec<_> = drops.iter().map(|d| (d.after_layer, d.keep)).collect();
        assert_eq!(drops, [(8, 0.5), (16, 0.25), (24, 0.125)]);
        assert_eq!(planned.average, 270.0);
        // Shares of public comparisons at equal budgets, to a hundredth.
        for (budget, share) in [(192.0, 0.581), (128.0, 0.437), (64.0, 0.196)] {
            let planned = plan(of(Method::PyramidDrop), budget).unwrap();
            let recipe = prune(&planned.recipe);
            let pass = recipe.pass::<VisualPrune>().unwrap();
            assert_eq!(pass.text, TextQueries::Last);
            let layers: Vec<usize> = pass.drops.iter().map(|d| d.after_layer).collect();
            assert_eq!(layers, [2, 8, 16, 24]);
            assert!((pass.drops[0].keep - share).abs() < 0.01, "{planned:?}");
            assert!(
                (planned.average - budget).abs() < 0.01 * budget,
                "{planned:?}"
            );
        }
    }

    /// Whatever the depth: what is planned is what the passes count, and hits the budget.
    #[test]
    fn budgets_are_hit_at_any_depth() {
        for &method in &Method::ALL[1..] {
            for layers in [2, 4, 8, 12, 16, 24, 28, 32, 40] {
                for patches in [81, 196, 576] {
                    for percent in [11.0, 22.0, 33.0, 50.0, 80.0] {
                        let shape = BudgetShape {
                            patches: Some(patches),
                            features: Some(patches),
                            layers,
                            ..of(method)
                        };
                        let budget = patches as f64 * percent / 100.0;
                        let planned = match plan(shape, budget) {
                            Ok(planned) => planned,
                            Err(error) => {
                                // All tokens in one layer are more than the budget.
                                let one = patches as f64 / layers as f64;
                                assert!(
                                    one + 1.0 > budget,
                                    "{method:?} {layers} {patches} {percent}: {error}"
                                );
                                continue;
                            }
                        };
                        let place = format!("{shape:?} at {budget}: {planned:?}");
                        assert!(planned.average <= budget * 1.01, "{place}");
                        // A token more or less in every layer, or a step of the share.
                        assert!(
                            (planned.average - budget).abs() <= 0.5_f64.max(0.01 * budget),
                            "{place}"
                        );
                        let recipe = Recipe::parse(&planned.recipe).unwrap();
                        let entering = recipe.tokens_left_of(patches, true).unwrap_or(patches);
                        assert_eq!(
                            recipe.tokens_per_layer(entering, layers),
                            planned.tokens,
                            "{place}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn shares_and_models_that_do_not_fit() {
        let open = BudgetShape {
            patches: None,
            features: None,
            cls: false,
            layers: 28,
            style: Style::Grid,
            ..LLAVA
        };
        let planned = plan_share(open, 0.3).unwrap();
        assert!((planned.average - 0.3).abs() < 1e-3, "{planned:?}");
        let planned = plan_share(
            BudgetShape {
                method: Method::PyramidDrop,
                ..open
            },
            0.3,
        )
        .unwrap();
        assert!((planned.average - 0.3).abs() < 1e-3, "{planned:?}");
        let error = plan(
            BudgetShape {
                method: Method::PyramidDrop,
                ..open
            },
            100.0,
        )
        .unwrap_err();
        assert!(error.contains("--tokens"), "{error}");
        let error = plan(
            BudgetShape {
                merges: false,
                ..LLAVA
            },
            64.0,
        )
        .unwrap_err();
        assert!(error.contains("merges tokens behind"), "{error}");
        let error = plan(of(Method::PyramidDrop), 17.0).unwrap_err();
        assert!(error.contains("18.00 per layer"), "{error}");
    }
}
