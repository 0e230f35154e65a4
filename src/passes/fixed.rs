//! Fixed shapes: a rewritten model in which every size is a number, for runtimes that take no others.
//!
//! ```text
//!  vision   pixels [images · batch, 3, H, W] ─▶ features
//!  embed    ids [batch, L]                   ─▶ embeddings           L = prompt + visual tokens
//!  prompt   [batch, L], no past              ─▶ logits, caches of S(ℓ) columns
//!  step     [batch, 1], past of P(ℓ) columns ─▶ logits, caches of P(ℓ) + 1     P(ℓ) = S(ℓ) + answer − 1
//! ```
//!
//! A decoder that takes a past of any length is both of the last two, so it becomes two files. How many tokens leave at
//! a drop point follows from the number of visual tokens, which is stated here rather than counted when the graph runs;
//! [`fix`] works out the rest. In the step graph nothing is visual, so its drop points are gone: what they did to the
//! caches' lengths is a difference of two constants.
//!
//! Prompts that are shorter are padded: on the left where attention takes a mask of columns, on the right where it
//! goes by the length of each row (`GroupQueryAttention`), and so are the caches.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::manager::{Rewritten, change, rewrite_with};
use super::{
    Change, Context, KvLayout, Marker, PassError, Placement, RatioBase, Recipe, SALIENT_MASK_INPUT,
    VISUAL_MASK_INPUT,
};
use crate::arch::{Decoder, DecoderLayer, Part, RECIPE_KEY, ROLE_KEY, Role, VERSION_KEY, Vlm};
use crate::ir::{Dim, Model, Patch, ValueId, fix};
use crate::suggest::unknown;

pub use crate::ir::{PADDING_KEY, VISUAL_KEY};

/// Name of the step in what is inserted.
const NAME: &str = "static";

/// Metadata entry: the shapes that a file was fixed to.
pub const SHAPES_KEY: &str = "duet.static";

/// What `--static` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedShapes {
    /// Tokens of a prompt besides the visual ones, padding among them.
    pub prompt: i64,
    /// Images of a prompt: of what the vision encoder takes in a row, so crops count each.
    pub images: i64,
    /// Visual tokens that enter the decoder with a prompt; left out: what the encoder gives for the images.
    pub visual: Option<i64>,
    /// Most tokens of an answer.
    pub answer: i64,
    /// Rows.
    pub batch: i64,
}

const KEYS: &[&str] = &["prompt", "images", "visual", "answer", "batch"];

impl FromStr for FixedShapes {
    type Err = String;

    /// `prompt=64,images=1,answer=128`; all but `prompt` may be left out.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut found: HashMap<&str, i64> = HashMap::new();
        for pair in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, number) = pair
                .split_once('=')
                .ok_or_else(|| format!("'{pair}': expected KEY=N, as in prompt=64"))?;
            let (key, number) = (key.trim(), number.trim());
            if !KEYS.contains(&key) {
                return Err(unknown("key", key, KEYS, "--static"));
            }
            let size = number.parse::<i64>().ok();
            let Some(size) = size.filter(|n| (1..=1 << 20).contains(n)) else {
                return Err(format!(
                    "{key}={number}: expected a number from 1 to {}",
                    1 << 20
                ));
            };
            if found.insert(key, size).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let or = |key: &str, default: i64| found.get(key).copied().unwrap_or(default);
        Ok(Self {
            prompt: *found
                .get("prompt")
                .ok_or("prompt=N is missing: the text tokens of a prompt")?,
            images: or("images", 1),
            visual: found.get("visual").copied(),
            answer: or("answer", 128),
            batch: or("batch", 1),
        })
    }
}

impl fmt::Display for FixedShapes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt={},images={}", self.prompt, self.images)?;
        if let Some(visual) = self.visual {
            write!(f, ",visual={visual}")?;
        }
        write!(f, ",answer={},batch={}", self.answer, self.batch)
    }
}

