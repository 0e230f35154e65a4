//! Running the rewritten model beside the reference.

use ndarray::{Array2, Array3, Axis};

use super::limits::Limits;
use super::plain::PlainPair;
use super::precision::{lower, precision, quantised, ties, tolerance};
use super::reference::{Choice, Fewer, ORDER, Ranking, ReferenceVision, State, StepIn, order_of};
use super::report::Report;
use super::rows::RowPair;
use super::scenario::{Frame, Layout, Scenario, Seeded, lay_out, standard};
use super::tally::Tally;
use super::{
    ValidateError, decoders, embed, padded, probe, rows, scenario, second, structure, whole,
};
use crate::arch::{Decoder, DecoderFiles, FileSet, Role, Vlm};
use crate::ir::{DataType, Model};
use crate::passes::{KvLayout, Marker, Recipe, TextQueries};
use crate::runtime::{
    Decoder as RunDecoder, Embedder, Grid, GridPositions, SessionOptions, StepInput, Tensor, Value,
    VisionEncoder, scatter,
};

/// How to validate.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// ONNX Runtime sessions.
    pub session: SessionOptions,
    /// Seed of the scenarios.
    pub seed: u64,
}

/// What findings about one of several sets of files begin with.
pub(super) fn set_label(sets: &[FileSet], set: &FileSet) -> String {
    match (sets.len(), set.variant.is_empty()) {
        (1, true) => String::new(),
        (_, true) => "default: ".to_owned(),
        (_, false) => format!("{}: ", set.variant),
    }
}

/// Validates a rewritten model against its base.
///
/// # Errors
/// What keeps the validation from being carried out; what is wrong with the
/// model is in the report.
pub fn check(
    base: &Vlm,
    rewritten: &Vlm,
    recipe: &Recipe,
    options: &Options,
    progress: &mut dyn FnMut(&str),
) -> Result<Report, ValidateError> {
    let mut report = Report::new();
    progress("structure");
    structure::check(base, rewritten, recipe, &mut report)?;
    let sets = base.sets();
    for set in &sets {
        let variant = set.variant.clone();
        let label = set_label(&sets, set);
        whole::check(
            base,
            rewritten,
            recipe,
            &variant,
            &label,
            options,
            progress,
            &mut report,
        )?;
        let decoders = set.decoder.map_or_else(Vec::new, |d| {
            base.decoder_files(&base.parts[d.main].variant)
        });
        let several = decoders.len() > 1;
        let each: Vec<Option<&DecoderFiles>> = match decoders.as_slice() {
            [] => vec![None],
            some => some.iter().map(Some).collect(),
        };
        let encoders = match [set.vision, set.video] {
            [None, None] => vec![None],
            some => some.into_iter().flatten().map(Some).collect(),
        };
        let rounds = encoders
            .iter()
            .flat_map(|e| each.iter().map(move |f| (*e, *f)));
        for (encoder, files) in rounds {
            let set = FileSet {
                vision: encoder,
                ..set.clone()
            };
            let opened = Pair::open(base, rewritten, recipe, &set, files, options);
            let Some(mut pair) = report.opened(&label, opened)? else {
                continue;
            };
            let clips = encoder.is_some() && encoder == set.video;
            pair.label = format!("{label}{}", if clips { "clips: " } else { "" });
            let label = pair.label.clone();
            if let Some(files) = files.filter(|_| several) {
                let file = base.parts[files.main].file.display();
                pair.label = format!("{label}{file}: ");
            }
            let vocabulary = pair.vocabulary;
            let goes_on = pair.decoder.as_ref().is_none_or(|(d, _)| d.has_past());
            let scenarios = match &pair {
                Pair {
                    vision: None,
                    rows: None,
                    plain: None,
                    embed: None,
                    decoder: None,
                    ..
                } => Vec::new(),
                _ => standard(vocabulary, options.seed),
            };
            if pair.attended {
                report.add(
                    format!("{}discarded features", pair.label),
                    true,
                    "the decoder's attention takes the length of each row and no mask of columns: its first \
                     layer attends to them, here and in the reference",
                );
            }
            for mut scenario in scenarios {
                // What cannot go on from a cache is asked once.
                if !goes_on {
                    if scenario.turns.len() > 1 {
                        continue;
                    }
                    scenario.decode = 0;
                }
                if let Some(why) = pair.limits.beyond(&scenario) {
                    let check = format!("{}{}", pair.label, scenario.name);
                    report.add(check, true, format!("left out: {why}"));
                    continue;
                }
                progress(scenario.name);
                pair.compare(&scenario, options.seed, &mut report)?;
            }
        }
        progress("tract");
        second::check(
            base,
            rewritten,
            recipe,
            &variant,
            &label,
            options,
            &mut report,
        )?;
    }
    Ok(report)
}

