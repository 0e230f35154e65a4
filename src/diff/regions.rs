//! Nodes that only one side has, put together to what happened: something was
//! inserted, taken out, replaced, or inserted by one of our passes.
//!
//! Nodes that feed each other are one region, and so are old and new nodes that
//! feed the same input of a node that is in both. Inputs that are redirected to or
//! from a region belong to it; the others are changes of their own.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::compare::{Comparer, Reader, Wire, op, spot};
use super::report::{Change, Class, Kind, Place, Spot};
use super::side::Side;
use crate::ir::{Def, GraphId, NodeId, ValueId};

/// Operators that a title names.
const NAMED: usize = 6;

/// Old and new nodes of one place.
#[derive(Default)]
struct Region {
    removed: Vec<NodeId>,
    added: Vec<NodeId>,
    wires: Vec<Wire>,
}

/// Sets that grow together.
struct Union(Vec<usize>);

impl Union {
    fn find(&mut self, mut at: usize) -> usize {
        while self.0[at] != at {
            self.0[at] = self.0[self.0[at]];
            at = self.0[at];
        }
        at
    }

    fn join(&mut self, x: usize, y: usize) {
        let (x, y) = (self.find(x), self.find(y));
        self.0[x.max(y)] = x.min(y);
    }
}

/// Everything that a node reads, in its bodies as well.
pub(super) fn reads(side: &Side<'_>, node: NodeId) -> Vec<ValueId> {
    let mut found: Vec<ValueId> = side
        .model
        .node(node)
        .inputs
        .iter()
        .flatten()
        .copied()
        .collect();
    for body in side.model.node(node).subgraphs() {
        let graph = side.model.subgraph(body);
        found.extend(&graph.outputs);
        for inner in &graph.nodes {
            found.extend(reads(side, *inner));
        }
    }
    found
}

/// The node of `graph` that produces a value and has no pair.
fn lonely(
    side: &Side<'_>,
    index: &HashMap<NodeId, usize>,
    graph: GraphId,
    v: Option<ValueId>,
) -> Option<usize> {
    let Def::Node { node, .. } = side.model.value(v?).def else {
        return None;
    };
    index.get(&side.ancestor(node, graph)?).copied()
}

/// Tells what happened to the unmatched nodes of a pair of graphs, and to inputs
/// that were redirected. `cache`: layers by caches, for side B.
pub(super) fn tell(c: &mut Comparer<'_, '_>, graphs: (GraphId, GraphId), cache: &[Option<u32>]) {
    let wires = std::mem::take(&mut c.wires);
    let open = |side: &Side<'_>, graph, pair: &[Option<NodeId>]| -> Vec<NodeId> {
        let all = side.nodes(graph);
        all.into_iter()
            .filter(|n| pair[n.index()].is_none())
            .collect()
    };
    let only_a = open(c.a, graphs.0, &c.pairs.node_b);
    let only_b = open(c.b, graphs.1, &c.pairs.node_a);
    let index_a: HashMap<NodeId, usize> = only_a.iter().enumerate().map(|(i, n)| (*n, i)).collect();
    let index_b: HashMap<NodeId, usize> = only_b
        .iter()
        .enumerate()
        .map(|(i, n)| (*n, only_a.len() + i))
        .collect();
    let mut union = Union((0..only_a.len() + only_b.len()).collect());
    for (side, graph, index) in [(c.a, graphs.0, &index_a), (c.b, graphs.1, &index_b)] {
        for (&node, &at) in index {
            for value in reads(side, node) {
                if let Some(other) = lonely(side, index, graph, Some(value)) {
                    union.join(at, other);
                }
            }
        }
    }
    let mut owners = Vec::with_capacity(wires.len());
    for wire in &wires {
        let old = lonely(c.a, &index_a, graphs.0, wire.a);
        let new = lonely(c.b, &index_b, graphs.1, wire.b);
        if let (Some(old), Some(new)) = (old, new) {
            union.join(old, new);
        }
        owners.push(old.or(new));
    }
    let mut regions: BTreeMap<usize, Region> = BTreeMap::new();
    for (i, node) in only_a.iter().enumerate() {
        regions
            .entry(union.find(i))
            .or_default()
            .removed
            .push(*node);
    }
    for (i, node) in only_b.iter().enumerate() {
        regions
            .entry(union.find(only_a.len() + i))
            .or_default()
            .added
            .push(*node);
    }
    let mut loose = Vec::new();
    for (wire, owner) in wires.into_iter().zip(owners) {
        match owner {
            Some(at) => regions.entry(union.find(at)).or_default().wires.push(wire),
            None => loose.push(wire),
        }
    }
    rewrites(c, &mut regions, cache);
    for region in regions.into_values() {
        told(c, graphs.1, region);
    }
    for wire in loose {
        rewired(c, graphs, wire);
    }
}

