//! The text form: the ONNX textual syntax, one node a line.
//!
//! Used for goldens, dumps and error reports. Large constants are shown by
//! type only. Source: onnx `docs/Syntax.md`.

use std::fmt::Write;

use super::model::{AttrValue, Graph, Model, Node};
use super::{Tensor, TensorData, ValueId};

/// Elements of a constant that are spelled out.
const SHOWN: u64 = 8;

/// The model in ONNX textual syntax.
pub fn text(model: &Model) -> String {
    let mut out = String::new();
    let opsets: Vec<String> = model
        .opset_imports
        .iter()
        .map(|(domain, version)| format!("\"{domain}\" : {version}"))
        .collect();
    let _ = writeln!(out, "<");
    let _ = writeln!(out, "   ir_version: {},", model.ir_version);
    let _ = writeln!(out, "   opset_import: [{}]", opsets.join(", "));
    let _ = writeln!(out, ">");
    graph(model, model.graph(), 0, &mut out);
    for function in &model.functions {
        let _ = writeln!(out, "<domain: \"{}\">", function.domain);
        let _ = write!(out, "{} ", quote(&function.name));
        graph(model, model.subgraph(function.body), 0, &mut out);
    }
    out
}

fn graph(model: &Model, g: &Graph, depth: usize, out: &mut String) {
    let pad = "   ".repeat(depth);
    let typed = |v: &ValueId| {
        let value = model.value(*v);
        match &value.ty {
            Some(ty) => format!("{ty} {}", quote(&value.name)),
            None => quote(&value.name),
        }
    };
    let list = |ids: &[ValueId]| ids.iter().map(typed).collect::<Vec<_>>().join(", ");
    let name = quote(if g.name.is_empty() { "graph" } else { &g.name });
    let _ = writeln!(out, "{name} ({}) => ({})", list(&g.inputs), list(&g.outputs));
    if !g.initializers.is_empty() {
        let _ = writeln!(out, "{pad}<");
        for &id in &g.initializers {
            if let Some(tensor) = &model.value(id).initializer {
                let _ = writeln!(out, "{pad}   {}", constant(model, tensor, model.name(id)));
            }
        }
        let _ = writeln!(out, "{pad}>");
    }
    let _ = writeln!(out, "{pad}{{");
    for &id in &g.nodes {
        node(model, model.node(id), depth + 1, out);
    }
    let _ = writeln!(out, "{pad}}}");
}

fn node(model: &Model, n: &Node, depth: usize, out: &mut String) {
    let pad = "   ".repeat(depth);
    let names = |list: &[Option<ValueId>]| {
        list.iter()
            .map(|v| v.map_or("\"\"".into(), |v| quote(model.name(v))))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let op = if n.domain.is_empty() {
        n.op_type.clone()
    } else {
        format!("{}.{}", n.domain, n.op_type)
    };
    let _ = write!(out, "{pad}{} = {op}", names(&n.outputs));
    let mut bodies = Vec::new();
    let mut parts = Vec::new();
    for a in &n.attributes {
        let shown = match &a.value {
            AttrValue::Float(f) => format!("{f:?}"),
            AttrValue::Int(i) => i.to_string(),
            AttrValue::String(s) => format!("{:?}", String::from_utf8_lossy(s)),
            AttrValue::Tensor(t) => constant(model, t, ""),
            AttrValue::Floats(l) => format!("{l:?}"),
            AttrValue::Ints(l) => format!("{l:?}"),
            AttrValue::Strings(l) => {
                let all: Vec<_> = l.iter().map(|s| String::from_utf8_lossy(s)).collect();
                format!("{all:?}")
            }
            AttrValue::Graph(g) => {
                bodies.push((a.name.as_str(), *g));
                continue;
            }
            AttrValue::Graphs(l) => {
                bodies.extend(l.iter().map(|g| (a.name.as_str(), *g)));
                continue;
            }
            AttrValue::Ref(name) => format!("@{name}"),
            AttrValue::Other(bytes) => format!("<{} bytes>", bytes.len()),
        };
        parts.push(format!("{} = {shown}", a.name));
    }
    if !parts.is_empty() {
        let _ = write!(out, " <{}>", parts.join(", "));
    }
    let _ = writeln!(out, " ({})", names(&n.inputs));
    for (name, body) in bodies {
        let _ = write!(out, "{pad}   <{name} = ");
        graph(model, model.subgraph(body), depth + 1, out);
        let _ = writeln!(out, "{pad}   >");
    }
}

fn constant(model: &Model, t: &Tensor, name: &str) -> String {
    let dims = if t.dims.is_empty() {
        String::new()
    } else {
        let all: Vec<String> = t.dims.iter().map(ToString::to_string).collect();
        format!("[{}]", all.join(","))
    };
    let mut shown = format!("{}{dims}", t.dtype);
    if !name.is_empty() {
        shown = format!("{shown} {}", quote(name));
    }
    let small = t.element_count().is_some_and(|n| n <= SHOWN);
    if small && matches!(t.data, TensorData::Raw(_)) {
        let values = if t.dtype.is_float() {
            t.to_f64s(model.external()).ok().map(join)
        } else {
            t.to_i64s(model.external()).ok().map(join)
        };
        if let Some(values) = values {
            return format!("{shown} = {{{values}}}");
        }
    }
    shown
}

fn join<T: std::fmt::Debug>(values: Vec<T>) -> String {
    let all: Vec<String> = values.iter().map(|v| format!("{v:?}")).collect();
    all.join(", ")
}

/// Identifiers as they are, everything else in quotes.
fn quote(name: &str) -> String {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        && name.chars().next().is_some_and(|c| !c.is_ascii_digit());
    if plain { name.to_owned() } else { format!("\"{name}\"") }
}
