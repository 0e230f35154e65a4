//! The token embedding: ids in, rows of a table out, and in some exports image
//! features put in their places.

use std::collections::HashSet;

use super::NoMatch;
use super::tower::element_type;
use crate::ir::cone::{ancestors, descendants};
use crate::ir::{DataType, Dim, Model, Node, ValueId, consts};

/// A graph that turns token ids into embeddings.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[batch, sequence]` token ids.
    pub ids: ValueId,
    /// `[batch, sequence, width]` embeddings.
    pub output: ValueId,
    /// Element type of the embeddings.
    pub dtype: DataType,
    /// Width, if the file states it.
    pub width: Option<i64>,
    /// The image features' way into the embeddings, if the graph puts them
    /// there itself (ONNX Runtime GenAI's embedding models do).
    pub scatter: Option<Scatter>,
}

/// How image features reach the embeddings inside the graph.
///
/// Between the input and the output they are only copied, so the same nodes,
/// given marks instead of features and zeros instead of everything else, tell
/// which embeddings are features.
#[derive(Clone, Debug)]
pub struct Scatter {
    /// `[images, N, width]` or `[rows, width]` features.
    pub features: ValueId,
    /// Rank of `features`.
    pub rank: usize,
    /// What meets the features on their way (text embeddings, fillers), with
    /// element types: it has their shape at that place and is no feature.
    pub others: Vec<(ValueId, DataType)>,
    /// What steers the copying (indices, shapes, conditions).
    pub steering: Vec<ValueId>,
    /// Token id whose places take the features, where the graph compares with
    /// one.
    pub placeholder: Option<i64>,
}

/// Operators that make it a network rather than a table.
const NETWORK: &[&str] = &[
    "MatMul",
    "Gemm",
    "Conv",
    "MatMulNBits",
    "MatMulInteger",
    "Softmax",
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "LSTM",
];

impl Embedding {
    /// Recognises a graph that looks token ids up in a table and gives out one
    /// floating-point tensor, with or without image features put into it.
    ///
    /// # Errors
    /// What did not fit.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let want = "a token embedding (integer ids in, one floating-point tensor out)";
        let fail = |found: String| Err(NoMatch::new(want, found));
        let graph = model.graph();
        let inputs: Vec<ValueId> = graph
            .inputs
            .iter()
            .copied()
            .filter(|&v| model.value(v).initializer.is_none())
            .collect();
        let [output] = graph.outputs.as_slice() else {
            return fail(format!("{} outputs", graph.outputs.len()));
        };
        let ty = |v: ValueId| model.value(v).ty.as_ref().and_then(|t| t.dtype());
        let rank = |v: ValueId| {
            let shape = model.value(v).ty.as_ref().and_then(|t| t.shape());
            shape.map(<[Dim]>::len)
        };
        let (ids, features) = match inputs.as_slice() {
            [ids] => (*ids, None),
            [a, b] if ty(*b).is_some_and(DataType::is_float) => (*a, Some(*b)),
            [a, b] if ty(*a).is_some_and(DataType::is_float) => (*b, Some(*a)),
            _ => {
                let names: Vec<&str> = inputs.iter().map(|v| model.name(*v)).collect();
                return fail(format!(
                    "{} inputs ({}); expected ids, and at most one input of image features",
                    inputs.len(),
                    names.join(", ")
                ));
            }
        };
        if !matches!(ty(ids), Some(DataType::Int64 | DataType::Int32)) {
            return fail(format!("input '{}' is no integer tensor", model.name(ids)));
        }
        let Some(dtype) = ty(*output).filter(|t| t.is_float()) else {
            let name = model.name(*output);
            return fail(format!("output '{name}' is no floating-point tensor"));
        };
        let by_id = descendants(model, &[ids], true);
        let tables = graph.nodes.iter().filter(|&&n| {
            let node = model.node(n);
            let slots = 0..node.inputs.len();
            let reads = |slot: usize| node.input(slot).is_some_and(|v| by_id.contains(&v));
            matches!(node.op_type.as_str(), "Gather" | "GatherBlockQuantized")
                && !reads(0)
                && slots.skip(1).any(reads)
        });
        let looked_up: Vec<ValueId> = tables.filter_map(|n| model.node(*n).output(0)).collect();
        if looked_up.is_empty() {
            return fail("no Gather in the graph that looks the ids up in a table".into());
        }
        let needed = ancestors(model, &[*output], true);
        if !looked_up.iter().any(|v| needed.contains(v)) {
            let name = model.name(*output);
            return fail(format!("output '{name}' does not depend on the table"));
        }
        let network = graph.nodes.iter().find(|&&n| {
            let node = model.node(n);
            let used = node.outputs.iter().flatten().any(|o| needed.contains(o));
            used && NETWORK.contains(&node.op_type.as_str())
        });
        if let Some(&node) = network {
            return fail(format!(
                "{} computes with what was looked up: it is a network, not a table",
                model.describe(node)
            ));
        }
        let scatter = match features {
            None => None,
            Some(features) => match rank(features) {
                Some(rank @ 2..=3) => Some(scatter(model, ids, features, rank, *output)?),
                found => {
                    return fail(format!(
                        "input '{}' has rank {found:?}; expected image features [images, N, width] or [rows, \
                         width]",
                        model.name(features)
                    ));
                }
            },
        };
        let shape = model.value(*output).ty.as_ref().and_then(|t| t.shape());
        Ok(Self {
            ids,
            output: *output,
            dtype,
            width: shape.and_then(|s| s.last()).and_then(Dim::known),
            scatter,
        })
    }
}

