//! Stage 1, V2V: which patch tokens of the vision tower survive, and what the merged ones hold.
//!
//! ```text
//! scores ──▶ dominant: the best, emitted in ascending position order (after CLS, if kept)
//!    └─────▶ residual ──▶ pool ──▶ anchors ──▶ token = H[anchor] + mean(H[members])
//! ```
//!
//! One call handles one image (one row of the batch, one frame of a video). Patch indices count
//! from the first patch: CLS is not index 0, it has no index.

use ndarray::{Array2, ArrayView2, ArrayView3, Axis, s};

use super::OracleError;
use super::math::{check_finite, descending, dot, expect_extent, softmax, to_scores};

/// How contextual anchors are chosen among the patches that are not dominant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector {
    /// Every `step`-th of the best `cluster_width · contextual` residuals, by falling score; the
    /// other residuals are discarded (DUET, public implementation).
    Attention,
    /// Every `step`-th residual by position; none is discarded (VisionZip).
    Uniform,
    /// The residuals that receive the most attention, each with its nearest neighbours, averaged
    /// (the text of the DUET paper).
    Local,
}

/// What becomes of the CLS token of a tower that has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cls {
    /// CLS is emitted first, and `dominant` counts it.
    Keep,
    /// CLS only scores the patches; `dominant` counts patches.
    Drop,
}

/// A token budget as a recipe states it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// So many tokens.
    Count(usize),
    /// A fraction of the tower's patch tokens, in 0..=1.
    Ratio(f64),
}

impl Budget {
    /// The count that the budget means for `patches` patch tokens: `floor(ratio · patches)`, the
    /// product taken in double precision. Not yet clamped, see [`clamp_budget`].
    ///
    /// # Errors
    /// [`OracleError::Parameter`] for a ratio outside of 0..=1 or NaN.
    pub fn resolve(self, patches: usize) -> Result<usize, OracleError> {
        match self {
            Self::Count(count) => Ok(count),
            Self::Ratio(ratio) if (0.0..=1.0).contains(&ratio) => {
                Ok((ratio * patches as f64).floor() as usize)
            }
            Self::Ratio(ratio) => Err(OracleError::Parameter {
                what: "token budget",
                expected: "a ratio between 0 and 1".into(),
                found: ratio.to_string(),
            }),
        }
    }
}

/// Parameters of the merge, counts already resolved with [`Budget::resolve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeParams {
    /// Dominant tokens asked for; counts CLS under [`Cls::Keep`].
    pub dominant: usize,
    /// Contextual tokens asked for.
    pub contextual: usize,
    /// Pool size per contextual token (`attention`), neighbours of an anchor (`local`); unused by
    /// `uniform`.
    pub cluster_width: usize,
    /// How anchors are chosen.
    pub selector: Selector,
    /// `None`: the tower has no CLS token, and patches are scored by the attention they receive.
    pub cls: Option<Cls>,
}

/// What the parameters come to for an image of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClampedBudget {
    /// Whether CLS is emitted.
    pub cls: bool,
    /// Dominant patches, CLS not counted.
    pub patches: usize,
    /// Contextual tokens.
    pub contextual: usize,
}

impl ClampedBudget {
    /// Tokens that come out for the image.
    pub fn tokens(self) -> usize {
        usize::from(self.cls) + self.patches + self.contextual
    }
}

/// Clamps the parameters to an image of `patches` patch tokens (CLS not counted).
///
/// `dominant ≤ patches + 1` with CLS kept, `≤ patches` otherwise; `contextual ≤` the patches that
/// are not dominant. A kept CLS is always emitted, so `dominant: 0` means the same as
/// `dominant: 1` there. Under the `attention` selector a cluster width of 0 leaves a pool of one
/// patch and so one contextual token at most.
pub fn clamp_budget(patches: usize, params: &MergeParams) -> ClampedBudget {
    let cls = params.cls == Some(Cls::Keep);
    let dominant = params
        .dominant
        .saturating_sub(usize::from(cls))
        .min(patches);
    let mut contextual = params.contextual.min(patches - dominant);
    if params.selector == Selector::Attention && params.cluster_width == 0 {
        contextual = contextual.min(1);
    }
    ClampedBudget {
        cls,
        patches: dominant,
        contextual,
    }
}

