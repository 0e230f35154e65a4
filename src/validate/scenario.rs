//! What is asked of both models: seeded prompts and images of every kind that
//! a client may send.

use ndarray::{Array2, Array3, Array4, Array5, s};

use crate::arch::VisionTower;
use crate::ir::{Dim, Model, ValueId};
use crate::random::SplitMix64;
use crate::runtime::Tensor;

use crate::runtime::Grid;

/// One turn of a conversation: text before, between and after images.
#[derive(Clone, Debug)]
pub struct Turn {
    /// For each row: segments of text (token ids) around its images, so one more
    /// than it has images.
    pub rows: Vec<Vec<Vec<i64>>>,
}

impl Turn {
    /// Images of each row.
    pub fn images(&self) -> Vec<usize> {
        self.rows
            .iter()
            .map(|segments| segments.len() - 1)
            .collect()
    }
}

/// A conversation.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is.
    pub name: &'static str,
    /// Turns; each is followed by decode steps.
    pub turns: Vec<Turn>,
    /// Decode steps after each turn.
    pub decode: usize,
}

impl Scenario {
    /// Whether a row is shorter than another, and so padded on the left (images
    /// have the same number of features each).
    pub fn padded(&self) -> bool {
        let length = |row: &Vec<Vec<i64>>| (row.len(), row.iter().map(Vec::len).sum::<usize>());
        self.turns.iter().any(|turn| {
            let mut lengths = turn.rows.iter().map(length);
            let first = lengths.next();
            lengths.any(|other| Some(other) != first)
        })
    }
}

/// Reproducible inputs (SplitMix64): the scenarios have to be the same on every machine and in every version of any
/// library.
#[derive(Clone, Debug)]
pub struct Seeded(SplitMix64);

impl Seeded {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0.bits()
    }

    /// Uniform in 0..1.
    pub fn uniform(&mut self) -> f64 {
        self.0.uniform()
    }

    /// Standard normal (Box–Muller).
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (self.uniform().max(1e-300), self.uniform());
        #[allow(clippy::cast_possible_truncation, reason = "noise")]
        let value = ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32;
        value
    }

    /// `count` token ids below `vocabulary`.
    pub fn ids(&mut self, count: usize, vocabulary: i64) -> Vec<i64> {
        let below = vocabulary.max(1).unsigned_abs();
        (0..count).map(|_| (self.bits() % below) as i64).collect()
    }

    /// Which pixels of `n` images are not padding, `[n, height, width]`: a corner of
    /// at least half of each edge, as a processor leaves it that pads below and to
    /// the right.
    pub fn masks(&mut self, n: usize, height: usize, width: usize) -> Array3<u8> {
        let mut masks = Array3::zeros((n, height, width));
        for mut image in masks.outer_iter_mut() {
            let mut part = |edge: usize| edge - (self.uniform() * edge as f64 / 2.0) as usize;
            let (h, w) = (part(height), part(width));
            image.slice_mut(s![..h, ..w]).fill(1);
        }
        masks
    }

    /// Images of smooth blobs and noise, normalised: `[n, channels, height, width]`.
    pub fn images(
        &mut self,
        n: usize,
        channels: usize,
        height: usize,
        width: usize,
    ) -> Array4<f32> {
        let mut waves = Vec::new();
        for _ in 0..n * channels * 4 {
            let f = [
                self.uniform() * 9.0,
                self.uniform() * 9.0,
                self.uniform() * 6.3,
            ];
            #[allow(clippy::cast_possible_truncation, reason = "noise")]
            waves.push(f.map(|x| x as f32));
        }
        Array4::from_shape_fn((n, channels, height, width), |(i, c, y, x)| {
            let (u, v) = (x as f32 / width as f32, y as f32 / height as f32);
            let smooth: f32 = (0..4)
                .map(|k| {
                    let [a, b, p] = waves[(i * channels + c) * 4 + k];
                    (a * u + b * v + p).sin()
                })
                .sum();
            smooth * 0.7 + self.normal() * 0.5
        })
    }
}

/// What an encoder takes: its pixels are random ones of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Frames of a clip; none for images.
    pub frames: Option<usize>,
    /// Channels, height, width.
    pub size: [usize; 3],
    /// Whether the file takes one at a time.
    pub alone: bool,
}

impl Frame {
    /// The size that a tower's file fixes; `None` if it fixes none. Clips of any number of
    /// frames have three.
    pub fn of(model: &Model, tower: &VisionTower) -> Option<Self> {
        Self::of_pixels(model, tower.pixels, tower.video)
    }

    /// The size that the file fixes of an input of pixels; `video`: of clips.
    pub fn of_pixels(model: &Model, pixels: ValueId, video: bool) -> Option<Self> {
        let shape = model.value(pixels).ty.as_ref()?.shape()?;
        let known = |n: &Dim| n.known().and_then(|n| usize::try_from(n).ok());
        let [.., channels, height, width] = shape else {
            return None;
        };
        // Of clips the first axis counts clips; crops of an image are laid out as images.
        let counts = if video {
            0
        } else {
            shape.len().checked_sub(4)?
        };
        Some(Self {
            // Crops of an image are no frames.
            frames: video.then(|| known(&shape[1]).unwrap_or(3)),
            size: [known(channels).unwrap_or(3), known(height)?, known(width)?],
            alone: known(&shape[counts]) == Some(1),
        })
    }

