//! Tokens chosen one after the other, and written down as text.

use std::ops::ControlFlow;

use ndarray::Array2;

use super::{GenerateOptions, Generation, Stop, Token};
use crate::runtime::error::{Result, RuntimeError};
use crate::runtime::sampling::Sampler;
use crate::runtime::text::{Detokenizer, TextProcessor};

/// Chooses the tokens of an answer, one after the other, and writes them down.
pub(in crate::runtime) struct Writing<'a> {
    text: &'a TextProcessor,
    options: &'a GenerateOptions,
    /// For messages.
    model: String,
    sampler: Sampler,
    detokenizer: Detokenizer,
}

impl<'a> Writing<'a> {
    /// Nothing is written yet.
    pub(in crate::runtime) fn new(
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
    pub(in crate::runtime) fn next(
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
    pub(in crate::runtime) fn finish(mut self, generation: &mut Generation) -> Result<()> {
        generation
            .text
            .push_str(&self.detokenizer.finish(self.text)?);
        Ok(())
    }
}
