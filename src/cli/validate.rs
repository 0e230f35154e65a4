//! `duet validate`

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};

use super::{Engine, Global, Outcome, load, print_json, style};
use crate::arch::{Role, Vlm};
use crate::passes::{FixedShapes, Recipe, SHAPES_KEY, earlier_recipe};
use crate::validate::{Options, Report, check, check_fixed, structure};

/// Arguments of `duet validate`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The model as it was
    base: PathBuf,
    /// The rewritten model
    rewritten: PathBuf,
    /// Seed of the random images and prompts
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Precisions to check (fp16, q4, default, …); all that the rewritten model has if left out
    #[arg(long, value_name = "NAME")]
    variant: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: Engine,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let rewritten = load::select(&arguments.rewritten, &arguments.variant, global)?.vlm;
    let shapes = fixed(&rewritten)?;
    let base = match shapes {
        // Its decoders have other names.
        Some(_) => load::base_of_variants(&arguments.base, &rewritten)?,
        None => load::base_of(&arguments.base, &rewritten)?,
    };
    if let Some(part) = base
        .parts
        .iter()
        .find(|p| earlier_recipe(&p.model).is_some())
    {
        bail!(
            "{} of the base was rewritten itself; give the original first",
            part.label()
        );
    }
    let recipe = stamped(&rewritten)
        .with_context(|| format!("{} is not a rewritten model", arguments.rewritten.display()))?;
    let (base, rewritten) = match shapes {
        Some(_) => (base, rewritten),
        None => structure::pair(base, rewritten)?,
    };
    if base
        .parts
        .iter()
        .all(|p| matches!(p.role, Role::Unknown(_)))
    {
        bail!(
            "nothing is recognised in the base; see duet inspect {}",
            arguments.base.display()
        );
    }
    let options = Options {
        session: arguments.engine.options(),
        seed: arguments.seed,
    };
    let mut progress = |step: &str| global.detail(step);
    let report = match &shapes {
        Some(shapes) => check_fixed(&base, &rewritten, &recipe, shapes, &options, &mut progress)?,
        None => check(&base, &rewritten, &recipe, &options, &mut progress)?,
    };
    if arguments.json {
        print_json(&serde_json::to_value(&report)?)?;
    } else {
        print(&report);
    }
    Ok(if report.passed() {
        Outcome::Done
    } else {
        Outcome::Failed
    })
}

/// The shapes that the files were fixed to, if they were; all have to agree.
fn fixed(vlm: &Vlm) -> anyhow::Result<Option<FixedShapes>> {
    let stamps = vlm
        .parts
        .iter()
        .filter_map(|p| p.model.metadata(SHAPES_KEY));
    let stamps: BTreeSet<&str> = stamps.collect();
    match stamps.into_iter().collect::<Vec<_>>()[..] {
        [] => Ok(None),
        [one] => {
            let shapes = one.parse::<FixedShapes>();
            Ok(Some(shapes.map_err(|problem| {
                anyhow!("metadata '{SHAPES_KEY}': {problem}")
            })?))
        }
        ref several => bail!(
            "its files are fixed to different shapes: {}",
            several.join(" and ")
        ),
    }
}

/// The recipe that the files are stamped with; all stamps must agree.
fn stamped(vlm: &Vlm) -> anyhow::Result<Recipe> {
    let mut found: Option<&str> = None;
    for part in &vlm.parts {
        if let Some((_, recipe)) = earlier_recipe(&part.model) {
            if found.is_some_and(|f| f != recipe) {
                bail!("its files are stamped with different recipes");
            }
            found = Some(recipe);
        }
    }
    let Some(text) = found else {
        bail!("no file is stamped (metadata 'duet.recipe')");
    };
    Ok(Recipe::parse(text)?)
}

/// Findings, for people.
pub(super) fn print(report: &Report) {
    for finding in &report.findings {
        let (style, word) = if finding.passed {
            (style::GOOD, "ok  ")
        } else {
            (style::BAD, "FAIL")
        };
        anstream::println!(
            "{style}{word}{}  {}  {}{}{}",
            style::RESET,
            finding.check,
            style::DIM,
            finding.detail,
            style::RESET
        );
    }
    let failed = report.findings.iter().filter(|f| !f.passed).count();
    let verdict = if failed == 0 { "valid" } else { "NOT VALID" };
    anstream::println!(
        "{verdict}: {} checks, {failed} failed",
        report.findings.len()
    );
}
