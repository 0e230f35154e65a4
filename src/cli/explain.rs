//! `duet explain`

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Value as Json, json};

use super::load::{self, Runnable};
use super::{Engine, Global, ModelArgument, Outcome, family, print_json, rewrite, run, style};
use crate::arch::{DEFAULT_FRAMES, Kind, Vlm};
use crate::explain::{Explanation, Look, Question, Stage, Values, draw, explain, explain_whole};
use crate::ir::{Model, verify};
use crate::onnx::ModelDir;
use crate::passes::{Recipe, Rewritten, earlier_recipe};
use crate::runtime::{
    GenerateOptions, Pixels, RuntimeError, Session, SessionOptions, WholePipeline, probe,
};

/// Arguments of `duet explain`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("seen").required(true).multiple(true))]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Image; may be repeated
    #[arg(long, value_name = "FILE", group = "seen")]
    image: Vec<PathBuf>,
    /// Clip: a folder of frames, a GIF, or any video file if an ffmpeg program is on PATH; may be repeated
    #[arg(long, value_name = "PATH", group = "seen")]
    video: Vec<PathBuf>,
    /// Question or instruction
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Picture to write, a PNG file; what exists is never replaced
    #[arg(long, value_name = "FILE", required_unless_present = "json")]
    out: Option<PathBuf>,
    /// Recipe for a model that was not rewritten: a built-in name or a YAML file
    ///
    /// The model is rewritten in memory; no model file is written.
    #[arg(long, value_name = "NAME_OR_FILE")]
    recipe: Option<String>,
    /// Precision of the files to use (fp16, q4, default, …), or the suffix of an earlier --beside
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 32, value_name = "N")]
    max_new_tokens: usize,
    /// Print one JSON document: indices at every stage
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: Engine,
}

/// A rewritten model, on disk or in memory.
struct Subject {
    dir: ModelDir,
    vlm: Vlm,
    recipe: Recipe,
    /// What it is called, for people.
    recipe_name: Option<String>,
    variant: String,
    /// Where the configurations are, if not in the model's directory.
    configs: Option<tempfile::TempDir>,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    if let Some(out) = &arguments.out {
        check_target(out)?;
    }
    let images = arguments.image.iter().map(Pixels::open);
    let images = images.collect::<Result<Vec<_>, _>>()?;
    let subject = subject(arguments, global)?;
    let explanation = ask(arguments, &subject, &images)?;
    let picture = match &arguments.out {
        Some(out) => {
            let bytes = draw(&explanation, &title(arguments, &subject, &explanation))?;
            write_new(out, &bytes)?;
            global.say(format!("wrote {}", out.display()));
            Some(out)
        }
        None => None,
    };
    if arguments.json {
        let mut document = document(arguments, &subject, &explanation);
        document["picture"] = json!(picture);
        print_json(&document)?;
    } else {
        anstream::print!("{}", style::table(&rows(&explanation)));
        anstream::println!("\n{}", explanation.answer.text.trim());
    }
    Ok(Outcome::Done)
}

/// Refuses a target before anything is run.
fn check_target(out: &Path) -> anyhow::Result<()> {
    let png = |e: &std::ffi::OsStr| e.eq_ignore_ascii_case("png");
    if !out.extension().is_some_and(png) {
        bail!(
            "{}: the picture is a PNG file; give it a name that ends in .png",
            out.display()
        );
    }
    if out.symlink_metadata().is_ok() {
        bail!(
            "{} exists, and nothing is replaced; name another file",
            out.display()
        );
    }
    Ok(())
}

/// Writes a file that must not be there: all of it or nothing.
fn write_new(out: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).open(out);
    let mut file = file.with_context(|| format!("writing {}", out.display()))?;
    if let Err(error) = file.write_all(bytes) {
        // Half a picture is none.
        let _ = std::fs::remove_file(out);
        return Err(error).with_context(|| format!("writing {}", out.display()));
    }
    Ok(())
}

/// The rewritten model that is asked about.
fn subject(arguments: &Arguments, global: &Global) -> anyhow::Result<Subject> {
    let path = &arguments.model.path;
    let (dir, vlm, variant) = load::everything_and_variant(path, arguments.variant.as_deref())?;
    let set = vlm.set(&variant);
    let mut parts = set.files().map(|i| &vlm.parts[i].model);
    let earlier = parts.find_map(earlier_recipe);
    let earlier = earlier.map(|(_, text)| text.to_owned());
    match (earlier, &arguments.recipe) {
        (Some(_), Some(name)) => bail!(
            "{}: it was rewritten already, with the recipe in its metadata; leave --recipe {name} out, or name the \
             unmodified model",
            path.display()
        ),
        (None, None) => bail!(
            "{}: it was not rewritten, so every layer sees every visual token; name a rewritten model, or a recipe to \
             see what it would keep (--recipe NAME_OR_FILE)",
            path.display()
        ),
        (Some(text), None) => {
            let recipe = Recipe::parse(&text)
                .with_context(|| format!("{}: the recipe in its metadata", path.display()))?;
            Ok(Subject {
                dir,
                vlm,
                recipe,
                recipe_name: None,
                variant,
                configs: None,
            })
        }
        (None, Some(name)) => {
            let recipe = load::recipe(name)?;
            let selected = load::select(path, &[load::variant_name(&variant).to_owned()], global)?;
            family::check(&selected.dir.root, &selected.vlm, name)?;
            let done = crate::passes::rewrite(selected.vlm, &recipe)?;
            let stem = Path::new(name).file_stem().unwrap_or_default();
            Ok(Subject {
                configs: patched_configs(&selected.dir, &done, &recipe)?,
                dir: selected.dir,
                vlm: done.vlm,
                recipe,
                recipe_name: Some(stem.to_string_lossy().into_owned()),
                variant,
            })
        }
    }
}

