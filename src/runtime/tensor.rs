//! Owned tensors of plain Rust data: what goes into and comes out of the engines.

use std::borrow::Cow;
use std::fmt;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};

use super::error::{Result, RuntimeError};

macro_rules! element_types {
    ($($variant:ident($ty:ty) = $name:literal, $size:literal;)*) => {
        /// Element type of a tensor.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DType {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl DType {
            /// Bytes of one element.
            pub fn size(self) -> usize {
                match self { $(Self::$variant => $size,)* }
            }
        }

        impl fmt::Display for DType {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name,)* })
            }
        }

        /// The elements of a tensor, row-major.
        #[derive(Debug, Clone, PartialEq)]
        pub enum TensorData {
            $(#[doc = concat!("elements of type `", $name, "`")] $variant(Vec<$ty>),)*
        }

        impl TensorData {
            /// Element type.
            pub fn dtype(&self) -> DType {
                match self { $(Self::$variant(_) => DType::$variant,)* }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(data) => data.len(),)* }
            }

            /// True if there are no elements.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// `len` zeros (`false` for booleans).
            pub fn zeros(dtype: DType, len: usize) -> Self {
                match dtype { $(DType::$variant => Self::$variant(vec![<$ty>::default(); len]),)* }
            }
        }

        $(impl From<Vec<$ty>> for TensorData {
            fn from(data: Vec<$ty>) -> Self {
                Self::$variant(data)
            }
        })*

        $(impl Element for $ty {
            const DTYPE: DType = DType::$variant;
            fn slice(data: &TensorData) -> Option<&[Self]> {
                match data { TensorData::$variant(data) => Some(data), _ => None }
            }
            fn slice_mut(data: &mut TensorData) -> Option<&mut [Self]> {
                match data { TensorData::$variant(data) => Some(data), _ => None }
            }
        })*
    };
}

/// A Rust type that a tensor can hold.
pub trait Element: Copy + Default + 'static {
    /// Its element type.
    const DTYPE: DType;
    /// The elements, if they are of this type.
    fn slice(data: &TensorData) -> Option<&[Self]>;
    /// The elements, mutable, if they are of this type.
    fn slice_mut(data: &mut TensorData) -> Option<&mut [Self]>;
}

element_types! {
    F32(f32) = "float32", 4;
    F64(f64) = "float64", 8;
    F16(f16) = "float16", 2;
    BF16(bf16) = "bfloat16", 2;
    I8(i8) = "int8", 1;
    I16(i16) = "int16", 2;
    I32(i32) = "int32", 4;
    I64(i64) = "int64", 8;
    U8(u8) = "uint8", 1;
    U16(u16) = "uint16", 2;
    U32(u32) = "uint32", 4;
    U64(u64) = "uint64", 8;
    Bool(bool) = "bool", 1;
}

impl DType {
    /// True for the four floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::F16 | Self::BF16)
    }
}

/// A dense, row-major tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: TensorData,
}

impl Tensor {
    /// Puts a shape on elements.
    ///
    /// # Errors
    /// The product of `shape` is not the number of elements.
    pub fn new(shape: impl Into<Vec<usize>>, data: impl Into<TensorData>) -> Result<Self> {
        let (shape, data) = (shape.into(), data.into());
        match volume(&shape) {
            Some(len) if len == data.len() => Ok(Self { shape, data }),
            _ => Err(RuntimeError::Tensor(format!(
                "shape {shape:?} does not hold {} elements of {}",
                data.len(),
                data.dtype()
            ))),
        }
    }

    /// All zeros (`false` for booleans).
    ///
    /// # Errors
    /// The number of elements overflows.
    pub fn zeros(dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self> {
        let shape = shape.into();
        let len = volume(&shape)
            .ok_or_else(|| RuntimeError::Tensor(format!("shape {shape:?} is too large")))?;
        Ok(Self {
            shape,
            data: TensorData::zeros(dtype, len),
        })
    }

    /// Dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Bytes of the elements.
    pub fn byte_len(&self) -> usize {
        self.len() * self.dtype().size()
    }

    /// The elements.
    pub fn data(&self) -> &TensorData {
        &self.data
    }

    /// Shape and elements.
    pub fn into_parts(self) -> (Vec<usize>, TensorData) {
        (self.shape, self.data)
    }

    /// The elements as a slice of exactly their type.
    ///
    /// # Errors
    /// The tensor holds another type.
    pub fn slice<T: Element>(&self) -> Result<&[T]> {
        T::slice(&self.data).ok_or_else(|| wrong_type(T::DTYPE, self.dtype()))
    }

    /// The elements as a mutable slice of exactly their type.
    ///
    /// # Errors
    /// The tensor holds another type.
    pub fn slice_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        let found = self.dtype();
        T::slice_mut(&mut self.data).ok_or_else(|| wrong_type(T::DTYPE, found))
    }