/// The tensors of the tower that the merge reads, for one image.
///
/// T is N patch tokens, or 1 + N with CLS first. Queries and keys come from the last live
/// attention, with bias and *unscaled*; keys as the method's metric wants them (before any rotary
/// embedding for CLIP and SigLIP).
#[derive(Debug, Clone, Copy)]
pub struct MergeInput<'a> {
    /// Features that the projector would have received, `[T, D]`.
    pub hidden: ArrayView2<'a, f32>,
    /// Query projection, `[heads, T, head_dim]`.
    pub query: ArrayView3<'a, f32>,
    /// Key projection, `[heads, T, head_dim]`.
    pub key: ArrayView3<'a, f32>,
    /// Factor of the attention logits, usually `1 / √head_dim`.
    pub scale: f32,
    /// Added to the scaled logits: 0 or a bias where a query sees a key, −∞ or a
    /// huge negative number where not, `[heads, T, T]`; `None`: nothing is masked.
    /// A query that sees no key at all (only −∞) gives no attention.
    pub mask: Option<ArrayView3<'a, f32>>,
}

/// What the merge selected and emits. All indices are patch indices in `0..N`.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// Score of every patch, `[N]`.
    pub scores: Vec<f32>,
    /// Dominant patches, ascending.
    pub dominant: Vec<usize>,
    /// Patches that contextual tokens are made from: by falling score for `attention`, ascending
    /// for `uniform` and `local`; empty if there is no contextual token.
    pub pool: Vec<usize>,
    /// Anchor of each contextual token, in output order.
    pub anchors: Vec<usize>,
    /// For each anchor the patches merged into it, itself excluded. `attention` and `uniform`: a
    /// partition of the pool without the anchors, in pool order. `local`: the neighbours, nearest
    /// first; a patch may be a neighbour of several anchors.
    pub assignment: Vec<Vec<usize>>,
    /// `[CLS if kept, dominant ascending, contextual in anchor order]`, `[K, D]`.
    pub tokens: Array2<f32>,
}

/// Runs stage 1 on one image.
///
/// # Errors
/// [`OracleError::Shape`] if the tensors do not fit together or a CLS token is announced and there
/// is no token at all; [`OracleError::NotFinite`] if a score or the metric is NaN or infinite.
pub fn merge(input: &MergeInput<'_>, params: &MergeParams) -> Result<Merged, OracleError> {
    let scores = patch_scores(input, params.cls)?;
    merge_by(input, scores, params)
}

/// [`merge()`] with patches ranked by the given scores `[N]`.
///
/// # Errors
/// As [`merge()`].
pub fn merge_by(
    input: &MergeInput<'_>,
    scores: Vec<f32>,
    params: &MergeParams,
) -> Result<Merged, OracleError> {
    let first_patch = first_patch(input, params.cls)?;
    let received = match params.selector {
        Selector::Local => received_attention(input, params.cls)?,
        Selector::Attention | Selector::Uniform => Vec::new(),
    };
    let metric = metric(input.key.slice(s![.., first_patch.., ..]));
    merge_selected(input.hidden, scores, &received, metric.view(), params)
}