/// What a decoder graph of fixed shapes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedRun {
    /// Rows.
    pub(super) batch: i64,
    /// Tokens of a row that are no features.
    pub(super) text: i64,
    /// Visual tokens of a row.
    pub(super) visual: i64,
    /// Features of a row that a merge discarded and left in their places.
    pub(super) gone: i64,
}

impl FixedRun {
    fn length(&self) -> i64 {
        self.text + self.visual + self.gone
    }
}

/// Rewrites a model for inputs of fixed shapes: as [`rewrite`](super::rewrite), then every file that is recognised.
/// Decoders that take a past come out as two files, `decoder_model` and `decoder_with_past_model`.
///
/// # Errors
/// As [`rewrite`](super::rewrite); what has no fixed shapes, by name.
pub fn rewrite_fixed(
    vlm: Vlm,
    recipe: &Recipe,
    shapes: &FixedShapes,
) -> Result<Rewritten, PassError> {
    refuse(&vlm, recipe)?;
    let (visual, gone) = counts(&vlm, recipe, shapes)?;
    let prompt = FixedRun {
        batch: shapes.batch,
        text: shapes.prompt,
        visual,
        gone,
    };
    let step = FixedRun {
        batch: shapes.batch,
        text: 1,
        visual: 0,
        gone: 0,
    };
    let context = |run: FixedRun| Context {
        fixed: Some(run),
        ..recipe.context.clone()
    };
    let base = vlm.clone();
    let mut done = rewrite_with(vlm, recipe, &context(prompt))?;
    done.summaries
        .push((NAME, format!("every shape fixed: {shapes}")));
    let goes_on = base.decoders().any(|(_, d)| d.layers[0].past.is_some());
    let mut steps = match goes_on {
        true => Some(rewrite_with(base, recipe, &context(step))?),
        false => None,
    };
    let parts: Vec<usize> = (0..done.vlm.parts.len()).collect();
    // Lengths of the caches that a prompt gives, by variant: a step goes on from them.
    let mut lengths: HashMap<String, Vec<i64>> = HashMap::new();
    let mut replaced = Vec::new();
    for &index in &parts {
        let part = &done.vlm.parts[index];
        let variant = part.variant.clone();
        let starts = |p: &Part| p.variant == variant && starts_cache(p);
        let only_step =
            !starts_cache(part) && is_decoder(part) && done.vlm.parts.iter().any(starts);
        if matches!(part.role, Role::Unknown(_)) {
            continue;
        }
        if only_step {
            replaced.push(index);
            continue;
        }
        let inputs = inputs(part, &prompt, None, shapes)?;
        fix_part(&mut done, index, &inputs, shapes, Some(visual + gone))?;
        let part = &mut done.vlm.parts[index];
        if let Role::Decoder(decoder) = &part.role {
            lengths.insert(part.variant.clone(), cache_lengths(&part.model, decoder));
            part.file = renamed(part, false);
        }
        if let Role::Vision(tower) = &part.role
            && let Some(output) = tower.features_index
            && shapes.visual.is_none()
        {
            checked(
                part,
                part.model.graph().outputs[output],
                visual + gone,
                shapes,
            )?;
        }
    }
    let Some(steps) = &mut steps else {
        return Ok(done);
    };
    for &index in &parts {
        let part = &steps.vlm.parts[index];
        let Role::Decoder(decoder) = &part.role else {
            continue;
        };
        if decoder.layers[0].past.is_none() {
            continue;
        }
        let Some(starts) = lengths.get(&part.variant) else {
            continue;
        };
        let past: Vec<i64> = starts.iter().map(|s| s + shapes.answer - 1).collect();
        let inputs = inputs(part, &step, Some(&past), shapes)?;
        fix_part(steps, index, &inputs, shapes, None)?;
        let mut part = steps.vlm.parts[index].clone();
        part.file = renamed(&part, true);
        let changes = steps.changes.iter().filter(|c| c.part == index);
        let target = match replaced.contains(&index) {
            true => {
                done.changes.retain(|c| c.part != index);
                done.vlm.parts[index] = part;
                index
            }
            false => {
                done.vlm.parts.push(part);
                done.vlm.parts.len() - 1
            }
        };
        done.changes.extend(changes.map(|c| Change {
            part: target,
            ..c.clone()
        }));
    }
    Ok(done)
}

