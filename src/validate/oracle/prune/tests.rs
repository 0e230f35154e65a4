use ndarray::{Array3, Axis, concatenate};
use proptest::prelude::*;

use super::*;

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(
        found.len(),
        expected.len(),
        "{found:?} against {expected:?}"
    );
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= 1e-6, "{found:?} against {expected:?}");
    }
}

/// `v`: visual, `.`: padding, anything else: text.
fn masks(tokens: &str) -> (Vec<bool>, Vec<bool>) {
    (
        tokens.chars().map(|c| c == 'v').collect(),
        tokens.chars().map(|c| c != '.').collect(),
    )
}

fn rows_of(tokens: &str, text: Text<'_>) -> Vec<usize> {
    let (visual, real) = masks(tokens);
    text_rows(&visual, &real, text).unwrap()
}

fn schedule(drops: &[(usize, f64)]) -> Vec<Drop> {
    let drop = |&(after_layer, keep): &(usize, f64)| Drop { after_layer, keep };
    drops.iter().map(drop).collect()
}

/// Heads of head_dim 1; `log_keys` gives softmax weights under the query 1.
fn one_dim(heads: &[&[f32]], log_keys: bool) -> Array3<f32> {
    Array3::from_shape_fn((heads.len(), heads[0].len(), 1), |(h, t, _)| {
        if log_keys {
            heads[h][t].ln()
        } else {
            heads[h][t]
        }
    })
}

#[test]
fn text_rows_are_what_asks() {
    assert_eq!(rows_of("tvvtt", Text::All), [3, 4]);
    // Only what follows the last image asks, and padding never does.
    assert_eq!(rows_of("..tvvtvtt", Text::All), [7, 8]);
    assert_eq!(rows_of("tvvtt..", Text::All), [3, 4]);
    // Nothing after the image: the last real token, visual as it is.
    assert_eq!(rows_of("ttvv", Text::All), [3]);
    assert_eq!(rows_of("ttvv..", Text::All), [3]);
    assert_eq!(rows_of("ttt", Text::All), [2]);
    assert_eq!(rows_of("tvvtt..", Text::Last), [4]);
    // Text before the image may be salient; visual and padding tokens are not, the last always is.
    let marked = [true, true, false, true, false, false, true];
    assert_eq!(rows_of("tvvtttt", Text::Salient(&marked)), [0, 3, 6]);
    assert_eq!(rows_of("tvvttt.", Text::Salient(&marked)), [0, 3, 5]);
    assert_eq!(rows_of("tvvtttt", Text::Salient(&[false; 7])), [6]);
}

#[test]
fn rank_by_hand_is_causal_and_averages_rows() {
    let (visual, real) = masks("tvvtt");
    let key = one_dim(&[&[1.0, 2.0, 4.0, 1.0, 9.0]], true);
    let query = one_dim(&[&[5.0, 5.0, 5.0, 1.0, 0.0]], false);
    let rank = |rows: &[usize], real: &[bool]| {
        rank(query.view(), key.view(), 1.0, real, rows, &visual).unwrap()
    };
    // Row 3 does not see key 4: [1 2 4 1]/8.
    close(&rank(&[3], &real), &[0.25, 0.5]);
    // Row 4's query is zero: 1/5 each.
    close(&rank(&[4], &real), &[0.2, 0.2]);
    close(&rank(&[3, 4], &real), &[0.225, 0.35]);
    // The first token as padding: [2 4 1]/7.
    let padded = [false, true, true, true, true];
    close(&rank(&[3], &padded), &[2.0 / 7.0, 4.0 / 7.0]);
}

#[test]
fn scale_multiplies_the_logits() {
    let (visual, real) = masks("vvt");
    let key = one_dim(&[&[1.0, 3.0, 1.0]], true) * 4.0;
    let query = one_dim(&[&[0.0, 0.0, 1.0]], false);
    let scores = rank(query.view(), key.view(), 0.25, &real, &[2], &visual).unwrap();
    close(&scores, &[0.2, 0.6]);
}

