//! A tower of patch rows and its merger, unmodified, with the oracle's merge behind it.

use ndarray::{Array2, Array3, Axis, Ix2, Ix3, Ix4};

use super::super::oracle::{self, MergeInput, MergeParams};
use super::super::{ValidateError, probe};
use super::projection::Probes;
use super::ties::{Ranking, reordered};
use super::vision::budget;
use crate::arch::{PatchRows, VisionTower};
use crate::ir::{Dim, Model, Patch, ValueType, extract};
use crate::passes::TokenMerge;
use crate::runtime::{DType, Outputs, Session, SessionOptions, Tensor, Value};

/// What the reference gives for one image.
#[derive(Debug)]
pub struct RowsOut {
    /// Features of the unmodified encoder, `[N, D]`.
    pub plain: Array2<f32>,
    /// Features that the recipe leaves, `[K, D]`.
    pub features: Array2<f32>,
    /// Their places among the N, ascending; all without a merge.
    pub kept: Vec<usize>,
    /// Tokens that changed places because their scores tie as well as exactly.
    pub near_ties: usize,
}

/// The unmodified encoder, opened up at its last attention.
#[derive(Debug)]
pub struct ReferenceRows {
    tower: VisionTower,
    rows: PatchRows,
    session: Session,
    names: Names,
    merge: Option<TokenMerge>,
    attention: Attention,
    /// The base graph's own way from the merger's order to the features', run on numbers.
    order: Option<Session>,
}

#[derive(Debug)]
struct Names {
    pixels: String,
    grid: Option<String>,
    merged: String,
    features: String,
    key: String,
}

/// Where the attention that patches receive is read.
#[derive(Debug)]
enum Attention {
    /// The tower's own probabilities.
    Probabilities(String),
    /// Queries, where an operator keeps its probabilities to itself.
    Queries(String, Probes),
}

impl ReferenceRows {
    /// Opens the base vision encoder for a recipe's merge (`None`: it has none).
    ///
    /// # Errors
    /// The model cannot be opened, or is no tower of patch rows.
    pub fn open(
        model: &Model,
        tower: &VisionTower,
        merge: Option<&TokenMerge>,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let Some(rows) = &tower.rows else {
            return Err(ValidateError::Model(
                "the vision encoder takes no rows of patches".into(),
            ));
        };
        let mut patch = Patch::new(model, "reference");
        let key = rows.heads(&mut patch, tower, true);
        let query = rows.heads(&mut patch, tower, false);
        let named = |patch: &Patch<'_>, v| patch.value(v).name.clone();
        let (key_name, query_name) = (named(&patch, key), named(&patch, query));
        for value in [key, query] {
            let inside = value.index() >= model.value_count();
            if inside || !model.is_output(value) {
                patch.add_output(value, probe::INFERRED);
            }
        }
        let opened = model.clone().apply(patch.finish())?;
        let node = model.node(tower.site.node);
        let probabilities = node.output(0).filter(|_| node.is("Softmax"));
        let (probed, attention) = match probabilities {
            Some(value) => (
                probe::with_outputs(&opened, &[value])?,
                Attention::Probabilities(model.name(value).to_owned()),
            ),
            None => {
                let (probed, probes) = Probes::new(&opened, tower, &[])?;
                (probed, Attention::Queries(query_name, probes))
            }
        };
        let session = probe::open(&probed, "reference vision encoder", options)?;
        let order = match (rows.moves.is_empty(), merge) {
            (false, Some(_)) => Some(ordering(model, tower, rows, options)?),
            _ => None,
        };
        let name = |v| model.name(v).to_owned();
        Ok(Self {
            names: Names {
                pixels: name(tower.pixels),
                grid: rows.grid.map(name),
                merged: name(rows.merged),
                features: name(tower.features),
                key: key_name,
            },
            tower: tower.clone(),
            rows: rows.clone(),
            session,
            merge: merge.cloned(),
            attention,
            order,
        })
    }

