//! Asking a model: the vision encoder runs once for each image, the decoder once for each question.
//!
//! Nothing is batched and no cache is shared between questions: each answer is what `duet run` gives for the
//! question alone.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use super::answers::Answer;
use super::dataset::{DataSet, Question};
use super::error::{EvalError, Result};
use crate::runtime::{
    GenerateOptions, Generation, Message, Pixels, RuntimeError, VlmPipeline, WholePipeline,
};

/// Frames of a clip where neither the model nor its configuration says how many it sees.
const USUAL_FRAMES: usize = 8;

/// Decoded images, so that the next model need not decode them again; the oldest go when there are too many bytes.
#[derive(Debug)]
pub struct Pictures {
    known: HashMap<String, Rc<Pixels>>,
    order: std::collections::VecDeque<String>,
    bytes: usize,
    limit: usize,
}

impl Pictures {
    /// Keeps at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            known: HashMap::new(),
            order: std::collections::VecDeque::new(),
            bytes: 0,
            limit,
        }
    }

    fn get(&mut self, root: &Path, name: &str) -> std::result::Result<Rc<Pixels>, RuntimeError> {
        if let Some(pixels) = self.known.get(name) {
            return Ok(Rc::clone(pixels));
        }
        let pixels = Rc::new(Pixels::open(root.join(name))?);
        self.bytes += pixels.rgb().len();
        self.known.insert(name.to_owned(), Rc::clone(&pixels));
        self.order.push_back(name.to_owned());
        while self.bytes > self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            let gone = self.known.remove(&oldest);
            self.bytes -= gone.map_or(0, |p| p.rgb().len());
        }
        Ok(pixels)
    }
}

/// An open model.
#[derive(Debug)]
pub enum Runner {
    /// Vision encoder, embeddings and decoder.
    Parts(Box<VlmPipeline>),
    /// All in one file.
    Whole(Box<WholePipeline>),
}

impl Runner {
    /// Answers questions about the same pictures, each as it is handed to `each`.
    ///
    /// # Errors
    /// A picture cannot be read, the model fails (the first question is named that needs what failed), or `each`
    /// does.
    pub fn answer(
        &mut self,
        name: &str,
        set: &DataSet,
        questions: &[&Question],
        max_new_tokens: usize,
        pictures: &mut Pictures,
        each: &mut dyn FnMut(Answer) -> Result<()>,
    ) -> Result<()> {
        let Some(first) = questions.first() else {
            return Ok(());
        };
        let failed = |question: &Question| {
            let (model, id) = (name.to_owned(), question.id.clone());
            move |source: RuntimeError| EvalError::Question {
                model,
                id,
                source: Box::new(source),
            }
        };
        let options = GenerateOptions {
            max_new_tokens,
            ..Default::default()
        };
        let images = first.images.iter().map(|image| {
            let pixels = pictures.get(&set.root, image)?;
            Ok(Pixels::clone(&pixels))
        });
        let images: Vec<Pixels> = images
            .collect::<std::result::Result<_, _>>()
            .map_err(failed(first))?;
        match self {
            Self::Parts(pipeline) => {
                let clip = first.video.as_ref();
                let clip = clip.map(|clip| pipeline.take_clip(set.root.join(clip), USUAL_FRAMES));
                let clips: Vec<_> = clip
                    .transpose()
                    .map_err(failed(first))?
                    .into_iter()
                    .collect();
                let seen = pipeline.encode(&images, &clips).map_err(failed(first))?;
                for question in questions {
                    let message =
                        Message::user_with(images.len(), clips.len(), set.prompt(question));
                    let start = Instant::now();
                    let answer = pipeline
                        .prepare_encoded(&[message], &seen)
                        .and_then(|prepared| {
                            pipeline.generate(&prepared, None, &options, &mut |_| {
                                ControlFlow::Continue(())
                            })
                        })
                        .map_err(failed(question))?;
                    each(record(question, &answer, start))?;
                }
            }
            Self::Whole(pipeline) => {
                if first.video.is_some() {
                    let source = RuntimeError::Prompt(
                        "the model is one file that takes images; a clip needs an encoder of clips beside the \
                         decoder (pixel_values_videos of rank 5)"
                            .into(),
                    );
                    return Err(failed(first)(source));
                }
                for question in questions {
                    let message = Message::user(images.len(), set.prompt(question));
                    let start = Instant::now();
                    let prepared = pipeline
                        .prepare(&[message], &images)
                        .map_err(failed(question))?;
                    let answer = pipeline
                        .generate(&prepared, &options, &mut |_| ControlFlow::Continue(()))
                        .map_err(failed(question))?;
                    each(record(question, &answer, start))?;
                }
            }
        }
        Ok(())
    }
}

fn record(question: &Question, answer: &Generation, start: Instant) -> Answer {
    // Only visual tokens are ever dropped, so what a layer's cache lacks is visual.
    let text = answer.prompt_tokens.saturating_sub(answer.visual_tokens);
    let lengths = &answer.cache_lengths;
    let visual: usize = lengths
        .iter()
        .map(|length| length.saturating_sub(text))
        .sum();
    let mean = (!lengths.is_empty()).then(|| visual as f64 / lengths.len() as f64);
    Answer {
        id: question.id.clone(),
        answer: answer.text.trim().to_owned(),
        tokens: answer.tokens.clone(),
        visual_tokens: Some(answer.visual_tokens),
        visual_tokens_by_layer: mean,
        seconds: Some((start.elapsed().as_secs_f64() * 1e6).round() / 1e6),
    }
}
