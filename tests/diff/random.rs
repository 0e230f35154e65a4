//! Random graphs: whatever is renamed, reordered or stored otherwise is equal, and whatever is
//! changed is found, at its place.
//!
//! Whether a mutated graph is another one is decided by an oracle that shares nothing with the
//! engine: the terms that the outputs are, spelled out, and those of all nodes.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use duet_onnx::diff::{ModelDiff, Options, compare_models};
use duet_onnx::proto::{GraphProto, ModelProto, NodeProto};

use crate::common::*;
use crate::edit::{self, Dice};

const SEEDS: u64 = 300;
const UNARY: [&str; 5] = ["Relu", "Neg", "Exp", "Sigmoid", "LeakyRelu"];
const BINARY: [&str; 5] = ["Add", "Mul", "Sub", "Div", "MatMul"];

fn named(op: &str, name: String, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        name: Some(name),
        ..node(op, inputs, outputs)
    }
}

/// A random graph with duplicates, branches, several outputs and dead nodes.
fn generate(seed: u64) -> ModelProto {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut values: Vec<String> = vec!["x0".into(), "x1".into()];
    let weights: Vec<_> = (0..6)
        .map(|i| {
            // Some are equal, some are zero.
            let base = dice.roll(3) as f32;
            floats(&format!("w{i}"), &[4], &[base, 0.0, 1.0, 2.0])
        })
        .collect();
    values.extend(weights.iter().map(|w| w.name().to_owned()));
    let count = 4 + dice.roll(30);
    let mut nodes: Vec<NodeProto> = Vec::new();
    for i in 0..count {
        let pick = |dice: &mut Dice, values: &[String]| {
            // Recent values more often, so that graphs are deep as well as wide.
            let from = if dice.roll(2) == 0 {
                values.len().saturating_sub(5)
            } else {
                0
            };
            values[from + dice.roll(values.len() - from)].clone()
        };
        let out = format!("v{i}");
        let (p, q) = (pick(&mut dice, &values), pick(&mut dice, &values));
        let name = format!("n{i}");
        let made = match dice.roll(10) {
            0..=3 => {
                let op = UNARY[dice.roll(UNARY.len())];
                let mut made = named(op, name, &[&p], &[&out]);
                if op == "LeakyRelu" {
                    made.attribute.push(int("alpha", dice.roll(3) as i64));
                }
                made
            }
            4..=7 => named(BINARY[dice.roll(BINARY.len())], name, &[&p, &q], &[&out]),
            8 => {
                let second = format!("v{i}b");
                let mut made = named("Split", name, &[&p], &[&out, &second]);
                made.attribute.push(int("axis", dice.roll(2) as i64));
                values.push(second);
                made
            }
            _ => {
                let body = |name: &str, op: &str, read: &str| {
                    let (inner, given) = (format!("{name}{i}_in"), format!("{name}{i}_out"));
                    let nodes = [
                        named(op, format!("{name}{i}_1"), &[read, &q], &[&inner]),
                        named("Neg", format!("{name}{i}_2"), &[&inner], &[&given]),
                    ];
                    graph(name, &[], &[two(&given)], &[], &nodes)
                };
                let (then, other) = (BINARY[dice.roll(5)], BINARY[dice.roll(5)]);
                let bodies = [
                    ("then_branch", body("t", then, &p)),
                    ("else_branch", body("e", other, &p)),
                ];
                let mut made = holder("If", &["x0"], &[&out], &bodies);
                made.name = Some(name);
                made
            }
        };
        nodes.push(made);
        values.push(out);
    }
    let last = values.len() - 1;
    let mut outputs: Vec<String> = vec![values[last].clone()];
    for _ in 0..dice.roll(3) {
        let candidate = values[8 + dice.roll(values.len() - 8)].clone();
        if !outputs.contains(&candidate) {
            outputs.push(candidate);
        }
    }
    let outputs: Vec<_> = outputs.iter().map(|n| two(n)).collect();
    model(graph(
        "random",
        &[two("x0"), two("x1")],
        &outputs,
        &weights,
        &nodes,
    ))
}

/// Terms of a graph: what each output is, and what each node is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Terms {
    outputs: Vec<u64>,
    nodes: Vec<u64>,
    by_name: HashMap<String, u64>,
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