/// Takes what our passes inserted out of the regions, one change for each scope.
fn rewrites(
    c: &mut Comparer<'_, '_>,
    regions: &mut BTreeMap<usize, Region>,
    cache: &[Option<u32>],
) {
    let mut scopes: BTreeMap<(String, String), Region> = BTreeMap::new();
    for region in regions.values_mut() {
        let of_pass = |n: &NodeId| c.b.model.node(*n).pass.is_some();
        if !region.added.iter().any(of_pass) {
            continue;
        }
        let (ours, rest): (Vec<NodeId>, Vec<NodeId>) =
            region.added.iter().partition(|n| of_pass(n));
        region.added = rest;
        let first = scope(c.b, ours[0]);
        for node in ours {
            scopes.entry(scope(c.b, node)).or_default().added.push(node);
        }
        if !region.added.is_empty() {
            continue;
        }
        // What a pass made superfluous or redirected is part of it: of the scope that
        // feeds what the node fed.
        let mut instead: HashMap<NodeId, (String, String)> = HashMap::new();
        let producer = |side: &Side<'_>, v: Option<ValueId>| match side.model.value(v?).def {
            Def::Node { node, .. } => Some(node),
            _ => None,
        };
        for wire in std::mem::take(&mut region.wires) {
            let new = producer(c.b, wire.b).filter(of_pass);
            let of = new.map_or_else(|| first.clone(), |n| scope(c.b, n));
            if let Some(old) = producer(c.a, wire.a) {
                instead.entry(old).or_insert_with(|| of.clone());
            }
            scopes.entry(of).or_default().wires.push(wire);
        }
        for node in std::mem::take(&mut region.removed).into_iter().rev() {
            let of = instead.get(&node).unwrap_or(&first).clone();
            for value in reads(c.a, node) {
                if let Some(before) = producer(c.a, Some(value)) {
                    instead.entry(before).or_insert_with(|| of.clone());
                }
            }
            scopes.entry(of).or_default().removed.insert(0, node);
        }
    }
    regions.retain(|_, r| !r.removed.is_empty() || !r.added.is_empty() || !r.wires.is_empty());
    for region in scopes.values_mut() {
        region.added.sort();
    }
    let mut scopes: Vec<_> = scopes.into_iter().collect();
    scopes.sort_by_key(|(_, region)| region.added.first().copied());
    for ((pass, part), region) in scopes {
        let layer = region.added.iter().filter_map(|n| cache[n.index()]).min();
        let what = if part.is_empty() {
            format!("duet/{pass}")
        } else {
            format!("duet/{pass}/{part}")
        };
        let at = match layer {
            Some(layer) if layer > 0 => format!(" after layer {layer}"),
            _ => String::new(),
        };
        let mut title = format!("{what} inserted{at} ({})", nodes(region.added.len()));
        if !region.removed.is_empty() {
            title = format!("{title}, {} removed", nodes(region.removed.len()));
        }
        let mut change = Change::new(Class::Structure, Kind::Rewrite, title).subject(part);
        change.pass = Some(pass);
        let mut place = place(c, &region);
        place.layer = layer;
        c.found.push(change.at(place));
    }
}

