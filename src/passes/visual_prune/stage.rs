//! The stages between drop points, and re-rooting what they read.

use std::collections::{HashMap, HashSet};

use super::rank::Ranking;
use super::{Drop, SALIENT_MASK_INPUT, TextQueries, VisualPrune, marker};
use crate::arch::Decoder;
use crate::ir::cone::{descendants, descendants_up_to};
use crate::ir::{
    DataType, Dim, Model, NodeId, Patch, PatchPlan, Size, Substitution, ValueId, ValueType,
};
use crate::passes::{Context, Positions};

/// Name of the length of past and new tokens, where a file has none for it.
const TOTAL_LENGTH: &str = "total_sequence_length";

/// What the layers of one stage read. Shapes: b batch, L tokens of the stage
/// that are processed now, S past + L.
pub(super) struct Stage {
    /// First layer (from 0).
    pub(super) first: usize,
    /// What enters it, `[b, L, D]` each: a value for each one of the boundary.
    pub(super) hidden: Vec<ValueId>,
    /// Attention mask `[b, S]` in the graph's own type.
    pub(super) mask: Option<ValueId>,
    /// Token ids `[b, L]`, in a whole model.
    ids: Option<ValueId>,
    /// Bool `[b, L]`: no padding.
    pub(super) real: ValueId,
    /// Position ids `[b, L]`, or `[rows, b, L]` where the decoder takes several for
    /// each token.
    positions: Option<ValueId>,
    /// Positions of the rotary embedding inside the attention operators, int64
    /// `[b, L]`, where they are carried through the drops (`positions: keep`).
    pub(super) rotary: Option<ValueId>,
    /// Bool `[b, L]`.
    pub(super) visual: ValueId,
    /// Bool `[b, L]`: the tokens that ask.
    pub(super) text: ValueId,
    /// L.
    pub(super) length: Size,
    /// Length of the stage's caches before this step.
    pub(super) past: Size,
    /// Tokens dropped before this stage, in this step.
    lost: Size,
    /// Original value → this stage's.
    pub(super) subst: Substitution,
}

/// Plans the whole decoder patch.
pub(super) fn plan(
    pass: &VisualPrune,
    model: &Model,
    decoder: &Decoder,
    context: &Context,
) -> Result<PatchPlan, String> {
    let mut patch = Patch::new(model, super::ENTRY.name);
    let entry = marker::enter(&mut patch, decoder, context);
    let cuts = Cuts::of(model, decoder, &pass.drops)?;
    let mut plan = Plan {
        pass,
        model,
        decoder,
        patch: &mut patch,
        cuts: &cuts,
    };
    plan.inputs()?;
    if entry.embeds != decoder.embeds {
        plan.patch.rewire_all(decoder.embeds, entry.embeds);
    }
    let mut stages = vec![plan.entry(entry)];
    plan.keep_places(&mut stages[0])?;
    let entered = plan.entered(&stages[0]);
    for (number, drop) in pass.drops.iter().enumerate() {
        let next = plan.drop(number + 1, drop, &stages[number], entered)?;
        stages.push(next);
        plan.rewire(number + 1, &mut stages[number + 1])?;
        plan.unfuse(number + 1, &mut stages[number + 1])?;
    }
    plan.types(&stages);
    Ok(patch.finish())
}

/// Which nodes lie behind which drop point.
struct Cuts {
    /// Values behind each drop point (they nest).
    behind: Vec<HashSet<ValueId>>,
    /// Values that carry the sequence's data.
    data: HashSet<ValueId>,
}

impl Cuts {
    fn of(model: &Model, decoder: &Decoder, drops: &[Drop]) -> Result<Self, String> {
        let mut data = descendants(model, &[decoder.embeds], true);
        if decoder.ids.is_some() {
            // Features that reach later layers by another way than the embeddings.
            let floats = |v: &&ValueId| {
                let ty = model.value(**v).ty.as_ref().and_then(|t| t.dtype());
                ty.is_some_and(DataType::is_float) && !known_roots(decoder).contains(v)
            };
            let other: Vec<ValueId> = model
                .graph()
                .inputs
                .iter()
                .filter(floats)
                .copied()
                .collect();
            data.extend(descendants_up_to(model, &other, &[decoder.embeds], true));
        }
        let mut behind = Vec::new();
        for drop in drops {
            let boundary = &decoder.layers[drop.after_layer].boundary;
            let mut set = descendants(model, boundary, false);
            set.retain(|v| !boundary.contains(v));
            behind.push(set);
        }
        Ok(Self { behind, data })
    }