fn terms(g: &GraphProto, outer: &HashMap<String, u64>) -> Terms {
    let mut known = outer.clone();
    for input in &g.input {
        known.insert(input.name().to_owned(), hash(("input", input.name())));
    }
    for tensor in &g.initializer {
        let bytes: &[u8] = tensor.raw_data.as_deref().unwrap_or(&[]);
        known.insert(
            tensor.name().to_owned(),
            hash(("constant", &tensor.dims, bytes)),
        );
    }
    let mut found = Terms {
        outputs: Vec::new(),
        nodes: Vec::new(),
        by_name: HashMap::new(),
    };
    for n in &g.node {
        let mut inputs: Vec<u64> = n.input.iter().map(|i| known[i]).collect();
        if matches!(n.op_type(), "Add" | "Mul") {
            inputs.sort_unstable();
        }
        let mut parts: Vec<(String, u64)> = Vec::new();
        for a in &n.attribute {
            match &a.g {
                Some(body) => {
                    let mut inner = terms(body, &known);
                    inner.nodes.sort_unstable();
                    found.by_name.extend(inner.by_name);
                    parts.push((a.name().to_owned(), hash((inner.outputs, inner.nodes))));
                }
                None => parts.push((a.name().to_owned(), hash(a.i()))),
            }
        }
        parts.sort();
        let term = hash((n.op_type(), inputs, parts));
        for (slot, output) in n.output.iter().enumerate() {
            known.insert(output.clone(), hash((term, slot)));
        }
        found.nodes.push(term);
        found.by_name.insert(n.name().to_owned(), term);
    }
    found.outputs = g.output.iter().map(|o| known[o.name()]).collect();
    found
}

fn terms_of(model: &ModelProto) -> Terms {
    let mut all = terms(model.graph.as_ref().unwrap(), &HashMap::new());
    all.nodes.sort_unstable();
    all
}

/// Whether two models are certainly not the same.
fn differ(a: &ModelProto, b: &ModelProto) -> bool {
    let (x, y) = (terms_of(a), terms_of(b));
    x.outputs != y.outputs || x.nodes != y.nodes
}

/// Another name, order and storage for everything.
fn disguised(model: &ModelProto, seed: u64) -> ModelProto {
    let mut other = model.clone();
    // Outputs keep their names, so they are computed under another name first only
    // where the renaming leaves them alone: it does.
    edit::rename(&mut other, "q");
    edit::shuffle(&mut other, seed);
    if seed.is_multiple_of(3) {
        edit::typed(other.graph.as_mut().unwrap());
    } else if seed % 3 == 1 {
        edit::as_nodes(other.graph.as_mut().unwrap());
    }
    other
}

/// Nodes of a node's bodies.
fn inside(n: &NodeProto) -> impl Iterator<Item = &NodeProto> {
    let bodies = n.attribute.iter().filter_map(|a| a.g.as_ref());
    bodies.flat_map(|g| &g.node)
}

/// What a node and its bodies read.
fn reads(n: &NodeProto) -> impl Iterator<Item = &String> {
    n.input.iter().chain(inside(n).flat_map(|n| &n.input))
}

