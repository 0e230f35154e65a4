//! Where something is, in words.

use std::collections::BTreeSet;

use super::words::{clean, count};
use crate::diff::report::{Change, Kind, Place, Spot};

/// A node or a value: `Softmax '/layers.3/Softmax', input 0`.
pub(super) fn spot(spot: &Spot) -> String {
    let quoted = |name: &String| format!("'{}'", clean(name));
    let mut text = match (&spot.op, &spot.node) {
        (Some(op), Some(name)) if !name.is_empty() => format!("{} {}", clean(op), quoted(name)),
        // A node without a name is known by what it gives or reads.
        (Some(op), _) => match &spot.value {
            Some(value) if spot.slot.is_none() => {
                return format!("{} of {}", clean(op), quoted(value));
            }
            _ => clean(op),
        },
        (None, Some(name)) if !name.is_empty() => quoted(name),
        _ => String::new(),
    };
    if let Some(slot) = spot.slot {
        text.push_str(&format!(
            "{}input {slot}",
            if text.is_empty() { "" } else { ", " }
        ));
    }
    match &spot.value {
        Some(value) if text.is_empty() => quoted(value),
        _ => text,
    }
}

/// Where a place is: the side that has it now, else the old one.
pub(super) fn place(place: &Place) -> String {
    let mut text = place
        .b
        .as_ref()
        .or(place.a.as_ref())
        .map_or_else(String::new, spot);
    if text.is_empty() {
        let first = place.added.first().or(place.removed.first());
        text = first.map_or_else(String::new, spot);
    }
    if !place.graph.is_empty() {
        let space = if text.is_empty() { "" } else { " " };
        text.push_str(&format!("{space}in {}", clean(&place.graph)));
    }
    text
}

/// Numbers as ranges: `0–11, 13`.
fn ranges(numbers: &BTreeSet<u32>) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut sorted = numbers.iter().copied().peekable();
    while let Some(start) = sorted.next() {
        let mut end = start;
        while let Some(next) = sorted.next_if(|n| *n == end + 1) {
            end = next;
        }
        parts.push(match end - start {
            0 => start.to_string(),
            1 => format!("{start}, {end}"),
            _ => format!("{start}–{end}"),
        });
    }
    parts.join(", ")
}

/// How many layers, and `layer 3`, `layers 0–27`.
fn layers(places: &[&Place]) -> (usize, String) {
    let all: BTreeSet<u32> = places.iter().filter_map(|p| p.layer).collect();
    let s = if all.len() == 1 { "" } else { "s" };
    (all.len(), format!("layer{s} {}", ranges(&all)))
}

/// A place behind a title: what the title says already (operator, input) is not
/// said again, if there is a name to say instead.
fn brief(title: &str, at: &Place) -> String {
    let spots = [&at.b, &at.a].into_iter().flatten();
    let mut spots = spots.chain(at.added.first()).chain(at.removed.first());
    let named = spots.next().filter(|s| {
        let told = s.op.as_ref().is_none_or(|op| title.contains(&clean(op)));
        let slot = s.slot.is_none_or(|n| title.contains(&format!("input {n}")));
        told && slot
    });
    match named
        .and_then(|s| s.node.as_ref())
        .filter(|n| !n.is_empty())
    {
        Some(name) if at.graph.is_empty() => format!("'{}'", clean(name)),
        _ => place(at),
    }
}

/// Names of places in one line before "and so on".
const NAMED: usize = 2;

/// Where a change is, behind its title: `, in layers 0–27`, `, at Softmax 'x'`.
pub(super) fn at(change: &Change) -> String {
    let title = clean(&change.title);
    // What the title names already is not named again.
    let told = |p: &Place| {
        let names = [&p.a, &p.b].into_iter().flatten().filter_map(|s| {
            let node = s.node.as_ref().filter(|n| !n.is_empty());
            node.or(s.value.as_ref())
        });
        let mut names = names.map(|n| format!("'{}'", clean(n))).peekable();
        names.peek().is_some() && names.any(|n| title.contains(&n))
    };
    match change.places.as_slice() {
        [] => String::new(),
        // Names of inserted nodes say nothing that the pass does not; the title has the layer.
        [_] if change.kind == Kind::Rewrite => String::new(),
        [one] if told(one) => layer_of(one),
        [one] => match brief(&title, one) {
            at if at.is_empty() => layer_of(one),
            at => format!(", at {at}{}", layer_of(one)),
        },
        many => {
            let total = many.len();
            // Where most lie in layers, these say more than names.
            let (inside, outside): (Vec<&Place>, Vec<&Place>) =
                many.iter().partition(|p| p.layer.is_some());
            if inside.len() > outside.len() {
                let (distinct, layers) = layers(&inside);
                let elsewhere = match outside.len() {
                    0 => String::new(),
                    n => format!(" and {n} elsewhere"),
                };
                return if distinct == total {
                    format!(", in {layers}")
                } else {
                    format!(", {} times, in {layers}{elsewhere}", count(total as u64))
                };
            }
            let named = many.iter().map(|p| brief(&title, p));
            let named: Vec<String> = named.filter(|p| !p.is_empty()).collect();
            if named.is_empty() {
                return format!(", {} times", count(total as u64));
            }
            let shown = named[..named.len().min(NAMED)].join("; ");
            let more = total - named.len().min(NAMED);
            let rest = match more {
                0 => String::new(),
                n => format!("; and {} more", count(n as u64)),
            };
            format!(", in {} places: {shown}{rest}", count(total as u64))
        }
    }
}

fn layer_of(place: &Place) -> String {
    place
        .layer
        .map_or_else(String::new, |l| format!(" (layer {l})"))
}
