//! Caches that are filled up to one length (`kv: padded`).

use super::ValidateError;
use crate::passes::FILLER;
use crate::runtime::Value;

/// What the key caches of each layer hold besides filler, if all have one length and filler lies in front, in all rows and
/// heads alike; else nothing, which is no decoder's lengths.
pub(super) fn held<'k>(keys: impl Iterator<Item = &'k Value>) -> Result<Vec<usize>, ValidateError> {
    let mut lengths = Vec::new();
    let mut whole = None;
    for key in keys {
        let length = key.shape()[2];
        match (*whole.get_or_insert(length) == length, held_by(key)?) {
            (true, Some(held)) => lengths.push(held),
            _ => return Ok(Vec::new()),
        }
    }
    Ok(lengths)
}

/// Columns of a key cache `[b, h, S, d]` behind its filler.
fn held_by(key: &Value) -> Result<Option<usize>, ValidateError> {
    let &[batch, heads, length, width] = key.shape() else {
        return Ok(None);
    };
    let all = key.f32s()?;
    let mut filled = None;
    for row in 0..batch * heads {
        let column = |at: usize| &all[(row * length + at) * width..][..width];
        let filler = |at: &usize| column(*at).iter().all(|x| *x == FILLER);
        let front = (0..length).take_while(filler).count();
        let strewn = (front..length).any(|at| column(at).contains(&FILLER));
        if strewn || *filled.get_or_insert(front) != front {
            return Ok(None);
        }
    }
    Ok(Some(length - filled.unwrap_or(0)))
}
