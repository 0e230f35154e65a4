//! Which files are measured, on what, and whether they are of one model.

use std::path::Path;

use anyhow::{Context, bail};

use super::Arguments;
use crate::arch::{Decoder, Embedding, Kind, Role, VisionTower, cache_heads};
use crate::bench::report::About;
use crate::bench::{Files, Inputs, Job, Schedule, Turn, schedule};
use crate::cli::Engine;
use crate::cli::counts::frames;
use crate::cli::eval::ask::Named;
use crate::cli::load::{self, Parts};
use crate::ir::{Dim, Model, ValueType};
use crate::passes::{Placement, Recipe, earlier_recipe};
use crate::runtime::ImageProcessor;

/// Features of an image where nothing says how many it has: 24 × 24 patches, as in LLaVA-1.5.
const USUAL_FEATURES: usize = 576;

/// Frames of a clip where nothing says how many it has.
const USUAL_FRAMES: usize = crate::arch::DEFAULT_FRAMES as usize;

/// The models, the base first.
pub(super) struct Models {
    parts: Vec<Parts>,
    recipes: Vec<Option<Recipe>>,
    pub(super) jobs: Vec<Job>,
}

impl Models {
    /// Finds the files and makes sure that they are of one model.
    pub(super) fn read(
        named: &[Named],
        arguments: &Arguments,
        engine: &Engine,
    ) -> anyhow::Result<Self> {
        let mut parts = Vec::new();
        for model in named {
            parts.push(load::parts(&model.path, model.variant.as_deref())?);
        }
        let recipes = parts
            .iter()
            .map(recipe)
            .collect::<anyhow::Result<Vec<_>>>()?;
        if recipes[0].is_some() {
            bail!(
                "{} was rewritten itself; give the original first",
                named[0].path.display()
            );
        }
        for (model, own) in named.iter().zip(&parts) {
            if used(own).next().is_none() {
                bail!(
                    "{}: no file of it can be run: there is no vision encoder, token embedding, decoder or whole \
                     model; duet inspect says why",
                    model.path.display()
                );
            }
        }
        for (model, own) in named.iter().zip(&parts).skip(1) {
            one_model(&parts[0], own, &model.path)?;
        }
        let mut models = Self {
            parts,
            recipes,
            jobs: Vec::new(),
        };
        models.jobs = models.plan(arguments, engine)?;
        Ok(models)
    }

    fn base(&self) -> &Parts {
        &self.parts[0]
    }

    fn plan(&self, arguments: &Arguments, engine: &Engine) -> anyhow::Result<Vec<Job>> {
        let base = self.base();
        let spans = self.recipes.iter().flatten().filter_map(|r| r.context.span);
        let mut spans = spans.map(|s| usize::try_from(s.start).unwrap_or(0));
        let total = arguments.prompt_tokens;
        // A span that was fixed when the model was rewritten is where the image has to be.
        let text = match spans.next() {
            Some(start) => [start, total.saturating_sub(start).max(1)],
            None => [total / 4, total - total / 4],
        };
        let tower = tower(base);
        let decoder = decoder(base);
        let processor = ImageProcessor::from_dir(&base.dir.root).ok();
        let size = arguments.image_size.map(|(width, height)| [height, width]);
        let size = size.or_else(|| processor?.output_size().map(|(h, w)| [h, w]));
        let per = tower.map_or(4, |t| t.rows.as_ref().map_or(4, |r| r.per));
        let placeholder = match base.places.whole.map(|w| &base.vlm.parts[w].role) {
            Some(Role::Whole(whole)) => Some(whole.ids.image),
            _ => embedding(base).and_then(|e| e.scatter.as_ref()?.placeholder),
        };
        let width = decoder.and_then(|d| d.width);
        let width = width.or_else(|| tower.and_then(|t| t.feature_width));
        let vocabulary = decoder.and_then(|d| d.vocabulary).unwrap_or(256);
        let mut jobs = Vec::new();
        for (own, recipe) in self.parts.iter().zip(&self.recipes) {
            let clips = own.places.vision.is_none() && own.places.video.is_some();
            let heads = own
                .places
                .decoder
                .and_then(|d| cache_heads(&own.vlm.parts[d].model));
            let heads = heads.and_then(load::heads_of).map(|h| (h.count, h.width));
            let inputs = Inputs {
                images: arguments.images,
                image_size: size,
                frames: USUAL_FRAMES,
                text,
                features: self.features(recipe.as_ref(), arguments.visual_tokens),
                merge: (per.max(1) as f64).sqrt() as usize,
                vocabulary,
                placeholder,
                width: width.and_then(|w| usize::try_from(w).ok()),
                steps: arguments.new_tokens,
                seed: arguments.seed,
            };
            let apart = own.places.whole.is_none();
            let file = |part: Option<usize>| part.filter(|_| apart).map(|p| own.file(p));
            jobs.push(Job {
                files: Files {
                    vision: file(own.places.vision.or(own.places.video)),
                    clips,
                    embed: file(own.places.embed),
                    decoder: file(own.places.decoder),
                    prompt: own.prompt_file().filter(|_| apart),
                    whole: own.places.whole.map(|w| own.file(w)),
                },
                heads,
                threads: engine.threads,
                providers: engine.providers.clone(),
                inputs,
            });
        }
        Ok(jobs)
    }

