//! Visual tokens layer by layer: what a recipe leaves of an image, of a clip, of an
//! image of several crops, and where only the run tells how many there are.

use serde_json::{Value, json};

use super::style;
use crate::arch::{DEFAULT_FRAMES, VisionTower, Vlm};
use crate::passes::{Count, Placement, Recipe, TokenMerge};
use crate::readable::rounded;

/// What decoder layers see of one image or clip.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerTable {
    /// Whose tokens they are: `an image`, `a clip of 8 frames`.
    pub(super) of: String,
    /// Tokens that each layer sees of it in the unmodified model, where they are known.
    pub(super) before: Option<Vec<i64>>,
    /// Tokens that each layer sees.
    pub(super) after: Seen,
    /// Whether the first layer sees all of them, however many that is, and `after` has
    /// there what is left behind it.
    pub(super) all_at_first: bool,
}

/// Tokens, or shares where their number is known only when an image is there.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Seen {
    /// Tokens.
    Tokens(Vec<i64>),
    /// Shares of an image's tokens, 0 to 1.
    Shares(Vec<f64>),
}

impl Seen {
    /// Mean over the layers.
    pub(super) fn average(&self) -> f64 {
        match self {
            Self::Tokens(counts) => average(counts),
            Self::Shares(shares) => shares.iter().sum::<f64>() / shares.len().max(1) as f64,
        }
    }
}

impl LayerTable {
    /// Share of the tokens that layers no longer see, where it is known.
    fn fewer(&self) -> Option<f64> {
        match (&self.before, &self.after) {
            (Some(before), after @ Seen::Tokens(_)) => {
                let full = average(before);
                (full > 0.0).then(|| 1.0 - after.average() / full)
            }
            (None, after @ Seen::Shares(_)) => Some(1.0 - after.average()),
            _ => None,
        }
    }

    /// One line for people.
    pub(super) fn line(&self) -> String {
        let fewer = self.fewer().map(percent_fewer);
        let fewer = fewer.map_or_else(String::new, |f| format!(" ({f})"));
        let of = match self.of.as_str() {
            "an image" => String::new(),
            of => format!(" of {of}"),
        };
        match &self.after {
            Seen::Tokens(counts) if self.all_at_first => {
                let mut each: Vec<String> = counts.iter().map(i64::to_string).collect();
                if let Some(first) = each.first_mut() {
                    *first = "all".into();
                }
                format!(
                    "visual tokens{of} by layer: {}; average {:.2}{fewer}, with {} in the first layer for all",
                    style::layers(&each),
                    average(counts),
                    counts.first().unwrap_or(&0)
                )
            }
            Seen::Tokens(counts) => {
                let full = self
                    .before
                    .as_ref()
                    .map(|b| format!(" of {:.0}", average(b)));
                format!(
                    "visual tokens{of} by layer: {}; average {:.2}{}{fewer}",
                    style::layers(counts),
                    average(counts),
                    full.unwrap_or_default()
                )
            }
            Seen::Shares(shares) => {
                let percent: Vec<String> = shares
                    .iter()
                    .map(|s| format!("{} %", rounded(100.0 * s)))
                    .collect();
                format!(
                    "visual tokens{of} by layer: {}; average {} % of an image's{fewer}",
                    style::layers(&percent),
                    rounded(100.0 * self.after.average())
                )
            }
        }
    }

    /// The same for programs.
    pub(super) fn json(&self) -> Value {
        let (tokens, shares) = match &self.after {
            Seen::Tokens(counts) => (Some(counts), None),
            Seen::Shares(shares) => (None, Some(shares)),
        };
        json!({
            "of": self.of,
            "before_by_layer": self.before,
            "before_average": self.before.as_deref().map(average),
            "by_layer": tokens,
            "share_by_layer": shares,
            "first_layer_sees_all": self.all_at_first,
            "average": self.after.average(),
            "fewer": self.fewer(),
        })
    }
}