/// What the rewritten vision encoder ranks its tokens by, `[n, N]`.
pub(super) const SCORE: &str = "duet/token_merge/score";

/// Both models, opened.
struct Pair {
    label: String,
    vision: Option<(ReferenceVision, VisionEncoder, Frame)>,
    /// The same for an encoder that takes rows of patches.
    rows: Option<RowPair>,
    /// The same for an encoder whose tower is not known.
    plain: Option<PlainPair>,
    embed: Option<(Embedder, Embedder)>,
    decoder: Option<(decoders::Reference, RunDecoder)>,
    /// Plain width of embeddings.
    width: usize,
    /// Features of an image where no tower says how many there are.
    features: usize,
    /// Token that the embedding graph itself replaces by features.
    placeholder: Option<i64>,
    vocabulary: i64,
    channel: bool,
    dtype: DataType,
    quantised: bool,
    salient: bool,
    /// What the unmodified files do not run.
    limits: Limits,
    /// Rows of its position ids, if these have rank 3.
    position_rows: Option<usize>,
    /// Whether the decoder attends to features that a merge discarded and left in their places.
    attended: bool,
    /// Names of the kept indices of its drop points.
    kept: Vec<String>,
    span: Option<crate::passes::StaticSpan>,
    /// Whether all caches are filled up to one length.
    padded: bool,
}

pub(super) fn fixed(model: &Model, value: crate::ir::ValueId, axis: usize) -> Option<usize> {
    let shape = model.value(value).ty.as_ref()?.shape()?;
    shape
        .get(axis)?
        .known()
        .and_then(|n| usize::try_from(n).ok())
}

