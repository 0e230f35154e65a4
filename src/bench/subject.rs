//! One model, opened, and what is asked of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ndarray::{Array2, Array3, Array5};

use super::error::{BenchError, Result};
use super::head::Head;
use super::inputs::{self, row};
use super::job::{Job, LengthTime, Reply, Task, Turn};
use super::memory;
use crate::random::SplitMix64;
use crate::runtime::{
    Block, Cache, CacheHeads, DType, Decoder, Embedder, Patches, Session, SessionOptions,
    StepInput, Tensor, Value, Vision, VisionEncoder, WholeInput, WholeModel, scatter,
};
use crate::statistics::median;

/// Turns in a profile, of which the first warms up.
pub(super) const PROFILED: usize = 4;

/// A vision encoder with what it looks at.
#[derive(Debug)]
enum Eye {
    Images(VisionEncoder, Vec<Array3<f32>>),
    Clips(VisionEncoder, Tensor),
    Patches(Vision, Vec<Patches>),
}

/// What the encoder gave.
#[derive(Debug, Default)]
struct Seen {
    features: Vec<Tensor>,
    blocks: Option<Vec<Block>>,
}

/// An open model.
#[derive(Debug)]
pub struct Subject {
    job: Job,
    options: SessionOptions,
    eye: Option<Eye>,
    embedder: Option<Embedder>,
    decoder: Option<Decoder>,
    whole: Option<WholeModel>,
    head: Option<Head>,
    random: SplitMix64,
    /// Repetitions of what is short, at most.
    again: usize,
}

fn seconds(spent: Duration) -> f64 {
    spent.as_secs_f64()
}

/// What is run again takes less than this together, or is run once more; [`AGAIN`] times at most.
const ENOUGH: f64 = 0.2;
/// Repetitions at most.
const AGAIN: usize = 9;

/// Decode steps that a turn has at least, if so many are asked for, and the seconds after which these are enough.
const FEW: usize = 3;
const LONG: f64 = 0.5;

/// Runs something until it can be timed: what takes long, twice; what is short, several times. The median without the
/// first counts, which pays for caches and threads that others have used meanwhile. Gives what the last run gave.
fn timed<T>(again: usize, mut run: impl FnMut() -> Result<(T, f64)>) -> Result<(T, f64)> {
    let (mut last, first) = run()?;
    let (mut spent, mut times) = (first, Vec::new());
    while times.len() < again && (times.is_empty() || spent < ENOUGH) {
        let (found, time) = run()?;
        (last, spent) = (found, spent + time);
        times.push(time);
    }
    let time = match times.as_slice() {
        [] => first,
        warm => median(warm),
    };
    Ok((last, time))
}

impl Subject {
    /// Opens the files of a job.
    ///
    /// # Errors
    /// A file does not load or has no known interface; the size of its images is not known.
    pub fn open(job: &Job) -> Result<Self> {
        Self::open_with(job, |_| None)
    }

    /// Opens the files of a job; `profile` gives the prefix of a part's profile.
    fn open_with(job: &Job, profile: impl Fn(&str) -> Option<PathBuf>) -> Result<Self> {
        let mut random = SplitMix64::new(job.inputs.seed);
        let options = SessionOptions {
            intra_threads: job.threads,
            providers: job.providers.clone(),
            ..SessionOptions::default()
        };
        let open = |path: &Path, part: &str| {
            let options = SessionOptions {
                profile: profile(part),
                ..options.clone()
            };
            Session::open(path, &options)
        };
        let files = &job.files;
        let eye = match &files.vision {
            Some(path) => Some(Eye::open(open(path, "vision")?, job, &mut random)?),
            None => None,
        };
        let embedder = match &files.embed {
            Some(path) => Some(Embedder::new(open(path, "embed")?)?),
            None => None,
        };
        let heads = job.heads.map(|(count, width)| CacheHeads { count, width });
        let mut decoder = match &files.decoder {
            // Of two files only that of the prompt is profiled.
            Some(path) => {
                let part = match files.prompt {
                    Some(_) => "later",
                    None => "prefill",
                };
                Some(Decoder::with_heads(open(path, part)?, heads)?)
            }
            None => None,
        };
        if let Some(path) = &files.prompt
            && let Some(later) = decoder.take()
        {
            decoder = Some(later.with_prompt(open(path, "prefill")?)?);
        }
        let whole = match &files.whole {
            Some(path) => Some(WholeModel::new(open(path, "prefill")?)?),
            None => None,
        };
        if let Some(decoder) = &decoder
            && decoder.embeds().1.or(job.inputs.width).is_none()
        {
            return Err(BenchError::Input(format!(
                "{}: how wide the embeddings are is stated nowhere; expected inputs_embeds [batch, tokens, width] \
                 with a width",
                decoder.session().model()
            )));
        }
        Ok(Self {
            job: job.clone(),
            options: options.clone(),
            eye,
            embedder,
            decoder,
            whole,
            head: None,
            random,
            again: AGAIN,
        })
    }

