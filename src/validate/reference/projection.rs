//! What the oracle needs of the tower's attention, read off the unmodified graph:
//! queries, keys and masks.
//!
//! Fused operators keep queries and keys to themselves. They are then computed
//! from the whole packed weight at once, dequantised where it is quantised, which
//! is another way than the one that a pass takes.

use ndarray::{Array3, Array4, ArrayD, Axis, IxDyn, Slice};

use super::super::{ValidateError, probe};
use crate::arch::{Mask, Operand, VisionTower};
use crate::ir::{DataType, Model, Patch, ValueId, consts, int};
use crate::runtime::{Outputs, Value};

/// One `[heads, T, head_dim]` for each image.
type Heads = Vec<Array3<f32>>;

/// Where queries, keys and masks of a tower come out of the probed graph.
#[derive(Debug)]
pub(super) struct Probes {
    query: Projected,
    key: Projected,
    masks: Vec<Masked>,
}

/// A projection, or something that it is cut out of.
#[derive(Debug)]
struct Projected {
    output: String,
    /// Part of the next to last axis of `[b, T, heads, parts, width]`.
    part: Option<i64>,
    /// Columns (first, number) of the last axis.
    columns: Option<(i64, i64)>,
    /// Added to the columns.
    bias: Vec<f32>,
}

#[derive(Debug)]
struct Masked {
    mask: Mask,
    value: String,
    fill: Option<String>,
}

impl Probes {
    /// Makes `hidden` and everything that the merge reads outputs of a model.
    pub(super) fn new(
        model: &Model,
        tower: &VisionTower,
        others: &[ValueId],
    ) -> Result<(Model, Self), ValidateError> {
        let mut patch = Patch::new(model, "probe");
        let mut outputs: Vec<ValueId> = others.to_vec();
        let mut projected = |patch: &mut Patch<'_>, operand: &Operand| {
            let (value, shape) = expose(patch, operand)?;
            outputs.push(value);
            Ok::<_, ValidateError>(Projected {
                output: patch.value(value).name.clone(),
                ..shape
            })
        };
        let query = projected(&mut patch, &tower.site.query)?;
        let key = projected(&mut patch, &tower.site.key)?;
        let mut masks = Vec::new();
        for &mask in &tower.site.masks {
            // Bool has no place among the outputs that are read as numbers.
            let mut float = |value: ValueId| {
                let value = patch.cast(value, DataType::Float);
                outputs.push(value);
                patch.value(value).name.clone()
            };
            let value = float(mask.value());
            let fill = match mask {
                Mask::Chosen {
                    fill: Some(fill), ..
                } => Some(float(fill)),
                _ => None,
            };
            masks.push(Masked { mask, value, fill });
        }
        let mut seen = std::collections::HashSet::new();
        for value in outputs {
            let known = value.index() < model.value_count() && model.is_output(value);
            if !known && seen.insert(value) {
                patch.add_output(value, probe::INFERRED);
            }
        }
        let plan = patch.finish();
        let probes = Self { query, key, masks };
        Ok((model.clone().apply(plan)?, probes))
    }

    /// Queries and keys, one `[heads, T, head_dim]` for each image.
    pub(super) fn heads(
        &self,
        outputs: &Outputs,
        tower: &VisionTower,
        images: usize,
        tokens: usize,
    ) -> Result<(Heads, Heads), ValidateError> {
        let each = |p: &Projected| p.heads(outputs.get(&p.output)?, tower, images, tokens);
        Ok((each(&self.query)?, each(&self.key)?))
    }

    /// What is added to the logits of each image, `[heads, T, T]`; `None` without
    /// a mask.
    pub(super) fn masks(
        &self,
        outputs: &Outputs,
        tower: &VisionTower,
        images: usize,
        tokens: usize,
    ) -> Result<Option<Vec<Array3<f32>>>, ValidateError> {
        if self.masks.is_empty() {
            return Ok(None);
        }
        let dims = (images, tower.heads as usize, tokens, tokens);
        let mut sum = Array4::<f32>::zeros(dims);
        for masked in &self.masks {
            let whole = |name: &str| -> Result<Array4<f32>, ValidateError> {
                let array = outputs.get(name)?.to_tensor()?.to_array()?;
                let wide = array.broadcast(IxDyn(&[dims.0, dims.1, dims.2, dims.3]));
                let wide = wide.ok_or_else(|| {
                    ValidateError::Model(format!(
                        "a mask of the tower is {:?}; expected something that broadcasts to {dims:?}",
                        array.shape()
                    ))
                })?;
                let wide = wide.to_owned().into_dimensionality();
                wide.map_err(|e| ValidateError::Model(e.to_string()))
            };
            if let Mask::Segments(_) = masked.mask {
                let bounds = outputs.get(&masked.value)?.to_tensor()?.to_array()?;
                let segment = |at: usize| bounds.iter().filter(|b| **b <= at as f32).count();
                let numbers: Vec<usize> = (0..tokens).map(segment).collect();
                for ((_, _, query, key), s) in sum.indexed_iter_mut() {
                    if numbers[query] != numbers[key] {
                        *s = f32::NEG_INFINITY;
                    }
                }
                continue;
            }
            let value = whole(&masked.value)?;
            match masked.mask {
                Mask::Added(_) | Mask::Segments(_) => sum += &value,
                Mask::Chosen { when, .. } => {
                    let fill = match &masked.fill {
                        Some(name) => whole(name)?,
                        None => Array4::from_elem(dims, f32::NEG_INFINITY),
                    };
                    ndarray::Zip::from(&mut sum)
                        .and(&value)
                        .and(&fill)
                        .for_each(|s, v, f| {
                            if (*v != 0.0) != when {
                                *s += f;
                            }
                        });
                }
            }
        }
        Ok(Some(sum.outer_iter().map(|m| m.to_owned()).collect()))
    }
}

