//! Models and recipes as the command line names them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, anyhow, bail};

use super::Global;
use crate::arch::{
    FileModel, Kind, NoMatch, Part, Role, Vlm, WholeModel, cache_heads, takes_clips,
};
use crate::ir::{TensorData, verify};
use crate::onnx::{ModelDir, read};
use crate::passes::{Recipe, earlier_recipe, gives_fewer};
use crate::runtime::CacheHeads;

/// Files of `passes/` with their names.
macro_rules! recipes {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../passes/", $name, ".yaml")))),*]
    };
}

/// Recipes that ship with the program: the files of `passes/`.
pub(super) const RECIPES: &[(&str, &str)] = recipes![
    "demo",
    "tiles-65",
    "tiles-43",
    "tiles-21",
    "clips-188",
    "clips-26",
    "llava-1.5-192",
    "llava-1.5-128",
    "llava-1.5-64",
    "llava-next-prune",
    "llava-next-640",
    "llava-next-320",
    "llava-next-160",
    "llava-onevision-prune",
    "llava-onevision-810",
    "llava-onevision-405",
    "llava-onevision-200",
    "qwen2.5-vl-prune",
    "qwen2.5-vl-640",
    "qwen2.5-vl-320",
    "qwen2.5-vl-160",
    "qwen2.5-vl-ratio",
    "video-llava-960",
    "video-llava-136",
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

/// A model as the command line uses it.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) dir: ModelDir,
    /// The files that were chosen, and those that are no part of a model.
    pub(super) vlm: Vlm,
    /// Files of variants that were not chosen, with the reason.
    pub(super) left_out: Vec<LeftOut>,
}

/// A file that is not used.
#[derive(Debug)]
pub(super) struct LeftOut {
    pub(super) file: PathBuf,
    pub(super) why: &'static str,
    /// Data files that it refers to, relative to the root.
    pub(super) data: BTreeSet<PathBuf>,
}

/// The directory and every graph in it, verified and recognised.
fn everything(path: &Path) -> anyhow::Result<(ModelDir, Vlm)> {
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
        models.push((file.relative.clone(), file.variant.clone(), model));
    }
    let mut vlm = Vlm::new(models);
    vlm.set_strangers_aside();
    name_besides(&mut vlm);
    set_others_aside(&mut vlm);
    check_image_token(&dir, &vlm)?;
    Ok((dir, vlm))
}

/// Where a part of the model was rewritten, a file of the same kind that was not
/// is another model's: it was carried over.
fn set_others_aside(vlm: &mut Vlm) {
    let rewritten: BTreeSet<Kind> = vlm
        .parts
        .iter()
        .filter(|p| earlier_recipe(&p.model).is_some() && !is_beside(p, vlm))
        .map(Part::kind)
        .collect();
    for part in &mut vlm.parts {
        let kind = part.kind();
        if earlier_recipe(&part.model).is_none() && rewritten.contains(&kind) {
            part.role = Role::Unknown(vec![NoMatch {
                looked_for: format!("a {} of this model", kind.name()),
                found: "it was not rewritten, and another one here was".into(),
            }]);
        }
    }
}

/// Files that an earlier `--beside` put next to their originals are variants of
/// these, named after the suffix.
fn name_besides(vlm: &mut Vlm) {
    let originals: Vec<(PathBuf, String)> = vlm
        .parts
        .iter()
        .filter(|p| earlier_recipe(&p.model).is_none())
        .map(|p| (p.file.clone(), p.variant.clone()))
        .collect();
    for part in &mut vlm.parts {
        if earlier_recipe(&part.model).is_none() {
            continue;
        }
        let suffix = |original: &Path| {
            let same_folder = original.parent() == part.file.parent();
            let rest = stem(&part.file).strip_prefix(&stem(original))?.to_owned();
            rest.strip_prefix('_')
                .filter(|_| same_folder)
                .map(str::to_owned)
        };
        let found = originals.iter().filter_map(|(o, v)| Some((suffix(o)?, v)));
        // The longest original: vision_encoder_fp16, not vision_encoder.
        if let Some((suffix, variant)) = found.min_by_key(|(suffix, _)| suffix.len()) {
            part.variant = if variant.is_empty() {
                suffix
            } else {
                format!("{variant}_{suffix}")
            };
        }
    }
}