/// Configurations as a rewritten directory has them, for a whole model in one file: its placeholders are counted by
/// them. Files of several graphs count features.
fn patched_configs(
    dir: &ModelDir,
    done: &Rewritten,
    recipe: &Recipe,
) -> anyhow::Result<Option<tempfile::TempDir>> {
    if !done.vlm.parts.iter().any(|p| p.kind() == Kind::Whole) {
        return Ok(None);
    }
    let place = tempfile::tempdir().context("a temporary directory for configurations")?;
    let entries = std::fs::read_dir(&dir.root);
    for entry in entries.with_context(|| format!("reading {}", dir.root.display()))? {
        let from = entry?.path();
        let text = |e: &std::ffi::OsStr| ["json", "jinja", "txt"].iter().any(|t| e == *t);
        if let Some(name) = from.file_name().filter(|_| from.is_file())
            && from.extension().is_some_and(text)
        {
            std::fs::copy(&from, place.path().join(name))
                .with_context(|| format!("reading {}", from.display()))?;
        }
    }
    for (file, text) in rewrite::configs(dir, done, recipe, None)? {
        std::fs::write(place.path().join(file), text)?;
    }
    Ok(Some(place))
}

/// Opens the model up and asks the question.
fn ask(arguments: &Arguments, subject: &Subject, images: &[Pixels]) -> anyhow::Result<Explanation> {
    let Subject {
        dir, vlm, recipe, ..
    } = subject;
    let runnable = load::files_of(&arguments.model.path, dir, vlm, &subject.variant)?;
    let seen: Vec<&Path> = match &runnable {
        Runnable::Whole(file) => vec![file],
        Runnable::Trio(trio) => {
            let all = [Some(&trio.vision), trio.video.as_ref(), Some(&trio.decoder)];
            let all = all.into_iter().chain([trio.prompt.as_ref()]).flatten();
            all.map(PathBuf::as_path).collect()
        }
    };
    let mut opened = vlm.clone();
    let (mut of_images, mut of_clips) = (Values::default(), Values::default());
    for part in &mut opened.parts {
        if !seen.contains(&dir.root.join(&part.file).as_path()) {
            continue;
        }
        let kind = part.kind();
        let (model, values) = Values::open_up(&part.model, recipe)?;
        part.model = model;
        match kind {
            Kind::Vision | Kind::Whole => of_images = values,
            Kind::Video => of_clips = values,
            _ => {}
        }
    }
    // What differs from the file on disk: rewritten in memory, or opened up.
    let changed: HashSet<PathBuf> = opened
        .parts
        .iter()
        .filter(|part| part.model.is_patched())
        .map(|part| part.file.clone())
        .collect();
    let files: HashMap<PathBuf, Model> = opened
        .files()?
        .into_iter()
        .filter(|file| changed.contains(&file.file))
        .map(|file| (dir.root.join(file.file), file.model.into_owned()))
        .collect();
    let options = arguments.engine.options();
    let mut open = |file: &Path| open(&files, file, &options);
    let mut look = Look {
        recipe,
        placed: match &runnable {
            Runnable::Whole(_) => false,
            Runnable::Trio(trio) => recipe.context.merges && !trio.merged,
        },
        depth: vlm.decoders().next().map(|(_, d)| d.depth()),
        images: of_images,
        clips: of_clips,
    };
    let mut question = Question {
        images,
        clips: &[],
        text: &arguments.prompt,
    };
    let generate = GenerateOptions {
        max_new_tokens: arguments.max_new_tokens,
        ..Default::default()
    };
    let root = subject
        .configs
        .as_ref()
        .map_or(dir.root.as_path(), |c| c.path());
    Ok(match &runnable {
        Runnable::Whole(file) => {
            if !arguments.video.is_empty() {
                bail!(
                    "{}: the model is one file that takes images; --video needs an encoder of clips beside the \
                     decoder (pixel_values_videos of rank 5)",
                    file.display()
                );
            }
            let mut pipeline = WholePipeline::open_through(file, root, &mut open)?;
            explain_whole(&mut pipeline, &look, &question, &generate)?
        }
        Runnable::Trio(trio) => {
            let mut pipeline = run::open_through(root, trio, &mut open)?;
            if let Some(clips) = &pipeline.clips {
                look.clips = look.clips.of_input(clips.encoder.input());
            }
            let usual = usize::try_from(DEFAULT_FRAMES)?;
            let clips = arguments.video.iter();
            let clips = clips.map(|path| pipeline.take_clip(path, usual));
            let clips = clips.collect::<Result<Vec<_>, _>>()?;
            question.clips = &clips;
            explain(&mut pipeline, &look, &question, &generate)?
        }
    })
}

