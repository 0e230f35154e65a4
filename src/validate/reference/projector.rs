//! The unmodified projector, run on fewer tokens than it was exported for.

use ndarray::{Array3, Axis, s};

use super::super::{ValidateError, probe};
use super::vision::per_image;
use crate::arch::VisionTower;
use crate::ir::{DataType, Dim, Model, ValueType, consts, extract};
use crate::runtime::{DType, Session, SessionOptions, Tensor, Value};

/// What lies between a tower's tokens and the features.
#[derive(Debug)]
pub(super) struct Projector {
    session: Session,
    entry: String,
    /// Tokens of an image that an exporter or optimiser wrote into the shapes, if one did: it is
    /// given as many, and what was not asked is left out of the answer. (It works on each by
    /// itself: towers whose projector does not are refused.)
    baked: Option<usize>,
}

impl Projector {
    pub(super) fn open(
        model: &Model,
        tower: &VisionTower,
        end: crate::ir::ValueId,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let unknown = |rank| vec![Dim::Unknown; rank];
        let entry = ValueType::tensor(tower.dtype, unknown(3));
        let dtype = model.value(end).ty.as_ref().and_then(|t| t.dtype());
        let features = ValueType::Tensor {
            dtype: dtype.unwrap_or(DataType::Float),
            shape: (!tower.video).then(|| unknown(3)),
        };
        let part = extract(model, &[(tower.entry, entry)], &[(end, features)])?;
        let count = tower.features_per_image().filter(|_| !tower.video);
        let states = |node: &crate::ir::NodeId| {
            let node = part.node(*node);
            let target = node.input(1).filter(|_| node.is("Reshape"));
            let dims = target.and_then(|t| consts::ints(&part, t));
            // The last is the width, which may happen to be the same number.
            dims.is_some_and(|d| {
                d.split_last()
                    .is_some_and(|(_, rows)| rows.iter().any(|n| Some(*n) == count))
            })
        };
        let baked = part.graph().nodes.iter().any(states);
        Ok(Self {
            session: probe::open(&part, "reference projector", options)?,
            entry: model.name(tower.entry).to_owned(),
            baked: count.filter(|_| baked).and_then(|n| n.try_into().ok()),
        })
    }

    /// What becomes of `tokens` `[images, K, width]`, computed in `dtype`.
    pub(super) fn run(
        &mut self,
        tokens: Array3<f32>,
        dtype: DType,
    ) -> Result<Value, ValidateError> {
        let Some(baked) = self.baked.filter(|n| *n > 0 && tokens.dim().1 > 0) else {
            return self.project(tokens, dtype);
        };
        let (images, count, _) = tokens.dim();
        let mut pieces = Vec::new();
        for from in (0..count).step_by(baked) {
            // Filled up with tokens that are there: quantised layers scale by the largest.
            let rows: Vec<usize> = (from..from + baked).map(|i| i.min(count - 1)).collect();
            let all = self.project(tokens.select(Axis(1), &rows), dtype)?;
            let asked = baked.min(count - from);
            let each = per_image(&all, images)?;
            let each: Vec<_> = each.iter().map(|f| f.slice(s![..asked, ..])).collect();
            pieces.push(ndarray::stack(Axis(0), &each).map_err(shaped)?);
        }
        let pieces: Vec<_> = pieces.iter().map(|p| p.view()).collect();
        let all = ndarray::concatenate(Axis(1), &pieces).map_err(shaped)?;
        Ok(Value::new(Tensor::from(all))?)
    }

    fn project(&mut self, tokens: Array3<f32>, dtype: DType) -> Result<Value, ValidateError> {
        let tokens = Value::new(Tensor::from(tokens).cast_float(dtype)?)?;
        let out = self.session.run(&[(&self.entry, &tokens)])?;
        Ok(Value::new(out.first()?.to_tensor()?)?)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn shaped(error: ndarray::ShapeError) -> ValidateError {
    ValidateError::Model(error.to_string())
}
