//! One decoder layer, found from its cache.

use super::cache::Caches;
use super::fused::{self, Attention, Stated};
use super::{DecoderLayer, Projection, output_width};
use crate::arch::NoMatch;
use crate::arch::attention::{Site, operand};
use crate::arch::residual::Stream;
use crate::ir::{Def, Model, NodeId, ValueId};

pub(super) struct Layer<'a> {
    pub(super) model: &'a Model,
    pub(super) caches: &'a Caches,
    pub(super) number: usize,
    pub(super) present: (ValueId, ValueId),
    pub(super) stream: &'a Stream,
}

impl Layer<'_> {
    pub(super) fn recognise(&self, all: &[Site]) -> Result<DecoderLayer, NoMatch> {
        let model = self.model;
        let number = self.number;
        let fail = |found: String| NoMatch::new(format!("decoder layer {number}"), found);
        let past = self.caches.past.get(&number).copied();
        if past.is_none() && !self.caches.past.is_empty() {
            return Err(fail(format!(
                "no cache inputs past_key_values.{number}.key/value, which other layers have"
            )));
        }
        let attention = self.attention(past.map(|p| p.0), all).map_err(&fail)?;
        let stream = self.stream;
        let Some(entry) = stream.entry_of(model, attention.key.value) else {
            return Err(fail(format!(
                "'{}' does not depend on the residual stream",
                model.name(self.present.0)
            )));
        };
        let at = model.describe(attention.node);
        if !attention.scale.is_finite() {
            return Err(fail(format!("the scale of {at} is not a constant")));
        }
        let boundary = &stream.cuts[entry];
        // Whatever depends on a later cut depends on this one.
        if stream.entry_of(model, attention.query.value) < Some(entry) {
            return Err(fail(format!(
                "the query of {at} does not come from '{}'",
                model.name(boundary[0])
            )));
        }
        Ok(DecoderLayer {
            boundary: boundary.clone(),
            past,
            present: Some(self.present),
            query: attention.query,
            new_key: attention.key,
            rotary: attention.rotary,
            scale: attention.scale,
            softcap: attention.softcap,
            node: attention.node,
            masked: attention.masked,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            head_dim: attention.width,
        })
    }

    /// The attention over this layer's cache, in whatever form.
    fn attention(&self, past: Option<ValueId>, all: &[Site]) -> Result<Attention, String> {
        let model = self.model;
        if let Some(id) = self.cache_operator() {
            return fused::with_cache(model, id, self.stated(past, Some(id)));
        }
        let (new_key, cache) = match past {
            Some(past) => self.new_rows(past, self.present.0)?,
            None => self.only_rows(self.present.0)?,
        };
        // The present is the concatenation, or what is left of it after rounding;
        // re-arranging may lie on both sides of what the cache holds.
        let caches = [self.present.0, cache, operand(model, cache).root];
        if let Some(site) = all.iter().find(|s| caches.contains(&s.key.root)) {
            return Ok(Attention {
                node: site.node,
                query: Projection::heads(site.query.value),
                key: Projection::heads(new_key),
                rotary: None,
                scale: site.key.scale * site.post_scale,
                softcap: site.softcap,
                heads: site.query.heads.map(|h| h.0).filter(|h| *h > 0),
                kv_heads: None,
                width: self.stated(past, None).width,
                masked: true,
            });
        }
        let stated = self.stated(past, None);
        if let Some(found) = fused::over_cache(model, &caches, new_key, stated) {
            return found;
        }
        let readers = model.value(cache).uses.iter();
        let readers: Vec<String> = readers.map(|u| model.describe(u.node)).collect();
        Err(format!(
            "no attention reads '{}' (its readers: {})",
            model.name(self.present.0),
            if readers.is_empty() {
                "none".into()
            } else {
                readers.join(", ")
            }
        ))
    }

    /// The operator that gives the present keys, if it is an attention that
    /// appends to the cache by itself.
    fn cache_operator(&self) -> Option<NodeId> {
        let id = self.model.producer_of(self.present.0)?;
        fused::holds_cache(self.model.node(id)).then_some(id)
    }

    fn stated(&self, past: Option<ValueId>, attention: Option<NodeId>) -> Stated {
        let model = self.model;
        Stated {
            width: cache_dim(model, past.into_iter().chain([self.present.0]), 3),
            output: attention.and_then(|id| output_width(model, id)),
        }
    }

    /// The keys that a decoder without a past gives out, as they are or behind a
    /// concatenation with an empty cache, and what it gives out.
    fn only_rows(&self, present: ValueId) -> Result<(ValueId, ValueId), String> {
        let model = self.model;
        let of_tokens = |v: ValueId| self.stream.entry_of(model, v).is_some();
        let mut at = present;
        while let Some(producer) = model.producer_node(at) {
            let mut fresh = producer.inputs.iter().flatten().filter(|i| of_tokens(**i));
            let next = match (producer.op_type.as_str(), fresh.next(), fresh.next()) {
                ("Identity" | "Cast" | "Concat", Some(&new), None) => new,
                _ => break,
            };
            at = next;
        }
        if !of_tokens(at) {
            return Err(format!(
                "'{}' is not computed from the tokens",
                model.name(present)
            ));
        }
        Ok((at, at))
    }

    /// The rows that are appended to the cache (the other part of the
    /// concatenation with the past), and the concatenation.
    fn new_rows(&self, past: ValueId, present: ValueId) -> Result<(ValueId, ValueId), String> {
        let model = self.model;
        let from_past = |v: ValueId| self.stream.local(model, v).contains(&past);
        let mut at = present;
        loop {
            let Def::Node { node, slot: _ } = model.value(at).def else {
                return Err(format!("'{}' is not computed", model.name(present)));
            };
            let producer = model.node(node);
            // A quantised model rounds what it gives out.
            let passes_on = ["Identity", "Cast", "QuantizeLinear", "DequantizeLinear"];
            if passes_on.iter().any(|op| producer.is(op)) {
                at = producer.input(0).ok_or("an Identity without input")?;
                continue;
            }
            if producer.is("Concat") {
                let mut fresh = producer.inputs.iter().flatten().filter(|i| !from_past(**i));
                if let (Some(&new), None) = (fresh.next(), fresh.next()) {
                    return Ok((new, at));
                }
            }
            return Err(format!(
                "expected '{}' to be Concat(past, new keys) or an attention with a cache \
                 (GroupQueryAttention, MultiHeadAttention, Attention), found {}",
                model.name(present),
                model.describe(node)
            ));
        }
    }
}

