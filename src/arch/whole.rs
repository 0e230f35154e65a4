//! A whole vision-language model in one graph: pixels and token ids in, logits
//! out.
//!
//! The two ends that other exports have as files are inner values here:
//!
//! ```text
//! pixels ─ tower ─ projector ─ features ─┐ (flattened, sliced, …)
//! ids ──┬─ table ─ text embeddings ──────┴▶ scatter ─ embeds ─ layers ─ logits
//!       └─ == image token ────────────────▶
//! ```
//!
//! `embeds` is the residual tensor that enters the first layer; the join is the
//! first value through which all of the pixels' data passes and that the text
//! embeddings reach too. No operator of the scatter has to be known.

use super::pixels::pixels_of;
use super::residual::articulations;
use super::{Decoder, NoMatch, TokenIds, VisionTower, hidden_network, too_old};
use crate::ir::cone::{ancestors, descendants};
use crate::ir::{DataType, Model, NodeId, ValueId, consts};

const WANT: &str = "a whole model (vision tower, token embedding and decoder in one graph)";

/// A recognised whole model.
#[derive(Clone, Debug)]
pub struct WholeModel {
    /// Vision tower and projector; the features are an inner value.
    pub tower: VisionTower,
    /// The decoder; its embeddings are an inner value, and it knows the token ids.
    pub decoder: Decoder,
    /// Token ids `[batch, sequence]`.
    pub ids: TokenIds,
    /// Text embeddings before the features take their places: as many elements as
    /// `[batch, sequence, width]` has.
    pub text: ValueId,
}

impl WholeModel {
    /// Whether a graph takes both pixels and token ids.
    pub fn has_interface(model: &Model) -> bool {
        pixels_of(model).is_some() && ids_of(model).is_some()
    }

    /// Recognises a whole model.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let fail = |found: String| Err(NoMatch::new(WANT, found));
        let (Some(pixels), Some(ids)) = (pixels_of(model), ids_of(model)) else {
            return fail("it does not take both pixel_values and input_ids".into());
        };
        let logits = Decoder::logits_of(model)?;
        if let Some(why) = hidden_network(model) {
            return fail(why);
        }
        if let Some(why) = too_old(model) {
            return fail(why);
        }
        let from_pixels = descendants(model, &[pixels], true);
        let tables = look_ups(model, ids);
        if tables.is_empty() {
            return fail(format!(
                "no table is looked up with '{}' (Gather of a constant)",
                model.name(ids)
            ));
        }
        let from_text = descendants(model, &tables, true);
        let line = articulations(model, pixels, logits);
        let Some(at) = line.iter().position(|v| from_text.contains(v)) else {
            return fail(format!(
                "the data of '{}' and the embeddings of '{}' never meet in one tensor",
                model.name(pixels),
                model.name(ids)
            ));
        };
        let joined = line[at];
        let Some(join) = model.producer_of(joined) else {
            return fail(format!("'{}' is not computed", model.name(joined)));
        };
        // A provisional decoder tells where its first layer begins: after whatever
        // brings the joined embeddings into shape.
        let probe = Decoder::between(model, joined, logits)?;
        let [embeds] = probe.layers[0].boundary[..] else {
            return fail(format!(
                "several tensors enter the first layer, of which '{}' is one; one residual tensor was expected",
                model.name(probe.layers[0].boundary[0])
            ));
        };
        let mut decoder = Decoder::between(model, embeds, logits)?;
        let mut scattered = line[..at].iter().rev().copied();
        let Some(features) = scattered.find(|&v| computed(model, v)) else {
            return fail(format!(
                "'{}' does not come out of a network that reads '{}'",
                model.name(joined),
                model.name(pixels)
            ));
        };
        let tower = VisionTower::between(model, pixels, features, None)?;
        let operands = |id: NodeId| model.node(id).inputs.iter().flatten().copied();
        let Some(text) = operands(join).find(|v| from_text.contains(v) && !from_pixels.contains(v))
        else {
            return fail(format!(
                "{} puts features and text together, but reads no text embeddings of their own",
                model.describe(join)
            ));
        };
        // What says where: neither text embeddings nor features.
        let places: Vec<ValueId> = operands(join)
            .filter(|v| !from_text.contains(v) && !from_pixels.contains(v))
            .collect();
        let image = image_token(model, ids, &places, join)?;
        let ids = TokenIds { value: ids, image };
        decoder.ids = Some(ids);
        decoder.width = decoder.width.or(tower.feature_width);
        Ok(Self {
            tower,
            decoder,
            ids,
            text,
        })
    }
}

