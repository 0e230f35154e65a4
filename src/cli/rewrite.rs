//! `duet rewrite`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{anyhow, bail};
use serde_json::json;

use super::{Global, ModelArgument, Outcome, clients, counts, family, load, print_json, style};
use crate::arch::{Part, Role, Vlm};
use crate::ir::cone::holder_of;
use crate::ir::{Model, TensorData, ValueId, verify};
use crate::onnx::{
    DataMode, Layout, ModelDir, Outputs, mark_newline, patch_genai, patch_processor, serialize,
    suffixed, write_beside, write_out,
};
use crate::passes::{
    FixedShapes, KvLayout, PADDING_KEY, Placement, Recipe, Rewritten, SHAPES_KEY, rewrite,
    rewrite_fixed,
};

/// Arguments of `duet rewrite`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Recipe: a built-in name or a YAML file
    #[arg(long, value_name = "NAME_OR_FILE")]
    recipe: String,
    /// Give logits of the last token alone, which is what generating text needs (recipe: logits: last)
    #[arg(long)]
    last_logits: bool,
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
    /// Fix every shape, for runtimes that take no others: prompt=64,images=1,answer=128,batch=1
    ///
    /// `prompt` is the number of text tokens of a prompt (shorter ones are padded), `images` that of its images,
    /// `answer` the most tokens of an answer, `batch` the number of rows; all but `prompt` may be left out. `visual`
    /// says how many visual tokens enter the decoder, where the vision encoder does not say it. A decoder becomes
    /// two files, one for prompts and one for a token on the cache. May be repeated.
    #[arg(long = "static", value_name = "KEY=N", conflicts_with = "beside")]
    fixed: Vec<String>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Data {
    /// Copied, sharing blocks where the file system can
    Copy,
    /// Hard-linked (onnx 1.23 and later refuse such files)
    Hardlink,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let mut recipe = load::recipe(&arguments.recipe)?;
    if arguments.last_logits {
        recipe = recipe.with_last_logits()?;
    }
    let shapes = match arguments.fixed.as_slice() {
        [] => None,
        given => {
            let shapes: Result<FixedShapes, String> = given.join(",").parse();
            Some(shapes.map_err(|problem| anyhow!("--static: {problem}"))?)
        }
    };
    let began = Instant::now();
    let selected = load::select(&arguments.model.path, &arguments.variant, global)?;
    let dir = &selected.dir;
    family::check(&dir.root, &selected.vlm, &arguments.recipe)?;
    let crops = family::crops(&dir.root, &selected.vlm);
    let read = Instant::now();
    let files: BTreeSet<PathBuf> = selected.vlm.parts.iter().map(|p| p.file.clone()).collect();
    let done = match &shapes {
        None => rewrite(selected.vlm, &recipe)?,
        Some(_) if dir.layout == Layout::GenAi => bail!(
            "--static: ONNX Runtime GenAI gives its graphs prompts of any length; export the model for ONNX Runtime \
             (Hugging Face's layout) to fix its shapes"
        ),
        Some(shapes) => rewrite_fixed(selected.vlm, &recipe, shapes)?,
    };
    let patched = Instant::now();
    let mut outputs = outputs(dir, &done, &recipe, arguments.beside.as_deref())?;
    for left in &selected.left_out {
        outputs.left_out.insert(left.file.clone());
        outputs.left_out.extend(left.data.iter().cloned());
    }
    // Decoders of fixed shapes have files of other names.
    let named = |file: &PathBuf| done.vlm.parts.iter().any(|p| p.file == *file);
    outputs
        .left_out
        .extend(files.into_iter().filter(|f| !named(f)));
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
    let written = match (&arguments.out, &arguments.beside) {
        (Some(out), None) => {
            write_out(dir, &outputs, out, mode)?;
            report(&done, &recipe, crops, global);
            for left in &selected.left_out {
                global.say(format!("{}: left out, {}", left.file.display(), left.why));
            }
            global.say(format!("wrote {}", out.display()));
            vec![out.clone()]
        }
        (None, Some(suffix)) => {
            let only_changed = changed_only(outputs, &done);
            let written = write_beside(dir, &only_changed, suffix)?;
            report(&done, &recipe, crops, global);
            for path in &written {
                global.say(format!("wrote {}", path.display()));
            }
            written
        }
        _ => bail!("name one target: --out DIR or --beside SUFFIX"),
    };
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    global.detail(format!(
        "read, verified and recognised in {:.1} ms; patched and verified in {:.1} ms; written in {:.1} ms",
        ms(began, read),
        ms(read, patched),
        ms(patched, Instant::now())
    ));
    let beside = arguments.beside.is_some();
    let clients = clients::clients(dir, &done, &recipe, beside, crops.is_some());
    clients::lines(&clients)
        .iter()
        .for_each(|line| global.say(line));
    if arguments.json {
        let mut document = document(&done, &recipe, &arguments.recipe, crops, &written);
        if let Some(shapes) = &shapes {
            document["static"] = static_document(&done, shapes);
        }
        document["clients"] = clients.iter().map(clients::Client::json).collect();
        print_json(&document)?;
    }
    Ok(Outcome::Done)
}

