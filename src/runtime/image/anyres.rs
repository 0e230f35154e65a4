//! Images of any resolution, as LLaVA-NeXT and LLaVA-OneVision cut them up and put their features together.
//!
//! ```text
//! image ─┬─ resized to one crop ────────────────────────────▶ base crop ─┐
//!        └─ scaled into the best grid, padded, cut ─▶ crops row by row ──┴▶ encoder ─▶ [N, D] each
//!
//! packed:  base │ row 1 of the whole grid, newline │ row 2, newline │ …      (rows of padding left out)
//! merged:  base │ crop 1 │ crop 2 │ …                                        (no rows, so no newlines)
//! ```
//!
//! Source: Transformers 5.22, `image_processing_pil_llava_next.py`, `image_processing_utils.py`
//! (`select_best_resolution`, `get_patch_output_size`) and `modeling_llava_next.py`, `modeling_llava_onevision.py`
//! (`pack_image_features`, `unpad_image`).

use std::path::Path;

use serde_json::Value as Json;

use super::super::error::{Result, RuntimeError};
use super::super::tensor::Tensor;
use super::pixels::{Pixels, Resample};

/// Height and width in pixels.
type Size = (usize, usize);

/// How an image becomes crops.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Grids {
    /// Resolutions that an image may be scaled to.
    pub(super) pinpoints: Vec<Size>,
    /// Height and width of the base crop.
    pub(super) base: Size,
    /// Edge of the other crops.
    pub(super) edge: usize,
    pub(super) resample: Resample,
}

/// `image_grid_pinpoints`, if the configuration has them.
///
/// # Errors
/// They are no list of heights and widths above 0.
pub(super) fn pinpoints(config: &Json, path: &Path) -> Result<Option<Vec<Size>>> {
    let stated = match config.get("image_grid_pinpoints") {
        None | Some(Json::Null) => return Ok(None),
        Some(stated) => stated,
    };
    let side = |v: &Json| {
        v.as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| (1..=1 << 20).contains(v))
    };
    let pair = |v: &Json| match v.as_array()?.as_slice() {
        [height, width] => Some((side(height)?, side(width)?)),
        _ => None,
    };
    let all: Option<Vec<Size>> = stated
        .as_array()
        .and_then(|all| all.iter().map(pair).collect());
    match all.filter(|all| !all.is_empty()) {
        Some(all) => Ok(Some(all)),
        None => Err(RuntimeError::config(
            path,
            format!("`image_grid_pinpoints` is {stated}, expected a list of [height, width]"),
        )),
    }
}

/// The resolution that shows most of an image and, among these, wastes least.
fn best(pinpoints: &[Size], (height, width): Size) -> Size {
    let mut best = (pinpoints[0], 0, usize::MAX);
    for &(h, w) in pinpoints {
        let scale = (w as f64 / width as f64).min(h as f64 / height as f64);
        let scaled = (width as f64 * scale) as usize * (height as f64 * scale) as usize;
        let effective = scaled.min(width * height);
        let wasted = (w * h).saturating_sub(effective);
        if effective > best.1 || (effective == best.1 && wasted < best.2) {
            best = ((h, w), effective, wasted);
        }
    }
    best.0
}

impl Grids {
    /// Crops of an image of that size, the base crop counted.
    pub(super) fn count(&self, height: usize, width: usize) -> usize {
        let (down, across) = self.grid(height, width);
        1 + down * across
    }

    /// Rows and columns of the crops other than the base crop.
    pub(super) fn grid(&self, height: usize, width: usize) -> Size {
        let (h, w) = best(&self.pinpoints, (height, width));
        (h.div_ceil(self.edge), w.div_ceil(self.edge))
    }