impl Pair {
    fn open(
        base: &Vlm,
        rewritten: &Vlm,
        recipe: &Recipe,
        set: &FileSet,
        files: Option<&DecoderFiles>,
        options: &Options,
    ) -> Result<Self, ValidateError> {
        let session = &options.session;
        let fewer = Fewer::of(recipe, base)?;
        let merge = fewer.and_then(Fewer::merge);
        let pruning = recipe.pruning();
        let prune = pruning.map(|p| p.prune);
        let placed = recipe.placed(base);
        let mut pair = Self {
            label: String::new(),
            vision: None,
            rows: None,
            plain: None,
            embed: None,
            decoder: None,
            width: 0,
            features: 8,
            placeholder: None,
            vocabulary: 32,
            channel: (prune.is_some() || placed)
                && !matches!(recipe.context.marker, Some(m) if m != Marker::Channel),
            dtype: DataType::Float,
            quantised: false,
            salient: prune.is_some_and(|p| p.text == TextQueries::Salient),
            limits: Limits::default(),
            position_rows: None,
            attended: false,
            kept: decoders::kept_names(pruning, placed),
            span: recipe.context.span,
            padded: recipe.context.kv == KvLayout::Padded,
        };
        let decoder = files.map(|f| [f.prompt, Some(f.main)]);
        let parts = [set.vision, set.embedding];
        for index in parts
            .into_iter()
            .chain(decoder.into_iter().flatten())
            .flatten()
        {
            let (old, new) = (&base.parts[index], &rewritten.parts[index]);
            let name = new.file.display().to_string();
            pair.quantised |= quantised(&old.model);
            match &old.role {
                Role::Vision(tower) if tower.rows.is_some() => {
                    let pair_of =
                        RowPair::open(&old.model, &new.model, tower, merge, &name, session)?;
                    pair.rows = Some(pair_of);
                    pair.dtype = lower(pair.dtype, precision(&old.model));
                    pair.width = tower.feature_width.map_or(pair.width, |w| w as usize);
                }
                Role::Vision(tower) => {
                    let reference = ReferenceVision::open(&old.model, tower, fewer, session)?;
                    let inside = [SCORE, ORDER].iter().filter_map(|n| new.model.find(n));
                    let score: Vec<_> = inside.collect();
                    let probed = probe::with_outputs(&new.model, &score)?;
                    let run = probe::open_rewritten(&probed, &name, session)?;
                    let run = VisionEncoder::new(run).map_err(ValidateError::of_rewritten)?;
                    let Some(frame) = Frame::of(&old.model, tower) else {
                        return Err(ValidateError::open_size(&name));
                    };
                    pair.dtype = lower(pair.dtype, precision(&old.model));
                    pair.vision = Some((reference, run, frame));
                    if let Some(width) = tower.feature_width {
                        pair.width = width as usize;
                    }
                }
                Role::Encoder(encoder) => {
                    let open = PlainPair::open(&old.model, &new.model, encoder, &name, session)?;
                    pair.dtype = lower(pair.dtype, precision(&old.model));
                    pair.plain = Some(open);
                }
                Role::Embedding(embedding) => {
                    pair.limits.note_batch(&old.model, embedding.ids, &name);
                    if let Some(scatter) = &embedding.scatter {
                        pair.placeholder = Some(embed::placeholder(scatter, &name)?);
                        let stated = fixed(&old.model, scatter.features, 1);
                        pair.features = stated.filter(|_| scatter.rank == 3).unwrap_or(8);
                    }
                    let plain = embed::any_count(&old.model, embedding)?;
                    let reference = Embedder::new(probe::open(&plain, &name, session)?)?;
                    let run = probe::open_rewritten(&new.model, &name, session)?;
                    let run = Embedder::new(run).map_err(ValidateError::of_rewritten)?;
                    pair.embed = Some((reference, run));
                }
                Role::Decoder(decoder) => {
                    pair.limits.note_batch(&old.model, decoder.embeds, &name);
                    pair.limits.note_mask(decoder);
                    pair.attended |= placed && !decoder.hides_columns();
                    pair.takes_rows(decoder, &name)?;
                    pair.width = decoder.width.map_or(pair.width, |w| w as usize);
                    pair.vocabulary = decoder.vocabulary.unwrap_or(32);
                    pair.dtype = lower(pair.dtype, precision(&old.model));
                }
                // Whole models are compared on their own.
                Role::Whole(_) | Role::Unknown(_) => {}
            }
        }
        if let Some(files) = files {
            let (mut reference, run) =
                decoders::open(base, rewritten, files, pruning, placed, session)?;
            pair.limits.single_steps = reference.continues()?;
            pair.decoder = Some((reference, run));
        }
        Ok(pair)
    }

    /// Notes a decoder's kind of position ids.
    fn takes_rows(&mut self, decoder: &Decoder, file: &str) -> Result<(), ValidateError> {
        self.position_rows = decoder.position_rows;
        match decoder.position_rows {
            None => Ok(()),
            Some(3) => {
                if self.vision.is_none() && self.rows.is_none() && self.placeholder.is_none() {
                    // As many as several grids have.
                    self.features = 12;
                }
                Ok(())
            }
            Some(rows) => Err(ValidateError::Model(format!(
                "{file}: position_ids has {rows} rows; expected [batch, sequence], or [3, batch, sequence] \
                 (M-RoPE: time, height, width), which are the positions that scenarios can be made with"
            ))),
        }
    }

    /// Positions `[rows, b, L]` of a step's tokens, `images` of them images' of so many
    /// tokens each; `past` and `places` tell what was said before.
    fn positions(
        &self,
        layout: &Layout,
        past: &Array2<i64>,
        places: &mut GridPositions,
        images: &[usize],
    ) -> Result<Array3<i64>, ValidateError> {
        if self.position_rows.is_none() {
            return Ok(positions_of(past, &layout.mask).insert_axis(Axis(0)));
        }
        let grids: Vec<Grid> = images
            .iter()
            .enumerate()
            .map(|(i, &tokens)| scenario::grid(tokens, i))
            .collect();
        Ok(places.advance(&layout.visual, &layout.mask, &grids)?)
    }

