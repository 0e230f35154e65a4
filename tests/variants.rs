//! Directories with several precisions of a module: all rewritten in one go, or
//! those that are named, and whatever a client puts together runs.

mod commands;
mod common;

use commands::*;
use duet_onnx::onnx::read;
use duet_onnx::runtime::{GenerateOptions, Message, Pixels, SessionOptions, VlmFiles, VlmPipeline};

/// Exports of one model in the places of its precisions: plain files, a whole
/// set `_fp16`, and a decoder `_q4` with external data.
fn several(recipe: &str) -> Place {
    let place = Place::new(recipe);
    place.configs("model");
    for name in PARTS {
        place.put(
            &part("ts-sdpa-gqa", name),
            &format!("model/onnx/{name}.onnx"),
        );
        place.put(
            &part("ts-eager-gqa", name),
            &format!("model/onnx/{name}_fp16.onnx"),
        );
    }
    let q4 = part("dynamo18-gqa", "decoder_model_merged");
    place.put(&q4, "model/onnx/decoder_model_merged_q4.onnx");
    let data = q4.with_extension("onnx_data");
    place.put(&data, "model/onnx/decoder_model_merged.onnx_data");
    place
}

const ALL: [&str; 7] = [
    "onnx/decoder_model_merged.onnx",
    "onnx/decoder_model_merged_fp16.onnx",
    "onnx/decoder_model_merged_q4.onnx",
    "onnx/embed_tokens.onnx",
    "onnx/embed_tokens_fp16.onnx",
    "onnx/vision_encoder.onnx",
    "onnx/vision_encoder_fp16.onnx",
];

#[test]
fn configurations_that_cannot_be_read_are_not_carried_over_as_they_are() {
    let place = Place::new(commands::BOTH);
    place.graphs("ts-sdpa-gqa", "model");
    let (recipe, out) = (place.at("recipe.yaml"), place.at("out"));
    let fails = |part: &str| {
        let ran = duet(&[
            "rewrite",
            &place.at("model"),
            "--recipe",
            &recipe,
            "--out",
            &out,
        ]);
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert!(ran.stderr.contains(part), "{}", ran.stderr);
        assert!(!place.path("out").exists());
    };
    // As an editor saves it in UTF-16.
    place.write("model/processor_config.json", b"\xff\xfe{\0}\0");
    fails("processor_config.json as text in UTF-8");
    std::fs::remove_file(place.path("model/processor_config.json")).expect("removed");
    std::fs::create_dir(place.path("model/config.json")).expect("made");
    fails("config.json: expected a file");
}

