//! An encoder whose tower is not known: what is pruned has its features marked and nothing else.

use ndarray::{Array2, Ix2};

use super::scenario::{Frame, Seeded};
use super::tally::Tally;
use super::{ValidateError, probe};
use crate::arch::Encoder;
use crate::ir::Model;
use crate::runtime::{SessionOptions, Tensor, VisionEncoder};

/// The unmodified encoder and the rewritten one.
pub(super) struct PlainPair {
    base: VisionEncoder,
    run: VisionEncoder,
    frame: Frame,
}

impl PlainPair {
    pub(super) fn open(
        old: &Model,
        new: &Model,
        encoder: &Encoder,
        name: &str,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let frame = Frame::of_pixels(old, encoder.pixels, false);
        let frame = frame.ok_or_else(|| ValidateError::open_size(name))?;
        let run = probe::open_rewritten(new, name, options)?;
        Ok(Self {
            base: VisionEncoder::new(probe::open(old, name, options)?)?,
            run: VisionEncoder::new(run).map_err(ValidateError::of_rewritten)?,
            frame,
        })
    }

    /// Features of `images` random images, as they were and as the rewritten encoder gives them;
    /// `marked`: with a channel more.
    pub(super) fn see(
        &mut self,
        images: usize,
        rng: &mut Seeded,
        marked: bool,
        tally: &mut Tally,
    ) -> Result<Vec<(Array2<f32>, Tensor)>, ValidateError> {
        let mut seen = Vec::new();
        let at_once = self.frame.at_once(images);
        for _ in 0..images.checked_div(at_once).unwrap_or(0) {
            let pixels = self.frame.pixels(at_once, rng);
            let [_, h, w] = self.frame.size;
            let mask = self.base.takes_mask().then(|| rng.masks(at_once, h, w));
            let (plain, _) = self.base.run_with_outputs(pixels.clone(), mask.as_ref())?;
            let found = self.run.run_with_outputs(pixels, mask.as_ref());
            let (found, _) = found.map_err(ValidateError::Rewritten)?;
            for (want, found) in plain.iter().zip(found) {
                let want = want.to_array()?.into_dimensionality::<Ix2>();
                let want = want.map_err(|e| ValidateError::Model(e.to_string()))?;
                let kept = vec![false; want.nrows()];
                tally.features(&want, &found, marked.then_some(&kept))?;
                seen.push((want, found));
            }
        }
        Ok(seen)
    }
}
