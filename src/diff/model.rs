//! One pair of models: everything that is compared, in order.

use std::collections::BTreeMap;
use std::path::Path;

use super::change::group;
use super::compare::Comparer;
use super::matching::{Functions, Matcher, Pairs};
use super::report::{Change, Class, FileReport, Kind, ModelFacts, Place, Renames, Spot};
use super::side::Side;
use super::sweep::own;
use super::{
    DiffError, Options, annotations, attributes, content, context, files, header, layers, regions,
    storage,
};
use crate::ir::{AttrValue, Attribute, GraphId, Model, NodeId};
use crate::onnx::{details, read};

/// What was found about a pair of models.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelDiff {
    /// What changed, grouped.
    pub changes: Vec<Change>,
    /// Counts.
    pub facts: ModelFacts,
    /// Where bytes lie.
    pub storage: Vec<super::StorageNote>,
    /// Names.
    pub renames: Renames,
}

/// Compares two model files.
pub(super) fn files(
    file: &mut FileReport,
    a: &Path,
    b: &Path,
    options: &Options,
) -> Result<(), DiffError> {
    let (ma, mb) = (read(a)?, read(b)?);
    let found = models((&ma, Some(a)), (&mb, Some(b)), options)?;
    let weights = found.changes.iter().any(|c| c.class == Class::Weights);
    file.same_bytes = !weights && files::same_bytes(a, b)?;
    file.changes = found.changes;
    file.model = Some(found.facts);
    file.storage = found.storage;
    file.renames = found.renames;
    Ok(())
}

/// Two graphs that correspond.
#[derive(Clone)]
struct GraphPair {
    a: GraphId,
    b: GraphId,
    /// Positions of outputs that correspond.
    outputs: Vec<(usize, usize)>,
}

/// Compares two models.
pub(super) fn models(
    (model_a, path_a): (&Model, Option<&Path>),
    (model_b, path_b): (&Model, Option<&Path>),
    options: &Options,
) -> Result<ModelDiff, DiffError> {
    let mut a = Side::new(model_a, path_a)?;
    let mut b = Side::new(model_b, path_b)?;
    content::digest(&mut a.constants, &mut b.constants, options.threads)?;
    let (a, b) = (a, b);
    let mut found = Vec::new();
    header::compare((model_a, &a.details), (model_b, &b.details), &mut found);
    let interface = header::contract(model_a, model_b, &mut found);

    // Matching: the main graphs, functions of one name, and the bodies that
    // matched nodes hold.
    let functions = Functions::new(&a, &b);
    let own_a = own(&a, &Functions::number_a);
    let own_b = own(&b, &|f| functions.number_b(f));
    let mut pairs = Pairs::new(&a, &b);
    for (x, y) in &interface.inputs {
        pairs.values(*x, *y);
    }
    let mut todo = vec![GraphPair {
        a: model_a.main(),
        b: model_b.main(),
        outputs: interface.outputs.clone(),
    }];
    function_changes(&a, &b, &functions, &mut pairs, &mut todo, &mut found);
    todo.reverse();
    let mut graphs = Vec::new();
    while let Some(pair) = todo.pop() {
        let sides = ((&a, pair.a), (&b, pair.b));
        Matcher::new(sides.0, sides.1, (&own_a, &own_b), &pair.outputs).run(&mut pairs);
        for x in a.nodes(pair.a) {
            if let Some(y) = pairs.node_b[x.index()] {
                todo.extend(bodies(&a, &b, x, y, &mut pairs));
            }
        }
        graphs.push(pair);
    }

    // Comparing what corresponds, and telling of what does not.
    let (layers_a, layers_b) = (layers::of(&a), layers::of(&b));
    let named = (layers_a.named.as_slice(), layers_b.named.as_slice());
    let mut c = Comparer::new(&a, &b, &pairs, &functions, options, named);
    c.found = found;
    for pair in &graphs {
        graph(&mut c, pair)?;
        regions::tell(&mut c, (pair.a, pair.b), &layers_b.cache);
    }
    defaults_of_inputs(&mut c, &interface.inputs)?;
    values(&mut c);
    annotations::compare(&mut c);
    storage::unused(&mut c);
    let storage = storage::notes(&c);
    let renames = renames(&c);
    let facts = facts(&c);
    let contexts = context::Contexts::new(&c, options.context);
    let mut changes = group(std::mem::take(&mut c.found));
    contexts.fill(&mut changes);
    Ok(ModelDiff {
        changes,
        facts,
        storage,
        renames,
    })
}

