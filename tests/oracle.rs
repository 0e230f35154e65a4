//! The selection that rewritten graphs make, against a second implementation in plain `ndarray`.
//!
//! The inserted sub-graphs are cut out of rewritten fixtures and fed with random tensors: for the merge
//! the features, queries and keys of the tower, for the drop points the queries and keys of the layers
//! behind them, with images in any places, several rows, padding on the left and rows without an image.
//! ONNX Runtime and tract run each of them, and both have to select what [`duet_onnx::validate::oracle`]
//! selects, index by index, and emit the same values within 1e-5.
//!
//! Equal scores are made on purpose: there the lower index wins, and the first of equally near anchors. An
//! engine may add up a product's terms in another order from column to column, so equal keys do not make
//! equal scores by themselves; keys with a single one (or queries of zeros) do, because nothing is rounded.
//! Scores that merely lie closer together than single precision tells them apart are nobody's fault, so
//! inputs that have such are thrown away.

mod support;

use duet_onnx::arch::Role;
use duet_onnx::ir::{DataType, ValueId};
use duet_onnx::runtime::Tensor;
use duet_onnx::validate::oracle::{
    self, Cls, MergeInput, MergeParams, Merged, OracleError, Selector, Text,
};
use duet_onnx::validate::scenario::Seeded;
use ndarray::{Array2, Array3, Array4, Axis, s};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use support::models::{index_rows, kept_name, rewritten};
use support::parts::{APART, Ties, border, close, joined, noise, part, run_part, ties, told_apart};

/// One fixture for each way of exporting; the weights play no part here.
const EXPORTS: [&str; 4] = [
    "ts-eager-gqa",
    "ts-sdpa-mha",
    "dynamo18-gqa",
    "dynamo23-mha",
];

/// The same inputs in every run, and no file of failures beside the sources.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(20_260_218),
        failure_persistence: None,
        max_shrink_iters: 60,
        ..ProptestConfig::default()
    }
}

// The merge.

#[derive(Clone, Debug)]
struct MergeCase {
    export: &'static str,
    images: usize,
    dominant: usize,
    contextual: usize,
    width: usize,
    selector: Selector,
    cls: Cls,
    ties: Ties,
    seed: u64,
}

fn merge_case() -> impl Strategy<Value = MergeCase> {
    let selector = prop_oneof![
        3 => Just(Selector::Attention),
        2 => Just(Selector::Uniform),
        2 => Just(Selector::Local),
    ];
    let few = prop_oneof![4 => 1usize..40, 1 => 70usize..90];
    (
        prop::sample::select(&EXPORTS[..]),
        1usize..=2,
        few,
        prop_oneof![1 => Just(0usize), 6 => 1usize..14, 1 => 20usize..90],
        1usize..=6,
        selector,
        prop_oneof![Just(Cls::Keep), Just(Cls::Drop)],
        ties(),
        any::<u64>(),
    )
        .prop_map(
            |(export, images, dominant, contextual, width, selector, cls, ties, seed)| MergeCase {
                export,
                images,
                dominant,
                contextual,
                width,
                selector,
                cls,
                ties,
                seed,
            },
        )
}

impl MergeCase {
    fn recipe(&self) -> String {
        let selector = match self.selector {
            Selector::Attention => "attention",
            Selector::Uniform => "uniform",
            Selector::Local => "local",
        };
        let cls = if self.cls == Cls::Keep {
            "keep"
        } else {
            "drop"
        };
        format!(
            "version: 1\npasses:\n  - token_merge: {{dominant: {}, contextual: {}, cluster_width: {}, \
             selector: {selector}, cls: {cls}}}\n",
            self.dominant, self.contextual, self.width
        )
    }

    fn params(&self) -> MergeParams {
        MergeParams {
            dominant: self.dominant,
            contextual: self.contextual,
            cluster_width: self.width,
            selector: self.selector,
            cls: Some(self.cls),
        }
    }
}

/// Whether every choice by similarity is clear: nearest anchors, and neighbourhoods.
fn clear_similarities(merged: &Merged, metric: &Array2<f32>, case: &MergeCase) -> bool {
    let unit = |i: usize| {
        let row = metric.row(i).mapv(f64::from);
        let norm = row.dot(&row).sqrt().max(1e-12);
        row / norm
    };
    let gap = |best: f64, next: f64| best == next || (best - next).abs() > 1e-5;
    if case.selector == Selector::Local {
        let residual: Vec<usize> = merged.pool.clone();
        return merged.anchors.iter().all(|&anchor| {
            let mut all: Vec<f64> = residual
                .iter()
                .filter(|p| **p != anchor)
                .map(|&p| unit(p).dot(&unit(anchor)))
                .collect();
            all.sort_by(|a, b| b.total_cmp(a));
            all.len() <= case.width || gap(all[case.width - 1], all[case.width])
        });
    }
    let members = merged.assignment.iter().flatten();
    members.into_iter().all(|&member| {
        let mut all: Vec<f64> = merged
            .anchors
            .iter()
            .map(|&a| unit(member).dot(&unit(a)))
            .collect();
        all.sort_by(|a, b| b.total_cmp(a));
        all.len() < 2 || gap(all[0], all[1])
    })
}

