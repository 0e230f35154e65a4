//! LLaVA-NeXT and LLaVA-OneVision: images of several crops, against PyTorch and Transformers.

#![allow(clippy::print_stdout, reason = "tests say how close they came")]

mod commands;
mod support;

use std::path::PathBuf;

use commands::duet;
use duet_onnx::arch::Vlm;
use duet_onnx::ir::{DataType, Dim, Patch, ValueType};
use duet_onnx::passes::{Recipe, rewrite};
use duet_onnx::runtime::{
    GenerateOptions, ImageProcessor, Message, Pixels, SessionOptions, VlmFiles, VlmPipeline,
};

use support::goldens::{Client, Goldens};
use support::models::{Pool, fixture_at, rewritten, root, runtime};
use support::packed::unpacked;

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values (fp32).
const LIMIT: f64 = 1e-4;

fn folder(name: &str) -> PathBuf {
    unpacked(&root().join("models/llava_next/fixtures").join(name))
}

fn goldens(name: &str) -> Goldens {
    Goldens::read_crops(
        root().join("models/llava_next/goldens").join(name),
        &folder(name),
    )
}

/// Every case gives PyTorch's index sets, cache lengths, features and logits, with the prompt's tokens packed
/// by the code that `duet run` packs them with.
fn reproduces_pytorch(name: &str) {
    let base: Vlm = fixture_at(&folder(name));
    let goldens = goldens(name);
    let mut pool = Pool::default();
    let (mut features, mut logits, mut sets) = (0f64, 0f64, 0);
    let mut problems = Vec::new();
    for case in &goldens.cases {
        let runner = pool.open(&rewritten(&base, &case.recipe.to_string()));
        let outcome = goldens.run(case, &runner, Client::default());
        features = features.max(outcome.features);
        logits = logits.max(outcome.logits);
        sets += outcome.sets;
        problems.extend(
            outcome
                .problems
                .iter()
                .map(|p| format!("{}: {p}", case.name)),
        );
        if !(outcome.features <= LIMIT && outcome.logits <= LIMIT) {
            problems.push(format!(
                "{}: features differ by {:.1e} and logits by {:.1e} standard deviations",
                case.name, outcome.features, outcome.logits
            ));
        }
    }
    println!(
        "{name}: {sets} index sets; features within {features:.1e}, logits within {logits:.1e}"
    );
    assert!(
        goldens.cases.len() == 16 && sets > 60,
        "{name}: {sets} sets"
    );
    assert!(problems.is_empty(), "{name}:\n{}", problems.join("\n"));
}

#[test]
fn llava_next_reproduces_pytorch() {
    reproduces_pytorch("llava-next");
}

#[test]
fn llava_onevision_reproduces_pytorch() {
    reproduces_pytorch("llava-onevision");
}

/// Part of a picture, from its upper left corner.
fn corner(of: &Pixels, width: usize, height: usize) -> Pixels {
    let rows = of.rgb().chunks(of.width() * 3).take(height);
    let rgb: Vec<u8> = rows.flat_map(|row| row[..width * 3].to_vec()).collect();
    Pixels::new(width, height, rgb).expect("a part of the picture")
}

/// Crops are those of Transformers' image processors: number, order, padding and pixel values, but for what
/// Pillow's resize rounds otherwise (2 of 255, as `src/runtime/image` says).
#[test]
fn crops_are_those_of_transformers() {
    let open = |name: &str| {
        let file = root().join("models/llava/images").join(name);
        Pixels::open(file).expect("a picture")
    };
    let street = open("street.png");
    let pictures = [
        ("street", street.clone()),
        ("shapes", open("shapes.png")),
        ("small", corner(&street, 84, 70)),
        ("wide", corner(&street, 400, 110)),
    ];
    for name in ["llava-next", "llava-onevision"] {
        let goldens = goldens(name);
        let processor = ImageProcessor::from_dir(folder(name)).expect("an image processor");
        let mut worst: f32 = 0.0;
        for (picture, pixels) in &pictures {
            let want = goldens.pixels(&[picture]);
            let crops = processor.crops(pixels).expect("crops");
            assert_eq!(crops.len(), want.shape()[0], "{name}, {picture}");
            let found = crops.iter().flat_map(|c| c.iter().copied());
            let want = want.f32s().expect("pixels");
            assert_eq!(crops.iter().map(|c| c.len()).sum::<usize>(), want.len());
            for (found, want) in found.zip(want.iter()) {
                worst = worst.max((found - want).abs());
            }
        }
        // 2 of 255, by the smallest deviation that pixels are divided by.
        assert!(worst <= 2.01 / 255.0 / 0.26, "{name}: {worst}");
        println!("{name}: pixel values within {worst:.1e}");
    }
}

/// Features with an axis for batches are pruned, but not merged: refused by name, with what to do.
#[test]
fn batches_of_crops_are_refused_for_merging() {
    let mut vlm = fixture_at(&folder("llava-onevision"));
    let (at, tower) = vlm.towers().next().expect("a tower");
    let index = tower.features_index.expect("an output");
    let part = &mut vlm.parts[at];
    let mut patch = Patch::new(&part.model, "batches");
    let output = patch.model().graph().outputs[index];
    let batched = patch.unsqueeze(output, &[0]);
    let ty = ValueType::tensor(DataType::Float, vec![Dim::Unknown; 4]);
    patch.replace_output(index, batched, ty);
    let plan = patch.finish();
    let model = part.model.clone().apply(plan).expect("a patched model");
    let files = vlm.parts.iter().enumerate().map(|(i, p)| {
        let own = if i == at {
            model.clone()
        } else {
            p.model.clone()
        };
        (p.file.clone(), p.variant.clone(), own)
    });
    let vlm = Vlm::new(files.collect());
    let parse = |passes: &[(&str, &str)]| {
        Recipe::parse(&support::models::recipe_text(passes, "")).expect("a recipe")
    };
    let merge = parse(&[("token_merge", "{dominant: 12, contextual: 3}")]);
    let error = rewrite(vlm.clone(), &merge)
        .expect_err("four axes")
        .to_string();
    assert!(
        error.contains("4 axes") && error.contains("[crops, N, width]"),
        "{error}"
    );
    let prune = parse(&[("visual_prune", "{drops: [{after_layer: 2, keep: 0.5}]}")]);
    rewrite(vlm, &prune).expect("pruning takes any layout");
}

