//! A recipe for a budget: how many visual tokens the layers of a decoder may see on average.
//!
//! The shape of the schedule, and how many of the entering tokens are contextual, are those published for models of
//! the kind (see [`Style`]). Where nothing can be merged, three drops by the same ratio at quarters of the depth
//! (PyramidDrop's shape) meet the budget alone.

use std::fmt::Write;

use super::methods::{self, Method};

/// Which published budgets a recipe is modelled on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Style {
    /// LLaVA-1.5 (DUET-VLM, arXiv 2602.18846): half of the tokens leave after half of the layers, all of them after
    /// three quarters, so that e tokens entering average 0.625·e; contextual ones interpolated between the budgets of
    /// 192, 128 and 64 of 576.
    #[default]
    Image,
    /// Video-LLaVA (the same source): the same schedule, 32 contextual tokens among a frame's 192.
    Clip,
    /// LLaVA-NeXT: half leave after each quarter of the layers (DUET-VLM's public implementation), 20 contextual
    /// tokens among a crop's 128 (VisionZip, arXiv 2412.04467).
    Crops,
    /// Qwen2.5-VL (DUET-VLM's public implementation): half leave after half of the layers, half of these after three
    /// quarters; 100 contextual tokens among 640.
    Grid,
}

impl Style {
    /// Drops of a merging recipe, (layers that have run, share of the entering tokens). Short decoders have no
    /// quarters: what falls together or onto the end is left out.
    fn drops(self, layers: usize) -> Vec<(usize, f64)> {
        let (half, most) = (layers / 2, layers * 3 / 4);
        let all: &[(usize, f64)] = match self {
            Self::Image | Self::Clip => &[(half, 0.5), (most, 0.0)],
            Self::Crops => &[(layers / 4, 0.5), (half, 0.25), (most, 0.125)],
            Self::Grid => &[(half, 0.5), (most, 0.25)],
        };
        let mut drops: Vec<(usize, f64)> = Vec::new();
        for &(after, keep) in all {
            if after > drops.last().map_or(0, |d| d.0) && after < layers {
                drops.push((after, keep));
            }
        }
        drops
    }

    /// Contextual tokens among the `entering` of an image of `patches`, as the published budgets have them.
    fn contextual(self, entering: i64, patches: Option<i64>) -> i64 {
        let share = match self {
            Self::Image => {
                let at = entering as f64 / patches.unwrap_or(576).max(1) as f64;
                let [(a, share_a), (b, share_b), (c, share_c)] = PUBLISHED;
                let between =
                    |x0: f64, y0: f64, x1: f64, y1: f64| y0 + (at - x0) / (x1 - x0) * (y1 - y0);
                if at < b {
                    between(a, share_a, b, share_b)
                } else {
                    between(b, share_b, c, share_c)
                }
            }
            Self::Clip => 32.0 / 192.0,
            Self::Crops => 20.0 / 128.0,
            Self::Grid => 100.0 / 640.0,
        };
        #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
        let count = (entering as f64 * share.clamp(0.0, 1.0 / 3.0)).round() as i64;
        count.clamp(0, (entering - 1).max(0))
    }
}

/// What a recipe is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetShape {
    /// Patch tokens of one image that the tower sees (an image, a frame, a crop); none where only the run tells.
    pub patches: Option<i64>,
    /// Whether the tower has a CLS token.
    pub cls: bool,
    /// Visual tokens of one such image that reach the decoder unmerged; none where only the run tells.
    pub features: Option<i64>,
    /// Such images whose tokens enter together and that a budget is for: frames of a clip, crops of an image.
    pub images: i64,
    /// Whether tokens can be merged behind the tower.
    pub merges: bool,
    /// Decoder layers; 0 if there is no decoder to prune.
    pub layers: usize,
    /// What the recipe is modelled on.
    pub style: Style,
    /// Whether discarded tokens go through the first layer (`placement: decoder`), so that it sees all of them.
    pub placed: bool,
    /// Whose recipe it is to be.
    pub method: Method,
}

