//! A Llama-like decoder, with or without a key/value cache.
//!
//! Layers are numbered by the cache outputs that every exporter names
//! (`present.N.key`). From each, the new keys are found behind the cache
//! concatenation or in the attention operator that holds the cache, and from these
//! what enters the layer: the last values before them through which all data
//! passes. A decoder without any cache has its attentions for layers, in the order
//! of the data. Either way no attention between embeddings and logits may be left
//! over.

mod cache;
mod fused;
mod layer;
mod live;

use cache::Caches;
use layer::Layer;
use live::{Live, key_shape, uncached};

pub(super) use cache::Caches as CacheNames;
pub use layer::cache_heads;

use super::residual::Stream;
use super::tower::element_type;
use super::{NoMatch, hidden_network, too_old};
use crate::ir::cone::carries_data;
use crate::ir::{DataType, Dim, Model, Node, NodeId, ValueId, consts};

/// How the queries or keys of all heads lie in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[batch, heads, sequence, head_dim]`.
    Heads,
    /// `[batch, sequence, columns]`: heads side by side from column `start` on.
    Rows {
        /// First column.
        start: i64,
        /// Number of heads.
        heads: i64,
    },
}

/// Queries or keys of the tokens processed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// The tensor they are in.
    pub value: ValueId,
    /// Where in it.
    pub layout: Layout,
    /// A vector that the attention adds to them, and its first column
    /// (`MultiHeadAttention` with `bias`).
    pub bias: Option<(ValueId, i64)>,
}

/// A rotary embedding that the attention operator itself applies to queries and
/// keys (`GroupQueryAttention` with `do_rotary`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotary {
    /// Cosines `[positions, width / 2]`.
    pub cos: ValueId,
    /// Sines `[positions, width / 2]`.
    pub sin: ValueId,
    /// `seqlens_k` `[batch]`: length of each row with its past, less 1. Token i of
    /// L is at position `seqlens_k + 1 − L + i`.
    pub lengths: ValueId,
    /// Position ids `[batch, sequence]`, where the operator is given them.
    pub positions: Option<ValueId>,
    /// Whether neighbours are rotated together, rather than the two halves.
    pub interleaved: bool,
    /// Columns of each head that are rotated (the first ones).
    pub width: i64,
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// What enters the layer, `[batch, sequence, width]` each: the residual
    /// tensor, or (where one operator computes the residual sum and its norm)
    /// that operator's outputs.
    pub boundary: Vec<ValueId>,
    /// Cache inputs `[batch, kv_heads, past, head_dim]`, if the decoder goes on
    /// from a cache.
    pub past: Option<(ValueId, ValueId)>,
    /// Cache outputs `[batch, kv_heads, past + sequence, head_dim]`, if it gives
    /// them.
    pub present: Option<(ValueId, ValueId)>,
    /// Keys of the tokens processed now, before the cache, with every rotary
    /// embedding applied but `rotary`.
    pub new_key: Projection,
    /// Queries, with every rotary embedding but `rotary` (and what scale the
    /// exporter put on them) applied.
    pub query: Projection,
    /// Rotary embedding inside the attention operator.
    pub rotary: Option<Rotary>,
    /// Factor that the attention applies besides what `query` carries.
    pub scale: f64,
    /// Bound on the scores, `c·tanh(s / c)` of a scaled score s (0: none).
    pub softcap: f64,
    /// The attention (its `Softmax`, or the fused operator).
    pub node: NodeId,
    /// Whether the attention takes a mask. One that goes by the length of each row
    /// (`GroupQueryAttention`) knows no padding on the left.
    pub masked: bool,
    heads: Option<i64>,
    kv_heads: Option<i64>,
    head_dim: Option<i64>,
}

/// Token ids beside the embeddings.
#[derive(Clone, Copy, Debug)]
pub struct TokenIds {
    /// Graph input `[batch, sequence]`.
    pub value: ValueId,
    /// The id that image features take the place of, as the graph compares it.
    pub image: i64,
}

/// Rows of M-RoPE's position ids: time, height, width (Transformers,
/// `Qwen2VLRotaryEmbedding`).
const MROPE_ROWS: usize = 3;

/// What is looked for.
const WANT: &str = "a decoder";