/// Operators that pass on what their first input holds.
const ARRANGING: &[&str] = &[
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Cast",
    "CastLike",
    "Slice",
    "Split",
    "Concat",
    "Expand",
    "Gather",
    "GatherND",
    "GatherElements",
    "Transpose",
];

/// Whether a value is more than a re-arrangement of another.
fn computed(model: &Model, value: ValueId) -> bool {
    let producer = model.producer_node(value);
    producer.is_some_and(|n| !n.is("Where") && !ARRANGING.contains(&n.op_type.as_str()))
}

/// The graph input of token ids, by its name and type.
fn ids_of(model: &Model) -> Option<ValueId> {
    let ids = model.input("input_ids")?;
    let ty = model.value(ids).ty.as_ref()?;
    let integer = matches!(ty.dtype(), Some(DataType::Int64 | DataType::Int32));
    (integer && ty.shape().is_none_or(|s| s.len() == 2)).then_some(ids)
}

/// Rows of constant tables at places that come from `ids`.
fn look_ups(model: &Model, ids: ValueId) -> Vec<ValueId> {
    let from_ids = descendants(model, &[ids], true);
    let table = |v: ValueId| {
        let source = model
            .producer_node(v)
            .filter(|n| n.is("DequantizeLinear"))
            .and_then(|n| n.input(0))
            .unwrap_or(v);
        consts::dims(model, source).is_some_and(|d| d.len() >= 2)
    };
    let nodes = model.graph().nodes.iter().map(|&n| model.node(n));
    nodes
        .filter(|n| matches!(n.op_type.as_str(), "Gather" | "GatherBlockQuantized"))
        .filter(|n| n.input(0).is_some_and(table))
        .filter(|n| n.input(1).is_some_and(|i| from_ids.contains(&i)))
        .filter_map(|n| n.output(0))
        .collect()
}

/// The constant that the ids are compared with to say where features go.
fn image_token(
    model: &Model,
    ids: ValueId,
    places: &[ValueId],
    join: NodeId,
) -> Result<i64, NoMatch> {
    let cone = ancestors(model, places, false);
    let is_ids = |mut v: ValueId| {
        while v != ids {
            match model.producer_node(v) {
                Some(n) if ARRANGING.contains(&n.op_type.as_str()) => match n.input(0) {
                    Some(next) => v = next,
                    None => return false,
                },
                _ => return false,
            }
        }
        true
    };
    let mut found: Vec<(i64, NodeId)> = Vec::new();
    for &id in &model.graph().nodes {
        let node = model.node(id);
        let inside = node.output(0).is_some_and(|o| cone.contains(&o));
        let (Some(a), Some(b), true) = (node.input(0), node.input(1), inside && node.is("Equal"))
        else {
            continue;
        };
        let other = match (is_ids(a), is_ids(b)) {
            (true, false) => b,
            (false, true) => a,
            _ => continue,
        };
        if let Some(token) = consts::int(model, other)
            && found.iter().all(|(t, _)| *t != token)
        {
            found.push((token, id));
        }
    }
    match found.as_slice() {
        [(token, _)] => Ok(*token),
        [] => Err(NoMatch::new(
            WANT,
            format!(
                "where {} puts features is not told by comparing '{}' with a constant (the image token)",
                model.describe(join),
                model.name(ids)
            ),
        )),
        several => {
            let list: Vec<String> = several
                .iter()
                .map(|(t, n)| format!("{t} at {}", model.describe(*n)))
                .collect();
            Err(NoMatch::new(
                WANT,
                format!(
                    "where {} puts features depends on several token ids ({}); one image token was expected",
                    model.describe(join),
                    list.join(", ")
                ),
            ))
        }
    }
}
