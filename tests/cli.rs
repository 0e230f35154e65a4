//! The command line as people and scripts use it: exit codes, messages, what is
//! written and what is not.

#![allow(clippy::print_stderr, reason = "an installation announces itself")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/llava/fixtures")
}

fn duet(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(arguments)
        .env("NO_COLOR", "1")
        .output()
        .expect("the binary starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8 path")
}

/// Installs ONNX Runtime if the machine has none: commands that run models do
/// not download it themselves.
fn runtime() {
    duet_onnx::runtime::ensure(&mut |line| eprintln!("{line}")).expect("ONNX Runtime");
}

/// Rewrites a directory into a new one.
fn rewrite(model: &Path, recipe: &Path, out: &Path) -> Output {
    let (model, recipe, out) = (text(model), text(recipe), text(out));
    duet(&["rewrite", model, "--recipe", recipe, "--out", out])
}

const RECIPE: &str = "version: 1
passes:
  - token_merge: {dominant: 30, contextual: 6}
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}
";

/// A directory with a recipe in it, and the recipe's path.
fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = dir.path().join("recipe.yaml");
    std::fs::write(&recipe, RECIPE).expect("written");
    (dir, recipe)
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("a directory")
        .map(|e| {
            e.expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[test]
fn bad_input_is_refused_with_exit_code_2_and_nothing_written() {
    let (dir, recipe) = scratch();
    let model = fixtures().join("ts-sdpa-mha");
    let out = dir.path().join("out");
    let rising = dir.path().join("rising.yaml");
    std::fs::write(
        &rising,
        "version: 1\npasses:\n  - visual_prune: {drops: [{after_layer: 2, keep: 0.2}, {after_layer: 4, keep: 0.6}]}",
    )
    .expect("written");
    let deep = dir.path().join("deep.yaml");
    std::fs::write(
        &deep,
        "version: 1\npasses:\n  - visual_prune: {drops: [{after_layer: 8, keep: 0.2}]}",
    )
    .expect("written");
    let typo = dir.path().join("typo.yaml");
    std::fs::write(
        &typo,
        "version: 1\npasses:\n  - token_merge: {dominat: 3, contextual: 1}",
    )
    .expect("written");
    let there = dir.path().join("there");
    std::fs::create_dir(&there).expect("created");
    let before = entries(dir.path());
    let missing = dir.path().join("missing");
    let cases: &[(&Path, &Path, &Path, &str)] = &[
        (&missing, &recipe, &out, "does not exist"),
        (
            &model,
            Path::new("no-such-recipe"),
            &out,
            "neither a recipe file nor a built-in recipe",
        ),
        (&model, &rising, &out, "ratios must fall"),
        (&model, &deep, &out, "the last drop point is after layer 7"),
        (&model, &typo, &out, "did you mean 'dominant'?"),
        (&model, &recipe, &there, "exists already"),
        (&recipe, &recipe, &out, "not a valid ONNX file"),
        (dir.path(), &recipe, &out, "no .onnx file"),
    ];
    for (model, recipe, out, expected) in cases {
        let result = rewrite(model, recipe, out);
        assert_eq!(code(&result), 2, "{expected}: {}", stderr(&result));
        assert!(
            stderr(&result).contains(expected),
            "{expected}: {}",
            stderr(&result)
        );
        assert!(stdout(&result).is_empty());
        assert_eq!(entries(dir.path()), before, "{expected}");
        assert!(entries(&there).is_empty(), "{expected}");
    }
    assert_eq!(
        code(&duet(&["rewrite", text(&model), "--recipe", "demo"])),
        2,
        "no target"
    );
    assert_eq!(code(&duet(&["no-such-command"])), 2);
}

#[test]
fn a_rewritten_model_is_refused_and_the_message_names_its_recipe() {
    let (dir, recipe) = scratch();
    let model = fixtures().join("dynamo18-gqa");
    let out = dir.path().join("out");
    let first = rewrite(&model, &recipe, &out);
    assert_eq!(code(&first), 0, "{}", stderr(&first));
    // Everything else is carried over, external data included.
    for name in [
        "config.json",
        "tokenizer.json",
        "onnx/decoder_model_merged.onnx_data",
    ] {
        assert!(out.join(name).is_file(), "{name}");
    }
    let again = dir.path().join("again");
    let second = rewrite(&out, &recipe, &again);
    assert_eq!(code(&second), 2);
    assert!(
        stderr(&second).contains("rewritten before"),
        "{}",
        stderr(&second)
    );
    assert!(
        stderr(&second).contains("dominant: 30, contextual: 6"),
        "{}",
        stderr(&second)
    );
    assert!(!again.exists());
}

#[test]
fn processor_configs_expand_to_the_new_token_count() {
    let (dir, recipe) = scratch();
    let out = dir.path().join("out");
    let model = fixtures().join("ts-eager-mha");
    let result = duet(&[
        "rewrite",
        text(&model),
        "--recipe",
        text(&recipe),
        "--out",
        text(&out),
        "--quiet",
    ]);
    assert_eq!(code(&result), 0, "{}", stderr(&result));
    assert!(stderr(&result).is_empty(), "--quiet: {}", stderr(&result));
    let config = std::fs::read_to_string(out.join("processor_config.json")).expect("a config");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["num_additional_image_tokens"], 36 - 81);
    assert_eq!(config["vision_feature_select_strategy"], "full");
}

#[test]
fn beside_shares_the_data_and_touches_nothing() {
    let (dir, recipe) = scratch();
    let model = dir.path().join("model");
    let status = Command::new("cp")
        .arg("-r")
        .arg(fixtures().join("dynamo18-gqa"))
        .arg(&model)
        .status();
    assert!(status.expect("cp").success());
    let before = entries(&model.join("onnx"));
    let old = std::fs::read(model.join("onnx/decoder_model_merged.onnx")).expect("a file");
    let rewrite = || {
        duet(&[
            "rewrite",
            text(&model),
            "--recipe",
            text(&recipe),
            "--beside",
            "small",
        ])
    };
    let result = rewrite();
    assert_eq!(code(&result), 0, "{}", stderr(&result));
    let after = entries(&model.join("onnx"));
    let new: Vec<&String> = after.iter().filter(|n| !before.contains(n)).collect();
    assert_eq!(
        new,
        [
            "decoder_model_merged_small.onnx",
            "embed_tokens_small.onnx",
            "vision_encoder_small.onnx"
        ]
    );
    assert!(model.join("processor_config_small.json").is_file());
    assert_eq!(
        std::fs::read(model.join("onnx/decoder_model_merged.onnx")).expect("a file"),
        old
    );
    let again = rewrite();
    assert_eq!(code(&again), 2);
    assert!(
        stderr(&again).contains("exists already"),
        "{}",
        stderr(&again)
    );
    // The files run where they lie.
    runtime();
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/llava/images/street.png");
    let run = |extra: &[&str]| {
        let mut all = vec![
            "run",
            text(&model),
            "--image",
            text(&picture),
            "--prompt",
            "What is it?",
        ];
        all.extend(["--max-new-tokens", "4", "--threads", "2", "--json"]);
        all.extend(extra);
        let result = duet(&all);
        assert_eq!(code(&result), 0, "{}", stderr(&result));
        serde_json::from_str::<serde_json::Value>(&stdout(&result)).expect("one JSON document")
    };
    let (plain, small) = (run(&[]), run(&["--variant", "small"]));
    assert_eq!(plain["visual_tokens"], 81);
    assert_eq!(small["visual_tokens"], 36);
    let text_tokens = 11;
    let lengths: Vec<i64> =
        serde_json::from_value(small["cache_lengths"].clone()).expect("numbers");
    assert_eq!(
        lengths,
        [36, 36, 36, 18, 18, 0, 0, 0].map(|v| v + text_tokens)
    );
}

#[test]
fn validate_tells_a_good_model_from_a_wrong_one() {
    runtime();
    let (dir, recipe) = scratch();
    let model = fixtures().join("ts-sdpa-gqa");
    let out = dir.path().join("out");
    let result = rewrite(&model, &recipe, &out);
    assert_eq!(code(&result), 0, "{}", stderr(&result));
    let good = duet(&[
        "validate",
        text(&model),
        text(&out),
        "--json",
        "--threads",
        "2",
    ]);
    assert_eq!(code(&good), 0, "{}{}", stdout(&good), stderr(&good));
    let report: serde_json::Value =
        serde_json::from_str(&stdout(&good)).expect("one JSON document");
    assert_eq!(report["schema_version"], 1);
    // The vision encoder of another recipe, under this recipe's name.
    let other = dir.path().join("other.yaml");
    std::fs::write(
        &other,
        RECIPE.replace("contextual: 6", "contextual: 6, selector: uniform"),
    )
    .expect("written");
    let wrong = dir.path().join("wrong");
    let result = rewrite(&model, &other, &wrong);
    assert_eq!(code(&result), 0, "{}", stderr(&result));
    let mixed = out.join("onnx/vision_encoder.onnx");
    let foreign = std::fs::read(wrong.join("onnx/vision_encoder.onnx")).expect("a file");
    let stamp = |bytes: Vec<u8>| {
        let model = duet_onnx::onnx::read_bytes("foreign", bytes.into()).expect("a model");
        let mut patch = duet_onnx::ir::Patch::new(&model, "forged");
        patch.metadata("duet.recipe", RECIPE);
        let plan = patch.finish();
        let model = model.apply(plan).expect("a stamp");
        duet_onnx::onnx::serialize(duet_onnx::ir::verify(&model).expect("valid")).to_vec()
    };
    std::fs::write(&mixed, stamp(foreign)).expect("written");
    let bad = duet(&["validate", text(&model), text(&out), "--threads", "2"]);
    assert_eq!(code(&bad), 1, "{}{}", stdout(&bad), stderr(&bad));
    assert!(stdout(&bad).contains("FAIL"), "{}", stdout(&bad));
    // A base is no rewritten model.
    let base = duet(&["validate", text(&model), text(&model)]);
    assert_eq!(code(&base), 2);
    assert!(
        stderr(&base).contains("not a rewritten model"),
        "{}",
        stderr(&base)
    );
}

#[test]
fn inspect_reports_the_same_structure_for_every_export_of_a_model() {
    let mut seen = std::collections::BTreeMap::<String, Vec<String>>::new();
    for exporter in ["ts-eager", "ts-sdpa", "dynamo18", "dynamo23"] {
        for set in ["mha", "gqa"] {
            let model = fixtures().join(format!("{exporter}-{set}"));
            let result = duet(&["inspect", text(&model), "--json"]);
            assert_eq!(code(&result), 0, "{}", stderr(&result));
            let document: serde_json::Value = serde_json::from_str(&stdout(&result)).expect("JSON");
            assert_eq!(document["schema_version"], 1);
            let mut structure = Vec::new();
            for file in document["files"].as_array().expect("files") {
                let mut found = file["found"].clone();
                // Names are the exporter's; everything else is the model's.
                for key in ["attention", "merge_point", "drop_points", "prelude_nodes"] {
                    found.as_object_mut().expect("an object").remove(key);
                }
                structure.push(format!("{} {found}", file["role"]));
            }
            seen.entry(set.to_owned())
                .or_default()
                .push(structure.join("\n"));
        }
    }
    for (set, all) in seen {
        assert_eq!(all.len(), 4);
        assert!(all.iter().all(|s| *s == all[0]), "{set}: {all:#?}");
        assert!(all[0].contains(if set == "mha" {
            "\"kv_heads\":4"
        } else {
            "\"kv_heads\":2"
        }));
    }
}

#[test]
fn the_demo_holds_what_it_shows() {
    let result = duet(&["demo", "--runs", "1", "--limit", "120"]);
    assert_eq!(code(&result), 0, "{}{}", stdout(&result), stderr(&result));
    let shown = stdout(&result);
    for expected in [
        "196 patch tokens → 119",
        "accuracy",
        "valid, ",
        "0 failed",
        "prefill",
    ] {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    // What its caches held, in the table of accuracies, and what came out of its encoder, in that of times.
    let rows: Vec<Vec<&str>> = shown
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for cells in [
        &["tiles-21", "21.25", "89.2", "%"][..],
        &["visual", "tokens", "in", "196", "156", "119", "119"],
    ] {
        assert!(
            rows.iter().any(|row| row.starts_with(cells)),
            "{cells:?}: {shown}"
        );
    }
    assert!(
        !shown.contains('\u{1b}'),
        "no colour codes where nobody sees them"
    );
}

#[test]
fn built_in_recipes_are_the_files_of_the_passes_folder_and_meet_their_budgets() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("passes");
    let message = stderr(&duet(&[
        "rewrite",
        text(&fixtures().join("demo")),
        "--recipe",
        "?",
        "--out",
        "/dev/null/x",
    ]));
    for entry in entries(&folder) {
        let Some(name) = entry.strip_suffix(".yaml") else {
            continue;
        };
        assert!(message.contains(name), "{name} is not built in: {message}");
        let text = std::fs::read_to_string(folder.join(&entry)).expect("a recipe");
        let recipe = duet_onnx::passes::Recipe::parse(&text).expect("a valid recipe");
        let prune = recipe
            .pass::<duet_onnx::passes::VisualPrune>()
            .expect("a schedule");
        // What the families' budgets are stated for: images that enter together, patches of one, CLS, layers.
        let (images, patches, cls, layers) = match name {
            "demo" => (1, 576, true, 16),
            n if n.starts_with("tiles-") => (1, 196, true, 12),
            n if n.starts_with("clips-") => (8, 49, true, 12),
            n if n.starts_with("llava-1.5-") => (1, 576, true, 32),
            n if n.starts_with("llava-next-") => (5, 576, true, 32),
            n if n.starts_with("llava-onevision-") => (5, 729, false, 28),
            n if n.starts_with("qwen2.5-vl-") => (1, 1000, false, 28),
            n if n.starts_with("video-llava-") => (8, 256, true, 32),
            _ => panic!("{name}: of which family?"),
        };
        let each = match recipe.pass::<duet_onnx::passes::TokenMerge>() {
            Some(merge) => duet_onnx::passes::merge_budget(merge, patches, cls).total(),
            None => patches,
        };
        let deepest = prune.drops.last().expect("a drop").after_layer;
        assert!(deepest < layers, "{name}: a drop after layer {deepest}");
        let counts = prune.tokens_per_layer(images * each, layers);
        let average = counts.iter().sum::<i64>() as f64 / layers as f64;
        let expected = match name {
            "llava-1.5-192" => 191.75,
            "demo" | "llava-1.5-128" => 126.25,
            "llava-1.5-64" => 63.75,
            "tiles-65" => 65.0,
            "tiles-43" => 43.25,
            "tiles-21" => 21.25,
            "clips-188" => 188.0,
            "clips-26" => 26.0,
            // All, a half, a quarter, an eighth, for a quarter of the layers each.
            "llava-next-prune" => 2880.0 * 1.875 / 4.0,
            "llava-next-640" => 300.0,
            "llava-next-320" => 150.0,
            "llava-next-160" => 75.0,
            "llava-onevision-prune" => (3645 + 1822 + 911 + 455) as f64 / 4.0,
            "llava-onevision-810" => 379.5,
            "llava-onevision-405" => 189.5,
            "llava-onevision-200" => 93.75,
            "qwen2.5-vl-prune" => 687.5,
            "qwen2.5-vl-640" => 440.0,
            "qwen2.5-vl-320" => 220.0,
            "qwen2.5-vl-160" => 110.0,
            "qwen2.5-vl-ratio" => 437.5,
            "video-llava-960" => 960.0,
            "video-llava-136" => 136.0,
            _ => panic!("{name}: which budget?"),
        };
        assert!((average - expected).abs() < 1e-9, "{name}: {average}");
    }
}
