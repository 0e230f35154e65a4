//! Images to `pixel_values`, as `preprocessor_config.json` says and as Transformers does it with Pillow:
//! convert to RGB, resize, centre crop, rescale, normalise.

use std::path::{Path, PathBuf};

use ndarray::Array3;
use serde_json::Value as Json;

use super::error::{Result, RuntimeError};

mod anyres;
mod patches;
mod pixels;
#[cfg(test)]
mod tests;

pub use anyres::{Packing, Place, Slot, concatenate};
pub use patches::Patches;
pub use pixels::{Pixels, Resample};

/// Target of the resize step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    ShortestEdge(usize),
    Exact { height: usize, width: usize },
    Bounded(patches::Bounds),
}

impl Size {
    /// Height and width for an image of this height and width.
    fn of(self, height: usize, width: usize) -> Result<(usize, usize)> {
        Ok(match self {
            Self::Exact { height, width } => (height, width),
            Self::Bounded(bounds) => bounds.of(height, width)?,
            Self::ShortestEdge(edge) => {
                let (short, long) = (height.min(width), height.max(width));
                // Transformers: int(edge · long / short).
                let long = (edge as u128 * long as u128 / short as u128) as usize;
                if width <= height {
                    (long, edge)
                } else {
                    (edge, long)
                }
            }
        })
    }
}

