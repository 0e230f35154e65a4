//! Taking the branches of an `If` apart into models of their own, and putting
//! them together again.
//!
//! ```text
//!  inputs ─┬─ If(use_cache) ─┬─ outputs          then: inputs that it reads ─ body ─ outputs
//!  weights ┘  then │ else    │            ⇄      else: inputs that it reads ─ body ─ outputs
//! ```
//!
//! A merged decoder is one such file: everything lies in the branches, which read
//! the outer graph's inputs and weights. As models of their own they can be
//! recognised and patched like any other. Outputs bear the outer graph's names
//! there. Weights are referred to, not read.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::copy::{Copier, Names, all};
use super::inline::called;
use super::load::{Loader, NodeDraft};
use super::model::{AttrValue, Attribute, Def, GraphKind, Model};
use super::{Dim, GraphId, IrError, NodeId, ValueId, ValueType};

/// One branch of an `If`.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Attribute that holds it: `then_branch` or `else_branch`.
    pub attribute: String,
    /// The branch as a model.
    pub model: Model,
}

const WHAT: &str = "branches";

fn fail(place: String, reason: &str) -> IrError {
    IrError::Patch {
        pass: WHAT.into(),
        reason: format!("{place}: {reason}"),
    }
}

/// The bodies that a node's attributes hold, with the attributes' names.
fn bodies(model: &Model, node: NodeId) -> Vec<(String, GraphId)> {
    let attributes = model.node(node).attributes.iter();
    let held = attributes.filter_map(|a| match a.value {
        AttrValue::Graph(g) => Some((a.name.clone(), g)),
        _ => None,
    });
    held.collect()
}

/// Values of the outer graph that a body reads or gives out.
fn captured(model: &Model, body: GraphId) -> HashSet<ValueId> {
    let g = model.subgraph(body);
    let mut reads = g.outputs.clone();
    for &node in &g.nodes {
        model.push_reads(node, &mut reads);
    }
    let outer = |v: &ValueId| model.value(*v).graph == model.main();
    reads.into_iter().filter(outer).collect()
}

/// Each branch of an `If` of the main graph as a model.
///
/// # Errors
/// Where the branches are not all there is: an output that is not the `If`'s, a
/// node that reads what it gives, or a branch that reads what is computed outside
/// (constants excepted).
pub fn split(model: &Model, node: NodeId) -> Result<Vec<Branch>, IrError> {
    let main = model.graph();
    let outputs = &model.node(node).outputs;
    for &output in &main.outputs {
        if !outputs.contains(&Some(output)) {
            let place = format!("graph output '{}'", model.name(output));
            let reason = format!("it is computed outside of {}", model.describe(node));
            return Err(fail(place, &reason));
        }
    }
    for &output in outputs.iter().flatten() {
        if let Some(reader) = model.value(output).uses.first() {
            let reason = format!("{} reads it", model.describe(reader.node));
            let place = format!(
                "output '{}' of {}",
                model.name(output),
                model.describe(node)
            );
            return Err(fail(place, &reason));
        }
    }
    let bodies = bodies(model, node);
    let split = bodies.into_iter().map(|(attribute, body)| {
        let model = branch(model, node, &attribute, body)?;
        Ok(Branch { attribute, model })
    });
    split.collect()
}