    /// Carries out a task.
    ///
    /// # Errors
    /// A run fails; the model has not what the task is about.
    pub fn perform(&mut self, task: &Task) -> Result<Reply> {
        Ok(match task {
            Task::Turn => Reply::Turn(Box::new(self.turn()?)),
            Task::Length(tokens) => Reply::Length(self.length(*tokens)?),
            Task::Head(rows) => Reply::Head(self.head(*rows)?),
            Task::Memory => Reply::Memory(memory::peak()),
            Task::Profile(folder) => self.profile(folder)?,
        })
    }

    fn turn(&mut self) -> Result<Turn> {
        let mut turn = Turn::default();
        if self.whole.is_some() {
            self.answer_whole(&mut turn)?;
            return Ok(turn);
        }
        let seen = self.see(&mut turn)?;
        if self.decoder.is_none() && self.embedder.is_none() {
            turn.visual_tokens = seen.features.iter().map(|f| f.shape()[0]).sum();
            return Ok(turn);
        }
        let (input, visual) = self.prompt(&seen, &mut turn)?;
        turn.visual_tokens = visual;
        let again = self.again;
        let Some(decoder) = &mut self.decoder else {
            return Ok(turn);
        };
        let (first, time) = timed(again, || {
            let first = decoder.prefill(&input)?;
            let time = seconds(first.elapsed);
            Ok((first, time))
        })?;
        turn.prefill = Some(time);
        turn.logits_rows = match *first.logits.shape() {
            [_, rows, _] => rows,
            _ => 1,
        };
        turn.cache_lengths = first.cache.lengths();
        turn.cache_bytes = first.cache.bytes();
        let element = first.cache.values().first().map(|v| v.dtype().size());
        turn.cache_element = element.unwrap_or(0);
        self.decode(&first.cache, &mut turn)?;
        Ok(turn)
    }

    /// The vision encoder over all images.
    fn see(&mut self, turn: &mut Turn) -> Result<Seen> {
        let again = self.again;
        let Some(eye) = &mut self.eye else {
            return Ok(Seen::default());
        };
        let (seen, time) = timed(again, || {
            let before = eye.session().spent();
            let seen = eye.see()?;
            Ok((seen, seconds(eye.session().spent() - before)))
        })?;
        turn.vision = Some(time);
        Ok(seen)
    }

    /// Width of the decoder's embeddings, and whether the last channel is a marker.
    fn width(&self) -> (usize, bool) {
        let plain = self.job.inputs.width;
        let stated = self.decoder.as_ref().and_then(|d| d.embeds().1);
        let width = stated.or(plain).unwrap_or(1);
        (width, plain.is_some_and(|plain| width == plain + 1))
    }

    fn dtype(&self) -> DType {
        let dtype = self.decoder.as_ref().and_then(|d| d.embeds().0);
        dtype.unwrap_or(DType::F32)
    }