/// A share of tokens that layers no longer see, in words: more where a recipe keeps what the model itself drops (CLS).
pub(super) fn percent_fewer(share: f64) -> String {
    let word = if share < 0.0 { "more" } else { "fewer" };
    format!("{:.1} % {word}", 100.0 * share.abs())
}

/// The mean of counts.
pub(super) fn average(counts: &[i64]) -> f64 {
    counts.iter().sum::<i64>() as f64 / counts.len().max(1) as f64
}

/// Frames of a clip that a tower sees; 1 of towers for images.
pub(super) fn frames(tower: &VisionTower) -> i64 {
    match tower.video {
        true => tower.frames.unwrap_or(DEFAULT_FRAMES),
        false => 1,
    }
}

/// Visual tokens that each layer sees, before and after, if the model is whole: of an
/// image, or of a clip where the model takes nothing else.
pub(super) fn tokens_by_layer(vlm: &Vlm, recipe: &Recipe) -> Option<(Vec<i64>, Vec<i64>)> {
    let (_, tower) = vlm.towers().next()?;
    by_layer(vlm, tower, recipe, frames(tower))
}

/// The same for `images` images (frames, crops) of one tower of the model.
fn by_layer(
    vlm: &Vlm,
    tower: &VisionTower,
    recipe: &Recipe,
    images: i64,
) -> Option<(Vec<i64>, Vec<i64>)> {
    let (_, decoder) = vlm.decoders().next()?;
    let before = images * tower.features_per_image()?;
    let placed = recipe.placed(vlm);
    let placement = match placed {
        true => Placement::Decoder,
        false => Placement::Encoder,
    };
    let left = recipe.tokens_left(tower, placement);
    let entering = left.map_or(before, |left| images * left);
    let mut after = recipe.tokens_per_layer(entering, decoder.depth());
    // Discarded features go through the first layer with the others.
    if placed && let Some(first) = after.first_mut() {
        *first = before;
    }
    Some((vec![before; decoder.depth()], after))
}

/// Where the number of an image's tokens is known only at run time: the counts of an
/// image that has as many as the recipe asks for, or shares of what there is.
fn open(vlm: &Vlm, recipe: &Recipe) -> Option<LayerTable> {
    let (_, decoder) = vlm.decoders().next()?;
    let depth = decoder.depth();
    let merge = recipe.pass::<TokenMerge>();
    let placed = recipe.placed(vlm);
    if let Some(merge) = merge
        && let (Count::Tokens(dominant), Count::Tokens(contextual)) =
            (merge.dominant, merge.contextual)
    {
        let entering = dominant.saturating_add(contextual);
        return Some(LayerTable {
            of: format!("an image of {entering} tokens or more"),
            before: None,
            after: Seen::Tokens(recipe.tokens_per_layer(entering, depth)),
            all_at_first: placed,
        });
    }
    let entering = match merge.map(|m| (m.dominant, m.contextual)) {
        None => 1.0,
        Some((Count::Ratio(dominant), Count::Ratio(contextual))) => {
            (dominant + contextual).min(1.0)
        }
        // A count and a ratio: no one number says it.
        Some(_) => return None,
    };
    // What is left of a million tokens, whose roundings nobody sees.
    let million = 1e6;
    #[allow(clippy::cast_possible_truncation, reason = "at most a million")]
    let tokens = (entering * million) as i64;
    let counts = recipe.tokens_per_layer(tokens, depth);
    let mut shares: Vec<f64> = counts.iter().map(|n| *n as f64 / million).collect();
    if placed && let Some(first) = shares.first_mut() {
        *first = 1.0;
    }
    Some(LayerTable {
        of: "an image".into(),
        before: None,
        after: Seen::Shares(shares),
        all_at_first: false,
    })
}

/// Images whose tokens enter together, as `duet rewrite` counts them where an image has
/// several crops: a grid of 2 × 2 and the whole image in one.
pub(super) const CROPS: i64 = 5;

