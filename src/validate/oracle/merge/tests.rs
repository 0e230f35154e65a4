use ndarray::{Array3, array};
use proptest::prelude::*;

use super::*;

const EPS: f32 = 1e-6;

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(
        found.len(),
        expected.len(),
        "{found:?} against {expected:?}"
    );
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= EPS, "{found:?} against {expected:?}");
    }
}

/// Keys of head_dim 1 whose softmax under the query 1 (scale 1) has the given weights.
fn log_keys(heads: &[&[f32]]) -> Array3<f32> {
    Array3::from_shape_fn((heads.len(), heads[0].len(), 1), |(h, t, _)| {
        heads[h][t].ln()
    })
}

fn params(dominant: usize, contextual: usize, cluster_width: usize) -> MergeParams {
    MergeParams {
        dominant,
        contextual,
        cluster_width,
        selector: Selector::Attention,
        cls: None,
    }
}

/// Patch i has the features [i, 10 i]; CLS, if any, [100, 200].
fn numbered(patches: usize, cls: bool) -> Array2<f32> {
    let first = usize::from(cls);
    Array2::from_shape_fn((patches + first, 2), |(t, d)| match (t, d) {
        (0, d) if cls => [100.0, 200.0][d],
        (t, 0) => (t - first) as f32,
        (t, _) => 10.0 * (t - first) as f32,
    })
}

const SCORES: [f32; 8] = [0.9, 0.1, 0.5, 0.5, 0.8, 0.3, 0.2, 0.7];

/// 2 and 5 lie between the directions of 7 and 3: 2 in the middle, 5 nearer to 3.
fn directions() -> Array2<f32> {
    array![
        [1.0, 0.0],
        [0.0, 1.0],
        [1.0, 1.0],
        [0.0, 2.0],
        [1.0, 0.0],
        [0.1, 1.0],
        [1.0, 0.1],
        [3.0, 0.0]
    ]
}

fn selected(params: &MergeParams, received: &[f32]) -> Merged {
    let hidden = numbered(8, params.cls.is_some());
    let metric = directions();
    merge_selected(
        hidden.view(),
        SCORES.to_vec(),
        received,
        metric.view(),
        params,
    )
    .unwrap()
}

#[test]
fn cls_scores_sum_heads_and_leave_cls_out() {
    // Softmax over CLS and three patches: [1 1 2 4]/8 and [1 3 3 1]/8.
    let key = log_keys(&[&[1.0, 1.0, 2.0, 4.0], &[1.0, 3.0, 3.0, 1.0]]) * 2.0;
    let mut query = Array3::from_elem((2, 4, 1), -7.0);
    query.slice_mut(s![.., 0, ..]).fill(1.0);
    let hidden = numbered(3, true);
    let input = MergeInput {
        hidden: hidden.view(),
        query: query.view(),
        key: key.view(),
        scale: 0.5,
        mask: None,
    };
    close(
        &patch_scores(&input, Some(Cls::Keep)).unwrap(),
        &[0.5, 0.625, 0.625],
    );
    close(
        &patch_scores(&input, Some(Cls::Drop)).unwrap(),
        &[0.5, 0.625, 0.625],
    );
}

#[test]
fn received_attention_counts_every_query() {
    // Query 0 weighs the keys 1:3, query 1 (zero) evenly; two equal heads.
    let key = log_keys(&[&[1.0, 3.0], &[1.0, 3.0]]);
    let query = Array3::from_shape_fn((2, 2, 1), |(_, t, _)| if t == 0 { 1.0 } else { 0.0 });
    let hidden = numbered(2, false);
    let input = MergeInput {
        hidden: hidden.view(),
        query: query.view(),
        key: key.view(),
        scale: 1.0,
        mask: None,
    };
    close(&patch_scores(&input, None).unwrap(), &[0.75, 1.25]);
    close(&received_attention(&input, None).unwrap(), &[1.5, 2.5]);
    // With the first token as CLS, its query still counts, and its column is left out.
    close(
        &received_attention(&input, Some(Cls::Keep)).unwrap(),
        &[2.5],
    );
}