/// One branch as a model.
fn branch(model: &Model, node: NodeId, attribute: &str, body: GraphId) -> Result<Model, IrError> {
    let place = format!("{attribute} of {}", model.describe(node));
    let g = model.subgraph(body);
    if let Some(&index) = called(model, body).first() {
        let function = &model.functions[index];
        let reason = format!(
            "it calls the function {}::{}",
            function.domain, function.name
        );
        return Err(fail(place, &reason));
    }
    let mut names = Names::default();
    let given = &model.node(node).outputs;
    if given.len() != g.outputs.len() {
        let reason = format!(
            "it gives {} values, the node {}",
            g.outputs.len(),
            given.len()
        );
        return Err(fail(place, &reason));
    }
    for (inner, outer) in g.outputs.iter().zip(given) {
        let v = model.value(*inner);
        let own = v.graph == body && matches!(v.def, Def::Node { .. });
        let Some(outer) = outer.filter(|_| own) else {
            let reason = format!("its output '{}' is not computed in it", v.name);
            return Err(fail(place, &reason));
        };
        if names
            .listed
            .insert(*inner, model.name(outer).to_owned())
            .is_some()
        {
            let reason = format!("it gives '{}' out twice", v.name);
            return Err(fail(place, &reason));
        }
    }
    let mut copier = Copier::new(model, WHAT);
    copier.functions(|_| false)?;
    let new = copier.into.header().main();
    copier.head(body, new, &names, |_| true)?;
    let reads = captured(model, body);
    let main = model.graph();
    for &input in main.inputs.iter().filter(|v| reads.contains(v)) {
        let v = model.value(input);
        copier
            .into
            .input(new, &v.name, v.ty.clone(), v.info_origin.clone())?;
    }
    for &value in main.initializers.iter().filter(|v| reads.contains(v)) {
        if let Some(tensor) = &model.value(value).initializer {
            copier.into.initializer(new, tensor.clone())?;
        }
    }
    for &outer in &main.nodes {
        let read = model.node(outer).outputs.iter().flatten();
        let Some(read) = read.copied().find(|o| reads.contains(o)) else {
            continue;
        };
        if !model.node(outer).is("Constant") {
            let reason = format!(
                "it reads '{}', which {} computes outside of it",
                model.name(read),
                model.describe(outer)
            );
            return Err(fail(place, &reason));
        }
        copier.node(outer, new, &Names::default(), &mut all)?;
    }
    if let Some(opaque) = reads.iter().find(|v| model.value(**v).def == Def::Opaque) {
        let reason = format!("it reads the sparse initializer '{}'", model.name(*opaque));
        return Err(fail(place, &reason));
    }
    all(&mut copier, body, new, &names)?;
    for (inner, outer) in g.outputs.iter().zip(given.iter().flatten()) {
        let v = model.value(*inner);
        let name = model.name(*outer);
        let stated = v.ty.clone();
        let origin = v
            .info_origin
            .clone()
            .filter(|_| name == v.name && stated.is_some());
        let ty = stated.or_else(|| model.value(*outer).ty.clone());
        copier.into.output(new, name, ty, origin);
    }
    copier.types(g, new, &names);
    copier.into.touch(new);
    Ok(copier.into.finish())
}

/// The model whose `If` has these branches, given as [`split`] gave them and
/// patches changed them.
///
/// New initializers of a branch lie in its body. New graph inputs, and types of
/// inputs and outputs that patches changed, are the outer graph's as well.
/// Outputs that every branch has beyond the `If`'s become outputs of the node and
/// of the graph.
///
/// # Errors
/// Branches that do not fit the node or each other.
pub fn join(whole: &Model, node: NodeId, branches: &[Branch]) -> Result<Model, IrError> {
    let held = bodies(whole, node);
    let names = Names::default();
    let main = whole.graph();
    let further = further_outputs(whole, node, branches)?;
    let mut copier = Copier::new(whole, WHAT);
    if let Some(patched) = branches.iter().find(|b| b.model.is_patched()) {
        let metadata = patched.model.metadata.clone();
        copier.into.header().metadata = metadata;
    }
    let new = copier.into.header().main();
    let read: Vec<HashSet<ValueId>> = held.iter().map(|(_, g)| captured(whole, *g)).collect();
    let weights: HashSet<&str> = branches
        .iter()
        .flat_map(|b| {
            b.model
                .graph()
                .initializers
                .iter()
                .map(|v| b.model.name(*v))
        })
        .collect();
    let still = |v: ValueId| {
        let outside = || {
            let main_graph = |u: &super::Use| whole.node(u.node).graph == whole.main();
            whole.value(v).uses.iter().any(main_graph)
        };
        let read_before = read.iter().any(|r| r.contains(&v));
        !read_before || weights.contains(whole.name(v)) || outside()
    };
    copier.head(whole.main(), new, &names, |v| {
        main.initializers.contains(&v) && !main.inputs.contains(&v) && still(v)
    })?;
    inputs(whole, branches, new, &mut copier.into)?;
    for &value in main.inputs.iter().filter(|v| main.initializers.contains(v)) {
        if let Some(tensor) = &whole.value(value).initializer {
            copier.into.initializer(new, tensor.clone())?;
        }
    }
    for &id in &main.nodes {
        if id != node {
            copier.node(id, new, &names, &mut all)?;
            continue;
        }
        let mut loader = copier.into;
        let mut attributes = Vec::new();
        for attribute in &whole.node(node).attributes {
            let AttrValue::Graph(old) = attribute.value else {
                attributes.push(attribute.clone());
                continue;
            };
            let branch = branches.iter().find(|b| b.attribute == attribute.name);
            let branch = branch
                .ok_or_else(|| fail(whole.describe(node), &format!("no {}", attribute.name)))?;
            let body;
            (loader, body) = write_body(whole, old, branch, new, loader)?;
            attributes.push(Attribute {
                name: attribute.name.clone(),
                value: AttrValue::Graph(body),
            });
        }
        let n = whole.node(node);
        let list = |values: &[Option<ValueId>]| -> Vec<String> {
            let name = |v: &Option<ValueId>| v.map_or(String::new(), |v| whole.name(v).to_owned());
            values.iter().map(name).collect()
        };
        let (reads, mut gives) = (list(&n.inputs), list(&n.outputs));
        gives.extend(further.iter().map(|(name, _)| name.clone()));
        let draft = NodeDraft {
            name: n.name.clone(),
            op_type: n.op_type.clone(),
            domain: n.domain.clone(),
            overload: n.overload.clone(),
            inputs: &reads,
            outputs: &gives,
            attributes,
            origin: n.origin.clone(),
            edited: n.edited || !further.is_empty(),
        };
        loader.node(new, draft)?;
        copier = Copier::onto(whole, loader, WHAT);
    }
    for &output in &main.outputs {
        let v = whole.value(output);
        let slot = whole
            .node(node)
            .outputs
            .iter()
            .position(|o| *o == Some(output));
        let changed = slot.map(|slot| output_type(whole, &held, slot, branches, v.ty.as_ref()));
        match changed.flatten() {
            Some(ty) => copier.into.output(new, &v.name, Some(ty), None),
            None => copier
                .into
                .output(new, &v.name, v.ty.clone(), v.info_origin.clone()),
        }
    }
    for (name, ty) in further {
        copier.into.output(new, &name, ty, None);
    }
    copier.types(main, new, &names);
    copier.functions(|_| true)?;
    copier.into.touch(new);
    Ok(copier.into.finish())
}

