//! A ViT-like vision tower with its projector (CLIP, SigLIP and relatives).
//!
//! What an exporter did not keep is not there: with LLaVA's
//! `vision_feature_layer = -2` the unused last block has already been dropped,
//! so the last attention in the file is the selected one.

use std::collections::HashSet;

use super::attention::{Site, refused, sites};
use super::list::{Way, added_rows, cut_node, grid_node, to_the_end};
use super::pixels::{no_pixels, pixels_of, takes_clips};
use super::residual::articulations;
use super::rows::{PatchRows, patch_inputs};
use super::shuffle::{self, Shuffle};
use super::{NoMatch, hidden_network, too_old};
use crate::ir::cone::{ancestors, descendants};
use crate::ir::{DataType, Dim, Model, NodeId, ValueId, consts};

/// A recognised vision tower and projector.
#[derive(Clone, Debug)]
pub struct VisionTower {
    /// `[images, channels, height, width]` pixels; `[batch, crops, channels, height,
    /// width]` of crops, `[clips, frames, channels, height, width]` of clips.
    pub pixels: ValueId,
    /// Features for the language model, `[images, N, width]` or `[images·N, width]`; of
    /// clips, whose frames the tower sees as images, also `[clips, frames·N, width]`.
    pub features: ValueId,
    /// Position among the graph outputs; none in a whole model, where the features
    /// are an inner value.
    pub features_index: Option<usize>,
    /// Output of the last live block: `[images, T, width]`, T = N or 1 + N.
    pub hidden: ValueId,
    /// What the projector reads: `hidden`, or `hidden` without the CLS token, or
    /// what a shuffle made of it.
    pub entry: ValueId,
    /// Whether token 0 of `hidden` is a CLS token.
    pub cls: bool,
    /// Attention of the last live block.
    pub site: Site,
    /// Number of live blocks (attentions that the features depend on).
    pub layers: usize,
    /// Attention heads.
    pub heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// T, where the file fixes it.
    pub tokens: Option<i64>,
    /// Width of the rows of `hidden`, D, where the file says it.
    pub width: Option<i64>,
    /// Element type of `hidden`.
    pub dtype: DataType,
    /// Width of the features, where the file states it.
    pub feature_width: Option<i64>,
    /// The re-arrangement of patches into wider tokens that ends at `entry`.
    pub shuffle: Option<Shuffle>,
    /// The first node behind `entry` that treats its tokens as a grid (pooling,
    /// convolution), by name: fewer tokens make no grid.
    pub grid: Option<String>,
    /// The first node behind `entry` that takes tokens by their place (a tower with register
    /// tokens leaves them out so), by name: fewer tokens have other places.
    pub cut: Option<String>,
    /// Whether it takes clips: frames are folded into the batch and merged one by one.
    pub video: bool,
    /// Frames of a clip, where the file fixes their number.
    pub frames: Option<i64>,
    /// What a tower has besides that takes patches cut by the client. Its `pixels` are
    /// `[patches, width]`, its `hidden` has a row for each, and `entry` is the features, in
    /// which a merge chooses among the merger's tokens.
    pub rows: Option<PatchRows>,
}

impl VisionTower {
    /// N: patch tokens, where the file fixes their number.
    pub fn patches(&self) -> Option<i64> {
        self.tokens.map(|t| t - i64::from(self.cls))
    }

    /// Tokens that a merge chooses among, where the file fixes their number: the
    /// patches, or what a shuffle made of them.
    pub fn candidates(&self) -> Option<i64> {
        match (&self.shuffle, &self.rows) {
            (Some(shuffle), _) => Some(shuffle.tokens()),
            (None, Some(rows)) => self.tokens.map(|patches| patches / rows.per),
            (None, None) => self.patches(),
        }
    }

    /// Patches in a token that a merge chooses among.
    pub fn patches_per_token(&self) -> i64 {
        let shuffled = self.shuffle.as_ref().map(|s| s.per);
        shuffled.or(self.rows.as_ref().map(|r| r.per)).unwrap_or(1)
    }

