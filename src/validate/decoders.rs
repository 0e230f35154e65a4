//! Which graphs are one decoder: a file, the branches of a merged file, or a file
//! that starts a cache with one that goes on from it.

use super::reference::{Choice, ReferenceDecoder, State, StepIn, StepOut};
use super::{ValidateError, probe};
use crate::arch::{Decoder, Part, Role, Vlm};
use crate::passes::VisualPrune;
use crate::runtime::{CacheHeads, DType, Decoder as RunDecoder, Session, SessionOptions};

/// Positions in [`Vlm::parts`] of one decoder's graphs.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// The graph that goes on from a cache; the only one of a decoder that has
    /// none.
    pub(super) main: usize,
    /// The graph that runs first, if that is another.
    pub(super) prompt: Option<usize>,
}

fn decoder(part: &Part) -> Option<&Decoder> {
    match &part.role {
        Role::Decoder(decoder) => Some(decoder),
        _ => None,
    }
}

/// The decoders of a variant.
///
/// Only names tell which of several files goes on from a cache that another
/// started: the exporters' convention is `decoder_with_past_model` beside
/// `decoder_model`.
pub(super) fn groups(base: &Vlm, variant: &str) -> Vec<Group> {
    let of = |i: usize| decoder(&base.parts[i]);
    let past = |i: &usize| of(*i).is_some_and(|d| d.layers[0].past.is_some());
    let all =
        (0..base.parts.len()).filter(|&i| base.parts[i].variant == variant && of(i).is_some());
    let (going_on, starting): (Vec<usize>, Vec<usize>) = all.partition(past);
    let file = |i: usize| &base.parts[i].file;
    let named = |i: &usize| {
        let stem = file(*i).file_stem().unwrap_or_default().to_string_lossy();
        stem.contains("with_past")
    };
    let partner = |main: usize| {
        let branch = starting.iter().find(|s| file(**s) == file(main));
        let alone = base.parts[main].source.branch.is_none();
        let pair = || {
            starting
                .iter()
                .find(|s| base.parts[**s].source.branch.is_none())
        };
        let chosen = going_on.iter().filter(|i| named(i)).count() == 0 || named(&main);
        branch
            .or_else(|| pair().filter(|_| alone && chosen))
            .copied()
    };
    let mut groups: Vec<Group> = going_on
        .iter()
        .map(|&main| Group {
            main,
            prompt: partner(main),
        })
        .collect();
    let taken: Vec<usize> = groups.iter().filter_map(|g| g.prompt).collect();
    let left = starting.into_iter().filter(|s| !taken.contains(s));
    groups.extend(left.map(|main| Group { main, prompt: None }));
    groups
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

/// The reference of a decoder, and the rewritten one with its kept indices for
/// outputs.
pub(super) fn open(
    base: &Vlm,
    rewritten: &Vlm,
    group: &Group,
    prune: Option<&VisualPrune>,
    session: &SessionOptions,
) -> Result<(Reference, RunDecoder), ValidateError> {
    let graph = |i: usize| {
        let part = &base.parts[i];
        let decoder = decoder(part)
            .ok_or_else(|| ValidateError::Model(format!("{}: it is no decoder", part.label())))?;
        Ok::<_, ValidateError>((&part.model, decoder))
    };
    let (model, decoder) = graph(group.main)?;
    let main = ReferenceDecoder::open(model, decoder, prune, session)?;
    let prompt = match group.prompt {
        Some(prompt) => {
            let (model, decoder) = graph(prompt)?;
            Some(ReferenceDecoder::open(model, decoder, prune, session)?)
        }
        None => None,
    };
    let reference = Reference { main, prompt };
    let drops = prune.map_or(0, |p| p.drops.len());
    let mut probed = rewritten.clone();
    for part in &mut probed.parts {
        for drop in 1..=drops {
            let kept = format!("duet/visual_prune/drop{drop}/kept_indices");
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
        probe::open(&found.model, &file.display().to_string(), session)
    };
    let heads = CacheHeads {
        count: usize::try_from(decoder.kv_heads).unwrap_or(1),
        width: usize::try_from(decoder.head_dim).unwrap_or(1),
    };
    let mut run = RunDecoder::with_heads(open(group.main)?, Some(heads))?;
    if let Some(prompt) = group.prompt
        && rewritten.parts[prompt].file != rewritten.parts[group.main].file
    {
        run = run.with_prompt(open(prompt)?)?;
    }
    Ok((reference, run))
}