fn merge_agrees(case: &MergeCase) -> Result<(), TestCaseError> {
    let base = part(case.export, |r| matches!(r, Role::Vision(_)), "vision");
    let (at, tower) = base.towers().next().expect("a vision tower");
    let new = &rewritten(&base, &case.recipe()).parts[at].model;
    let (heads, head_dim) = (tower.heads as usize, tower.head_dim as usize);
    let tokens = tower.tokens.expect("a fixed number of tokens") as usize;
    let width = heads * head_dim;
    let mut rng = Seeded::new(case.seed);
    let hidden = noise(&mut rng, (case.images, tokens, width));
    let dims = (case.images, heads, heads, tokens, head_dim);
    let (query, key) = case.ties.projections(&mut rng, dims);
    let params = case.params();
    let scale = tower.site.scale() as f32;
    let mut want = Vec::new();
    for image in 0..case.images {
        let input = MergeInput {
            hidden: hidden.index_axis(Axis(0), image),
            query: query.index_axis(Axis(0), image),
            key: key.index_axis(Axis(0), image),
            scale,
            mask: None,
        };
        let merged = oracle::merge(&input, &params).expect("the oracle");
        prop_assume!(told_apart(&merged.scores));
        if case.selector == Selector::Local {
            let received = oracle::received_attention(&input, params.cls).expect("the oracle");
            prop_assume!(told_apart(&received));
        }
        let metric = oracle::metric(input.key.slice(s![.., 1.., ..]));
        prop_assume!(clear_similarities(&merged, &metric, case));
        want.push(merged);
    }

    let name = |v: ValueId| base.parts[at].model.name(v);
    let inputs = vec![
        (name(tower.hidden), hidden.into()),
        (name(tower.site.query.root), joined(&query).into()),
        (name(tower.site.key.root), joined(&key).into()),
    ];
    let scope = |what: &str| format!("duet/token_merge/{what}");
    let mut outputs = vec![border(new, &scope("merged_tokens"), DataType::Float, 3)];
    for what in ["dominant_indices", "anchor_indices"] {
        if new.find(&scope(what)).is_some() {
            outputs.push(border(new, &scope(what), DataType::Int64, 2));
        }
    }
    for (engine, found) in run_part(new, inputs, &outputs)? {
        for (what, want) in [
            (
                "dominant_indices",
                want.iter().map(|m| m.dominant.clone()).collect::<Vec<_>>(),
            ),
            (
                "anchor_indices",
                want.iter().map(|m| m.anchors.clone()).collect(),
            ),
        ] {
            let found = found.get(&scope(what)).map(index_rows);
            let found = found.unwrap_or_else(|| vec![vec![]; case.images]);
            prop_assert_eq!(want, found, "{} of {}", what, engine);
        }
        let tokens: Vec<f32> = want.iter().flat_map(|m| m.tokens.iter().copied()).collect();
        let merged = &found[&scope("merged_tokens")];
        prop_assert_eq!(
            merged.shape(),
            &[case.images, want[0].tokens.nrows(), width][..]
        );
        let merged = merged.f32s().expect("features");
        prop_assert!(close(&tokens, &merged), "merged tokens of {}", engine);
    }
    Ok(())
}

// The drop points.

/// A row of the batch: text, image, text, image, text.
type Row = [usize; 5];

#[derive(Clone, Debug)]
struct PruneCase {
    export: &'static str,
    rows: Vec<Row>,
    drops: Vec<(usize, f64)>,
    text: &'static str,
    ties: Ties,
    seed: u64,
}

