//! From images and a question to an answer: the three models of a VLM put together.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ndarray::Array2;

use super::decoder::{Cache, CacheHeads, Decoder, StepInput};
use super::error::{Result, RuntimeError};
use super::image::{ImageProcessor, Packing, Pixels, concatenate, read_json};
use super::salient::salient_mask;
use super::sampling::{Sampler, Sampling};
use super::session::{Session, SessionOptions};
use super::template::Message;
use super::tensor::Tensor;
use super::text::{Detokenizer, ImageToken, TextProcessor};
use super::value::Value;
use super::video::ClipEncoder;
use super::vision::{Embedder, VisionEncoder, scatter};

/// Where the parts of a model are.
#[derive(Debug, Clone)]
pub struct VlmFiles {
    /// `vision_encoder.onnx`
    pub vision_encoder: PathBuf,
    /// `embed_tokens.onnx`
    pub embed_tokens: PathBuf,
    /// `decoder_model_merged.onnx`
    pub decoder: PathBuf,
    /// Directory of `tokenizer.json`, `preprocessor_config.json`, `config.json`, …
    pub configs: PathBuf,
}

/// How an answer is made.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Goes on after an end-of-sequence token, so that two models can be timed over the same number of steps.
    pub ignore_eos: bool,
    /// Tells decoders with an input `salient_token_mask` which tokens of the question are salient; otherwise
    /// they are told that none is.
    pub salient: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::Greedy,
            ignore_eos: false,
            salient: true,
        }
    }
}

/// A prompt, ready for the decoder.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The conversation as the template renders it.
    pub prompt: String,
    /// Token ids of this turn, each image placeholder repeated once for each feature.
    pub ids: Vec<u32>,
    /// True at image features.
    pub visual: Vec<bool>,
    /// True at salient tokens of the question, and at the last token.
    pub salient: Vec<bool>,
    /// `[1, tokens, width]`.
    pub embeds: Value,
    /// Number of features of each image or clip, in the prompt's order.
    pub features_per_image: Vec<usize>,
    /// Time of the vision encoder.
    pub vision_time: Duration,
    /// Time of the embeddings, scattering included.
    pub embed_time: Duration,
}

/// How long the parts took.
#[derive(Debug, Clone, Default)]
pub struct Timing {
    /// Vision encoder.
    pub vision: Duration,
    /// Embeddings of the prompt.
    pub embed: Duration,
    /// The decoder's run over the prompt.
    pub prefill: Duration,
    /// Each further token: embedding and decoder.
    pub decode: Vec<Duration>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An end-of-sequence token.
    Eos,
    /// As many tokens as asked for.
    Length,
    /// The caller wanted no more.
    Caller,
}

/// One token of an answer, as it is streamed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that is certain now; may be empty.
    pub text: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The text, without special tokens.
    pub text: String,
    /// The tokens, an end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// Tokens of this turn's prompt, image features included.
    pub prompt_tokens: usize,
    /// Image features among them.
    pub visual_tokens: usize,
    /// Length of each layer's cache after prefill.
    pub cache_lengths: Vec<usize>,
    /// Bytes of the cache after prefill.
    pub cache_bytes: usize,
    /// How long the parts took.
    pub timing: Timing,
    /// The conversation as it was rendered for this turn.
    pub prompt: String,
    /// Cache of everything but the last token, for another turn.
    pub cache: Cache,
}

/// Vision encoder, embeddings, decoder, tokenizer and image processor of a model.
#[derive(Debug)]
pub struct VlmPipeline {
    /// Pixels to features.
    pub vision: VisionEncoder,
    /// Ids to embeddings.
    pub embedder: Embedder,
    /// Embeddings to logits.
    pub decoder: Decoder,
    /// Text to ids and back.
    pub text: TextProcessor,
    /// Images to pixels.
    pub images: ImageProcessor,
    /// How the crops of images of any resolution become tokens.
    packing: Option<Packing>,
    /// Whether the encoder gives merged tokens, of which no grid can be laid out.
    merged: bool,
    /// What sees clips, if the model has that.
    pub clips: Option<ClipEncoder>,
}