/// What `preprocessor_config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    resize: Option<(Size, Resample)>,
    /// Height and width.
    crop: Option<(usize, usize)>,
    rescale: Option<f64>,
    normalize: Option<([f32; 3], [f32; 3])>,
    /// For images of any resolution: how they are cut into crops.
    grids: Option<anyres::Grids>,
    /// For models that take rows of patches: how these are cut.
    patches: Option<patches::Cut>,
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json`, or the `image_processor` part of `processor_config.json`.
    ///
    /// # Errors
    /// Neither is there, or it describes a processor that is not known here.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let own = dir.join("preprocessor_config.json");
        let shared = dir.join("processor_config.json");
        if let Some(config) = read_json(&own)? {
            return Self::from_json(&config, &own);
        }
        if let Some(config) = read_json(&shared)?
            .as_ref()
            .and_then(|c| c.get("image_processor"))
        {
            return Self::from_json(config, &shared);
        }
        Err(RuntimeError::config(
            dir,
            "has neither preprocessor_config.json nor a processor_config.json with an \
             `image_processor`; copy it from the model that was exported",
        ))
    }

    /// Reads a configuration that is parsed already; `path` appears in messages.
    ///
    /// # Errors
    /// The processor is not a known one, or a value is of the wrong kind.
    pub fn from_json(config: &Json, path: &Path) -> Result<Self> {
        let fields = Fields { config, path };
        let keys = [
            "image_processor_type",
            "video_processor_type",
            "feature_extractor_type",
        ];
        let kind = keys
            .iter()
            .find_map(|key| config.get(key).and_then(Json::as_str))
            .ok_or_else(|| RuntimeError::config(path, "names no `image_processor_type`"))?;
        let plain = kind.strip_suffix("Fast").unwrap_or(kind);
        // What Transformers fills in for absent keys.
        let plain = plain.strip_suffix("Pil").unwrap_or(plain);
        let any = matches!(
            plain,
            "LlavaNextImageProcessor" | "LlavaOnevisionImageProcessor"
        );
        let (size, crop, mean, std) = match plain {
            "CLIPImageProcessor"
            | "CLIPFeatureExtractor"
            | "LlavaNextImageProcessor"
            | "VideoLlavaImageProcessor"
            | "VideoLlavaVideoProcessor" => (
                Size::ShortestEdge(224),
                true,
                [0.481_454_66, 0.457_827_5, 0.408_210_73],
                [0.268_629_54, 0.261_302_6, 0.275_777_1],
            ),
            "LlavaOnevisionImageProcessor" => (
                Size::Exact {
                    height: 384,
                    width: 384,
                },
                false,
                [0.481_454_66, 0.457_827_5, 0.408_210_73],
                [0.268_629_54, 0.261_302_6, 0.275_777_1],
            ),
            "Qwen2VLImageProcessor" | "Qwen2VLVideoProcessor" => (
                Size::ShortestEdge(224),
                false,
                [0.481_454_66, 0.457_827_5, 0.408_210_73],
                [0.268_629_54, 0.261_302_6, 0.275_777_1],
            ),
            "SiglipImageProcessor" => (
                Size::Exact {
                    height: 224,
                    width: 224,
                },
                false,
                [0.5; 3],
                [0.5; 3],
            ),
            _ => {
                return Err(RuntimeError::config(
                    path,
                    format!(
                        "the image processor `{kind}` is not supported; CLIPImageProcessor, \
                         SiglipImageProcessor, LlavaNextImageProcessor, LlavaOnevisionImageProcessor and \
                         Qwen2VLImageProcessor are. Prepare the pixel values elsewhere for it"
                    ),
                ));
            }
        };
        let patches = match plain.starts_with("Qwen2VL") {
            true => Some(patches::Cut::read(&fields)?),
            false => None,
        };
        let resize = if fields.flag("do_resize", true)? {
            let resample = fields.integer("resample", 3)?;
            let resample = Resample::from_number(resample).ok_or_else(|| {
                RuntimeError::config(path, format!("`resample` is {resample}, expected 0 to 5"))
            })?;
            let size = match &patches {
                Some(cut) => Size::Bounded(patches::Bounds::read(&fields, plain, cut)?),
                None => fields.size("size", size, false)?,
            };
            Some((size, resample))
        } else {
            None
        };
        let crop = if fields.flag("do_center_crop", crop)? {
            let default = Size::Exact {
                height: 224,
                width: 224,
            };
            match fields.size("crop_size", default, true)? {
                Size::ShortestEdge(edge) => Some((edge, edge)),
                other => Some(other.of(1, 1)?),
            }
        } else {
            None
        };
        let rescale = if fields.flag("do_rescale", true)? {
            Some(fields.number("rescale_factor", 1.0 / 255.0)?)
        } else {
            None
        };
        let normalize = if fields.flag("do_normalize", true)? {
            Some((
                fields.triple("image_mean", mean)?,
                fields.triple("image_std", std)?,
            ))
        } else {
            None
        };
        let grids = if any {
            let stated = anyres::pinpoints(config, path)?.ok_or_else(|| {
                RuntimeError::config(path, format!("a {kind} without `image_grid_pinpoints`"))
            })?;
            let base = match fields.size("size", size, false)? {
                Size::ShortestEdge(edge) => (edge, edge),
                other => other.of(1, 1)?,
            };
            let resample = match resize {
                Some((_, resample)) => resample,
                None => Resample::Bicubic,
            };
            Some(anyres::Grids {
                pinpoints: stated,
                base,
                edge: crop.map_or(base.0, |(height, _)| height),
                resample,
            })
        } else {
            None
        };
        Ok(Self {
            resize,
            crop,
            rescale,
            normalize,
            grids,
            patches,
        })
    }

    /// Whether images are cut into crops of one size, see [`crops`](Self::crops).
    pub fn any_resolution(&self) -> bool {
        self.grids.is_some()
    }

    /// Crops that an image of that size is cut into, the base crop counted.
    pub fn crop_count(&self, height: usize, width: usize) -> usize {
        self.grids.as_ref().map_or(1, |g| g.count(height, width))
    }

    /// Pixel values of every crop, `[3, height, width]` each: the whole image in one crop first, then, for
    /// processors of images of any resolution, the crops of its grid row by row.
    ///
    /// # Errors
    /// A resize fails.
    pub fn crops(&self, image: &Pixels) -> Result<Vec<Array3<f32>>> {
        self.each_crop(image, |crop| self.process(crop))
    }

    /// The crops of an image after resizing and cropping, before they become numbers, in the order of
    /// [`crops`](Self::crops).
    ///
    /// # Errors
    /// A resize fails.
    pub fn fit_crops(&self, image: &Pixels) -> Result<Vec<Pixels>> {
        self.each_crop(image, |crop| self.fit(crop))
    }

    fn each_crop<T>(
        &self,
        image: &Pixels,
        prepared: impl Fn(&Pixels) -> Result<T>,
    ) -> Result<Vec<T>> {
        match &self.grids {
            None => Ok(vec![prepared(image)?]),
            Some(grids) => grids.cut(image)?.iter().map(prepared).collect(),
        }
    }

    /// Rows and columns of the crops of an image of that size, the base crop not counted.
    pub fn crop_grid(&self, height: usize, width: usize) -> Option<(usize, usize)> {
        Some(self.grids.as_ref()?.grid(height, width))
    }

    /// Height and width of every result, if they do not depend on the image.
    pub fn output_size(&self) -> Option<(usize, usize)> {
        self.crop.or(match self.resize {
            Some((Size::Exact { height, width }, _)) => Some((height, width)),
            _ => None,
        })
    }

    /// The image after resizing and cropping, before it becomes numbers.
    ///
    /// # Errors
    /// The resize fails.
    pub fn fit(&self, image: &Pixels) -> Result<Pixels> {
        let resized = match self.resize {
            Some((size, resample)) => {
                let (height, width) = size.of(image.height, image.width)?;
                image.resize(width, height, resample)?
            }
            None => image.clone(),
        };
        Ok(match self.crop {
            Some((height, width)) => resized.center_crop(width, height),
            None => resized,
        })
    }

    /// Pixel values, `[3, height, width]`.
    ///
    /// # Errors
    /// The resize fails.
    pub fn process(&self, image: &Pixels) -> Result<Array3<f32>> {
        let image = self.fit(image)?;
        // One table for each channel: 256 values, computed as Transformers computes each pixel.
        let tables: [[f32; 256]; 3] = std::array::from_fn(|channel| {
            std::array::from_fn(|value| {
                let value = match self.rescale {
                    Some(factor) => (value as f64 * factor) as f32,
                    None => value as f32,
                };
                match &self.normalize {
                    Some((mean, std)) => (value - mean[channel]) / std[channel],
                    None => value,
                }
            })
        });
        Ok(Array3::from_shape_fn(
            (3, image.height, image.width),
            |(c, y, x)| tables[c][usize::from(image.rgb[(y * image.width + x) * 3 + c])],
        ))
    }
}

/// Typed access to the keys of a configuration, with defaults.
struct Fields<'a> {
    config: &'a Json,
    path: &'a Path,
}

impl Fields<'_> {
    fn get<T>(
        &self,
        key: &str,
        default: T,
        expected: &str,
        read: impl Fn(&Json) -> Option<T>,
    ) -> Result<T> {
        match self.config.get(key) {
            None | Some(Json::Null) => Ok(default),
            Some(value) => read(value).ok_or_else(|| {
                RuntimeError::config(
                    self.path,
                    format!("`{key}` is {value}, expected {expected}"),
                )
            }),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key, default, "true or false", Json::as_bool)
    }

    fn integer(&self, key: &str, default: i64) -> Result<i64> {
        self.get(key, default, "an integer", Json::as_i64)
    }

    /// A number of pixels or patches.
    fn above_zero(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key, default, "a whole number above 0", |value| {
            let number = value.as_u64().filter(|n| *n > 0 && *n <= 1 << 40)?;
            usize::try_from(number).ok()
        })
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key, default, "a number", Json::as_f64)
    }

    fn triple(&self, key: &str, default: [f32; 3]) -> Result<[f32; 3]> {
        self.get(key, default, "three numbers", |value| {
            let list = value.as_array().filter(|list| list.len() == 3)?;
            let mut triple = [0.0; 3];
            for (to, from) in triple.iter_mut().zip(list) {
                *to = from.as_f64()? as f32;
            }
            Some(triple)
        })
    }

    /// A size: `{shortest_edge}`, `{height, width}` or one integer (a square if `square`).
    fn size(&self, key: &str, default: Size, square: bool) -> Result<Size> {
        let expected = "`shortest_edge`, or `height` and `width`, above 0";
        self.get(key, default, expected, |value| {
            let side = |value: &Json| {
                value
                    .as_u64()
                    .and_then(|v| usize::try_from(v).ok())
                    .filter(|v| *v > 0)
            };
            if let Some(edge) = side(value) {
                return Some(if square {
                    Size::Exact {
                        height: edge,
                        width: edge,
                    }
                } else {
                    Size::ShortestEdge(edge)
                });
            }
            let object = value.as_object()?;
            let get = |key: &str| object.get(key).and_then(side);
            match (get("shortest_edge"), get("height"), get("width")) {
                // A longest edge beside the shortest one limits the long side; no CLIP model has it.
                (Some(edge), None, None) if !object.contains_key("longest_edge") => {
                    Some(Size::ShortestEdge(edge))
                }
                (None, Some(height), Some(width)) => Some(Size::Exact { height, width }),
                _ => None,
            }
        })
    }
}

/// A JSON file; `None` if it is not there.
pub(super) fn read_json(path: &Path) -> Result<Option<Json>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(RuntimeError::Io {
                path: PathBuf::from(path),
                source,
            });
        }
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| RuntimeError::config(path, e.to_string()))
}
