//! A conversation and its images made ready for the decoder.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use ndarray::Array2;

use super::{Generation, Prepared, Stop, VlmPipeline};
use crate::runtime::error::{Result, RuntimeError};
use crate::runtime::grid::Block;
use crate::runtime::image::{Pixels, Slot, concatenate};
use crate::runtime::salient::salient_mask;
use crate::runtime::template::Message;
use crate::runtime::tensor::Tensor;
use crate::runtime::text::ImageToken;
use crate::runtime::value::Value;
use crate::runtime::video::{self, Clip};
use crate::runtime::vision::{Inside, PatchFeatures, Vision, scatter};

impl VlmPipeline {
    /// Features of images, one tensor `[features, width]` each: for images of any resolution those of all crops,
    /// put together as the model was trained with them, or one after the other where they are merged.
    ///
    /// # Errors
    /// An image cannot be resized, or the run fails.
    pub fn encode_images(&mut self, images: &[Pixels]) -> Result<Vec<Tensor>> {
        Ok(self.see(images)?.into_iter().map(|s| s.features).collect())
    }

    fn see(&mut self, images: &[Pixels]) -> Result<Vec<Seen>> {
        let encoder = match &mut self.vision {
            Vision::Images(encoder) => encoder,
            Vision::Patches(encoder) => {
                let each = images.iter().map(|image| {
                    let patches = self.images.patches(std::slice::from_ref(image))?;
                    Ok(encoder.encode(&patches)?.into())
                });
                return each.collect();
            }
        };
        let mut counts = Vec::with_capacity(images.len());
        let mut pixels = Vec::with_capacity(images.len());
        for image in images {
            let crops = self.images.crops(image)?;
            counts.push(crops.len());
            pixels.extend(crops);
        }
        let encoded = encoder.encode_inside(&pixels)?;
        let Some(packing) = &self.packing else {
            return Ok(encoded.into_iter().map(Seen::from).collect());
        };
        let (features, mut inside): (Vec<Tensor>, Vec<Inside>) = encoded.into_iter().unzip();
        let mut rest = features.as_slice();
        let mut together = Vec::with_capacity(images.len());
        for (image, count) in images.iter().zip(counts) {
            let (own, others) = rest.split_at(count);
            rest = others;
            let features = match self.merged {
                true => concatenate(own)?,
                false => packing.pack(own, (image.height(), image.width()))?,
            };
            together.push(Seen {
                features,
                block: None,
                inside: inside.drain(..count).collect(),
            });
        }
        Ok(together)
    }

    /// Where the tokens of an image lie among its crops, in the prompt's order, if crops are packed; else they follow
    /// each other.
    ///
    /// # Errors
    /// The image's crops have no tokens.
    pub fn slots(&self, image: &Pixels) -> Result<Option<Vec<Slot>>> {
        let packing = self.packing.as_ref().filter(|_| !self.merged);
        let Some(packing) = packing else {
            return Ok(None);
        };
        let size = (image.height(), image.width());
        let crops = self.images.crop_count(size.0, size.1);
        Ok(Some(packing.slots(crops, size)?))
    }

    /// The frames of a clip as the encoder sees them, before they become numbers, and how many of them make one frame
    /// of tokens.
    ///
    /// # Errors
    /// The model sees no clips, or a frame cannot be resized.
    pub fn fit_clip(&self, clip: &Clip) -> Result<(Vec<Pixels>, usize)> {
        let processor = match (&self.clips, &self.patch_clips) {
            (Some(encoder), _) => &encoder.processor.images,
            (None, Some(clips)) => &clips.processor.images,
            (None, None) => return Err(no_clips()),
        };
        let frames = clip.frames.iter().map(|frame| processor.fit(frame));
        let frames = frames.collect::<Result<_>>()?;
        Ok((frames, processor.moments().unwrap_or(1)))
    }

    /// The frames of a clip that the model is to see; `usual` of them, where neither it nor its configuration says
    /// how many.
    ///
    /// # Errors
    /// The model sees no clips, or the file cannot be read.
    pub fn take_clip(&self, path: impl AsRef<Path>, usual: usize) -> Result<Clip> {
        match (&self.clips, &self.patch_clips) {
            (Some(encoder), _) => {
                let frames = encoder.frames(usual);
                video::take(path, &|total, _| video::even_steps(total, frames))
            }
            (None, Some(clips)) => {
                video::take(path, &|total, seconds| clips.choose(total, seconds))
            }
            (None, None) => Err(no_clips()),
        }
    }

