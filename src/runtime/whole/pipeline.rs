//! From images and a question to an answer, with a whole model in one file.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use ndarray::{Array2, Axis};
use serde_json::Value as Json;

use super::super::decoder::Cache;
use super::super::error::{Result, RuntimeError};
use super::super::generate::{
    GenerateOptions, Generation, Stop, Timing, Token, Writing, check_images, question,
};
use super::super::image::{ImageProcessor, Pixels, read_json};
use super::super::salient::salient_mask;
use super::super::session::{Session, SessionOptions};
use super::super::template::Message;
use super::super::tensor::{DType, Tensor};
use super::super::text::TextProcessor;
use super::{WholeInput, WholeModel};

/// A whole model with its tokenizer and image processor.
#[derive(Debug)]
pub struct WholePipeline {
    /// Ids and pixels to logits.
    pub model: WholeModel,
    /// Text to ids and back.
    pub text: TextProcessor,
    /// Images to pixels.
    pub images: ImageProcessor,
    placeholders: Placeholders,
}

/// A prompt, ready for the model.
#[derive(Debug, Clone)]
pub struct WholePrompt {
    /// The conversation as the template renders it.
    pub prompt: String,
    /// Token ids, each image placeholder repeated once for each feature.
    pub ids: Vec<u32>,
    /// True at image features.
    pub visual: Vec<bool>,
    /// True at salient tokens of the question, and at the last token.
    pub salient: Vec<bool>,
    /// `[images, channels, height, width]`; something of the right size where there is no image, since the model
    /// takes pixels always.
    pub pixels: Tensor,
}

impl WholePipeline {
    /// Opens the model and reads the configurations in `configs`.
    ///
    /// # Errors
    /// A file is missing, does not load, or does not have the interface of its part.
    pub fn open(model: &Path, configs: &Path, options: &SessionOptions) -> Result<Self> {
        Self::open_through(model, configs, &mut |file| Session::open(file, options))
    }

    /// The same, the file through `open`: which may give another session for it, of a model that exists in memory
    /// only.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_through(
        model: &Path,
        configs: &Path,
        open: &mut dyn FnMut(&Path) -> Result<Session>,
    ) -> Result<Self> {
        Ok(Self {
            text: TextProcessor::from_dir(configs)?,
            images: ImageProcessor::from_dir(configs)?,
            placeholders: Placeholders::from_dir(configs, model)?,
            model: WholeModel::new(open(model)?)?,
        })
    }

    /// Prepares a conversation for the model's answer. `images` are those of all messages, in order.
    ///
    /// # Errors
    /// The template fails, the images do not match the conversation or the model, or the number of placeholders of
    /// an image is not said.
    pub fn prepare(&self, messages: &[Message], images: &[Pixels]) -> Result<WholePrompt> {
        check_images(messages, images.len())?;
        let prompt = self.text.render(messages)?;
        let question = question(&prompt, messages);
        let (pixels, counts) = self.pixels(images)?;
        let encoded = self.text.encode(&prompt)?;
        let salient = salient_mask(&prompt, &encoded.offsets, question);
        let expanded = self.text.expand(&encoded.ids, &counts)?;
        Ok(WholePrompt {
            prompt,
            salient: expanded.source.iter().map(|&at| salient[at]).collect(),
            ids: expanded.ids,
            visual: expanded.visual,
            pixels,
        })
    }

    /// Pixels for the model, and the number of placeholders of each image.
    fn pixels(&self, images: &[Pixels]) -> Result<(Tensor, Vec<usize>)> {
        let fixed = self.model.images();
        if let Some(takes) = fixed.filter(|&n| n != images.len() && !images.is_empty()) {
            return Err(RuntimeError::Prompt(format!(
                "{} takes {takes} image(s), {} are given",
                self.model.session().model(),
                images.len()
            )));
        }
        let mut prepared = Vec::with_capacity(images.len());
        let mut counts = Vec::with_capacity(images.len());
        if self.images.any_resolution() && !images.is_empty() {
            return Err(RuntimeError::Prompt(format!(
                "{} is one file, and images of any resolution (several crops of each) are prepared for models with \
                 a vision encoder of their own only; export vision encoder, embeddings and decoder apart",
                self.model.session().model()
            )));
        }
        for image in images {
            let pixels = self.images.process(image)?;
            let (_, height, width) = pixels.dim();
            counts.push(self.placeholders.count(height, width)?);
            prepared.push(pixels);
        }
        if prepared.is_empty() {
            let [channels, height, width] = self.model.image_size();
            let size = height.zip(width).or(self.images.output_size());
            let Some((height, width)) = size else {
                return Err(RuntimeError::Prompt(format!(
                    "{} takes pixels always, and neither it nor the image processor says of what size they are \
                     when there is no image",
                    self.model.session().model()
                )));
            };
            let shape = [fixed.unwrap_or(1), channels.unwrap_or(3), height, width];
            return Ok((Tensor::zeros(DType::F32, shape)?, counts));
        }
        let views: Vec<_> = prepared.iter().map(|image| image.view()).collect();
        let stacked = ndarray::stack(Axis(0), &views).map_err(|e| {
            RuntimeError::Prompt(format!(
                "a whole model takes all images at once, so they need one size after preparation: {e}"
            ))
        })?;
        Ok((stacked.into(), counts))
    }

    /// Answers a prepared prompt. `on_token` sees each token as it is chosen and may end the answer. Every token
    /// takes a run over everything before it.
    ///
    /// # Errors
    /// A run fails, or the logits hold NaN.
    pub fn generate(
        &mut self,
        prompt: &WholePrompt,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&Token) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let tokens = prompt.ids.len();
        let mut generation = Generation {
            text: String::new(),
            tokens: Vec::new(),
            stop: Stop::Length,
            prompt_tokens: tokens,
            visual_tokens: prompt.visual.iter().filter(|v| **v).count(),
            cache_lengths: Vec::new(),
            cache_bytes: 0,
            timing: Timing::default(),
            prompt: prompt.prompt.clone(),
            cache: Cache::none(tokens),
            extra: Vec::new(),
        };
        let model = self.model.session().model().to_string();
        let mut writing = Writing::new(&self.text, options, model);
        loop {
            // The answer so far is text: neither visual nor a question's word.
            let written = &generation.tokens;
            let all = tokens + written.len();
            let row = |flags: &[bool]| {
                Array2::from_shape_fn((1, all), |(_, i)| flags.get(i).copied().unwrap_or(false))
            };
            let ids = prompt.ids.iter().chain(written).map(|id| i64::from(*id));
            let ids = Array2::from_shape_vec((1, all), ids.collect())
                .map_err(|e| RuntimeError::Tensor(e.to_string()))?;
            let input = WholeInput {
                ids,
                pixels: prompt.pixels.clone(),
                mask: None,
                visual: Some(row(&prompt.visual)),
                salient: options.salient.then(|| row(&prompt.salient)),
            };
            let start = Instant::now();
            let mut output = self.model.run(&input)?;
            let elapsed = start.elapsed();
            match generation.tokens.len() {
                0 => {
                    generation.timing.prefill = elapsed;
                    output
                        .extra
                        .retain(|(name, _)| !name.starts_with("present."));
                    generation.extra = std::mem::take(&mut output.extra);
                }
                _ => generation.timing.decode.push(elapsed),
            }
            if writing
                .next(&mut generation, &output.last_logits()?, on_token)?
                .is_none()
            {
                break;
            }
        }
        writing.finish(&mut generation)?;
        generation.timing.vision = Duration::ZERO;
        generation.cache = Cache::none(tokens + generation.tokens.len().saturating_sub(1));
        Ok(generation)
    }
}