/// Outputs beyond the node's own, which all branches must have.
fn further_outputs(
    whole: &Model,
    node: NodeId,
    branches: &[Branch],
) -> Result<Vec<(String, Option<ValueType>)>, IrError> {
    let count = whole.node(node).outputs.len();
    let of = |b: &Branch| -> Vec<(String, Option<ValueType>)> {
        let outputs = b.model.graph().outputs.iter().skip(count);
        let value = |v: &ValueId| (b.model.name(*v).to_owned(), b.model.value(*v).ty.clone());
        outputs.map(value).collect()
    };
    let Some(first) = branches.first().map(of) else {
        return Err(fail(whole.describe(node), "it has no branches"));
    };
    for branch in branches {
        let same = of(branch)
            .iter()
            .map(|o| &o.0)
            .eq(first.iter().map(|o| &o.0));
        if !same || branch.model.graph().outputs.len() < count {
            let place = format!("{} of {}", branch.attribute, whole.describe(node));
            return Err(fail(place, "it has other outputs than the other branch"));
        }
    }
    Ok(first)
}

/// Adds the outer graph's inputs: its own, with the types that the branches have
/// now, and new ones.
fn inputs(
    whole: &Model,
    branches: &[Branch],
    new: GraphId,
    loader: &mut Loader,
) -> Result<(), IrError> {
    for &input in &whole.graph().inputs {
        let v = whole.value(input);
        let mut changed: Option<ValueType> = None;
        for branch in branches {
            let Some(own) = branch.model.input(&v.name) else {
                continue;
            };
            let ty = &branch.model.value(own).ty;
            if *ty == v.ty {
                continue;
            }
            changed = match (changed, ty) {
                (Some(before), Some(ty)) if before != *ty => {
                    Some(common(&before, ty).ok_or_else(|| {
                        fail(
                            format!("input '{}'", v.name),
                            "the branches give it two types",
                        )
                    })?)
                }
                (_, ty) => ty.clone(),
            };
        }
        match changed {
            Some(ty) => loader.input(new, &v.name, Some(ty), None)?,
            None => loader.input(new, &v.name, v.ty.clone(), v.info_origin.clone())?,
        };
    }
    let mut added: BTreeMap<String, Option<ValueType>> = BTreeMap::new();
    for branch in branches {
        for &input in &branch.model.graph().inputs {
            let v = branch.model.value(input);
            if whole.input(&v.name).is_some() {
                continue;
            }
            match added.get(&v.name) {
                None => {
                    loader.input(new, &v.name, v.ty.clone(), None)?;
                    added.insert(v.name.clone(), v.ty.clone());
                }
                Some(ty) if *ty == v.ty => {}
                Some(_) => {
                    let place = format!("new input '{}'", v.name);
                    return Err(fail(place, "the branches give it two types"));
                }
            }
        }
    }
    Ok(())
}

