//! What an opened-up encoder gives besides features.

use super::super::error::{Result, RuntimeError};
use super::super::session::Outputs;
use super::super::value::Value;

/// The outputs of a vision encoder other than its features, for one of the images that a run was about. Most models
/// have none as they were exported; one that was [opened up](super::super::probe) has what was asked for.
#[derive(Debug, Clone, Default)]
pub struct Inside {
    outputs: Vec<(String, Value)>,
    image: usize,
    images: usize,
}

impl Inside {
    /// Of each of `images` images that a run gave `outputs` for, of which `features` is the name of those.
    pub(in crate::runtime) fn of(outputs: Outputs, features: &str, images: usize) -> Vec<Self> {
        let mut outputs = outputs.into_vec();
        outputs.retain(|(name, _)| name != features);
        Self::of_run(&outputs, images)
    }

    /// Of each of the `images` images of a run that gave these outputs.
    pub fn of_run(outputs: &[(String, Value)], images: usize) -> Vec<Self> {
        let of = |image| Self {
            outputs: outputs.to_vec(),
            image,
            images,
        };
        (0..images).map(of).collect()
    }

    /// An output of the run, of all its images.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|o| &o.1)
    }

    /// What an output of whole numbers `[images · n, width]` says of this image, the elements of the run's images one
    /// after the other: `[n, width]`. `None` if there is no such output.
    ///
    /// # Errors
    /// It is no table of whole numbers, or cannot be divided among the images.
    pub fn integers(&self, name: &str) -> Result<Option<Vec<Vec<i64>>>> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        let tensor = value.to_tensor()?;
        let [rows, width] = match *tensor.shape() {
            [rows, width] if rows.is_multiple_of(self.images.max(1)) => [rows, width],
            _ => {
                return Err(RuntimeError::Tensor(format!(
                    "'{name}' is {tensor}; expected as many rows for each of {} images",
                    self.images
                )));
            }
        };
        let each = rows / self.images.max(1);
        let all = tensor.i64s()?;
        let row = |r: usize| all[r * width..(r + 1) * width].to_vec();
        let own = self.image * each..(self.image + 1) * each;
        Ok(Some(own.map(row).collect()))
    }
}
