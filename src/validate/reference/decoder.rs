//! The decoder in stages, each the unmodified graph entered at a drop point.

use ndarray::{Array2, Array3, ArrayView1, Axis, s};

use super::super::oracle::{self, Text};
use super::super::{ValidateError, probe};
use super::operands::{Operands, Probe, Turn, array};
use super::step::{State, StepIn, StepOut};
use super::ties::{Choice, exchanged};
use crate::arch::Decoder;
use crate::ir::{Dim, Model, Patch, ValueType};
use crate::passes::{Positions, RankLayer, RankMask, TextQueries, VisualPrune, default_positions};
use crate::runtime::{DType, Session, SessionOptions, Tensor, Value};

struct Stage {
    first: usize,
    session: Session,
}

/// The unmodified decoder, cut at a recipe's drop points.
pub struct ReferenceDecoder {
    decoder: Decoder,
    stages: Vec<Stage>,
    names: Names,
    pub(super) prune: Option<VisualPrune>,
    /// Whether discarded tokens come in, to leave before the second layer.
    pub(super) placed: bool,
    positions: Positions,
    dtype: DType,
    /// Inputs that are the same for all stages.
    given: Vec<(String, Value)>,
}

struct Names {
    ids: Option<String>,
    embeds: String,
    mask: Option<String>,
    positions: Option<String>,
    logits: String,
    past: Vec<(String, String)>,
    present: Vec<(String, String)>,
    /// What each stage's entry reads besides the embeddings: a tensor for each
    /// further value of its boundary.
    extra: Vec<Vec<String>>,
    /// What is looked at, at each drop point.
    probes: Vec<Probe>,
}

/// What a stage is run on.
struct Fed<'a> {
    /// A tensor `[b, L, D]` for each value of the stage's boundary.
    entry: &'a [Array3<f32>],
    /// `[b, past + L]`.
    mask: &'a Array2<i64>,
    /// `[rows, b, L]`.
    positions: &'a Array3<i64>,
    /// `[b, L]`, in a whole model.
    ids: Option<&'a Array2<i64>>,
    past: usize,
    turn: Option<&'a Turn>,
}

impl ReferenceDecoder {
    /// Opens the base decoder for a recipe's pruning (`None`: it has none).
    ///
    /// # Errors
    /// The model cannot be cut or opened.
    pub fn open(
        model: &Model,
        decoder: &Decoder,
        prune: Option<&VisualPrune>,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        Self::open_placed(model, decoder, prune, false, options)
    }

