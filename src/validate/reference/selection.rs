//! What makes an encoder's tokens fewer, in the oracle's words, and the reference of passes that keep some tokens as
//! they are.

use ndarray::{Array2, Axis};

use super::super::ValidateError;
use super::super::oracle::{self, Keeping, Kept};
use super::ties::Ranking;
use super::vision::budget;
use crate::arch::{VisionTower, Vlm};
use crate::ir::Model;
use crate::passes::{
    DivPrune, Placement, RandomDrop, Recipe, TokenMerge, UniformDrop, placement_in,
};

/// What a recipe does to a vision encoder.
#[derive(Clone, Copy, Debug)]
pub enum Fewer<'a> {
    /// It merges.
    Merge(&'a TokenMerge, Placement),
    /// It keeps some tokens.
    Keep(Kept),
}

impl<'a> Fewer<'a> {
    /// What `recipe` does to the encoder of `base`; none if nothing.
    ///
    /// # Errors
    /// A pass that has no reference.
    pub fn of(recipe: &'a Recipe, base: &Vlm) -> Result<Option<Self>, ValidateError> {
        if let Some(merge) = recipe.pass::<TokenMerge>() {
            return Ok(Some(Self::Merge(
                merge,
                placement_in(merge.placement, base),
            )));
        }
        let kept = |keep, how| {
            let keep = budget(keep);
            Some(Self::Keep(Kept { keep, how }))
        };
        if let Some(pass) = recipe.pass::<RandomDrop>() {
            return Ok(kept(pass.keep, Keeping::Random { seed: pass.seed }));
        }
        if let Some(pass) = recipe.pass::<UniformDrop>() {
            return Ok(kept(pass.keep, Keeping::Even));
        }
        if let Some(pass) = recipe.pass::<DivPrune>() {
            return Ok(kept(pass.keep, Keeping::Diverse));
        }
        known(recipe)?;
        Ok(None)
    }

    /// The merge, if it is one.
    pub fn merge(self) -> Option<(&'a TokenMerge, Placement)> {
        match self {
            Self::Merge(merge, placement) => Some((merge, placement)),
            Self::Keep(_) => None,
        }
    }

    /// Whether tokens are chosen by the features, behind the projector.
    pub fn by_features(self) -> bool {
        matches!(self, Self::Keep(kept) if kept.how == Keeping::Diverse)
    }
}

/// Refuses a recipe with a pass that validation has no reference for.
fn known(recipe: &Recipe) -> Result<(), ValidateError> {
    let unknown = recipe.passes.iter().find(|p| {
        let decoder = p.pruning().is_some();
        let encoder = recipe.encoder_pass().is_some_and(|e| e.name() == p.name());
        // (What the encoder's passes are was looked up before.)
        encoder || !decoder
    });
    match unknown {
        None => Ok(()),
        Some(pass) => Err(ValidateError::Model(format!(
            "the recipe has the pass {}, whose choice of tokens validation has no second implementation of; \
             expected token_merge, random_drop, uniform_drop or div_prune, and visual_prune or fast_v. Its structure \
             is checked by 'duet diff' against the base model",
            pass.name()
        ))),
    }
}

/// Where the order in which tokens were chosen by the features is found in a rewritten graph, int64 `[n, K]`.
pub(in crate::validate) const ORDER: &str = "duet/div_prune/order";

/// The order of every image, as [`Ranking`] has scores.
pub(in crate::validate) fn order_of(order: &[i64], images: usize) -> Vec<Vec<f32>> {
    let each = order.len() / images.max(1);
    let row = |row: &[i64]| row.iter().map(|i| *i as f32).collect();
    order.chunks(each.max(1)).map(row).collect()
}

/// The value of a rewritten graph that holds the features which go on to the decoder, by name.
pub(in crate::validate) fn features_in(
    new: &Model,
    fewer: Option<Fewer<'_>>,
    features: &str,
) -> String {
    let chosen = "duet/div_prune/kept_tokens";
    match fewer.is_some_and(Fewer::by_features) && new.find(chosen).is_some() {
        true => chosen.to_owned(),
        false => features.to_owned(),
    }
}

/// A choice among the tokens of a tower.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choosing {
    how: Keeping,
    all: usize,
    keep: usize,
    /// Where patch tokens begin among the features.
    first: usize,
}

impl Choosing {
    pub(super) fn new(kept: Kept, tower: &VisionTower) -> Result<Self, ValidateError> {
        let all = tower.candidates().and_then(|n| usize::try_from(n).ok());
        let all =
            all.ok_or_else(|| ValidateError::Model("the tower's token count is not fixed".into()))?;
        Ok(Self {
            how: kept.how,
            all,
            keep: kept.keep.resolve(all)?.min(all),
            first: usize::from(tower.gives_cls()),
        })
    }

    /// Rows of what the projector reads, or of the features, that stay; none where the features decide.
    pub(super) fn rows(&self) -> Option<Vec<usize>> {
        let places = oracle::fixed_places(self.how, self.all, self.keep)?;
        Some(places.into_iter().map(|place| self.first + place).collect())
    }

    /// The features `[F, D]` of one image that stay, and how many were decided as the graph did. Where that differs
    /// from the oracle by near-ties only, it is followed.
    pub(super) fn features(
        &self,
        image: usize,
        features: &Array2<f32>,
        ranking: Option<Ranking<'_>>,
    ) -> Result<(Array2<f32>, usize), ValidateError> {
        let patches = features.slice(ndarray::s![self.first.., ..]);
        let found = ranking.and_then(|r| Some((r.scores.get(image)?, r.tolerance)));
        let followed = match found {
            Some((found, tolerance)) if found.len() == self.keep => {
                let found: Vec<usize> = found.iter().map(|i| *i as usize).collect();
                let moved = oracle::diverse_along(patches, &found, tolerance.0)?;
                moved.map(|moved| (found, moved))
            }
            _ => None,
        };
        let (mut order, near_ties) = match followed {
            Some(followed) => followed,
            None => (oracle::diverse(patches, self.keep)?, 0),
        };
        order.sort_unstable();
        Ok((patches.select(Axis(0), &order), near_ties))
    }
}
