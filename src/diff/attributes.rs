//! Attributes of two nodes that correspond, defaults included.

use std::collections::BTreeSet;

use super::DiffError;
use super::change::short;
use super::compare::{Comparer, op};
use super::defaults::Default as Stated;
use super::report::{Change, Class, Kind};
use super::side::Side;
use crate::ir::{AttrValue, Attribute, NodeId};

/// Compares the attributes of a pair of nodes. Bodies are compared as graphs.
pub(super) fn compare(c: &mut Comparer<'_, '_>, x: NodeId, y: NodeId) -> Result<(), DiffError> {
    let (node_a, node_b) = (c.a.model.node(x), c.b.model.node(y));
    let names = |node: &crate::ir::Node| {
        node.attributes
            .iter()
            .map(|a| a.name.clone())
            .collect::<BTreeSet<_>>()
    };
    let defaults = (c.a.defaults(node_a), c.b.defaults(node_b));
    let mut all = names(node_a);
    all.extend(names(node_b));
    all.extend(defaults.0.iter().map(|(n, _)| (*n).to_owned()));
    let default = |of: &'static [(&'static str, Stated)], name: &str| {
        of.iter().find(|(n, _)| *n == name).map(|(_, d)| d)
    };
    repeated(c, x, y)?;
    for name in all {
        let at = |node: &crate::ir::Node| node.attributes.iter().position(|a| a.name == name);
        let (i, j) = (at(node_a), at(node_b));
        let (da, db) = (default(defaults.0, &name), default(defaults.1, &name));
        let (old, new) = match (i, j) {
            (Some(i), Some(j)) => {
                if same(c, (x, i), (y, j))? {
                    continue;
                }
                (text(c.a, x, i), text(c.b, y, j))
            }
            (Some(i), None) => match db {
                Some(d) if d.is(&node_a.attributes[i].value) => {
                    spelled_out(c, x, y, &name, false);
                    continue;
                }
                d => (
                    text(c.a, x, i),
                    d.map(|d| format!("{} (default)", d.text()))
                        .unwrap_or_default(),
                ),
            },
            (None, Some(j)) => match da {
                Some(d) if d.is(&node_b.attributes[j].value) => {
                    spelled_out(c, x, y, &name, true);
                    continue;
                }
                d => (
                    d.map(|d| format!("{} (default)", d.text()))
                        .unwrap_or_default(),
                    text(c.b, y, j),
                ),
            },
            // Left out on both sides: the same unless the default changed. What one
            // version does not know yet is no change.
            (None, None) => match (da, db) {
                (Some(d), Some(e)) if d != e => (
                    format!("{} (default)", d.text()),
                    format!("{} (default)", e.text()),
                ),
                _ => continue,
            },
        };
        let what = format!("attribute '{name}' of {}", op(c.a, x));
        let title = match (old.is_empty(), new.is_empty()) {
            (true, _) => format!("{what} added: {}", short(&new)),
            (_, true) => format!("{what} removed: {}", short(&old)),
            _ => format!("{what}: {} → {}", short(&old), short(&new)),
        };
        let change = Change::new(Class::Structure, Kind::Attribute, title).subject(&name);
        c.push(change.values(old, new), Some(x), Some(y));
    }
    Ok(())
}

/// Attributes that a node has twice: which of them counts is not said anywhere, so
/// anything but the same list is a change.
fn repeated(c: &mut Comparer<'_, '_>, x: NodeId, y: NodeId) -> Result<(), DiffError> {
    let (of_a, of_b) = (&c.a.model.node(x).attributes, &c.b.model.node(y).attributes);
    let twice = |all: &[Attribute]| {
        let names: BTreeSet<&str> = all.iter().map(|a| a.name.as_str()).collect();
        names.len() < all.len()
    };
    if !twice(of_a) && !twice(of_b) {
        return Ok(());
    }
    let mut equal = of_a.len() == of_b.len();
    for (i, (a, b)) in of_a.iter().zip(of_b).enumerate() {
        equal = equal && a.name == b.name && same(c, (x, i), (y, i))?;
    }
    if !equal {
        let list = |side: &Side<'_>, node: NodeId| {
            let all = side.model.node(node).attributes.iter().enumerate();
            let each = all.map(|(i, a)| format!("{} = {}", a.name, text(side, node, i)));
            each.collect::<Vec<_>>().join(", ")
        };
        let (old, new) = (list(c.a, x), list(c.b, y));
        let title = format!(
            "attributes of {}, one of them there twice, changed",
            op(c.a, x)
        );
        let change = Change::new(Class::Structure, Kind::Attribute, title);
        c.push(change.values(old, new), Some(x), Some(y));
    }
    Ok(())
}

fn spelled_out(c: &mut Comparer<'_, '_>, x: NodeId, y: NodeId, name: &str, now: bool) {
    let verb = if now {
        "is spelled out"
    } else {
        "is left to its default"
    };
    let title = format!("attribute '{name}' of {} {verb}", op(c.a, x));
    let change = Change::new(Class::Cosmetic, Kind::DefaultAttribute, title).subject(name);
    c.push(change, Some(x), Some(y));
}