    /// The elements as `f32`, converted if they are of another floating-point type.
    ///
    /// # Errors
    /// The tensor holds no floating-point numbers.
    pub fn f32s(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match &self.data {
            TensorData::F32(data) => Cow::Borrowed(data),
            TensorData::F64(data) => data.iter().map(|&v| v as f32).collect(),
            TensorData::F16(data) => data.iter().map(|v| v.to_f32()).collect(),
            TensorData::BF16(data) => data.iter().map(|v| v.to_f32()).collect(),
            other => return Err(wrong_type(DType::F32, other.dtype())),
        })
    }

    /// The elements as `i64`, converted if they are of another integer type or booleans.
    ///
    /// # Errors
    /// The tensor holds floating-point numbers, or an unsigned number above `i64::MAX`.
    pub fn i64s(&self) -> Result<Cow<'_, [i64]>> {
        Ok(match &self.data {
            TensorData::I64(data) => Cow::Borrowed(data),
            TensorData::I32(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::I16(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::I8(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::U32(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::U16(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::U8(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::Bool(data) => data.iter().map(|&v| v.into()).collect(),
            TensorData::U64(data) => data
                .iter()
                .map(|&v| i64::try_from(v))
                .collect::<std::result::Result<_, _>>()
                .map_err(|_| RuntimeError::Tensor("uint64 value above the int64 range".into()))?,
            other => return Err(wrong_type(DType::I64, other.dtype())),
        })
    }

    /// Integers (`int64`) in the type that an input of ids, masks or positions declares: `int32` (the largest for what
    /// is too large), booleans, `float32`. Unchanged for any other, and what is no `int64`.
    pub fn as_declared(self, dtype: Option<DType>) -> Self {
        let TensorData::I64(all) = &self.data else {
            return self;
        };
        let data = match dtype {
            Some(DType::I32) => {
                let narrow = |v: &i64| i32::try_from(*v).unwrap_or(i32::MAX);
                TensorData::I32(all.iter().map(narrow).collect())
            }
            Some(DType::Bool) => TensorData::Bool(all.iter().map(|v| *v != 0).collect()),
            Some(DType::F32) => TensorData::F32(all.iter().map(|v| *v as f32).collect()),
            _ => return self,
        };
        Self {
            shape: self.shape,
            data,
        }
    }

    /// The same numbers in another floating-point type; unchanged if it is that type already.
    ///
    /// # Errors
    /// Either type is no floating-point type (and they differ).
    pub fn cast_float(self, dtype: DType) -> Result<Self> {
        if self.dtype() == dtype {
            return Ok(self);
        }
        if !self.dtype().is_float() || !dtype.is_float() {
            return Err(wrong_type(dtype, self.dtype()));
        }
        // float64 is widened from and to itself, so that no detour over float32 loses digits.
        let wide: Vec<f64> = match &self.data {
            TensorData::F64(data) => data.clone(),
            _ => self.f32s()?.iter().map(|&v| v.into()).collect(),
        };
        let data = match dtype {
            DType::F64 => wide.into(),
            DType::F16 => TensorData::F16(wide.into_iter().map(f16::from_f64).collect()),
            DType::BF16 => TensorData::BF16(wide.into_iter().map(bf16::from_f64).collect()),
            _ => TensorData::F32(wide.into_iter().map(|v| v as f32).collect()),
        };
        Ok(Self {
            shape: self.shape,
            data,
        })
    }

    /// The elements as an `ndarray` of `f32`.
    ///
    /// # Errors
    /// The tensor holds no floating-point numbers.
    pub fn to_array(&self) -> Result<ArrayD<f32>> {
        let data = self.f32s()?.into_owned();
        ArrayD::from_shape_vec(IxDyn(&self.shape), data)
            .map_err(|e| RuntimeError::Tensor(e.to_string()))
    }
}

impl<T, D> From<ndarray::Array<T, D>> for Tensor
where
    T: Element,
    D: ndarray::Dimension,
    TensorData: From<Vec<T>>,
{
    /// Takes an array over, without a copy if it is row-major already.
    fn from(array: ndarray::Array<T, D>) -> Self {
        let shape = array.shape().to_vec();
        let array = if array.is_standard_layout() {
            array
        } else {
            array.as_standard_layout().into_owned()
        };
        let (mut data, offset) = array.into_raw_vec_and_offset();
        // A sliced owned array may keep elements before and after the ones it shows.
        let start = offset.unwrap_or(0);
        data.drain(..start);
        data.truncate(shape.iter().product());
        Self {
            shape,
            data: data.into(),
        }
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype(), self.shape)
    }
}

/// Number of elements of a shape, if it does not overflow.
pub(super) fn volume(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |len, &dim| len.checked_mul(dim))
}

fn wrong_type(expected: DType, found: DType) -> RuntimeError {
    RuntimeError::Tensor(format!("expected elements of {expected}, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_must_match_elements() {
        assert!(Tensor::new([2, 3], vec![0f32; 6]).is_ok());
        let error = Tensor::new([2, 3], vec![0f32; 5]).unwrap_err().to_string();
        assert!(error.contains("[2, 3]") && error.contains('5'), "{error}");
        assert!(Tensor::new([usize::MAX, 3], Vec::<f32>::new()).is_err());
    }

    #[test]
    fn integers_take_the_type_that_is_declared() {
        let ids = || Tensor::new([2], vec![1i64 << 40, 0]).unwrap();
        let as_i32 = ids().as_declared(Some(DType::I32));
        assert_eq!(as_i32, Tensor::new([2], vec![i32::MAX, 0]).unwrap());
        let as_bool = ids().as_declared(Some(DType::Bool));
        assert_eq!(as_bool, Tensor::new([2], vec![true, false]).unwrap());
        let as_f32 = ids().as_declared(Some(DType::F32));
        assert_eq!(
            as_f32,
            Tensor::new([2], vec![(1i64 << 40) as f32, 0.0]).unwrap()
        );
        assert_eq!(ids().as_declared(None), ids());
        let real = Tensor::new([1], vec![0.5f32]).unwrap();
        assert_eq!(real.clone().as_declared(Some(DType::I32)), real);
    }

    #[test]
    fn scalars_and_empty_tensors() {
        assert_eq!(Tensor::new([], vec![7i64]).unwrap().len(), 1);
        assert_eq!(
            Tensor::zeros(DType::F16, [1, 4, 0, 8]).unwrap().byte_len(),
            0
        );
    }

    #[test]
    fn float_casts_round_as_half_does() {
        let t = Tensor::new([3], vec![1.0f32, 0.1, -65504.0]).unwrap();
        let h = t.clone().cast_float(DType::F16).unwrap();
        assert_eq!(h.slice::<f16>().unwrap()[1], f16::from_f32(0.1));
        assert_eq!(h.f32s().unwrap()[2], -65504.0);
        let d = Tensor::new([1], vec![0.1f64]).unwrap();
        assert_eq!(d.clone().cast_float(DType::F64).unwrap(), d);
        assert!(
            Tensor::new([1], vec![1i64])
                .unwrap()
                .cast_float(DType::F32)
                .is_err()
        );
    }

    #[test]
    fn arrays_come_over_row_major() {
        let a = ndarray::arr2(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let t = Tensor::from(a.clone().reversed_axes());
        assert_eq!(t.shape(), [3, 2]);
        assert_eq!(t.slice::<f32>().unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let cut = a.slice_move(ndarray::s![1.., ..]);
        let t = Tensor::from(cut);
        assert_eq!(t.slice::<f32>().unwrap(), [4.0, 5.0, 6.0]);
        assert_eq!(t.to_array().unwrap().shape(), [1, 3]);
    }

    #[test]
    fn integers_widen() {
        let t = Tensor::new([2], vec![true, false]).unwrap();
        assert_eq!(&*t.i64s().unwrap(), [1, 0]);
        assert!(Tensor::new([1], vec![u64::MAX]).unwrap().i64s().is_err());
        assert!(Tensor::new([1], vec![1f32]).unwrap().i64s().is_err());
    }
}
