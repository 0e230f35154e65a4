//! Values that live in ONNX Runtime: what a session returns and what it takes.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use ort::value::{DynValue, TensorElementType, ValueType};

use super::error::{Result, RuntimeError};
use super::library::Runtime;
use super::tensor::{DType, Tensor, TensorData};

/// A tensor in ONNX Runtime's hands. A clone shares the memory, and an output may be fed to the next run as
/// it is, so that a cache is never copied between steps.
#[derive(Clone)]
pub struct Value {
    inner: Arc<DynValue>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Value {
    /// Hands a tensor over; its memory is kept, not copied.
    ///
    /// # Errors
    /// ONNX Runtime is not there or refuses the shape.
    pub fn new(tensor: Tensor) -> Result<Self> {
        // Creating a value calls into the library, which has to be loaded (and found) first.
        Runtime::get()?;
        let dtype = tensor.dtype();
        let (shape, data) = tensor.into_parts();
        macro_rules! hand_over {
            ($($variant:ident)*) => {
                match data {
                    $(TensorData::$variant(data) => {
                        ort::value::Tensor::from_array((shape.clone(), data)).map(|v| v.into_dyn())
                    })*
                }
            };
        }
        let inner = hand_over!(F32 F64 F16 BF16 I8 I16 I32 I64 U8 U16 U32 U64 Bool)
            .map_err(|e| RuntimeError::Tensor(format!("{dtype}{shape:?}: {e}")))?;
        Ok(Self {
            inner: Arc::new(inner),
            dtype,
            shape,
        })
    }

    pub(super) fn from_ort(value: DynValue) -> Result<Self> {
        let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
            return Err(RuntimeError::Tensor(format!(
                "expected a tensor, found {}",
                value.dtype()
            )));
        };
        let dtype = dtype_of(*ty).ok_or_else(|| {
            RuntimeError::Tensor(format!("elements of type {ty} are not supported"))
        })?;
        let shape = shape
            .iter()
            .map(|&dim| usize::try_from(dim))
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| RuntimeError::Tensor(format!("negative dimension in {shape}")))?;
        Ok(Self {
            inner: Arc::new(value),
            dtype,
            shape,
        })
    }

    pub(super) fn as_ort(&self) -> &DynValue {
        &self.inner
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of the elements.
    pub fn byte_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// A copy of the elements.
    ///
    /// # Errors
    /// The value is not in memory that the CPU can read.
    pub fn to_tensor(&self) -> Result<Tensor> {
        macro_rules! copy {
            ($($variant:ident($ty:ty))*) => {
                match self.dtype {
                    $(DType::$variant => TensorData::$variant(self.slice::<$ty>()?.to_vec()),)*
                }
            };
        }
        let data = copy!(
            F32(f32) F64(f64) F16(f16) BF16(bf16) I8(i8) I16(i16) I32(i32) I64(i64)
            U8(u8) U16(u16) U32(u32) U64(u64) Bool(bool)
        );
        Tensor::new(self.shape.clone(), data)
    }

    /// The elements as `f32`: in place if they are, converted if they are of another floating-point type.
    ///
    /// # Errors
    /// The value holds no floating-point numbers or is not in memory that the CPU can read.
    pub fn f32s(&self) -> Result<Cow<'_, [f32]>> {
        if self.dtype == DType::F32 {
            return Ok(Cow::Borrowed(self.slice::<f32>()?));
        }
        Ok(Cow::Owned(self.to_tensor()?.f32s()?.into_owned()))
    }

    /// `len` elements from `start` on, row-major, as `f32`.
    ///
    /// # Errors
    /// As [`f32s`](Self::f32s), or the range is outside the value.
    pub fn f32_range(&self, start: usize, len: usize) -> Result<Vec<f32>> {
        fn part<T: Copy>(data: &[T], start: usize, len: usize) -> Result<&[T]> {
            start
                .checked_add(len)
                .and_then(|end| data.get(start..end))
                .ok_or_else(|| {
                    RuntimeError::Tensor(format!(
                        "{len} elements from {start} on are asked for, there are {}",
                        data.len()
                    ))
                })
        }
        Ok(match self.dtype {
            DType::F32 => part(self.slice::<f32>()?, start, len)?.to_vec(),
            DType::F64 => part(self.slice::<f64>()?, start, len)?
                .iter()
                .map(|&v| v as f32)
                .collect(),
            DType::F16 => part(self.slice::<f16>()?, start, len)?
                .iter()
                .map(|v| v.to_f32())
                .collect(),
            DType::BF16 => part(self.slice::<bf16>()?, start, len)?
                .iter()
                .map(|v| v.to_f32())
                .collect(),
            other => {
                return Err(RuntimeError::Tensor(format!(
                    "expected floating-point elements, found {other}"
                )));
            }
        })
    }

    fn slice<T: ort::value::PrimitiveTensorElementType>(&self) -> Result<&[T]> {
        match self.inner.try_extract_tensor::<T>() {
            Ok((_, data)) => Ok(data),
            Err(e) => Err(RuntimeError::Tensor(e.to_string())),
        }
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({}{:?})", self.dtype, self.shape)
    }
}

impl TryFrom<Tensor> for Value {
    type Error = RuntimeError;

    fn try_from(tensor: Tensor) -> Result<Self> {
        Self::new(tensor)
    }
}

/// Our name for one of ONNX Runtime's element types; `None` for those that nothing here handles.
pub(super) fn dtype_of(ty: TensorElementType) -> Option<DType> {
    Some(match ty {
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::BF16,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Int16 => DType::I16,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Uint16 => DType::U16,
        TensorElementType::Uint32 => DType::U32,
        TensorElementType::Uint64 => DType::U64,
        TensorElementType::Bool => DType::Bool,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::library::ensure;

    #[test]
    fn tensors_survive_the_trip() {
        ensure(&mut |_| ()).unwrap();
        let tensors = [
            Tensor::new([2, 2], vec![1.5f32, -0.0, f32::MAX, 0.25]).unwrap(),
            Tensor::new([2], vec![f16::from_f32(0.5), f16::MAX]).unwrap(),
            Tensor::new([1], vec![bf16::from_f32(3.0)]).unwrap(),
            Tensor::new([], vec![9i64]).unwrap(),
            Tensor::new([3], vec![true, false, true]).unwrap(),
            Tensor::zeros(DType::F32, [1, 4, 0, 8]).unwrap(),
            Tensor::new([2], vec![0u8, 255]).unwrap(),
        ];
        for tensor in tensors {
            let value = Value::new(tensor.clone()).unwrap();
            assert_eq!(
                (value.dtype(), value.shape()),
                (tensor.dtype(), tensor.shape())
            );
            assert_eq!(value.byte_len(), tensor.byte_len());
            assert_eq!(value.clone().to_tensor().unwrap(), tensor);
        }
    }

    #[test]
    fn handing_over_copies_nothing() {
        ensure(&mut |_| ()).unwrap();
        let data = vec![1f32, 2.0, 3.0];
        let address = data.as_ptr();
        let value = Value::new(Tensor::new([3], data).unwrap()).unwrap();
        assert_eq!(value.f32s().unwrap().as_ptr(), address);
    }

    #[test]
    fn ranges_are_checked() {
        ensure(&mut |_| ()).unwrap();
        let value = Value::new(Tensor::new([4], vec![1f64, 2.0, 3.0, 4.0]).unwrap()).unwrap();
        assert_eq!(value.f32_range(1, 2).unwrap(), [2.0, 3.0]);
        assert!(value.f32_range(3, 2).is_err());
        assert!(value.f32_range(usize::MAX, 2).is_err());
    }
}
