//! `duet rewrite`

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};

use super::{Global, ModelArgument, Outcome, family, load, style};
use crate::arch::{DEFAULT_FRAMES, Part, Role, VisionTower, Vlm};
use crate::ir::cone::holder_of;
use crate::ir::{Model, TensorData, ValueId, verify};
use crate::onnx::{
    DataMode, Layout, ModelDir, Outputs, mark_newline, patch_genai, patch_processor, serialize,
    suffixed, write_beside, write_out,
};
use crate::passes::{Count, Placement, Recipe, Rewritten, TokenMerge, VisualPrune, rewrite};

/// Arguments of `duet rewrite`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Recipe: a built-in name or a YAML file
    #[arg(long, value_name = "NAME_OR_FILE")]
    recipe: String,
    /// New directory to write
    #[arg(long, group = "target", value_name = "DIR")]
    out: Option<PathBuf>,
    /// How external data reaches the new directory
    #[arg(long, value_enum, default_value_t = Data::Copy, requires = "out")]
    data: Data,
    /// Write NAME_SUFFIX.onnx next to the old files, sharing their data files
    #[arg(long, group = "target", value_name = "SUFFIX")]
    beside: Option<String>,
    /// Precisions to rewrite: fp16, q4, quantized, …, or default for the files without a suffix
    ///
    /// May be repeated. Without it, every precision in the directory is rewritten. Modules of other
    /// precisions are left out of the new directory: they would not go together with rewritten ones. Where
    /// a precision has no file of a module, the one with the same element types is taken along.
    #[arg(long, value_name = "NAME")]
    variant: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Data {
    /// Copied, sharing blocks where the file system can
    Copy,
    /// Hard-linked (onnx 1.23 and later refuse such files)
    Hardlink,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let recipe = load::recipe(&arguments.recipe)?;
    let selected = load::select(&arguments.model.path, &arguments.variant, global)?;
    let dir = &selected.dir;
    // A file of that name comes before the built-in recipe.
    if !Path::new(&arguments.recipe).is_file() {
        let built_in: Vec<&str> = load::RECIPES.iter().map(|(name, _)| *name).collect();
        family::check(&dir.root, &arguments.recipe, &built_in)?;
    }
    let done = rewrite(selected.vlm, &recipe)?;
    let mut outputs = outputs(dir, &done, &recipe, arguments.beside.as_deref())?;
    for left in &selected.left_out {
        outputs.left_out.insert(left.file.clone());
        outputs.left_out.extend(left.data.iter().cloned());
    }
    if arguments.data == Data::Hardlink {
        if let Some(place) = data_in_bodies(&done.vlm)? {
            bail!(
                "{place} keeps external data, and ONNX Runtime refuses hard-linked data there; use --data copy \
                 or --beside"
            );
        }
        global.say("warning: onnx 1.23 and later, and ONNX Runtime in places, refuse hard-linked external data");
    }
    let mode = match arguments.data {
        Data::Copy => DataMode::Copy,
        Data::Hardlink => DataMode::Hardlink,
    };
    match (&arguments.out, &arguments.beside) {
        (Some(out), None) => {
            write_out(dir, &outputs, out, mode)?;
            report(&done, &recipe, global);
            if let Some(note) = crops_note(dir, &done.vlm, &recipe) {
                global.say(note);
            }
            for left in &selected.left_out {
                global.say(format!("{}: left out, {}", left.file.display(), left.why));
            }
            global.say(format!("wrote {}", out.display()));
        }
        (None, Some(suffix)) => {
            let only_changed = changed_only(outputs, &done);
            let written = write_beside(dir, &only_changed, suffix)?;
            report(&done, &recipe, global);
            for path in written {
                global.say(format!("wrote {}", path.display()));
            }
        }
        _ => bail!("name one target: --out DIR or --beside SUFFIX"),
    }
    Ok(Outcome::Done)
}

