//! Which nodes of two graphs correspond.
//!
//! Every node has a hash of everything before it (*up*: operator, attributes,
//! constants, inputs) and of everything behind it (*down*: who reads it, at which
//! input, up to the outputs). Nodes that agree in both are pairs; then those that
//! agree in one, by name where several do. A pair is an anchor: in the next round
//! its values are what the hashes start from, so a change stays local. Rounds go
//! from exact (contents of constants) to loose (operators), each followed by
//! spreading from pairs to neighbours. Each round is linear in what is left.
//!
//! Names decide only between nodes that the structure leaves equal. Nodes of our
//! own passes (`duet/<pass>/…`) correspond to such nodes only, as long as anything
//! else is possible: a pass inserts copies of what is there.

use std::collections::{HashMap, HashSet};

use super::hash::{Level, Mix, arity, commutes};
use super::side::Side;
use super::sweep::{Own, Scratch, Sweep};
use crate::ir::{Def, Function, GraphId, NodeId, ValueId};

/// Pairs of nodes and values of two models.
#[derive(Clone)]
pub(super) struct Pairs {
    /// By node of A.
    pub(super) node_b: Vec<Option<NodeId>>,
    /// By node of B.
    pub(super) node_a: Vec<Option<NodeId>>,
    /// By value of A.
    pub(super) value_b: Vec<Option<ValueId>>,
    /// By value of B.
    pub(super) value_a: Vec<Option<ValueId>>,
}

impl Pairs {
    pub(super) fn new(a: &Side<'_>, b: &Side<'_>) -> Self {
        Self {
            node_b: vec![None; a.model.node_count()],
            node_a: vec![None; b.model.node_count()],
            value_b: vec![None; a.model.value_count()],
            value_a: vec![None; b.model.value_count()],
        }
    }

    pub(super) fn values(&mut self, a: ValueId, b: ValueId) {
        if self.value_b[a.index()].is_none() && self.value_a[b.index()].is_none() {
            self.value_b[a.index()] = Some(b);
            self.value_a[b.index()] = Some(a);
        }
    }

    fn nodes(&mut self, a: (&Side<'_>, NodeId), b: (&Side<'_>, NodeId)) {
        let ((sa, na), (sb, nb)) = (a, b);
        self.node_b[na.index()] = Some(nb);
        self.node_a[nb.index()] = Some(na);
        let outputs = sa
            .model
            .node(na)
            .outputs
            .iter()
            .zip(&sb.model.node(nb).outputs);
        for (x, y) in outputs {
            if let (Some(x), Some(y)) = (x, y) {
                self.values(*x, *y);
            }
        }
    }

    /// Whether two values are the same one.
    pub(super) fn same(&self, a: ValueId, b: ValueId) -> bool {
        self.value_b[a.index()] == Some(b)
    }
}

/// Functions that correspond, and what numbers them alike.
#[derive(Clone, Debug, Default)]
pub(super) struct Functions {
    /// By function of A: the one of B.
    pub(super) b: Vec<Option<usize>>,
    /// By function of B: the one of A.
    pub(super) a: Vec<Option<usize>>,
}

impl Functions {
    /// Functions of the same domain, name and overload.
    pub(super) fn new(a: &Side<'_>, b: &Side<'_>) -> Self {
        let key = |f: &Function| (f.domain.clone(), f.name.clone(), f.overload.clone());
        let of_b: HashMap<_, usize> = b
            .model
            .functions
            .iter()
            .enumerate()
            .map(|(i, f)| (key(f), i))
            .collect();
        let to_b: Vec<Option<usize>> = a
            .model
            .functions
            .iter()
            .map(|f| of_b.get(&key(f)).copied())
            .collect();
        let mut to_a = vec![None; b.model.functions.len()];
        for (i, j) in to_b.iter().enumerate() {
            if let Some(j) = j {
                to_a[*j] = Some(i);
            }
        }
        Self { b: to_b, a: to_a }
    }

    /// A number for a function of A.
    pub(super) fn number_a(f: usize) -> u64 {
        f as u64 * 2
    }

    /// A number for a function of B: the same as for its counterpart.
    pub(super) fn number_b(&self, f: usize) -> u64 {
        self.a[f].map_or(f as u64 * 2 + 1, Self::number_a)
    }
}

