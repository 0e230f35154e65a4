//! The decoder: one run over new tokens, with a key-value cache that may differ in length from layer to layer.
//!
//! Nothing here knows which model it is. Inputs named `past_key_values.*` are filled from the outputs named
//! `present.*` of the run before, as they are; which other inputs there are decides what else is given.

mod fixed;
mod interface;

use std::time::{Duration, Instant};

use ndarray::{Array2, Axis, concatenate, s};

use self::fixed::Fixed;
pub(super) use self::interface::is_past;
use self::interface::{Ends, Slot, fillable, keys, slot};
use super::error::{Result, RuntimeError};
use super::grid::{self, Block, GridPositions};
use super::session::{Port, Session};
use super::tensor::{DType, Tensor};
use super::value::Value;

pub(super) const IDS: &str = "input_ids";
pub(super) const MASK: &str = "attention_mask";
pub(super) const POSITIONS: &str = "position_ids";
pub(super) const VISUAL: &str = "visual_token_mask";
pub(super) const SALIENT: &str = "salient_token_mask";
pub(super) const LOGITS: &str = "logits";
/// Old merged exports ask which of their two branches to take.
const USE_CACHE: &str = "use_cache_branch";
/// Some exports ask how many rows of logits to compute; 0 is all.
const KEEP_LOGITS: [&str; 2] = ["num_logits_to_keep", "logits_to_keep"];

/// What one run of the decoder reads. B rows, S new tokens.
#[derive(Debug, Clone)]
pub struct StepInput {
    /// `[B, S, width]`.
    pub embeds: Value,
    /// `[B, S]`, for decoders that (also) read ids.
    pub ids: Option<Array2<i64>>,
    /// `[B, S]`, 1 for tokens, 0 for padding. All ones if absent.
    pub mask: Option<Array2<i64>>,
    /// Position ids, given as they are. If absent: the number of tokens before each, per row, counted over
    /// the whole sequence; 0 for padding, as Transformers has it. A decoder with M-RoPE (`[3, B, S]`) has to be
    /// given them or `blocks`, see [`GridPositions`].
    pub positions: Option<Tensor>,
    /// For decoders with M-RoPE: the images of `visual`, over all rows in order. Given with the first tokens,
    /// the positions of later ones follow from the cache.
    pub blocks: Option<Vec<Block>>,
    /// `[B, S]`, true at image features, for decoders with an input `visual_token_mask`. All false if absent.
    pub visual: Option<Array2<bool>>,
    /// `[B, S]`, true at salient text, for decoders with an input `salient_token_mask`. All false if absent.
    pub salient: Option<Array2<bool>>,
}

impl StepInput {
    /// Embeddings, everything else left to the defaults.
    pub fn new(embeds: Value) -> Self {
        Self {
            embeds,
            ids: None,
            mask: None,
            positions: None,
            blocks: None,
            visual: None,
            salient: None,
        }
    }
}

/// Keys and values of all tokens so far. Cheap to clone; the memory is shared.
#[derive(Debug, Clone)]
pub struct Cache {
    /// In the order of the decoder's `past_key_values.*` inputs.
    values: Vec<Value>,
    /// Index of the axis that grows, for each value.
    axes: Vec<usize>,
    /// Which of them are keys, in the order of the layers.
    keys: Vec<usize>,
    /// `[B, tokens so far]`, 0 for padding.
    mask: Array2<i64>,
    /// Where positions of M-RoPE go on, if they are known.
    places: Option<GridPositions>,
}

impl Cache {
    /// Of a model that keeps none: only how many tokens there were.
    pub(super) fn none(tokens: usize) -> Self {
        Self {
            values: Vec::new(),
            axes: Vec::new(),
            keys: Vec::new(),
            mask: Array2::ones((1, tokens)),
            places: None,
        }
    }

    /// Tokens seen so far, padding included: what layer 0 holds.
    pub fn tokens(&self) -> usize {
        self.mask.ncols()
    }

    /// Rows.
    pub fn batch(&self) -> usize {
        self.mask.nrows()
    }

    /// `[B, tokens so far]`, 1 for tokens, 0 for padding.
    pub fn mask(&self) -> &Array2<i64> {
        &self.mask
    }

    /// Keys of each layer, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &Value> {
        self.keys.iter().map(|&key| &self.values[key])
    }

    /// Length of each layer's cache (of its keys).
    pub fn lengths(&self) -> Vec<usize> {
        let length = |&at: &usize| self.values[at].shape()[self.axes[at]];
        self.keys.iter().map(length).collect()
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.values.iter().map(Value::byte_len).sum()
    }

    /// The keys and values, in the order of the decoder's inputs.
    pub fn values(&self) -> &[Value] {
        &self.values
    }
}