/// One change of what is computed. Returns what was done, and the nodes around it.
fn mutate(model: &mut ModelProto, seed: u64) -> Option<(&'static str, BTreeSet<String>)> {
    let mut dice = Dice(seed.wrapping_mul(0xd6e8_feb8_6659_fd93) | 1);
    let g = model.graph.as_mut().unwrap();
    let at = dice.roll(g.node.len());
    let readers = |g: &GraphProto, at: usize| -> BTreeSet<String> {
        let made: BTreeSet<&String> = g.node[at].output.iter().collect();
        let reads = |n: &&NodeProto| reads(n).any(|i| made.contains(i));
        let mut names: BTreeSet<String> = g
            .node
            .iter()
            .filter(reads)
            .map(|n| n.name().to_owned())
            .collect();
        names.insert(g.node[at].name().to_owned());
        names
    };
    let around = readers(g, at);
    let earlier: Vec<String> = {
        let before = g.node[..at].iter().flat_map(|n| n.output.clone());
        ["x0", "x1"]
            .map(String::from)
            .into_iter()
            .chain(before)
            .collect()
    };
    let n = &mut g.node[at];
    let what = match dice.roll(8) {
        0 => {
            let of: &[&str] = match n.input.len() {
                1 if n.op_type() != "Split" && n.op_type() != "If" => &["Abs", "Tanh"],
                2 => &["Pow", "Min", "Div"],
                _ => return None,
            };
            n.op_type = Some(of[dice.roll(of.len())].into());
            "operator"
        }
        1 => {
            let a = n.attribute.iter_mut().find(|a| a.g.is_none())?;
            a.i = Some(a.i() + 1);
            "attribute"
        }
        2 => {
            let slot = dice.roll(n.input.len());
            n.input[slot] = earlier[dice.roll(earlier.len())].clone();
            "input"
        }
        3 => {
            let weight = dice.roll(g.initializer.len());
            let tensor = &mut g.initializer[weight];
            let mut raw = tensor.raw_data.clone().unwrap().to_vec();
            let bit = dice.roll(raw.len() * 8);
            raw[bit / 8] ^= 1 << (bit % 8);
            tensor.raw_data = Some(raw.into());
            let name = tensor.name().to_owned();
            let mut names: BTreeSet<String> = BTreeSet::new();
            for n in g.node.iter().filter(|n| reads(n).any(|i| *i == name)) {
                names.insert(n.name().to_owned());
                names.extend(inside(n).map(|n| n.name().to_owned()));
            }
            return Some(("bit", names));
        }
        4 => {
            if n.input.len() != 1
                || n.output.len() != 1
                || g.output.iter().any(|o| o.name() == g.node[at].output[0])
            {
                return None;
            }
            let (from, gone) = (g.node[at].input[0].clone(), g.node[at].output[0].clone());
            g.node.remove(at);
            let inner = |n: &mut NodeProto| {
                n.input
                    .iter_mut()
                    .filter(|i| **i == gone)
                    .for_each(|i| i.clone_from(&from));
                for body in n.attribute.iter_mut().filter_map(|a| a.g.as_mut()) {
                    let all = body.node.iter_mut().flat_map(|n| &mut n.input);
                    all.filter(|i| **i == gone)
                        .for_each(|i| i.clone_from(&from));
                }
            };
            g.node.iter_mut().for_each(inner);
            "removal"
        }
        5 => {
            let slot = dice.roll(n.input.len());
            let from = std::mem::replace(&mut n.input[slot], "inserted".into());
            let made = named("Tanh", "new".into(), &[&from], &["inserted"]);
            g.node.insert(at, made);
            "insertion"
        }
        6 => {
            if n.input.len() != 2 {
                return None;
            }
            n.input.swap(0, 1);
            "operands"
        }
        _ => {
            let body = n.attribute.iter_mut().find_map(|a| a.g.as_mut())?;
            body.node[1].op_type = Some("Abs".into());
            let name = body.node[1].name().to_owned();
            return Some(("body", BTreeSet::from([name])));
        }
    };
    Some((what, around))
}

fn compared(a: &ModelProto, b: &ModelProto) -> (bool, ModelDiff) {
    let found =
        compare_models(&load(a), &load(b), &Options::default()).unwrap_or_else(|e| panic!("{e}"));
    (found.changes.iter().any(|c| c.class.counts()), found)
}

fn titles(found: &ModelDiff) -> Vec<String> {
    found
        .changes
        .iter()
        .map(|c| format!("{}: {}", c.class.word(), c.title))
        .collect()
}

#[test]
fn names_order_and_storage_are_no_difference() {
    for seed in 0..SEEDS {
        let a = generate(seed);
        let b = disguised(&a, seed + 1);
        let (differs, found) = compared(&a, &b);
        assert!(!differs, "seed {seed}: {:#?}", titles(&found));
        let facts = &found.facts;
        assert_eq!(
            (facts.removed, facts.added, facts.modified),
            (0, 0, 0),
            "seed {seed}"
        );
    }
}