fn prune_case() -> impl Strategy<Value = PruneCase> {
    let row = prop_oneof![
        6 => (1usize..5, 1usize..14, 1usize..5, Just(0usize), Just(0usize)),
        3 => (1usize..4, 1usize..10, 0usize..3, 1usize..9, 0usize..4),
        1 => (1usize..9, Just(0usize), Just(0usize), Just(0usize), Just(0usize)),
    ];
    let row = row.prop_map(|(a, b, c, d, e)| [a, b, c, d, e]);
    let keep = prop::sample::select(vec![1.0, 0.9, 0.75, 0.5, 1.0 / 3.0, 0.3, 0.25, 0.1, 0.0]);
    let drops = (
        prop::sample::subsequence(vec![1usize, 2, 3, 5, 6, 7], 1..=3),
        prop::collection::vec(keep, 3),
    );
    let drops = drops.prop_map(|(layers, mut keep): (Vec<usize>, Vec<f64>)| {
        keep.sort_by(|a, b| b.total_cmp(a));
        layers.into_iter().zip(keep).collect()
    });
    (
        prop::sample::select(&EXPORTS[..]),
        prop::collection::vec(row, 1..=3),
        drops,
        prop::sample::select(vec!["all", "last", "salient"]),
        ties(),
        any::<u64>(),
    )
        .prop_map(|(export, rows, drops, text, ties, seed)| PruneCase {
            export,
            rows,
            drops,
            text,
            ties,
            seed,
        })
}

/// What the decoder knows of its tokens, `[rows, tokens]` each.
struct Tokens {
    visual: Array2<bool>,
    real: Array2<bool>,
    salient: Array2<bool>,
}

impl PruneCase {
    fn recipe(&self) -> String {
        let drops: Vec<String> = self
            .drops
            .iter()
            .map(|(layer, keep)| format!("{{after_layer: {layer}, keep: {keep:?}}}"))
            .collect();
        // The decoder alone: no other file for a marker channel to go through.
        format!(
            "version: 1\npasses:\n  - visual_prune: {{drops: [{}], text: {}}}\nmarker: input\n",
            drops.join(", "),
            self.text
        )
    }

    fn tokens(&self, rng: &mut Seeded) -> Tokens {
        let length = self.rows.iter().map(|r| r.iter().sum()).max().unwrap_or(0);
        let shape = (self.rows.len(), length);
        let mut tokens = Tokens {
            visual: Array2::from_elem(shape, false),
            real: Array2::from_elem(shape, false),
            salient: Array2::from_elem(shape, false),
        };
        for (r, row) in self.rows.iter().enumerate() {
            let mut at = length - row.iter().sum::<usize>();
            for (segment, &count) in row.iter().enumerate() {
                for _ in 0..count {
                    tokens.real[[r, at]] = true;
                    tokens.visual[[r, at]] = segment % 2 == 1;
                    at += 1;
                }
            }
        }
        // Anything may be called salient; only real text counts.
        tokens
            .salient
            .mapv_inplace(|_| rng.bits().is_multiple_of(3));
        tokens
    }
}

/// Queries and keys at a drop point, for the tokens that are there.
type Operands<'a> = dyn FnMut(usize, &Tokens) -> (Array4<f32>, Array4<f32>) + 'a;

/// Indices kept at each drop point, for each row.
type Kept = Vec<Vec<Vec<usize>>>;

/// What the oracle keeps at each drop point, for each row; `None` if a choice is not clear.
fn oracle_kept(
    case: &PruneCase,
    tokens: &Tokens,
    scales: &[f32],
    inputs: &mut Operands<'_>,
) -> Result<Option<Kept>, OracleError> {
    let schedule: Vec<oracle::Drop> = case
        .drops
        .iter()
        .map(|&(after_layer, keep)| oracle::Drop { after_layer, keep })
        .collect();
    let count = |row: ndarray::ArrayView1<'_, bool>| row.iter().filter(|v| **v).count();
    let entered: Vec<usize> = tokens.visual.outer_iter().map(count).collect();
    let losses = oracle::drop_counts(&entered, &schedule)?;
    let flags = |x: &Array2<bool>, row: usize| x.row(row).to_vec();
    let rows = case.rows.len();
    let mut now = Tokens {
        visual: tokens.visual.clone(),
        real: tokens.real.clone(),
        salient: tokens.salient.clone(),
    };
    let mut asking: Vec<Vec<usize>> = (0..rows)
        .map(|r| {
            let salient = flags(&now.salient, r);
            let text = match case.text {
                "all" => Text::All,
                "last" => Text::Last,
                _ => Text::Salient(&salient),
            };
            oracle::text_rows(&flags(&now.visual, r), &flags(&now.real, r), text)
        })
        .collect::<Result<_, _>>()?;
    let mut all = Vec::new();
    for (number, &lost) in losses.iter().enumerate() {
        let (query, key) = inputs(number, &now);
        let mut kept = Vec::new();
        for (row, asks) in asking.iter_mut().enumerate() {
            let (visual, real) = (flags(&now.visual, row), flags(&now.real, row));
            let (q, k) = (query.index_axis(Axis(0), row), key.index_axis(Axis(0), row));
            let scores = oracle::rank(q, k, scales[number], &real, asks, &visual)?;
            let chosen = oracle::select(&scores, &visual, lost)?;
            let places = (0..visual.len()).filter(|i| visual[*i]);
            let (mut stay, mut leave) = (f32::INFINITY, f32::NEG_INFINITY);
            for (place, score) in places.zip(&scores) {
                if chosen.binary_search(&place).is_ok() {
                    stay = stay.min(*score);
                } else {
                    leave = leave.max(*score);
                }
            }
            if lost > 0 && stay != leave && stay - leave <= APART * leave {
                return Ok(None);
            }
            *asks = oracle::carry_rows(asks, &chosen, &real)?;
            kept.push(chosen);
        }
        let gather = |x: &Array2<bool>| {
            Array2::from_shape_fn((rows, kept[0].len()), |(r, i)| x[[r, kept[r][i]]])
        };
        now = Tokens {
            visual: gather(&now.visual),
            real: gather(&now.real),
            salient: gather(&now.salient),
        };
        all.push(kept);
    }
    Ok(Some(all))
}

