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
//! Where a vision encoder gives fewer tokens than the grid has, those that are left have the positions of
//! their places in the whole grid, and the text goes on as if the whole grid had been there.
//!
//! Source: Transformers 5.22, `get_rope_index` and `get_vision_position_ids` of `Qwen2_5_VLModel`
//! (`models/qwen2_5_vl/modeling_qwen2_5_vl.py`) and of `Qwen2VLModel`, which has no times of clips.

use ndarray::{Array2, Array3};

use super::decoder::{StepInput, integers};
use super::error::{Result, RuntimeError};
use super::session::Port;
use super::tensor::DType;
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

/// The tokens of one image or clip in a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The whole grid.
    pub grid: Grid,
    /// Which tokens of the grid are in the prompt, ascending; `None` is all of them.
    pub kept: Option<Vec<usize>>,
    /// Positions from one frame to the next: 1, or for clips of models that know of time, tokens for a second
    /// times seconds for a frame of the grid.
    pub interval: f32,
}

impl Block {
    /// Number of tokens in the prompt.
    pub fn tokens(&self) -> usize {
        self.kept
            .as_ref()
            .map_or_else(|| self.grid.tokens(), Vec::len)
    }

    /// Offsets in time, height and width of the token that is number `index` in the prompt.
    fn place(&self, index: usize) -> [i64; 3] {
        let index = self.kept.as_ref().map_or(index, |kept| kept[index]);
        let [time, height, width] = self.grid.place(index);
        // In single precision and cut off, as Transformers computes it.
        let time = (time as f32 * self.interval) as i64;
        [time, height as i64, width as i64]
    }

    fn check(&self) -> Result<()> {
        let Some(kept) = &self.kept else {
            return Ok(());
        };
        let ascending = kept.windows(2).all(|pair| pair[0] < pair[1]);
        if ascending && kept.last().is_none_or(|last| *last < self.grid.tokens()) {
            return Ok(());
        }
        Err(RuntimeError::Tensor(format!(
            "the tokens {kept:?} are kept of {:?}; expected ascending indices below {}",
            self.grid,
            self.grid.tokens()
        )))
    }
}

impl From<Grid> for Block {
    fn from(grid: Grid) -> Self {
        Self {
            grid,
            kept: None,
            interval: 1.0,
        }
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
        let blocks: Vec<Block> = grids.iter().map(|grid| (*grid).into()).collect();
        self.advance_blocks(visual, mask, &blocks)
    }

    /// The same for images of which some tokens are left out, and clips with times of their own. What comes
    /// after these tokens goes on behind the largest position that any of them has, which is a clip's last time
    /// where that is later than the text behind it.
    ///
    /// # Errors
    /// As [`advance`](Self::advance); tokens are kept that a grid does not have.
    pub fn advance_blocks(
        &mut self,
        visual: &Array2<bool>,
        mask: &Array2<i64>,
        blocks: &[Block],
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
        blocks.iter().try_for_each(Block::check)?;
        let mut positions = Array3::zeros((3, batch, length));
        let mut blocks = blocks.iter().filter(|b| b.tokens() > 0);
        for (row, next) in self.next.iter_mut().enumerate() {
            // The image that is being laid out, and how many of its tokens are.
            let mut open: Option<(&Block, usize)> = None;
            let mut largest = *next - 1;
            for token in (0..length).filter(|&t| mask[[row, t]] != 0) {
                if !visual[[row, token]] {
                    if let Some((block, laid)) = open {
                        return wrong(format!(
                            "an image of {:?} has {laid} tokens in row {row}; expected {}",
                            block.grid,
                            block.tokens()
                        ));
                    }
                    for plane in 0..3 {
                        positions[[plane, row, token]] = *next;
                    }
                    largest = largest.max(*next);
                    *next += 1;
                    continue;
                }
                let Some((block, laid)) = open.or_else(|| blocks.next().map(|b| (b, 0))) else {
                    return wrong(format!(
                        "token {token} of row {row} is an image's, and no grid is left; expected a grid for \
                         each image"
                    ));
                };
                for (plane, place) in block.place(laid).into_iter().enumerate() {
                    positions[[plane, row, token]] = *next + place;
                    largest = largest.max(*next + place);
                }
                open = Some((block, laid + 1)).filter(|_| laid + 1 < block.tokens());
                if open.is_none() {
                    *next += block.grid.height.max(block.grid.width) as i64;
                }
            }
            if let Some((block, laid)) = open {
                return wrong(format!(
                    "row {row} ends after {laid} tokens of an image of {:?}; expected {}",
                    block.grid,
                    block.tokens()
                ));
            }
            *next = (*next).max(largest + 1);
        }
        if let Some(block) = blocks.next() {
            return wrong(format!(
                "no tokens are marked for an image of {:?}",
                block.grid
            ));
        }
        Ok(positions)
    }
}