    /// [`open`](Self::open); with `placed`, tokens that a merge discarded come in
    /// ([`StepIn::gone`]) and leave before the second layer.
    ///
    /// # Errors
    /// The model cannot be cut or opened.
    pub fn open_placed(
        model: &Model,
        decoder: &Decoder,
        prune: Option<&VisualPrune>,
        placed: bool,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let ranked = prune.into_iter().flat_map(|p| &p.drops);
        let ranked = ranked.map(|d| d.after_layer);
        let drops: Vec<usize> = placed.then_some(1).into_iter().chain(ranked).collect();
        let positions = match prune {
            Some(prune) => prune.positions_of(decoder, placed),
            None => default_positions(decoder, placed),
        };
        let name = |v| model.name(v).to_owned();
        let (mut stages, mut extra, mut probes) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..=drops.len() {
            let first = if number == 0 { 0 } else { drops[number - 1] };
            let mut patch = Patch::new(model, "cut");
            let (mut more, mut entering) = (Vec::new(), Vec::new());
            if number > 0 {
                for (i, &boundary) in decoder.layers[first].boundary.iter().enumerate() {
                    let source = if i == 0 {
                        decoder.embeds
                    } else {
                        more.push(format!("duet/cut/entry_{}", i + 1));
                        let dims = vec![Dim::Unknown; 3];
                        patch.add_input(&more[i - 1], ValueType::tensor(decoder.dtype, dims))
                    };
                    // In the residual stream's own type, which may not be the input's.
                    let hidden = match model.opset("") {
                        Some(15..) => patch.op("CastLike", &[source, boundary]),
                        _ => source,
                    };
                    patch.rewire_all(boundary, hidden);
                    entering.push(hidden);
                }
                if positions == Positions::Keep {
                    Turn::inputs(&mut patch, decoder);
                }
            }
            extra.push(more);
            let mut outputs = Vec::new();
            if let Some(&next) = drops.get(number) {
                let layer = &decoder.layers[next];
                let ranks = &decoder.layers[ranking(prune, placed, number, next)];
                // What no layer lies before any more is not computed.
                let gone = next == first;
                outputs.extend(layer.boundary.iter().filter(|_| !gone));
                for &value in entering.iter().filter(|_| gone) {
                    let copy = patch.op("Identity", &[value]);
                    patch.add_output(copy, probe::INFERRED);
                    outputs.push(copy);
                }
                outputs.extend([ranks.query.value, ranks.new_key.value]);
                let mut copies = Vec::new();
                // In a mixed graph, other layers' attention may count positions.
                let any = decoder.layers.iter().find_map(|l| l.rotary);
                if let Some(rotary) = ranks.rotary.or(any) {
                    // Copies: a table may be a weight, which cannot be given out.
                    copies.extend([rotary.cos, rotary.sin, rotary.lengths]);
                }
                copies.extend(ranks.query.bias.map(|b| b.0));
                for value in copies {
                    let copy = patch.op("Identity", &[value]);
                    patch.add_output(copy, probe::INFERRED);
                    outputs.push(copy);
                }
            }
            let plan = patch.finish();
            let cut = model.clone().apply(plan)?;
            let cut = probe::with_outputs(&cut, &outputs)?;
            if let Some(&next) = drops.get(number) {
                let ranks = &decoder.layers[ranking(prune, placed, number, next)];
                probes.push(Probe::of(&cut, &decoder.layers[next], ranks, &outputs));
            }
            let session =
                probe::open(&cut, &format!("reference decoder, stage {number}"), options)?;
            stages.push(Stage { first, session });
        }
        let names = Names {
            ids: decoder.ids.map(|i| name(i.value)),
            embeds: name(decoder.embeds),
            mask: decoder.attention_mask.map(name),
            positions: decoder.position_ids.map(name),
            logits: name(decoder.logits),
            past: decoder
                .layers
                .iter()
                .filter_map(|l| l.past.map(|(k, v)| (name(k), name(v))))
                .collect(),
            present: decoder
                .layers
                .iter()
                .filter_map(|l| l.present.map(|(k, v)| (name(k), name(v))))
                .collect(),
            extra,
            probes,
        };
        let dtype = stages[0]
            .session
            .input(&names.embeds)
            .and_then(|p| p.dtype)
            .unwrap_or(DType::F32);
        Ok(Self {
            decoder: decoder.clone(),
            stages,
            names,
            prune: prune.cloned(),
            placed,
            positions,
            dtype,
            given: Vec::new(),
        })
    }

    /// Gives an input of the graph that nothing behind the embeddings reads the
    /// data of, for all stages.
    pub fn give(&mut self, name: &str, value: Value) {
        self.given.retain(|(n, _)| n != name);
        self.given.push((name.to_owned(), value));
    }

    /// Whether it goes on from what it said before.
    pub fn has_past(&self) -> bool {
        !self.names.past.is_empty()
    }

    /// Names of the key outputs of its layers, if it gives caches.
    pub fn present_keys(&self) -> impl Iterator<Item = &str> {
        self.names.present.iter().map(|(key, _)| key.as_str())
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.decoder.depth()
    }

    /// Element type of the embeddings that the decoder reads.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A conversation of `batch` rows with nothing said yet.
    ///
    /// # Errors
    /// ONNX Runtime refuses an empty tensor.
    pub fn start(&self, batch: usize) -> Result<State, ValidateError> {
        let mut caches = Vec::new();
        for _ in &self.names.present {
            caches.push((self.zeros(batch, 0)?, self.zeros(batch, 0)?));
        }
        let alone = if batch > 1 && self.turned() {
            (0..batch)
                .map(|_| self.start(1))
                .collect::<Result<_, _>>()?
        } else {
            Vec::new()
        };
        Ok(State {
            caches,
            alone,
            masks: vec![Array2::zeros((batch, 0)); self.stages.len()],
        })
    }