#[test]
fn a_masked_key_gets_no_attention() {
    // Weights 1:3 for query 0, of which the mask leaves the first; query 1 sees nothing.
    let key = log_keys(&[&[1.0, 3.0]]);
    let query = Array3::from_elem((1, 2, 1), 1.0);
    let hidden = numbered(2, false);
    let none = f32::NEG_INFINITY;
    let score = |mask: Array3<f32>| {
        let input = MergeInput {
            hidden: hidden.view(),
            query: query.view(),
            key: key.view(),
            scale: 1.0,
            mask: Some(mask.view()),
        };
        patch_scores(&input, None)
    };
    close(
        &score(array![[[0.0, none], [none, none]]]).unwrap(),
        &[1.0, 0.0],
    );
    // A bias changes the weights to 3:3; beside a huge number nothing is left, so all are even.
    let huge = f32::MIN;
    close(
        &score(array![[[3f32.ln(), 0.0], [huge, huge]]]).unwrap(),
        &[1.0, 1.0],
    );
    assert!(matches!(
        score(Array3::zeros((1, 2, 3))),
        Err(OracleError::Shape { .. })
    ));
}

#[test]
fn shuffled_tokens_have_the_means_of_their_patches() {
    // One head whose four patches get 1, 2, 3 and 2 eighths of every query's attention.
    let key = log_keys(&[&[1.0, 2.0, 3.0, 2.0]]);
    let query = Array3::from_elem((1, 4, 1), 1.0);
    let hidden = numbered(4, false);
    let input = MergeInput {
        hidden: hidden.view(),
        query: query.view(),
        key: key.view(),
        scale: 1.0,
        mask: None,
    };
    let params = MergeParams {
        dominant: 1,
        contextual: 1,
        cluster_width: 4,
        selector: Selector::Attention,
        cls: None,
    };
    let rows = array![[1.0f32, 2.0], [10.0, 20.0]];
    let groups = [vec![0, 3], vec![1, 2]];
    let merged = merge_shuffled(&input, rows.view(), &groups, None, &params).unwrap();
    close(&merged.scores, &[0.75, 1.25]);
    assert_eq!((merged.dominant, merged.anchors), (vec![1], vec![0]));
    assert_eq!(merged.tokens, array![[10.0, 20.0], [1.0, 2.0]]);
    let outside = merge_shuffled(&input, rows.view(), &[vec![0, 4]], None, &params);
    assert!(matches!(outside, Err(OracleError::Index { .. })));
    let kept = MergeParams {
        cls: Some(Cls::Keep),
        ..params
    };
    let kept = merge_shuffled(&input, rows.view(), &groups, None, &kept);
    assert!(matches!(kept, Err(OracleError::Parameter { .. })));
}

#[test]
fn metric_is_the_mean_key_over_heads() {
    let key = array![[[1.0, 2.0], [4.0, 0.0]], [[3.0, -2.0], [0.0, 0.5]]];
    assert_eq!(metric(key.view()), array![[2.0, 0.0], [2.0, 0.25]]);
}

#[test]
fn attention_selector_by_hand() {
    let params = MergeParams {
        cls: Some(Cls::Keep),
        ..params(3, 2, 2)
    };
    let merged = selected(&params, &[]);
    // CLS is one of the three dominant tokens.
    assert_eq!(merged.dominant, [0, 4]);
    // 2 and 3 have the same score: the lower index comes first.
    assert_eq!(merged.pool, [7, 2, 3, 5]);
    assert_eq!(merged.anchors, [7, 3]);
    // 2 is as near to 7 as to 3: the first anchor takes it.
    assert_eq!(merged.assignment, [vec![2], vec![5]]);
    assert_eq!(
        merged.tokens,
        array![
            [100.0, 200.0],
            [0.0, 0.0],
            [4.0, 40.0],
            [9.0, 90.0],
            [8.0, 80.0]
        ]
    );
}

#[test]
fn contextual_token_is_the_anchor_plus_the_mean_of_its_members() {
    let merged = selected(&params(2, 1, 3), &[]);
    assert_eq!((merged.pool, merged.anchors), (vec![7, 2, 3], vec![7]));
    assert_eq!(merged.assignment, [vec![2, 3]]);
    // 7 + (2 + 3) / 2
    assert_eq!(merged.tokens.row(2), array![9.5, 95.0]);
    // An anchor without members is itself.
    let alone = selected(&params(2, 1, 1), &[]);
    assert_eq!(alone.assignment, [Vec::<usize>::new()]);
    assert_eq!(alone.tokens.row(2), array![7.0, 70.0]);
}

