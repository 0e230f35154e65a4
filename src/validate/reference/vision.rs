//! Tower, oracle merge, projector.

use ndarray::{Array2, Array3, Axis, s};

use super::super::oracle::{self, MergeInput, MergeParams, Merged};
use super::super::{ValidateError, probe};
use super::projection::Probes;
use super::projector::Projector;
use super::selection::{Choosing, Fewer};
use super::ties::{Ranking, reordered};
use crate::arch::VisionTower;
use crate::ir::{Dim, Model, ValueId, ValueType, extract};
use crate::passes::{Count, Placement, Selector, TokenMerge};
use crate::runtime::{Port, Session, SessionOptions, Tensor, Value, lay_out_pixels, pixel_mask};

/// What the reference gives for a batch of images.
#[derive(Debug)]
pub struct ReferenceFeatures {
    /// One `[K, D]` for each image, `[frames·K, D]` for each clip.
    pub features: Vec<Array2<f32>>,
    /// Which of these the merge discarded and left in their places, for each image or clip.
    pub gone: Vec<Vec<bool>>,
    /// What the merge chose, for each image or frame; empty without a merge.
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
    /// Where the attention is looked at: not where the features decide, which are then what the
    /// graph gives when nothing else is asked of it.
    probes: Option<Probes>,
    merge: Option<(MergeParams, Projector)>,
    /// A choice among tokens, and the projector where that works on what is left.
    choosing: Option<(Choosing, Projector)>,
    /// Features of an image, where merged ones go to their places among as many.
    slots: Option<usize>,
    /// Patches of each token that a shuffle makes, by the base graph's own
    /// operators.
    groups: Option<Vec<Vec<usize>>>,
}

#[derive(Debug)]
struct Names {
    pixels: String,
    features: String,
    hidden: String,
    entry: String,
}

impl ReferenceVision {
    /// Opens the base vision encoder for what a recipe does there (`None`: nothing); merged
    /// tokens come out alone or in their places.
    ///
    /// # Errors
    /// The model cannot be opened.
    pub fn open(
        model: &Model,
        tower: &VisionTower,
        fewer: Option<Fewer<'_>>,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let merge = fewer.and_then(Fewer::merge);
        let placed = merge.filter(|(_, p)| *p == Placement::Decoder);
        let slots = placed.and_then(|_| usize::try_from(tower.features_per_image()?).ok());
        let (probed, probes) = match fewer.is_some_and(Fewer::by_features) {
            true => (model.clone(), None),
            false => {
                let (probed, probes) = Probes::new(model, tower, &[tower.hidden, tower.entry])?;
                (probed, Some(probes))
            }
        };
        let session = probe::open(&probed, "reference vision encoder", options)?;
        let projector = || Projector::open(model, tower, projected(model, tower), options);
        let choosing = match fewer {
            Some(Fewer::Keep(kept)) => Some((Choosing::new(kept, tower)?, projector()?)),
            _ => None,
        };
        let merge = match merge {
            None => None,
            Some((merge, placement)) => Some((params(merge, placement, tower)?, projector()?)),
        };
        let groups = match &tower.shuffle {
            Some(_) => Some(shuffled(model, tower, options)?),
            None => None,
        };
        let name = |v| model.name(v).to_owned();
        Ok(Self {
            groups,
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
            choosing,
            slots,
        })
    }

