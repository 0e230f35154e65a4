//! The decoder in stages, each the unmodified graph entered at a drop point.

use ndarray::{Array2, Array3, Array4, Axis, s};

use super::super::oracle::{self, Text};
use super::super::{ValidateError, probe};
use super::ties::{Choice, exchanged};
use crate::arch::Decoder;
use crate::ir::{Model, Patch};
use crate::passes::{Positions, TextQueries, VisualPrune};
use crate::runtime::{DType, Session, SessionOptions, Tensor, Value};

/// What one step reads. b rows, L new tokens.
#[derive(Clone, Debug)]
pub struct StepIn {
    /// `[b, L, D]`, without any marker channel.
    pub embeds: Array3<f32>,
    /// `[b, L]`: 1 for tokens, 0 for padding.
    pub mask: Array2<i64>,
    /// `[b, L]`.
    pub positions: Array2<i64>,
    /// `[b, L]`.
    pub visual: Array2<bool>,
    /// `[b, L]`, for `text: salient`.
    pub salient: Array2<bool>,
}

/// What one step gives.
#[derive(Clone, Debug)]
pub struct StepOut {
    /// `[b, vocabulary]`: the last row.
    pub logits: Array2<f32>,
    /// Kept indices at each drop point, for each row, into the sequence before it.
    pub kept: Vec<Vec<Vec<usize>>>,
    /// Length of every layer's cache.
    pub lengths: Vec<usize>,
    /// Tokens that were exchanged because their scores tie as well as exactly.
    pub near_ties: usize,
}

/// Caches and masks of a conversation.
#[derive(Debug)]
pub struct State {
    /// Key and value of every layer.
    caches: Vec<(Value, Value)>,
    /// Mask `[b, past]` of every stage.
    masks: Vec<Array2<i64>>,
}

struct Stage {
    first: usize,
    session: Session,
}

/// The unmodified decoder, cut at a recipe's drop points.
pub struct ReferenceDecoder {
    decoder: Decoder,
    stages: Vec<Stage>,
    names: Names,
    prune: Option<VisualPrune>,
    dtype: DType,
}

