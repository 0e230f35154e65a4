//! Whole models in one file, beside the same reference as the others.
//!
//! ```text
//! base file ─ cut out: pixels → H, q, k │ H' → features   (oracle merges between)
//!           ─ cut out: ids → text embeddings               (scattered here, not by the graph)
//!           ─ entered at its embeddings, stage by stage    (oracle selects between)
//! ```
//!
//! Nothing of the file's own scatter is relied on, so that it is checked too.

use ndarray::{Array2, Array3, Axis};

use super::numeric::{Options, array3, fixed, kept_of};
use super::precision::{precision, quantised, ties, tolerance};
use super::reference::{
    Choice, Fewer, ReferenceDecoder, ReferenceVision, StepIn, features_in, per_image,
};
use super::report::Report;
use super::scenario::{Layout, Scenario, Seeded, lay_out, standard};
use super::tally::Tally;
use super::{ValidateError, decoders, probe};
use crate::arch::{Decoder, Part, Role, VisionTower, Vlm, WholeModel};
use crate::ir::{DataType, Dim, Model, Patch, ValueId, ValueType, extract};
use crate::passes::{Placement, Recipe, TextQueries};
use crate::runtime::{
    Session, Tensor, Value, WholeInput, WholeModel as Runner, WholeOutput, scatter,
};

/// Compares the whole models of a variant.
///
/// # Errors
/// What keeps the comparison from being carried out.
#[allow(clippy::too_many_arguments, reason = "one call site")]
pub(super) fn check(
    base: &Vlm,
    rewritten: &Vlm,
    recipe: &Recipe,
    variant: &str,
    label: &str,
    options: &Options,
    progress: &mut dyn FnMut(&str),
    report: &mut Report,
) -> Result<(), ValidateError> {
    for (old, new) in base.parts.iter().zip(&rewritten.parts) {
        let Role::Whole(whole) = &old.role else {
            continue;
        };
        if old.variant != variant {
            continue;
        }
        let opened = Pair::open(old, new, whole, recipe, options);
        let Some(mut pair) = report.opened(label, opened)? else {
            continue;
        };
        let mut left_out = Vec::new();
        for scenario in standard(pair.vocabulary, options.seed) {
            if let Some(why) = pair.interface.refuses(&scenario) {
                left_out.push(format!("{}: {why}", scenario.name));
                continue;
            }
            progress(scenario.name);
            let name = format!("{label}{}", scenario.name);
            pair.compare(&scenario, name, options.seed, report)?;
        }
        if !left_out.is_empty() {
            let name = format!("{label}what the file's inputs do not allow");
            report.add(name, true, left_out.join("; "));
        }
    }
    Ok(())
}

/// What a file's inputs allow.
struct Interface {
    /// Rows that it fixes.
    rows: Option<usize>,
    /// Images that it fixes.
    images: Option<usize>,
    /// Images and rows are one dimension. Runtimes do not insist, and features are
    /// scattered in their order, so that rows may have any number: what the
    /// unmodified file runs is compared.
    one_each: bool,
    cache: bool,
}

impl Interface {
    fn of(model: &Model, whole: &WholeModel) -> Self {
        let first = |v: ValueId| {
            let shape = model.value(v).ty.as_ref().and_then(|t| t.shape());
            shape.and_then(|s| s.first().cloned())
        };
        let (rows, images) = (first(whole.ids.value), first(whole.tower.pixels));
        Self {
            one_each: matches!(&rows, Some(Dim::Param(_))) && rows == images,
            rows: fixed(model, whole.ids.value, 0),
            images: fixed(model, whole.tower.pixels, 0),
            cache: whole.decoder.layers[0].past.is_some(),
        }
    }

    /// Why a conversation cannot be had with it.
    fn refuses(&self, scenario: &Scenario) -> Option<String> {
        let images = scenario.turns[0].images();
        let total: usize = images.iter().sum();
        if scenario.turns.len() > 1 {
            let cache = "the cache is the client's to carry on";
            return Some(if self.cache { cache } else { "it has no cache" }.into());
        }
        if let Some(rows) = self.rows.filter(|r| *r != images.len()) {
            return Some(format!("it takes {rows} rows"));
        }
        if let Some(fixed) = self.images.filter(|n| *n != total && total > 0) {
            return Some(format!("it takes {fixed} images"));
        }
        None
    }