/// Whether a file was written by `--beside` next to an original that is there.
fn is_beside(part: &Part, vlm: &Vlm) -> bool {
    earlier_recipe(&part.model).is_some()
        && vlm.parts.iter().any(|o| {
            let own = stem(&part.file);
            earlier_recipe(&o.model).is_none()
                && o.file.parent() == part.file.parent()
                && own.starts_with(&format!("{}_", stem(&o.file)))
        })
}

/// The recognised parts of a model: all variants, or the named ones, each with
/// what a client would pair it with.
///
/// Files that an earlier `--beside` put next to their originals are left out.
///
/// # Errors
/// No such variant; files between which nothing decides; a variant of a module
/// that is not recognised though others of the module are.
pub(super) fn select(
    path: &Path,
    variants: &[String],
    global: &Global,
) -> anyhow::Result<Selected> {
    let (dir, vlm) = look(path, global)?;
    if let Some((kind, files)) = vlm.ambiguous() {
        let names: Vec<String> = files
            .iter()
            .map(|i| vlm.parts[*i].file.display().to_string())
            .collect();
        bail!(
            "{}: each of {} is a {}, and nothing says which belongs to the model; name one file, or put the \
             model's own files into a directory of their own",
            path.display(),
            names.join(" and "),
            kind.name()
        );
    }
    let modules: BTreeSet<(Option<PathBuf>, String)> = vlm
        .parts
        .iter()
        .filter(|p| p.kind() != Kind::Unknown)
        .map(family)
        .collect();
    let chosen: Option<BTreeSet<usize>> = if variants.is_empty() {
        None
    } else {
        let mut files = BTreeSet::new();
        for name in variants {
            let variant = variant(&vlm, name, path)?;
            files.extend(vlm.set(&variant).files());
            // One that is not recognised is chosen all the same, and refused below.
            let own = vlm.parts.iter().enumerate();
            files.extend(
                own.filter(|(_, p)| p.variant == variant && modules.contains(&family(p)))
                    .map(|(i, _)| i),
            );
        }
        Some(files)
    };
    let left = |index: usize, part: &Part| {
        let ours = part.kind() != Kind::Unknown || modules.contains(&family(part));
        ours && chosen.as_ref().is_some_and(|c| !c.contains(&index))
    };
    if let Some((part, reasons)) = half_recognised(&vlm, &left) {
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        bail!(
            "{}: another precision of it is recognised, but this file is not, and rewritten and original \
             files do not go together; choose others with --variant\n  {}",
            part.label(),
            reasons.join("\n  ")
        );
    }
    let (mut kept, mut other) = (Vlm::default(), Vlm::default());
    for (index, part) in vlm.parts.into_iter().enumerate() {
        let to = if left(index, &part) {
            &mut other
        } else {
            &mut kept
        };
        to.parts.push(part);
    }
    let left_out = other.files()?.into_iter().map(|file| LeftOut {
        data: data_files(&file),
        file: file.file,
        why: "its variant was not chosen",
    });
    Ok(Selected {
        dir,
        vlm: kept,
        left_out: left_out.collect(),
    })
}

/// A file of a module of which other files are recognised. (Of the branches of one
/// file, the passes say which they need.)
fn half_recognised<'a>(
    vlm: &'a Vlm,
    left: &dyn Fn(usize, &Part) -> bool,
) -> Option<(&'a Part, &'a [NoMatch])> {
    vlm.parts.iter().enumerate().find_map(|(index, part)| {
        let Role::Unknown(reasons) = &part.role else {
            return None;
        };
        let mut others = vlm.parts.iter().filter(|p| p.file != part.file);
        let half = part.kind() == Kind::Unknown
            && !left(index, part)
            && others.any(|p| p.kind() != Kind::Unknown && family(p) == family(part));
        half.then_some((part, reasons.as_slice()))
    })
}