    /// How many are given to the encoder in each run, of `n` in all.
    pub fn at_once(self, n: usize) -> usize {
        if self.alone { n.min(1) } else { n }
    }

    /// Pixels of `n` images or clips.
    pub fn pixels(self, n: usize, rng: &mut Seeded) -> Tensor {
        let [c, h, w] = self.size;
        match self.frames {
            None => rng.images(n, c, h, w).into(),
            Some(frames) => {
                let all = rng.images(n * frames, c, h, w);
                Tensor::from(Array5::from_shape_fn(
                    (n, frames, c, h, w),
                    |(i, f, c, y, x)| all[[i * frames + f, c, y, x]],
                ))
            }
        }
    }
}

/// The standard set, for a model whose ids run below `vocabulary`.
pub fn standard(vocabulary: i64, seed: u64) -> Vec<Scenario> {
    let mut rng = Seeded::new(seed);
    let mut turn = |rows: &[&[usize]]| Turn {
        rows: rows
            .iter()
            .map(|lengths| lengths.iter().map(|&n| rng.ids(n, vocabulary)).collect())
            .collect(),
    };
    let single = |name, turn| Scenario {
        name,
        turns: vec![turn],
        decode: 3,
    };
    vec![
        single("one image", turn(&[&[5, 9]])),
        single("two images", turn(&[&[3, 4, 7]])),
        single("image at the end", turn(&[&[6, 0]])),
        single("no image", turn(&[&[8]])),
        single(
            "batch of two, padded on the left",
            turn(&[&[5, 9], &[2, 4]]),
        ),
        single(
            "batch with one and two images",
            turn(&[&[4, 6], &[3, 2, 5]]),
        ),
        single("batch with a text-only row", turn(&[&[4, 6], &[7]])),
        Scenario {
            name: "a second question on the same cache",
            turns: vec![turn(&[&[5, 9]]), turn(&[&[6]])],
            decode: 2,
        },
        Scenario {
            name: "a second image on the same cache",
            turns: vec![turn(&[&[5, 9]]), turn(&[&[4, 6]])],
            decode: 2,
        },
        single(
            "batch of two rows of one length",
            turn(&[&[5, 9], &[3, 11]]),
        ),
    ]
}

/// A grid of `tokens` tokens for the image with that number: images take the grids
/// that there are in turn, those with several rows and columns first.
pub fn grid(tokens: usize, image: usize) -> Grid {
    let divisors = |n: usize| (1..=n).filter(move |d| n.is_multiple_of(*d));
    let all = |least: usize| -> Vec<Grid> {
        let frames = divisors(tokens).filter(|t| *t <= 2);
        let grids = frames.flat_map(|time| {
            divisors(tokens / time).map(move |height| Grid {
                time,
                height,
                width: tokens / time / height,
            })
        });
        grids
            .filter(|g| g.height >= least && g.width >= least)
            .collect()
    };
    let mut grids = all(2);
    if grids.is_empty() {
        grids = all(1);
    }
    let none = Grid {
        time: 0,
        height: 0,
        width: 0,
    };
    grids
        .get(image % grids.len().max(1))
        .copied()
        .unwrap_or(none)
}

/// A turn laid out for the decoder, given the features of each image.
#[derive(Clone, Debug)]
pub struct Layout {
    /// `[b, L]`; image positions hold 0.
    pub ids: Array2<i64>,
    /// `[b, L]`: true at image positions.
    pub visual: Array2<bool>,
    /// `[b, L]`: 0 for padding on the left.
    pub mask: Array2<i64>,
    /// For every image position in row-major order: (image, row of its features).
    pub source: Vec<(usize, usize)>,
}

/// Lays a turn out; `features` are the rows of each image, images counted over
/// all rows in order.
pub fn lay_out(turn: &Turn, features: &[usize]) -> Layout {
    // None stands for one visual token.
    let mut image = 0;
    let mut rows: Vec<Vec<Option<i64>>> = Vec::new();
    let mut source = Vec::new();
    for segments in &turn.rows {
        let mut row: Vec<Option<i64>> = segments[0].iter().map(|id| Some(*id)).collect();
        for text in &segments[1..] {
            for feature in 0..features[image] {
                row.push(None);
                source.push((image, feature));
            }
            image += 1;
            row.extend(text.iter().map(|id| Some(*id)));
        }
        rows.push(row);
    }
    let length = rows.iter().map(Vec::len).max().unwrap_or(0);
    let shape = (rows.len(), length);
    let (mut ids, mut visual) = (Array2::zeros(shape), Array2::from_elem(shape, false));
    let mut mask = Array2::zeros(shape);
    for (r, row) in rows.iter().enumerate() {
        let pad = length - row.len();
        for (i, token) in row.iter().enumerate() {
            mask[[r, pad + i]] = 1;
            match token {
                Some(id) => ids[[r, pad + i]] = *id,
                None => visual[[r, pad + i]] = true,
            }
        }
    }
    Layout {
        ids,
        visual,
        mask,
        source,
    }
}
