//! Whole models in one file: pixels and token ids in, logits out, no cache.
//!
//! The fixtures hold the same weights as three-file ones, so that recognition, goldens and answers of
//! those are the measure.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

#[macro_use]
mod support;

use std::ops::ControlFlow;
use std::process::Command;

use duet_onnx::arch::{Role, Vlm, WholeModel as Recognised};
use duet_onnx::ir::{Model, Patch, Tensor as Constant};
use duet_onnx::passes::{Entry, REGISTRY, rewrite};
use duet_onnx::runtime::{
    GenerateOptions, Message, Pixels, SessionOptions, VlmFiles, VlmPipeline, WholeInput,
    WholePipeline,
};
use duet_onnx::validate::scenario::{Seeded, lay_out, standard};
use duet_onnx::validate::{Options, check};
use serde_json::Value;

use support::goldens::Goldens;
use support::models::{
    WHOLE, difference, fixture, open_whole, options, pairs, recipe, recipe_text, rewritten, root,
    runtime, set_of, sizes, whole_fixture, whole_folder,
};

const LIMIT: f64 = 1e-4;
const MERGE: &str = "{dominant: 30, contextual: 6}";
const PRUNE: &str = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";

fn both(rest: &str) -> String {
    recipe_text(&[("token_merge", MERGE), ("visual_prune", PRUNE)], rest)
}

fn whole(vlm: &Vlm) -> &Recognised {
    match &vlm.parts[0].role {
        Role::Whole(whole) => whole,
        other => panic!("recognised as {}", other.name()),
    }
}

/// The three-file fixture of the same weights and exporter.
fn twin(name: &str) -> String {
    name.replace("vlm-batch-", "")
}

/// Prompts take several rows only where the exporter made a file that runs them at all.
fn rows_run(name: &str) -> bool {
    name != "vlm-batch-dynamo23-mha"
}

#[test]
fn the_same_structure_is_recognised_as_in_three_files() {
    for name in WHOLE {
        let vlm = whole_fixture(name);
        let found = whole(&vlm);
        let parts = fixture(&twin(name));
        let (_, tower) = parts.towers().next().expect("a tower");
        let (_, decoder) = parts.decoders().next().expect("a decoder");
        let t = &found.tower;
        let of = |t: &duet_onnx::arch::VisionTower| {
            (
                t.layers,
                t.heads,
                t.head_dim,
                t.cls,
                t.entry != t.hidden,
                t.tokens,
                t.features_per_image(),
                t.feature_width,
            )
        };
        assert_eq!(of(t), of(tower), "{name}");
        let of = |d: &duet_onnx::arch::Decoder| {
            (
                d.depth(),
                d.heads,
                d.kv_heads,
                d.head_dim,
                d.width,
                d.vocabulary,
            )
        };
        assert_eq!(of(&found.decoder), of(decoder), "{name}");
        let layers = &found.decoder.layers;
        assert!(
            layers
                .iter()
                .all(|l| l.past.is_none() && l.present.is_none())
        );
        let config =
            std::fs::read_to_string(whole_folder(name).join("config.json")).expect("config");
        let config: Value = serde_json::from_str(&config).expect("JSON");
        assert_eq!(Some(found.ids.image), config["image_token_index"].as_i64());
    }
}

/// What PyTorch recorded of the weights holds for the file too: which patches and tokens are selected,
/// and the logits.
#[test]
fn reproduces_pytorch() {
    for name in WHOLE {
        let base = whole_fixture(name);
        let (edge, _) = sizes(&fixture(&twin(name)));
        let goldens = Goldens::read(set_of(name));
        let (mut worst, mut cases, mut sets, mut steps) = (0f64, 0, 0, 0);
        for case in &goldens.cases {
            let kept = case.recipe.to_string().contains("\"keep\",")
                || case.recipe.to_string().contains("\"positions\":\"keep\"");
            if kept || !(rows_run(name) || case.turns[0].images.len() == 1) {
                continue;
            }
            let mut model = open_whole(&rewritten(&base, &case.recipe.to_string()));
            let outcome = goldens.run_whole(case, &mut model, edge);
            assert!(
                outcome.problems.is_empty() && outcome.logits <= LIMIT,
                "{name}, {}: logits differ by {:.1e}; {:?}",
                case.name,
                outcome.logits,
                outcome.problems
            );
            worst = worst.max(outcome.logits);
            cases += 1;
            sets += outcome.sets;
            steps += outcome.steps;
        }
        println!(
            "{name}: {cases} cases, {steps} steps, {sets} index sets; logits within {worst:.1e}"
        );
        assert!(
            cases >= 9 && sets >= 12,
            "{name}: {cases} cases, {sets} sets"
        );
    }
}

