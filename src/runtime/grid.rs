//! Positions of M-RoPE: three numbers for each token instead of one.
//!
//! ```text
//!            text    image of 1 × 2 × 3   text
//! time       0  1    2  2  2  2  2  2     5  6
//! height     0  1    2  2  2  3  3  3     5  6
//! width      0  1    2  3  4  2  3  4     5  6
//! ```
//!
//! A text token has the same number in all rows; an image's tokens are numbered by
//! their places in its grid, from where the text before it ended; the text behind it
//! goes on behind the longer edge. So positions cannot be counted from the mask, and
//! the next one has to be carried from step to step.
//!
//! Source: Transformers, `Qwen2_5_VLModel.get_rope_index`
//! (`models/qwen2_5_vl/modeling_qwen2_5_vl.py`).

use ndarray::{Array2, Array3};

use super::decoder::integers;
use super::error::{Result, RuntimeError};
use super::session::Port;
use super::value::Value;

/// How the tokens of one image lie, in order of time, then height, then width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Frames (1 for an image).
    pub time: usize,
    /// Rows of tokens, which are patches merged by the vision tower.
    pub height: usize,
    /// Columns of tokens.
    pub width: usize,
}

impl Grid {
    /// Number of tokens.
    pub fn tokens(self) -> usize {
        self.time * self.height * self.width
    }

    /// Time, height and width of token `index`.
    fn place(self, index: usize) -> [usize; 3] {
        let plane = self.height * self.width;
        let (time, rest) = (index / plane, index % plane);
        [time, rest / self.width, rest % self.width]
    }
}

/// The next position of each row of a conversation.
#[derive(Clone, Debug)]
pub struct GridPositions {
    next: Vec<i64>,
}

impl GridPositions {
    /// A conversation of `batch` rows in which nothing was said yet.
    pub fn new(batch: usize) -> Self {
        Self {
            next: vec![0; batch],
        }
    }

    /// Positions `[3, b, L]` of new tokens. `visual [b, L]` says which are an image's,
    /// `mask [b, L]` is 0 for padding (whose positions are 0), and `grids` are those of
    /// the images, over all rows in order.
    ///
    /// # Errors
    /// Shapes do not agree, or the images have more or fewer tokens than their grids.
    pub fn advance(
        &mut self,
        visual: &Array2<bool>,
        mask: &Array2<i64>,
        grids: &[Grid],
    ) -> Result<Array3<i64>> {
        let wrong = |what: String| Err(RuntimeError::Tensor(what));
        let (batch, length) = mask.dim();
        if visual.dim() != (batch, length) || self.next.len() != batch {
            return wrong(format!(
                "positions of {} rows were asked for visual tokens {:?} and a mask {:?}; expected [rows, \
                 tokens] of both",
                self.next.len(),
                visual.dim(),
                mask.dim()
            ));
        }
        let mut positions = Array3::zeros((3, batch, length));
        let mut grids = grids.iter().filter(|g| g.tokens() > 0);
        for (row, next) in self.next.iter_mut().enumerate() {
            // The image that is being laid out, and how many of its tokens are.
            let mut open: Option<(Grid, usize)> = None;
            for token in (0..length).filter(|&t| mask[[row, t]] != 0) {
                if !visual[[row, token]] {
                    if let Some((grid, laid)) = open {
                        return wrong(format!(
                            "an image of {grid:?} has {laid} tokens in row {row}; expected {}",
                            grid.tokens()
                        ));
                    }
                    for plane in 0..3 {
                        positions[[plane, row, token]] = *next;
                    }
                    *next += 1;
                    continue;
                }
                let Some((grid, laid)) = open.or_else(|| grids.next().map(|g| (*g, 0))) else {
                    return wrong(format!(
                        "token {token} of row {row} is an image's, and no grid is left; expected a grid for \
                         each image"
                    ));
                };
                for (plane, place) in grid.place(laid).into_iter().enumerate() {
                    positions[[plane, row, token]] = *next + place as i64;
                }
                open = Some((grid, laid + 1)).filter(|_| laid + 1 < grid.tokens());
                if open.is_none() {
                    *next += grid.height.max(grid.width) as i64;
                }
            }
            if let Some((grid, laid)) = open {
                return wrong(format!(
                    "row {row} ends after {laid} tokens of an image of {grid:?}; expected {}",
                    grid.tokens()
                ));
            }
        }
        if let Some(grid) = grids.next() {
            return wrong(format!("no tokens are marked for an image of {grid:?}"));
        }
        Ok(positions)
    }
}

