//! Random pixels, ids and features: what a run costs does not depend on what they are.

use ndarray::{Array2, Array3};

use super::error::{BenchError, Result};
use crate::random::SplitMix64;
use crate::runtime::{DType, Dim, Grid, Port, Tensor};

/// Elements of a tensor at most: more is a mistake of a file or an option, not something to time.
const MOST_ELEMENTS: usize = 1 << 30;

/// Tokens of a prompt at most.
const MOST_TOKENS: usize = 1 << 24;

/// Elements of a tensor of this shape, or of as many images as its first dimension says together.
pub(super) fn volume(shape: &[usize]) -> Result<usize> {
    let volume = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    volume.filter(|n| *n <= MOST_ELEMENTS).ok_or_else(|| {
        BenchError::Input(format!(
            "a tensor {shape:?} is too large to be measured with; expected at most {MOST_ELEMENTS} elements"
        ))
    })
}

/// Numbers of mean 0 and variance 1, evenly spread, for a tensor of this shape.
pub(super) fn noise(random: &mut SplitMix64, shape: &[usize]) -> Result<Vec<f32>> {
    let count = volume(shape)?;
    let half = 3f64.sqrt();
    Ok((0..count)
        .map(|_| {
            #[allow(clippy::cast_possible_truncation, reason = "noise")]
            let value = ((random.uniform() * 2.0 - 1.0) * half) as f32;
            value
        })
        .collect())
}

/// Which tokens of a prompt are images': text, images, text.
pub(super) fn places([before, after]: [usize; 2], images: usize) -> Result<Vec<bool>> {
    let tokens = before.saturating_add(images).saturating_add(after);
    if tokens > MOST_TOKENS {
        return Err(BenchError::Input(format!(
            "a prompt of {before} tokens of text, {images} of images and {after} of text is too long to be measured; \
             expected at most {MOST_TOKENS}"
        )));
    }
    let visual = before..before + images;
    Ok((0..tokens).map(|i| visual.contains(&i)).collect())
}

/// Token ids below `vocabulary` other than `not`.
pub(super) fn ids(
    random: &mut SplitMix64,
    count: usize,
    vocabulary: i64,
    not: Option<i64>,
) -> Vec<i64> {
    let below = vocabulary.max(1).unsigned_abs();
    let other = i64::from(not == Some(0)).min(vocabulary - 1).max(0);
    (0..count)
        .map(|_| {
            let id = random.below(below).cast_signed();
            if Some(id) == not { other } else { id }
        })
        .collect()
}

/// The last three dimensions of pixels, those that the input fixes; channels are 3 and the edges `size` where it does
/// not.
pub(super) fn pixel_size(port: &Port, size: Option<[usize; 2]>, model: &str) -> Result<[usize; 3]> {
    let fixed = |from_end: usize| {
        let at = port.dims.len().checked_sub(from_end)?;
        port.dims.get(at).and_then(Dim::fixed)
    };
    let edge = |from_end: usize, given: usize| {
        let given = size.map(|s| s[given]);
        fixed(from_end).or(given).ok_or_else(|| {
            BenchError::Input(format!(
                "{model}: `{}` {port} fixes no image size, and no preprocessor_config.json says one; give it with \
                 --image-size WIDTHxHEIGHT",
                port.name
            ))
        })
    };
    Ok([fixed(3).unwrap_or(3), edge(2, 0)?, edge(1, 1)?])
}

/// An image of random pixels.
pub(super) fn image(
    random: &mut SplitMix64,
    [channels, height, width]: [usize; 3],
) -> Result<Array3<f32>> {
    let data = noise(random, &[channels, height, width])?;
    Array3::from_shape_vec((channels, height, width), data)
        .map_err(|e| BenchError::Input(e.to_string()))
}

/// Patches in rows and columns, `merge` of them on the edge of a token: as many as the file fixes, else as an image of
/// `size` pixels has. `values` is the width of a patch's row, 3 · moments · edge².
pub(super) fn patch_grid(
    fixed: Option<usize>,
    values: usize,
    merge: usize,
    size: Option<[usize; 2]>,
) -> Result<[usize; 2]> {
    let merge = merge.max(1);
    if let Some(patches) = fixed {
        if patches > MOST_TOKENS {
            return Err(BenchError::Input(format!(
                "a vision encoder of {patches} patches cannot be measured; expected at most {MOST_TOKENS}"
            )));
        }
        let tokens = patches / (merge * merge);
        let [height, width] = near_square(tokens);
        return Ok([height * merge, width * merge]);
    }
    // Two frames of three channels in a patch (Qwen2-VL and Qwen2.5-VL).
    let edge = ((values / 6) as f64).sqrt() as usize;
    if edge == 0 {
        return Err(BenchError::Input(format!(
            "rows of {values} values are no patches of two frames of three channels; which image they are cut from \
             cannot be told"
        )));
    }
    // 24 × 24 tokens.
    let [height, width] = size.unwrap_or([24 * merge * edge; 2]);
    let whole = |pixels: usize| (pixels / edge / merge).max(1) * merge;
    Ok([whole(height), whole(width)])
}

