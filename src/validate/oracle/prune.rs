//! Stage 2, T2V: which visual tokens the text has no use for, inside the decoder.
//!
//! One drop point, for one row of the batch:
//!
//! ```text
//! q, k of layer ℓ+1 ──▶ rank ──▶ select ──▶ kept rows ──▶ renumber
//!          text_rows ────┘          └── how many: drop_counts over all rows of the batch
//! ```
//!
//! A row's sequence holds padding, text and visual tokens. Masks and index lists address it by
//! position: `visual[i]` says that token i is a visual token, `real[i]` that it is not padding.

use ndarray::{ArrayView3, s};

use super::OracleError;
use super::math::{check_finite, descending, dot, expect_extent, softmax, to_scores};

/// One drop point of a schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drop {
    /// The decoder layer, 1-based, after which tokens leave.
    pub after_layer: usize,
    /// The fraction that stays, *of the visual tokens that entered the decoder*, in 0..=1.
    pub keep: f64,
}

/// Which text tokens ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Text<'a> {
    /// Every real token after the last visual token; the last real token if there is none.
    All,
    /// The last real token (PyramidDrop).
    Last,
    /// The real text tokens marked in this mask `[L]`, and the last real token in any case.
    Salient(&'a [bool]),
}

/// The rows of the sequence whose queries rank the visual tokens, ascending, never empty.
///
/// To be called once, on the sequence as it *entered the decoder*; the set is then carried through
/// the drops with [`carry_rows`]. Without a visual token there is nothing to rank, and the answer
/// for [`Text::All`] is the last real token. `visual` and `real` are `[L]`.
///
/// # Errors
/// [`OracleError::Shape`] for masks of different lengths, [`OracleError::Index`] if there is no
/// real token or a padding token is called visual.
pub fn text_rows(
    visual: &[bool],
    real: &[bool],
    text: Text<'_>,
) -> Result<Vec<usize>, OracleError> {
    check_masks(visual, real)?;
    let Some(last) = real.iter().rposition(|&real| real) else {
        return Err(no_real_token(real.len()));
    };
    let rows = match text {
        Text::Last => vec![last],
        Text::All => match visual.iter().rposition(|&visual| visual) {
            Some(end) if end < last => (end + 1..=last).filter(|&i| real[i]).collect(),
            _ => vec![last],
        },
        Text::Salient(salient) => {
            expect_extent("salient mask", visual.len(), salient.len())?;
            (0..=last)
                .filter(|&i| i == last || (salient[i] && real[i] && !visual[i]))
                .collect()
        }
    };
    Ok(rows)
}

/// How queries and keys are weighed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Factor of the product q·k.
    pub scale: f32,
    /// Bound c on the scaled scores s, as c·tanh(s / c); 0 for none.
    pub softcap: f32,
    /// Whether a query sees only keys up to itself.
    pub causal: bool,
}

impl From<f32> for Scaling {
    fn from(scale: f32) -> Self {
        Self {
            scale,
            softcap: 0.0,
            causal: true,
        }
    }
}

/// Score of every visual token, in position order: its attention probability, averaged over the
/// query heads and then over the text rows.
///
/// `query` is `[heads, L, head_dim]`, `key` `[key heads, L, head_dim]`, both of the layer after
/// the drop point, rotary embedding applied, unscaled; key head `h / (heads / key heads)` serves
/// query head `h`. `scale` is the factor of the logits, usually `1 / √head_dim`. The softmax runs
/// over all keys that are real and (if causal) not after the query, text and visual alike.
///
/// # Errors
/// [`OracleError::Shape`] if the tensors do not fit together, [`OracleError::Index`] if `rows` is
/// empty or names a token that is not there or is padding, [`OracleError::NotFinite`] if a score
/// is.
pub fn rank(
    query: ArrayView3<'_, f32>,
    key: ArrayView3<'_, f32>,
    scaling: impl Into<Scaling>,
    real: &[bool],
    rows: &[usize],
    visual: &[bool],
) -> Result<Vec<f32>, OracleError> {
    let scaling = scaling.into();
    let (heads, length, head_dim) = query.dim();
    let (key_heads, key_length, key_dim) = key.dim();
    if key_length != length || key_dim != head_dim {
        return Err(OracleError::Shape {
            what: "key",
            expected: format!("[key heads, {length}, {head_dim}]"),
            found: format!("{:?}", key.shape()),
        });
    }
    if heads == 0 || key_heads == 0 || heads % key_heads != 0 {
        return Err(OracleError::Shape {
            what: "query heads",
            expected: format!("a positive multiple of {key_heads} key heads"),
            found: heads.to_string(),
        });
    }
    check_masks(visual, real)?;
    expect_extent("visual mask", length, visual.len())?;
    if rows.is_empty() {
        return Err(OracleError::Index {
            what: "text rows",
            expected: "at least one row".into(),
            found: "none".into(),
        });
    }
    if let Some(&row) = rows.iter().find(|&&row| !real.get(row).is_some_and(|&r| r)) {
        return Err(OracleError::Index {
            what: "text rows",
            expected: format!("real tokens of a sequence of {length}"),
            found: format!("row {row}"),
        });
    }

    let group = heads / key_heads;
    let mut mean = vec![0.0; length];
    let mut row_mean = vec![0.0; length];
    let mut probability = vec![0.0; length];
    for &row in rows {
        row_mean.fill(0.0);
        for head in 0..heads {
            let q = query.slice(s![head, row, ..]);
            for (at, logit) in probability.iter_mut().enumerate() {
                *logit = if (at <= row || !scaling.causal) && real[at] {
                    let score =
                        f64::from(scaling.scale) * dot(q, key.slice(s![head / group, at, ..]));
                    match f64::from(scaling.softcap) {
                        0.0 => score,
                        cap => cap * (score / cap).tanh(),
                    }
                } else {
                    f64::NEG_INFINITY
                };
            }
            softmax(&mut probability);
            let heads = heads as f64;
            row_mean
                .iter_mut()
                .zip(&probability)
                .for_each(|(m, p)| *m += p / heads);
        }
        let rows = rows.len() as f64;
        mean.iter_mut()
            .zip(&row_mean)
            .for_each(|(m, r)| *m += r / rows);
    }
    let of_visual: Vec<f64> = (0..length)
        .filter(|&i| visual[i])
        .map(|i| mean[i])
        .collect();
    to_scores("visual token score", &of_visual)
}

