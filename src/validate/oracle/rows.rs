//! Stage 1 behind a tower of patch rows (Qwen2-VL, Qwen2.5-VL): the merger's tokens are chosen among, and come
//! out by place.

use ndarray::{Array2, ArrayView2, ArrayView3, Axis};

use super::OracleError;
use super::math::expect_extent;
use super::merge::{
    MergeInput, MergeParams, Merged, attention_mass, clamp_budget, merge_selected, metric,
};

/// What the merge of one image's tokens gives. All numbers are places among its N tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// The choice; its `tokens` are in the order of [`merge()`](super::merge()).
    pub merged: Merged,
    /// Dominant tokens and anchors, ascending.
    pub kept: Vec<usize>,
    /// The merged tokens in the order of `kept`, `[K, D]`.
    pub tokens: Array2<f32>,
}

/// Attention that each patch receives, summed over heads and queries, `[P]`: from the probabilities `[heads, P, P]`
/// that the tower itself has. A query without any (NaN) gives none.
pub fn mass_of(probabilities: ArrayView3<'_, f32>) -> Vec<f64> {
    let mut mass = vec![0.0; probabilities.dim().2];
    for head in probabilities.outer_iter() {
        for query in head
            .outer_iter()
            .filter(|q| q.iter().all(|p| p.is_finite()))
        {
            mass.iter_mut()
                .zip(query)
                .for_each(|(m, p)| *m += f64::from(*p));
        }
    }
    mass
}

/// The same from queries and keys.
pub fn mass_received(input: &MergeInput<'_>) -> Vec<f64> {
    attention_mass(input, input.query.dim().1)
}

/// Counts for an image of `tokens` tokens: as stated, but one token where that comes to none.
fn at_least_one(tokens: usize, params: &MergeParams) -> MergeParams {
    let dominant = match clamp_budget(tokens, params).tokens() {
        0 => 1,
        _ => params.dominant,
    };
    MergeParams {
        dominant,
        ..*params
    }
}

