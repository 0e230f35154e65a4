//! Encoders of patch rows beside each other: images in grids of different shapes, one call for each.

use ndarray::{Array2, Array3};

use super::reference::{Ranking, ReferenceRows, RowsOut, Tolerance, row_feed};
use super::scenario::{self, Layout, Seeded, Turn, lay_out};
use super::tally::Tally;
use super::{ValidateError, oracle, probe};
use crate::arch::VisionTower;
use crate::ir::Model;
use crate::passes::{Count, KEPT_OUTPUT, Placement, TokenMerge};
use crate::runtime::{Grid, GridPositions, Outputs, Session, SessionOptions, Tensor, Value};

/// Grids of tokens that images take in turn: with windows cut off on each side, two frames, and a single row.
const GRIDS: [[usize; 3]; 5] = [[1, 4, 5], [1, 3, 2], [2, 3, 4], [1, 6, 7], [1, 1, 3]];

/// Base and rewritten encoder, opened.
pub(super) struct RowPair {
    reference: ReferenceRows,
    run: Session,
    pixels: String,
    grid: Option<String>,
    features: String,
    width: usize,
    grids: Vec<[usize; 3]>,
    /// Patches along the edges of a token.
    unit: [usize; 2],
    next: usize,
    placement: Placement,
}

/// An image as both encoders saw it.
pub(super) struct Seen {
    /// Features of the reference.
    pub(super) want: Array2<f32>,
    /// Features of the rewritten encoder, marker channel included.
    pub(super) found: Tensor,
    /// All tokens of the image.
    pub(super) grid: Grid,
    /// Places of the features among them.
    pub(super) kept: Vec<usize>,
    /// Which of the features were discarded and left in their places.
    pub(super) gone: Vec<bool>,
}

/// Patches along the edges of a token that is made of `per`.
fn unit(per: i64) -> [usize; 2] {
    let per = usize::try_from(per).unwrap_or(1);
    match per.isqrt() {
        edge if edge * edge == per => [edge, edge],
        _ => [1, per],
    }
}

/// Grids of tokens to ask about: the one that the file is made for, or several, one of them beyond a budget of
/// so many tokens.
fn grids(tower: &VisionTower, merge: Option<&TokenMerge>) -> Vec<[usize; 3]> {
    let fixed = tower.candidates().and_then(|n| usize::try_from(n).ok());
    if let Some(tokens) = fixed {
        let grid = scenario::grid(tokens, 0);
        return vec![[grid.time, grid.height, grid.width]];
    }
    let asked = |count: Count| match count {
        Count::Tokens(n) => usize::try_from(n).unwrap_or(0),
        Count::Ratio(_) => 0,
    };
    let total = merge.map_or(0, |m| asked(m.dominant) + asked(m.contextual));
    let mut all = GRIDS.to_vec();
    // The largest of the list holds 42.
    if total >= 40 {
        let edge = (total + total / 5).isqrt() + 1;
        all.insert(3, [1, edge, edge]);
    }
    all
}

impl RowPair {
    pub(super) fn open(
        old: &Model,
        new: &Model,
        tower: &VisionTower,
        merge: Option<(&TokenMerge, Placement)>,
        name: &str,
        options: &SessionOptions,
    ) -> Result<Self, ValidateError> {
        let wrong = |what: &str| ValidateError::Model(format!("{name}: {what}"));
        let placement = merge.map_or(Placement::Encoder, |(_, placement)| placement);
        let merge = merge.map(|(merge, _)| merge);
        let rows = tower
            .rows
            .as_ref()
            .ok_or_else(|| wrong("takes no rows of patches"))?;
        let width = rows
            .patch_width(old, tower)
            .and_then(|w| usize::try_from(w).ok());
        let score: Vec<_> = new.find(super::numeric::SCORE).into_iter().collect();
        let probed = probe::with_outputs(new, &score)?;
        Ok(Self {
            reference: ReferenceRows::open(old, tower, merge, options)?,
            run: probe::open_rewritten(&probed, name, options)?,
            pixels: old.name(tower.pixels).to_owned(),
            grid: rows.grid.map(|v| old.name(v).to_owned()),
            features: old.name(tower.features).to_owned(),
            width: width.ok_or_else(|| {
                wrong("the width of a patch is stated neither by the input nor a weight")
            })?,
            grids: grids(tower, merge),
            unit: unit(rows.per),
            next: 0,
            placement,
        })
    }

    /// The next image through both.
    pub(super) fn see(
        &mut self,
        rng: &mut Seeded,
        tolerance: Tolerance,
        channel: bool,
        tally: &mut Tally,
    ) -> Result<Seen, ValidateError> {
        let [time, height, width] = self.grids[self.next % self.grids.len()];
        self.next += 1;
        let patches = [time, height * self.unit[0], width * self.unit[1]];
        let pixels = noise(patches, self.width, rng)?;
        let feed = row_feed(
            &self.run,
            &self.pixels,
            self.grid.as_deref(),
            &pixels,
            patches,
        )?;
        let given: Vec<(&str, &Value)> = feed.iter().map(|(n, v)| (n.as_str(), v)).collect();
        let out = match self.run.run(&given) {
            Ok(out) => out,
            Err(error) => {
                self.reference.features(&pixels, patches, None)?;
                return Err(ValidateError::Rewritten(error));
            }
        };
        let scores: Vec<Vec<f32>> = match out.get(super::numeric::SCORE) {
            Ok(scores) => vec![scores.f32s()?.into_owned()],
            Err(_) => Vec::new(),
        };
        let ranking = Ranking {
            scores: &scores,
            tolerance,
        };
        let expected = self.reference.features(&pixels, patches, Some(ranking))?;
        tally.near_ties += expected.near_ties;
        let found = out.get(&self.features).and_then(Value::to_tensor);
        let found = found.map_err(ValidateError::Rewritten)?;
        let all = expected.plain.nrows();
        let (want, kept, gone) = match self.placement {
            Placement::Encoder => {
                self.places(&out, patches, &expected, tally)?;
                let gone = vec![false; expected.kept.len()];
                (expected.features, expected.kept, gone)
            }
            Placement::Decoder => {
                let (want, gone) = oracle::place(expected.features.view(), &expected.kept, all)?;
                (want, (0..all).collect(), gone)
            }
        };
        tally.features(&want, &found, channel.then_some(gone.as_slice()))?;
        Ok(Seen {
            want,
            found,
            grid: Grid {
                time,
                height,
                width,
            },
            kept,
            gone,
        })
    }