/// How many tokens every row of a batch loses at each drop point, in schedule order.
///
/// `visual_tokens` holds, for each row, the count that entered the decoder. Up to drop point p a
/// row may lose `n - floor(keep_p · n)` of its n visual tokens; all rows lose the smallest such
/// number, so that the batch stays rectangular. A row without visual tokens (or no row at all)
/// means that nothing is dropped.
///
/// # Errors
/// [`OracleError::Parameter`] for a schedule that [`check_schedule`] refuses (its layers aside).
pub fn drop_counts(visual_tokens: &[usize], schedule: &[Drop]) -> Result<Vec<usize>, OracleError> {
    check_schedule(schedule, usize::MAX)?;
    let mut gone = 0;
    Ok(schedule
        .iter()
        .map(|drop| {
            let losses = visual_tokens.iter().map(|&n| n - kept_of(n, drop.keep));
            let target = losses.min().unwrap_or(0);
            let now = target - gone;
            gone = target;
            now
        })
        .collect())
}

/// The positions that stay when the `drop` visual tokens with the lowest scores leave, ascending.
///
/// `scores` has one entry for each visual token of `visual` `[L]`, as [`rank`] returns them. Every
/// other token (text, padding) stays. Of equal scores the one at the lower position stays.
///
/// # Errors
/// [`OracleError::Shape`] if scores and mask disagree, [`OracleError::Index`] if more tokens are
/// to go than there are, [`OracleError::NotFinite`] for a score without a place in an order.
pub fn select(scores: &[f32], visual: &[bool], drop: usize) -> Result<Vec<usize>, OracleError> {
    let places: Vec<usize> = (0..visual.len()).filter(|&i| visual[i]).collect();
    expect_extent("visual token scores", places.len(), scores.len())?;
    check_finite("visual token score", scores)?;
    if drop > places.len() {
        return Err(OracleError::Index {
            what: "tokens to drop",
            expected: format!("at most the {} visual tokens that are left", places.len()),
            found: drop.to_string(),
        });
    }
    let mut keep: Vec<bool> = visual.iter().map(|&visual| !visual).collect();
    for place in descending(scores).into_iter().take(places.len() - drop) {
        keep[places[place]] = true;
    }
    Ok((0..visual.len()).filter(|&i| keep[i]).collect())
}

/// Position ids after a drop under `positions: renumber`: contiguous again, each survivor moved
/// down by the number of tokens that left before it.
///
/// `positions` is the row's `[L]`, `kept` what [`select`] returned; padding is never dropped, so
/// it keeps the ids that it had.
///
/// # Errors
/// [`OracleError::Index`] if `kept` is not ascending or leaves the sequence.
pub fn renumber(positions: &[i64], kept: &[usize]) -> Result<Vec<i64>, OracleError> {
    check_kept(kept, positions.len())?;
    let moved = |(new, &old): (usize, &usize)| positions[old].saturating_sub((old - new) as i64);
    Ok(kept.iter().enumerate().map(moved).collect())
}

