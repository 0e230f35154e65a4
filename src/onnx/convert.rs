//! Leaf messages ↔ IR types.

use bytes::Bytes;
use prost::Message;

use super::read::external_ref;
use crate::ir::{AttrValue, Attribute, DataType, Dim, Tensor, TensorData, ValueType};
use crate::proto::{self, tensor_shape_proto::dimension, type_proto};

/// Serialised tensors of at least so many bytes are looked at twice to keep their
/// elements where they are.
const LARGE: usize = 4096;

/// A tensor; `raw_data` stays a slice of `origin`, and so do large packed
/// `float_data` and `double_data`, which are the same bytes.
pub(super) fn tensor(origin: Bytes) -> Result<Tensor, String> {
    let (t, floats) = match packed_floats(&origin) {
        Some((t, floats)) => (t, Some(floats)),
        None => {
            let t = proto::TensorProto::decode(origin.clone());
            (t.map_err(|e| e.to_string())?, None)
        }
    };
    let dtype = DataType::from_code(t.data_type());
    let at = |what: String| format!("tensor '{}': {what}", t.name());
    if let Some(dim) = t.dims.iter().find(|d| **d < 0) {
        return Err(at(format!("dimension {dim} is negative")));
    }
    let data = if t.data_location() == proto::tensor_proto::DataLocation::External {
        let mut reference = external_ref(&t.external_data).map_err(at)?;
        if reference.length.is_none() {
            let dims = t.dims.iter().map(|d| d.unsigned_abs());
            let count = dims.into_iter().try_fold(1u64, u64::checked_mul);
            reference.length = count.and_then(|n| dtype.byte_len(n));
        }
        TensorData::External(reference)
    } else if dtype == DataType::String {
        TensorData::Strings(t.string_data.clone())
    } else if t.raw_data.is_some() {
        TensorData::Raw(t.raw_data.clone().unwrap_or_default())
    } else if let Some(floats) = floats {
        TensorData::Raw(floats)
    } else {
        TensorData::Raw(typed(&t, dtype).map_err(at)?.into())
    };
    Ok(Tensor::read(
        t.name().to_owned(),
        dtype,
        t.dims,
        data,
        origin,
    ))
}

/// A tensor whose elements are one packed list of floats or doubles, without them, and
/// their bytes.
fn packed_floats(origin: &Bytes) -> Option<(proto::TensorProto, Bytes)> {
    use super::wire::{Payload, fields};
    if origin.len() < LARGE {
        return None;
    }
    let mut rest = Vec::new();
    let mut floats = None;
    for field in fields(origin) {
        let field = field.ok()?;
        match (field.number, field.payload) {
            (4 | 10, Payload::Bytes(bytes)) if floats.is_none() => {
                floats = Some((field.number, bytes));
            }
            // Other elements: a list in pieces, or of another type.
            (4..=7 | 9..=11, _) => return None,
            _ => rest.extend_from_slice(&field.whole),
        }
    }
    let (number, bytes) = floats?;
    let t = proto::TensorProto::decode(rest.as_slice()).ok()?;
    let width = match (DataType::from_code(t.data_type()), number) {
        (DataType::Float | DataType::Complex64, 4) => 4,
        (DataType::Double | DataType::Complex128, 10) => 8,
        _ => return None,
    };
    bytes.len().is_multiple_of(width).then_some((t, bytes))
}

/// Elements that are stored in a typed field, as little-endian bytes.
fn typed(t: &proto::TensorProto, dtype: DataType) -> Result<Vec<u8>, String> {
    use DataType as D;
    let narrow = |bytes: usize| -> Vec<u8> {
        let mut all = Vec::with_capacity(t.int32_data.len() * bytes);
        for v in &t.int32_data {
            all.extend_from_slice(&v.to_le_bytes()[..bytes]);
        }
        all
    };
    Ok(match dtype {
        D::Float | D::Complex64 => t.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        D::Double | D::Complex128 => t.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        D::Int64 => t.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        D::Uint64 => t.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        D::Uint32 => t
            .uint64_data
            .iter()
            .flat_map(|v| v.to_le_bytes()[..4].to_vec())
            .collect(),
        D::Int32 => narrow(4),
        D::Int16 | D::Uint16 | D::Float16 | D::Bfloat16 => narrow(2),
        D::Undefined | D::String | D::Other(_) => {
            return Err(format!("element type {dtype} has no data"));
        }
        // 8-bit and packed sub-byte types: one byte of data each.
        _ => narrow(1),
    })
}

/// Name and type of a value.
pub(super) fn value_info(origin: &Bytes) -> Result<(String, Option<ValueType>), String> {
    let info = proto::ValueInfoProto::decode(origin.clone()).map_err(|e| e.to_string())?;
    let ty = info.r#type.as_ref().map(|ty| match &ty.value {
        Some(type_proto::Value::TensorType(t)) => ValueType::Tensor {
            dtype: DataType::from_code(t.elem_type()),
            shape: t.shape.as_ref().map(|s| s.dim.iter().map(dim).collect()),
        },
        _ => ValueType::Other(ty.encode_to_vec().into()),
    });
    Ok((info.name().to_owned(), ty))
}

fn dim(d: &proto::tensor_shape_proto::Dimension) -> Dim {
    match &d.value {
        Some(dimension::Value::DimValue(n)) => Dim::Known(*n),
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => Dim::Param(name.clone()),
        _ => Dim::Unknown,
    }
}

