//! What the unmodified files do not run: scenarios that ask for it are left out, and the
//! report says why.

use super::numeric::fixed;
use super::scenario::Scenario;
use crate::arch::Decoder;
use crate::ir::{Model, ValueId};

/// Limits of a decoder and the embedding in front of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// Whether the decoder takes no mask at all.
    unmasked: bool,
    /// Whether an attention takes the lengths of rows alone.
    lengths: bool,
    /// The file that takes one row at a time, if one does.
    one_row: Option<String>,
    /// Why a cache cannot be followed by several new tokens, if so.
    pub(super) single_steps: Option<String>,
}

impl Limits {
    /// Notes what tells a decoder which tokens are padding.
    pub(super) fn note_mask(&mut self, decoder: &Decoder) {
        self.unmasked |= decoder.attention_mask.is_none();
        self.lengths |= !decoder.takes_padding();
    }

    /// Notes whether the interface of a file fixes the batch at one row.
    pub(super) fn note_batch(&mut self, model: &Model, input: ValueId, file: &str) {
        if fixed(model, input, 0) == Some(1) {
            self.one_row = Some(file.to_owned());
        }
    }

    /// Why the unmodified decoder cannot run a scenario, if it cannot.
    pub(super) fn beyond(&self, scenario: &Scenario) -> Option<String> {
        if let (Some(file), true) = (&self.one_row, scenario.turns[0].rows.len() > 1) {
            return Some(format!("{file} takes one row at a time"));
        }
        if scenario.padded() && self.unmasked {
            return Some(
                "the decoder takes no attention_mask, so rows of a batch cannot be padded".into(),
            );
        }
        if scenario.padded() && self.lengths {
            return Some(
                "the decoder's attention takes the length of each row but no mask \
                 (GroupQueryAttention), so rows of a batch cannot be padded on the left"
                    .into(),
            );
        }
        let why = self
            .single_steps
            .as_ref()
            .filter(|_| scenario.turns.len() > 1)?;
        Some(format!(
            "the unmodified decoder does not take several new tokens on top of a cache ({why})"
        ))
    }
}