#[test]
fn pool_and_step_when_residuals_run_short() {
    // 2 · 4 asked of 6 residuals: P = 6, step 3.
    let merged = selected(&params(2, 2, 4), &[]);
    assert_eq!(merged.pool, [7, 2, 3, 5, 6, 1]);
    assert_eq!(merged.anchors, [7, 5]);
    // 4 · 4 asked of 6: P = 6, step 1, the last two are members.
    let merged = selected(&params(2, 4, 4), &[]);
    assert_eq!(merged.anchors, [7, 2, 3, 5]);
    assert_eq!(merged.assignment, [vec![6], vec![], vec![1], vec![]]);
    // P = 5 and two anchors: step 2, the fifth place is no third anchor.
    let merged = selected(&params(3, 2, 9), &[]);
    assert_eq!(merged.pool, [2, 3, 5, 6, 1]);
    assert_eq!(merged.anchors, [2, 5]);
}

#[test]
fn uniform_anchors_go_by_position_and_nothing_is_discarded() {
    let uniform = |contextual| MergeParams {
        selector: Selector::Uniform,
        ..params(2, contextual, 1)
    };
    let merged = selected(&uniform(2), &[]);
    assert_eq!(merged.pool, [1, 2, 3, 5, 6, 7]);
    assert_eq!(merged.anchors, [1, 5]);
    // 5 leans to x a little, so everything but 1's own direction is nearer to it.
    assert_eq!(merged.assignment, [vec![3], vec![2, 6, 7]]);
    assert_eq!(merged.tokens.row(2), array![4.0, 40.0]);
    assert_eq!(merged.tokens.row(3), array![10.0, 100.0]);
    assert_eq!(selected(&uniform(4), &[]).anchors, [1, 2, 3, 5]);
}

#[test]
fn local_anchors_go_by_received_attention_and_may_share_neighbours() {
    let local = |contextual, width| MergeParams {
        selector: Selector::Local,
        ..params(2, contextual, width)
    };
    // The dominant 0 and 4 receive most, and are out all the same; 2 and 3 tie.
    let received = [5.0, 0.2, 0.9, 0.9, 5.0, 0.1, 0.0, 0.3];
    let merged = selected(&local(3, 2), &received);
    assert_eq!(merged.pool, [1, 2, 3, 5, 6, 7]);
    assert_eq!(merged.anchors, [2, 3, 7]);
    // 2 at 45°: 5 and 6 are equally near, at 39.3°. 3 points as 1 does, then 5. 7: 6, then 2.
    assert_eq!(merged.assignment, [vec![5, 6], vec![1, 5], vec![6, 2]]);
    close(
        merged
            .tokens
            .column(0)
            .as_standard_layout()
            .as_slice()
            .unwrap(),
        &[0.0, 4.0, 13.0 / 3.0, 3.0, 5.0],
    );
    // More neighbours asked than there are residuals: all others.
    let merged = selected(&local(1, 99), &received);
    assert_eq!(merged.assignment[0].len(), 5);
    assert_eq!(merged.tokens.row(2), array![4.0, 40.0]);
    let merged = selected(&local(1, 0), &received);
    assert_eq!(merged.tokens.row(2), array![2.0, 20.0]);
}

#[test]
fn neighbours_of_one_direction_tie_whatever_their_length() {
    let metric = array![[1.0, 1.0], [0.7, 0.7], [5.3, 5.3], [-1.0, 0.0]];
    let params = MergeParams {
        selector: Selector::Local,
        ..params(0, 1, 1)
    };
    let hidden = numbered(4, false);
    let run = |received: [f32; 4]| {
        merge_selected(
            hidden.view(),
            vec![0.0; 4],
            &received,
            metric.view(),
            &params,
        )
        .unwrap()
    };
    assert_eq!(run([1.0, 0.0, 0.0, 0.0]).assignment, [vec![1]]);
    assert_eq!(run([0.0, 0.0, 1.0, 0.0]).assignment, [vec![0]]);
}

#[test]
fn a_zero_metric_is_similar_to_nothing() {
    let metric = array![[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]];
    let hidden = numbered(4, false);
    let scores = vec![4.0, 3.0, 2.0, 1.0];
    let merged =
        merge_selected(hidden.view(), scores, &[], metric.view(), &params(0, 2, 2)).unwrap();
    assert_eq!(merged.anchors, [0, 2]);
    // 1: cosine 0 with both; 3: -1 with 0, 0 with 2.
    assert_eq!(merged.assignment, [vec![1], vec![3]]);
}

