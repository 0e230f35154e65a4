//! From images and a question to an answer: the three models of a VLM put together.

mod prepare;
#[cfg(test)]
mod tests;
mod writing;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ndarray::Array2;

use super::decoder::{Cache, CacheHeads, Decoder, StepInput};
use super::embedder::Embedder;
use super::error::{Result, RuntimeError};
use super::grid::Block;
use super::image::{ImageProcessor, Packing, read_json};
use super::sampling::Sampling;
use super::session::{Session, SessionOptions};
use super::text::TextProcessor;
use super::value::Value;
use super::video::{ClipEncoder, PatchClips};
use super::vision::Vision;

pub use prepare::{Encoded, Seen};
pub(super) use prepare::{check_images, question};
pub(super) use writing::Writing;

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
    /// How the tokens of images and clips lie, in the prompt's order, for decoders that number them by that.
    /// `None` if the vision encoder does not tell.
    pub blocks: Option<Vec<Block>>,
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
    /// What the decoder gave for the prompt besides logits and cache, by name: of a model that was
    /// [opened up](super::probe).
    pub extra: Vec<(String, Value)>,
}

/// Vision encoder, embeddings, decoder, tokenizer and image processor of a model.
#[derive(Debug)]
pub struct VlmPipeline {
    /// Pixels to features.
    pub vision: Vision,
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
    /// How clips become rows of patches, if the vision encoder takes these.
    patch_clips: Option<PatchClips>,
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
        Self::open_through(files, heads, &mut |file| Session::open(file, options))
    }

    /// As [`open_with_heads`](Self::open_with_heads), each file through `open`: which may give another session for it,
    /// of a model that exists in memory only.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_through(
        files: &VlmFiles,
        heads: Option<CacheHeads>,
        open: &mut dyn FnMut(&Path) -> Result<Session>,
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
        let vision = Vision::new(open(&files.vision_encoder)?)?;
        if matches!(vision, Vision::Patches(_)) && !images.cuts_patches() {
            return Err(RuntimeError::config(
                configs,
                format!(
                    "{} takes rows of patches, and the image processor makes none; expected an \
                     image_processor_type Qwen2VLImageProcessor in preprocessor_config.json",
                    vision.session().model()
                ),
            ));
        }
        let patch_clips = match vision {
            Vision::Patches(_) => PatchClips::from_dir(configs)?,
            Vision::Images(_) => None,
        };
        Ok(Self {
            patch_clips,
            packing,
            merged: false,
            vision,
            embedder: Embedder::new(open(&files.embed_tokens)?)?,
            decoder: Decoder::with_heads(open(&files.decoder)?, heads)?,
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
    /// The graph does not give what the decoder goes on from.
    pub fn with_prompt_session(mut self, prompt: Session) -> Result<Self> {
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
        input.blocks = prepared.blocks.clone();
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
            extra: std::mem::take(&mut output.extra),
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
