//! Passes of other methods: tokens kept as they are in front of the decoder (`random_drop`, `uniform_drop`,
//! `div_prune`), and FastV's drop (`fast_v`, and `visual_prune` with `rank_layer: previous`). What every pass holds to
//! is in `conformance.rs`; here is what they choose.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod commands;
#[macro_use]
mod support;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{DataType, Patch, verify};
use duet_onnx::passes::{Method, Pass, PassError, REGISTRY, Recipe, Stage, TokenMerge, rewrite};
use duet_onnx::runtime::Tensor;
use duet_onnx::validate::oracle;
use duet_onnx::validate::scenario::Seeded;
use ndarray::{Array2, Array3, Axis};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use commands::{duet, source};
use support::goldens::Goldens;
use support::models::{
    CHOSEN, Pool, Runner, WHOLE, fixture, index_rows, parts_at, recipe, recipe_text, rewritten,
    root, set_of, sizes, whole_fixture,
};
use support::packed::unpacked;
use support::parts::{border, part, run_part};
use support::reports::{failures, validated};

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values (fp32).
const LIMIT: f64 = 1e-4;

const RANDOM: (&str, &str) = ("random_drop", "{keep: 30, seed: 3}");
const UNIFORM: (&str, &str) = ("uniform_drop", "{keep: 0.2}");
const DIVERSE: (&str, &str) = ("div_prune", "{keep: 20}");
const FAST_V: (&str, &str) = ("fast_v", "{keep: 0.3}");
const FALL: (&str, &str) = (
    "visual_prune",
    "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}",
);
const PREVIOUS: (&str, &str) = (
    "visual_prune",
    "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.2}], rank_layer: previous, positions: keep}",
);

/// The PyTorch reference's goldens: features, kept sets, cache lengths, logits of prompts and steps.
fn reproduces_pytorch(name: &str) {
    if name == "demo" {
        return;
    }
    let goldens = Goldens::read(&format!("{}-rivals", set_of(name)));
    let sets = goldens.reproduced(name, &fixture(name), LIMIT);
    // Three images of DivPrune's, and eight drops of rows.
    assert!(sets >= 11, "{name}: {sets} index sets");
}

/// A validation that has to pass, and to have looked at these.
fn valid(name: &str, base: &Vlm, passes: &[(&str, &str)], looked_at: &[&str]) {
    let text = recipe_text(passes, "");
    let report = validated(base, &rewritten(base, &text), &text, 4);
    println!(
        "{name}: {} findings, logits within {:.1e}, features within {:.1e}",
        report.findings.len(),
        report.worst_logits,
        report.worst_features
    );
    assert!(report.passed(), "{name}: {:#?}\n{text}", failures(&report));
    for what in looked_at {
        let says = report.findings.iter().any(|f| f.check.contains(what));
        assert!(says, "{name}: nothing was said about '{what}'\n{text}");
    }
}

fn rewritten_models_are_valid(name: &str) {
    let base = fixture(name);
    let diverse = ["one image", "tract: div_prune", "tract: drop point 1"];
    valid(name, &base, &[DIVERSE, FAST_V], &diverse);
    // The full-size one takes many times as long.
    if name != "demo" {
        valid(
            name,
            &base,
            &[RANDOM, PREVIOUS],
            &["tract: random_drop", "tract: drop point 2"],
        );
        valid(
            name,
            &base,
            &[UNIFORM],
            &["two images", "tract: uniform_drop"],
        );
    }
}

/// What a pass leaves of the encoder's features are some of them, each once and in their order, as many as it says.
fn features_are_kept_as_they_are(name: &str) {
    let base = fixture(name);
    let mut pool = Pool::default();
    let all = pool.open(&base);
    for entry in REGISTRY.iter().filter(|e| e.stage == Stage::Encoder) {
        for sample in entry.samples {
            let text = recipe_text(&[(entry.name, sample)], "");
            let parsed = recipe(&text);
            let pass = parsed.encoder_pass().expect("a pass for the encoder");
            if parsed.pass::<TokenMerge>().is_none() {
                let left = pool.open(&rewritten(&base, &text));
                kept_as_they_are(&base, pass, [&all, &left], &format!("{name}\n{text}"));
            }
        }
    }
}

