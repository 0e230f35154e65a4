//! Both graphs around a change, for renderings that draw them.

use std::collections::{BTreeSet, HashMap};

use super::compare::{Comparer, op};
use super::report::{Change, Class, Context, ContextNode, NodeState, Spot};
use super::side::Side;
use crate::ir::{Def, NodeId};

/// A context of more nodes than this says less, not more.
const LARGEST: usize = 60;

/// What is needed to draw contexts once changes are grouped.
pub(super) struct Contexts {
    reach: usize,
    a: Drawing,
    b: Drawing,
}

/// One side's nodes.
struct Drawing {
    nodes: Vec<ContextNode>,
    /// Neighbours: producers and readers.
    near: Vec<Vec<usize>>,
    /// By name, or by first output where there is none.
    named: HashMap<(String, String), usize>,
}

impl Contexts {
    pub(super) fn new(c: &Comparer<'_, '_>, reach: usize) -> Self {
        let modified = |x: NodeId| c.modified.contains(&x);
        let of_a = |x: NodeId| match c.pairs.node_b[x.index()] {
            Some(_) if modified(x) => (NodeState::Modified, Some(x.index() as u32)),
            Some(_) => (NodeState::Same, Some(x.index() as u32)),
            None => (NodeState::Removed, None),
        };
        let of_b = |y: NodeId| match c.pairs.node_a[y.index()] {
            Some(x) if modified(x) => (NodeState::Modified, Some(x.index() as u32)),
            Some(x) => (NodeState::Same, Some(x.index() as u32)),
            None => (NodeState::Added, None),
        };
        Self {
            reach,
            a: draw(c.a, reach, &of_a),
            b: draw(c.b, reach, &of_b),
        }
    }

    /// Gives changes of structure and weights the graphs around their first place.
    pub(super) fn fill(&self, changes: &mut [Change]) {
        if self.reach == 0 {
            return;
        }
        for change in changes.iter_mut() {
            if !matches!(change.class, Class::Structure | Class::Weights) {
                continue;
            }
            let Some(place) = change.places.first() else {
                continue;
            };
            let a = self
                .a
                .around(place.removed.iter().chain(&place.a), self.reach);
            let b = self
                .b
                .around(place.added.iter().chain(&place.b), self.reach);
            // Where one side has no node of its own, its side of the border is shown.
            let a = if a.is_empty() { self.a.same_as(&b) } else { a };
            let b = if b.is_empty() { self.b.same_as(&a) } else { b };
            if !a.is_empty() || !b.is_empty() {
                change.context = Some(Context { a, b });
            }
        }
    }
}

fn draw(
    side: &Side<'_>,
    reach: usize,
    state: &dyn Fn(NodeId) -> (NodeState, Option<u32>),
) -> Drawing {
    let mut drawing = Drawing {
        nodes: Vec::new(),
        near: Vec::new(),
        named: HashMap::new(),
    };
    if reach == 0 {
        return drawing;
    }
    let mut index: HashMap<NodeId, usize> = HashMap::new();
    for (id, _) in side.model.graphs() {
        for node in side.nodes(id) {
            let at = drawing.nodes.len();
            index.insert(node, at);
            let n = side.model.node(node);
            let (state, pair) = state(node);
            let names = |list: &[Option<crate::ir::ValueId>]| {
                let name = |v: &Option<crate::ir::ValueId>| {
                    v.map_or("", |v| side.model.name(v)).to_owned()
                };
                list.iter().map(name).collect::<Vec<String>>()
            };
            let shown = ContextNode {
                pair,
                state,
                op: op(side, node),
                name: n.name.clone(),
                inputs: names(&n.inputs),
                outputs: names(&n.outputs),
            };
            let output = if n.name.is_empty() {
                shown.outputs.first().cloned()
            } else {
                None
            };
            drawing
                .named
                .insert((n.name.clone(), output.unwrap_or_default()), at);
            drawing.nodes.push(shown);
            drawing.near.push(Vec::new());
            for value in n.inputs.iter().flatten() {
                if let Def::Node { node: producer, .. } = side.model.value(*value).def
                    && let Some(&from) = index.get(&producer)
                {
                    drawing.near[at].push(from);
                    drawing.near[from].push(at);
                }
            }
        }
    }
    drawing
}

impl Drawing {
    /// Nodes up to `reach` steps from some places.
    fn around<'p>(&self, places: impl Iterator<Item = &'p Spot>, reach: usize) -> Vec<ContextNode> {
        let find = |spot: &Spot| {
            let name = spot.node.clone()?;
            let output = if name.is_empty() {
                spot.value.clone()
            } else {
                None
            };
            self.named.get(&(name, output.unwrap_or_default())).copied()
        };
        let mut shown: BTreeSet<usize> = places.filter_map(find).take(LARGEST).collect();
        let mut edge: Vec<usize> = shown.iter().copied().collect();
        for _ in 0..reach {
            let mut next = Vec::new();
            for node in &edge {
                for &near in &self.near[*node] {
                    if shown.len() < LARGEST && shown.insert(near) {
                        next.push(near);
                    }
                }
            }
            edge = next;
        }
        shown.into_iter().map(|i| self.nodes[i].clone()).collect()
    }

    /// This side's counterparts of the other side's nodes.
    fn same_as(&self, other: &[ContextNode]) -> Vec<ContextNode> {
        let pairs: BTreeSet<u32> = other.iter().filter_map(|n| n.pair).collect();
        let own = self
            .nodes
            .iter()
            .filter(|n| n.pair.is_some_and(|p| pairs.contains(&p)));
        own.cloned().collect()
    }
}