    /// The base crop and, row by row, the others.
    ///
    /// # Errors
    /// A resize fails.
    pub(super) fn cut(&self, image: &Pixels) -> Result<Vec<Pixels>> {
        let (height, width) = best(&self.pinpoints, (image.height, image.width));
        let (down, across) = (
            height as f64 / image.height as f64,
            width as f64 / image.width as f64,
        );
        let (new_height, new_width) = if across < down {
            let scaled = (image.height as f64 * across).ceil() as usize;
            (scaled.min(height), width)
        } else {
            let scaled = (image.width as f64 * down).ceil() as usize;
            (height, scaled.min(width))
        };
        let scaled = image.resize(new_width, new_height, self.resample)?;
        let (top, left) = ((height - new_height) / 2, (width - new_width) / 2);
        let base = image.resize(self.base.1, self.base.0, self.resample)?;
        let mut crops = vec![base];
        for y in (0..height).step_by(self.edge) {
            for x in (0..width).step_by(self.edge) {
                let (h, w) = (self.edge.min(height - y), self.edge.min(width - x));
                let mut rgb = vec![0; h * w * 3];
                for row in 0..h {
                    let from = (y + row).checked_sub(top).filter(|r| *r < new_height);
                    let Some(from) = from else { continue };
                    for column in 0..w {
                        let at = (x + column).checked_sub(left).filter(|c| *c < new_width);
                        let Some(at) = at else { continue };
                        let (to, at) = ((row * w + column) * 3, (from * new_width + at) * 3);
                        rgb[to..to + 3].copy_from_slice(&scaled.rgb[at..at + 3]);
                    }
                }
                crops.push(Pixels::new(w, h, rgb)?);
            }
        }
        Ok(crops)
    }
}

/// A token of a crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the crop; 0 is the base crop.
    pub crop: usize,
    /// Number of the token in it, row by row.
    pub token: usize,
}

/// What a token of an image of several crops is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Slot {
    /// A token of a crop, as it is.
    Token(Place),
    /// What is put behind each row.
    Newline,
    /// A mean of four neighbours of a grid that is shrunk: above left, above right, below left and below right.
    Between {
        /// The neighbours; the same one twice at an edge.
        corners: [Place; 4],
        /// Weight of those below.
        down: f32,
        /// Weight of those on the right.
        across: f32,
    },
}

/// How the features of an image's crops become the tokens of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    pinpoints: Vec<Size>,
    /// Edge of a crop in pixels, and in tokens.
    edge: usize,
    grid: usize,
    /// Put behind each row; none in the configuration of a model that packs nothing.
    newline: Option<Vec<f32>>,
    /// LLaVA-OneVision: crops whose tokens an image may have before its grid is shrunk.
    most: Option<usize>,
    config: std::path::PathBuf,
}