/// What is to be written for a rewritten model, with `beside`'s suffix if the
/// files are to lie next to the old ones.
pub(super) fn outputs(
    dir: &ModelDir,
    done: &Rewritten,
    recipe: &Recipe,
    beside: Option<&str>,
) -> anyhow::Result<Outputs> {
    let mut outputs = Outputs::default();
    for file in done.vlm.files()? {
        let text = serialize(verify(&file.model)?);
        outputs.data.extend(load::data_files(&file));
        outputs.models.push((file.file, text));
    }
    if !dir.layout.is_directory() {
        return Ok(outputs);
    }
    let mut patch = |name: &str, patched: &dyn Fn(&str) -> Result<Option<String>, String>| {
        let path = dir.root.join(name);
        let mut known = outputs.configs.iter_mut();
        let known = known.find(|(file, _)| file == Path::new(name));
        let text = match &known {
            Some((_, earlier)) => String::from_utf8_lossy(earlier).into_owned(),
            None => match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(_) => return Ok(()),
            },
        };
        let new = patched(&text).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
        match (new, known) {
            (Some(new), Some((_, earlier))) => *earlier = new.into_bytes(),
            (Some(new), None) => outputs
                .configs
                .push((PathBuf::from(name), new.into_bytes())),
            (None, _) => {}
        }
        anyhow::Ok(())
    };
    if let Some((before, after)) = token_counts(&done.vlm, recipe) {
        for name in ["processor_config.json", "config.json"] {
            patch(name, &|text| patch_processor(name, text, before, after))?;
        }
    }
    let width = marked_width(done);
    if let Some(width) = width {
        patch("config.json", &|text| mark_newline(text, width))?;
    }
    if dir.layout == Layout::GenAi {
        let renamed = |file: &Path| {
            let changed = done
                .changes
                .iter()
                .any(|c| done.vlm.parts[c.part].file == *file);
            beside
                .filter(|_| changed)
                .map(|suffix| suffixed(file, suffix))
        };
        patch("genai_config.json", &|text| {
            patch_genai(text, width, &renamed)
        })?;
    }
    Ok(outputs)
}

/// What the counts mean for images of any resolution, and what their clients do.
fn crops_note(dir: &ModelDir, vlm: &Vlm, recipe: &Recipe) -> Option<&'static str> {
    let merge = recipe.pass::<TokenMerge>().filter(|_| !recipe.placed(vlm));
    let text = std::fs::read_to_string(dir.root.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    config.get("image_grid_pinpoints")?;
    Some(match merge {
        Some(_) => {
            "images of several crops: the counts above are of one crop. Clients put the crops' merged tokens one after \
             the other, the base crop's first, without newline tokens (duet run does); the processor's own count of \
             placeholders is for unmerged crops"
        }
        None => {
            "images of several crops: the counts above are of one crop. Clients pack the crops as before; newline \
             tokens count as visual"
        }
    })
}

/// Width of the embeddings without the marker channel, if there is one now.
fn marked_width(done: &Rewritten) -> Option<i64> {
    let (index, embedding) = done.vlm.embeddings().next()?;
    let width = embedding.width?;
    let graph = done.vlm.parts[index].model.graph();
    let output = *graph.outputs.first()?;
    let ty = done.vlm.parts[index].model.value(output).ty.as_ref()?;
    let now = ty.shape()?.last()?.known()?;
    (now == width + 1).then_some(width)
}

/// (patch tokens of the tower, features per image now), if they differ.
fn token_counts(vlm: &Vlm, recipe: &Recipe) -> Option<(i64, i64)> {
    if recipe.placed(vlm) {
        return None;
    }
    let (index, tower) = vlm.towers().next()?;
    let model = &vlm.parts[index].model;
    let merge = recipe.pass::<TokenMerge>();
    let left = || merge?.tokens_left(tower, Placement::Encoder);
    let after = match tower.features_index {
        // Of clips the output need not say how many tokens a frame gives.
        _ if tower.video => left()?,
        Some(output) => {
            let output = model.graph().outputs[output];
            let shape = model.value(output).ty.as_ref()?.shape()?;
            shape.get(1)?.known().filter(|_| shape.len() == 3)?
        }
        // An inner value need not state its shape.
        None => left()?,
    };
    (Some(after) != tower.features_per_image()).then_some((tower.candidates()?, after))
}

/// The first file with external data in a branch or another body.
fn data_in_bodies(vlm: &Vlm) -> anyhow::Result<Option<String>> {
    let external = |model: &Model, value: &ValueId| {
        let tensor = model.value(*value).initializer.as_ref();
        tensor.is_some_and(|t| matches!(t.data, TensorData::External(_)))
    };
    for file in vlm.files()? {
        let model = &file.model;
        for (id, graph) in model.graphs().filter(|(id, _)| *id != model.main()) {
            if graph.initializers.iter().any(|v| external(model, v)) {
                let holder = holder_of(model, id).map(|n| model.describe(n));
                let holder = holder.unwrap_or_else(|| format!("graph '{}'", graph.name));
                return Ok(Some(format!("{}: {holder}", file.file.display())));
            }
        }
    }
    Ok(None)
}

/// `--beside` writes only what changed.
fn changed_only(mut outputs: Outputs, done: &Rewritten) -> Outputs {
    let changed = |file: &PathBuf| {
        done.changes
            .iter()
            .any(|c| done.vlm.parts[c.part].file == *file)
    };
    outputs.models.retain(|(file, _)| changed(file));
    outputs
}

/// Visual tokens that each layer sees, before and after, if the model is whole: of an
/// image, or of a clip where the model takes nothing else.
pub(super) fn tokens_by_layer(vlm: &Vlm, recipe: &Recipe) -> Option<(Vec<i64>, Vec<i64>)> {
    by_layer(vlm, vlm.towers().next()?.1, recipe)
}