    /// Whether only the run tells how many tokens there are to choose among.
    pub fn open(&self) -> bool {
        self.rows.is_some() && self.tokens.is_none()
    }

    /// Features that come out per image, where the file fixes their number.
    pub fn features_per_image(&self) -> Option<i64> {
        if self.shuffle.is_some() || self.rows.is_some() {
            return self.candidates();
        }
        let dropped = self.cls && !self.gives_cls();
        self.tokens.map(|t| t - i64::from(dropped))
    }

    /// Whether the CLS token is among the features, before those of the patches.
    pub fn gives_cls(&self) -> bool {
        self.cls && self.shuffle.is_none() && self.entry == self.hidden
    }

    /// Channels, height and width of the pixels, each where the file fixes it.
    /// Before them lie the images, in one axis or two (batch and crops).
    pub fn pixel_size(&self, model: &Model) -> [Option<usize>; 3] {
        let shape = model.value(self.pixels).ty.as_ref().and_then(|t| t.shape());
        let size = |from_end: usize| {
            let shape = shape?;
            let dim = shape.get(shape.len().checked_sub(from_end)?)?;
            usize::try_from(dim.known()?).ok()
        };
        [size(3), size(2), size(1)]
    }

    /// Recognises a tower.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let want = "a vision tower";
        let fail = |found: String| Err(NoMatch::new(want, found));
        let Some(pixels) = pixels_of(model) else {
            return match patch_inputs(model) {
                Some((patches, grid)) => Self::of_rows(model, patches, grid),
                None => fail(no_pixels(model)),
            };
        };
        if let Some(why) = closed(model, "the pixels") {
            return fail(why);
        }
        let reached = descendants(model, &[pixels], true);
        let Some(features_index) = float_output(model, &reached) else {
            return fail("no floating-point output depends on the pixels".into());
        };
        let features = model.graph().outputs[features_index];
        Self::between(model, pixels, features, Some(features_index))
    }

    /// Recognises what lies between pixels and features.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub(super) fn between(
        model: &Model,
        pixels: ValueId,
        features: ValueId,
        features_index: Option<usize>,
    ) -> Result<Self, NoMatch> {
        let fail = |found: String| Err(NoMatch::new("a vision tower", found));
        let reached = descendants(model, &[pixels], true);
        let Blocks {
            line,
            needed,
            live,
            site,
            end,
        } = match Blocks::between(model, pixels, features, &reached) {
            Ok(blocks) => blocks,
            Err(found) => return fail(found),
        };
        let at = after_norm(model, &line, end);
        let hidden = line[at];
        let (mut entry, dropped) = after_cls(model, &line[at..]);
        let added = added_rows(model, &line, &reached);
        let cls = dropped || prepends_token(model, &line, &reached);
        // Of several rows beside the patches' it is not known where they are.
        let odd = added.len() > 1 || added.iter().any(|(_, r)| r.is_some_and(|n| n != 1));
        if !site.scale().is_finite() {
            return fail(format!(
                "the attention scale of {} is not a constant",
                model.describe(site.node)
            ));
        }
        if site.scaled_mask {
            return fail(format!(
                "{} scales its scores after a mask was added, which is not supported",
                model.describe(site.node)
            ));
        }
        if site.softcap != 0.0 {
            return fail(format!(
                "{} bounds its scores (softcap), which is not supported",
                model.describe(site.node)
            ));
        }
        let Some((heads, head_dim)) = head_shape(model, &site) else {
            return fail(format!(
                "number and width of the attention heads of {} cannot be read off its reshapes",
                model.describe(site.node)
            ));
        };
        let stated = model.value(features).ty.as_ref().and_then(|t| t.shape());
        let rows = stated.filter(|s| s.len() == 3).and_then(|s| s[1].known());
        let counted = position_rows(model, &line, &reached, &added)
            .or_else(|| conv_patches(model, pixels, hidden).map(|n| n + i64::from(cls)))
            .filter(|_| !odd);
        let stated_width = row_width(model, hidden);
        let width = stated_width.unwrap_or(heads * head_dim);
        let shuffle = counted.and_then(|tokens| {
            let (tokens, width) = (usize::try_from(tokens).ok()?, usize::try_from(width).ok()?);
            shuffle::find(model, &line[at..], tokens, width, usize::from(cls))
        });
        let video = takes_clips(model);
        let tokens = match &shuffle {
            Some(found) => {
                entry = found.output;
                counted
            }
            // What a clip gives may be the tokens of all its frames.
            None if video => counted.or(rows.map(|n| n + i64::from(dropped))),
            None => rows.map(|n| n + i64::from(dropped)).or(counted),
        };
        let listed = rows.or(tokens.map(|n| n - i64::from(dropped)));
        let way = Way::new(model, entry, &needed);
        let cut = cut_node(model, &way);
        // Then what comes out says nothing of what there is.
        let (cls, tokens) = match &cut {
            Some(_) => (false, rows),
            None => (cls, tokens),
        };
        let size = model.value(pixels).ty.as_ref().and_then(|t| t.shape());
        let frames = size.filter(|_| video).and_then(|s| s[1].known());
        let dtype = element_type(model, hidden).unwrap_or(DataType::Float);
        Ok(Self {
            pixels,
            features,
            features_index,
            hidden,
            entry,
            cls,
            site,
            layers: live.len(),
            heads,
            head_dim,
            tokens,
            width: stated_width.or(shuffle.as_ref().map(|_| width)),
            dtype,
            feature_width: stated
                .and_then(<[Dim]>::last)
                .and_then(Dim::known)
                .or_else(|| projection_width(model, features)),
            shuffle,
            grid: grid_node(model, &way, listed.filter(|n| *n != width)),
            cut,
            video,
            frames,
            rows: None,
        })
    }
}

