//! Queries and keys with the meaning of each axis, as far back as that can be told.
//!
//! An attention's product fixes what the axes of its operands are. Walking back from there,
//! every re-arrangement tells what they were before it, in whatever order an exporter laid
//! heads, tokens and widths. Scales met on the way are noted. The walk ends at the first
//! operator that computes something (a rotary embedding, a projection), so what is read is
//! what the attention itself multiplies, without the copies in front of the product.

use super::attention::{Site, quantised_from};
use super::scalar;
use super::tower::projection_width;
use crate::ir::{Model, ValueId, consts};

/// A query or key operand.
#[derive(Clone, Debug)]
pub struct HeadRows {
    /// The tensor.
    pub value: ValueId,
    /// What its axes are: `b`atch (of size 1), `h`eads, `s`equence, `d` width of a head;
    /// `bsx` are rows of all heads side by side.
    pub axes: String,
    /// Factor between it and what the product reads.
    pub scale: f64,
}

impl HeadRows {
    /// The permutation that leads to the order `to`, of the same axes.
    pub fn order(&self, to: &str) -> Vec<i64> {
        let place = |axis: char| self.axes.find(axis).unwrap_or(0) as i64;
        to.chars().map(place).collect()
    }
}

/// Query and key of a plain attention; `None` if their axes cannot be told.
pub(super) fn head_rows(model: &Model, site: &Site, width: i64) -> Option<[HeadRows; 2]> {
    let node = model.node(site.node);
    let product = node.is("Softmax");
    let transposed = product && !super::attention::transposed(model, site);
    let (query, key) = (site.query.value, site.key.value);
    let rank = |value| consts::known_rank(model, value);
    // Of rank 3 the operator ONNX Attention splits rows into heads; a loop over segments has rows.
    let splits = node.is("Loop") || node.attr_int("q_num_heads").is_some();
    if !product && (rank(query) == Some(3) || splits) {
        let rows = |value| HeadRows {
            value,
            axes: "bsx".into(),
            scale: 1.0,
        };
        return Some([rows(query), rows(key)]);
    }
    let lay = |value, tail: &str| {
        let batched = || back(model, value, format!("b{tail}"), width);
        let alone = || back(model, value, tail.to_owned(), width);
        match rank(value) {
            Some(4) => batched(),
            Some(3) => alone(),
            Some(_) => None,
            // The first re-arrangement tells the rank.
            None => batched().or_else(alone),
        }
    };
    let key_axes = if transposed { "hds" } else { "hsd" };
    Some([lay(query, "hsd")?, lay(key, key_axes)?])
}

/// Walks back from `value` with the given axes; `None` if a re-arrangement contradicts them.
fn back(model: &Model, value: ValueId, axes: String, width: i64) -> Option<HeadRows> {
    let mut at = HeadRows {
        value,
        axes,
        scale: 1.0,
    };
    for _ in 0..32 {
        let Some(node) = model.producer_node(at.value) else {
            break;
        };
        let Some(first) = node.input(0) else { break };
        let listed = |slot: usize| node.input(slot).and_then(|v| consts::ints(model, v));
        match node.op_type.as_str() {
            "Cast" | "Identity" => at.value = first,
            // A list of one stretch.
            "Split" if node.outputs.len() == 1 => at.value = first,
            "DequantizeLinear" => match quantised_from(model, at.value) {
                Some(before) => at.value = before,
                None => break,
            },
            "Mul" | "Div" => {
                let Some(second) = node.input(1) else { break };
                let factor = |v| scalar::evaluate(model, v, Some(width));
                match (node.op_type.as_str(), factor(first), factor(second)) {
                    ("Mul", _, Some(f)) => (at.value, at.scale) = (first, at.scale * f),
                    ("Mul", Some(f), None) => (at.value, at.scale) = (second, at.scale * f),
                    ("Div", _, Some(f)) => (at.value, at.scale) = (first, at.scale / f),
                    _ => break,
                }
            }
            "Transpose" => {
                let perm = node.attr_ints("perm")?;
                if perm.len() != at.axes.len() {
                    return None;
                }
                let mut before = vec!['?'; perm.len()];
                for (axis, from) in at.axes.chars().zip(perm) {
                    *before.get_mut(usize::try_from(*from).ok()?)? = axis;
                }
                (at.value, at.axes) = (first, before.into_iter().collect());
            }
            "Unsqueeze" => {
                let rank = at.axes.len() as i64;
                let axis = match listed(1).as_deref() {
                    Some([axis]) => *axis,
                    _ => break,
                };
                let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()?;
                if at.axes.chars().nth(axis)? != 'b' {
                    break;
                }
                at.axes.remove(axis);
                at.value = first;
            }
            "Squeeze" => {
                let rank = at.axes.len() as i64 + 1;
                let axis = match listed(1).as_deref() {
                    Some([axis]) if !at.axes.contains('b') => *axis,
                    _ => break,
                };
                let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()?;
                if axis > at.axes.len() {
                    return None;
                }
                at.axes.insert(axis, 'b');
                at.value = first;
            }
            // [b, h, s, d] → [b·h, s, d] → [b·h, d, s] → [b, h, d, s], as dynamo transposes.
            "Reshape" => {
                let swap = model.producer_node(first);
                let swap =
                    swap.filter(|n| n.is("Transpose") && n.attr_ints("perm") == Some(&[0, 2, 1]));
                let merge = swap.and_then(|n| model.producer_node(n.input(0)?));
                let Some(before) = merge.filter(|n| n.is("Reshape")).and_then(|n| n.input(0))
                else {
                    break;
                };
                if !matches!(at.axes.as_str(), "bhds" | "bhsd") {
                    break;
                }
                let (lead, tail) = at.axes.split_at(2);
                at.axes = lead.chars().chain(tail.chars().rev()).collect();
                at.value = before;
            }
            _ => break,
        }
    }
    Some(at)
}

