//! Cutting a piece out of a model as a model of its own.

use std::collections::HashMap;
use std::sync::Arc;

use super::load::{Loader, NodeDraft};
use super::model::{GraphKind, Model};
use super::{IrError, Tensor, TensorData, ValueId, ValueType};

/// The part of the main graph that computes `outputs` from `inputs`, as a model
/// with these inputs and outputs under their own names.
///
/// Constants that the part reads come along (loaded, if they were external).
/// Types are needed for the new inputs and outputs because files rarely state
/// them for intermediate values.
///
/// # Errors
/// A part that needs a graph input which is not among `inputs`, that contains
/// a node with a sub-graph, or whose external data cannot be read.
pub fn extract(
    model: &Model,
    inputs: &[(ValueId, ValueType)],
    outputs: &[(ValueId, ValueType)],
) -> Result<Model, IrError> {
    let mut loader = Loader::new(Arc::new(super::NoExternal));
    let header = loader.header();
    header.ir_version = model.ir_version;
    header.opset_imports.clone_from(&model.opset_imports);
    let graph = header.main();
    loader.rename_graph(graph, "extract".into());
    let mut wanted: HashMap<ValueId, bool> = HashMap::new();
    for (value, ty) in inputs {
        loader.input(graph, model.name(*value), Some(ty.clone()), None)?;
        wanted.insert(*value, true);
    }
    let fail = |place: String, reason: &str| IrError::Patch {
        pass: "extract".into(),
        reason: format!("{place}: {reason}"),
    };
    // Post-order: a node is added after everything it reads.
    let mut stack: Vec<(ValueId, bool)> = outputs.iter().map(|(v, _)| (*v, false)).collect();
    while let Some((value, ready)) = stack.pop() {
        if wanted.contains_key(&value) {
            continue;
        }
        let v = model.value(value);
        if let Some(tensor) = &v.initializer {
            let data = match &tensor.data {
                TensorData::External(_) => TensorData::Raw(tensor.bytes(model.external())?),
                inline => inline.clone(),
            };
            let copy = Tensor {
                name: v.name.clone(),
                data,
                origin: None,
                ..tensor.clone()
            };
            loader.initializer(graph, copy)?;
            wanted.insert(value, true);
            continue;
        }
        let Some(producer) = model.producer_of(value) else {
            return Err(fail(
                format!("'{}'", v.name),
                "the part needs this input too",
            ));
        };
        let node = model.node(producer);
        if node.subgraphs().next().is_some() || model.subgraph(node.graph).kind != GraphKind::Main {
            return Err(fail(
                model.describe(producer),
                "it has or is in a sub-graph",
            ));
        }
        if !ready {
            stack.push((value, true));
            stack.extend(node.inputs.iter().flatten().map(|&i| (i, false)));
            continue;
        }
        let names = |list: &[Option<ValueId>]| -> Vec<String> {
            list.iter()
                .map(|v| v.map_or(String::new(), |v| model.name(v).to_owned()))
                .collect()
        };
        let (reads, mut writes) = (names(&node.inputs), names(&node.outputs));
        for (name, out) in writes.iter_mut().zip(&node.outputs) {
            // An output that stands for a new input is not computed here.
            if out.is_some_and(|o| inputs.iter().any(|(i, _)| *i == o)) {
                *name = format!("{name}:unused");
            }
        }
        loader.node(
            graph,
            NodeDraft {
                name: node.name.clone(),
                op_type: node.op_type.clone(),
                domain: node.domain.clone(),
                overload: node.overload.clone(),
                inputs: &reads,
                outputs: &writes,
                attributes: node.attributes.clone(),
                origin: None,
                edited: false,
            },
        )?;
        for out in node.outputs.iter().flatten() {
            wanted.insert(*out, true);
        }
    }
    for (value, ty) in outputs {
        loader.output(graph, model.name(*value), Some(ty.clone()), None);
    }
    Ok(loader.finish())
}
