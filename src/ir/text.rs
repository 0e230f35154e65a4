//! The text form: the ONNX textual syntax, one node a line.
//!
//! Used for goldens, dumps and error reports. Large constants are shown by
//! type only. Source: onnx `docs/Syntax.md`.

use std::fmt::Write;

use super::model::{AttrValue, Graph, Model, Node};
use super::{DataType, GraphId, Tensor, TensorData, ValueId};

/// Elements of a constant that are spelled out.
const SHOWN: u64 = 8;

/// The model in ONNX textual syntax.
pub fn text(model: &Model) -> String {
    let mut out = String::new();
    let opsets = |imports: &[(String, i64)]| {
        let all = imports
            .iter()
            .map(|(domain, version)| format!("\"{domain}\" : {version}"));
        all.collect::<Vec<_>>().join(", ")
    };
    let _ = writeln!(out, "<");
    let _ = writeln!(out, "   ir_version: {},", model.ir_version);
    let _ = writeln!(out, "   opset_import: [{}]", opsets(&model.opset_imports));
    let _ = writeln!(out, ">");
    graph(model, model.graph(), 0, &mut out);
    for function in &model.functions {
        let _ = writeln!(out, "<");
        let _ = writeln!(out, "   domain: \"{}\",", function.domain);
        let _ = writeln!(
            out,
            "   opset_import: [{}]",
            opsets(&function.opset_imports)
        );
        let _ = writeln!(out, ">");
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
    let _ = writeln!(
        out,
        "{name} ({}) => ({})",
        list(&g.inputs),
        list(&g.outputs)
    );
    if !g.initializers.is_empty() {
        let shown = g.initializers.iter().filter_map(|id| {
            let tensor = model.value(*id).initializer.as_ref()?;
            Some(format!(
                "{pad}   {}",
                constant(model, tensor, model.name(*id))
            ))
        });
        let _ = writeln!(
            out,
            "{pad}<\n{}\n{pad}>",
            shown.collect::<Vec<_>>().join(",\n")
        );
    }
    let _ = writeln!(out, "{pad}{{");
    for &id in &g.nodes {
        node(model, model.node(id), depth + 1, out);
    }
    let _ = write!(out, "{pad}}}");
    // A body is followed by what ends its attribute.
    if depth == 0 {
        out.push('\n');
    }
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
            AttrValue::Graph(g) => body(model, *g, depth),
            AttrValue::Graphs(l) => {
                let all: Vec<String> = l.iter().map(|g| body(model, *g, depth)).collect();
                format!("[{}]", all.join(", "))
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
}

fn body(model: &Model, id: GraphId, depth: usize) -> String {
    let mut shown = String::new();
    graph(model, model.subgraph(id), depth + 1, &mut shown);
    shown
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
        let values = match t.dtype {
            DataType::Double => t.to_f64s(model.external()).ok().map(join),
            #[allow(
                clippy::cast_possible_truncation,
                reason = "they were read from these types"
            )]
            DataType::Float => {
                let narrow = |all: Vec<f64>| join(all.into_iter().map(|v| v as f32).collect());
                t.to_f64s(model.external()).ok().map(narrow)
            }
            // The syntax has the bits of half-precision numbers.
            DataType::Float16 | DataType::Bfloat16 => {
                let bits = |c: &[u8]| u16::from_le_bytes([c[0], c[1]]);
                let all = t.bytes(model.external()).ok();
                all.map(|b| join(b.chunks_exact(2).map(bits).collect()))
            }
            _ => t.to_i64s(model.external()).ok().map(join),
        };
        if let Some(values) = values {
            // An attribute's tensor has no name.
            let equals = if name.is_empty() { "" } else { " =" };
            return format!("{shown}{equals} {{{values}}}");
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
    let plain = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        && name.chars().next().is_some_and(|c| !c.is_ascii_digit());
    if plain {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\\\""))
    }
}
