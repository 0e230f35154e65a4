//! Models and recipes as the command line names them.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::Global;
use crate::arch::{Role, Vlm, WholeModel, cache_heads};
use crate::ir::{Model, ValueId, verify};
use crate::onnx::{ModelDir, ModelFile, read};
use crate::passes::{Recipe, earlier_recipe};
use crate::runtime::CacheHeads;

/// Recipes that ship with the program: the files of `passes/`.
pub(super) const RECIPES: &[(&str, &str)] = &[
    ("demo", include_str!("../../passes/demo.yaml")),
    (
        "llava-1.5-192",
        include_str!("../../passes/llava-1.5-192.yaml"),
    ),
    (
        "llava-1.5-128",
        include_str!("../../passes/llava-1.5-128.yaml"),
    ),
    (
        "llava-1.5-64",
        include_str!("../../passes/llava-1.5-64.yaml"),
    ),
];

/// A recipe by name or file.
pub(super) fn recipe(name: &str) -> anyhow::Result<Recipe> {
    let path = Path::new(name);
    if path.is_file() {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
        return Recipe::parse(&text).with_context(|| format!("in {name}"));
    }
    if let Some((_, text)) = RECIPES.iter().find(|(n, _)| *n == name) {
        return Ok(Recipe::parse(text)?);
    }
    let names: Vec<&str> = RECIPES.iter().map(|(n, _)| *n).collect();
    bail!(
        "'{name}' is neither a recipe file nor a built-in recipe ({})",
        names.join(", ")
    )
}

/// A file with its graph.
pub(super) type Loaded = (ModelFile, Model);

/// The directory and every graph in it, verified.
pub(super) fn graphs(path: &Path) -> anyhow::Result<(ModelDir, Vec<Loaded>)> {
    if !path.exists() {
        bail!(
            "{} does not exist; expected a model directory or an .onnx file",
            path.display()
        );
    }
    let dir = ModelDir::open(path)?;
    let mut models = Vec::new();
    for file in &dir.files {
        let at = dir.path(file);
        let model = read(&at)?;
        verify(&model).with_context(|| format!("{} is not a well-formed model", at.display()))?;
        models.push((file.clone(), model));
    }
    Ok((dir, models))
}

/// The recognised parts of a model.
///
/// Files that an earlier `--beside` put next to their originals are left out
/// where the original is there too.
pub(super) fn vlm(path: &Path, global: &Global) -> anyhow::Result<(ModelDir, Vlm)> {
    let (dir, models) = graphs(path)?;
    let originals: Vec<String> = models
        .iter()
        .filter(|(_, m)| earlier_recipe(m).is_none())
        .map(|(f, _)| stem(&f.relative))
        .collect();
    let mut parts = Vec::new();
    for (file, model) in models {
        let own = stem(&file.relative);
        let beside = earlier_recipe(&model).is_some()
            && originals
                .iter()
                .any(|o| own.len() > o.len() && own.starts_with(&format!("{o}_")));
        if beside {
            global.detail(format!(
                "{}: rewritten before, left out",
                file.relative.display()
            ));
            continue;
        }
        parts.push((file.relative, file.variant, model));
    }
    let vlm = Vlm::new(parts);
    check_image_token(&dir, &vlm)?;
    Ok((dir, vlm))
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map_or(String::new(), |s| s.to_string_lossy().into_owned())
}

/// The file that holds the whole model, if the model is one file: it takes token
/// ids and pixels and gives logits.
pub(super) fn whole(
    path: &Path,
    variant: Option<&str>,
) -> anyhow::Result<Option<(ModelDir, PathBuf)>> {
    let (dir, models) = graphs(path)?;
    let fits = |(file, model): &&Loaded| {
        let own = stem(&file.relative);
        WholeModel::has_interface(model)
            && model.output("logits").is_some()
            && match variant {
                Some(v) => own.ends_with(&format!("_{v}")),
                None => file.variant.is_empty(),
            }
    };
    // Of a file and its rewritten copy beside it, the file.
    let found = models
        .iter()
        .filter(fits)
        .min_by_key(|(f, _)| stem(&f.relative).len());
    let Some(file) = found.map(|(file, _)| dir.path(file)) else {
        return Ok(None);
    };
    Ok(Some((dir, file)))
}

