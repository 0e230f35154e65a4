//! How many tokens leave at each drop point, and which are ranked there.

use ndarray::ArrayView1;

use super::decoder::ReferenceDecoder;
use super::step::StepIn;
use crate::passes::{RatioBase, TextQueries};
use crate::validate::{ValidateError, oracle};

impl ReferenceDecoder {
    /// Tokens that all rows lose at each drop point.
    pub(super) fn losses(&self, input: &StepIn) -> Result<Vec<usize>, ValidateError> {
        let count = |row: ArrayView1<'_, bool>| row.iter().filter(|v| **v).count();
        let entered: Vec<usize> = input.visual.outer_iter().map(count).collect();
        let gone: Vec<usize> = input.gone.outer_iter().map(count).collect();
        let drops = self.prune.iter().flat_map(|p| &p.drops);
        let schedule: Vec<oracle::Drop> = drops
            .map(|d| oracle::Drop {
                after_layer: d.after_layer,
                keep: d.keep,
            })
            .collect();
        Ok(match (self.placed, self.current()) {
            (placed, true) => {
                let gone = placed.then_some(gone.as_slice());
                oracle::current_drop_counts(&entered, gone, &schedule)?
            }
            (true, false) => oracle::placed_drop_counts(&entered, &gone, &schedule)?,
            (false, false) => oracle::drop_counts(&entered, &schedule)?,
        })
    }

    /// Whether ratios are of what counts as visual at a drop point.
    fn current(&self) -> bool {
        let prune = self.prune.as_ref();
        prune.is_some_and(|p| p.ratio_base == RatioBase::Current)
    }

    fn asks_all(&self) -> bool {
        let prune = self.prune.as_ref();
        prune.is_none_or(|p| p.text == TextQueries::All)
    }

    /// The rows of a batch in which a visual token asks, for want of text behind it.
    pub(super) fn wanting(&self, asking: &[Vec<usize>], visual: &[Vec<bool>]) -> Vec<bool> {
        let rows = asking.iter().zip(visual);
        let none = rows.map(|(asking, visual)| asking.iter().all(|at| visual[*at]));
        none.map(|none| none && self.asks_all()).collect()
    }

    /// With `ratio_base: current`, makes text of the visual tokens of a row that are not
    /// ranked at the drop point that ends stage `number`. `asking`: the tokens that ask, and
    /// whether these do for want of text.
    pub(super) fn release(
        &self,
        number: usize,
        visual: &mut [bool],
        (asking, wanting): (&mut Vec<usize>, &mut bool),
    ) {
        if !self.current() {
            return;
        }
        let drops = self.prune.as_ref().map_or(&[][..], |p| &p.drops);
        let before = number.checked_sub(1 + usize::from(self.placed));
        let ratio = before.and_then(|at| drops.get(at)).map_or(1.0, |d| d.keep);
        let freed = oracle::release(visual, ratio);
        if freed.is_empty() || !self.asks_all() {
            return;
        }
        if *wanting {
            asking.clear();
            *wanting = false;
        }
        asking.extend(freed);
        asking.sort_unstable();
    }
}