    fn see_clips(&mut self, clips: &[Clip]) -> Result<Vec<Seen>> {
        if clips.is_empty() {
            return Ok(Vec::new());
        }
        match (&mut self.clips, &self.patch_clips, &mut self.vision) {
            (Some(encoder), _, _) => {
                let encoded = encoder.encode_inside(clips)?;
                Ok(encoded.into_iter().map(Seen::from).collect())
            }
            (None, Some(how), Vision::Patches(encoder)) => {
                let each = clips.iter().map(|clip| {
                    let mut found = encoder.encode(&how.patches(clip)?)?;
                    found.block = how.timed(found.block, clip);
                    Ok(found.into())
                });
                each.collect()
            }
            _ => Err(no_clips()),
        }
    }

    /// Prepares a conversation for the model's answer. `images` are those of all messages, in order.
    ///
    /// # Errors
    /// The template fails, the images do not match the conversation, or a run fails.
    pub fn prepare(&mut self, messages: &[Message], images: &[Pixels]) -> Result<Prepared> {
        self.prepare_with_clips(messages, images, &[])
    }

    /// The same with clips, see [`take_clip`](Self::take_clip); `clips` are those of all messages, in order.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare); there are clips and the model sees none.
    pub fn prepare_with_clips(
        &mut self,
        messages: &[Message],
        images: &[Pixels],
        clips: &[Clip],
    ) -> Result<Prepared> {
        check_images(messages, images.len())?;
        check_clips(messages, clips.len())?;
        let prompt = self.text.render(messages)?;
        let question = question(&prompt, messages);
        self.prepare_all(prompt, question, images, clips)
    }

    /// What the vision encoder makes of images and clips, for several questions about them.
    ///
    /// # Errors
    /// An image cannot be resized, there are clips and the model sees none, or the run fails.
    pub fn encode(&mut self, images: &[Pixels], clips: &[Clip]) -> Result<Encoded> {
        let start = Instant::now();
        let (images, clips) = (self.see(images)?, self.see_clips(clips)?);
        Ok(Encoded {
            images,
            clips,
            elapsed: start.elapsed(),
        })
    }

    /// Prepares a conversation about images and clips that are [encoded](Self::encode) already: those of all
    /// messages, in order. The result is that of [`prepare_with_clips`](Self::prepare_with_clips).
    ///
    /// # Errors
    /// As there.
    pub fn prepare_encoded(&mut self, messages: &[Message], seen: &Encoded) -> Result<Prepared> {
        check_images(messages, seen.images.len())?;
        check_clips(messages, seen.clips.len())?;
        let prompt = self.text.render(messages)?;
        let question = question(&prompt, messages);
        self.prepare_seen(prompt, question, seen.clone())
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
        clips: &[Clip],
    ) -> Result<Prepared> {
        let seen = self.encode(images, clips)?;
        self.prepare_seen(prompt, question, seen)
    }

    fn prepare_seen(
        &mut self,
        prompt: String,
        question: Range<usize>,
        seen: Encoded,
    ) -> Result<Prepared> {
        let encoded = self.text.encode(&prompt)?;
        let salient = salient_mask(&prompt, &encoded.offsets, question);
        let both = (seen.images, seen.clips);
        self.assemble(prompt, encoded.ids, salient, both, seen.elapsed)
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

    /// The same with clips, see [`take_clip`](Self::take_clip); `clips` are the new question's.
    ///
    /// # Errors
    /// As [`prepare_follow_up`](Self::prepare_follow_up); there are clips and the model sees none.
    pub fn prepare_follow_up_with_clips(
        &mut self,
        previous: &Generation,
        messages: &[Message],
        images: &[Pixels],
        clips: &[Clip],
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
        let (images, clips) = (self.see(images)?, self.see_clips(clips)?);
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
        self.assemble(prompt, ids, salient, (images, clips), vision_time)
    }

    /// Expands the placeholders, embeds, and puts the features in.
    fn assemble(
        &mut self,
        prompt: String,
        ids: Vec<u32>,
        salient: Vec<bool>,
        (images, clips): (Vec<Seen>, Vec<Seen>),
        vision_time: Duration,
    ) -> Result<Prepared> {
        let rows = |of: &[Seen]| of.iter().map(Seen::tokens).collect::<Vec<usize>>();
        let expanded = self.text.expand_both(&ids, &rows(&images), &rows(&clips))?;
        let id = |token: Option<&ImageToken>| token.map(|t| t.id);
        let tokens = (id(self.text.image_token()), id(self.text.video_token()));
        let seen = in_order(images, clips, &ids, tokens.0, tokens.1);
        let features_per_image = rows(&seen);
        let (features, blocks): (Vec<Tensor>, Vec<Option<Block>>) =
            seen.into_iter().map(|s| (s.features, s.block)).unzip();
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
            blocks: blocks.into_iter().collect(),
            features_per_image,
            vision_time,
            embed_time: start.elapsed(),
        })
    }
}