/// What one run of the decoder gives.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// `[B, rows, vocabulary]`; a pruned prompt has fewer rows than tokens.
    pub logits: Value,
    /// The cache to go on with.
    pub cache: Cache,
    /// Outputs besides logits and cache, by name.
    pub extra: Vec<(String, Value)>,
    /// Time of the run.
    pub elapsed: Duration,
}

impl StepOutput {
    /// The last row of the logits of each batch row, `[B, vocabulary]`, as `f32`.
    ///
    /// # Errors
    /// The logits are no floating-point numbers, or there are none.
    pub fn last_logits(&self) -> Result<Array2<f32>> {
        last_rows(&self.logits)
    }
}

/// The last row of logits `[B, rows, vocabulary]` of each batch row.
pub(super) fn last_rows(logits: &Value) -> Result<Array2<f32>> {
    let (batch, rows, width) = match *logits.shape() {
        [batch, rows, width] if rows > 0 => (batch, rows, width),
        [batch, width] => (batch, 1, width),
        _ => {
            return Err(RuntimeError::Tensor(format!(
                "logits {:?} have no last row; expected [batch, rows, vocabulary]",
                logits.shape()
            )));
        }
    };
    let mut out = Array2::zeros((batch, width));
    for (row, mut target) in out.outer_iter_mut().enumerate() {
        let start = (row * rows + rows - 1) * width;
        target.assign(&ndarray::aview1(&logits.f32_range(start, width)?));
    }
    Ok(out)
}

/// Heads of a cache, for decoders that do not declare them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheHeads {
    /// Number of key/value heads.
    pub count: usize,
    /// Width of a head.
    pub width: usize,
}

/// An open decoder.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    /// The graph that runs first, where `session` only goes on from a cache.
    prompt: Option<(Session, Ends)>,
    slots: Vec<Slot>,
    /// Which slots are keys, in the order of the layers.
    keys: Vec<usize>,
    /// Where data goes in and comes out of `session`.
    ends: Ends,
    /// What both graphs are for, if their shapes are fixed.
    fixed: Option<Fixed>,
}

impl Decoder {
    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// There are no logits, an input is not one of those that can be filled, a `past_key_values.*` has no
    /// `present.*`, or its head count or head size is not fixed.
    pub fn new(session: Session) -> Result<Self> {
        Self::with_heads(session, None)
    }

