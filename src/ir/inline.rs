//! Replacing calls of model-local functions by the functions' nodes.
//!
//! ```text
//!  x ─▶ call "decoder" of F(a) { t = Neg(a); b = Exp(t) } ─▶ y
//!  x ─▶ Neg "decoder/…" ─ decoder/t ─▶ Exp "decoder/…" ─▶ y
//! ```
//!
//! What lies inside gets the call's name as a prefix, so that two calls of one
//! function do not meet; inputs and outputs keep the caller's names. Attributes
//! that refer to the call's take its value, or the function's default, or are
//! left out. A function that nothing calls any more is removed.
//!
//! Source: ONNX IR specification, section "Functions".

use std::collections::{BTreeSet, HashMap, HashSet};

use super::copy::{Copier, Names};
use super::load::NodeDraft;
use super::model::{AttrValue, Def, Model, Node};
use super::{GraphId, IrError, NodeId};

/// The model with every call of the functions at positions `wanted` of
/// [`Model::functions`] replaced by the function's nodes.
///
/// The new model has ids of its own. Names of the main graph stay as they were.
///
/// # Errors
/// A function that calls itself, one that imports another version of an operator
/// set than the model, and constructs that cannot be moved (by name).
pub fn inline(model: &Model, wanted: &BTreeSet<usize>) -> Result<Model, IrError> {
    let mut copier = Copier::new(model, "inline");
    let mut inliner = Inliner {
        wanted,
        taken: taken_names(model),
        calls: Vec::new(),
        imports: Vec::new(),
    };
    let main = copier.into.header().main();
    let names = Names::default();
    copier.head(model.main(), main, &names, |_| true)?;
    inliner.nodes(&mut copier, model.main(), main, &names)?;
    copier.tail(model.main(), main, &names)?;
    copier.into.touch(main);
    let kept = kept_functions(model, wanted);
    copier.functions(|index| kept.contains(&index))?;
    let header = copier.into.header();
    header.opset_imports.extend(inliner.imports);
    Ok(copier.into.finish())
}

/// Every name of the model's values and nodes.
fn taken_names(model: &Model) -> BTreeSet<String> {
    let values = model.values.iter().map(|v| v.name.clone());
    let nodes = model.nodes.iter().flatten().map(|n| n.name.clone());
    values.chain(nodes).collect()
}

/// Functions that stay in the file: those that are not inlined, and what they
/// call.
fn kept_functions(model: &Model, wanted: &BTreeSet<usize>) -> HashSet<usize> {
    let mut kept: HashSet<usize> = HashSet::new();
    let mut stack: Vec<usize> = (0..model.functions.len())
        .filter(|i| !wanted.contains(i))
        .collect();
    while let Some(index) = stack.pop() {
        if kept.insert(index) {
            stack.extend(called(model, model.functions[index].body));
        }
    }
    kept
}

/// Functions that a graph and its bodies call, in order.
pub fn called(model: &Model, graph: GraphId) -> Vec<usize> {
    let mut found = Vec::new();
    let mut stack = vec![graph];
    while let Some(graph) = stack.pop() {
        for &id in &model.subgraph(graph).nodes {
            let node = model.node(id);
            found.extend(model.function_of(node));
            stack.extend(node.subgraphs());
        }
    }
    found
}

struct Inliner<'a> {
    wanted: &'a BTreeSet<usize>,
    /// Names that exist; prefixes must lead to others.
    taken: BTreeSet<String>,
    /// Functions whose calls are being replaced, outermost first.
    calls: Vec<usize>,
    /// Operator sets that the model has to import besides its own.
    imports: Vec<(String, i64)>,
}