fn prune_agrees(case: &PruneCase) -> Result<(), TestCaseError> {
    let base = part(case.export, |r| matches!(r, Role::Decoder(_)), "decoder");
    let (at, decoder) = base.decoders().next().expect("a decoder");
    let old = &base.parts[at].model;
    let new = &rewritten(&base, &case.recipe()).parts[at].model;
    let head_dim = decoder.head_dim as usize;
    let key_heads = decoder.kv_heads as usize;
    let heads = decoder.heads.expect("the number of heads") as usize;
    let width = decoder.width.expect("the width") as usize;
    let rows = case.rows.len();
    let mut rng = Seeded::new(case.seed);
    let tokens = case.tokens(&mut rng);
    let scales: Vec<f32> = case
        .drops
        .iter()
        .map(|(layer, _)| decoder.layers[*layer].scale as f32)
        .collect();

    let mut made: Vec<(Array4<f32>, Array4<f32>)> = Vec::new();
    let mut make = |_: usize, now: &Tokens| {
        let dims = (rows, heads, key_heads, now.visual.ncols(), head_dim);
        let (query, key) = case.ties.projections(&mut rng, dims);
        made.push((query.clone(), key.clone()));
        (query, key)
    };
    let want = oracle_kept(case, &tokens, &scales, &mut make).expect("the oracle");
    prop_assume!(want.is_some());
    let want = want.unwrap_or_default();

    let length = tokens.visual.ncols();
    let entry = |what: &str| format!("duet/visual_prune/entry/{what}_mask");
    let mut inputs: Vec<(String, Tensor)> = vec![
        (entry("visual"), tokens.visual.clone().into()),
        (entry("real"), tokens.real.clone().into()),
        ("salient_token_mask".into(), tokens.salient.clone().into()),
        // Only its length is read.
        (
            old.name(decoder.embeds).into(),
            Array3::<f32>::zeros((rows, length, width)).into(),
        ),
    ];
    let mut outputs = Vec::new();
    let mut residuals: Vec<Array3<f32>> = Vec::new();
    for (number, ((query, key), (layer, _))) in made.iter().zip(&case.drops).enumerate() {
        let scope = format!("duet/visual_prune/drop{}", number + 1);
        let residual = noise(&mut rng, (rows, query.dim().2, width));
        inputs.push((format!("{scope}/query"), query.clone().into()));
        inputs.push((format!("{scope}/key"), key.clone().into()));
        let boundary = decoder.layers[*layer].boundary[0];
        inputs.push((old.name(boundary).into(), residual.clone().into()));
        outputs.push(border(new, &kept_name(number + 1), DataType::Int64, 2));
        outputs.push(border(new, &format!("{scope}/hidden"), DataType::Float, 3));
        residuals.push(residual);
    }
    let inputs = inputs
        .iter()
        .map(|(n, t)| (n.as_str(), t.clone()))
        .collect();
    for (engine, found) in run_part(new, inputs, &outputs)? {
        for (number, want) in want.iter().enumerate() {
            let kept = index_rows(&found[&kept_name(number + 1)]);
            prop_assert_eq!(want, &kept, "drop point {} of {}", number + 1, engine);
            let hidden = &found[&format!("duet/visual_prune/drop{}/hidden", number + 1)];
            let gathered = Array3::from_shape_fn((rows, want[0].len(), width), |(r, i, d)| {
                residuals[number][[r, want[r][i], d]]
            });
            // Rows are moved, never computed.
            prop_assert_eq!(&Tensor::from(gathered), hidden, "rows of {}", engine);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn merge_selects_what_the_oracle_selects(case in merge_case()) {
        merge_agrees(&case)?;
    }

    #[test]
    fn drop_points_keep_what_the_oracle_keeps(case in prune_case()) {
        prune_agrees(&case)?;
    }
}
