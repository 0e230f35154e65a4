//! Decoders as they are run: one graph, the branches of a merged file, or a file that
//! starts a cache with one that goes on from it.

use super::reference::{Choice, ReferenceDecoder, State, StepIn, StepOut};
use super::{ValidateError, probe};
use crate::arch::{Decoder, DecoderFiles, Part, Role, Vlm};
use crate::ir::Model;
use crate::passes::Pruning;
use crate::runtime::{CacheHeads, DType, Decoder as RunDecoder, Session, SessionOptions};

fn decoder(part: &Part) -> Option<&Decoder> {
    match &part.role {
        Role::Decoder(decoder) => Some(decoder),
        _ => None,
    }
}

/// The reference of a decoder in one graph or two, which share their state.
pub(super) struct Reference {
    main: ReferenceDecoder,
    prompt: Option<ReferenceDecoder>,
}

impl Reference {
    /// Whether it goes on from what it said before.
    pub(super) fn has_past(&self) -> bool {
        self.main.has_past()
    }

    /// Why the unmodified decoder takes no several new tokens on top of a cache, if
    /// it does not.
    pub(super) fn continues(&mut self) -> Result<Option<String>, ValidateError> {
        if self.main.has_past() {
            self.main.continues()
        } else {
            Ok(None)
        }
    }

    /// Names of the key outputs of its layers, if it gives caches.
    pub(super) fn present_keys(&self) -> impl Iterator<Item = &str> {
        self.main.present_keys()
    }

    /// Element type of the embeddings that it reads.
    pub(super) fn dtype(&self) -> DType {
        self.main.dtype()
    }

    /// A conversation with nothing said yet.
    pub(super) fn start(&self, batch: usize) -> Result<State, ValidateError> {
        self.main.start(batch)
    }

    /// Runs new tokens, the first ones through the graph that starts a cache.
    pub(super) fn step(
        &mut self,
        state: &mut State,
        input: &StepIn,
        choice: Option<Choice<'_>>,
    ) -> Result<StepOut, ValidateError> {
        match &mut self.prompt {
            Some(prompt) if state.is_new() => prompt.step_with(state, input, choice),
            _ => self.main.step_with(state, input, choice),
        }
    }
}

/// Under what name scope the pass that plans the decoder inserts.
pub(super) fn decoder_scope(pruning: Option<Pruning<'_>>) -> String {
    // (A merge that leaves features in their places has them dropped.)
    format!("duet/{}", pruning.map_or("token_merge", |p| p.pass))
}

/// Names of the kept indices of every drop point, in order; with `placed`, the first is
/// where discarded tokens leave.
pub(super) fn kept_names(pruning: Option<Pruning<'_>>, placed: bool) -> Vec<String> {
    let drops = pruning.map_or(0, |p| p.prune.drops.len());
    let scope = decoder_scope(pruning);
    let name = |drop| format!("{scope}/drop{drop}/kept_indices");
    (usize::from(!placed)..=drops).map(name).collect()
}

/// The reference of a decoder, and the rewritten one with its kept indices for
/// outputs.
pub(super) fn open(
    base: &Vlm,
    rewritten: &Vlm,
    group: &DecoderFiles,
    pruning: Option<Pruning<'_>>,
    placed: bool,
    session: &SessionOptions,
) -> Result<(Reference, RunDecoder), ValidateError> {
    let reference = |model: &Model, decoder: &Decoder| {
        let prune = pruning.map(|p| p.prune);
        ReferenceDecoder::open_placed(model, decoder, prune, placed, session)
    };
    let graph = |i: usize| {
        let part = &base.parts[i];
        let decoder = decoder(part)
            .ok_or_else(|| ValidateError::Model(format!("{}: it is no decoder", part.label())))?;
        Ok::<_, ValidateError>((&part.model, decoder))
    };
    let (model, decoder) = graph(group.main)?;
    let main = reference(model, decoder)?;
    let prompt = match group.prompt {
        Some(prompt) => {
            let (model, decoder) = graph(prompt)?;
            Some(reference(model, decoder)?)
        }
        None => None,
    };
    let reference = Reference { main, prompt };
    let mut probed = rewritten.clone();
    for part in &mut probed.parts {
        for kept in kept_names(pruning, placed) {
            if let Some(value) = part.model.find(&kept) {
                part.model = probe::with_outputs(&part.model, &[value])?;
            }
        }
    }
    let files = probed.files()?;
    let open = |i: usize| -> Result<Session, ValidateError> {
        let file = &rewritten.parts[i].file;
        let found = files.iter().find(|f| f.file == *file);
        let found =
            found.ok_or_else(|| ValidateError::Model(format!("{}: lost", file.display())))?;
        probe::open_rewritten(&found.model, &file.display().to_string(), session)
    };
    let heads = CacheHeads {
        count: usize::try_from(decoder.kv_heads).unwrap_or(1),
        width: usize::try_from(decoder.head_dim).unwrap_or(1),
    };
    let run = RunDecoder::with_heads(open(group.main)?, Some(heads));
    let mut run = run.map_err(ValidateError::of_rewritten)?;
    if let Some(prompt) = group.prompt
        && rewritten.parts[prompt].file != rewritten.parts[group.main].file
    {
        let both = run.with_prompt(open(prompt)?);
        run = both.map_err(ValidateError::of_rewritten)?;
    }
    Ok((reference, run))
}
