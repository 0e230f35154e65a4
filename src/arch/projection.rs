//! Queries and keys of fused attentions, which are no values of the graph.
//!
//! `com.microsoft` operators take the tokens with one packed weight, or queries,
//! keys and values in one tensor, and add the bias themselves. What a ranking
//! needs is then computed beside them, from the same weights.
//! Source: ONNX Runtime's operator documentation (`Attention`, `QAttention`,
//! `MultiHeadAttention` of the domain `com.microsoft`).

use super::attention::{Mask, Operand, Site, operand};
use super::tower::projection_width;
use crate::ir::{DataType, Model, Node, NodeId, Patch, Size, ValueId, consts};

/// What a fused operator does to an operand's root before it multiplies.
#[derive(Clone, Debug)]
pub struct Packed {
    /// The root `[b, T, D]` is multiplied by columns of this.
    pub weight: Option<PackedWeight>,
    /// The root is `[b, T, heads, parts, width]`, and this part is meant.
    pub part: Option<i64>,
    /// Columns of this are added.
    pub bias: Option<ValueId>,
    /// First column of weight and bias.
    pub from: i64,
    /// Number of columns: heads times head width.
    pub width: i64,
}

/// A weight that holds the columns of several projections.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    /// `[D, columns]`.
    pub matrix: ValueId,
    /// How root and matrix are quantised.
    pub quantised: Option<Quantised>,
}

/// Scales and zero points of `QAttention`.
#[derive(Clone, Debug)]
pub struct Quantised {
    /// Scale of the tokens.
    pub input_scale: ValueId,
    /// Scale of the weight: one, or one for each column.
    pub weight_scale: ValueId,
    /// Zero point of the tokens.
    pub input_zero: Option<ValueId>,
    /// Zero point of the weight: one, or one for each column.
    pub weight_zero: Option<ValueId>,
    /// Whether scale and zero point of the weight differ by column.
    pub by_column: bool,
}

impl Operand {
    /// What [`build`](Self::build) reads besides weights: values with their ranks
    /// and element types, for a tower that computes in `dtype`.
    pub fn reads(&self, model: &Model, dtype: DataType) -> Vec<(ValueId, usize, DataType)> {
        let packed = self.packed.as_ref();
        let rank = match packed.and_then(|p| p.part) {
            Some(_) => 5,
            None => 3,
        };
        let weight = packed.and_then(|p| p.weight.as_ref());
        let Some(quantised) = weight.and_then(|w| w.quantised.as_ref()) else {
            return vec![(self.root, rank, dtype)];
        };
        // The zero point, where it is a constant, has the tokens' type; what
        // DynamicQuantizeLinear gives is uint8.
        let zero = quantised.input_zero;
        let code = zero
            .and_then(|z| consts::constant(model, z))
            .map(|t| t.dtype);
        let code = code.filter(|t| !t.is_float()).unwrap_or(DataType::Uint8);
        let mut all = vec![(self.root, rank, code)];
        all.push((quantised.input_scale, 0, DataType::Float));
        all.extend(quantised.input_zero.map(|zero| (zero, 0, code)));
        all.retain(|(value, ..)| consts::constant(model, *value).is_none());
        all
    }

    /// The projection in a patch of the operand's model: its root, or what a
    /// fused operator makes of it, `[b, T, heads · width]` in rows as they are
    /// in the root. With `first`, a packed projection is computed for token 0
    /// alone, `[b, 1, …]`; the second result says whether that was done.
    pub fn build(&self, patch: &mut Patch<'_>, first: bool) -> (ValueId, bool) {
        let Some(packed) = &self.packed else {
            return (self.root, false);
        };
        let mut x = self.root;
        if first {
            x = patch.slice(x, Size::Known(0), Size::Known(1), 1);
        }
        if let Some(part) = packed.part {
            let part = patch.i64(part);
            x = patch.gather(x, part, 3);
            x = patch.reshape(x, &[0, 0, packed.width]);
        }
        let (from, to) = (
            Size::Known(packed.from),
            Size::Known(packed.from + packed.width),
        );
        if let Some(weight) = &packed.weight {
            let columns = patch.slice(weight.matrix, from, to, 1);
            x = match &weight.quantised {
                None => patch.op("MatMul", &[x, columns]),
                Some(q) => {
                    let mut own = |v: ValueId| match q.by_column {
                        true => patch.slice(v, from, to, 0),
                        false => v,
                    };
                    let scale = own(q.weight_scale);
                    let zero = q.weight_zero.map(&mut own);
                    let inputs = [Some(x), Some(columns), q.input_zero, zero];
                    let used = 1 + inputs.iter().rposition(Option::is_some).unwrap_or(1);
                    let product = patch.node("", "MatMulInteger", &inputs[..used], 1, vec![])[0];
                    let product = patch.cast(product, DataType::Float);
                    let scale = patch.op("Mul", &[scale, q.input_scale]);
                    patch.op("Mul", &[product, scale])
                }
            };
        }
        if let Some(bias) = packed.bias {
            let columns = patch.slice(bias, from, to, 0);
            x = patch.op("Add", &[x, columns]);
        }
        (x, first)
    }
}