impl BudgetShape {
    /// Tokens by layer when `entering` are left of a merge: the first layer's are all of them where they are placed
    /// and known.
    pub(super) fn merged(&self, entering: i64, drops: &[(usize, f64)]) -> Vec<i64> {
        let mut seen = by_layer(entering, drops, self.layers);
        if let (true, Some(features), Some(first)) = (self.placed, self.features, seen.first_mut())
        {
            *first = features * self.images.max(1);
        }
        seen
    }

    /// Visual tokens that enter the decoder unmerged; none where only the run tells. (Saturating: more than are
    /// counted with are refused.)
    pub fn visual_tokens(&self) -> Option<i64> {
        let images = self.images.max(1);
        self.features.map(|each| each.saturating_mul(images))
    }

    /// An error: what is left of a merge does not meet the budget.
    pub(super) fn no_token_left(&self, budget: f64) -> String {
        format!(
            "no token is left at a budget of {budget:.2} per layer{}",
            self.first_sees_all()
        )
    }

    /// For errors: what makes a budget hard to meet where discarded tokens go through the first layer.
    fn first_sees_all(&self) -> &'static str {
        match self.placed {
            true => ", of which the first layer sees all tokens",
            false => "",
        }
    }
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

/// A recipe of ratios.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedShare {
    /// YAML text.
    pub recipe: String,
    /// Share of the visual tokens that each decoder layer sees.
    pub shares: Vec<f64>,
    /// Their mean: at most the share asked for.
    pub average: f64,
}

/// (entering tokens as a share of the patches, contextual ones as a share of the entering), published for LLaVA-1.5.
const PUBLISHED: [(f64, f64); 3] = [
    (102.0 / 576.0, 30.0 / 102.0),
    (202.0 / 576.0, 32.0 / 202.0),
    (307.0 / 576.0, 7.0 / 307.0),
];

/// Tokens that a recipe of ratios is worked out with: ratios have four digits.
const UNIT: i64 = 10_000;

/// Most tokens that are counted with: sums over all layers stay exact.
const MOST: i64 = 1_000_000_000_000;

/// How a recipe says how many tokens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Counts,
    Ratios,
}

impl Said {
    /// A number of an image's tokens, as a recipe has it.
    pub(super) fn count(self, tokens: i64) -> String {
        match self {
            Self::Counts => tokens.to_string(),
            Self::Ratios => format!("{:?}", tokens as f64 / UNIT as f64),
        }
    }
}

/// A recipe under which decoder layers see at most `budget` visual tokens on average.
///
/// # Errors
/// A budget that is no less than what there is, that leaves no token, or that only a number of tokens could meet which
/// is not known; more tokens than anything has (10¹²).
pub fn plan(shape: BudgetShape, budget: f64) -> Result<Planned, String> {
    let all = shape.visual_tokens();
    if !(budget > 0.0 && budget <= MOST as f64) {
        return Err(format!(
            "the budget is {} visual tokens per layer; expected more than 0 and at most {MOST}",
            match budget.abs() < 1e15 {
                true => format!("{budget:.2}"),
                false => format!("{budget:e}"),
            }
        ));
    }
    let patches = shape.patches.map_or(0, |p| p.saturating_add(1));
    let most = all
        .unwrap_or(0)
        .max(patches.saturating_mul(shape.images.max(1)));
    if most > MOST {
        return Err(format!(
            "there are {} images of {} visual tokens each; expected at most {MOST} tokens in all",
            shape.images,
            shape.features.or(shape.patches).unwrap_or(0)
        ));
    }
    if let Some(all) = all.filter(|all| budget >= *all as f64) {
        return Err(format!(
            "the budget is {budget:.2} visual tokens per layer; expected more than 0 and less than the {all} that \
             there are"
        ));
    }
    make(shape, budget, Said::Counts)
}