/// Stage 1 behind a pixel shuffle, on one image: `rows` `[tokens, r²·D]` are the
/// shuffled tokens, and token i is made of the patches `groups[i]`. Score, received
/// attention and metric of a token are the means over its patches; `scores`, if
/// given, are those of the tokens. There is no CLS token among the rows, so with
/// [`Cls::Keep`] this is an error.
///
/// # Errors
/// As [`merge()`]; [`OracleError::Index`] for a patch that is not there.
pub fn merge_shuffled(
    input: &MergeInput<'_>,
    rows: ArrayView2<'_, f32>,
    groups: &[Vec<usize>],
    scores: Option<Vec<f32>>,
    params: &MergeParams,
) -> Result<Merged, OracleError> {
    if params.cls == Some(Cls::Keep) {
        return Err(OracleError::Parameter {
            what: "cls",
            expected: "'drop' behind a pixel shuffle".into(),
            found: "'keep'".into(),
        });
    }
    let first_patch = first_patch(input, params.cls)?;
    let of_patches = patch_scores(input, params.cls)?;
    let known = |patch: &&usize| **patch >= of_patches.len();
    if let Some(patch) = groups.iter().flatten().find(known) {
        return Err(OracleError::Index {
            what: "patches of a shuffled token",
            expected: format!("patches below {}", of_patches.len()),
            found: patch.to_string(),
        });
    }
    let mean = |all: &[f32], group: &Vec<usize>| {
        let sum: f64 = group.iter().map(|&p| f64::from(all[p])).sum();
        (sum / group.len().max(1) as f64) as f32
    };
    let pooled = |all: &[f32]| groups.iter().map(|g| mean(all, g)).collect::<Vec<f32>>();
    let received = match params.selector {
        Selector::Local => pooled(&received_attention(input, params.cls)?),
        Selector::Attention | Selector::Uniform => Vec::new(),
    };
    let of_patch = metric(input.key.slice(s![.., first_patch.., ..]));
    let width = of_patch.ncols();
    let mut of_tokens = Array2::zeros((groups.len(), width));
    for (column, values) in of_patch.columns().into_iter().enumerate() {
        let pooled = pooled(&values.to_vec());
        of_tokens
            .column_mut(column)
            .assign(&ndarray::Array1::from(pooled));
    }
    let scores = scores.unwrap_or_else(|| pooled(&of_patches));
    let params = MergeParams {
        cls: None,
        ..*params
    };
    merge_selected(rows, scores, &received, of_tokens.view(), &params)
}

/// Stage 1 from given scores, for towers whose scores and metric are pooled before selection.
///
/// `hidden` is `[T, D]` as in [`MergeInput`], `scores` `[N]`, `metric` `[N, head_dim]`, and
/// `received` `[N]`, read by [`Selector::Local`] only (may be empty otherwise).
///
/// # Errors
/// As [`merge()`].
pub fn merge_selected(
    hidden: ArrayView2<'_, f32>,
    scores: Vec<f32>,
    received: &[f32],
    metric: ArrayView2<'_, f32>,
    params: &MergeParams,
) -> Result<Merged, OracleError> {
    let n = scores.len();
    let first_patch = usize::from(params.cls.is_some());
    expect_extent("hidden tokens", first_patch + n, hidden.nrows())?;
    expect_extent("metric rows", n, metric.nrows())?;
    if params.selector == Selector::Local {
        expect_extent("received attention", n, received.len())?;
        check_finite("received attention", received)?;
    }
    check_finite("patch score", &scores)?;
    let metric: Vec<f32> = metric.iter().copied().collect();
    check_finite("key metric", &metric)?;
    let unit = unit_rows(&metric, n);

    let budget = clamp_budget(n, params);
    let by_score = descending(&scores);
    let mut dominant = by_score[..budget.patches].to_vec();
    dominant.sort_unstable();
    let mut residual = by_score[budget.patches..].to_vec();
    let Clusters {
        pool,
        anchors,
        assignment,
    } = match params.selector {
        _ if budget.contextual == 0 => Clusters::default(),
        Selector::Attention => {
            let size = params
                .cluster_width
                .saturating_mul(budget.contextual)
                .max(1);
            residual.truncate(size);
            every_step(residual, budget.contextual, &unit)
        }
        Selector::Uniform => {
            residual.sort_unstable();
            every_step(residual, budget.contextual, &unit)
        }
        Selector::Local => {
            residual.sort_unstable();
            neighbourhoods(
                residual,
                received,
                budget.contextual,
                params.cluster_width,
                &unit,
            )
        }
    };

    let mut tokens = Array2::zeros((budget.tokens(), hidden.ncols()));
    let mut rows = tokens.rows_mut().into_iter();
    let mut emit = |token: Vec<f64>| {
        if let Some(mut row) = rows.next() {
            row.iter_mut().zip(token).for_each(|(to, x)| *to = x as f32);
        }
    };
    let patch = |index: usize| -> Vec<f64> {
        let row = hidden.row(first_patch + index);
        row.iter().map(|&x| f64::from(x)).collect()
    };
    if budget.cls {
        emit(hidden.row(0).iter().map(|&x| f64::from(x)).collect());
    }
    for &index in &dominant {
        emit(patch(index));
    }
    for (&anchor, members) in anchors.iter().zip(&assignment) {
        let mut token = patch(anchor);
        let mut sum = vec![0.0; token.len()];
        for &member in members {
            sum.iter_mut().zip(patch(member)).for_each(|(s, x)| *s += x);
        }
        let count = members.len() as f64;
        for (t, s) in token.iter_mut().zip(sum) {
            *t = match params.selector {
                Selector::Local => (*t + s) / (count + 1.0),
                _ if members.is_empty() => *t,
                // A sum of the anchor and its members' mean, not a mean over the cluster.
                Selector::Attention | Selector::Uniform => *t + s / count,
            };
        }
        emit(token);
    }

    Ok(Merged {
        scores,
        dominant,
        pool,
        anchors,
        assignment,
        tokens,
    })
}