    /// Features of an image that the model's encoder gives, or would give.
    fn features(&self, recipe: Option<&Recipe>, stated: Option<usize>) -> usize {
        let base = self.base();
        let tower = tower(base);
        // Where no tower says, what a rewritten model was made for.
        let mut spans = self.recipes.iter().flatten().filter_map(|r| r.context.span);
        let span = spans.next().map(|s| s.count);
        let usual = stated.unwrap_or(USUAL_FEATURES);
        let all = tower.and_then(VisionTower::features_per_image);
        let left = recipe.filter(|r| !r.placed(&base.vlm)).and_then(|recipe| {
            match tower.filter(|t| t.candidates().is_some()) {
                Some(tower) => recipe.tokens_left(tower, Placement::Encoder),
                None => recipe.tokens_left_of(i64::try_from(usual).unwrap_or(i64::MAX), false),
            }
        });
        let span = span.filter(|_| stated.is_none());
        let count = left.or(all).or(span).and_then(|n| usize::try_from(n).ok());
        count.unwrap_or(usual)
    }

    /// Tokens by layer of each model, or why they are not known.
    pub(super) fn schedules(&self, turns: &[Turn]) -> Vec<Result<Schedule, String>> {
        let base = self.base();
        let Some(decoder) = decoder(base) else {
            let why = match base.places.decoder.or(base.places.whole) {
                Some(part) => match &base.vlm.parts[part].role {
                    Role::Unknown(reasons) => format!(
                        "the base's decoder is not recognised ({})",
                        reasons.first().map_or(String::new(), ToString::to_string)
                    ),
                    _ => "the base's decoder is not recognised".into(),
                },
                None => "the base has no decoder".into(),
            };
            return turns.iter().map(|_| Err(why.clone())).collect();
        };
        let tower = tower(base);
        let images = self.jobs[0].inputs.images;
        let seen = tower.map_or(1, |t| usize::try_from(frames(t)).unwrap_or(1));
        let each = self.recipes.iter().zip(turns);
        each.map(|(recipe, turn)| {
            let known = schedule::BaseModel {
                decoder,
                tower,
                placed: recipe.as_ref().is_some_and(|r| r.placed(&base.vlm)),
            };
            match turn.prefill {
                Some(_) => Ok(Schedule::of(recipe.as_ref(), known, turn, images * seen)),
                None => Err("the model has no decoder".into()),
            }
        })
        .collect()
    }

    /// What is known of the models besides their times.
    pub(super) fn about(
        &self,
        named: &[Named],
        schedules: Vec<Result<Schedule, String>>,
    ) -> Vec<About> {
        let each = named
            .iter()
            .zip(&self.parts)
            .zip(&self.recipes)
            .zip(schedules);
        each.map(|(((named, parts), recipe), schedule)| About {
            name: named.name.clone(),
            path: named.path.display().to_string(),
            recipe: recipe.as_ref().map(|r| r.text.clone()),
            schedule,
            vision: parts.places.vision.or(parts.places.video).is_some(),
            embed: parts.places.embed.is_some(),
            whole: parts.places.whole.is_some(),
            decoder: parts.places.decoder.is_some(),
        })
        .collect()
    }
}

