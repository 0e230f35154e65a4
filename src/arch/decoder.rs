//! A Llama-like decoder, with or without a key/value cache.
//!
//! Layers are numbered by the cache outputs that every exporter names
//! (`present.N.key`). From each, the new keys are found behind the cache
//! concatenation, and from these the residual tensor that enters the layer: the
//! last value before them through which all data passes. A decoder without any
//! cache has its attentions for layers, in the order of the data. Either way no
//! attention between embeddings and logits may be left over.

use std::collections::BTreeMap;

use super::attention::{Site, operand};
use super::layers::{Live, key_shape, scored, uncached};
use super::residual::articulations;
use super::tower::element_type;
use super::{MIN_OPSET, NoMatch, hidden_network};
use crate::ir::cone::{ancestors, carries_data, descendants};
use crate::ir::{DataType, Def, Dim, Model, Node, ValueId, consts};

/// What is looked for.
const WANT: &str = "a decoder";

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// Residual tensor `[batch, sequence, width]` that enters the layer.
    pub boundary: ValueId,
    /// Cache inputs `[batch, kv_heads, past, head_dim]`, if the decoder goes on
    /// from a cache.
    pub past: Option<(ValueId, ValueId)>,
    /// Cache outputs `[batch, kv_heads, past + sequence, head_dim]`, if it gives
    /// them.
    pub present: Option<(ValueId, ValueId)>,
    /// Keys of the tokens processed now, rotary embedding applied, before the
    /// cache: `[batch, kv_heads, sequence, head_dim]`.
    pub new_key: ValueId,
    /// Query operand `[batch, heads, sequence, head_dim]`, rotary embedding (and
    /// what scale the exporter put on it) applied.
    pub query: ValueId,
    /// Factor that the attention applies besides what `query` carries.
    pub scale: f64,
    /// The attention.
    pub site: Site,
}

