//! Tensor element types, numbered as in `onnx.TensorProto.DataType`.

use std::fmt;

/// An ONNX tensor element type. The discriminant is the number that the file
/// format uses; numbers this version does not know are kept in `Other`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(
    missing_docs,
    reason = "the names are the operator specification's own"
)]
pub enum DataType {
    Undefined,
    Float,
    Uint8,
    Int8,
    Uint16,
    Int16,
    Int32,
    Int64,
    String,
    Bool,
    Float16,
    Double,
    Uint32,
    Uint64,
    Complex64,
    Complex128,
    Bfloat16,
    Float8E4M3FN,
    Float8E4M3FNUZ,
    Float8E5M2,
    Float8E5M2FNUZ,
    Uint4,
    Int4,
    Float4E2M1,
    Float8E8M0,
    Uint2,
    Int2,
    Other(i32),
}

/// Format number, name in the ONNX text syntax, bits per element.
const TABLE: &[(DataType, i32, &str, u32)] = &[
    (DataType::Undefined, 0, "undefined", 0),
    (DataType::Float, 1, "float", 32),
    (DataType::Uint8, 2, "uint8", 8),
    (DataType::Int8, 3, "int8", 8),
    (DataType::Uint16, 4, "uint16", 16),
    (DataType::Int16, 5, "int16", 16),
    (DataType::Int32, 6, "int32", 32),
    (DataType::Int64, 7, "int64", 64),
    (DataType::String, 8, "string", 0),
    (DataType::Bool, 9, "bool", 8),
    (DataType::Float16, 10, "float16", 16),
    (DataType::Double, 11, "double", 64),
    (DataType::Uint32, 12, "uint32", 32),
    (DataType::Uint64, 13, "uint64", 64),
    (DataType::Complex64, 14, "complex64", 64),
    (DataType::Complex128, 15, "complex128", 128),
    (DataType::Bfloat16, 16, "bfloat16", 16),
    (DataType::Float8E4M3FN, 17, "float8e4m3fn", 8),
    (DataType::Float8E4M3FNUZ, 18, "float8e4m3fnuz", 8),
    (DataType::Float8E5M2, 19, "float8e5m2", 8),
    (DataType::Float8E5M2FNUZ, 20, "float8e5m2fnuz", 8),
    (DataType::Uint4, 21, "uint4", 4),
    (DataType::Int4, 22, "int4", 4),
    (DataType::Float4E2M1, 23, "float4e2m1", 4),
    (DataType::Float8E8M0, 24, "float8e8m0", 8),
    (DataType::Uint2, 25, "uint2", 2),
    (DataType::Int2, 26, "int2", 2),
];

impl DataType {
    /// The type with the file format's number `code`.
    pub fn from_code(code: i32) -> Self {
        TABLE
            .iter()
            .find(|row| row.1 == code)
            .map_or(Self::Other(code), |row| row.0)
    }

    /// The file format's number.
    pub fn code(self) -> i32 {
        match self {
            Self::Other(code) => code,
            known => TABLE.iter().find(|row| row.0 == known).map_or(0, |r| r.1),
        }
    }

    /// Bytes that `count` elements occupy as raw data (sub-byte types are
    /// packed); `None` for strings, unknown types and on overflow.
    pub fn byte_len(self, count: u64) -> Option<u64> {
        let bits = TABLE.iter().find(|row| row.0 == self)?.3;
        if bits == 0 {
            return None;
        }
        Some(count.checked_mul(u64::from(bits))?.div_ceil(8))
    }

    /// Whether elements of this type have a size: not strings, nor types that are not known.
    pub fn is_sized(self) -> bool {
        self.byte_len(1).is_some()
    }

    /// Whether this is a floating-point type that features and scores may have.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            Self::Float | Self::Float16 | Self::Bfloat16 | Self::Double
        )
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(code) => write!(f, "type#{code}"),
            known => f.write_str(TABLE.iter().find(|r| r.0 == *known).map_or("?", |r| r.2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_sub_byte_types_round_up() {
        for code in 0..40 {
            assert_eq!(DataType::from_code(code).code(), code);
        }
        assert_eq!(DataType::Int4.byte_len(3), Some(2));
        assert_eq!(DataType::Float16.byte_len(3), Some(6));
        assert_eq!(DataType::String.byte_len(3), None);
        assert_eq!(DataType::Double.byte_len(u64::MAX), None);
    }
}
