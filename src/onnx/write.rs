//! Writing a verified model.
//!
//! Elements that no patch touched go out as the bytes they came in as; a model
//! that nothing touched is its own file, byte for byte. The output is a list of
//! slices, most of them of the mapped input, so that inline weights are never
//! copied in memory.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::wire::{Rope, fields};
use super::{OnnxError, convert};
use crate::ir::{
    AttrValue, Attribute, Def, ExternalSource, Graph, GraphId, Model, NodeId, Provenance, ValueId,
    Verified,
};
use crate::proto;

/// Protobuf messages are limited to 2 GiB.
const LIMIT: u64 = i32::MAX as u64;

/// Slices of a mapped file of at least so many bytes are copied from file to file;
/// shorter ones are cheaper to gather.
#[cfg(unix)]
const DIRECT: usize = 1 << 16;

/// A serialised model: slices in order.
pub struct Serialized {
    rope: Rope,
    /// Knows which slices lie in an open file.
    source: Arc<dyn ExternalSource>,
}

impl fmt::Debug for Serialized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rope, source: _ } = self;
        f.debug_struct("Serialized")
            .field("bytes", &rope.len())
            .field("slices", &rope.parts().len())
            .finish_non_exhaustive()
    }
}

impl Serialized {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.rope.len()
    }

    /// Whether it is empty (a model never is).
    pub fn is_empty(&self) -> bool {
        self.rope.len() == 0
    }

    /// All bytes in one piece (for small models and tests).
    pub fn to_vec(&self) -> Vec<u8> {
        self.rope.parts().concat()
    }

    /// Writes to an open file. Large slices of the file that the model was read
    /// from go from file to file and never through this process's memory.
    ///
    /// # Errors
    /// Those of writing; a model over protobuf's 2 GiB.
    pub fn write_to(&self, path: &Path, file: &File) -> Result<(), OnnxError> {
        if self.len() > LIMIT {
            return Err(OnnxError::Directory {
                path: path.to_owned(),
                problem: format!(
                    "the model takes {} bytes inline, more than the 2 GiB that protobuf allows; export it \
                     with external data",
                    self.len()
                ),
            });
        }
        let mut out = BufWriter::with_capacity(1 << 16, file);
        let mut buffer = Vec::new();
        for part in self.rope.parts() {
            self.write_part(part, &mut out, &mut buffer)
                .map_err(OnnxError::io(path))?;
            self.source.passed(part.len());
        }
        out.flush().map_err(OnnxError::io(path))
    }

    /// Writes a slice; `buffer` is of [`copy_range`](super::copy::copy_range).
    fn write_part(
        &self,
        part: &[u8],
        out: &mut BufWriter<&File>,
        buffer: &mut Vec<u8>,
    ) -> std::io::Result<()> {
        #[cfg(not(unix))]
        let _ = buffer;
        #[cfg(unix)]
        if part.len() >= DIRECT
            && let Some((from, offset)) = self.source.place(part)
        {
            out.flush()?;
            let length = part.len() as u64;
            return super::copy::copy_range(from, offset, length, out.get_ref(), buffer);
        }
        out.write_all(part)
    }
}

/// Serialises a verified model.
pub fn serialize(model: Verified<'_>) -> Serialized {
    let model = model.model();
    Serialized {
        rope: rope(model),
        source: model.external().clone(),
    }
}

fn rope(model: &Model) -> Rope {
    let mut rope = Rope::default();
    if let Some(source) = &model.source {
        rope.whole(source.clone());
        return rope;
    }
    let order = numbers(&model.provenance, &[1, 8, 2, 7, 14]);
    for number in order {
        match number {
            7 => rope.message(7, graph(model, model.main())),
            14 => {
                for entry in &model.metadata {
                    match &entry.origin {
                        Some(origin) => rope.bytes(14, origin.clone()),
                        None => rope.encode(
                            14,
                            &proto::StringStringEntryProto {
                                key: Some(entry.key.clone()),
                                value: Some(entry.value.clone()),
                            },
                        ),
                    }
                }
            }
            other => {
                carry(&model.provenance, other, &mut rope);
                header(model, other, &mut rope);
            }
        }
    }
    rope
}

