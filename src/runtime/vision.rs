//! The two models before the decoder: pixels to features, ids to embeddings, and features into embeddings.

mod inside;
mod patches;

use ndarray::{Array3, Axis};

use super::error::{Result, RuntimeError};
use super::session::{Outputs, Port, Session};
use super::tensor::{DType, Element, Tensor, TensorData};
use super::value::Value;

pub use inside::Inside;
pub use patches::{PatchEncoder, PatchFeatures};

/// An open vision encoder of either kind.
#[derive(Debug)]
pub enum Vision {
    /// Takes images of one size.
    Images(VisionEncoder),
    /// Takes rows of patches and the grid that they were.
    Patches(PatchEncoder),
}

impl Vision {
    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// The model has the interface of neither kind.
    pub fn new(session: Session) -> Result<Self> {
        Ok(match PatchEncoder::fits(&session) {
            true => Self::Patches(PatchEncoder::new(session)?),
            false => Self::Images(VisionEncoder::new(session)?),
        })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        match self {
            Self::Images(encoder) => encoder.session(),
            Self::Patches(encoder) => encoder.session(),
        }
    }

    /// The session, to end its profiling.
    pub fn session_mut(&mut self) -> &mut Session {
        match self {
            Self::Images(encoder) => encoder.session_mut(),
            Self::Patches(encoder) => encoder.session_mut(),
        }
    }
}

/// An open vision encoder (tower and projector).
#[derive(Debug)]
pub struct VisionEncoder {
    session: Session,
    pixels: Port,
    /// Which pixels are the image and which padding, for models that are told.
    mask: Option<Port>,
    /// In a file of two towers, the pixels of the other and the output that is ours.
    beside: Option<(Port, String)>,
}

/// Whether an input takes clips, `[clips, frames, 3, height, width]`, and not the crops of
/// an image.
pub(super) fn is_clips(port: &Port) -> bool {
    port.dims.len() == 5 && port.name.contains("video")
}

impl VisionEncoder {
    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// The model needs something else than one input of pixels.
    pub fn new(session: Session) -> Result<Self> {
        Self::of(session, false)
    }