/// What hashes of a round are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Both,
    NameUp,
    NameDown,
    Up,
    Down,
}

/// Finds pairs in one graph of each side.
pub(super) struct Matcher<'s, 'm> {
    a: &'s Side<'m>,
    b: &'s Side<'m>,
    graph_a: GraphId,
    graph_b: GraphId,
    own: (&'s Own, &'s Own),
    sa: Scratch,
    sb: Scratch,
}

/// Rounds after which what is left is left.
const ROUNDS: usize = 12;

impl<'s, 'm> Matcher<'s, 'm> {
    /// `outputs`: positions of outputs that correspond.
    pub(super) fn new(
        a: (&'s Side<'m>, GraphId),
        b: (&'s Side<'m>, GraphId),
        own: (&'s Own, &'s Own),
        outputs: &[(usize, usize)],
    ) -> Self {
        let mut matcher = Self {
            own,
            sa: Scratch::new(a.0, a.1),
            sb: Scratch::new(b.0, b.1),
            a: a.0,
            b: b.0,
            graph_a: a.1,
            graph_b: b.1,
        };
        let outputs_a = &a.0.model.subgraph(a.1).outputs;
        let outputs_b = &b.0.model.subgraph(b.1).outputs;
        for &(i, j) in outputs {
            let token = Mix::new(10).with(i as u64).end();
            matcher
                .sa
                .given
                .entry(outputs_a[i])
                .or_default()
                .push(token);
            matcher
                .sb
                .given
                .entry(outputs_b[j])
                .or_default()
                .push(token);
        }
        matcher
    }

