//! Attention operators that hold more than the product: the cache, the rotary
//! embedding, packed projections.
//!
//! ```text
//! GroupQueryAttention   q, k, v or qkv packed; past → present; rotary by lengths
//! MultiHeadAttention    q, k, v [b, L, h·d]; past → present, or over a cache that
//!                       was concatenated before it
//! Attention (ONNX 23)   q, k, v; past → present
//! ```
//!
//! Source: ONNX Runtime, `docs/ContribOperators.md` and the CPU kernels of
//! `contrib_ops/cpu/bert`; ONNX `Attention`, operator set 23.

use super::{Layout, Projection, Rotary};
use crate::arch::attention::operand;
use crate::ir::{Dim, Model, Node, NodeId, ValueId, consts};

/// What a layer's attention computes from.
pub(super) struct Attention {
    pub(super) node: NodeId,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) rotary: Option<Rotary>,
    pub(super) scale: f64,
    pub(super) softcap: f64,
    pub(super) heads: Option<i64>,
    pub(super) kv_heads: Option<i64>,
    pub(super) width: Option<i64>,
    pub(super) masked: bool,
}

/// What is known of the heads before the attention is looked at.
#[derive(Clone, Copy)]
pub(super) struct Stated {
    /// Head width, from the cache's declared shape.
    pub(super) width: Option<i64>,
    /// Columns of the attention's result: query heads times head width.
    pub(super) output: Option<i64>,
}

/// Whether an operator appends to the cache by itself.
pub(super) fn holds_cache(node: &Node) -> bool {
    node.is_ms("GroupQueryAttention")
        || (node.is_ms("MultiHeadAttention") && node.input(6).is_some())
        || (node.is("Attention") && node.input(4).is_some())
}

/// Reads an operator that appends to the cache by itself.
pub(super) fn with_cache(model: &Model, id: NodeId, stated: Stated) -> Result<Attention, String> {
    let node = model.node(id);
    let found = if node.is_ms("GroupQueryAttention") {
        group_query(model, id, stated)
    } else if node.is_ms("MultiHeadAttention") {
        multi_head(model, id, stated)
    } else {
        standard(model, id, stated)
    };
    found.map_err(|why| format!("{} {why}", model.describe(id)))
}

/// `MultiHeadAttention` whose keys are a cache that was concatenated before it.
pub(super) fn over_cache(
    model: &Model,
    cache: &[ValueId],
    new_key: ValueId,
    stated: Stated,
) -> Option<Result<Attention, String>> {
    for &id in &model.graph().nodes {
        let node = model.node(id);
        if !node.is_ms("MultiHeadAttention") || node.input(6).is_some() {
            continue;
        }
        let key = operand(model, node.input(1)?);
        if !cache.contains(&key.root) {
            continue;
        }
        let found = multi_head(model, id, stated).map(|mut attention| {
            attention.scale *= key.scale;
            attention.key = Projection::heads(new_key);
            attention.kv_heads = None;
            attention
        });
        return Some(found.map_err(|why| format!("{} {why}", model.describe(id))));
    }
    None
}

fn group_query(model: &Model, id: NodeId, stated: Stated) -> Result<Attention, String> {
    let node = model.node(id);
    if node.attr_int("sliding_window_cache").unwrap_or(0) != 0 {
        return Err(
            "keeps only its window in the cache (sliding_window_cache), so that the cache does not tell \
             how many tokens came before; export with a full cache (without \
             sliding_window_cache), local_window_size may stay"
                .into(),
        );
    }
    if let Some(slot) = (12..node.inputs.len()).find(|s| node.input(*s).is_some()) {
        return Err(format!(
            "reads input {slot}, which belongs to a quantised cache; export with a floating-point cache"
        ));
    }
    let heads = node.attr_int("num_heads").filter(|h| *h > 0);
    let kv_heads = node.attr_int("kv_num_heads").filter(|h| *h > 0);
    let (Some(heads), Some(kv_heads)) = (heads, kv_heads) else {
        return Err("states no num_heads and kv_num_heads".into());
    };
    let cos = node.input(7);
    let width = stated
        .width
        .or_else(|| stated.output.map(|o| o / heads))
        .or_else(|| columns(model, cos?).map(|c| 2 * c));
    let Some(width) = width.filter(|w| *w > 0) else {
        return Err(format!(
            "has {heads} heads of unknown width: neither the cache's shape nor the layer behind it states it"
        ));
    };
    let first = node.input(0).ok_or("has no query")?;
    let (query, key) = match node.input(1) {
        Some(key) => (
            Projection::rows(first, 0, heads),
            Projection::rows(key, 0, kv_heads),
        ),
        None => (
            Projection::rows(first, 0, heads),
            Projection::rows(first, heads * width, kv_heads),
        ),
    };
    let rotary = if node.attr_int("do_rotary").unwrap_or(0) == 0 {
        None
    } else {
        let (Some(cos), Some(sin), Some(lengths)) = (cos, node.input(8), node.input(5)) else {
            return Err("has do_rotary but not cos_cache, sin_cache and seqlens_k".into());
        };
        Some(Rotary {
            cos,
            sin,
            lengths,
            positions: node.input(9),
            interleaved: node.attr_int("rotary_interleaved").unwrap_or(0) != 0,
            // A table that is computed states no width; then all is rotated.
            width: columns(model, cos)
                .filter(|c| *c > 0)
                .map_or(width, |c| 2 * c)
                .min(width),
        })
    };
    Ok(Attention {
        node: id,
        query,
        key,
        rotary,
        scale: scale(node, Some(width)),
        softcap: f64::from(node.attr_float("softcap").unwrap_or(0.0)),
        heads: Some(heads),
        kv_heads: Some(kv_heads),
        width: Some(width),
        // (`attention_bias` would hide padding, but lengths say where keys lie.)
        masked: false,
    })
}

