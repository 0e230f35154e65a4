//! Intervals by a bootstrap over images.
//!
//! Questions about one image are not independent, so whole images are drawn, with replacement, as many as there are
//! (a cluster bootstrap). All models are measured on the same draws: what they have in common cancels out of a ratio
//! or a difference (a paired bootstrap). Intervals are the 2.5th and 97.5th percentile of the draws.
//!
//! Where every question of every draw is answered alike (all right, say) the interval has no width: the draws know
//! nothing of errors that were not made.

use crate::random::SplitMix64;
use crate::statistics::quantile;

/// Share of the draws within an interval.
pub const LEVEL: f64 = 0.95;

/// A number and where 95 % of the draws lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Of the questions as they are.
    pub value: f64,
    /// Lower and upper end; none for a single image.
    pub interval: Option<(f64, f64)>,
}

/// Where 95 % of some numbers lie.
pub fn interval(mut draws: Vec<f64>) -> Option<(f64, f64)> {
    draws.retain(|draw| draw.is_finite());
    if draws.is_empty() {
        return None;
    }
    draws.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    Some((quantile(&draws, tail), quantile(&draws, 1.0 - tail)))
}

/// What one image adds to one mean: how many questions, and for each model the sum of their scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Which mean.
    pub bucket: usize,
    /// Questions.
    pub count: f64,
    /// Sum of scores by model.
    pub sums: Vec<f64>,
}

/// Scores of several models on the same images. The statistic is a sum of means (`scale` times the sum over buckets
/// of Σ scores / Σ questions): with one bucket an accuracy, with MME's accuracies and accuracies+ as buckets its score.
#[derive(Debug, Clone)]
pub struct Sample {
    models: usize,
    buckets: usize,
    scale: f64,
    images: Vec<Vec<Cell>>,
}

impl Sample {
    /// Of `models` models, each cell with a sum for each.
    pub fn new(models: usize, buckets: usize, scale: f64) -> Self {
        Self {
            models,
            buckets,
            scale,
            images: Vec::new(),
        }
    }

    /// Adds an image.
    pub fn push(&mut self, cells: Vec<Cell>) {
        self.images.push(cells);
    }

    /// Images.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// The statistic of each model for the images that come out of `drawn`; a bucket that none of them has is as in
    /// `otherwise`.
    fn of(&self, drawn: impl Iterator<Item = usize>, otherwise: Option<&[f64]>) -> Vec<f64> {
        let width = self.models + 1;
        let mut totals = vec![0.0; self.buckets * width];
        for image in drawn {
            for cell in &self.images[image] {
                let total = &mut totals[cell.bucket * width..(cell.bucket + 1) * width];
                total[self.models] += cell.count;
                for (total, sum) in total.iter_mut().zip(&cell.sums) {
                    *total += sum;
                }
            }
        }
        (0..self.models)
            .map(|model| {
                let means = (0..self.buckets).map(|bucket| {
                    let total = &totals[bucket * width..(bucket + 1) * width];
                    match (total[self.models] > 0.0, otherwise) {
                        (true, _) => total[model] / total[self.models],
                        (false, Some(usual)) => usual[bucket * self.models + model],
                        (false, None) => 0.0,
                    }
                });
                self.scale * means.sum::<f64>()
            })
            .collect()
    }

    /// The statistic of each model.
    pub fn values(&self) -> Vec<f64> {
        self.of(0..self.images.len(), None)
    }

    /// The statistic of each model in each draw: `[draw][model]`. None for a single image, which tells nothing of
    /// others.
    pub fn draws(&self, resamples: usize, seed: u64) -> Vec<Vec<f64>> {
        let images = self.images.len();
        if images < 2 {
            return Vec::new();
        }
        let usual: Vec<f64> = (0..self.buckets).flat_map(|b| self.means(b)).collect();
        let mut random = SplitMix64::new(seed);
        (0..resamples)
            .map(|_| {
                let drawn = (0..images).map(|_| random.below(images as u64) as usize);
                self.of(drawn, Some(&usual))
            })
            .collect()
    }

    fn means(&self, bucket: usize) -> Vec<f64> {
        let cells = || self.images.iter().flatten().filter(|c| c.bucket == bucket);
        let count: f64 = cells().map(|c| c.count).sum();
        (0..self.models)
            .map(|model| cells().map(|c| c.sums[model]).sum::<f64>() / count.max(1.0))
            .collect()
    }
}

/// Statistics of models, of their ratio to the first, and of their differences, with intervals from the same draws.
#[derive(Debug, Clone)]
pub struct Compared {
    values: Vec<f64>,
    draws: Vec<Vec<f64>>,
}

impl Compared {
    /// Draws.
    pub fn new(sample: &Sample, resamples: usize, seed: u64) -> Self {
        Self {
            values: sample.values(),
            draws: sample.draws(resamples, seed),
        }
    }

    fn estimate(&self, of: impl Fn(&[f64]) -> f64) -> Estimate {
        Estimate {
            value: of(&self.values),
            interval: interval(self.draws.iter().map(|draw| of(draw)).collect()),
        }
    }

    /// A model's statistic.
    pub fn value(&self, model: usize) -> Estimate {
        self.estimate(|v| v[model])
    }

    /// A model's statistic over the first one's; none if that is 0. (A draw in which it is 0 is left out.)
    pub fn kept(&self, model: usize) -> Option<Estimate> {
        let first = *self.values.first()?;
        (first != 0.0).then(|| self.estimate(|v| v[model] / v[0]))
    }

    /// A model's statistic minus another's, over the first one's; none if that is 0.
    pub fn kept_more(&self, model: usize, other: usize) -> Option<Estimate> {
        let first = *self.values.first()?;
        (first != 0.0).then(|| self.estimate(|v| (v[model] - v[other]) / v[0]))
    }
}

#[cfg(test)]
mod tests;