/// Why a graph is not looked at: it is too old, hides its network, or holds the decoder
/// `beside` what the tower takes.
pub(super) fn closed(model: &Model, beside: &str) -> Option<String> {
    if let Some(why) = too_old(model) {
        return Some(why);
    }
    let whole = || {
        let ids = model.input("input_ids").is_some();
        ids.then(|| format!("it takes input_ids beside {beside}, as a whole model does"))
    };
    hidden_network(model).or_else(whole)
}

/// Position of the first floating-point output among what is `reached`.
pub(super) fn float_output(model: &Model, reached: &HashSet<ValueId>) -> Option<usize> {
    model.graph().outputs.iter().position(|v| {
        let ty = model.value(*v).ty.as_ref().and_then(|t| t.dtype());
        ty.is_some_and(DataType::is_float) && reached.contains(v)
    })
}

/// The blocks between pixels and features.
pub(super) struct Blocks {
    /// The values that all data goes through, from pixels to features.
    pub(super) line: Vec<ValueId>,
    /// What the features depend on.
    pub(super) needed: HashSet<ValueId>,
    /// The attentions among that, in order.
    pub(super) live: Vec<Site>,
    /// The last one of them.
    pub(super) site: Site,
    /// Place on the line where the last block ends.
    pub(super) end: usize,
}

impl Blocks {
    /// Finds them; `reached`: what depends on the pixels.
    ///
    /// # Errors
    /// The first thing that did not fit, and where.
    pub(super) fn between(
        model: &Model,
        pixels: ValueId,
        features: ValueId,
        reached: &HashSet<ValueId>,
    ) -> Result<Self, String> {
        let line = articulations(model, pixels, features);
        let needed = ancestors(model, &[features], true);
        let is_live = |node: NodeId| {
            let output = model.node(node).output(0);
            output.is_some_and(|o| needed.contains(&o))
        };
        if let Some((_, why)) = refused(model).into_iter().find(|(n, _)| is_live(*n)) {
            return Err(why);
        }
        let all = sites(model).into_iter();
        let live: Vec<Site> = all.filter(|s| is_live(s.node)).collect();
        let Some(site) = live.last().cloned() else {
            return Err(format!(
                "no attention (Softmax of a scaled product, or an Attention operator) that '{}' depends on",
                model.name(features)
            ));
        };
        let Some(end) = tower_end(model, &line, reached, &site) else {
            return Err(format!(
                "no residual addition after the last attention ({})",
                model.describe(site.node)
            ));
        };
        Ok(Self {
            line,
            needed,
            live,
            site,
            end,
        })
    }
}

