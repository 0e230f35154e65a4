//! Where constants lie, and constants that nothing reads: told, but no difference.

use std::collections::{BTreeMap, BTreeSet};

use super::compare::Comparer;
use super::content::{Data, Digest};
use super::report::{Change, Class, Kind, Place, Spot, StorageNote};
use super::side::Side;
use crate::ir::{Def, ValueId};

/// Tells of constants that correspond and lie elsewhere.
pub(super) fn notes(c: &Comparer<'_, '_>) -> Vec<StorageNote> {
    let mut moved: BTreeMap<(String, String), (usize, u64)> = BTreeMap::new();
    let mut laid: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    let (mut to_node, mut to_initializer) = (0, 0);
    let mut seen = BTreeSet::new();
    for (v, w) in &c.constants {
        let (Some(x), Some(y)) = (c.a.constant(*v), c.b.constant(*w)) else {
            continue;
        };
        if !seen.insert(*w) {
            continue;
        }
        if x.place != y.place {
            let entry = moved.entry((x.place.clone(), y.place.clone())).or_default();
            *entry = (entry.0 + 1, entry.1 + x.data.len());
        } else if let (Data::File(_, start_a, _), Data::File(_, start_b, _)) = (&x.data, &y.data)
            && x.place != super::content::INLINE
            && start_a != start_b
        {
            let entry = laid.entry(x.place.clone()).or_default();
            *entry = (entry.0 + 1, entry.1 + x.data.len());
        }
        let node =
            |side: &Side<'_>, v: &ValueId| matches!(side.model.value(*v).def, Def::Node { .. });
        match (node(c.a, v), node(c.b, w)) {
            (true, false) => to_initializer += 1,
            (false, true) => to_node += 1,
            _ => {}
        }
    }
    let mut notes = Vec::new();
    let tensors = |n: usize| {
        if n == 1 {
            "1 tensor".to_owned()
        } else {
            format!("{n} tensors")
        }
    };
    for ((from, to), (count, size)) in moved {
        let text = format!(
            "{} moved from {from} to {to} ({size} bytes)",
            tensors(count)
        );
        notes.push(StorageNote { text, count });
    }
    for (place, (count, size)) in laid {
        let text = format!(
            "{} at other offsets of {place} ({size} bytes)",
            tensors(count)
        );
        notes.push(StorageNote { text, count });
    }
    for (count, way) in [
        (to_initializer, "from Constant nodes to initializers"),
        (to_node, "from initializers to Constant nodes"),
    ] {
        if count > 0 {
            let plural = if count == 1 { "" } else { "s" };
            let text = format!("{count} constant{plural} moved {way}");
            notes.push(StorageNote { text, count });
        }
    }
    notes
}

/// Tells of initializers that nothing reads, as far as only one side has them.
pub(super) fn unused(c: &mut Comparer<'_, '_>) {
    let of = |side: &Side<'_>| -> BTreeMap<Digest, Vec<String>> {
        let given: BTreeSet<ValueId> = side
            .model
            .graphs()
            .flat_map(|(_, g)| g.outputs.iter().copied())
            .collect();
        let mut found: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (_, graph) in side.model.graphs() {
            for value in &graph.initializers {
                let v = side.model.value(*value);
                if v.uses.is_empty()
                    && v.def == Def::Initializer
                    && !given.contains(value)
                    && let Some(constant) = side.constant(*value)
                {
                    found
                        .entry(constant.digest)
                        .or_default()
                        .push(v.name.clone());
                }
            }
        }
        found
    };
    let (of_a, of_b) = (of(c.a), of(c.b));
    let new = |word: &str| {
        let title = format!("initializer that nothing reads {word}");
        Change::new(Class::Cosmetic, Kind::UnusedInitializer, title)
    };
    let extra = |one: &BTreeMap<Digest, Vec<String>>, other: &BTreeMap<Digest, Vec<String>>| {
        let mut found = Vec::new();
        for (digest, names) in one {
            let there = other.get(digest).map_or(0, Vec::len);
            found.extend(names.iter().skip(there).cloned());
        }
        found
    };
    for name in extra(&of_a, &of_b) {
        let a = Some(Spot::value(name));
        c.found.push(new("removed").at(Place {
            a,
            ..Place::default()
        }));
    }
    for name in extra(&of_b, &of_a) {
        let b = Some(Spot::value(name));
        c.found.push(new("added").at(Place {
            b,
            ..Place::default()
        }));
    }
}