/// What the model takes, of which each is counted by itself: whose tokens they are, the
/// tower that gives them, and how many images it sees (frames, crops) that enter together.
/// Of images of several `crops` one crop and their union.
fn inputs(vlm: &Vlm, crops: Option<i64>) -> Vec<(String, &VisionTower, i64)> {
    let mut found = Vec::new();
    // The precisions of one tower say the same.
    let towers = [false, true].map(|video| vlm.towers().find(|(_, t)| t.video == video));
    for (_, tower) in towers.into_iter().flatten() {
        match (tower.video, crops) {
            (true, _) => {
                let frames = frames(tower);
                found.push((format!("a clip of {frames} frames"), tower, frames));
            }
            (false, Some(crops)) => {
                found.push(("one crop".into(), tower, 1));
                found.push((format!("an image of {crops} crops"), tower, crops));
            }
            (false, None) => found.push(("an image".into(), tower, 1)),
        }
    }
    found
}

/// A table for each kind of input that the model takes: images, clips; of images of
/// several `crops` also their union.
pub(super) fn tables(vlm: &Vlm, recipe: &Recipe, crops: Option<i64>) -> Vec<LayerTable> {
    let mut tables = Vec::new();
    for (of, tower, images) in inputs(vlm, crops) {
        if let Some((before, after)) = by_layer(vlm, tower, recipe, images) {
            tables.push(LayerTable {
                of,
                before: Some(before),
                after: Seen::Tokens(after),
                all_at_first: false,
            });
        }
    }
    // No tower, or one of a grid that only the run tells.
    let known = vlm
        .towers()
        .next()
        .is_none_or(|(_, t)| t.candidates().is_none());
    if tables.is_empty() && known {
        tables.extend(open(vlm, recipe));
    }
    tables
}

/// Visual tokens of the unmodified model, for people and programs: (whose, in each
/// layer).
pub(super) fn unmodified(vlm: &Vlm, crops: Option<i64>) -> Vec<(String, i64)> {
    let each = inputs(vlm, crops).into_iter();
    each.filter_map(|(of, tower, images)| Some((of, images * tower.features_per_image()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_counts_shares_and_what_they_are_of() {
        let clip = LayerTable {
            of: "a clip of 8 frames".into(),
            before: Some(vec![2056; 4]),
            after: Seen::Tokens(vec![1536, 1536, 768, 0]),
            all_at_first: false,
        };
        assert_eq!(
            clip.line(),
            "visual tokens of a clip of 8 frames by layer: 1–2: 1536, 3: 768, 4: 0; average 960.00 of 2056 \
             (53.3 % fewer)"
        );
        let shares = LayerTable {
            of: "an image".into(),
            before: None,
            after: Seen::Shares(vec![1.0, 1.0, 0.5, 0.25]),
            all_at_first: false,
        };
        assert_eq!(
            shares.line(),
            "visual tokens by layer: 1–2: 100 %, 3: 50 %, 4: 25 %; average 68.75 % of an image's (31.2 % fewer)"
        );
        // All patches and CLS, which the model drops.
        let more = LayerTable {
            of: "an image".into(),
            before: Some(vec![81; 2]),
            after: Seen::Tokens(vec![82; 2]),
            all_at_first: false,
        };
        assert!(
            more.line().ends_with("of 81 (1.2 % more)"),
            "{}",
            more.line()
        );
        assert_eq!(shares.json()["average"], 0.6875);
        assert_eq!(shares.json()["share_by_layer"][3], 0.25);
        let open = LayerTable {
            of: "an image of 640 tokens or more".into(),
            before: None,
            after: Seen::Tokens(vec![640, 320]),
            all_at_first: false,
        };
        assert!(open.line().ends_with("average 480.00"), "{}", open.line());
        assert_eq!(open.json()["fewer"], Value::Null);
        let placed = LayerTable {
            all_at_first: true,
            ..open
        };
        assert!(
            placed
                .line()
                .contains("by layer: 1: all, 2: 320; average 480.00, with 640"),
            "{}",
            placed.line()
        );
    }
}