#[test]
fn equal_scores_go_to_the_lower_index() {
    let hidden = numbered(6, false);
    let metric = Array2::ones((6, 2));
    let merged = merge_selected(
        hidden.view(),
        vec![0.25; 6],
        &[],
        metric.view(),
        &params(2, 2, 2),
    )
    .unwrap();
    assert_eq!(merged.dominant, [0, 1]);
    assert_eq!(merged.pool, [2, 3, 4, 5]);
    assert_eq!(merged.anchors, [2, 4]);
    assert_eq!(merged.assignment, [vec![3, 5], vec![]]);
}

#[test]
fn budgets_resolve_in_double_precision_and_clamp() {
    assert_eq!(Budget::Count(7).resolve(3), Ok(7));
    // 0.29 · 100 is 28.999999999999996 in doubles, and 29 in single precision.
    assert_eq!(Budget::Ratio(0.29).resolve(100), Ok(28));
    assert_eq!(Budget::Ratio(0.5).resolve(577), Ok(288));
    assert_eq!(Budget::Ratio(1.0).resolve(576), Ok(576));
    for ratio in [-0.1, 1.5, f64::NAN] {
        assert!(matches!(
            Budget::Ratio(ratio).resolve(9),
            Err(OracleError::Parameter { .. })
        ));
    }

    let clamped = |dominant, contextual, cls| {
        let params = MergeParams {
            cls,
            ..params(dominant, contextual, 4)
        };
        let budget = clamp_budget(8, &params);
        (budget.tokens(), budget.patches, budget.contextual)
    };
    assert_eq!(clamped(3, 2, None), (5, 3, 2));
    assert_eq!(clamped(3, 2, Some(Cls::Drop)), (5, 3, 2));
    assert_eq!(clamped(3, 2, Some(Cls::Keep)), (5, 2, 2));
    assert_eq!(clamped(99, 99, Some(Cls::Keep)), (9, 8, 0));
    assert_eq!(clamped(99, 99, Some(Cls::Drop)), (8, 8, 0));
    assert_eq!(clamped(6, 99, None), (8, 6, 2));
    assert_eq!(clamped(0, 0, Some(Cls::Keep)), (1, 0, 0));
    assert_eq!(clamped(0, 0, None), (0, 0, 0));
    // The published budgets of LLaVA-1.5.
    for (dominant, contextual) in [(300, 7), (170, 32), (72, 30)] {
        let params = MergeParams {
            cls: Some(Cls::Keep),
            ..params(dominant, contextual, 4)
        };
        assert_eq!(clamp_budget(576, &params).tokens(), dominant + contextual);
    }
}

#[test]
fn no_contextual_token_means_an_empty_pool() {
    for selector in [Selector::Attention, Selector::Uniform, Selector::Local] {
        let merged = selected(
            &MergeParams {
                selector,
                ..params(3, 0, 4)
            },
            &[0.0; 8],
        );
        assert!(merged.pool.is_empty() && merged.anchors.is_empty());
        assert_eq!(merged.tokens.column(0), array![0.0, 4.0, 7.0]);
    }
}

