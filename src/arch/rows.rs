//! A vision tower that takes patches cut by the client (Qwen2-VL, Qwen2.5-VL).
//!
//! ```text
//!  pixel_values [patches, C·t·p·p] ─ embed ─ blocks ─ hidden [patches, D]
//!  image_grid_thw [images, 3] ─ windows, rotary tables, masks ─┘   │
//!                                merger: per consecutive rows ─────┴─▶ [N, D′] ─ Gather(order) ─▶ features [N, D′]
//! ```
//!
//! All patches of a call lie in one list, so there is no axis for images, and how many there
//! are only the run tells. Windows are masks. Where the tower has its patches in the order of
//! windows, a gather behind the merger puts the tokens back; its indices do not depend on the
//! pixels. Files for one grid state the number of patches and need no grid.

use std::collections::HashSet;

use super::NoMatch;
use super::attention::{Mask, Site};
use super::head_rows::{HeadRows, cut_rows, head_rows, heads_behind};
use super::shuffle;
use super::tower::{
    Blocks, VisionTower, closed, element_type, float_output, projection_width, row_width,
};
use crate::ir::cone::descendants;
use crate::ir::{DataType, Dim, Model, Patch, ValueId, consts};

/// Patches that a re-arrangement is run with where the file states no number: whole groups of
/// 4, 9 and 16.
const NOMINAL: usize = 144;

/// What a tower of patch rows has besides.
#[derive(Clone, Debug)]
pub struct PatchRows {
    /// Integers `[images, 3]`: time, height and width of each image's grid in patches. `None`
    /// where the file is made for one grid.
    pub grid: Option<ValueId>,
    /// Patches that the merger makes one token of: so many consecutive rows of `hidden`.
    pub per: i64,
    /// The merger's rows `[N, width]`, in the order in which the tower has its patches.
    pub merged: ValueId,
    /// What puts them into the client's order, from `merged` to the features.
    pub moves: Vec<RowMove>,
    /// Queries of the last attention; `None` where a fused operator keeps them to itself.
    pub query: Option<HeadRows>,
    /// Its keys, behind the rotary embedding.
    pub key: Option<HeadRows>,
    /// Element type of queries and keys.
    pub dtype: DataType,
    /// Blocks whose queries see other keys than those of the last block do (windows).
    pub windowed: usize,
}

impl PatchRows {
    /// Queries, or keys, of the last attention in a patch: `[1, patches, heads, width]`, in the
    /// type that the attention has them in.
    pub fn heads(&self, patch: &mut Patch<'_>, tower: &VisionTower, key: bool) -> ValueId {
        let (laid, operand) = match key {
            true => (&self.key, &tower.site.key),
            false => (&self.query, &tower.site.query),
        };
        let split = [1, -1, tower.heads, tower.head_dim];
        let Some(laid) = laid else {
            let (projection, _) = operand.build(patch, false);
            return patch.reshape(projection, &split);
        };
        if laid.axes == "bsx" {
            return patch.reshape(laid.value, &split);
        }
        let batched = laid.axes.contains('b');
        let order = laid.order(if batched { "bshd" } else { "shd" });
        let straight = order.iter().zip(0..).all(|(from, to)| *from == to);
        let x = match straight {
            true => laid.value,
            false => patch.transpose(laid.value, &order),
        };
        match batched {
            true => x,
            false => patch.unsqueeze(x, &[0]),
        }
    }

    /// Width of a row of pixels: as stated, or as the patch embedding wants it.
    pub fn patch_width(&self, model: &Model, tower: &VisionTower) -> Option<i64> {
        if let Some(stated) = stated_dim(model, tower.pixels, 1) {
            return Some(stated);
        }
        let reached = descendants(model, &[tower.pixels], true);
        let nodes = model.graph().nodes.iter().map(|n| model.node(*n));
        let mut reading = nodes.filter(|n| n.input(0).is_some_and(|v| reached.contains(&v)));
        reading.find_map(|node| {
            let weight = consts::dims(model, node.input(1)?)?;
            match node.op_type.as_str() {
                "Conv" => Some(weight.iter().skip(1).product()),
                "MatMul" => weight.first().copied(),
                "Gemm" => {
                    let transposed = node.attr_int("transB") == Some(1);
                    weight.get(usize::from(transposed)).copied()
                }
                _ => None,
            }
        })
    }

    /// Element type of the merger's rows.
    pub fn merged_dtype(&self, model: &Model) -> DataType {
        element_type(model, self.merged).unwrap_or(DataType::Float)
    }

    /// Rows `[N, …]` in the tower's order, put into the order of the features.
    pub fn in_order(&self, patch: &mut Patch<'_>, rows: ValueId) -> ValueId {
        self.moves
            .iter()
            .fold(rows, |rows, step| step.of(patch, rows))
    }
}