    /// The stage a node runs in.
    fn stage_of(&self, model: &Model, node: NodeId) -> usize {
        let outputs = &model.node(node).outputs;
        let inside = |set: &&HashSet<ValueId>| outputs.iter().flatten().any(|o| set.contains(o));
        self.behind.iter().take_while(inside).count()
    }
}

/// Graph inputs whose relation to the sequence is known.
fn known_roots(decoder: &Decoder) -> HashSet<ValueId> {
    let pasts = decoder.layers.iter().filter_map(|l| l.past);
    let mut known: HashSet<ValueId> = pasts.flat_map(|(key, value)| [key, value]).collect();
    known.insert(decoder.embeds);
    known.extend(decoder.attention_mask);
    known.extend(decoder.position_ids);
    known.extend(decoder.ids.map(|i| i.value));
    known
}

pub(super) struct Plan<'a, 'm> {
    pub(super) pass: &'a VisualPrune,
    pub(super) model: &'m Model,
    pub(super) decoder: &'a Decoder,
    pub(super) patch: &'a mut Patch<'m>,
    cuts: &'a Cuts,
}

impl Plan<'_, '_> {
    /// Refuses inputs whose layout is not known or that would keep the full
    /// length behind a drop point.
    fn inputs(&self) -> Result<(), String> {
        let (model, decoder) = (self.model, self.decoder);
        let rank = |v: ValueId| {
            model
                .value(v)
                .ty
                .as_ref()
                .and_then(|t| t.shape())
                .map(<[_]>::len)
        };
        for (value, name, expected, ranks) in [
            (
                decoder.attention_mask,
                "attention_mask",
                "[batch, sequence]",
                2..=2,
            ),
            (
                decoder.position_ids,
                "position_ids",
                "[batch, sequence] or [rows, batch, sequence]",
                2..=3,
            ),
        ] {
            if let Some(rank) = value.and_then(rank)
                && !ranks.contains(&rank)
            {
                return Err(format!("'{name}' has rank {rank}; expected {expected}"));
            }
        }
        let known = known_roots(decoder);
        for &input in &model.graph().inputs {
            let value = model.value(input);
            let shape = value.ty.as_ref().and_then(|t| t.shape());
            let scalar = shape.is_some_and(|s| s.iter().all(|d| *d == Dim::Known(1)));
            if known.contains(&input) || scalar || value.initializer.is_some() {
                continue;
            }
            // What only the embeddings are made of is gathered with them; sizes of
            // pixels are no sequence's.
            let pixels = decoder.ids.is_some() && shape.is_some_and(|s| s.len() >= 4);
            let reached = descendants_up_to(model, &[input], &[decoder.embeds], pixels);
            let read = self.cuts.behind[0].iter().any(|v| {
                let node = model.producer_node(*v);
                node.is_some_and(|n| n.inputs.iter().flatten().any(|i| reached.contains(i)))
            });
            if read {
                return Err(format!(
                    "layers behind a drop point read the input '{}', whose relation to the sequence is not \
                     known; export the decoder with inputs_embeds, attention_mask, position_ids and \
                     past_key_values only",
                    value.name
                ));
            }
        }
        Ok(())
    }

    /// The stage before the first drop.
    fn entry(&mut self, entry: marker::Entry) -> Stage {
        let decoder = self.decoder;
        let length = self.patch.size_of(decoder.embeds, 1);
        let real = match decoder.attention_mask {
            Some(mask) => {
                let current = self.last(mask, length);
                self.patch.cast(current, DataType::Bool)
            }
            None => {
                let yes = self
                    .patch
                    .constant(crate::ir::Tensor::bool_scalar("", true));
                let shape = self.patch.op("Shape", &[entry.visual]);
                self.patch.op("Expand", &[yes, shape])
            }
        };
        let visual = self.patch.op("And", &[entry.visual, real]);
        let past = marker::past_length(self.patch, decoder, 0);
        let text = self.text(visual, real);
        for (value, name) in [(visual, "visual"), (real, "real"), (text, "text")] {
            self.patch.name_value(value, &format!("entry/{name}_mask"));
        }
        let mut stage = Stage {
            first: 0,
            hidden: vec![entry.embeds],
            mask: decoder.attention_mask,
            ids: decoder.ids.map(|i| i.value),
            real,
            positions: decoder.position_ids,
            rotary: None,
            visual,
            text,
            length,
            past,
            lost: Size::Known(0),
            subst: HashMap::new(),
        };
        self.roots(0, &mut stage);
        stage
    }

