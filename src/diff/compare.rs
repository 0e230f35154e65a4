//! What differs between two things that correspond: node by node, input by input,
//! attribute by attribute. This is where equality is decided.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::attributes;
use super::change::{fate, short};
use super::hash::{arity, commutes};
use super::header::{renamed_dims, type_text};
use super::matching::{Functions, Pairs};
use super::report::{Change, Class, Kind, Place, Spot, WeightChange};
use super::side::{ConstId, Side};
use super::{DiffError, Options, weights};
use crate::ir::{DataType, Def, Node, NodeId, ValueId};
use crate::onnx::details::{self, Remarks};

/// Who reads a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// An input of a pair of nodes.
    Node(NodeId, NodeId, usize, usize),
    /// Outputs of the graphs: positions.
    Output(usize, usize),
}

/// An input that is another value than before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire {
    pub(super) reader: Reader,
    pub(super) a: Option<ValueId>,
    pub(super) b: Option<ValueId>,
}

/// How two inputs stand to each other.
enum Agreement {
    Same,
    /// Both constants, of other contents.
    Contents(ConstId, ConstId),
    Other,
}

/// Compares pairs and collects what differs.
pub(super) struct Comparer<'s, 'm> {
    pub(super) a: &'s Side<'m>,
    pub(super) b: &'s Side<'m>,
    pub(super) pairs: &'s Pairs,
    pub(super) functions: &'s Functions,
    pub(super) options: &'s Options,
    /// Layers of nodes, by side.
    pub(super) layers: (&'s [Option<u32>], &'s [Option<u32>]),
    pub(super) found: Vec<Change>,
    pub(super) wires: Vec<Wire>,
    /// Nodes of A (with a pair) of which something that counts changed.
    pub(super) modified: HashSet<NodeId>,
    /// Constants that stand in the same place: values of A and B.
    pub(super) constants: BTreeSet<(ValueId, ValueId)>,
    /// Results of comparing contents; `None`: the same.
    memo: HashMap<(ConstId, ConstId), Option<WeightChange>>,
}

impl<'s, 'm> Comparer<'s, 'm> {
    pub(super) fn new(
        a: &'s Side<'m>,
        b: &'s Side<'m>,
        pairs: &'s Pairs,
        functions: &'s Functions,
        options: &'s Options,
        layers: (&'s [Option<u32>], &'s [Option<u32>]),
    ) -> Self {
        Self {
            a,
            b,
            pairs,
            functions,
            options,
            layers,
            found: Vec::new(),
            wires: Vec::new(),
            modified: HashSet::new(),
            constants: BTreeSet::new(),
            memo: HashMap::new(),
        }
    }