    /// The prompt as the decoder reads it: text, images, text.
    fn prompt(&mut self, seen: &Seen, turn: &mut Turn) -> Result<(StepInput, usize)> {
        let (width, marker) = self.width();
        let again = self.again;
        let wanted = &self.job.inputs;
        if self.eye.is_none() && self.decoder.is_some() {
            inputs::volume(&[wanted.images, wanted.features, width])?;
        }
        // Embeddings alone have no width that features could have.
        let made: Vec<Tensor> = match (&self.eye, &self.decoder) {
            (Some(_), _) | (None, None) => Vec::new(),
            (None, Some(_)) => (0..wanted.images)
                .map(|_| inputs::features(&mut self.random, wanted.features, width, marker))
                .collect::<Result<_>>()?,
        };
        let features = if self.eye.is_some() {
            &seen.features
        } else {
            &made
        };
        let visual_tokens: usize = features.iter().map(|f| f.shape()[0]).sum();
        let visual = inputs::places(wanted.text, visual_tokens)?;
        let tokens = visual.len();
        let ids = self.ids(&visual);
        let embeds = match &mut self.embedder {
            Some(embedder) => {
                let takes = embedder.takes_features();
                let given: &[Tensor] = if takes { features } else { &[] };
                let (embeds, time) = timed(again, || {
                    let before = embedder.session().spent();
                    let embeds = embedder.run_with(row(&ids), given)?;
                    Ok((embeds, seconds(embedder.session().spent() - before)))
                })?;
                turn.embed = Some(time);
                match takes || features.is_empty() {
                    true => embeds,
                    false => Value::new(scatter(embeds.to_tensor()?, &visual, features)?)?,
                }
            }
            None => {
                let dtype = self.dtype();
                let text = inputs::embeddings(&mut self.random, tokens, width, marker, dtype)?;
                Value::new(scatter(text, &visual, features)?)?
            }
        };
        turn.prompt_tokens = tokens;
        let mut input = StepInput::new(embeds);
        input.ids = Some(row(&ids));
        input.visual = Some(row(&visual));
        let near = || features.iter().map(|f| inputs::grid(f.shape()[0]).into());
        input.blocks = Some(seen.blocks.clone().unwrap_or_else(|| near().collect()));
        Ok((input, visual_tokens))
    }

    /// Ids for places, of images where `visual`.
    fn ids(&mut self, visual: &[bool]) -> Vec<i64> {
        let inputs = &self.job.inputs;
        let image = inputs.placeholder;
        let mut ids = inputs::ids(&mut self.random, visual.len(), inputs.vocabulary, image);
        for (id, visual) in ids.iter_mut().zip(visual) {
            if *visual {
                *id = image.unwrap_or(0);
            }
        }
        ids
    }

    /// Steps of one token, all on the same cache: that of the prompt. Of several the first does not count.
    fn decode(&mut self, cache: &Cache, turn: &mut Turn) -> Result<()> {
        if !self.decoder.as_ref().is_some_and(Decoder::has_cache) {
            return Ok(());
        }
        let (width, marker) = self.width();
        let dtype = self.dtype();
        let mut spent = 0.0;
        let steps = self.job.inputs.steps;
        for step in 0..steps + usize::from(steps > 1) {
            if step > FEW && spent > LONG {
                break;
            }
            let ids = self.ids(&[false]);
            let embeds = match &mut self.embedder {
                Some(embedder) => {
                    let before = embedder.session().spent();
                    let embeds = embedder.run(row(&ids))?;
                    let taken = embedder.session().spent() - before;
                    turn.decode_embed.push(seconds(taken));
                    embeds
                }
                None => Value::new(inputs::embeddings(
                    &mut self.random,
                    1,
                    width,
                    marker,
                    dtype,
                )?)?,
            };
            let mut input = StepInput::new(embeds);
            input.ids = Some(row(&ids));
            if let Some(decoder) = &mut self.decoder {
                let found = decoder.step(&input, cache)?;
                spent += seconds(found.elapsed);
                turn.decode.push(seconds(found.elapsed));
            }
        }
        for times in [&mut turn.decode, &mut turn.decode_embed] {
            if times.len() > 1 {
                times.remove(0);
            }
        }
        Ok(())
    }

    /// A prompt of text alone, and steps on its cache.
    fn length(&mut self, tokens: usize) -> Result<LengthTime> {
        let (width, marker) = self.width();
        let dtype = self.dtype();
        let embeds = inputs::embeddings(&mut self.random, tokens, width, marker, dtype)?;
        let ids = self.ids(&inputs::places([tokens, 0], 0)?);
        let again = self.again;
        let Some(decoder) = &mut self.decoder else {
            return Err(BenchError::Input(
                "the model has no decoder of its own whose prompt could be shortened".into(),
            ));
        };
        let mut input = StepInput::new(Value::new(embeds)?);
        input.ids = Some(row(&ids));
        input.blocks = Some(Vec::new());
        let (first, prefill) = timed(again, || {
            let first = decoder.prefill(&input)?;
            let time = seconds(first.elapsed);
            Ok((first, time))
        })?;
        let mut turn = Turn::default();
        self.decode(&first.cache, &mut turn)?;
        Ok(LengthTime {
            prefill,
            decode: turn.decode,
        })
    }