    /// Plain embeddings `[b, L, D]`, and those that the rewritten decoder reads,
    /// with the features of the images in their places.
    fn embeddings(
        &mut self,
        layout: &Layout,
        plain: Vec<Tensor>,
        marked: Vec<Tensor>,
        rng: &mut Seeded,
    ) -> Result<(Tensor, Tensor), ValidateError> {
        let dtype = self.dtype_like();
        let (plain, marked) = (cast(plain, &dtype)?, cast(marked, &dtype)?);
        if let Some((reference, run)) = &mut self.embed {
            let token = self.placeholder;
            return Ok((
                embed::embed(reference, layout, token, &plain)?,
                embed::embed(run, layout, token, &marked).map_err(ValidateError::of_rewritten)?,
            ));
        }
        let (b, l) = layout.ids.dim();
        let noise = Tensor::from(Array3::from_shape_fn((b, l, self.width), |_| rng.normal()));
        let flat: Vec<bool> = layout.visual.iter().copied().collect();
        Ok((
            scatter(noise.clone(), &flat, &plain)?,
            scatter(noise, &flat, &marked).map_err(ValidateError::of_rewritten)?,
        ))
    }

    fn compare(
        &mut self,
        scenario: &Scenario,
        seed: u64,
        report: &mut Report,
    ) -> Result<(), ValidateError> {
        let mut tally = Tally::default();
        let outcome = self.converse(scenario, seed, &mut tally);
        tally.ran(outcome)?;
        tally.report(
            format!("{}{}", self.label, scenario.name),
            tolerance(self.dtype, self.quantised),
            ties(self.dtype, self.quantised),
            report,
        );
        Ok(())
    }

    #[allow(clippy::too_many_lines, reason = "one comparison, step by step")]
    fn converse(
        &mut self,
        scenario: &Scenario,
        seed: u64,
        tally: &mut Tally,
    ) -> Result<(), ValidateError> {
        let mut rng = Seeded::new(seed ^ 0x5eed);
        let batch = scenario.turns[0].rows.len();
        let mut state: Option<(State, crate::runtime::Cache)> = None;
        let mut seen = Array2::<i64>::zeros((batch, 0));
        let mut places = GridPositions::new(batch);
        for turn in &scenario.turns {
            let images: usize = turn.images().iter().sum();
            let (mut plain, mut marked, mut seen_rows) = (Vec::new(), Vec::new(), Vec::new());
            let mut discarded: Vec<Vec<bool>> = Vec::new();
            if let Some(rows) = &mut self.rows {
                let tolerance = ties(self.dtype, self.quantised);
                for _ in 0..images {
                    let seen = rows.see(&mut rng, tolerance, self.channel, tally)?;
                    plain.push(Tensor::from(seen.want.clone()));
                    marked.push(seen.found.clone());
                    discarded.push(seen.gone.clone());
                    seen_rows.push(seen);
                }
            } else if let Some(encoder) = &mut self.plain {
                for (want, found) in encoder.see(images, &mut rng, self.channel, tally)? {
                    discarded.push(vec![false; want.nrows()]);
                    plain.push(Tensor::from(want));
                    marked.push(found);
                }
            } else if let (true, Some((reference, run, frame))) = (images > 0, &mut self.vision) {
                let at_once = frame.at_once(images);
                for _ in 0..images / at_once {
                    let pixels = frame.pixels(at_once, &mut rng);
                    let [_, h, w] = frame.size;
                    let mask = run.takes_mask().then(|| rng.masks(at_once, h, w));
                    let (found, outputs) = match run.run_with_outputs(pixels.clone(), mask.as_ref())
                    {
                        Ok(found) => found,
                        Err(error) => {
                            reference.features(pixels, mask.as_ref(), None)?;
                            return Err(ValidateError::Rewritten(error));
                        }
                    };
                    let scores = match (outputs.get(SCORE), outputs.get(ORDER)) {
                        (Ok(scores), _) => rows_of(scores)?,
                        (_, Ok(order)) => order_of(&order.to_tensor()?.i64s()?, order.shape()[0]),
                        _ => Vec::new(),
                    };
                    let ranking = Ranking {
                        scores: &scores,
                        tolerance: ties(self.dtype, self.quantised),
                    };
                    let expected = reference.features(pixels, mask.as_ref(), Some(ranking))?;
                    tally.near_ties += expected.near_ties;
                    let each = expected.features.iter().zip(&expected.gone);
                    for ((want, gone), found) in each.zip(found) {
                        let marks = self.channel.then_some(gone.as_slice());
                        tally.features(want, &found, marks)?;
                        plain.push(Tensor::from(want.clone()));
                        marked.push(found);
                    }
                    discarded.extend(expected.gone);
                }
            } else {
                for _ in 0..images {
                    let f = Array2::from_shape_fn((self.features, self.width), |_| rng.normal());
                    plain.push(Tensor::from(f.clone()));
                    marked.push(Tensor::from(f));
                }
            }
            if self.decoder.is_none() {
                continue;
            }
            let counts: Vec<usize> = plain.iter().map(|t| t.shape()[0]).collect();
            let layout = lay_out(turn, &counts);
            let (base_embeds, run_embeds) = self.embeddings(&layout, plain, marked, &mut rng)?;
            let past = seen.clone();
            seen = ndarray::concatenate(ndarray::Axis(1), &[seen.view(), layout.mask.view()])
                .map_err(|e| ValidateError::Model(e.to_string()))?;
            let salient = Array2::from_shape_fn(layout.ids.dim(), |(r, i)| {
                self.salient
                    && layout.mask[[r, i]] == 1
                    && !layout.visual[[r, i]]
                    && (r + i) % 3 == 0
            });
            let positions = match (self.position_rows, seen_rows.is_empty()) {
                (Some(_), false) => rows::positions(turn, &layout, &seen_rows, &mut places)?,
                _ => self.positions(&layout, &past, &mut places, &counts)?,
            };
            let mut visual = self.visual_for(&layout, past.ncols());
            let gone = gone_of(&layout, &discarded);
            visual.zip_mut_with(&gone, |visual, gone| *visual &= !gone);
            let input = StepIn {
                embeds: array3(&base_embeds)?,
                mask: layout.mask.clone(),
                positions,
                visual,
                gone,
                salient,
                ids: None,
            };
            self.step(&mut state, &input, run_embeds, tally)?;
            for step in 0..scenario.decode {
                let ids = Array2::from_shape_fn((batch, 1), |(r, _)| {
                    (17 * (r + 1) + 5 * step) as i64 % self.vocabulary
                });
                let layout = Layout {
                    visual: Array2::from_elem((batch, 1), false),
                    mask: Array2::ones((batch, 1)),
                    source: Vec::new(),
                    ids,
                };
                let (base_embeds, run_embeds) =
                    self.embeddings(&layout, Vec::new(), Vec::new(), &mut rng)?;
                let positions = self.positions(&layout, &seen, &mut places, &[])?;
                seen = ndarray::concatenate(ndarray::Axis(1), &[seen.view(), layout.mask.view()])
                    .map_err(|e| ValidateError::Model(e.to_string()))?;
                let input = StepIn {
                    embeds: array3(&base_embeds)?,
                    mask: layout.mask.clone(),
                    positions,
                    visual: layout.visual.clone(),
                    gone: Array2::from_elem((batch, 1), false),
                    salient: Array2::from_elem((batch, 1), false),
                    ids: None,
                };
                self.step(&mut state, &input, run_embeds, tally)?;
            }
        }
        Ok(())
    }