/// (heads, head width) of an operand: from the reshape, behind rotary embeddings and copies,
/// that splits a projection into heads of all its columns; into `stated` heads, where their
/// number is known.
pub(super) fn heads_behind(
    model: &Model,
    value: ValueId,
    stated: Option<i64>,
) -> Option<(i64, i64)> {
    let (mut stack, mut seen) = (vec![value], std::collections::HashSet::new());
    let (mut splits, mut projected) = (Vec::new(), None);
    while let Some(at) = stack.pop() {
        if seen.len() > 128 || !seen.insert(at) {
            continue;
        }
        let Some(node) = model.producer_node(at) else {
            continue;
        };
        if consts::constant(model, at).is_some() {
            continue;
        }
        if let Some(width) = projection_width(model, at) {
            projected = projected.or(Some(width));
            continue;
        }
        match node.op_type.as_str() {
            "Shape" | "Size" => {}
            "Reshape" => {
                splits.extend(node.input(1).and_then(|shape| last_two(model, shape)));
                stack.extend(node.input(0));
            }
            "Add" | "Sub" | "Mul" | "Concat" => stack.extend(node.inputs.iter().flatten().rev()),
            _ => stack.extend(node.input(0)),
        }
    }
    // Packed projections hold queries, keys and values.
    let complete = |(heads, width): (i64, i64)| -> Option<(i64, i64)> {
        let parts = [1, 2, 3].into_iter();
        let Some(all) = projected else {
            return (heads > 0 && width > 0).then_some((heads, width));
        };
        let mut fitting = parts.filter_map(|n| match (heads > 0, width > 0) {
            (true, true) => (heads * width * n == all).then_some((heads, width)),
            // What is left to be inferred: the reshape says how many parts there are.
            (true, false) => {
                (-width == n && all % (heads * n) == 0).then(|| (heads, all / (heads * n)))
            }
            _ => None,
        });
        fitting.next()
    };
    let mut found = splits.into_iter().filter_map(complete);
    found.find(|(heads, _)| stated.is_none_or(|stated| stated == *heads))
}

/// The last two dimensions of a reshape target of rank 3 or more, where they are stated. A width
/// that the reshape infers is minus the number of parts in front of the heads.
fn last_two(model: &Model, shape: ValueId) -> Option<(i64, i64)> {
    let dims = consts::ints(model, shape).or_else(|| {
        let node = model.producer_node(shape).filter(|n| n.is("Concat"))?;
        let parts = node.inputs.iter().flatten();
        // 0 where the graph computes it.
        let each = parts.map(|part| consts::ints(model, *part).unwrap_or_else(|| vec![0]));
        Some(each.collect::<Vec<_>>().concat())
    })?;
    let pair = match dims.as_slice() {
        // [P, heads, −1] and [P, 3, heads, −1]
        [_, heads, -1] => (*heads, -1),
        [_, parts @ (1..=3), heads, -1] => (*heads, -parts),
        [.., _, heads, width] => (*heads, (*width).max(0)),
        _ => return None,
    };
    (pair.0 > 0 && pair.1 != 0).then_some(pair)
}

/// The operator that cuts an operand's tokens into stretches, each with an attention of its own:
/// then no attention is that of the block.
pub(super) fn cut_rows(model: &Model, laid: &HeadRows) -> Option<String> {
    let producer = model.producer_of(laid.value)?;
    let node = model.node(producer);
    let axis = match node.op_type.as_str() {
        "Split" if node.outputs.len() > 1 => node.attr_int("axis").unwrap_or(0),
        "Slice" => consts::int(model, node.input(3)?)?,
        _ => return None,
    };
    let rank = laid.axes.len() as i64;
    let axis = usize::try_from(if axis < 0 { axis + rank } else { axis }).ok()?;
    (laid.axes.chars().nth(axis)? == 's').then(|| model.describe(producer))
}
