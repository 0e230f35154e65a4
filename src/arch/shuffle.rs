//! Pixel shuffle: a tower's patches re-arranged into fewer, wider tokens before
//! the projector (Idefics3, SmolVLM, InternVL).
//!
//! ```text
//!  [n, N, D] ─ Reshape, Transpose, … ─▶ [n, N/r², r²·D]
//! ```
//!
//! No exporter's sequence of operators is looked for. The operators are run on
//! the *indices* of the elements, for two images, and what comes out says which
//! patches make up a token. Whatever is more than a re-arrangement (pooling,
//! convolution, resizing) has no indices, and ends the search.

use std::collections::HashMap;

use crate::ir::cone::carries_data;
use crate::ir::{Dim, Model, Node, ValueId, consts};

/// Images that indices are made for: two, so that mixing them would show.
const IMAGES: usize = 2;

/// Larger tensors of indices are not made.
const LIMIT: usize = 1 << 26;

/// A re-arrangement of whole patches into wider tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shuffle {
    /// What comes out: `[n, tokens, per · D]`.
    pub output: ValueId,
    /// Patches that make up each token, `[tokens · per]`, ascending within a token,
    /// counted from the tower's first patch.
    pub patches: Vec<i64>,
    /// Patches in a token, r².
    pub per: i64,
}

impl Shuffle {
    /// Tokens that come out per image.
    pub fn tokens(&self) -> i64 {
        self.patches.len() as i64 / self.per.max(1)
    }
}

/// Finds the last value of `line` that holds whole patches of `line[0]`
/// `[n, tokens, width]`, more than one in a row; the first `skip` tokens are not
/// patches (CLS).
pub(super) fn find(
    model: &Model,
    line: &[ValueId],
    tokens: usize,
    width: usize,
    skip: usize,
) -> Option<Shuffle> {
    let (&root, rest) = line.split_first()?;
    let run = |sizes_only: bool| {
        let dims = vec![IMAGES, tokens, width];
        Run::on(model, root, dims, IMAGES, *rest.last()?, sizes_only)
    };
    // Most towers have no shuffle, and indices take four bytes for each element.
    let sizes = run(true)?;
    let wider = |v: &ValueId| match sizes.pixels.get(v).map(|i| i.dims.as_slice()) {
        Some([IMAGES, _, wide]) => groups(*wide, width).is_some(),
        _ => false,
    };
    if !rest.iter().any(wider) {
        return None;
    }
    let run = run(false)?;
    let quantised = |v: ValueId| {
        let node = model.producer_node(v);
        node.is_some_and(|n| n.is("QuantizeLinear"))
    };
    rest.iter().rev().find_map(|&value| {
        let indices = run.pixels.get(&value).filter(|_| !quantised(value))?;
        whole_patches(value, indices, [IMAGES, tokens, width], skip)
    })
}

/// Finds the last value of `line` whose rows each hold several whole rows of `line[0]`
/// `[rows, width]` (or `[1, rows, width]`), run with `rows` of them. The batch is no axis here:
/// all patches of a call are rows.
pub(super) fn find_groups(
    model: &Model,
    line: &[ValueId],
    rows: usize,
    width: usize,
    rank: usize,
) -> Option<Shuffle> {
    let (&root, rest) = line.split_first()?;
    let mut dims = vec![1; rank.saturating_sub(2)];
    dims.extend([rows, width]);
    let run = Run::on(model, root, dims, rows, *rest.last()?, false)?;
    rest.iter().rev().find_map(|&value| {
        let found = run.pixels.get(&value)?;
        // [1, tokens, …] or [tokens, …]; behind the tokens lies what they are made of.
        let tokens = match found.dims.as_slice() {
            [1, tokens, _, ..] | [tokens, _, ..] => *tokens,
            _ => return None,
        };
        let flat = vec![1, tokens, found.data.len().checked_div(tokens)?];
        whole_patches(value, &found.reshaped(flat)?, [1, rows, width], 0)
    })
}

/// The patches of every row of `output`, if each row of each image holds all of several
/// patches of that image and nothing else, and images agree. `indices` were run with so
/// many images of so many tokens of a width.
fn whole_patches(
    output: ValueId,
    indices: &Indices,
    [count, tokens, width]: [usize; 3],
    skip: usize,
) -> Option<Shuffle> {
    let [images, rows, wide] = indices.dims.as_slice() else {
        return None;
    };
    if *images != count {
        return None;
    }
    let per = groups(*wide, width)?;
    let mut of_images: Vec<Vec<i64>> = Vec::new();
    for image in 0..count {
        let mut all = Vec::with_capacity(rows * per);
        for row in 0..*rows {
            let from = (image * rows + row) * wide;
            let mut elements: Vec<usize> = indices.data[from..from + wide]
                .iter()
                .map(|i| *i as usize)
                .collect();
            elements.sort_unstable();
            for patch in elements.chunks(width) {
                let first = patch[0];
                let run = patch.iter().zip(first..).all(|(e, want)| *e == want);
                if !run || first % width != 0 {
                    return None;
                }
                let token = (first / width).checked_sub(image * tokens + skip)?;
                if token + skip >= tokens {
                    return None;
                }
                all.push(token as i64);
            }
        }
        of_images.push(all);
    }
    let mut once = of_images[0].clone();
    once.sort_unstable();
    once.dedup();
    let agree = of_images.windows(2).all(|pair| pair[0] == pair[1]);
    (agree && once.len() == of_images[0].len()).then(|| Shuffle {
        output,
        patches: of_images.swap_remove(0),
        per: per as i64,
    })
}