/// A prompt of a standard conversation, with `features` for each image.
fn prompt(name: &str, scenario: usize, features: usize) -> Option<WholeInput> {
    let scenario = &standard(400, 3)[scenario];
    let images: usize = scenario.turns[0].images().iter().sum();
    if scenario.turns[0].rows.len() > 1 && !rows_run(name) {
        return None;
    }
    let layout = lay_out(&scenario.turns[0], &vec![features; images]);
    let vlm = whole_fixture(name);
    let image = whole(&vlm).ids.image;
    let (edge, _) = sizes(&fixture(&twin(name)));
    let ids = ndarray::Array2::from_shape_fn(layout.ids.dim(), |at| match layout.visual[at] {
        true => image,
        false => layout.ids[at].max(image + 1),
    });
    let pixels = Seeded::new(9).images(images.max(1), 3, edge, edge);
    Some(WholeInput {
        ids,
        pixels: pixels.into(),
        mask: Some(layout.mask),
        visual: Some(layout.visual),
        salient: None,
    })
}

#[test]
fn keeping_everything_changes_nothing() {
    for name in WHOLE {
        let base = whole_fixture(name);
        let mut plain = open_whole(&base);
        let mut recipes: Vec<Vec<(&str, &str)>> = REGISTRY
            .iter()
            .map(|e| vec![(e.name, e.keep_everything)])
            .collect();
        let all = |pair: [&'static Entry; 2]| pair.map(|e| (e.name, e.keep_everything)).to_vec();
        recipes.extend(pairs().into_iter().map(all));
        for passes in recipes {
            let mut changed = open_whole(&rewritten(&base, &recipe_text(&passes, "")));
            for scenario in 0..7 {
                let Some(input) = prompt(name, scenario, 81) else {
                    continue;
                };
                let want = plain.run(&input).expect("the base runs");
                let found = changed.run(&input).expect("the rewritten file runs");
                assert_eq!(want.logits.shape(), found.logits.shape());
                let last = |o: &duet_onnx::runtime::WholeOutput| -> Vec<f32> {
                    o.last_logits().expect("logits").into_iter().collect()
                };
                let apart = difference(&last(&want), &last(&found));
                assert!(apart <= 1e-5, "{name}, {passes:?}, {scenario}: {apart:.1e}");
            }
        }
    }
}

/// Where the visual tokens are known from makes no difference, bit for bit.
#[test]
fn markers_agree() {
    for name in WHOLE {
        let base = whole_fixture(name);
        let text = recipe_text(&[("visual_prune", PRUNE)], "");
        let input = prompt(name, 0, 81).expect("one row");
        let ask = |rest: &str| {
            let mut model = open_whole(&rewritten(&base, &format!("{text}{rest}")));
            let out = model.run(&input).expect("runs");
            out.logits.f32s().expect("logits").into_owned()
        };
        let default = ask("");
        assert_eq!(default, ask("marker: token-id\n"), "{name}");
        assert_eq!(default, ask("marker: input\n"), "{name}");
        let span = "marker: static\nspan: {start: 5, count: 81}\n";
        assert_eq!(default, ask(span), "{name}");
        let refused = rewrite(base.clone(), &recipe(&format!("{text}marker: channel\n")));
        let message = refused.expect_err("no channel").to_string();
        assert!(
            message.contains("holds the whole model") && message.contains("token-id"),
            "{message}"
        );
    }
}

#[test]
fn rewritten_files_are_valid_and_tampering_is_found() {
    runtime();
    for name in WHOLE {
        let base = whole_fixture(name);
        let text = both("");
        let changed = rewritten(&base, &text);
        let options = Options {
            session: options(),
            seed: 4,
        };
        let validated = |changed: &Vlm| {
            check(&base, changed, &recipe(&text), &options, &mut |_| ()).expect("validation")
        };
        let report = validated(&changed);
        let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
        assert!(failed.is_empty(), "{name}: {failed:?}");
        assert!(
            report.worst_logits <= LIMIT && report.worst_logits > 0.0,
            "{name}"
        );
        for what in [
            "one image",
            "no image",
            "inputs do not allow",
            "tract: drop point 2",
        ] {
            assert!(
                report.findings.iter().any(|f| f.check.contains(what)),
                "{name}: {what}"
            );
        }
        // The least asked-for tokens are kept.
        let mut other = changed.clone();
        let model = &other.parts[0].model;
        let scores = model
            .find("duet/visual_prune/drop1/scores")
            .expect("the scores");
        let mut patch = Patch::new(model, "tamper");
        let upside_down = patch.op("Neg", &[scores]);
        patch.rewire_all(scores, upside_down);
        let plan = patch.finish();
        other.parts[0].model = other.parts[0].model.clone().apply(plan).expect("applies");
        let report = validated(&other);
        let one = report
            .findings
            .iter()
            .find(|f| f.check == "one image")
            .expect("a finding");
        assert!(
            !one.passed && one.detail.contains("another set"),
            "{}",
            one.detail
        );
    }
}

fn recognition(model: &Model) -> String {
    match Role::of(model) {
        Role::Unknown(why) => why.iter().map(ToString::to_string).collect(),
        other => panic!("recognised as {}", other.name()),
    }
}

#[test]
fn an_image_token_that_is_not_told_is_never_guessed() {
    let vlm = whole_fixture("vlm-batch-dynamo18-gqa");
    let (model, found) = (&vlm.parts[0].model, whole(&vlm));
    let compares = model
        .graph()
        .nodes
        .iter()
        .copied()
        .find(|&n| model.node(n).is("Equal") && model.node(n).input(0) == Some(found.ids.value))
        .expect("the comparison");
    let places = model.node(compares).output(0).expect("an output");
    // A second token takes features as well.
    let mut patch = Patch::new(model, "two");
    let token = patch.i64(7);
    let second = patch.op("Equal", &[found.ids.value, token]);
    let either = patch.op("Or", &[places, second]);
    patch.rewire_all(places, either);
    let plan = patch.finish();
    let message = recognition(&model.clone().apply(plan).expect("applies"));
    assert!(
        message.contains("several token ids (4 at") && message.contains("7 at"),
        "{message}"
    );
    // Places are told by something else than one constant.
    let mut patch = Patch::new(model, "less");
    let token = patch.i64(4);
    let less = patch.op("Less", &[found.ids.value, token]);
    patch.rewire_all(places, less);
    let plan = patch.finish();
    let message = recognition(&model.clone().apply(plan).expect("applies"));
    assert!(
        message.contains("comparing 'input_ids' with a constant"),
        "{message}"
    );
}

#[test]
fn an_attention_that_is_no_layer_is_not_skipped() {
    let vlm = whole_fixture("vlm-batch-dynamo18-gqa");
    let (model, found) = (&vlm.parts[0].model, whole(&vlm));
    let [x] = found.decoder.layers[4].boundary[..] else {
        panic!("one residual tensor")
    };
    let mut patch = Patch::new(model, "plant");
    let key = patch.transpose(x, &[0, 2, 1]);
    let scores = patch.op("MatMul", &[x, key]);
    let shares = patch.softmax(scores);
    let mixed = patch.op("MatMul", &[shares, x]);
    let sum = patch.op("Add", &[x, mixed]);
    patch.rewire_all(x, sum);
    let plan = patch.finish();
    let message = recognition(&model.clone().apply(plan).expect("applies"));
    assert!(message.contains("duet/plant/Softmax"), "{message}");
    // A softmax of something else is no attention of a known form.
    let mut patch = Patch::new(model, "plant");
    let half = patch.constant(Constant::f32_scalar("", 0.5));
    let power = patch.op("Pow", &[x, half]);
    let shares = patch.softmax(power);
    let sum = patch.op("Add", &[x, shares]);
    patch.rewire_all(x, sum);
    let plan = patch.finish();
    let message = recognition(&model.clone().apply(plan).expect("applies"));
    assert!(
        message.contains("no attention of a known form"),
        "{message}"
    );
}

fn picture() -> Pixels {
    let folder = root().join("models/llava/images");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("images")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "png" || e == "jpg"))
        .collect();
    files.sort();
    Pixels::open(&files[0]).expect("an image")
}

