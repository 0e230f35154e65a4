//! Which graphs are one decoder: a file, the branches of a merged file, or a file
//! that starts a cache with one that goes on from it.

use super::reference::ReferenceDecoder;
use super::{ValidateError, probe};
use crate::arch::{Decoder, Part, Role, Vlm};
use crate::passes::VisualPrune;
use crate::runtime::{Decoder as RunDecoder, Session, SessionOptions};

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

/// The reference of a decoder, and the rewritten one with its kept indices for
/// outputs.
pub(super) fn open(
    base: &Vlm,
    rewritten: &Vlm,
    group: &Group,
    prune: Option<&VisualPrune>,
    session: &SessionOptions,
) -> Result<(ReferenceDecoder, RunDecoder), ValidateError> {
    let graph = |i: usize| {
        let part = &base.parts[i];
        let decoder = decoder(part)
            .ok_or_else(|| ValidateError::Model(format!("{}: it is no decoder", part.label())))?;
        Ok::<_, ValidateError>((&part.model, decoder))
    };
    let (model, decoder) = graph(group.main)?;
    let mut reference = ReferenceDecoder::open(model, decoder, prune, session)?;
    if let Some(prompt) = group.prompt {
        let (model, decoder) = graph(prompt)?;
        reference = reference.with_prompt(model, decoder, session)?;
    }
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
    let mut run = RunDecoder::new(open(group.main)?)?;
    if let Some(prompt) = group.prompt
        && rewritten.parts[prompt].file != rewritten.parts[group.main].file
    {
        run = run.with_prompt(open(prompt)?)?;
    }
    Ok((reference, run))
}
