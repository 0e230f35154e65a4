//! Reading a model file into the IR.
//!
//! The file is memory-mapped. The outer messages are walked field by field and
//! every element keeps the slice it was read from; tensor contents stay slices
//! of the mapping, and external data is not opened (its ranges are checked).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::external::{DataDirectory, Mapped, map_file};
use super::wire::{Field, Payload, WireError, fields};
use super::{OnnxError, convert};
use crate::ir::{
    AttrValue, Attribute, ExternalRef, ExternalSource, Function, GraphId, GraphKind, IrError,
    Loader, MetadataEntry, Model, NoExternal, NodeDraft, NodeId, TensorData,
};
use crate::proto;

/// Sub-graphs nested deeper than this are refused rather than risking the stack.
const MAX_DEPTH: usize = 32;

/// Reads a model file.
///
/// # Errors
/// A file that cannot be opened or is not a well-formed ONNX model, and
/// external data that is missing, truncated, overlapping or outside the
/// model's directory.
pub fn read(path: &Path) -> Result<Model, OnnxError> {
    let mapped = Mapped::open(path).map_err(OnnxError::io(path))?;
    let bytes = mapped.bytes().clone();
    let root = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let data = Arc::new(DataDirectory::of(root, mapped));
    let model = parse(path, bytes, data.clone())?;
    check_external(&model, &data).map_err(|source| OnnxError::Model {
        path: path.to_owned(),
        source,
    })?;
    Ok(model)
}

/// Reads a model file without looking at its external data, which may be missing.
///
/// # Errors
/// A file that cannot be opened or is not a well-formed ONNX model.
pub fn read_graph(path: &Path) -> Result<Model, OnnxError> {
    let bytes = map_file(path).map_err(OnnxError::io(path))?;
    parse(path, bytes, Arc::new(NoExternal))
}

/// Reads a model from memory; it must not refer to external data files.
///
/// # Errors
/// As [`read`]; messages name the model `name`.
pub fn read_bytes(name: &str, bytes: Bytes) -> Result<Model, OnnxError> {
    parse(Path::new(name), bytes, Arc::new(NoExternal))
}

fn parse(path: &Path, bytes: Bytes, external: Arc<dyn ExternalSource>) -> Result<Model, OnnxError> {
    let mut reader = Reader {
        loader: Loader::new(external.clone()),
        external,
        path,
    };
    reader.model(&bytes)?;
    let mut model = reader.loader.finish();
    model.source = Some(bytes);
    Ok(model)
}

/// Checks that every external range lies inside its file and that two tensors
/// share either all bytes (tied weights) or none.
fn check_external(model: &Model, data: &DataDirectory) -> Result<(), IrError> {
    let mut places: HashMap<Arc<Path>, usize> = HashMap::new();
    let mut ranges: Vec<(usize, u64, u64, Owner<'_>)> = Vec::new();
    let mut tensors: Vec<(Owner<'_>, &TensorData)> = Vec::new();
    for (_, graph) in model.graphs() {
        for &value in &graph.initializers {
            if let Some(tensor) = &model.value(value).initializer {
                tensors.push((Owner::Initializer(&tensor.name), &tensor.data));
            }
        }
        for &node in &graph.nodes {
            for attribute in &model.node(node).attributes {
                if let AttrValue::Tensor(tensor) = &attribute.value {
                    tensors.push((Owner::Node(node), &tensor.data));
                }
            }
        }
    }
    for (owner, data_of) in tensors {
        if let TensorData::External(reference) = data_of {
            let (path, start, length) = data.range(reference).map_err(|e| match e {
                IrError::External { location, reason } => IrError::External {
                    location,
                    reason: format!("of tensor '{}': {reason}", owner.name(model)),
                },
                other => other,
            })?;
            if length > 0 {
                let next = places.len();
                let place = *places.entry(path).or_insert(next);
                ranges.push((place, start, start + length, owner));
            }
        }
    }
    ranges.sort_by_key(|(place, start, end, _)| (*place, *start, *end));
    for pair in ranges.windows(2) {
        let [(a_place, a_start, a_end, a), (b_place, b_start, b_end, b)] = pair else {
            continue;
        };
        let same = (a_start, a_end) == (b_start, b_end);
        if a_place == b_place && b_start < a_end && !same {
            let path = places.iter().find(|(_, place)| *place == a_place);
            let (a, b) = (a.name(model), b.name(model));
            return Err(IrError::External {
                location: path.map_or(String::new(), |(path, _)| path.display().to_string()),
                reason: format!(
                    "tensors '{a}' ({a_start}..{a_end}) and '{b}' ({b_start}..{b_end}) overlap; the file \
                     is damaged or was written by a broken tool"
                ),
            });
        }
    }
    Ok(())
}

/// Whose tensor one is: put into words only where they are needed.
#[derive(Clone, Copy)]
enum Owner<'a> {
    Initializer(&'a str),
    Node(NodeId),
}

impl Owner<'_> {
    fn name(self, model: &Model) -> String {
        match self {
            Self::Initializer(name) => name.to_owned(),
            Self::Node(node) => model.describe(node),
        }
    }
}

struct Reader<'a> {
    loader: Loader,
    /// The loader's own.
    external: Arc<dyn ExternalSource>,
    path: &'a Path,
}