    /// As [`new`](Self::new); `heads` stand in for a head count and head size that the model does not declare
    /// (`[batch, heads, past, width]`, one of them or both left open).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_heads(session: Session, heads: Option<CacheHeads>) -> Result<Self> {
        let ends = Ends::of(&session)?;
        let mut slots = Vec::new();
        for port in session.inputs() {
            if is_past(&port.name) {
                slots.push(slot(&session, port, heads)?);
            }
        }
        fillable(&session, &ends)?;
        let keys = keys(&slots);
        Ok(Self {
            session,
            prompt: None,
            slots,
            keys,
            ends,
            fixed: None,
        })
    }

    /// Adds the graph that runs over a sequence's first tokens: of a model in two files, of which the other
    /// goes on from a cache.
    ///
    /// # Errors
    /// It takes a cache itself, does not give what the other goes on from, or has an input that cannot be
    /// filled.
    pub fn with_prompt(mut self, prompt: Session) -> Result<Self> {
        let wrong = |expected: String, found: String| RuntimeError::Interface {
            model: prompt.model().to_string(),
            expected,
            found,
        };
        let ends = Ends::of(&prompt)?;
        for name in self.slots.iter().map(|s| s.present.as_str()) {
            if prompt.output(name).is_none() {
                return Err(wrong(
                    format!(
                        "an output `{name}`, from which {} goes on",
                        self.session.model()
                    ),
                    ports(prompt.outputs()),
                ));
            }
        }
        let past = |port: &&Port| is_past(&port.name);
        if let Some(port) = prompt.inputs().iter().find(past) {
            return Err(wrong(
                "no cache inputs in the graph that runs first".into(),
                port.name.clone(),
            ));
        }
        fillable(&prompt, &ends)?;
        self.fixed = Fixed::of(&prompt, &ends, &self.slots, &self.keys);
        self.prompt = Some((prompt, ends));
        Ok(self)
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to end its profiling.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The session that runs over a sequence's first tokens: that of a file of its own, or the only one.
    pub fn prompt_session_mut(&mut self) -> &mut Session {
        match &mut self.prompt {
            Some((prompt, _)) => prompt,
            None => &mut self.session,
        }
    }

    /// True if the decoder can go on from a cache.
    pub fn has_cache(&self) -> bool {
        !self.slots.is_empty()
    }

    /// True if the decoder reads which tokens are salient.
    pub fn reads_salient(&self) -> bool {
        self.session.input(SALIENT).is_some()
    }

    /// True if the decoder reads which tokens are image features from an input of its own.
    pub fn reads_visual(&self) -> bool {
        self.session.input(VISUAL).is_some()
    }

    /// Element type and width of the embeddings that the decoder reads; the width is `None` if the model does
    /// not declare it.
    pub fn embeds(&self) -> (Option<DType>, Option<usize>) {
        let port = self.session.input(&self.ends.embeds);
        let width = port.and_then(|port| port.dims.get(2)?.fixed());
        (port.and_then(|port| port.dtype), width)
    }

    /// A cache of no tokens, for `batch` rows.
    ///
    /// # Errors
    /// ONNX Runtime refuses it.
    pub fn empty_cache(&self, batch: usize) -> Result<Cache> {
        let mut values = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let shape: Vec<usize> = slot
                .dims
                .iter()
                .enumerate()
                .map(|(axis, dim)| match axis {
                    _ if axis == slot.axis => 0,
                    _ => dim.unwrap_or(batch),
                })
                .collect();
            values.push(Value::new(Tensor::zeros(slot.dtype, shape)?)?);
        }
        let axes = self.slots.iter().map(|slot| slot.axis).collect();
        Ok(Cache {
            values,
            axes,
            keys: self.keys.clone(),
            mask: Array2::zeros((batch, 0)),
            places: None,
        })
    }

    /// Runs the first tokens of a sequence.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn prefill(&mut self, input: &StepInput) -> Result<StepOutput> {
        let batch = input.embeds.shape().first().copied().unwrap_or(0);
        let cache = self.empty_cache(batch)?;
        self.step(input, &cache)
    }

    /// Runs further tokens: one while decoding, several for another turn of a conversation.
    ///
    /// # Errors
    /// Shapes do not agree, or the run fails.
    pub fn step(&mut self, input: &StepInput, cache: &Cache) -> Result<StepOutput> {
        match self.fixed.clone() {
            Some(fixed) => self.step_fixed(&fixed, input, cache),
            None => self.run(input, cache),
        }
    }

    /// Runs a graph as the tokens come.
    fn run(&mut self, input: &StepInput, cache: &Cache) -> Result<StepOutput> {
        let (batch, new) = match *input.embeds.shape() {
            [batch, new, _] if batch > 0 && new > 0 => (batch, new),
            ref other => {
                return Err(RuntimeError::Tensor(format!(
                    "embeddings are {other:?}; expected [batch, tokens, width], none of them 0"
                )));
            }
        };
        if cache.batch() != batch {
            return Err(RuntimeError::Tensor(format!(
                "embeddings have {batch} rows, the cache has {}",
                cache.batch()
            )));
        }
        if cache.values.len() != self.slots.len() {
            return Err(RuntimeError::Tensor(format!(
                "the cache holds {} tensors, {} takes {}: it is another model's",
                cache.values.len(),
                self.session.model(),
                self.slots.len()
            )));
        }
        let check = |what: &str, dim: (usize, usize)| {
            if dim == (batch, new) {
                return Ok(());
            }
            Err(RuntimeError::Tensor(format!(
                "{what} is {dim:?}, the embeddings have ({batch}, {new}) tokens"
            )))
        };
        let step_mask = match &input.mask {
            Some(mask) => mask.clone(),
            None => Array2::ones((batch, new)),
        };
        check("the mask", step_mask.dim())?;
        let mask = concatenate(Axis(1), &[cache.mask.view(), step_mask.view()])
            .map_err(|e| RuntimeError::Tensor(e.to_string()))?;

        let first = cache.tokens() == 0 && self.prompt.is_some();
        let (session, ends) = match &mut self.prompt {
            Some((prompt, ends)) if first => (prompt, &*ends),
            _ => (&mut self.session, &self.ends),
        };
        let mut places = None;
        let mut feed: Vec<(String, Value)> = vec![(ends.embeds.clone(), input.embeds.clone())];
        for port in session.inputs() {
            let value = match port.name.as_str() {
                IDS => {
                    let ids = input.ids.clone().ok_or_else(|| {
                        RuntimeError::Tensor(format!(
                            "{} reads token ids, none are given",
                            session.model()
                        ))
                    })?;
                    check(IDS, ids.dim())?;
                    integers(port, ids)?
                }
                MASK => integers(port, mask.clone())?,
                POSITIONS => match &input.positions {
                    Some(positions) => integers(port, positions.clone())?,
                    None => {
                        if let Some(visual) = &input.visual {
                            check(VISUAL, visual.dim())?;
                        }
                        let counted = || positions(&mask, new);
                        let before = cache.places.as_ref();
                        let start = cache.tokens() == 0;
                        let (value, after) =
                            grid::positions(port, input, before, &step_mask, counted, start)?;
                        places = after;
                        value
                    }
                },
                VISUAL | SALIENT => {
                    let given = if port.name == VISUAL {
                        &input.visual
                    } else {
                        &input.salient
                    };
                    let flags = match given {
                        Some(flags) => flags.clone(),
                        None => Array2::default((batch, new)),
                    };
                    check(&port.name, flags.dim())?;
                    Value::new(flags.into())?
                }
                USE_CACHE => Value::new(Tensor::new([1], vec![cache.tokens() > 0])?)?,
                name if KEEP_LOGITS.contains(&name) => {
                    Value::new(Tensor::new(vec![1; port.dims.len()], vec![0i64])?)?
                }
                _ => continue,
            };
            feed.push((port.name.clone(), value));
        }
        if !first {
            for (slot, value) in self.slots.iter().zip(&cache.values) {
                feed.push((slot.past.clone(), value.clone()));
            }
        }
        let feed: Vec<(&str, &Value)> = feed
            .iter()
            .map(|(name, value)| (name.as_str(), value))
            .collect();
        let start = Instant::now();
        let outputs = session.run(&feed)?;
        let elapsed = start.elapsed();
        let values = self
            .slots
            .iter()
            .map(|slot| outputs.get(&slot.present).cloned())
            .collect::<Result<_>>()?;
        let known =
            |name: &str| name == ends.logits || self.slots.iter().any(|s| s.present == name);
        let extra = outputs
            .iter()
            .filter(|(name, _)| !known(name))
            .map(|(name, value)| (name.to_owned(), value.clone()))
            .collect();
        Ok(StepOutput {
            logits: outputs.get(&ends.logits)?.clone(),
            extra,
            cache: Cache {
                values,
                axes: cache.axes.clone(),
                keys: cache.keys.clone(),
                mask,
                places,
            },
            elapsed,
        })
    }
}