/// Token ids beside the embeddings.
#[derive(Clone, Copy, Debug)]
pub struct TokenIds {
    /// Graph input `[batch, sequence]`.
    pub value: ValueId,
    /// The id that image features take the place of, as the graph compares it.
    pub image: i64,
}

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
    /// Graph input `[batch, sequence]`.
    pub position_ids: Option<ValueId>,
    /// Graph output `[batch, sequence, vocabulary]`.
    pub logits: ValueId,
    /// Layers in order.
    pub layers: Vec<DecoderLayer>,
    /// Residual tensors in order, `embeds` first (the boundaries among them).
    pub residuals: Vec<ValueId>,
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
        let opset = model.opset("").unwrap_or(0);
        if opset < MIN_OPSET {
            return fail(format!(
                "operator set {opset}; at least {MIN_OPSET} is needed: export again with a higher opset, or \
                 convert with onnx.version_converter"
            ));
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
        let caches = Caches::of(model);
        let mut outputs = model.graph().outputs.iter().copied();
        let logits = outputs.find(|v| {
            caches.role(model.name(*v)).is_none()
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
        let residuals = articulations(model, embeds, logits);
        if residuals.is_empty() {
            return fail(format!(
                "'{}' does not depend on '{}'",
                model.name(logits),
                model.name(embeds)
            ));
        }
        let live = Live::of(model, embeds, logits);
        let mut layers = Vec::new();
        for (number, present) in &caches.present {
            let layer = Layer {
                model,
                caches: &caches,
                number: *number,
                present: *present,
            };
            layers.push(layer.recognise(&residuals, &live.sites)?);
        }
        if caches.present.is_empty() {
            if !caches.past.is_empty() {
                return fail(
                    "cache inputs, but no cache outputs (present.N.key, present.N.value)".into(),
                );
            }
            for (number, site) in live.sites.iter().enumerate() {
                layers.push(uncached(model, number, site, &residuals)?);
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
        let order = |v: ValueId| residuals.iter().position(|r| *r == v);
        for (i, pair) in layers.windows(2).enumerate() {
            if order(pair[0].boundary) >= order(pair[1].boundary) {
                return fail(format!(
                    "layers {i} and {} are entered by the same tensor '{}'; parallel layers are not supported",
                    i + 1,
                    model.name(pair[1].boundary)
                ));
            }
        }
        let Some((kv_heads, head_dim)) = key_shape(model, &layers[0]) else {
            return fail(format!(
                "the number of heads and their width cannot be told from '{}'; expected [batch, kv_heads, \
                 sequence, head_dim], stated by a cache or by the reshape of the key projection",
                model.name(layers[0].new_key)
            ));
        };
        let named = |name: &str| model.input(name);
        let last = |v: ValueId| {
            let shape = model.value(v).ty.as_ref().and_then(|t| t.shape());
            shape.and_then(<[Dim]>::last).and_then(Dim::known)
        };
        let stated = layers[0].site.query.heads.map(|h| h.0).filter(|h| *h > 0);
        let heads = stated.or_else(|| output_width(model, &layers[0].site).map(|w| w / head_dim));
        let heads = heads.filter(|h| *h > 0 && h % kv_heads == 0);
        Ok(Self {
            embeds,
            ids: None,
            attention_mask: named("attention_mask"),
            position_ids: named("position_ids"),
            logits,
            width: last(embeds),
            heads,
            kv_heads,
            head_dim,
            vocabulary: last(logits),
            dtype: element_type(model, embeds).unwrap_or(DataType::Float),
            residuals,
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
}

/// What the heads of an attention give together: the depth of the linear layer
/// that reads its result. (The query projection may be packed with others.)
fn output_width(model: &Model, site: &Site) -> Option<i64> {
    let mut at = model.node(site.node).output(0)?;
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
        consts::dims(model, source).filter(|d| d.len() == 2)
    };
    match node.op_type.as_str() {
        "MatMul" | "MatMulInteger" | "FusedMatMul" => weight().map(|d| d[0]),
        "Gemm" => weight().map(|d| d[usize::from(node.attr_int("transB") == Some(1))]),
        "MatMulNBits" => node.attr_int("K"),
        _ => None,
    }
}

/// Cache inputs and outputs by layer number.
struct Caches {
    present: BTreeMap<usize, (ValueId, ValueId)>,
    past: BTreeMap<usize, (ValueId, ValueId)>,
}

impl Caches {
    fn of(model: &Model) -> Self {
        let graph = model.graph();
        let mut found = Self {
            present: BTreeMap::new(),
            past: BTreeMap::new(),
        };
        let pairs = |values: &[ValueId], what: &str| {
            let (mut keys, mut layers) = (BTreeMap::new(), BTreeMap::new());
            for &value in values {
                match cache_name(model.name(value), what) {
                    Some((layer, true)) => {
                        keys.insert(layer, value);
                    }
                    Some((layer, false)) => {
                        if let Some(&key) = keys.get(&layer) {
                            layers.insert(layer, (key, value));
                        }
                    }
                    None => {}
                }
            }
            layers
        };
        found.present = pairs(&graph.outputs, "present");
        found.past = pairs(&graph.inputs, "past");
        found
    }

    fn role(&self, name: &str) -> Option<(usize, bool)> {
        cache_name(name, "present")
    }
}

/// (layer, is key) of a cache name such as `present.3.key`,
/// `past_key_values.3.value` or `past_key_3`.
fn cache_name(name: &str, what: &str) -> Option<(usize, bool)> {
    let rest = name.strip_prefix(what)?;
    let digits: String = rest
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    let layer = digits.parse().ok()?;
    // `past_key_values` holds both words: the layer's own word comes last.
    let own = rest.replace("key_values", "");
    match (own.contains("key"), own.contains("value")) {
        (true, false) => Some((layer, true)),
        (false, true) => Some((layer, false)),
        _ => None,
    }
}

struct Layer<'a> {
    model: &'a Model,
    caches: &'a Caches,
    number: usize,
    present: (ValueId, ValueId),
}

impl Layer<'_> {
    fn recognise(&self, residuals: &[ValueId], all: &[Site]) -> Result<DecoderLayer, NoMatch> {
        let model = self.model;
        let number = self.number;
        let fail = |found: String| NoMatch::new(format!("decoder layer {number}"), found);
        let past = self.caches.past.get(&number).copied();
        if past.is_none() && !self.caches.past.is_empty() {
            return Err(fail(format!(
                "no cache inputs past_key_values.{number}.key/value, which other layers have"
            )));
        }
        let (new_key, cache) = match past {
            Some(past) => self.new_rows(past.0, self.present.0),
            None => self.only_rows(residuals[0], self.present.0),
        }
        .map_err(&fail)?;
        let source = ancestors(model, &[new_key], true);
        let Some(&boundary) = residuals.iter().rev().find(|r| source.contains(r)) else {
            return Err(fail(format!(
                "'{}' does not depend on the residual stream",
                model.name(self.present.0)
            )));
        };
        // Re-arranging may lie on both sides of what the cache holds.
        let own = [self.present.0, cache, operand(model, cache).root];
        let reads = |s: &&Site| own.contains(&s.key.root);
        let Some(site) = all.iter().find(reads) else {
            let fused = model
                .value(cache)
                .uses
                .iter()
                .map(|u| model.describe(u.node));
            let fused: Vec<String> = fused.chain(self.fused()).collect();
            return Err(fail(format!(
                "no attention reads '{}' (its readers: {})",
                model.name(self.present.0),
                if fused.is_empty() {
                    "none".into()
                } else {
                    fused.join(", ")
                }
            )));
        };
        let (query, scale) = scored(model, site, boundary).map_err(&fail)?;
        Ok(DecoderLayer {
            boundary,
            past,
            present: Some(self.present),
            new_key,
            query,
            scale,
            site: site.clone(),
        })
    }

    fn fused(&self) -> Option<String> {
        self.model
            .producer_of(self.present.0)
            .map(|n| self.model.describe(n))
    }

    /// The keys that a decoder without a past gives out, as they are or behind a
    /// concatenation with an empty cache, and what it gives out.
    fn only_rows(&self, embeds: ValueId, present: ValueId) -> Result<(ValueId, ValueId), String> {
        let model = self.model;
        let data = descendants(model, &[embeds], true);
        let mut at = present;
        while let Some(producer) = model.producer_node(at) {
            let mut fresh = producer
                .inputs
                .iter()
                .flatten()
                .filter(|i| data.contains(i));
            let next = match (producer.op_type.as_str(), fresh.next(), fresh.next()) {
                ("Identity" | "Cast" | "Concat", Some(&new), None) => new,
                _ => break,
            };
            at = next;
        }
        if !data.contains(&at) {
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
        let from_past = descendants(model, &[past], true);
        let mut at = present;
        loop {
            let Def::Node { node, slot: _ } = model.value(at).def else {
                return Err(format!("'{}' is not computed", model.name(present)));
            };
            let producer = model.node(node);
            if producer.is("Identity") || producer.is("Cast") {
                at = producer.input(0).ok_or("an Identity without input")?;
                continue;
            }
            if producer.is("Concat") {
                let mut fresh = producer
                    .inputs
                    .iter()
                    .flatten()
                    .filter(|i| !from_past.contains(i));
                if let (Some(&new), None) = (fresh.next(), fresh.next()) {
                    return Ok((new, at));
                }
            }
            return Err(format!(
                "expected '{}' to be Concat(past, new keys), found {}",
                model.name(present),
                model.describe(node)
            ));
        }
    }
}
