//! Two towers in one file: one for images, one for clips.

use super::pixels::{pixels_of, second_pixels};
use crate::ir::cone::descendants;
use crate::ir::{Model, ValueId};

/// The name of a tower's pixels, and the outputs that depend on them.
pub(super) type Lane = (String, Vec<ValueId>);

/// Outputs of each tower under the name of its pixels, where a graph takes pixels twice
/// (and no token ids: it is no whole model); the tower for images comes first.
///
/// # Errors
/// Towers that the graph's outputs do not keep apart, in words for people.
pub(super) fn towers_of(model: &Model) -> Option<Result<Vec<Lane>, String>> {
    if model.input("input_ids").is_some() || model.output("logits").is_some() {
        return None;
    }
    let first = pixels_of(model)?;
    let second = second_pixels(model, first)?;
    let mut pixels = [first, second];
    let rank = |v: &ValueId| {
        let shape = model.value(*v).ty.as_ref().and_then(|t| t.shape());
        (
            shape.map_or(0, <[_]>::len),
            model.name(*v).contains("video"),
        )
    };
    pixels.sort_by_key(rank);
    let reached = pixels.map(|p| descendants(model, &[p], false));
    let mut groups: Vec<Lane> = pixels
        .iter()
        .map(|p| (model.name(*p).to_owned(), Vec::new()))
        .collect();
    let twice = format!(
        "it takes pixels twice, '{}' and '{}'",
        model.name(first),
        model.name(second)
    );
    for &output in &model.graph().outputs {
        match [0, 1].map(|i| reached[i].contains(&output)) {
            [true, false] => groups[0].1.push(output),
            [false, true] => groups[1].1.push(output),
            [true, true] => {
                return Some(Err(format!(
                    "{twice}, and its output '{}' depends on both: give each tower an output of its own, or \
                     export a file for each",
                    model.name(output)
                )));
            }
            [false, false] => {
                return Some(Err(format!(
                    "{twice}, and its output '{}' depends on neither",
                    model.name(output)
                )));
            }
        }
    }
    if let Some((name, _)) = groups.iter().find(|(_, outputs)| outputs.is_empty()) {
        return Some(Err(format!("{twice}, and no output depends on '{name}'")));
    }
    Some(Ok(groups))
}