impl VlmPipeline {
    /// Opens the models and reads the configurations.
    ///
    /// # Errors
    /// A file is missing, does not load, or does not have the interface of its part.
    pub fn open(files: &VlmFiles, options: &SessionOptions) -> Result<Self> {
        Self::open_with_heads(files, options, None)
    }

    /// As [`open`](Self::open), with the heads of a cache that the decoder does not declare.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_heads(
        files: &VlmFiles,
        options: &SessionOptions,
        heads: Option<CacheHeads>,
    ) -> Result<Self> {
        let configs: &Path = &files.configs;
        // The cheap and most often wrong parts first.
        let text = TextProcessor::from_dir(configs)?;
        let images = ImageProcessor::from_dir(configs)?;
        let path = configs.join("config.json");
        let packing = match read_json(&path)?.filter(|_| images.any_resolution()) {
            Some(config) => Packing::from_json(&config, &path)?,
            None => None,
        };
        if images.any_resolution() && packing.is_none() {
            return Err(RuntimeError::config(
                &path,
                "is missing or has no `image_grid_pinpoints`, which the image processor's crops need",
            ));
        }
        Ok(Self {
            packing,
            merged: false,
            vision: VisionEncoder::new(Session::open(&files.vision_encoder, options)?)?,
            embedder: Embedder::new(Session::open(&files.embed_tokens, options)?)?,
            decoder: Decoder::with_heads(Session::open(&files.decoder, options)?, heads)?,
            text,
            images,
            clips: None,
        })
    }

    /// Adds what sees clips.
    #[must_use]
    pub fn with_clips(mut self, clips: ClipEncoder) -> Self {
        self.clips = Some(clips);
        self
    }

    /// Adds the decoder graph that runs over a prompt, where the model's decoder only goes on from a cache.
    ///
    /// # Errors
    /// The file does not load, or does not give what the decoder goes on from.
    pub fn with_prompt_decoder(mut self, file: &Path, options: &SessionOptions) -> Result<Self> {
        let prompt = Session::open(file, options)?;
        self.decoder = self.decoder.with_prompt(prompt)?;
        Ok(self)
    }

    /// Says that the vision encoder merges the tokens of each crop: the crops of an image of any resolution then
    /// follow each other, the base crop first, without newline tokens.
    #[must_use]
    pub fn with_merged_crops(mut self, merged: bool) -> Self {
        self.merged = merged;
        self
    }

    /// Features of images, one tensor `[features, width]` each: for images of any resolution those of all crops,
    /// put together as the model was trained with them, or one after the other where they are merged.
    ///
    /// # Errors
    /// An image cannot be resized, or the run fails.
    pub fn encode_images(&mut self, images: &[Pixels]) -> Result<Vec<Tensor>> {
        let mut counts = Vec::with_capacity(images.len());
        let mut pixels = Vec::with_capacity(images.len());
        for image in images {
            let crops = self.images.crops(image)?;
            counts.push(crops.len());
            pixels.extend(crops);
        }
        let features = self.vision.encode(&pixels)?;
        let Some(packing) = &self.packing else {
            return Ok(features);
        };
        let mut rest = features.as_slice();
        let mut together = Vec::with_capacity(images.len());
        for (image, count) in images.iter().zip(counts) {
            let (own, others) = rest.split_at(count);
            rest = others;
            together.push(match self.merged {
                true => concatenate(own)?,
                false => packing.pack(own, (image.height(), image.width()))?,
            });
        }
        Ok(together)
    }

    /// Prepares a conversation for the model's answer. `images` are those of all messages, in order.
    ///
    /// # Errors
    /// The template fails, the images do not match the conversation, or a run fails.
    pub fn prepare(&mut self, messages: &[Message], images: &[Pixels]) -> Result<Prepared> {
        self.prepare_with_clips(messages, images, &[])
    }

    /// The same with clips, each given as its frames; `clips` are those of all messages, in order.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare); there are clips and the model sees none.
    pub fn prepare_with_clips(
        &mut self,
        messages: &[Message],
        images: &[Pixels],
        clips: &[Vec<Pixels>],
    ) -> Result<Prepared> {
        check_images(messages, images.len())?;
        let mentioned: usize = messages.iter().map(Message::clips).sum();
        if mentioned != clips.len() {
            return Err(RuntimeError::Prompt(format!(
                "the conversation mentions {mentioned} clips, {} are given",
                clips.len()
            )));
        }
        let prompt = self.text.render(messages)?;
        let question = question(&prompt, messages);
        self.prepare_all(prompt, question, images, clips)
    }

    /// Prepares a prompt that is written out already, with one placeholder for each image. `question` is the
    /// byte range of the user's words, where salient tokens are looked for.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn prepare_prompt(
        &mut self,
        prompt: String,
        question: Range<usize>,
        images: &[Pixels],
    ) -> Result<Prepared> {
        self.prepare_all(prompt, question, images, &[])
    }

    fn prepare_all(
        &mut self,
        prompt: String,
        question: Range<usize>,
        images: &[Pixels],
        clips: &[Vec<Pixels>],
    ) -> Result<Prepared> {
        let start = Instant::now();
        let features = self.see(images, clips)?;
        let vision_time = start.elapsed();
        let encoded = self.text.encode(&prompt)?;
        let salient = salient_mask(&prompt, &encoded.offsets, question);
        self.assemble(prompt, encoded.ids, salient, features, vision_time)
    }

    /// Features of images and clips.
    fn see(&mut self, images: &[Pixels], clips: &[Vec<Pixels>]) -> Result<Seen> {
        let images = self.encode_images(images)?;
        let clips = match (clips, &mut self.clips) {
            ([], _) => Vec::new(),
            (clips, Some(encoder)) => encoder.encode(clips)?,
            (_, None) => {
                return Err(RuntimeError::Prompt(
                    "the model has no encoder of clips (pixels of rank 5)".into(),
                ));
            }
        };
        Ok(Seen { images, clips })
    }

    /// Prepares another turn on the cache of an answer. `messages` is the whole conversation, with the answer
    /// and the new question; `images` are the new question's.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), or the conversation does not begin with what was answered.
    pub fn prepare_follow_up(
        &mut self,
        previous: &Generation,
        messages: &[Message],
        images: &[Pixels],
    ) -> Result<Prepared> {
        self.prepare_follow_up_with_clips(previous, messages, images, &[])
    }

    /// The same with clips, each given as its frames; `clips` are the new question's.
    ///
    /// # Errors
    /// As [`prepare_follow_up`](Self::prepare_follow_up); there are clips and the model sees none.
    pub fn prepare_follow_up_with_clips(
        &mut self,
        previous: &Generation,
        messages: &[Message],
        images: &[Pixels],
        clips: &[Vec<Pixels>],
    ) -> Result<Prepared> {
        let last = messages.last();
        for (what, mentioned, given) in [
            ("images", last.map_or(0, Message::images), images.len()),
            ("clips", last.map_or(0, Message::clips), clips.len()),
        ] {
            if mentioned != given {
                return Err(RuntimeError::Prompt(format!(
                    "the new question mentions {mentioned} {what}, {given} are given"
                )));
            }
        }
        let prompt = self.text.render(messages)?;
        let answer = previous.text.trim();
        let begun = prompt
            .strip_prefix(previous.prompt.as_str())
            .and_then(|rest| rest.trim_start().strip_prefix(answer))
            .ok_or_else(|| {
                RuntimeError::Prompt(format!(
                    "the conversation does not go on from the previous turn: expected it to begin \
                     with the previous prompt and the answer {answer:?}"
                ))
            })?;
        let from = prompt.len() - begun.len();
        let question = question(&prompt, messages);
        let question = question.start.max(from) - from..question.end.max(from) - from;

        let start = Instant::now();
        let features = self.see(images, clips)?;
        let vision_time = start.elapsed();
        let encoded = self.text.encode_raw(begun, false)?;
        let mut salient = salient_mask(begun, &encoded.offsets, question);
        let mut ids = encoded.ids;
        // The last token of an answer is chosen but never run, so the cache lacks it. The template decides
        // whether an end-of-sequence token belongs between the turns.
        let last = previous
            .tokens
            .last()
            .filter(|_| previous.stop != Stop::Eos);
        if let Some(&last) = last {
            ids.insert(0, last);
            salient.insert(0, false);
        }
        self.assemble(prompt, ids, salient, features, vision_time)
    }

    /// Expands the placeholders, embeds, and puts the features in.
    fn assemble(
        &mut self,
        prompt: String,
        ids: Vec<u32>,
        salient: Vec<bool>,
        features: Seen,
        vision_time: Duration,
    ) -> Result<Prepared> {
        let rows = |of: &[Tensor]| of.iter().map(|f| f.shape()[0]).collect::<Vec<usize>>();
        let (images, clips) = (rows(&features.images), rows(&features.clips));
        let expanded = self.text.expand_both(&ids, &images, &clips)?;
        let id = |token: Option<&ImageToken>| token.map(|t| t.id);
        let tokens = (id(self.text.image_token()), id(self.text.video_token()));
        let features = features.in_order(&ids, tokens.0, tokens.1);
        let features_per_image = rows(&features);
        let salient = expanded
            .source
            .iter()
            .map(|&place| salient[place])
            .collect();
        let start = Instant::now();
        let embeds = if self.embedder.takes_features() {
            let ids =
                Array2::from_shape_fn((1, expanded.ids.len()), |(_, i)| i64::from(expanded.ids[i]));
            self.embedder.run_with(ids, &features)?
        } else {
            let embeds = self.embedder.run_row(&expanded.ids)?;
            match features.as_slice() {
                [] => embeds,
                some => Value::new(scatter(embeds.to_tensor()?, &expanded.visual, some)?)?,
            }
        };
        Ok(Prepared {
            prompt,
            ids: expanded.ids,
            visual: expanded.visual,
            salient,
            embeds,
            features_per_image,
            vision_time,
            embed_time: start.elapsed(),
        })
    }

    /// Answers a prepared prompt, on an empty cache or on that of an earlier turn. `on_token` sees each token as
    /// it is chosen and may end the answer.
    ///
    /// # Errors
    /// A run fails, or the logits hold NaN.
    pub fn generate(
        &mut self,
        prepared: &Prepared,
        cache: Option<&Cache>,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&Token) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let tokens = prepared.ids.len();
        let row = |flags: &[bool]| Array2::from_shape_fn((1, tokens), |(_, i)| flags[i]);
        let mut input = StepInput::new(prepared.embeds.clone());
        input.ids = Some(Array2::from_shape_fn((1, tokens), |(_, i)| {
            prepared.ids[i].into()
        }));
        input.visual = Some(row(&prepared.visual));
        input.salient = options.salient.then(|| row(&prepared.salient));

        let mut output = match cache {
            Some(cache) => self.decoder.step(&input, cache)?,
            None => self.decoder.prefill(&input)?,
        };
        let mut generation = Generation {
            text: String::new(),
            tokens: Vec::new(),
            stop: Stop::Length,
            prompt_tokens: tokens,
            visual_tokens: prepared.visual.iter().filter(|v| **v).count(),
            cache_lengths: output.cache.lengths(),
            cache_bytes: output.cache.bytes(),
            timing: Timing {
                vision: prepared.vision_time,
                embed: prepared.embed_time,
                prefill: output.elapsed,
                decode: Vec::new(),
            },
            prompt: prepared.prompt.clone(),
            cache: output.cache.clone(),
        };
        let model = self.decoder.session().model().to_string();
        let mut writing = Writing::new(&self.text, options, model);
        while let Some(id) = writing.next(&mut generation, &output.last_logits()?, on_token)? {
            if !self.decoder.has_cache() {
                return Err(RuntimeError::Interface {
                    model: self.decoder.session().model().to_string(),
                    expected: "a decoder with a cache (past_key_values.*), to generate more than \
                               one token"
                        .into(),
                    found: "a decoder without".into(),
                });
            }
            let start = Instant::now();
            let mut input = StepInput::new(self.embedder.run_row(&[id])?);
            input.ids = Some(Array2::from_elem((1, 1), id.into()));
            output = self.decoder.step(&input, &generation.cache)?;
            generation.cache = output.cache.clone();
            generation.timing.decode.push(start.elapsed());
        }
        writing.finish(&mut generation)?;
        Ok(generation)
    }
}

