//! Attention, in whatever form an exporter or optimiser left it.
//!
//! A *site* is one attention: its query and key operands, each traced back
//! through what only scales or re-arranges it, and the product of all scales.

use super::scalar;
use crate::ir::{Model, NodeId, ValueId, consts};

/// One operand of q·kᵀ.
#[derive(Clone, Debug)]
pub struct Operand {
    /// As the product reads it.
    pub value: ValueId,
    /// What it was before scaling and re-arranging (projection, rotary
    /// embedding or cache concatenation).
    pub root: ValueId,
    /// Factor between `root` and `value`.
    pub scale: f64,
    /// Number of heads and head width, where a reshape between the two says so.
    pub heads: Option<(i64, i64)>,
}

/// One attention.
#[derive(Clone, Debug)]
pub struct Site {
    /// The `Softmax` or the fused operator.
    pub node: NodeId,
    /// Query.
    pub query: Operand,
    /// Key.
    pub key: Operand,
    /// Factor applied to the product itself.
    pub post_scale: f64,
    /// A bound c put on a scaled score s before the softmax, c·tanh(s / c)
    /// (0: none).
    pub softcap: f64,
}

impl Site {
    /// Total factor between q_root·k_rootᵀ and the softmax.
    pub fn scale(&self) -> f64 {
        self.query.scale * self.key.scale * self.post_scale
    }
}

/// Every attention of the main graph, in graph order.
pub fn sites(model: &Model) -> Vec<Site> {
    let nodes = &model.graph().nodes;
    nodes.iter().filter_map(|&id| site(model, id)).collect()
}

fn site(model: &Model, id: NodeId) -> Option<Site> {
    let node = model.node(id);
    if node.is("Softmax") {
        return softmax_site(model, id);
    }
    if node.is("Attention") {
        let (q, k) = (node.input(0)?, node.input(1)?);
        let (query, key) = (operand(model, q), operand(model, k));
        let width = key.heads.or(query.heads).map(|h| h.1);
        let stated = node
            .attr_float("scale")
            .map(f64::from)
            .filter(|s| *s != 0.0);
        let post_scale = stated.or_else(|| width.map(|w| 1.0 / (w as f64).sqrt()))?;
        return Some(Site {
            node: id,
            query,
            key,
            post_scale,
            softcap: f64::from(node.attr_float("softcap").unwrap_or(0.0)),
        });
    }
    None
}

/// `Softmax([mask +] scale · (q @ kᵀ))`.
fn softmax_site(model: &Model, id: NodeId) -> Option<Site> {
    let mut at = model.node(id).input(0)?;
    let (mut post_scale, mut softcap) = (1.0, 0.0);
    for _ in 0..12 {
        let producer = model.producer_of(at)?;
        let node = model.node(producer);
        match node.op_type.as_str() {
            "MatMul" if node.domain.is_empty() => {
                let (query, key) = (
                    operand(model, node.input(0)?),
                    operand(model, node.input(1)?),
                );
                return Some(Site {
                    node: id,
                    query,
                    key,
                    post_scale: uncapped(post_scale, softcap),
                    softcap,
                });
            }
            // alpha · (q @ kᵀ), as ONNX Runtime fuses it; k as it is with transB.
            "FusedMatMul" => {
                let plain = ["transA", "transBatchA", "transBatchB"];
                if plain.iter().any(|a| node.attr_int(a).unwrap_or(0) != 0) {
                    return None;
                }
                let (query, key) = (
                    operand(model, node.input(0)?),
                    operand(model, node.input(1)?),
                );
                return Some(Site {
                    node: id,
                    query,
                    key,
                    post_scale: uncapped(post_scale, softcap)
                        * f64::from(node.attr_float("alpha").unwrap_or(1.0)),
                    softcap,
                });
            }
            "Cast" | "Identity" | "Reshape" | "QuantizeLinear" | "DequantizeLinear" => {
                at = node.input(0)?;
            }
            // scores + mask, in either order: the scores come from a product.
            "Add" => {
                let (a, b) = (node.input(0)?, node.input(1)?);
                at = if from_product(model, a) { a } else { b };
            }
            // Where(mask, scores, -inf) and Where(mask, -inf, scores).
            "Where" => {
                let (a, b) = (node.input(1)?, node.input(2)?);
                at = if from_product(model, a) { a } else { b };
            }
            "Mul" => {
                let (a, b) = (node.input(0)?, node.input(1)?);
                let factor = |v| scalar::evaluate(model, v, None);
                (at, post_scale) = match (factor(a), factor(b)) {
                    (_, Some(f)) => (a, post_scale * f),
                    (Some(f), None) => (b, post_scale * f),
                    _ => return None,
                };
                // cap · tanh(scores / cap)
                if let Some(tanh) = model.producer_node(at).filter(|n| n.is("Tanh")) {
                    softcap = post_scale;
                    post_scale = 1.0;
                    at = tanh.input(0)?;
                }
            }
            "Div" => {
                post_scale /= scalar::evaluate(model, node.input(1)?, None)?;
                at = node.input(0)?;
            }
            _ => return None,
        }
    }
    None
}