    /// A pair of nodes.
    pub(super) fn nodes(&mut self, x: NodeId, y: NodeId) -> Result<(), DiffError> {
        let (model_a, model_b) = (self.a.model, self.b.model);
        let (node_a, node_b) = (model_a.node(x), model_b.node(y));
        let before = self.found.iter().filter(|c| c.class.counts()).count() + self.wires.len();
        if !self.same_operator(x, y) {
            // Matching proposes nodes of one operator only.
            let title = format!("{} became {}", op(self.a, x), op(self.b, y));
            let change = Change::new(Class::Structure, Kind::NodesReplaced, title);
            self.push(change, Some(x), Some(y));
        }
        attributes::compare(self, x, y)?;
        self.inputs(x, y)?;
        let asked = |node: &Node| {
            let list = &node.outputs;
            // How many are left out at the end makes no difference where an operator
            // has a fixed number of them.
            let plain = node.domain.is_empty() && !self.a.model.is_function(node);
            let fixed = plain && !matches!(node.op_type.as_str(), "Split" | "If" | "Loop" | "Scan");
            let last = list.iter().rposition(Option::is_some);
            let count = match fixed {
                true => last.map_or(0, |at| at + 1),
                false => list.len(),
            };
            list[..count]
                .iter()
                .map(Option::is_some)
                .collect::<Vec<_>>()
        };
        let (asked_a, asked_b) = (asked(node_a), asked(node_b));
        if asked_a != asked_b {
            let words = |list: &[bool]| {
                let named = list.iter().enumerate().filter(|(_, a)| **a);
                named
                    .map(|(i, _)| i.to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let (mut old, mut new) = (words(&asked_a), words(&asked_b));
            if old == new {
                // The same ones, of more or fewer.
                old = format!("{old} of {}", asked_a.len());
                new = format!("{new} of {}", asked_b.len());
            }
            let title = format!("outputs asked of {}: {old} → {new}", op(self.a, x));
            let change = Change::new(Class::Structure, Kind::OutputsAsked, title);
            self.push(change.values(old, new), Some(x), Some(y));
        }
        let of = (details::of_node(node_a), details::of_node(node_b));
        let place = self.place(Some(x), Some(y));
        self.remarks("nodes", &of.0, &of.1, &place);
        if details::attribute_docs(node_a) != details::attribute_docs(node_b) {
            let title = "doc strings of attributes changed";
            let change = Change::new(Class::Cosmetic, Kind::DocString, title);
            self.found.push(change.at(place));
        }
        let after = self.found.iter().filter(|c| c.class.counts()).count() + self.wires.len();
        if after > before {
            self.modified.insert(x);
        }
        Ok(())
    }

    fn same_operator(&self, x: NodeId, y: NodeId) -> bool {
        let (node_a, node_b) = (self.a.model.node(x), self.b.model.node(y));
        let function = (
            self.a.model.function_of(node_a),
            self.b.model.function_of(node_b),
        );
        match function {
            (None, None) => {
                node_a.op_type == node_b.op_type
                    && node_a.domain == node_b.domain
                    && node_a.overload == node_b.overload
            }
            (Some(f), Some(g)) => self.functions.b[f] == Some(g),
            _ => false,
        }
    }

    fn inputs(&mut self, x: NodeId, y: NodeId) -> Result<(), DiffError> {
        let (node_a, node_b) = (self.a.model.node(x), self.b.model.node(y));
        if arity(node_a) != arity(node_b) {
            return self.lists(x, y);
        }
        let mut order: Vec<usize> = (0..arity(node_a)).collect();
        if commutes(self.a.model, node_a) && commutes(self.b.model, node_b) {
            let mut agree = |slots: [usize; 2]| -> Result<usize, DiffError> {
                let mut score = 0;
                for (slot, other) in slots.into_iter().enumerate() {
                    score += match self.agree(node_a.input(slot), node_b.input(other))? {
                        Agreement::Same => 4,
                        Agreement::Contents(..) => 1,
                        Agreement::Other => 0,
                    };
                }
                Ok(score)
            };
            if agree([1, 0])? > agree([0, 1])? {
                order.swap(0, 1);
                let title = format!("operands of {} in another order", op(self.a, x));
                let change = Change::new(Class::Cosmetic, Kind::OperandOrder, title);
                self.push(change, Some(x), Some(y));
            }
        }
        for (slot, other) in order.into_iter().enumerate() {
            self.input((x, slot), (y, other))?;
        }
        Ok(())
    }

    /// Inputs of nodes that have different numbers of them: what agrees at both ends
    /// stays in place, so that one input more is one change.
    fn lists(&mut self, x: NodeId, y: NodeId) -> Result<(), DiffError> {
        let (node_a, node_b) = (self.a.model.node(x), self.b.model.node(y));
        let (n, m) = (arity(node_a), arity(node_b));
        let mut same = |slot: usize, other: usize| -> Result<bool, DiffError> {
            let agreement = self.agree(node_a.input(slot), node_b.input(other))?;
            Ok(matches!(agreement, Agreement::Same))
        };
        let (mut head, mut tail) = (0, 0);
        while head < n.min(m) && same(head, head)? {
            head += 1;
        }
        while head + tail < n.min(m) && same(n - 1 - tail, m - 1 - tail)? {
            tail += 1;
        }
        let middle = (n - head - tail).min(m - head - tail);
        for slot in (0..head + middle).chain(n - tail..n) {
            let other = if slot < head + middle {
                slot
            } else {
                slot + m - n
            };
            self.input((x, slot), (y, other))?;
        }
        for slot in head + middle..n - tail {
            self.wires.push(Wire {
                reader: Reader::Node(x, y, slot, slot),
                a: node_a.input(slot),
                b: None,
            });
        }
        for slot in head + middle..m - tail {
            self.wires.push(Wire {
                reader: Reader::Node(x, y, slot, slot),
                a: None,
                b: node_b.input(slot),
            });
        }
        Ok(())
    }

    /// One input of a pair of nodes.
    fn input(
        &mut self,
        (x, slot): (NodeId, usize),
        (y, other): (NodeId, usize),
    ) -> Result<(), DiffError> {
        let (v, w) = (
            self.a.model.node(x).input(slot),
            self.b.model.node(y).input(other),
        );
        match self.agree(v, w)? {
            Agreement::Same => {
                if let (Some(v), Some(w)) = (v, w)
                    && self.a.constant_of[v.index()].is_some()
                {
                    self.constants.insert((v, w));
                }
            }
            Agreement::Contents(c, d) => {
                // Told once, however many nodes read the pair.
                if let (Some(v), Some(w)) = (v, w)
                    && self.constants.insert((v, w))
                {
                    let mut place = self.place(Some(x), Some(y));
                    let at = |spot: &mut Option<Spot>, slot, name: &str| {
                        if let Some(spot) = spot {
                            spot.slot = Some(slot);
                            spot.value = Some(name.to_owned());
                        }
                    };
                    at(&mut place.a, slot, self.a.model.name(v));
                    at(&mut place.b, other, self.b.model.name(w));
                    let what = format!("{} (input {slot})", op(self.a, x));
                    self.contents(c, d, &what, place)?;
                }
            }
            Agreement::Other => self.wires.push(Wire {
                reader: Reader::Node(x, y, slot, other),
                a: v,
                b: w,
            }),
        }
        Ok(())
    }

    /// An output of a pair of graphs.
    pub(super) fn output(
        &mut self,
        places: (usize, usize),
        v: ValueId,
        w: ValueId,
    ) -> Result<(), DiffError> {
        match self.agree(Some(v), Some(w))? {
            Agreement::Same => {
                if self.a.constant_of[v.index()].is_some() {
                    self.constants.insert((v, w));
                }
            }
            Agreement::Contents(c, d) => {
                let place = Place {
                    a: Some(Spot::value(self.a.model.name(v))),
                    b: Some(Spot::value(self.b.model.name(w))),
                    ..Place::default()
                };
                if self.constants.insert((v, w)) {
                    self.contents(c, d, "output", place)?;
                }
            }
            Agreement::Other => self.wires.push(Wire {
                reader: Reader::Output(places.0, places.1),
                a: Some(v),
                b: Some(w),
            }),
        }
        Ok(())
    }

    fn agree(&mut self, v: Option<ValueId>, w: Option<ValueId>) -> Result<Agreement, DiffError> {
        let (v, w) = match (v, w) {
            (None, None) => return Ok(Agreement::Same),
            (Some(v), Some(w)) => (v, w),
            _ => return Ok(Agreement::Other),
        };
        match (self.a.constant_of[v.index()], self.b.constant_of[w.index()]) {
            (Some(c), Some(d)) => Ok(match self.weights(c, d)? {
                None => Agreement::Same,
                Some(_) => Agreement::Contents(c, d),
            }),
            (None, None) if self.pairs.same(v, w) => Ok(Agreement::Same),
            // What nothing defines is known by its name only.
            (None, None) if undefined(self.a, v) && undefined(self.b, w) => {
                let same = self.a.model.name(v) == self.b.model.name(w);
                Ok(if same {
                    Agreement::Same
                } else {
                    Agreement::Other
                })
            }
            _ => Ok(Agreement::Other),
        }
    }

    /// How two constants differ; `None` if they do not.
    pub(super) fn weights(
        &mut self,
        c: ConstId,
        d: ConstId,
    ) -> Result<Option<WeightChange>, DiffError> {
        let (of_a, of_b) = (&self.a.constants[c], &self.b.constants[d]);
        if of_a.digest == of_b.digest {
            return Ok(None);
        }
        if let Some(known) = self.memo.get(&(c, d)) {
            return Ok(known.clone());
        }
        let change = weights::compare(of_a, of_b, self.options)?;
        let same_type = of_a.dtype == of_b.dtype && of_a.dims == of_b.dims;
        let differs = !same_type || of_a.packed != of_b.packed || change.changed > 0;
        let result = differs.then_some(change);
        self.memo.insert((c, d), result.clone());
        Ok(result)
    }

    /// Tells a change of contents. `what`: of what, in words.
    pub(super) fn contents(
        &mut self,
        c: ConstId,
        d: ConstId,
        what: &str,
        mut place: Place,
    ) -> Result<(), DiffError> {
        let Some(change) = self.weights(c, d)? else {
            return Ok(());
        };
        let (of_a, of_b) = (&self.a.constants[c], &self.b.constants[d]);
        let ty = |dtype: &str, dims: &[i64]| {
            let dims: Vec<String> = dims.iter().map(ToString::to_string).collect();
            format!("{dtype}[{}]", dims.join(","))
        };
        let (old, new) = (
            ty(&change.dtype_a, &change.dims_a),
            ty(&change.dtype_b, &change.dims_b),
        );
        let small = (values(of_a), values(of_b));
        let (kind, title, before, after) = if of_a.dims != of_b.dims && of_a.dtype == of_b.dtype {
            let title = match &small {
                (Some(x), Some(y)) => format!("constant of {what}: {} → {}", short(x), short(y)),
                _ => format!("shape of the constant of {what}: {old} → {new}"),
            };
            (Kind::WeightShape, title, old, new)
        } else if of_a.dtype != of_b.dtype || of_a.dims != of_b.dims {
            let title = format!("type of the constant of {what}: {old} → {new}");
            (Kind::WeightType, title, old, new)
        } else if let (Some(x), Some(y)) = small {
            let title = format!("constant of {what}: {} → {}", short(&x), short(&y));
            (Kind::WeightValues, title, x, y)
        } else {
            let title = format!("weights of {what} changed: {old}");
            (Kind::WeightValues, title, String::new(), String::new())
        };
        let tolerated = kind == Kind::WeightValues && change.beyond == 0 && change.changed > 0;
        place.weights = Some(change.clone());
        let mut told = Change::new(Class::Weights, kind, title)
            .values(before, after)
            .at(place);
        told.weights = Some(change);
        if tolerated {
            let (rtol, atol) = (self.options.rtol, self.options.atol);
            told.ignored = Some(format!("within rtol {rtol:e}, atol {atol:e}"));
        }
        self.found.push(told);
        Ok(())
    }

    /// Types and remarks of a pair of values that no constants are. `stated`:
    /// whether types are to be compared (those of the interface are elsewhere).
    pub(super) fn values(&mut self, v: ValueId, w: ValueId, stated: bool) {
        let (value_a, value_b) = (self.a.model.value(v), self.b.model.value(w));
        let place = Place {
            graph: self.a.way(value_a.graph),
            a: Some(Spot::value(&value_a.name)),
            b: Some(Spot::value(&value_b.name)),
            ..Place::default()
        };
        // A type that says nothing is as good as none.
        let said = |ty: &Option<crate::ir::ValueType>| {
            let known = |t: &&crate::ir::ValueType| t.dtype() != Some(DataType::Undefined);
            ty.as_ref().filter(known).cloned()
        };
        let (ty_a, ty_b) = (said(&value_a.ty), said(&value_b.ty));
        if stated && ty_a != ty_b {
            let class = Class::Shapes;
            let changes: Vec<Change> = match (&ty_a, &ty_b) {
                (None, _) => vec![Change::new(
                    Class::Cosmetic,
                    Kind::TypeStated,
                    "types of values stated",
                )],
                (_, None) => vec![Change::new(
                    Class::Cosmetic,
                    Kind::TypeStated,
                    "types of values no longer stated",
                )],
                (Some(x), Some(y)) => match renamed_dims(Some(x), Some(y)) {
                    Some(renames) => renames
                        .into_iter()
                        .map(|(old, new)| {
                            let title = format!("dimension name of values: {old} → {new}");
                            Change::new(class, Kind::ValueType, title)
                                .subject(old.clone())
                                .values(old, new)
                        })
                        .collect(),
                    None => {
                        let (old, new) = (type_text(x), type_text(y));
                        let title = format!("stated type of values: {old} → {new}");
                        vec![Change::new(class, Kind::ValueType, title).values(old, new)]
                    }
                },
            };
            self.found
                .extend(changes.into_iter().map(|c| c.at(place.clone())));
        }
        let of = (details::of_value(value_a), details::of_value(value_b));
        self.remarks("values", &of.0, &of.1, &place);
    }

    /// Remarks on two things of a kind.
    pub(super) fn remarks(&mut self, kind: &str, a: &Remarks, b: &Remarks, place: &Place) {
        if a == b {
            return;
        }
        let singular = matches!(kind, "model" | "graph");
        let of = if singular {
            format!("the {kind}")
        } else {
            kind.to_owned()
        };
        if a.doc != b.doc {
            let word = if singular {
                "doc string"
            } else {
                "doc strings"
            };
            let title = format!("{word} of {of} changed");
            let change = Change::new(Class::Cosmetic, Kind::DocString, title);
            self.found
                .push(change.values(&a.doc, &b.doc).at(place.clone()));
        }
        let map = |r: &Remarks| r.metadata.iter().cloned().collect::<BTreeMap<_, _>>();
        let (before, after) = (map(a), map(b));
        for key in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            let (old, new) = (before.get(key), after.get(key));
            if old == new {
                continue;
            }
            let title = format!("metadata '{key}' of {of} {}", fate(old, new));
            let text = |t: Option<&String>| t.cloned().unwrap_or_default();
            let change = Change::new(Class::Metadata, Kind::ElementMetadata, title).subject(key);
            self.found
                .push(change.values(text(old), text(new)).at(place.clone()));
        }
        if a.opaque != b.opaque {
            let numbers = |r: &Remarks| r.opaque.iter().map(|(n, _)| *n).collect::<BTreeSet<u32>>();
            let all: Vec<String> = numbers(a)
                .union(&numbers(b))
                .map(ToString::to_string)
                .collect();
            let what = if kind == "nodes" && all == ["10"] {
                "device configurations".to_owned()
            } else {
                format!("fields not known to this version ({})", all.join(", "))
            };
            let title = format!("{what} of {of} changed");
            self.found.push(
                Change::new(Class::Structure, Kind::Opaque, title)
                    .subject(what)
                    .at(place.clone()),
            );
        }
    }

    /// Adds a change at a pair of nodes.
    pub(super) fn push(&mut self, change: Change, x: Option<NodeId>, y: Option<NodeId>) {
        let place = self.place(x, y);
        self.found.push(change.at(place));
    }

    /// Where two nodes are.
    pub(super) fn place(&self, x: Option<NodeId>, y: Option<NodeId>) -> Place {
        let way = x.map(|x| self.a.way(self.a.model.node(x).graph));
        let way = way.or_else(|| y.map(|y| self.b.way(self.b.model.node(y).graph)));
        let layer = x.and_then(|x| self.layers.0[x.index()]);
        Place {
            graph: way.unwrap_or_default(),
            a: x.map(|x| spot(self.a, x)),
            b: y.map(|y| spot(self.b, y)),
            layer: layer.or_else(|| y.and_then(|y| self.layers.1[y.index()])),
            ..Place::default()
        }
    }
}

/// Whether a file reads a value that nothing in it defines.
fn undefined(side: &Side<'_>, v: ValueId) -> bool {
    side.model.value(v).def == Def::Missing
}

/// A node's operator, with the domain if it is not the standard one.
pub(super) fn op(side: &Side<'_>, node: NodeId) -> String {
    let node = side.model.node(node);
    if node.domain.is_empty() {
        node.op_type.clone()
    } else {
        format!("{}::{}", node.domain, node.op_type)
    }
}

/// Where a node is.
pub(super) fn spot(side: &Side<'_>, node: NodeId) -> Spot {
    let name = side.model.node(node).name.clone();
    // Nodes without a name are told by what they compute.
    let output = side.model.node(node).outputs.iter().flatten().next();
    let value = output
        .filter(|_| name.is_empty())
        .map(|v| side.model.name(*v).to_owned());
    Spot {
        node: Some(name),
        op: Some(op(side, node)),
        slot: None,
        value,
    }
}

/// Elements of a small constant in words.
pub(super) fn values(constant: &super::content::Constant) -> Option<String> {
    const SHOWN: u64 = 8;
    let count = constant
        .dims
        .iter()
        .try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?))?;
    if count > SHOWN
        || constant.packed
        || constant.dtype.byte_len(count) != Some(constant.data.len())
    {
        return None;
    }
    let mut buffer = Vec::new();
    let bytes = constant
        .data
        .slice(0, constant.data.len() as usize, &mut buffer)
        .ok()?;
    let shown = weights::texts(constant.dtype, bytes, count as usize);
    if constant.dims.is_empty() {
        shown.first().cloned()
    } else {
        Some(format!("[{}]", shown.join(", ")))
    }
}