/// Positions counted from the mask, in the type that an input declares.
///
/// # Errors
/// The input takes several for each token, which a mask does not tell.
pub(super) fn counted(port: &Port, positions: Array2<i64>) -> Result<Value> {
    if port.dims.len() == 3 {
        return Err(RuntimeError::Tensor(format!(
            "'{}' takes several positions for each token (M-RoPE), which cannot be counted from the mask; \
             give those that GridPositions makes of the images' grids",
            port.name
        )));
    }
    integers(port, positions)
}

#[cfg(test)]
mod tests {
    use ndarray::{arr2, s};

    use super::*;

    fn grid(time: usize, height: usize, width: usize) -> Grid {
        Grid {
            time,
            height,
            width,
        }
    }

    /// Rows of flags from a drawing: `i` is an image's token, `t` text, `.` padding.
    fn drawn(rows: &[&str]) -> (Array2<bool>, Array2<i64>) {
        let at = |r: usize, i: usize| rows[r].as_bytes()[i];
        let shape = (rows.len(), rows[0].len());
        (
            Array2::from_shape_fn(shape, |(r, i)| at(r, i) == b'i'),
            Array2::from_shape_fn(shape, |(r, i)| i64::from(at(r, i) != b'.')),
        )
    }

    /// What Transformers' `get_rope_index` gives for the same tokens: text, a grid of 2 × 3, text, and
    /// behind them a row on the left of which two tokens are padding.
    #[test]
    fn images_are_numbered_by_their_grid_and_text_goes_on_behind_the_longer_edge() {
        let (visual, mask) = drawn(&["ttiiiiiitt", "..tiiiittt"]);
        let mut places = GridPositions::new(2);
        let found = places
            .advance(&visual, &mask, &[grid(1, 2, 3), grid(1, 2, 2)])
            .unwrap();
        assert_eq!(
            found.slice(s![.., 0, ..]),
            arr2(&[
                [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
                [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
                [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
            ])
        );
        assert_eq!(
            found.slice(s![.., 1, ..]),
            arr2(&[
                [0, 0, 0, 1, 1, 1, 1, 3, 4, 5],
                [0, 0, 0, 1, 1, 2, 2, 3, 4, 5],
                [0, 0, 0, 1, 2, 1, 2, 3, 4, 5],
            ])
        );
        // A further step goes on from there.
        let (visual, mask) = drawn(&["t", "t"]);
        let found = places.advance(&visual, &mask, &[]).unwrap();
        assert_eq!(found.slice(s![0, .., ..]), arr2(&[[7], [6]]));
    }

    #[test]
    fn images_side_by_side_and_frames() {
        let (visual, mask) = drawn(&["iiiiiiiiii"]);
        let found = GridPositions::new(1)
            .advance(&visual, &mask, &[grid(2, 2, 2), grid(1, 1, 2)])
            .unwrap();
        assert_eq!(
            found.slice(s![.., 0, ..]),
            arr2(&[
                [0, 0, 0, 0, 1, 1, 1, 1, 2, 2],
                [0, 0, 1, 1, 0, 0, 1, 1, 2, 2],
                [0, 1, 0, 1, 0, 1, 0, 1, 2, 3],
            ])
        );
    }

    #[test]
    fn grids_that_do_not_fit_are_errors() {
        let fails = |row: &str, grids: &[Grid]| {
            let (visual, mask) = drawn(&[row]);
            let error = GridPositions::new(1).advance(&visual, &mask, grids);
            error.unwrap_err().to_string()
        };
        assert!(fails("tiit", &[grid(1, 2, 2)]).contains("has 2 tokens"));
        assert!(fails("tii", &[grid(1, 2, 2)]).contains("ends after 2"));
        assert!(fails("tiit", &[]).contains("no grid is left"));
        assert!(fails("tiit", &[grid(1, 1, 2); 2]).contains("no tokens are marked"));
    }
}