fn same(
    c: &mut Comparer<'_, '_>,
    (x, i): (NodeId, usize),
    (y, j): (NodeId, usize),
) -> Result<bool, DiffError> {
    let (a, b) = (
        &c.a.model.node(x).attributes[i].value,
        &c.b.model.node(y).attributes[j].value,
    );
    Ok(match (a, b) {
        (AttrValue::Float(v), AttrValue::Float(w)) => v.to_bits() == w.to_bits(),
        (AttrValue::Int(v), AttrValue::Int(w)) => v == w,
        (AttrValue::String(v), AttrValue::String(w)) => v == w,
        (AttrValue::Floats(v), AttrValue::Floats(w)) => {
            v.len() == w.len() && v.iter().zip(w).all(|(p, q)| p.to_bits() == q.to_bits())
        }
        (AttrValue::Ints(v), AttrValue::Ints(w)) => v == w,
        (AttrValue::Strings(v), AttrValue::Strings(w)) => v == w,
        (AttrValue::Tensor(_), AttrValue::Tensor(_)) => {
            let of = (
                c.a.attribute_constants.get(&(x, i)),
                c.b.attribute_constants.get(&(y, j)),
            );
            match of {
                (Some(p), Some(q)) => c.weights(*p, *q)?.is_none(),
                _ => false,
            }
        }
        // What they hold is compared on its own, pair by pair.
        (AttrValue::Graph(_), AttrValue::Graph(_)) => true,
        (AttrValue::Graphs(v), AttrValue::Graphs(w)) => v.len() == w.len(),
        (AttrValue::Ref(v), AttrValue::Ref(w)) => v == w,
        (AttrValue::Other(v), AttrValue::Other(w)) => c.a.essence(v) == c.b.essence(w),
        _ => false,
    })
}

/// An attribute in words.
fn text(side: &Side<'_>, node: NodeId, index: usize) -> String {
    let attribute = &side.model.node(node).attributes[index];
    let lossy = |s: &bytes::Bytes| format!("{:?}", String::from_utf8_lossy(s));
    let list = |all: Vec<String>| format!("[{}]", all.join(", "));
    match &attribute.value {
        AttrValue::Float(v) if v.is_nan() => format!("NaN ({:#x})", v.to_bits()),
        AttrValue::Float(v) => format!("{v:?}"),
        AttrValue::Int(v) => v.to_string(),
        AttrValue::String(v) => lossy(v),
        AttrValue::Floats(v) => list(v.iter().map(|f| format!("{f:?}")).collect()),
        AttrValue::Ints(v) => list(v.iter().map(ToString::to_string).collect()),
        AttrValue::Strings(v) => list(v.iter().map(lossy).collect()),
        AttrValue::Tensor(t) => {
            let constant = side
                .attribute_constants
                .get(&(node, index))
                .map(|c| &side.constants[*c]);
            let values = constant.and_then(super::compare::values);
            let dims = list(t.dims.iter().map(ToString::to_string).collect()).replace(' ', "");
            let dims = if t.dims.is_empty() {
                String::new()
            } else {
                dims
            };
            let mut shown = format!("{}{dims}", t.dtype);
            match values {
                Some(values) => shown = format!("{shown} {values}"),
                None => {
                    let digest = constant.map_or([0; 32], |c| c.digest);
                    let hex: String = digest.iter().take(4).map(|b| format!("{b:02x}")).collect();
                    shown = format!("{shown} #{hex}");
                }
            }
            shown
        }
        AttrValue::Graph(_) => "a graph".to_owned(),
        AttrValue::Graphs(v) => format!("{} graphs", v.len()),
        AttrValue::Ref(name) => format!("@{name}"),
        AttrValue::Other(bytes) => {
            let essence = side.essence(bytes);
            let hex: String = essence
                .iter()
                .take(12)
                .map(|b| format!("{b:02x}"))
                .collect();
            format!("{} bytes {hex}", essence.len())
        }
    }
}

/// A value of an attribute in words that are the same for the same bits only, wherever
/// they lie.
pub(super) fn exact(side: &Side<'_>, value: &AttrValue) -> String {
    match value {
        AttrValue::Float(v) => format!("{v:?} ({:#010x})", v.to_bits()),
        AttrValue::Floats(list) => {
            let bits: Vec<String> = list
                .iter()
                .map(|v| format!("{:#010x}", v.to_bits()))
                .collect();
            format!("{list:?} ({})", bits.join(", "))
        }
        AttrValue::Tensor(t) => {
            let contents = match &t.data {
                crate::ir::TensorData::Strings(list) => format!("{list:?}"),
                // What cannot be loaded is told by where it should be.
                data => match t.bytes(side.model.external()) {
                    Ok(bytes) => blake3::hash(&bytes).to_string(),
                    Err(_) => format!("{data:?}"),
                },
            };
            format!("{}{:?} {contents}", t.dtype, t.dims)
        }
        AttrValue::Other(bytes) => {
            format!("{}", blake3::hash(&side.essence(bytes)))
        }
        other => format!("{other:?}"),
    }
}