/// A file of the model: what was opened up from memory.
fn open(
    files: &HashMap<PathBuf, Model>,
    file: &Path,
    options: &SessionOptions,
) -> Result<Session, RuntimeError> {
    let Some(model) = files.get(file) else {
        return Session::open(file, options);
    };
    let name = file.display().to_string();
    let verified = verify(model).map_err(|e| RuntimeError::Run {
        model: name.clone(),
        reason: e.to_string(),
    })?;
    probe::open(verified, &name, options)
}

/// Lines above the picture.
fn title(arguments: &Arguments, subject: &Subject, explanation: &Explanation) -> Vec<String> {
    let path = &arguments.model.path;
    let model = path.canonicalize().unwrap_or_else(|_| path.clone());
    let model = model.file_name().unwrap_or_default().to_string_lossy();
    let model = match &subject.recipe_name {
        Some(recipe) => format!("{model}, {recipe}"),
        None => model.into_owned(),
    };
    vec![
        format!("{}  {}", arguments.prompt, explanation.answer.text.trim()),
        model,
    ]
}

/// The stages for people.
fn rows(explanation: &Explanation) -> Vec<Vec<String>> {
    let mut rows = vec![
        ["stage", "layers", "tokens", "which"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for stage in &explanation.stages {
        let counts = explanation.counts(stage, None);
        let layers = stage.layers.map_or("–".into(), |l| l.text());
        let which = match stage.tokens {
            None => "all".into(),
            Some(_) => counts.text(),
        };
        rows.push(vec![
            stage.name().unwrap_or_else(|| "vision encoder".into()),
            layers,
            counts.total().to_string(),
            which,
        ]);
    }
    rows
}

/// The stages for programs.
fn document(arguments: &Arguments, subject: &Subject, explanation: &Explanation) -> Json {
    let (mut images, mut clips) = (arguments.image.iter(), arguments.video.iter());
    let visuals: Vec<Json> = explanation
        .visuals
        .iter()
        .map(|visual| {
            let (kind, file) = match visual.clip {
                true => ("clip", clips.next()),
                false => ("image", images.next()),
            };
            let pictures = explanation.units[visual.units.clone()].iter().map(|unit| {
                json!({
                    "width": unit.pixels.width(),
                    "height": unit.pixels.height(),
                    "rows": unit.grid.map(|g| g[0]),
                    "columns": unit.grid.map(|g| g[1]),
                    "token_edge": unit.grid.map(|g| g[2]),
                })
            });
            json!({
                "kind": kind,
                "file": file,
                "pictures": pictures.collect::<Vec<_>>(),
                "first_token": visual.tokens.start,
                "tokens": visual.tokens.len(),
            })
        })
        .collect();
    let stages: Vec<Json> = explanation
        .stages
        .iter()
        .map(|stage| stage_json(explanation, stage))
        .collect();
    json!({
        "schema_version": 1,
        "model": arguments.model.path,
        "recipe": subject.recipe.text,
        "prompt": arguments.prompt,
        "answer": {
            "text": explanation.answer.text,
            "tokens": explanation.answer.tokens,
            "cache_lengths": explanation.answer.cache_lengths,
        },
        "images": visuals,
        "stages": stages,
    })
}

fn stage_json(explanation: &Explanation, stage: &Stage) -> Json {
    let of_visual = |visual: &crate::explain::Visual| {
        let counts = explanation.counts(stage, Some(visual));
        let choices = visual.choices.clone().map(|number| {
            let choice = &explanation.choices[number];
            let left = explanation.left(stage, number);
            let clusters = left.as_ref().map(|left| {
                let each = left.contextual.iter();
                let each = each.map(|c| json!({ "anchor": c.anchor, "members": c.members }));
                each.collect::<Vec<_>>()
            });
            json!({
                "picture": choice.unit - visual.units.start,
                "of": choice.all,
                "dominant": left.map(|left| left.dominant),
                "contextual": clusters,
            })
        });
        json!({
            "tokens": counts.total(),
            "cls": counts.cls,
            "newlines": counts.newlines,
            "discarded": counts.discarded,
            "chosen": choices.collect::<Vec<_>>(),
        })
    };
    json!({
        "pass": stage.pass,
        "after_layer": stage.after_layer,
        "layers": stage.layers.map(|l| json!({ "first": l.first, "last": l.last })),
        "visual_tokens": explanation.counts(stage, None).total(),
        "kept": stage.tokens,
        "images": explanation.visuals.iter().map(of_visual).collect::<Vec<_>>(),
    })
}