    /// The last `length` columns of a `[b, S]` tensor.
    fn last(&mut self, x: ValueId, length: Size) -> ValueId {
        let total = self.patch.size_of(x, 1);
        let start = self.patch.size_sub(total, length);
        self.patch.slice(x, start, total, 1)
    }

    /// The tokens that ask, fixed here for all drop points: bool `[b, L]`.
    fn text(&mut self, visual: ValueId, real: ValueId) -> ValueId {
        let p = &mut *self.patch;
        let last = last_real(p, real);
        match self.pass.text {
            TextQueries::Last => last,
            TextQueries::All => {
                // No visual token here or further on.
                let after = remaining(p, visual, 0);
                p.op("And", &[after, real])
            }
            TextQueries::Salient => {
                let dims = marker::sequence_dims(self.model, self.decoder);
                let ty = ValueType::tensor(DataType::Bool, dims);
                let given = p.add_input(SALIENT_MASK_INPUT, ty);
                let text = p.op("Not", &[visual]);
                let given = p.op("And", &[given, text]);
                let given = p.op("And", &[given, real]);
                p.op("Or", &[given, last])
            }
        }
    }

    /// Visual tokens of each row that entered, int64 `[b]`.
    fn entered(&mut self, stage: &Stage) -> ValueId {
        let count = self.patch.cast(stage.visual, DataType::Int64);
        self.patch.reduce_sum(count, &[1], false)
    }

    /// Inserts a drop point and returns the stage behind it.
    fn drop(
        &mut self,
        number: usize,
        drop: &Drop,
        before: &Stage,
        entered: ValueId,
    ) -> Result<Stage, String> {
        let first = drop.after_layer;
        let boundary = &self.decoder.layers[first].boundary;
        self.patch.scope(&format!("drop{number}"));
        // Each row could lose n − ⌊r·n⌋; all lose the smallest of these.
        let lost = {
            let p = &mut *self.patch;
            let double = p.cast(entered, DataType::Double);
            let ratio = p.constant(crate::ir::Tensor::f64_scalar("", drop.keep));
            let kept = p.op("Mul", &[double, ratio]);
            let kept = p.cast(kept, DataType::Int64);
            let could = p.op("Sub", &[entered, kept]);
            Size::Value(p.reduce("ReduceMin", could, &[0], true))
        };
        let now = self.patch.size_sub(lost, before.lost);
        let length = self.patch.size_sub(before.length, now);
        let scores = Ranking {
            model: self.model,
            patch: self.patch,
            layer: &self.decoder.layers[first],
            decoder: self.decoder,
            stage: before,
            number,
            mask: self.pass.rank_mask,
        }
        .scores()?;
        // Text and padding always stay: a probability never reaches 2.
        let p = &mut *self.patch;
        let two = p.f32(2.0);
        let scores = p.op("Where", &[before.visual, scores, two]);
        let (_, best) = p.top_k(scores, length, true);
        let kept = p.sort_ascending(best, length);
        p.name_value(kept, &format!("drop{number}/kept_indices"));
        let hidden: Vec<ValueId> = boundary
            .iter()
            .enumerate()
            .map(|(i, &value)| {
                let hidden = p.gather_rows(value, kept);
                let name = if i == 0 {
                    "hidden".into()
                } else {
                    format!("hidden_{}", i + 1)
                };
                p.name_value(hidden, &format!("drop{number}/{name}"));
                hidden
            })
            .collect();
        let real = p.gather_rows(before.real, kept);
        let visual = p.gather_rows(before.visual, kept);
        let text = p.gather_rows(before.text, kept);
        let past = marker::past_length(p, self.decoder, first);
        let mask = before.mask.map(|mask| {
            if past == Size::Known(0) {
                return p.gather_rows(mask, kept);
            }
            // Padding lies on the left and is never dropped, so the first
            // columns of the past describe a shorter past as well.
            let total = p.size_of(mask, 1);
            let old = p.size_sub(total, before.length);
            let current = p.slice(mask, old, total, 1);
            let earlier = p.slice(mask, Size::Known(0), old, 1);
            let earlier = p.slice(earlier, Size::Known(0), past, 1);
            let current = p.gather_rows(current, kept);
            p.concat(&[earlier, current], 1)
        });
        let ids = before.ids.map(|ids| p.gather_rows(ids, kept));
        let positions = before.positions.map(|positions| {
            let gathered = match self.decoder.position_rows {
                None => p.gather_rows(positions, kept),
                // A token's rows go together.
                Some(_) => {
                    let tokens = p.transpose(positions, &[1, 2, 0]);
                    let tokens = p.gather_rows(tokens, kept);
                    p.transpose(tokens, &[2, 0, 1])
                }
            };
            match self.pass.positions_of(self.decoder) {
                Positions::Keep => gathered,
                Positions::Renumber => {
                    // kept[i] − i tokens were dropped before token i, and the
                    // shorter cache tells how many in earlier steps.
                    let place = p.iota(length);
                    let gone = p.op("Sub", &[kept, place]);
                    let gone = match p.size_sub(before.past, past) {
                        Size::Known(0) => gone,
                        earlier => {
                            let earlier = p.size_value(earlier);
                            p.op("Add", &[gone, earlier])
                        }
                    };
                    let gone = cast_like(p, self.model, self.decoder.position_ids, gone);
                    p.op("Sub", &[gathered, gone])
                }
            }
        });
        let mut stage = Stage {
            first,
            hidden,
            mask,
            ids,
            real,
            positions,
            rotary: before.rotary.map(|r| p.gather_rows(r, kept)),
            visual,
            text,
            length,
            past,
            lost,
            subst: HashMap::new(),
        };
        self.roots(number, &mut stage);
        Ok(stage)
    }

