//! Which input and output of a decoder is what.

use crate::ir::cache_name;

use super::super::error::{Result, RuntimeError};
use super::super::session::{Port, Session};
use super::super::tensor::DType;
use super::{
    CacheHeads, IDS, KEEP_LOGITS, LOGITS, MASK, POSITIONS, SALIENT, USE_CACHE, VISUAL, ports,
};

const EMBEDS: &str = "inputs_embeds";

/// One pair of a past input and the present output that fills it.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) past: String,
    pub(super) present: String,
    pub(super) dtype: DType,
    /// Declared sizes; `None` where they vary.
    pub(super) dims: Vec<Option<usize>>,
    /// The axis that grows.
    pub(super) axis: usize,
}

/// Names of what every decoder has, whatever an exporter called it.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// The input of embeddings.
    pub(super) embeds: String,
    /// The output of logits.
    pub(super) logits: String,
}

impl Ends {
    /// Finds them by name, else by kind.
    pub(super) fn of(session: &Session) -> Result<Self> {
        let wrong = |expected: &str, found: String| RuntimeError::Interface {
            model: session.model().to_string(),
            expected: expected.to_string(),
            found,
        };
        let cached = |port: &Port| port.name.starts_with("present");
        let Some(logits) = by_name_or_kind(session.outputs(), LOGITS, |p| !cached(p)) else {
            return Err(wrong(
                "a decoder with an output `logits`, or with one floating-point output besides the cache",
                ports(session.outputs()),
            ));
        };
        let Some(embeds) = by_name_or_kind(session.inputs(), EMBEDS, |p| p.dims.len() == 3) else {
            return Err(wrong(
                "a decoder with an input `inputs_embeds`, or with one floating-point input of rank 3",
                ports(session.inputs()),
            ));
        };
        Ok(Self { embeds, logits })
    }
}

/// The port of this name, or the only floating-point one that fits.
fn by_name_or_kind(ports: &[Port], name: &str, fits: impl Fn(&Port) -> bool) -> Option<String> {
    if ports.iter().any(|p| p.name == name) {
        return Some(name.to_owned());
    }
    let float = |p: &&Port| p.dtype.is_some_and(DType::is_float) && fits(p);
    let mut all = ports.iter().filter(float);
    match (all.next(), all.next()) {
        (Some(only), None) => Some(only.name.clone()),
        _ => None,
    }
}

/// Refuses inputs that nothing here can fill.
pub(super) fn fillable(session: &Session, ends: &Ends) -> Result<()> {
    for port in session.inputs() {
        let name = port.name.as_str();
        let known = name == ends.embeds
            || [IDS, MASK, POSITIONS, VISUAL, SALIENT, USE_CACHE].contains(&name)
            || KEEP_LOGITS.contains(&name)
            || is_past(name);
        if !known {
            return Err(RuntimeError::Interface {
                model: session.model().to_string(),
                expected: "inputs among inputs_embeds, input_ids, attention_mask, position_ids, \
                           past_key_values.*, visual_token_mask, salient_token_mask"
                    .into(),
                found: format!("an input `{name}` {port}, which nothing here can fill"),
            });
        }
    }
    Ok(())
}

/// Whether an input is part of the cache.
pub(in crate::runtime) fn is_past(name: &str) -> bool {
    name.starts_with("past_key_values.") || cache_name(name, "past").is_some()
}

/// Name of the output that fills a past input: `present.3.key` for `past_key_values.3.key`,
/// and whatever else names the key or value of the same layer (`present_key_3`).
fn present_of(session: &Session, past: &str) -> String {
    let usual = past.strip_prefix("past_key_values.");
    let usual = usual.map(|rest| format!("present.{rest}"));
    if let Some(usual) = usual.as_ref().filter(|n| session.output(n).is_some()) {
        return usual.clone();
    }
    let place = cache_name(past, "past");
    let same = |port: &&Port| place.is_some() && cache_name(&port.name, "present") == place;
    let named = session.outputs().iter().find(same);
    let named = named.map(|port| port.name.clone()).or(usual);
    named.unwrap_or_else(|| past.replacen("past", "present", 1))
}

/// The pair of a past input and its present output.
pub(super) fn slot(session: &Session, port: &Port, heads: Option<CacheHeads>) -> Result<Slot> {
    let wrong = |expected: String, found: String| RuntimeError::Interface {
        model: session.model().to_string(),
        expected,
        found,
    };
    let present = present_of(session, &port.name);
    if session.output(&present).is_none() {
        return Err(wrong(
            format!("an output `{present}` for the input `{}`", port.name),
            ports(session.outputs()),
        ));
    }
    let mut dims: Vec<Option<usize>> = port.dims.iter().map(|dim| dim.fixed()).collect();
    if let (Some(heads), [_, count, _, width]) = (heads, dims.as_mut_slice()) {
        count.get_or_insert(heads.count);
        width.get_or_insert(heads.width);
    }
    // What varies besides the rows is the number of tokens: the head count and head size are known.
    let mut growing = (1..dims.len()).filter(|&axis| dims[axis].is_none());
    let (first, second) = (growing.next(), growing.next());
    // Of fixed shapes, as [batch, heads, tokens, width].
    let axis = first.or((dims.len() == 4 && dims[0].is_some()).then_some(2));
    let (Some(axis), None, Some(dtype)) = (axis, second, port.dtype) else {
        return Err(wrong(
            format!(
                "`{}` with a fixed head count and head size and one growing axis, like \
                 float32[batch, 8, past, 64]",
                port.name
            ),
            port.to_string(),
        ));
    };
    Ok(Slot {
        past: port.name.clone(),
        present,
        dtype,
        dims,
        axis,
    })
}

/// Which slots hold keys, in the order of the layers that their names state. Interfaces list keys and values in
/// turns, or all keys before all values.
pub(super) fn keys(slots: &[Slot]) -> Vec<usize> {
    let layer = |name: &str| -> Option<usize> {
        let stated = cache_name(name, "past").map(|(layer, _)| layer);
        stated.or_else(|| name.rsplit('.').find_map(|part| part.parse().ok()))
    };
    let is_key = |name: &str| match cache_name(name, "past") {
        Some((_, key)) => key,
        None => name.ends_with("key"),
    };
    let mut keys: Vec<(Option<usize>, usize)> = slots
        .iter()
        .enumerate()
        .filter(|(_, slot)| is_key(&slot.past))
        .map(|(at, slot)| (layer(&slot.past), at))
        .collect();
    keys.sort();
    keys.into_iter().map(|(_, at)| at).collect()
}