impl Packing {
    /// Reads a model's `config.json`; `None` if it is not one of images of any resolution.
    ///
    /// # Errors
    /// A value is of the wrong kind, or the size of a crop is missing.
    pub fn from_json(config: &Json, path: &Path) -> Result<Option<Self>> {
        let Some(pinpoints) = pinpoints(config, path)? else {
            return Ok(None);
        };
        let wrong = |what: &str| RuntimeError::config(path, what);
        let size = |key: &str| {
            let stated = config.get("vision_config").and_then(|v| v.get(key));
            let stated = stated.and_then(Json::as_u64).filter(|n| *n > 0);
            stated.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
                wrong(&format!(
                    "has image_grid_pinpoints, but no vision_config.{key} above 0"
                ))
            })
        };
        let (edge, patch) = (size("image_size")?, size("patch_size")?);
        let newline = match config.get("image_newline") {
            None | Some(Json::Null) => None,
            Some(stated) => {
                let number = |v: &Json| v.as_f64().map(|v| v as f32);
                let all: Option<Vec<f32>> = stated
                    .as_array()
                    .and_then(|all| all.iter().map(number).collect());
                let all = all.ok_or_else(|| wrong("`image_newline` is no list of numbers"))?;
                Some(all)
            }
        };
        let aspect = config.get("vision_aspect_ratio").and_then(Json::as_str);
        let onevision = config.get("model_type").and_then(Json::as_str) == Some("llava_onevision");
        let most = match aspect.and_then(|a| a.strip_prefix("anyres_max_")) {
            Some(n) => {
                let most = n.parse().ok().filter(|n| *n > 0);
                Some(most.ok_or_else(|| {
                    wrong("`vision_aspect_ratio` is expected to be anyres_max_ and a number")
                })?)
            }
            // What Transformers fills in.
            None => onevision.then_some(9),
        };
        Ok(Some(Self {
            pinpoints,
            edge,
            grid: edge / patch,
            newline,
            most,
            config: path.to_owned(),
        }))
    }

    /// The tokens of an image of height and width `size`: features `[N, width]` of its crops laid out as the
    /// grid they were cut from, without the rows or columns that are padding, with a newline token behind each
    /// row; the base crop's first. `[tokens, width]`.
    ///
    /// In models with a marker channel, newline tokens are visual: they come from the picture's layout, and
    /// pruning ranks them with the patches.
    ///
    /// # Errors
    /// Crops that are no such grid (a merged crop has none), or no newline token of their width.
    pub fn pack(&self, features: &[Tensor], size: Size) -> Result<Tensor> {
        let [count, channels] = match features {
            [first, ..] if first.shape().len() == 2 => [first.shape()[0], first.shape()[1]],
            _ => [0, 0],
        };
        if count != self.grid * self.grid {
            return Err(self.wrong(features.len(), count, size));
        }
        let slots = self.slots(features.len(), size)?;
        let newline = self.newline(channels)?;
        let dtype = features[0].dtype();
        let all: Vec<_> = features.iter().map(Tensor::f32s).collect::<Result<_>>()?;
        let at = |place: Place| -> &[f32] {
            let token = place.token * channels;
            &all[place.crop][token..token + channels]
        };
        let mut data = Vec::with_capacity(slots.len() * channels);
        for slot in slots {
            match slot {
                Slot::Newline => data.extend(&newline),
                Slot::Token(place) => data.extend(at(place)),
                Slot::Between {
                    corners,
                    down,
                    across,
                } => {
                    let corners = corners.map(at);
                    let (v, h) = (down, across);
                    data.extend((0..channels).map(|c| {
                        let [a, b, p, q] = corners.map(|corner| corner[c]);
                        (1.0 - v) * ((1.0 - h) * a + h * b) + v * ((1.0 - h) * p + h * q)
                    }));
                }
            }
        }
        Tensor::new([data.len() / channels, channels], data)?.cast_float(dtype)
    }

    fn wrong(&self, crops: usize, count: usize, size: Size) -> RuntimeError {
        let (height, width) = best(&self.pinpoints, size);
        let (down, across, g) = (height / self.edge, width / self.edge, self.grid);
        RuntimeError::Prompt(format!(
            "an image of {}×{} is expected as {} crops of {g}×{g} features; found {crops} of {count}. Crops of \
             merged tokens have no rows and are put one after the other, without newline tokens",
            size.1,
            size.0,
            1 + down * across
        ))
    }

    /// What the tokens of an image of height and width `size` are made of, in their order, where it has `crops` crops
    /// (see [`pack`](Self::pack)).
    ///
    /// # Errors
    /// That is another number of crops than such an image has.
    pub fn slots(&self, crops: usize, size: Size) -> Result<Vec<Slot>> {
        let g = self.grid;
        let (height, width) = best(&self.pinpoints, size);
        let (down, across) = (height / self.edge, width / self.edge);
        if crops != 1 && crops != 1 + down * across {
            return Err(self.wrong(crops, g * g, size));
        }
        let mut slots: Vec<Slot> = (0..g * g)
            .map(|token| Slot::Token(Place { crop: 0, token }))
            .collect();
        if crops == 1 {
            slots.push(Slot::Newline);
            return Ok(slots);
        }
        let (rows, columns) = (down * g, across * g);
        let (top, left) = margins((rows, columns), size);
        let (rows, columns) = (rows - 2 * top, columns - 2 * left);
        let at = |y: usize, x: usize| {
            let (y, x) = (y + top, x + left);
            Place {
                crop: 1 + y / g * across + x / g,
                token: y % g * g + x % g,
            }
        };
        let shrink = self.most.map(|most| {
            let limit = (most * g * g) as f64;
            ((rows * columns) as f64 / limit).sqrt()
        });
        match shrink.filter(|ratio| *ratio > 1.1) {
            None => {
                for y in 0..rows {
                    slots.extend((0..columns).map(|x| Slot::Token(at(y, x))));
                    slots.push(Slot::Newline);
                }
            }
            Some(ratio) => {
                let fewer = |n: usize| ((n as f64 / ratio).floor() as usize).max(1);
                let (vertical, horizontal) =
                    (taps(rows, fewer(rows)), taps(columns, fewer(columns)));
                for &(y, below, v) in &vertical {
                    slots.extend(horizontal.iter().map(|&(x, beside, h)| Slot::Between {
                        corners: [at(y, x), at(y, beside), at(below, x), at(below, beside)],
                        down: v,
                        across: h,
                    }));
                    slots.push(Slot::Newline);
                }
            }
        }
        Ok(slots)
    }

    /// The newline token, with the mark of a visual token where features carry a marker channel.
    fn newline(&self, channels: usize) -> Result<Vec<f32>> {
        let Some(newline) = &self.newline else {
            return Err(RuntimeError::config(
                &self.config,
                format!(
                    "has no `image_newline`, the list of {channels} numbers that goes behind each row of an image of \
                     several crops; export the weight `image_newline` of the model into it, or merge the crops' tokens \
                     (token_merge), which leaves no rows"
                ),
            ));
        };
        let mut newline = newline.clone();
        if newline.len() + 1 == channels {
            newline.push(1.0);
        }
        if newline.len() != channels {
            return Err(RuntimeError::config(
                &self.config,
                format!(
                    "`image_newline` has {} numbers, the vision encoder's features have {channels}",
                    newline.len()
                ),
            ));
        }
        Ok(newline)
    }
}

