//! What a file says beside the computation: doc strings, metadata of parts,
//! quantisation annotations, sparse tensors, and fields that are carried through
//! unread. The reader keeps them as bytes; here they are decoded for comparison.
//!
//! Everything is read from what an element keeps of its serialised form, so of
//! an element that a patch made there is nothing to tell. Parts that do not
//! decode are told as opaque bytes, never left out.

use bytes::Bytes;
use prost::Message;

use super::convert;
use super::wire::{Field, Payload, fields};
use crate::ir::{Graph, Model, Node, Tensor, Value, ValueType};
use crate::proto;

/// A key and a value.
pub type Pair = (String, String);

/// Text beside a part, and what is not understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remarks {
    /// `doc_string`.
    pub doc: String,
    /// `metadata_props`, sorted by key.
    pub metadata: Vec<Pair>,
    /// Other fields that no type of the IR holds: number and serialised field,
    /// sorted.
    pub opaque: Vec<(u32, Bytes)>,
}

impl Remarks {
    fn add(&mut self, field: &Field, doc: u32, metadata: u32) {
        if field.number == doc
            && let Ok(text) = field.text()
        {
            self.doc = text;
        } else if field.number == metadata
            && let Some(pair) = pair(field)
        {
            self.metadata.push(pair);
        } else {
            self.opaque.push((field.number, field.whole.clone()));
        }
    }

    fn sorted(mut self) -> Self {
        self.metadata.sort();
        self.opaque.sort();
        self
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.doc.is_empty() && self.metadata.is_empty() && self.opaque.is_empty()
    }
}

fn pair(field: &Field) -> Option<Pair> {
    let entry = proto::StringStringEntryProto::decode(field.bytes().ok()?.clone()).ok()?;
    Some((entry.key().to_owned(), entry.value().to_owned()))
}

/// The fields of a message; those of a damaged one up to the damage.
fn all(message: &Bytes) -> impl Iterator<Item = Field> + use<> {
    fields(message).map_while(Result::ok)
}

/// Header fields of a model that the IR does not hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelDetails {
    /// `producer_version`.
    pub producer_version: String,
    /// `domain`.
    pub domain: String,
    /// `model_version`.
    pub model_version: i64,
    /// Doc string; opaque: training information, device configurations, fields
    /// that this version does not know.
    pub remarks: Remarks,
    /// One for each of the model's functions, in order.
    pub functions: Vec<FunctionDetails>,
}

/// What the IR does not hold of a function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionDetails {
    /// Attributes without a default, sorted.
    pub attributes: Vec<String>,
    /// Types that it states of values of its body, by name.
    pub types: Vec<(String, Option<ValueType>)>,
    /// Doc string, metadata, the rest.
    pub remarks: Remarks,
}

/// Details of a model.
pub fn of_model(model: &Model) -> ModelDetails {
    let mut found = ModelDetails::default();
    for (number, whole) in &model.provenance.extra {
        let Some(field) = all(whole).next() else {
            continue;
        };
        match (number, &field.payload) {
            (1 | 2 | 7 | 8, _) => {}
            (3, Payload::Bytes(_)) => found.producer_version = field.text().unwrap_or_default(),
            (4, Payload::Bytes(_)) => found.domain = field.text().unwrap_or_default(),
            (5, Payload::Varint(version)) => found.model_version = *version as i64,
            (25, Payload::Bytes(function)) => found.functions.push(of_function(function)),
            // No metadata comes this way: the IR holds it.
            _ => found.remarks.add(&field, 6, 14),
        }
    }
    found
        .functions
        .resize_with(model.functions.len(), FunctionDetails::default);
    found.remarks = found.remarks.sorted();
    found
}

