//! A whole vision-language model in one file: token ids and pixels in, logits out.
//!
//! Without a cache every step runs the whole sequence again, pixels included: right, and quadratic in the length of
//! the answer.

mod pipeline;

use std::time::{Duration, Instant};

use ndarray::Array2;

use super::decoder::{
    IDS, LOGITS, MASK, POSITIONS, SALIENT, VISUAL, integers, is_past, last_rows, ports, positions,
};
use super::error::{Result, RuntimeError};
use super::session::Session;
use super::tensor::{DType, Tensor};
use super::value::Value;

pub use pipeline::{WholePipeline, WholePrompt};

/// What one run reads. B rows, L tokens.
#[derive(Debug, Clone)]
pub struct WholeInput {
    /// `[B, L]`, the image token once for each feature.
    pub ids: Array2<i64>,
    /// `[images, channels, height, width]`.
    pub pixels: Tensor,
    /// `[B, L]`, 1 for tokens, 0 for padding. All ones if absent.
    pub mask: Option<Array2<i64>>,
    /// `[B, L]`, true at image features, for models with an input `visual_token_mask`. All false if absent.
    pub visual: Option<Array2<bool>>,
    /// `[B, L]`, true at salient text, for models with an input `salient_token_mask`. All false if absent.
    pub salient: Option<Array2<bool>>,
}

/// What one run gives.
#[derive(Debug, Clone)]
pub struct WholeOutput {
    /// `[B, rows, vocabulary]`; a pruned prompt has fewer rows than tokens.
    pub logits: Value,
    /// Outputs besides the logits, by name.
    pub extra: Vec<(String, Value)>,
    /// Time of the run.
    pub elapsed: Duration,
}

impl WholeOutput {
    /// The last row of the logits of each batch row, `[B, vocabulary]`, as `f32`.
    ///
    /// # Errors
    /// The logits are no floating-point numbers, or there are none.
    pub fn last_logits(&self) -> Result<Array2<f32>> {
        last_rows(&self.logits)
    }
}

/// An open whole model.
#[derive(Debug)]
pub struct WholeModel {
    session: Session,
    pixels: String,
}

impl WholeModel {
    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// It does not take token ids and pixels and give logits, or an input is not one of those that can be filled.
    pub fn new(session: Session) -> Result<Self> {
        let wrong = |expected: &str, found: String| RuntimeError::Interface {
            model: session.model().to_string(),
            expected: expected.to_string(),
            found,
        };
        if session.output(LOGITS).is_none() || session.input(IDS).is_none() {
            let names = format!("{} → {}", ports(session.inputs()), ports(session.outputs()));
            return Err(wrong(
                "a whole model, input_ids and pixel_values → logits",
                names,
            ));
        }
        let mut pixels = None;
        for port in session.inputs() {
            let name = port.name.as_str();
            if [IDS, MASK, POSITIONS, VISUAL, SALIENT].contains(&name) || is_past(name) {
                continue;
            }
            let image =
                port.dtype.is_some_and(DType::is_float) && (4..=5).contains(&port.dims.len());
            if image && pixels.is_none() {
                pixels = Some(name.to_owned());
                continue;
            }
            return Err(wrong(
                "inputs among input_ids, pixel_values, attention_mask, position_ids, past_key_values.*, \
                 visual_token_mask, salient_token_mask",
                format!("an input `{name}` {port}, which nothing here can fill"),
            ));
        }
        let Some(pixels) = pixels else {
            return Err(wrong("an input of pixels", ports(session.inputs())));
        };
        Ok(Self { session, pixels })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to end its profiling.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// How many images one run takes, if the model fixes it.
    pub fn images(&self) -> Option<usize> {
        let port = self.session.input(&self.pixels)?;
        port.dims.first()?.fixed()
    }

    /// (channels, height, width) of an image, where the model fixes them.
    pub fn image_size(&self) -> [Option<usize>; 3] {
        let dims = self.session.input(&self.pixels).map(|p| p.dims.as_slice());
        let dims = dims.unwrap_or_default();
        let from = dims.len().saturating_sub(3);
        [0, 1, 2].map(|axis| dims.get(from + axis).and_then(|d| d.fixed()))
    }

    /// Runs a sequence from its first token.
    ///
    /// # Errors
    /// Shapes do not agree, or the run fails.
    pub fn run(&mut self, input: &WholeInput) -> Result<WholeOutput> {
        let dim = input.ids.dim();
        let check = |what: &str, found: (usize, usize)| {
            if found == dim {
                return Ok(());
            }
            Err(RuntimeError::Tensor(format!(
                "{what} is {found:?}, the token ids are {dim:?}"
            )))
        };
        let mask = input.mask.clone().unwrap_or_else(|| Array2::ones(dim));
        check("the mask", mask.dim())?;
        let mut feed: Vec<(String, Value)> = Vec::new();
        for port in self.session.inputs() {
            let value = match port.name.as_str() {
                IDS => integers(port, input.ids.clone())?,
                MASK => integers(port, mask.clone())?,
                POSITIONS => integers(port, positions(&mask, dim.1))?,
                name @ (VISUAL | SALIENT) => {
                    let given = if name == VISUAL {
                        &input.visual
                    } else {
                        &input.salient
                    };
                    let flags = given.clone().unwrap_or_else(|| Array2::default(dim));
                    check(name, flags.dim())?;
                    Value::new(flags.into())?
                }
                name if name == self.pixels => {
                    let dtype = port.dtype.unwrap_or(DType::F32);
                    Value::new(input.pixels.clone().cast_float(dtype)?)?
                }
                // Nothing came before.
                _ => {
                    let known = |axis: usize| port.dims.get(axis).and_then(|d| d.fixed());
                    let shape = [dim.0, known(1).unwrap_or(1), 0, known(3).unwrap_or(1)];
                    Value::new(Tensor::zeros(port.dtype.unwrap_or(DType::F32), shape)?)?
                }
            };
            feed.push((port.name.clone(), value));
        }
        let feed: Vec<(&str, &Value)> = feed.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let start = Instant::now();
        let outputs = self.session.run(&feed)?;
        let elapsed = start.elapsed();
        let logits = outputs.get(LOGITS)?.clone();
        let mut extra = outputs.into_vec();
        extra.retain(|(name, _)| name != LOGITS);
        Ok(WholeOutput {
            logits,
            extra,
            elapsed,
        })
    }
}