/// Everything that can be recognised, whether it goes together or not.
///
/// Files that an earlier `--beside` put next to their originals are left out.
pub(super) fn look(path: &Path, global: &Global) -> anyhow::Result<(ModelDir, Vlm)> {
    let (dir, mut all) = everything(path)?;
    drop_besides(&mut all, &mut |part| {
        global.detail(format!(
            "{}: rewritten before, left out",
            part.file.display()
        ));
    });
    Ok((dir, all))
}

fn drop_besides(vlm: &mut Vlm, each: &mut dyn FnMut(&Part)) {
    let besides: Vec<bool> = vlm.parts.iter().map(|p| is_beside(p, vlm)).collect();
    let mut beside = besides.into_iter();
    vlm.parts.retain(|part| {
        let leave = beside.next().unwrap_or(false);
        if leave {
            each(part);
        }
        !leave
    });
}

/// The model that `rewritten` was made from. Only what `rewritten` holds has to
/// be there; other precisions may be.
pub(super) fn base_of(path: &Path, rewritten: &Vlm) -> anyhow::Result<Vlm> {
    let (_, mut base) = everything(path)?;
    drop_besides(&mut base, &mut |_| ());
    let held: BTreeSet<&Path> = rewritten.parts.iter().map(|p| p.file.as_path()).collect();
    if base.parts.iter().any(|p| held.contains(p.file.as_path())) {
        base.parts.retain(|p| held.contains(p.file.as_path()));
    }
    Ok(base)
}

/// The same where files have other names: the precisions that `rewritten` has.
pub(super) fn base_of_variants(path: &Path, rewritten: &Vlm) -> anyhow::Result<Vlm> {
    let (_, mut base) = everything(path)?;
    drop_besides(&mut base, &mut |_| ());
    let held: BTreeSet<&str> = rewritten.parts.iter().map(|p| p.variant.as_str()).collect();
    base.parts.retain(|p| held.contains(p.variant.as_str()));
    Ok(base)
}

/// What the precisions of a module have in common.
fn family(part: &Part) -> (Option<PathBuf>, String) {
    (part.file.parent().map(Path::to_owned), part.module())
}

/// A variant by the name that people use.
fn variant(vlm: &Vlm, name: &str, path: &Path) -> anyhow::Result<String> {
    let named: BTreeSet<&str> = vlm.parts.iter().map(|p| p.variant.as_str()).collect();
    if named.contains(name) {
        return Ok(name.to_owned());
    }
    // As transformers.js calls them.
    let meant = match name {
        "fp32" | "default" | "plain" => "",
        "q8" => "quantized",
        other => other,
    };
    if vlm.variants().iter().any(|v| v == meant) || named.contains(meant) {
        return Ok(meant.to_owned());
    }
    let names: Vec<&str> = named.iter().map(|v| variant_name(v)).collect();
    bail!(
        "{}: no file of variant '{name}'; there are {}",
        path.display(),
        names.join(", ")
    )
}

/// A variant's name for people.
pub(super) fn variant_name(variant: &str) -> &str {
    if variant.is_empty() {
        "default"
    } else {
        variant
    }
}

/// External data files of a model file, relative to the model's root.
pub(super) fn data_files(file: &FileModel<'_>) -> BTreeSet<PathBuf> {
    let folder = file.file.parent().map(PathBuf::from).unwrap_or_default();
    let model = &file.model;
    let graphs = model.graphs().flat_map(|(_, g)| &g.initializers);
    let initializers = graphs.filter_map(|&v| model.value(v).initializer.as_ref());
    let nodes = model.graphs().flat_map(|(_, g)| &g.nodes);
    let attributes = nodes.flat_map(|&n| &model.node(n).attributes);
    let constants = attributes.filter_map(|a| match &a.value {
        crate::ir::AttrValue::Tensor(tensor) => Some(tensor),
        _ => None,
    });
    let tensors = initializers.chain(constants);
    let locations: BTreeSet<&str> = tensors
        .filter_map(|t| match &t.data {
            TensorData::External(reference) => Some(reference.location.as_str()),
            _ => None,
        })
        .collect();
    let paths = locations.into_iter().map(|l| folder.join(l));
    paths
        .map(|p| p.components().filter(|c| *c != Component::CurDir).collect())
        .collect()
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map_or(String::new(), |s| s.to_string_lossy().into_owned())
}