/// Header fields that the model did not get from a file: all of them if it was
/// not read, and operator sets that came with inlined functions.
fn header(model: &Model, number: u32, rope: &mut Rope) {
    let carried = model.provenance.extra.iter();
    let carried = carried.filter(|(n, _)| *n == number).count();
    match number {
        1 if carried == 0 => {
            let version = proto::ModelProto {
                ir_version: Some(model.ir_version),
                ..Default::default()
            };
            rope.whole(prost::Message::encode_to_vec(&version).into());
        }
        8 => {
            for (domain, version) in model.opset_imports.iter().skip(carried) {
                rope.encode(
                    8,
                    &proto::OperatorSetIdProto {
                        domain: Some(domain.clone()),
                        version: Some(*version),
                    },
                );
            }
        }
        _ => {}
    }
}

/// Field numbers in the file's order, then those that must be there.
fn numbers(provenance: &Provenance, needed: &[u32]) -> Vec<u32> {
    let mut order = provenance.order.clone();
    for number in needed {
        if !order.contains(number) {
            order.push(*number);
        }
    }
    order
}

fn carry(provenance: &Provenance, number: u32, rope: &mut Rope) {
    for (n, whole) in &provenance.extra {
        if *n == number {
            rope.whole(whole.clone());
        }
    }
}

fn graph(model: &Model, id: GraphId) -> Rope {
    let g = model.subgraph(id);
    let mut rope = Rope::default();
    if let (false, Some(origin)) = (g.touched, &g.provenance.origin) {
        rope.whole(origin.clone());
        return rope;
    }
    for number in numbers(&g.provenance, &[1, 2, 5, 11, 12, 13]) {
        match number {
            1 => {
                for &n in &g.nodes {
                    rope.message(1, node(model, n));
                }
            }
            2 => rope.text(2, &g.name),
            5 => {
                for &value in &g.initializers {
                    if let Some(tensor) = &model.value(value).initializer {
                        match &tensor.origin {
                            Some(origin) => rope.bytes(5, origin.clone()),
                            None => rope.encode(5, &convert::tensor_proto(tensor)),
                        }
                    }
                }
            }
            11 => g.inputs.iter().for_each(|&v| info(model, 11, v, &mut rope)),
            12 => g
                .outputs
                .iter()
                .for_each(|&v| info(model, 12, v, &mut rope)),
            13 => {
                for value in still_typed(model, g) {
                    info(model, 13, value, &mut rope);
                }
                carry(&g.provenance, 13, &mut rope);
            }
            other => carry(&g.provenance, other, &mut rope),
        }
    }
    rope
}

/// Typed intermediate values whose nodes were not removed and that did not become
/// graph outputs.
fn still_typed(model: &Model, graph: &Graph) -> Vec<ValueId> {
    let outputs: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    let initializers: HashSet<ValueId> = graph.initializers.iter().copied().collect();
    let there = |v: &ValueId| {
        let value = model.value(*v);
        let defined = match value.def {
            Def::Node { node, .. } => model.try_node(node).is_some(),
            Def::Initializer => initializers.contains(v),
            Def::Input | Def::Opaque => true,
            Def::Missing => false,
        };
        defined && value.ty.is_some() && !outputs.contains(v)
    };
    graph.typed.iter().copied().filter(there).collect()
}

fn info(model: &Model, number: u32, value: ValueId, rope: &mut Rope) {
    let v = model.value(value);
    match &v.info_origin {
        Some(origin) => rope.bytes(number, origin.clone()),
        None => rope.encode(number, &convert::value_info_proto(&v.name, v.ty.as_ref())),
    }
}