    /// Images to give with a prompt: something has to be there even if no token
    /// asks for it.
    fn given(&self, rows: usize, images: usize) -> usize {
        match (images, self.images) {
            (0, Some(fixed)) => fixed,
            (0, None) if self.one_each => rows,
            (0, None) => 1,
            (n, _) => n,
        }
    }
}

/// Base and rewritten file, opened.
struct Pair {
    interface: Interface,
    vision: ReferenceVision,
    text: Session,
    decoder: ReferenceDecoder,
    base: Runner,
    run: Runner,
    ids: String,
    text_name: String,
    pixels: String,
    features: String,
    /// Features of an image in the base file.
    base_features: Option<usize>,
    image_token: i64,
    size: [usize; 3],
    width: usize,
    vocabulary: i64,
    dtype: DataType,
    quantised: bool,
    salient: bool,
    /// Names of the kept indices of its drop points.
    kept: Vec<String>,
    span: Option<crate::passes::StaticSpan>,
}

impl Pair {
    fn open(
        old: &Part,
        new: &Part,
        whole: &WholeModel,
        recipe: &Recipe,
        options: &Options,
    ) -> Result<Self, ValidateError> {
        let (model, session) = (&old.model, &options.session);
        let file = new.file.display().to_string();
        // (Such a file gives fewer features: it has no marker channel.)
        let fewer = match Fewer::of(recipe, &Vlm::default())? {
            Some(Fewer::Merge(merge, _)) => Some(Fewer::Merge(merge, Placement::Encoder)),
            other => other,
        };
        let pruning = recipe.pruning();
        let prune = pruning.map(|p| p.prune);
        let size = |axis| fixed(model, whole.tower.pixels, axis);
        let (Some(height), Some(width)) = (size(2), size(3)) else {
            return Err(ValidateError::Model(format!(
                "{file}: the image size is not fixed in the file; expected pixels [n, 3, height, width]"
            )));
        };
        let (part, tower) = tower_alone(model, &whole.tower)?;
        let vision = ReferenceVision::open(&part, &tower, fewer, session)?;
        let ty = model.value(whole.ids.value).ty.clone();
        let ty = ty.unwrap_or(ValueType::tensor(DataType::Int64, vec![Dim::Unknown; 2]));
        let part = extract(
            model,
            &[(whole.ids.value, ty)],
            &[(whole.text, probe::INFERRED)],
        )?;
        let text = probe::open(&part, "reference text embeddings", session)?;
        let (cut, decoder) = decoder_alone(model, &whole.decoder)?;
        let reference = ReferenceDecoder::open(&cut, &decoder, prune, session)?;
        let features = features_in(&new.model, fewer, model.name(whole.tower.features));
        let kept = decoders::kept_names(pruning, false);
        let mut names = vec![features.clone()];
        names.extend(kept.iter().cloned());
        let probes: Vec<ValueId> = names.iter().filter_map(|n| new.model.find(n)).collect();
        let probed = probe::with_outputs(&new.model, &probes)?;
        let base = Runner::new(probe::open(model, "the unmodified file", session)?)?;
        let run = Runner::new(probe::open_rewritten(&probed, &file, session)?);
        Ok(Self {
            interface: Interface::of(model, whole),
            vision,
            text,
            decoder: reference,
            base,
            run: run.map_err(ValidateError::of_rewritten)?,
            ids: model.name(whole.ids.value).to_owned(),
            text_name: model.name(whole.text).to_owned(),
            pixels: model.name(whole.tower.pixels).to_owned(),
            features,
            base_features: whole
                .tower
                .features_per_image()
                .and_then(|n| usize::try_from(n).ok()),
            image_token: whole.ids.image,
            size: [size(1).unwrap_or(3), height, width],
            width: whole.tower.feature_width.map_or(0, |w| w as usize),
            vocabulary: whole.decoder.vocabulary.unwrap_or(32),
            dtype: precision(model),
            quantised: quantised(model),
            salient: prune.is_some_and(|p| p.text == TextQueries::Salient),
            kept,
            span: recipe.context.span,
        })
    }

    /// Token ids of a layout: the image token at its places and nowhere else.
    fn ids_of(&self, layout: &Layout) -> Array2<i64> {
        let other = i64::from(self.image_token == 0);
        Array2::from_shape_fn(layout.ids.dim(), |at| match layout.visual[at] {
            true => self.image_token,
            false if layout.ids[at] == self.image_token => other,
            false => layout.ids[at],
        })
    }

