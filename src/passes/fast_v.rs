//! FastV: one early drop, ranked by attention that was computed anyway.
//!
//! ```text
//!  layer 1 ─▶ … ─▶ layer K ──────────────────────────▶ H [b, L, D] ─┐
//!                    └─ q of the last token, k of all ─▶ softmax,    ▼
//!                       mean over heads ─▶ TopK of the visual tokens ─▶ GatherND ─▶ layer K+1 …
//! ```
//!
//! After layer K (2 as published) ⌊keep·n⌋ of the n visual tokens stay: those to which the last token of the prompt
//! paid most attention in layer K itself, averaged over its heads. They keep their order and their positions (contiguous
//! ones in a decoder that computes positions itself and cannot be told).
//!
//! This is `visual_prune` with `text: last`, `rank_layer: previous` and `positions: keep`. `visual_prune` alone ranks by
//! what the *next* layer would pay; FastV's layer has run, on what entered it, and so needs no projections of its own.
//!
//! Source: FastV (ECCV 2024, arXiv 2403.06764) and its public implementation, which takes the attention that the layer
//! before gave out, and keeps the positions of the tokens that stay. Its models see one image; here all visual tokens of
//! a prompt are ranked together.

use serde::Deserialize;

use super::recipe::Positions;
use super::visual_prune::{Drop, RankLayer, RankMask, RatioBase, TextQueries, VisualPrune};
use super::{Context, Entry, Pass, PassError, Stage};
use crate::arch::Vlm;
use crate::ir::PatchPlan;

pub(super) const ENTRY: Entry = Entry {
    name: "fast_v",
    about: "drops visual tokens once, ranked by the last token's attention in the layer before (FastV)",
    stage: Stage::Decoder,
    keys: &["after_layer", "keep", "positions"],
    parse: super::parse::<FastV>,
    keep_everything: "{keep: 1.0}",
    samples: &[
        "{keep: 0.3}",
        "{after_layer: 3, keep: 0.1, positions: renumber}",
    ],
};

/// Parameters in a recipe.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "second")]
    after_layer: usize,
    keep: f64,
    #[serde(default)]
    positions: Option<Positions>,
}

/// K as published.
fn second() -> usize {
    2
}

/// The pass.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Parameters")]
pub struct FastV {
    prune: VisualPrune,
}

impl From<Parameters> for FastV {
    fn from(parameters: Parameters) -> Self {
        let drop = Drop {
            after_layer: parameters.after_layer,
            keep: parameters.keep,
        };
        Self {
            prune: VisualPrune {
                drops: vec![drop],
                text: TextQueries::Last,
                positions: parameters.positions,
                keeps_if_told: true,
                rank_mask: RankMask::Causal,
                rank_layer: RankLayer::Previous,
                ratio_base: RatioBase::Entered,
            },
        }
    }
}

impl Pass for FastV {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn requires(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError> {
        self.prune.requires_for(ENTRY.name, vlm, context)
    }

    fn plan(&self, vlm: &Vlm, context: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError> {
        self.prune.plan_for(ENTRY.name, vlm, context)
    }

    fn ensures(&self, vlm: &Vlm, _: &Context) -> Result<(), PassError> {
        self.prune.ensures_for(ENTRY.name, vlm)
    }

    fn seen_by_layers(&self, entered: i64, layers: usize) -> Option<Vec<i64>> {
        Some(self.prune.tokens_per_layer(entered, layers))
    }

    fn pruning(&self) -> Option<&VisualPrune> {
        Some(&self.prune)
    }

    fn summary(&self, vlm: &Vlm) -> String {
        self.prune.summary(vlm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::Recipe;

    #[test]
    fn parameters_are_what_the_recipe_says() {
        let parse = |text: &str| {
            let text = format!("version: 1\npasses:\n  - fast_v: {text}\n");
            Recipe::parse(&text).map_err(|e| e.to_string())
        };
        let recipe = parse("{keep: 0.5}").unwrap();
        let pruning = recipe.pruning().unwrap();
        assert_eq!(pruning.pass, "fast_v");
        let drop = Drop {
            after_layer: 2,
            keep: 0.5,
        };
        assert_eq!(pruning.prune.drops, [drop]);
        assert!(pruning.prune.keeps_if_told && pruning.prune.positions.is_none());
        // Half of 576 tokens from the third layer on, as in the paper's title.
        assert_eq!(recipe.tokens_per_layer(576, 4), [576, 576, 288, 288]);
        assert!(parse("{}").unwrap_err().contains("keep"));
        assert!(
            parse("{keep: 0.5, after_layr: 2}")
                .unwrap_err()
                .contains("after_layer")
        );
    }
}