    /// Finds what corresponds.
    pub(super) fn run(mut self, pairs: &mut Pairs) {
        let inserted = |side: &Side<'_>, left: &[NodeId]| {
            let of_pass = |n: &&NodeId| side.model.node(**n).pass.is_some();
            left.iter().filter(of_pass).copied().collect::<Vec<_>>()
        };
        let (mut kept_a, mut kept_b) = (
            inserted(self.a, &self.sa.left),
            inserted(self.b, &self.sb.left),
        );
        if kept_a.is_empty() != kept_b.is_empty() {
            // A rewritten model and one that was rewritten and renamed: if all
            // corresponds, nothing was inserted.
            let (left_a, left_b) = (self.sa.left.clone(), self.sb.left.clone());
            let mut attempt = pairs.clone();
            self.round(Level::Exact, Key::Both, true, &mut attempt);
            if self.sa.left.is_empty() && self.sb.left.is_empty() {
                *pairs = attempt;
                return;
            }
            let without = |mut left: Vec<NodeId>, kept: &[NodeId]| {
                let kept: HashSet<&NodeId> = kept.iter().collect();
                left.retain(|n| !kept.contains(n));
                left
            };
            self.sa.left = without(left_a, &kept_a);
            self.sb.left = without(left_b, &kept_b);
            self.rounds(pairs);
            if self.sa.left.is_empty() || self.sb.left.is_empty() {
                return;
            }
            // More was done than inserting: what is left may be anything.
            self.sa.left.append(&mut kept_a);
            self.sb.left.append(&mut kept_b);
            let order = |side: &Side<'_>, graph: GraphId, left: &mut Vec<NodeId>| {
                let place: HashMap<NodeId, usize> = side
                    .nodes(graph)
                    .into_iter()
                    .enumerate()
                    .map(|(i, n)| (n, i))
                    .collect();
                left.sort_by_key(|n| place.get(n).copied());
            };
            order(self.a, self.graph_a, &mut self.sa.left);
            order(self.b, self.graph_b, &mut self.sb.left);
        }
        self.rounds(pairs);
    }

    fn done(&self) -> bool {
        self.sa.left.is_empty() || self.sb.left.is_empty()
    }

    fn rounds(&mut self, pairs: &mut Pairs) {
        let mut rounds = 0;
        // First only what is unambiguous, as far as that leads: a tie that is decided
        // too early is decided wrongly where a later anchor would have told.
        for ties in [false, true] {
            loop {
                let before = self.sa.left.len();
                let levels: &[Level] = if ties { &Level::ALL } else { &[Level::Exact] };
                for level in levels {
                    self.level(*level, ties, pairs);
                }
                if ties {
                    self.names(pairs);
                }
                rounds += 1;
                if self.done() || rounds > ROUNDS {
                    return;
                }
                if self.sa.left.len() == before {
                    break;
                }
            }
        }
    }

    /// All rounds of a level.
    fn level(&mut self, level: Level, ties: bool, pairs: &mut Pairs) {
        for key in [Key::Both, Key::NameUp, Key::NameDown, Key::Up, Key::Down] {
            if self.done() {
                return;
            }
            // Operators alone say too little one way.
            let one_way = matches!(key, Key::Up | Key::Down);
            if level < Level::Operator || !one_way {
                self.round(level, key, ties, pairs);
            }
        }
        if level == Level::Exact {
            self.anchors(pairs);
        }
        self.spread(level, pairs);
    }

    /// One round: hashes at a level, and pairs of what agrees.
    fn round(&mut self, level: Level, key: Key, ties: bool, pairs: &mut Pairs) {
        self.sweep(level, pairs, false);
        let mut keys = self.keys(key);
        if key == Key::Both && ambiguous(&keys.0) {
            // Each node as what it is from both ends, once more: tells apart what
            // meets others only sideways.
            for side in [&mut self.sa, &mut self.sb] {
                for node in &side.left {
                    let i = node.index();
                    side.seed[i] = Mix::new(11).with(side.up[i]).with(side.down[i]).end();
                }
            }
            self.sweep(level, pairs, true);
            keys = self.keys(key);
        }
        self.settle(
            &keys.0,
            &keys.1,
            key,
            ties && level < Level::Operator,
            pairs,
        );
        self.sa.left.retain(|n| pairs.node_b[n.index()].is_none());
        self.sb.left.retain(|n| pairs.node_a[n.index()].is_none());
    }

    /// Computes `up` and `down` of what is left.
    fn sweep(&mut self, level: Level, pairs: &Pairs, seeded: bool) {
        let a = Sweep {
            side: self.a,
            graph: self.graph_a,
            own: self.own.0,
            level,
            token: &|v| pairs.value_b[v.index()].map(|_| v.index() as u64),
            node: &|n| pairs.node_b[n.index()].map(|_| n.index() as u64),
        };
        a.run(&mut self.sa, seeded);
        let b = Sweep {
            side: self.b,
            graph: self.graph_b,
            own: self.own.1,
            level,
            token: &|v| pairs.value_a[v.index()].map(|v| v.index() as u64),
            node: &|n| pairs.node_a[n.index()].map(|n| n.index() as u64),
        };
        b.run(&mut self.sb, seeded);
    }

    #[allow(clippy::type_complexity, reason = "hash and node, of each side")]
    fn keys(&self, key: Key) -> (Vec<(u64, NodeId)>, Vec<(u64, NodeId)>) {
        let of = |side: &Side<'_>, scratch: &Scratch| {
            let one = |n: &NodeId| {
                let (up, down) = (scratch.up[n.index()], scratch.down[n.index()]);
                let name = side.model.node(*n).name.as_bytes();
                let named = |hash: u64| {
                    let mut mix = Mix::new(hash);
                    mix.bytes(name);
                    (!name.is_empty()).then(|| mix.end())
                };
                let hash = match key {
                    Key::Both => Some(Mix::new(12).with(up).with(down).end()),
                    Key::NameUp => named(up),
                    Key::NameDown => named(down),
                    Key::Up => Some(up),
                    Key::Down => Some(down),
                };
                hash.map(|h| (h, *n))
            };
            scratch.left.iter().filter_map(one).collect()
        };
        (of(self.a, &self.sa), of(self.b, &self.sb))
    }

    /// Pairs nodes of equal keys. `uneven`: also where the sides have different
    /// numbers of them, and where a key looks one way only.
    fn settle(
        &self,
        a: &[(u64, NodeId)],
        b: &[(u64, NodeId)],
        key: Key,
        uneven: bool,
        pairs: &mut Pairs,
    ) {
        let mut groups: HashMap<u64, (Vec<NodeId>, Vec<NodeId>)> = HashMap::new();
        for (hash, node) in a {
            groups.entry(*hash).or_default().0.push(*node);
        }
        for (hash, node) in b {
            if let Some(group) = groups.get_mut(hash) {
                group.1.push(*node);
            }
        }
        let down = matches!(key, Key::Down | Key::NameDown);
        let mut settle = |hash: &u64, pairs: &mut Pairs| {
            let Some((of_a, of_b)) = groups.remove(hash) else {
                return;
            };
            match (of_a.as_slice(), of_b.as_slice()) {
                (_, []) => {}
                ([x], [y]) => pairs.nodes((self.a, *x), (self.b, *y)),
                _ if !uneven && (key != Key::Both || of_a.len() != of_b.len()) => {}
                _ => self.ties(of_a, of_b, down, pairs),
            }
        };
        // Producers before readers (or readers before producers), so that a tie is
        // decided by what it is connected to.
        if down {
            a.iter().rev().for_each(|(hash, _)| settle(hash, pairs));
        } else {
            a.iter().for_each(|(hash, _)| settle(hash, pairs));
        }
    }

    /// Pairs nodes that have the same hash: by what they are connected to, then by
    /// name, then in order.
    fn ties(&self, a: Vec<NodeId>, b: Vec<NodeId>, down: bool, pairs: &mut Pairs) {
        type Sides = (Vec<NodeId>, Vec<NodeId>);
        let mut groups: HashMap<Vec<Option<ValueId>>, Sides> = HashMap::new();
        let mut order = Vec::new();
        for node in a {
            let key = connected(self.a, node, down, |v| pairs.value_b[v.index()]);
            if !groups.contains_key(&key) {
                order.push(key.clone());
            }
            groups.entry(key).or_default().0.push(node);
        }
        for node in b {
            let paired = |v: ValueId| pairs.value_a[v.index()].map(|_| v);
            let key = connected(self.b, node, down, paired);
            if let Some(group) = groups.get_mut(&key) {
                group.1.push(node);
            }
        }
        for key in order {
            let Some((of_a, of_b)) = groups.remove(&key) else {
                continue;
            };
            let name_b: HashMap<&str, NodeId> = of_b
                .iter()
                .map(|n| (self.b.model.node(*n).name.as_str(), *n))
                .collect();
            for x in &of_a {
                let name = self.a.model.node(*x).name.as_str();
                if !name.is_empty()
                    && let Some(y) = name_b.get(name)
                    && pairs.node_a[y.index()].is_none()
                {
                    pairs.nodes((self.a, *x), (self.b, *y));
                }
            }
            let rest_a = of_a.iter().filter(|n| pairs.node_b[n.index()].is_none());
            let rest_a: Vec<NodeId> = rest_a.copied().collect();
            let rest_b = of_b.iter().filter(|n| pairs.node_a[n.index()].is_none());
            let rest_b: Vec<NodeId> = rest_b.copied().collect();
            for (x, y) in rest_a.iter().zip(&rest_b) {
                pairs.nodes((self.a, *x), (self.b, *y));
            }
        }
    }

    /// Pairs nodes that read constants which no other node on either side reads in
    /// that way.
    fn anchors(&mut self, pairs: &mut Pairs) {
        let unique =
            |side: &Side<'_>, own: &Own, scratch: &Scratch| -> HashMap<u64, Option<NodeId>> {
                let mut found = HashMap::new();
                for node in &scratch.left {
                    let inputs = side.model.node(*node).inputs.iter().flatten();
                    let bytes = inputs.filter_map(|v| Some(side.constant(*v)?.data.len()));
                    if bytes.max().unwrap_or(0) >= 16 {
                        let hash = own[Level::Exact as usize][node.index()];
                        found
                            .entry(hash)
                            .and_modify(|n| *n = None)
                            .or_insert(Some(*node));
                    }
                }
                found
            };
        let (of_a, of_b) = (
            unique(self.a, self.own.0, &self.sa),
            unique(self.b, self.own.1, &self.sb),
        );
        for node in self.sa.left.clone() {
            let hash = self.own.0[Level::Exact as usize][node.index()];
            if let (Some(Some(x)), Some(Some(y))) = (of_a.get(&hash), of_b.get(&hash))
                && *x == node
            {
                pairs.nodes((self.a, *x), (self.b, *y));
            }
        }
        self.sa.left.retain(|n| pairs.node_b[n.index()].is_none());
        self.sb.left.retain(|n| pairs.node_a[n.index()].is_none());
    }

    /// Spreads from pairs to neighbours that nothing else could be the pair of.
    fn spread(&mut self, level: Level, pairs: &mut Pairs) {
        let open_a: HashSet<NodeId> = self.sa.left.iter().copied().collect();
        let open_b: HashSet<NodeId> = self.sb.left.iter().copied().collect();
        if open_a.is_empty() || open_b.is_empty() {
            return;
        }
        let mut queue: Vec<(NodeId, NodeId)> = Vec::new();
        let all = self.a.nodes(self.graph_a);
        queue.extend(
            all.iter()
                .filter_map(|n| Some((*n, pairs.node_b[n.index()]?))),
        );
        queue.reverse();
        // Values that are no node's output have readers as well.
        let inputs = &self.a.model.subgraph(self.graph_a).inputs;
        let inputs = inputs
            .iter()
            .filter_map(|v| Some((*v, pairs.value_b[v.index()]?)));
        for (x, y) in inputs.collect::<Vec<_>>() {
            self.readers(x, y, level, (&open_a, &open_b), pairs, &mut queue);
        }
        while let Some((x, y)) = queue.pop() {
            let (node_a, node_b) = (self.a.model.node(x), self.b.model.node(y));
            if arity(node_a) == arity(node_b) {
                for (v, w) in node_a.inputs.iter().zip(&node_b.inputs) {
                    let of =
                        |side: &Side<'_>, v: &Option<ValueId>| match side.model.value((*v)?).def {
                            Def::Node { node, slot } => Some((node, slot)),
                            _ => None,
                        };
                    if let (Some((p, i)), Some((q, j))) = (of(self.a, v), of(self.b, w))
                        && i == j
                        && self.fits(p, q, level, (&open_a, &open_b), pairs)
                    {
                        pairs.nodes((self.a, p), (self.b, q));
                        queue.push((p, q));
                    }
                }
            }
            let outputs: Vec<(ValueId, ValueId)> = node_a
                .outputs
                .iter()
                .zip(&node_b.outputs)
                .filter_map(|(v, w)| Some(((*v)?, (*w)?)))
                .collect();
            for (v, w) in outputs {
                self.readers(v, w, level, (&open_a, &open_b), pairs, &mut queue);
            }
        }
        self.sa.left.retain(|n| pairs.node_b[n.index()].is_none());
        self.sb.left.retain(|n| pairs.node_a[n.index()].is_none());
    }

    fn fits(
        &self,
        x: NodeId,
        y: NodeId,
        level: Level,
        open: (&HashSet<NodeId>, &HashSet<NodeId>),
        pairs: &Pairs,
    ) -> bool {
        open.0.contains(&x)
            && open.1.contains(&y)
            && pairs.node_b[x.index()].is_none()
            && pairs.node_a[y.index()].is_none()
            && self.own.0[level as usize][x.index()] == self.own.1[level as usize][y.index()]
    }

    /// Pairs the readers of a pair of values.
    fn readers(
        &self,
        v: ValueId,
        w: ValueId,
        level: Level,
        open: (&HashSet<NodeId>, &HashSet<NodeId>),
        pairs: &mut Pairs,
        queue: &mut Vec<(NodeId, NodeId)>,
    ) {
        let l = level as usize;
        let mut groups: HashMap<(usize, u64), (Vec<NodeId>, Vec<NodeId>)> = HashMap::new();
        let slot = |side: &Side<'_>, node: NodeId, slot| {
            if commutes(side.model, side.model.node(node)) {
                0
            } else {
                slot
            }
        };
        for u in &self.a.model.value(v).uses {
            if open.0.contains(&u.node) && pairs.node_b[u.node.index()].is_none() {
                let key = (slot(self.a, u.node, u.slot), self.own.0[l][u.node.index()]);
                groups.entry(key).or_default().0.push(u.node);
            }
        }
        if groups.is_empty() {
            return;
        }
        for u in &self.b.model.value(w).uses {
            if open.1.contains(&u.node) && pairs.node_a[u.node.index()].is_none() {
                let key = (slot(self.b, u.node, u.slot), self.own.1[l][u.node.index()]);
                if let Some(group) = groups.get_mut(&key) {
                    group.1.push(u.node);
                }
            }
        }
        let mut all: Vec<_> = groups.into_values().collect();
        all.sort_unstable();
        for (of_a, of_b) in all {
            let found: Vec<(NodeId, NodeId)> = match (of_a.as_slice(), of_b.as_slice()) {
                ([x], [y]) => vec![(*x, *y)],
                (_, []) => continue,
                _ => {
                    let name = |side: &Side<'m>, n: &NodeId| (side.model.node(*n).name.clone(), *n);
                    let names: HashMap<String, NodeId> =
                        of_b.iter().map(|n| name(self.b, n)).collect();
                    let by_name = of_a.iter().map(|n| name(self.a, n));
                    let by_name = by_name.filter(|(name, _)| !name.is_empty());
                    by_name
                        .filter_map(|(name, x)| Some((x, *names.get(&name)?)))
                        .collect()
                }
            };
            for (x, y) in found {
                if self.fits(x, y, level, open, pairs) {
                    pairs.nodes((self.a, x), (self.b, y));
                    queue.push((x, y));
                }
            }
        }
    }

    /// Pairs nodes of one name and operator, where nothing speaks against it.
    fn names(&mut self, pairs: &mut Pairs) {
        let by_name = |side: &Side<'m>, left: &[NodeId]| -> HashMap<String, Option<NodeId>> {
            let mut found = HashMap::new();
            for node in left {
                let name = side.model.node(*node).name.clone();
                found
                    .entry(name)
                    .and_modify(|n| *n = None)
                    .or_insert(Some(*node));
            }
            found
        };
        let (of_a, of_b) = (
            by_name(self.a, &self.sa.left),
            by_name(self.b, &self.sb.left),
        );
        for x in self.sa.left.clone() {
            let node = self.a.model.node(x);
            if node.name.is_empty() || of_a.get(&node.name) != Some(&Some(x)) {
                continue;
            }
            let Some(Some(y)) = of_b.get(&node.name) else {
                continue;
            };
            let same = self.own.0[Level::Operator as usize][x.index()]
                == self.own.1[Level::Operator as usize][y.index()];
            if same && self.agree(x, *y, pairs) {
                pairs.nodes((self.a, x), (self.b, *y));
            }
        }
        self.sa.left.retain(|n| pairs.node_b[n.index()].is_none());
        self.sb.left.retain(|n| pairs.node_a[n.index()].is_none());
    }

    /// Whether two nodes share a neighbour, or have none that is paired.
    fn agree(&self, x: NodeId, y: NodeId, pairs: &Pairs) -> bool {
        let (node_a, node_b) = (self.a.model.node(x), self.b.model.node(y));
        let (mut shared, mut paired) = (false, false);
        for (slot, v) in node_a.inputs.iter().enumerate() {
            if let Some(w) = v.and_then(|v| pairs.value_b[v.index()]) {
                paired = true;
                shared |= node_b.input(slot) == Some(w);
            }
        }
        let outputs = node_a.outputs.iter().zip(&node_b.outputs);
        for (v, w) in outputs.filter_map(|(v, w)| Some(((*v)?, (*w)?))) {
            for u in &self.a.model.value(v).uses {
                if let Some(reader) = pairs.node_b[u.node.index()] {
                    paired = true;
                    shared |= self.b.model.value(w).uses.iter().any(|t| t.node == reader);
                }
            }
        }
        shared || !paired
    }
}

/// What a node is connected to, in terms that are the same on both sides: its inputs,
/// or with `down` the first outputs of its readers.
fn connected(
    side: &Side<'_>,
    node: NodeId,
    down: bool,
    as_b: impl Fn(ValueId) -> Option<ValueId>,
) -> Vec<Option<ValueId>> {
    let of = |n: NodeId| side.model.node(n);
    if !down {
        return of(node).inputs.iter().map(|v| v.and_then(&as_b)).collect();
    }
    let outputs = of(node).outputs.iter().flatten();
    let uses = outputs.flat_map(|v| &side.model.value(*v).uses);
    let first = uses.filter_map(|u| of(u.node).outputs.first().copied().flatten());
    let mut all: Vec<_> = first.map(as_b).collect();
    all.sort_unstable();
    all
}

fn ambiguous(keys: &[(u64, NodeId)]) -> bool {
    let mut all: Vec<u64> = keys.iter().map(|k| k.0).collect();
    all.sort_unstable();
    all.windows(2).any(|w| w[0] == w[1])
}