/// A gather of rows whose indices do not depend on the pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowMove {
    /// `[N]`, or `[N, 1]` for `GatherND`.
    pub indices: ValueId,
    /// Whether the operator is `GatherND`.
    pub nd: bool,
}

impl RowMove {
    /// The same move of other rows `[N, …]`.
    fn of(self, patch: &mut Patch<'_>, rows: ValueId) -> ValueId {
        match self.nd {
            true => patch.op("GatherND", &[rows, self.indices]),
            false => patch.gather(rows, self.indices, 0),
        }
    }
}

/// Inputs of a tower that takes patches cut by the client: floating-point `[patches, width]`
/// and, unless the file is made for one grid, integers `[images, 3]` (time, height, width).
pub(super) fn patch_inputs(model: &Model) -> Option<(ValueId, Option<ValueId>)> {
    let find = |fits: &dyn Fn(DataType, &[Dim], &str) -> bool| {
        let mut inputs = model.graph().inputs.iter().copied();
        inputs.find(|&v| {
            let value = model.value(v);
            let shape = value
                .ty
                .as_ref()
                .and_then(|t| Some((t.dtype()?, t.shape()?)));
            value.initializer.is_none()
                && shape
                    .is_some_and(|(dtype, dims)| dims.len() == 2 && fits(dtype, dims, &value.name))
        })
    };
    let integer = |dtype| matches!(dtype, DataType::Int64 | DataType::Int32);
    let grid = find(&|dtype, dims, name| {
        let triple = dims[1].known().map_or(name.contains("grid"), |n| n == 3);
        integer(dtype) && triple
    });
    let named = |dtype: DataType, name: &str| {
        dtype.is_float() && (name.contains("pixel") || name.contains("patch"))
    };
    let patches = find(&|dtype, _, name| named(dtype, name))
        .or_else(|| grid.and(find(&|dtype, _, _| dtype.is_float())))?;
    Some((patches, grid))
}

impl VisionTower {
    /// Recognises a tower of patch rows.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub(super) fn of_rows(
        model: &Model,
        pixels: ValueId,
        grid: Option<ValueId>,
    ) -> Result<Self, NoMatch> {
        let fail = |found: String| {
            Err(NoMatch::new(
                "a vision tower that takes rows of patches",
                found,
            ))
        };
        if let Some(why) = closed(model, "the patches") {
            return fail(why);
        }
        let reached = descendants(model, &[pixels], true);
        let Some(features_index) = float_output(model, &reached) else {
            return fail(format!(
                "no floating-point output depends on '{}'",
                model.name(pixels)
            ));
        };
        let features = model.graph().outputs[features_index];
        let Blocks {
            line,
            live,
            mut site,
            end,
            ..
        } = match Blocks::between(model, pixels, features, &reached) {
            Ok(blocks) => blocks,
            Err(found) => return fail(found),
        };
        let described = model.describe(site.node);
        let hidden = line[end];
        if site.scaled_mask || site.softcap != 0.0 {
            return fail(format!(
                "{described} scales its scores after a mask was added, or bounds them (softcap), which is not supported"
            ));
        }
        let stated = site.query.heads.or(site.key.heads);
        let stated = stated.filter(|(h, w)| *h > 0 && *w > 0);
        let behind = |value| heads_behind(model, value, None);
        let heads = stated.or_else(|| behind(site.query.value));
        let Some((heads, head_dim)) = heads.or_else(|| behind(site.key.value)) else {
            return fail(format!(
                "number and width of the attention heads of {described} cannot be read off its reshapes"
            ));
        };
        let (query, key) = match site.query.packed.is_some() || site.key.packed.is_some() {
            true => (None, None),
            false => {
                let Some([query, key]) = head_rows(model, &site, head_dim) else {
                    return fail(format!(
                        "which axes of the queries and keys of {described} are heads and tokens cannot be told"
                    ));
                };
                if let Some(cut) = [&query, &key]
                    .into_iter()
                    .find_map(|laid| cut_rows(model, laid))
                {
                    return fail(format!(
                        "{cut} cuts the tokens of the last block into stretches with an attention each (windows or \
                         frames of one grid); export with masks, or with a grid of one frame"
                    ));
                }
                (site.query.scale, site.key.scale) = (query.scale, key.scale);
                (Some(query), Some(key))
            }
        };
        if !site.scale().is_finite() {
            return fail(format!(
                "the attention scale of {described} is not a constant"
            ));
        }
        let patches = stated_dim(model, pixels, 0);
        let stated_width = row_width(model, hidden);
        let width = stated_width.unwrap_or(heads * head_dim);
        let (merged, moves) = row_moves(model, features, &reached);
        let per = match groups(model, &line[end..], merged, patches, width) {
            Ok(per) => per,
            Err(found) => return fail(found),
        };
        let seen =
            |s: &Site| -> Vec<ValueId> { s.masks.iter().map(|m| decides(model, *m)).collect() };
        let last = seen(&site);
        let windowed = live.iter().filter(|s| seen(s) != last).count();
        Ok(Self {
            pixels,
            features,
            features_index: Some(features_index),
            hidden,
            entry: features,
            cls: false,
            layers: live.len(),
            heads,
            head_dim,
            tokens: patches,
            width: Some(width),
            dtype: element_type(model, features).unwrap_or(DataType::Float),
            feature_width: stated_dim(model, features, 1)
                .or_else(|| projection_width(model, merged)),
            shuffle: None,
            grid: None,
            cut: None,
            video: false,
            frames: None,
            rows: Some(PatchRows {
                grid,
                per,
                merged,
                moves,
                dtype: element_type(model, site.key.value).unwrap_or(DataType::Float),
                query,
                key,
                windowed,
            }),
            site,
        })
    }
}

