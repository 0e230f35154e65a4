//! What makes a decoder's attentions its layers, whether a cache names them or
//! not.

use super::layer::cache_dim;
use super::{DecoderLayer, Layout, Projection};
use crate::arch::NoMatch;
use crate::arch::attention::{Site, head_rows, operand, sites, split_heads};
use crate::arch::residual::Stream;
use crate::arch::tower::projection_width;
use crate::ir::cone::{ancestors, descendants};
use crate::ir::{Model, NodeId, ValueId};

/// The attentions between embeddings and logits.
pub(super) struct Live {
    pub(super) sites: Vec<Site>,
    /// What computes attention or looks like it, and is none of the sites.
    unknown: Vec<NodeId>,
}

impl Live {
    pub(super) fn of(model: &Model, embeds: ValueId, logits: ValueId) -> Self {
        let behind = descendants(model, &[embeds], true);
        let before = ancestors(model, &[logits], true);
        let between = |id: NodeId| {
            let outputs = &model.node(id).outputs;
            let mut outputs = outputs.iter().flatten();
            outputs.any(|o| behind.contains(o) && before.contains(o))
        };
        // The scores of a router come from a product with a weight.
        let of_tokens = |s: &Site| behind.contains(&s.query.root) && behind.contains(&s.key.root);
        let all = sites(model);
        let unknown = model.graph().nodes.iter().copied().filter(|&id| {
            let node = model.node(id);
            (node.is("Softmax") || node.op_type.contains("Attention"))
                && between(id)
                && !all.iter().any(|s| s.node == id)
        });
        Self {
            unknown: unknown.collect(),
            sites: all
                .into_iter()
                .filter(|s| between(s.node) && of_tokens(s))
                .collect(),
        }
    }

    /// Every attention has to be a layer's: one that is not would keep the
    /// length that a drop before it changed.
    pub(super) fn all_taken(&self, model: &Model, layers: &[DecoderLayer]) -> Result<(), String> {
        let taken = |n: NodeId| layers.iter().any(|l| l.node == n);
        if let Some(site) = self.sites.iter().find(|s| !taken(s.node)) {
            return Err(format!(
                "{} is an attention that belongs to none of the {} layers found by their cache outputs",
                model.describe(site.node),
                layers.len()
            ));
        }
        let cached = layers.iter().any(|l| l.present.is_some());
        match self.unknown.first().filter(|_| !cached) {
            Some(&node) => Err(format!(
                "{} is no attention of a known form, and without cache outputs layers are told by their \
                 attentions; export with a cache, or without fused attention operators",
                model.describe(node)
            )),
            None => Ok(()),
        }
    }
}

/// The layer of an attention that no cache output names.
pub(super) fn uncached(
    model: &Model,
    number: usize,
    site: &Site,
    stream: &Stream,
) -> Result<DecoderLayer, NoMatch> {
    let fail = |found: String| NoMatch::new(format!("decoder layer {number}"), found);
    let Some(new_key) = head_rows(model, site) else {
        return Err(fail(format!(
            "the keys of {} are not laid out as [batch, heads, sequence, width] anywhere before the product",
            model.describe(site.node)
        )));
    };
    // Scaling before these rows is theirs already.
    let carried = operand(model, new_key).scale;
    let at = model.describe(site.node);
    let Some(entry) = stream.entry_of(model, new_key) else {
        return Err(fail(format!(
            "the keys of {at} do not depend on the residual stream"
        )));
    };
    let scale = site.key.scale * site.post_scale;
    if !scale.is_finite() {
        return Err(fail(format!("the scale of {at} is not a constant")));
    }
    let boundary = &stream.cuts[entry];
    // Whatever depends on a later cut depends on this one.
    if stream.entry_of(model, site.query.value) < Some(entry) {
        return Err(fail(format!(
            "the query of {at} does not come from '{}'",
            model.name(boundary[0])
        )));
    }
    Ok(DecoderLayer {
        boundary: boundary.clone(),
        past: None,
        present: None,
        new_key: Projection::heads(new_key),
        query: Projection::heads(site.query.value),
        rotary: None,
        scale: scale / carried,
        softcap: site.softcap,
        node: site.node,
        masked: true,
        heads: site.query.heads.map(|h| h.0).filter(|h| *h > 0),
        kv_heads: None,
        head_dim: None,
    })
}

/// (key/value heads, width of a head), from the cache's stated shape or from how
/// the key projection is split.
pub(super) fn key_shape(model: &Model, layer: &DecoderLayer) -> Option<(i64, i64)> {
    let caches = [layer.past, layer.present];
    let ends = || caches.into_iter().flatten().flat_map(|(k, v)| [k, v]);
    let kv_heads = cache_dim(model, ends(), 1).or(layer.kv_heads);
    let head_dim = cache_dim(model, ends(), 3).or(layer.head_dim);
    if let Some(both) = kv_heads.zip(head_dim) {
        return Some(both);
    }
    if layer.new_key.layout != Layout::Heads {
        return None;
    }
    // The reshape nearest before the rotary embedding, if there is one.
    let tokens = descendants(model, &layer.boundary, true);
    let mut front = vec![layer.new_key.value];
    for _ in 0..12 {
        let mut before = Vec::new();
        for value in front {
            let Some(node) = model.producer_node(value) else {
                continue;
            };
            if node.is("Reshape")
                && let Some((heads, width)) = node.input(1).and_then(|s| split_heads(model, s))
                && width > 0
            {
                let total = || projection_width(model, node.input(0)?);
                let heads = Some(heads)
                    .filter(|h| *h > 0)
                    .or_else(|| Some(total()? / width));
                return heads.map(|h| (h, width));
            }
            before.extend(node.inputs.iter().flatten().filter(|i| tokens.contains(i)));
        }
        front = before;
    }
    None
}