#[test]
fn a_key_head_serves_its_group_of_query_heads() {
    let (visual, real) = masks("vvt");
    let key = one_dim(&[&[1.0, 3.0, 4.0], &[5.0, 1.0, 2.0]], true);
    // Heads 0 and 1 read key head 0, heads 2 and 3 key head 1.
    let query = one_dim(
        &[
            &[0.0, 0.0, 1.0],
            &[0.0, 0.0, 0.0],
            &[0.0, 0.0, 1.0],
            &[0.0, 0.0, 1.0],
        ],
        false,
    );
    let scores = rank(query.view(), key.view(), 1.0, &real, &[2], &visual).unwrap();
    let third = 1.0 / 3.0;
    close(
        &scores,
        &[(0.125 + third + 1.25) / 4.0, (0.375 + third + 0.25) / 4.0],
    );
}

#[test]
fn the_batch_loses_what_its_shortest_row_can() {
    let drops = schedule(&[(16, 0.5), (24, 0.0)]);
    assert_eq!(drop_counts(&[307], &drops).unwrap(), [154, 153]);
    assert_eq!(drop_counts(&[307, 100], &drops).unwrap(), [50, 50]);
    // A row without an image stops all dropping; so does an empty batch.
    assert_eq!(drop_counts(&[307, 0], &drops).unwrap(), [0, 0]);
    assert_eq!(drop_counts(&[], &drops).unwrap(), [0, 0]);
    // Which row is the limit may change: 10 - 7 = 3 and 7 - 4 = 3, then 10 - 3 = 7 and 7 - 2 = 5.
    let drops = schedule(&[(1, 0.7), (2, 0.3)]);
    assert_eq!(drop_counts(&[10, 7], &drops).unwrap(), [3, 2]);
    // Ratios are of what entered: half, then a quarter of it, never 37.5 %.
    let drops = schedule(&[(14, 0.5), (21, 0.25)]);
    assert_eq!(drop_counts(&[640], &drops).unwrap(), [320, 160]);
    // Double precision: 0.29 · 100 falls short of 29.
    assert_eq!(drop_counts(&[100], &schedule(&[(1, 0.29)])).unwrap(), [72]);
}