struct Names {
    embeds: String,
    mask: Option<String>,
    positions: Option<String>,
    logits: String,
    past: Vec<(String, String)>,
    present: Vec<(String, String)>,
    /// Residual tensor, query and key at each drop point.
    probes: Vec<(String, String, String)>,
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
        let drops: Vec<usize> = prune
            .map(|p| p.drops.iter().map(|d| d.after_layer).collect())
            .unwrap_or_default();
        let name = |v| model.name(v).to_owned();
        let mut stages = Vec::new();
        for number in 0..=drops.len() {
            let first = if number == 0 { 0 } else { drops[number - 1] };
            let mut patch = Patch::new(model, "cut");
            if number > 0 {
                let boundary = decoder.layers[first].boundary;
                // In the residual stream's own type, which may not be the input's.
                let hidden = match model.opset("") {
                    Some(15..) => patch.op("CastLike", &[decoder.embeds, boundary]),
                    _ => decoder.embeds,
                };
                patch.rewire_all(boundary, hidden);
            }
            let plan = patch.finish();
            let cut = model.clone().apply(plan)?;
            let mut outputs = Vec::new();
            if let Some(&next) = drops.get(number) {
                let layer = &decoder.layers[next];
                outputs.extend([layer.boundary, layer.query, layer.new_key]);
            }
            let cut = probe::with_outputs(&cut, &outputs)?;
            let session =
                probe::open(&cut, &format!("reference decoder, stage {number}"), options)?;
            stages.push(Stage { first, session });
        }
        let names = Names {
            embeds: name(decoder.embeds),
            mask: decoder.attention_mask.map(name),
            positions: decoder.position_ids.map(name),
            logits: name(decoder.logits),
            past: decoder
                .layers
                .iter()
                .map(|l| (name(l.past.0), name(l.past.1)))
                .collect(),
            present: decoder
                .layers
                .iter()
                .map(|l| (name(l.present.0), name(l.present.1)))
                .collect(),
            probes: drops
                .iter()
                .map(|&d| {
                    let l = &decoder.layers[d];
                    (name(l.boundary), name(l.query), name(l.new_key))
                })
                .collect(),
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
            dtype,
        })
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
        for _ in 0..self.depth() {
            caches.push((self.zeros(batch, 0)?, self.zeros(batch, 0)?));
        }
        Ok(State {
            caches,
            masks: vec![Array2::zeros((batch, 0)); self.stages.len()],
        })
    }

    fn zeros(&self, batch: usize, length: usize) -> Result<Value, ValidateError> {
        let (heads, width) = (
            self.decoder.kv_heads as usize,
            self.decoder.head_dim as usize,
        );
        let cache = self.stages[0].session.input(&self.names.past[0].0);
        let dtype = cache.and_then(|p| p.dtype).unwrap_or(self.dtype);
        Ok(Value::new(Tensor::zeros(
            dtype,
            [batch, heads, length, width],
        )?)?)
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
    /// # Errors
    /// A run fails, or scores are not finite.
    pub fn step_with(
        &mut self,
        state: &mut State,
        input: &StepIn,
        choice: Option<Choice<'_>>,
    ) -> Result<StepOut, ValidateError> {
        let batch = input.mask.nrows();
        let bools = |row: ndarray::ArrayView1<'_, bool>| row.to_vec();
        let mut visual: Vec<Vec<bool>> = input.visual.outer_iter().map(bools).collect();
        let mut rows: Vec<Vec<usize>> = Vec::new();
        for (row, row_visual) in visual.iter().enumerate() {
            let real: Vec<bool> = input.mask.row(row).iter().map(|m| *m != 0).collect();
            let salient = input.salient.row(row).to_vec();
            let text = match self.prune.as_ref().map(|p| p.text) {
                Some(TextQueries::Last) => Text::Last,
                Some(TextQueries::Salient) => Text::Salient(&salient),
                Some(TextQueries::All) | None => Text::All,
            };
            rows.push(oracle::text_rows(row_visual, &real, text)?);
        }
        let entered: Vec<usize> = visual
            .iter()
            .map(|v| v.iter().filter(|x| **x).count())
            .collect();
        let schedule: Vec<oracle::Drop> = self
            .prune
            .iter()
            .flat_map(|p| &p.drops)
            .map(|d| oracle::Drop {
                after_layer: d.after_layer,
                keep: d.keep,
            })
            .collect();
        let drops = oracle::drop_counts(&entered, &schedule)?;
        let mut embeds = input.embeds.clone();
        let mut mask = input.mask.clone();
        let mut positions = input.positions.clone();
        let renumber = self
            .prune
            .as_ref()
            .is_none_or(|p| p.positions == Positions::Renumber);
        let mut kept_all = Vec::new();
        let mut near_ties = 0;
        let mut logits = None;
        // Behind the last stage nothing is dropped.
        for (number, dropped) in drops.into_iter().chain([0]).enumerate() {
            let first = self.stages[number].first;
            let end = self
                .stages
                .get(number + 1)
                .map_or(self.depth(), |s| s.first);
            let past = state.masks[number].ncols();
            let full_mask =
                ndarray::concatenate(Axis(1), &[state.masks[number].view(), mask.view()])
                    .map_err(|e| ValidateError::Model(e.to_string()))?;
            let outputs = self.run(number, state, &embeds, &full_mask, &positions, past, batch)?;
            for layer in first..end {
                let (key, value) = &self.names.present[layer];
                state.caches[layer] = (outputs.get(key)?.clone(), outputs.get(value)?.clone());
            }
            if number + 1 == self.stages.len() {
                logits = Some(last_row(outputs.get(&self.names.logits)?)?);
                state.masks[number] = full_mask;
                break;
            }
            let (boundary, query, key) = &self.names.probes[number];
            let hidden: Array3<f32> = array(outputs.get(boundary)?)?;
            let query: Array4<f32> = array(outputs.get(query)?)?;
            let key: Array4<f32> = array(outputs.get(key)?)?;
            let layer = &self.decoder.layers[end];
            let mut kept = Vec::new();
            for row in 0..batch {
                let real: Vec<bool> = mask.row(row).iter().map(|m| *m != 0).collect();
                let scores = if visual[row].iter().any(|v| *v) {
                    #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
                    let scale = layer.scale as f32;
                    let (q, k) = (query.index_axis(Axis(0), row), key.index_axis(Axis(0), row));
                    oracle::rank(q, k, scale, &real, &rows[row], &visual[row])?
                } else {
                    Vec::new()
                };
                let mut keep = oracle::select(&scores, &visual[row], dropped)?;
                let found = choice.and_then(|c| Some((c.kept.get(number)?.get(row)?, c.tolerance)));
                if let Some((found, tolerance)) = found
                    && let Some(count) = exchanged(&keep, found, &scores, &visual[row], tolerance)
                {
                    near_ties += count;
                    keep.clone_from(found);
                }
                rows[row] = oracle::carry_rows(&rows[row], &keep, &real)?;
                kept.push(keep);
            }
            let next_past = state.masks[number + 1].ncols();
            let earlier = i64::try_from(past - next_past).unwrap_or(0);
            state.masks[number] = full_mask;
            let length = kept[0].len();
            let mut next_mask = Array2::zeros((batch, length));
            let mut next_positions = Array2::zeros((batch, length));
            let mut next_embeds = Array3::zeros((batch, length, hidden.dim().2));
            for (row, keep) in kept.iter().enumerate() {
                let old = positions.row(row).to_vec();
                let new = if renumber {
                    let moved = oracle::renumber(&old, keep)?;
                    moved.into_iter().map(|p| p - earlier).collect()
                } else {
                    keep.iter().map(|&i| old[i]).collect::<Vec<i64>>()
                };
                for (slot, &from) in keep.iter().enumerate() {
                    next_mask[[row, slot]] = mask[[row, from]];
                    next_positions[[row, slot]] = new[slot];
                    next_embeds
                        .slice_mut(s![row, slot, ..])
                        .assign(&hidden.slice(s![row, from, ..]));
                }
                visual[row] = keep.iter().map(|&i| visual[row][i]).collect();
            }
            (mask, positions, embeds) = (next_mask, next_positions, next_embeds);
            kept_all.push(kept);
        }
        Ok(StepOut {
            logits: logits.ok_or_else(|| ValidateError::Model("no stage gave logits".into()))?,
            kept: kept_all,
            lengths: state.caches.iter().map(|(k, _)| k.shape()[2]).collect(),
            near_ties,
        })
    }

    /// Runs one stage. Layers of other stages are fed caches of this stage's
    /// length, so that whatever the exporter reads lengths from agrees; what
    /// they compute is not used.
    #[allow(clippy::too_many_arguments, reason = "the state of one stage")]
    fn run(
        &mut self,
        number: usize,
        state: &State,
        embeds: &Array3<f32>,
        mask: &Array2<i64>,
        positions: &Array2<i64>,
        past: usize,
        batch: usize,
    ) -> Result<crate::runtime::Outputs, ValidateError> {
        let first = self.stages[number].first;
        let end = self
            .stages
            .get(number + 1)
            .map_or(self.depth(), |s| s.first);
        let filler = self.zeros(batch, past)?;
        let embeds = Value::new(Tensor::from(embeds.clone()).cast_float(self.dtype)?)?;
        let mut feed: Vec<(&str, Value)> = vec![(&self.names.embeds, embeds)];
        if let Some(name) = &self.names.mask {
            feed.push((name, Value::new(Tensor::from(mask.clone()))?));
        }
        if let Some(name) = &self.names.positions {
            feed.push((name, Value::new(Tensor::from(positions.clone()))?));
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

fn array<D: ndarray::Dimension>(value: &Value) -> Result<ndarray::Array<f32, D>, ValidateError> {
    let found = value.shape().to_vec();
    let array = value.to_tensor()?.to_array()?;
    array.into_dimensionality().map_err(|_| {
        ValidateError::Model(format!("an inner tensor has an unexpected rank: {found:?}"))
    })
}

/// `[b, rows, vocabulary]` → `[b, vocabulary]`.
pub(in crate::validate) fn last_row(logits: &Value) -> Result<Array2<f32>, ValidateError> {
    let all: Array3<f32> = array(logits)?;
    let last = all.dim().1.checked_sub(1);
    let last = last.ok_or_else(|| ValidateError::Model("the logits have no rows".into()))?;
    Ok(all.index_axis(Axis(1), last).to_owned())
}
