//! What makes a decoder's attentions its layers, whether a cache names them or
//! not.

use super::attention::{Site, head_rows, operand, sites, split_heads};
use super::tower::projection_width;
use super::{DecoderLayer, NoMatch};
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
        let taken = |n: NodeId| layers.iter().any(|l| l.site.node == n);
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

/// The query that an attention reads and the factor it applies besides.
pub(super) fn scored(
    model: &Model,
    site: &Site,
    boundary: ValueId,
) -> Result<(ValueId, f64), String> {
    let at = || model.describe(site.node);
    if site.softcap != 0.0 {
        return Err(format!(
            "{} bounds its scores (softcap), which is not supported",
            at()
        ));
    }
    let scale = site.key.scale * site.post_scale;
    if !scale.is_finite() {
        return Err(format!("the scale of {} is not a constant", at()));
    }
    let query = site.query.value;
    if !descendants(model, &[boundary], true).contains(&query) {
        return Err(format!(
            "the query of {} does not come from '{}'",
            at(),
            model.name(boundary)
        ));
    }
    Ok((query, scale))
}

/// The layer of an attention that no cache output names.
pub(super) fn uncached(
    model: &Model,
    number: usize,
    site: &Site,
    residuals: &[ValueId],
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
    let source = ancestors(model, &[new_key], true);
    let Some(&boundary) = residuals.iter().rev().find(|r| source.contains(r)) else {
        return Err(fail(format!(
            "the keys of {} do not depend on the residual stream",
            model.describe(site.node)
        )));
    };
    let (query, scale) = scored(model, site, boundary).map_err(&fail)?;
    Ok(DecoderLayer {
        boundary,
        past: None,
        present: None,
        new_key,
        query,
        scale: scale / carried,
        site: site.clone(),
    })
}

/// (key/value heads, width of a head), from the cache's stated shape or from how
/// the key projection is split.
pub(super) fn key_shape(model: &Model, layer: &DecoderLayer) -> Option<(i64, i64)> {
    let caches = [layer.past, layer.present];
    let caches = caches.into_iter().flatten();
    let values: Vec<ValueId> = caches.flat_map(|(k, v)| [k, v]).collect();
    let stated = |axis: usize| {
        values.iter().find_map(|&v| {
            let shape = model.value(v).ty.as_ref()?.shape()?;
            (shape.len() == 4).then(|| shape[axis].known()).flatten()
        })
    };
    if let Some(both) = stated(1).zip(stated(3)) {
        return Some(both);
    }
    // The reshape nearest before the rotary embedding, if there is one.
    let tokens = descendants(model, &[layer.boundary], true);
    let mut front = vec![layer.new_key];
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