#[test]
fn a_width_of_zero_leaves_a_pool_of_one() {
    let merged = selected(&params(2, 3, 0), &[]);
    assert_eq!((merged.pool, merged.anchors), (vec![7], vec![7]));
    assert_eq!(merged.tokens.nrows(), 3);
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let hidden = numbered(3, true);
    let query = Array3::<f32>::ones((2, 4, 5));
    let check = |hidden: &Array2<f32>, query: &Array3<f32>, key: &Array3<f32>| {
        let input = MergeInput {
            hidden: hidden.view(),
            query: query.view(),
            key: key.view(),
            scale: 1.0,
            mask: None,
        };
        let params = MergeParams {
            cls: Some(Cls::Keep),
            ..params(2, 1, 1)
        };
        merge(&input, &params).map(|merged| merged.tokens.nrows())
    };
    assert_eq!(check(&hidden, &query, &query), Ok(3));
    let shape = |result| matches!(result, Err(OracleError::Shape { .. }));
    assert!(shape(check(&numbered(3, false), &query, &query)));
    assert!(shape(check(&hidden, &query, &Array3::ones((2, 4, 6)))));
    assert!(shape(check(
        &hidden,
        &Array3::ones((0, 4, 5)),
        &Array3::ones((0, 4, 5))
    )));
    let empty = Array3::ones((1, 0, 5));
    assert!(shape(check(&Array2::ones((0, 2)), &empty, &empty)));

    let mut bad = query.clone();
    bad[[1, 2, 0]] = f32::NAN;
    let error = check(&hidden, &query, &bad).unwrap_err();
    assert!(
        matches!(error, OracleError::NotFinite { index: 0, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("patch score"), "{error}");
}

/// A random tower output. `grid`: values from a coarse grid, so that ties are common.
fn tower(grid: bool) -> impl Strategy<Value = (Array2<f32>, Array3<f32>, Array3<f32>)> {
    (1usize..=3, 2usize..=14, 2usize..=4, 1usize..=3).prop_flat_map(
        move |(heads, tokens, head_dim, width)| {
            let value = move || (-2.0f32..2.0).prop_map(move |x| if grid { x.round() } else { x });
            let size = heads * tokens * head_dim;
            (
                prop::collection::vec(value(), tokens * width),
                prop::collection::vec(value(), size),
                prop::collection::vec(value(), size),
            )
                .prop_map(move |(h, q, k)| {
                    let shape = (heads, tokens, head_dim);
                    (
                        Array2::from_shape_vec((tokens, width), h).unwrap(),
                        Array3::from_shape_vec(shape, q).unwrap(),
                        Array3::from_shape_vec(shape, k).unwrap(),
                    )
                })
        },
    )
}

fn any_params() -> impl Strategy<Value = MergeParams> {
    (
        prop_oneof![0usize..18, Just(usize::MAX)],
        prop_oneof![0usize..8, Just(usize::MAX)],
        prop_oneof![0usize..6, Just(usize::MAX)],
        prop::sample::select(vec![
            Selector::Attention,
            Selector::Uniform,
            Selector::Local,
        ]),
        prop::sample::select(vec![None, Some(Cls::Keep), Some(Cls::Drop)]),
    )
        .prop_map(
            |(dominant, contextual, cluster_width, selector, cls)| MergeParams {
                dominant,
                contextual,
                cluster_width,
                selector,
                cls,
            },
        )
}

fn run(tower: &(Array2<f32>, Array3<f32>, Array3<f32>), params: &MergeParams) -> Merged {
    let input = MergeInput {
        hidden: tower.0.view(),
        query: tower.1.view(),
        key: tower.2.view(),
        scale: 0.7,
        mask: None,
    };
    merge(&input, params).unwrap()
}

fn sorted(mut list: Vec<usize>) -> Vec<usize> {
    list.sort_unstable();
    list
}

proptest! {
    /// What holds for every selection, ties included.
    #[test]
    fn selections_are_consistent(tower in tower(true), params in any_params()) {
        let merged = run(&tower, &params);
        let first = usize::from(params.cls.is_some());
        let n = tower.0.nrows() - first;
        let budget = clamp_budget(n, &params);
        prop_assert_eq!(merged.scores.len(), n);
        prop_assert_eq!(merged.tokens.dim(), (budget.tokens(), tower.0.ncols()));
        prop_assert_eq!(merged.dominant.len(), budget.patches);
        prop_assert_eq!(merged.anchors.len(), budget.contextual);
        prop_assert_eq!(merged.assignment.len(), budget.contextual);
        prop_assert!(merged.dominant.is_sorted_by(|a, b| a < b));
        prop_assert!(merged.dominant.iter().all(|&d| d < n));

        // No patch that is left out would have ranked before a dominant one.
        let residual: Vec<usize> = (0..n).filter(|i| !merged.dominant.contains(i)).collect();
        for &out in &residual {
            for &kept in &merged.dominant {
                let (o, k) = (merged.scores[out], merged.scores[kept]);
                prop_assert!(k > o || (k == o && kept < out));
            }
        }
        prop_assert!(merged.pool.iter().chain(&merged.anchors).all(|p| residual.contains(p)));
        prop_assert!(merged.anchors.iter().all(|a| merged.pool.contains(a)));
        let members: Vec<usize> = merged.assignment.concat();
        if params.selector == Selector::Local {
            for (anchor, near) in merged.anchors.iter().zip(&merged.assignment) {
                prop_assert_eq!(near.len(), params.cluster_width.min(residual.len() - 1));
                prop_assert!(!near.contains(anchor));
                let unique = sorted(near.clone());
                prop_assert!(unique.is_sorted_by(|a, b| a < b));
                prop_assert!(unique.iter().all(|p| residual.contains(p)));
            }
        } else {
            // Anchors and members partition the pool.
            let all = sorted([merged.anchors.clone(), members].concat());
            prop_assert_eq!(&all, &sorted(merged.pool.clone()));
            prop_assert!(all.is_sorted_by(|a, b| a < b));
        }
        // Dominant tokens are the features themselves.
        for (row, &patch) in merged.dominant.iter().enumerate() {
            let row = merged.tokens.row(row + usize::from(budget.cls));
            prop_assert_eq!(row, tower.0.row(first + patch));
        }
    }

    /// Total probability mass: every query gives 1 per head.
    #[test]
    fn attention_mass_is_conserved(tower in tower(false)) {
        let input = MergeInput {
            hidden: tower.0.view(),
            query: tower.1.view(),
            key: tower.2.view(),
            scale: 1.3,
            mask: None,
        };
        let (heads, tokens, _) = tower.1.dim();
        let sum = |scores: Vec<f32>| scores.iter().sum::<f32>();
        let mean = sum(patch_scores(&input, None).unwrap());
        prop_assert!((mean - tokens as f32).abs() < 1e-3);
        let all = sum(received_attention(&input, None).unwrap());
        prop_assert!((all - (tokens * heads) as f32).abs() < 1e-3);
        prop_assert!(sum(patch_scores(&input, Some(Cls::Keep)).unwrap()) <= heads as f32);
    }

    #[test]
    fn keeping_everything_changes_nothing(tower in tower(true)) {
        let tokens = tower.0.nrows();
        for (cls, dominant) in [(None, tokens), (Some(Cls::Keep), tokens), (Some(Cls::Drop), tokens - 1)] {
            let merged = run(&tower, &MergeParams { cls, ..params(dominant, 0, 4) });
            let first = usize::from(cls == Some(Cls::Drop));
            prop_assert_eq!(merged.tokens, tower.0.slice(s![first.., ..]));
        }
    }

    /// Renaming the patches renames the selection, where it depends on no position (`uniform`
    /// does) and no tie.
    #[test]
    fn selection_follows_a_permutation_of_the_patches(
        tower in tower(false),
        params in any_params(),
        seed in any::<u64>(),
    ) {
        prop_assume!(params.selector != Selector::Uniform);
        let merged = run(&tower, &params);
        let first = usize::from(params.cls.is_some());
        let input = MergeInput {
            hidden: tower.0.view(),
            query: tower.1.view(),
            key: tower.2.view(),
            scale: 0.7,
            mask: None,
        };
        for scores in [merged.scores.clone(), received_attention(&input, params.cls).unwrap()] {
            let mut scores = scores;
            scores.sort_by(f32::total_cmp);
            prop_assume!(scores.windows(2).all(|w| w[1] - w[0] > 1e-5));
        }
        // Patch i of the permuted image is patch from[i] of the original; CLS stays first.
        let n = tower.0.nrows() - first;
        let mut from: Vec<usize> = (0..n).collect();
        from.sort_by_key(|&i| seed.wrapping_mul(2 * i as u64 + 1).rotate_left(17) ^ (i as u64));
        let tokens: Vec<usize> = (0..first).chain(from.iter().map(|i| i + first)).collect();
        let permuted = (
            tower.0.select(Axis(0), &tokens),
            tower.1.select(Axis(1), &tokens),
            tower.2.select(Axis(1), &tokens),
        );
        let other = run(&permuted, &params);
        let back = |list: &[usize]| -> Vec<usize> { list.iter().map(|&i| from[i]).collect() };
        prop_assert_eq!(sorted(back(&other.dominant)), merged.dominant);
        prop_assert_eq!(back(&other.anchors), merged.anchors.clone());
        for (a, b) in other.assignment.iter().zip(&merged.assignment) {
            prop_assert_eq!(back(a), b.clone());
        }
        let contextual = merged.tokens.nrows() - merged.anchors.len();
        prop_assert_eq!(
            other.tokens.slice(s![contextual.., ..]),
            merged.tokens.slice(s![contextual.., ..])
        );
    }
}
