//! Images as rows of patches, as Qwen2-VL's and Qwen2.5-VL's image processor makes them.
//!
//! An image keeps its shape: its sides are rounded to whole tokens of `merge · edge` pixels, and where it then has
//! too many or too few pixels, scaled so that it has not. Then it is cut into patches of `edge · edge` pixels. The
//! patches of a token follow one another:
//!
//! ```text
//!  0  1 |  4  5
//!  2  3 |  6  7      a row: [channel, moment, y, x] of one patch
//! ------+------
//!  8  9 | 12 13
//! ```
//!
//! A patch spans several moments of time; of an image, which has one, all are the same.
//!
//! Source: Transformers 5.22, `models/qwen2_vl/image_processing_pil_qwen2_vl.py` (`smart_resize`, `patchify`) and
//! `video_processing_qwen2_vl.py`.

use ndarray::{Array2, Array3};

use super::super::error::{Result, RuntimeError};
use super::super::grid::Grid;
use super::pixels::Pixels;
use super::{Fields, ImageProcessor};

/// Largest ratio of an image's sides.
const SLIMMEST: usize = 200;

/// Sides of an image that are whole tokens, with bounds for their product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Edge of a token in pixels.
    factor: usize,
    /// Fewest pixels.
    least: usize,
    /// Most pixels.
    most: usize,
}

impl Bounds {
    /// `size: {shortest_edge, longest_edge}` (numbers of pixels, in spite of their names), or `min_pixels` and
    /// `max_pixels`, which go before it, with the defaults of the class `plain`.
    pub(super) fn read(fields: &Fields<'_>, plain: &str, cut: &Cut) -> Result<Self> {
        let (mut least, mut most) = match plain {
            "Qwen2VLVideoProcessor" => (128 * 28 * 28, 28 * 28 * 768),
            _ => (56 * 56, 28 * 28 * 1280),
        };
        if let Some(size) = fields.config.get("size").filter(|s| !s.is_null()) {
            let inner = Fields {
                config: size,
                path: fields.path,
            };
            let pixels = |new: &str, old: &str| -> Result<usize> {
                let old = inner.above_zero(old, 0)?;
                match inner.above_zero(new, old)? {
                    0 => Err(RuntimeError::config(
                        fields.path,
                        format!(
                            "`size` is {size}; expected `shortest_edge` and `longest_edge`, the fewest and the \
                             most pixels of an image"
                        ),
                    )),
                    n => Ok(n),
                }
            };
            least = pixels("shortest_edge", "min_pixels")?;
            most = pixels("longest_edge", "max_pixels")?;
        }
        Ok(Self {
            factor: cut.edge * cut.merge,
            least: fields.above_zero("min_pixels", least)?,
            most: fields.above_zero("max_pixels", most)?,
        })
    }

    /// Height and width that an image of this height and width gets.
    pub(super) fn of(self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (long, short) = (height.max(width), height.min(width));
        if short == 0 || long as f64 / short as f64 > SLIMMEST as f64 {
            return Err(RuntimeError::Image {
                name: format!("{width}×{height}"),
                reason: format!(
                    "one side is more than {SLIMMEST} times the other, which the model's image processor does not \
                     take; cut the image"
                ),
            });
        }
        // In double precision, and halves to the even side, as Python rounds.
        let factor = self.factor as f64;
        let (h, w) = (height as f64, width as f64);
        let nearest = |side: f64| (side / factor).round_ties_even() * factor;
        let area = nearest(h) * nearest(w);
        let (h, w) = if area > self.most as f64 {
            let shrink = (h * w / self.most as f64).sqrt();
            let side = |side: f64| ((side / shrink / factor).floor() * factor).max(factor);
            (side(h), side(w))
        } else if area < self.least as f64 {
            let grow = (self.least as f64 / (h * w)).sqrt();
            let side = |side: f64| (side * grow / factor).ceil() * factor;
            (side(h), side(w))
        } else {
            (nearest(h), nearest(w))
        };
        Ok((h as usize, w as usize))
    }
}

/// How an image is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// Edge of a patch in pixels.
    edge: usize,
    /// Moments of time in a patch.
    moments: usize,
    /// Edge of a token in patches.
    merge: usize,
}

