//! Attention in segments: a `Loop` in which one stretch of rows after another attends to itself.
//!
//! ```text
//!  query, key, value [1, T, heads·width], bounds [segments + 1]      read by the body
//!  Loop(Size(bounds) − 1, no rows):  i, rows ─▶ Concat(rows, MultiHeadAttention(
//!        each of query, key, value [bounds[i] : bounds[i + 1]]))
//! ```
//!
//! So Microsoft's recipe for ONNX Runtime GenAI leaves the attention of Qwen2.5-VL's tower, in
//! blocks with windows and in those with full attention (then a segment is a frame). For a query
//! it is attention with a mask: [`Mask::Segments`].

use super::attention::{Mask, Site, operand};
use super::head_rows::heads_behind;
use super::hidden::heavy;
use super::projection::{heads_of, scale_of};
use crate::ir::{GraphId, Model, Node, NodeId, ValueId, consts};

/// The attention that a loop is; `None` if the node is no loop over an attention.
///
/// # Errors
/// What of the loop is not understood.
pub(super) fn in_segments(model: &Model, id: NodeId) -> Option<Result<Site, String>> {
    let node = model.node(id);
    if !node.is("Loop") {
        return None;
    }
    let body = node.subgraphs().next()?;
    let inner = model.subgraph(body).nodes.iter().copied();
    let mut holding = inner.filter(|n| heavy(model.node(*n)));
    let attention = holding.next()?;
    if holding.next().is_some() || !model.node(attention).is_ms("MultiHeadAttention") {
        return None;
    }
    let site = Body::new(model, node, body)
        .and_then(|body| body.site(id, model.node(attention)))
        .map_err(|why| format!("{}: {why}", model.describe(id)));
    Some(site)
}

/// The body of a loop that carries one value.
struct Body<'m> {
    model: &'m Model,
    /// The loop's own inputs: number of rounds, and what is carried into the first.
    rounds: ValueId,
    start: ValueId,
    /// The body's inputs: number of the round, and what it is given.
    index: ValueId,
    given: ValueId,
    /// What it hands on.
    result: ValueId,
}

impl<'m> Body<'m> {
    fn new(model: &'m Model, node: &Node, body: GraphId) -> Result<Self, String> {
        let graph = model.subgraph(body);
        let (Some(rounds), Some(start)) = (node.input(0), node.input(2)) else {
            return Err("expected a loop with a number of rounds and one carried value".into());
        };
        let ([index, going, given], [goes_on, result], 3) =
            (&graph.inputs[..], &graph.outputs[..], node.inputs.len())
        else {
            return Err(format!(
                "expected a loop that carries one value, found {} inputs and {} outputs of its body",
                graph.inputs.len(),
                graph.outputs.len()
            ));
        };
        let ends = same(model, *goes_on) != *going;
        if ends
            || node
                .input(1)
                .is_some_and(|c| consts::int(model, c) != Some(1))
        {
            return Err("expected a loop without a condition of its own".into());
        }
        Ok(Self {
            model,
            rounds,
            start,
            index: *index,
            given: *given,
            result: *result,
        })
    }

    /// The attention as one of all rows with a mask.
    fn site(&self, id: NodeId, attention: &Node) -> Result<Site, String> {
        let model = self.model;
        let refused = [
            (3, "bias"),
            (4, "key_padding_mask"),
            (5, "attention_bias"),
            (6, "past_key"),
            (7, "past_value"),
        ];
        let heads = heads_of(attention, &refused)?;
        let mut parts = Vec::new();
        for (slot, what) in ["queries", "keys", "values"].into_iter().enumerate() {
            let part = attention.input(slot).and_then(|v| self.stretch(v));
            parts.push(part.ok_or_else(|| {
                format!("expected {what} [bounds[i] : bounds[i + 1]] of all rows")
            })?);
        }
        let bounds = parts[0].1;
        if parts.iter().any(|p| p.1 != bounds) {
            return Err("queries, keys and values are cut at different bounds".into());
        }
        if !self.appends(attention.output(0)) {
            return Err("expected its attention to be appended to the rows so far".into());
        }
        if !self.every_segment(bounds) {
            return Err(format!(
                "expected as many rounds as '{}' has segments",
                model.name(bounds)
            ));
        }
        let (query, key) = (parts[0].0, parts[1].0);
        let behind = |value| heads_behind(model, value, Some(heads));
        let Some((_, width)) = behind(query).or_else(|| behind(key)) else {
            return Err(format!(
                "the width of its {heads} heads cannot be read off the reshapes in front"
            ));
        };
        let (mut query, mut key) = (operand(model, query), operand(model, key));
        query.heads = Some((heads, width));
        key.heads = Some((heads, width));
        let mut site = Site::of(id, query, key, scale_of(attention, width));
        site.masks.push(Mask::Segments(bounds));
        Ok(site)
    }

