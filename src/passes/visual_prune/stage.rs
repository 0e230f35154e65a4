//! The stages between drop points, and re-rooting what they read.

use std::collections::{HashMap, HashSet};

use super::gone;
use super::rank::Ranking;
use super::{RankLayer, RatioBase, SALIENT_MASK_INPUT, TextQueries, VisualPrune, marker};
use crate::arch::Decoder;
use crate::ir::cone::{descendants, descendants_up_to};
use crate::ir::{
    DataType, Dim, Model, NodeId, Patch, PatchPlan, Size, Substitution, ValueId, ValueType,
};
use crate::passes::{Context, FixedRun, Positions};

/// What the layers of one stage read. Shapes: b batch, L tokens of the stage
/// that are processed now, S past + L.
pub(super) struct Stage {
    /// What the drop point before it is called; empty before the first.
    pub(super) label: String,
    /// First layer (from 0).
    pub(super) first: usize,
    /// What enters it, `[b, L, D]` each: a value for each one of the boundary.
    pub(super) hidden: Vec<ValueId>,
    /// Attention mask `[b, S]` in the graph's own type.
    pub(super) mask: Option<ValueId>,
    /// Its columns of the tokens processed now, `[b, L]`.
    pub(super) mask_now: Option<ValueId>,
    /// Token ids `[b, L]`, in a whole model.
    ids: Option<ValueId>,
    /// Bool `[b, L]`: neither padding nor gone.
    pub(super) real: ValueId,
    /// Bool `[b, L]`: discarded features that are still there (`placement: decoder`).
    pub(super) gone: Option<ValueId>,
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
    /// Tokens dropped before this stage, in this step (`ratio_base: entered`).
    lost: Size,
    /// Original value → this stage's.
    pub(super) subst: Substitution,
    /// Projections of the first layer → what the ranking has computed of them.
    pub(super) computed: Substitution,
}

/// What a decoder patch is to do.
pub(super) struct Job<'a> {
    /// The pass that plans it.
    pub(super) pass: &'static str,
    /// Ranked drops, and what goes for all drops.
    pub(super) prune: &'a VisualPrune,
    /// Whether discarded features come in, to be dropped behind the first layer.
    pub(super) placed: bool,
}

/// Plans the whole decoder patch.
pub(super) fn plan(
    job: &Job<'_>,
    model: &Model,
    decoder: &Decoder,
    context: &Context,
) -> Result<PatchPlan, String> {
    let mut patch = Patch::new(model, job.pass);
    let entry = marker::enter(&mut patch, decoder, context, job.placed);
    let drops = job.prune.drops.iter().map(|d| d.after_layer);
    let points: Vec<usize> = job
        .placed
        .then_some(gone::LAYERS)
        .into_iter()
        .chain(drops)
        .collect();
    let cuts = Cuts::of(model, decoder, &points)?;
    let mut plan = Plan {
        pass: job.prune,
        model,
        decoder,
        patch: &mut patch,
        points,
        hides: job.placed && decoder.hides_columns(),
        positions: job.prune.positions_of(decoder, job.placed),
        mask_before: None,
        cuts: &cuts,
        fixed: context.fixed,
    };
    plan.inputs()?;
    if entry.embeds != decoder.embeds {
        plan.patch.rewire_all(decoder.embeds, entry.embeds);
    }
    let mut stages = vec![plan.entry(entry)?];
    plan.keep_places(&mut stages[0])?;
    let entered = plan.entered(&stages[0]);
    for number in 0..plan.points.len() {
        let before = &mut stages[number];
        let mut next = match number.checked_sub(usize::from(job.placed)) {
            None => plan.drop_gone(before),
            Some(at) => plan.drop(at + 1, before, &entered)?,
        };
        plan.rewire(number + 1, &mut next)?;
        plan.unfuse(number + 1, &mut next)?;
        stages.push(next);
    }
    for (number, stage) in stages.iter().enumerate() {
        plan.zero_keys(number, stage)?;
    }
    plan.types(&stages);
    Ok(patch.finish())
}

/// How many tokens of a kind each row had when they entered, int64 `[b]`.
pub(super) struct Entered {
    visual: ValueId,
    gone: Option<ValueId>,
}

/// Which nodes lie behind which drop point.
pub(super) struct Cuts {
    /// Values behind each drop point (they nest).
    pub(super) behind: Vec<HashSet<ValueId>>,
    /// Values that carry the sequence's data.
    data: HashSet<ValueId>,
}