fn node(model: &Model, id: NodeId) -> Rope {
    let n = model.node(id);
    let mut rope = Rope::default();
    let touched = |g: &GraphId| model.subgraph(*g).touched;
    let body_changed = n.subgraphs().any(|g| touched(&g));
    if let (Some(origin), false, false) = (&n.origin, n.edited, body_changed) {
        rope.whole(origin.clone());
        return rope;
    }
    let name = |v: &Option<ValueId>| v.map_or("", |v| model.name(v)).to_owned();
    for input in &n.inputs {
        rope.text(1, &name(input));
    }
    for output in &n.outputs {
        rope.text(2, &name(output));
    }
    rope.text(3, &n.name);
    let Some(origin) = &n.origin else {
        rope.text(4, &n.op_type);
        for attribute in &n.attributes {
            attribute_field(model, attribute, &mut rope);
        }
        if !n.domain.is_empty() {
            rope.text(7, &n.domain);
        }
        if !n.overload.is_empty() {
            rope.text(8, &n.overload);
        }
        return rope;
    };
    // Everything but inputs, outputs and name as it stands in the file.
    let mut attributes = n.attributes.iter();
    for field in fields(origin).map_while(Result::ok) {
        match field.number {
            1..=3 => {}
            5 => {
                let attribute = attributes.next();
                match attribute {
                    Some(a) if holds_touched(model, a) => match field.bytes() {
                        Ok(origin) => rope.message(5, with_bodies(model, a, origin)),
                        Err(_) => attribute_field(model, a, &mut rope),
                    },
                    _ => rope.whole(field.whole),
                }
            }
            // A clone does not inherit what the exporter said about the
            // original (doc_string, metadata).
            6 | 9 if n.pass.is_some() => {}
            _ => rope.whole(field.whole),
        }
    }
    rope
}

fn holds_touched(model: &Model, attribute: &Attribute) -> bool {
    match &attribute.value {
        AttrValue::Graph(g) => model.subgraph(*g).touched,
        AttrValue::Graphs(list) => list.iter().any(|g| model.subgraph(*g).touched),
        _ => false,
    }
}

/// An attribute as it stands in the file, around the bodies as they are now.
fn with_bodies(model: &Model, attribute: &Attribute, origin: &Bytes) -> Rope {
    let bodies: &[GraphId] = match &attribute.value {
        AttrValue::Graph(g) => std::slice::from_ref(g),
        AttrValue::Graphs(all) => all,
        _ => &[],
    };
    let mut bodies = bodies.iter();
    let mut rope = Rope::default();
    for field in fields(origin).map_while(Result::ok) {
        match (field.number, bodies.as_slice().first()) {
            (6 | 11, Some(&body)) => {
                bodies.next();
                rope.message(field.number, graph(model, body));
            }
            _ => rope.whole(field.whole),
        }
    }
    rope
}

fn attribute_field(model: &Model, attribute: &Attribute, rope: &mut Rope) {
    use proto::attribute_proto::AttributeType as T;
    let (list, bodies): (bool, &[GraphId]) = match &attribute.value {
        AttrValue::Graph(g) => (false, std::slice::from_ref(g)),
        AttrValue::Graphs(all) => (true, all),
        AttrValue::Other(origin) => {
            rope.bytes(5, origin.clone());
            return;
        }
        _ => {
            if let Some(message) = convert::attribute_proto(attribute) {
                rope.encode(5, &message);
            }
            return;
        }
    };
    let mut inner = Rope::default();
    inner.text(1, &attribute.name);
    for &body in bodies {
        inner.message(if list { 11 } else { 6 }, graph(model, body));
    }
    let ty = if list { T::Graphs } else { T::Graph };
    let tail = proto::AttributeProto {
        r#type: Some(ty.into()),
        ..Default::default()
    };
    inner.whole(Bytes::from(prost::Message::encode_to_vec(&tail)));
    rope.message(5, inner);
}