    /// The same of a tower for clips, which may be one of two in a file.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn for_clips(session: Session) -> Result<Self> {
        Self::of(session, true)
    }

    fn of(session: Session, clips: bool) -> Result<Self> {
        let float = |port: &Port| port.dtype.is_some_and(DType::is_float);
        let pixels = |port: &Port| float(port) && (4..=5).contains(&port.dims.len());
        let marks = |port: &Port| {
            matches!(
                port.dtype,
                Some(DType::Bool | DType::I64 | DType::I32 | DType::U8)
            ) && port.dims.len() >= 3
        };
        match session.inputs() {
            [pixels] if float(pixels) => Ok(Self {
                pixels: pixels.clone(),
                mask: None,
                beside: None,
                session,
            }),
            [a, b] if pixels(a) && pixels(b) && is_clips(a) != is_clips(b) => {
                let (ours, other) = match is_clips(a) == clips {
                    true => (a.clone(), b.clone()),
                    false => (b.clone(), a.clone()),
                };
                let outputs = session.outputs();
                // What follows the features was asked for by whoever opened the model up.
                let two = outputs.iter().take(2);
                let (own, rest): (Vec<&Port>, Vec<&Port>) =
                    two.partition(|p| p.name.contains("video") == clips);
                let ([output], [_]) = (&own[..], &rest[..]) else {
                    return Err(RuntimeError::Interface {
                        model: session.model().to_string(),
                        expected: "two towers with an output each, that of clips with 'video' in its name"
                            .into(),
                        found: describe(outputs),
                    });
                };
                Ok(Self {
                    beside: Some((other, output.name.clone())),
                    pixels: ours,
                    mask: None,
                    session,
                })
            }
            [pixels, mask] if float(pixels) && marks(mask) => Ok(Self {
                pixels: pixels.clone(),
                mask: Some(mask.clone()),
                beside: None,
                session,
            }),
            inputs => Err(RuntimeError::Interface {
                model: session.model().to_string(),
                expected:
                    "a vision encoder with one input, pixel_values [images, 3, height, width], and at most \
                     a pixel_attention_mask [images, height, width]; or with rows of patches [patches, values] \
                     and their image_grid_thw [images, 3] as the only inputs"
                        .into(),
                found: describe(inputs),
            }),
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to end its profiling.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Name of the input that takes the pixels.
    pub fn input(&self) -> &str {
        &self.pixels.name
    }

    /// Features of images that are prepared one by one, `[3, height, width]` each. One run if their sizes are
    /// the same and the model takes several at once, else one run each.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn encode(&mut self, images: &[Array3<f32>]) -> Result<Vec<Tensor>> {
        let all = self.encode_inside(images)?;
        Ok(all.into_iter().map(|(features, _)| features).collect())
    }

    /// The same, each with what the model gives besides.
    pub(super) fn encode_inside(
        &mut self,
        images: &[Array3<f32>],
    ) -> Result<Vec<(Tensor, Inside)>> {
        // In front of [3, height, width].
        let at = self.pixels.dims.len().saturating_sub(4);
        let fits = self
            .pixels
            .dims
            .get(at)
            .is_none_or(|dim| dim.fixed().is_none_or(|fixed| fixed == images.len()));
        let same = images.windows(2).all(|pair| pair[0].dim() == pair[1].dim());
        let mut features = Vec::with_capacity(images.len());
        for group in images.chunks(if fits && same { images.len().max(1) } else { 1 }) {
            let views: Vec<_> = group.iter().map(|image| image.view()).collect();
            let pixels =
                ndarray::stack(Axis(0), &views).map_err(|e| RuntimeError::Tensor(e.to_string()))?;
            features.extend(self.run_inside(pixels.into())?);
        }
        Ok(features)
    }

    /// Features of `pixel_values`, each with what the model gives besides.
    pub(super) fn run_inside(&mut self, pixels: Tensor) -> Result<Vec<(Tensor, Inside)>> {
        let (features, outputs) = self.run_with_outputs(pixels, None)?;
        let name = match &self.beside {
            Some((_, name)) => name.clone(),
            None => outputs.iter().next().map_or("", |o| o.0).to_owned(),
        };
        let inside = Inside::of(outputs, &name, features.len());
        Ok(features.into_iter().zip(inside).collect())
    }

    /// Features of `pixel_values` `[images, 3, height, width]`: for each image `[features, width]`. How many
    /// there are is read from the output, so a rewritten encoder needs nothing special.
    ///
    /// # Errors
    /// The pixels do not fit the input, the run fails, or the output cannot be divided among the images.
    pub fn run(&mut self, pixels: Tensor) -> Result<Vec<Tensor>> {
        Ok(self.run_with_outputs(pixels, None)?.0)
    }

    /// Whether the model is told which pixels are padding.
    pub fn takes_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// The same, and all outputs of the model: a model that was opened up gives
    /// more than features. `mask` `[images, height, width]` is 1 for pixels of the
    /// image and 0 for padding; without one, nothing is padding. It is not read by
    /// models that take none.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_with_outputs(
        &mut self,
        pixels: Tensor,
        mask: Option<&Array3<u8>>,
    ) -> Result<(Vec<Tensor>, Outputs)> {
        let [height, width] = match pixels.shape() {
            [.., height, width] => [*height, *width],
            _ => [0, 0],
        };
        let images = pixels.shape().first().copied().unwrap_or(0);
        let pixels = match self.pixels.dtype {
            Some(dtype) => pixels.cast_float(dtype)?,
            None => pixels,
        };
        let pixels = Value::new(lay_out_pixels(pixels, self.pixels.dims.len())?)?;
        let mask = match &self.mask {
            None => None,
            Some(port) => {
                let all = Array3::ones((images, height, width));
                Some((port.name.as_str(), pixel_mask(mask.unwrap_or(&all), port)?))
            }
        };
        let blank = match &self.beside {
            None => None,
            Some((port, _)) => Some((port.name.as_str(), blank(port, [height, width])?)),
        };
        let mut inputs = vec![(self.pixels.name.as_str(), &pixels)];
        inputs.extend(mask.as_ref().map(|(name, value)| (*name, value)));
        inputs.extend(blank.as_ref().map(|(name, value)| (*name, value)));
        let outputs = self.session.run(&inputs)?;
        let output = match &self.beside {
            Some((_, name)) => outputs.get(name)?,
            None => outputs.first()?,
        };
        let (rows, width) = match *output.shape() {
            [n, rows, width] | [1, n, rows, width] if n == images => (rows, width),
            // The frames of each clip as images of their own.
            [n, rows, width] if images > 0 && n > images && n % images == 0 => {
                (n / images * rows, width)
            }
            // Some exports return the features of all images in one list.
            [rows, width] | [1, rows, width] if images > 0 && rows % images == 0 => {
                (rows / images, width)
            }
            ref other => {
                return Err(RuntimeError::Interface {
                    model: self.session.model().to_string(),
                    expected: format!("features [{images}, rows, width] for {images} images"),
                    found: format!("{other:?}"),
                });
            }
        };
        let features = split(output.to_tensor()?, images, rows, width)?;
        Ok((features, outputs))
    }
}