/// Features of the images and clips of a prompt.
struct Seen {
    images: Vec<Tensor>,
    clips: Vec<Tensor>,
}

impl Seen {
    /// All of them in the order in which the prompt has their placeholders.
    fn in_order(self, ids: &[u32], image: Option<u32>, clip: Option<u32>) -> Vec<Tensor> {
        if self.clips.is_empty() {
            return self.images;
        }
        let count = self.images.len() + self.clips.len();
        let (mut images, mut clips) = (self.images.into_iter(), self.clips.into_iter());
        let mut all = Vec::with_capacity(count);
        for id in ids {
            if Some(*id) == clip {
                all.extend(clips.next());
            } else if Some(*id) == image {
                all.extend(images.next());
            }
        }
        all
    }
}

/// Chooses the tokens of an answer, one after the other, and writes them down.
pub(super) struct Writing<'a> {
    text: &'a TextProcessor,
    options: &'a GenerateOptions,
    /// For messages.
    model: String,
    sampler: Sampler,
    detokenizer: Detokenizer,
}

impl<'a> Writing<'a> {
    /// Nothing is written yet.
    pub(super) fn new(
        text: &'a TextProcessor,
        options: &'a GenerateOptions,
        model: String,
    ) -> Self {
        Self {
            text,
            options,
            model,
            sampler: Sampler::new(options.sampling),
            detokenizer: Detokenizer::new(),
        }
    }

