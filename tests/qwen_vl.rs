//! Qwen2.5-VL's decoder: three rows of positions for each token (M-RoPE), kept through every drop.
//!
//! The goldens (`models/qwen_vl/goldens`) were recorded with Transformers' own layers and positions, by an
//! independent implementation of the schedule around them.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

#[macro_use]
mod support;

use std::fs;
use std::path::PathBuf;

use duet_onnx::arch::{Kind, Vlm};
use duet_onnx::passes::rewrite;
use duet_onnx::runtime::{
    Cache, Decoder, Embedder, Grid, GridPositions, StepInput, StepOutput, Tensor, Value, scatter,
};
use duet_onnx::validate::{Options, check};
use ndarray::{Array2, Array3};
use serde::Deserialize;

use support::goldens::{integers, tensors};
use support::models::{difference, kept, open, open_decoder, parts_at, recipe, rewritten, root};

const FIXTURES: [&str; 2] = ["ts-sdpa", "dynamo18"];

/// Largest allowed difference from PyTorch, in standard deviations of the reference's logits (fp32).
const LIMIT: f64 = 1e-4;

#[derive(Deserialize)]
struct Goldens {
    image_token_id: i64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    recipe: serde_json::Value,
    turns: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    grids: Vec<[usize; 3]>,
    drops: Vec<DropPoint>,
    cache_lengths: Vec<usize>,
    cache_lengths_after_decode: Vec<usize>,
}

#[derive(Deserialize)]
struct DropPoint {
    kept: Vec<Vec<usize>>,
}

fn folder() -> PathBuf {
    root().join("models/qwen_vl/goldens")
}

fn goldens() -> Goldens {
    read("cases.json")
}

fn read(name: &str) -> Goldens {
    let text = fs::read_to_string(folder().join(name)).expect("goldens");
    serde_json::from_str(&text).expect("cases")
}

fn fixture(name: &str) -> Vlm {
    parts_at(&root().join("models/qwen_vl/fixtures").join(name))
}

/// Embedding and decoder of a model, opened.
struct Model {
    embedder: Embedder,
    decoder: Decoder,
}

impl Model {
    fn open(vlm: &Vlm) -> Self {
        let (at, _) = vlm.embeddings().next().expect("a token embedding");
        let part = &vlm.parts[at];
        Self {
            embedder: Embedder::new(open(&part.model, &part.file)).expect("an embedding"),
            decoder: open_decoder(vlm),
        }
    }

    fn step(
        &mut self,
        ids: &Array2<i64>,
        image: i64,
        features: Option<&Tensor>,
        input: impl FnOnce(&mut StepInput),
        cache: Option<&Cache>,
    ) -> StepOutput {
        let visual = ids.mapv(|id| id == image);
        let embeds = self.embedder.run(ids.clone()).expect("embeddings");
        let embeds = embeds.to_tensor().expect("embeddings");
        let flags: Vec<bool> = visual.iter().copied().collect();
        let features: Vec<Tensor> = features
            .into_iter()
            .filter(|f| !f.is_empty())
            .cloned()
            .collect();
        let embeds = scatter(embeds, &flags, &features).expect("as many features as places");
        let mut given = StepInput::new(Value::new(embeds).expect("embeddings"));
        given.visual = Some(visual);
        input(&mut given);
        let output = match cache {
            Some(cache) => self.decoder.step(&given, cache),
            None => self.decoder.prefill(&given),
        };
        output.expect("a step")
    }
}

fn logits(output: &StepOutput) -> Vec<f32> {
    let last = output.last_logits().expect("logits");
    last.into_iter().collect()
}

fn planes(tensor: &Tensor) -> Array3<i64> {
    let [rows, batch, length] = *tensor.shape() else {
        panic!("{:?} is not of rank 3", tensor.shape());
    };
    let data = tensor.i64s().expect("integers").into_owned();
    Array3::from_shape_vec((rows, batch, length), data).expect("as many as its shape says")
}

