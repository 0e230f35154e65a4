//! How many tokens each layer of a model sees, by the recipe that it is stamped with.

use serde::Serialize;

use super::job::Turn;
use crate::arch::{Decoder, VisionTower};
use crate::passes::{KvLayout, Placement, Recipe};

/// Tokens by layer, and what the caches should hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// Tokens that each layer works on in the prompt, text included.
    pub tokens: Vec<usize>,
    /// Visual ones among them.
    pub visual: Vec<usize>,
    /// Whether caches are filled up to one length (`kv: padded`).
    pub padded: bool,
    /// Bytes of all caches by this schedule; none where the base declares no cache.
    pub cache_bytes: Option<usize>,
}

/// What is known of the base.
#[derive(Debug, Clone, Copy)]
pub struct BaseModel<'a> {
    /// Its decoder.
    pub decoder: &'a Decoder,
    /// Its vision tower.
    pub tower: Option<&'a VisionTower>,
    /// Whether a merge of this recipe leaves discarded features in their places.
    pub placed: bool,
}

impl Schedule {
    /// The schedule of `recipe` (none: the unmodified model) for what a turn had.
    pub fn of(recipe: Option<&Recipe>, base: BaseModel<'_>, turn: &Turn, images: usize) -> Self {
        let depth = base.decoder.depth();
        let text = turn.prompt_tokens.saturating_sub(turn.visual_tokens);
        let given = i64::try_from(turn.visual_tokens).unwrap_or(0);
        let visual: Vec<i64> = match recipe {
            None => vec![given; depth],
            Some(recipe) => {
                let entering = match base.placed {
                    true => left_behind_first_layer(recipe, base.tower, given, images),
                    false => recipe
                        .context
                        .span
                        .map_or(given, |span| span.count.min(given)),
                };
                let mut layers = recipe.tokens_per_layer(entering, depth);
                // A span that ends before the last feature leaves the others alone.
                let others = if base.placed { 0 } else { given - entering };
                layers.iter_mut().for_each(|n| *n += others);
                // Discarded features go through the first layer with the others.
                if let Some(first) = layers.first_mut().filter(|_| base.placed) {
                    *first = given;
                }
                layers
            }
        };
        let visual: Vec<usize> = visual
            .iter()
            .map(|n| usize::try_from(*n).unwrap_or(0))
            .collect();
        let tokens: Vec<usize> = visual.iter().map(|n| n + text).collect();
        let padded = recipe.is_some_and(|r| r.context.kv == KvLayout::Padded);
        let caches = base.decoder.layers.iter().all(|l| l.present.is_some());
        let held: usize = match padded {
            true => depth * turn.prompt_tokens,
            false => tokens.iter().sum(),
        };
        let sizes = [base.decoder.kv_heads, base.decoder.head_dim];
        let sizes = sizes.map(|n| usize::try_from(n).unwrap_or(0));
        let factors = [2, sizes[0], sizes[1], turn.cache_element];
        let bytes = factors.into_iter().try_fold(held, usize::checked_mul);
        Self {
            cache_bytes: bytes.filter(|_| caches && turn.cache_element > 0),
            tokens,
            visual,
            padded,
        }
    }

    /// Visual tokens that a layer sees on average.
    pub fn average(&self) -> f64 {
        self.visual.iter().sum::<usize>() as f64 / self.visual.len().max(1) as f64
    }

    /// Whether caches have the lengths that they should.
    pub fn holds(&self, lengths: &[usize], prompt: usize) -> bool {
        match self.padded {
            true => lengths.len() == self.tokens.len() && lengths.iter().all(|n| *n == prompt),
            false => lengths == self.tokens,
        }
    }
}

/// Of features that all come in: how many are left behind the first layer.
fn left_behind_first_layer(
    recipe: &Recipe,
    tower: Option<&VisionTower>,
    given: i64,
    images: usize,
) -> i64 {
    let images = i64::try_from(images.max(1)).unwrap_or(1);
    let each = given / images;
    let left = match tower {
        Some(tower) if tower.candidates().is_some() => {
            recipe.tokens_left(tower, Placement::Decoder)
        }
        _ => recipe.tokens_left_of(each, false),
    };
    left.map_or(given, |left| (left * images).min(given))
}
