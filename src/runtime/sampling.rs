//! Choosing the next token from logits.

use crate::random::SplitMix64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The largest logit; the lowest id wins a tie.
    #[default]
    Greedy,
    /// At random. The limits apply in the order of Transformers: temperature, then `top_k`, then `top_p`.
    Random {
        /// Divides the logits; above 0. Below 1 sharpens, above 1 flattens.
        temperature: f32,
        /// Only the k most likely tokens; 0 for all.
        top_k: usize,
        /// Only the most likely tokens that together reach this probability; 1 for all.
        top_p: f32,
        /// Start of the random sequence; the same seed gives the same tokens.
        seed: u64,
    },
}

/// Chooses tokens one after the other.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
}

impl Sampler {
    /// Starts a sequence.
    pub fn new(sampling: Sampling) -> Self {
        let seed = match sampling {
            Sampling::Greedy => 0,
            Sampling::Random { seed, .. } => seed,
        };
        let random = SplitMix64::new(seed);
        Self { sampling, random }
    }

    /// The next token's id; `None` if there are no logits or one is NaN.
    pub fn pick(&mut self, logits: &[f32]) -> Option<usize> {
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        match self.sampling {
            Sampling::Random {
                temperature,
                top_k,
                top_p,
                ..
            } if temperature > 0.0 => {
                let uniform = self.random.uniform();
                Some(draw(logits, temperature, top_k, top_p, uniform))
            }
            _ => Some(argmax(logits)),
        }
    }
}

fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best
}

fn draw(logits: &[f32], temperature: f32, top_k: usize, top_p: f32, uniform: f64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Stable, so equal logits stay in the order of their ids.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if top_k > 0 {
        order.truncate(top_k);
    }
    let largest = f64::from(logits[order[0]]);
    if !largest.is_finite() {
        return order[0];
    }
    let temperature = f64::from(temperature);
    let mut weights: Vec<f64> = order
        .iter()
        .map(|&i| ((f64::from(logits[i]) - largest) / temperature).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut reached = 0.0;
    // The token that crosses the line still counts, so at least one does.
    let kept = weights.iter().position(|weight| {
        reached += weight;
        reached >= f64::from(top_p) * total
    });
    weights.truncate(kept.map_or(weights.len(), |last| last + 1));
    let mut left = uniform * weights.iter().sum::<f64>();
    for (&id, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    order[weights.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling::Random {
            temperature,
            top_k,
            top_p,
            seed,
        })
    }

    /// How often each token comes in 20,000 draws.
    fn shares(mut sampler: Sampler, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..20_000 {
            counts[sampler.pick(logits).unwrap()] += 1;
        }
        counts
            .into_iter()
            .map(|count| f64::from(count) / 20_000.0)
            .collect()
    }

    fn close(found: &[f64], expected: &[f64]) {
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 0.015, "{found:?} {expected:?}");
        }
    }

    /// Logits of probabilities 0.2, 0.5, 0.3, up to a constant.
    const LOGITS: [f32; 3] = [0.0, 0.916_290_7, 0.405_465_1];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(Sampling::Greedy);
        assert_eq!(sampler.pick(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(sampler.pick(&[f32::NEG_INFINITY; 2]), Some(0));
        assert_eq!(sampler.pick(&[0.0, f32::NAN]), None);
        assert_eq!(sampler.pick(&[]), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        close(&shares(random(1.0, 0, 1.0, 1), &LOGITS), &[0.2, 0.5, 0.3]);
        // Half the temperature squares the probabilities.
        let total = 0.04 + 0.25 + 0.09;
        close(
            &shares(random(0.5, 0, 1.0, 2), &LOGITS),
            &[0.04 / total, 0.25 / total, 0.09 / total],
        );
    }

    #[test]
    fn limits_cut_the_tail() {
        close(
            &shares(random(1.0, 2, 1.0, 3), &LOGITS),
            &[0.0, 0.625, 0.375],
        );
        close(
            &shares(random(1.0, 0, 0.7, 4), &LOGITS),
            &[0.0, 0.625, 0.375],
        );
        close(&shares(random(1.0, 0, 0.1, 5), &LOGITS), &[0.0, 1.0, 0.0]);
        close(&shares(random(1.0, 1, 0.0, 5), &LOGITS), &[0.0, 1.0, 0.0]);
    }

    #[test]
    fn a_seed_fixes_the_sequence() {
        let sequence = |seed| -> Vec<_> {
            let mut sampler = random(1.0, 0, 1.0, seed);
            (0..50).map(|_| sampler.pick(&LOGITS)).collect()
        };
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
        assert_eq!(random(0.0, 0, 1.0, 1).pick(&LOGITS), Some(1));
        assert_eq!(random(1.0, 0, 1.0, 1).pick(&[0.0, f32::INFINITY]), Some(1));
    }
}
