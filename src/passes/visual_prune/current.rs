//! `ratio_base: current`: ratios of what counts as visual at a drop point, as the public
//! code has them for Qwen2.5-VL.
//!
//! ```text
//!  visual [b, L], c in a row ─┬─ the first ⌊c·r⌋ ─▶ ranked, ⌊c·r'⌋ of them stay
//!                             └─ the others ─▶ text from here on
//! ```
//!
//! r is the ratio before the drop point (1 at the first), r' its own. With one drop point
//! this is what the method does.

use super::TextQueries;
use super::stage::{Plan, Stage};
use crate::ir::{DataType, Size, ValueId};

impl Plan<'_, '_> {
    /// How many tokens all rows lose: the smallest of n − `kept` and what is gone.
    pub(super) fn loss(&mut self, n: ValueId, kept: ValueId, gone: Option<ValueId>) -> Size {
        let p = &mut *self.patch;
        let mut could = p.op("Sub", &[n, kept]);
        if let Some(gone) = gone {
            could = p.op("Add", &[could, gone]);
        }
        Size::Value(p.reduce("ReduceMin", could, &[0], true))
    }

    /// Makes text of the visual tokens of `stage` that are not ranked at drop point
    /// `number`, and returns how many tokens are lost there.
    pub(super) fn release(&mut self, number: usize, stage: &mut Stage) -> Size {
        let keep = self.pass.drops[number - 1].keep;
        let before = number
            .checked_sub(2)
            .map_or(1.0, |at| self.pass.drops[at].keep);
        let count = self.count(stage.visual);
        let gone = stage.gone.map(|g| self.count(g));
        let mut ranked = count;
        if before < 1.0 {
            ranked = self.patch.share(count, before);
            let p = &mut *self.patch;
            // (int32, and a cumulative sum over it: what tract types.)
            let flags = p.cast(stage.visual, DataType::Int32);
            let axis = p.i64(1);
            let place = p.op("CumSum", &[flags, axis]);
            let last = p.cast(ranked, DataType::Int32);
            let last = p.unsqueeze(last, &[1]);
            let beyond = p.op("Greater", &[place, last]);
            let freed = p.op("And", &[stage.visual, beyond]);
            let first = p.op("Not", &[beyond]);
            stage.visual = p.op("And", &[stage.visual, first]);
            if self.pass.text == TextQueries::All {
                stage.text = p.op("Or", &[stage.text, freed]);
            }
        }
        let kept = self.patch.share(count, keep);
        self.loss(ranked, kept, gone)
    }
}