#[test]
fn every_mutation_is_found_where_it_is() {
    let mut done: HashMap<&str, usize> = HashMap::new();
    for seed in 0..SEEDS * 3 {
        let a = generate(seed);
        let mut b = a.clone();
        let Some((what, around)) = mutate(&mut b, seed) else {
            continue;
        };
        if !differ(&a, &b) {
            continue;
        }
        *done.entry(what).or_default() += 1;
        let (differs, found) = compared(&a, &b);
        assert!(differs, "seed {seed}: {what} at {around:?} was not found");
        let (back, _) = compared(&b, &a);
        assert!(
            back,
            "seed {seed}: {what} was not found the other way round"
        );
        let (hidden, _) = compared(&a, &disguised(&b, seed));
        assert!(
            hidden,
            "seed {seed}: {what} was not found under other names"
        );
        // Twins of the changed node are as good as the node itself.
        let all = terms_of(&a).by_name;
        let wanted: BTreeSet<u64> = around.iter().filter_map(|n| all.get(n).copied()).collect();
        let places = found
            .changes
            .iter()
            .filter(|c| c.class.counts())
            .flat_map(|c| &c.places);
        let told = places.flat_map(|p| p.a.iter().chain(&p.b).chain(&p.removed).chain(&p.added));
        let told: Vec<String> = told.filter_map(|s| s.node.clone()).collect();
        let outputs = found
            .changes
            .iter()
            .any(|c| c.kind.word() == "output-rewired");
        let near = told.iter().any(|n| {
            n == "new" || around.contains(n) || all.get(n).is_some_and(|t| wanted.contains(t))
        });
        assert!(
            near || outputs,
            "seed {seed}: {what} at {around:?} was told at {told:?}: {:#?}",
            titles(&found)
        );
    }
    for what in [
        "operator",
        "attribute",
        "input",
        "bit",
        "removal",
        "insertion",
        "operands",
        "body",
    ] {
        assert!(
            done.get(what).copied().unwrap_or(0) >= 5,
            "too few of {what}: {done:?}"
        );
    }
}

/// A single change leaves the rest alone: nothing far away is reported.
#[test]
fn a_change_stays_local() {
    for (length, at) in [(50, 25), (400, 0), (400, 399)] {
        let chain = |extra: Option<usize>| {
            let mut nodes = Vec::new();
            let mut last = "x0".to_owned();
            for i in 0..length {
                if extra == Some(i) {
                    nodes.push(named("Tanh", String::new(), &[&last], &["extra"]));
                    last = "extra".into();
                }
                let out = if i == length - 1 {
                    "y".to_owned()
                } else {
                    format!("v{i}")
                };
                nodes.push(named("Relu", String::new(), &[&last], &[&out]));
                last = out;
            }
            model(graph("chain", &[two("x0")], &[two("y")], &[], &nodes))
        };
        let (differs, found) = compared(&chain(None), &chain(Some(at)));
        assert!(differs);
        assert_eq!(found.changes.len(), 1, "{:?}", titles(&found));
        assert_eq!((found.facts.added, found.facts.removed), (1, 0));
    }
}

/// Thousands of nodes that nothing tells apart are matched in one go, and one of them less is one
/// change.
#[test]
fn many_identical_nodes() {
    let wide = |skip: Option<usize>| {
        let names: Vec<String> = (0..3000).map(|i| format!("r{i}")).collect();
        let kept: Vec<&str> = names
            .iter()
            .enumerate()
            .filter(|(i, _)| Some(*i) != skip)
            .map(|(_, n)| n.as_str())
            .collect();
        let mut nodes: Vec<NodeProto> = kept
            .iter()
            .map(|n| named("Relu", String::new(), &["x0"], &[n]))
            .collect();
        let mut concat = named("Concat", "cat".into(), &kept, &["y"]);
        concat.attribute.push(int("axis", 0));
        nodes.push(concat);
        model(graph("wide", &[two("x0")], &[two("y")], &[], &nodes))
    };
    let (differs, _) = compared(&wide(None), &disguised(&wide(None), 4));
    assert!(!differs);
    let (differs, found) = compared(&wide(None), &wide(Some(1234)));
    assert!(differs);
    assert_eq!(found.facts.removed, 1, "{:?}", titles(&found));
    assert!(found.changes.len() <= 2, "{:?}", titles(&found));
}