    /// The substituted roots of a stage's prelude.
    fn roots(&self, number: usize, stage: &mut Stage) {
        let decoder = self.decoder;
        let end = self
            .pass
            .drops
            .get(number)
            .map_or(decoder.depth(), |d| d.after_layer);
        let subst = &mut stage.subst;
        if number > 0 {
            // Residual tensors of earlier stages are read for their shape only.
            let boundary = &decoder.layers[stage.first].boundary;
            for cut in decoder.residuals.iter().take_while(|c| *c != boundary) {
                subst.extend(cut.iter().map(|v| (*v, stage.hidden[0])));
            }
            subst.extend(boundary.iter().copied().zip(stage.hidden.iter().copied()));
        }
        if let (Some(old), Some(new)) = (decoder.attention_mask, stage.mask) {
            subst.insert(old, new);
        }
        if let (Some(old), Some(new)) = (decoder.position_ids, stage.positions) {
            subst.insert(old, new);
        }
        if let (Some(old), Some(new)) = (decoder.ids, stage.ids) {
            subst.insert(old.value, new);
        }
        // Lengths are read off some layer's cache: of this stage.
        let own = decoder.layers[stage.first].past;
        for (index, layer) in decoder.layers.iter().enumerate() {
            if let (Some(past), Some(own), false) =
                (layer.past, own, (stage.first..end).contains(&index))
            {
                subst.insert(past.0, own.0);
                subst.insert(past.1, own.1);
            }
        }
    }

    /// Reconnects the nodes of a stage behind a drop point: to the gathered
    /// residual tensor, and to a prelude of their own.
    fn rewire(&mut self, number: usize, stage: &mut Stage) -> Result<(), String> {
        let behind = &self.cuts.behind[number - 1];
        self.patch.scope(&format!("stage{number}"));
        for &id in &self.model.graph().nodes {
            if self.cuts.stage_of(self.model, id) != number {
                continue;
            }
            let node = self.model.node(id);
            for slot in 0..node.inputs.len() {
                let Some(value) = node.input(slot).filter(|v| !behind.contains(v)) else {
                    continue;
                };
                self.allowed(id, value, stage)?;
                let new = self.patch.clone_cone(value, &mut stage.subst).map_err(|at| {
                    format!("{at} holds a sub-graph that later layers depend on, which cannot be cloned")
                })?;
                if new != value {
                    self.patch.rewire(id, slot, new);
                }
            }
        }
        Ok(())
    }

    /// Refuses what cutting the sequence would leave at the wrong length.
    fn allowed(&self, node: NodeId, value: ValueId, stage: &Stage) -> Result<(), String> {
        let model = self.model;
        if self.cuts.data.contains(&value) && !stage.subst.contains_key(&value) {
            return Err(format!(
                "'{}', which {} reads, carries token data across the drop point after layer {} beside the \
                 residual stream; expected the residual stream alone",
                model.name(value),
                model.describe(node),
                stage.first
            ));
        }
        Ok(())
    }

