//! Types of values: element type and symbolic shape.

use std::fmt;

use bytes::Bytes;

use super::DataType;

/// One dimension of a tensor type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Known size.
    Known(i64),
    /// Named, as in `dim_param`.
    Param(String),
    /// Nothing is said.
    Unknown,
}

impl Dim {
    /// A named dimension.
    pub fn param(name: impl Into<String>) -> Self {
        Self::Param(name.into())
    }

    /// The size if it is known.
    pub fn known(&self) -> Option<i64> {
        match self {
            Self::Known(n) => Some(*n),
            _ => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(n) => write!(f, "{n}"),
            Self::Param(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// The type of a value.
#[derive(Clone, Debug, PartialEq)]
pub enum ValueType {
    /// A dense tensor; `shape: None` means that not even the rank is known.
    Tensor {
        /// Element type.
        dtype: DataType,
        /// Dimensions.
        shape: Option<Vec<Dim>>,
    },
    /// A sequence, map, optional, sparse or opaque type, in serialised form:
    /// carried through, never looked into.
    Other(Bytes),
}

impl ValueType {
    /// A dense tensor type.
    pub fn tensor(dtype: DataType, shape: Vec<Dim>) -> Self {
        Self::Tensor {
            dtype,
            shape: Some(shape),
        }
    }

    /// Element type of a dense tensor.
    pub fn dtype(&self) -> Option<DataType> {
        match self {
            Self::Tensor { dtype, .. } => Some(*dtype),
            Self::Other(_) => None,
        }
    }

    /// Dimensions of a dense tensor of known rank.
    pub fn shape(&self) -> Option<&[Dim]> {
        match self {
            Self::Tensor { shape, .. } => shape.as_deref(),
            Self::Other(_) => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor { dtype, shape } => {
                write!(f, "{dtype}")?;
                let Some(dims) = shape else {
                    return f.write_str("[]");
                };
                if dims.is_empty() {
                    return Ok(());
                }
                f.write_str("[")?;
                for (i, dim) in dims.iter().enumerate() {
                    if i > 0 {
                        f.write_str(",")?;
                    }
                    write!(f, "{dim}")?;
                }
                f.write_str("]")
            }
            Self::Other(_) => f.write_str("opaque"),
        }
    }
}