/// What was done, for programs.
fn document(
    done: &Rewritten,
    recipe: &Recipe,
    name: &str,
    crops: Option<i64>,
    written: &[PathBuf],
) -> serde_json::Value {
    let passes: Vec<_> = done
        .summaries
        .iter()
        .map(|(pass, summary)| {
            let changes = done.changes.iter().filter(|c| c.pass == *pass);
            let files: Vec<_> = changes
                .map(|c| {
                    let part = &done.vlm.parts[c.part];
                    json!({ "file": part.file, "branch": part.source.branch, "nodes_inserted": c.inserted })
                })
                .collect();
            json!({ "pass": pass, "summary": summary, "files": files })
        })
        .collect();
    let tables = counts::tables(&done.vlm, recipe, crops);
    json!({
        "schema_version": 1,
        "recipe": name,
        "passes": passes,
        "visual_tokens": tables.iter().map(counts::LayerTable::json).collect::<Vec<_>>(),
        "written": written,
    })
}

/// The shapes that files were fixed to, for programs.
fn static_document(done: &Rewritten, shapes: &FixedShapes) -> serde_json::Value {
    let list = |model: &Model, values: &[ValueId]| -> serde_json::Value {
        let each = values.iter().map(|&v| {
            let dims = model.value(v).ty.as_ref().and_then(|t| t.shape());
            let dims: Vec<Option<i64>> =
                dims.unwrap_or_default().iter().map(|d| d.known()).collect();
            (model.name(v).to_owned(), json!(dims))
        });
        each.collect::<serde_json::Map<_, _>>().into()
    };
    let parts = done.vlm.parts.iter();
    let fixed = parts.filter(|p| p.model.metadata(SHAPES_KEY).is_some());
    let files = fixed.map(|part| {
        let graph = part.model.graph();
        json!({
            "file": part.file,
            "inputs": list(&part.model, &graph.inputs),
            "outputs": list(&part.model, &graph.outputs),
            "padding": part.model.metadata(PADDING_KEY),
        })
    });
    json!({ "shapes": shapes.to_string(), "files": files.collect::<Vec<_>>() })
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
    outputs.configs = configs(dir, done, recipe, beside)?;
    Ok(outputs)
}

/// The configurations among them, by name and content.
pub(super) fn configs(
    dir: &ModelDir,
    done: &Rewritten,
    recipe: &Recipe,
    beside: Option<&str>,
) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut configs: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    if !dir.layout.is_directory() {
        return Ok(configs);
    }
    let mut patch = |name: &str, patched: &dyn Fn(&str) -> Result<Option<String>, String>| {
        let path = dir.root.join(name);
        let mut known = configs.iter_mut();
        let known = known.find(|(file, _)| file == Path::new(name));
        let text = match &known {
            Some((_, earlier)) => String::from_utf8_lossy(earlier).into_owned(),
            None => match load::text_of(&path)? {
                Some(text) => text,
                None => return Ok(()),
            },
        };
        let new = patched(&text).map_err(|problem| anyhow!("{}: {problem}", path.display()))?;
        match (new, known) {
            (Some(new), Some((_, earlier))) => *earlier = new.into_bytes(),
            (Some(new), None) => configs.push((PathBuf::from(name), new.into_bytes())),
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
        let padded = recipe.context.kv == KvLayout::Padded;
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
            patch_genai(text, width, padded, &renamed)
        })?;
    }
    Ok(configs)
}

/// What the counts mean for images of any resolution, and what their clients do.
fn crops_note(crops: Option<i64>, vlm: &Vlm, recipe: &Recipe) -> Option<&'static str> {
    crops?;
    Some(
        match recipe.encoder_pass().filter(|_| !recipe.placed(vlm)) {
            Some(_) => {
                "images of several crops: clients put what is left of the crops' tokens one after the other, the base crop's first, \
             without newline tokens (duet run does); the processor's own count of placeholders is for unmerged crops"
            }
            None => {
                "images of several crops: clients pack the crops as before; newline tokens count as visual, what is cut off \
             as padding does not"
            }
        },
    )
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
    let left = || recipe.tokens_left(tower, Placement::Encoder);
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

/// That functions were inlined, for people.
fn inlined(part: &Part) -> String {
    match part.source.inlined.as_slice() {
        [] => String::new(),
        names => format!("; functions inlined: {}", names.join(", ")),
    }
}

/// What was done, for people.
fn report(done: &Rewritten, recipe: &Recipe, crops: Option<i64>, global: &Global) {
    for (pass, summary) in &done.summaries {
        global.say(format!("{}{pass}{}  {summary}", style::NEW, style::RESET));
        for change in done.changes.iter().filter(|c| c.pass == *pass) {
            let part = &done.vlm.parts[change.part];
            let what = match *pass {
                "static" => format!("{} nodes are left", part.model.graph().nodes.len()),
                _ => format!("{} nodes inserted", change.inserted),
            };
            global.say(format!("  {}: {what}{}", part.label(), inlined(part)));
        }
    }
    for table in counts::tables(&done.vlm, recipe, crops) {
        global.say(table.line());
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
    if let Some(note) = crops_note(crops, &done.vlm, recipe) {
        global.say(note);
    }
}
