//! Clips for encoders that take rows of patches: which frames are taken, and how far apart in time they are.
//!
//! Two moments make a patch, so a clip of n frames is a grid of n / 2. Qwen2.5-VL numbers its rows by time: so many
//! positions for a second (`tokens_per_second`); Qwen2-VL counts them.
//!
//! Source: Transformers 5.22, `sample_frames` of `models/qwen2_vl/video_processing_qwen2_vl.py` (there done where a
//! client asks for a rate), `_process_videos` of `models/qwen2_5_vl/processing_qwen2_5_vl.py`.

use std::path::Path;

use serde_json::Value as Json;

use super::super::error::Result;
use super::super::grid::Block;
use super::super::image::{Patches, read_json};
use super::{Clip, ClipProcessor};

/// Frames of a second that are taken where nothing says another number: what Qwen's own tools take.
const RATE: f64 = 2.0;
/// Fewest and most frames of a clip.
const FEWEST: usize = 4;
const MOST: usize = 768;
/// What a second is worth where a Qwen2.5-VL's configuration does not say.
const TOKENS_PER_SECOND: f64 = 4.0;

/// How the clips of such a model are prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchClips {
    /// What is done to frames.
    pub processor: ClipProcessor,
    /// Positions for a second, of models that number by time.
    pub tokens_per_second: Option<f64>,
    /// Frames in a patch.
    moments: usize,
}

impl PatchClips {
    /// Reads `video_preprocessor_config.json` and `config.json`. `None` if frames are not cut into patches.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let processor = ClipProcessor::from_dir(dir)?;
        let Some(moments) = processor.images.moments() else {
            return Ok(None);
        };
        let config = read_json(&dir.join("config.json"))?.unwrap_or(Json::Null);
        let stated = config
            .pointer("/vision_config/tokens_per_second")
            .and_then(Json::as_f64);
        let timed = config["model_type"] == "qwen2_5_vl";
        Ok(Some(Self {
            processor,
            tokens_per_second: stated.or(timed.then_some(TOKENS_PER_SECOND)),
            moments,
        }))
    }

    /// Which of `total` frames to take.
    pub fn choose(&self, total: usize, seconds: Option<f64>) -> Vec<usize> {
        if total == 0 {
            return Vec::new();
        }
        let whole = |n: usize| n / self.moments * self.moments;
        let wanted = match (self.processor.frames, seconds) {
            (Some(frames), _) => {
                let turns = (frames as f64 / self.moments as f64).round_ties_even();
                turns as usize * self.moments
            }
            (None, Some(seconds)) => {
                let wanted = seconds * self.processor.rate.unwrap_or(RATE);
                let most = whole(MOST.min(total)) as f64;
                whole(wanted.max(FEWEST as f64).min(most) as usize)
            }
            // A folder is what a client has chosen.
            (None, None) => total.min(MOST),
        };
        let count = wanted.clamp(1, total);
        let step = total as f64 / count as f64;
        let at = |i: usize| (((i as f64 * step) as f32) as usize).min(total - 1);
        (0..count).map(at).collect()
    }

    /// Rows of patches of a clip.
    ///
    /// # Errors
    /// A frame cannot be resized, or frames differ in size.
    pub fn patches(&self, clip: &Clip) -> Result<Patches> {
        self.processor.images.patches(&clip.frames)
    }

    /// The tokens of a clip with the times that its frames have. A clip of which no time is known is taken for one
    /// whose patches are a second long.
    pub fn timed(&self, block: Block, clip: &Clip) -> Block {
        let Some(each) = self.tokens_per_second else {
            return block;
        };
        let seconds = match clip.seconds {
            Some(seconds) => self.moments as f64 * seconds / clip.frames.len().max(1) as f64,
            None => 1.0,
        };
        Block {
            interval: (each * seconds) as f32,
            ..block
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::runtime::grid::Grid;
    use crate::runtime::image::ImageProcessor;

    fn clips(frames: Option<usize>, rate: Option<f64>) -> PatchClips {
        let config = json!({"video_processor_type": "Qwen2VLVideoProcessor"});
        let images = ImageProcessor::from_json(&config, Path::new("video.json")).unwrap();
        PatchClips {
            moments: images.moments().unwrap(),
            processor: ClipProcessor {
                images,
                frames,
                rate,
            },
            tokens_per_second: Some(2.0),
        }
    }

    /// Transformers' `Qwen2VLVideoProcessor.sample_frames` for the same clips.
    #[test]
    fn frames_are_chosen_by_number_or_by_time() {
        let by_number = clips(Some(7), None);
        assert_eq!(by_number.choose(20, None), [0, 2, 5, 7, 10, 12, 15, 17]);
        assert_eq!(by_number.choose(3, Some(1.0)), [0, 1, 2]);
        let by_time = clips(None, None);
        // 20 frames at 10 a second: 2 seconds, 2 frames of each.
        assert_eq!(by_time.choose(20, Some(2.0)), [0, 5, 10, 15]);
        assert_eq!(clips(None, Some(4.0)).choose(20, Some(2.0)).len(), 8);
        assert_eq!(by_time.choose(3, Some(0.1)), [0, 1], "whole patches");
        assert_eq!(by_time.choose(5000, Some(900.0)).len(), 768);
        assert_eq!(by_time.choose(1, Some(0.1)), [0]);
        assert_eq!(by_time.choose(5, None), [0, 1, 2, 3, 4]);
        assert!(by_time.choose(0, None).is_empty());
    }

    #[test]
    fn positions_follow_time() {
        let grid = Grid {
            time: 2,
            height: 1,
            width: 1,
        };
        let mut clips = clips(None, None);
        let pixels = super::super::Pixels::new(1, 1, vec![0; 3]).unwrap();
        let mut clip = Clip::from(vec![pixels; 4]);
        assert_eq!(clips.timed(grid.into(), &clip).interval, 2.0);
        // Four frames of three seconds: a patch is one and a half.
        clip.seconds = Some(3.0);
        assert_eq!(clips.timed(grid.into(), &clip).interval, 3.0);
        clips.tokens_per_second = None;
        assert_eq!(clips.timed(grid.into(), &clip).interval, 1.0);
    }
}