/// Positions of a step in the type and rank that an input declares: counted from the mask, or, where the input
/// takes three for each token, what follows `before`. Those are returned as they are after the step.
///
/// # Errors
/// Grids are needed and not given, or do not fit the tokens.
pub(super) fn positions(
    port: &Port,
    input: &StepInput,
    before: Option<&GridPositions>,
    step_mask: &Array2<i64>,
    counted: impl FnOnce() -> Array2<i64>,
    first: bool,
) -> Result<(Value, Option<GridPositions>)> {
    if port.dims.len() != 3 {
        return Ok((integers(port, counted())?, None));
    }
    let mut places = match (before, &input.blocks) {
        (Some(before), _) => before.clone(),
        (None, Some(_)) if first => GridPositions::new(step_mask.nrows()),
        (None, _) => {
            return Err(RuntimeError::Tensor(format!(
                "'{}' takes several positions for each token (M-RoPE), which cannot be counted from the mask; \
                 give the grids of the images (a vision encoder that takes image_grid_thw has them), or the \
                 positions that GridPositions makes of them",
                port.name
            )));
        }
    };
    let none = Array2::default(step_mask.dim());
    let visual = input.visual.as_ref().unwrap_or(&none);
    let blocks = input.blocks.as_deref().unwrap_or_default();
    let found = places.advance_blocks(visual, step_mask, blocks)?;
    let found = match port.dtype {
        Some(DType::I32) => found
            .mapv(|p| i32::try_from(p).unwrap_or(i32::MAX))
            .into_dyn()
            .into(),
        _ => found.into_dyn().into(),
    };
    Ok((Value::new(found)?, Some(places)))
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

    /// What is left of an image keeps its places, and the text behind it does not notice.
    #[test]
    fn kept_tokens_have_the_places_of_the_whole_grid() {
        let whole = grid(1, 3, 4);
        let text = |places: &mut GridPositions| {
            let (visual, mask) = drawn(&["tt"]);
            places.advance(&visual, &mask, &[]).unwrap()
        };
        let (visual, mask) = drawn(&["tiiiiiiiiiiiit"]);
        let mut all = GridPositions::new(1);
        let expected = all.advance(&visual, &mask, &[whole]).unwrap();
        let kept = vec![0, 3, 6, 11];
        let block = Block {
            kept: Some(kept.clone()),
            ..whole.into()
        };
        assert_eq!(block.tokens(), 4);
        let (visual, mask) = drawn(&["tiiiit"]);
        let mut some = GridPositions::new(1);
        let found = some.advance_blocks(&visual, &mask, &[block]).unwrap();
        let columns = [0]
            .into_iter()
            .chain(kept.iter().map(|k| k + 1))
            .chain([13]);
        for (new, old) in columns.enumerate() {
            assert_eq!(found.slice(s![.., 0, new]), expected.slice(s![.., 0, old]));
        }
        assert_eq!(text(&mut some), text(&mut all));
    }

    /// Transformers 5.22, `Qwen2_5_VLModel.get_rope_index`, 2 tokens a second, a text token, a clip of 3 × 1 × 2
    /// with 1.3 seconds for each frame of the grid, and a text token: rows `[0, 1, 1, 3, 3, 6, 6, 3]`,
    /// `[0, 1, 1, 1, 1, 1, 1, 3]`, `[0, 1, 2, 1, 2, 1, 2, 3]`, and `mrope_position_deltas` of −1.
    #[test]
    fn clips_have_times_and_answers_go_on_behind_the_last() {
        let block = Block {
            interval: 2.0 * 1.3,
            ..grid(3, 1, 2).into()
        };
        let (visual, mask) = drawn(&["tiiiiiit"]);
        let mut places = GridPositions::new(1);
        let found = places.advance_blocks(&visual, &mask, &[block]).unwrap();
        assert_eq!(
            found.slice(s![.., 0, ..]),
            arr2(&[
                [0, 1, 1, 3, 3, 6, 6, 3],
                [0, 1, 1, 1, 1, 1, 1, 3],
                [0, 1, 2, 1, 2, 1, 2, 3],
            ])
        );
        let (visual, mask) = drawn(&["t"]);
        let found = places.advance(&visual, &mask, &[]).unwrap();
        assert_eq!(found[[0, 0, 0]], 8 - 1);
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
        let (visual, mask) = drawn(&["ii"]);
        for kept in [vec![1, 1], vec![0, 4]] {
            let block = Block {
                kept: Some(kept),
                ..grid(1, 2, 2).into()
            };
            let error = GridPositions::new(1).advance_blocks(&visual, &mask, &[block]);
            assert!(error.unwrap_err().to_string().contains("below 4"));
        }
    }
}
