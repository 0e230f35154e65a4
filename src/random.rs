//! Reproducible random numbers.

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same numbers from the same seed on every machine and in every
/// version of any library.
#[derive(Clone, Debug)]
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// Starts a sequence.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`: ⌊bits · bound / 2⁶⁴⌋ (its bias is below `bound` / 2⁶⁴).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        #[allow(clippy::cast_possible_truncation, reason = "it is below the bound")]
        let scaled = ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64;
        scaled
    }

    /// Uniform in 0..1, 53 bits.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published sequences from 0 and from 1234567, as the reference implementation's tests have them.
    #[test]
    fn numbers_are_those_of_the_published_generator() {
        let first = |seed| {
            let mut random = SplitMix64::new(seed);
            [random.bits(), random.bits(), random.bits()]
        };
        let from_zero = [
            0xe220_a839_7b1d_cdaf,
            0x6e78_9e6a_a1b9_65f4,
            0x06c4_5d18_8009_454f,
        ];
        assert_eq!(first(0), from_zero);
        let from_far = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(first(1_234_567), from_far);
    }

    #[test]
    fn bounded_numbers_are_the_upper_bits_of_a_product() {
        let mut random = SplitMix64::new(42);
        let below: Vec<u64> = (0..12).map(|_| random.below(10)).collect();
        assert_eq!(below, [7, 1, 2, 3, 0, 8, 2, 8, 3, 6, 2, 4]);
        let mut random = SplitMix64::new(1_234_567);
        // (z · (2⁶⁴ − 1)) ≫ 64 is z − 1, or 0.
        assert_eq!(random.below(u64::MAX), 6_457_827_717_110_365_316);
    }
}