/// The rows and columns of a grid of `tokens` tokens that is nearest to a square.
pub(super) fn near_square(tokens: usize) -> [usize; 2] {
    let tokens = tokens.max(1);
    let height = (1..=tokens.isqrt())
        .rev()
        .find(|h| tokens.is_multiple_of(*h));
    let height = height.unwrap_or(1);
    [height, tokens / height]
}

/// A grid for an image of which only the number of tokens is known.
pub(super) fn grid(tokens: usize) -> Grid {
    let [height, width] = near_square(tokens);
    Grid {
        time: 1,
        height,
        width,
    }
}

/// Embeddings `[1, tokens, width]`, with a last channel of zeros where it is a marker.
pub(super) fn embeddings(
    random: &mut SplitMix64,
    tokens: usize,
    width: usize,
    marker: bool,
    dtype: DType,
) -> Result<Tensor> {
    let mut data = noise(random, &[tokens, width])?;
    if marker {
        data.chunks_exact_mut(width.max(1)).for_each(|row| {
            row[width - 1] = 0.0;
        });
    }
    Ok(Tensor::new([1, tokens, width], data)?.cast_float(dtype)?)
}

/// Features `[rows, width]`, with a last channel of ones where it is a marker.
pub(super) fn features(
    random: &mut SplitMix64,
    rows: usize,
    width: usize,
    marker: bool,
) -> Result<Tensor> {
    let mut data = noise(random, &[rows, width])?;
    if marker {
        data.chunks_exact_mut(width.max(1)).for_each(|row| {
            row[width - 1] = 1.0;
        });
    }
    Ok(Tensor::new([rows, width], data)?)
}

/// One row of flags or ids.
pub(super) fn row<T: Clone>(values: &[T]) -> Array2<T> {
    Array2::from_shape_fn((1, values.len()), |(_, i)| values[i].clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_leave_the_placeholder_out() {
        let mut random = SplitMix64::new(1);
        let found = ids(&mut random, 500, 3, Some(0));
        assert!(found.iter().all(|id| (1..3).contains(id)), "{found:?}");
        assert!(
            ids(&mut random, 50, 3, Some(2))
                .iter()
                .all(|id| (0..2).contains(id))
        );
        assert_eq!(ids(&mut random, 4, 1, Some(0)), [0; 4], "there is no other");
    }

    #[test]
    fn grids_are_near_squares() {
        assert_eq!(near_square(576), [24, 24]);
        assert_eq!(near_square(12), [3, 4]);
        assert_eq!(near_square(7), [1, 7]);
        assert_eq!(near_square(2), [1, 2]);
        assert_eq!(patch_grid(None, 1176, 2, None).unwrap(), [48, 48]);
        assert_eq!(patch_grid(None, 1176, 2, Some([56, 90])).unwrap(), [4, 6]);
        assert_eq!(patch_grid(Some(48), 1176, 2, None).unwrap(), [6, 8]);
        assert!(patch_grid(None, 5, 2, None).is_err());
        assert!(patch_grid(Some(usize::MAX), 1176, 2, None).is_err());
    }

    #[test]
    fn marker_channels_tell_text_from_images() {
        let mut random = SplitMix64::new(1);
        let text = embeddings(&mut random, 2, 3, true, DType::F32).unwrap();
        let image = features(&mut random, 2, 3, true).unwrap();
        let last = |t: &Tensor| {
            t.f32s()
                .unwrap()
                .chunks(3)
                .map(|r| r[2])
                .collect::<Vec<_>>()
        };
        assert_eq!((last(&text), last(&image)), (vec![0.0; 2], vec![1.0; 2]));
        let noise = noise(&mut random, &[100, 100]).unwrap();
        let variance = noise.iter().map(|v| f64::from(v * v)).sum::<f64>() / 1e4;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn sizes_that_no_machine_holds_are_errors() {
        let mut random = SplitMix64::new(1);
        for shape in [&[1 << 31][..], &[1 << 40, 1 << 40, 2]] {
            let error = noise(&mut random, shape).unwrap_err().to_string();
            assert!(error.contains("too large"), "{error}");
            assert_eq!(volume(shape).unwrap_err().to_string(), error);
        }
        assert_eq!(
            places([1, 2], 3).unwrap(),
            [false, true, true, true, false, false]
        );
        assert!(places([usize::MAX, 2], 3).is_err() && places([1, 1], 1 << 25).is_err());
    }
}