impl Reader<'_> {
    fn bad(&self, place: impl Into<String>, problem: impl ToString) -> OnnxError {
        OnnxError::Malformed {
            path: self.path.to_owned(),
            place: place.into(),
            problem: problem.to_string(),
        }
    }

    fn ir(&self, source: IrError) -> OnnxError {
        OnnxError::Model {
            path: self.path.to_owned(),
            source,
        }
    }

    fn walk(&self, place: &str, message: &Bytes) -> Result<Vec<Field>, OnnxError> {
        let each = fields(message).inspect(|field| {
            let length = field.as_ref().map_or(0, |f| f.whole.len());
            self.external.passed(length);
        });
        let all: Result<Vec<Field>, WireError> = each.collect();
        all.map_err(|e| self.bad(place, e))
    }

    fn text(&self, place: &str, field: &Field) -> Result<String, OnnxError> {
        field.text().map_err(|e| self.bad(place, e.problem))
    }

    fn payload(&self, place: &str, field: &Field) -> Result<Bytes, OnnxError> {
        field
            .bytes()
            .cloned()
            .map_err(|e| self.bad(place, e.problem))
    }

    fn decode<M: Message + Default>(&self, place: &str, field: &Field) -> Result<M, OnnxError> {
        M::decode(self.payload(place, field)?).map_err(|e| self.bad(place, e))
    }

    fn model(&mut self, bytes: &Bytes) -> Result<(), OnnxError> {
        let all = self.walk("ModelProto", bytes)?;
        let main = self.loader.header().main();
        let mut graph_seen = false;
        for field in &all {
            let number = field.number;
            let order = &mut self.loader.header().provenance.order;
            if !order.contains(&number) {
                order.push(number);
            }
            match (number, &field.payload) {
                (1, Payload::Varint(version)) => {
                    self.loader.header().ir_version = *version as i64;
                    self.keep(field);
                }
                (2, Payload::Bytes(_)) => {
                    self.loader.header().producer = self.text("producer_name", field)?;
                    self.keep(field);
                }
                (7, Payload::Bytes(graph)) => {
                    if graph_seen {
                        return Err(self.bad("ModelProto", "it holds two graphs"));
                    }
                    graph_seen = true;
                    self.graph(main, graph, 0)?;
                }
                (8, Payload::Bytes(_)) => {
                    let import: proto::OperatorSetIdProto = self.decode("opset_import", field)?;
                    let entry = (import.domain().to_owned(), import.version());
                    self.loader.header().opset_imports.push(entry);
                    self.keep(field);
                }
                (14, Payload::Bytes(origin)) => {
                    let entry: proto::StringStringEntryProto =
                        self.decode("metadata_props", field)?;
                    self.loader.header().metadata.push(MetadataEntry {
                        key: entry.key().to_owned(),
                        value: entry.value().to_owned(),
                        origin: Some(origin.clone()),
                    });
                }
                (25, Payload::Bytes(function)) => {
                    self.function(function)?;
                    self.keep(field);
                }
                _ => self.keep(field),
            }
        }
        if !graph_seen {
            return Err(self.bad(
                "ModelProto",
                "it holds no graph (is this an ONNX model, or a data file?)",
            ));
        }
        Ok(())
    }

    fn keep(&mut self, field: &Field) {
        let extra = &mut self.loader.header().provenance.extra;
        extra.push((field.number, field.whole.clone()));
    }

    fn graph(&mut self, id: GraphId, bytes: &Bytes, depth: usize) -> Result<(), OnnxError> {
        if depth > MAX_DEPTH {
            return Err(self.bad("GraphProto", "sub-graphs are nested too deeply"));
        }
        let all = self.walk("GraphProto", bytes)?;
        self.loader.provenance(id).origin = Some(bytes.clone());
        // Inputs and initializers first: nodes refer to them by name, and files
        // list the nodes before them.
        for field in &all {
            let order = &mut self.loader.provenance(id).order;
            if !order.contains(&field.number) {
                order.push(field.number);
            }
            match field.number {
                2 => {
                    let name = self.text("graph name", field)?;
                    self.loader.rename_graph(id, name);
                }
                5 => {
                    let origin = self.payload("initializer", field)?;
                    let tensor = convert::tensor(origin).map_err(|e| self.bad("initializer", e))?;
                    self.external.passed(field.whole.len());
                    if tensor.name.is_empty() {
                        return Err(self.bad("initializer", "it has no name"));
                    }
                    self.loader
                        .initializer(id, tensor)
                        .map_err(|e| self.ir(e))?;
                }
                11 => {
                    let origin = self.payload("graph input", field)?;
                    let (name, ty) =
                        convert::value_info(&origin).map_err(|e| self.bad("graph input", e))?;
                    let added = self.loader.input(id, &name, ty, Some(origin));
                    added.map_err(|e| self.ir(e))?;
                }
                15 => {
                    let sparse: proto::SparseTensorProto =
                        self.decode("sparse_initializer", field)?;
                    let name = sparse.values.as_ref().map_or("", |v| v.name());
                    self.loader.opaque(id, name).map_err(|e| self.ir(e))?;
                    let extra = &mut self.loader.provenance(id).extra;
                    extra.push((field.number, field.whole.clone()));
                }
                1 | 12 | 13 => {}
                number => {
                    let extra = &mut self.loader.provenance(id).extra;
                    extra.push((number, field.whole.clone()));
                }
            }
        }
        for field in all.iter().filter(|f| f.number == 1) {
            let origin = self.payload("node", field)?;
            self.node(id, origin, depth)?;
        }
        for field in all.iter().filter(|f| f.number == 12) {
            let origin = self.payload("graph output", field)?;
            let (name, ty) =
                convert::value_info(&origin).map_err(|e| self.bad("graph output", e))?;
            self.loader.output(id, &name, ty, Some(origin));
        }
        for field in all.iter().filter(|f| f.number == 13) {
            let origin = self.payload("value_info", field)?;
            let (name, ty) = convert::value_info(&origin).map_err(|e| self.bad("value_info", e))?;
            if !self.loader.value_info(id, &name, ty, Some(origin)) {
                let extra = &mut self.loader.provenance(id).extra;
                extra.push((13, field.whole.clone()));
            }
        }
        Ok(())
    }

    fn node(&mut self, graph: GraphId, origin: Bytes, depth: usize) -> Result<(), OnnxError> {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        let (mut name, mut op_type, mut domain) = (String::new(), String::new(), String::new());
        let mut overload = String::new();
        let mut attributes = Vec::new();
        for field in self.walk("NodeProto", &origin)? {
            match field.number {
                1 => inputs.push(self.text("node input", &field)?),
                2 => outputs.push(self.text("node output", &field)?),
                3 => name = self.text("node name", &field)?,
                4 => op_type = self.text("node op_type", &field)?,
                5 => {
                    let bytes = self.payload("attribute", &field)?;
                    attributes.push(self.attribute(graph, &bytes, depth)?);
                }
                7 => domain = self.text("node domain", &field)?,
                8 => overload = self.text("node overload", &field)?,
                _ => {}
            }
        }
        if op_type.is_empty() {
            return Err(self.bad(format!("node '{name}'"), "it has no op_type"));
        }
        if domain == "ai.onnx" {
            domain.clear();
        }
        let draft = NodeDraft {
            name,
            op_type,
            domain,
            overload,
            inputs: &inputs,
            outputs: &outputs,
            attributes,
            origin: Some(origin),
            edited: false,
        };
        self.loader.node(graph, draft).map_err(|e| self.ir(e))
    }

    fn attribute(
        &mut self,
        graph: GraphId,
        bytes: &Bytes,
        depth: usize,
    ) -> Result<Attribute, OnnxError> {
        let mut bodies = Vec::new();
        let (mut list, mut name) = (false, String::new());
        for field in self.walk("AttributeProto", bytes)? {
            match field.number {
                1 => name = self.text("attribute name", &field)?,
                6 | 11 => {
                    list = field.number == 11;
                    let contents = self.payload("sub-graph", &field)?;
                    let kind = GraphKind::Body { parent: graph };
                    let body = self.loader.graph(String::new(), kind);
                    self.graph(body, &contents, depth + 1)?;
                    bodies.push(body);
                }
                _ => {}
            }
        }
        match bodies.as_slice() {
            [] => convert::attribute(bytes.clone()).map_err(|e| self.bad("attribute", e)),
            [one] if !list => Ok(Attribute {
                name,
                value: AttrValue::Graph(*one),
            }),
            _ => Ok(Attribute {
                name,
                value: AttrValue::Graphs(bodies),
            }),
        }
    }

    fn function(&mut self, bytes: &Bytes) -> Result<(), OnnxError> {
        let (mut name, mut domain, mut overload) = (String::new(), String::new(), String::new());
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        let (mut opset_imports, mut defaults) = (Vec::new(), Vec::new());
        let all = self.walk("FunctionProto", bytes)?;
        for field in &all {
            match field.number {
                1 => name = self.text("function name", field)?,
                4 => inputs.push(self.text("function input", field)?),
                5 => outputs.push(self.text("function output", field)?),
                9 => {
                    let import: proto::OperatorSetIdProto =
                        self.decode("function opset_import", field)?;
                    opset_imports.push((import.domain().to_owned(), import.version()));
                }
                11 => {
                    let origin = self.payload("function attribute", field)?;
                    let default = convert::attribute(origin);
                    defaults.push(default.map_err(|e| self.bad("function attribute", e))?);
                }
                10 => domain = self.text("function domain", field)?,
                13 => overload = self.text("function overload", field)?,
                _ => {}
            }
        }
        let body = self.loader.graph(name.clone(), GraphKind::Function);
        for input in &inputs {
            let added = self.loader.input(body, input, None, None);
            added.map_err(|e| self.ir(e))?;
        }
        for field in all.iter().filter(|f| f.number == 7) {
            let origin = self.payload("function node", field)?;
            self.node(body, origin, 0)?;
        }
        for output in &outputs {
            self.loader.output(body, output, None, None);
        }
        self.loader.function(Function {
            domain,
            name,
            overload,
            opset_imports,
            defaults,
            body,
        });
        Ok(())
    }
}

/// An external reference from the entries of `TensorProto.external_data`.
pub(super) fn external_ref(
    entries: &[proto::StringStringEntryProto],
) -> Result<ExternalRef, String> {
    let mut reference = ExternalRef {
        location: String::new(),
        offset: None,
        length: None,
    };
    for entry in entries {
        let number = || {
            entry.value().parse::<u64>().map_err(|_| {
                format!(
                    "external data: {} '{}' is no byte count",
                    entry.key(),
                    entry.value()
                )
            })
        };
        match entry.key() {
            "location" => entry.value().clone_into(&mut reference.location),
            "offset" => reference.offset = Some(number()?),
            "length" => reference.length = Some(number()?),
            _ => {}
        }
    }
    if reference.location.is_empty() {
        return Err("external data without a location".into());
    }
    Ok(reference)
}