fn is_decoder(part: &Part) -> bool {
    matches!(part.role, Role::Decoder(_))
}

/// Whether it is a decoder without a past.
fn starts_cache(part: &Part) -> bool {
    matches!(&part.role, Role::Decoder(d) if d.layers[0].past.is_none())
}

/// What has no fixed shapes.
fn refuse(vlm: &Vlm, recipe: &Recipe) -> Result<(), PassError> {
    let fail = |problem: String| {
        Err(PassError::Requires {
            pass: NAME,
            problem,
        })
    };
    if recipe.context.kv == KvLayout::Padded {
        return fail(
            "'kv: padded' counts its filler when it runs, so lengths inside are not fixed; use 'kv: ragged', whose \
             caches have a fixed length for each layer"
                .into(),
        );
    }
    let current = |p: super::Pruning<'_>| p.prune.ratio_base == RatioBase::Current;
    if recipe.pruning().is_some_and(current) {
        return fail(
            "'ratio_base: current' takes a share of what is visual at each drop point, which differs from prompt to \
             prompt; use 'ratio_base: entered'"
                .into(),
        );
    }
    if recipe.context.marker == Some(Marker::Static) {
        return fail(
            "'marker: static' says where visual tokens lie in a prompt without padding, and shorter prompts are padded \
             here, which moves them; use 'marker: channel' or 'marker: input'"
                .into(),
        );
    }
    for part in &vlm.parts {
        let label = part.label();
        if matches!(part.role, Role::Decoder(_)) && part.source.branch.is_some() {
            return fail(format!(
                "{label}: a decoder in the branches of an If chooses when it runs; export decoder_model and \
                 decoder_with_past_model, or one graph without the If"
            ));
        }
    }
    for (index, tower) in vlm.towers() {
        let label = vlm.parts[index].label();
        if tower.rows.is_some() {
            return fail(format!(
                "{label}: takes rows of patches and their grid, so the number of tokens depends on what the grid says; \
                 encoders that take images of one size can be fixed"
            ));
        }
        if tower.video {
            return fail(format!(
                "{label}: takes clips; encoders of images can be fixed. Take it out of the directory if only images \
                 are asked about"
            ));
        }
    }
    Ok(())
}

/// Visual tokens of a row, and discarded features among them.
fn counts(vlm: &Vlm, recipe: &Recipe, shapes: &FixedShapes) -> Result<(i64, i64), PassError> {
    let fail = |problem: String| PassError::Requires {
        pass: NAME,
        problem,
    };
    let placed = recipe.placed(vlm);
    let tower = vlm.towers().next();
    let each = tower.and_then(|(_, tower)| {
        let all = tower.features_per_image()?;
        if placed {
            let left = recipe.tokens_left(tower, Placement::Decoder)?.min(all);
            return Some((left, all - left));
        }
        let left = recipe.tokens_left(tower, Placement::Encoder);
        Some((left.unwrap_or(all), 0))
    });
    match (shapes.visual, each) {
        (Some(_), _) if placed => Err(fail(
            "visual=N is for features that all stay; with 'placement: decoder' the number of images says how many do"
                .into(),
        )),
        (Some(visual), _) => Ok((visual, 0)),
        (None, Some((visual, gone))) => Ok((visual * shapes.images, gone * shapes.images)),
        (None, None) => Err(fail(match tower {
            Some((index, _)) => format!(
                "{}: does not state how many tokens an image has; say how many enter the decoder with visual=N",
                vlm.parts[index].label()
            ),
            None => "there is no vision encoder that says how many visual tokens a prompt has; say it with visual=N"
                .into(),
        })),
    }
}