/// The parts of a model that are run.
fn used(parts: &Parts) -> impl Iterator<Item = usize> {
    let whole = parts.places.whole.is_some();
    let apart = [
        parts.places.vision.or(parts.places.video),
        parts.places.embed,
        parts.places.prompt,
        parts.places.decoder,
    ];
    let apart = apart.into_iter().flatten().filter(move |_| !whole);
    parts.places.whole.into_iter().chain(apart)
}

/// The recipe that a model's files are stamped with.
fn recipe(parts: &Parts) -> anyhow::Result<Option<Recipe>> {
    let each = used(parts).map(|p| &parts.vlm.parts[p]);
    let mut stamps = each.filter_map(|p| Some((p, earlier_recipe(&p.model)?.1)));
    let Some((part, text)) = stamps.next() else {
        return Ok(None);
    };
    if let Some((other, _)) = stamps.find(|(_, other)| *other != text) {
        bail!(
            "{} and {} are stamped with different recipes; they are not one model",
            part.label(),
            other.label()
        );
    }
    let recipe = Recipe::parse(text);
    let recipe = recipe.with_context(|| format!("the recipe stamped in {}", part.label()))?;
    Ok(Some(recipe))
}

fn tower(parts: &Parts) -> Option<&VisionTower> {
    let part = parts
        .places
        .whole
        .or(parts.places.vision)
        .or(parts.places.video)?;
    match &parts.vlm.parts[part].role {
        Role::Vision(tower) => Some(tower),
        Role::Whole(whole) => Some(&whole.tower),
        _ => None,
    }
}

fn decoder(parts: &Parts) -> Option<&Decoder> {
    let part = parts.places.whole.or(parts.places.decoder)?;
    match &parts.vlm.parts[part].role {
        Role::Decoder(decoder) => Some(decoder),
        Role::Whole(whole) => Some(&whole.decoder),
        _ => None,
    }
}

fn embedding(parts: &Parts) -> Option<&Embedding> {
    match &parts.vlm.parts[parts.places.embed?].role {
        Role::Embedding(embedding) => Some(embedding),
        _ => None,
    }
}

/// What the interfaces of two forms of one model have in common.
#[derive(Debug, PartialEq, Eq)]
struct Interface {
    kind: &'static str,
    /// Names of cache inputs.
    caches: Vec<String>,
    /// (heads, width) of the first.
    heads: Vec<Option<i64>>,
    /// Last dimension of the logits.
    vocabulary: Option<i64>,
    /// Width of embeddings or features.
    width: Option<i64>,
    /// Last two dimensions of pixels.
    pixels: Vec<Option<i64>>,
}

fn dims(model: &Model, value: crate::ir::ValueId) -> Vec<Option<i64>> {
    let shape = model.value(value).ty.as_ref().and_then(ValueType::shape);
    shape.unwrap_or_default().iter().map(Dim::known).collect()
}

impl Interface {
    fn of(model: &Model, kind: Kind) -> Self {
        let graph = model.graph();
        let float = |value: &crate::ir::ValueId| {
            let ty = model.value(*value).ty.as_ref().and_then(ValueType::dtype);
            ty.is_some_and(|t| t.is_float()) && model.value(*value).initializer.is_none()
        };
        let past = |value: &crate::ir::ValueId| {
            crate::ir::cache_name(model.name(*value), "past").is_some()
        };
        let inputs = || graph.inputs.iter().copied();
        let caches: Vec<_> = inputs().filter(past).collect();
        let first = caches.first().map(|v| dims(model, *v)).unwrap_or_default();
        let rank = |value: &crate::ir::ValueId, rank: usize| dims(model, *value).len() == rank;
        let last = |value: crate::ir::ValueId| dims(model, value).last().copied().flatten();
        let embeds = inputs().find(|v| float(v) && !past(v) && rank(v, 3));
        let pixels = inputs().find(|v| float(v) && !past(v) && (rank(v, 4) || rank(v, 5)));
        let output = graph.outputs.iter().copied().find(float);
        Self {
            kind: kind.name(),
            heads: [1, 3]
                .map(|axis| first.get(axis).copied().flatten())
                .to_vec(),
            caches: caches.iter().map(|v| model.name(*v).to_owned()).collect(),
            vocabulary: model.output("logits").and_then(last),
            width: embeds
                .filter(|_| kind == Kind::Decoder)
                .or(output)
                .and_then(last),
            pixels: pixels.map_or(Vec::new(), |v| {
                let dims = dims(model, v);
                dims[dims.len() - 2..].to_vec()
            }),
        }
    }