/// How many patches of a width a row holds, if several.
fn groups(wide: usize, width: usize) -> Option<usize> {
    let per = wide.checked_div(width)?;
    (wide.is_multiple_of(width) && per >= 2).then_some(per)
}

/// A tensor that holds where its elements came from.
#[derive(Clone, Debug)]
struct Indices {
    dims: Vec<usize>,
    /// Empty where only sizes are wanted.
    data: Vec<u32>,
}

impl Indices {
    /// A tensor whose elements are picked from this one, by coordinates.
    fn pick(&self, dims: Vec<usize>, from: impl Fn(&[usize], &mut [usize])) -> Self {
        let count = match self.data.is_empty() {
            true => 0,
            false => dims.iter().product(),
        };
        let mut data = Vec::with_capacity(count);
        let mut to = vec![0; dims.len()];
        let mut at = vec![0; self.dims.len()];
        for _ in 0..count {
            from(&to, &mut at);
            let flat = at.iter().zip(&self.dims).fold(0, |f, (a, d)| f * d + a);
            data.push(self.data[flat]);
            for (coordinate, extent) in to.iter_mut().zip(&dims).rev() {
                *coordinate += 1;
                if *coordinate < *extent {
                    break;
                }
                *coordinate = 0;
            }
        }
        Self { dims, data }
    }

    /// Number of elements.
    fn count(&self) -> usize {
        self.dims.iter().product()
    }

    fn reshaped(&self, dims: Vec<usize>) -> Option<Self> {
        let same = dims.iter().product::<usize>() == self.count();
        same.then(|| Self {
            dims,
            data: self.data.clone(),
        })
    }
}

struct Run<'m> {
    model: &'m Model,
    pixels: HashMap<ValueId, Indices>,
    /// What a first dimension is that the file does not state.
    open: usize,
}

impl<'m> Run<'m> {
    /// Runs what moves the elements of `root`, up to `last`; on sizes alone, if these
    /// are enough.
    fn on(
        model: &'m Model,
        root: ValueId,
        dims: Vec<usize>,
        open: usize,
        last: ValueId,
        sizes_only: bool,
    ) -> Option<Self> {
        let count = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        if count == 0 || count > LIMIT {
            return None;
        }
        let mut run = Self {
            model,
            pixels: HashMap::new(),
            open,
        };
        let data = match sizes_only {
            true => Vec::new(),
            false => (0..u32::try_from(count).ok()?).collect(),
        };
        run.pixels.insert(root, Indices { dims, data });
        for &id in &model.graph().nodes {
            let node = model.node(id);
            let reads = |v: &ValueId| run.pixels.contains_key(v);
            if !carries_data(model, id) || !node.inputs.iter().flatten().any(reads) {
                continue;
            }
            if let (Some(output), Some(result)) = (node.output(0), run.node(node)) {
                run.pixels.insert(output, result);
                if output == last {
                    break;
                }
            }
        }
        Some(run)
    }