/// Plays a case; returns the largest difference of logits and the number of kept sets compared.
fn play(case: &Case, model: &mut Model, image: i64, place: &str) -> (f64, usize) {
    let stored = tensors(&folder().join(format!("{}.safetensors", case.name)));
    let (mut worst, mut sets) = (0f64, 0);
    let mut cache: Option<Cache> = None;
    let mut places: Option<GridPositions> = None;
    for (number, turn) in case.turns.iter().enumerate() {
        let of = |name: &str| &stored[&format!("turn{number}.{name}")];
        let ids = integers(of("input_ids"));
        let mask = integers(of("attention_mask"));
        let before = mask.ncols() - ids.ncols();
        let mask = mask.slice(ndarray::s![.., before..]).to_owned();
        // The runtime's own positions are Transformers'.
        let counter = places.get_or_insert_with(|| GridPositions::new(ids.nrows()));
        let grid = |g: &[usize; 3]| Grid {
            time: g[0],
            height: g[1],
            width: g[2],
        };
        let grids: Vec<Grid> = turn.grids.iter().map(grid).collect();
        let own = counter.advance(&ids.mapv(|id| id == image), &mask, &grids);
        let positions = planes(of("position_ids"));
        assert_eq!(own.expect("positions"), positions, "{place}, turn {number}");
        let features = Some(of("image_features"));
        let give = |input: &mut StepInput| {
            input.mask = Some(mask.clone());
            input.positions = Some(positions.clone().into());
        };
        let output = model.step(&ids, image, features, give, cache.as_ref());
        let want = of("logits").f32s().expect("logits");
        worst = worst.max(difference(&want, &logits(&output)));
        let want: Vec<_> = turn.drops.iter().map(|d| d.kept.clone()).collect();
        assert_eq!(want, kept(&output), "{place}, turn {number}: kept indices");
        sets += want.iter().map(Vec::len).sum::<usize>();
        assert_eq!(turn.cache_lengths, output.cache.lengths(), "{place}");
        let mut now = output.cache;
        for step in 0.. {
            let of = |name: &str| stored.get(&format!("turn{number}.step{step}.{name}"));
            let Some(ids) = of("input_ids").map(integers) else {
                assert_eq!(step, 3, "{place}: recorded decode steps");
                break;
            };
            let positions = planes(of("position_ids").expect("positions"));
            let text = Array2::from_elem(ids.dim(), false);
            let own = counter.advance(&text, &Array2::ones(ids.dim()), &[]);
            assert_eq!(own.expect("positions"), positions, "{place}, step {step}");
            let give = |input: &mut StepInput| input.positions = Some(positions.into());
            let output = model.step(&ids, image, None, give, Some(&now));
            let want = of("logits").expect("logits").f32s().expect("logits");
            worst = worst.max(difference(&want, &logits(&output)));
            now = output.cache;
        }
        assert_eq!(turn.cache_lengths_after_decode, now.lengths(), "{place}");
        cache = Some(now);
    }
    (worst, sets)
}

#[test]
fn reproduces_pytorch() {
    let goldens = goldens();
    assert!(goldens.cases.len() >= 6, "cases are recorded");
    reproduces(&goldens);
}

/// `ratio_base: current`, the public code's schedule: what is not ranked at a drop stays as text, and asks.
#[test]
fn ratios_of_what_is_left_reproduce_pytorch() {
    let goldens = read("current.json");
    assert!(goldens.cases.len() >= 5, "cases are recorded");
    reproduces(&goldens);
    // The method's own ratios choose otherwise.
    let case = &goldens.cases[0];
    let text = case
        .recipe
        .to_string()
        .replace("\"current\"", "\"entered\"");
    let mut model = Model::open(&rewritten(&fixture("ts-sdpa"), &text));
    let stored = tensors(&folder().join(format!("{}.safetensors", case.name)));
    let ids = integers(&stored["turn0.input_ids"]);
    let positions = planes(&stored["turn0.position_ids"]);
    let give = |input: &mut StepInput| input.positions = Some(positions.into());
    let features = Some(&stored["turn0.image_features"]);
    let output = model.step(&ids, goldens.image_token_id, features, give, None);
    assert_ne!(case.turns[0].cache_lengths, output.cache.lengths());
}

fn reproduces(goldens: &Goldens) {
    for name in FIXTURES {
        let base = fixture(name);
        let (mut worst, mut sets) = (0f64, 0);
        for case in &goldens.cases {
            let place = format!("{name}, {}", case.name);
            let mut model = Model::open(&rewritten(&base, &case.recipe.to_string()));
            let (apart, compared) = play(case, &mut model, goldens.image_token_id, &place);
            assert!(apart <= LIMIT, "{place}: logits differ by {apart:.1e}");
            worst = worst.max(apart);
            sets += compared;
        }
        println!(
            "{name}: {} cases, {sets} kept sets, logits within {worst:.1e}",
            goldens.cases.len()
        );
        assert!(sets >= 15, "{name}: {sets} kept sets compared");
    }
}

