//! Constant tensors: inline bytes (slices of the mapped file) or a reference
//! into an external data file that is opened only when its bytes are asked for.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::{DataType, IrError};

/// A reference into an external data file (`TensorProto.external_data`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRef {
    /// Path relative to the directory of the model file.
    pub location: String,
    /// First byte; absent means 0.
    pub offset: Option<u64>,
    /// Number of bytes. A file may leave it out: then it is what type and
    /// dimensions ask for, and absent only where these do not say (strings).
    pub length: Option<u64>,
}

/// Where the elements are.
#[derive(Clone, Debug)]
pub enum TensorData {
    /// Little-endian elements as in `TensorProto.raw_data`.
    Raw(Bytes),
    /// `string_data`.
    Strings(Vec<Bytes>),
    /// In another file.
    External(ExternalRef),
}

/// Opens external data. The reader of a format supplies it, so that the IR
/// knows neither paths nor policies.
pub trait ExternalSource: Send + Sync {
    /// The bytes that `reference` names.
    ///
    /// # Errors
    /// A location that is not allowed, a missing file, or a range outside it.
    fn load(&self, reference: &ExternalRef) -> Result<Bytes, IrError>;

    /// Directory that locations are relative to, if there is one.
    fn directory(&self) -> Option<PathBuf>;

    /// The open file that `bytes` are a mapped slice of, and where in it they
    /// begin; `None` if they lie in memory. A writer can then have them copied
    /// from file to file.
    fn place(&self, bytes: &[u8]) -> Option<(&File, u64)> {
        let _ = bytes;
        None
    }

    /// Says that so many bytes were gone over, of the mapped model perhaps: a source
    /// gives pages back from time to time. (A kernel maps two megabytes where one
    /// byte is looked at, so the headers of weights alone would bring all of a file
    /// into this process.)
    fn passed(&self, count: usize) {
        let _ = count;
    }
}

/// A source for models that live in memory and refer to no file.
#[derive(Debug, Default)]
pub struct NoExternal;

impl ExternalSource for NoExternal {
    fn load(&self, reference: &ExternalRef) -> Result<Bytes, IrError> {
        Err(IrError::External {
            location: reference.location.clone(),
            reason: "the model was not read from a directory".into(),
        })
    }

    fn directory(&self) -> Option<PathBuf> {
        None
    }
}

/// A constant tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Name inside the file (an initializer's name is its value's name).
    pub name: String,
    /// Element type.
    pub dtype: DataType,
    /// Dimensions; empty for a scalar.
    pub dims: Vec<i64>,
    /// Elements.
    pub data: TensorData,
    /// The serialised form it was read from; written back unchanged.
    pub(crate) origin: Option<Bytes>,
}