#[test]
fn select_keeps_the_best_in_their_places() {
    let (visual, _) = masks(".tvvtvvt");
    let scores = [0.1, 0.4, 0.3, 0.2];
    assert_eq!(select(&scores, &visual, 2).unwrap(), [0, 1, 3, 4, 5, 7]);
    assert_eq!(
        select(&scores, &visual, 0).unwrap(),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    assert_eq!(select(&scores, &visual, 4).unwrap(), [0, 1, 4, 7]);
    // Equal scores, zeros of either sign among them: the lower position stays.
    assert_eq!(
        select(&[0.0, -0.0, 0.0, 0.0], &visual, 2).unwrap(),
        [0, 1, 2, 3, 4, 7]
    );
}

#[test]
fn positions_close_up_and_rows_follow() {
    let kept = [0, 1, 3, 4, 7];
    // Left padding keeps its ids, the row stays contiguous from its first real token.
    assert_eq!(
        renumber(&[1, 0, 1, 2, 3, 4, 5, 6], &kept).unwrap(),
        [1, 0, 1, 2, 3]
    );
    assert_eq!(carry_rows(&[4, 7], &kept, &[true; 8]).unwrap(), [3, 4]);
}

#[test]
fn an_asking_token_that_is_dropped_hands_on_to_the_last_real_one() {
    let (visual, real) = masks("ttvvv..");
    let rows = text_rows(&visual, &real, Text::All).unwrap();
    assert_eq!(rows, [4]);
    // The image's last token ranks lowest and goes; position 3 is the last real one then.
    let kept = select(&[0.3, 0.2, 0.1], &visual, 1).unwrap();
    assert_eq!(kept, [0, 1, 2, 3, 5, 6]);
    assert_eq!(carry_rows(&rows, &kept, &real).unwrap(), [3]);
    // The set does not grow while one that asks is left.
    assert_eq!(carry_rows(&[1, 4], &kept, &real).unwrap(), [1]);
}

#[test]
fn published_budgets_of_llava() {
    let drops = schedule(&[(16, 0.5), (24, 0.0)]);
    for (tokens, average) in [(307, 191.75), (202, 126.25), (102, 63.75)] {
        assert_eq!(average_visual_tokens(tokens, 32, &drops).unwrap(), average);
    }
    let seen = visual_tokens_per_layer(307, 32, &drops).unwrap();
    assert_eq!(seen[..16], [307; 16]);
    assert_eq!(seen[16..24], [153; 8]);
    assert_eq!(seen[24..], [0; 8]);
    // Video-LLaVA, eight frames of 160 + 32; Qwen2.5-VL, 28 layers.
    assert_eq!(average_visual_tokens(8 * 192, 32, &drops).unwrap(), 960.0);
    let qwen = schedule(&[(14, 0.5), (21, 0.25)]);
    assert_eq!(average_visual_tokens(640, 28, &qwen).unwrap(), 440.0);
    assert_eq!(average_visual_tokens(576, 32, &[]).unwrap(), 576.0);
}

#[test]
fn schedules_that_make_no_sense_are_errors() {
    assert_eq!(
        check_schedule(&schedule(&[(1, 1.0), (2, 0.5), (3, 0.5), (31, 0.0)]), 32),
        Ok(())
    );
    for bad in [
        &[(0, 0.5)][..],
        &[(32, 0.5)],
        &[(8, 0.5), (8, 0.25)],
        &[(8, 0.25), (4, 0.2)],
        &[(8, 0.25), (16, 0.5)],
        &[(8, 1.1)],
        &[(8, -0.1)],
        &[(8, f64::NAN)],
    ] {
        let result = check_schedule(&schedule(bad), 32);
        assert!(
            matches!(result, Err(OracleError::Parameter { .. })),
            "{bad:?}"
        );
    }
    assert!(average_visual_tokens(9, 0, &[]).is_err());
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let (visual, real) = masks(".vvt");
    assert!(text_rows(&visual, &[true; 3], Text::All).is_err());
    assert!(text_rows(&visual, &[false, true, true, true], Text::Salient(&[true])).is_err());
    assert!(text_rows(&[false; 2], &[false; 2], Text::Last).is_err());
    assert!(text_rows(&visual, &[true, false, true, true], Text::All).is_err());

    let query = Array3::<f32>::ones((4, 4, 2));
    let key = |heads, length, dim| Array3::<f32>::ones((heads, length, dim));
    let ranked = |key: &Array3<f32>, rows: &[usize]| {
        rank(query.view(), key.view(), 1.0, &real, rows, &visual).map(|scores| scores.len())
    };
    assert_eq!(ranked(&key(2, 4, 2), &[3]), Ok(2));
    for bad in [
        key(3, 4, 2),
        key(0, 4, 2),
        key(8, 4, 2),
        key(2, 5, 2),
        key(2, 4, 3),
    ] {
        assert!(matches!(ranked(&bad, &[3]), Err(OracleError::Shape { .. })));
    }
    for bad in [&[][..], &[0], &[4]] {
        assert!(
            matches!(ranked(&key(2, 4, 2), bad), Err(OracleError::Index { .. })),
            "{bad:?}"
        );
    }
    let nan = key(2, 4, 2) * f32::NAN;
    assert!(matches!(
        ranked(&nan, &[3]),
        Err(OracleError::NotFinite { .. })
    ));

    assert!(select(&[0.1], &visual, 0).is_err());
    assert!(select(&[0.1, 0.2], &visual, 3).is_err());
    assert!(select(&[0.1, f32::NAN], &visual, 1).is_err());
    assert!(renumber(&[0, 1, 2], &[0, 3]).is_err());
    assert!(renumber(&[0, 1, 2], &[1, 1]).is_err());
    assert!(carry_rows(&[2], &[0, 4], &[true; 4]).is_err());
    assert!(carry_rows(&[2], &[0, 1], &[false, false, true]).is_err());
}

/// One row: its tokens (padding on the left), queries and keys. `grid`: ties are common.
#[derive(Debug, Clone)]
struct Row {
    visual: Vec<bool>,
    real: Vec<bool>,
    query: Array3<f32>,
    key: Array3<f32>,
}

fn row(grid: bool) -> impl Strategy<Value = Row> {
    let sizes = (0usize..3, 1usize..14, 1usize..=2, 1usize..=2, 1usize..=3);
    sizes.prop_flat_map(move |(pads, length, key_heads, group, head_dim)| {
        let total = pads + length;
        let value = move || (-2.0f32..2.0).prop_map(move |x| if grid { x.round() } else { x });
        (
            prop::collection::vec(prop::bool::weighted(0.6), length),
            prop::collection::vec(value(), key_heads * group * total * head_dim),
            prop::collection::vec(value(), key_heads * total * head_dim),
        )
            .prop_map(move |(of_real, q, k)| {
                let mut visual = vec![false; pads];
                visual.extend(of_real);
                let real = (0..total).map(|i| i >= pads).collect();
                let heads = key_heads * group;
                Row {
                    visual,
                    real,
                    query: Array3::from_shape_vec((heads, total, head_dim), q).unwrap(),
                    key: Array3::from_shape_vec((key_heads, total, head_dim), k).unwrap(),
                }
            })
    })
}

impl Row {
    fn scores(&self) -> Vec<f32> {
        let rows = text_rows(&self.visual, &self.real, Text::All).unwrap();
        let (q, k) = (self.query.view(), self.key.view());
        rank(q, k, 0.6, &self.real, &rows, &self.visual).unwrap()
    }
}

proptest! {
    #[test]
    fn kept_positions_are_consistent(row in row(true), fraction in 0.0f64..=1.0) {
        let scores = row.scores();
        let count = row.visual.iter().filter(|&&v| v).count();
        prop_assert_eq!(scores.len(), count);
        prop_assert!(scores.iter().sum::<f32>() <= 1.0 + 1e-5);
        let drop = (count as f64 * fraction) as usize;
        let kept = select(&scores, &row.visual, drop).unwrap();
        prop_assert_eq!(kept.len(), row.visual.len() - drop);
        prop_assert!(kept.is_sorted_by(|a, b| a < b));
        prop_assert!((0..row.visual.len()).all(|i| row.visual[i] || kept.contains(&i)));
        // Whoever left ranks behind everyone who stayed.
        let places: Vec<usize> = (0..row.visual.len()).filter(|&i| row.visual[i]).collect();
        for (o, out) in places.iter().enumerate().filter(|(_, p)| !kept.contains(p)) {
            for (s, stayed) in places.iter().enumerate().filter(|(_, p)| kept.contains(p)) {
                prop_assert!(scores[s] > scores[o] || (scores[s] == scores[o] && stayed < out));
            }
        }
        // Positions 0, 1, 2, … stay contiguous from the first real token on.
        let pads = row.real.iter().filter(|&&r| !r).count();
        let positions: Vec<i64> = (0..row.real.len()).map(|i| i as i64 - pads as i64).collect();
        let closed = renumber(&positions, &kept).unwrap();
        prop_assert!(closed.iter().enumerate().all(|(i, &p)| p == i as i64 - pads as i64));
    }

    #[test]
    fn dropping_nothing_changes_nothing(row in row(true)) {
        let kept = select(&row.scores(), &row.visual, 0).unwrap();
        let all: Vec<usize> = (0..row.visual.len()).collect();
        prop_assert_eq!(&kept, &all);
        let positions: Vec<i64> = all.iter().map(|&i| 3 * i as i64).collect();
        prop_assert_eq!(renumber(&positions, &kept).unwrap(), positions);
        prop_assert_eq!(carry_rows(&all, &kept, &row.real).unwrap(), all);
    }

    /// A row ranks the same alone and padded, on either side, whatever the padding holds.
    #[test]
    fn padding_does_not_matter(row in row(false), junk in -9.0f32..9.0, left in any::<bool>()) {
        let pad = |x: &Array3<f32>| {
            let (heads, _, dim) = x.dim();
            let junk = Array3::from_elem((heads, 2, dim), junk);
            let parts = if left { [junk.view(), x.view()] } else { [x.view(), junk.view()] };
            concatenate(Axis(1), &parts).unwrap()
        };
        let mask = |mask: &[bool]| {
            let parts = if left { [&[false; 2], mask] } else { [mask, &[false; 2]] };
            parts.concat()
        };
        let padded = Row {
            visual: mask(&row.visual),
            real: mask(&row.real),
            query: pad(&row.query),
            key: pad(&row.key),
        };
        prop_assert_eq!(padded.scores(), row.scores());
    }

    /// Grouped-query attention is multi-head attention with every key head repeated.
    #[test]
    fn grouped_heads_equal_repeated_heads(row in row(false)) {
        let group = row.query.dim().0 / row.key.dim().0;
        let heads: Vec<usize> = (0..row.query.dim().0).map(|h| h / group).collect();
        let repeated = Row { key: row.key.select(Axis(0), &heads), ..row.clone() };
        prop_assert_eq!(repeated.scores(), row.scores());
    }

    /// Swapping two visual tokens swaps their scores: keys are seen as a set.
    #[test]
    fn scores_follow_visual_tokens(row in row(false), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>()) {
        // Rows that end in an image rank from a visual token, whose own place matters.
        let places: Vec<usize> = (0..row.visual.len()).filter(|&i| row.visual[i]).collect();
        prop_assume!(places.len() > 1 && !row.visual[row.visual.len() - 1]);
        let (a, b) = (a.index(places.len()), b.index(places.len()));
        let mut order: Vec<usize> = (0..row.visual.len()).collect();
        order.swap(places[a], places[b]);
        let swapped = Row {
            query: row.query.select(Axis(1), &order),
            key: row.key.select(Axis(1), &order),
            ..row.clone()
        };
        let mut expected = row.scores();
        expected.swap(a, b);
        for (found, expected) in swapped.scores().iter().zip(expected) {
            prop_assert!((found - expected).abs() < 1e-6);
        }
    }

    /// No row of a batch loses more than it would alone, and one of them loses as much.
    #[test]
    fn batches_lose_the_least_of_their_rows(
        counts in prop::collection::vec(0usize..700, 1..5),
        mut ratios in prop::collection::vec(0.0f64..=1.0, 1..4),
    ) {
        ratios.sort_by(|a, b| b.total_cmp(a));
        let drops: Vec<Drop> = (1..).zip(ratios).map(|(after_layer, keep)| Drop { after_layer, keep }).collect();
        let total = |counts: &[usize], upto: usize| -> usize {
            drop_counts(counts, &drops).unwrap()[..=upto].iter().sum()
        };
        for point in 0..drops.len() {
            let alone: Vec<usize> = counts.iter().map(|&n| total(&[n], point)).collect();
            prop_assert_eq!(total(&counts, point), *alone.iter().min().unwrap());
            for (&n, &lost) in counts.iter().zip(&alone) {
                prop_assert_eq!(n - lost, (n as f64 * drops[point].keep) as usize);
                let seen = visual_tokens_per_layer(n, drops.len() + 1, &drops).unwrap();
                prop_assert_eq!(seen[point + 1], n - lost);
            }
        }
    }
}