    /// What keeps the unmodified file from answering a prompt of this kind.
    fn refusal(
        &mut self,
        scenario: &Scenario,
        pixels: &Tensor,
    ) -> Result<Option<String>, ValidateError> {
        let images: usize = scenario.turns[0].images().iter().sum();
        let Some(rows) = self.base_features else {
            return Ok(None);
        };
        let layout = lay_out(&scenario.turns[0], &vec![rows; images]);
        let input = WholeInput {
            ids: self.ids_of(&layout),
            pixels: pixels.clone(),
            mask: Some(layout.mask),
            visual: None,
            salient: None,
        };
        Ok(match self.base.run(&input) {
            Err(error) => Some(format!("the unmodified file does not run it: {error}")),
            Ok(out) => {
                let finite = out.last_logits()?.iter().all(|v| v.is_finite());
                (!finite).then(|| "the unmodified file gives logits that are not finite".into())
            }
        })
    }

    fn compare(
        &mut self,
        scenario: &Scenario,
        name: String,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), ValidateError> {
        let mut rng = Seeded::new(seed ^ 0x5eed);
        let turn = &scenario.turns[0];
        let images: usize = turn.images().iter().sum();
        let given = self.interface.given(turn.rows.len(), images);
        let [c, h, w] = self.size;
        let pixels = Tensor::from(rng.images(given, c, h, w));
        if let Some(why) = self.refusal(scenario, &pixels)? {
            report.add(name, true, format!("not compared: {why}"));
            return Ok(());
        }
        let expected = self.vision.features(pixels.clone(), None, None)?.features;
        let used = &expected[..images];
        let rows: Vec<usize> = used.iter().map(Array2::nrows).collect();
        let mut layout = lay_out(turn, &rows);
        layout.ids = self.ids_of(&layout);
        let mut tally = Tally::default();
        // Each step runs everything again.
        for step in 0..=scenario.decode.min(1) {
            if step > 0 {
                layout = self.grown(&layout);
            }
            let outcome = self.step(&layout, &pixels, &expected, images, &mut tally);
            tally.ran(outcome)?;
        }
        tally.report(
            name,
            tolerance(self.dtype, self.quantised),
            ties(self.dtype, self.quantised),
            report,
        );
        Ok(())
    }

    /// The layout with one more text token in every row.
    fn grown(&self, layout: &Layout) -> Layout {
        let (rows, length) = layout.ids.dim();
        let text = |r: usize| {
            let id = (17 * (r as i64 + 1)) % self.vocabulary.max(1);
            id + i64::from(id == self.image_token)
        };
        let last = |i: usize| i == length;
        let dim = (rows, length + 1);
        Layout {
            ids: Array2::from_shape_fn(
                dim,
                |(r, i)| {
                    if last(i) { text(r) } else { layout.ids[[r, i]] }
                },
            ),
            visual: Array2::from_shape_fn(dim, |(r, i)| !last(i) && layout.visual[[r, i]]),
            mask: Array2::from_shape_fn(
                dim,
                |(r, i)| {
                    if last(i) { 1 } else { layout.mask[[r, i]] }
                },
            ),
            source: layout.source.clone(),
        }
    }

