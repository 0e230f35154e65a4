//! Tower, oracle merge, projector.

use ndarray::{Array2, Array3, Axis, s};

use super::super::oracle::{self, MergeInput, MergeParams, Merged};
use super::super::{ValidateError, probe};
use super::projection::Probes;
use super::ties::{Ranking, reordered};
use crate::arch::VisionTower;
use crate::ir::{DataType, Dim, Model, ValueType, extract};
use crate::passes::{Cls, Count, Selector, TokenMerge};
use crate::runtime::{Session, SessionOptions, Tensor, Value};

/// What the reference gives for a batch of images.
#[derive(Debug)]
pub struct ReferenceFeatures {
    /// One `[K, D]` for each image.
    pub features: Vec<Array2<f32>>,
    /// What the merge chose, for each image; empty without a merge.
    pub merged: Vec<Merged>,
    /// Tokens that changed places because their scores tie as well as exactly.
    pub near_ties: usize,
}

/// The unmodified vision encoder, opened up at the tower's end.
#[derive(Debug)]
pub struct ReferenceVision {
    tower: VisionTower,
    session: Session,
    names: Names,
    probes: Probes,
    merge: Option<(MergeParams, Session)>,
}

#[derive(Debug)]
struct Names {
    pixels: String,
    features: String,
    hidden: String,
    entry: String,
}

impl ReferenceVision {
    /// Opens the base vision encoder for a recipe's merge (`None`: it has none).
    ///
    /// # Errors
    /// The model cannot be opened.
    pub fn open(
        model: &Model,
        tower: &VisionTower,
        merge: Option<&TokenMerge>,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let (probed, probes) = Probes::new(model, tower, &[tower.hidden])?;
        let session = probe::open(&probed, "reference vision encoder", options)?;
        let merge = match merge {
            None => None,
            Some(merge) => {
                let unknown = |rank| vec![Dim::Unknown; rank];
                let entry = ValueType::tensor(tower.dtype, unknown(3));
                let dtype = model
                    .value(tower.features)
                    .ty
                    .as_ref()
                    .and_then(|t| t.dtype());
                let features = ValueType::tensor(dtype.unwrap_or(DataType::Float), unknown(3));
                let part = extract(
                    model,
                    &[(tower.entry, entry)],
                    &[(tower.features, features)],
                )?;
                let projector = probe::open(&part, "reference projector", options)?;
                Some((params(merge, tower)?, projector))
            }
        };
        let name = |v| model.name(v).to_owned();
        Ok(Self {
            names: Names {
                pixels: name(tower.pixels),
                features: name(tower.features),
                hidden: name(tower.hidden),
                entry: name(tower.entry),
            },
            tower: tower.clone(),
            session,
            probes,
            merge,
        })
    }