    /// What a node makes of indices; `None` if it does more than move elements.
    fn node(&self, node: &Node) -> Option<Indices> {
        if !node.domain.is_empty() && node.domain != "ai.onnx" {
            return None;
        }
        let x = self.pixels.get(&node.input(0)?);
        if node.op_type == "Concat" {
            return self.concat(node);
        }
        let x = x?;
        let rank = x.dims.len();
        let axis_of = |axis: i64, rank: usize| {
            let axis = if axis < 0 { axis + rank as i64 } else { axis };
            usize::try_from(axis).ok().filter(|a| *a < rank)
        };
        let ints = |slot: usize| self.ints(node.input(slot)?);
        match node.op_type.as_str() {
            "Identity" | "Cast" | "QuantizeLinear" | "DequantizeLinear" => Some(x.clone()),
            "Reshape" => {
                let zero = node.attr_int("allowzero").unwrap_or(0) == 0;
                let mut dims = Vec::new();
                let mut open = None;
                for (axis, want) in ints(1)?.into_iter().enumerate() {
                    dims.push(match want {
                        0 if zero => *x.dims.get(axis)?,
                        -1 if open.is_none() => {
                            open = Some(axis);
                            1
                        }
                        n => usize::try_from(n).ok()?,
                    });
                }
                if let Some(axis) = open {
                    let rest: usize = dims.iter().product();
                    dims[axis] = x.count().checked_div(rest)?;
                }
                x.reshaped(dims)
            }
            "Flatten" => {
                let axis = node.attr_int("axis").unwrap_or(1);
                let axis = axis_of(axis, rank + 1)?;
                let (a, b) = x.dims.split_at(axis);
                x.reshaped(vec![a.iter().product(), b.iter().product()])
            }
            "Squeeze" => {
                let axes = ints(1)?;
                let axes: Option<Vec<usize>> = axes.iter().map(|a| axis_of(*a, rank)).collect();
                let axes = axes?;
                let kept = (0..rank).filter(|a| !axes.contains(a));
                x.reshaped(kept.map(|a| x.dims[a]).collect())
            }
            "Unsqueeze" => {
                let axes = ints(1)?;
                let wide = rank + axes.len();
                let axes: Option<Vec<usize>> = axes.iter().map(|a| axis_of(*a, wide)).collect();
                let axes = axes?;
                let mut old = x.dims.iter();
                let dims: Option<Vec<usize>> = (0..wide)
                    .map(|a| match axes.contains(&a) {
                        true => Some(1),
                        false => old.next().copied(),
                    })
                    .collect();
                x.reshaped(dims?)
            }
            "Transpose" => {
                let reversed: Vec<i64> = (0..rank as i64).rev().collect();
                let perm = node.attr_ints("perm").unwrap_or(&reversed);
                let perm: Option<Vec<usize>> = perm.iter().map(|a| axis_of(*a, rank)).collect();
                let perm = perm.filter(|p| p.len() == rank)?;
                let dims = perm.iter().map(|a| x.dims[*a]).collect();
                Some(x.pick(dims, |to, at| {
                    for (axis, coordinate) in perm.iter().zip(to) {
                        at[*axis] = *coordinate;
                    }
                }))
            }
            "Gather" => {
                let axis = axis_of(node.attr_int("axis").unwrap_or(0), rank)?;
                let shape = consts::dims(self.model, node.input(1)?)?;
                let picked: Option<Vec<usize>> =
                    ints(1)?.iter().map(|i| axis_of(*i, x.dims[axis])).collect();
                let picked = picked.filter(|_| shape.len() == 1)?;
                let mut dims = x.dims.clone();
                dims[axis] = picked.len();
                Some(x.pick(dims, |to, at| {
                    at.copy_from_slice(to);
                    at[axis] = picked[to[axis]];
                }))
            }
            "Slice" => {
                let (starts, ends) = (ints(1)?, ints(2)?);
                let all: Vec<i64> = (0..starts.len() as i64).collect();
                let axes = node.input(3).map_or(Some(all), |v| self.ints(v))?;
                let ones = vec![1; starts.len()];
                let steps = node.input(4).map_or(Some(ones), |v| self.ints(v))?;
                let mut dims = x.dims.clone();
                let mut moves = vec![(0, 1); rank];
                for (((start, end), axis), step) in starts.iter().zip(ends).zip(axes).zip(steps) {
                    let axis = axis_of(axis, rank)?;
                    let extent = x.dims[axis] as i64;
                    let place = |p: i64| (if p < 0 { p + extent } else { p }).clamp(0, extent);
                    let (from, to) = (place(*start), place(end));
                    if step < 1 {
                        return None;
                    }
                    dims[axis] = usize::try_from(((to - from).max(0) + step - 1) / step).ok()?;
                    moves[axis] = (from as usize, step as usize);
                }
                Some(x.pick(dims, |to, at| {
                    for ((at, to), (from, step)) in at.iter_mut().zip(to).zip(&moves) {
                        *at = from + to * step;
                    }
                }))
            }
            _ => None,
        }
    }

    fn concat(&self, node: &Node) -> Option<Indices> {
        let parts: Option<Vec<&Indices>> = node
            .inputs
            .iter()
            .map(|v| self.pixels.get(v.as_ref()?))
            .collect();
        let parts = parts?;
        let rank = parts.first()?.dims.len();
        let axis = node.attr_int("axis")?;
        let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok()?;
        if axis >= rank || parts.iter().any(|p| p.dims.len() != rank) {
            return None;
        }
        let others = |p: &Indices| {
            let mut dims = p.dims.clone();
            dims.remove(axis);
            dims
        };
        if parts.iter().any(|p| others(p) != others(parts[0])) {
            return None;
        }
        let mut dims = parts[0].dims.clone();
        dims[axis] = parts.iter().map(|p| p.dims[axis]).sum();
        let mut data = Vec::new();
        if parts.iter().any(|p| !p.data.is_empty()) {
            let outer: usize = dims[..axis].iter().product();
            for block in 0..outer {
                for part in &parts {
                    let size = part.count() / outer;
                    data.extend(part.data.get(block * size..(block + 1) * size)?);
                }
            }
        }
        Some(Indices { dims, data })
    }

