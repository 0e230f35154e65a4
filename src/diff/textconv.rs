//! A model as lines for `git diff`: the same file always gives the same lines,
//! and a change of the model changes few of them.
//!
//! Weights are told by type, dimensions and the digest of their bytes (BLAKE3).
//! Those in other files are told by where they are: git compares those files
//! itself, and they are not there when it shows an old version of this one.

use std::fmt::Write;
use std::path::Path;

use super::DiffError;
use super::render::clean;
use crate::ir::{AttrValue, Graph, GraphId, Model, Node, Tensor, TensorData, ValueId, ValueType};
use crate::onnx::details::{self, Remarks, Sparse, Unusual};
use crate::onnx::{OnnxError, read_graph};

/// Constants of so many elements are spelled out.
const SHOWN: u64 = 16;

/// What a file says in lines; a file that is no model is told by its size and
/// digest, with the reason.
///
/// # Errors
/// A file that cannot be read at all.
pub fn textconv(path: &Path) -> Result<String, DiffError> {
    super::files::regular(path)?;
    match read_graph(path) {
        Ok(model) => Ok(of_model(&model)),
        Err(OnnxError::Io { path, source }) => Err(DiffError::Io {
            path,
            reason: source,
        }),
        Err(error) => {
            let bytes = std::fs::read(path).map_err(DiffError::io(path))?;
            // What `git lfs` leaves in place of a file is text already.
            if bytes.len() < 1024 && bytes.starts_with(b"version https://git-lfs") {
                return Ok(String::from_utf8_lossy(&bytes).into_owned());
            }
            if bytes.is_empty() {
                return Ok(String::new());
            }
            // The path is another one for each call.
            let reason = error.to_string();
            let prefix = format!("{}: ", path.display());
            let reason = reason.strip_prefix(&prefix).unwrap_or(&reason);
            Ok(format!(
                "no model: {}\n{} bytes, {}\n",
                clean(reason),
                bytes.len(),
                digest(&bytes)
            ))
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex = blake3::hash(bytes).to_hex();
    format!("blake3:{}", &hex[..24])
}

/// The lines of a model.
pub fn of_model(model: &Model) -> String {
    let mut out = Lines {
        text: String::new(),
        model,
    };
    let header = details::of_model(model);
    out.put(0, format_args!("ir_version {}", model.ir_version));
    for (domain, version) in &model.opset_imports {
        out.put(0, format_args!("opset {} {version}", domain_name(domain)));
    }
    let texts = [
        ("producer", &model.producer),
        ("producer_version", &header.producer_version),
        ("domain", &header.domain),
    ];
    for (key, value) in texts.iter().filter(|t| !t.1.is_empty()) {
        out.long(0, key, value);
    }
    if header.model_version != 0 {
        out.put(0, format_args!("model_version {}", header.model_version));
    }
    for entry in &model.metadata {
        out.long(0, &format!("metadata {}", clean(&entry.key)), &entry.value);
    }
    out.remarks(0, &header.remarks);
    out.text.push('\n');
    out.graph(0, "graph", model.graph());
    for (i, function) in model.functions.iter().enumerate() {
        out.text.push('\n');
        let overload = overload(&function.overload);
        let name = format!(
            "function {}.{}{overload}",
            clean(&function.domain),
            clean(&function.name)
        );
        out.graph(0, &name, model.subgraph(function.body));
        for (domain, version) in &function.opset_imports {
            out.put(1, format_args!("opset {} {version}", domain_name(domain)));
        }
        if let Some(more) = header.functions.get(i) {
            for attribute in &more.attributes {
                out.put(1, format_args!("attribute {}", clean(attribute)));
            }
            out.remarks(1, &more.remarks);
        }
        for default in &function.defaults {
            out.attribute(1, &default.name, &default.value);
        }
    }
    out.text
}

fn domain_name(domain: &str) -> String {
    if domain.is_empty() {
        "ai.onnx".into()
    } else {
        clean(domain)
    }
}

/// An overload as it stands behind a function's name.
fn overload(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(":{}", clean(text))
    }
}

/// A name as it is if it is one word, else in quotes. `_` alone is what is left out.
fn name(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_./:-".contains(c);
    if !text.is_empty() && text != "_" && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("\"{}\"", clean(text).replace('"', "\\\""))
    }
}

fn typed(of: &str, ty: Option<&ValueType>) -> String {
    let ty = ty.map_or_else(|| "?".into(), super::header::type_text);
    format!("{} {}", name(of), clean(&ty))
}