/// The smallest thing that a tower takes which is not asked: one image or frame of
/// zeros. ONNX Runtime runs every tower of a file, and an empty batch breaks reshapes
/// that exporters leave.
fn blank(port: &Port, size: [usize; 2]) -> Result<Value> {
    let rank = port.dims.len();
    let usual = |axis: usize| match rank - axis {
        1 => size[1],
        2 => size[0],
        3 => 3,
        _ => 1,
    };
    let dims = port.dims.iter().enumerate();
    let shape: Vec<usize> = dims
        .map(|(axis, dim)| dim.fixed().unwrap_or(usual(axis)))
        .collect();
    let zeros = TensorData::F32(vec![0.0; shape.iter().product()]);
    let zeros = Tensor::new(shape, zeros)?;
    Value::new(match port.dtype {
        Some(dtype) => zeros.cast_float(dtype)?,
        None => zeros,
    })
}

/// Pixels `[images, 3, height, width]` in the rank that an input has: some models take
/// `[batch, crops, 3, height, width]`, and all images go in as the crops of one row.
///
/// # Errors
/// None that the caller can cause: the number of elements stays.
pub fn lay_out_pixels(pixels: Tensor, rank: usize) -> Result<Tensor> {
    if rank != 5 || pixels.shape().len() != 4 {
        return Ok(pixels);
    }
    let (mut shape, data) = pixels.into_parts();
    shape.insert(0, 1);
    Tensor::new(shape, data)
}

/// A mask of pixels in the type that a model's input has.
///
/// # Errors
/// The input takes no mask of rank 3, or another type than a boolean or integer.
pub fn pixel_mask(mask: &Array3<u8>, port: &Port) -> Result<Value> {
    let data = || mask.iter().copied();
    let data = match port.dtype {
        Some(DType::Bool) => TensorData::Bool(data().map(|m| m != 0).collect()),
        Some(DType::I64) => TensorData::I64(data().map(i64::from).collect()),
        Some(DType::I32) => TensorData::I32(data().map(i32::from).collect()),
        Some(DType::U8) => TensorData::U8(data().collect()),
        _ => {
            return Err(RuntimeError::Tensor(format!(
                "'{}' is no mask of pixels: expected booleans or integers",
                port.name
            )));
        }
    };
    let (images, height, width) = mask.dim();
    Value::new(Tensor::new([images, height, width], data)?)
}

/// Cuts features into one tensor for each image.
fn split(features: Tensor, images: usize, rows: usize, width: usize) -> Result<Vec<Tensor>> {
    let (_, data) = features.into_parts();
    macro_rules! cut {
        ($($variant:ident)*) => {
            match data {
                $(TensorData::$variant(data) => (0..images)
                    .map(|i| {
                        let part = &data[i * rows * width..(i + 1) * rows * width];
                        Tensor::new([rows, width], part.to_vec())
                    })
                    .collect(),)*
                other => Err(RuntimeError::Tensor(format!(
                    "image features are {}, expected floating-point numbers",
                    other.dtype()
                ))),
            }
        };
    }
    cut!(F32 F16 BF16 F64)
}

/// Puts image features, in order, at the places of `visual`.
///
/// `embeds` is `[batch, tokens, width]`, `visual` has `batch · tokens` entries, row-major, and each of
/// `features` is `[rows, width]`.
///
/// # Errors
/// The number of places is not the number of feature rows, or a width differs (as it does between a rewritten
/// and an original model).
pub fn scatter(embeds: Tensor, visual: &[bool], features: &[Tensor]) -> Result<Tensor> {
    let [batch, tokens, width] = *embeds.shape() else {
        return Err(RuntimeError::Tensor(format!(
            "embeddings are {embeds}; expected [batch, tokens, width]"
        )));
    };
    if visual.len() != batch * tokens {
        return Err(RuntimeError::Tensor(format!(
            "{} flags for {batch}×{tokens} embeddings",
            visual.len()
        )));
    }
    let mut rows = 0;
    for feature in features {
        match *feature.shape() {
            [n, w] if w == width => rows += n,
            _ => {
                return Err(RuntimeError::Prompt(format!(
                    "image features are {feature}, embeddings have width {width}: the vision \
                     encoder and the embeddings do not belong together. Rewritten encoders with a \
                     marker channel need the rewritten embed_tokens"
                )));
            }
        }
    }
    let places = visual.iter().filter(|v| **v).count();
    if places != rows {
        return Err(RuntimeError::Prompt(format!(
            "{rows} image features for {places} image places"
        )));
    }
    let dtype = embeds.dtype();
    let features: Vec<Tensor> = features
        .iter()
        .map(|feature| feature.clone().cast_float(dtype))
        .collect::<Result<_>>()?;
    fn fill<T: Element>(
        mut embeds: Tensor,
        visual: &[bool],
        features: &[Tensor],
        width: usize,
    ) -> Result<Tensor> {
        let mut rows = Vec::new();
        for feature in features {
            rows.extend(feature.slice::<T>()?.chunks_exact(width.max(1)));
        }
        let targets = embeds.slice_mut::<T>()?.chunks_exact_mut(width.max(1));
        let places = targets
            .zip(visual)
            .filter(|(_, visual)| **visual)
            .map(|(row, _)| row);
        for (target, row) in places.zip(rows) {
            target.copy_from_slice(row);
        }
        Ok(embeds)
    }
    match dtype {
        DType::F32 => fill::<f32>(embeds, visual, &features, width),
        DType::F16 => fill::<half::f16>(embeds, visual, &features, width),
        DType::BF16 => fill::<half::bf16>(embeds, visual, &features, width),
        DType::F64 => fill::<f64>(embeds, visual, &features, width),
        other => Err(RuntimeError::Tensor(format!(
            "embeddings are {other}, expected floating-point numbers"
        ))),
    }
}

