//! Networks in places where recognition does not look: bodies of `If`, `Loop` and
//! `Scan`, and model-local functions.

use std::collections::BTreeSet;

use super::MIN_OPSET;
use super::segments::in_segments;
use crate::ir::{GraphId, Model, Node, NodeId, called};

/// Operators that hold learned matrices or do what only a network does.
const HEAVY: &[&str] = &[
    "MatMul",
    "Gemm",
    "Conv",
    "Einsum",
    "Attention",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
    "MatMulNBits",
    "FusedMatMul",
    "FusedGemm",
    "MultiHeadAttention",
    "GroupQueryAttention",
];

pub(super) fn heavy(node: &Node) -> bool {
    let known = node.domain.is_empty() || node.domain.starts_with("com.microsoft");
    known && HEAVY.contains(&node.op_type.as_str())
}

/// Whether a graph or a body in it, or a function that one of them calls, holds
/// part of a network.
fn holds_network(model: &Model, graph: GraphId, seen: &mut BTreeSet<GraphId>) -> bool {
    if !seen.insert(graph) {
        return false;
    }
    let nodes = &model.subgraph(graph).nodes;
    nodes.iter().any(|&id| {
        let node = model.node(id);
        let function = model.function_of(node);
        let inner = function.map(|f| model.functions[f].body);
        (function.is_none() && heavy(node))
            || node
                .subgraphs()
                .chain(inner)
                .any(|g| holds_network(model, g, seen))
    })
}

/// Model-local functions that are called and hold part of a network, themselves
/// or through what they call; positions in [`Model::functions`].
pub fn network_functions(model: &Model) -> BTreeSet<usize> {
    let mut reached = BTreeSet::new();
    let mut stack = called(model, model.main());
    while let Some(index) = stack.pop() {
        if reached.insert(index) {
            stack.extend(called(model, model.functions[index].body));
        }
    }
    let network = |f: &usize| holds_network(model, model.functions[*f].body, &mut BTreeSet::new());
    reached.into_iter().filter(network).collect()
}

/// Nodes of the main graph whose bodies hold part of a network; a loop that is one attention
/// over segments does not count.
pub(super) fn network_holders(model: &Model) -> Vec<NodeId> {
    let nodes = model.graph().nodes.iter().copied();
    let nodes = nodes.filter(|id| in_segments(model, *id).is_none());
    let holds = |id: &NodeId| {
        let mut bodies = model.node(*id).subgraphs();
        bodies.any(|g| holds_network(model, g, &mut BTreeSet::new()))
    };
    nodes.filter(holds).collect()
}

/// Says so where a model's operator set is below [`MIN_OPSET`], and what would do instead.
pub(super) fn too_old(model: &Model) -> Option<String> {
    let found = model.opset("").unwrap_or(0);
    (found < MIN_OPSET).then(|| {
        format!(
            "operator set {found}; at least {MIN_OPSET} is needed: export again with a higher opset, or convert \
             with onnx.version_converter"
        )
    })
}

/// Constructs that no pass may skip silently: a network hidden in a sub-graph or
/// function. Says where the first one is, and what would do instead.
pub fn hidden_network(model: &Model) -> Option<String> {
    if let Some(&holder) = network_holders(model).first() {
        let place = model.describe(holder);
        let instead = if model.node(holder).is("If") {
            "export the decoder without branches (one graph that takes an empty cache), or as \
             decoder_model and decoder_with_past_model instead of the merged file"
        } else {
            "export with the loop unrolled"
        };
        return Some(format!(
            "part of the network lies in a sub-graph of {place}; {instead}"
        ));
    }
    let index = *network_functions(model).first()?;
    let function = &model.functions[index];
    Some(format!(
        "the network lies in the model-local function {}::{}; inline functions first \
         (onnx.inliner.inline_local_functions)",
        function.domain, function.name
    ))
}