/// A site of a fused operator of the domain `com.microsoft`; `None` if the node
/// is another one.
///
/// # Errors
/// What of the operator is not understood.
pub(super) fn fused(model: &Model, id: NodeId) -> Option<Result<Site, String>> {
    let node = model.node(id);
    let site = if node.is_ms("Attention") {
        packed_weight(model, id, node, [3, 4, 5])
    } else if node.is_ms("QAttention") {
        packed_weight(model, id, node, [5, 8, 9])
    } else if node.is_ms("MultiHeadAttention") {
        multi_head(model, id, node)
    } else if node.is_ms("PackedMultiHeadAttention") || node.is_ms("PackedAttention") {
        Err(
            "packed attention is not supported; export with a MultiHeadAttention in a Loop (Olive's \
             PackedAttentionToLoopMHA), or with masks"
                .into(),
        )
    } else {
        return None;
    };
    Some(site.map_err(|why| format!("{}: {why}", model.describe(id))))
}

/// The number of heads, and everything that would make the operator another one
/// than softmax(scale · q·kᵀ + bias)·v.
pub(super) fn heads_of(node: &Node, refused: &[(usize, &str)]) -> Result<i64, String> {
    for attribute in ["unidirectional", "do_rotary"] {
        if node.attr_int(attribute).unwrap_or(0) != 0 {
            return Err(format!(
                "'{attribute}' is not supported in a fused attention; export without attention fusion"
            ));
        }
    }
    for (slot, name) in refused {
        if node.input(*slot).is_some() {
            return Err(format!(
                "input {slot} ({name}) is not supported in a fused attention; export without attention fusion"
            ));
        }
    }
    let heads = node.attr_int("num_heads").filter(|h| *h > 0);
    heads.ok_or_else(|| "expected a positive 'num_heads'".into())
}

pub(super) fn scale_of(node: &Node, head_dim: i64) -> f64 {
    let stated = node.attr_float("scale").map(f64::from);
    let stated = stated.filter(|s| *s != 0.0);
    stated.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt())
}

/// `Attention` and `QAttention`: tokens and one weight for q, k and v. `slots`
/// are those of mask, cache and additive bias.
fn packed_weight(
    model: &Model,
    id: NodeId,
    node: &Node,
    slots: [usize; 3],
) -> Result<Site, String> {
    let [mask, past, bias] = slots;
    let (Some(x), Some(matrix)) = (node.input(0), node.input(1)) else {
        return Err("expected tokens and a packed weight".into());
    };
    let columns = consts::dims(model, matrix).filter(|d| d.len() == 2);
    let Some(columns) = columns.map(|d| d[1]) else {
        return Err(format!(
            "expected a packed weight [D, columns] that is a constant, found '{}'; ONNX's own Attention turned \
             into this operator by a quantiser is not valid (ONNX Runtime does not load it): quantise only \
             MatMul and Gemm, or export without attention fusion",
            model.name(matrix)
        ));
    };
    let heads = heads_of(node, &[(mask, "mask_index"), (past, "past")])?;
    let sizes = match node.attr_ints("qkv_hidden_sizes") {
        Some([q, k, _]) => (*q, *k),
        _ if columns % 3 == 0 => (columns / 3, columns / 3),
        _ => return Err(format!("expected 3 equal parts, found {columns} columns")),
    };
    if sizes.0 != sizes.1 || sizes.0 % heads != 0 || sizes.0 <= 0 || 2 * sizes.0 > columns {
        return Err(format!(
            "expected queries and keys of one width, a multiple of {heads} heads, found {sizes:?}"
        ));
    }
    let width = sizes.0;
    let quantised = match node.is_ms("QAttention") {
        false => None,
        true => {
            let (Some(input_scale), Some(weight_scale)) = (node.input(3), node.input(4)) else {
                return Err("expected scales of tokens and weight".into());
            };
            let many =
                |v: ValueId| consts::dims(model, v).is_some_and(|d| d.iter().any(|n| *n > 1));
            let zero = node.input(7);
            let by_column = many(weight_scale);
            if zero.is_some_and(|z| many(z) != by_column) {
                return Err("expected scale and zero point of the weight of one shape".into());
            }
            Some(Quantised {
                input_scale,
                weight_scale,
                input_zero: node.input(6),
                weight_zero: zero,
                by_column,
            })
        }
    };
    let weight = PackedWeight { matrix, quantised };
    let part = |from: i64| Operand {
        value: x,
        root: x,
        scale: 1.0,
        heads: Some((heads, width / heads)),
        packed: Some(Packed {
            weight: Some(weight.clone()),
            part: None,
            bias: node.input(2),
            from,
            width,
        }),
    };
    let mut site = Site::of(id, part(0), part(width), scale_of(node, width / heads));
    if !node.is_ms("QAttention") {
        site.masks.extend(node.input(bias).map(Mask::Added));
    }
    Ok(site)
}