/// Where `rows` are once only the positions in `kept` are left: how the set that asks is carried
/// through a drop. `real` is the padding mask `[L]` before the drop; `rows` and `kept` ascend.
///
/// The set never grows. A row that was dropped itself leaves it (only the last token can, when it
/// is a visual one that asked for want of text behind the image); if none is left, the last real
/// token asks, as at the entry.
///
/// # Errors
/// [`OracleError::Index`] if `kept` is not ascending or leaves the sequence, or if no row and no
/// real token is left.
pub fn carry_rows(
    rows: &[usize],
    kept: &[usize],
    real: &[bool],
) -> Result<Vec<usize>, OracleError> {
    check_kept(kept, real.len())?;
    let left: Vec<usize> = rows
        .iter()
        .filter_map(|row| kept.binary_search(row).ok())
        .collect();
    if !left.is_empty() {
        return Ok(left);
    }
    match kept.iter().rposition(|&old| real[old]) {
        Some(last) => Ok(vec![last]),
        None => Err(no_real_token(kept.len())),
    }
}

/// Visual tokens that each decoder layer sees, `[layers]`, for a row on its own.
///
/// # Errors
/// [`OracleError::Parameter`] for a schedule that [`check_schedule`] refuses.
pub fn visual_tokens_per_layer(
    visual_tokens: usize,
    layers: usize,
    schedule: &[Drop],
) -> Result<Vec<usize>, OracleError> {
    check_schedule(schedule, layers)?;
    let seen_by = |layer: usize| {
        let before = schedule.iter().rfind(|drop| drop.after_layer < layer);
        before.map_or(visual_tokens, |drop| kept_of(visual_tokens, drop.keep))
    };
    Ok((1..=layers).map(seen_by).collect())
}

/// Mean over the decoder's layers of the visual tokens that the layer sees: what a budget names.
///
/// # Errors
/// As [`visual_tokens_per_layer`]; [`OracleError::Parameter`] for a decoder without layers.
pub fn average_visual_tokens(
    visual_tokens: usize,
    layers: usize,
    schedule: &[Drop],
) -> Result<f64, OracleError> {
    if layers == 0 {
        return Err(parameter("decoder layers", "at least 1".into(), "0".into()));
    }
    let seen = visual_tokens_per_layer(visual_tokens, layers, schedule)?;
    Ok(seen.iter().sum::<usize>() as f64 / layers as f64)
}

/// Checks a schedule for a decoder of `layers` layers.
///
/// # Errors
/// [`OracleError::Parameter`] if layers do not rise, one is 0, the last or beyond the last, or if
/// a ratio is outside of 0..=1 or above an earlier one.
pub fn check_schedule(schedule: &[Drop], layers: usize) -> Result<(), OracleError> {
    let mut last = Drop {
        after_layer: 0,
        keep: 1.0,
    };
    for &drop in schedule {
        if drop.after_layer <= last.after_layer || drop.after_layer >= layers {
            return Err(parameter(
                "after_layer",
                format!("a layer above {} and below {layers}", last.after_layer),
                drop.after_layer.to_string(),
            ));
        }
        if !(0.0..=last.keep).contains(&drop.keep) {
            return Err(parameter(
                "keep",
                format!("a ratio from 0 to {}", last.keep),
                drop.keep.to_string(),
            ));
        }
        last = drop;
    }
    Ok(())
}

/// `floor(ratio · count)`, the product in double precision.
pub(super) fn kept_of(count: usize, ratio: f64) -> usize {
    (count as f64 * ratio).floor() as usize
}

fn parameter(what: &'static str, expected: String, found: String) -> OracleError {
    OracleError::Parameter {
        what,
        expected,
        found,
    }
}

fn no_real_token(padding: usize) -> OracleError {
    OracleError::Index {
        what: "padding mask",
        expected: "at least one real token".into(),
        found: format!("{padding} padding tokens"),
    }
}

fn check_masks(visual: &[bool], real: &[bool]) -> Result<(), OracleError> {
    expect_extent("padding mask", visual.len(), real.len())?;
    match (0..visual.len()).find(|&i| visual[i] && !real[i]) {
        None => Ok(()),
        Some(at) => Err(OracleError::Index {
            what: "visual mask",
            expected: "real tokens only".into(),
            found: format!("padding at position {at}"),
        }),
    }
}

fn check_kept(kept: &[usize], length: usize) -> Result<(), OracleError> {
    let rising = kept.windows(2).all(|pair| pair[0] < pair[1]);
    if rising && kept.last().is_none_or(|&last| last < length) {
        return Ok(());
    }
    Err(OracleError::Index {
        what: "kept positions",
        expected: format!("rising positions below {length}"),
        found: format!("{kept:?}"),
    })
}

#[cfg(test)]
mod tests;