fn no_clips() -> RuntimeError {
    RuntimeError::Prompt(
        "the model sees no clips: it has neither an encoder with pixels [clips, frames, 3, height, width] \
         (pixel_values_videos) nor one of rows of patches; duet inspect lists its files"
            .into(),
    )
}

/// Images and clips as the vision encoder sees them.
#[derive(Debug, Clone)]
pub struct Encoded {
    images: Vec<Seen>,
    clips: Vec<Seen>,
    /// Time of the encoder.
    elapsed: Duration,
}

impl Encoded {
    /// What the encoder made of each image.
    pub fn images(&self) -> &[Seen] {
        &self.images
    }

    /// What it made of each clip.
    pub fn clips(&self) -> &[Seen] {
        &self.clips
    }
}

/// What the encoder made of an image or a clip.
#[derive(Debug, Clone)]
pub struct Seen {
    features: Tensor,
    /// How the features lie, if the encoder tells.
    block: Option<Block>,
    inside: Vec<Inside>,
}

impl Seen {
    /// Number of features.
    pub fn tokens(&self) -> usize {
        self.features.shape()[0]
    }

    /// How they lie, for encoders that take rows of patches.
    pub fn block(&self) -> Option<&Block> {
        self.block.as_ref()
    }

    /// What the encoder gave besides: of an image of several crops for each of them.
    pub fn inside(&self) -> &[Inside] {
        &self.inside
    }
}

impl From<(Tensor, Inside)> for Seen {
    fn from((features, inside): (Tensor, Inside)) -> Self {
        Self {
            features,
            block: None,
            inside: vec![inside],
        }
    }
}

impl From<PatchFeatures> for Seen {
    fn from(found: PatchFeatures) -> Self {
        Self {
            features: found.features,
            block: Some(found.block),
            inside: vec![found.inside],
        }
    }
}

/// Images and clips in the order in which the prompt has their placeholders.
fn in_order(
    images: Vec<Seen>,
    clips: Vec<Seen>,
    ids: &[u32],
    image: Option<u32>,
    clip: Option<u32>,
) -> Vec<Seen> {
    if clips.is_empty() {
        return images;
    }
    let mut all = Vec::with_capacity(images.len() + clips.len());
    let (mut images, mut clips) = (images.into_iter(), clips.into_iter());
    for id in ids {
        if Some(*id) == clip {
            all.extend(clips.next());
        } else if Some(*id) == image {
            all.extend(images.next());
        }
    }
    all
}

pub(in crate::runtime) fn check_images(messages: &[Message], images: usize) -> Result<()> {
    let mentioned: usize = messages.iter().map(Message::images).sum();
    if mentioned == images {
        return Ok(());
    }
    Err(RuntimeError::Prompt(format!(
        "the conversation mentions {mentioned} images, {images} are given"
    )))
}

fn check_clips(messages: &[Message], clips: usize) -> Result<()> {
    let mentioned: usize = messages.iter().map(Message::clips).sum();
    if mentioned == clips {
        return Ok(());
    }
    Err(RuntimeError::Prompt(format!(
        "the conversation mentions {mentioned} clips, {clips} are given"
    )))
}

/// Where the last message's words are in the rendered prompt; everything if a template changes them.
pub(in crate::runtime) fn question(prompt: &str, messages: &[Message]) -> Range<usize> {
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
