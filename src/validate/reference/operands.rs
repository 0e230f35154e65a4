//! Queries and keys of the next layer, as the unmodified graph computes them.

use ndarray::{Array1, Array2, Array3, Array4, ArrayView1, ArrayView2, s};

use super::super::ValidateError;
use super::super::oracle;
use crate::arch::{Decoder, DecoderLayer, Layout, Projection};
use crate::ir::{DataType, Dim, Model, Patch, ValueId, ValueType};
use crate::runtime::{DType, Outputs, Tensor, Value};

/// Names of what the ranking at a drop point is computed from.
pub(super) struct Probe {
    /// What the next layer is entered by.
    pub(super) boundary: Vec<String>,
    query: String,
    key: String,
    /// Tables and lengths of a rotary embedding inside the attention (of this layer
    /// or, if that has none, of another).
    rotary: Option<[String; 3]>,
    /// What the attention adds to projections.
    bias: Option<String>,
}

/// Queries and keys `[b, heads, L, head_dim]`, and the tables of a rotary embedding
/// inside the attention.
pub(super) type Found = (Array4<f32>, Array4<f32>, Option<Tables>);

/// Reads the operands of a layer's attention off a run.
pub(super) struct Operands<'a> {
    pub(super) layer: &'a DecoderLayer,
    /// Width of a head.
    pub(super) width: usize,
    /// Name of the layer's present keys, if it gives them out.
    pub(super) present: Option<&'a str>,
    /// Positions `[b, L]` that the tokens kept, where they are not what the
    /// attention counts.
    pub(super) positions: Option<ArrayView2<'a, i64>>,
}

impl Operands<'_> {
    /// Reads them, where `past` tokens came before.
    pub(super) fn read(
        &self,
        probe: &Probe,
        past: usize,
        outputs: &Outputs,
    ) -> Result<Found, ValidateError> {
        let layer = self.layer;
        let bias: Option<Array1<f32>> = match &probe.bias {
            Some(name) => Some(array(outputs.get(name)?)?),
            None => None,
        };
        let split = |name: &str, projection: &Projection| -> Result<_, ValidateError> {
            split(outputs.get(name)?, projection, bias.as_ref(), self.width)
        };
        let mut query = split(&probe.query, &layer.query)?;
        let tables = match &probe.rotary {
            None => None,
            Some([cos, sin, _]) => Some(Tables {
                cos: array(outputs.get(cos)?)?,
                sin: array(outputs.get(sin)?)?,
            }),
        };
        let (Some([_, _, lengths]), Some(rotary), Some(given)) =
            (&probe.rotary, layer.rotary, &tables)
        else {
            let key = split(&probe.key, &layer.new_key)?;
            return Ok((query, key, tables));
        };
        // The operator gives its turned keys out, behind those of the past; only
        // the queries have to be turned here.
        let present = self.present.ok_or_else(|| {
            ValidateError::Model("an attention turns its keys and gives no cache out".into())
        })?;
        let present: Array4<f32> = array(outputs.get(present)?)?;
        let key = present.slice(s![.., .., past.., ..]).to_owned();
        let lengths = outputs.get(lengths)?.to_tensor()?.i64s()?.to_vec();
        for (row, mut heads) in query.outer_iter_mut().enumerate() {
            let length = heads.dim().1 as i64;
            let start = (lengths[row] + 1 - length).max(0);
            let positions = match self.positions {
                Some(kept) => kept.row(row).to_vec(),
                None => (start..start + length).collect(),
            };
            let (cos, sin) = (given.cos.view(), given.sin.view());
            let turned = oracle::rotate(heads.view(), cos, sin, &positions, rotary.interleaved)?;
            heads.assign(&turned);
        }
        Ok((query, key, tables))
    }
}

/// Cosines and sines `[positions, pairs]`.
pub(super) struct Tables {
    cos: Array2<f32>,
    sin: Array2<f32>,
}

impl Tables {
    /// What makes an attention that counts from `past` rotate one row's tokens at
    /// `positions [L]`.
    pub(super) fn at(
        &self,
        past: usize,
        positions: ArrayView1<'_, i64>,
    ) -> Result<Turn, ValidateError> {
        let length = positions.len();
        let pick = |table: &Array2<f32>| -> Result<Array2<f32>, ValidateError> {
            let mut rows = Array2::zeros((past + length, table.ncols()));
            for (i, &position) in positions.iter().enumerate() {
                let row = usize::try_from(position)
                    .ok()
                    .filter(|p| *p < table.nrows());
                let row = row.ok_or_else(|| {
                    ValidateError::Model(format!(
                        "position {position} lies outside of a rotary table of {}",
                        table.nrows()
                    ))
                })?;
                rows.row_mut(past + i).assign(&table.row(row));
            }
            Ok(rows)
        };
        Ok(Turn {
            cos: pick(&self.cos)?,
            sin: pick(&self.sin)?,
            total: past + length,
        })
    }
}

