//! Recipes of other published methods, at the budget that DUET's are made for, to compare with.
//!
//! | method | tokens leave | as published |
//! |---|---|---|
//! | VisionZip | behind the tower, merged | 10 of 64 contextual, anchors at even steps (arXiv 2412.04467) |
//! | PyramidDrop | in the decoder, ranked by the last token | after each quarter of the layers the same share of what was left, half of it (arXiv 2410.17247) |
//! | FastV | in the decoder, once, ranked by the last token | after two layers (arXiv 2403.06764) |
//! | DivPrune | behind the projector, the most alike | (arXiv 2503.02175) |
//! | random, uniform | behind the tower | no method: what a method has to beat |
//!
//! PyramidDrop's half averages 46.9 % of the tokens. Budgets below that are met as public comparisons at equal budgets
//! meet them: with one more drop after two layers, and the share that the average asks for (LLaVA-1.5: 0.581, 0.437 and
//! 0.196 at 192, 128 and 64 of 576 tokens). Where two layers alone are more than the budget, it comes after one; FastV's
//! drop too.

use std::fmt::Write;

use super::budget::{BudgetShape, Planned, Said, Style, by_layer, finish, mean};

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
    /// FastV: one early drop.
    FastV,
    /// Tokens drawn at random.
    Random,
    /// Tokens at even steps.
    Uniform,
    /// DivPrune: the tokens that are least alike.
    DivPrune,
}

impl Method {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Duet,
        Self::VisionZip,
        Self::PyramidDrop,
        Self::FastV,
        Self::Random,
        Self::Uniform,
        Self::DivPrune,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Duet => "duet",
            Self::VisionZip => "visionzip",
            Self::PyramidDrop => "pyramiddrop",
            Self::FastV => "fastv",
            Self::Random => "random",
            Self::Uniform => "uniform",
            Self::DivPrune => "divprune",
        }
    }

    /// What it does, in a few words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Duet => "merging behind the tower, and pruning in the decoder",
            Self::VisionZip => "merging alone (VisionZip)",
            Self::PyramidDrop => "pruning alone, ranked by the last token (PyramidDrop)",
            Self::FastV => "one early drop, ranked by the last token (FastV)",
            Self::Random => "tokens drawn at random",
            Self::Uniform => "tokens at even steps",
            Self::DivPrune => "the tokens that are least alike (DivPrune)",
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
        Method::FastV => fast_v(shape, budget),
        Method::Random | Method::Uniform | Method::DivPrune => keeping(shape, budget, said),
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
    let mut found = match above.is_some_and(better) {
        true => over,
        false => under,
    };
    // Rounded down, several shares leave the same: the least is the plainest.
    while found > 1 && mean_of(found - 1) == mean_of(found) {
        found -= 1;
    }
    (found > 0).then_some(found)
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

/// Tokens that enter a decoder which alone makes them fewer.
fn entering(shape: BudgetShape, method: &str) -> Result<i64, String> {
    if shape.layers < 2 {
        return Err(format!(
            "{method} drops tokens between decoder layers, of which there are {}",
            shape.layers
        ));
    }
    let features = shape.features.ok_or(
        "pruning keeps ratios of a number of tokens that only the run tells; ask for a reduction (67%), or say how \
         many tokens an image has (--tokens)",
    )?;
    Ok(features * shape.images.max(1))
}

/// An error: what the first layer sees is no less than the budget.
fn first_layer(method: &str, (all, layers): (i64, usize), budget: f64) -> String {
    format!(
        "{method} drops tokens between decoder layers: the first of {layers} sees all {all}, {:.2} per layer on \
         average, which leaves none at a budget of {budget:.2}",
        all as f64 / layers as f64
    )
}

/// The shortest share of which ⌊share · all⌋ is `count`.
fn share_of(count: i64, all: i64) -> f64 {
    let shares = (2..=9).map(|digits| {
        let unit = 10_f64.powi(digits);
        (count as f64 / all.max(1) as f64 * unit).ceil() / unit
    });
    #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
    let mut fitting = shares.filter(|share| (share * all as f64) as i64 == count);
    fitting.next().unwrap_or(count as f64 / all.max(1) as f64)
}

