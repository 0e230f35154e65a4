//! RGB images: decoding, Pillow's conversions and Pillow's resizing.
//!
//! Resizing follows Pillow: one side, rounded to 8 bits, then the other; the width first, except where the height
//! shrinks by more than twice what the width does (so Pillow 13.0, found by comparing both orders with its result
//! for 400 sizes). [`fast_image_resize`] in one call differs by up to 22 of 255. In two calls fewer than 1 % of the
//! values differ, by 1, and where edges are hard by 2 (bicubic, bilinear, Lanczos, Hamming); nearest neighbour is
//! the same. PNG, GIF, BMP and WebP decode to the same bytes; JPEG decoders are free to round
//! differently, which is 1 to 3 of 255 on photographs and up to 11 on subsampled noise.

use std::path::Path;

use fast_image_resize::images::{Image as Target, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, ImageDecoder, ImageReader};

use super::super::error::{Result, RuntimeError};

/// Largest number of pixels that an image is resized to; a sliver scaled to a short edge of hundreds of
/// pixels would otherwise ask for gigabytes.
const MAX_PIXELS: usize = 1 << 27;

/// An RGB image with 8 bits for each channel, row-major, channels last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) rgb: Vec<u8>,
}

impl Pixels {
    /// Takes pixels over: `height · width · 3` bytes.
    ///
    /// # Errors
    /// The number of bytes differs, or a side is 0.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        if width == 0 || height == 0 || width.checked_mul(height * 3) != Some(rgb.len()) {
            return Err(RuntimeError::Image {
                name: "(from memory)".into(),
                reason: format!("{width}×{height} RGB does not take {} bytes", rgb.len()),
            });
        }
        Ok(Self { width, height, rgb })
    }

    /// Reads a PNG, JPEG, GIF (first frame), BMP or WebP file.
    ///
    /// # Errors
    /// The file cannot be read or decoded.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(RuntimeError::io(path))?;
        Self::decode(&bytes, &path.display().to_string())
    }

    /// Decodes an image file in memory; its format is told by its first bytes. The orientation that EXIF
    /// metadata gives is applied, as Transformers' `load_image` does. `name` appears in messages.
    ///
    /// # Errors
    /// The format is unknown or the data is damaged.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self> {
        let failed = |reason: String| RuntimeError::Image {
            name: name.into(),
            reason,
        };
        let reader = ImageReader::new(std::io::Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|e| failed(e.to_string()))?;
        if reader.format().is_none() {
            return Err(failed("no PNG, JPEG, GIF, BMP or WebP image".into()));
        }
        let mut decoder = reader.into_decoder().map_err(|e| failed(e.to_string()))?;
        let orientation = decoder.orientation().ok();
        let mut decoded = DynamicImage::from_decoder(decoder).map_err(|e| failed(e.to_string()))?;
        if let Some(orientation) = orientation {
            decoded.apply_orientation(orientation);
        }
        Ok(Self::from_image(decoded))
    }

    /// Converts a decoded image.
    pub(in crate::runtime) fn from_image(decoded: DynamicImage) -> Self {
        Self {
            width: decoded.width() as usize,
            height: decoded.height() as usize,
            rgb: to_rgb(decoded),
        }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The bytes: `height · width · 3`, row-major.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Scales to `width`×`height` as Pillow's `Image.resize` does.
    ///
    /// # Errors
    /// A side is 0 or the result is unreasonably large.
    pub fn resize(&self, width: usize, height: usize, resample: Resample) -> Result<Self> {
        let failed = |reason: String| RuntimeError::Image {
            name: format!("{}×{}", self.width, self.height),
            reason: format!("cannot resize to {width}×{height}: {reason}"),
        };
        if width == 0 || height == 0 {
            return Err(failed("a side is 0".into()));
        }
        // Between the passes the image has the new width and the old height.
        let largest = width.checked_mul(height.max(self.height));
        if largest.is_none_or(|pixels| pixels > MAX_PIXELS) {
            return Err(failed(format!("more than {MAX_PIXELS} pixels")));
        }
        if resample == Resample::Nearest {
            return Ok(self.nearest(width, height));
        }
        let pass = |source: &Self, width: usize, height: usize| -> Result<Self> {
            if (source.width, source.height) == (width, height) {
                return Ok(source.clone());
            }
            let fir = |e: &dyn std::fmt::Display| failed(e.to_string());
            let view = ImageRef::new(
                source.width as u32,
                source.height as u32,
                &source.rgb,
                PixelType::U8x3,
            )
            .map_err(|e| fir(&e))?;
            let mut target = Target::new(width as u32, height as u32, PixelType::U8x3);
            let options = ResizeOptions::new()
                .resize_alg(ResizeAlg::Convolution(resample.filter()))
                .use_alpha(false);
            Resizer::new()
                .resize(&view, &mut target, &options)
                .map_err(|e| fir(&e))?;
            Ok(Self {
                width,
                height,
                rgb: target.into_vec(),
            })
        };
        let shrinks = |old: usize, new: usize| old as i128 - new as i128;
        let down = shrinks(self.height, height);
        if down > 0 && down > 2 * shrinks(self.width, width) {
            return pass(&pass(self, self.width, height)?, width, height);
        }
        pass(&pass(self, width, self.height)?, width, height)
    }

    /// Pillow's nearest neighbour: the source pixel under the centre of each target pixel.
    fn nearest(&self, width: usize, height: usize) -> Self {
        // The centres are summed up one by one, as Pillow does: multiplying rounds differently where a
        // centre falls between two pixels.
        let places = |size: usize, source: usize| -> Vec<usize> {
            let scale = source as f64 / size as f64;
            let centres = std::iter::successors(Some(scale * 0.5), |at| Some(at + scale));
            centres
                .take(size)
                .map(|at| (at as usize).min(source - 1))
                .collect()
        };
        let columns = places(width, self.width);
        let mut rgb = Vec::with_capacity(width * height * 3);
        for y in places(height, self.height) {
            for x in &columns {
                let at = (y * self.width + x) * 3;
                rgb.extend_from_slice(&self.rgb[at..at + 3]);
            }
        }
        Self { width, height, rgb }
    }

    /// Cuts `width`×`height` out of the centre; where the image is smaller, it is padded with black. Odd
    /// margins are split as Transformers' `center_crop` splits them.
    pub fn center_crop(&self, width: usize, height: usize) -> Self {
        // Offset of the cut in the source, negative where there is padding.
        let offset = |source: usize, cut: usize| -> i64 {
            let offset = (source as i64 - cut as i64).div_euclid(2);
            if cut > source {
                // Transformers pads by ⌈difference / 2⌉ in front and then cuts from there.
                let padded = ((cut - source) as i64 + 1) / 2;
                (offset + padded).max(0) - padded
            } else {
                offset
            }
        };
        let (left, top) = (offset(self.width, width), offset(self.height, height));
        let mut rgb = vec![0; width * height * 3];
        for y in 0..height {
            let Some(sy) = inside(y as i64 + top, self.height) else {
                continue;
            };
            for x in 0..width {
                let Some(sx) = inside(x as i64 + left, self.width) else {
                    continue;
                };
                let (to, from) = ((y * width + x) * 3, (sy * self.width + sx) * 3);
                rgb[to..to + 3].copy_from_slice(&self.rgb[from..from + 3]);
            }
        }
        Self { width, height, rgb }
    }
}