/// The text of a configuration; none if there is no such file. One that cannot be read is not one that is missing:
/// it would be carried over as if nothing in it had to change.
pub(super) fn text_of(path: &Path) -> anyhow::Result<Option<String>> {
    match path.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(found) if !found.is_file() => bail!("{}: expected a file", path.display()),
        _ => {}
    }
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("reading {} as text in UTF-8", path.display()))?;
    Ok(Some(text))
}

/// The image token of a whole model is told by its graph; a configuration that
/// says another was made for another model.
fn check_image_token(dir: &ModelDir, vlm: &Vlm) -> anyhow::Result<()> {
    let path = dir.root.join("config.json");
    let Some(text) = text_of(&path)? else {
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

/// What answers a question.
#[derive(Debug)]
pub(super) enum Runnable {
    /// One file that takes token ids and pixels and gives logits.
    Whole(PathBuf),
    /// Files that work together.
    Trio(Trio),
}

/// The three files that answer a question, chosen by what they are.
#[derive(Debug)]
pub(super) struct Trio {
    pub(super) vision: PathBuf,
    /// What sees clips, if the model has that.
    pub(super) video: Option<PathBuf>,
    pub(super) embed: PathBuf,
    pub(super) decoder: PathBuf,
    /// The graph that starts the cache, where `decoder` only goes on from one.
    pub(super) prompt: Option<PathBuf>,
    /// Whether the vision encoder was rewritten to merge its tokens.
    pub(super) merged: bool,
    /// Heads of the decoder's cache, which its interface need not declare.
    pub(super) heads: Option<CacheHeads>,
}

/// What a file is; where it was not recognised, what its interface is named for: it can
/// be run all the same.
fn runs_as(part: &Part) -> Kind {
    let kind = part.kind();
    if kind != Kind::Unknown {
        return kind;
    }
    let model = &part.model;
    let takes = |name: &str| model.input(name).is_some();
    match model.output("logits") {
        Some(_) if WholeModel::has_interface(model) => Kind::Whole,
        Some(_) if takes("inputs_embeds") => Kind::Decoder,
        None if takes("pixel_values") || takes("pixel_values_images") => Kind::Vision,
        None if takes_clips(model) => Kind::Video,
        None if takes("input_ids") && model.graph().outputs.len() == 1 => Kind::Embedding,
        _ => Kind::Unknown,
    }
}

/// The files of a variant, as positions in a model's parts: those that there are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub(super) vision: Option<usize>,
    pub(super) video: Option<usize>,
    pub(super) embed: Option<usize>,
    pub(super) decoder: Option<usize>,
    /// The graph that starts the cache, where `decoder` only goes on from one.
    pub(super) prompt: Option<usize>,
    pub(super) whole: Option<usize>,
}

impl Places {
    fn of(vlm: &Vlm, wanted: &str) -> Self {
        let set = vlm.set(wanted);
        let find = |kind: Kind| {
            let all = vlm.parts.iter().enumerate();
            let mut named = all.filter(|(_, p)| p.variant == wanted && runs_as(p) == kind);
            set.get(kind).or_else(|| named.next().map(|(i, _)| i))
        };
        Self {
            vision: find(Kind::Vision),
            video: find(Kind::Video),
            embed: find(Kind::Embedding),
            decoder: find(Kind::Decoder),
            prompt: set.decoder.and_then(|d| d.prompt),
            whole: match set.decoder {
                None => find(Kind::Whole),
                Some(_) => set.whole,
            },
        }
    }
}

/// A model and the files of one of its variants.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) dir: ModelDir,
    pub(super) vlm: Vlm,
    pub(super) places: Places,
}

impl Parts {
    /// Where a part is.
    pub(super) fn file(&self, part: usize) -> PathBuf {
        self.dir.root.join(&self.vlm.parts[part].file)
    }