    fn head(&mut self, rows: usize) -> Result<f64> {
        let again = self.again;
        let head = match &mut self.head {
            Some(head) => head,
            none => {
                let files = &self.job.files;
                let Some(path) = files.prompt.as_ref().or(files.decoder.as_ref()) else {
                    return Err(BenchError::Input(
                        "the model has no decoder of its own".into(),
                    ));
                };
                none.insert(Head::open(path, &self.options)?)
            }
        };
        let random = &mut self.random;
        Ok(timed(again, || Ok(((), head.run(rows, random)?)))?.1)
    }

    /// A file that takes ids and pixels.
    fn answer_whole(&mut self, turn: &mut Turn) -> Result<()> {
        let Some(whole) = &self.whole else {
            return Ok(());
        };
        let wanted = self.job.inputs.clone();
        let name = whole.session().model().to_owned();
        let port = whole.session().inputs().iter();
        let mut port = port.filter(|p| p.dtype.is_some_and(DType::is_float) && p.dims.len() >= 4);
        let port = port.find(|p| crate::ir::cache_name(&p.name, "past").is_none());
        let Some(port) = port else {
            return Err(BenchError::Input(format!("{name}: no input of pixels")));
        };
        let size = inputs::pixel_size(port, wanted.image_size, &name)?;
        let images = whole.images().unwrap_or(wanted.images);
        let [channels, height, width] = size;
        let data = inputs::noise(&mut self.random, &[images, channels, height, width])?;
        let pixels = Tensor::new([images, channels, height, width], data)?;
        let count = images.saturating_mul(wanted.features);
        let visual = inputs::places(wanted.text, count)?;
        let tokens = visual.len();
        let ids = self.ids(&visual);
        let input = WholeInput {
            ids: row(&ids),
            pixels,
            mask: None,
            visual: Some(row(&visual)),
            salient: None,
        };
        let again = self.again;
        if let Some(whole) = &mut self.whole {
            let (output, time) = timed(again, || {
                let output = whole.run(&input)?;
                let time = seconds(output.elapsed);
                Ok((output, time))
            })?;
            turn.prefill = Some(time);
            turn.prompt_tokens = tokens;
            turn.visual_tokens = count;
            turn.logits_rows = output.logits.shape().get(1).copied().unwrap_or(1);
        }
        Ok(())
    }

    /// Turns in sessions of their own, with the profiler.
    fn profile(&mut self, folder: &Path) -> Result<Reply> {
        let mut job = self.job.clone();
        // Decode steps would be in the decoder's profile.
        job.inputs.steps = 0;
        let mut subject = Self::open_with(&job, |part| {
            ["vision", "prefill"]
                .contains(&part)
                .then(|| folder.join(part))
        })?;
        // Each part once in a turn.
        subject.again = 0;
        for _ in 0..PROFILED {
            subject.turn()?;
        }
        let vision = match &mut subject.eye {
            Some(eye) => eye.session_mut().end_profiling()?,
            None => None,
        };
        let prefill = match (&mut subject.decoder, &mut subject.whole) {
            (Some(decoder), _) => decoder.prompt_session_mut().end_profiling()?,
            (None, Some(whole)) => whole.session_mut().end_profiling()?,
            (None, None) => None,
        };
        Ok(Reply::Profile { vision, prefill })
    }
}