/// The rows are told apart: with one row's positions in all three, logits are others.
#[test]
fn every_row_of_positions_matters() {
    let goldens = goldens();
    let case = goldens.cases.iter().find(|c| c.name == "two");
    let case = case.expect("a case with two grids");
    let stored = tensors(&folder().join("two.safetensors"));
    let ids = integers(&stored["turn0.input_ids"]);
    let positions = planes(&stored["turn0.position_ids"]);
    for name in FIXTURES {
        let mut model = Model::open(&rewritten(&fixture(name), &case.recipe.to_string()));
        let mut ask = |positions: Array3<i64>| {
            let give = |input: &mut StepInput| input.positions = Some(positions.into());
            let features = Some(&stored["turn0.image_features"]);
            logits(&model.step(&ids, goldens.image_token_id, features, give, None))
        };
        let right = ask(positions.clone());
        for row in 0..3 {
            let mut other = positions.clone();
            let replaced = positions
                .slice(ndarray::s![(row + 1) % 3, .., ..])
                .to_owned();
            other.slice_mut(ndarray::s![row, .., ..]).assign(&replaced);
            let apart = difference(&right, &ask(other));
            assert!(apart > 1e-3, "{name}: row {row} changes {apart:.1e}");
        }
    }
}

/// `duet validate`, with all its scenarios on grids of different shape.
#[test]
fn validates() {
    let text = |more: &str| {
        format!(
            "version: 1\nmarker: input\npasses: [{{visual_prune: {{drops: [{{after_layer: 1, keep: 0.6}}, \
             {{after_layer: 3, keep: 0.25}}]{more}}}}}]"
        )
    };
    let texts = [
        text(""),
        text(", rank_mask: none"),
        text(", ratio_base: current"),
        text(", ratio_base: current, rank_mask: none, text: last"),
    ];
    for (name, text) in FIXTURES.iter().cycle().zip(&texts) {
        let base = fixture(name);
        let options = Options {
            session: support::models::options(),
            seed: 3,
        };
        support::models::runtime();
        let report = check(
            &base,
            &rewritten(&base, text),
            &recipe(text),
            &options,
            &mut |_| (),
        );
        let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(report.passed(), "{name}: {report:?}");
    }
}

#[test]
fn renumbering_is_refused() {
    let text = "version: 1\nmarker: input\npasses: [{visual_prune: {drops: [{after_layer: 1, keep: 0.6}], \
                positions: renumber}}]";
    for name in FIXTURES {
        let error = rewrite(fixture(name), &recipe(text)).map(|_| ());
        let error = error.expect_err("M-RoPE has no numbering").to_string();
        assert!(error.contains("positions: keep"), "{name}: {error}");
        assert!(error.contains("M-RoPE"), "{name}: {error}");
    }
}

/// Without a vision encoder in the directory nothing marks visual tokens, and the decoder is rewritten as the
/// message says.
#[test]
fn a_decoder_alone_is_told_its_visual_tokens() {
    let mut vlm = fixture("ts-sdpa");
    vlm.parts.retain(|part| part.kind() != Kind::Vision);
    let prune = "visual_prune: {drops: [{after_layer: 2, keep: 0.5}]}";
    let error = rewrite(
        vlm.clone(),
        &recipe(&format!("version: 1\npasses: [{prune}]")),
    )
    .map(|_| ());
    let error = error.expect_err("no tower").to_string();
    assert!(error.contains("marker: input"), "{error}");
    let done = rewritten(
        &vlm,
        &format!("version: 1\nmarker: input\npasses: [{prune}]"),
    );
    let (at, _) = vlm.decoders().next().expect("a decoder");
    let inputs = done.parts[at].model.graph().inputs.len();
    assert_eq!(inputs, vlm.parts[at].model.graph().inputs.len() + 1);
}

/// What a mask does not tell is asked for, not guessed.
#[test]
fn positions_have_to_be_given() {
    let mut model = Model::open(&fixture("ts-sdpa"));
    let ids = Array2::from_elem((1, 4), 20);
    let embeds = model.embedder.run(ids).expect("embeddings");
    let error = model.decoder.prefill(&StepInput::new(embeds));
    let error = error.map(|_| ()).expect_err("no positions").to_string();
    assert!(error.contains("GridPositions"), "{error}");
}
