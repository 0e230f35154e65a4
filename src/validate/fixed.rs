//! Validating a model of fixed shapes: the same recipe with open shapes is validated against the base, and the files
//! of fixed shapes have to give what those of open shapes give.
//!
//! Both run without ONNX Runtime's optimisations, some of which it makes only where shapes are fixed: what is compared
//! is the graphs.

use ndarray::Array2;

use super::numeric::set_label;
use super::precision::{lower, precision, quantised, tolerance};
use super::report::Report;
use super::scenario::{Layout, Seeded, Turn, lay_out};
use super::tally::difference;
use super::{Options, ValidateError, check, probe};
use crate::arch::{FileSet, Role, Vlm};
use crate::ir::{DataType, Model, loose, verify};
use crate::onnx::serialize;
use crate::passes::{FixedShapes, Recipe, SHAPES_KEY, rewrite, rewrite_fixed};
use crate::runtime::{
    CacheHeads, DType, Decoder as RunDecoder, Embedder, Optimization, Session, SessionOptions,
    StepInput, Tensor, Value, scatter,
};

/// Tokens that follow a prompt.
const STEPS: usize = 3;

/// Validates files of fixed shapes; `base` holds what `recipe` was applied to.
///
/// # Errors
/// As [`check`].
pub fn check_fixed(
    base: &Vlm,
    fixed: &Vlm,
    recipe: &Recipe,
    shapes: &FixedShapes,
    options: &Options,
    progress: &mut dyn FnMut(&str),
) -> Result<Report, ValidateError> {
    let open = rewrite(base.clone(), recipe)?.vlm;
    let mut report = check(base, &open, recipe, options, progress)?;
    progress("fixed shapes");
    let again = rewrite_fixed(base.clone(), recipe, shapes)?.vlm;
    files(fixed, &again, &mut report)?;
    for part in fixed
        .parts
        .iter()
        .filter(|p| p.model.metadata(SHAPES_KEY).is_some())
    {
        let open = loose(&part.model);
        let detail = match open.first() {
            None => format!(
                "{} nodes, none of which computes a size",
                part.model.graph().nodes.len()
            ),
            Some(first) => format!("{} values or nodes are not fixed: {first}", open.len()),
        };
        report.add(
            format!("{}: every size is a number", part.label()),
            open.is_empty(),
            detail,
        );
    }
    let session = SessionOptions {
        optimization: Optimization::Off,
        ..options.session.clone()
    };
    let sets = open.sets();
    for set in &sets {
        let label = set_label(&sets, set);
        let pair = Pair::open(base, &open, &again, fixed, set, &session);
        if let Some(Some(mut pair)) = report.opened(&label, pair)? {
            for (name, missing) in [
                ("full prompt", 0),
                ("prompt that is padded", shapes.prompt / 3),
            ] {
                let worst = pair
                    .compare(shapes, missing, options.seed)
                    .map_err(ValidateError::of_rewritten);
                let name = format!("{label}fixed shapes: {name}");
                match report.opened(&name, worst)? {
                    Some((lengths, worst)) => report.add(
                        name,
                        lengths.0 == lengths.1 && worst <= pair.tolerance,
                        format!(
                            "{worst:.1e} standard deviations from the open shapes' logits (limit {:.0e}), caches {:?} and \
                             {:?}",
                            pair.tolerance, lengths.0, lengths.1
                        ),
                    ),
                    None => continue,
                }
            }
        }
    }
    Ok(report)
}

/// That the files are what the recipe and the shapes give.
fn files(fixed: &Vlm, again: &Vlm, report: &mut Report) -> Result<(), ValidateError> {
    let (found, expected) = (fixed.files()?, again.files()?);
    for file in &expected {
        let name = file.file.display();
        let same = match found.iter().find(|f| f.file == file.file) {
            Some(found) => {
                let bytes =
                    |model: &Model| Ok::<_, ValidateError>(serialize(verify(model)?).to_vec());
                bytes(&found.model)? == bytes(&file.model)?
            }
            None => false,
        };
        let detail = match same {
            true => {
                "rewriting the base with the stamped recipe and shapes gives this file, byte for byte"
            }
            false => "missing, or another file than the stamped recipe and shapes give",
        };
        report.add(format!("{name}: reproducible"), same, detail);
    }
    Ok(())
}