struct Lines<'m> {
    text: String,
    model: &'m Model,
}

impl Lines<'_> {
    fn put(&mut self, depth: usize, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.text, "{:1$}{line}", "", depth * 2);
    }

    /// A key and a text that may have many lines.
    fn long(&mut self, depth: usize, key: &str, value: &str) {
        if value.lines().count() <= 1 {
            let value = clean(value);
            self.put(depth, format_args!("{key} \"{value}\""));
            return;
        }
        self.put(depth, format_args!("{key}"));
        for line in value.lines() {
            let line = clean(line);
            self.put(depth + 1, format_args!("| {line}"));
        }
    }

    fn remarks(&mut self, depth: usize, remarks: &Remarks) {
        if !remarks.doc.is_empty() {
            self.long(depth, "doc", &remarks.doc);
        }
        for (key, value) in &remarks.metadata {
            self.long(depth, &format!("metadata {}", clean(key)), value);
        }
        for (number, bytes) in &remarks.opaque {
            let digest = digest(bytes);
            self.put(
                depth,
                format_args!("field {number}, {} bytes {digest}", bytes.len()),
            );
        }
    }

    fn graph(&mut self, depth: usize, what: &str, graph: &Graph) {
        let model = self.model;
        let graph_name = if graph.name.is_empty() {
            String::new()
        } else {
            format!(" {}", name(&graph.name))
        };
        self.put(depth, format_args!("{what}{graph_name}"));
        let depth = depth + 1;
        let more = details::of_graph(graph);
        for (word, list) in [("input", &graph.inputs), ("output", &graph.outputs)] {
            for (i, &value) in list.iter().enumerate() {
                let of = model.value(value);
                // What the file declares an output to be: that of an input given out
                // again need not be the input's type.
                let declared = more.outputs.as_ref().filter(|_| word == "output");
                let typed = match declared.and_then(|all| all.get(i)) {
                    Some(ty) => typed(&of.name, ty.as_ref()),
                    None => typed(&of.name, of.ty.as_ref()),
                };
                self.put(depth, format_args!("{word} {typed}"));
                self.remarks(depth + 1, &details::of_value(of));
            }
        }
        self.remarks(depth, &more.remarks);
        for &value in &graph.initializers {
            let of = model.value(value);
            if let Some(tensor) = &of.initializer {
                let (of, constant) = (name(&of.name), self.constant(tensor));
                self.put(depth, format_args!("constant {of} {constant}"));
                self.remarks(depth + 1, &details::of_tensor(tensor));
            }
        }
        for sparse in &more.sparse {
            let (of, constant) = (name(&sparse.values.name), self.sparse(sparse));
            self.put(depth, format_args!("constant {of} {constant}"));
        }
        for (of, pairs) in &more.quantization {
            let pairs: Vec<String> = pairs
                .iter()
                .map(|(k, v)| format!("{}={}", clean(k), name(v)))
                .collect();
            let of = name(of);
            self.put(depth, format_args!("quantization {of} {}", pairs.join(" ")));
        }
        for &id in &graph.nodes {
            self.node(depth, model.node(id));
        }
        // Types of what is between: apart, so that they hide no change of a node.
        let inside = graph
            .nodes
            .iter()
            .flat_map(|n| model.node(*n).outputs.iter().flatten());
        for &value in inside.filter(|v| model.value(**v).ty.is_some()) {
            if !graph.outputs.contains(&value) {
                let of = model.value(value);
                let typed = typed(&of.name, of.ty.as_ref());
                self.put(depth, format_args!("type {typed}"));
                self.remarks(depth + 1, &details::of_value(model.value(value)));
            }
        }
    }

    fn node(&mut self, depth: usize, node: &Node) {
        let names = |list: &[Option<ValueId>]| {
            let all = list
                .iter()
                .map(|v| v.map_or("_".into(), |v| name(self.model.name(v))));
            all.collect::<Vec<String>>().join(", ")
        };
        let domain = match node.domain.as_str() {
            "" | "ai.onnx" => String::new(),
            domain => format!("{}.", clean(domain)),
        };
        let overload = overload(&node.overload);
        let called = if node.name.is_empty() {
            String::new()
        } else {
            format!("  # {}", clean(&node.name))
        };
        let line = format!(
            "{} = {domain}{}{overload}({}){called}",
            names(&node.outputs),
            clean(&node.op_type),
            names(&node.inputs)
        );
        self.put(depth, format_args!("{line}"));
        for attribute in &node.attributes {
            self.attribute(depth + 1, &attribute.name, &attribute.value);
        }
        self.remarks(depth + 1, &details::of_node(node));
        for (attribute, doc) in details::attribute_docs(node) {
            self.long(depth + 1, &format!("doc of {}", clean(&attribute)), &doc);
        }
    }

    fn attribute(&mut self, depth: usize, key: &str, value: &AttrValue) {
        let key = name(key);
        let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) => format!("\"{}\"", clean(text)),
            Err(_) => format!("{} bytes {}", bytes.len(), digest(bytes)),
        };
        let shown = match value {
            // Different bits are different lines, NaNs too.
            AttrValue::Float(f) => float(*f),
            AttrValue::Int(i) => i.to_string(),
            AttrValue::String(s) => text(s),
            AttrValue::Tensor(t) => self.constant(t),
            AttrValue::Floats(l) => {
                format!(
                    "[{}]",
                    l.iter().map(|f| float(*f)).collect::<Vec<_>>().join(", ")
                )
            }
            AttrValue::Ints(l) => format!("{l:?}"),
            AttrValue::Strings(l) => {
                format!(
                    "[{}]",
                    l.iter().map(|s| text(s)).collect::<Vec<_>>().join(", ")
                )
            }
            AttrValue::Graph(g) => return self.body(depth, &key, *g),
            AttrValue::Graphs(list) => {
                for (i, g) in list.iter().enumerate() {
                    self.body(depth, &format!("{key}[{i}]"), *g);
                }
                return;
            }
            AttrValue::Ref(of) => format!("@{}", name(of)),
            AttrValue::Other(bytes) => self.unusual(bytes),
        };
        self.put(depth, format_args!("{key} = {shown}"));
    }

    fn body(&mut self, depth: usize, key: &str, id: GraphId) {
        let model = self.model;
        self.graph(depth, &format!("{key} = graph"), model.subgraph(id));
    }

    fn unusual(&self, bytes: &bytes::Bytes) -> String {
        match details::unusual(bytes) {
            Unusual::Tensors(list) => {
                let all: Vec<String> = list.iter().map(|t| self.constant(t)).collect();
                format!("[{}]", all.join("; "))
            }
            Unusual::Sparse(list) => {
                let all: Vec<String> = list.iter().map(|s| self.sparse(s)).collect();
                format!("[{}]", all.join("; "))
            }
            Unusual::Types(_) | Unusual::Unknown(_) => {
                format!("{} bytes {}", bytes.len(), digest(bytes))
            }
        }
    }

    fn sparse(&self, sparse: &Sparse) -> String {
        format!(
            "sparse {:?}: values {}, indices {}",
            sparse.dims,
            self.constant(&sparse.values),
            self.constant(&sparse.indices)
        )
    }

    /// Type, dimensions, and elements: spelled out if few, else their digest.
    fn constant(&self, tensor: &Tensor) -> String {
        let dims: Vec<String> = tensor.dims.iter().map(ToString::to_string).collect();
        let head = format!("{}[{}]", tensor.dtype, dims.join(","));
        let bytes = match &tensor.data {
            TensorData::External(at) => {
                let length = at.length.map_or_else(
                    || "the end".into(),
                    |l| (at.offset.unwrap_or(0) + l).to_string(),
                );
                let start = at.offset.unwrap_or(0);
                return format!("{head} in {} {start}..{length}", name(&at.location));
            }
            TensorData::Strings(list) => {
                let mut all = Vec::new();
                for text in list {
                    all.extend((text.len() as u64).to_le_bytes());
                    all.extend_from_slice(text);
                }
                return format!("{head} {}", digest(&all));
            }
            TensorData::Raw(bytes) => bytes,
        };
        let source = self.model.external();
        let few = tensor.element_count().is_some_and(|n| n <= SHOWN);
        let values: Option<Vec<String>> = if !few {
            None
        } else if tensor.dtype.is_float() {
            let all = tensor.to_f64s(source).ok();
            // Numbers alone would hide the bits of a NaN.
            let all = all.filter(|all| all.iter().all(|v| v.is_finite()));
            all.map(|all| all.iter().map(|v| format!("{v:?}")).collect())
        } else {
            let all = tensor.to_i64s(source).ok();
            all.map(|all| all.iter().map(ToString::to_string).collect())
        };
        match values {
            Some(values) => format!("{head} = {}", values.join(", ")),
            None => format!("{head} {}", digest(bytes)),
        }
    }
}

fn float(f: f32) -> String {
    if f.is_nan() {
        format!("NaN (bits {:08x})", f.to_bits())
    } else {
        format!("{f:?}")
    }
}