impl Cuts {
    fn of(model: &Model, decoder: &Decoder, points: &[usize]) -> Result<Self, String> {
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
        for point in points {
            let boundary = &decoder.layers[*point].boundary;
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
    /// The drop points, by the first layer behind each.
    pub(super) points: Vec<usize>,
    /// Whether columns of discarded features are masked.
    pub(super) hides: bool,
    /// What happens to the positions of tokens that stay.
    pub(super) positions: Positions,
    /// What the client's mask says of the cache, `[b, S − L]`; none without a cache.
    pub(super) mask_before: Option<ValueId>,
    pub(super) cuts: &'a Cuts,
    /// What the graph is for, where its shapes are to be fixed.
    pub(super) fixed: Option<FixedRun>,
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
                let cache = match shape.is_some_and(|s| s.len() == 4) {
                    true => {
                        " (caches are told by their names: past_key_values.N.key and present.N.key, \
                         past_key_N, past.N.k)"
                    }
                    false => "",
                };
                return Err(format!(
                    "layers behind a drop point read the input '{}', whose relation to the sequence is not \
                     known; export the decoder with inputs_embeds, attention_mask, position_ids and \
                     past_key_values only{cache}",
                    value.name
                ));
            }
        }
        Ok(())
    }

    /// Layers of a stage.
    pub(super) fn span(&self, number: usize) -> std::ops::Range<usize> {
        let first = number.checked_sub(1).map_or(0, |n| self.points[n]);
        let end = self.points.get(number).copied();
        first..end.unwrap_or(self.decoder.depth())
    }

    /// The stage before the first drop.
    fn entry(&mut self, entry: marker::Entry) -> Result<Stage, String> {
        let decoder = self.decoder;
        let p = &mut *self.patch;
        let length = p.size_of(decoder.embeds, 1);
        let past = marker::past_length(p, decoder, 0);
        let mut mask_now = None;
        let real = match decoder.attention_mask {
            Some(mask) => {
                let total = p.size_of(mask, 1);
                let old = p.size_sub(total, length);
                let now = p.slice(mask, old, total, 1);
                if past != Size::Known(0) {
                    self.mask_before = Some(p.slice(mask, Size::Known(0), old, 1));
                }
                mask_now = Some(now);
                p.cast(now, DataType::Bool)
            }
            None => {
                let yes = p.constant(crate::ir::Tensor::bool_scalar("", true));
                let shape = p.op("Shape", &[entry.visual]);
                p.op("Expand", &[yes, shape])
            }
        };
        let gone = entry.gone.map(|g| self.patch.op("And", &[g, real]));
        let mut mask = decoder.attention_mask;
        if let (Some(gone), true) = (gone, self.hides) {
            (mask, mask_now) = self.hide(gone, mask_now, past)?;
        }
        let real = match gone {
            Some(gone) => {
                let here = self.patch.op("Not", &[gone]);
                self.patch.op("And", &[real, here])
            }
            None => real,
        };
        let visual = self.patch.op("And", &[entry.visual, real]);
        let text = self.text(visual, real);
        let gone_mask = gone.map(|g| (g, "gone"));
        let masks = [(visual, "visual"), (real, "real"), (text, "text")];
        for (value, name) in masks.into_iter().chain(gone_mask) {
            self.patch.name_value(value, &format!("entry/{name}_mask"));
        }
        let mut stage = Stage {
            label: String::new(),
            first: 0,
            hidden: vec![entry.embeds],
            mask,
            mask_now,
            ids: decoder.ids.map(|i| i.value),
            real,
            gone,
            positions: decoder.position_ids,
            rotary: None,
            visual,
            text,
            length,
            past,
            lost: Size::Known(0),
            subst: HashMap::new(),
            computed: HashMap::new(),
        };
        self.roots(0, &mut stage);
        Ok(stage)
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

    /// What each row had when it entered.
    fn entered(&mut self, stage: &Stage) -> Entered {
        let stated = self.fixed.map(|run| (run.visual, run.gone));
        Entered {
            visual: self.count_or(stage.visual, stated.map(|s| s.0)),
            gone: stage.gone.map(|g| self.count_or(g, stated.map(|s| s.1))),
        }
    }

    /// Whether prompts and caches of a graph of fixed shapes are padded on the right: attention goes by the length
    /// of each row.
    pub(super) fn pads_right(&self) -> bool {
        self.fixed.is_some() && !self.decoder.hides_columns()
    }

    /// Flags of each row, int64 `[b]`: counted, unless their number is stated.
    pub(super) fn count_or(&mut self, flags: ValueId, stated: Option<i64>) -> ValueId {
        match (stated, self.fixed) {
            (Some(count), Some(run)) => {
                let rows = usize::try_from(run.batch).unwrap_or(1);
                self.patch.i64s(&vec![count; rows])
            }
            _ => self.count(flags),
        }
    }

    /// Flags `[b, L]` that are set, of each row: int64 `[b]`.
    pub(super) fn count(&mut self, flags: ValueId) -> ValueId {
        let count = self.patch.cast(flags, DataType::Int64);
        self.patch.reduce_sum(count, &[1], false)
    }

    /// What leaves a stage where layer `first` is entered: what its last layer gives, or,
    /// of a stage without layers, what entered it.
    pub(super) fn exit(&self, stage: &Stage, first: usize) -> Vec<ValueId> {
        match stage.first == first {
            true => stage.hidden.clone(),
            false => self.decoder.layers[first].boundary.clone(),
        }
    }

    /// Inserts drop point `number` (from 1) and returns the stage behind it.
    fn drop(
        &mut self,
        number: usize,
        before: &mut Stage,
        entered: &Entered,
    ) -> Result<Stage, String> {
        // Gone tokens have a drop point of their own, before the others.
        let behind = number + usize::from(before.gone.is_some());
        let first = self.points[behind - 1];
        let label = format!("drop{number}");
        self.patch.scope(&label);
        let (now, lost) = match self.pass.ratio_base {
            RatioBase::Entered => {
                // Each row could lose n − ⌊r·n⌋, and what is gone, up to here.
                let keep = self.pass.drops[number - 1].keep;
                let kept = self.patch.share(entered.visual, keep);
                let lost = self.loss(entered.visual, kept, entered.gone);
                (self.patch.size_sub(lost, before.lost), lost)
            }
            RatioBase::Current => {
                let now = self.release(number, before);
                (now, now)
            }
        };
        let before = &*before;
        let length = self.patch.size_sub(before.length, now);
        let (scores, shared) = Ranking {
            model: self.model,
            entry: &self.exit(before, first),
            patch: self.patch,
            layer: &self.decoder.layers[self.pass.rank_layer.at(first)],
            own: self.pass.rank_layer == RankLayer::Previous,
            decoder: self.decoder,
            stage: before,
            number,
            mask: self.pass.rank_mask,
            text: self
                .fixed
                .map(|run| run.text)
                .filter(|_| self.pass.text != TextQueries::Salient),
            fixed: self.fixed.is_some(),
        }
        .scores()?;
        // Text and padding always stay: a probability never reaches 2. What is gone
        // leaves first.
        let p = &mut *self.patch;
        let two = p.f32(2.0);
        let mut scores = p.op("Where", &[before.visual, scores, two]);
        if let Some(gone) = before.gone {
            let lowest = p.f32(-1.0);
            scores = p.op("Where", &[gone, lowest, scores]);
        }
        let (_, best) = p.top_k(scores, length, true);
        let kept = p.sort_ascending(best, length);
        let mut next = self.behind(behind, label, before, kept, (length, lost));
        self.read_again(&shared, kept, &mut next);
        Ok(next)
    }

    /// Stage `number`, behind a drop point at which the tokens `kept` `[b, length]` of
    /// `before` stay; `lost` left in this step up to there.
    pub(super) fn behind(
        &mut self,
        number: usize,
        label: String,
        before: &Stage,
        kept: ValueId,
        (length, lost): (Size, Size),
    ) -> Stage {
        let first = self.points[number - 1];
        let leaving = self.exit(before, first);
        let p = &mut *self.patch;
        p.name_value(kept, &format!("{label}/kept_indices"));
        let hidden: Vec<ValueId> = leaving
            .iter()
            .enumerate()
            .map(|(i, &value)| {
                let hidden = p.gather_rows(value, kept);
                let name = if i == 0 {
                    "hidden".into()
                } else {
                    format!("hidden_{}", i + 1)
                };
                p.name_value(hidden, &format!("{label}/{name}"));
                hidden
            })
            .collect();
        let real = p.gather_rows(before.real, kept);
        let gone = before.gone.map(|g| p.gather_rows(g, kept));
        let visual = p.gather_rows(before.visual, kept);
        let text = p.gather_rows(before.text, kept);
        let past = marker::past_length(p, self.decoder, first);
        let mask_now = before.mask_now.map(|now| p.gather_rows(now, kept));
        let mask = mask_now.map(|now| match self.mask_of_past(first, past) {
            Some(earlier) => self.patch.concat(&[earlier, now], 1),
            None => now,
        });
        let right = self.pads_right();
        let p = &mut *self.patch;
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
            match self.positions {
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
                    let new = p.op("Sub", &[gathered, gone]);
                    match right {
                        // Padding behind the tokens is at 0 in front of a drop too.
                        true => {
                            let zero = p.i64(0);
                            let zero = cast_like(p, self.model, self.decoder.position_ids, zero);
                            p.op("Max", &[new, zero])
                        }
                        false => new,
                    }
                }
            }
        });
        let mut stage = Stage {
            label,
            first,
            hidden,
            mask,
            mask_now,
            ids,
            real,
            gone,
            positions,
            rotary: before.rotary.map(|r| p.gather_rows(r, kept)),
            visual,
            text,
            length,
            past,
            lost,
            subst: HashMap::new(),
            computed: HashMap::new(),
        };
        self.roots(number, &mut stage);
        stage
    }

    /// The substituted roots of a stage's prelude.
    fn roots(&self, number: usize, stage: &mut Stage) {
        let decoder = self.decoder;
        let layers = self.span(number);
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
            if let (Some(past), Some(own), false) = (layer.past, own, layers.contains(&index)) {
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