    fn dtype_like(&self) -> crate::runtime::DType {
        self.decoder
            .as_ref()
            .map_or(crate::runtime::DType::F32, |(d, _)| d.dtype())
    }

    /// What the rewritten decoder takes for visual: with `marker: static` the
    /// fixed span, whatever is there.
    fn visual_for(&self, layout: &Layout, past: usize) -> Array2<bool> {
        let Some(span) = self.span else {
            return layout.visual.clone();
        };
        Array2::from_shape_fn(layout.visual.dim(), |(r, i)| {
            let inside = (span.start..span.start + span.count).contains(&(i as i64));
            past == 0 && inside && layout.mask[[r, i]] == 1
        })
    }

    fn step(
        &mut self,
        state: &mut Option<(State, crate::runtime::Cache)>,
        input: &StepIn,
        run_embeds: Tensor,
        tally: &mut Tally,
    ) -> Result<(), ValidateError> {
        let Some((reference, run)) = &mut self.decoder else {
            return Ok(());
        };
        let batch = input.mask.nrows();
        if state.is_none() {
            let empty = run.empty_cache(batch);
            let empty = empty.map_err(ValidateError::of_rewritten)?;
            *state = Some((reference.start(batch)?, empty));
        }
        let Some((ref_state, cache)) = state else {
            return Ok(());
        };
        let given = StepInput {
            embeds: Value::new(run_embeds.cast_float(reference.dtype())?)?,
            ids: None,
            mask: Some(input.mask.clone()),
            positions: Some(match self.position_rows {
                Some(_) => input.positions.clone().into(),
                None => input.positions.index_axis(Axis(0), 0).to_owned().into(),
            }),
            blocks: None,
            visual: Some(input.visual.clone()),
            salient: Some(input.salient.clone()),
        };
        let (found, kept) = match run_probed(run, &given, cache, &self.kept) {
            Ok(found) => found,
            Err(error) => {
                reference.step(ref_state, input, None)?;
                return Err(ValidateError::of_rewritten(error));
            }
        };
        let choice = Choice {
            kept: &kept,
            tolerance: ties(self.dtype, self.quantised),
        };
        let expected = reference.step(ref_state, input, Some(choice))?;
        // A prompt's own graph gives its caches out for another file to go on from.
        let given_out = reference
            .present_keys()
            .filter_map(|key| found.extra.iter().find(|(name, _)| name == key))
            .map(|(_, value)| value);
        let lengths = match (reference.has_past(), self.padded) {
            (true, false) => found.cache.lengths(),
            (true, true) => padded::held(found.cache.keys())?,
            (false, false) => given_out.map(|key| key.shape()[2]).collect(),
            (false, true) => padded::held(given_out)?,
        };
        let logits = found.last_logits().map_err(ValidateError::of_rewritten)?;
        tally.step(&expected, &logits, &kept, &lengths);
        *cache = found.cache;
        Ok(())
    }
}

