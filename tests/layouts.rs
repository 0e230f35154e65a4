//! Where model files lie and what they are called: names that say nothing, single
//! files, strangers in the directory, and ONNX Runtime GenAI's directories.

mod commands;
mod common;

use commands::*;
use common::{FLOAT, INT64, encode, floats, graph, model, node, value};
use duet_onnx::onnx::read;

/// A flat directory whose files have names without meaning.
fn nameless(recipe: &str) -> Place {
    let place = Place::new(recipe);
    place.configs("model");
    for (name, to) in PARTS.into_iter().zip(["c", "a", "b"]) {
        place.put(&part("ts-eager-gqa", name), &format!("model/{to}.onnx"));
    }
    place
}

#[test]
fn names_that_say_nothing_do() {
    let place = nameless(BOTH);
    let shown = duet(&["inspect", &place.at("model"), "--json"]).json();
    assert_eq!(shown["layout"], "flat");
    let roles: Vec<&str> = shown["files"]
        .as_array()
        .expect("files")
        .iter()
        .map(|f| f["role"].as_str().expect("a role"))
        .collect();
    assert_eq!(roles, ["token embedding", "decoder", "vision encoder"]);
    place.rewritten(&[]);
    assert_eq!(place.names("out", ".onnx"), ["a.onnx", "b.onnx", "c.onnx"]);
    place.valid();
    let (before, after) = (place.answer("model", &[]), place.answer("out", &[]));
    assert_eq!(before["visual_tokens"], 81);
    assert_eq!(after["visual_tokens"], 36);
    // Rewritten graphs are no longer recognised; they say what they are.
    let shown = duet(&["inspect", &place.at("out"), "--json"]).json();
    assert_eq!(shown["files"][1]["role"], "decoder");
    let ran = place.rewrite("model", &["--beside", "less"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let beside = place.answer("model", &["--variant", "less"]);
    assert_eq!(beside["tokens"], after["tokens"]);
    assert_eq!(beside["cache_lengths"], after["cache_lengths"]);
}

#[test]
fn a_vision_encoder_alone_is_merged() {
    let place = Place::new(MERGE);
    place.put(&part("ts-sdpa-mha", "vision_encoder"), "model/x.onnx");
    let (file, out) = (place.at("model/x.onnx"), place.at("out"));
    let recipe = place.at("recipe.yaml");
    let ran = duet(&["rewrite", &file, "--recipe", &recipe, "--out", &out]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(place.names("out", ""), ["x.onnx"]);
    runtime();
    let ran = validate(&[&file, &place.at("out/x.onnx"), "--json"]);
    assert!(
        ran.json()["findings"]
            .as_array()
            .is_some_and(|f| f.len() > 9),
        "{}",
        ran.stdout
    );
    // There is no decoder to prune.
    place.write("recipe.yaml", BOTH.as_bytes());
    let ran = duet(&[
        "rewrite",
        &file,
        "--recipe",
        &recipe,
        "--out",
        &place.at("other"),
    ]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr.contains("it is the vision encoder"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_decoder_alone_is_pruned_with_a_mark_of_its_own() {
    let prune = "version: 1
passes:
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}
";
    for marker in [
        "marker: input\n",
        "marker: static\nspan: {start: 2, count: 12}\n",
    ] {
        let place = Place::new(&format!("{prune}{marker}"));
        place.put(
            &part("dynamo23-gqa", "decoder_model_merged"),
            "model/y.onnx",
        );
        let (file, out) = (place.at("model/y.onnx"), place.at("out"));
        let recipe = place.at("recipe.yaml");
        let ran = duet(&["rewrite", &file, "--recipe", &recipe, "--out", &out]);
        assert_eq!(ran.code, 0, "{marker}: {}", ran.stderr);
        runtime();
        let ran = validate(&[&file, &place.at("out/y.onnx")]);
        assert_eq!(ran.code, 0, "{marker}: {}\n{}", ran.stdout, ran.stderr);
    }
    let place = Place::new(prune);
    place.put(
        &part("dynamo23-gqa", "decoder_model_merged"),
        "model/y.onnx",
    );
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    for what in ["no vision encoder", "marker: input", "marker: static"] {
        assert!(
            ran.stderr.contains(what),
            "'{what}' is not in {}",
            ran.stderr
        );
    }
}

#[test]
fn two_decoders_between_which_nothing_decides_are_listed() {
    let place = nameless(BOTH);
    place.put(&part("ts-sdpa-gqa", "decoder_model_merged"), "model/d.onnx");
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    let said = "each of b.onnx and d.onnx is a decoder";
    assert!(ran.stderr.contains(said), "{}", ran.stderr);
    assert!(!place.path("out").exists());
    // Looking is not rewriting.
    assert_eq!(duet(&["inspect", &place.at("model")]).code, 0);
}

/// A text encoder: ids and a mask in, one vector a row out.
fn text_encoder() -> Vec<u8> {
    let table = floats("table", &[4, 2], &[0.5; 8]);
    let weight = floats("weight", &[2, 2], &[0.25; 4]);
    let proto = model(graph(
        "text",
        &[
            value("input_ids", INT64, &[-1, -1]),
            value("attention_mask", INT64, &[-1, -1]),
        ],
        &[value("text_embeds", FLOAT, &[-1, -1, 2])],
        &[table, weight],
        &[
            node("Gather", &["table", "input_ids"], &["rows"]),
            node("MatMul", &["rows", "weight"], &["text_embeds"]),
        ],
    ));
    encode(&proto).to_vec()
}

#[test]
fn strangers_are_carried_over_as_they_are() {
    let place = nameless(BOTH);
    place.write("model/text_model.onnx", &text_encoder());
    // A tower whose features the decoder cannot read is another model's.
    place.put(&part("demo", "vision_encoder"), "model/other_tower.onnx");
    let ran = place.rewritten(&[]);
    for name in ["text_model.onnx", "other_tower.onnx"] {
        let said = format!("{name}: not recognised, carried over as it is");
        assert!(ran.stderr.contains(&said), "{}", ran.stderr);
        assert!(
            place.files("model")[name] == place.files("out")[name],
            "{name} changed"
        );
    }
    let shown = duet(&["inspect", &place.at("model")]);
    let why = "its output is 64 wide, the decoder reads 32";
    assert!(shown.stdout.contains(why), "{}", shown.stdout);
    place.valid();
    assert_eq!(place.answer("out", &[])["visual_tokens"], 36);
}

#[test]
fn a_network_behind_the_table_is_no_token_embedding() {
    let place = nameless(BOTH);
    let mut proto = common::decode(&text_encoder());
    proto.graph.as_mut().expect("a graph").input.truncate(1);
    place.write("model/bert.onnx", &encode(&proto));
    let ran = place.rewritten(&[]);
    assert!(
        ran.stderr.contains("bert.onnx: not recognised"),
        "{}",
        ran.stderr
    );
    let shown = duet(&["inspect", &place.at("model")]);
    assert!(
        shown.stdout.contains("it is a network, not a table"),
        "{}",
        shown.stdout
    );
}

/// A GenAI directory under names of its own, with what `duet run` needs besides.
fn genai(recipe: &str) -> Place {
    let place = Place::new(recipe);
    place.configs("model");
    let from = source("models/forms/fixtures/genai");
    for (name, to) in [
        ("embedding.onnx", "words.onnx"),
        ("text.onnx", "language.onnx"),
        ("text.onnx.data", "text.onnx.data"),
    ] {
        place.put(&from.join(name), &format!("model/{to}"));
    }
    place.put(
        &part("ts-sdpa-gqa", "vision_encoder"),
        "model/sub/eyes.onnx",
    );
    // Not named by the config, so no part of the model.
    place.put(
        &part("ts-sdpa-gqa", "decoder_model_merged"),
        "model/spare.onnx",
    );
    let text = std::fs::read_to_string(from.join("genai_config.json")).expect("a config");
    let text = text
        .replace("\"embedding.onnx\"", "\"words.onnx\"")
        .replace("\"text.onnx\"", "\"language.onnx\"")
        .replace("\"vision.onnx\"", "\"sub/eyes.onnx\"");
    place.write("model/genai_config.json", text.as_bytes());
    place
}

fn config(place: &Place, path: &str) -> serde_json::Value {
    let text = std::fs::read(place.path(path)).expect("a config");
    serde_json::from_slice(&text).expect("JSON")
}

#[test]
fn a_genai_directory_is_found_through_its_config_and_stays_one() {
    let place = genai(BOTH);
    let shown = duet(&["inspect", &place.at("model"), "--json"]).json();
    assert_eq!(shown["layout"], "genai");
    let files = shown["files"].as_array().expect("files");
    assert_eq!(files.len(), 3, "{shown:#}");
    let words = &files[2]["found"];
    assert_eq!(files[2]["file"], "words.onnx");
    assert_eq!(words["features_input"], "image_features");
    assert_eq!(words["image_token"], 4);
    place.rewritten(&[]);
    let spare = |folder: &str| place.files(folder).remove("spare.onnx");
    assert!(
        spare("model") == spare("out"),
        "a file that the config does not name changed"
    );
    // GenAI allocates what passes between the files by hidden_size.
    let (before, after) = (
        config(&place, "model/genai_config.json"),
        config(&place, "out/genai_config.json"),
    );
    let mut wanted = before.clone();
    wanted["model"]["decoder"]["hidden_size"] = 33.into();
    assert_eq!(after, wanted);
    let last = |file: &str, output: bool, name: &str| {
        let model = read(&place.path(&format!("out/{file}"))).expect("a model");
        let found = if output {
            model.output(name)
        } else {
            model.input(name)
        };
        let ty = model
            .value(found.expect("there"))
            .ty
            .clone()
            .expect("typed");
        ty.shape().expect("ranked").last().expect("a width").known()
    };
    for (file, output, name) in [
        ("sub/eyes.onnx", true, "image_features"),
        ("words.onnx", false, "image_features"),
        ("words.onnx", true, "inputs_embeds"),
        ("language.onnx", false, "inputs_embeds"),
    ] {
        assert_eq!(last(file, output, name), Some(33), "{file}: {name}");
    }
    let checks = place.valid();
    assert!(
        checks.iter().any(|c| c == "tract: drop point 2"),
        "{checks:?}"
    );
    let answer = place.answer("out", &[]);
    assert_eq!(answer["visual_tokens"], 36);
    let lengths: Vec<i64> =
        serde_json::from_value(answer["cache_lengths"].clone()).expect("numbers");
    assert_eq!(lengths, [36, 36, 36, 18, 18, 0, 0, 0].map(|v| v + 11));
    assert_eq!(place.answer("model", &[])["visual_tokens"], 81);
}

/// The embedding graph of `out` states how many features an image has and how wide they are; what was rewritten is
/// valid, and an answer sees as many.
#[track_caller]
fn takes_features(place: &Place, count: i64, width: i64) {
    let model = read(&place.path("out/words.onnx")).expect("a model");
    let features = model.value(model.input("image_features").expect("there"));
    let shape = features.ty.as_ref().and_then(|t| t.shape()).expect("typed");
    assert_eq!(
        (shape[1].known(), shape[2].known()),
        (Some(count), Some(width))
    );
    place.valid();
    assert_eq!(place.answer("out", &[])["visual_tokens"], count);
}

#[test]
fn a_merge_alone_leaves_the_genai_config_as_it_is() {
    let place = genai(MERGE);
    place.rewritten(&[]);
    assert!(place.files("model")["genai_config.json"] == place.files("out")["genai_config.json"]);
    takes_features(&place, 36, 32);
}

#[test]
fn a_genai_directory_whose_features_keep_their_places_has_wider_tensors_only() {
    let place = genai(&MERGE.replace('}', ", placement: decoder}"));
    let ran = place.rewritten(&[]);
    let said = "attended to in the decoder's first layer";
    assert!(ran.stderr.contains(said), "{}", ran.stderr);
    let mut wanted = config(&place, "model/genai_config.json");
    wanted["model"]["decoder"]["hidden_size"] = 33.into();
    assert_eq!(config(&place, "out/genai_config.json"), wanted);
    takes_features(&place, 81, 33);
}

#[test]
fn beside_a_genai_config_lies_one_that_names_the_new_files() {
    let place = genai(BOTH);
    let before = place.files("model");
    let ran = place.rewrite("model", &["--beside", "duet"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let after = place.files("model");
    assert!(before.iter().all(|(name, bytes)| after[name] == *bytes));
    let new = config(&place, "model/genai_config_duet.json");
    assert_eq!(new["model"]["decoder"]["filename"], "language_duet.onnx");
    assert_eq!(new["model"]["vision"]["filename"], "sub/eyes_duet.onnx");
    assert_eq!(new["model"]["embedding"]["filename"], "words_duet.onnx");
    assert_eq!(new["model"]["decoder"]["hidden_size"], 33);
    assert_eq!(place.answer("model", &[])["visual_tokens"], 81);
    assert_eq!(
        place.answer("model", &["--variant", "duet"])["visual_tokens"],
        36
    );
}

#[test]
fn a_text_only_genai_directory_is_refused_with_the_reason() {
    let place = Place::new(&BOTH.replace("  - token_merge: {dominant: 30, contextual: 6}\n", ""));
    let cache = |name: &str| value(name, FLOAT, &[-1, 1, -1, 2]);
    let proto = model(graph(
        "text",
        &[
            value("input_ids", INT64, &[-1, -1]),
            cache("past_key_values.0.key"),
            cache("past_key_values.0.value"),
        ],
        &[
            value("logits", FLOAT, &[-1, -1, 2]),
            cache("present.0.key"),
            cache("present.0.value"),
        ],
        &[floats("table", &[4, 2], &[0.5; 8])],
        &[
            node("Gather", &["table", "input_ids"], &["logits"]),
            node("Identity", &["past_key_values.0.key"], &["present.0.key"]),
            node(
                "Identity",
                &["past_key_values.0.value"],
                &["present.0.value"],
            ),
        ],
    ));
    place.write("model/model.onnx", &encode(&proto));
    let config =
        br#"{"model": {"type": "llama", "decoder": {"filename": "model.onnx", "hidden_size": 2}}}"#;
    place.write("model/genai_config.json", config);
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    for what in [
        "model.onnx",
        "takes input_ids and no pixels",
        "has no visual tokens",
    ] {
        assert!(
            ran.stderr.contains(what),
            "'{what}' is not in {}",
            ran.stderr
        );
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_genai_config_that_lies_is_refused() {
    let place = genai(BOTH);
    let text = std::fs::read_to_string(place.path("model/genai_config.json")).expect("a config");
    let wrong = text.replace("\"hidden_size\": 32", "\"hidden_size\": 48");
    place.write("model/genai_config.json", wrong.as_bytes());
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("hidden_size is 48"), "{}", ran.stderr);
    assert!(!place.path("out").exists());
}

/// A fixture's file whose interface has other names.
fn renamed(name: &str, names: &[(&str, &str)]) -> Vec<u8> {
    let mut proto = common::decode(&std::fs::read(part("ts-eager-gqa", name)).expect("a fixture"));
    let graph = proto.graph.as_mut().expect("a graph");
    let new = |old: &str| {
        let found = names.iter().find(|(from, _)| *from == old);
        found.map(|(_, to)| (*to).to_owned())
    };
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if let Some(to) = new(value.name()) {
            value.name = Some(to);
        }
    }
    for node in &mut graph.node {
        for value in node.input.iter_mut().chain(&mut node.output) {
            if let Some(to) = new(value) {
                *value = to;
            }
        }
    }
    encode(&proto).to_vec()
}

#[test]
fn tensors_may_have_other_names_too() {
    let place = Place::new(BOTH);
    place.configs("model");
    let names = [
        ("pixel_values", "x"),
        ("image_features", "y"),
        ("input_ids", "tokens"),
        ("inputs_embeds", "hidden_in"),
        ("logits", "scores"),
    ];
    for (name, to) in PARTS.into_iter().zip(["1", "2", "3"]) {
        place.write(&format!("model/{to}.onnx"), &renamed(name, &names));
    }
    place.rewritten(&[]);
    place.valid();
    let usual = nameless(BOTH);
    usual.rewritten(&[]);
    let (new, old) = (place.answer("out", &[]), usual.answer("out", &[]));
    assert_eq!(new["tokens"], old["tokens"]);
    assert_eq!(new["cache_lengths"], old["cache_lengths"]);
    assert_eq!(place.answer("model", &[])["visual_tokens"], 81);
}