    /// Integers that a value holds, computed from sizes if need be.
    fn ints(&self, value: ValueId) -> Option<Vec<i64>> {
        let numbers = self.numbers(value, 32)?;
        #[allow(clippy::cast_possible_truncation, reason = "sizes")]
        Some(numbers.into_iter().map(|n| n as i64).collect())
    }

    fn numbers(&self, value: ValueId, depth: usize) -> Option<Vec<f64>> {
        let depth = depth.checked_sub(1)?;
        let model = self.model;
        if let Some(ints) = consts::ints(model, value) {
            return Some(ints.into_iter().map(|n| n as f64).collect());
        }
        if let Some(tensor) = consts::constant(model, value) {
            let small = tensor.dims.iter().product::<i64>() <= 16;
            return tensor.to_f64s(model.external()).ok().filter(|_| small);
        }
        let node = model.producer_node(value)?;
        let arg = |slot: usize| self.numbers(node.input(slot)?, depth);
        let each = |f: fn(f64) -> f64| Some(arg(0)?.into_iter().map(f).collect());
        let both = |f: fn(f64, f64) -> f64| {
            let (a, b) = (arg(0)?, arg(1)?);
            let count = a.len().max(b.len());
            let at = |v: &[f64], i: usize| v.get(if v.len() == 1 { 0 } else { i }).copied();
            (0..count)
                .map(|i| Some(f(at(&a, i)?, at(&b, i)?)))
                .collect()
        };
        let integral = || {
            let mut at = node.input(0)?;
            for _ in 0..8 {
                if let Some(tensor) = consts::constant(model, at) {
                    return Some(!tensor.dtype.is_float());
                }
                let node = model.producer_node(at)?;
                match node.op_type.as_str() {
                    "Shape" => return Some(true),
                    "Cast" => return Some(matches!(node.attr_int("to"), Some(6 | 7))),
                    "Sqrt" | "Pow" => return Some(false),
                    _ => at = node.input(0)?,
                }
            }
            None
        };
        match node.op_type.as_str() {
            "Shape" => {
                let dims = self.dims(node.input(0)?)?;
                let rank = dims.len() as i64;
                let place = |p: i64| (if p < 0 { p + rank } else { p }).clamp(0, rank) as usize;
                let from = place(node.attr_int("start").unwrap_or(0));
                let to = place(node.attr_int("end").unwrap_or(rank));
                Some(dims.get(from..to)?.iter().map(|n| *n as f64).collect())
            }
            "Gather" => {
                let (from, at) = (arg(0)?, arg(1)?);
                let count = from.len() as f64;
                let place = |i: f64| from.get((if i < 0.0 { i + count } else { i }) as usize);
                at.into_iter().map(|i| place(i).copied()).collect()
            }
            "Slice" => {
                let (all, from, to) = (arg(0)?, arg(1)?, arg(2)?);
                let count = all.len() as f64;
                let place =
                    |p: f64| (if p < 0.0 { p + count } else { p }).clamp(0.0, count) as usize;
                Some(
                    all.get(place(*from.first()?)..place(*to.first()?))?
                        .to_vec(),
                )
            }
            "Concat" => {
                let parts: Option<Vec<Vec<f64>>> = (0..node.inputs.len()).map(arg).collect();
                Some(parts?.concat())
            }
            "Unsqueeze" | "Squeeze" | "Identity" | "Reshape" => arg(0),
            "Cast" => match node.attr_int("to") {
                Some(6 | 7) => each(f64::trunc),
                _ => arg(0),
            },
            "Mul" => both(|a, b| a * b),
            "Add" => both(|a, b| a + b),
            "Sub" => both(|a, b| a - b),
            "Div" if integral() == Some(true) => both(|a, b| (a / b).trunc()),
            "Div" => both(|a, b| a / b),
            "Sqrt" => each(f64::sqrt),
            "Pow" => both(f64::powf),
            "Floor" => each(f64::floor),
            _ => None,
        }
    }

    /// Dimensions of a value: of indices, or as stated, a first one that is not
    /// stated being the images.
    fn dims(&self, value: ValueId) -> Option<Vec<usize>> {
        if let Some(indices) = self.pixels.get(&value) {
            return Some(indices.dims.clone());
        }
        let stated = self.model.value(value).ty.as_ref()?.shape()?;
        let known = |(axis, dim): (usize, &Dim)| match dim.known() {
            Some(n) => usize::try_from(n).ok(),
            None if axis == 0 => Some(self.open),
            None => None,
        };
        stated.iter().enumerate().map(known).collect()
    }
}