    /// Whether another may be a rewritten form of this: equal but for a marker channel; what one of them does not
    /// state may be anything.
    fn fits(&self, other: &Self) -> bool {
        let same = |a: &Option<i64>, b: &Option<i64>| a.is_none() || b.is_none() || a == b;
        let all = |a: &[Option<i64>], b: &[Option<i64>]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        };
        let wider = |a: Option<i64>, b: Option<i64>| match (a, b) {
            (Some(a), Some(b)) => b == a || b == a + 1,
            _ => true,
        };
        self.kind == other.kind
            && self.caches == other.caches
            && all(&self.heads, &other.heads)
            && same(&self.vocabulary, &other.vocabulary)
            && wider(self.width, other.width)
            && all(&self.pixels, &other.pixels)
    }

    fn words(&self) -> String {
        let number = |n: &Option<i64>| n.map_or("?".to_owned(), |n| n.to_string());
        let mut words = vec![format!("a {} of width {}", self.kind, number(&self.width))];
        if !self.caches.is_empty() {
            let [count, width] = [0, 1].map(|i| self.heads.get(i).map_or("?".into(), number));
            let layers = self.caches.len() / 2;
            words.push(format!(
                "{layers} layers of {count} key/value heads of width {width}"
            ));
        }
        if self.vocabulary.is_some() {
            words.push(format!("a vocabulary of {}", number(&self.vocabulary)));
        }
        if let [height, width] = self.pixels.as_slice() {
            words.push(format!("pixels {} × {}", number(height), number(width)));
        }
        words.join(", ")
    }
}

/// Makes sure that a model may have been made from the base.
fn one_model(base: &Parts, other: &Parts, path: &Path) -> anyhow::Result<()> {
    // Decoders first: they say most about a model.
    let kinds = [
        (base.places.decoder, other.places.decoder, Kind::Decoder),
        (
            base.places.vision.or(base.places.video),
            other.places.vision.or(other.places.video),
            Kind::Vision,
        ),
        (base.places.embed, other.places.embed, Kind::Embedding),
        (base.places.whole, other.places.whole, Kind::Whole),
    ];
    let mut common = false;
    for (own, found, kind) in kinds {
        let (Some(own), Some(found)) = (own, found) else {
            continue;
        };
        common = true;
        let (own, found) = (&base.vlm.parts[own], &other.vlm.parts[found]);
        let is = Interface::of(&found.model, kind);
        let was = Interface::of(&own.model, kind);
        if !was.fits(&is) {
            bail!(
                "{} is not made from the base: {} is {}, and the base's {} is {}",
                path.display(),
                found.label(),
                is.words(),
                own.label(),
                was.words()
            );
        }
    }
    if !common {
        let words = |parts: &Parts| {
            let kinds: Vec<&str> = used(parts)
                .map(|p| parts.vlm.parts[p].kind().name())
                .collect();
            kinds.join(", ")
        };
        bail!(
            "{} and the base have no part in common: {} and {}",
            path.display(),
            words(other),
            words(base)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            kind: "decoder",
            caches: vec!["past_key_values.0.key".into()],
            heads: vec![Some(2), Some(8)],
            vocabulary: Some(100),
            width: Some(64),
            pixels: vec![Some(336), None],
        }
    }

    #[test]
    fn a_rewritten_form_differs_in_a_marker_channel_only() {
        let base = interface();
        let fits = |change: fn(&mut Interface)| {
            let mut other = interface();
            change(&mut other);
            base.fits(&other)
        };
        assert!(fits(|_| ()));
        assert!(fits(|i| i.width = Some(65)), "a marker channel");
        assert!(fits(|i| i.pixels[1] = Some(336)), "not stated by the base");
        assert!(fits(|i| (i.vocabulary, i.heads[0]) = (None, None)));
        assert!(!fits(|i| i.kind = "vision encoder"));
        assert!(!fits(|i| i.caches.push("past_key_values.1.key".into())));
        assert!(!fits(|i| i.heads[0] = Some(4)));
        assert!(!fits(|i| i.vocabulary = Some(101)));
        assert!(!fits(|i| i.width = Some(63)));
        assert!(!fits(|i| i.width = Some(66)));
        assert!(!fits(|i| i.pixels[0] = Some(224)));
        assert!(!fits(|i| i.pixels.clear()));
    }
}