/// Width of the rows of a value, where the file says it or a learned vector that
/// is applied to them does.
pub(super) fn row_width(model: &Model, value: ValueId) -> Option<i64> {
    let stated = model.value(value).ty.as_ref().and_then(|t| t.shape());
    if let Some(known) = stated.and_then(<[Dim]>::last).and_then(Dim::known) {
        return Some(known);
    }
    let node = model.producer_node(value)?;
    let vectors = node.inputs.iter().flatten();
    let mut vectors = vectors.filter_map(|v| consts::dims(model, *v).filter(|d| d.len() == 1));
    vectors.next().map(|d| d[0])
}

/// Number of patches that the convolution between pixels and tokens cuts images
/// of a fixed size into; `None` if there are several (then it is no patch embedding).
fn conv_patches(model: &Model, pixels: ValueId, hidden: ValueId) -> Option<i64> {
    let size = model.value(pixels).ty.as_ref()?.shape()?;
    let edges: Vec<Option<i64>> = size.iter().rev().take(2).map(Dim::known).collect();
    let [Some(w), Some(h)] = edges.as_slice() else {
        return None;
    };
    let seen = descendants(model, &[pixels], true);
    let needed = ancestors(model, &[hidden], true);
    let mut convolutions = model
        .graph()
        .nodes
        .iter()
        .map(|n| model.node(*n))
        .filter(|n| {
            matches!(n.op_type.as_str(), "Conv" | "ConvInteger" | "QLinearConv")
                && n.input(0).is_some_and(|v| seen.contains(&v))
                && n.output(0).is_some_and(|v| needed.contains(&v))
        });
    let conv = convolutions.next()?;
    if convolutions.next().is_some() {
        return None;
    }
    if conv
        .attr_ints("pads")
        .is_some_and(|p| p.iter().any(|n| *n != 0))
    {
        return None;
    }
    let weight = conv.input(if conv.op_type == "QLinearConv" { 3 } else { 1 })?;
    let kernel = conv.attr_ints("kernel_shape").map(<[i64]>::to_vec);
    let kernel = kernel.or_else(|| consts::dims(model, weight)?.get(2..4).map(<[i64]>::to_vec))?;
    let strides = conv.attr_ints("strides")?;
    let ([kh, kw], [sh, sw]) = (kernel.as_slice(), strides) else {
        return None;
    };
    let along = |size: i64, kernel: i64, stride: i64| {
        (stride > 0 && size >= kernel).then(|| (size - kernel) / stride + 1)
    };
    Some(along(*h, *kh, *sh)? * along(*w, *kw, *sw)?)
}

/// Position on the residual line of the last sum of two data paths behind the
/// last attention: the end of the last block. A fused normalisation
/// (`SkipLayerNormalization`) sums its inputs too; where it gives out the sum,
/// that is the end, else what it makes of it.
fn tower_end(
    model: &Model,
    line: &[ValueId],
    reached: &HashSet<ValueId>,
    site: &Site,
) -> Option<usize> {
    let output = model.node(site.node).output(0)?;
    let after = descendants(model, &[output], true);
    line.iter().rposition(|&v| {
        let joins = model.producer_node(v).is_some_and(|n| {
            let sums = match n.is_ms("SkipLayerNormalization") {
                true => 2,
                false if n.is("Add") => n.inputs.len(),
                false => return false,
            };
            let mut summed = n.inputs.iter().take(sums).flatten();
            summed.all(|i| reached.contains(i))
        });
        joins && after.contains(&v)
    })
}