    /// Features of `[n, C, H, W]` pixels; `mask` `[n, H, W]` is for models that are
    /// told which pixels are padding. Where `ranking` orders tokens otherwise
    /// than the oracle only by near-ties, it is followed.
    ///
    /// # Errors
    /// The run fails or the tower gives something else than it was recognised as.
    pub fn features(
        &mut self,
        pixels: Tensor,
        mask: Option<&Array3<u8>>,
        ranking: Option<Ranking<'_>>,
    ) -> Result<ReferenceFeatures, ValidateError> {
        let dtype = self.session.input(&self.names.pixels).and_then(|p| p.dtype);
        let pixels = match dtype.filter(|d| d.is_float()) {
            Some(dtype) => pixels.cast_float(dtype)?,
            None => pixels,
        };
        let batch = pixels.shape()[0];
        // The tower sees the frames of clips as images.
        let images = match self.tower.video {
            true => batch * pixels.shape()[1],
            false => batch,
        };
        let rank = self
            .session
            .input(&self.names.pixels)
            .map_or(4, |p| p.dims.len());
        let pixels = Value::new(lay_out_pixels(pixels, rank)?)?;
        let mut inputs: Vec<(&str, Value)> = vec![(&self.names.pixels, pixels)];
        let other = |p: &&Port| p.name != self.names.pixels;
        if let (Some(port), Some(mask)) = (self.session.inputs().iter().find(other), mask) {
            inputs.push((&port.name, pixel_mask(mask, port)?));
        }
        let inputs: Vec<(String, Value)> =
            inputs.into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
        let inputs: Vec<(&str, &Value)> = inputs.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let out = self.session.run(&inputs)?;
        if let Some((choosing, projector)) = &mut self.choosing {
            let (features, near_ties) = match choosing.rows() {
                // In front of the projector, which works on what is left as in the rewritten encoder.
                Some(rows) => {
                    let entry = out.get(&self.names.entry)?;
                    let tokens = rank3(entry)?.select(Axis(1), &rows);
                    let projected = projector.run(tokens, entry.dtype())?;
                    (per_image(&projected, batch)?, 0)
                }
                None => {
                    let each = per_image(out.get(&self.names.features)?, images)?;
                    let (mut left, mut near_ties) = (Vec::new(), 0);
                    for (image, features) in each.iter().enumerate() {
                        let (features, ties) = choosing.features(image, features, ranking)?;
                        near_ties += ties;
                        left.push(features);
                    }
                    let frames = images / batch.max(1);
                    let clip = |frames: &[Array2<f32>]| {
                        let views: Vec<_> = frames.iter().map(|f| f.view()).collect();
                        let all = ndarray::concatenate(Axis(0), &views);
                        all.map_err(|e| ValidateError::Model(e.to_string()))
                    };
                    let all = left.chunks(frames.max(1)).map(clip);
                    (all.collect::<Result<_, _>>()?, near_ties)
                }
            };
            return Ok(ReferenceFeatures {
                gone: none_gone(&features),
                features,
                merged: Vec::new(),
                near_ties,
            });
        }
        let Some((params, projector)) = &mut self.merge else {
            let features = out.get(&self.names.features)?;
            let features = per_image(features, batch)?;
            return Ok(ReferenceFeatures {
                gone: none_gone(&features),
                features,
                merged: Vec::new(),
                near_ties: 0,
            });
        };
        let hidden = rank3(out.get(&self.names.hidden)?)?;
        let entry = rank3(out.get(&self.names.entry)?)?;
        let (_, tokens, _) = hidden.dim();
        let probes = self.probes.as_ref();
        let probes =
            probes.ok_or_else(|| ValidateError::Model("no attention was probed".into()))?;
        let (query, key) = probes.heads(&out, &self.tower, images, tokens)?;
        let masks = probes.masks(&out, &self.tower, images, tokens)?;
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
            let rows = entry.index_axis(Axis(0), image);
            let groups = self.groups.as_deref();
            let choose = |scores: Option<Vec<f32>>| match (groups, scores) {
                (Some(groups), scores) => {
                    oracle::merge_shuffled(&input, rows, groups, scores, params)
                }
                (None, None) => oracle::merge(&input, params),
                (None, Some(scores)) => oracle::merge_by(&input, scores, params),
            };
            let mut choice = choose(None)?;
            let found = ranking.and_then(|r| Some((r.scores.get(image)?, r.tolerance)));
            if let Some((found, tolerance)) = found {
                let first = choice.dominant.len() + choice.pool.len();
                let moved = reordered(&choice.scores, found, first, tolerance);
                if let Some(moved @ 1..) = moved {
                    near_ties += moved;
                    choice = choose(Some(found.clone()))?;
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
        let projected = projector.run(tokens, out.get(&self.names.hidden)?.dtype())?;
        let (features, gone) = match self.slots {
            None => {
                let features = per_image(&projected, batch)?;
                let gone = none_gone(&features);
                (features, gone)
            }
            Some(slots) => {
                let frames = images / batch.max(1);
                place(
                    &self.tower,
                    per_image(&projected, images)?,
                    &merged,
                    slots,
                    frames,
                )?
            }
        };
        Ok(ReferenceFeatures {
            features,
            gone,
            merged,
            near_ties,
        })
    }
}

fn none_gone(features: &[Array2<f32>]) -> Vec<Vec<bool>> {
    features.iter().map(|f| vec![false; f.nrows()]).collect()
}

/// Features of each image or clip, and which of them were discarded.
type Placed = (Vec<Array2<f32>>, Vec<Vec<bool>>);

/// Merged features of each image in their places among `slots`, and which places are
/// empty; `frames` images together are one clip.
fn place(
    tower: &VisionTower,
    features: Vec<Array2<f32>>,
    merged: &[Merged],
    slots: usize,
    frames: usize,
) -> Result<Placed, ValidateError> {
    let first = usize::from(tower.gives_cls());
    let mut placed = Vec::new();
    for (rows, merged) in features.iter().zip(merged) {
        let tokens = merged.dominant.iter().chain(&merged.anchors);
        let patches: Vec<usize> = tokens.map(|t| first + t).collect();
        // CLS, if it came along, is the row that no patch stands for.
        let cls = (rows.nrows() > patches.len()).then_some(0);
        let places: Vec<usize> = cls.into_iter().chain(patches).collect();
        placed.push(oracle::place(rows.view(), &places, slots)?);
    }
    let (mut all, mut gone) = (Vec::new(), Vec::new());
    for clip in placed.chunks(frames.max(1)) {
        let views: Vec<_> = clip.iter().map(|(rows, _)| rows.view()).collect();
        let rows = ndarray::concatenate(Axis(0), &views);
        all.push(rows.map_err(|e| ValidateError::Model(e.to_string()))?);
        gone.push(clip.iter().flat_map(|(_, empty)| empty.clone()).collect());
    }
    Ok((all, gone))
}

/// Where the projector ends: the features, of clips as they are before their frames are
/// put into one list, which is a re-arrangement that counts tokens.
fn projected(model: &Model, tower: &VisionTower) -> ValueId {
    let mut at = tower.features;
    while tower.video && at != tower.entry {
        let node = model.producer_node(at);
        let moved = node.filter(|n| matches!(n.op_type.as_str(), "Reshape" | "Identity"));
        match moved.and_then(|n| n.input(0)) {
            Some(before) => at = before,
            None => break,
        }
    }
    at
}

/// The oracle's parameters for a recipe's merge on a tower.
pub(in crate::validate) fn params(
    merge: &TokenMerge,
    placement: Placement,
    tower: &VisionTower,
) -> Result<MergeParams, ValidateError> {
    let patches = tower
        .candidates()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| ValidateError::Model("the tower's token count is not fixed".into()))?;
    let cls = tower
        .cls
        .then_some(match merge.keeps_cls(tower, placement) {
            true => oracle::Cls::Keep,
            false => oracle::Cls::Drop,
        });
    Ok(MergeParams {
        dominant: budget(merge.dominant).resolve(patches)?,
        contextual: budget(merge.contextual).resolve(patches)?,
        cluster_width: usize::try_from(merge.cluster_width).unwrap_or(1),
        selector: selector(merge.selector),
        cls,
    })
}

/// A recipe's count in the oracle's words.
pub(super) fn budget(count: Count) -> oracle::Budget {
    match count {
        Count::Tokens(n) => oracle::Budget::Count(usize::try_from(n).unwrap_or(0)),
        Count::Ratio(r) => oracle::Budget::Ratio(r),
    }
}

/// A recipe's selector in the oracle's words.
pub(super) fn selector(selector: Selector) -> oracle::Selector {
    match selector {
        Selector::Attention => oracle::Selector::Attention,
        Selector::Uniform => oracle::Selector::Uniform,
        Selector::Local => oracle::Selector::Local,
    }
}

/// Runs the base graph's own re-arrangement on the numbers of the patches, digit
/// by digit so that every element type holds them, and reads off which patches a
/// token is made of.
fn shuffled(
    model: &Model,
    tower: &VisionTower,
    options: &SessionOptions,
) -> Result<Vec<Vec<usize>>, ValidateError> {
    const BASE: usize = 128;
    let wrong = |what: &str| ValidateError::Model(format!("the pixel shuffle {what}"));
    let size = |n: Option<i64>| n.and_then(|n| usize::try_from(n).ok());
    let (Some(tokens), Some(shuffle)) = (size(tower.tokens), &tower.shuffle) else {
        return Err(wrong("works on a number of tokens that is not fixed"));
    };
    let ty = ValueType::tensor(tower.dtype, vec![Dim::Unknown; 3]);
    let part = extract(model, &[(tower.hidden, ty.clone())], &[(tower.entry, ty)])?;
    let mut session = probe::open(&part, "reference pixel shuffle", options)?;
    let port = session.inputs().first().and_then(|p| p.dtype);
    let first = usize::from(tower.cls);
    let width = size(tower.width).ok_or_else(|| wrong("works on rows of unknown width"))?;
    let mut found: Vec<Vec<usize>> = Vec::new();
    let (mut scale, mut digits) = (1, tokens);
    while digits > 0 {
        let numbers = Array3::from_shape_fn((1, tokens, width), |(_, token, _)| {
            (token / scale % BASE) as f32
        });
        let mut numbers = Tensor::from(numbers);
        if let Some(dtype) = port {
            numbers = numbers.cast_float(dtype)?;
        }
        let out = session.run(&[(model.name(tower.hidden), &Value::new(numbers)?)])?;
        let out = rank3(out.first()?)?;
        let rows = out.index_axis(Axis(0), 0);
        found.resize(rows.nrows(), vec![0; rows.ncols()]);
        for (all, row) in found.iter_mut().zip(rows.outer_iter()) {
            all.iter_mut()
                .zip(row)
                .for_each(|(n, digit)| *n += *digit as usize * scale);
        }
        (scale, digits) = (scale * BASE, digits / BASE);
    }
    for row in &mut found {
        row.sort_unstable();
        row.dedup();
        if row.len() as i64 != shuffle.per || row.first().is_some_and(|t| *t < first) {
            return Err(wrong("does not make tokens of whole patches"));
        }
        row.iter_mut().for_each(|token| *token -= first);
    }
    Ok(found)
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