/// Features that come out have to be as many as the decoder was told.
fn checked(
    part: &Part,
    features: ValueId,
    expected: i64,
    shapes: &FixedShapes,
) -> Result<(), PassError> {
    let dims = part
        .model
        .value(features)
        .ty
        .as_ref()
        .and_then(|t| t.shape())
        .unwrap_or_default();
    let rows = dims.split_last().map(|(_, rows)| rows).unwrap_or_default();
    let rows: Option<i64> = rows.iter().map(Dim::known).product();
    if rows == Some(expected * shapes.batch) {
        return Ok(());
    }
    let found: Vec<String> = dims.iter().map(ToString::to_string).collect();
    Err(PassError::Requires {
        pass: NAME,
        problem: format!(
            "{}: gives features [{}] for {} images, and {expected} visual tokens a prompt were expected; say how many \
             enter the decoder with visual=N",
            part.label(),
            found.join(", "),
            shapes.images * shapes.batch,
        ),
    })
}

/// Shapes of a part's inputs; `past` has the length of each layer's cache, in a graph that goes on from one.
fn inputs(
    part: &Part,
    run: &FixedRun,
    past: Option<&[i64]>,
    shapes: &FixedShapes,
) -> Result<HashMap<ValueId, Vec<i64>>, PassError> {
    let model = &part.model;
    let (batch, length) = (run.batch, run.length());
    let dims = |v: ValueId| {
        model
            .value(v)
            .ty
            .as_ref()
            .and_then(|t| t.shape())
            .unwrap_or_default()
    };
    let mut all = HashMap::new();
    let pixels = |v: ValueId| -> Vec<i64> {
        let rest = dims(v).iter().skip(1).map(|d| d.known().unwrap_or(-1));
        std::iter::once(shapes.images * batch).chain(rest).collect()
    };
    let mut decoder = |decoder: &Decoder| {
        if let Some(width) = dims(decoder.embeds).last().and_then(Dim::known) {
            all.insert(decoder.embeds, vec![batch, length, width]);
        }
        let before = past.map_or(0, |p| p[0]);
        if let Some(mask) = decoder.attention_mask {
            all.insert(mask, vec![batch, before + length]);
        }
        if let Some(positions) = decoder.position_ids {
            let rows = dims(positions).len();
            let mut shape: Vec<i64> = dims(positions)
                .iter()
                .take(rows.saturating_sub(2))
                .filter_map(Dim::known)
                .collect();
            shape.extend([batch, length]);
            all.insert(positions, shape);
        }
        if let Some(ids) = decoder.ids {
            all.insert(ids.value, vec![batch, length]);
        }
        for (index, layer) in decoder.layers.iter().enumerate() {
            let columns = past.map_or(0, |p| p[index]);
            for cache in layer.past.into_iter().flat_map(|(k, v)| [k, v]) {
                all.insert(
                    cache,
                    vec![batch, decoder.kv_heads, columns, decoder.head_dim],
                );
            }
        }
        for name in [VISUAL_MASK_INPUT, SALIENT_MASK_INPUT] {
            if let Some(flags) = model.input(name) {
                all.insert(flags, vec![batch, length]);
            }
        }
    };
    match &part.role {
        Role::Decoder(d) => decoder(d),
        Role::Whole(whole) => {
            decoder(&whole.decoder);
            all.insert(whole.tower.pixels, pixels(whole.tower.pixels));
        }
        Role::Vision(tower) => drop(all.insert(tower.pixels, pixels(tower.pixels))),
        Role::Encoder(encoder) => drop(all.insert(encoder.pixels, pixels(encoder.pixels))),
        Role::Embedding(embedding) => drop(all.insert(embedding.ids, vec![batch, length])),
        Role::Unknown(_) => {}
    }
    if let Some((value, _)) = all.iter().find(|(_, shape)| shape.contains(&-1)) {
        return Err(PassError::Unsupported {
            pass: NAME,
            file: part.label(),
            problem: format!(
                "'{}' does not state the size of its images; export with a fixed size",
                model.name(*value)
            ),
        });
    }
    let own = |v: &ValueId| model.graph().inputs.contains(v);
    all.retain(|v, _| own(v));
    Ok(all)
}