/// The same parts with open and fixed shapes.
struct Pair {
    /// Of open shapes: what both decoders are given comes from it.
    vision: Option<Session>,
    embed: Option<Embedder>,
    decoders: (RunDecoder, RunDecoder),
    width: usize,
    dtype: DType,
    tolerance: f64,
}

/// Lengths of the caches of both, in the end.
type Lengths = (Vec<usize>, Vec<usize>);

impl Pair {
    /// None where there is no decoder with a cache.
    fn open(
        base: &Vlm,
        open: &Vlm,
        again: &Vlm,
        fixed: &Vlm,
        set: &FileSet,
        session: &SessionOptions,
    ) -> Result<Option<Self>, ValidateError> {
        let model = |vlm: &Vlm, index: usize| -> Result<Session, ValidateError> {
            let part = &vlm.parts[index];
            probe::open_rewritten(&part.model, &part.file.display().to_string(), session)
        };
        let Some(files) = set.decoder else {
            return Ok(None);
        };
        let Role::Decoder(decoder) = &base.parts[files.main].role else {
            return Ok(None);
        };
        let size = |n: i64| usize::try_from(n).unwrap_or(1);
        let heads = CacheHeads {
            count: size(decoder.kv_heads),
            width: size(decoder.head_dim),
        };
        let mut first = RunDecoder::with_heads(model(open, files.main)?, Some(heads))?;
        if let Some(prompt) = files.prompt {
            first = first.with_prompt(model(open, prompt)?)?;
        }
        let variant = &base.parts[files.main].variant;
        let second = |past: bool| -> Result<Option<Session>, ValidateError> {
            let part = again.parts.iter().find(|p| {
                let goes_on =
                    matches!(&p.role, Role::Decoder(d) if d.layers[0].past.is_some() == past);
                goes_on && p.variant == *variant
            });
            let found = part.and_then(|p| fixed.parts.iter().find(|f| f.file == p.file));
            let open = |p: &crate::arch::Part| {
                probe::open_rewritten(&p.model, &p.file.display().to_string(), session)
            };
            found.map(open).transpose()
        };
        let (Some(prompt), Some(step)) = (second(false)?, second(true)?) else {
            return Ok(None);
        };
        let closed = RunDecoder::with_heads(step, Some(heads)).and_then(|d| d.with_prompt(prompt));
        let closed = closed.map_err(ValidateError::of_rewritten)?;
        let mut dtype = precision(&base.parts[files.main].model);
        let mut rounds = quantised(&base.parts[files.main].model);
        for index in [set.vision, set.embedding].into_iter().flatten() {
            dtype = lower(dtype, precision(&base.parts[index].model));
            rounds |= quantised(&base.parts[index].model);
        }
        if decoder.dtype == DataType::Float16 {
            dtype = lower(dtype, DataType::Float16);
        }
        let (interface, width) = first.embeds();
        Ok(Some(Self {
            vision: set.vision.map(|v| model(open, v)).transpose()?,
            embed: match set.embedding {
                Some(embed) => Some(Embedder::new(model(open, embed)?)?),
                None => None,
            },
            decoders: (first, closed),
            width: width.unwrap_or(1),
            dtype: interface.unwrap_or(DType::F32),
            tolerance: tolerance(dtype, rounds),
        }))
    }