/// The image token of a whole model is told by its graph; a configuration that
/// says another was made for another model.
fn check_image_token(dir: &ModelDir, vlm: &Vlm) -> anyhow::Result<()> {
    let path = dir.root.join("config.json");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let config: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    for part in &vlm.parts {
        let Role::Whole(whole) = &part.role else {
            continue;
        };
        for key in ["image_token_id", "image_token_index"] {
            let stated = config.get(key).and_then(serde_json::Value::as_i64);
            if let Some(stated) = stated.filter(|s| *s != whole.ids.image) {
                bail!(
                    "{} puts image features where the token id is {}, but {} says {key} {stated}; they belong \
                     to different models",
                    part.file.display(),
                    whole.ids.image,
                    path.display()
                );
            }
        }
    }
    Ok(())
}

/// The three files that answer a question, chosen by what they take and give.
#[derive(Debug)]
pub(super) struct Trio {
    pub(super) vision: PathBuf,
    pub(super) embed: PathBuf,
    pub(super) decoder: PathBuf,
    /// The graph that starts the cache, where `decoder` only goes on from one.
    pub(super) prompt: Option<PathBuf>,
    /// Heads of the decoder's cache, which its interface need not declare.
    pub(super) heads: Option<CacheHeads>,
}

/// Whether a graph turns embeddings into logits.
fn decodes(model: &Model) -> bool {
    model.input("inputs_embeds").is_some() && model.output("logits").is_some()
}

/// Whether a decoder goes on from a cache.
fn takes_past(model: &Model) -> bool {
    let past = |v: &ValueId| model.name(*v).starts_with("past_key_values.");
    model.graph().inputs.iter().any(past)
}

/// Whether a decoder gives a cache for another graph to go on from.
fn starts_cache(model: &Model) -> bool {
    let present = |v: &ValueId| model.name(*v).starts_with("present.");
    !takes_past(model) && model.graph().outputs.iter().any(present)
}

/// Finds the vision encoder, embedding and decoder of a variant.
pub(super) fn trio(path: &Path, variant: Option<&str>) -> anyhow::Result<(ModelDir, Trio)> {
    let (dir, models) = graphs(path)?;
    let pick = |what: &str, fits: fn(&Model) -> bool| -> anyhow::Result<PathBuf> {
        let all: Vec<&Loaded> = models.iter().filter(|(_, m)| fits(m)).collect();
        let found = match variant {
            Some(v) => all
                .iter()
                .find(|(f, _)| stem(&f.relative).ends_with(&format!("_{v}"))),
            None => all.iter().find(|(f, m)| {
                let shadowed = all.iter().any(|(o, _)| {
                    let (o, own) = (stem(&o.relative), stem(&f.relative));
                    own.len() > o.len()
                        && own.starts_with(&format!("{o}_"))
                        && earlier_recipe(m).is_some()
                });
                f.variant.is_empty() && !shadowed
            }),
        };
        match found.or(if variant.is_none() { all.first() } else { None }) {
            Some((file, _)) => Ok(dir.path(file)),
            None => bail!(
                "{}: no {what}{} among {}",
                path.display(),
                variant.map_or(String::new(), |v| format!(" of variant '{v}'")),
                models
                    .iter()
                    .map(|(f, _)| f.relative.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    };
    let what = "decoder (inputs_embeds → logits, present.*)";
    // One graph for everything comes before two that share the work; of these,
    // names tell which goes on (the exporters' convention).
    let decoder = pick(what, |m| decodes(m) && takes_past(m)).or_else(|_| pick(what, decodes))?;
    let prompt = if stem(&decoder).contains("with_past") {
        let first =
            "decoder for the prompt (inputs_embeds → logits, present.*, no past_key_values.*)";
        Some(pick(first, |m| decodes(m) && starts_cache(m))?)
    } else {
        None
    };
    let chosen = models.iter().find(|(f, _)| dir.path(f) == decoder);
    let heads = chosen.and_then(|(_, m)| cache_heads(m));
    let trio = Trio {
        vision: pick("vision encoder (pixel_values → image_features)", |m| {
            m.input("pixel_values").is_some() && m.output("logits").is_none()
        })?,
        embed: pick("token embedding (input_ids → inputs_embeds)", |m| {
            m.input("input_ids").is_some()
                && m.graph().outputs.len() == 1
                && m.output("logits").is_none()
        })?,
        decoder,
        prompt,
        heads: heads.and_then(heads_of),
    };
    Ok((dir, trio))
}

/// What the runtime is told of a cache's heads.
pub(super) fn heads_of((count, width): (i64, i64)) -> Option<CacheHeads> {
    Some(CacheHeads {
        count: usize::try_from(count).ok()?,
        width: usize::try_from(width).ok()?,
    })
}