fn of_function(function: &Bytes) -> FunctionDetails {
    let mut found = FunctionDetails::default();
    for field in all(function) {
        match field.number {
            1 | 4 | 5 | 7 | 9 | 10 | 11 | 13 => {}
            6 => found.attributes.extend(field.text()),
            12 => {
                let info = field.bytes().ok();
                found
                    .types
                    .extend(info.and_then(|b| convert::value_info(b).ok()));
            }
            _ => found.remarks.add(&field, 8, 14),
        }
    }
    found.attributes.sort();
    found.remarks = found.remarks.sorted();
    found
}

/// A sparse constant.
#[derive(Clone, Debug)]
pub struct Sparse {
    /// Values that are not zero; their name is the constant's.
    pub values: Tensor,
    /// Where they are.
    pub indices: Tensor,
    /// Dimensions of the whole.
    pub dims: Vec<i64>,
}

/// What the IR does not hold of a graph.
#[derive(Clone, Debug, Default)]
pub struct GraphDetails {
    /// Doc string, metadata, the rest.
    pub remarks: Remarks,
    /// Quantisation annotations: tensor, and which tensor is which parameter.
    pub quantization: Vec<(String, Vec<Pair>)>,
    /// Sparse initializers.
    pub sparse: Vec<Sparse>,
    /// Declared names and types of the outputs, in order; `None` where a patch
    /// changed the graph (then the values hold them) and in functions.
    pub outputs: Option<Vec<Option<ValueType>>>,
}

/// Details of a graph.
pub fn of_graph(graph: &Graph) -> GraphDetails {
    let mut found = GraphDetails::default();
    for (number, whole) in &graph.provenance.extra {
        let Some(field) = all(whole).next() else {
            continue;
        };
        match number {
            14 => {
                let read = field.bytes().ok().cloned();
                let read = read.and_then(|b| proto::TensorAnnotation::decode(b).ok());
                match read {
                    Some(a) => {
                        let pairs = &a.quant_parameter_tensor_names;
                        let pairs = pairs
                            .iter()
                            .map(|p| (p.key().to_owned(), p.value().to_owned()));
                        let mut pairs: Vec<Pair> = pairs.collect();
                        pairs.sort();
                        found.quantization.push((a.tensor_name().to_owned(), pairs));
                    }
                    None => found.remarks.opaque.push((*number, whole.clone())),
                }
            }
            15 => match field.bytes().ok().and_then(sparse) {
                Some(tensor) => found.sparse.push(tensor),
                None => found.remarks.opaque.push((*number, whole.clone())),
            },
            // Types of names that no value bears: nothing depends on them.
            13 => {}
            _ => found.remarks.add(&field, 10, 16),
        }
    }
    if !graph.touched
        && let Some(origin) = &graph.provenance.origin
    {
        let declared = all(origin).filter(|f| f.number == 12);
        let declared =
            declared.map(|f| f.bytes().ok().and_then(|b| convert::value_info(b).ok()?.1));
        found.outputs = Some(declared.collect());
    }
    found.remarks = found.remarks.sorted();
    found
}

fn sparse(message: &Bytes) -> Option<Sparse> {
    let (mut values, mut indices) = (None, None);
    let dims = proto::SparseTensorProto::decode(message.clone()).ok()?.dims;
    for field in all(message) {
        match field.number {
            1 => values = convert::tensor(field.bytes().ok()?.clone()).ok(),
            2 => indices = convert::tensor(field.bytes().ok()?.clone()).ok(),
            _ => {}
        }
    }
    Some(Sparse {
        values: values?,
        indices: indices?,
        dims,
    })
}

/// Remarks on a part of which the IR holds the fields `held`; `doc` and `metadata` are
/// the numbers of these fields.
fn of_part(origin: Option<&Bytes>, held: impl Fn(u32) -> bool, doc: u32, metadata: u32) -> Remarks {
    let mut found = Remarks::default();
    for field in origin.into_iter().flat_map(all) {
        if !held(field.number) {
            found.add(&field, doc, metadata);
        }
    }
    found.sorted()
}

/// Remarks on a node. Opaque: device configurations and unknown fields.
pub fn of_node(node: &Node) -> Remarks {
    let held = |number| matches!(number, 1..=5 | 7 | 8);
    of_part(node.origin.as_ref(), held, 6, 9)
}

