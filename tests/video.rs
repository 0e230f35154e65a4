//! Video-LLaVA: an image tower and a video tower in one directory, clips merged frame by frame, one set of
//! visual tokens in the decoder.
//!
//! The goldens (`models/video_llava/goldens`) were recorded by an independent PyTorch implementation, which
//! without a pass is Transformers' `VideoLlavaForConditionalGeneration`.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

#[macro_use]
mod support;

use std::collections::HashMap;

use duet_onnx::arch::{Kind, Vlm};
use duet_onnx::runtime::{Embedder, StepInput, Tensor, Value, VisionEncoder, scatter};
use duet_onnx::validate::scenario::Seeded;
use ndarray::Array2;
use serde_json::Value as Json;

use support::goldens::{integers, tensors};
use support::models::{
    ANCHORS, DOMINANT, difference, index_rows, kept, numbers, open, open_decoder, probed,
    recipe_text, recognised, rewritten, root,
};

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values.
const LIMIT: f64 = 1e-4;

fn fixture() -> Vlm {
    recognised(&root().join("models/video_llava/fixtures/ts-sdpa"))
}

/// The pixels that the goldens were recorded with: the upper byte of SplitMix64, divided by 64, less 2.
fn pixels(kind: &str, edge: usize) -> Tensor {
    let (seed, mut shape) = match kind {
        "image" => (1, vec![1, 3]),
        _ => (2, vec![1, 8, 3]),
    };
    shape.extend([edge, edge]);
    let mut numbers = Seeded::new(seed);
    let count = shape.iter().product();
    let data: Vec<f32> = (0..count)
        .map(|_| (numbers.bits() >> 56) as f32 / 64.0 - 2.0)
        .collect();
    Tensor::new(shape, data).expect("pixels")
}

/// Runs the tower of a kind: features in one list, and what it selected in each image or frame.
fn encode(vlm: &Vlm, kind: &str) -> (Tensor, HashMap<&'static str, Vec<Vec<usize>>>) {
    let clips = kind == "video";
    let (at, _) = vlm
        .towers()
        .find(|(_, t)| t.video == clips)
        .expect("a tower of this kind");
    let part = &vlm.parts[at];
    let inside = [DOMINANT.to_owned(), ANCHORS.to_owned()];
    let session = open(&probed(&part.model, &inside), &part.file);
    let mut encoder = VisionEncoder::new(session).expect("an encoder");
    let (mut features, outputs) = encoder
        .run_with_outputs(pixels(kind, 126), None)
        .expect("a run");
    assert_eq!(features.len(), 1, "one image or clip");
    let mut chosen = HashMap::new();
    for name in [DOMINANT, ANCHORS] {
        if let Ok(value) = outputs.get(name) {
            chosen.insert(name, index_rows(&value.to_tensor().expect("indices")));
        }
    }
    (features.remove(0), chosen)
}

/// The features without the marker channel, which has to be 1.
fn unmarked(features: &Tensor, width: usize) -> Vec<f32> {
    let found = features.shape()[1];
    assert!(found == width || found == width + 1, "width {found}");
    let all = features.f32s().expect("numbers");
    let rows = all.chunks_exact(found);
    rows.flat_map(|row| {
        assert!(row[width..].iter().all(|m| m.to_bits() == 1f32.to_bits()));
        row[..width].to_vec()
    })
    .collect()
}

fn list(json: &Json) -> Vec<usize> {
    serde_json::from_value(json.clone()).expect("a list of indices")
}

