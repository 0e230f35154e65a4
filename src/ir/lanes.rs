//! Taking a graph of several networks side by side apart into a model for each, and
//! putting them together again.
//!
//! ```text
//!  input a ─ network a ─ output a          a: input a, what it reads ─ network a ─ output a
//!  weights ┤                        ⇄
//!  input b ─ network b ─ output b          b: input b, what it reads ─ network b ─ output b
//! ```
//!
//! Weights, constants and whatever else both read come with each of them and are there
//! once again in the joined model. What patches insert bears the same names in every
//! lane, so in the joined model those of all lanes but the first lie in a scope of their
//! own, `duet/<pass>/<lane>/…`.

use std::collections::{HashMap, HashSet};

use super::cone::ancestors;
use super::copy::{Copier, Names, Scope, all, renamed_tensor};
use super::load::Loader;
use super::model::Model;
use super::{GraphId, IrError, NodeId, ValueId};

const WHAT: &str = "lanes";

/// One of the networks as a model.
#[derive(Clone, Debug)]
pub struct Lane {
    /// What it is told by: the name of its input.
    pub name: String,
    /// The network.
    pub model: Model,
}

fn fail(place: String, reason: &str) -> IrError {
    IrError::Patch {
        pass: WHAT.into(),
        reason: format!("{place}: {reason}"),
    }
}

/// Names of the lane at `index` in the joined model (`enter`), or of what lies in its
/// scope there once it is apart.
fn names(index: usize, lane: &str, enter: bool) -> Names {
    Names {
        scope: (index > 0).then(|| Scope {
            name: lane.to_owned(),
            enter,
        }),
        ..Names::default()
    }
}

/// Each group of outputs, named for its lane, as a model: with the nodes, inputs and
/// weights that the outputs depend on.
///
/// # Errors
/// A lane that cannot be built from what the model holds.
pub fn lanes(model: &Model, groups: &[(String, Vec<ValueId>)]) -> Result<Vec<Lane>, IrError> {
    let parts = groups.iter().enumerate().map(|(index, (name, outputs))| {
        let reads = ancestors(model, outputs, false);
        let names = names(index, name, false);
        let mut copier = Copier::new(model, WHAT);
        copier.functions(|_| true)?;
        let new = copier.into.header().main();
        copier.head(model.main(), new, &names, |v| reads.contains(&v))?;
        for &id in &model.graph().nodes {
            let mut made = model.node(id).outputs.iter().flatten();
            if made.any(|o| reads.contains(o)) {
                copier.node(id, new, &names, &mut all)?;
            }
        }
        for &output in outputs {
            copier.output(new, output, &names)?;
        }
        copier.types(model.graph(), new, &names);
        copier.into.touch(new);
        Ok(Lane {
            name: name.clone(),
            model: copier.into.finish(),
        })
    });
    parts.collect()
}

