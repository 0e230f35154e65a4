//! Vision encoders that take rows of patches and a grid, as Qwen2-VL's and Qwen2.5-VL's do.
//!
//! ```text
//! pixel_values   [patches, channels · moments · edge · edge]  ─┐
//! image_grid_thw [images, 3]: frames, rows, columns of patches ─┴▶ features [tokens, width]
//!                                                                (kept_token_indices [tokens])
//! ```
//!
//! One image is run at a time, whatever number the file would take: the features and kept tokens of a run are then
//! those of one image, and exports that were made with one image are met as they are.

use super::super::error::{Result, RuntimeError};
use super::super::grid::Block;
use super::super::image::Patches;
use super::super::session::{Outputs, Port, Session};
use super::super::tensor::{DType, Tensor};
use super::super::value::Value;
use super::{Inside, describe};

/// The output of an encoder that gives fewer tokens than its grid has: which of them, `int64 [tokens]`, ascending.
const KEPT: &str = "kept_token_indices";

/// An open vision encoder (tower and merger) of rows of patches.
#[derive(Debug)]
pub struct PatchEncoder {
    session: Session,
    pixels: Port,
    /// `None` where the file was made for one grid.
    grid: Option<Port>,
    /// Name of the output that holds features: the first of floating-point numbers.
    features: String,
}

/// What an encoder makes of an image or a clip.
#[derive(Debug, Clone)]
pub struct PatchFeatures {
    /// `[tokens, width]`.
    pub features: Tensor,
    /// How they lie; `kept` where the encoder says which they are.
    pub block: Block,
    /// What the encoder gives besides.
    pub inside: Inside,
}

/// Pixels, and the grid that goes with them.
fn ports(session: &Session) -> Option<(&Port, Option<&Port>)> {
    let rows = |port: &Port| port.dtype.is_some_and(DType::is_float) && port.dims.len() == 2;
    let grid = |port: &Port| {
        let whole = matches!(port.dtype, Some(DType::I64 | DType::I32));
        let three = port
            .dims
            .last()
            .is_some_and(|d| d.fixed().is_none_or(|n| n == 3));
        whole && three && (1..=2).contains(&port.dims.len())
    };
    match session.inputs() {
        [one] if rows(one) => Some((one, None)),
        [a, b] if rows(a) && grid(b) => Some((a, Some(b))),
        [a, b] if rows(b) && grid(a) => Some((b, Some(a))),
        _ => None,
    }
}