    fn zeros(&self, batch: usize, length: usize) -> Result<Value, ValidateError> {
        let (heads, width) = (
            self.decoder.kv_heads as usize,
            self.decoder.head_dim as usize,
        );
        let past = self.names.past.first();
        let cache = past.and_then(|(key, _)| self.stages[0].session.input(key));
        let dtype = cache.and_then(|p| p.dtype).unwrap_or(self.dtype);
        Ok(Value::new(Tensor::zeros(
            dtype,
            [batch, heads, length, width],
        )?)?)
    }

    /// Whether the unmodified decoder takes several new tokens on top of a cache;
    /// if not, what ONNX Runtime says.
    ///
    /// # Errors
    /// ONNX Runtime refuses an input tensor.
    pub fn continues(&mut self) -> Result<Option<String>, ValidateError> {
        let (past, new) = (3, 2);
        let width = self.decoder.width.unwrap_or(1) as usize;
        let state = State {
            caches: (0..self.depth())
                .map(|_| Ok((self.zeros(1, past)?, self.zeros(1, past)?)))
                .collect::<Result<_, ValidateError>>()?,
            masks: Vec::new(),
            alone: Vec::new(),
        };
        let fed = Fed {
            entry: &[Array3::zeros((1, new, width))],
            mask: &Array2::ones((1, past + new)),
            positions: &Array3::from_shape_fn(
                (self.decoder.position_rows.unwrap_or(1), 1, new),
                |(_, _, i)| (past + i) as i64,
            ),
            ids: None,
            past,
            turn: None,
        };
        let run = self.run(0, &state, &fed);
        Ok(run.err().map(|e| e.to_string()))
    }

    /// Runs new tokens through all stages.
    ///
    /// # Errors
    /// A run fails, or scores are not finite.
    pub fn step(&mut self, state: &mut State, input: &StepIn) -> Result<StepOut, ValidateError> {
        self.step_with(state, input, None)
    }

    /// [`step`](Self::step), but where `choice` differs from the
    /// oracle's only by near-ties, the choice is followed.
    ///
    /// A decoder without a past has to be given a state of its own for each step.
    ///
    /// # Errors
    /// A run fails, or scores are not finite.
    pub fn step_with(
        &mut self,
        state: &mut State,
        input: &StepIn,
        choice: Option<Choice<'_>>,
    ) -> Result<StepOut, ValidateError> {
        let drops = self.losses(input)?;
        if state.alone.is_empty() {
            return self.advance(state, input, &drops, choice);
        }
        let found = self.step_alone(state, input, &drops, choice)?;
        state.caches.clone_from(&state.alone[0].caches);
        Ok(found)
    }