/// The model whose networks are these, given as [`lanes`] gave them and patches changed
/// them.
///
/// # Errors
/// A node that several lanes read and one of them changed; values that two lanes add
/// under one name.
pub fn join_lanes(whole: &Model, parts: &[Lane]) -> Result<Model, IrError> {
    let join = Join::new(whole, parts)?;
    let mut copier = Copier::new(whole, WHAT);
    if let Some(patched) = parts.iter().find(|p| p.model.is_patched()) {
        copier.into.header().metadata = patched.model.metadata.clone();
    }
    let new = copier.into.header().main();
    let main = whole.graph();
    let plain = Names::default();
    let has = |v: ValueId| {
        let name = whole.name(v);
        let holds = |p: &Lane| {
            let mut weights = p.model.graph().initializers.iter();
            weights.any(|w| p.model.name(*w) == name)
        };
        !join.reads.iter().any(|r| r.contains(&v)) || parts.iter().any(holds)
    };
    copier.head(whole.main(), new, &plain, |v| {
        main.initializers.contains(&v) && !main.inputs.contains(&v) && has(v)
    })?;
    join.inputs(new, &mut copier.into)?;
    for &value in main.inputs.iter().filter(|v| main.initializers.contains(v)) {
        if let Some(tensor) = &whole.value(value).initializer {
            copier.into.initializer(new, tensor.clone())?;
        }
    }
    for (part, names) in parts.iter().zip(&join.names) {
        for &value in &part.model.graph().initializers {
            let tensor = part.model.value(value).initializer.as_ref();
            if let Some(tensor) = tensor.filter(|t| whole.find(&t.name).is_none()) {
                let name = names.of(&part.model, value);
                copier.into.initializer(new, renamed_tensor(tensor, name))?;
            }
        }
    }
    let mut into = join.nodes(new, copier.into)?;
    let mut written: HashSet<String> = HashSet::new();
    for &output in &main.outputs {
        let name = whole.name(output);
        written.insert(name.to_owned());
        let own = parts
            .iter()
            .zip(&join.names)
            .find_map(|(part, names)| Some((&part.model, part.model.output(name)?, names)));
        let (from, output, names) = own.unwrap_or((whole, output, &plain));
        let mut copier = Copier::onto(from, into, WHAT);
        copier.output(new, output, names)?;
        into = copier.into;
    }
    for (part, names) in parts.iter().zip(&join.names) {
        let mut copier = Copier::onto(&part.model, into, WHAT);
        for &output in &part.model.graph().outputs {
            let name = names.of(&part.model, output);
            if whole.output(part.model.name(output)).is_none() && !written.insert(name.clone()) {
                return Err(fail(format!("output '{name}'"), "two lanes give it out"));
            }
            if whole.output(part.model.name(output)).is_none() {
                copier.output(new, output, names)?;
            }
        }
        copier.types(part.model.graph(), new, names);
        into = copier.into;
    }
    for &value in &main.typed {
        let v = whole.value(value);
        if !join.reads.iter().any(|r| r.contains(&value)) {
            into.value_info(new, &v.name, v.ty.clone(), v.info_origin.clone());
        }
    }
    let mut copier = Copier::onto(whole, into, WHAT);
    copier.functions(|_| true)?;
    copier.into.touch(new);
    Ok(copier.into.finish())
}

struct Join<'a> {
    whole: &'a Model,
    parts: &'a [Lane],
    names: Vec<Names>,
    /// What each lane read of the whole model before it was changed.
    reads: Vec<HashSet<ValueId>>,
}

impl<'a> Join<'a> {
    fn new(whole: &'a Model, parts: &'a [Lane]) -> Result<Self, IrError> {
        let reads = parts.iter().map(|part| {
            let outputs = whole.graph().outputs.iter().copied();
            let own = outputs.filter(|o| part.model.output(whole.name(*o)).is_some());
            let own: Vec<ValueId> = own.collect();
            match own.is_empty() {
                true => Err(fail(
                    format!("the part of '{}'", part.name),
                    "it gives none of the file's outputs",
                )),
                false => Ok(ancestors(whole, &own, false)),
            }
        });
        let own = |(i, part): (usize, &Lane)| names(i, &part.name, true);
        Ok(Self {
            whole,
            parts,
            names: parts.iter().enumerate().map(own).collect(),
            reads: reads.collect::<Result<_, _>>()?,
        })
    }

    /// The whole model's inputs with the types that the lanes have now, and new ones.
    fn inputs(&self, new: GraphId, into: &mut Loader) -> Result<(), IrError> {
        for &input in &self.whole.graph().inputs {
            let v = self.whole.value(input);
            let types = self.parts.iter().filter_map(|part| {
                let own = part.model.input(&v.name)?;
                Some(&part.model.value(own).ty)
            });
            let mut changed: Vec<_> = types.filter(|ty| **ty != v.ty).collect();
            changed.dedup();
            match changed[..] {
                [] => into.input(new, &v.name, v.ty.clone(), v.info_origin.clone())?,
                [ty] => into.input(new, &v.name, ty.clone(), None)?,
                _ => {
                    let place = format!("input '{}'", v.name);
                    return Err(fail(place, "the lanes give it several types"));
                }
            };
        }
        for part in self.parts {
            for &input in &part.model.graph().inputs {
                let v = part.model.value(input);
                if self.whole.input(&v.name).is_none() {
                    into.input(new, &v.name, v.ty.clone(), None)?;
                }
            }
        }
        Ok(())
    }