/// A recipe of ratios under which decoder layers see at most a `share` of the visual tokens on average, however many
/// an image has.
///
/// # Errors
/// A share that is not between 0 and 1, that leaves no token, or that pruning alone does not reach.
pub fn plan_share(shape: BudgetShape, share: f64) -> Result<PlannedShare, String> {
    if !(share > 0.0 && share < 1.0) {
        return Err(format!(
            "the share is {share:.2} of the visual tokens; expected more than 0 and less than 1"
        ));
    }
    let unit = BudgetShape {
        patches: Some(UNIT),
        features: Some(UNIT),
        images: 1,
        ..shape
    };
    let planned = make(unit, share * UNIT as f64, Said::Ratios).map_err(|why| {
        let percent = 100.0 * share;
        match shape.merges {
            // Which speaks of so many tokens of each.
            _ if shape.method != Method::Duet => format!("{why} (of {UNIT} tokens)"),
            true => format!(
                "no token is left at {percent:.2} % of the visual tokens per layer{}",
                shape.first_sees_all()
            ),
            // (Nothing to prune either.)
            false if shape.layers < 2 => why,
            false => format!(
                "{percent:.2} % of the visual tokens cannot be met by pruning alone: the first quarter of {} layers \
                 sees all of them",
                shape.layers
            ),
        }
    })?;
    let of_unit = |tokens: &i64| *tokens as f64 / UNIT as f64;
    Ok(PlannedShare {
        recipe: planned.recipe,
        shares: planned.tokens.iter().map(of_unit).collect(),
        average: planned.average / UNIT as f64,
    })
}

fn make(shape: BudgetShape, budget: f64, said: Said) -> Result<Planned, String> {
    if shape.method != Method::Duet {
        return methods::make(shape, budget, said);
    }
    match (shape.merges, shape.features) {
        (true, _) => merging(shape, budget, said),
        (false, Some(features)) => pruning(shape, features, budget),
        (false, None) => Err(
            "nothing can be merged here, and pruning keeps ratios of a number of tokens that only the run tells; ask \
             for a reduction (67%), or say how many tokens an image has (--tokens)"
                .into(),
        ),
    }
}

/// Tokens by layer under `drops`: (layers that have run, share of the entering tokens).
pub(super) fn by_layer(entering: i64, drops: &[(usize, f64)], layers: usize) -> Vec<i64> {
    let kept = |layer: usize| {
        let last = drops.iter().rev().find(|(after, _)| *after <= layer);
        #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
        last.map_or(entering, |(_, keep)| (entering as f64 * keep) as i64)
    };
    (0..layers.max(1)).map(kept).collect()
}

pub(super) fn mean(counts: &[i64]) -> f64 {
    counts.iter().sum::<i64>() as f64 / counts.len().max(1) as f64
}

fn merging(shape: BudgetShape, budget: f64, said: Said) -> Result<Planned, String> {
    let (layers, images) = (shape.layers, shape.images.max(1));
    let drops = shape.style.drops(layers);
    // No drop comes before a quarter of the layers, so layers average a quarter of what enters at least (in decoders
    // so short that a quarter is none, an eighth).
    #[allow(clippy::cast_possible_truncation, reason = "token counts fit")]
    let most = match shape.patches {
        Some(patches) => patches + i64::from(shape.cls),
        None => (8.0 * budget) as i64 + 8,
    };
    let fits = |entering: i64| mean(&shape.merged(images * entering, &drops)) <= budget;
    // The mean rises with what enters: the largest that fits.
    let (mut entering, mut beyond) = (0, most + 1);
    while beyond - entering > 1 {
        let middle = entering + (beyond - entering) / 2;
        if fits(middle) {
            entering = middle;
        } else {
            beyond = middle;
        }
    }
    if entering == 0 {
        return Err(shape.no_token_left(budget));
    }
    if let Some(features) = shape.features.filter(|f| entering >= *f && layers > 1) {
        // Generous enough for every token to enter: later and weaker drops will do.
        return pruning(shape, features, budget);
    }
    let contextual = shape.style.contextual(entering, shape.patches);
    let count = |tokens: i64| said.count(tokens);
    let dominant = count(entering - contextual);
    let mut recipe = format!("version: 1\npasses:\n  - token_merge:\n      dominant: {dominant}");
    if shape.cls {
        recipe += " # CLS counted";
    }
    let _ = write!(
        recipe,
        "\n      contextual: {}\n      cluster_width: 4\n      selector: attention\n",
        count(contextual)
    );
    let tokens = shape.merged(images * entering, &drops);
    Ok(finish(recipe, tokens, &drops, "all"))
}