    /// Runs new tokens through all stages; `drops` are lost at each drop point.
    fn advance(
        &mut self,
        state: &mut State,
        input: &StepIn,
        drops: &[usize],
        choice: Option<Choice<'_>>,
    ) -> Result<StepOut, ValidateError> {
        let batch = input.mask.nrows();
        let bools = |row: ndarray::ArrayView1<'_, bool>| row.to_vec();
        let mut visual: Vec<Vec<bool>> = input.visual.outer_iter().map(bools).collect();
        let mut gone: Vec<Vec<bool>> = input.gone.outer_iter().map(bools).collect();
        // What no query may see is kept from every layer whose attention takes a mask.
        let mut mask = input.mask.clone();
        if self.decoder.hides_columns() {
            mask.zip_mut_with(&input.gone, |m, gone| *m *= i64::from(!gone));
        }
        let taking_part = |mask: &Array2<i64>, row: usize, gone: &[bool]| -> Vec<bool> {
            let each = mask.row(row).into_iter().zip(gone);
            each.map(|(m, gone)| *m != 0 && !gone).collect()
        };
        let mut rows: Vec<Vec<usize>> = Vec::new();
        for (row, row_visual) in visual.iter().enumerate() {
            let real = taking_part(&mask, row, &gone[row]);
            let salient = input.salient.row(row).to_vec();
            let text = match self.prune.as_ref().map(|p| p.text) {
                Some(TextQueries::Last) => Text::Last,
                Some(TextQueries::Salient) => Text::Salient(&salient),
                Some(TextQueries::All) | None => Text::All,
            };
            rows.push(oracle::text_rows(row_visual, &real, text)?);
        }
        let mut wanting = self.wanting(&rows, &visual);
        let mut entry = vec![input.embeds.clone()];
        let mut positions = input.positions.clone();
        let mut ids = input.ids.clone();
        let renumber = self.positions == Positions::Renumber;
        let unmasked = |p: &VisualPrune| p.rank_mask == RankMask::None;
        let unmasked = self.prune.as_ref().is_some_and(unmasked);
        let mut kept_all = Vec::new();
        let mut near_ties = 0;
        let mut logits = None;
        let turned = self.turned();
        let mut turn: Option<Turn> = None;
        // Behind the last stage nothing is dropped.
        for (number, dropped) in drops.iter().copied().chain([0]).enumerate() {
            let first = self.stages[number].first;
            let end = self
                .stages
                .get(number + 1)
                .map_or(self.depth(), |s| s.first);
            let cached = self.cached(number);
            let past = state.masks[cached].ncols();
            let full_mask =
                ndarray::concatenate(Axis(1), &[state.masks[cached].view(), mask.view()])
                    .map_err(|e| ValidateError::Model(e.to_string()))?;
            let fed = Fed {
                entry: &entry,
                mask: &full_mask,
                positions: &positions,
                ids: ids.as_ref(),
                past,
                turn: turn.as_ref(),
            };
            let outputs = self.run(number, state, &fed)?;
            let presents = self.names.present.iter().enumerate();
            for (layer, (key, value)) in presents.take(end).skip(first) {
                state.caches[layer] = (outputs.get(key)?.clone(), outputs.get(value)?.clone());
            }
            if number + 1 == self.stages.len() {
                logits = Some(last_row(outputs.get(&self.names.logits)?)?);
                state.masks[number] = full_mask;
                break;
            }
            let probe = &self.names.probes[number];
            let hidden: Vec<Array3<f32>> = match first == end {
                // No layer ran.
                true => entry.clone(),
                false => probe
                    .boundary
                    .iter()
                    .map(|b| array(outputs.get(b)?))
                    .collect::<Result<_, ValidateError>>()?,
            };
            let ranks = ranking(self.prune.as_ref(), self.placed, number, end);
            let operands = Operands {
                layer: &self.decoder.layers[ranks],
                width: self.decoder.head_dim as usize,
                present: self.names.present.get(ranks).map(|(key, _)| key.as_str()),
                positions: turned.then(|| positions.index_axis(Axis(0), 0)),
            };
            let (query, key, tables) = operands.read(probe, past, &outputs)?;
            let layer = &self.decoder.layers[ranks];
            let mut kept = Vec::new();
            for row in 0..batch {
                let real = taking_part(&mask, row, &gone[row]);
                // Where discarded tokens leave, nothing is ranked.
                let ranked = !(self.placed && number == 0);
                if ranked {
                    let asks = (&mut rows[row], &mut wanting[row]);
                    self.release(number, &mut visual[row], asks);
                }
                let candidates: Vec<bool> = visual[row].iter().map(|v| *v && ranked).collect();
                let scores = if candidates.iter().any(|v| *v) {
                    #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
                    let scaling = oracle::Scaling {
                        scale: layer.scale as f32,
                        softcap: layer.softcap as f32,
                        causal: !unmasked,
                    };
                    let (q, k) = (query.index_axis(Axis(0), row), key.index_axis(Axis(0), row));
                    oracle::rank(q, k, scaling, &real, &rows[row], &visual[row])?
                } else {
                    Vec::new()
                };
                let mut keep = match self.placed {
                    true => oracle::select_placed(&scores, &candidates, &gone[row], dropped)?,
                    false => oracle::select(&scores, &candidates, dropped)?,
                };
                let found = choice.and_then(|c| Some((c.kept.get(number)?.get(row)?, c.tolerance)));
                if let Some((found, tolerance)) = found
                    && let Some(count) = exchanged(&keep, found, &scores, &candidates, tolerance)
                {
                    near_ties += count;
                    keep.clone_from(found);
                }
                rows[row] = oracle::carry_rows(&rows[row], &keep, &real)?;
                kept.push(keep);
            }
            let next_past = state.masks[self.cached(number + 1)].ncols();
            let earlier = i64::try_from(past - next_past).unwrap_or(0);
            if cached == number {
                state.masks[number] = full_mask;
            }
            let length = kept[0].len();
            let mut next_mask = Array2::zeros((batch, length));
            let planes = positions.dim().0;
            let mut next_positions = Array3::zeros((planes, batch, length));
            let width = |h: &Array3<f32>| h.dim().2;
            let mut next_entry: Vec<Array3<f32>> = hidden
                .iter()
                .map(|h| Array3::zeros((batch, length, width(h))))
                .collect();
            for (row, keep) in kept.iter().enumerate() {
                for plane in 0..planes {
                    let old = positions.slice(s![plane, row, ..]).to_vec();
                    let new = if renumber {
                        let moved = oracle::renumber(&old, keep)?;
                        moved.into_iter().map(|p| p - earlier).collect()
                    } else {
                        keep.iter().map(|&i| old[i]).collect::<Vec<i64>>()
                    };
                    next_positions
                        .slice_mut(s![plane, row, ..])
                        .assign(&ArrayView1::from(&new));
                }
                for (slot, &from) in keep.iter().enumerate() {
                    next_mask[[row, slot]] = mask[[row, from]];
                    for (next, hidden) in next_entry.iter_mut().zip(&hidden) {
                        next.slice_mut(s![row, slot, ..])
                            .assign(&hidden.slice(s![row, from, ..]));
                    }
                }
                visual[row] = keep.iter().map(|&i| visual[row][i]).collect();
                gone[row] = keep.iter().map(|&i| gone[row][i]).collect();
            }
            ids = ids.map(|ids| {
                Array2::from_shape_fn((batch, length), |(row, slot)| ids[[row, kept[row][slot]]])
            });
            (mask, positions, entry) = (next_mask, next_positions, next_entry);
            if let (true, Some(tables)) = (turned, tables) {
                turn = Some(tables.at(next_past, positions.slice(s![0, 0, ..]))?);
            }
            kept_all.push(kept);
        }
        Ok(StepOut {
            logits: logits.ok_or_else(|| ValidateError::Model("no stage gave logits".into()))?,
            kept: kept_all,
            lengths: state.caches.iter().map(|(k, _)| k.shape()[2]).collect(),
            near_ties,
        })
    }