/// One file and three files of the same weights give the same answers, with one image, two and none,
/// and after a merge too.
#[test]
fn answers_are_those_of_three_files() {
    runtime();
    let name = "vlm-batch-dynamo18-gqa";
    let merge = recipe_text(&[("token_merge", MERGE)], "");
    for text in ["", &merge] {
        let work = tempfile::tempdir().expect("a directory");
        let (one, three) = (work.path().join("one"), work.path().join("three"));
        let sources = [
            (whole_folder(name), &one),
            (
                root().join("models/llava/fixtures").join(twin(name)),
                &three,
            ),
        ];
        for (from, to) in sources {
            let recipe = work.path().join("recipe.yaml");
            let nothing = "version: 1\npasses: []\n";
            std::fs::write(&recipe, if text.is_empty() { nothing } else { text }).expect("written");
            let done = Command::new(env!("CARGO_BIN_EXE_duet"))
                .arg("rewrite")
                .arg(from)
                .arg("--recipe")
                .arg(&recipe)
                .arg("--out")
                .arg(to)
                .output()
                .expect("starts");
            assert!(
                done.status.success(),
                "{}",
                String::from_utf8_lossy(&done.stderr)
            );
        }
        let file = |name: &str| three.join("onnx").join(name);
        let files = VlmFiles {
            vision_encoder: file("vision_encoder.onnx"),
            embed_tokens: file("embed_tokens.onnx"),
            decoder: file("decoder_model_merged.onnx"),
            configs: three.clone(),
        };
        let session = SessionOptions::default();
        let mut parts = VlmPipeline::open(&files, &session).expect("three files");
        let mut single =
            WholePipeline::open(&one.join("onnx/model.onnx"), &one, &session).expect("one file");
        let options = GenerateOptions {
            max_new_tokens: 10,
            ignore_eos: true,
            ..Default::default()
        };
        for images in 0..3 {
            let pictures = vec![picture(); images];
            let messages = [Message::user(images, "What colour is it?")];
            let go_on = &mut |_: &duet_onnx::runtime::Token| ControlFlow::Continue(());
            let prepared = parts.prepare(&messages, &pictures).expect("a prompt");
            let want = parts
                .generate(&prepared, None, &options, go_on)
                .expect("an answer");
            let prepared = single.prepare(&messages, &pictures).expect("a prompt");
            let found = single
                .generate(&prepared, &options, go_on)
                .expect("an answer");
            assert_eq!(want.tokens, found.tokens, "{images} images, {text}");
            assert_eq!(found.tokens.len(), 10);
            assert_eq!(want.visual_tokens, found.visual_tokens);
            let each = if text.is_empty() { 81 } else { 36 };
            assert_eq!(found.visual_tokens, images * each);
        }
    }
}

#[test]
fn a_configuration_of_another_model_is_an_error() {
    let work = tempfile::tempdir().expect("a directory");
    let name = "vlm-batch-dynamo23-mha";
    let onnx = work.path().join("onnx");
    std::fs::create_dir(&onnx).expect("a folder");
    std::fs::copy(
        whole_folder(name).join("onnx/model.onnx"),
        onnx.join("model.onnx"),
    )
    .expect("copied");
    let inspect = || {
        Command::new(env!("CARGO_BIN_EXE_duet"))
            .arg("inspect")
            .arg(work.path())
            .output()
            .expect("starts")
    };
    let config = work.path().join("config.json");
    std::fs::write(&config, r#"{"image_token_index": 4}"#).expect("written");
    let good = inspect();
    assert!(
        good.status.success(),
        "{}",
        String::from_utf8_lossy(&good.stderr)
    );
    assert!(String::from_utf8_lossy(&good.stdout).contains("whole model"));
    std::fs::write(&config, r#"{"image_token_id": 5}"#).expect("written");
    let bad = inspect();
    let message = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert!(!bad.status.success());
    assert!(
        message.contains("image_token_id 5") && message.contains("token id is 4"),
        "{message}"
    );
}