/// What a pass leaves of the encoder's features are some of them, each once and in their order, as many as it says.
fn kept_as_they_are(base: &Vlm, pass: &dyn Pass, [all, left]: [&Runner; 2], place: &str) {
    let (edge, _) = sizes(base);
    let (_, tower) = base.towers().next().expect("a vision encoder");
    let patches = tower.candidates().expect("a fixed number of patches");
    let count = pass.left_of_image(patches, tower.cls).expect("a count");
    let count = usize::try_from(count).expect("a count");
    let pixels = Seeded::new(9).images(3, 3, edge, edge);
    let all = all.encode(pixels.clone().into());
    let left = left.encode(pixels.into());
    for (image, (all, left)) in all.features.iter().zip(&left.features).enumerate() {
        let width = all.shape()[1];
        let rows = |x: &Tensor| {
            let wide = x.shape()[1];
            let data = x.f32s().expect("numbers").into_owned();
            // (The last channel may be the marker's.)
            let rows = data.chunks_exact(wide).map(|row| row[..width].to_vec());
            rows.collect::<Vec<_>>()
        };
        let (all, left) = (rows(all), rows(left));
        assert_eq!(left.len(), count, "features; {place}");
        let nearest = |row: &Vec<f32>| {
            let apart = |other: &Vec<f32>| {
                let pairs = row.iter().zip(other);
                pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            let each = all.iter().map(apart).enumerate();
            each.min_by(|a, b| a.1.total_cmp(&b.1)).expect("a feature")
        };
        let found: Vec<(usize, f32)> = left.iter().map(nearest).collect();
        assert!(
            found.iter().all(|(_, apart)| *apart < 1e-4),
            "a feature is none of image {image}'s; {place}"
        );
        let places: Vec<usize> = found.into_iter().map(|(place, _)| place).collect();
        assert!(
            places.windows(2).all(|p| p[0] < p[1]),
            "places ascend: {places:?}; {place}"
        );
        assert!(places.len() < all.len(), "nothing was left out; {place}");
    }
}

on_every_fixture!(
    reproduces_pytorch,
    rewritten_models_are_valid,
    features_are_kept_as_they_are
);

/// Frames one by one, CLS left out of each; both towers.
#[test]
fn clips_are_chosen_from_frame_by_frame() {
    let base = parts_at(&root().join("models/video_llava/fixtures/ts-sdpa"));
    let both = ["one image", "clips: one image"];
    valid("video", &base, &[RANDOM, FAST_V], &both);
    valid("video", &base, &[DIVERSE, FALL], &both);
    valid("video", &base, &[UNIFORM], &both);
}

/// Crops one by one.
#[test]
fn crops_are_chosen_from_one_by_one() {
    for name in ["llava-next", "llava-onevision"] {
        let folder = root().join("models/llava_next/fixtures").join(name);
        let base = parts_at(&unpacked(&folder));
        valid(
            name,
            &base,
            &[("div_prune", "{keep: 7}"), FAST_V],
            &["one image"],
        );
        valid(
            name,
            &base,
            &[("uniform_drop", "{keep: 7}")],
            &["one image"],
        );
    }
}

#[test]
fn whole_models_in_one_file_are_valid() {
    for name in WHOLE {
        let base = whole_fixture(name);
        valid(
            name,
            &base,
            &[DIVERSE, FAST_V],
            &["tract: div_prune", "tract: drop point 1"],
        );
        let previous = PREVIOUS.1.replace(", positions: keep", "");
        let passes = [RANDOM, (PREVIOUS.0, &previous)];
        valid(name, &base, &passes, &["tract: random_drop"]);
    }
}

/// Attention that holds its cache and rotates inside (`GroupQueryAttention`, `MultiHeadAttention`), half precision,
/// quantised layers, towers without CLS or with wider tokens, decoders in two files or branches.
#[test]
fn other_forms_are_valid() {
    for name in [
        "genaivlm-fp32-gqa",
        "genai-fp32-gqa",
        "genai-fp16-rotary-mha",
        "genai09-mha-mha",
        "ort-extended-ts-sdpa-mha",
        "fp16-ts-sdpa-mha",
        "int8-ts-eager-gqa",
        "if-ts-eager-mha",
        "split-ts-sdpa-gqa",
        "siglip2-dynamo23",
        "idefics3-plain-ts-sdpa",
        "gemma2-ts-eager",
    ] {
        let base = parts_at(&support::forms::form(name).directory());
        // Of the shuffled tokens of Idefics3 there are fewer.
        let few = ("div_prune", "{keep: 0.3}");
        valid(
            name,
            &base,
            &[few, FAST_V],
            &["one image", "tract: div_prune", "tract: drop point 1"],
        );
        valid(
            name,
            &base,
            &[("random_drop", "{keep: 0.3}"), PREVIOUS],
            &["one image"],
        );
    }
}

/// Grids of any size, and positions in them, are for `token_merge`; pruning in the decoder works there too.
#[test]
fn grids_are_refused_and_say_what_works() {
    let base = parts_at(&root().join("models/qwen_vl/fixtures/ts-sdpa"));
    for pass in [RANDOM, UNIFORM, DIVERSE] {
        let error = rewrite(base.clone(), &recipe(&recipe_text(&[pass], "")));
        let error = error.expect_err("a grid").to_string();
        assert!(
            error.contains(pass.0) && error.contains("M-RoPE") && error.contains("token_merge"),
            "{error}"
        );
    }
    let error = validation_of_another(&base);
    assert!(error.is_none(), "{error:?}");
}

/// FastV on a model with M-RoPE.
fn validation_of_another(base: &Vlm) -> Option<Vec<String>> {
    let text = recipe_text(&[FAST_V], "");
    let report = validated(base, &rewritten(base, &text), &text, 4);
    (!report.passed()).then(|| failures(&report))
}

/// A file that another choice made is noticed under this recipe's stamp: by its bytes and by what it keeps.
#[test]
fn another_choice_is_noticed() {
    let base = fixture("ts-sdpa-mha");
    for (claimed, made, check) in [
        (RANDOM, ("random_drop", "{keep: 30, seed: 4}"), "one image"),
        (("uniform_drop", "{keep: 20}"), DIVERSE, "one image"),
        (DIVERSE, ("uniform_drop", "{keep: 20}"), "one image"),
        (
            FAST_V,
            (
                "visual_prune",
                "{drops: [{after_layer: 2, keep: 0.3}], text: last, positions: keep}",
            ),
            "reproducible",
        ),
        (
            PREVIOUS,
            (
                PREVIOUS.0,
                &PREVIOUS.1.replace("rank_layer: previous, ", ""),
            ),
            "another set is kept",
        ),
    ] {
        let claimed = recipe_text(&[claimed], "");
        let mut swapped = rewritten(&base, &recipe_text(&[made], ""));
        for part in &mut swapped.parts {
            if part.model.metadata("duet.recipe").is_some() {
                let mut patch = Patch::new(&part.model, "stamp");
                patch.metadata("duet.recipe", &claimed);
                let plan = patch.finish();
                part.model = part.model.clone().apply(plan).expect("metadata can be set");
            }
        }
        let report = validated(&base, &swapped, &claimed, 4);
        let failed = failures(&report);
        for check in [check, "reproducible"] {
            assert!(
                failed.iter().any(|f| f.contains(check)),
                "{check}: {failed:#?}\n{claimed}"
            );
        }
    }
}

/// A pass can be told from its neighbours: what FastV keeps is not what the next layer would keep.
#[test]
fn the_layer_that_ranks_makes_a_difference() {
    let base = fixture("ts-sdpa-mha");
    let kept = |layer: &str| {
        let prune =
            format!("{{drops: [{{after_layer: 2, keep: 0.3}}], text: last, rank_layer: {layer}}}");
        let runner = Runner::open(&rewritten(
            &base,
            &recipe_text(&[("visual_prune", &prune)], ""),
        ));
        let (edge, width) = sizes(&base);
        let scenario = &duet_onnx::validate::scenario::standard(32, 11)[0];
        let held = support::conversation::hold(&runner, scenario, edge, width);
        held.steps[0].kept.clone()
    };
    assert_ne!(kept("next"), kept("previous"));
    assert_eq!(kept("previous"), kept("previous"));
}

// DivPrune's choice against a second implementation, by both engines.

#[derive(Clone, Debug)]
struct Case {
    export: &'static str,
    images: usize,
    keep: usize,
    /// So many different tokens, or all of them.
    kinds: Option<u64>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop::sample::select(vec![
            "ts-eager-gqa",
            "ts-sdpa-mha",
            "dynamo18-gqa",
            "dynamo23-mha",
        ]),
        1usize..=3,
        prop_oneof![1 => Just(1usize), 1 => Just(2usize), 6 => 3usize..40, 1 => Just(80usize)],
        prop_oneof![2 => Just(None), 1 => Just(Some(1)), 3 => (2u64..60).prop_map(Some)],
        any::<u64>(),
    )
        .prop_map(|(export, images, keep, kinds, seed)| Case {
            export,
            images,
            keep,
            kinds,
            seed,
        })
}

