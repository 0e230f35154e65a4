//! Rotary position embedding, for models whose attention operator applies it inside.

use ndarray::{Array3, ArrayView2, ArrayView3};

use super::OracleError;

/// `x [heads, L, head_dim]`, each token turned by its position: of every head, the first
/// `2 · cos.ncols()` columns are pairs (a, b) that become (a·cos − b·sin, b·cos + a·sin); pair i is
/// columns i and i + ncols, or 2i and 2i + 1 if `interleaved`. `cos` and `sin` are
/// `[positions, pairs]`.
///
/// # Errors
/// [`OracleError::Shape`] if tables or columns do not fit, [`OracleError::Index`] for a position
/// outside of the tables.
pub fn rotate(
    x: ArrayView3<'_, f32>,
    cos: ArrayView2<'_, f32>,
    sin: ArrayView2<'_, f32>,
    positions: &[i64],
    interleaved: bool,
) -> Result<Array3<f32>, OracleError> {
    let (_, length, width) = x.dim();
    let pairs = cos.ncols();
    if sin.dim() != cos.dim() || 2 * pairs > width || positions.len() != length {
        return Err(OracleError::Shape {
            what: "rotary tables",
            expected: format!("up to {} columns, for {length} tokens", width / 2),
            found: format!(
                "{:?} and {:?}, for {} tokens",
                cos.dim(),
                sin.dim(),
                positions.len()
            ),
        });
    }
    let mut out = x.to_owned();
    for (token, &position) in positions.iter().enumerate() {
        let row = usize::try_from(position).ok().filter(|p| *p < cos.nrows());
        let row = row.ok_or_else(|| OracleError::Index {
            what: "position",
            expected: format!("a row of a rotary table of {}", cos.nrows()),
            found: position.to_string(),
        })?;
        for pair in 0..pairs {
            let (first, second) = if interleaved {
                (2 * pair, 2 * pair + 1)
            } else {
                (pair, pair + pairs)
            };
            let (c, s) = (f64::from(cos[[row, pair]]), f64::from(sin[[row, pair]]));
            for mut head in out.outer_iter_mut() {
                let (a, b) = (
                    f64::from(head[[token, first]]),
                    f64::from(head[[token, second]]),
                );
                #[allow(clippy::cast_possible_truncation, reason = "tensors are fp32")]
                let turned = ((a * c - b * s) as f32, (b * c + a * s) as f32);
                (head[[token, first]], head[[token, second]]) = turned;
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, Array3, arr2};

    #[test]
    fn quarter_turns_move_columns() {
        // Position 0 turns by nothing, position 1 by 90 degrees; the last column is no pair's.
        let (cos, sin) = (
            arr2(&[[1.0, 1.0], [0.0, 0.0]]),
            arr2(&[[0.0, 0.0], [1.0, 1.0]]),
        );
        let x = Array3::from_shape_fn((1, 2, 5), |(_, _, d)| d as f32 + 1.0);
        let halves = rotate(x.view(), cos.view(), sin.view(), &[0, 1], false).unwrap();
        assert_eq!(halves.as_slice().unwrap()[..5], [1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(halves.as_slice().unwrap()[5..], [-3.0, -4.0, 1.0, 2.0, 5.0]);
        let pairs = rotate(x.view(), cos.view(), sin.view(), &[1, 1], true).unwrap();
        assert_eq!(pairs.as_slice().unwrap()[..5], [-2.0, 1.0, -4.0, 3.0, 5.0]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let table = Array2::<f32>::ones((2, 2));
        let x = Array3::<f32>::ones((1, 1, 4));
        let turn =
            |positions: &[i64]| rotate(x.view(), table.view(), table.view(), positions, false);
        assert!(matches!(turn(&[2]), Err(OracleError::Index { .. })));
        assert!(matches!(turn(&[-1]), Err(OracleError::Index { .. })));
        assert!(matches!(turn(&[0, 1]), Err(OracleError::Shape { .. })));
    }
}