fn stated_dim(model: &Model, value: ValueId, axis: usize) -> Option<i64> {
    let shape = model.value(value).ty.as_ref()?.shape()?;
    shape.get(axis).filter(|_| shape.len() == 2)?.known()
}

/// The value from which on rows are only put into another order, and what does that.
fn row_moves(
    model: &Model,
    features: ValueId,
    reached: &HashSet<ValueId>,
) -> (ValueId, Vec<RowMove>) {
    let (mut at, mut moves) = (features, Vec::new());
    for _ in 0..8 {
        let Some(node) = model.producer_node(at) else {
            break;
        };
        let (Some(rows), indices) = (node.input(0), node.input(1)) else {
            break;
        };
        let ours = |v: &ValueId| !reached.contains(v) && reached.contains(&rows);
        let nd = node.is("GatherND") && node.attr_int("batch_dims").unwrap_or(0) == 0;
        let plain = node.is("Gather") && node.attr_int("axis").unwrap_or(0) == 0;
        match indices.filter(ours) {
            Some(indices) if nd || plain => moves.push(RowMove { indices, nd }),
            _ if node.is("Cast") || node.is("Identity") => {}
            _ => break,
        }
        at = rows;
    }
    // Casts on the way are passed: they move no row.
    moves.reverse();
    (at, moves)
}

/// Patches in each token, found by running the merger's re-arrangement on indices behind each
/// value of the line in turn, since a normalisation may come first.
fn groups(
    model: &Model,
    line: &[ValueId],
    merged: ValueId,
    patches: Option<i64>,
    width: i64,
) -> Result<i64, String> {
    let known = patches.and_then(|n| usize::try_from(n).ok());
    let count = known.unwrap_or(NOMINAL);
    let columns = usize::try_from(width).unwrap_or(0);
    let end = line
        .iter()
        .position(|v| *v == merged)
        .unwrap_or(line.len() - 1);
    let starts = 0..end;
    let rank = |v: ValueId| match consts::known_rank(model, v) {
        Some(rank @ 2..=3) => vec![rank],
        _ => vec![2, 3],
    };
    let found = starts
        .flat_map(|start| rank(line[start]).into_iter().map(move |rank| (start, rank)))
        .find_map(|(start, rank)| {
            shuffle::find_groups(model, &line[start..=end], count, columns, rank)
        });
    let Some(found) = found else {
        return Err(format!(
            "nothing behind '{}' makes one token of several patches of width {width} (a merger's reshape)",
            model.name(line[0])
        ));
    };
    let consecutive = found
        .patches
        .iter()
        .zip(0..)
        .all(|(patch, want)| *patch == want);
    if !consecutive || found.patches.len() != count {
        return Err(format!(
            "'{}' makes tokens of patches that do not follow one another; expected groups of {} consecutive rows, as \
             Qwen2-VL's processor orders them",
            model.name(found.output),
            found.per
        ));
    }
    Ok(found.per)
}

/// What decides which keys a query sees, behind what exporters make of it for each block.
fn decides(model: &Model, mask: Mask) -> ValueId {
    let mut at = mask.value();
    for _ in 0..16 {
        let Some(node) = model.producer_node(at) else {
            break;
        };
        let sized = matches!(
            node.op_type.as_str(),
            "Expand" | "Reshape" | "Unsqueeze" | "Squeeze" | "Slice"
        );
        let inputs = node.inputs.iter().flatten().copied();
        let mut computed = inputs.filter(|v| consts::constant(model, *v).is_none());
        at = match (sized, computed.next(), computed.next()) {
            (true, Some(_), _) => match node.input(0) {
                Some(first) => first,
                None => break,
            },
            (false, Some(one), None) => one,
            _ => break,
        };
    }
    at
}