#[test]
fn every_precision_is_rewritten_and_any_mixture_runs() {
    let place = several(BOTH);
    place.rewritten(&[]);
    assert_eq!(place.names("out", ".onnx"), ALL);
    for name in ALL {
        let model = read(&place.path(&format!("out/{name}"))).expect("a model");
        assert!(
            model.metadata("duet.recipe").is_some(),
            "{name} is as it was"
        );
    }
    let checks = place.valid();
    for label in ["default: ", "fp16: ", "q4: "] {
        let of_it = checks.iter().filter(|c| c.starts_with(label)).count();
        assert!(of_it >= 9, "{label}{of_it} checks of {checks:?}");
    }
    // One model in seven files: every mixture gives the same answer.
    runtime();
    let picture = Pixels::open(source("models/llava/images/street.png")).expect("a picture");
    let mut answers = Vec::new();
    for vision in ["", "_fp16"] {
        for embed in ["", "_fp16"] {
            for decoder in ["", "_fp16", "_q4"] {
                let file = |name: &str, variant: &str| {
                    place.path(&format!("out/onnx/{name}{variant}.onnx"))
                };
                let files = VlmFiles {
                    vision_encoder: file("vision_encoder", vision),
                    embed_tokens: file("embed_tokens", embed),
                    decoder: file("decoder_model_merged", decoder),
                    configs: place.path("out"),
                };
                let session = SessionOptions {
                    intra_threads: 1,
                    ..SessionOptions::default()
                };
                let mut pipeline = VlmPipeline::open(&files, &session).expect("opens");
                let question = [Message::user(1, "What is it?")];
                let prepared = pipeline
                    .prepare(&question, std::slice::from_ref(&picture))
                    .expect("prepares");
                let options = GenerateOptions {
                    max_new_tokens: 5,
                    ignore_eos: true,
                    ..GenerateOptions::default()
                };
                let go = &mut |_: &_| std::ops::ControlFlow::Continue(());
                let answer = pipeline
                    .generate(&prepared, None, &options, go)
                    .expect("answers");
                assert_eq!(answer.visual_tokens, 36);
                answers.push((answer.tokens, answer.cache_lengths));
            }
        }
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(answers[0].1, [36, 36, 36, 18, 18, 0, 0, 0].map(|v| v + 11));
}

#[test]
fn a_chosen_precision_takes_along_what_it_needs_and_nothing_else() {
    let place = several(BOTH);
    let ran = place.rewritten(&["--variant", "q4"]);
    let written = place.names("out", "");
    let models: Vec<&String> = written.iter().filter(|n| n.starts_with("onnx/")).collect();
    assert_eq!(
        models,
        [
            "onnx/decoder_model_merged.onnx_data",
            "onnx/decoder_model_merged_q4.onnx",
            "onnx/embed_tokens.onnx",
            "onnx/vision_encoder.onnx",
        ]
    );
    assert!(written.contains(&"tokenizer.json".to_owned()));
    for left in [
        "decoder_model_merged.onnx",
        "decoder_model_merged_fp16.onnx",
    ] {
        let said = format!("onnx/{left}: left out, its variant was not chosen");
        assert!(ran.stderr.contains(&said), "{}", ran.stderr);
    }
    place.valid();
    assert_eq!(place.answer("out", &[])["visual_tokens"], 36);
}

#[test]
fn data_of_what_was_not_chosen_stays_behind() {
    let place = several(MERGE);
    place.rewritten(&["--variant", "fp16"]);
    let onnx: Vec<String> = place.names("out/onnx", "");
    let fp16 = PARTS.map(|n| format!("{n}_fp16.onnx"));
    let mut wanted = fp16.to_vec();
    wanted.sort();
    assert_eq!(onnx, wanted);
}

#[test]
fn precisions_have_the_names_that_clients_use() {
    for (name, files) in [
        ("default", 3),
        ("fp32", 3),
        ("plain", 3),
        ("fp16", 3),
        ("q4", 3),
    ] {
        let place = several(MERGE);
        place.rewritten(&["--variant", name]);
        assert_eq!(place.names("out", ".onnx").len(), files, "{name}");
    }
    let place = several(MERGE);
    place.rewritten(&["--variant", "fp16", "--variant", "q4"]);
    // q4 needs the plain encoder and embedding.
    let without_plain_decoder: Vec<&str> = ALL[1..].to_vec();
    assert_eq!(place.names("out", ".onnx"), without_plain_decoder);
    let place = several(MERGE);
    for wrong in ["int4", "q8"] {
        let ran = place.rewrite("model", &["--out", &place.at("out"), "--variant", wrong]);
        assert_eq!(ran.code, 2);
        assert!(
            ran.stderr.contains("there are default, fp16, q4"),
            "{}",
            ran.stderr
        );
        assert!(!place.path("out").exists());
    }
}

#[test]
fn a_precision_that_cannot_be_rewritten_is_named_unless_others_are_chosen() {
    let place = several(BOTH);
    let broken = "model/onnx/decoder_model_merged_q4f16.onnx";
    place.write(broken, &common::encode(&common::nested()));
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    for what in [
        "decoder_model_merged_q4f16.onnx",
        "no floating-point input of rank 3",
        "--variant",
    ] {
        assert!(
            ran.stderr.contains(what),
            "'{what}' is not in {}",
            ran.stderr
        );
    }
    assert!(!place.path("out").exists());
    let ran = place.rewrite("model", &["--out", &place.at("out"), "--variant", "q4f16"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    let ran = place.rewritten(&["--variant", "default"]);
    assert!(
        ran.stderr
            .contains("decoder_model_merged_q4f16.onnx: left out")
    );
    assert_eq!(place.names("out", ".onnx").len(), 3);
}

#[test]
fn a_pass_that_fails_on_one_precision_names_its_file() {
    // A decoder of another depth: the second drop lies behind its last layer.
    let place =
        several("version: 1\npasses:\n  - visual_prune: {drops: [{after_layer: 9, keep: 0.5}]}\n");
    let deep = part("demo", "decoder_model_merged");
    place.graphs("demo", "model");
    assert!(deep.is_file());
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr.contains("decoder_model_merged_fp16.onnx"),
        "{}",
        ran.stderr
    );
    assert!(!place.path("out").exists());
    place.rewritten(&["--variant", "default"]);
}

#[test]
fn inspect_shows_the_precisions_and_what_is_used_together() {
    let place = several(BOTH);
    let ran = duet(&["inspect", &place.at("model")]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for line in [
        "layout     Hugging Face directory",
        "variants   default, fp16, q4",
        "q4 is used with onnx/vision_encoder.onnx and onnx/embed_tokens.onnx",
    ] {
        assert!(
            ran.stdout.contains(line),
            "'{line}' is not in {}",
            ran.stdout
        );
    }
    let document = duet(&["inspect", &place.at("model"), "--json"]).json();
    assert_eq!(document["layout"], "hugging-face");
    let sets = document["sets"].as_array().expect("sets");
    assert_eq!(sets.len(), 3);
    assert_eq!(sets[1]["variant"], "fp16");
    assert_eq!(sets[1]["embedding"], "onnx/embed_tokens_fp16.onnx");
    assert_eq!(sets[2]["decoder"], "onnx/decoder_model_merged_q4.onnx");
    assert_eq!(sets[2]["vision"], "onnx/vision_encoder.onnx");
}

#[test]
fn files_beside_the_old_ones_are_variants_of_their_own() {
    let place = several(BOTH);
    let before = place.files("model");
    let ran = place.rewrite("model", &["--beside", "small"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let after = place.files("model");
    for (name, bytes) in &before {
        assert!(after[name] == *bytes, "{name} was touched");
    }
    let new: Vec<&String> = after.keys().filter(|n| !before.contains_key(*n)).collect();
    assert_eq!(
        new.iter().filter(|n| n.ends_with("_small.onnx")).count(),
        7,
        "{new:?}"
    );
    assert!(!new.iter().any(|n| n.contains("data")), "{new:?}");
    for (variant, visual) in [
        ("default", 81),
        ("q4", 81),
        ("small", 36),
        ("fp16_small", 36),
        ("q4_small", 36),
    ] {
        let answer = place.answer("model", &["--variant", variant]);
        assert_eq!(answer["visual_tokens"], visual, "{variant}");
    }
    assert_eq!(place.answer("model", &[])["visual_tokens"], 81);
    // What was written before is no precision to rewrite.
    place.rewritten(&[]);
}

#[test]
fn one_precision_is_validated_alone() {
    let place = several(MERGE);
    place.rewritten(&[]);
    runtime();
    let (model, out) = (place.at("model"), place.at("out"));
    let checks = |variant: &str| -> Vec<String> {
        let ran = duet(&["validate", &model, &out, "--variant", variant, "--json"]);
        let report = ran.json();
        let findings = report["findings"].as_array().expect("findings");
        let name = |f: &serde_json::Value| f["check"].as_str().expect("a name").to_owned();
        findings.iter().map(name).collect()
    };
    let fp16 = checks("fp16");
    assert!(fp16.iter().any(|c| c == "fp16: one image"), "{fp16:?}");
    assert!(
        !fp16
            .iter()
            .any(|c| c.contains("default") || c.contains("q4")),
        "{fp16:?}"
    );
    let plain = checks("default");
    assert!(plain.iter().any(|c| c == "one image"), "{plain:?}");
    assert!(!plain.iter().any(|c| c.contains("fp16")), "{plain:?}");
}

#[test]
fn without_plain_files_the_precision_to_run_has_to_be_named() {
    let place = Place::new(MERGE);
    place.configs("model");
    for name in PARTS {
        for variant in ["fp16", "q4"] {
            place.put(
                &part("ts-sdpa-gqa", name),
                &format!("model/onnx/{name}_{variant}.onnx"),
            );
        }
    }
    let picture = source("models/llava/images/street.png");
    let picture = picture.to_str().expect("UTF-8");
    let model = place.at("model");
    let ran = duet(&["run", &model, "--image", picture, "--prompt", "What?"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr.contains("--variant among fp16, q4"),
        "{}",
        ran.stderr
    );
    assert_eq!(
        place.answer("model", &["--variant", "q4"])["visual_tokens"],
        81
    );
    for name in PARTS {
        std::fs::remove_file(place.path(&format!("model/onnx/{name}_q4.onnx"))).expect("removed");
    }
    assert_eq!(place.answer("model", &[])["visual_tokens"], 81);
}