/// Merges one image. `features` `[N, D]` are the tokens by place, `mass` `[P]` the attention that each patch
/// receives, `key` `[heads, P, head_dim]` the keys behind the rotary embedding, and token i is made of the patches
/// `groups[i]`. `scores` `[N]`, if given, rank the tokens.
///
/// # Errors
/// As [`merge()`](super::merge()); [`OracleError::Index`] for a patch that is not there.
pub fn merge_rows(
    features: ArrayView2<'_, f32>,
    mass: &[f64],
    key: ArrayView3<'_, f32>,
    groups: &[Vec<usize>],
    scores: Option<Vec<f32>>,
    params: &MergeParams,
) -> Result<Placed, OracleError> {
    let (heads, patches, width) = key.dim();
    expect_extent("attention received", patches, mass.len())?;
    expect_extent("merge groups", features.nrows(), groups.len())?;
    if let Some(patch) = groups.iter().flatten().find(|p| **p >= patches) {
        return Err(OracleError::Index {
            what: "patches of a merged token",
            expected: format!("patches below {patches}"),
            found: patch.to_string(),
        });
    }
    let mean = |of: &dyn Fn(usize) -> f64, group: &[usize]| {
        let sum: f64 = group.iter().map(|&p| of(p)).sum();
        (sum / group.len().max(1) as f64) as f32
    };
    let each = |of: &dyn Fn(usize) -> f64| groups.iter().map(|g| mean(of, g)).collect::<Vec<f32>>();
    let received = each(&|p| mass[p]);
    let scores = scores.unwrap_or_else(|| each(&|p| mass[p] / heads.max(1) as f64));
    let of_patch = metric(key);
    let metric = Array2::from_shape_fn((groups.len(), width), |(token, d)| {
        mean(&|p| f64::from(of_patch[[p, d]]), &groups[token])
    });
    let params = MergeParams {
        cls: None,
        ..at_least_one(groups.len(), params)
    };
    let merged = merge_selected(features, scores, &received, metric.view(), &params)?;
    let mut order: Vec<(usize, usize)> = merged
        .dominant
        .iter()
        .chain(&merged.anchors)
        .copied()
        .zip(0..)
        .collect();
    order.sort_unstable();
    let rows: Vec<usize> = order.iter().map(|(_, row)| *row).collect();
    Ok(Placed {
        tokens: merged.tokens.select(Axis(0), &rows),
        kept: order.into_iter().map(|(place, _)| place).collect(),
        merged,
    })
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, arr2};

    use super::super::{Cls, Selector};
    use super::*;

    fn params(dominant: usize, contextual: usize) -> MergeParams {
        MergeParams {
            dominant,
            contextual,
            cluster_width: 2,
            selector: Selector::Attention,
            cls: None,
        }
    }

    /// Four tokens of two patches each, in the tower's order 2 0 3 1; attention falls with the place of the patch.
    #[test]
    fn tokens_come_out_by_place_with_the_means_of_their_patches() {
        let features = arr2(&[[10.0f32, 0.0], [20.0, 0.0], [30.0, 0.0], [40.0, 0.0]]);
        let groups = [vec![2, 3], vec![6, 7], vec![0, 1], vec![4, 5]];
        // Keys of tokens 0 and 1 point one way, those of 2 and 3 another.
        let key = Array3::from_shape_fn((1, 8, 2), |(_, p, d)| {
            let first = [2, 3, 6, 7].contains(&p);
            f32::from(u8::from(first == (d == 0)))
        });
        let merged = |mass: [f64; 8]| {
            let budget = params(1, 1);
            merge_rows(features.view(), &mass, key.view(), &groups, None, &budget).unwrap()
        };
        let made = merged([8.0, 6.0, 1.0, 1.0, 4.0, 2.0, 3.0, 1.0]);
        // Scores by place: 1, 2, 7, 3. Dominant 2; pool 3, 1; anchor 3 with member 1; 0 is discarded.
        assert_eq!(made.merged.scores, [1.0, 2.0, 7.0, 3.0]);
        assert_eq!(
            (made.merged.dominant, made.merged.anchors),
            (vec![2], vec![3])
        );
        assert_eq!(made.merged.assignment, [vec![1]]);
        assert_eq!(made.kept, [2, 3]);
        assert_eq!(made.tokens, arr2(&[[30.0, 0.0], [60.0, 0.0]]));
        // An anchor that lies before the dominant token comes out before it.
        let made = merged([8.0, 6.0, 5.0, 5.0, 1.0, 0.0, 3.0, 1.0]);
        assert_eq!(
            (made.kept, made.tokens),
            (vec![0, 2], arr2(&[[30.0, 0.0], [30.0, 0.0]]))
        );
    }

    #[test]
    fn one_token_is_kept_where_a_budget_comes_to_none() {
        let features = arr2(&[[1.0f32], [2.0]]);
        let key = Array3::ones((1, 2, 2));
        let groups = [vec![0], vec![1]];
        let made = merge_rows(
            features.view(),
            &[1.0, 2.0],
            key.view(),
            &groups,
            None,
            &params(0, 0),
        )
        .unwrap();
        assert_eq!((made.kept, made.tokens), (vec![1], arr2(&[[2.0]])));
        assert_eq!(at_least_one(2, &params(0, 1)), params(0, 1));
        let with_cls = MergeParams {
            cls: Some(Cls::Keep),
            ..params(1, 0)
        };
        assert_eq!(at_least_one(2, &with_cls), with_cls);
    }

    #[test]
    fn probabilities_that_are_none_count_nothing() {
        let mut all = Array3::from_elem((2, 2, 2), 0.5f32);
        all[[0, 1, 0]] = f32::NAN;
        assert_eq!(mass_of(all.view()), [1.5, 1.5]);
    }
}