fn multi_head(model: &Model, id: NodeId, stated: Stated) -> Result<Attention, String> {
    let node = model.node(id);
    let heads = node.attr_int("num_heads").filter(|h| *h > 0);
    let heads = heads.ok_or("states no num_heads")?;
    let (Some(query), Some(key)) = (node.input(0), node.input(1)) else {
        return Err("has packed queries, keys and values in one tensor, which is not supported; export with \
                    separate inputs"
            .into());
    };
    if node.input(2).is_none() {
        return Err(
            "has packed keys and values, which is not supported; export with separate inputs"
                .into(),
        );
    }
    if let Some(slot) = [8, 9].into_iter().find(|s| node.input(*s).is_some()) {
        return Err(format!(
            "reads input {slot} (a cache buffer shared between steps), which is not supported; export with \
             past and present tensors"
        ));
    }
    let width = stated.width.or_else(|| stated.output.map(|o| o / heads));
    let mut query = Projection::rows(query, 0, heads);
    let mut key = Projection::rows(key, 0, heads);
    if let (Some(bias), Some(width)) = (node.input(3), width) {
        query.bias = Some((bias, 0));
        key.bias = Some((bias, heads * width));
    }
    Ok(Attention {
        node: id,
        query,
        key,
        rotary: None,
        scale: scale(node, width),
        softcap: 0.0,
        heads: Some(heads),
        kv_heads: Some(heads),
        width,
        masked: node.input(4).is_some() || node.input(5).is_some(),
    })
}

fn standard(model: &Model, id: NodeId, stated: Stated) -> Result<Attention, String> {
    let node = model.node(id);
    let (Some(query), Some(key)) = (node.input(0), node.input(1)) else {
        return Err("has no query and key".into());
    };
    let heads = node.attr_int("q_num_heads").filter(|h| *h > 0);
    let kv_heads = node.attr_int("kv_num_heads").filter(|h| *h > 0);
    let width = stated.width;
    // Rank 3 needs the head counts, rank 4 must not have them.
    let (query, key) = match (heads, kv_heads) {
        (Some(h), Some(kv)) => (Projection::rows(query, 0, h), Projection::rows(key, 0, kv)),
        _ => (Projection::heads(query), Projection::heads(key)),
    };
    Ok(Attention {
        node: id,
        query,
        key,
        rotary: None,
        scale: scale(node, width),
        softcap: f64::from(node.attr_float("softcap").unwrap_or(0.0)),
        heads,
        kv_heads,
        width,
        masked: node.input(3).is_some(),
    })
}

/// The stated scale, or 1/√width; NaN if neither is known.
fn scale(node: &Node, width: Option<i64>) -> f64 {
    let stated = node.attr_float("scale").filter(|s| *s != 0.0);
    let usual = || width.map_or(f64::NAN, |w| 1.0 / (w as f64).sqrt());
    stated.map_or_else(usual, f64::from)
}

/// Columns of a table, where the file states them.
fn columns(model: &Model, table: ValueId) -> Option<i64> {
    if let Some(dims) = consts::dims(model, table) {
        return dims.last().copied();
    }
    let shape = model.value(table).ty.as_ref()?.shape()?;
    shape.last().and_then(Dim::known)
}

impl Projection {
    /// `[batch, heads, sequence, head_dim]`.
    pub(super) fn heads(value: ValueId) -> Self {
        Self {
            value,
            layout: Layout::Heads,
            bias: None,
        }
    }

    fn rows(value: ValueId, start: i64, heads: i64) -> Self {
        Self {
            value,
            layout: Layout::Rows { start, heads },
            bias: None,
        }
    }
}