    /// Chooses the next token from logits `[1, vocabulary]`. `None` if the answer ends with it, or had ended.
    ///
    /// # Errors
    /// The logits hold NaN, or the tokenizer fails.
    pub(super) fn next(
        &mut self,
        generation: &mut Generation,
        logits: &Array2<f32>,
        on_token: &mut dyn FnMut(&Token) -> ControlFlow<()>,
    ) -> Result<Option<u32>> {
        let step = generation.tokens.len();
        if step >= self.options.max_new_tokens {
            return Ok(None);
        }
        let not_a_number = || RuntimeError::NotANumber {
            model: self.model.clone(),
            step,
            row: 0,
        };
        let logits = logits.as_slice().ok_or_else(not_a_number)?;
        let id = self.sampler.pick(logits).ok_or_else(not_a_number)? as u32;
        let text = self.detokenizer.push(self.text, id)?;
        generation.text.push_str(&text);
        generation.tokens.push(id);
        let flow = on_token(&Token { id, text });
        if !self.options.ignore_eos && self.text.eos_ids().contains(&id) {
            generation.stop = Stop::Eos;
            return Ok(None);
        }
        if flow.is_break() {
            generation.stop = Stop::Caller;
            return Ok(None);
        }
        Ok((step + 1 < self.options.max_new_tokens).then_some(id))
    }

