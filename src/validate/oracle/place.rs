//! Discarded tokens that stay in their places until the decoder drops them.

use ndarray::{Array2, ArrayView2};

use super::OracleError;
use super::prune::{Drop, check_schedule, kept_of, select};

/// `rows` `[K, D]` put at `places` among `slots` rows of zeros: `[slots, D]`, and which of
/// these are empty.
///
/// # Errors
/// [`OracleError::Index`] for a place that is not there or taken twice, or another number of
/// places than of rows.
pub fn place(
    rows: ArrayView2<'_, f32>,
    places: &[usize],
    slots: usize,
) -> Result<(Array2<f32>, Vec<bool>), OracleError> {
    let wrong = |found: String| OracleError::Index {
        what: "places of merged tokens",
        expected: format!("{} different places below {slots}", rows.nrows()),
        found,
    };
    if places.len() != rows.nrows() {
        return Err(wrong(format!("{} places", places.len())));
    }
    let mut placed = Array2::zeros((slots, rows.ncols()));
    let mut empty = vec![true; slots];
    for (row, &at) in rows.outer_iter().zip(places) {
        if !empty.get(at).copied().unwrap_or(false) {
            return Err(wrong(format!("place {at}, which is taken or not there")));
        }
        empty[at] = false;
        placed.row_mut(at).assign(&row);
    }
    Ok((placed, empty))
}

/// How many tokens every row of a batch loses where discarded tokens leave, before all drops,
/// and at each drop point.
///
/// `visual_tokens` and `gone` hold, for each row, the counts that entered. Up to drop point p a
/// row may lose its gone tokens and `n - floor(keep_p · n)` of its n visual ones; all rows lose
/// the smallest such number.
///
/// # Errors
/// [`OracleError::Parameter`] for a schedule that [`check_schedule`] refuses (its layers aside).
pub fn placed_drop_counts(
    visual_tokens: &[usize],
    gone: &[usize],
    schedule: &[Drop],
) -> Result<Vec<usize>, OracleError> {
    check_schedule(schedule, usize::MAX)?;
    let first = gone.iter().copied().min().unwrap_or(0);
    let (mut counts, mut lost) = (vec![first], first);
    for drop in schedule {
        let rows = visual_tokens.iter().zip(gone);
        let could = rows.map(|(&n, &g)| g + n - kept_of(n, drop.keep));
        let target = could.min().unwrap_or(0);
        counts.push(target - lost);
        lost = target;
    }
    Ok(counts)
}

/// As [`select`], where tokens of `gone` `[L]` leave first, the last ones before the others.
///
/// # Errors
/// As [`select`].
pub fn select_placed(
    scores: &[f32],
    visual: &[bool],
    gone: &[bool],
    drop: usize,
) -> Result<Vec<usize>, OracleError> {
    let places: Vec<usize> = (0..gone.len()).filter(|&i| gone[i]).collect();
    let leave = drop.min(places.len());
    let kept = select(scores, visual, drop - leave)?;
    let leaving = &places[places.len() - leave..];
    Ok(kept.into_iter().filter(|i| !leaving.contains(i)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn rows_go_to_their_places_and_the_rest_is_zero() {
        let rows = array![[1.0, 2.0], [3.0, 4.0]];
        let (placed, empty) = place(rows.view(), &[3, 1], 4).unwrap();
        assert_eq!(
            placed,
            array![[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
        );
        assert_eq!(empty, [true, false, true, false]);
        for wrong in [&[1, 1][..], &[1, 4], &[1]] {
            assert!(place(rows.view(), wrong, 4).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn rows_lose_the_smallest_number_and_the_gone_first() {
        let half = [Drop {
            after_layer: 2,
            keep: 0.5,
        }];
        assert_eq!(placed_drop_counts(&[6], &[10], &half).unwrap(), [10, 3]);
        // The second row has 4 gone and may lose 1 of 2; the first leaves 5 of its 10.
        assert_eq!(
            placed_drop_counts(&[6, 2], &[10, 4], &half).unwrap(),
            [4, 1]
        );
        assert_eq!(
            placed_drop_counts(&[6, 0], &[10, 0], &half).unwrap(),
            [0, 0]
        );
        let visual = [false, true, true, false, false, true];
        let gone = [false, false, false, true, true, false];
        let select = |drop| select_placed(&[0.3, 0.1, 0.2], &visual, &gone, drop).unwrap();
        assert_eq!(select(1), [0, 1, 2, 3, 5]);
        assert_eq!(select(2), [0, 1, 2, 5]);
        assert_eq!(select(3), [0, 1, 5]);
    }
}