    /// The same of a decoder's other file. The branches of one choose by themselves.
    pub(super) fn prompt_file(&self) -> Option<PathBuf> {
        let prompt = self.file(self.places.prompt?);
        (prompt != self.file(self.places.decoder?)).then_some(prompt)
    }
}

/// Finds the files of a variant (or of the suffix of an earlier `--beside`).
pub(super) fn parts(path: &Path, name: Option<&str>) -> anyhow::Result<Parts> {
    let (dir, vlm, wanted) = everything_and_variant(path, name)?;
    let places = Places::of(&vlm, &wanted);
    Ok(Parts { dir, vlm, places })
}

/// Finds the files that answer questions; all have to be there.
pub(super) fn runnable(path: &Path, name: Option<&str>) -> anyhow::Result<(ModelDir, Runnable)> {
    let (dir, vlm, wanted) = everything_and_variant(path, name)?;
    let runnable = files_of(path, &dir, &vlm, &wanted)?;
    Ok((dir, runnable))
}

/// Everything at a path, and the variant that is meant by `name`, or by none.
pub(super) fn everything_and_variant(
    path: &Path,
    name: Option<&str>,
) -> anyhow::Result<(ModelDir, Vlm, String)> {
    let (dir, vlm) = everything(path)?;
    let wanted = match name {
        Some(name) => variant(&vlm, name, path)?,
        None => {
            let plain = |p: &&Part| p.kind() != Kind::Unknown && !is_beside(p, &vlm);
            let parts = vlm.parts.iter().filter(plain);
            let all: BTreeSet<&str> = parts.map(|p| p.variant.as_str()).collect();
            match all.iter().copied().collect::<Vec<_>>()[..] {
                [] => String::new(),
                [only] => only.to_owned(),
                ["", ..] => String::new(),
                _ => bail!(
                    "{}: which variant? Choose with --variant among {}",
                    path.display(),
                    all.into_iter().collect::<Vec<_>>().join(", ")
                ),
            }
        }
    };
    Ok((dir, vlm, wanted))
}

/// The files of a variant that answer a question.
pub(super) fn files_of(
    path: &Path,
    dir: &ModelDir,
    vlm: &Vlm,
    wanted: &str,
) -> anyhow::Result<Runnable> {
    let places = Places::of(vlm, wanted);
    let file = |part: usize| dir.root.join(&vlm.parts[part].file);
    if let Some(whole) = places.whole {
        return Ok(Runnable::Whole(file(whole)));
    }
    let pick = |part: Option<usize>, what: &str| -> anyhow::Result<usize> {
        part.ok_or_else(|| {
            let each = vlm.parts.iter().map(|p| {
                let found = match p.kind() {
                    Kind::Unknown => "not recognised".to_owned(),
                    kind => format!("the {}", kind.name()),
                };
                format!("{} ({found})", p.label())
            });
            anyhow!(
                "{}: no {what} among {}; duet inspect says why",
                path.display(),
                each.collect::<Vec<_>>().join(", ")
            )
        })
    };
    let decoder = pick(places.decoder, "decoder (embeddings → logits, cache)")?;
    // A model that sees clips only has no other encoder.
    let vision = places.vision.or(places.video);
    let vision = pick(vision, "vision encoder (pixels → features)")?;
    let embed = pick(places.embed, "token embedding (ids → embeddings)")?;
    let merged = gives_fewer(&vlm.parts[vision].model);
    let trio = Trio {
        merged,
        heads: cache_heads(&vlm.parts[decoder].model).and_then(heads_of),
        vision: file(vision),
        video: places.video.map(file),
        embed: file(embed),
        prompt: places.prompt.map(file).filter(|p| *p != file(decoder)),
        decoder: file(decoder),
    };
    Ok(Runnable::Trio(trio))
}

/// What the runtime is told of a cache's heads.
pub(super) fn heads_of((count, width): (i64, i64)) -> Option<CacheHeads> {
    Some(CacheHeads {
        count: usize::try_from(count).ok()?,
        width: usize::try_from(width).ok()?,
    })
}
