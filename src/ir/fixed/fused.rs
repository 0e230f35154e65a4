//! Types and shapes that ONNX Runtime's own operators give.
//!
//! Source: ONNX Runtime, `docs/ContribOperators.md`.

use super::fact::{Call, Fact};
use super::shapes::matmul;

/// What is known of the outputs; none for operators without a rule.
pub(super) fn infer(call: &Call<'_>) -> Option<Vec<Fact>> {
    if call.node.domain != "com.microsoft" {
        return None;
    }
    let known = |shape: Vec<i64>| Fact::of(call.dtype(0), shape);
    let own = || call.shape(0).map(|s| known(s.to_vec()));
    match call.node.op_type.as_str() {
        "QuickGelu"
        | "BiasGelu"
        | "FastGelu"
        | "Gelu"
        | "RotaryEmbedding"
        | "SimplifiedLayerNormalization" => Some(vec![own()?]),
        // Mean and deviation are given in training only; the fourth is the sum.
        "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization" => {
            Some(vec![own()?, Fact::default(), Fact::default(), own()?])
        }
        "FusedMatMul" => {
            let side = |slot: usize, transposed: &str, batch: &str| {
                let mut shape = call.shape(slot)?.to_vec();
                if call.attribute(batch, 0) != 0 {
                    return None;
                }
                if call.attribute(transposed, 0) != 0 {
                    let last = shape.len().checked_sub(2)?;
                    shape.swap(last, last + 1);
                }
                Some(shape)
            };
            let (a, b) = (
                side(0, "transA", "transBatchA")?,
                side(1, "transB", "transBatchB")?,
            );
            Some(vec![known(matmul(&a, &b)?)])
        }
        "MatMulNBits" => {
            let mut shape = call.shape(0)?.to_vec();
            *shape.last_mut()? = call.node.attr_int("N")?;
            Some(vec![known(shape)])
        }
        "GroupQueryAttention" => group(call),
        "MultiHeadAttention" => multi_head(call),
        "Attention" => {
            let [batch, rows, _] = *call.shape(0)? else {
                return None;
            };
            let values = call
                .node
                .attr_ints("qkv_hidden_sizes")
                .and_then(|s| s.last());
            let packed = || call.shape(1)?.last().map(|all| all / 3);
            let width = values.copied().or_else(packed)?;
            Some(vec![known(vec![batch, rows, width])])
        }
        _ => None,
    }
}

/// Batch, heads, columns and width of what is in a cache.
fn cached(past: Option<&[i64]>) -> Option<[i64; 4]> {
    past?.try_into().ok()
}

fn group(call: &Call<'_>) -> Option<Vec<Fact>> {
    let known = |shape: Vec<i64>| Fact::of(call.dtype(0), shape);
    let [batch, rows, width] = *call.shape(0)? else {
        return None;
    };
    let heads = call.node.attr_int("num_heads")?;
    let key_heads = call.node.attr_int("kv_num_heads")?;
    let packed = call.fact(1).is_none();
    let head = match packed {
        true => width / (heads + 2 * key_heads),
        false => width / heads,
    };
    let past = cached(call.shape(3)).map_or(0, |p| p[2]);
    let cache = vec![batch, key_heads, past + rows, head];
    Some(vec![
        known(vec![batch, rows, heads * head]),
        known(cache.clone()),
        known(cache),
    ])
}

fn multi_head(call: &Call<'_>) -> Option<Vec<Fact>> {
    let known = |shape: Vec<i64>| Fact::of(call.dtype(0), shape);
    let heads = call.node.attr_int("num_heads")?;
    let past = cached(call.shape(6)).map_or(0, |p| p[2]);
    let (batch, rows, width, columns, values) = match (*call.shape(0)?).to_vec()[..] {
        [b, s, h, 3, d] => (b, s, h * d, s, h * d),
        [b, s, d] => match (call.shape(1), call.shape(2)) {
            (Some(&[_, t, _]), Some(&[_, _, v])) => (b, s, d, t, v),
            (Some(&[_, h, t, _]), Some(&[_, _, _, v])) => (b, s, d, t, h * v),
            _ => return None,
        },
        _ => return None,
    };
    let key = vec![batch, heads, past + columns, width / heads];
    let value = vec![batch, heads, past + columns, values / heads];
    Some(vec![
        known(vec![batch, rows, values]),
        known(key),
        known(value),
    ])
}