/// Past the normalisation that ends some towers, if there is one: its output is
/// what the projector receives. As one operator, or as the exporter spelt it out:
/// (x − mean) / √(variance + ε) · weight + bias.
fn after_norm(model: &Model, line: &[ValueId], end: usize) -> usize {
    let reads = |at: usize, op: &str| {
        let node = line.get(at).and_then(|v| model.producer_node(*v));
        node.is_some_and(|n| {
            n.op_type == op
                && n.inputs.contains(&Some(line[at - 1]))
                && n.output(0) == Some(line[at])
        })
    };
    let learned = |at: usize| {
        let node = model.producer_node(line[at]);
        node.is_some_and(|n| {
            n.inputs
                .iter()
                .flatten()
                .any(|i| consts::dims(model, *i).is_some_and(|d| d.len() == 1))
        })
    };
    if reads(end + 1, "LayerNormalization") {
        return end + 1;
    }
    let mut at = end + 1;
    // A cast to the precision of the statistics.
    let cast = reads(at, "Cast");
    at += usize::from(cast);
    if !(reads(at, "Sub") && reads(at + 1, "Div")) {
        return end;
    }
    at += 2;
    at += usize::from(reads(at, "Cast"));
    match reads(at, "Mul") && learned(at) && reads(at + 1, "Add") && learned(at + 1) {
        true => at + 1,
        false => end,
    }
}

/// Follows the line from the tower's end to what the projector reads: past a
/// `Slice` or `Gather` that leaves out token 0, if there is one.
fn after_cls(model: &Model, line: &[ValueId]) -> (ValueId, bool) {
    for &value in &line[1..] {
        let Some(node) = model.producer_node(value) else {
            break;
        };
        let constant = |slot: usize| node.input(slot).and_then(|v| consts::ints(model, v));
        match node.op_type.as_str() {
            "Cast" | "Identity" => {}
            "Slice" => {
                let (starts, axes) = (constant(1), constant(3));
                if !to_the_end(model, node) {
                    break;
                }
                match (starts.as_deref(), axes.as_deref()) {
                    (Some([1]), Some([1])) => return (value, true),
                    // Everything, as tracers write an index of ':'.
                    (Some([0]), _) => {}
                    _ => break,
                }
            }
            "Gather" if node.attr_int("axis") == Some(1) => {
                let indices = constant(1).unwrap_or_default();
                let skips =
                    !indices.is_empty() && indices.iter().zip(1..).all(|(i, want)| *i == want);
                if skips {
                    return (value, true);
                }
                break;
            }
            _ => break,
        }
    }
    (line[0], false)
}

/// Whether a constant row is put before the patch tokens at the tower's start.
fn prepends_token(model: &Model, line: &[ValueId], reached: &HashSet<ValueId>) -> bool {
    line.iter().any(|&v| {
        model.producer_node(v).is_some_and(|n| {
            n.is("Concat")
                && n.attr_int("axis") == Some(1)
                && n.inputs.len() == 2
                && n.input(0).is_some_and(|a| !reached.contains(&a))
                && n.input(1).is_some_and(|b| reached.contains(&b))
        })
    })
}

/// Rows of the position table that is added to the tokens, and of what is `added` to them behind
/// it (one row, where nothing else is said).
fn position_rows(
    model: &Model,
    line: &[ValueId],
    reached: &HashSet<ValueId>,
    added: &[(usize, Option<i64>)],
) -> Option<i64> {
    line.iter().enumerate().find_map(|(at, &v)| {
        let node = model.producer_node(v).filter(|n| n.is("Add"))?;
        let (a, b) = (node.input(0)?, node.input(1)?);
        let table = match (reached.contains(&a), reached.contains(&b)) {
            (true, false) => b,
            (false, true) => a,
            _ => return None,
        };
        let behind = added.iter().filter(|(joined, _)| *joined > at);
        let behind: i64 = behind.map(|(_, rows)| rows.unwrap_or(1)).sum();
        Some(rows(model, table)? + behind)
    })
}