/// The factor before a bound c: the quotient by c inside of the tanh is no part
/// of it.
fn uncapped(inside: f64, softcap: f64) -> f64 {
    if softcap == 0.0 {
        inside
    } else {
        inside * softcap
    }
}

/// Whether a value is a product of two computed tensors, possibly scaled.
fn from_product(model: &Model, mut value: ValueId) -> bool {
    for _ in 0..6 {
        let Some(node) = model.producer_node(value) else {
            return false;
        };
        let next = match node.op_type.as_str() {
            "MatMul" | "FusedMatMul" => return true,
            "Cast" | "Identity" | "Reshape" | "Div" | "Tanh" | "Add" | "QuantizeLinear"
            | "DequantizeLinear" => node.input(0),
            "Mul" => {
                let (a, b) = (node.input(0), node.input(1));
                let constant = a.is_some_and(|a| consts::constant(model, a).is_some());
                if constant { b } else { a }
            }
            _ => None,
        };
        match next {
            Some(next) => value = next,
            None => return false,
        }
    }
    false
}

/// Traces an operand back through scaling and re-arranging.
pub(super) fn operand(model: &Model, value: ValueId) -> Operand {
    let mut result = Operand {
        value,
        root: value,
        scale: 1.0,
        heads: None,
    };
    // The head width may be needed to evaluate a scale that was met earlier.
    let mut pending: Vec<(ValueId, bool)> = Vec::new();
    for _ in 0..32 {
        let Some(node) = model.producer_node(result.root) else {
            break;
        };
        let Some(first) = node.input(0) else { break };
        match node.op_type.as_str() {
            // A quantised model rounds between its operators: that changes no layout.
            "Transpose" | "Cast" | "Identity" | "Unsqueeze" | "Squeeze" | "Expand" | "Flatten"
            | "QuantizeLinear" | "DequantizeLinear" => {
                result.root = first;
            }
            "Reshape" => {
                if let Some(heads) = node.input(1).and_then(|s| split_heads(model, s)) {
                    result.heads = Some(heads);
                }
                result.root = first;
            }
            "Mul" | "Div" => {
                let Some(second) = node.input(1) else { break };
                let divide = node.op_type == "Div";
                if is_scalar(model, second) {
                    pending.push((second, divide));
                    result.root = first;
                } else if !divide && is_scalar(model, first) {
                    pending.push((first, false));
                    result.root = second;
                } else {
                    break;
                }
            }
            _ => break,
        }
    }
    for (factor, divide) in pending {
        let width = result.heads.map(|h| h.1).filter(|w| *w > 0);
        match scalar::evaluate(model, factor, width) {
            Some(f) if divide => result.scale /= f,
            Some(f) => result.scale *= f,
            // Not a number that is known now: then nothing before this point
            // can be relied on.
            None => result.scale = f64::NAN,
        }
    }
    result
}

