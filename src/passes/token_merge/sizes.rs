//! Token counts of a merge: numbers where the file fixes how many tokens there are, else
//! computed when the graph runs.

use super::{MergeBudget, Selector, TokenMerge};
use crate::ir::{Patch, Size};
use crate::passes::recipe::Count;

/// The counts of a [`MergeBudget`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Tokens chosen among, N.
    pub(super) all: Size,
    /// Of these, tokens kept as they are.
    pub(super) dominant: Size,
    /// Contextual tokens; a known 0 where there never are any.
    pub(super) contextual: Size,
    /// Residual tokens that take part.
    pub(super) pool: Size,
    /// Whether CLS comes first.
    pub(super) cls: bool,
}

impl Sizes {
    /// Counts that are known.
    pub(super) fn known(budget: MergeBudget) -> Self {
        Self {
            all: Size::Known(budget.patches),
            dominant: Size::Known(budget.dominant),
            contextual: Size::Known(budget.contextual),
            pool: Size::Known(budget.pool),
            cls: budget.cls,
        }
    }

    /// Counts for N ≥ 1 tokens of a tower without CLS, as [`merge_budget`](super::merge_budget)
    /// has them, with two differences that only the run makes necessary. One token is kept where
    /// ratios of a small N come to none at all. And the pool is that of one contextual token where
    /// there is none, so that no operator behind it meets an empty axis; what is made of it is
    /// cut off.
    pub(super) fn computed(patch: &mut Patch<'_>, merge: &TokenMerge, all: Size) -> Self {
        let none = Size::Known(0);
        let one = Size::Known(1);
        let mut asked = |count: Count| match count {
            Count::Tokens(n) => Size::Known(n),
            Count::Ratio(r) if r >= 1.0 => all,
            Count::Ratio(r) if r <= 0.0 => none,
            Count::Ratio(r) => patch.size_scaled(all, r),
        };
        let (dominant, contextual) = (asked(merge.dominant), asked(merge.contextual));
        let least = |patch: &mut Patch<'_>, size: Size, most: Size| match size {
            Size::Known(0) => none,
            size if size == most => size,
            size => patch.size_min(size, most),
        };
        let mut dominant = least(patch, dominant, all);
        let residual = match dominant {
            whole if whole == all => none,
            Size::Known(0) => all,
            some => patch.size_sub(all, some),
        };
        let contextual = match residual {
            Size::Known(0) => none,
            residual => least(patch, contextual, residual),
        };
        let surely = matches!(merge.dominant, Count::Tokens(1..)) || dominant == all;
        if !surely {
            let missing = patch.size_sub(one, contextual);
            dominant = patch.size_max(dominant, missing);
        }
        let pool = match (contextual, merge.selector) {
            (Size::Known(0), _) => none,
            (_, Selector::Attention) => {
                let served = patch.size_max(contextual, one);
                let wide = patch.size_mul(served, Size::Known(merge.cluster_width));
                let left = patch.size_sub(all, dominant);
                patch.size_min(wide, left)
            }
            (_, Selector::Uniform | Selector::Local) => patch.size_sub(all, dominant),
        };
        Self {
            all,
            dominant,
            contextual,
            pool,
            cls: false,
        }
    }

    /// Contextual tokens and pool as numbers, where they are.
    pub(super) fn fixed(&self) -> Option<(i64, i64)> {
        match (self.contextual, self.pool) {
            (Size::Known(contextual), Size::Known(pool)) => Some((contextual, pool)),
            _ => None,
        }
    }
}