fn rows(model: &Model, table: ValueId) -> Option<i64> {
    if let Some(dims) = consts::dims(model, table) {
        return (dims.len() >= 2).then(|| dims[dims.len() - 2]);
    }
    let node = model.producer_node(table)?;
    match node.op_type.as_str() {
        "Gather" => consts::dims(model, node.input(1)?)?.last().copied(),
        "Cast" | "Identity" | "Unsqueeze" | "DequantizeLinear" => rows(model, node.input(0)?),
        _ => None,
    }
}

/// (heads, head width) of an attention, completed from the projection's width.
fn head_shape(model: &Model, site: &Site) -> Option<(i64, i64)> {
    let (heads, width) = site.query.heads.or(site.key.heads)?;
    if heads > 0 && width > 0 {
        return Some((heads, width));
    }
    let total = projection_width(model, site.query.root)?;
    match (heads, width) {
        (h, _) if h > 0 && total % h == 0 => Some((h, total / h)),
        (_, w) if w > 0 && total % w == 0 => Some((total / w, w)),
        _ => None,
    }
}

/// Output width of a linear layer, from its bias or weight.
pub(super) fn projection_width(model: &Model, value: ValueId) -> Option<i64> {
    let node = model.producer_node(value)?;
    let dims = |slot: usize| {
        let value = node.input(slot)?;
        let packed = model
            .producer_node(value)
            .filter(|n| n.is("DequantizeLinear"));
        consts::dims(model, packed.and_then(|n| n.input(0)).unwrap_or(value))
    };
    match node.op_type.as_str() {
        "Add" => {
            let bias = dims(0).or_else(|| dims(1)).filter(|d| d.len() == 1)?;
            Some(bias[0])
        }
        "MatMul" | "MatMulInteger" => dims(1)?.last().copied(),
        "Gemm" => {
            let weight = dims(1)?;
            let transposed = node.attr_int("transB") == Some(1);
            weight.get(usize::from(!transposed)).copied()
        }
        "MatMulNBits" => node.attr_int("N"),
        // An integer product and its scale.
        "Cast" => projection_width(model, node.input(0)?),
        "Mul" => {
            let product = |v: &ValueId| model.producer_node(*v).is_some_and(|n| n.is("Cast"));
            projection_width(model, node.inputs.iter().flatten().copied().find(product)?)
        }
        _ => None,
    }
}

/// Element type of a value: as stated, or as its producers pass it on.
pub(super) fn element_type(model: &Model, value: ValueId) -> Option<DataType> {
    let mut at = value;
    for _ in 0..256 {
        let v = model.value(at);
        if let Some(dtype) = v.ty.as_ref().and_then(|t| t.dtype()) {
            return Some(dtype);
        }
        if let Some(tensor) = &v.initializer {
            return Some(tensor.dtype);
        }
        let node = model.producer_node(at)?;
        if node.is("Cast") {
            let code = node.attr_int("to").and_then(|c| i32::try_from(c).ok())?;
            return Some(DataType::from_code(code));
        }
        if let Some(tensor) = consts::constant(model, at) {
            return Some(tensor.dtype);
        }
        if matches!(
            node.op_type.as_str(),
            "Equal"
                | "Less"
                | "LessOrEqual"
                | "Greater"
                | "GreaterOrEqual"
                | "And"
                | "Or"
                | "Not"
                | "IsNaN"
        ) {
            return Some(DataType::Bool);
        }
        // Operators of these graphs give out the type of their first data
        // input; a constant operand (bias, weight) has it too.
        let stated = node.inputs.iter().flatten().find_map(|&i| {
            let float = |t: &DataType| t.is_float();
            consts::constant(model, i).map(|t| t.dtype).filter(float)
        });
        if stated.is_some() && !matches!(node.op_type.as_str(), "Where" | "DequantizeLinear") {
            return stated;
        }
        at = match node.op_type.as_str() {
            "Where" => node.input(1)?,
            _ => node.input(0)?,
        };
    }
    None
}