#[test]
fn reproduces_pytorch() {
    let base = fixture();
    let folder = root().join("models/video_llava/goldens");
    let text = std::fs::read_to_string(folder.join("cases.json")).expect("cases.json");
    let goldens: Json = serde_json::from_str(&text).expect("cases.json");
    let cases = goldens["cases"].as_array().expect("cases");
    assert!(cases.len() >= 10);
    let (mut worst_features, mut worst_logits, mut sets) = (0f64, 0f64, 0);
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let stored = tensors(&folder.join(format!("{name}.safetensors")));
        let vlm = rewritten(&base, &case["recipe"].to_string());
        let mut features = Vec::new();
        for kind in case["contents"].as_array().expect("contents") {
            let kind = kind.as_str().expect("a kind");
            let (found, chosen) = encode(&vlm, kind);
            let want = &stored[&format!("{kind}_features")];
            let width = want.shape()[2];
            let apart = difference(&want.f32s().expect("numbers"), &unmarked(&found, width));
            worst_features = worst_features.max(apart);
            for (frame, merged) in case["merged"][kind]
                .as_array()
                .expect("merges")
                .iter()
                .enumerate()
            {
                for (set, field) in [(DOMINANT, "dominant"), (ANCHORS, "anchors")] {
                    let want = list(&merged[field]);
                    let found = chosen.get(set).map_or(vec![], |all| all[frame].clone());
                    assert_eq!(want, found, "{name}: {field} of {kind} {frame}");
                    sets += 1;
                }
            }
            features.push(found);
        }
        let ids = integers(&stored["input_ids"]);
        let token = |key: &str| goldens[key].as_i64().expect("a token");
        let tokens = [token("image_token_id"), token("video_token_id")];
        let visual: Vec<bool> = ids.iter().map(|id| tokens.contains(id)).collect();
        let (at, _) = vlm.embeddings().next().expect("an embedding");
        let part = &vlm.parts[at];
        let mut embedder = Embedder::new(open(&part.model, &part.file)).expect("an embedding");
        let embeds = embedder.run(ids.clone()).expect("embeddings");
        let embeds = embeds.to_tensor().expect("embeddings");
        let embeds = scatter(embeds, &visual, &features).expect("as many places as features");
        let mut decoder = open_decoder(&vlm);
        let mut input = StepInput::new(Value::new(embeds).expect("embeddings"));
        input.visual =
            Some(Array2::from_shape_vec(ids.dim(), visual).expect("as many as there are ids"));
        let mut output = decoder.prefill(&input).expect("a run");
        let drops = case["drops"].as_array().expect("drops");
        let want: Vec<Vec<Vec<usize>>> = drops.iter().map(|d| vec![list(&d["kept"][0])]).collect();
        assert_eq!(want, kept(&output), "{name}: kept");
        sets += want.len();
        assert_eq!(
            list(&case["cache_lengths"]),
            output.cache.lengths(),
            "{name}"
        );
        let mut wanted = vec!["logits".to_owned()];
        wanted.extend((0..2).map(|step| format!("step{step}.logits")));
        for (step, key) in wanted.iter().enumerate() {
            let found: Vec<f32> = output.last_logits().expect("logits").into_iter().collect();
            let apart = difference(&stored[key].f32s().expect("logits"), &found);
            worst_logits = worst_logits.max(apart);
            let Some(next) = case["decode"][step].as_i64() else {
                break;
            };
            let next = Array2::from_elem((1, 1), next);
            let embeds = embedder.run(next).expect("embeddings");
            let cache = output.cache;
            output = decoder
                .step(&StepInput::new(embeds), &cache)
                .expect("a step");
        }
        assert!(
            worst_features <= LIMIT && worst_logits <= LIMIT,
            "{name}: features {worst_features:.1e}, logits {worst_logits:.1e}"
        );
    }
    println!(
        "{} cases, {sets} index sets; features within {worst_features:.1e}, logits within {worst_logits:.1e}",
        cases.len()
    );
    assert!(sets > 100, "{sets} index sets were compared");
}

#[test]
fn two_towers_are_one_model() {
    let vlm = fixture();
    assert_eq!(vlm.ambiguous(), None);
    let set = vlm.set("");
    let kind = |index: Option<usize>| vlm.parts[index.expect("a file")].kind();
    assert_eq!(kind(set.vision), Kind::Vision);
    assert_eq!(kind(set.video), Kind::Video);
    let towers: Vec<_> = vlm.towers().map(|(_, t)| t).collect();
    let [image, clip] = towers[..] else {
        panic!("expected two towers, found {}", towers.len());
    };
    // The class drops CLS of images and keeps that of frames.
    assert_eq!(
        (
            image.video,
            image.patches(),
            image.cls,
            image.features_per_image()
        ),
        (false, Some(81), true, Some(81))
    );
    assert_eq!(
        (
            clip.video,
            clip.patches(),
            clip.cls,
            clip.features_per_image()
        ),
        (true, Some(81), true, Some(82))
    );
    assert_eq!(clip.frames, None);
    // Written files are told by their stamp and their interface.
    let text = recipe_text(&[("token_merge", "{dominant: 9, contextual: 2}")], "");
    let again = rewritten(&vlm, &text);
    let kinds: Vec<Kind> = again.parts.iter().map(duet_onnx::arch::Part::kind).collect();
    assert!(kinds.contains(&Kind::Video) && kinds.contains(&Kind::Vision));
    assert_eq!(again.ambiguous(), None);
}

#[test]
fn a_second_video_tower_is_ambiguous() {
    let mut vlm = fixture();
    let at = vlm.set("").video.expect("a video encoder");
    let mut other = vlm.parts[at].clone();
    other.file = "onnx/another.onnx".into();
    vlm.parts.push(other);
    assert_eq!(vlm.ambiguous(), Some((Kind::Video, vec![at, 4])));
}

/// Any number of clips of any number of frames: each frame is merged as if it were alone.
#[test]
fn frames_do_not_see_each_other() {
    let text = recipe_text(&[("token_merge", "{dominant: 12, contextual: 3}")], "");
    let vlm = rewritten(&fixture(), &text);
    let (at, _) = vlm.towers().find(|(_, t)| t.video).expect("a video tower");
    let part = &vlm.parts[at];
    let mut encoder = VisionEncoder::new(open(&part.model, &part.file)).expect("an encoder");
    let all = pixels("video", 126).f32s().expect("pixels").into_owned();
    let clip = |clips: usize, frames: usize| {
        Tensor::new(vec![clips, frames, 3, 126, 126], all.clone()).expect("pixels")
    };
    let mut rows = |clips, frames| {
        let features = encoder.run(clip(clips, frames)).expect("a run");
        assert_eq!(features.len(), clips);
        assert!(features.iter().all(|f| f.shape()[0] == frames * 15));
        let each = features
            .into_iter()
            .flat_map(|f| numbers(&Value::new(f).expect("features")));
        each.collect::<Vec<f32>>()
    };
    let one = rows(1, 8);
    for (clips, frames) in [(2, 4), (8, 1)] {
        let apart = difference(&one, &rows(clips, frames));
        assert!(apart < 1e-5, "{clips} clips of {frames} frames: {apart:.1e}");
    }
}