    /// Runs a prompt of `missing` tokens fewer than there may be, and some steps: lengths of the caches, and the
    /// largest difference of the last rows' logits.
    fn compare(
        &mut self,
        shapes: &FixedShapes,
        missing: i64,
        seed: u64,
    ) -> Result<(Lengths, f64), ValidateError> {
        let size = |n: i64| usize::try_from(n).unwrap_or(1);
        let batch = size(shapes.batch);
        let mut rng = Seeded::new(seed);
        let features = self.features(shapes, &mut rng)?;
        let counts: Vec<usize> = features.iter().map(|f| f.shape()[0]).collect();
        let per_row = features.len() / batch.max(1);
        let text = size(shapes.prompt - missing);
        let mut segments = vec![text / (per_row + 1); per_row + 1];
        segments[per_row] += text - segments.iter().sum::<usize>();
        let turn = Turn {
            rows: (0..batch)
                .map(|_| segments.iter().map(|n| rng.ids(*n, 30)).collect())
                .collect(),
        };
        let layout = lay_out(&turn, &counts);
        let embeds = self.embeds(&layout, &features, &mut rng)?;
        let mut input = StepInput::new(embeds);
        input.ids = Some(layout.ids.clone());
        input.visual = Some(layout.visual.clone());
        let mut caches = None;
        let mut worst: f64 = 0.0;
        for step in 0..=STEPS.min(size(shapes.answer - 1)) {
            let (one, other) = match &caches {
                None => (
                    self.decoders.0.prefill(&input)?,
                    self.decoders.1.prefill(&input)?,
                ),
                Some((a, b)) => (
                    self.decoders.0.step(&input, a)?,
                    self.decoders.1.step(&input, b)?,
                ),
            };
            let (want, found) = (one.last_logits()?, other.last_logits()?);
            worst = worst.max(apart(&want, &found));
            caches = Some((one.cache, other.cache));
            let ids =
                Array2::from_shape_fn((batch, 1), |(row, _)| ((7 + 11 * step + row) % 30) as i64);
            let layout = Layout {
                visual: Array2::from_elem((batch, 1), false),
                mask: Array2::ones((batch, 1)),
                source: Vec::new(),
                ids,
            };
            let embeds = self.embeds(&layout, &[], &mut rng)?;
            input = StepInput::new(embeds);
            input.ids = Some(layout.ids);
        }
        let lengths = caches
            .map(|(a, b)| (a.lengths(), b.lengths()))
            .unwrap_or_default();
        Ok((lengths, worst))
    }

    /// Features of random images, `[tokens, width]` each; of a decoder alone, random ones.
    fn features(
        &mut self,
        shapes: &FixedShapes,
        rng: &mut Seeded,
    ) -> Result<Vec<Tensor>, ValidateError> {
        let size = |n: i64| usize::try_from(n).unwrap_or(1);
        let many = size(shapes.images * shapes.batch);
        let Some(vision) = &mut self.vision else {
            let rows = size(shapes.visual.unwrap_or(1));
            let each = |rng: &mut Seeded| {
                (0..rows * self.width)
                    .map(|_| rng.normal())
                    .collect::<Vec<f32>>()
            };
            let all =
                (0..size(shapes.batch)).map(|_| Ok(Tensor::new([rows, self.width], each(rng))?));
            return all.collect();
        };
        let port = vision.inputs()[0].clone();
        let dims: Vec<usize> = port.dims.iter().skip(1).filter_map(|d| d.fixed()).collect();
        let mut shape = vec![many];
        shape.extend(&dims);
        let count: usize = shape.iter().product();
        let pixels: Vec<f32> = (0..count).map(|_| rng.normal()).collect();
        let pixels = Tensor::new(shape, pixels)?.cast_float(port.dtype.unwrap_or(DType::F32))?;
        let outputs = vision.run(&[(&port.name, &Value::new(pixels)?)])?;
        let features = outputs.first()?;
        let width = features.shape().last().copied().unwrap_or(1);
        let all = features.f32s()?;
        let rows = all.len() / width.max(1) / many.max(1);
        let each = all.chunks_exact(rows * width);
        each.map(|part| Ok(Tensor::new([rows, width], part.to_vec())?))
            .collect()
    }

    fn embeds(
        &mut self,
        layout: &Layout,
        features: &[Tensor],
        rng: &mut Seeded,
    ) -> Result<Value, ValidateError> {
        let visual: Vec<bool> = layout.visual.iter().copied().collect();
        let embeds = match &mut self.embed {
            Some(embed) => embed.run(layout.ids.clone())?.to_tensor()?,
            None => {
                let (rows, tokens) = layout.ids.dim();
                let all: Vec<f32> = (0..rows * tokens * self.width)
                    .map(|_| rng.normal())
                    .collect();
                Tensor::new([rows, tokens, self.width], all)?.cast_float(self.dtype)?
            }
        };
        Ok(Value::new(scatter(embeds, &visual, features)?)?)
    }
}

/// Largest difference, in standard deviations of the first.
fn apart(want: &Array2<f32>, found: &Array2<f32>) -> f64 {
    match want.dim() == found.dim() && want.iter().all(|v| v.is_finite()) {
        true => difference(want, found).0,
        false => f64::INFINITY,
    }
}