    /// Whether kept positions have to be given to attention operators that would
    /// count for themselves.
    fn turned(&self) -> bool {
        self.positions == Positions::Keep
            && self.stages.len() > 1
            && self.decoder.layers.iter().any(|l| l.rotary.is_some())
    }

    /// The stage whose layers have the cache of a stage: itself, or, if it has no layers
    /// (drops at the same place), the one behind it.
    fn cached(&self, number: usize) -> usize {
        let first = self.stages[number].first;
        let last = self.stages.iter().rposition(|s| s.first == first);
        last.unwrap_or(number)
    }

    /// Runs the rows of a batch one by one, all losing what the batch does.
    fn step_alone(
        &mut self,
        state: &mut State,
        input: &StepIn,
        drops: &[usize],
        choice: Option<Choice<'_>>,
    ) -> Result<StepOut, ValidateError> {
        let mut all: Option<StepOut> = None;
        for (row, state) in state.alone.iter_mut().enumerate() {
            let one = row..row + 1;
            let input = StepIn {
                embeds: input.embeds.slice(s![one.clone(), .., ..]).to_owned(),
                mask: input.mask.slice(s![one.clone(), ..]).to_owned(),
                positions: input.positions.slice(s![.., one.clone(), ..]).to_owned(),
                visual: input.visual.slice(s![one.clone(), ..]).to_owned(),
                gone: input.gone.slice(s![one.clone(), ..]).to_owned(),
                salient: input.salient.slice(s![one.clone(), ..]).to_owned(),
                ids: input
                    .ids
                    .as_ref()
                    .map(|ids| ids.slice(s![one, ..]).to_owned()),
            };
            let chosen: Option<Vec<Vec<Vec<usize>>>> = choice.map(|c| {
                let own = |drop: &Vec<Vec<usize>>| drop.get(row).cloned().into_iter().collect();
                c.kept.iter().map(own).collect()
            });
            let choice = choice
                .zip(chosen.as_ref())
                .map(|(c, kept)| Choice { kept, ..c });
            let found = self.advance(state, &input, drops, choice)?;
            match &mut all {
                None => all = Some(found),
                Some(all) => {
                    all.logits
                        .append(Axis(0), found.logits.view())
                        .map_err(|e| ValidateError::Model(e.to_string()))?;
                    all.near_ties += found.near_ties;
                    for (kept, row) in all.kept.iter_mut().zip(found.kept) {
                        kept.extend(row);
                    }
                }
            }
        }
        all.ok_or_else(|| ValidateError::Model("a batch without rows".into()))
    }