fn fast_v(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let all = entering(shape, "FastV")?;
    let layers = shape.layers;
    for after in EARLY.into_iter().filter(|after| *after < layers) {
        let seen = |count: i64| by_layer(all, &[(after, share_of(count, all))], layers);
        if let Some(count) = nearest(all - 1, budget, |count| mean(&seen(count))) {
            let mut recipe = headline("FastV", "arXiv 2403.06764");
            let keep = share_of(count, all);
            let _ = writeln!(
                recipe,
                "  - fast_v:\n      after_layer: {after}\n      keep: {keep:?}"
            );
            return Ok(finish(recipe, seen(count), &[], ""));
        }
    }
    Err(first_layer("FastV", (all, layers), budget))
}

fn keeping(shape: BudgetShape, budget: f64, said: Said) -> Result<Planned, String> {
    let name = shape.method.name();
    if shape.patches.is_none() || shape.style == Style::Grid {
        return Err(format!(
            "{name} works on images of a fixed number of tokens, which this model's tower does not have"
        ));
    }
    if !shape.merges {
        return Err(format!(
            "{name} leaves tokens out behind the vision tower, which this model does not allow"
        ));
    }
    let images = shape.images.max(1);
    let seen = |keep: i64| by_layer(images * keep, &[], shape.layers);
    let keep = nearest(most(shape, budget), budget, |keep| mean(&seen(keep)));
    let keep = keep.ok_or_else(|| shape.no_token_left(budget))?;
    let (title, source, pass) = match shape.method {
        Method::DivPrune => ("DivPrune", "arXiv 2503.02175", "div_prune"),
        Method::Uniform => ("Uniform dropping", "tokens at even steps", "uniform_drop"),
        _ => ("Random dropping", "other seeds draw others", "random_drop"),
    };
    let mut recipe = headline(title, source);
    let _ = writeln!(recipe, "  - {pass}:\n      keep: {}", said.count(keep));
    if shape.method == Method::Random {
        recipe += "      seed: 0\n";
    }
    Ok(finish(recipe, seen(keep), &[], ""))
}

fn pyramid_drop(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let layers = shape.layers;
    let all = entering(shape, "PyramidDrop")?;
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
    Err(first_layer("PyramidDrop", (all, layers), budget))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{Recipe, TextQueries, TokenMerge, VisualPrune, plan, plan_share};

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

    #[test]
    fn one_early_drop_and_tokens_left_out() {
        // Counts of public comparisons at equal budgets: 166, 98 and 30 of 576 behind the second layer.
        for (budget, count) in [(192.0, 166), (128.0, 98), (64.0, 30)] {
            let planned = plan(of(Method::FastV), budget).unwrap();
            assert_eq!(planned.tokens[..3], [576, 576, count], "{planned:?}");
            assert!(planned.average <= budget * 1.01);
        }
        // Two of eight layers would be more than the budget.
        let shallow = BudgetShape {
            layers: 8,
            ..of(Method::FastV)
        };
        let planned = plan(shallow, 128.0).unwrap();
        assert_eq!(planned.tokens[..2], [576, 64], "{planned:?}");
        for (method, line) in [
            (
                Method::Random,
                "  - random_drop:\n      keep: 64\n      seed: 0\n",
            ),
            (Method::Uniform, "  - uniform_drop:\n      keep: 64\n"),
            (Method::DivPrune, "  - div_prune:\n      keep: 64\n"),
        ] {
            let planned = plan(of(method), 64.0).unwrap();
            assert!(planned.recipe.ends_with(line), "{}", planned.recipe);
            assert_eq!(planned.average, 64.0);
            // Of a clip, so many of each frame.
            let clip = BudgetShape {
                patches: Some(256),
                features: Some(257),
                images: 8,
                ..of(method)
            };
            let planned = plan(clip, 960.0).unwrap();
            assert!(planned.recipe.contains("keep: 120\n"), "{}", planned.recipe);
            let grid = BudgetShape {
                patches: None,
                features: None,
                style: Style::Grid,
                ..of(method)
            };
            assert!(
                plan(grid, 64.0)
                    .unwrap_err()
                    .contains("fixed number of tokens")
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
                        assert!(planned.average <= budget * 1.01 + 1e-9, "{place}");
                        // A token more or less in every layer.
                        assert!((planned.average - budget).abs() <= 1.0, "{place}");
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