/// Inputs of a node that are copied to its output; `None` for a node that does
/// anything else than copying.
fn copied(node: &Node) -> Option<Vec<usize>> {
    if !(node.domain.is_empty() || node.domain == "ai.onnx") {
        return None;
    }
    let adds = match node.attr("reduction") {
        Some(crate::ir::AttrValue::String(how)) => how.as_ref() != b"none",
        _ => false,
    };
    match node.op_type.as_str() {
        "Identity" | "Cast" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Transpose"
        | "Slice" | "Gather" | "GatherND" | "GatherElements" | "Split" | "Expand" | "Tile"
        | "Compress" => Some(vec![0]),
        "Concat" => Some((0..node.inputs.len()).collect()),
        "Where" => Some(vec![1, 2]),
        "ScatterND" | "ScatterElements" if !adds => Some(vec![0, 2]),
        _ => None,
    }
}

/// Follows the features to the output.
fn scatter(
    model: &Model,
    ids: ValueId,
    features: ValueId,
    rank: usize,
    output: ValueId,
) -> Result<Scatter, NoMatch> {
    let want = "a token embedding that puts image features in their places";
    let fail = |found: String| Err(NoMatch::new(want, found));
    let reached = descendants(model, &[features], true);
    let needed = ancestors(model, &[output], true);
    if !reached.contains(&output) {
        return fail(format!(
            "'{}' does not reach '{}'",
            model.name(features),
            model.name(output)
        ));
    }
    let (mut others, mut steering) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for &id in &model.graph().nodes {
        let node = model.node(id);
        let on_the_way = |v: &ValueId| reached.contains(v) && needed.contains(v);
        if !node.outputs.iter().flatten().any(on_the_way) {
            continue;
        }
        let Some(slots) = copied(node) else {
            return fail(format!(
                "{} changes the features on their way from '{}'; expected them to be copied only, as by \
                 ScatterND or Where (compute them in the vision encoder instead)",
                model.describe(id),
                model.name(features)
            ));
        };
        for (slot, input) in node.inputs.iter().enumerate() {
            let Some(input) = *input else { continue };
            match (slots.contains(&slot), reached.contains(&input)) {
                (true, true) => {}
                (false, true) => {
                    return fail(format!(
                        "{} reads the features as its input {slot}, which steers what is copied",
                        model.describe(id)
                    ));
                }
                (true, false) if seen.insert(input) => {
                    let dtype = element_type(model, input)
                        .or_else(|| element_type(model, output))
                        .unwrap_or(DataType::Float);
                    others.push((input, dtype));
                }
                (false, false) if seen.insert(input) => steering.push(input),
                _ => {}
            }
        }
    }
    Ok(Scatter {
        features,
        rank,
        others,
        steering,
        placeholder: placeholder(model, ids),
    })
}

/// The id that the graph compares the ids with, if it is one.
fn placeholder(model: &Model, ids: ValueId) -> Option<i64> {
    let mut found: Vec<i64> = Vec::new();
    let mut same = vec![ids];
    while let Some(value) = same.pop() {
        for reader in &model.value(value).uses {
            let node = model.node(reader.node);
            match node.op_type.as_str() {
                "Cast" | "Identity" | "Unsqueeze" | "Reshape" if reader.slot == 0 => {
                    same.extend(node.output(0));
                }
                "Equal" => {
                    let other = node.input(1 - reader.slot.min(1))?;
                    found.extend(consts::int(model, other));
                }
                _ => {}
            }
        }
    }
    found.dedup();
    match found.as_slice() {
        [one] => Some(*one),
        _ => None,
    }
}
