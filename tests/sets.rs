//! Which files belong together where a decoder is two graphs or the model is one file:
//! chosen by precision, rewritten, validated and run as what they are.

mod commands;
mod common;
mod support;

use commands::*;
use duet_onnx::onnx::read;
use serde_json::{Value, json};
use support::forms::form;

/// A packed form as `model`, and each of its networks again as `_fp16`. (Precisions
/// are told by names alone.)
fn twice(name: &str, networks: &[&str]) -> Place {
    let place = Place::new(BOTH);
    let made = form(name).unpack(&place.path("made"));
    std::fs::rename(made, place.path("model")).expect("moved");
    for network in networks {
        let plain = place.path(&format!("model/onnx/{network}.onnx"));
        place.put(&plain, &format!("model/onnx/{network}_fp16.onnx"));
    }
    place
}

/// The sets that `duet inspect` shows.
#[track_caller]
fn sets(place: &Place, model: &str) -> Vec<Value> {
    let ran = duet(&["inspect", &place.at(model), "--json"]);
    let document = ran.json();
    document["sets"].as_array().expect("sets").clone()
}

/// What a rewritten file says that it is.
fn role(place: &Place, file: &str) -> String {
    let model = read(&place.path(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    model.metadata("duet.role").unwrap_or_default().to_owned()
}

#[test]
fn the_decoder_that_starts_a_cache_goes_with_the_one_that_goes_on() {
    let pair = ["decoder_model", "decoder_with_past_model"];
    let place = twice("split-ts-sdpa-gqa", &pair);
    for (set, suffix) in sets(&place, "model").iter().zip(["", "_fp16"]) {
        let named = |stem: &str| json!(format!("onnx/{stem}{suffix}.onnx"));
        assert_eq!(set["prompt_decoder"], named(pair[0]), "{set}");
        assert_eq!(set["decoder"], named(pair[1]), "{set}");
        // There is one of each.
        assert_eq!(set["vision"], "onnx/vision_encoder.onnx", "{set}");
        assert_eq!(set["whole"], Value::Null, "{set}");
    }
    place.rewritten(&["--variant", "fp16"]);
    let expected = [
        "onnx/decoder_model_fp16.onnx",
        "onnx/decoder_with_past_model_fp16.onnx",
        "onnx/embed_tokens.onnx",
        "onnx/vision_encoder.onnx",
    ];
    assert_eq!(place.names("out", ".onnx"), expected);
    for (file, kind) in expected
        .iter()
        .zip(["decoder", "decoder", "embedding", "vision"])
    {
        assert_eq!(role(&place, &format!("out/{file}")), kind, "{file}");
    }
    let checks = place.valid();
    assert!(
        checks.iter().any(|c| c.contains("second question")),
        "{checks:?}"
    );
    // The graph that starts is another of the set's.
    let set = sets(&place, "out").pop().expect("a set");
    assert_eq!(set["prompt_decoder"], expected[0], "{set}");
    let (plain, chosen) = (
        place.answer("out", &[]),
        place.answer("out", &["--variant", "fp16"]),
    );
    assert_eq!(plain["tokens"], chosen["tokens"]);
    assert!(plain["cache_lengths"][0].as_u64() > plain["cache_lengths"][7].as_u64());
}

#[test]
fn the_branches_of_a_merged_file_are_one_file() {
    let place = twice("if-ts-eager-mha", &["decoder_model_merged"]);
    for (set, suffix) in sets(&place, "model").iter().zip(["", "_fp16"]) {
        let file = json!(format!("onnx/decoder_model_merged{suffix}.onnx"));
        assert_eq!(set["decoder"], file, "{set}");
        assert_eq!(set["prompt_decoder"], file, "{set}");
    }
    let ran = place.rewritten(&["--variant", "default"]);
    let left = ran
        .stderr
        .matches("decoder_model_merged_fp16.onnx: left out");
    assert_eq!(left.count(), 1, "{}", ran.stderr);
    let expected = [
        "onnx/decoder_model_merged.onnx",
        "onnx/embed_tokens.onnx",
        "onnx/vision_encoder.onnx",
    ];
    assert_eq!(place.names("out", ".onnx"), expected);
    assert_eq!(role(&place, &format!("out/{}", expected[0])), "decoder");
    place.valid();
    let answer = place.answer("out", &[]);
    assert!(answer["cache_lengths"][0].as_u64() > answer["cache_lengths"][7].as_u64());
}

#[test]
fn a_model_in_one_file_has_precisions_too() {
    let place = twice("vlm-ts-sdpa-mha", &["model"]);
    for (set, suffix) in sets(&place, "model").iter().zip(["", "_fp16"]) {
        assert_eq!(set["whole"], format!("onnx/model{suffix}.onnx"), "{set}");
        assert_eq!(set["decoder"], Value::Null, "{set}");
    }
    place.rewritten(&["--variant", "fp16"]);
    assert_eq!(place.names("out", ".onnx"), ["onnx/model_fp16.onnx"]);
    assert_eq!(role(&place, "out/onnx/model_fp16.onnx"), "whole");
    place.valid();
    let set = sets(&place, "out").pop().expect("a set");
    assert_eq!(set["whole"], "onnx/model_fp16.onnx", "{set}");
    let answer = place.answer("out", &[]);
    assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(4));
    assert!(
        answer["visual_tokens"].as_u64() < place.answer("model", &[])["visual_tokens"].as_u64()
    );
}

#[test]
fn files_between_which_names_do_not_decide_are_not_taken_for_a_pair() {
    let place = twice("split-ts-sdpa-gqa", &[]);
    // Three decoders under names of their own.
    let pair = ["decoder_model", "decoder_with_past_model"];
    for (network, own) in pair.iter().zip(["first", "next"]) {
        let from = place.path(&format!("model/onnx/{network}.onnx"));
        std::fs::rename(from, place.path(&format!("model/onnx/{own}.onnx"))).expect("moved");
    }
    // One that starts and one that goes on are a decoder, whatever their names.
    let set = sets(&place, "model").pop().expect("a set");
    assert_eq!(set["prompt_decoder"], "onnx/first.onnx", "{set}");
    assert_eq!(set["decoder"], "onnx/next.onnx", "{set}");
    place.put(&place.path("model/onnx/next.onnx"), "model/onnx/third.onnx");
    let ran = place.rewrite("model", &["--out", &place.at("out")]);
    assert_eq!(ran.code, 2);
    for file in ["first.onnx", "next.onnx", "third.onnx"] {
        assert!(ran.stderr.contains(file), "{}", ran.stderr);
    }
    assert!(ran.stderr.contains("nothing says which"), "{}", ran.stderr);
}