/// The serialised form of a value's name and type.
pub(super) fn value_info_proto(name: &str, ty: Option<&ValueType>) -> proto::ValueInfoProto {
    // A type that says nothing is left out: runtimes then infer it.
    let unsaid = |t: &&ValueType| t.dtype() != Some(DataType::Undefined);
    let r#type = ty.filter(unsaid).map(|ty| match ty {
        ValueType::Tensor { dtype, shape } => proto::TypeProto {
            value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                elem_type: Some(dtype.code()),
                shape: shape.as_ref().map(|dims| proto::TensorShapeProto {
                    dim: dims.iter().map(dim_proto).collect(),
                }),
            })),
            denotation: None,
        },
        ValueType::Other(bytes) => proto::TypeProto::decode(bytes.clone()).unwrap_or_default(),
    });
    proto::ValueInfoProto {
        name: Some(name.to_owned()),
        r#type,
        ..Default::default()
    }
}

fn dim_proto(d: &Dim) -> proto::tensor_shape_proto::Dimension {
    let value = match d {
        Dim::Known(n) => Some(dimension::Value::DimValue(*n)),
        Dim::Param(name) => Some(dimension::Value::DimParam(name.clone())),
        Dim::Unknown => None,
    };
    proto::tensor_shape_proto::Dimension {
        value,
        denotation: None,
    }
}

/// An attribute that holds no sub-graph.
pub(super) fn attribute(origin: Bytes) -> Result<Attribute, String> {
    use proto::attribute_proto::AttributeType as T;
    let a = proto::AttributeProto::decode(origin.clone()).map_err(|e| e.to_string())?;
    if !a.ref_attr_name().is_empty() {
        return Ok(Attribute {
            name: a.name().to_owned(),
            value: AttrValue::Ref(a.ref_attr_name().to_owned()),
        });
    }
    let value = match a.r#type() {
        T::Float => AttrValue::Float(a.f()),
        T::Int => AttrValue::Int(a.i()),
        T::String => AttrValue::String(a.s.clone().unwrap_or_default()),
        T::Floats => AttrValue::Floats(a.floats.clone()),
        T::Ints => AttrValue::Ints(a.ints.clone()),
        T::Strings => AttrValue::Strings(a.strings.clone()),
        T::Tensor => AttrValue::Tensor(tensor(attribute_tensor(&origin)?)?),
        _ => AttrValue::Other(origin.clone()),
    };
    Ok(Attribute {
        name: a.name().to_owned(),
        value,
    })
}

fn attribute_tensor(attribute: &Bytes) -> Result<Bytes, String> {
    for field in super::wire::fields(attribute) {
        let field = field.map_err(|e| e.to_string())?;
        if field.number == 5 {
            return field.bytes().cloned().map_err(|e| e.to_string());
        }
    }
    Err("a tensor attribute without a tensor".into())
}

/// The serialised form of an attribute that a pass made.
pub(super) fn attribute_proto(attribute: &Attribute) -> Option<proto::AttributeProto> {
    use proto::attribute_proto::AttributeType as T;
    let mut a = proto::AttributeProto {
        name: Some(attribute.name.clone()),
        ..Default::default()
    };
    let ty = match &attribute.value {
        AttrValue::Float(f) => {
            a.f = Some(*f);
            T::Float
        }
        AttrValue::Int(i) => {
            a.i = Some(*i);
            T::Int
        }
        AttrValue::String(s) => {
            a.s = Some(s.clone());
            T::String
        }
        AttrValue::Floats(list) => {
            a.floats.clone_from(list);
            T::Floats
        }
        AttrValue::Ints(list) => {
            a.ints.clone_from(list);
            T::Ints
        }
        AttrValue::Strings(list) => {
            a.strings.clone_from(list);
            T::Strings
        }
        AttrValue::Tensor(t) => {
            a.t = Some(tensor_proto(t));
            T::Tensor
        }
        AttrValue::Graph(_) | AttrValue::Graphs(_) | AttrValue::Ref(_) | AttrValue::Other(_) => {
            return None;
        }
    };
    a.r#type = Some(ty.into());
    Some(a)
}

/// The serialised form of a tensor that a pass made.
pub(super) fn tensor_proto(t: &Tensor) -> proto::TensorProto {
    let mut p = proto::TensorProto {
        dims: t.dims.clone(),
        data_type: Some(t.dtype.code()),
        name: (!t.name.is_empty()).then(|| t.name.clone()),
        ..Default::default()
    };
    match &t.data {
        TensorData::Raw(bytes) => p.raw_data = Some(bytes.clone()),
        TensorData::Strings(list) => p.string_data.clone_from(list),
        TensorData::External(reference) => {
            let entry = |key: &str, value: String| proto::StringStringEntryProto {
                key: Some(key.into()),
                value: Some(value),
            };
            p.external_data
                .push(entry("location", reference.location.clone()));
            let numbers = [("offset", reference.offset), ("length", reference.length)];
            for (key, number) in numbers {
                if let Some(n) = number {
                    p.external_data.push(entry(key, n.to_string()));
                }
            }
            p.data_location = Some(proto::tensor_proto::DataLocation::External.into());
        }
    }
    p
}
