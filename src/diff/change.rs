//! Building changes, and putting the same change at several places together.

use std::collections::HashMap;

use super::report::{Change, Class, Kind, Place, Spot, WeightChange};

impl Change {
    /// A change without places.
    pub(super) fn new(class: Class, kind: Kind, title: impl Into<String>) -> Self {
        Self {
            class,
            kind,
            title: title.into(),
            before: None,
            after: None,
            subject: None,
            pass: None,
            places: Vec::new(),
            ignored: None,
            weights: None,
            context: None,
        }
    }

    /// With what was there before and is there now; empty text for nothing.
    pub(super) fn values(mut self, before: impl Into<String>, after: impl Into<String>) -> Self {
        let some = |text: String| (!text.is_empty()).then_some(text);
        self.before = some(before.into());
        self.after = some(after.into());
        self
    }

    /// With the name of the part that changed.
    pub(super) fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// At one more place.
    pub(super) fn at(mut self, place: Place) -> Self {
        self.places.push(place);
        self
    }
}

impl Spot {
    /// A value.
    pub(super) fn value(name: impl Into<String>) -> Self {
        Self {
            value: Some(name.into()),
            ..Self::default()
        }
    }
}

/// Text up to a length that a line bears, cut in the middle of nothing.
pub(super) fn short(text: &str) -> String {
    const LENGTH: usize = 60;
    if text.chars().count() <= LENGTH {
        return text.to_owned();
    }
    let start: String = text.chars().take(LENGTH).collect();
    format!("{start}…")
}

/// What became of something that only one side has, or that both have.
pub(super) fn fate<T>(old: Option<T>, new: Option<T>) -> &'static str {
    match (old, new) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    }
}

/// Puts changes that say the same together, and orders all by class, keeping
/// the order in which they were found otherwise.
pub(super) fn group(found: Vec<Change>) -> Vec<Change> {
    type Key = (Class, Kind, String, [Option<String>; 4]);
    let mut index: HashMap<Key, usize> = HashMap::new();
    let mut all: Vec<Change> = Vec::new();
    for change in found {
        // A title that was cut does not say all.
        let cut = change.title.contains('…');
        let whole = |text: &Option<String>| text.clone().filter(|_| cut);
        let key = (
            change.class,
            change.kind,
            change.title.clone(),
            [
                change.pass.clone(),
                change.ignored.clone(),
                whole(&change.before),
                whole(&change.after),
            ],
        );
        match index.get(&key) {
            Some(&at) => {
                let into = &mut all[at];
                into.places.extend(change.places);
                if into.subject != change.subject {
                    into.subject = None;
                }
                if into.before != change.before || into.after != change.after {
                    into.before = None;
                    into.after = None;
                }
                into.weights = match (into.weights.take(), change.weights) {
                    (Some(one), Some(other)) => Some(worst(one, other)),
                    (one, other) => one.or(other),
                };
                if into.context.is_none() {
                    into.context = change.context;
                }
            }
            None => {
                index.insert(key, all.len());
                all.push(change);
            }
        }
    }
    for change in &mut all {
        if change.places.is_empty() {
            change.places.push(Place::default());
        }
    }
    all.sort_by_key(|c| c.class);
    all
}

/// Two weight changes as one: counts add up, distances are the larger ones.
pub(super) fn worst(one: WeightChange, other: WeightChange) -> WeightChange {
    let larger = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    };
    let root = |a: Option<f64>, b: Option<f64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.hypot(b)),
        (a, b) => a.or(b),
    };
    let same = one.dims_a == other.dims_a && one.dims_b == other.dims_b;
    WeightChange {
        dims_a: if same { one.dims_a } else { Vec::new() },
        dims_b: if same { one.dims_b } else { Vec::new() },
        dtype_a: one.dtype_a,
        dtype_b: one.dtype_b,
        elements: one.elements + other.elements,
        changed: one.changed + other.changed,
        beyond: one.beyond + other.beyond,
        first: None,
        max_abs: larger(one.max_abs, other.max_abs),
        max_rel: larger(one.max_rel, other.max_rel),
        norm_a: root(one.norm_a, other.norm_a),
        norm_b: root(one.norm_b, other.norm_b),
        norm_diff: root(one.norm_diff, other.norm_diff),
        non_finite: one.non_finite + other.non_finite,
        signs_of_zero: one.signs_of_zero + other.signs_of_zero,
    }
}