    /// Features of `[n, C, H, W]` pixels. Where `ranking` orders tokens otherwise
    /// than the oracle only by near-ties, it is followed.
    ///
    /// # Errors
    /// The run fails or the tower gives something else than it was recognised as.
    pub fn features(
        &mut self,
        pixels: Tensor,
        ranking: Option<Ranking<'_>>,
    ) -> Result<ReferenceFeatures, ValidateError> {
        let dtype = self.session.input(&self.names.pixels).and_then(|p| p.dtype);
        let pixels = match dtype.filter(|d| d.is_float()) {
            Some(dtype) => pixels.cast_float(dtype)?,
            None => pixels,
        };
        let pixels = Value::new(pixels)?;
        let images = pixels.shape()[0];
        let out = self.session.run(&[(&self.names.pixels, &pixels)])?;
        let Some((params, projector)) = &mut self.merge else {
            let features = out.get(&self.names.features)?;
            return Ok(ReferenceFeatures {
                features: per_image(features, images)?,
                merged: Vec::new(),
                near_ties: 0,
            });
        };
        let hidden = rank3(out.get(&self.names.hidden)?)?;
        let (_, tokens, _) = hidden.dim();
        let (query, key) = self.probes.heads(&out, &self.tower, images, tokens)?;
        let masks = self.probes.masks(&out, &self.tower, images, tokens)?;
        #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
        let scale = self.tower.site.scale() as f32;
        let (mut tokens, mut merged, mut near_ties) = (Vec::new(), Vec::new(), 0);
        for image in 0..images {
            let input = MergeInput {
                hidden: hidden.index_axis(Axis(0), image),
                query: query[image].view(),
                key: key[image].view(),
                scale,
                mask: masks.as_ref().map(|m| m[image].view()),
            };
            let mut choice = oracle::merge(&input, params)?;
            let found = ranking.and_then(|r| Some((r.scores.get(image)?, r.tolerance)));
            if let Some((found, tolerance)) = found {
                let first = choice.dominant.len() + choice.pool.len();
                let moved = reordered(&choice.scores, found, first, tolerance);
                if let Some(moved @ 1..) = moved {
                    near_ties += moved;
                    choice = oracle::merge_by(&input, found.clone(), params)?;
                }
            }
            tokens.push(choice.tokens.clone().insert_axis(Axis(0)));
            merged.push(choice);
        }
        // All images at once, as the rewritten encoder does it: quantised layers
        // scale by what is in the batch.
        let views: Vec<_> = tokens.iter().map(|t| t.view()).collect();
        let tokens = ndarray::concatenate(Axis(0), &views);
        let tokens = tokens.map_err(|e| ValidateError::Model(e.to_string()))?;
        let entry = Tensor::from(tokens).cast_float(out.get(&self.names.hidden)?.dtype())?;
        let projected = projector.run(&[(&self.names.entry, &Value::new(entry)?)])?;
        Ok(ReferenceFeatures {
            features: per_image(projected.get(&self.names.features)?, images)?,
            merged,
            near_ties,
        })
    }
}

/// The oracle's parameters for a recipe's merge on a tower.
pub(in crate::validate) fn params(
    merge: &TokenMerge,
    tower: &VisionTower,
) -> Result<MergeParams, ValidateError> {
    let patches = tower
        .patches()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| ValidateError::Model("the tower's token count is not fixed".into()))?;
    let budget = |count: Count| match count {
        Count::Tokens(n) => oracle::Budget::Count(usize::try_from(n).unwrap_or(0)),
        Count::Ratio(r) => oracle::Budget::Ratio(r),
    };
    let cls = tower.cls.then_some(match merge.cls {
        Cls::Keep => oracle::Cls::Keep,
        Cls::Drop => oracle::Cls::Drop,
    });
    Ok(MergeParams {
        dominant: budget(merge.dominant).resolve(patches)?,
        contextual: budget(merge.contextual).resolve(patches)?,
        cluster_width: usize::try_from(merge.cluster_width).unwrap_or(1),
        selector: match merge.selector {
            Selector::Attention => oracle::Selector::Attention,
            Selector::Uniform => oracle::Selector::Uniform,
            Selector::Local => oracle::Selector::Local,
        },
        cls,
    })
}

fn rank3(value: &Value) -> Result<Array3<f32>, ValidateError> {
    let found = value.shape().to_vec();
    let array = value.to_tensor()?.to_array()?;
    array
        .into_dimensionality()
        .map_err(|_| ValidateError::Model(format!("expected a tensor of rank 3, found {found:?}")))
}

/// `[n, K, D]` or `[n·K, D]` as one `[K, D]` for each image.
pub(in crate::validate) fn per_image(
    features: &Value,
    images: usize,
) -> Result<Vec<Array2<f32>>, ValidateError> {
    let shape = features.shape().to_vec();
    let width = shape.last().copied().unwrap_or(1).max(1);
    let data = features.f32s()?.into_owned();
    let rows = data.len() / width;
    if images == 0 || rows % images != 0 {
        return Err(ValidateError::Model(format!(
            "features {shape:?} are not those of {images} images"
        )));
    }
    let all = Array3::from_shape_vec((images, rows / images, width), data)
        .map_err(|e| ValidateError::Model(e.to_string()))?;
    Ok((0..images)
        .map(|i| all.slice(s![i, .., ..]).to_owned())
        .collect())
}
