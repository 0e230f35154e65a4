//! `ratio_base: current`: the public code's schedule for Qwen2.5-VL.
//!
//! At a drop point c tokens count as visual; r is the ratio before it (1 at the first), r′ its
//! own. The first ⌊c·r⌋ of them are ranked, in sequence order, and ⌊c·r′⌋ of these stay; the
//! others stay too, and count as text from there on.

use super::OracleError;
use super::prune::{Drop, check_schedule, kept_of};

/// How many tokens every row of a batch loses at each drop point (`gone`: with discarded tokens,
/// which leave before all drops and first at each; then the first count is that of their own
/// drop point).
///
/// `visual_tokens` and `gone` hold, for each row, the counts that entered. At a drop point a row
/// may lose ⌊c·r⌋ − ⌊c·r′⌋ of its visual tokens and what is gone; all rows lose the smallest
/// such number.
///
/// # Errors
/// [`OracleError::Parameter`] for a schedule that [`check_schedule`] refuses (its layers aside).
pub fn current_drop_counts(
    visual_tokens: &[usize],
    gone: Option<&[usize]>,
    schedule: &[Drop],
) -> Result<Vec<usize>, OracleError> {
    check_schedule(schedule, usize::MAX)?;
    let mut visual = visual_tokens.to_vec();
    let mut left = gone.map_or_else(|| vec![0; visual.len()], <[usize]>::to_vec);
    let mut counts = Vec::new();
    if gone.is_some() {
        let first = left.iter().copied().min().unwrap_or(0);
        left.iter_mut().for_each(|g| *g -= first);
        counts.push(first);
    }
    let mut ratio = 1.0;
    for drop in schedule {
        let rows = visual.iter().zip(&left);
        let could = rows.map(|(&c, &g)| g + kept_of(c, ratio) - kept_of(c, drop.keep));
        let lose = could.min().unwrap_or(0);
        for (c, g) in visual.iter_mut().zip(&mut left) {
            let of_gone = lose.min(*g);
            *g -= of_gone;
            *c = kept_of(*c, ratio) - (lose - of_gone);
        }
        counts.push(lose);
        ratio = drop.keep;
    }
    Ok(counts)
}

/// Of the visual tokens `[L]` of a row, unmarks those behind the first ⌊c·ratio⌋ of the c that
/// there are, and returns their positions, ascending.
pub fn release(visual: &mut [bool], ratio: f64) -> Vec<usize> {
    let places: Vec<usize> = (0..visual.len()).filter(|&i| visual[i]).collect();
    let freed = places[kept_of(places.len(), ratio).min(places.len())..].to_vec();
    for &place in &freed {
        visual[place] = false;
    }
    freed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(drops: &[(usize, f64)]) -> Vec<Drop> {
        let drop = |&(after_layer, keep)| Drop { after_layer, keep };
        drops.iter().map(drop).collect()
    }

    #[test]
    fn ratios_of_what_is_left_end_where_the_public_code_ends() {
        let counts = |n: usize, drops: &[(usize, f64)]| -> Vec<usize> {
            current_drop_counts(&[n], None, &schedule(drops)).unwrap()
        };
        // 37.5 % instead of a quarter, a quarter instead of nothing.
        assert_eq!(counts(640, &[(14, 0.5), (21, 0.25)]), [320, 80]);
        assert_eq!(counts(64, &[(1, 0.5), (2, 0.0)]), [32, 16]);
        // One drop is the method's.
        assert_eq!(counts(35, &[(3, 0.3)]), [25]);
        // 35: ranked 35, kept 24; ranked 16, kept 12; ranked 6, kept 3.
        assert_eq!(counts(35, &[(1, 0.7), (2, 0.5), (4, 0.25)]), [11, 4, 3]);
    }

    #[test]
    fn rows_of_a_batch_lose_the_smallest_number() {
        let drops = schedule(&[(1, 0.5), (2, 0.25)]);
        // 16: 8, then ⌊8·0.5⌋ − ⌊8·0.25⌋ = 2. 8: 4, so 16 keeps 12: could lose 6 − 3; 4: 2 − 1.
        assert_eq!(current_drop_counts(&[16], None, &drops).unwrap(), [8, 2]);
        assert_eq!(current_drop_counts(&[16, 8], None, &drops).unwrap(), [4, 1]);
        assert_eq!(current_drop_counts(&[16, 0], None, &drops).unwrap(), [0, 0]);
        // Discarded ones leave first: 3 of the second row's 5 are left over, and 3 leave.
        let gone = Some(&[2, 5][..]);
        assert_eq!(
            current_drop_counts(&[6, 6], gone, &drops).unwrap(),
            [2, 3, 1]
        );
    }

    #[test]
    fn the_last_of_what_counts_is_text_from_then_on() {
        let mut visual = [false, true, true, false, true, true, true];
        assert_eq!(release(&mut visual, 0.5), [4, 5, 6]);
        assert_eq!(visual, [false, true, true, false, false, false, false]);
        assert!(release(&mut visual, 1.0).is_empty());
        assert_eq!(release(&mut visual, 0.0), [1, 2]);
    }
}