impl Eye {
    fn open(session: Session, job: &Job, random: &mut SplitMix64) -> Result<Self> {
        let wanted = &job.inputs;
        let name = session.model().to_owned();
        let float = |dims: usize| {
            let mut ports = session.inputs().iter();
            ports.find(|p| p.dtype.is_some_and(DType::is_float) && p.dims.len() == dims)
        };
        if job.files.clips {
            let video = session.inputs().iter().find(|p| p.name.contains("video"));
            let Some(port) = video.filter(|p| p.dims.len() == 5).or(float(5)) else {
                return Err(BenchError::Input(format!(
                    "{name}: no input of clips [clips, frames, channels, height, width]"
                )));
            };
            let [c, h, w] = inputs::pixel_size(port, wanted.image_size, &name)?;
            let frames = port.dims[1].fixed().unwrap_or(wanted.frames);
            let shape = (wanted.images, frames, c, h, w);
            let data = inputs::noise(random, &[wanted.images, frames, c, h, w])?;
            let pixels = Array5::from_shape_vec(shape, data);
            let pixels = pixels.map_err(|e| BenchError::Input(e.to_string()))?;
            return Ok(Self::Clips(
                VisionEncoder::for_clips(session)?,
                pixels.into(),
            ));
        }
        if let Some(port) = float(4).or(float(5)) {
            let size = inputs::pixel_size(port, wanted.image_size, &name)?;
            let [channels, height, width] = size;
            inputs::volume(&[wanted.images, channels, height, width])?;
            let images = (0..wanted.images).map(|_| inputs::image(random, size));
            let images = images.collect::<Result<Vec<_>>>()?;
            return Ok(Self::Images(VisionEncoder::new(session)?, images));
        }
        let patches = float(2).map(|port| (port.dims[0].fixed(), port.dims[1].fixed()));
        let vision = Vision::new(session)?;
        let Some((fixed, Some(values))) = patches else {
            return Err(BenchError::Input(format!(
                "{name}: how wide a row of patches is is not stated; expected pixel_values [patches, values] with \
                 a number for values"
            )));
        };
        let [rows, columns] = inputs::patch_grid(fixed, values, wanted.merge, wanted.image_size)?;
        inputs::volume(&[wanted.images, rows, columns, values])?;
        let images = (0..wanted.images).map(|_| {
            let data = inputs::noise(random, &[rows, columns, values])?;
            let values = Array2::from_shape_vec((rows * columns, values), data);
            Ok(Patches {
                values: values.map_err(|e| BenchError::Input(e.to_string()))?,
                grid: [1, rows, columns],
                merge: wanted.merge,
            })
        });
        let images = images.collect::<Result<_>>()?;
        Ok(Self::Patches(vision, images))
    }

    /// Runs the encoder over all it looks at.
    fn see(&mut self) -> Result<Seen> {
        Ok(match self {
            Self::Images(encoder, images) => Seen {
                features: encoder.encode(images)?,
                blocks: None,
            },
            Self::Clips(encoder, clips) => Seen {
                features: encoder.run(clips.clone())?,
                blocks: None,
            },
            Self::Patches(Vision::Patches(encoder), images) => {
                let each = images.iter().map(|patches| encoder.encode(patches));
                let each = each.collect::<std::result::Result<Vec<_>, _>>()?;
                let blocks = each.iter().map(|f| f.block.clone()).collect();
                Seen {
                    features: each.into_iter().map(|f| f.features).collect(),
                    blocks: Some(blocks),
                }
            }
            Self::Patches(Vision::Images(_), _) => Seen::default(),
        })
    }

    fn session(&self) -> &Session {
        match self {
            Self::Images(encoder, _) | Self::Clips(encoder, _) => encoder.session(),
            Self::Patches(vision, _) => vision.session(),
        }
    }

    fn session_mut(&mut self) -> &mut Session {
        match self {
            Self::Images(encoder, _) | Self::Clips(encoder, _) => encoder.session_mut(),
            Self::Patches(vision, _) => vision.session_mut(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs that take these times, in order; how many were done, and what was measured.
    fn of(again: usize, times: &[f64]) -> (usize, f64) {
        let mut done = 0;
        let (last, time) = timed(again, || {
            done += 1;
            Ok((done, times[done - 1]))
        })
        .unwrap();
        assert_eq!(last, done);
        (done, time)
    }

    #[test]
    fn everything_is_repeated_and_its_first_run_does_not_count() {
        assert_eq!(of(9, &[3.0, 2.0]), (2, 2.0));
        assert_eq!(of(9, &[0.15, 0.04, 0.02]), (3, 0.03));
        assert_eq!(of(9, &[0.001; 10]), (10, 0.001));
        assert_eq!(of(0, &[0.001]), (1, 0.001), "a profile is of single runs");
        assert!(timed(9, || Err::<((), f64), _>(BenchError::Input("no".into()))).is_err());
    }
}