/// A pair of graphs: its nodes in order, its outputs, what is said of it.
fn graph(c: &mut Comparer<'_, '_>, pair: &GraphPair) -> Result<(), DiffError> {
    for x in c.a.nodes(pair.a) {
        if let Some(y) = c.pairs.node_b[x.index()] {
            c.nodes(x, y)?;
        }
    }
    let (graph_a, graph_b) = (c.a.model.subgraph(pair.a), c.b.model.subgraph(pair.b));
    for &(i, j) in &pair.outputs {
        c.output((i, j), graph_a.outputs[i], graph_b.outputs[j])?;
    }
    let main = pair.a == c.a.model.main();
    let place = Place {
        graph: c.a.way(pair.a),
        ..Place::default()
    };
    if !main {
        let counts = [
            ("inputs", graph_a.inputs.len(), graph_b.inputs.len()),
            ("outputs", graph_a.outputs.len(), graph_b.outputs.len()),
        ];
        for (what, old, new) in counts.iter().filter(|(_, old, new)| old != new) {
            let title = format!("number of {what} of a body: {old} → {new}");
            let change =
                Change::new(Class::Structure, Kind::FunctionSignature, title).subject(*what);
            let change = change.values(old.to_string(), new.to_string());
            c.found.push(change.at(place.clone()));
        }
    }
    if graph_a.name != graph_b.name {
        let title = if main {
            format!("graph name: {} → {}", graph_a.name, graph_b.name)
        } else {
            "names of bodies changed".to_owned()
        };
        let change = Change::new(Class::Cosmetic, Kind::GraphName, title);
        c.found.push(
            change
                .values(&graph_a.name, &graph_b.name)
                .at(place.clone()),
        );
    }
    let (of_a, of_b) = (&c.a.graphs[pair.a.index()], &c.b.graphs[pair.b.index()]);
    c.remarks("graph", &of_a.remarks, &of_b.remarks, &place);
    // Outputs that are inputs, or are captured, have a type of their own here.
    if let (Some(ty_a), Some(ty_b)) = (&of_a.outputs, &of_b.outputs) {
        for &(i, j) in &pair.outputs {
            let own = |side: &Side<'_>, graph: GraphId, k: usize| {
                let v = side.model.subgraph(graph).outputs[k];
                side.model.value(v).graph == graph && side.model.producer_of(v).is_some()
            };
            let told = own(c.a, pair.a, i) && own(c.b, pair.b, j);
            let (old, new) = (
                ty_a.get(i).cloned().flatten(),
                ty_b.get(j).cloned().flatten(),
            );
            if let (false, Some(old), Some(new)) = (told, old, new)
                && old != new
            {
                let class = if main { Class::Contract } else { Class::Shapes };
                let kind = if main {
                    Kind::OutputType
                } else {
                    Kind::ValueType
                };
                let (old, new) = (header::type_text(&old), header::type_text(&new));
                let title = format!("declared type of an output: {old} → {new}");
                let mut place = place.clone();
                place.a = Some(Spot::value(c.a.model.name(graph_a.outputs[i])));
                place.b = Some(Spot::value(c.b.model.name(graph_b.outputs[j])));
                c.found
                    .push(Change::new(class, kind, title).values(old, new).at(place));
            }
        }
    }
    Ok(())
}

/// Bodies of a pair of nodes, attribute by attribute.
fn bodies(a: &Side<'_>, b: &Side<'_>, x: NodeId, y: NodeId, pairs: &mut Pairs) -> Vec<GraphPair> {
    let mut found = Vec::new();
    let (of_a, of_b) = (&a.model.node(x).attributes, &b.model.node(y).attributes);
    for (at, attribute) in of_a.iter().enumerate() {
        // Of a name that is there twice, the first belongs to the first.
        let named = |a: &&Attribute| a.name == attribute.name;
        let other = of_b.iter().filter(named);
        let other = other
            .map(|b| &b.value)
            .nth(of_a[..at].iter().filter(named).count());
        let lists = match (&attribute.value, other) {
            (AttrValue::Graph(g), Some(AttrValue::Graph(h))) => vec![(*g, *h)],
            (AttrValue::Graphs(g), Some(AttrValue::Graphs(h))) => {
                g.iter().copied().zip(h.iter().copied()).collect()
            }
            _ => continue,
        };
        found.extend(lists.into_iter().map(|(g, h)| by_place(a, b, g, h, pairs)));
    }
    found
}

/// Graphs whose inputs and outputs have places, not names.
fn by_place(a: &Side<'_>, b: &Side<'_>, g: GraphId, h: GraphId, pairs: &mut Pairs) -> GraphPair {
    let (graph_a, graph_b) = (a.model.subgraph(g), b.model.subgraph(h));
    for (v, w) in graph_a.inputs.iter().zip(&graph_b.inputs) {
        pairs.values(*v, *w);
    }
    let outputs = graph_a.outputs.len().min(graph_b.outputs.len());
    GraphPair {
        a: g,
        b: h,
        outputs: (0..outputs).map(|i| (i, i)).collect(),
    }
}