/// The keys of an attention as `[batch, heads, sequence, width]`, before they are
/// repeated for the query heads of a group: as far back as they are laid out so.
pub(super) fn head_rows(model: &Model, site: &Site) -> Option<ValueId> {
    // The axes of the value looked at, by what they are.
    let mut axes = if model.node(site.node).is("Softmax") && !transposed(model, site) {
        "bhds"
    } else {
        "bhsd"
    }
    .to_owned();
    let (mut at, mut found) = (site.key.value, None);
    for _ in 0..32 {
        if axes == "bhsd" {
            found = Some(at);
        }
        if at == site.key.root {
            break;
        }
        let node = model.producer_node(at)?;
        let first = node.input(0)?;
        match node.op_type.as_str() {
            "Cast" | "Identity" => at = first,
            "Mul" | "Div" => {
                at = if is_scalar(model, first) {
                    node.input(1)?
                } else {
                    first
                };
            }
            "Transpose" => {
                let perm = node.attr_ints("perm")?;
                if perm.len() != axes.len() {
                    break;
                }
                let mut before = vec![b' '; perm.len()];
                for (axis, from) in axes.bytes().zip(perm) {
                    *before.get_mut(usize::try_from(*from).ok()?)? = axis;
                }
                axes = String::from_utf8(before).ok()?;
                at = first;
            }
            "Reshape" => {
                let inner = model.producer_node(first);
                let source = inner.and_then(|n| n.input(0));
                let before = source.and_then(|s| model.producer_node(s));
                match (inner, before) {
                    // [b, h, s, d] → [b·h, s, d] → [b·h, d, s] → [b, h, d, s]
                    (Some(swap), Some(merge))
                        if swap.is("Transpose")
                            && swap.attr_ints("perm") == Some(&[0, 2, 1])
                            && merge.is("Reshape") =>
                    {
                        let (lead, tail) = axes.split_at_checked(2)?;
                        axes = lead.chars().chain(tail.chars().rev()).collect();
                        at = merge.input(0)?;
                    }
                    // Keys repeated for their group of queries.
                    (Some(repeat), Some(widen)) if repeat.is("Expand") && widen.is("Unsqueeze") => {
                        at = widen.input(0)?;
                    }
                    _ => break,
                }
            }
            _ => break,
        }
    }
    found
}

/// Whether the product itself transposes the keys.
fn transposed(model: &Model, site: &Site) -> bool {
    let reads = |u: &&crate::ir::Use| u.slot == 1 && model.node(u.node).op_type == "FusedMatMul";
    let product = model.value(site.key.value).uses.iter().find(reads);
    product.is_some_and(|u| model.node(u.node).attr_int("transB") == Some(1))
}

/// Whether a value is a scalar by construction: a one-element constant, or an
/// expression of roots and quotients.
fn is_scalar(model: &Model, value: ValueId) -> bool {
    // Any width will do to see that it is computable.
    scalar::evaluate(model, value, Some(64)).is_some()
}

/// (heads, head width) from a reshape target `[…, heads, width]` of rank 4;
/// −1 where the graph computes it.
pub(super) fn split_heads(model: &Model, shape: ValueId) -> Option<(i64, i64)> {
    if let Some(dims) = consts::ints(model, shape) {
        return match dims.as_slice() {
            [_, _, heads, width] => Some((*heads, *width)),
            _ => None,
        };
    }
    let node = model.producer_node(shape).filter(|n| n.is("Concat"))?;
    let mut dims = Vec::new();
    for part in node.inputs.iter().flatten() {
        match consts::ints(model, *part) {
            Some(known) => dims.extend(known),
            None => dims.push(-1),
        }
    }
    match dims.as_slice() {
        [_, _, heads, width] => Some((*heads, *width)),
        _ => None,
    }
}
