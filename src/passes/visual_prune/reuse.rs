//! What the ranking has computed of the next layer, so that the layer need not.
//!
//! ```text
//!  before:  H ─▶ norm ─▶ q, k projections ─▶ scores        H' ─▶ norm ─┬▶ q, k projections ─▶ …
//!                                                                     └▶ v projection ─▶ …
//!  after:   H ─▶ norm ─▶ q, k projections ─┬▶ scores       H' ─▶ norm ──▶ v projection ─▶ …
//!                                          └▶ GatherND (kept) ─▶ …
//! ```
//!
//! A projection of a token depends on that token alone, so the rows that stay are those that
//! the layer would compute. Positions come in behind it, so this holds for renumbered ones too.
//! In a decode step, where nothing is dropped, the ranking then costs no weight that the layer
//! does not read anyway.
//!
//! Only what is a token's own by the operators that make it is taken: sums and products with
//! vectors, norms over the width, products with a weight. A quantisation whose scale comes from
//! all tokens is not, nor what lies behind it.

use std::collections::HashSet;

use super::stage::{Plan, Stage};
use crate::arch::DecoderLayer;
use crate::ir::cone::{ancestors, carries_data, descendants, varying};
use crate::ir::{GraphKind, Model, NodeId, ValueId, consts};

/// A projection of the model, and the ranking's copy of it on all tokens, `[b, L, …]` both.
pub(super) type Shared = (ValueId, ValueId);

/// The projections of `layer` that queries and keys are made of, `[b, L, columns]`: one each,
/// or one for both where they lie in one tensor. None where it is not a token's own.
pub(super) fn projections(model: &Model, layer: &DecoderLayer) -> Vec<ValueId> {
    let varying = varying(model);
    let mut found: Vec<ValueId> = [layer.query.value, layer.new_key.value]
        .into_iter()
        .filter_map(|target| projection(model, layer, target, &varying))
        .collect();
    found.dedup();
    found
}

/// The last value on the way from what enters `layer` to `target` that is a token's own, if
/// all that `target` takes of the tokens goes through it.
fn projection(
    model: &Model,
    layer: &DecoderLayer,
    target: ValueId,
    varying: &HashSet<ValueId>,
) -> Option<ValueId> {
    let way = ancestors(model, &[target], true);
    let entered = descendants(model, &layer.boundary, false);
    let between = |v: &ValueId| way.contains(v) && entered.contains(v);
    // Values that are a token's own, and those of them behind a product with a weight.
    let mut own: HashSet<ValueId> = layer.boundary.iter().copied().collect();
    let mut projected: HashSet<ValueId> = HashSet::new();
    let mut last: HashSet<ValueId> = HashSet::new();
    for &id in &model.graph().nodes {
        let node = model.node(id);
        let Some(output) = node.output(0).filter(between) else {
            continue;
        };
        let reads = || node.inputs.iter().flatten().copied();
        if own.contains(&output) {
            continue;
        }
        if node.outputs.len() == 1 && row_wise(model, id, &own, varying) {
            own.insert(output);
            if is_product(&node.op_type) || reads().any(|v| projected.contains(&v)) {
                projected.insert(output);
            }
        } else if carries_data(model, id) {
            last.extend(reads().filter(|v| own.contains(v)));
        }
    }
    if own.contains(&target) {
        last.insert(target);
    }
    match last.into_iter().collect::<Vec<_>>().as_slice() {
        [one] if projected.contains(one) && only_here(model, *one) => Some(*one),
        _ => None,
    }
}

/// Whether all readers can be reconnected: none is in a sub-graph, and it is no output.
fn only_here(model: &Model, value: ValueId) -> bool {
    let mut readers = model.value(value).uses.iter();
    !model.is_output(value)
        && readers.all(|u| model.subgraph(model.node(u.node).graph).kind == GraphKind::Main)
}

fn is_product(op_type: &str) -> bool {
    matches!(op_type, "MatMul" | "MatMulNBits")
}

/// Whether each row of a node's output depends on the same row of its inputs alone, which are
/// a token's `own` or do not vary.
fn row_wise(model: &Model, id: NodeId, own: &HashSet<ValueId>, varying: &HashSet<ValueId>) -> bool {
    let node = model.node(id);
    if model.is_function(node) {
        return false;
    }
    let input = |slot: usize| node.input(slot);
    let first = || input(0).is_some_and(|v| own.contains(&v));
    let fixed_from = |slot: usize| {
        let mut rest = node.inputs.iter().skip(slot).flatten();
        rest.all(|v| !varying.contains(v))
    };
    let over_width = |axes: Option<Vec<i64>>| axes.is_some_and(|a| a == [-1] || a == [2]);
    match node.op_type.as_str() {
        "Identity" | "Cast" | "Sqrt" | "Reciprocal" | "Neg" => first(),
        "Add" | "Sub" | "Mul" | "Div" | "Pow" => {
            let mut inputs = node.inputs.iter().flatten();
            inputs.all(|v| own.contains(v) || is_vector(model, *v))
        }
        "ReduceMean" => {
            let stated = || node.attr_ints("axes").map(<[i64]>::to_vec);
            let axes = input(1).map_or_else(stated, |v| consts::ints(model, v));
            first() && over_width(axes) && node.attr_int("keepdims").unwrap_or(1) == 1
        }
        "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization" => {
            let axis = node.attr_int("axis").unwrap_or(-1);
            first() && over_width(Some(vec![axis])) && fixed_from(1)
        }
        "MatMul" => {
            let weight = input(1).and_then(|v| stored(model, v));
            let matrix = weight.and_then(|v| consts::dims(model, v));
            first() && fixed_from(1) && matrix.is_some_and(|d| d.len() == 2)
        }
        "MatMulNBits" => first() && fixed_from(1),
        _ => false,
    }
}

/// Whether a constant is the same for every token: no axis but the last is longer than 1.
fn is_vector(model: &Model, value: ValueId) -> bool {
    let dims = consts::dims(model, value);
    dims.is_some_and(|d| d.iter().rev().skip(1).all(|&n| n == 1))
}

/// The tensor that a weight is stored in, seen through what unpacks or turns it.
fn stored(model: &Model, value: ValueId) -> Option<ValueId> {
    let mut at = value;
    for _ in 0..4 {
        if consts::dims(model, at).is_some() {
            return Some(at);
        }
        let node = model.producer_node(at)?;
        match node.op_type.as_str() {
            "DequantizeLinear" | "Transpose" | "Cast" => at = node.input(0)?,
            _ => return None,
        }
    }
    None
}

impl Plan<'_, '_> {
    /// Makes the first layer of `stage`, in which the tokens `kept` are left, read rows of what
    /// the ranking has computed.
    pub(super) fn read_again(&mut self, shared: &[Shared], kept: ValueId, stage: &mut Stage) {
        for &(original, copy) in shared {
            let rows = self.patch.gather_rows(copy, kept);
            self.patch.rewire_all(original, rows);
            stage.computed.insert(original, rows);
        }
    }
}