/// Position ids of the last `new` columns of a mask: the number of tokens before each, 0 for padding.
pub(super) fn positions(mask: &Array2<i64>, new: usize) -> Array2<i64> {
    let mut positions = mask.clone();
    positions.accumulate_axis_inplace(Axis(1), |&before, token| *token += before);
    positions.zip_mut_with(mask, |position, &token| {
        *position = if token == 0 { 0 } else { *position - 1 };
    });
    positions.slice_move(s![.., mask.ncols() - new..])
}

/// Integers in the type that an input declares.
pub(super) fn integers(port: &Port, values: impl Into<Tensor>) -> Result<Value> {
    Value::new(values.into().as_declared(port.dtype))
}

pub(super) fn ports(ports: &[Port]) -> String {
    let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::library::ensure;
    use crate::runtime::session::SessionOptions;
    use crate::runtime::test_models::{self as models, Type};
    use ndarray::arr2;

    fn open(model: &[u8]) -> Result<Decoder> {
        ensure(&mut |_| ()).unwrap();
        Decoder::new(Session::from_bytes(model, "decoder", &SessionOptions::default()).unwrap())
    }

    fn embeds(rows: usize, tokens: usize, dtype: DType) -> Value {
        let data: Vec<f32> = (0..rows * tokens).map(|v| v as f32).collect();
        let tensor = Tensor::new([rows, tokens, 1], data).unwrap();
        Value::new(tensor.cast_float(dtype).unwrap()).unwrap()
    }

    #[test]
    fn positions_count_tokens_only() {
        let mask = arr2(&[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]);
        assert_eq!(
            positions(&mask, 5),
            arr2(&[[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
        );
        assert_eq!(positions(&mask, 1), arr2(&[[2], [4]]));
    }

    #[test]
    fn caches_of_unequal_length_go_round() {
        for (ty, dtype) in [(Type::F32, DType::F32), (Type::F16, DType::F16)] {
            let mut decoder = open(&models::ragged_decoder(ty)).unwrap();
            assert_eq!(decoder.embeds(), (Some(dtype), Some(1)));
            assert!(decoder.has_cache() && decoder.reads_salient() && decoder.reads_visual());
            let mut input = StepInput::new(embeds(2, 3, dtype));
            input.mask = Some(arr2(&[[0, 1, 1], [1, 1, 1]]));
            input.visual = Some(arr2(&[[false, true, false], [true, true, false]]));
            input.salient = Some(arr2(&[[false, false, true], [false, false, false]]));
            let first = decoder.prefill(&input).unwrap();
            // Embedding, position, visual, salient, tokens in the mask.
            let expected = [
                [0.0, 0.0, 0.0, 0.0, 2.0],
                [1.0, 0.0, 1.0, 0.0, 2.0],
                [2.0, 1.0, 0.0, 1.0, 2.0],
                [3.0, 0.0, 1.0, 0.0, 3.0],
                [4.0, 1.0, 1.0, 0.0, 3.0],
                [5.0, 2.0, 0.0, 0.0, 3.0],
            ];
            assert_eq!(&*first.logits.f32s().unwrap(), expected.concat());
            assert_eq!(
                first.last_logits().unwrap(),
                arr2(&[expected[2], expected[5]])
            );
            assert_eq!(
                (first.cache.lengths(), first.cache.tokens()),
                (vec![3, 1], 3)
            );
            assert_eq!(first.cache.bytes(), 2 * 2 * (3 + 1) * dtype.size());

            let step = decoder
                .step(&StepInput::new(embeds(2, 1, dtype)), &first.cache)
                .unwrap();
            let expected = arr2(&[[0.0, 2.0, 0.0, 0.0, 3.0], [1.0, 3.0, 0.0, 0.0, 4.0]]);
            assert_eq!(step.last_logits().unwrap(), expected);
            assert_eq!((step.cache.lengths(), step.cache.tokens()), (vec![4, 2], 4));
            // A second turn of several tokens, and the first cache is still good.
            let turn = decoder
                .step(&StepInput::new(embeds(2, 2, dtype)), &step.cache)
                .unwrap();
            assert_eq!(turn.cache.lengths(), [6, 3]);
            let again = decoder
                .step(&StepInput::new(embeds(2, 1, dtype)), &first.cache)
                .unwrap();
            assert_eq!(again.last_logits().unwrap(), expected);
            assert_eq!(turn.cache.mask().row(0).to_vec(), [0, 1, 1, 1, 1, 1]);
        }
    }

    #[test]
    fn given_positions_are_taken_as_they_are() {
        let mut decoder = open(&models::ragged_decoder(Type::F32)).unwrap();
        let mut input = StepInput::new(embeds(1, 2, DType::F32));
        input.positions = Some(Tensor::new([1, 2], vec![7i64, 9]).unwrap());
        let logits = decoder.prefill(&input).unwrap().last_logits().unwrap();
        assert_eq!(logits[[0, 1]], 9.0);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut decoder = open(&models::ragged_decoder(Type::F32)).unwrap();
        let cache = decoder.empty_cache(2).unwrap();
        let one = || StepInput::new(embeds(1, 2, DType::F32));
        let error = decoder.step(&one(), &cache).unwrap_err().to_string();
        assert!(
            error.contains("1 rows") && error.contains("has 2"),
            "{error}"
        );
        let mut short = one();
        short.mask = Some(arr2(&[[1]]));
        let error = decoder.prefill(&short).unwrap_err().to_string();
        assert!(error.contains("the mask is (1, 1)"), "{error}");
        let mut short = one();
        short.visual = Some(arr2(&[[true]]));
        let error = decoder.prefill(&short).unwrap_err().to_string();
        assert!(error.contains("visual_token_mask"), "{error}");
        let error = decoder
            .prefill(&StepInput::new(embeds(1, 0, DType::F32)))
            .unwrap_err();
        assert!(error.to_string().contains("[1, 0, 1]"), "{error}");
        let error = decoder
            .prefill(&StepInput::new(embeds(1, 2, DType::F16)))
            .unwrap_err();
        assert!(error.to_string().contains("float32[b, s, 1]"), "{error}");
    }

    #[test]
    fn other_models_are_refused_by_name() {
        let error = open(&models::top_two_rows()).unwrap_err().to_string();
        assert!(
            error.contains("inputs_embeds") && error.contains("`scores`"),
            "{error}"
        );
    }
}