/// The features of an image's crops one after the other, the base crop's first: `[crops · rows, width]`.
///
/// # Errors
/// Crops of different widths.
pub fn concatenate(features: &[Tensor]) -> Result<Tensor> {
    let Some(first) = features.first() else {
        return Err(RuntimeError::Tensor("an image without crops".into()));
    };
    let width = first.shape().last().copied().unwrap_or(0);
    let rows = features.iter().map(|f| f.shape()[0]).sum::<usize>();
    let mut data = Vec::with_capacity(rows * width);
    for feature in features {
        data.extend_from_slice(&feature.f32s()?);
    }
    Tensor::new([rows, width], data)?.cast_float(first.dtype())
}

/// Rows above and columns left of an image of height and width `size` that was scaled into a grid, as many of
/// which lie on the other side.
fn margins((rows, columns): Size, (height, width): Size) -> Size {
    // Transformers: int(round(x, 7)).
    let round = |x: f64| ((x * 1e7).round() / 1e7) as usize;
    let (h, w) = (height as f64, width as f64);
    if w / h > columns as f64 / rows as f64 {
        let used = round(h * (columns as f64 / w));
        (rows.saturating_sub(used) / 2, 0)
    } else {
        let used = round(w * (rows as f64 / h));
        (0, columns.saturating_sub(used) / 2)
    }
}

/// For each of `to` places the two of `from` that it lies between and the weight of the second, as PyTorch's
/// bilinear interpolation without aligned corners has them.
fn taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    let place = |i: usize| {
        let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
        let first = (at as usize).min(from - 1);
        (first, (first + 1).min(from - 1), at - first as f32)
    };
    (0..to).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn resolutions_are_chosen_as_transformers_does() {
        let next = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];
        // select_best_resolution of Transformers 5.22.
        for (size, want) in [
            ((300, 400), (336, 672)),
            ((420, 300), (672, 336)),
            ((1000, 1000), (672, 672)),
            ((200, 1200), (336, 1008)),
            ((1200, 200), (1008, 336)),
        ] {
            assert_eq!(best(&next, size), want, "{size:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let path = Path::new("config.json");
        let config = json!({
            "image_grid_pinpoints": [[28, 56]], "vision_config": {"image_size": 28, "patch_size": 14},
        });
        let packing = Packing::from_json(&config, path).unwrap().unwrap();
        let crop = |rows: usize| Tensor::new([rows, 3], vec![0f32; rows * 3]).unwrap();
        let error = packing.pack(&[crop(4), crop(4), crop(4)], (20, 40));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("image_newline"), "{error}");
        let error = packing.pack(&[crop(3), crop(3), crop(3)], (20, 40));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("3 crops of 2×2"), "{error}");
        let mut wide = config.clone();
        wide["image_newline"] = json!([0.5]);
        let packing = Packing::from_json(&wide, path).unwrap().unwrap();
        let error = packing.pack(&[crop(4), crop(4), crop(4)], (20, 40));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("1 numbers"), "{error}");
        // Two numbers for features of three: the last is the marker channel.
        wide["image_newline"] = json!([0.5, 0.25]);
        let packing = Packing::from_json(&wide, path).unwrap().unwrap();
        let packed = packing
            .pack(&[crop(4), crop(4), crop(4)], (28, 56))
            .unwrap();
        assert_eq!(packed.shape(), [4 + 2 * 5, 3]);
        assert_eq!(packed.f32s().unwrap()[8 * 3..9 * 3], [0.5, 0.25, 1.0]);
        for bad in [json!([]), json!([[1]]), json!([[0, 1]]), json!("x")] {
            let config = json!({"image_grid_pinpoints": bad});
            assert!(Packing::from_json(&config, path).is_err(), "{config}");
        }
        assert_eq!(Packing::from_json(&json!({}), path).unwrap(), None);
    }
}