    fn step(
        &mut self,
        layout: &Layout,
        pixels: &Tensor,
        expected: &[Array2<f32>],
        images: usize,
        tally: &mut Tally,
    ) -> Result<(), ValidateError> {
        let dim = layout.ids.dim();
        let salient = Array2::from_shape_fn(dim, |(r, i)| {
            self.salient && layout.mask[[r, i]] == 1 && !layout.visual[[r, i]] && (r + i) % 3 == 0
        });
        let visual = match self.span {
            None => layout.visual.clone(),
            Some(span) => Array2::from_shape_fn(dim, |(r, i)| {
                (span.start..span.start + span.count).contains(&(i as i64))
                    && layout.mask[[r, i]] == 1
            }),
        };
        let embeds = self.embeds(layout, &expected[..images])?;
        let stated = self.base.session().input(&self.pixels);
        let given = match stated.and_then(|p| p.dtype).filter(|d| d.is_float()) {
            Some(dtype) => pixels.clone().cast_float(dtype)?,
            None => pixels.clone(),
        };
        self.decoder.give(&self.pixels, Value::new(given)?);
        let input = StepIn {
            embeds,
            mask: layout.mask.clone(),
            positions: super::numeric::positions_of(&Array2::zeros((dim.0, 0)), &layout.mask)
                .insert_axis(Axis(0)),
            visual: visual.clone(),
            gone: Array2::from_elem(dim, false),
            salient: salient.clone(),
            ids: Some(layout.ids.clone()),
        };
        let given = WholeInput {
            ids: layout.ids.clone(),
            pixels: pixels.clone(),
            mask: Some(layout.mask.clone()),
            visual: Some(visual),
            salient: Some(salient),
        };
        let found = match self.run.run(&given) {
            Ok(found) => found,
            Err(error) => {
                let mut state = self.decoder.start(dim.0)?;
                self.decoder.step_with(&mut state, &input, None)?;
                return Err(ValidateError::Rewritten(error));
            }
        };
        self.features(&found, expected, tally)?;
        let lengths: Vec<usize> = self
            .decoder
            .present_keys()
            .filter_map(|key| found.extra.iter().find(|(name, _)| name == key))
            .map(|(_, value)| value.shape()[2])
            .collect();
        let kept = kept_of(&found.extra, &self.kept)?;
        let choice = Choice {
            kept: &kept,
            tolerance: ties(self.dtype, self.quantised),
        };
        let mut state = self.decoder.start(dim.0)?;
        let want = self.decoder.step_with(&mut state, &input, Some(choice))?;
        let logits = found.last_logits().map_err(ValidateError::of_rewritten)?;
        tally.step(&want, &logits, &kept, &lengths);
        Ok(())
    }

    /// Compares the features inside the rewritten file.
    fn features(
        &self,
        found: &WholeOutput,
        expected: &[Array2<f32>],
        tally: &mut Tally,
    ) -> Result<(), ValidateError> {
        let value = found.extra.iter().find(|(n, _)| *n == self.features);
        let Some((_, value)) = value else {
            tally
                .problems
                .push("the features are not in the rewritten graph under their name".into());
            return Ok(());
        };
        for (want, found) in expected.iter().zip(per_image(value, expected.len())?) {
            tally.features(want, &Tensor::from(found), None)?;
        }
        Ok(())
    }

    /// Text embeddings with the features at their places: `[b, L, D]`.
    fn embeds(
        &mut self,
        layout: &Layout,
        features: &[Array2<f32>],
    ) -> Result<Array3<f32>, ValidateError> {
        let (b, l) = layout.ids.dim();
        let narrow = self.text.input(&self.ids).and_then(|p| p.dtype);
        let ids: Tensor = match narrow {
            Some(crate::runtime::DType::I32) => layout
                .ids
                .map(|i| i32::try_from(*i).unwrap_or(i32::MAX))
                .into(),
            _ => layout.ids.clone().into(),
        };
        let out = self.text.run(&[(&self.ids, &Value::new(ids)?)])?;
        let text = out.get(&self.text_name)?;
        let width = match self.width {
            0 => text.shape().last().copied().unwrap_or(1),
            width => width,
        };
        // The graph may have flattened them.
        let text = Tensor::new([b, l, width], text.f32s()?.into_owned())?;
        let flat: Vec<bool> = layout.visual.iter().copied().collect();
        let features: Vec<Tensor> = features.iter().map(|f| Tensor::from(f.clone())).collect();
        array3(&scatter(text, &flat, &features)?)
    }
}

/// The tower and projector as a model of their own.
pub(super) fn tower_alone(
    model: &Model,
    tower: &VisionTower,
) -> Result<(Model, VisionTower), ValidateError> {
    let pixels = model.value(tower.pixels).ty.clone();
    let pixels = pixels.unwrap_or(ValueType::tensor(DataType::Float, vec![Dim::Unknown; 4]));
    let features = ValueType::tensor(tower.dtype, vec![Dim::Unknown; 3]);
    let part = extract(
        model,
        &[(tower.pixels, pixels)],
        &[(tower.features, features)],
    )?;
    let mut alone = VisionTower::recognise(&part)
        .map_err(|why| ValidateError::Model(format!("the tower cut out of the file: {why}")))?;
    // Types that the file states between nodes do not come along.
    alone.tokens = tower.tokens;
    Ok((part, alone))
}