/// Fixes a part's shapes and stamps it.
fn fix_part(
    done: &mut Rewritten,
    index: usize,
    inputs: &HashMap<ValueId, Vec<i64>>,
    shapes: &FixedShapes,
    visual: Option<i64>,
) -> Result<(), PassError> {
    let part = &mut done.vlm.parts[index];
    let named = |model: &Model, v: ValueId| model.name(v).to_owned();
    let caches: Vec<Option<(String, String)>> = match &part.role {
        Role::Decoder(d) => {
            let present = |l: &DecoderLayer| {
                l.present
                    .map(|(k, v)| (named(&part.model, k), named(&part.model, v)))
            };
            d.layers.iter().map(present).collect()
        }
        _ => Vec::new(),
    };
    let plan = fix(&part.model, NAME, inputs).map_err(|open| {
        let first: Vec<String> = open.iter().take(3).map(ToString::to_string).collect();
        let more = match open.len() {
            0..=3 => String::new(),
            n => format!("; and {} more", n - 3),
        };
        PassError::Unsupported {
            pass: NAME,
            file: part.label(),
            problem: format!("no fixed shapes: {}{more}", first.join("; ")),
        }
    })?;
    let inserted = plan.inserted();
    change(part, NAME, |model| model.apply(plan))?;
    // Outputs may be other values now, and a past of no columns is gone.
    let model = &part.model;
    if let Role::Decoder(decoder) = &mut part.role {
        for (layer, names) in decoder.layers.iter_mut().zip(&caches) {
            let output = |name: &String| model.output(name);
            layer.present = names
                .as_ref()
                .and_then(|(k, v)| Some((output(k)?, output(v)?)));
            layer.past = layer
                .past
                .filter(|(key, _)| model.graph().inputs.contains(key));
        }
    }
    let padding = match &part.role {
        Role::Decoder(d) if d.hides_columns() => Some("left"),
        Role::Decoder(_) => Some("right"),
        _ => None,
    };
    let kind = part.role.kind();
    let recipe = part.model.metadata(RECIPE_KEY).map(str::to_owned);
    change(part, NAME, |model| {
        let mut patch = Patch::new(&model, "stamp");
        patch.metadata(SHAPES_KEY, &shapes.to_string());
        if recipe.is_none() {
            patch.metadata(VERSION_KEY, env!("CARGO_PKG_VERSION"));
            patch.metadata(ROLE_KEY, kind.word());
        }
        if let Some(padding) = padding {
            patch.metadata(PADDING_KEY, padding);
            if let Some(visual) = visual {
                patch.metadata(VISUAL_KEY, &visual.to_string());
            }
        }
        let plan = patch.finish();
        model.apply(plan)
    })?;
    done.changes.push(Change {
        pass: NAME,
        part: index,
        inserted,
    });
    Ok(())
}

/// Columns of each layer's cache, as a graph of fixed shapes states them.
fn cache_lengths(model: &Model, decoder: &Decoder) -> Vec<i64> {
    let keys = decoder.layers.iter().map(|layer| {
        let (key, _) = layer.present?;
        length_of(model, key)
    });
    keys.map(|l| l.unwrap_or(0)).collect()
}

fn length_of(model: &Model, cache: ValueId) -> Option<i64> {
    model.value(cache).ty.as_ref()?.shape()?.get(2)?.known()
}

/// Where a decoder graph is written: `decoder_model` and `decoder_with_past_model` beside each other, as exporters
/// name them, or NAME and NAME_with_past.
fn renamed(part: &Part, step: bool) -> PathBuf {
    let file: &Path = &part.file;
    let suffix = match part.variant.as_str() {
        "" => String::new(),
        variant => format!("_{variant}"),
    };
    let module = part.module();
    let module = match (module.as_str(), step) {
        ("decoder_model_merged" | "decoder_model", false) => "decoder_model".to_owned(),
        ("decoder_model_merged" | "decoder_with_past_model", true) => {
            "decoder_with_past_model".to_owned()
        }
        (name, false) => name.to_owned(),
        (name, true) => format!("{name}_with_past"),
    };
    let extension = file
        .extension()
        .map_or("onnx".into(), |e| e.to_string_lossy());
    file.with_file_name(format!("{module}{suffix}.{extension}"))
}