/// A recognised decoder.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// `[batch, sequence, width]`: a graph input, or an inner value of a whole
    /// model.
    pub embeds: ValueId,
    /// The token ids that a whole model takes.
    pub ids: Option<TokenIds>,
    /// Graph input `[batch, past + sequence]`.
    pub attention_mask: Option<ValueId>,
    /// Graph input `[batch, sequence]`, or `[rows, batch, sequence]` (M-RoPE).
    pub position_ids: Option<ValueId>,
    /// Rows of `position_ids` of rank 3, each of which turns its own part of every
    /// head (time, height, width with Qwen2-VL's M-RoPE). `None`: rank 2.
    pub position_rows: Option<usize>,
    /// Graph output `[batch, sequence, vocabulary]`.
    pub logits: ValueId,
    /// Layers in order.
    pub layers: Vec<DecoderLayer>,
    /// What all data passes through, in order, `embeds` first (the boundaries
    /// among them): single residual tensors, or several outputs of one node.
    pub residuals: Vec<Vec<ValueId>>,
    /// Width of the residual stream, where the file states it.
    pub width: Option<i64>,
    /// Query heads, where they can be told.
    pub heads: Option<i64>,
    /// Key/value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Vocabulary size, where the file states it.
    pub vocabulary: Option<i64>,
    /// Element type of the residual stream.
    pub dtype: DataType,
}

impl Decoder {
    /// Recognises a decoder that takes embeddings.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let fail = |found: String| Err(NoMatch::new(WANT, found));
        let graph = model.graph();
        let logits = Self::logits_of(model)?;
        if let Some(why) = hidden_network(model) {
            return fail(why);
        }
        if let Some(why) = too_old(model) {
            return fail(why);
        }
        let Some(embeds) = graph.inputs.iter().copied().find(|&v| {
            let ty = model.value(v).ty.as_ref();
            let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
            let rank = ty.and_then(|t| t.shape()).map(<[Dim]>::len);
            float && rank == Some(3) && model.value(v).initializer.is_none()
        }) else {
            return fail(
                "no floating-point input of rank 3 (inputs_embeds); a decoder that takes input_ids and no \
                 pixels has no visual tokens"
                    .into(),
            );
        };
        Self::between(model, embeds, logits)
    }

    /// The output that is none of the cache's.
    pub(super) fn logits_of(model: &Model) -> Result<ValueId, NoMatch> {
        let mut outputs = model.graph().outputs.iter().copied();
        let logits = outputs.find(|v| {
            !Caches::holds(model.name(*v))
                && element_type(model, *v).is_some_and(DataType::is_float)
        });
        let none = || NoMatch::new(WANT, "no floating-point output besides the cache (logits)");
        logits.ok_or_else(none)
    }

    /// Recognises what lies between embeddings and logits.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub(super) fn between(
        model: &Model,
        embeds: ValueId,
        logits: ValueId,
    ) -> Result<Self, NoMatch> {
        let fail = |found: String| Err(NoMatch::new(WANT, found));
        let caches = Caches::of(model);
        let stream = Stream::between(model, embeds, logits);
        if stream.cuts.is_empty() {
            return fail(format!(
                "'{}' does not depend on '{}'",
                model.name(logits),
                model.name(embeds)
            ));
        }
        let live = Live::of(model, embeds, logits);
        let mut layers: Vec<DecoderLayer> = Vec::new();
        for (number, present) in &caches.present {
            let layer = Layer {
                model,
                caches: &caches,
                number: *number,
                present: *present,
                stream: &stream,
            };
            layers.push(layer.recognise(&live.sites)?);
        }
        if caches.present.is_empty() {
            if !caches.past.is_empty() {
                return fail(
                    "cache inputs, but no cache outputs (present.N.key, present.N.value)".into(),
                );
            }
            for (number, site) in live.sites.iter().enumerate() {
                layers.push(uncached(model, number, site, &stream)?);
            }
        }
        if layers.is_empty() {
            return fail(format!(
                "neither cache outputs (present.N.key, present.N.value) nor an attention between '{}' and '{}'",
                model.name(embeds),
                model.name(logits)
            ));
        }
        if let Err(found) = live.all_taken(model, &layers) {
            return fail(found);
        }
        let order = |cut: &[ValueId]| cut.first().and_then(|v| stream.place(*v));
        for (i, pair) in layers.windows(2).enumerate() {
            if order(&pair[0].boundary) >= order(&pair[1].boundary) {
                return fail(format!(
                    "layers {i} and {} are entered by the same tensor '{}'; parallel layers are not supported",
                    i + 1,
                    model.name(pair[1].boundary[0])
                ));
            }
        }
        let first: &DecoderLayer = &layers[0];
        let Some((kv_heads, head_dim)) = key_shape(model, first) else {
            return fail(format!(
                "the number of heads and their width cannot be told from '{}'; expected [batch, kv_heads, \
                 sequence, head_dim], stated by a cache or by the reshape of the key projection",
                model.name(first.new_key.value)
            ));
        };
        if let Some(i) = layers.iter().position(|l| {
            l.kv_heads.is_some_and(|h| h != kv_heads) || l.head_dim.is_some_and(|w| w != head_dim)
        }) {
            return fail(format!(
                "layer {i} has other heads than layer 0 ({kv_heads} key heads of width {head_dim}), at {}; \
                 layers of different shape are not supported",
                model.describe(layers[i].node)
            ));
        }
        let named = |name: &str| model.input(name);
        let position_rows = named("position_ids").and_then(|v| {
            let shape = model.value(v).ty.as_ref()?.shape()?;
            let rows = shape.first().filter(|_| shape.len() == 3)?;
            let stated = rows.known().and_then(|n| usize::try_from(n).ok());
            Some(stated.unwrap_or(MROPE_ROWS))
        });
        let last = |v: ValueId| {
            let shape = model.value(v).ty.as_ref().and_then(|t| t.shape());
            shape.and_then(<[Dim]>::last).and_then(Dim::known)
        };
        let heads = first
            .heads
            .or_else(|| output_width(model, first.node).map(|w| w / head_dim));
        let heads = heads.filter(|h| *h > 0 && h % kv_heads == 0);
        Ok(Self {
            embeds,
            ids: None,
            attention_mask: named("attention_mask"),
            position_ids: named("position_ids"),
            position_rows,
            logits,
            width: last(embeds),
            heads,
            kv_heads,
            head_dim,
            vocabulary: last(logits),
            dtype: element_type(model, embeds).unwrap_or(DataType::Float),
            residuals: stream.cuts,
            layers,
        })
    }

    /// Whether a graph takes embeddings and gives logits, whatever is in between.
    pub fn has_interface(model: &Model) -> bool {
        let embeds = model.graph().inputs.iter().any(|&v| {
            let ty = model.value(v).ty.as_ref();
            let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
            float && ty.and_then(|t| t.shape()).map(<[Dim]>::len) == Some(3)
        });
        let caches = !Caches::of(model).present.is_empty();
        (embeds || caches) && model.output("logits").is_some()
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Whether rows of a batch may be padded on the left: every attention takes
    /// a mask.
    pub fn takes_padding(&self) -> bool {
        self.layers.iter().all(|l| l.masked)
    }

    /// Whether single columns can be kept from every attention: each takes a mask, and the
    /// client gives it.
    pub fn hides_columns(&self) -> bool {
        self.attention_mask.is_some() && self.takes_padding()
    }
}