    /// All rows and the bounds of `rows[bounds[i] : bounds[i + 1]]`.
    fn stretch(&self, part: ValueId) -> Option<(ValueId, ValueId)> {
        let model = self.model;
        let slice = model.producer_node(part).filter(|n| n.is("Slice"))?;
        let listed = |slot: usize| numbers(model, slice.input(slot)?);
        let along = matches!(listed(3)?.as_slice(), [1 | -2]);
        let whole = slice.input(4).is_none() || listed(4)? == [1];
        let (from, first) = self.bound(slice.input(1)?)?;
        let (to, last) = self.bound(slice.input(2)?)?;
        let next = first == 0 && last == 1 && from == to;
        (along && whole && next).then_some((slice.input(0)?, from))
    }

    /// The list and the offset o of `list[i + o]`.
    fn bound(&self, value: ValueId) -> Option<(ValueId, i64)> {
        let node = self.model.producer_node(same(self.model, value))?;
        let plain = node.is("Gather") && node.attr_int("axis").unwrap_or(0) == 0;
        plain.then_some(())?;
        Some((node.input(0)?, self.offset(node.input(1)?)?))
    }

    /// o of i + o.
    fn offset(&self, value: ValueId) -> Option<i64> {
        let value = same(self.model, value);
        if value == self.index {
            return Some(0);
        }
        let node = self.model.producer_node(value).filter(|n| n.is("Add"))?;
        let (a, b) = (node.input(0)?, node.input(1)?);
        let constant = |v| consts::int(self.model, same(self.model, v));
        match (constant(a), constant(b)) {
            (None, Some(o)) => Some(self.offset(a)? + o),
            (Some(o), None) => Some(self.offset(b)? + o),
            _ => None,
        }
    }

    /// Whether the body hands on what it was given with `made` behind it, and starts with nothing.
    fn appends(&self, made: Option<ValueId>) -> bool {
        let model = self.model;
        let joined = model.producer_node(self.result);
        let joined = joined.is_some_and(|n| {
            n.is("Concat")
                && matches!(n.attr_int("axis"), Some(1 | -2))
                && n.inputs == [Some(self.given), made]
        });
        let nothing = model.producer_node(self.start).is_some_and(|n| {
            let listed = |slot: usize| n.input(slot).and_then(|v| numbers(model, v));
            n.is("Slice") && listed(1).is_some() && listed(1) == listed(2)
        });
        joined && nothing
    }

    /// Whether the loop runs once for each pair of neighbours in `bounds`.
    fn every_segment(&self, bounds: ValueId) -> bool {
        let model = self.model;
        let of = |v: ValueId| model.producer_node(same(model, v));
        let less_one = || {
            let node = of(self.rounds)?;
            let (count, one) = (node.input(0)?, node.input(1)?);
            let step = consts::int(model, same(model, one))?;
            let fits = (node.is("Sub") && step == 1) || (node.is("Add") && step == -1);
            fits.then(|| of(count)).flatten()
        };
        let Some(count) = less_one() else {
            return false;
        };
        if count.is("Size") {
            return count.input(0) == Some(bounds);
        }
        let shape = count.input(0).filter(|_| count.is("Gather"));
        let shape = shape.and_then(of);
        shape.is_some_and(|n| n.is("Shape") && n.input(0) == Some(bounds))
    }
}

/// Integers that are constant, behind casts that an optimiser left.
fn numbers(model: &Model, value: ValueId) -> Option<Vec<i64>> {
    consts::ints(model, same(model, value))
}

/// A value behind casts and changes of shape that keep its numbers.
fn same(model: &Model, value: ValueId) -> ValueId {
    let mut at = value;
    for _ in 0..8 {
        let Some(node) = model.producer_node(at) else {
            break;
        };
        let kept = [
            "Cast",
            "CastLike",
            "Identity",
            "Reshape",
            "Squeeze",
            "Unsqueeze",
        ];
        match node.input(0) {
            Some(before) if kept.iter().any(|op| node.is(op)) => at = before,
            _ => break,
        }
    }
    at
}
