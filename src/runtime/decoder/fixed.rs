//! Decoders of fixed shapes (`duet rewrite --static`): a graph for prompts of so many tokens, and one for a token on a
//! cache of so many columns.
//!
//! What is shorter is padded, on the left, or on the right where attention goes by the length of each row; padding is
//! cut off again from what comes out, so callers see what a decoder of open shapes gives.

use ndarray::{Array2, Axis, concatenate, s};

use super::super::error::{Result, RuntimeError};
use super::super::session::Session;
use super::super::tensor::{Element, Tensor, TensorData};
use super::super::value::Value;
use super::interface::{Ends, Slot};
use super::{Cache, Decoder, StepInput, StepOutput};
use crate::ir::{PADDING_KEY, VISUAL_KEY};

/// The shapes of a decoder in two graphs.
#[derive(Debug, Clone)]
pub(super) struct Fixed {
    /// Rows.
    batch: usize,
    /// Tokens of a prompt.
    tokens: usize,
    /// Columns of each past, by slot.
    columns: Vec<usize>,
    /// Columns that the mask says something of before the new token.
    before: usize,
    /// Padding lies on the right.
    right: bool,
    /// Visual tokens of each row of a prompt, where the file states their number.
    visual: Option<usize>,
}

impl Fixed {
    /// Of the graph for prompts and what the other takes, if both state all sizes.
    pub(super) fn of(
        prompt: &Session,
        ends: &Ends,
        slots: &[Slot],
        keys: &[usize],
    ) -> Option<Self> {
        let dims = &prompt.input(&ends.embeds)?.dims;
        let columns: Option<Vec<usize>> = slots.iter().map(|s| s.dims[s.axis]).collect();
        let columns = columns?;
        Some(Self {
            batch: dims.first()?.fixed()?,
            tokens: dims.get(1)?.fixed()?,
            before: columns[*keys.first()?],
            columns,
            right: prompt.metadata(PADDING_KEY).as_deref() == Some("right"),
            visual: prompt.metadata(VISUAL_KEY).and_then(|n| n.parse().ok()),
        })
    }
}

/// `[rows, columns]` with `n` more columns of `fill`.
fn wider<T: Copy>(array: &Array2<T>, n: usize, fill: T, right: bool) -> Result<Array2<T>> {
    let more = Array2::from_elem((array.nrows(), n), fill);
    let parts = match right {
        true => [array.view(), more.view()],
        false => [more.view(), array.view()],
    };
    concatenate(Axis(1), &parts).map_err(|e| RuntimeError::Tensor(e.to_string()))
}

/// A value whose axis `axis` has `n` more places of zeros, or fewer for negative `n`.
fn resized(value: &Value, axis: usize, n: isize, right: bool) -> Result<Value> {
    if n == 0 {
        return Ok(value.clone());
    }
    fn each<T: Element>(
        all: &[T],
        (from, to): (usize, usize),
        inner: usize,
        right: bool,
    ) -> Vec<T> {
        let keep = from.min(to) * inner;
        let mut out = Vec::with_capacity(all.len() / from.max(1) * to);
        for block in all.chunks_exact(from * inner) {
            let zeros = vec![T::default(); (to * inner).saturating_sub(keep)];
            if right {
                out.extend_from_slice(&block[..keep]);
                out.extend(zeros);
            } else {
                out.extend(zeros);
                out.extend_from_slice(&block[block.len() - keep..]);
            }
        }
        out
    }
    let tensor = value.to_tensor()?;
    let (mut shape, data) = tensor.into_parts();
    let from = shape[axis];
    let to = from.saturating_add_signed(n);
    let inner: usize = shape[axis + 1..].iter().product();
    shape[axis] = to;
    let sizes = (from, to);
    let data: TensorData = match &data {
        TensorData::F32(all) => each(all, sizes, inner, right).into(),
        TensorData::F64(all) => each(all, sizes, inner, right).into(),
        TensorData::F16(all) => each(all, sizes, inner, right).into(),
        TensorData::BF16(all) => each(all, sizes, inner, right).into(),
        other => {
            return Err(RuntimeError::Tensor(format!(
                "a cache or embedding of {}; expected floating-point numbers",
                other.dtype()
            )));
        }
    };
    Value::new(Tensor::new(shape, data)?)
}