    /// The nodes: in the whole model's order, what patches inserted where it lies in
    /// its lane.
    fn nodes(&self, new: GraphId, mut into: Loader) -> Result<Loader, IrError> {
        let (whole, parts) = (self.whole, self.parts);
        let mut place: HashMap<&str, usize> = HashMap::new();
        for (index, &id) in whole.graph().nodes.iter().enumerate() {
            for &output in whole.node(id).outputs.iter().flatten() {
                place.insert(whole.name(output), index);
            }
        }
        let index_of = |part: &Lane, id: NodeId| {
            let mut made = part.model.node(id).outputs.iter().flatten();
            made.find_map(|o| place.get(part.model.name(*o)).copied())
        };
        let still: Vec<HashSet<usize>> = parts
            .iter()
            .map(|p| {
                let nodes = p.model.graph().nodes.iter();
                nodes.filter_map(|id| index_of(p, *id)).collect()
            })
            .collect();
        let mut at = vec![0; parts.len()];
        let mut written: HashSet<usize> = HashSet::new();
        let end = whole.graph().nodes.len();
        for index in 0..=end {
            for (i, part) in parts.iter().enumerate() {
                let nodes = &part.model.graph().nodes;
                let wanted = index == end || still[i].contains(&index);
                while wanted && at[i] < nodes.len() && !(index < end && written.contains(&index)) {
                    let id = nodes[at[i]];
                    at[i] += 1;
                    let own = index_of(part, id);
                    if let Some(own) = own {
                        self.unchanged_if_shared(own, part, id)?;
                    }
                    if own.is_some_and(|k| !written.insert(k)) {
                        continue;
                    }
                    into = copy(&part.model, into, id, new, &self.names[i])?;
                }
            }
            let Some(&id) = whole.graph().nodes.get(index) else {
                continue;
            };
            let mut made = whole.node(id).outputs.iter().flatten();
            let parted = made.any(|o| self.reads.iter().any(|r| r.contains(o)));
            if !parted {
                into = copy(whole, into, id, new, &Names::default())?;
            }
        }
        Ok(into)
    }

    /// That a node which several lanes have reads what it read: there is one of it.
    fn unchanged_if_shared(&self, index: usize, part: &Lane, id: NodeId) -> Result<(), IrError> {
        let whole = self.whole;
        let node = whole.node(whole.graph().nodes[index]);
        let shared = |o: &ValueId| self.reads.iter().filter(|r| r.contains(o)).count() > 1;
        if !node.outputs.iter().flatten().any(shared) {
            return Ok(());
        }
        let list = |model: &Model, values: &[Option<ValueId>]| -> Vec<String> {
            let name = |v: &Option<ValueId>| v.map(|v| model.name(v).to_owned());
            values.iter().filter_map(name).collect()
        };
        let now = part.model.node(id);
        match list(whole, &node.inputs) == list(&part.model, &now.inputs) {
            true => Ok(()),
            false => Err(fail(
                part.model.describe(id),
                "several networks of the file read it, and it would have to change for one of them",
            )),
        }
    }
}

fn copy(
    from: &Model,
    into: Loader,
    id: NodeId,
    new: GraphId,
    names: &Names,
) -> Result<Loader, IrError> {
    let mut copier = Copier::onto(from, into, WHAT);
    copier.node(id, new, names, &mut all)?;
    Ok(copier.into)
}