fn pipeline(dir: &std::path::Path, merged: bool) -> VlmPipeline {
    runtime();
    let onnx = |name: &str| dir.join("onnx").join(name);
    let files = VlmFiles {
        vision_encoder: onnx("vision_encoder.onnx"),
        embed_tokens: onnx("embed_tokens.onnx"),
        decoder: onnx("decoder_model_merged.onnx"),
        configs: dir.to_owned(),
    };
    let pipeline = VlmPipeline::open(&files, &SessionOptions::default());
    pipeline.expect("a model").with_merged_crops(merged)
}

/// A picture of five crops through the whole pipeline: as many visual tokens as the goldens' `baseline` has.
#[test]
fn pictures_are_packed_in_a_prompt() {
    let street = Pixels::open(root().join("models/llava/images/street.png")).expect("a picture");
    let options = GenerateOptions {
        max_new_tokens: 4,
        ..Default::default()
    };
    for (name, want) in [("llava-next", 166), ("llava-onevision", 106)] {
        let mut pipeline = pipeline(&folder(name), false);
        let prepared = pipeline.prepare(
            &[Message::user(1, "What is it?")],
            std::slice::from_ref(&street),
        );
        let prepared = prepared.expect("a prompt");
        assert_eq!(prepared.features_per_image, [want], "{name}");
        let answer = pipeline.generate(&prepared, None, &options, &mut |_| {
            std::ops::ControlFlow::Continue(())
        });
        assert_eq!(answer.expect("an answer").visual_tokens, want, "{name}");
        // Told that they are merged, crops follow each other.
        let mut pipeline = pipeline.with_merged_crops(true);
        let rows = pipeline.encode_images(std::slice::from_ref(&street));
        assert_eq!(rows.expect("features")[0].shape()[0], 5 * 36, "{name}");
    }
}

/// `duet rewrite` marks the newline vector as visual, and `duet run` answers with what came out: packed after
/// pruning alone, one crop after the other after a merge. Names and shapes of the processor stay.
#[test]
fn rewritten_models_answer() {
    let place = tempfile::tempdir().expect("a folder");
    let street = root().join("models/llava/images/street.png");
    let street = street.to_str().expect("a path");
    let prune = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 4, keep: 0.25}]}";
    let merge = "{dominant: 12, contextual: 3}";
    for (name, all) in [("llava-next", 166), ("llava-onevision", 106)] {
        let base = folder(name);
        let newline = |dir: &std::path::Path| {
            let text = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
            let config: serde_json::Value = serde_json::from_str(&text).expect("config.json");
            config["image_newline"].as_array().expect("a list").clone()
        };
        // Visual tokens of a picture of five crops, and how many of them the last layer sees.
        for (passes, visual, last) in [
            (vec![("visual_prune", prune)], all, all / 4),
            (vec![("token_merge", merge)], 75, 75),
            (
                vec![("token_merge", merge), ("visual_prune", prune)],
                75,
                18,
            ),
        ] {
            let recipe = place.path().join("recipe.yaml");
            let out = place.path().join(format!("{name}-{}-{last}", passes.len()));
            std::fs::write(&recipe, support::models::recipe_text(&passes, "")).expect("written");
            let path = |p: &std::path::Path| p.to_str().expect("a path").to_owned();
            let (from, to) = (path(&base), path(&out));
            let ran = duet(&["rewrite", &from, "--recipe", &path(&recipe), "--out", &to]);
            assert_eq!(ran.code, 0, "{}", ran.stderr);
            let merged = passes[0].0 == "token_merge";
            let after_another = ran.stderr.contains("one after the other");
            for said in [
                "images of several crops: clients",
                "of one crop by layer",
                "of an image of 5 crops by layer",
            ] {
                assert!(ran.stderr.contains(said), "{}", ran.stderr);
            }
            assert_eq!(after_another, merged, "{}", ran.stderr);
            let mut want = newline(&base);
            if passes.iter().any(|(pass, _)| *pass == "visual_prune") {
                want.push(1.0.into());
            }
            assert_eq!(newline(&out), want, "{name} {passes:?}");
            let answer = duet(&[
                "run",
                &to,
                "--image",
                street,
                "--prompt",
                "What is it?",
                "--max-new-tokens",
                "3",
                "--json",
            ]);
            let answer = answer.json();
            let lengths = answer["cache_lengths"].as_array().expect("lengths");
            let length = |at: usize| lengths[at].as_u64().expect("a length");
            let text = answer["prompt_tokens"].as_u64().expect("a count") - visual;
            assert_eq!(answer["visual_tokens"], visual, "{name} {passes:?}");
            assert_eq!(length(0), visual + text, "{name} {passes:?}");
            assert_eq!(length(lengths.len() - 1), last + text, "{name} {passes:?}");
        }
    }
}