impl Tensor {
    /// A new inline tensor of little-endian `bytes`.
    pub fn raw(name: impl Into<String>, dtype: DataType, dims: Vec<i64>, bytes: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            dtype,
            dims,
            data: TensorData::Raw(bytes.into()),
            origin: None,
        }
    }

    /// A tensor as a reader found it, with the bytes it came from.
    pub(crate) fn read(
        name: String,
        dtype: DataType,
        dims: Vec<i64>,
        data: TensorData,
        origin: Bytes,
    ) -> Self {
        Self {
            name,
            dtype,
            dims,
            data,
            origin: Some(origin),
        }
    }

    /// A 1-D int64 tensor.
    pub fn i64s(name: impl Into<String>, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::raw(name, DataType::Int64, vec![values.len() as i64], bytes)
    }

    /// A scalar int64 tensor.
    pub fn i64_scalar(name: impl Into<String>, value: i64) -> Self {
        Self::raw(name, DataType::Int64, vec![], value.to_le_bytes().to_vec())
    }

    /// A scalar float tensor.
    pub fn f32_scalar(name: impl Into<String>, value: f32) -> Self {
        Self::raw(name, DataType::Float, vec![], value.to_le_bytes().to_vec())
    }

    /// A scalar of a floating-point type.
    ///
    /// # Panics
    /// If `dtype` is not a floating-point type (a programming error).
    pub fn float_scalar(name: impl Into<String>, dtype: DataType, value: f64) -> Self {
        let bytes = match dtype {
            DataType::Float => (value as f32).to_le_bytes().to_vec(),
            DataType::Double => value.to_le_bytes().to_vec(),
            DataType::Float16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
            DataType::Bfloat16 => half::bf16::from_f64(value).to_le_bytes().to_vec(),
            other => panic!("{other} is no floating-point type"),
        };
        Self::raw(name, dtype, vec![], bytes)
    }

    /// A scalar bool tensor.
    pub fn bool_scalar(name: impl Into<String>, value: bool) -> Self {
        Self::raw(name, DataType::Bool, vec![], vec![u8::from(value)])
    }

    /// Number of elements; `None` if a dimension is negative or the product
    /// overflows.
    pub fn element_count(&self) -> Option<u64> {
        self.dims
            .iter()
            .try_fold(1u64, |n, &d| n.checked_mul(u64::try_from(d).ok()?))
    }

    /// Little-endian element bytes, loading external data if need be.
    ///
    /// # Errors
    /// External data that cannot be read, strings, or a byte count that does
    /// not fit type and dimensions.
    pub fn bytes(&self, source: &Arc<dyn ExternalSource>) -> Result<Bytes, IrError> {
        let bytes = match &self.data {
            TensorData::Raw(bytes) => bytes.clone(),
            TensorData::External(reference) => source.load(reference)?,
            TensorData::Strings(_) => {
                return Err(IrError::Tensor {
                    tensor: self.name.clone(),
                    reason: "expected numbers, found strings".into(),
                });
            }
        };
        let expected = self.element_count().and_then(|n| self.dtype.byte_len(n));
        if expected != Some(bytes.len() as u64) {
            return Err(IrError::Tensor {
                tensor: self.name.clone(),
                reason: format!(
                    "expected {} bytes for {}{:?}, found {}",
                    expected.map_or("a countable number of".into(), |n| n.to_string()),
                    self.dtype,
                    self.dims,
                    bytes.len()
                ),
            });
        }
        Ok(bytes)
    }

    /// The elements as integers (int64, int32, uint8, bool).
    ///
    /// # Errors
    /// As [`Tensor::bytes`], or if the type is no integer type of these.
    pub fn to_i64s(&self, source: &Arc<dyn ExternalSource>) -> Result<Vec<i64>, IrError> {
        let bytes = self.bytes(source)?;
        match self.dtype {
            DataType::Int64 => Ok(bytes
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes(c.try_into().expect("chunks of 8")))
                .collect()),
            DataType::Int32 => Ok(bytes
                .chunks_exact(4)
                .map(|c| i64::from(i32::from_le_bytes(c.try_into().expect("chunks of 4"))))
                .collect()),
            DataType::Uint8 | DataType::Bool => Ok(bytes.iter().map(|&b| i64::from(b)).collect()),
            other => Err(IrError::Tensor {
                tensor: self.name.clone(),
                reason: format!("expected integers, found {other}"),
            }),
        }
    }

    /// The elements as doubles (any of the four floating-point types).
    ///
    /// # Errors
    /// As [`Tensor::bytes`], or if the type is no floating-point type.
    pub fn to_f64s(&self, source: &Arc<dyn ExternalSource>) -> Result<Vec<f64>, IrError> {
        let bytes = self.bytes(source)?;
        let two = |c: &[u8]| [c[0], c[1]];
        Ok(match self.dtype {
            DataType::Float => bytes
                .chunks_exact(4)
                .map(|c| f64::from(f32::from_le_bytes(c.try_into().expect("chunks of 4"))))
                .collect(),
            DataType::Double => bytes
                .chunks_exact(8)
                .map(|c| f64::from_le_bytes(c.try_into().expect("chunks of 8")))
                .collect(),
            DataType::Float16 => bytes
                .chunks_exact(2)
                .map(|c| half::f16::from_le_bytes(two(c)).to_f64())
                .collect(),
            DataType::Bfloat16 => bytes
                .chunks_exact(2)
                .map(|c| half::bf16::from_le_bytes(two(c)).to_f64())
                .collect(),
            other => {
                return Err(IrError::Tensor {
                    tensor: self.name.clone(),
                    reason: format!("expected floating-point numbers, found {other}"),
                });
            }
        })
    }
}