impl Cut {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        Ok(Self {
            edge: fields.above_zero("patch_size", 14)?,
            moments: fields.above_zero("temporal_patch_size", 2)?,
            merge: fields.above_zero("merge_size", 2)?,
        })
    }

    /// The patches of frames `[3, height, width]` of one size; the last frame is repeated until they fill the
    /// moments of the last patch.
    fn rows(self, frames: &[Array3<f32>]) -> Result<Patches> {
        let Self {
            edge,
            moments,
            merge,
        } = self;
        let (height, width) = match frames.first() {
            Some(frame) => (frame.dim().1, frame.dim().2),
            None => return Err(RuntimeError::Tensor("a clip has no frames".into())),
        };
        let token = edge * merge;
        if frames.iter().any(|f| f.dim() != (3, height, width))
            || !height.is_multiple_of(token)
            || !width.is_multiple_of(token)
        {
            return Err(RuntimeError::Image {
                name: format!("{width}×{height}"),
                reason: format!(
                    "expected frames of one size, with sides that are multiples of {token} pixels ({merge} patches \
                     of {edge}); let the image processor resize them (`do_resize`)"
                ),
            });
        }
        let (down, across) = (height / token, width / token);
        let time = frames.len().div_ceil(moments);
        let count = time * down * across * merge * merge;
        let mut values = Vec::with_capacity(count * 3 * moments * edge * edge);
        for patch in 0..count {
            // Time, then the token's row and column, then the patch's in its token.
            let (rest, inner) = (patch / (merge * merge), patch % (merge * merge));
            let (rest, column) = (rest / across, rest % across);
            let (time, row) = (rest / down, rest % down);
            let top = (row * merge + inner / merge) * edge;
            let left = (column * merge + inner % merge) * edge;
            for channel in 0..3 {
                for moment in 0..moments {
                    let frame = &frames[(time * moments + moment).min(frames.len() - 1)];
                    for y in top..top + edge {
                        values.extend((left..left + edge).map(|x| frame[[channel, y, x]]));
                    }
                }
            }
        }
        let width = 3 * moments * edge * edge;
        Ok(Patches {
            values: Array2::from_shape_vec((count, width), values)
                .map_err(|e| RuntimeError::Tensor(e.to_string()))?,
            grid: [time, down * merge, across * merge],
            merge,
        })
    }
}

/// An image or a clip as rows of patches.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// `[patches, 3 · moments · edge · edge]`, the patches of a token together, tokens row by row.
    pub values: Array2<f32>,
    /// Frames, rows and columns of patches: a row of `image_grid_thw`.
    pub grid: [usize; 3],
    /// Edge of a token in patches.
    pub merge: usize,
}

impl Patches {
    /// How the tokens lie that a vision encoder makes of the patches.
    pub fn tokens(&self) -> Grid {
        let [time, height, width] = self.grid;
        Grid {
            time,
            height: height / self.merge,
            width: width / self.merge,
        }
    }
}

impl ImageProcessor {
    /// Whether the configuration is that of a processor that cuts images into rows of patches.
    pub fn cuts_patches(&self) -> bool {
        self.patches.is_some()
    }

    /// Frames in a patch, for processors that cut images into rows of patches.
    pub fn moments(&self) -> Option<usize> {
        Some(self.patches?.moments)
    }

    /// Tokens that an image of this height and width has.
    ///
    /// # Errors
    /// The processor cuts no patches, or the image is too slim.
    pub fn token_count(&self, height: usize, width: usize) -> Result<usize> {
        let cut = self.cut()?;
        let (height, width) = match self.resize {
            Some((size, _)) => size.of(height, width)?,
            None => (height, width),
        };
        let token = cut.edge * cut.merge;
        Ok((height / token) * (width / token))
    }

    fn cut(&self) -> Result<Cut> {
        self.patches.ok_or_else(|| {
            RuntimeError::Tensor(
                "rows of patches were asked of an image processor that makes none; expected a \
                 Qwen2VLImageProcessor in preprocessor_config.json"
                    .into(),
            )
        })
    }

    /// Rows of patches of an image, or of the frames of a clip.
    ///
    /// # Errors
    /// The processor cuts none; an image is too slim or cannot be resized; frames differ in size.
    pub fn patches(&self, frames: &[Pixels]) -> Result<Patches> {
        let cut = self.cut()?;
        let frames: Vec<Array3<f32>> = frames
            .iter()
            .map(|frame| self.process(frame))
            .collect::<Result<_>>()?;
        cut.rows(&frames)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value as Json, json};

    use super::*;
    use crate::runtime::test_models::models_dir;

    fn processor(config: &Json) -> Result<ImageProcessor> {
        let mut config = config.clone();
        config["image_processor_type"] = json!("Qwen2VLImageProcessorFast");
        ImageProcessor::from_json(&config, Path::new("preprocessor_config.json"))
    }

    fn plain(edge: usize, more: Json) -> ImageProcessor {
        let mut config = json!({"patch_size": edge, "do_rescale": false, "do_normalize": false});
        let more = more.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(more);
        processor(&config).unwrap()
    }

    /// Pixels whose value tells where they were: row, column and frame.
    fn frame(width: usize, height: usize, time: usize) -> Pixels {
        let at = |i: usize| [i / width, i % width, time].map(|v| v as u8);
        Pixels::new(width, height, (0..width * height).flat_map(at).collect()).unwrap()
    }

