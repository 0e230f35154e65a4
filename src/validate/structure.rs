//! What can be said of a rewritten file without running it: its interface, the
//! weights it kept, and whether the recipe still gives it.

use std::collections::HashMap;

use super::ValidateError;
use super::report::Report;
use crate::arch::{Kind, Part, VERSION_KEY, Vlm};
use crate::ir::{Dim, Model, TensorData, ValueId, ValueType, verify};
use crate::onnx::serialize;
use crate::passes::{KEPT_OUTPUT, Recipe, SALIENT_MASK_INPUT, VISUAL_MASK_INPUT, rewrite};

/// Checks every file of `rewritten` against its base.
///
/// # Errors
/// A base that the recipe no longer fits.
pub fn check(
    base: &Vlm,
    rewritten: &Vlm,
    recipe: &Recipe,
    report: &mut Report,
) -> Result<(), ValidateError> {
    let again = rewrite(base.clone(), recipe)?;
    let (olds, news, again) = (base.files()?, rewritten.files()?, again.vlm.files()?);
    for ((old, new), again) in olds.iter().zip(&news).zip(&again) {
        let file = new.file.display();
        let (old, new) = (&old.model, &new.model);
        interface(old, new, &format!("{file}: interface"), report);
        let lost = changed_weights(old, new)?;
        let detail = match lost.as_slice() {
            [] => "every initializer of the base that is still there is unchanged".to_owned(),
            some => format!("changed: {}", some.join(", ")),
        };
        report.add(format!("{file}: weights"), lost.is_empty(), detail);
        let expected = serialize(verify(&again.model)?).to_vec();
        let found = serialize(verify(new)?).to_vec();
        let same_tool = new.metadata(VERSION_KEY) == Some(env!("CARGO_PKG_VERSION"))
            || new.metadata(VERSION_KEY).is_none();
        let detail = match (expected == found, same_tool) {
            (true, _) => {
                "rewriting the base with the stamped recipe gives this file, byte for byte".into()
            }
            (false, true) => format!(
                "rewriting the base with the stamped recipe gives another file ({} bytes, found {})",
                expected.len(),
                found.len()
            ),
            (false, false) => format!(
                "written by duet {}, so this version's bytes may differ",
                new.metadata(VERSION_KEY).unwrap_or("?")
            ),
        };
        report.add(
            format!("{file}: reproducible"),
            expected == found || !same_tool,
            detail,
        );
    }
    Ok(())
}

/// Same names, element types, ranks and order; only the recipe's own extra
/// inputs may be new, and dimensions that the recipe changes may differ.
fn interface(old: &Model, new: &Model, name: &str, report: &mut Report) {
    let describe = |model: &Model, v: ValueId| {
        let value = model.value(v);
        let ty = value.ty.as_ref();
        (
            value.name.clone(),
            ty.and_then(ValueType::dtype),
            ty.and_then(|t| t.shape()).map(<[Dim]>::len),
        )
    };
    let list = |model: &Model, values: &[ValueId]| -> Vec<_> {
        values.iter().map(|&v| describe(model, v)).collect()
    };
    let mut problems = Vec::new();
    let ours = [VISUAL_MASK_INPUT, SALIENT_MASK_INPUT];
    let mut inputs = list(new, &new.graph().inputs);
    inputs.retain(|(n, _, _)| !ours.contains(&n.as_str()));
    if list(old, &old.graph().inputs) != inputs {
        problems.push("inputs differ in name, type, rank or order".to_owned());
    }
    let mut outputs = list(new, &new.graph().outputs);
    outputs.retain(|(n, _, _)| n != KEPT_OUTPUT);
    if list(old, &old.graph().outputs) != outputs {
        problems.push("outputs differ in name, type, rank or order".to_owned());
    }
    if old.ir_version != new.ir_version || old.opset_imports != new.opset_imports {
        problems.push("IR version or operator sets differ".to_owned());
    }
    let ok = problems.is_empty();
    let detail = if ok {
        "names, types and order as in the base".into()
    } else {
        problems.join("; ")
    };
    report.add(name, ok, detail);
}

/// Names of initializers that both files have and that differ, those of branches
/// and other bodies among them.
fn changed_weights(old: &Model, new: &Model) -> Result<Vec<String>, ValidateError> {
    let all = |model: &Model| -> Vec<(String, ValueId)> {
        let graphs = model.graphs().map(|(id, g)| match id == model.main() {
            true => (String::new(), g),
            false => (g.name.clone(), g),
        });
        let values = graphs.flat_map(|(name, g)| {
            let list = g.initializers.iter().copied();
            list.map(move |v| (name.clone(), v)).collect::<Vec<_>>()
        });
        values.collect()
    };
    let mut before = HashMap::new();
    for (graph, value) in all(old) {
        if let Some(tensor) = &old.value(value).initializer {
            before.insert((graph, tensor.name.as_str()), tensor);
        }
    }
    let mut changed = Vec::new();
    for (graph, value) in all(new) {
        let Some(tensor) = &new.value(value).initializer else {
            continue;
        };
        let Some(old_tensor) = before.get(&(graph, tensor.name.as_str())) else {
            if !tensor.name.starts_with("duet/") {
                changed.push(format!("{} (new)", tensor.name));
            }
            continue;
        };
        let same_type = tensor.dtype == old_tensor.dtype && tensor.dims == old_tensor.dims;
        let same_data = match (&tensor.data, &old_tensor.data) {
            (TensorData::Strings(a), TensorData::Strings(b)) => a == b,
            _ => tensor.bytes(new.external())? == old_tensor.bytes(old.external())?,
        };
        if !(same_type && same_data) {
            changed.push(tensor.name.clone());
        }
    }
    Ok(changed)
}

/// Pairs each rewritten file with its base by role and variant.
///
/// # Errors
/// Directories that do not hold the same files.
pub fn pair(base: Vlm, rewritten: Vlm) -> Result<(Vlm, Vlm), ValidateError> {
    let mut bases = Vec::new();
    for part in &rewritten.parts {
        let kind = part.kind();
        let found = base.parts.iter().find(|b| b.is_piece(part)).or_else(|| {
            let mut same = base.parts.iter().filter(|b| {
                b.kind() == kind
                    && b.variant == part.variant
                    && b.source.branch == part.source.branch
            });
            same.next().filter(|_| kind != Kind::Unknown)
        });
        // Written beside its original, under its name with a suffix.
        let stem = |p: &Part| {
            p.file
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        let beside = |b: &&Part| {
            let named = stem(part).starts_with(&format!("{}_", stem(b)));
            named && b.source.branch == part.source.branch
        };
        let longest = || {
            base.parts
                .iter()
                .filter(beside)
                .max_by_key(|b| stem(b).len())
        };
        let Some(found) = found.or_else(longest) else {
            return Err(ValidateError::Model(format!(
                "{}: no file of the base corresponds to it (same path, or same role and variant)",
                part.label()
            )));
        };
        bases.push(found.clone());
    }
    Ok((Vlm { parts: bases }, rewritten))
}