/// Makes a value that holds the operand's projection, and says where in it.
fn expose(patch: &mut Patch<'_>, operand: &Operand) -> Result<(ValueId, Projected), ValidateError> {
    let mut at = Projected {
        output: String::new(),
        part: None,
        columns: None,
        bias: Vec::new(),
    };
    let Some(packed) = &operand.packed else {
        return Ok((operand.root, at));
    };
    at.part = packed.part;
    let mut x = operand.root;
    match &packed.weight {
        None => {
            if let Some(bias) = packed.bias {
                let model = patch.model();
                let all = consts::constant(model, bias)
                    .and_then(|t| t.to_f64s(model.external()).ok())
                    .ok_or_else(|| {
                        ValidateError::Model(format!(
                            "the bias '{}' of a fused attention is not a constant",
                            model.name(bias)
                        ))
                    })?;
                let columns = packed.from as usize..(packed.from + packed.width) as usize;
                #[allow(clippy::cast_possible_truncation, reason = "it was fp32 or less")]
                at.bias.extend(all[columns].iter().map(|b| *b as f32));
            }
        }
        Some(weight) => {
            let mut matrix = weight.matrix;
            if let Some(q) = &weight.quantised {
                let back = |x, scale, zero: Option<ValueId>| {
                    let mut inputs = vec![Some(x), Some(scale)];
                    inputs.extend(zero.map(Some));
                    inputs
                };
                let inputs = back(x, q.input_scale, q.input_zero);
                x = patch.node("", "DequantizeLinear", &inputs, 1, vec![])[0];
                let inputs = back(matrix, q.weight_scale, q.weight_zero);
                let axis = vec![int("axis", 1)];
                matrix = patch.node("", "DequantizeLinear", &inputs, 1, axis)[0];
            }
            x = patch.op("MatMul", &[x, matrix]);
            if let Some(bias) = packed.bias {
                x = patch.op("Add", &[x, bias]);
            }
            at.columns = Some((packed.from, packed.width));
        }
    }
    Ok((x, at))
}

impl Projected {
    fn heads(
        &self,
        value: &Value,
        tower: &VisionTower,
        images: usize,
        tokens: usize,
    ) -> Result<Vec<Array3<f32>>, ValidateError> {
        let (heads, width) = (tower.heads as usize, tower.head_dim as usize);
        let mut array: ArrayD<f32> = value.to_tensor()?.to_array()?;
        let found = array.shape().to_vec();
        let wrong = || {
            ValidateError::Model(format!(
                "a projection of the tower is {found:?}; expected {images} × {tokens} × {heads} × {width} \
                 elements"
            ))
        };
        if let Some(part) = self.part {
            if array.ndim() != 5 || array.shape()[3] <= part as usize {
                return Err(wrong());
            }
            array = array.index_axis(Axis(3), part as usize).to_owned();
        }
        if let Some((from, count)) = self.columns {
            let axis = Axis(array.ndim() - 1);
            let columns = Slice::from(from as usize..(from + count) as usize);
            array = array.slice_axis(axis, columns).to_owned();
        }
        let data: Vec<f32> = array.iter().copied().collect();
        let mut split =
            Array4::from_shape_vec((images, tokens, heads, width), data).map_err(|_| wrong())?;
        if !self.bias.is_empty() {
            let bias = ndarray::ArrayView2::from_shape((heads, width), &self.bias);
            split += &bias.map_err(|_| wrong())?;
        }
        Ok(split
            .outer_iter()
            .map(|image| image.permuted_axes([1, 0, 2]).to_owned())
            .collect())
    }
}