/// Frames of a clip that a tower sees.
fn frames(tower: &VisionTower) -> i64 {
    match tower.video {
        true => tower.frames.unwrap_or(DEFAULT_FRAMES),
        false => 1,
    }
}

/// The same for one tower of the model.
fn by_layer(vlm: &Vlm, tower: &VisionTower, recipe: &Recipe) -> Option<(Vec<i64>, Vec<i64>)> {
    let (_, decoder) = vlm.decoders().next()?;
    let before = frames(tower) * tower.features_per_image()?;
    let placed = recipe.placed(vlm);
    let placement = match placed {
        true => Placement::Decoder,
        false => Placement::Encoder,
    };
    let entering = match recipe.pass::<TokenMerge>() {
        Some(merge) => frames(tower) * merge.tokens_left(tower, placement)?,
        None => before,
    };
    let mut after = match recipe.pass::<VisualPrune>() {
        Some(prune) => prune.tokens_per_layer(entering, decoder.depth()),
        None => vec![entering; decoder.depth()],
    };
    // Discarded features go through the first layer with the others.
    if placed && let Some(first) = after.first_mut() {
        *first = before;
    }
    Some((vec![before; decoder.depth()], after))
}

pub(super) fn average(counts: &[i64]) -> f64 {
    counts.iter().sum::<i64>() as f64 / counts.len().max(1) as f64
}

/// That functions were inlined, for people.
fn inlined(part: &Part) -> String {
    match part.source.inlined.as_slice() {
        [] => String::new(),
        names => format!("; functions inlined: {}", names.join(", ")),
    }
}

/// Visual tokens by layer where only the run tells how many an image has: of one with as many as
/// the recipe's counts or more, or in percent of an image's.
fn open_layers(done: &Rewritten, recipe: &Recipe) -> Option<String> {
    let (_, decoder) = done.vlm.decoders().next()?;
    let merge = recipe.pass::<TokenMerge>();
    // Hundredths of a percent keep what a product of two ratios has.
    let whole = 10_000;
    let (entering, counted) = match merge.map(|m| (m.dominant, m.contextual)) {
        Some((Count::Tokens(a), Count::Tokens(b))) => (a + b, true),
        Some((a @ Count::Ratio(_), b @ Count::Ratio(_))) => {
            ((a.of(whole) + b.of(whole)).min(whole), false)
        }
        // A count beside a ratio is neither.
        Some(_) => return None,
        None => (whole, false),
    };
    let after = match recipe.pass::<VisualPrune>() {
        Some(prune) => prune.tokens_per_layer(entering, decoder.depth()),
        None => vec![entering; decoder.depth()],
    };
    let placed = recipe.placed(&done.vlm);
    let first = if placed { " (the first sees all)" } else { "" };
    Some(match counted {
        true => format!(
            "visual tokens by layer{first}, of an image of {entering} or more: {}; average {:.2}",
            style::layers(&after),
            average(&after)
        ),
        false => {
            let percent = |n: f64| 100.0 * n / whole as f64;
            let shares: Vec<i64> = after.iter().map(|n| n * 100 / whole).collect();
            format!(
                "visual tokens by layer{first}, in percent of an image's: {}; average {:.1} %",
                style::layers(&shares),
                percent(average(&after))
            )
        }
    })
}

/// What was done, for people.
pub(super) fn report(done: &Rewritten, recipe: &Recipe, global: &Global) {
    for (pass, summary) in &done.summaries {
        global.say(format!("{}{pass}{}  {summary}", style::NEW, style::RESET));
        for change in done.changes.iter().filter(|c| c.pass == *pass) {
            let part = &done.vlm.parts[change.part];
            global.say(format!(
                "  {}: {} nodes inserted{}",
                part.label(),
                change.inserted,
                inlined(part)
            ));
        }
    }
    // The precisions of one tower say the same.
    let towers = [false, true].map(|video| done.vlm.towers().find(|(_, t)| t.video == video));
    for (_, tower) in towers.into_iter().flatten() {
        if tower.open() {
            open_layers(done, recipe)
                .into_iter()
                .for_each(|l| global.say(l));
            continue;
        }
        let Some((before, after)) = by_layer(&done.vlm, tower, recipe) else {
            continue;
        };
        let (full, now) = (average(&before), average(&after));
        let of = match tower.video {
            true => format!(" of a clip of {} frames", frames(tower)),
            false => String::new(),
        };
        global.say(format!(
            "visual tokens{of} by layer: {}; average {now:.2} of {full:.0} ({:.1} % fewer)",
            style::layers(&after),
            100.0 * (1.0 - now / full)
        ));
    }
    let unknown = done
        .vlm
        .parts
        .iter()
        .filter(|p| matches!(p.role, Role::Unknown(_)));
    for part in unknown {
        global.say(format!(
            "{}: not recognised, carried over as it is",
            part.label()
        ));
    }
}