/// Pass and part of it that a node's name says: `duet/<pass>/<part>/…`.
fn scope(side: &Side<'_>, node: NodeId) -> (String, String) {
    let node = side.model.node(node);
    let mut parts = node.name.split('/').skip(2);
    let part = parts
        .next()
        .filter(|_| parts.next().is_some())
        .unwrap_or("");
    (node.pass.clone().unwrap_or_default(), part.to_owned())
}

fn nodes(count: usize) -> String {
    if count == 1 {
        "1 node".into()
    } else {
        format!("{count} nodes")
    }
}

/// Operators of nodes, in order of appearance: `Cast, Mul ×2, Add`.
fn operators(side: &Side<'_>, list: &[NodeId]) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for node in list {
        let name = op(side, *node);
        match counts.iter_mut().find(|(n, _)| *n == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    let more = counts.len().saturating_sub(NAMED);
    let shown = counts.iter().take(NAMED).map(|(name, count)| match count {
        1 => name.clone(),
        n => format!("{name} ×{n}"),
    });
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if more > 0 {
        text = format!("{text} and {more} other operators");
    }
    text
}

fn told(c: &mut Comparer<'_, '_>, graph: GraphId, region: Region) {
    let (old, new) = (
        operators(c.a, &region.removed),
        operators(c.b, &region.added),
    );
    let (count_a, count_b) = (region.removed.len(), region.added.len());
    let several = |count: usize, list: &str| {
        if count > 1 {
            format!("{} ({list})", nodes(count))
        } else {
            list.to_owned()
        }
    };
    let (kind, title) = match (count_a, count_b) {
        (0, n) => {
            let between = between(c, graph, &region);
            let title = match n {
                1 => format!("{new} inserted{between}"),
                n => format!("{} inserted{between}: {new}", nodes(n)),
            };
            (Kind::NodesAdded, title)
        }
        (n, 0) => {
            let title = match n {
                1 => format!("{old} removed"),
                n => format!("{} removed: {old}", nodes(n)),
            };
            (Kind::NodesRemoved, title)
        }
        (n, 1) if n > 1 => (
            Kind::NodesReplaced,
            format!("{} fused into {new}", several(n, &old)),
        ),
        (1, n) if n > 1 => (
            Kind::NodesReplaced,
            format!("{old} split into {}", several(n, &new)),
        ),
        (n, m) => {
            let title = format!("{} replaced by {}", several(n, &old), several(m, &new));
            (Kind::NodesReplaced, title)
        }
    };
    let place = place(c, &region);
    let change = Change::new(Class::Structure, kind, title).values(old, new);
    c.found.push(change.at(place));
}

/// `between MatMul and Add`, where inserted nodes have one operator at each end.
fn between(c: &Comparer<'_, '_>, graph: GraphId, region: &Region) -> String {
    let inside: BTreeSet<NodeId> = region.added.iter().copied().collect();
    let mut before = BTreeSet::new();
    for node in &region.added {
        for value in reads(c.b, *node) {
            if c.b.constant_of[value.index()].is_some() {
                continue;
            }
            match c.b.model.value(value).def {
                Def::Node { node, .. } if inside.contains(&node) => {}
                Def::Node { node, .. } => drop(before.insert(op(c.b, node))),
                _ => drop(before.insert(format!("'{}'", c.b.model.name(value)))),
            }
        }
    }
    let behind: BTreeSet<String> = region
        .wires
        .iter()
        .map(|w| match w.reader {
            Reader::Node(_, y, ..) => op(c.b, y),
            Reader::Output(_, k) => {
                let output = c.b.model.subgraph(graph).outputs.get(k);
                format!("output '{}'", output.map_or("", |v| c.b.model.name(*v)))
            }
        })
        .collect();
    match (before.first(), behind.first()) {
        (Some(x), Some(y)) if before.len() == 1 && behind.len() == 1 => {
            format!(" between {x} and {y}")
        }
        (Some(x), None) if before.len() == 1 => format!(" after {x}"),
        (_, Some(y)) if behind.len() == 1 => format!(" before {y}"),
        _ => String::new(),
    }
}

/// Where a region is: its nodes, and the first input that it feeds.
fn place(c: &Comparer<'_, '_>, region: &Region) -> Place {
    let mut place = c.place(
        region.removed.first().copied(),
        region.added.first().copied(),
    );
    place.removed = region.removed.iter().map(|n| spot(c.a, *n)).collect();
    place.added = region.added.iter().map(|n| spot(c.b, *n)).collect();
    if region.removed.is_empty()
        && place.layer.is_none()
        && let Some(Reader::Node(x, ..)) = region.wires.first().map(|w| w.reader)
    {
        place.layer = c.layers.0[x.index()];
    }
    place
}

/// An input, or an output of a pair of graphs, that another value takes.
fn rewired(c: &mut Comparer<'_, '_>, graphs: (GraphId, GraphId), wire: Wire) {
    let source = |side: &Side<'_>, v: Option<ValueId>| -> String {
        let Some(v) = v else {
            return "nothing".into();
        };
        if side.constant_of[v.index()].is_some() {
            return "a constant".into();
        }
        match side.model.value(v).def {
            Def::Node { node, slot } => {
                let output = if slot > 0 {
                    format!(" (output {slot})")
                } else {
                    String::new()
                };
                format!("{}{output}", op(side, node))
            }
            Def::Input => format!("input '{}'", side.model.name(v)),
            _ => format!("'{}'", side.model.name(v)),
        }
    };
    let (old, new) = (source(c.a, wire.a), source(c.b, wire.b));
    let arrow = if old == new {
        format!("another {new}")
    } else {
        format!("{old} → {new}")
    };
    let name = |side: &Side<'_>, v: Option<ValueId>| v.map(|v| side.model.name(v).to_owned());
    let (value_a, value_b) = (name(c.a, wire.a), name(c.b, wire.b));
    match wire.reader {
        Reader::Node(x, y, slot, other) => {
            let mut place = c.place(Some(x), Some(y));
            let set = |spot: &mut Option<Spot>, slot, value: &Option<String>| {
                if let Some(spot) = spot {
                    spot.slot = Some(slot);
                    spot.value.clone_from(value);
                }
            };
            set(&mut place.a, slot, &value_a);
            set(&mut place.b, other, &value_b);
            let constant = |side: &Side<'_>, v: Option<ValueId>| {
                v.is_some_and(|v| side.constant_of[v.index()].is_some())
            };
            let one = constant(c.a, wire.a) != constant(c.b, wire.b);
            let both = wire.a.is_some() && wire.b.is_some();
            let kind = if one && both {
                Kind::WeightSource
            } else {
                Kind::Rewired
            };
            let title = format!(
                "input {slot} of {} comes from elsewhere: {arrow}",
                op(c.a, x)
            );
            let change = Change::new(Class::Structure, kind, title);
            let text = |t: Option<String>| t.unwrap_or_default();
            c.found
                .push(change.values(text(value_a), text(value_b)).at(place));
        }
        Reader::Output(i, j) => {
            let of = |side: &Side<'_>, graph: GraphId, k: usize| {
                let output = side.model.subgraph(graph).outputs.get(k).copied();
                output.map_or(String::new(), |v| side.model.name(v).to_owned())
            };
            let (name_a, name_b) = (of(c.a, graphs.0, i), of(c.b, graphs.1, j));
            let title = format!("output '{name_b}' is computed by another node: {arrow}");
            let change = Change::new(Class::Structure, Kind::OutputRewired, title).subject(&name_b);
            let place = Place {
                graph: c.a.way(graphs.0),
                a: Some(Spot::value(name_a)),
                b: Some(Spot::value(name_b)),
                ..Place::default()
            };
            let text = |t: Option<String>| t.unwrap_or_default();
            c.found
                .push(change.values(text(value_a), text(value_b)).at(place));
        }
    }
}