    /// Features of one image: `pixels` `[patches, width]` in a grid (time, height, width) of patches. Where
    /// `ranking` orders tokens otherwise than the oracle only by near-ties, it is followed.
    ///
    /// # Errors
    /// The run fails or the tower gives something else than it was recognised as.
    pub fn features(
        &mut self,
        pixels: &Tensor,
        grid: [usize; 3],
        ranking: Option<Ranking<'_>>,
    ) -> Result<RowsOut, ValidateError> {
        let feed = feed(
            &self.session,
            &self.names.pixels,
            self.names.grid.as_deref(),
            pixels,
            grid,
        )?;
        let given: Vec<(&str, &Value)> = feed.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let out = self.session.run(&given)?;
        let plain = matrix(out.get(&self.names.features)?)?;
        let Some(merge) = self.merge.clone() else {
            let kept = (0..plain.nrows()).collect();
            return Ok(RowsOut {
                features: plain.clone(),
                plain,
                kept,
                near_ties: 0,
            });
        };
        let key = heads(out.get(&self.names.key)?)?;
        let mass = self.mass(&out, &key)?;
        let groups = self.groups(&feed, plain.nrows())?;
        let params = resolved(&merge, plain.nrows())?;
        let choose =
            |scores| oracle::merge_rows(plain.view(), &mass, key.view(), &groups, scores, &params);
        let (mut choice, mut near_ties) = (choose(None)?, 0);
        let found = ranking.and_then(|r| Some((r.scores.first()?, r.tolerance)));
        if let Some((found, tolerance)) = found {
            let first = choice.merged.dominant.len() + choice.merged.pool.len();
            if let Some(moved @ 1..) = reordered(&choice.merged.scores, found, first, tolerance) {
                near_ties = moved;
                choice = choose(Some(found.clone()))?;
            }
        }
        Ok(RowsOut {
            plain,
            features: choice.tokens,
            kept: choice.kept,
            near_ties,
        })
    }

    /// Attention received by each patch.
    fn mass(&self, out: &Outputs, key: &Array3<f32>) -> Result<Vec<f64>, ValidateError> {
        match &self.attention {
            Attention::Probabilities(name) => {
                let all = out.get(name)?.to_tensor()?.to_array()?;
                let found = all.shape().to_vec();
                let single = match found.as_slice() {
                    [1, _, _, _] => all.index_axis(Axis(0), 0).to_owned(),
                    _ => all,
                };
                let single = single.into_dimensionality::<Ix3>().map_err(|_| {
                    ValidateError::Model(format!(
                        "the probabilities of the last attention are {found:?}; expected [1, heads, patches, patches]"
                    ))
                })?;
                Ok(oracle::mass_of(single.view()))
            }
            Attention::Queries(name, probes) => {
                let query = heads(out.get(name)?)?;
                let patches = key.dim().1;
                let masks = probes.masks(out, &self.tower, 1, patches)?;
                let hidden = Array2::zeros((patches, 1));
                #[allow(clippy::cast_possible_truncation, reason = "scores are fp32")]
                let scale = self.tower.site.scale() as f32;
                Ok(oracle::mass_received(&MergeInput {
                    hidden: hidden.view(),
                    query: query.view(),
                    key: key.view(),
                    scale,
                    mask: masks.as_ref().map(|m| m[0].view()),
                }))
            }
        }
    }

    /// Patches of each token, by the features' order.
    fn groups(
        &mut self,
        feed: &[(String, Value)],
        tokens: usize,
    ) -> Result<Vec<Vec<usize>>, ValidateError> {
        const BASE: usize = 128;
        let per = self.rows.per as usize;
        let group = |token: usize| (token * per..(token + 1) * per).collect();
        let Some(order) = &mut self.order else {
            return Ok((0..tokens).map(group).collect());
        };
        // Two digits, which every element type holds.
        let numbers = Array2::from_shape_fn((tokens, 2), |(t, digit)| {
            (if digit == 0 { t % BASE } else { t / BASE }) as f32
        });
        let mut numbers = Tensor::from(numbers);
        let port = order.input(&self.names.merged).and_then(|p| p.dtype);
        if let Some(dtype) = port.filter(|d| d.is_float()) {
            numbers = numbers.cast_float(dtype)?;
        }
        let numbers = Value::new(numbers)?;
        let mut given: Vec<(&str, &Value)> = vec![(&self.names.merged, &numbers)];
        let takes = |name: &str| order.inputs().iter().any(|p| p.name == name);
        given.extend(
            feed.iter()
                .filter(|(n, _)| takes(n))
                .map(|(n, v)| (n.as_str(), v)),
        );
        let out = order.run(&given)?;
        let moved = matrix(out.first()?)?;
        let token = |row: ndarray::ArrayView1<'_, f32>| row[0] as usize + BASE * row[1] as usize;
        Ok(moved.outer_iter().map(|row| group(token(row))).collect())
    }
}