/// What the heads of an attention give together: the depth of the linear layer
/// that reads its result. (The query projection may be packed with others.)
fn output_width(model: &Model, attention: NodeId) -> Option<i64> {
    let mut at = model.node(attention).output(0)?;
    for _ in 0..16 {
        // The result goes one way; sizes are read off it besides.
        let mut readers = model
            .value(at)
            .uses
            .iter()
            .filter(|u| carries_data(model, u.node));
        let reader = model.node(readers.next()?.node);
        if let Some(depth) = linear_depth(model, reader) {
            return Some(depth);
        }
        at = reader.output(0)?;
    }
    None
}

/// Input width of a linear layer with a constant weight.
fn linear_depth(model: &Model, node: &Node) -> Option<i64> {
    let weight = || {
        let value = node.input(1)?;
        let dequantized = model
            .producer_node(value)
            .filter(|n| n.is("DequantizeLinear"));
        let source = dequantized.and_then(|n| n.input(0)).unwrap_or(value);
        // An exporter that folds nothing turns PyTorch's weights at run time.
        let turned = model
            .producer_node(source)
            .filter(|n| n.is("Transpose") && n.attr_ints("perm") == Some(&[1, 0]));
        let dims = match turned {
            Some(node) => {
                consts::dims(model, node.input(0)?).map(|d| d.into_iter().rev().collect())
            }
            None => consts::dims(model, source),
        };
        dims.filter(|d: &Vec<i64>| d.len() == 2)
    };
    match node.op_type.as_str() {
        "MatMul" | "MatMulInteger" | "FusedMatMul" => weight().map(|d| d[0]),
        "Gemm" => weight().map(|d| d[usize::from(node.attr_int("transB") == Some(1))]),
        "MatMulNBits" => node.attr_int("K"),
        _ => None,
    }
}