/// A dimension that one of a cache's two ends declares.
pub(super) fn cache_dim(
    model: &Model,
    mut ends: impl Iterator<Item = ValueId>,
    axis: usize,
) -> Option<i64> {
    ends.find_map(|v| {
        let dims = model.value(v).ty.as_ref()?.shape()?;
        (dims.len() == 4).then(|| dims[axis].known())?
    })
}

/// Heads of a decoder's cache and their width, as its interface declares them or
/// as its first attention has them.
///
/// Unlike [`Decoder::recognise`](super::Decoder::recognise) this works on
/// rewritten models too. `None`: there is no cache, or nothing tells.
pub fn cache_heads(model: &Model) -> Option<(i64, i64)> {
    let caches = Caches::of(model);
    let (&number, &present) = caches.present.first_key_value()?;
    let past = caches.past.get(&number)?.0;
    let known = |axis| cache_dim(model, [past, present.0].into_iter(), axis);
    if let (Some(heads), Some(width)) = (known(1), known(3)) {
        return Some((heads, width));
    }
    let layer = Layer {
        model,
        caches: &caches,
        number,
        present,
        stream: &Stream::default(),
    };
    let id = layer.cache_operator()?;
    let found = fused::with_cache(model, id, layer.stated(Some(past), Some(id))).ok()?;
    Some((known(1).or(found.kv_heads)?, known(3).or(found.width)?))
}