impl Decoder {
    /// As [`step`](Decoder::step), of graphs of fixed shapes.
    pub(super) fn step_fixed(
        &mut self,
        fixed: &Fixed,
        input: &StepInput,
        cache: &Cache,
    ) -> Result<StepOutput> {
        let &[batch, new, _] = input.embeds.shape() else {
            return self.run(input, cache);
        };
        let refused = |expected: String, found: String| RuntimeError::Interface {
            model: self.session.model().to_string(),
            expected,
            found,
        };
        if batch != fixed.batch {
            return Err(refused(
                format!("{} rows, for which it was fixed", fixed.batch),
                format!("{batch}"),
            ));
        }
        if cache.tokens() == 0 {
            let Some(missing) = fixed.tokens.checked_sub(new) else {
                return Err(refused(
                    format!(
                        "at most {} tokens in a prompt, for which it was fixed (--static prompt=N)",
                        fixed.tokens
                    ),
                    format!("{new}"),
                ));
            };
            let count = |row: ndarray::ArrayView1<'_, bool>| row.iter().filter(|v| **v).count();
            if let (Some(flags), Some(visual)) = (&input.visual, fixed.visual)
                && let Some(found) = flags.rows().into_iter().map(count).find(|n| *n != visual)
            {
                return Err(refused(
                    format!(
                        "{visual} visual tokens in each prompt, for which it was fixed (--static images=N)"
                    ),
                    format!("{found}"),
                ));
            }
            return self.prompt_fixed(fixed, input, cache, missing);
        }
        if input.visual.as_ref().is_some_and(|v| v.iter().any(|v| *v)) {
            return Err(refused(
                "images in the first question only: further tokens go through the graph of one token, in which nothing \
                 is visual"
                    .into(),
                "an image in a later one".into(),
            ));
        }
        if cache.tokens() + new > fixed.before + 1 {
            return Err(refused(
                format!(
                    "a cache of at most {} tokens and a new one, for which it was fixed (--static answer=N)",
                    fixed.before
                ),
                format!("{} and {new}", cache.tokens()),
            ));
        }
        // Nothing leaves in later steps, so tokens one by one are what they are together.
        let mut cache = cache.clone();
        let mut elapsed = std::time::Duration::ZERO;
        let mut rows = Vec::new();
        for at in 0..new {
            let one = one_token(input, at)?;
            let mut output = self.token_fixed(fixed, &one, &cache)?;
            elapsed += output.elapsed;
            cache = output.cache.clone();
            rows.push(output.logits.clone());
            if at + 1 == new {
                output.elapsed = elapsed;
                output.logits = joined(&rows)?;
                return Ok(output);
            }
        }
        self.run(input, &cache)
    }

    fn prompt_fixed(
        &mut self,
        fixed: &Fixed,
        input: &StepInput,
        cache: &Cache,
        missing: usize,
    ) -> Result<StepOutput> {
        let right = fixed.right;
        let shape = input.embeds.shape();
        let dim = (shape[0], shape[1]);
        let add = isize::try_from(missing).unwrap_or(isize::MAX);
        let mask = input.mask.clone().unwrap_or_else(|| Array2::ones(dim));
        let flags = |flags: &Option<Array2<bool>>| {
            flags
                .as_ref()
                .map(|f| wider(f, missing, false, right))
                .transpose()
        };
        let positions = match &input.positions {
            Some(given) if missing == 0 => Some(given.clone()),
            Some(given) => match *given.shape() {
                [rows, tokens] => {
                    let all = given.i64s()?.into_owned();
                    let all = Array2::from_shape_vec((rows, tokens), all)
                        .map_err(|e| RuntimeError::Tensor(e.to_string()))?;
                    Some(wider(&all, missing, 0, right)?.into())
                }
                _ => None,
            },
            None => None,
        };
        let padded = StepInput {
            embeds: resized(&input.embeds, 1, add, right)?,
            ids: input
                .ids
                .as_ref()
                .map(|i| wider(i, missing, 0, right))
                .transpose()?,
            mask: Some(wider(&mask, missing, 0, right)?),
            positions,
            blocks: input.blocks.clone(),
            visual: flags(&input.visual)?,
            salient: flags(&input.salient)?,
        };
        let mut output = self.run(&padded, cache)?;
        let rows = output.logits.shape().get(1).copied().unwrap_or(0);
        if rows > missing {
            output.logits = resized(&output.logits, 1, -add, right)?;
        } else if right && missing > 0 {
            return Err(RuntimeError::Interface {
                model: self.session.model().to_string(),
                expected: format!(
                    "a prompt of exactly {} tokens: the graph gives the logits of the last place, and padding lies there",
                    fixed.tokens
                ),
                found: format!("{}", dim.1),
            });
        }
        output.cache = cut(&output.cache, missing, right)?;
        Ok(output)
    }