/// Functions: those of one name are compared, the others told.
fn function_changes(
    a: &Side<'_>,
    b: &Side<'_>,
    functions: &Functions,
    pairs: &mut Pairs,
    todo: &mut Vec<GraphPair>,
    found: &mut Vec<Change>,
) {
    let title = |f: &crate::ir::Function| match f.overload.as_str() {
        "" => format!("{}::{}", f.domain, f.name),
        overload => format!("{}::{}:{overload}", f.domain, f.name),
    };
    let structure = |kind, text: String| Change::new(Class::Structure, kind, text);
    for (i, f) in a.model.functions.iter().enumerate() {
        let name = title(f);
        let Some(j) = functions.b[i] else {
            let text = format!("function {name} removed");
            found.push(structure(Kind::FunctionRemoved, text).subject(name));
            continue;
        };
        let g = &b.model.functions[j];
        let place = Place {
            graph: a.way(f.body),
            ..Place::default()
        };
        let of = format!(" of function {name}");
        header::opsets(
            a.model,
            &f.opset_imports,
            b.model,
            &g.opset_imports,
            &of,
            found,
        );
        let (da, db) = (&a.details.functions[i], &b.details.functions[j]);
        let parameters = |side: &Side<'_>,
                          d: &crate::onnx::details::FunctionDetails,
                          f: &crate::ir::Function| {
            let mut all: BTreeMap<String, String> = d
                .attributes
                .iter()
                .map(|n| (n.clone(), String::new()))
                .collect();
            for default in &f.defaults {
                all.insert(
                    default.name.clone(),
                    format!(" = {}", attributes::exact(side, &default.value)),
                );
            }
            all
        };
        let (old, new) = (parameters(a, da, f), parameters(b, db, g));
        if old != new {
            let text = format!("attributes of function {name} changed");
            let shown = |all: &BTreeMap<String, String>| {
                all.iter()
                    .map(|(n, d)| format!("{n}{d}"))
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let change = structure(Kind::FunctionSignature, text).subject(&name);
            found.push(change.values(shown(&old), shown(&new)).at(place.clone()));
        }
        if da.remarks.doc != db.remarks.doc {
            let text = "doc strings of functions changed";
            found.push(Change::new(Class::Cosmetic, Kind::DocString, text).at(place.clone()));
        }
        if da.remarks.metadata != db.remarks.metadata {
            let text = "metadata of functions changed";
            found.push(Change::new(Class::Metadata, Kind::ElementMetadata, text).at(place.clone()));
        }
        if da.remarks.opaque != db.remarks.opaque {
            let text = format!("fields of function {name} that this version does not know changed");
            found.push(structure(Kind::Opaque, text).at(place.clone()));
        }
        todo.push(by_place(a, b, f.body, g.body, pairs));
    }
    for (j, g) in b.model.functions.iter().enumerate() {
        if functions.a[j].is_none() {
            let name = title(g);
            let text = format!("function {name} added");
            found.push(structure(Kind::FunctionAdded, text).subject(name));
        }
    }
}

/// Defaults of inputs that both sides have.
fn defaults_of_inputs(
    c: &mut Comparer<'_, '_>,
    inputs: &[(crate::ir::ValueId, crate::ir::ValueId)],
) -> Result<(), DiffError> {
    for (v, w) in inputs {
        if let (Some(x), Some(y)) = (c.a.default_of.get(v), c.b.default_of.get(w)) {
            let name = c.a.model.name(*v);
            let place = Place {
                a: Some(Spot::value(name)),
                b: Some(Spot::value(c.b.model.name(*w))),
                ..Place::default()
            };
            c.contents(*x, *y, &format!("input '{name}'"), place)?;
        }
    }
    Ok(())
}

/// Types and remarks of all pairs of values, and remarks of constants.
fn values(c: &mut Comparer<'_, '_>) {
    let (main_a, main_b) = (c.a.model.graph(), c.b.model.graph());
    let border: std::collections::HashSet<_> =
        main_a.inputs.iter().chain(&main_a.outputs).collect();
    let border_b: std::collections::HashSet<_> =
        main_b.inputs.iter().chain(&main_b.outputs).collect();
    let graphs: Vec<GraphId> = c.a.model.graphs().map(|(id, _)| id).collect();
    for id in graphs {
        let graph = c.a.model.subgraph(id);
        let outputs = graph
            .nodes
            .iter()
            .flat_map(|n| c.a.model.node(*n).outputs.iter().flatten());
        let all: Vec<_> = graph.inputs.iter().chain(outputs).copied().collect();
        for v in all {
            if let Some(w) = c.pairs.value_b[v.index()] {
                let inner = !border.contains(&v) && !border_b.contains(&w);
                c.values(v, w, inner);
            }
        }
    }
    function_types(c);
    for (v, w) in c.constants.clone() {
        let tensor = |side: &Side<'_>, v: crate::ir::ValueId| {
            let tensor = side.model.value(v).initializer.as_ref();
            tensor
                .map(crate::onnx::details::of_tensor)
                .unwrap_or_default()
        };
        let (x, y) = (tensor(c.a, v), tensor(c.b, w));
        let place = Place {
            a: Some(Spot::value(c.a.model.name(v))),
            b: Some(Spot::value(c.b.model.name(w))),
            ..Place::default()
        };
        c.remarks("tensors", &x, &y, &place);
        // Of constants that are values of the graph, or what `Constant` nodes give.
        let values = (c.a.model.value(v), c.b.model.value(w));
        let (x, y) = (details::of_value(values.0), details::of_value(values.1));
        c.remarks("values", &x, &y, &place);
        let node = |side: &Side<'_>, v| {
            let node = side.model.producer_node(v);
            node.map(details::of_node).unwrap_or_default()
        };
        let (x, y) = (node(c.a, v), node(c.b, w));
        c.remarks("nodes", &x, &y, &place);
    }
}

