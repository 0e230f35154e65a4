//! Quantisation annotations: which tensors are scale and zero point of a value.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::change::fate;
use super::compare::Comparer;
use super::report::{Change, Class, Kind, Place, Spot};
use super::side::Side;
use crate::ir::{GraphId, ValueId};

/// What an annotation says, in terms that are the same on both sides.
type Said = BTreeSet<(String, String)>;

/// Compares the annotations of all graphs.
pub(super) fn compare(c: &mut Comparer<'_, '_>) {
    // Values that are in both are told by A's ids, constants too where a node reads
    // both; else these are told by their contents.
    let (mut of_a, mut of_b) = (HashMap::new(), HashMap::new());
    for (v, w) in &c.constants {
        if let (Entry::Vacant(a), Entry::Vacant(b)) = (of_a.entry(*v), of_b.entry(*w)) {
            a.insert(*v);
            b.insert(*v);
        }
    }
    let on_a = |v: ValueId| {
        let constant = of_a.get(&v).copied();
        constant.or(c.pairs.value_b[v.index()].map(|_| v))
    };
    let on_b = |v: ValueId| {
        let constant = of_b.get(&v).copied();
        constant.or(c.pairs.value_a[v.index()])
    };
    let (of_a, of_b) = (said(c.a, &on_a), said(c.b, &on_b));
    let mut found = Vec::new();
    for what in of_a.keys().chain(of_b.keys()).collect::<BTreeSet<_>>() {
        let (old, new) = (of_a.get(what), of_b.get(what));
        if old.map(|o| &o.1) == new.map(|n| &n.1) {
            continue;
        }
        let title = format!("quantisation annotations of values {}", fate(old, new));
        let spot = |s: Option<&(String, Said)>| s.map(|(name, _)| Spot::value(name));
        let place = Place {
            a: spot(old),
            b: spot(new),
            ..Place::default()
        };
        found.push(Change::new(Class::Structure, Kind::Quantization, title).at(place));
    }
    c.found.extend(found);
}

/// Annotations by annotated value, with the value's name.
fn said(
    side: &Side<'_>,
    paired: &dyn Fn(ValueId) -> Option<ValueId>,
) -> BTreeMap<String, (String, Said)> {
    let mut all = BTreeMap::new();
    for (id, _) in side.model.graphs() {
        let annotations = &side.graphs[id.index()].quantization;
        if annotations.is_empty() {
            continue;
        }
        let names = names(side, id);
        let identity = |name: &str| match names.get(name) {
            Some(v) => match (side.constant(*v), paired(*v)) {
                (_, Some(pair)) => format!("value {pair}"),
                (Some(constant), None) => {
                    let hex: String = constant.digest.iter().map(|b| format!("{b:02x}")).collect();
                    format!("constant {hex}")
                }
                (None, None) => format!("name {name}"),
            },
            None => format!("name {name}"),
        };
        for (tensor, pairs) in annotations {
            let said = pairs.iter().map(|(key, of)| (key.clone(), identity(of)));
            let entry = all
                .entry(identity(tensor))
                .or_insert_with(|| (tensor.clone(), Said::new()));
            entry.1.extend(said);
        }
    }
    all
}

/// Values of a graph by name.
pub(super) fn names(side: &Side<'_>, graph: GraphId) -> HashMap<String, ValueId> {
    let g = side.model.subgraph(graph);
    let outputs = g
        .nodes
        .iter()
        .flat_map(|n| side.model.node(*n).outputs.iter().flatten());
    let all = g.inputs.iter().chain(&g.initializers).chain(outputs);
    all.map(|v| (side.model.name(*v).to_owned(), *v)).collect()
}