fn inside(at: i64, size: usize) -> Option<usize> {
    usize::try_from(at).ok().filter(|at| *at < size)
}

/// Pillow's `convert("RGB")`: alpha is dropped, not blended; grey is repeated; of 16-bit colours the high
/// byte counts, but 16-bit grey is *clipped* to 255.
pub(super) fn to_rgb(image: DynamicImage) -> Vec<u8> {
    let high = |v: u16| (v >> 8) as u8;
    match image {
        DynamicImage::ImageLuma8(grey) => grey.into_raw().iter().flat_map(|&v| [v; 3]).collect(),
        DynamicImage::ImageLumaA8(grey) => grey.pixels().flat_map(|p| [p.0[0]; 3]).collect(),
        DynamicImage::ImageLuma16(grey) => grey
            .into_raw()
            .iter()
            .flat_map(|&v| [v.min(255) as u8; 3])
            .collect(),
        DynamicImage::ImageLumaA16(grey) => grey.pixels().flat_map(|p| [high(p.0[0]); 3]).collect(),
        DynamicImage::ImageRgb8(rgb) => rgb.into_raw(),
        DynamicImage::ImageRgba8(rgba) => rgba
            .pixels()
            .flat_map(|p| [p.0[0], p.0[1], p.0[2]])
            .collect(),
        DynamicImage::ImageRgb16(rgb) => rgb.into_raw().into_iter().map(high).collect(),
        DynamicImage::ImageRgba16(rgba) => rgba
            .pixels()
            .flat_map(|p| [high(p.0[0]), high(p.0[1]), high(p.0[2])])
            .collect(),
        // Floating-point formats are not among those that are read.
        other => other.to_rgb8().into_raw(),
    }
}

/// Interpolation, by Pillow's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resample {
    /// 0
    Nearest,
    /// 1
    Lanczos,
    /// 2
    Bilinear,
    /// 3
    Bicubic,
    /// 4
    Box,
    /// 5
    Hamming,
}

impl Resample {
    pub(super) fn from_number(number: i64) -> Option<Self> {
        Some(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::Bilinear,
            3 => Self::Bicubic,
            4 => Self::Box,
            5 => Self::Hamming,
            _ => return None,
        })
    }

    fn filter(self) -> FilterType {
        match self {
            // Nearest is handled apart; a box of at most one pixel is the same for enlarging.
            Self::Nearest | Self::Box => FilterType::Box,
            Self::Lanczos => FilterType::Lanczos3,
            Self::Bilinear => FilterType::Bilinear,
            Self::Bicubic => FilterType::CatmullRom,
            Self::Hamming => FilterType::Hamming,
        }
    }
}