/// Copies a branch's model into the node's body.
fn write_body(
    whole: &Model,
    old: GraphId,
    branch: &Branch,
    parent: GraphId,
    loader: Loader,
) -> Result<(Loader, GraphId), IrError> {
    let part = &branch.model;
    let outer: HashMap<&str, ValueId> = whole
        .graph()
        .inputs
        .iter()
        .chain(&whole.graph().initializers)
        .chain(whole.graph().nodes.iter().flat_map(|n| {
            let node = whole.node(*n);
            let constant = node.is("Constant").then_some(&node.outputs);
            constant.into_iter().flatten().flatten()
        }))
        .map(|v| (whole.name(*v), *v))
        .collect();
    let g = whole.subgraph(old);
    let mut names = Names::default();
    for (own, given) in part.graph().outputs.iter().zip(&g.outputs) {
        if part.name(*own) != whole.name(*given) {
            names.listed.insert(*own, whole.name(*given).to_owned());
        }
    }
    let mut copier = Copier::onto(part, loader, WHAT);
    let body = copier.into.graph(String::new(), GraphKind::Body { parent });
    copier.head(part.main(), body, &names, |v| {
        let input = part.graph().inputs.contains(&v);
        !input && !outer.contains_key(part.name(v))
    })?;
    for &id in &part.graph().nodes {
        let outside = part.node(id).is("Constant")
            && part
                .node(id)
                .outputs
                .iter()
                .flatten()
                .any(|o| outer.contains_key(part.name(*o)));
        if !outside {
            copier.node(id, body, &names, &mut all)?;
        }
    }
    copier.tail(part.main(), body, &names)?;
    copier.into.touch(body);
    Ok((copier.into, body))
}

/// The outer type of an output whose type a patch changed in some branch.
fn output_type(
    whole: &Model,
    held: &[(String, GraphId)],
    slot: usize,
    branches: &[Branch],
    outer: Option<&ValueType>,
) -> Option<ValueType> {
    let mut result: Option<ValueType> = None;
    for branch in branches {
        let now = branch.model.graph().outputs.get(slot)?;
        let now = branch.model.value(*now).ty.as_ref()?;
        let (_, body) = held.iter().find(|(name, _)| *name == branch.attribute)?;
        let before = whole.value(whole.subgraph(*body).outputs[slot]).ty.as_ref();
        if before.or(outer) == Some(now) {
            continue;
        }
        let ty = changed_dims(before.or(outer), now, outer);
        result = match result {
            Some(other) => common(&other, &ty),
            None => Some(ty),
        };
    }
    result
}

/// `outer` with the dimensions in which `now` differs from `before`.
fn changed_dims(
    before: Option<&ValueType>,
    now: &ValueType,
    outer: Option<&ValueType>,
) -> ValueType {
    let shapes = (
        before.and_then(ValueType::shape),
        now.shape(),
        outer.and_then(ValueType::shape),
    );
    let (Some(before), Some(new), Some(outer), Some(dtype)) =
        (shapes.0, shapes.1, shapes.2, now.dtype())
    else {
        return now.clone();
    };
    if before.len() != new.len() || outer.len() != new.len() {
        return now.clone();
    }
    let dims = before.iter().zip(new).zip(outer);
    let dims = dims.map(|((b, n), o)| if b == n { o.clone() } else { n.clone() });
    ValueType::tensor(dtype, dims.collect())
}

/// What two types have in common; `None` if they are not of one element type and
/// rank.
fn common(a: &ValueType, b: &ValueType) -> Option<ValueType> {
    let dtype = a.dtype().filter(|d| Some(*d) == b.dtype())?;
    let (x, y) = (a.shape()?, b.shape()?);
    let dims = x
        .iter()
        .zip(y)
        .map(|(x, y)| if x == y { x.clone() } else { Dim::Unknown });
    (x.len() == y.len()).then(|| ValueType::tensor(dtype, dims.collect()))
}