    fn token_fixed(
        &mut self,
        fixed: &Fixed,
        input: &StepInput,
        cache: &Cache,
    ) -> Result<StepOutput> {
        let missing = fixed.before - cache.tokens();
        let right = fixed.right;
        let mut padded = cache.clone();
        padded.mask = wider(&cache.mask, missing, 0, right)?;
        for (at, value) in padded.values.iter_mut().enumerate() {
            let axis = cache.axes[at];
            let room = fixed.columns[at].checked_sub(value.shape()[axis]);
            let Some(add) = room.and_then(|n| isize::try_from(n).ok()) else {
                return Err(RuntimeError::Tensor(format!(
                    "a cache of {} columns, of which the graph takes {}",
                    value.shape()[axis],
                    fixed.columns[at]
                )));
            };
            *value = resized(value, axis, add, right)?;
        }
        let mut output = self.run(input, &padded)?;
        output.cache = cut(&output.cache, missing, right)?;
        // The new token's column of the mask lay behind the padding.
        let now = input.mask.clone();
        let now = now.unwrap_or_else(|| Array2::ones((cache.batch(), 1)));
        output.cache.mask = concatenate(Axis(1), &[cache.mask.view(), now.view()])
            .map_err(|e| RuntimeError::Tensor(e.to_string()))?;
        Ok(output)
    }
}

/// A cache without `n` columns of padding.
fn cut(cache: &Cache, n: usize, right: bool) -> Result<Cache> {
    let less = -isize::try_from(n).unwrap_or(isize::MAX);
    let mut cut = cache.clone();
    for (at, value) in cut.values.iter_mut().enumerate() {
        *value = resized(value, cache.axes[at], less, right)?;
    }
    let all = cache.mask.ncols();
    cut.mask = match right {
        true => cache.mask.slice(s![.., ..all - n]).to_owned(),
        false => cache.mask.slice(s![.., n..]).to_owned(),
    };
    Ok(cut)
}

/// Token `at` of an input.
fn one_token(input: &StepInput, at: usize) -> Result<StepInput> {
    let shape = input.embeds.shape();
    if shape[1] == 1 {
        return Ok(input.clone());
    }
    let all = isize::try_from(shape[1]).unwrap_or(isize::MAX);
    let at_i = isize::try_from(at).unwrap_or(isize::MAX);
    // What is behind goes, then what is in front.
    let front = resized(&input.embeds, 1, at_i + 1 - all, true)?;
    let column = |a: &Array2<i64>| a.slice(s![.., at..=at]).to_owned();
    let flags = |a: &Array2<bool>| a.slice(s![.., at..=at]).to_owned();
    Ok(StepInput {
        embeds: resized(&front, 1, -at_i, false)?,
        ids: input.ids.as_ref().map(column),
        mask: input.mask.as_ref().map(column),
        positions: None,
        blocks: None,
        visual: input.visual.as_ref().map(flags),
        salient: input.salient.as_ref().map(flags),
    })
}

/// Rows of logits `[batch, 1, vocabulary]`, one behind the other.
fn joined(rows: &[Value]) -> Result<Value> {
    if let [one] = rows {
        return Ok(one.clone());
    }
    let shape = rows[0].shape().to_vec();
    let width = shape.last().copied().unwrap_or(0);
    let all: Vec<_> = rows.iter().map(Value::f32s).collect::<Result<_>>()?;
    let mut data = Vec::new();
    for batch in 0..shape[0] {
        for row in &all {
            data.extend_from_slice(&row[batch * width..(batch + 1) * width]);
        }
    }
    let tensor = Tensor::new([shape[0], rows.len(), width], data)?;
    Value::new(tensor.cast_float(rows[0].dtype())?)
}