fn pruning(shape: BudgetShape, features: i64, budget: f64) -> Result<Planned, String> {
    let layers = shape.layers;
    let all = features * shape.images.max(1);
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
        mean(&by_layer(all, &drops, layers)) <= budget
    };
    let Some(step) = (0..1000).rev().find(fits) else {
        return Err(format!(
            "{budget:.2} visual tokens per layer cannot be met by pruning alone: the first {} of {layers} layers see \
             all {all} tokens",
            places[0]
        ));
    };
    let drops = schedule(f64::from(step) / 1000.0);
    let tokens = by_layer(all, &drops, layers);
    let head = "version: 1\npasses:\n".into();
    Ok(finish(head, tokens, &drops, "all"))
}

/// Adds the drops of a recipe, ranked by the tokens of `text`.
pub(super) fn finish(
    mut recipe: String,
    tokens: Vec<i64>,
    drops: &[(usize, f64)],
    text: &str,
) -> Planned {
    write_drops(&mut recipe, drops, text);
    let average = mean(&tokens);
    Planned {
        recipe,
        tokens,
        average,
    }
}

/// Writes the pass of some drops, if there are any, behind the others of a recipe.
pub(super) fn write_drops(recipe: &mut String, drops: &[(usize, f64)], text: &str) {
    if drops.is_empty() {
        return;
    }
    *recipe += "  - visual_prune:\n      drops:\n";
    for (after, keep) in drops {
        let _ = writeln!(
            recipe,
            "        - {{ after_layer: {after}, keep: {keep:?} }}"
        );
    }
    let _ = writeln!(recipe, "      text: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{Recipe, TokenMerge, VisualPrune};

    const LLAVA: BudgetShape = BudgetShape {
        patches: Some(576),
        cls: true,
        features: Some(576),
        images: 1,
        merges: true,
        layers: 32,
        style: Style::Image,
        placed: false,
        method: Method::Duet,
    };

    /// A tower whose number of tokens only the run tells.
    const GRID: BudgetShape = BudgetShape {
        patches: None,
        cls: false,
        features: None,
        layers: 28,
        style: Style::Grid,
        ..LLAVA
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

    /// (dominant, contextual, drops) of a recipe.
    fn parts(
        text: &str,
    ) -> (
        crate::passes::Count,
        crate::passes::Count,
        Vec<(usize, f64)>,
    ) {
        let recipe = Recipe::parse(text).unwrap();
        let merge = recipe.pass::<TokenMerge>().unwrap();
        let drops = &recipe.pass::<VisualPrune>().unwrap().drops;
        let drops = drops.iter().map(|d| (d.after_layer, d.keep)).collect();
        (merge.dominant, merge.contextual, drops)
    }

    #[test]
    fn the_published_make_up_of_every_family_comes_out() {
        use crate::passes::Count::Tokens;
        let clip = BudgetShape {
            patches: Some(256),
            features: Some(257),
            images: 8,
            style: Style::Clip,
            ..LLAVA
        };
        let planned = plan(clip, 960.0).unwrap();
        assert_eq!(planned.average, 960.0);
        assert_eq!(
            parts(&planned.recipe),
            (Tokens(160), Tokens(32), vec![(16, 0.5), (24, 0.0)])
        );
        let crops = BudgetShape {
            images: 5,
            style: Style::Crops,
            ..LLAVA
        };
        let planned = plan(crops, 300.0).unwrap();
        assert_eq!((planned.tokens[0], planned.average), (640, 300.0));
        assert_eq!(
            parts(&planned.recipe),
            (
                Tokens(108),
                Tokens(20),
                vec![(8, 0.5), (16, 0.25), (24, 0.125)]
            )
        );
        for (budget, dominant, contextual) in
            [(440.0, 540, 100), (220.0, 270, 50), (110.0, 135, 25)]
        {
            let planned = plan(GRID, budget).unwrap();
            assert_eq!(planned.average, budget);
            assert_eq!(
                parts(&planned.recipe),
                (
                    Tokens(dominant),
                    Tokens(contextual),
                    vec![(14, 0.5), (21, 0.25)]
                )
            );
        }
        let alone = BudgetShape {
            merges: false,
            ..GRID
        };
        assert!(plan(alone, 440.0).unwrap_err().contains("--tokens"));
    }

    #[test]
    fn what_the_first_layer_sees_counts() {
        let placed = BudgetShape {
            patches: Some(1196),
            features: Some(1196),
            placed: true,
            ..GRID
        };
        let planned = plan(placed, 440.0).unwrap();
        assert_eq!(planned.tokens[0], 1196);
        // (1196 + 13·e + 7·e/2 + 7·e/4) / 28 with 609 left of the merge.
        assert_eq!(planned.tokens[1], 609);
        assert!(
            planned.average <= 440.0 && planned.average > 439.0,
            "{planned:?}"
        );
        // A mean over 28 layers, of which one sees 1196: 42.7 at least.
        assert!(
            plan(placed, 40.0)
                .unwrap_err()
                .contains("first layer sees all")
        );
        // Neither does a share of less than one layer's tokens.
        let refused = plan_share(placed, 0.03).unwrap_err();
        assert!(
            refused.contains("3.00 %") && refused.contains("first layer sees all tokens"),
            "{refused}"
        );
        assert!(plan_share(placed, 0.04).unwrap().average <= 0.04);
    }

    #[test]
    fn shares_are_met_whatever_the_number_of_tokens() {
        for merges in [true, false] {
            for percent in [30, 50, 80, 95] {
                let share = f64::from(percent) / 100.0;
                let shape = BudgetShape { merges, ..GRID };
                let planned = plan_share(shape, share).unwrap();
                assert!(
                    planned.average <= share && planned.average > share - 0.01,
                    "{planned:?}"
                );
                let recipe = Recipe::parse(&planned.recipe).unwrap();
                let merge = recipe.pass::<TokenMerge>();
                assert!(merges || merge.is_none());
                for n in [7, 100, 1000, 16_384] {
                    let entering = merge.map_or(n, |m| m.dominant.of(n) + m.contextual.of(n));
                    let prune = recipe.pass::<VisualPrune>().unwrap();
                    let seen = mean(&prune.tokens_per_layer(entering, 28));
                    assert!(seen <= share * n as f64, "{n}: {seen} at {share}");
                }
            }
        }
        let alone = BudgetShape {
            merges: false,
            ..GRID
        };
        assert!(
            plan_share(alone, 0.2)
                .unwrap_err()
                .contains("pruning alone")
        );
        let nothing = BudgetShape { layers: 0, ..alone };
        assert!(
            plan_share(nothing, 0.5)
                .unwrap_err()
                .contains("neither a tower")
        );
        assert!(plan_share(GRID, 1.0).is_err() && plan_share(GRID, 0.0).is_err());
    }

    #[test]
    fn no_budget_is_exceeded_or_wasted() {
        for layers in [1, 2, 3, 8, 24, 28, 32] {
            for patches in [16, 81, 144, 576, 729] {
                for merges in [true, false] {
                    for percent in [5, 20, 33, 50, 80, 95] {
                        let shape = BudgetShape {
                            patches: Some(patches),
                            cls: merges,
                            features: Some(patches),
                            merges,
                            layers,
                            ..LLAVA
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
    fn what_cannot_be_met_is_an_error() {
        assert!(plan(LLAVA, 576.0).unwrap_err().contains("576"));
        assert!(plan(LLAVA, 0.0).is_err());
        assert!(plan(LLAVA, f64::NAN).is_err());
        // More than is counted with, and what would be more if it were multiplied.
        let beyond = plan(GRID, 1e300).unwrap_err();
        assert!(
            beyond.contains("1e300") && beyond.contains("at most 1000000000000"),
            "{beyond}"
        );
        assert!(plan(GRID, f64::INFINITY).is_err());
        let crops = BudgetShape {
            images: i64::MAX / 500,
            ..LLAVA
        };
        assert!(
            plan(crops, 100.0)
                .unwrap_err()
                .contains("at most 1000000000000")
        );
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