/// The model entered at its embeddings, which become an input.
fn decoder_alone(model: &Model, decoder: &Decoder) -> Result<(Model, Decoder), ValidateError> {
    let mut patch = Patch::new(model, "entered");
    let ty = ValueType::tensor(decoder.dtype, vec![Dim::Unknown; 3]);
    let input = patch.add_input("duet/entered/embeds", ty);
    patch.rewire_all(decoder.embeds, input);
    let plan = patch.finish();
    let cut = model.clone().apply(plan)?;
    let mut alone = decoder.clone();
    let moved = |v: &mut ValueId| {
        if *v == decoder.embeds {
            *v = input;
        }
    };
    moved(&mut alone.embeds);
    alone.residuals.iter_mut().flatten().for_each(moved);
    let boundaries = alone.layers.iter_mut().flat_map(|l| &mut l.boundary);
    boundaries.for_each(moved);
    Ok((cut, alone))
}

/// A prompt with one image in each row for the rewritten file's own inputs, for
/// looking at what was inserted.
pub(super) fn feed(
    old: &Model,
    new: &Model,
    whole: &WholeModel,
    recipe: &Recipe,
    rng: &mut Seeded,
) -> Result<Vec<(String, Tensor)>, ValidateError> {
    let interface = Interface::of(old, whole);
    let rows = interface.rows.unwrap_or(1);
    let size = |axis, other| fixed(old, whole.tower.pixels, axis).unwrap_or(other);
    let left = recipe.tokens_left(&whole.tower, Placement::Encoder);
    let features = left.or(whole.tower.features_per_image());
    let features = features.and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
    let layout = lay_out(&standard(8, 1)[0].turns[0], &[features]);
    let wide = |x: Array2<i64>| ndarray::concatenate(ndarray::Axis(0), &vec![x.view(); rows]);
    let ids = Array2::from_shape_fn(layout.ids.dim(), |at| match layout.visual[at] {
        true => whole.ids.image,
        false => layout.ids[at] + i64::from(layout.ids[at] == whole.ids.image),
    });
    let shaped = |e: ndarray::ShapeError| ValidateError::Model(e.to_string());
    let (ids, mask) = (
        wide(ids).map_err(shaped)?,
        wide(layout.mask).map_err(shaped)?,
    );
    let mut feed = Vec::new();
    for &input in &new.graph().inputs {
        let value = new.value(input);
        let stated = value.ty.as_ref().and_then(ValueType::dtype);
        let name = value.name.as_str();
        let ints = |x: &Array2<i64>| -> Tensor {
            match stated {
                Some(DataType::Int32) => x.map(|i| i32::try_from(*i).unwrap_or(i32::MAX)).into(),
                Some(DataType::Bool) => x.map(|i| *i != 0).into(),
                _ => x.clone().into(),
            }
        };
        let float = super::second::dtype(stated.unwrap_or(DataType::Float));
        let tensor = if name == old.name(whole.ids.value) {
            ints(&ids)
        } else if name == old.name(whole.tower.pixels) {
            let images = interface.images.unwrap_or(rows);
            let pixels = rng.images(images, size(1, 3), size(2, 224), size(3, 224));
            Tensor::from(pixels).cast_float(float)?
        } else if Some(name) == whole.decoder.attention_mask.map(|v| old.name(v)) {
            ints(&mask)
        } else if Some(name) == whole.decoder.position_ids.map(|v| old.name(v)) {
            let none = Array2::zeros((rows, 0));
            ints(&super::numeric::positions_of(&none, &mask))
        } else if name == crate::passes::VISUAL_MASK_INPUT {
            Tensor::from(ids.map(|i| *i == whole.ids.image))
        } else if name == crate::passes::SALIENT_MASK_INPUT {
            Tensor::from(Array2::from_elem(ids.dim(), false))
        } else {
            let shape = value.ty.as_ref().and_then(|t| t.shape()).unwrap_or(&[]);
            let known = |axis: usize| shape.get(axis).and_then(Dim::known).unwrap_or(1) as usize;
            Tensor::zeros(float, [rows, known(1), 0, known(3)])?
        };
        feed.push((name.to_owned(), tensor));
    }
    Ok(feed)
}