    #[test]
    fn the_patches_of_a_token_follow_one_another() {
        let cuts = plain(2, json!({"do_resize": false}));
        assert!(cuts.cuts_patches());
        let found = cuts.patches(&[frame(12, 8, 0)]).unwrap();
        assert_eq!(found.grid, [1, 4, 6]);
        assert_eq!(found.values.dim(), (24, 3 * 2 * 2 * 2));
        let tokens = found.tokens();
        assert_eq!((tokens.time, tokens.height, tokens.width), (1, 2, 3));
        // Upper left corner of each patch: its row and column in the image.
        let corners: Vec<[f32; 2]> = found.values.outer_iter().map(|p| [p[0], p[8]]).collect();
        let first = [[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0], [0.0, 4.0]];
        assert_eq!(corners[..5], first);
        assert_eq!(corners[12], [4.0, 0.0], "the second row of tokens");
        // Channel, moment, y, x: rows are 0 0 1 1 in both moments, columns 0 1 0 1.
        let patch: Vec<f32> = found.values.row(0).to_vec();
        assert_eq!(patch[..8], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(patch[8..16], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]);
    }

    #[test]
    fn frames_fill_the_moments_and_the_last_is_repeated() {
        let cuts = plain(2, json!({"do_resize": false}));
        let frames: Vec<Pixels> = (1..4).map(|t| frame(4, 4, t)).collect();
        let found = cuts.patches(&frames).unwrap();
        assert_eq!(found.grid, [2, 2, 2]);
        let times = |patch: usize| found.values.row(patch).to_vec()[16..].to_vec();
        assert_eq!(times(0), [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(times(4), [3.0; 8]);
        let other = [frame(4, 4, 0), frame(8, 4, 0)];
        let error = cuts.patches(&other).unwrap_err().to_string();
        assert!(error.contains("of one size"), "{error}");
        assert!(cuts.patches(&[]).is_err());
        let error = cuts.patches(&[frame(6, 4, 0)]).unwrap_err().to_string();
        assert!(error.contains("multiples of 4 pixels"), "{error}");
    }

    #[test]
    fn bounds_are_read_under_both_names() {
        let bounds = |config: Json| -> Result<(usize, usize, usize)> {
            match processor(&config)?.resize {
                Some((super::super::Size::Bounded(b), _)) => Ok((b.factor, b.least, b.most)),
                other => panic!("{other:?}"),
            }
        };
        let read = |config: Json| bounds(config).unwrap();
        assert_eq!(read(json!({})), (28, 3136, 1_003_520));
        let size = json!({"shortest_edge": 10, "longest_edge": 20});
        assert_eq!(read(json!({"size": size, "patch_size": 16})), (32, 10, 20));
        let old = json!({"min_pixels": 5, "max_pixels": 50});
        assert_eq!(read(json!({"size": old})), (28, 5, 50));
        let both = json!({"size": size, "min_pixels": 7, "max_pixels": null});
        assert_eq!(read(both), (28, 7, 20));
        for wrong in [
            json!({"size": {"shortest_edge": 5}}),
            json!({"size": {"height": 5, "width": 5}}),
            json!({"size": 5}),
            json!({"patch_size": 0}),
            json!({"merge_size": -1}),
            json!({"max_pixels": "many"}),
        ] {
            let error = bounds(wrong.clone()).unwrap_err().to_string();
            assert!(
                error.contains("preprocessor_config.json"),
                "{wrong}: {error}"
            );
        }
    }

    /// Transformers' `smart_resize`, recorded by `models/qwen_vl/answers.py`.
    #[test]
    fn sizes_are_those_of_transformers() {
        let path = models_dir().join("../qwen_vl/goldens/answers.json");
        let text = std::fs::read_to_string(path).unwrap();
        let goldens: Json = serde_json::from_str(&text).unwrap();
        let rows: Vec<[usize; 7]> = serde_json::from_value(goldens["sizes"].clone()).unwrap();
        assert!(rows.len() > 200);
        for [height, width, factor, least, most, tall, wide] in rows {
            let bounds = Bounds {
                factor,
                least,
                most,
            };
            let found = bounds.of(height, width).unwrap();
            assert_eq!(found, (tall, wide), "{height}×{width}, {bounds:?}");
        }
    }

    #[test]
    fn slivers_are_refused() {
        let cuts = plain(14, json!({}));
        let error = cuts.patches(&[frame(201, 1, 0)]).unwrap_err().to_string();
        assert!(
            error.contains("201×1") && error.contains("200 times"),
            "{error}"
        );
        assert!(cuts.patches(&[frame(200, 1, 0)]).is_ok());
    }
}