fn chooses_as_the_oracle(case: &Case) -> Result<(), TestCaseError> {
    let base = part(case.export, |r| matches!(r, Role::Vision(_)), "vision");
    let (at, tower) = base.towers().next().expect("a vision tower");
    let text = recipe_text(&[("div_prune", &format!("{{keep: {}}}", case.keep))], "");
    let new = &rewritten(&base, &text).parts[at].model;
    let width = usize::try_from(tower.feature_width.expect("a width")).expect("a width");
    let mut rng = Seeded::new(case.seed);
    // Equal tokens have a single power of two, so that nothing is rounded and equal distances are equal.
    let features = match case.kinds {
        None => Array3::from_shape_fn((case.images, 81, width), |_| rng.normal()),
        Some(kinds) => {
            let kind = Array2::from_shape_fn((case.images, 81), |_| (rng.bits() % kinds) as usize);
            let size = Array2::from_shape_fn((case.images, 81), |_| {
                [0.5, 1.0, 4.0][(rng.bits() % 3) as usize]
            });
            Array3::from_shape_fn((case.images, 81, width), |(n, t, d)| {
                if d == kind[[n, t]] % width {
                    size[[n, t]]
                } else {
                    0.0f32
                }
            })
        }
    };
    let inputs = vec![("duet/div_prune/kept_tokens:inner", features.clone().into())];
    let order = "duet/div_prune/order";
    let outputs = [
        border(new, order, DataType::Int64, 2),
        border(new, CHOSEN, DataType::Int64, 2),
    ];
    for (engine, found) in run_part(new, inputs, &outputs)? {
        let (orders, kept) = (index_rows(&found[order]), index_rows(&found[CHOSEN]));
        for (image, (order, kept)) in orders.iter().zip(&kept).enumerate() {
            let rows = features.index_axis(Axis(0), image);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(&sorted, kept, "the choice in order, {}", engine);
            let want = oracle::diverse(rows, case.keep).expect("the oracle");
            if case.kinds.is_some() {
                prop_assert_eq!(&want, order, "{}", engine);
            }
            // Distances that single precision does not tell apart are nobody's fault.
            let along = oracle::diverse_along(rows, order, 1e-6).expect("the oracle");
            prop_assert!(along.is_some(), "{}: {:?}, not {:?}", engine, order, want);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        rng_seed: RngSeed::Fixed(20_250_302),
        failure_persistence: None,
        max_shrink_iters: 60,
        ..ProptestConfig::default()
    })]

    #[test]
    fn div_prune_chooses_what_the_oracle_chooses(case in case()) {
        chooses_as_the_oracle(&case)?;
    }
}