/// Types that functions state of values of their bodies.
fn function_types(c: &mut Comparer<'_, '_>) {
    for (i, f) in c.a.model.functions.iter().enumerate() {
        let Some(j) = c.functions.b[i] else { continue };
        let g = &c.b.model.functions[j];
        let (ta, tb) = (
            &c.a.details.functions[i].types,
            &c.b.details.functions[j].types,
        );
        if ta.is_empty() && tb.is_empty() {
            continue;
        }
        let of =
            |side: &Side<'_>, body: GraphId, types: &[(String, Option<crate::ir::ValueType>)]| {
                let names = annotations::names(side, body);
                let known = types
                    .iter()
                    .filter_map(|(n, t)| Some((*names.get(n)?, t.clone()?)));
                known.collect::<BTreeMap<_, _>>()
            };
        let (of_a, of_b) = (of(c.a, f.body, ta), of(c.b, g.body, tb));
        let place = Place {
            graph: c.a.way(f.body),
            ..Place::default()
        };
        for (v, old) in &of_a {
            let new = c.pairs.value_b[v.index()].and_then(|w| of_b.get(&w));
            if let Some(new) = new.filter(|new| *new != old) {
                let (old, new) = (header::type_text(old), header::type_text(new));
                let title = format!("stated type of values: {old} → {new}");
                let mut place = place.clone();
                place.a = Some(Spot::value(c.a.model.name(*v)));
                let change = Change::new(Class::Shapes, Kind::ValueType, title);
                c.found.push(change.values(old, new).at(place));
            }
        }
    }
}

/// Names that differ between what corresponds.
fn renames(c: &Comparer<'_, '_>) -> Renames {
    let mut renames = Renames::default();
    let graphs: Vec<GraphId> = c.a.model.graphs().map(|(id, _)| id).collect();
    for id in graphs {
        for x in &c.a.model.subgraph(id).nodes {
            let Some(y) = c.pairs.node_b[x.index()] else {
                continue;
            };
            let (node_a, node_b) = (c.a.model.node(*x), c.b.model.node(y));
            if node_a.name != node_b.name {
                renames
                    .nodes
                    .push((node_a.name.clone(), node_b.name.clone()));
            }
            for v in node_a.outputs.iter().flatten() {
                if let Some(w) = c.pairs.value_b[v.index()] {
                    let (old, new) = (c.a.model.name(*v), c.b.model.name(w));
                    if old != new && !c.a.model.graph().outputs.contains(v) {
                        renames.values.push((old.to_owned(), new.to_owned()));
                    }
                }
            }
        }
    }
    for (v, w) in &c.constants {
        let (old, new) = (c.a.model.name(*v), c.b.model.name(*w));
        if old != new {
            renames.values.push((old.to_owned(), new.to_owned()));
        }
    }
    renames
}

fn facts(c: &Comparer<'_, '_>) -> ModelFacts {
    let count = |side: &Side<'_>| {
        let all = side.model.graphs().map(|(id, _)| side.nodes(id).len());
        all.sum::<usize>()
    };
    let bytes = |side: &Side<'_>| side.constants.iter().map(|k| k.data.len()).sum();
    let (nodes_a, nodes_b) = (count(c.a), count(c.b));
    let matched = c.pairs.node_b.iter().flatten().count();
    let weights = c.found.iter().filter(|f| f.class == Class::Weights);
    ModelFacts {
        nodes_a,
        nodes_b,
        matched,
        modified: c.modified.len(),
        removed: nodes_a - matched,
        added: nodes_b - matched,
        constants_a: c.a.constants.len(),
        constants_b: c.b.constants.len(),
        weight_bytes_a: bytes(c.a),
        weight_bytes_b: bytes(c.b),
        weights_changed: weights.count(),
    }
}