/// The score that ranks patches, `[N]`.
///
/// With CLS: the probability that the CLS query gives to the patch, softmax over all 1 + N keys,
/// summed over heads. Without: the mean over heads of the probabilities that all queries give it.
///
/// # Errors
/// As [`merge()`].
pub fn patch_scores(input: &MergeInput<'_>, cls: Option<Cls>) -> Result<Vec<f32>, OracleError> {
    let first_patch = first_patch(input, cls)?;
    let mut sums = attention_mass(
        input,
        if cls.is_some() {
            1
        } else {
            input.query.dim().1
        },
    );
    if cls.is_none() {
        let heads = input.query.dim().0 as f64;
        sums.iter_mut().for_each(|s| *s /= heads);
    }
    to_scores("patch score", &sums[first_patch..])
}

/// Attention that each patch receives: its probability summed over heads and over *all* queries,
/// CLS's included, `[N]`. The `local` selector ranks residuals by it.
///
/// # Errors
/// As [`merge()`].
pub fn received_attention(
    input: &MergeInput<'_>,
    cls: Option<Cls>,
) -> Result<Vec<f32>, OracleError> {
    let first_patch = first_patch(input, cls)?;
    let sums = attention_mass(input, input.query.dim().1);
    to_scores("received attention", &sums[first_patch..])
}

/// The vectors that similarity is measured on: keys `[heads, N, head_dim]`, averaged over heads,
/// `[N, head_dim]`.
pub fn metric(key: ArrayView3<'_, f32>) -> Array2<f32> {
    let heads = key.dim().0.max(1) as f64;
    let sum = key.mapv(f64::from).sum_axis(Axis(0));
    sum.mapv(|x| (x / heads) as f32)
}

/// Probability mass that each of the T keys gets from the first `queries` queries, over all heads.
pub(super) fn attention_mass(input: &MergeInput<'_>, queries: usize) -> Vec<f64> {
    let (heads, tokens, _) = input.key.dim();
    let mut mass = vec![0.0; tokens];
    let mut row = vec![0.0; tokens];
    for head in 0..heads {
        for query in 0..queries {
            let q = input.query.slice(s![head, query, ..]);
            for (key, logit) in row.iter_mut().enumerate() {
                *logit = f64::from(input.scale) * dot(q, input.key.slice(s![head, key, ..]));
                if let Some(mask) = input.mask {
                    // In f32, as the tower adds it: beside a huge number nothing is left.
                    *logit = f64::from(*logit as f32 + mask[[head, query, key]]);
                }
            }
            if row.iter().all(|l| *l == f64::NEG_INFINITY) {
                continue;
            }
            softmax(&mut row);
            mass.iter_mut().zip(&row).for_each(|(m, p)| *m += p);
        }
    }
    mass
}