impl Inliner<'_> {
    /// Copies a graph's nodes; returns whether a call was replaced.
    fn nodes(
        &mut self,
        copier: &mut Copier<'_>,
        old: GraphId,
        new: GraphId,
        names: &Names,
    ) -> Result<bool, IrError> {
        let mut replaced = false;
        let model = copier.from;
        for &id in &model.subgraph(old).nodes {
            let function = model.function_of(model.node(id));
            if let Some(index) = function.filter(|f| self.wanted.contains(f)) {
                self.call(copier, id, index, new, names)?;
                replaced = true;
                continue;
            }
            copier.node(id, new, names, &mut |copier, old, new, names| {
                let inner = self.nodes(copier, old, new, names)?;
                replaced |= inner;
                Ok(inner)
            })?;
        }
        Ok(replaced)
    }

    /// Copies a function's nodes in place of a call.
    fn call(
        &mut self,
        copier: &mut Copier<'_>,
        id: NodeId,
        index: usize,
        new: GraphId,
        outer: &Names,
    ) -> Result<(), IrError> {
        let model = copier.from;
        let function = &model.functions[index];
        let node = model.node(id);
        let shown = format!("{}::{}", function.domain, function.name);
        let place = format!("function {shown}, called by {}", model.describe(id));
        if self.calls.contains(&index) {
            return Err(copier.fail(&place, "it calls itself"));
        }
        self.imports(copier, index, &place)?;
        let body = model.subgraph(function.body);
        if node.inputs.len() > body.inputs.len() || node.outputs.len() > body.outputs.len() {
            let reason = format!(
                "it takes {} inputs and gives {} outputs; the call has {} and {}",
                body.inputs.len(),
                body.outputs.len(),
                node.inputs.len(),
                node.outputs.len()
            );
            return Err(copier.fail(&place, &reason));
        }
        let label = if node.name.is_empty() {
            function.name.as_str()
        } else {
            node.name.as_str()
        };
        let mut names = Names {
            prefix: self.prefix(&format!("{}{label}", outer.prefix)),
            listed: HashMap::new(),
            attributes: Some(attributes(node, function, outer)),
            scope: None,
        };
        for (slot, &input) in body.inputs.iter().enumerate() {
            let given = node.input(slot);
            let name = given.map_or(String::new(), |v| outer.of(model, v));
            names.listed.insert(input, name);
        }
        // (name inside, name outside) of outputs that no node of the body can
        // give out under the caller's name.
        let mut passed = Vec::new();
        for (slot, &output) in body.outputs.iter().enumerate() {
            let Some(given) = node.output(slot) else {
                continue;
            };
            let name = outer.of(model, given);
            let own = matches!(model.value(output).def, Def::Node { .. })
                && model.value(output).graph == function.body;
            if own && !names.listed.contains_key(&output) {
                names.listed.insert(output, name);
            } else {
                passed.push((slot, output, name));
            }
        }
        self.calls.push(index);
        let result = self.nodes(copier, function.body, new, &names);
        self.calls.pop();
        result?;
        for (slot, output, outside) in passed {
            let inside = names.of(model, output);
            if inside.is_empty() {
                let reason = format!("its output {slot} is an input that the call leaves out");
                return Err(copier.fail(&place, &reason));
            }
            let draft = NodeDraft {
                name: format!("{}output_{slot}", names.prefix),
                op_type: "Identity".into(),
                domain: String::new(),
                overload: String::new(),
                inputs: &[inside],
                outputs: &[outside],
                attributes: Vec::new(),
                origin: None,
                edited: false,
            };
            copier.into.node(new, draft)?;
        }
        Ok(())
    }

    /// `label/`, or with a number, such that no name of the model starts with it.
    fn prefix(&mut self, label: &str) -> String {
        let mut number = 1;
        loop {
            let prefix = match number {
                1 => format!("{label}/"),
                n => format!("{label}_{n}/"),
            };
            let next = self.taken.range(prefix.clone()..).next();
            if next.is_none_or(|name| !name.starts_with(&prefix)) {
                self.taken.insert(prefix.clone());
                return prefix;
            }
            number += 1;
        }
    }

    /// Checks the operator sets that a body's nodes belong to.
    fn imports(&mut self, copier: &Copier<'_>, index: usize, place: &str) -> Result<(), IrError> {
        let model = copier.from;
        let function = &model.functions[index];
        let mut used: BTreeSet<&str> = BTreeSet::new();
        let mut stack = vec![function.body];
        while let Some(graph) = stack.pop() {
            for &id in &model.subgraph(graph).nodes {
                let node = model.node(id);
                stack.extend(node.subgraphs());
                let inlined = model.function_of(node);
                if !inlined.is_some_and(|f| self.wanted.contains(&f)) {
                    used.insert(&node.domain);
                }
            }
        }
        let plain = |d: &str| {
            if d == "ai.onnx" {
                String::new()
            } else {
                d.to_owned()
            }
        };
        for (domain, version) in &function.opset_imports {
            let domain = plain(domain);
            if !used.contains(domain.as_str()) {
                continue;
            }
            let added = self.imports.iter().find(|(d, _)| *d == domain);
            match model.opset(&domain).or_else(|| added.map(|(_, v)| *v)) {
                Some(own) if own == *version => {}
                Some(own) => {
                    let shown = if domain.is_empty() {
                        "ai.onnx"
                    } else {
                        &domain
                    };
                    let reason = format!(
                        "its body uses operator set {shown} {version}, the model {own}, so its nodes would \
                         mean something else in the main graph; export functions and model with one operator \
                         set, or convert with onnx.version_converter"
                    );
                    return Err(copier.fail(place, &reason));
                }
                None => self.imports.push((domain, *version)),
            }
        }
        Ok(())
    }
}

/// Attributes that a body's nodes can refer to: the call's, else the defaults.
fn attributes(
    call: &Node,
    function: &super::Function,
    outer: &Names,
) -> HashMap<String, AttrValue> {
    let mut found: HashMap<String, AttrValue> = function
        .defaults
        .iter()
        .map(|a| (a.name.clone(), a.value.clone()))
        .collect();
    for attribute in &call.attributes {
        let value = match (&attribute.value, &outer.attributes) {
            // Given on from the function around: absent there, absent here.
            (AttrValue::Ref(name), Some(given)) => match given.get(name) {
                Some(value) => value.clone(),
                None => continue,
            },
            (value, _) => value.clone(),
        };
        found.insert(attribute.name.clone(), value);
    }
    found
}