/// `MultiHeadAttention`: q, k and v apart, or packed, with an optional bias.
fn multi_head(model: &Model, id: NodeId, node: &Node) -> Result<Site, String> {
    let refused = [
        (4, "key_padding_mask"),
        (6, "past_key"),
        (7, "past_value"),
        (9, "cache_indirection"),
    ];
    let heads = heads_of(node, &refused)?;
    let Some(q) = node.input(0) else {
        return Err("expected queries".into());
    };
    let bias = node.input(3);
    let bias_width = bias.and_then(|b| consts::dims(model, b)).map(|d| d[0] / 3);
    let (mut query, mut key) = match (node.input(1), node.input(2)) {
        // [b, T, heads, 3, width]
        (None, None) => (part_of(q, 0), part_of(q, 1)),
        // [b, T, heads · width] and [b, T, heads, 2, width]
        (Some(kv), None) => (operand(model, q), part_of(kv, 0)),
        (Some(k), Some(_)) => (operand(model, q), operand(model, k)),
        (None, Some(_)) => return Err("expected keys where there are values".into()),
    };
    let known = [
        query.heads.map(|h| h.0 * h.1).filter(|w| *w > 0),
        bias_width,
        packed_width(model, q),
        node.input(1).and_then(|k| packed_width(model, k)),
        projection_width(model, query.root),
        projection_width(model, key.root),
    ];
    let width = known
        .into_iter()
        .flatten()
        .find(|w| *w > 0 && w % heads == 0);
    let Some(width) = width else {
        return Err(format!(
            "the width of its {heads} heads is stated neither by a bias, a projection nor a shape"
        ));
    };
    for (operand, from) in [(&mut query, 0), (&mut key, width)] {
        operand.heads = Some((heads, width / heads));
        match &mut operand.packed {
            Some(packed) => {
                (packed.bias, packed.from, packed.width) = (bias, from, width);
            }
            None if bias.is_some() => {
                if operand.scale != 1.0 {
                    return Err("scaled operands with a bias are not supported".into());
                }
                // The bias is added to rows [b, T, heads · width].
                operand.root = operand.value;
                operand.packed = Some(Packed {
                    weight: None,
                    part: None,
                    bias,
                    from,
                    width,
                });
            }
            None => {}
        }
    }
    let mut site = Site::of(id, query, key, scale_of(node, width / heads));
    site.masks.extend(node.input(5).map(Mask::Added));
    Ok(site)
}

fn part_of(value: ValueId, part: i64) -> Operand {
    Operand {
        value,
        root: value,
        scale: 1.0,
        heads: None,
        packed: Some(Packed {
            weight: None,
            part: Some(part),
            bias: None,
            from: 0,
            width: 0,
        }),
    }
}

/// heads · width of `[b, T, heads, parts, width]`, from its type or the reshape
/// that makes it.
fn packed_width(model: &Model, value: ValueId) -> Option<i64> {
    let stated = model.value(value).ty.as_ref().and_then(|t| t.shape());
    if let Some([_, _, heads, _, width]) = stated {
        return Some(heads.known()? * width.known()?);
    }
    let node = model.producer_node(value).filter(|n| n.is("Reshape"))?;
    match consts::ints(model, node.input(1)?)?.as_slice() {
        [_, _, heads, _, width] if *heads > 0 && *width > 0 => Some(heads * width),
        _ => None,
    }
}
