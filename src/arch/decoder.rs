//! A Llama-like decoder with a key/value cache.
//!
//! Layers are numbered by the cache outputs that every exporter names
//! (`present.N.key`). From each, the new keys are found behind the cache
//! concatenation, and from these the residual tensor that enters the layer: the
//! last value before them through which all data passes.

use std::collections::{BTreeMap, HashSet};

use super::attention::{Site, operand, sites};
use super::residual::articulations;
use super::tower::element_type;
use super::{MIN_OPSET, NoMatch, hidden_network};
use crate::ir::cone::{ancestors, carries_data, descendants};
use crate::ir::{DataType, Def, Dim, Model, Node, ValueId, consts};

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// Residual tensor `[batch, sequence, width]` that enters the layer.
    pub boundary: ValueId,
    /// Cache inputs `[batch, kv_heads, past, head_dim]`; `None` in a graph that
    /// starts a cache and takes none.
    pub past: Option<(ValueId, ValueId)>,
    /// Cache outputs `[batch, kv_heads, past + sequence, head_dim]`.
    pub present: (ValueId, ValueId),
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

/// A recognised decoder.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Graph input `[batch, sequence, width]`.
    pub embeds: ValueId,
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
    /// Recognises a decoder.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let want = "a decoder with a cache";
        let fail = |found: String| Err(NoMatch::new(want, found));
        let graph = model.graph();
        let caches = Caches::of(model);
        let Some(logits) = graph.outputs.iter().copied().find(|v| {
            caches.role(model.name(*v)).is_none()
                && element_type(model, *v).is_some_and(DataType::is_float)
        }) else {
            return fail("no floating-point output besides the cache (logits)".into());
        };
        if caches.present.is_empty() {
            return fail("no cache outputs (present.N.key, present.N.value)".into());
        }
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
        let residuals = articulations(model, embeds, logits);
        if residuals.is_empty() {
            return fail(format!(
                "'{}' does not depend on '{}'",
                model.name(logits),
                model.name(embeds)
            ));
        }
        let all_sites = sites(model);
        let mut layers = Vec::new();
        for (number, present) in &caches.present {
            let layer = Layer {
                model,
                caches: &caches,
                number: *number,
                present: *present,
            };
            layers.push(layer.recognise(&residuals, &all_sites)?);
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
        // Exporters do not always know the key's sizes; the value has the same.
        let DecoderLayer { past, present, .. } = &layers[0];
        let caches = past.iter().chain([present]).flat_map(|p| [p.0, p.1]);
        let caches: Vec<ValueId> = caches.collect();
        let known = |axis: usize| {
            let of = |v: &ValueId| {
                let shape = model.value(*v).ty.as_ref().and_then(|t| t.shape());
                shape.filter(|d| d.len() == 4).and_then(|d| d[axis].known())
            };
            caches.iter().find_map(of)
        };
        let (Some(kv_heads), Some(head_dim)) = (known(1), known(3)) else {
            return fail(format!(
                "'{}' does not state its number of heads and head width; expected [batch, kv_heads, past, \
                 head_dim]",
                model.name(caches[0])
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
                "no cache inputs past_key_values.{number}.key/value"
            )));
        }
        let rows = self.new_rows(past.map(|p| p.0), self.present.0);
        let (new_key, cache) = rows.map_err(&fail)?;
        let source = ancestors(model, &[new_key], true);
        let Some(&boundary) = residuals.iter().rev().find(|r| source.contains(r)) else {
            return Err(fail(format!(
                "'{}' does not depend on the residual stream",
                model.name(self.present.0)
            )));
        };
        let reads = |s: &&Site| s.key.root == self.present.0 || s.key.root == cache;
        // Where no cache comes in, the output may be taken off behind a step that
        // the trace from the attention passes over.
        let origin = past.is_none().then(|| operand(model, cache).root);
        let same = |s: &&Site| Some(s.key.root) == origin;
        let Some(site) = all.iter().find(reads).or_else(|| all.iter().find(same)) else {
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
        if site.softcap != 0.0 {
            let at = model.describe(site.node);
            return Err(fail(format!(
                "{at} bounds its scores (softcap), which is not supported"
            )));
        }
        let scale = site.key.scale * site.post_scale;
        if !scale.is_finite() {
            let at = model.describe(site.node);
            return Err(fail(format!("the scale of {at} is not a constant")));
        }
        let query = site.query.value;
        if !descendants(model, &[boundary], true).contains(&query) {
            let at = model.describe(site.node);
            return Err(fail(format!(
                "the query of {at} does not come from '{}'",
                model.name(boundary)
            )));
        }
        Ok(DecoderLayer {
            boundary,
            past,
            present: self.present,
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

    /// The rows that are appended to the cache (the other part of the
    /// concatenation with the past), and the concatenation.
    /// Without a past they are the cache output itself.
    fn new_rows(
        &self,
        past: Option<ValueId>,
        present: ValueId,
    ) -> Result<(ValueId, ValueId), String> {
        let model = self.model;
        let from_past = match past {
            Some(past) => descendants(model, &[past], true),
            None => HashSet::new(),
        };
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
            if past.is_none() {
                return Ok((at, at));
            }
            return Err(format!(
                "expected '{}' to be Concat(past, new keys), found {}",
                model.name(present),
                model.describe(node)
            ));
        }
    }
}