/// How many placeholders an image has in a prompt, as the processor's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Placeholders {
    /// LLaVA's rule: ⌊h / patch⌋ · ⌊w / patch⌋ + more.
    Grid { patch: usize, more: i64 },
    /// Stated.
    Fixed(usize),
    /// Not said.
    Unknown,
}

impl Placeholders {
    /// Of `model`, from the configurations of `dir`. A file that was written beside its original has patched
    /// ones beside the originals as well, under the same suffix.
    fn from_dir(dir: &Path, model: &Path) -> Result<Self> {
        let stem = model.file_stem().unwrap_or_default().to_string_lossy();
        let suffixes: Vec<&str> = stem.match_indices('_').map(|(i, _)| &stem[i..]).collect();
        let config = |name: &str| {
            let patched = suffixes.iter().map(|s| dir.join(format!("{name}{s}.json")));
            let mut there = patched.filter(|p| p.is_file());
            read_json(
                &there
                    .next()
                    .unwrap_or_else(|| dir.join(format!("{name}.json"))),
            )
        };
        let (processor, model) = (config("processor_config")?, config("config")?);
        Ok(Self::of(processor.as_ref(), model.as_ref()))
    }

    fn of(processor: Option<&Json>, model: Option<&Json>) -> Self {
        let int = |config: Option<&Json>, key: &str| config?.get(key)?.as_i64();
        let patch = int(processor, "patch_size").and_then(|p| usize::try_from(p).ok());
        if let Some(patch) = patch.filter(|p| *p > 0) {
            let strategy = processor.and_then(|p| p.get("vision_feature_select_strategy"));
            let without_cls = strategy.and_then(Json::as_str) == Some("default");
            let more = int(processor, "num_additional_image_tokens").unwrap_or(0);
            return Self::Grid {
                patch,
                more: more - i64::from(without_cls),
            };
        }
        let stated = int(processor, "image_seq_length").or(int(model, "image_seq_length"));
        match stated.and_then(|n| usize::try_from(n).ok()) {
            Some(count) => Self::Fixed(count),
            None => Self::Unknown,
        }
    }

    fn count(&self, height: usize, width: usize) -> Result<usize> {
        let none = || {
            RuntimeError::Prompt(
                "how many placeholders an image has is not said: expected patch_size and \
                 num_additional_image_tokens, or image_seq_length, in processor_config.json"
                    .into(),
            )
        };
        match *self {
            Self::Grid { patch, more } => {
                let grid = (height / patch) * (width / patch);
                let count = i64::try_from(grid).ok().and_then(|g| g.checked_add(more));
                count.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
                    RuntimeError::Prompt(format!(
                        "an image of {width}×{height} has {grid} patches and {more} more placeholders in \
                         processor_config.json: less than none"
                    ))
                })
            }
            Self::Fixed(count) => Ok(count),
            Self::Unknown => Err(none()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_follow_the_processor() {
        let json = |text: &str| serde_json::from_str::<Json>(text).unwrap();
        let of = |text: &str| Placeholders::of(Some(&json(text)), None);
        let llava = r#"{"patch_size": 14, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default"}"#;
        assert_eq!(of(llava).count(126, 126).unwrap(), 81);
        let merged = r#"{"patch_size": 14, "num_additional_image_tokens": -45,
            "vision_feature_select_strategy": "full"}"#;
        assert_eq!(of(merged).count(126, 126).unwrap(), 36);
        assert_eq!(of(r#"{"image_seq_length": 64}"#).count(9, 9).unwrap(), 64);
        let few = of(merged).count(14, 14).unwrap_err().to_string();
        assert!(few.contains("less than none"), "{few}");
        let none = of("{}").count(14, 14).unwrap_err().to_string();
        assert!(none.contains("image_seq_length"), "{none}");
    }
}
