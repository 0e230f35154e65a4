//! `duet bench` from outside: what is measured and what is said where something is not, caches and profiles that add
//! up, the document against its schema, the chart, and errors.

mod commands;
mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use commands::markup::well_formed;
use commands::{BOTH, MERGE, Place, duet, runtime, schema, source, text};
use serde_json::{Value, json};
use support::forms::form;

const MODEL: &str = "models/llava/fixtures/ts-sdpa-gqa";

/// As many features as before come out; caches of one length.
const PADDED: &str = "version: 1
passes:
  - token_merge: {dominant: 30, contextual: 6, placement: decoder}
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}
kv: padded
";

/// Few and short runs.
const SHORT: [&str; 7] = [
    "--runs",
    "2",
    "--new-tokens",
    "2",
    "--threads",
    "1",
    "--json",
];

/// `model` of a place rewritten with a recipe's text, to `out`.
fn rewrite(place: &Place, model: &Path, recipe: &str, out: &str) -> String {
    let (file, out) = (format!("{out}.yaml"), place.at(out));
    place.write(&file, recipe.as_bytes());
    let ran = duet(&[
        "rewrite",
        text(model),
        "--recipe",
        &place.at(&file),
        "--out",
        &out,
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    out
}

fn bench(models: &[&str], rest: &[&str]) -> Value {
    runtime();
    duet(&[&["bench"], models, &SHORT, rest].concat()).json()
}

/// A document is what `docs/bench.schema.json` says.
fn conforms(document: &Value) {
    let mut broken = document.clone();
    broken["models"][0]["vision"] = json!({ "median_ms": "much" });
    broken["models"][0]["more"] = json!(1);
    broken
        .as_object_mut()
        .expect("an object")
        .remove("profiles");
    schema::conforms("docs/bench.schema.json", document, &broken, 3);
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

fn why(value: &Value) -> &str {
    value["not_measured"]
        .as_str()
        .unwrap_or_else(|| panic!("{value} was measured"))
}

#[test]
fn caches_are_the_schedules_profiles_add_up_and_the_document_is_what_its_schema_says() {
    let place = Place::new(BOTH);
    let base = source(MODEL);
    let ragged = rewrite(&place, &base, BOTH, "ragged");
    let padded = rewrite(&place, &base, PADDED, "padded");
    let (table, chart) = (place.at("table.md"), place.at("chart.svg"));
    let rest = ["--profile", "--markdown", &table, "--svg", &chart];
    let document = bench(&[text(&base), &ragged, &padded], &rest);
    conforms(&document);
    let models = document["models"].as_array().expect("models");
    assert_eq!(document["measured"]["rounds"], 2);

    // 32 tokens of text and what the recipes leave of 81 patches.
    let layers = [
        vec![113; 8],
        vec![68, 68, 68, 50, 50, 32, 32, 32],
        vec![113, 68, 68, 50, 50, 32, 32, 32],
    ];
    let held = [layers[0].clone(), layers[1].clone(), vec![113; 8]];
    let names = ["ts-sdpa-gqa", "ragged", "padded"];
    for (at, model) in models.iter().enumerate() {
        assert_eq!(model["name"], names[at]);
        assert_eq!(model["tokens_by_layer"], json!(layers[at]), "{at}");
        let cache = &model["cache"];
        assert_eq!(cache["tokens_by_layer"], json!(held[at]), "{at}");
        // Keys and values of 2 heads of 8 numbers of 4 bytes.
        let bytes: usize = held[at].iter().sum::<usize>() * 2 * 2 * 8 * 4;
        assert_eq!(
            (&cache["bytes"], &cache["scheduled_bytes"]),
            (&json!(bytes), &json!(bytes))
        );
        assert_eq!(cache["as_scheduled"], true);
        for part in [
            "vision",
            "embed",
            "prefill",
            "time_to_first_token",
            "decode_step",
        ] {
            let time = &model[part];
            let [least, middle, most] = ["min_ms", "median_ms", "max_ms"].map(|k| number(&time[k]));
            assert!(
                0.0 < least && least <= middle && middle <= most,
                "{part}: {time}"
            );
            assert!(number(&time["speedup"]) > 0.0);
            let rounds = time["rounds_ms"].as_array().expect("rounds");
            let rounds: Vec<f64> = rounds.iter().map(number).collect();
            assert_eq!(rounds.len(), 2);
            assert_eq!(rounds[0].min(rounds[1]), least, "{part}");
            assert_eq!(rounds[0].max(rounds[1]), most, "{part}");
        }
        let parts: f64 = ["vision", "embed", "prefill"]
            .map(|p| number(&model[p]["min_ms"]))
            .iter()
            .sum();
        assert!(number(&model["time_to_first_token"]["max_ms"]) >= parts);
        assert!(number(&model["ideal_prefill"]["share"]) > 0.0);
        assert!(number(&model["ideal_decode_step"]["median_ms"]) > 0.0);
        assert!(number(&model["tokens_per_second"]) > 0.0);
        if cfg!(target_os = "linux") {
            assert!(number(&model["peak_memory_bytes"]) > 1e7);
        }
    }
    assert_eq!(models[0]["recipe"], Value::Null);
    assert_eq!(models[1]["recipe"], BOTH);
    let counts = ["prompt_tokens", "visual_tokens", "logits_rows"];
    assert_eq!(
        counts.map(|c| &models[0][c]),
        [&json!(113), &json!(81), &json!(113)]
    );
    assert_eq!(
        counts.map(|c| &models[1][c]),
        [&json!(68), &json!(36), &json!(32)]
    );
    assert_eq!(models[1]["average_visual_tokens"], 18.0);
    // The base is measured at what the others' layers see.
    let at: Vec<&Value> = document["base_at_lengths"]
        .as_array()
        .expect("lengths")
        .iter()
        .map(|l| &l["tokens"])
        .collect();
    assert_eq!(at, [&json!(32), &json!(50), &json!(68)]);

    let profiles = document["profiles"].as_array().expect("profiles");
    let groups = |model: &str, part: &str| {
        let own = profiles
            .iter()
            .find(|p| p["model"] == model && p["part"] == part);
        let own = own.unwrap_or_else(|| panic!("no profile of {model} {part}"));
        let groups = own["groups"].as_array().expect("groups");
        let sum: f64 = groups.iter().map(|g| number(&g["ms"])).sum();
        assert!((sum - number(&own["total_ms"])).abs() < 1e-9);
        let base = profiles
            .iter()
            .find(|p| p["part"] == part)
            .expect("the base's");
        let inserted: f64 = groups.iter().skip(1).map(|g| number(&g["ms"])).sum();
        match &own["inserted_of_base"] {
            Value::Null => assert_eq!(model, names[0]),
            share => assert!((number(share) - inserted / number(&base["total_ms"])).abs() < 1e-9),
        }
        groups
            .iter()
            .map(|g| g["group"].as_str().expect("a name"))
            .collect::<Vec<_>>()
    };
    assert_eq!(groups(names[0], "vision"), ["base"]);
    assert_eq!(groups(names[0], "prefill"), ["base"]);
    assert_eq!(groups("ragged", "vision"), ["base", "merge", "marker"]);
    assert_eq!(
        groups("ragged", "prefill"),
        ["base", "marker", "ranking", "gather", "stage"]
    );
    assert_eq!(
        groups("padded", "prefill"),
        ["base", "marker", "ranking", "gather", "stage", "padding"]
    );

    let chart = std::fs::read_to_string(&chart).expect("a chart");
    let seen = well_formed(&chart, &[]);
    assert!(
        ["svg", "rect", "line", "text"]
            .iter()
            .all(|e| seen.contains(*e)),
        "{seen:?}"
    );
    let table = std::fs::read_to_string(&table).expect("a table");
    for row in [
        "| milliseconds | ts-sdpa-gqa | ragged | padded |",
        "| prefill |",
        "| ranking | – |",
    ] {
        assert!(table.contains(row), "{row} in\n{table}");
    }
}

/// Two files, and the branches of one: the prompt runs through another graph than the steps.
#[test]
fn decoders_in_two_graphs_are_measured_through_both() {
    let place = Place::new(BOTH);
    for name in ["split-ts-sdpa-gqa", "if-ts-eager-mha"] {
        let base = form(name).directory();
        let out = rewrite(&place, &base, BOTH, name);
        let document = bench(&[text(&base), &out], &["--profile"]);
        let model = &document["models"][1];
        assert_eq!(
            model["cache"]["as_scheduled"], true,
            "{name}: {}",
            model["cache"]
        );
        assert!(number(&model["decode_step"]["median_ms"]) > 0.0);
        assert!(number(&model["ideal_prefill"]["share"]) > 0.0, "{name}");
        let profiles = document["profiles"].as_array().expect("profiles");
        let prompt = profiles
            .iter()
            .filter(|p| p["part"] == "prefill")
            .nth(1)
            .expect("the prompt's");
        assert!(
            prompt["groups"].as_array().expect("groups").len() > 3,
            "{name}: {prompt}"
        );
    }
}

#[test]
fn what_a_model_has_not_is_said_and_the_rest_is_measured() {
    let place = Place::new(BOTH);
    let onnx = source(MODEL).join("onnx");
    // An encoder alone.
    let encoder = onnx.join("vision_encoder.onnx");
    let out = rewrite(&place, &encoder, MERGE, "encoder");
    let document = bench(
        &[text(&encoder), &format!("{out}/vision_encoder.onnx")],
        &[],
    );
    conforms(&document);
    let model = &document["models"][1];
    assert_eq!(
        (&model["visual_tokens"], &model["prompt_tokens"]),
        (&json!(36), &json!(0))
    );
    assert!(number(&model["vision"]["median_ms"]) > 0.0);
    assert_eq!(why(&model["prefill"]), "the model has no decoder");
    assert_eq!(why(&model["embed"]), "the model has no token embedding");
    // Embeddings alone: of text, as there is nothing to put images into.
    let document = bench(&[text(&onnx.join("embed_tokens.onnx"))], &[]);
    let model = &document["models"][0];
    assert_eq!(
        (&model["visual_tokens"], &model["prompt_tokens"]),
        (&json!(0), &json!(32))
    );
    assert!(number(&model["embed"]["median_ms"]) > 0.0);
    // A decoder alone, told where its visual tokens are when it was rewritten.
    let decoder = onnx.join("decoder_model_merged.onnx");
    let fixed = "version: 1
passes:
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}
marker: static
span: {start: 5, count: 81}
";
    let out = rewrite(&place, &decoder, fixed, "decoder");
    let out = format!("{out}/decoder_model_merged.onnx");
    let document = bench(&[text(&decoder), &out], &[]);
    conforms(&document);
    let model = &document["models"][1];
    assert_eq!(why(&model["vision"]), "the model has no vision encoder");
    assert_eq!(
        why(&model["time_to_first_token"]),
        "the model has no vision encoder"
    );
    let layers = json!([113, 113, 113, 72, 72, 72, 72, 72]);
    assert_eq!(model["cache"]["tokens_by_layer"], layers);
    assert_eq!(model["cache"]["as_scheduled"], true);
    // Or of as many visual tokens as are asked for.
    let told = "version: 1
passes:
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}
marker: input
";
    let out = rewrite(&place, &decoder, told, "told");
    let out = format!("{out}/decoder_model_merged.onnx");
    let rest = [
        "--visual-tokens",
        "20",
        "--images",
        "2",
        "--prompt-tokens",
        "5",
    ];
    let document = bench(&[text(&decoder), &out], &rest);
    let lengths = |model: usize| &document["models"][model]["cache"]["tokens_by_layer"];
    assert_eq!(lengths(0), &json!(vec![45; 8]));
    assert_eq!(lengths(1), &json!([45, 45, 45, 25, 25, 25, 25, 25]));
    // A model in one file.
    let whole = form("vlm-batch-dynamo18-gqa").directory();
    let out = rewrite(&place, &whole, BOTH, "whole");
    let document = bench(&[text(&whole), &out], &["--profile"]);
    conforms(&document);
    let model = &document["models"][1];
    assert!(number(&model["prefill"]["median_ms"]) > 0.0);
    assert!(why(&model["vision"]).contains("one file"));
    assert!(why(&model["decode_step"]).contains("without a cache"));
    assert!(why(&model["ideal_prefill"]).contains("no decoder of its own"));
    assert_eq!(model["tokens_by_layer"][7], 32);
    let groups = document["profiles"][1]["groups"]
        .as_array()
        .expect("groups");
    assert!(
        groups.iter().any(|g| g["group"] == "merge")
            && groups.iter().any(|g| g["group"] == "ranking")
    );
}

#[track_caller]
fn fails(arguments: &[&str], parts: &[&str]) {
    let ran = duet(&[&["bench"], arguments].concat());
    assert_eq!(ran.code, 2, "{}\n{}", ran.stdout, ran.stderr);
    assert_eq!(ran.stdout, "");
    for part in parts {
        assert!(ran.stderr.contains(part), "{part} in {}", ran.stderr);
    }
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    runtime();
    let place = Place::new(BOTH);
    let base = source(MODEL);
    let (base, out) = (text(&base), rewrite(&place, &base, BOTH, "out"));
    fails(
        &[&out, base],
        &["was rewritten itself; give the original first"],
    );
    let other = source("models/llava/fixtures/ts-sdpa-mha");
    let heads = [
        "8 layers of 4 key/value heads",
        "8 layers of 2 key/value heads",
        "is not made from the base",
    ];
    fails(&[base, text(&other)], &heads);
    let tiles = source("models/vqa/llava");
    fails(&[base, text(&tiles)], &["12 layers", "8 layers"]);
    let encoder = format!("{base}/onnx/vision_encoder.onnx");
    let decoder = format!("{base}/onnx/decoder_model_merged.onnx");
    fails(
        &[&encoder, &decoder],
        &["no part in common: decoder and vision encoder"],
    );
    fails(&[base, "no-such-model"], &["no-such-model does not exist"]);
    fails(
        &[base, &out, "--svg", "no-such-folder/x.svg"],
        &["no folder no-such-folder"],
    );
    // Said before anything is measured.
    let (folder, file) = (place.at(""), place.at("both"));
    fails(
        &[base, &out, "--markdown", &folder],
        &["is a directory; expected the name of a file"],
    );
    fails(
        &[base, &out, "--markdown", &file, "--svg", &file],
        &["both name"],
    );
    #[cfg(target_os = "linux")]
    fails(
        &[base, &out, "--svg", "/proc/x.svg"],
        &["no file can be written to /proc"],
    );
    fails(&[base, &out, "--threads", "999999"], &["--threads", "1024"]);
    fails(&[base, &out, "--images", "1000000"], &["is too large"]);
    let many = ["--images", "1000000", "--visual-tokens", "1000000"];
    fails(
        &[&[decoder.as_str()][..], &many].concat(),
        &["is too large"],
    );
    fails(&[base, &out, "--runs", "0"], &["--runs"]);
    fails(&[base, &out, "--variant", "q4"], &["q4"]);
}

#[test]
fn a_provider_that_the_library_lacks_is_an_error_that_says_what_to_do() {
    runtime();
    let base = source(MODEL);
    fails(
        &[text(&base), "--provider", "warp"],
        &["`warp`", "it is not known", "cuda"],
    );
    let available = duet_onnx::runtime::providers::available().expect("ONNX Runtime");
    // A library that has it is asked for what it lacks instead.
    let lacking = ["cuda", "rocm", "qnn"]
        .into_iter()
        .find(|p| !available.contains(p));
    let lacking = lacking.expect("no build has all of them");
    let library = duet_onnx::runtime::Runtime::get()
        .expect("ONNX Runtime")
        .library()
        .path
        .clone();
    let says = [
        "was built without it",
        "(it has ",
        "cpu",
        "pip install onnxruntime-gpu",
        "ORT_DYLIB_PATH",
        text(&library),
    ];
    fails(&[text(&base), "--provider", lacking], &says);
}

/// The process behind each model, given what is no job.
#[test]
fn a_models_process_survives_nonsense() {
    runtime();
    let tell = |input: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_duet"))
            .arg("bench-worker")
            .env("NO_COLOR", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        // It may have ended before it read all.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("it ends");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (code, out, error) = tell("");
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(error.contains("reads a job from stdin"), "{error}");
    for input in ["nonsense\n", "{\"files\": 3}\n", "[[[[\n"] {
        let (code, out, error) = tell(input);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{input}");
        assert!(error.contains("reading the job"), "{error}");
    }
    let job = json!({
        "files": {"vision": "no-such.onnx", "clips": false, "embed": null, "decoder": null, "prompt": null, "whole": null},
        "heads": null, "threads": 1, "providers": [],
        "inputs": {"images": 1, "image_size": null, "frames": 1, "text": [1, 1], "features": 1, "merge": 1,
            "vocabulary": 2, "placeholder": null, "width": null, "steps": 1, "seed": 0},
    });
    let (code, out, _) = tell(&format!("{job}\n"));
    assert_eq!(code, Some(0));
    assert!(
        out.contains("failed") && out.contains("no-such.onnx"),
        "{out}"
    );
    let mut job = job;
    job["files"]["vision"] = source(MODEL)
        .join("onnx/vision_encoder.onnx")
        .to_str()
        .into();
    let (code, out, error) = tell(&format!(
        "{job}\n\"turn\"\n{{\"length\": 4}}\n{{\"head\": 4}}\nstop\n"
    ));
    let replies: Vec<&str> = out.lines().collect();
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("reading a task"), "{error}");
    assert_eq!(replies.len(), 4, "{out}");
    assert_eq!(replies[0], "\"ready\"");
    assert!(replies[1].contains("\"visual_tokens\":81"), "{out}");
    assert!(
        replies[2].contains("no decoder of its own")
            && replies[3].contains("no decoder of its own"),
        "{out}"
    );
}