    /// Integers, of the type of the input `name`.
    fn integers(&self, name: &str, values: impl Into<Tensor>) -> Result<Value, ValidateError> {
        let port = self.stages[0].session.input(name);
        Ok(Value::new(
            values.into().as_declared(port.and_then(|p| p.dtype)),
        )?)
    }

    /// Runs one stage. Layers of other stages are fed caches of this stage's
    /// length, so that whatever the exporter reads lengths from agrees; what
    /// they compute is not used.
    fn run(
        &mut self,
        number: usize,
        state: &State,
        fed: &Fed<'_>,
    ) -> Result<crate::runtime::Outputs, ValidateError> {
        let (past, batch) = (fed.past, fed.mask.nrows());
        let first = self.stages[number].first;
        let end = self
            .stages
            .get(number + 1)
            .map_or(self.depth(), |s| s.first);
        let filler = self.zeros(batch, past)?;
        let mut feed: Vec<(&str, Value)> = Vec::new();
        let names = [&self.names.embeds]
            .into_iter()
            .chain(&self.names.extra[number]);
        for (name, tensor) in names.zip(fed.entry) {
            let value = Value::new(Tensor::from(tensor.clone()).cast_float(self.dtype)?)?;
            feed.push((name, value));
        }
        if let (Some(name), Some(ids)) = (&self.names.ids, fed.ids) {
            feed.push((name, self.integers(name, ids.clone())?));
        }
        feed.extend(self.given.iter().map(|(n, v)| (n.as_str(), v.clone())));
        if let Some(name) = &self.names.mask {
            feed.push((name, self.integers(name, fed.mask.clone())?));
        }
        if let Some(name) = &self.names.positions {
            // One row is what an input of rank 2 takes.
            let positions: Tensor = match self.decoder.position_rows {
                Some(_) => fed.positions.clone().into(),
                None => fed.positions.index_axis(Axis(0), 0).to_owned().into(),
            };
            feed.push((name, self.integers(name, positions)?));
        }
        if let Some(turn) = fed.turn {
            feed.extend(turn.feed(self.dtype)?);
        }
        for (layer, (key, value)) in self.names.past.iter().enumerate() {
            let own = (first..end).contains(&layer);
            let cache = &state.caches[layer];
            let pick = |v: &Value| if own { v.clone() } else { filler.clone() };
            feed.push((key, pick(&cache.0)));
            feed.push((value, pick(&cache.1)));
        }
        let inputs: Vec<(&str, &Value)> = feed.iter().map(|(n, v)| (*n, v)).collect();
        Ok(self.stages[number].session.run(&inputs)?)
    }
}

/// The layer, from 0, whose attention ranks at drop point `number` (from 0), in front of layer `next`.
fn ranking(prune: Option<&VisualPrune>, placed: bool, number: usize, next: usize) -> usize {
    // Where discarded tokens leave, nothing is ranked.
    let ranks = !(placed && number == 0);
    match prune.filter(|p| ranks && p.rank_layer == RankLayer::Previous) {
        Some(_) => next - 1,
        None => next,
    }
}

/// `[b, rows, vocabulary]` → `[b, vocabulary]`.
pub(in crate::validate) fn last_row(logits: &Value) -> Result<Array2<f32>, ValidateError> {
    let all: Array3<f32> = array(logits)?;
    let last = all.dim().1.checked_sub(1);
    let last = last.ok_or_else(|| ValidateError::Model("the logits have no rows".into()))?;
    Ok(all.index_axis(Axis(1), last).to_owned())
}