/// Doc strings of a node's attributes, by name.
pub fn attribute_docs(node: &Node) -> Vec<Pair> {
    let mut found = Vec::new();
    let Some(origin) = &node.origin else {
        return found;
    };
    for field in all(origin).filter(|f| f.number == 5) {
        let Ok(attribute) = field.bytes() else {
            continue;
        };
        let of = |wanted: u32| {
            let mut parts = all(attribute).filter(|f| f.number == wanted);
            parts.next().and_then(|f| f.text().ok())
        };
        if let Some(doc) = of(13) {
            found.push((of(1).unwrap_or_default(), doc));
        }
    }
    found
}

/// Remarks on a value, from its type information. The denotations of its type
/// and dimensions count as metadata.
pub fn of_value(value: &Value) -> Remarks {
    let mut found = Remarks::default();
    let Some(origin) = &value.info_origin else {
        return found;
    };
    for field in all(origin).filter(|f| f.number != 1) {
        if field.number != 2 {
            found.add(&field, 3, 4);
            continue;
        }
        let read = field.bytes().ok().cloned();
        let Some(ty) = read.and_then(|b| proto::TypeProto::decode(b).ok()) else {
            continue;
        };
        if !ty.denotation().is_empty() {
            let of = ty.denotation().to_owned();
            found.metadata.push(("denotation".into(), of));
        }
        if let Some(proto::type_proto::Value::TensorType(t)) = &ty.value {
            let dims = t.shape.iter().flat_map(|s| &s.dim).enumerate();
            for (axis, dim) in dims.filter(|(_, d)| !d.denotation().is_empty()) {
                let of = dim.denotation().to_owned();
                found
                    .metadata
                    .push((format!("denotation of axis {axis}"), of));
            }
        }
    }
    found.sorted()
}

/// Remarks on a constant. How and where its elements are stored is none.
pub fn of_tensor(tensor: &Tensor) -> Remarks {
    let held = |number| matches!(number, 1..=11 | 13 | 14);
    of_part(tensor.origin.as_ref(), held, 12, 16)
}

/// An attribute of a type that the IR does not hold.
#[derive(Clone, Debug)]
pub enum Unusual {
    /// Tensors.
    Tensors(Vec<Tensor>),
    /// Sparse tensors.
    Sparse(Vec<Sparse>),
    /// Types, each serialised in the same way.
    Types(Vec<Bytes>),
    /// Something else, as it stands in the file.
    Unknown(Bytes),
}

/// Decodes an attribute that the IR holds as serialised bytes
/// ([`AttrValue::Other`](crate::ir::AttrValue::Other)).
pub fn unusual(attribute: &Bytes) -> Unusual {
    use proto::attribute_proto::AttributeType as T;
    let unknown = || Unusual::Unknown(attribute.clone());
    let Ok(decoded) = proto::AttributeProto::decode(attribute.clone()) else {
        return unknown();
    };
    let parts = |number: u32| {
        let found = all(attribute).filter(move |f| f.number == number);
        found.filter_map(|f| f.bytes().ok().cloned())
    };
    let tensors: Option<Vec<Tensor>> = parts(10).map(|b| convert::tensor(b).ok()).collect();
    let one = matches!(decoded.r#type(), T::SparseTensor);
    let sparse: Option<Vec<Sparse>> = parts(if one { 22 } else { 23 })
        .map(|b| sparse(&b))
        .collect();
    match decoded.r#type() {
        T::Tensors => tensors.map_or_else(unknown, Unusual::Tensors),
        T::SparseTensor | T::SparseTensors => sparse.map_or_else(unknown, Unusual::Sparse),
        T::TypeProto | T::TypeProtos => {
            let types = decoded.tp.iter().chain(&decoded.type_protos);
            Unusual::Types(types.map(|t| t.encode_to_vec().into()).collect())
        }
        _ => unknown(),
    }
}