    /// What a graph that takes a past says to be as long as the new tokens, and is
    /// longer: mask and caches of the first `layers` layers. Merged exports state
    /// the lengths of their branch without a past for both. A runtime that plans
    /// buffers by named lengths gets by with that in one graph and fails in
    /// another, with more nodes to share buffers between.
    fn misnamed(&self, layers: usize) -> Vec<ValueId> {
        let decoder = self.decoder;
        let dim = |v: ValueId, axis: usize| {
            let shape = self.model.value(v).ty.as_ref()?.shape()?;
            shape.get(axis).filter(|d| matches!(d, Dim::Param(_)))
        };
        let Some(new) = dim(decoder.embeds, 1) else {
            return Vec::new();
        };
        let first = &decoder.layers[..layers];
        if first.iter().any(|l| l.past.is_none()) {
            return Vec::new();
        }
        let caches = first.iter().filter_map(|l| l.present);
        let caches = caches.flat_map(|(key, value)| [(key, 2), (value, 2)]);
        let mask = decoder.attention_mask.map(|m| (m, 1));
        let all = caches.chain(mask);
        all.filter(|(v, axis)| dim(*v, *axis) == Some(new))
            .map(|(v, _)| v)
            .collect()
    }

    /// Brings stated types up to date.
    fn types(&mut self, stages: &[Stage]) {
        let model = self.model;
        let Some(behind) = self.cuts.behind.first() else {
            return;
        };
        for &value in behind {
            if model.value(value).ty.is_some() && !model.is_output(value) {
                self.patch.forget_type(value);
            }
        }
        let rename = |patch: &mut Patch<'_>, value: ValueId, axis: usize, name: String| {
            if let Some(ValueType::Tensor {
                dtype,
                shape: Some(dims),
            }) = &model.value(value).ty
                && axis < dims.len()
                // (Logits of the last row only stay one row.)
                && !matches!(dims[axis], Dim::Known(_))
            {
                let mut dims = dims.clone();
                dims[axis] = Dim::param(name);
                patch.set_type(value, ValueType::tensor(*dtype, dims));
            }
        };
        for value in self.misnamed(stages.get(1).map_or(self.decoder.depth(), |s| s.first)) {
            let axis = if Some(value) == self.decoder.attention_mask {
                1
            } else {
                2
            };
            rename(self.patch, value, axis, TOTAL_LENGTH.to_owned());
        }
        for (number, stage) in stages.iter().enumerate().skip(1) {
            let end = stages
                .get(number + 1)
                .map_or(self.decoder.depth(), |s| s.first);
            for layer in &self.decoder.layers[stage.first..end] {
                for value in layer.past.into_iter().flat_map(|(k, v)| [k, v]) {
                    rename(
                        self.patch,
                        value,
                        2,
                        format!("past_sequence_length_drop{number}"),
                    );
                }
                for value in layer.present.into_iter().flat_map(|(k, v)| [k, v]) {
                    rename(
                        self.patch,
                        value,
                        2,
                        format!("total_sequence_length_drop{number}"),
                    );
                }
            }
        }
        let last = stages.len() - 1;
        if behind.contains(&self.decoder.logits) {
            rename(
                self.patch,
                self.decoder.logits,
                1,
                format!("sequence_length_drop{last}"),
            );
        }
    }
}

/// The last token of each row that is no padding: bool `[b, L]`.
pub(super) fn last_real(p: &mut Patch<'_>, real: ValueId) -> ValueId {
    let last = remaining(p, real, 1);
    p.op("And", &[last, real])
}

/// Where exactly `count` of the flags `[b, L]` are set from there to the end.
/// In int32: tract takes int64 sums for symbolic sizes and cannot run them.
fn remaining(p: &mut Patch<'_>, flags: ValueId, count: i32) -> ValueId {
    let flags = p.cast(flags, DataType::Int32);
    let axis = p.i64(1);
    let attributes = vec![crate::ir::int("reverse", 1)];
    let ahead = p.op_with("CumSum", &[flags, axis], attributes);
    let bytes = count.to_le_bytes().to_vec();
    let count = p.constant(crate::ir::Tensor::raw("", DataType::Int32, vec![], bytes));
    p.op("Equal", &[ahead, count])
}

/// Casts int64 to the element type of the position ids.
fn cast_like(p: &mut Patch<'_>, model: &Model, like: Option<ValueId>, x: ValueId) -> ValueId {
    let dtype = like.and_then(|v| model.value(v).ty.as_ref()?.dtype());
    match dtype {
        Some(other) if other != DataType::Int64 => p.cast(x, other),
        _ => x,
    }
}
