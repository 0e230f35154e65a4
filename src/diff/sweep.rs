//! One round of hashing: what is before and behind each node that has no pair yet.

use std::collections::HashMap;

use super::hash::{Level, Mix, arity, commutes};
use super::side::Side;
use crate::ir::{AttrValue, Def, GraphId, NodeId, ValueId};

/// Stands for the number of an input where a body reads the value.
const CAPTURED: u64 = u64::MAX;

/// Working memory for one side.
pub(super) struct Scratch {
    /// By node: everything before it.
    pub(super) up: Vec<u64>,
    /// By node: everything behind it.
    pub(super) down: Vec<u64>,
    /// What the node is taken as in this sweep.
    pub(super) seed: Vec<u64>,
    /// Round in which `up` was computed.
    pub(super) fresh: Vec<u32>,
    /// Number of the present sweep.
    pub(super) round: u32,
    /// Unmatched nodes in topological order.
    pub(super) left: Vec<NodeId>,
    /// What gives out a value as outputs of the graph.
    pub(super) given: HashMap<ValueId, Vec<u64>>,
}

impl Scratch {
    pub(super) fn new(side: &Side<'_>, graph: GraphId) -> Self {
        let nodes = side.model.node_count();
        Self {
            up: vec![0; nodes],
            down: vec![0; nodes],
            seed: vec![0; nodes],
            fresh: vec![0; nodes],
            round: 0,
            left: side.nodes(graph),
            given: HashMap::new(),
        }
    }
}

/// By level and node: the node by itself ([`Side::node_hash`]).
pub(super) type Own = [Vec<u64>; 3];

/// Hashes of all nodes of a model by themselves.
pub(super) fn own(side: &Side<'_>, function: &dyn Fn(usize) -> u64) -> Own {
    let mut own = Own::default();
    for level in Level::ALL {
        let hashes = &mut own[level as usize];
        hashes.resize(side.model.node_count(), 0);
        for (_, graph) in side.model.graphs() {
            for node in &graph.nodes {
                hashes[node.index()] = side.node_hash(*node, level, function);
            }
        }
    }
    own
}

/// Computes the hashes of one side.
pub(super) struct Sweep<'s, 'm> {
    pub(super) side: &'s Side<'m>,
    pub(super) graph: GraphId,
    pub(super) own: &'s Own,
    pub(super) level: Level,
    /// What stands for a value that is in both.
    pub(super) token: &'s dyn Fn(ValueId) -> Option<u64>,
    /// What stands for a node that is in both.
    pub(super) node: &'s dyn Fn(NodeId) -> Option<u64>,
}

impl Sweep<'_, '_> {
    /// `seeded`: nodes are taken as what [`Scratch::seed`] says.
    pub(super) fn run(&self, scratch: &mut Scratch, seeded: bool) {
        scratch.round += 1;
        if !seeded {
            for node in &scratch.left {
                scratch.seed[node.index()] = self.own[self.level as usize][node.index()];
            }
        }
        let left = std::mem::take(&mut scratch.left);
        for node in &left {
            let seed = scratch.seed[node.index()];
            scratch.up[node.index()] = self.up(*node, seed, scratch);
            scratch.fresh[node.index()] = scratch.round;
        }
        for node in left.iter().rev() {
            scratch.down[node.index()] = self.down(*node, scratch);
        }
        scratch.left = left;
    }

    fn value(&self, v: ValueId, scratch: &Scratch) -> u64 {
        if let Some(constant) = self.side.constant_of[v.index()] {
            return self.side.constant_hash(constant, self.level);
        }
        if let Some(token) = (self.token)(v) {
            return Mix::new(20).with(token).end();
        }
        let value = self.side.model.value(v);
        match value.def {
            Def::Node { node, slot } if scratch.fresh[node.index()] == scratch.round => {
                Mix::new(21)
                    .with(scratch.up[node.index()])
                    .with(slot as u64)
                    .end()
            }
            Def::Node { .. } => 22,
            Def::Input => {
                let mut mix = Mix::new(23);
                let list = &self.side.model.subgraph(value.graph).inputs;
                // Inputs of bodies are told by their place.
                if value.graph != self.graph {
                    mix.add(list.iter().position(|i| *i == v).unwrap_or(0) as u64);
                }
                mix.end()
            }
            Def::Initializer | Def::Opaque | Def::Missing => 24,
        }
    }

    fn up(&self, id: NodeId, seed: u64, scratch: &mut Scratch) -> u64 {
        let node = self.side.model.node(id);
        let mut mix = Mix::new(seed);
        let inputs = node.inputs.iter().take(arity(node));
        let mut tokens: Vec<u64> = inputs
            .map(|v| v.map_or(25, |v| self.value(v, scratch)))
            .collect();
        if commutes(self.side.model, node) {
            tokens.sort_unstable();
        }
        tokens.into_iter().for_each(|t| mix.add(t));
        // Attributes are in no order: each body counts with its attribute's name.
        let mut bodies = 0u64;
        for attribute in &node.attributes {
            let graphs = match &attribute.value {
                AttrValue::Graph(g) => std::slice::from_ref(g),
                AttrValue::Graphs(list) => list.as_slice(),
                _ => continue,
            };
            let mut of = Mix::new(30);
            of.bytes(attribute.name.as_bytes());
            for g in graphs {
                let body = self.body(*g, scratch);
                of.add(body);
            }
            bodies = bodies.wrapping_add(of.end());
        }
        mix.add(bodies);
        mix.end()
    }

    /// A body with what it captures, whatever the order of its nodes.
    fn body(&self, graph: GraphId, scratch: &mut Scratch) -> u64 {
        let mut sum = 0u64;
        for node in self.side.nodes(graph) {
            let seed = self.own[self.level as usize][node.index()];
            let up = self.up(node, seed, scratch);
            scratch.up[node.index()] = up;
            scratch.fresh[node.index()] = scratch.round;
            sum = sum.wrapping_add(Mix::new(26).with(up).end());
        }
        let mut mix = Mix::new(27).with(sum);
        for output in &self.side.model.subgraph(graph).outputs {
            mix.add(self.value(*output, scratch));
        }
        mix.end()
    }

    fn down(&self, id: NodeId, scratch: &Scratch) -> u64 {
        let node = self.side.model.node(id);
        let mut mix = Mix::new(scratch.seed[id.index()]);
        for (slot, output) in node.outputs.iter().enumerate() {
            let Some(output) = output else { continue };
            let mut tokens: Vec<u64> = Vec::new();
            for u in &self.side.model.value(*output).uses {
                let Some(reader) = self.side.ancestor(u.node, self.graph) else {
                    continue;
                };
                let place = if reader != u.node {
                    CAPTURED
                } else if commutes(self.side.model, self.side.model.node(reader)) {
                    0
                } else {
                    u.slot as u64 + 1
                };
                let who = match (self.node)(reader) {
                    Some(pair) => Mix::new(28).with(pair).end(),
                    None => scratch.down[reader.index()],
                };
                tokens.push(Mix::new(29).with(place).with(who).end());
            }
            tokens.extend(scratch.given.get(output).into_iter().flatten());
            tokens.sort_unstable();
            mix.add(slot as u64);
            tokens.into_iter().for_each(|t| mix.add(t));
        }
        mix.end()
    }
}