/// `duet plan --method` → `duet rewrite`, for every method: the average that was asked for is what comes out.
#[test]
fn every_method_is_planned_and_rewritten_at_one_budget() {
    let place = commands::Place::new("");
    place.copy(&source("models/llava/fixtures/ts-sdpa-mha"), "model");
    let model = place.at("model");
    for method in Method::ALL {
        let name = method.name();
        let file = place.at(&format!("{name}.yaml"));
        let all = [
            "plan", &model, "--budget", "24", "--method", name, "-o", &file, "--json",
        ];
        let plan = duet(&all).json();
        let average = plan["visual_tokens"]["average"]
            .as_f64()
            .expect("an average");
        assert!((23.0..=24.24).contains(&average), "{name}: {average}");
        let text = std::fs::read_to_string(&file).expect("a recipe");
        assert_eq!(plan["recipe"], text.as_str());
        let out = place.at(name);
        let made = duet(&[
            "rewrite", &model, "--recipe", &file, "--out", &out, "--json",
        ]);
        let made = made.json();
        let tokens = &made["visual_tokens"][0];
        assert_eq!(
            tokens["by_layer"], plan["visual_tokens"]["by_layer"],
            "{name}"
        );
        let passes = Recipe::parse(&text).expect("a recipe").passes;
        println!(
            "{name}: {average:.2}, {:?}",
            passes.iter().map(|p| p.name()).collect::<Vec<_>>()
        );
    }
    let error = duet(&["plan", &model, "--budget", "24", "--method", "fastvv"]);
    assert_eq!(error.code, 2);
    assert!(error.stderr.contains("fastv"), "{}", error.stderr);
}

/// Placeholders are as many as tokens that are left, and an answer comes.
#[test]
fn a_model_that_keeps_some_tokens_is_asked() {
    let place = commands::Place::new(&recipe_text(&[DIVERSE, FAST_V], ""));
    place.copy(&source("models/llava/fixtures/ts-sdpa-mha"), "model");
    place.rewritten(&[]);
    let answer = place.answer("out", &[]);
    assert_eq!(answer["visual_tokens"], 20);
    let lengths: Vec<i64> =
        serde_json::from_value(answer["cache_lengths"].clone()).expect("a list");
    assert_eq!(
        lengths[1] - lengths[2],
        14,
        "20 tokens, and 6 of them after two layers"
    );
    let refused = rewrite(
        fixture("ts-sdpa-mha"),
        &recipe(&recipe_text(
            &[("fast_v", "{keep: 0.5, after_layer: 9}")],
            "",
        )),
    );
    assert!(matches!(
        refused,
        Err(PassError::Requires { pass: "fast_v", .. })
    ));
    verify(&rewritten(&fixture("ts-sdpa-mha"), &recipe_text(&[FAST_V], "")).parts[0].model)
        .expect("well-formed");
}