/// The part of the base graph that puts the merger's rows into the features' order.
fn ordering(
    model: &Model,
    tower: &VisionTower,
    rows: &PatchRows,
    options: &SessionOptions,
) -> Result<Session, ValidateError> {
    let ty = ValueType::tensor(rows.merged_dtype(model), vec![Dim::Unknown; 2]);
    let mut inputs = vec![(rows.merged, ty.clone())];
    for &input in &model.graph().inputs {
        if let Some(ty) = &model.value(input).ty {
            inputs.push((input, ty.clone()));
        }
    }
    let out = ValueType::tensor(tower.dtype, vec![Dim::Unknown; 2]);
    let part = extract(model, &inputs, &[(tower.features, out)])?;
    probe::open(&part, "reference order of tokens", options)
}

/// What an encoder of patch rows is given, in the types that it wants.
pub(in crate::validate) fn feed(
    session: &Session,
    pixels_name: &str,
    grid_name: Option<&str>,
    pixels: &Tensor,
    grid: [usize; 3],
) -> Result<Vec<(String, Value)>, ValidateError> {
    let dtype = |name: &str| session.input(name).and_then(|p| p.dtype);
    let pixels = match dtype(pixels_name).filter(|d| d.is_float()) {
        Some(dtype) => pixels.clone().cast_float(dtype)?,
        None => pixels.clone(),
    };
    let mut feed = vec![(pixels_name.to_owned(), Value::new(pixels)?)];
    if let Some(name) = grid_name {
        let thw = grid_tensor(grid, dtype(name) == Some(DType::I32))?;
        feed.push((name.to_owned(), Value::new(thw)?));
    }
    Ok(feed)
}

/// The grid of one image, `[1, 3]`; `short`: as int32 instead of int64.
pub(in crate::validate) fn grid_tensor(
    grid: [usize; 3],
    short: bool,
) -> Result<Tensor, ValidateError> {
    #[allow(clippy::cast_possible_truncation, reason = "edges of grids")]
    let thw = match short {
        true => Tensor::new([1, 3], grid.map(|n| n as i32).to_vec()),
        false => Tensor::new([1, 3], grid.map(|n| n as i64).to_vec()),
    };
    Ok(thw?)
}

/// The oracle's parameters for an image of `tokens` tokens.
fn resolved(merge: &TokenMerge, tokens: usize) -> Result<MergeParams, ValidateError> {
    Ok(MergeParams {
        dominant: budget(merge.dominant).resolve(tokens)?,
        contextual: budget(merge.contextual).resolve(tokens)?,
        cluster_width: usize::try_from(merge.cluster_width).unwrap_or(1),
        selector: super::vision::selector(merge.selector),
        cls: None,
    })
}

fn matrix(value: &Value) -> Result<Array2<f32>, ValidateError> {
    let found = value.shape().to_vec();
    let array = value.to_tensor()?.to_array()?.into_dimensionality::<Ix2>();
    array.map_err(|_| {
        ValidateError::Model(format!(
            "expected features [tokens, width], found {found:?}"
        ))
    })
}

/// `[1, P, heads, width]` as `[heads, P, width]`.
fn heads(value: &Value) -> Result<Array3<f32>, ValidateError> {
    let found = value.shape().to_vec();
    let array = value.to_tensor()?.to_array()?.into_dimensionality::<Ix4>();
    let array = array.map_err(|_| {
        ValidateError::Model(format!(
            "a projection of the tower is {found:?}; expected [1, patches, heads, width]"
        ))
    })?;
    Ok(array
        .index_axis(Axis(0), 0)
        .permuted_axes([1, 0, 2])
        .to_owned())
}