/// Where a layout holds features that were discarded, given which those are of each image.
fn gone_of(layout: &Layout, discarded: &[Vec<bool>]) -> Array2<bool> {
    let mut sources = layout.source.iter();
    layout.visual.mapv(|visual| {
        let source = if visual { sources.next() } else { None };
        source.is_some_and(|(image, row)| discarded.get(*image).is_some_and(|d| d[*row]))
    })
}

/// Kept indices at every drop point, for every row.
pub(super) type Kept = Vec<Vec<Vec<usize>>>;

/// A step that also returns the kept indices at every drop point.
fn run_probed(
    decoder: &mut RunDecoder,
    input: &StepInput,
    cache: &crate::runtime::Cache,
    names: &[String],
) -> Result<(crate::runtime::StepOutput, Kept), ValidateError> {
    let output = decoder.step(input, cache)?;
    let kept = kept_of(&output.extra, names)?;
    Ok((output, kept))
}

/// The kept indices among a run's further outputs.
pub(super) fn kept_of(extra: &[(String, Value)], names: &[String]) -> Result<Kept, ValidateError> {
    let mut kept = Vec::new();
    for name in names {
        let Some(value) = extra.iter().find(|(n, _)| n == name).map(|(_, v)| v) else {
            continue;
        };
        let tensor = value.to_tensor()?;
        let width = tensor.shape().last().copied().unwrap_or(0).max(1);
        let indices = tensor.i64s()?;
        let rows = indices
            .chunks(width)
            .map(|row| row.iter().map(|i| *i as usize).collect());
        kept.push(rows.collect());
    }
    Ok(kept)
}

/// The rows of a matrix.
fn rows_of(value: &Value) -> Result<Vec<Vec<f32>>, ValidateError> {
    let width = value.shape().last().copied().unwrap_or(0).max(1);
    let all = value.f32s()?;
    Ok(all.chunks(width).map(<[f32]>::to_vec).collect())
}

/// Transformers' position ids: how many tokens came before; 0 for padding.
pub(super) fn positions_of(past: &Array2<i64>, mask: &Array2<i64>) -> Array2<i64> {
    let mut out = Array2::zeros(mask.dim());
    for (row, m) in mask.outer_iter().enumerate() {
        let mut count: i64 = past.row(row).sum();
        for (i, token) in m.iter().enumerate() {
            if *token == 1 {
                out[[row, i]] = count;
                count += 1;
            }
        }
    }
    out
}

fn cast(tensors: Vec<Tensor>, dtype: &crate::runtime::DType) -> Result<Vec<Tensor>, ValidateError> {
    let each = tensors.into_iter().map(|t| t.cast_float(*dtype));
    Ok(each.collect::<Result<_, _>>()?)
}

pub(super) fn array3(tensor: &Tensor) -> Result<Array3<f32>, ValidateError> {
    let array = tensor.to_array()?.into_dimensionality();
    array.map_err(|e| ValidateError::Model(e.to_string()))
}