pub(super) fn describe(ports: &[Port]) -> String {
    let list: Vec<String> = ports
        .iter()
        .map(|port| format!("{} {port}", port.name))
        .collect();
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::embedder::Embedder;
    use super::*;
    use crate::runtime::library::ensure;
    use crate::runtime::session::SessionOptions;
    use crate::runtime::test_models::{self as models, Type};

    fn features(rows: &[[f32; 2]]) -> Tensor {
        Tensor::new([rows.len(), 2], rows.concat()).unwrap()
    }

    #[test]
    fn features_go_to_their_places_in_order() {
        let embeds = Tensor::zeros(DType::F32, [1, 5, 2]).unwrap();
        let visual = [false, true, true, false, true];
        let images = [features(&[[1.0, 2.0], [3.0, 4.0]]), features(&[[5.0, 6.0]])];
        let filled = scatter(embeds.clone(), &visual, &images).unwrap();
        let expected = [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 5.0, 6.0];
        assert_eq!(filled.slice::<f32>().unwrap(), expected);
        // Half-precision embeddings take single-precision features.
        let half = scatter(embeds.cast_float(DType::F16).unwrap(), &visual, &images).unwrap();
        assert_eq!(half.dtype(), DType::F16);
        assert_eq!(&*half.f32s().unwrap(), expected);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let embeds = || Tensor::zeros(DType::F32, [1, 3, 2]).unwrap();
        let one = [features(&[[1.0, 2.0]])];
        let error = scatter(embeds(), &[true, true, false], &one)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("1 image features for 2 image places"),
            "{error}"
        );
        let wide = [Tensor::zeros(DType::F32, [1, 3]).unwrap()];
        let error = scatter(embeds(), &[true, false, false], &wide)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("width 2") && error.contains("[1, 3]"),
            "{error}"
        );
        assert!(scatter(embeds(), &[true], &one).is_err());
    }

    #[test]
    fn images_are_split_again_however_they_come() {
        ensure(&mut |_| ()).unwrap();
        let open = |dims: &[&str]| {
            let model = models::unary("Neg", Type::F32, dims);
            let options = SessionOptions::default();
            VisionEncoder::new(Session::from_bytes(&model, "vision", &options).unwrap()).unwrap()
        };
        let data: Vec<f32> = (0..8).map(|v| -(v as f32)).collect();
        for shape in [vec![2, 2, 2], vec![4, 2]] {
            // The test model returns what it gets, so "2 images" is the first dimension of its input.
            let dims: Vec<&str> = ["n", "r", "2"][3 - shape.len()..].to_vec();
            let pixels = Tensor::new(shape.clone(), data.clone()).unwrap();
            let found = open(&dims).run(pixels).unwrap();
            assert_eq!(found.len(), shape[0]);
            let all: Vec<f32> = found
                .iter()
                .flat_map(|f| f.f32s().unwrap().into_owned())
                .collect();
            assert_eq!(all, (0..8).map(|v| v as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn interfaces_are_checked() {
        ensure(&mut |_| ()).unwrap();
        let options = SessionOptions::default();
        let open = |model: &[u8]| Session::from_bytes(model, "m", &options).unwrap();
        let error = VisionEncoder::new(open(&models::top_two_rows()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("pixel_values") && error.contains("scores"),
            "{error}"
        );
        let floats = open(&models::unary("Neg", Type::F32, &["n"]));
        assert!(
            Embedder::new(floats)
                .unwrap_err()
                .to_string()
                .contains("input_ids")
        );
    }
}
