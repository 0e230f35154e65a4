//! `duet plan`

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};

use super::{Global, ModelArgument, Outcome, load, style};
use crate::arch::Vlm;
use crate::passes::{BudgetShape, Placement, placement_in, plan};

/// Arguments of `duet plan`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Visual tokens that a decoder layer may see on average
    #[arg(long, group = "target", value_name = "TOKENS")]
    budget: Option<f64>,
    /// Share of the visual tokens to save, as in 67%
    #[arg(long, group = "target", value_name = "PERCENT", value_parser = percent)]
    reduction: Option<f64>,
    /// Write the recipe to a file that does not exist yet
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// `67%` or `67` or `0.67`.
fn percent(text: &str) -> Result<f64, String> {
    let (number, percent) = match text.strip_suffix('%') {
        Some(number) => (number, true),
        None => (text, false),
    };
    let value: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("'{text}' is no number; expected 67%"))?;
    let share = if percent || value > 1.0 {
        value / 100.0
    } else {
        value
    };
    if share > 0.0 && share < 1.0 {
        Ok(share)
    } else {
        Err(format!(
            "{text} is no reduction; expected more than 0% and less than 100%"
        ))
    }
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let path = &arguments.model.path;
    let vlm = load::select(path, &[], global)?.vlm;
    let shape = shape(&vlm).with_context(|| format!("{}", path.display()))?;
    let all = shape.features as f64;
    let budget = match (arguments.budget, arguments.reduction) {
        (Some(tokens), _) => tokens,
        (None, Some(share)) => all * (1.0 - share),
        (None, None) => bail!("name --budget or --reduction"),
    };
    let planned =
        plan(shape, budget).map_err(|problem| anyhow::anyhow!("{}: {problem}", path.display()))?;
    match &arguments.output {
        Some(file) => {
            let mut target = std::fs::File::create_new(file)
                .with_context(|| format!("writing {}", file.display()))?;
            target
                .write_all(planned.recipe.as_bytes())
                .with_context(|| format!("writing {}", file.display()))?;
        }
        None => anstream::print!("{}", planned.recipe),
    }
    global.say(format!(
        "visual tokens by layer: {}; average {:.2} of {} ({:.1} % fewer)",
        style::layers(&planned.tokens),
        planned.average,
        shape.features,
        100.0 * (1.0 - planned.average / all)
    ));
    if let Some((_, decoder)) = vlm.decoders().next() {
        let width = decoder.dtype.byte_len(1).map_or(4, |bytes| bytes as i64);
        let row = 2 * decoder.kv_heads * decoder.head_dim * width;
        let saved = planned
            .tokens
            .iter()
            .map(|n| (shape.features - n) * row)
            .sum::<i64>();
        global.say(format!(
            "key/value cache: {} fewer for each image",
            style::bytes(u64::try_from(saved).unwrap_or(0))
        ));
    }
    Ok(Outcome::Done)
}

/// What there is to merge and to prune.
fn shape(vlm: &Vlm) -> anyhow::Result<BudgetShape> {
    let layers = vlm.decoders().next().map_or(0, |(_, d)| d.depth());
    let Some((_, tower)) = vlm.towers().next() else {
        bail!(
            "no vision encoder was recognised, so the number of visual tokens is not known; give the whole model \
             directory (duet inspect says what is recognised)"
        );
    };
    let (Some(patches), Some(features)) = (tower.patches(), tower.features_per_image()) else {
        bail!(
            "the number of patch tokens is not fixed in the file; write a recipe with ratios instead"
        );
    };
    Ok(BudgetShape {
        patches,
        cls: tower.cls,
        features,
        merges: tower.grid.is_none(),
        placed: placement_in(None, vlm) == Placement::Decoder,
        layers,
    })
}