/// Checks that the tensors fit together; the row of the first patch.
fn first_patch(input: &MergeInput<'_>, cls: Option<Cls>) -> Result<usize, OracleError> {
    let (heads, tokens, head_dim) = input.query.dim();
    if heads == 0 {
        return Err(OracleError::Shape {
            what: "query heads",
            expected: "at least 1".into(),
            found: "0".into(),
        });
    }
    if input.key.dim() != input.query.dim() {
        return Err(OracleError::Shape {
            what: "key",
            expected: format!("the query's [{heads}, {tokens}, {head_dim}]"),
            found: format!("{:?}", input.key.shape()),
        });
    }
    expect_extent("hidden tokens", tokens, input.hidden.nrows())?;
    if let Some(mask) = input.mask.filter(|m| m.dim() != (heads, tokens, tokens)) {
        return Err(OracleError::Shape {
            what: "attention mask",
            expected: format!("[{heads}, {tokens}, {tokens}]"),
            found: format!("{:?}", mask.shape()),
        });
    }
    let first_patch = usize::from(cls.is_some());
    if tokens < first_patch {
        return Err(OracleError::Shape {
            what: "tokens of a tower with CLS",
            expected: "at least 1 (CLS)".into(),
            found: tokens.to_string(),
        });
    }
    Ok(first_patch)
}

#[derive(Default)]
struct Clusters {
    pool: Vec<usize>,
    anchors: Vec<usize>,
    assignment: Vec<Vec<usize>>,
}

/// Anchors at every `step`-th place of the pool; everyone else joins the most similar anchor, the
/// first one on a tie. `contextual` is at least 1.
fn every_step(pool: Vec<usize>, contextual: usize, unit: &[Vec<f64>]) -> Clusters {
    let step = (pool.len() / contextual).max(1);
    let anchors: Vec<usize> = pool
        .iter()
        .copied()
        .step_by(step)
        .take(contextual)
        .collect();
    let mut assignment = vec![Vec::new(); anchors.len()];
    for &patch in pool.iter().filter(|patch| !anchors.contains(patch)) {
        let mut best = (0, f32::NEG_INFINITY);
        for (place, &anchor) in anchors.iter().enumerate() {
            let similarity = cosine(unit, patch, anchor);
            if similarity > best.1 {
                best = (place, similarity);
            }
        }
        assignment[best.0].push(patch);
    }
    Clusters {
        pool,
        anchors,
        assignment,
    }
}

/// Anchors by falling received attention, each with its `width` nearest residuals; the pool is
/// all residuals, ascending.
fn neighbourhoods(
    pool: Vec<usize>,
    received: &[f32],
    contextual: usize,
    width: usize,
    unit: &[Vec<f64>],
) -> Clusters {
    let of_pool: Vec<f32> = pool.iter().map(|&patch| received[patch]).collect();
    let anchors: Vec<usize> = descending(&of_pool)
        .into_iter()
        .take(contextual)
        .map(|place| pool[place])
        .collect();
    let nearest = |&anchor: &usize| -> Vec<usize> {
        let others: Vec<usize> = pool.iter().copied().filter(|&p| p != anchor).collect();
        let similarity: Vec<f32> = others.iter().map(|&p| cosine(unit, p, anchor)).collect();
        let order = descending(&similarity).into_iter().take(width);
        order.map(|place| others[place]).collect()
    };
    let assignment = anchors.iter().map(nearest).collect();
    Clusters {
        pool,
        anchors,
        assignment,
    }
}

/// Rows of the metric at length 1. A zero row stays zero: its cosine with anything is 0.
fn unit_rows(metric: &[f32], rows: usize) -> Vec<Vec<f64>> {
    let width = metric.len().checked_div(rows).unwrap_or(0);
    (0..rows)
        .map(|row| {
            let row = &metric[row * width..(row + 1) * width];
            let norm = row
                .iter()
                .map(|&x| f64::from(x).powi(2))
                .sum::<f64>()
                .sqrt();
            let norm = if norm > 0.0 { norm } else { 1.0 };
            row.iter().map(|&x| f64::from(x) / norm).collect()
        })
        .collect()
}

/// Cosine similarity, as `f32` like the scores: vectors of one direction and different lengths
/// then tie, whatever the last bit of the quotients.
fn cosine(unit: &[Vec<f64>], a: usize, b: usize) -> f32 {
    unit[a]
        .iter()
        .zip(&unit[b])
        .map(|(x, y)| x * y)
        .sum::<f64>() as f32
}

#[cfg(test)]
mod tests;