    /// Compares the places that the rewritten encoder gives out.
    fn places(
        &self,
        out: &Outputs,
        grid: [usize; 3],
        expected: &RowsOut,
        tally: &mut Tally,
    ) -> Result<(), ValidateError> {
        let Ok(found) = out.get(KEPT_OUTPUT) else {
            if expected.kept.len() < expected.plain.nrows() {
                tally
                    .problems
                    .push(format!("there is no output {KEPT_OUTPUT}"));
            }
            return Ok(());
        };
        let found = found.to_tensor()?.i64s()?.to_vec();
        let want: Vec<i64> = expected.kept.iter().map(|k| *k as i64).collect();
        if found != want {
            tally.problems.push(format!(
                "{KEPT_OUTPUT} of a grid {grid:?} are {found:?}, expected {want:?}"
            ));
        }
        Ok(())
    }
}

/// Rows of normalised noise for a grid of patches.
pub(super) fn noise(
    [time, height, width]: [usize; 3],
    columns: usize,
    rng: &mut Seeded,
) -> Result<Tensor, ValidateError> {
    let rows = time * height * width;
    let data: Vec<f32> = (0..rows * columns).map(|_| rng.normal()).collect();
    Ok(Tensor::new([rows, columns], data)?)
}

/// A grid of patches to feed to an encoder, and the width of its rows.
pub(super) fn sample(
    model: &Model,
    tower: &VisionTower,
    merge: Option<&TokenMerge>,
) -> Option<([usize; 3], usize)> {
    let rows = tower.rows.as_ref()?;
    let columns = usize::try_from(rows.patch_width(model, tower)?).ok()?;
    let [down, across] = unit(rows.per);
    let [time, height, width] = *grids(tower, merge).first()?;
    Some(([time, height * down, width * across], columns))
}

/// Positions `[3, b, L]` of a turn's tokens: an image's as if all of its tokens were there.
pub(super) fn positions(
    turn: &Turn,
    layout: &Layout,
    seen: &[Seen],
    places: &mut GridPositions,
) -> Result<Array3<i64>, ValidateError> {
    let counts: Vec<usize> = seen.iter().map(|s| s.grid.tokens()).collect();
    let grids: Vec<Grid> = seen.iter().map(|s| s.grid).collect();
    let full = lay_out(turn, &counts);
    let all = places.advance(&full.visual, &full.mask, &grids)?;
    let (batch, length) = layout.ids.dim();
    let mut picked = Array3::zeros((3, batch, length));
    let mut sources = full.source.iter();
    for row in 0..batch {
        let mut stay = Vec::new();
        for token in (0..full.mask.ncols()).filter(|&t| full.mask[[row, t]] == 1) {
            let kept = match full.visual[[row, token]] {
                false => true,
                true => sources
                    .next()
                    .is_some_and(|(image, place)| seen[*image].kept.binary_search(place).is_ok()),
            };
            if kept {
                stay.push(token);
            }
        }
        let pad = length - stay.len();
        for (at, token) in stay.into_iter().enumerate() {
            for plane in 0..3 {
                picked[[plane, row, pad + at]] = all[[plane, row, token]];
            }
        }
    }
    Ok(picked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions of what is left are those that it has in the whole image, and text goes on behind the image.
    #[test]
    fn survivors_have_their_places_in_the_whole_grid() {
        let turn = Turn {
            rows: vec![vec![vec![1, 2], vec![3]], vec![vec![1], vec![2]]],
        };
        let seen = |kept: &[usize], height, width| Seen {
            want: Array2::zeros((kept.len(), 1)),
            found: Tensor::new([0], Vec::<f32>::new()).unwrap(),
            grid: Grid {
                time: 1,
                height,
                width,
            },
            kept: kept.to_vec(),
            gone: vec![false; kept.len()],
        };
        let all = [seen(&[1, 5], 2, 3), seen(&[3], 2, 2)];
        let layout = lay_out(&turn, &[2, 1]);
        let mut places = GridPositions::new(2);
        let found = positions(&turn, &layout, &all, &mut places).unwrap();
        let row = |plane: usize, row: usize| -> Vec<i64> {
            found.slice(ndarray::s![plane, row, ..]).to_vec()
        };
        assert_eq!(
            [row(0, 0), row(1, 0), row(2, 0)],
            [[0, 1, 2, 2, 5], [0, 1, 2, 3, 5], [0, 1, 3, 4, 5]]
        );
        assert_eq!(
            [row(0, 1), row(1, 1), row(2, 1)],
            [[0, 0, 0, 1, 3], [0, 0, 0, 2, 3], [0, 0, 0, 2, 3]]
        );
    }
}