impl PatchEncoder {
    /// Whether a model has this interface.
    pub fn fits(session: &Session) -> bool {
        ports(session).is_some()
    }

    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// The model needs something else than rows of patches and, at most, a grid; it gives no features; or it is
    /// made for several images at once.
    pub fn new(session: Session) -> Result<Self> {
        let wrong = |expected: &str, found: String| RuntimeError::Interface {
            model: session.model().to_string(),
            expected: expected.into(),
            found,
        };
        let Some((pixels, grid)) = ports(&session) else {
            return Err(wrong(
                "a vision encoder of rows of patches, pixel_values [patches, values] and image_grid_thw \
                 [images, 3]",
                describe(session.inputs()),
            ));
        };
        if let Some(grid) = grid {
            let images = (grid.dims.len() == 2)
                .then(|| grid.dims[0].fixed())
                .flatten();
            if images.is_some_and(|n| n != 1) {
                return Err(wrong(
                    "a vision encoder that takes one image in a run, image_grid_thw [1, 3] or [images, 3]",
                    format!("{} {grid}", grid.name),
                ));
            }
        }
        let float = |port: &&Port| port.dtype.is_some_and(DType::is_float);
        let Some(features) = session.outputs().iter().find(float) else {
            return Err(wrong(
                "a floating-point output of features [tokens, width]",
                describe(session.outputs()),
            ));
        };
        Ok(Self {
            features: features.name.clone(),
            pixels: pixels.clone(),
            grid: grid.cloned(),
            session,
        })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to end its profiling.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Features of an image or a clip.
    ///
    /// # Errors
    /// The patches do not fit the input, the run fails, or the model gives another number of features than the
    /// grid has tokens without saying which they are.
    pub fn encode(&mut self, patches: &Patches) -> Result<PatchFeatures> {
        let count = patches.values.nrows();
        if self.grid.is_none()
            && let Some(fixed) = self.pixels.dims[0].fixed()
            && fixed != count
        {
            return Err(RuntimeError::Interface {
                model: self.session.model().to_string(),
                expected: "an input of grids (image_grid_thw), or an image that gives as many patches as the file \
                           was made for"
                    .into(),
                found: format!(
                    "an input of {fixed} patches, and an image of {count}; set min_pixels and max_pixels of the \
                     image processor so that it fits, or export with dynamic shapes"
                ),
            });
        }
        let outputs = self.run(patches)?;
        let found = outputs.get(&self.features)?;
        let grid = patches.tokens();
        let kept = match self.session.output(KEPT) {
            Some(_) => Some(indices(outputs.get(KEPT)?)?),
            None => None,
        };
        let wanted = kept.as_ref().map_or(grid.tokens(), Vec::len);
        let shape = match *found.shape() {
            [rows, width] | [1, rows, width] if rows == wanted && rows > 0 => [rows, width],
            ref other => {
                let expected = match kept {
                    Some(_) => format!("as many features as {KEPT} has entries, and at least one"),
                    None => format!(
                        "features [{wanted}, width] for {grid:?}, or an output {KEPT} that says which tokens of \
                         the grid are left"
                    ),
                };
                return Err(RuntimeError::Interface {
                    model: self.session.model().to_string(),
                    expected,
                    found: match kept {
                        Some(_) => format!("{other:?} and {wanted} entries"),
                        None => format!("{other:?}"),
                    },
                });
            }
        };
        let (_, data) = found.to_tensor()?.into_parts();
        let mut inside = Inside::of(outputs, &self.features, 1);
        Ok(PatchFeatures {
            features: Tensor::new(shape, data)?,
            inside: inside.pop().unwrap_or_default(),
            block: Block {
                kept,
                ..grid.into()
            },
        })
    }

    /// All outputs of the model for an image or a clip.
    ///
    /// # Errors
    /// The patches do not fit the input, or the run fails.
    pub fn run(&mut self, patches: &Patches) -> Result<Outputs> {
        let pixels: Tensor = patches.values.clone().into();
        let pixels = match self.pixels.dtype {
            Some(dtype) => pixels.cast_float(dtype)?,
            None => pixels,
        };
        let pixels = Value::new(pixels)?;
        let mut feed = vec![(self.pixels.name.as_str(), &pixels)];
        let grid;
        if let Some(port) = &self.grid {
            grid = grid_value(port, patches.grid)?;
            feed.push((port.name.as_str(), &grid));
        }
        self.session.run(&feed)
    }
}

fn grid_value(port: &Port, grid: [usize; 3]) -> Result<Value> {
    let shape: &[usize] = if port.dims.len() == 1 { &[3] } else { &[1, 3] };
    Value::new(match port.dtype {
        Some(DType::I32) => Tensor::new(shape.to_vec(), grid.map(|n| n as i32).to_vec())?,
        _ => Tensor::new(shape.to_vec(), grid.map(|n| n as i64).to_vec())?,
    })
}

fn indices(value: &Value) -> Result<Vec<usize>> {
    let tensor = value.to_tensor()?;
    let wrong = || {
        RuntimeError::Tensor(format!(
            "`{KEPT}` is {tensor}; expected int64 [tokens], none below 0"
        ))
    };
    let data = tensor.i64s().map_err(|_| wrong())?;
    if tensor.shape().len() > 2 || tensor.shape().iter().rev().skip(1).any(|n| *n != 1) {
        return Err(wrong());
    }
    data.iter()
        .map(|i| usize::try_from(*i).map_err(|_| wrong()))
        .collect()
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::runtime::library::ensure;
    use crate::runtime::session::SessionOptions;
    use crate::runtime::test_models::{self as models, Type};

    fn open(dims: &[&str]) -> Session {
        ensure(&mut |_| ()).unwrap();
        let model = models::unary("Neg", Type::F32, dims);
        Session::from_bytes(&model, "vision", &SessionOptions::default()).unwrap()
    }

    fn patches(count: usize) -> Patches {
        Patches {
            values: Array2::zeros((count, 6)),
            grid: [1, 2, count / 2],
            merge: 2,
        }
    }

    /// A file that was made for one grid takes no other, and a wrong number of features is no answer.
    #[test]
    fn counts_that_do_not_fit_are_errors() {
        let mut fixed = PatchEncoder::new(open(&["8", "6"])).unwrap();
        let error = fixed.encode(&patches(12)).unwrap_err().to_string();
        assert!(
            error.contains("an input of 8 patches, and an image of 12"),
            "{error}"
        );
        // The test model gives a feature for each patch, where there should be one for four.
        let error = fixed.encode(&patches(8)).unwrap_err().to_string();
        assert!(
            error.contains("[2, width]") && error.contains(KEPT),
            "{error}"
        );
        assert_eq!(
            fixed.run(&patches(8)).unwrap().first().unwrap().shape(),
            [8, 6]
        );
    }

    #[test]
    fn interfaces_are_told_apart() {
        assert!(PatchEncoder::fits(&open(&["n", "6"])));
        let images = open(&["n", "3", "h", "w"]);
        assert!(!PatchEncoder::fits(&images));
        let error = PatchEncoder::new(images).unwrap_err().to_string();
        assert!(error.contains("image_grid_thw"), "{error}");
    }
}