    /// Writes what was held back.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub(super) fn finish(mut self, generation: &mut Generation) -> Result<()> {
        generation
            .text
            .push_str(&self.detokenizer.finish(self.text)?);
        Ok(())
    }
}

pub(super) fn check_images(messages: &[Message], images: usize) -> Result<()> {
    let mentioned: usize = messages.iter().map(Message::images).sum();
    if mentioned == images {
        return Ok(());
    }
    Err(RuntimeError::Prompt(format!(
        "the conversation mentions {mentioned} images, {images} are given"
    )))
}

/// Where the last message's words are in the rendered prompt; everything if a template changes them.
pub(super) fn question(prompt: &str, messages: &[Message]) -> Range<usize> {
    let texts = messages.last().map(Message::texts).unwrap_or_default();
    let first = texts
        .iter()
        .map(|text| text.trim())
        .find(|text| !text.is_empty());
    let last = texts
        .iter()
        .rev()
        .map(|text| text.trim())
        .find(|text| !text.is_empty());
    let (Some(first), Some(last)) = (first, last) else {
        return 0..0;
    };
    match prompt.rfind(last) {
        Some(at) => {
            let end = at + last.len();
            let start = if first == last {
                at
            } else {
                prompt[..at].rfind(first).unwrap_or(at)
            };
            start..end
        }
        None => 0..prompt.len(),
    }
}

#[cfg(test)]
mod tests;