/// Tables that stand in for a model's own: row p is what the attention reads for
/// the token at place p of its cache.
pub(super) struct Turn {
    cos: Array2<f32>,
    sin: Array2<f32>,
    total: usize,
}

impl Turn {
    const NAMES: [&'static str; 4] = [
        "duet/cut/cos",
        "duet/cut/sin",
        "duet/cut/lengths",
        "duet/cut/total",
    ];

    /// Makes the attentions of a cut graph read tables and lengths that are fed.
    pub(super) fn inputs(patch: &mut Patch<'_>, decoder: &Decoder) {
        let rotary: Vec<&DecoderLayer> = decoder
            .layers
            .iter()
            .filter(|l| l.rotary.is_some())
            .collect();
        if rotary.is_empty() {
            return;
        }
        let table = ValueType::tensor(decoder.dtype, vec![Dim::Unknown; 2]);
        let types = [
            table.clone(),
            table,
            ValueType::tensor(DataType::Int32, vec![Dim::Unknown]),
            ValueType::tensor(DataType::Int32, vec![]),
        ];
        let fed: Vec<ValueId> = Self::NAMES
            .iter()
            .zip(types)
            .map(|(name, ty)| patch.add_input(name, ty))
            .collect();
        for layer in rotary {
            for (slot, value) in [7, 8, 5, 6].into_iter().zip(&fed) {
                patch.connect(layer.node, slot, *value);
            }
        }
    }

    /// The values of these inputs, for one row.
    pub(super) fn feed(&self, dtype: DType) -> Result<Vec<(&'static str, Value)>, ValidateError> {
        let total = i32::try_from(self.total).unwrap_or(i32::MAX);
        let tensors = [
            Tensor::from(self.cos.clone()).cast_float(dtype)?,
            Tensor::from(self.sin.clone()).cast_float(dtype)?,
            Tensor::new([1], vec![total - 1])?,
            Tensor::new([0; 0], vec![total])?,
        ];
        let mut fed = Vec::new();
        for (name, tensor) in Self::NAMES.into_iter().zip(tensors) {
            fed.push((name, Value::new(tensor)?));
        }
        Ok(fed)
    }
}

impl Probe {
    /// Of what is asked for in front of layer `next`, where `layer` ranks; `outputs`: boundary, query, key and copies of what the
    /// rotary embedding reads (three) and of a bias (one).
    pub(super) fn of(
        cut: &Model,
        next: &DecoderLayer,
        layer: &DecoderLayer,
        outputs: &[ValueId],
    ) -> Self {
        let name = |v: ValueId| cut.name(v).to_owned();
        let copies = outputs.get(next.boundary.len() + 2..).unwrap_or(&[]);
        Self {
            boundary: next.boundary.iter().copied().map(name).collect(),
            query: name(layer.query.value),
            key: name(layer.new_key.value),
            rotary: match copies {
                [cos, sin, lengths, ..] => Some([name(*cos), name(*sin), name(*lengths)]),
                _ => None,
            },
            bias: layer
                .query
                .bias
                .and_then(|_| copies.last())
                .map(|b| name(*b)),
        }
    }
}

/// The heads of a projection, `[b, heads, L, width]`.
fn split(
    value: &Value,
    projection: &Projection,
    bias: Option<&Array1<f32>>,
    width: usize,
) -> Result<Array4<f32>, ValidateError> {
    let Layout::Rows { start, heads } = projection.layout else {
        return array(value);
    };
    let rows: Array3<f32> = array(value)?;
    let (start, heads) = (start as usize, heads as usize);
    let (batch, length, _) = rows.dim();
    Ok(Array4::from_shape_fn(
        (batch, heads, length, width),
        |(b, h, l, d)| {
            let column = h * width + d;
            let added = projection
                .bias
                .zip(bias)
                .map_or(0.0, |((_, at), bias)| bias[at as usize + column]);
            rows[[b, l, start + column]] + added
        },
    ))
}

pub(super) fn array<D: ndarray::Dimension>(
    value: &Value,
) -> Result<ndarray::Array<f32, D>, ValidateError> {
    let found = value.shape().to_vec();
    let array = value.to_tensor()?.to_array()?;
    array.into_dimensionality().map_err(|_| {
        ValidateError::Model(format!("an inner tensor has an unexpected rank: {found:?}"))
    })
}
