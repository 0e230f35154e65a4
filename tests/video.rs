//! Video-LLaVA: an image tower and a video tower in one directory, clips merged frame by frame, one set of
//! visual tokens in the decoder.
//!
//! The goldens (`models/video_llava/goldens`) were recorded by an independent PyTorch implementation, which
//! without a pass is Transformers' `VideoLlavaForConditionalGeneration`.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod commands;
#[macro_use]
mod support;

use std::collections::HashMap;
use std::path::PathBuf;

use duet_onnx::arch::{Kind, Role, Vlm};
use duet_onnx::onnx::read;
use duet_onnx::runtime::{Embedder, StepInput, Tensor, Value, VisionEncoder, scatter};
use duet_onnx::validate::scenario::Seeded;
use ndarray::Array2;
use serde_json::Value as Json;

use support::goldens::{integers, tensors};
use support::models::{
    ANCHORS, DOMINANT, difference, index_rows, kept, numbers, open, open_decoder, parts_at, probed,
    recipe_text, rewritten, root,
};
use support::packed::contents;

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values.
const LIMIT: f64 = 1e-4;

fn folder() -> PathBuf {
    root().join("models/video_llava/fixtures/ts-sdpa")
}

/// The TorchScript export: the frames of clips come out as images of their own, `[clips·frames, N, D]`.
fn fixture() -> Vlm {
    parts_at(&folder())
}

/// The same with the video encoder of the dynamo exporter, whose frames come out in one list,
/// `[clips, frames·N, D]`: a product of the number of frames and of the tokens of one, which is baked in.
fn joined() -> Vlm {
    with_video_encoder("joined")
}

/// A packed file of the fixtures.
fn unpacked(name: &str) -> Vec<u8> {
    contents(&root().join("models/video_llava/fixtures").join(name))
}

/// The fixture with another encoder of clips.
fn with_video_encoder(name: &str) -> Vlm {
    let mut vlm = fixture();
    let place = tempfile::tempdir().expect("a folder");
    let file = place.path().join("video_encoder.onnx");
    let bytes = unpacked(&format!("{name}/video_encoder.onnx.gz"));
    std::fs::write(&file, bytes).expect("written");
    let model = read(&file).expect("a model");
    let at = vlm.set("").video.expect("a video encoder");
    vlm.parts[at].role = Role::of(&model);
    vlm.parts[at].model = model;
    vlm
}

/// A directory in which both towers are one file, with two inputs and two outputs.
fn together() -> commands::Place {
    let place = commands::Place::new(commands::CLIPS);
    place.copy(&folder(), "model");
    std::fs::remove_file(place.path("model/onnx/video_encoder.onnx")).expect("removed");
    let encoder = unpacked("together/vision_encoder.onnx.gz");
    place.write("model/onnx/vision_encoder.onnx", &encoder);
    place
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
fn frames_as_images_reproduce_pytorch() {
    reproduces_pytorch(&fixture());
}

#[test]
fn frames_in_one_list_reproduce_pytorch() {
    let vlm = joined();
    let (at, _) = vlm.towers().find(|(_, t)| t.video).expect("a video tower");
    let output = vlm.parts[at].model.graph().outputs[0];
    let stated = vlm.parts[at].model.value(output).ty.as_ref();
    let dims = stated.and_then(|t| t.shape()).expect("a shape");
    assert!(dims[1].to_string().contains("82*"), "{:?}", dims[1]);
    reproduces_pytorch(&vlm);
}

fn reproduces_pytorch(base: &Vlm) {
    let folder = root().join("models/video_llava/goldens");
    let text = std::fs::read_to_string(folder.join("cases.json")).expect("cases.json");
    let goldens: Json = serde_json::from_str(&text).expect("cases.json");
    let cases = goldens["cases"].as_array().expect("cases");
    assert!(cases.len() >= 10);
    let (mut worst_features, mut worst_logits, mut sets) = (0f64, 0f64, 0);
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let stored = tensors(&folder.join(format!("{name}.safetensors")));
        let vlm = rewritten(base, &case["recipe"].to_string());
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
    let kinds: Vec<Kind> = again
        .parts
        .iter()
        .map(duet_onnx::arch::Part::kind)
        .collect();
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
        assert!(
            apart < 1e-5,
            "{clips} clips of {frames} frames: {apart:.1e}"
        );
    }
}

#[test]
fn two_towers_in_one_file_reproduce_pytorch() {
    let place = together();
    reproduces_pytorch(&parts_at(&place.path("model")));
}

/// Taken apart, changed and put together again: one file with both inputs and both outputs, where each output is
/// what the tower gives alone, the weights of the projector that both share are there once, and a file that
/// nothing changed is the file that was read.
#[test]
fn two_towers_in_one_file_stay_one_file() {
    let place = together();
    let vlm = parts_at(&place.path("model"));
    let lanes: Vec<&str> = vlm
        .parts
        .iter()
        .filter(|p| p.source.is_tower())
        .filter_map(|p| p.source.branch.as_deref())
        .collect();
    assert_eq!(lanes, ["pixel_values_images", "pixel_values_videos"]);
    assert_eq!(vlm.ambiguous(), None);
    let file = |vlm: &Vlm| {
        let files = vlm.files().expect("files");
        let named = |f: &duet_onnx::arch::FileModel| f.file.ends_with("vision_encoder.onnx");
        let found = files.into_iter().find(named).expect("the encoder");
        duet_onnx::onnx::serialize(duet_onnx::ir::verify(&found.model).expect("valid")).to_vec()
    };
    assert!(
        file(&vlm) == unpacked("together/vision_encoder.onnx.gz"),
        "the bytes that were read"
    );

    let merge = ("token_merge", "{dominant: 12, contextual: 3}");
    let prune = ("visual_prune", "{drops: [{after_layer: 4, keep: 0.5}]}");
    let new = rewritten(&vlm, &recipe_text(&[merge, prune], ""));
    let bytes = file(&new);
    assert!(bytes == file(&new), "the same each time");
    let path = place.path("new.onnx");
    std::fs::write(&path, &bytes).expect("written");
    let model = read(&path).expect("a model");
    let names = |values: &[duet_onnx::ir::ValueId]| -> Vec<String> {
        values.iter().map(|v| model.name(*v).to_owned()).collect()
    };
    let graph = model.graph();
    assert_eq!(
        (names(&graph.inputs), names(&graph.outputs)),
        (
            vec!["pixel_values_images".into(), "pixel_values_videos".into()],
            vec!["image_features".into(), "video_features".into()]
        )
    );
    let weights = |vlm: &Vlm| {
        let files = vlm.files().expect("files");
        let first = files
            .into_iter()
            .find(|f| f.file.ends_with("vision_encoder.onnx"));
        let model = first.expect("the encoder").model;
        let shared = |v: &&duet_onnx::ir::ValueId| !model.name(**v).starts_with("duet/");
        model.graph().initializers.iter().filter(shared).count()
    };
    assert_eq!(weights(&new), weights(&vlm));
    // Two merges and two marker channels, the second lane's in a scope of their own.
    let scored = |scope: &str| {
        model
            .find(&format!("duet/token_merge/{scope}score"))
            .is_some()
    };
    assert!(scored("") && scored("pixel_values_videos/"));

    let mut session = open(&model, &path);
    let given =
        [pixels("image", 126), pixels("video", 126)].map(|p| Value::new(p).expect("pixels"));
    let outputs = session
        .run(&[
            ("pixel_values_images", &given[0]),
            ("pixel_values_videos", &given[1]),
        ])
        .expect("a run");
    for (kind, name) in [("image", "image_features"), ("video", "video_features")] {
        let (alone, _) = encode(&new, kind);
        let both = numbers(outputs.get(name).expect("features"));
        let apart = difference(&alone.f32s().expect("numbers"), &both);
        assert!(apart < 1e-6, "{kind}: {apart:.1e}");
    }
    // Read again, it is two towers that were rewritten.
    let again = Vlm::new(vec![("vision_encoder.onnx".into(), String::new(), model)]);
    let kinds: Vec<Kind> = again
        .parts
        .iter()
        .map(duet_onnx::arch::Part::kind)
        .collect();
    assert_eq!(kinds, [Kind::Vision, Kind::Video]);
    assert!(
        again
            .parts
            .iter()
            .all(|p| p.model.find("duet/token_merge/score").is_some())
    );
}

/// Rewritten, asked and validated on the command line; the file runs as it is, the tower that is not asked on zeros.
#[test]
fn two_towers_in_one_file_are_asked_and_validated() {
    let place = together();
    let golden = root().join("models/video_llava/goldens/clip.json");
    let golden: Json =
        serde_json::from_str(&std::fs::read_to_string(golden).expect("clip.json")).expect("JSON");
    let prompt = golden["prompt"].as_str().expect("a prompt");
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
    let clip = text(commands::source("models/video_llava/images/ball.gif"));
    let picture = text(commands::source("models/llava/images/street.png"));
    let (clip, picture) = (["--video", &clip], ["--image", &picture]);
    let (base, apart) = (place.at("model"), text(folder()));
    let answer = commands::ask(&base, prompt, &clip);
    assert_eq!(answer["tokens"], golden["tokens"]);
    assert_eq!(
        commands::ask(&base, prompt, &picture)["tokens"],
        commands::ask(&apart, prompt, &picture)["tokens"]
    );

    place.rewritten(&[]);
    let (file, other) = (place.at("recipe.yaml"), place.at("apart"));
    let rewrite = commands::duet(&["rewrite", &apart, "--recipe", &file, "--out", &other]);
    assert_eq!(rewrite.code, 0, "{}", rewrite.stderr);
    let both = [clip, picture].concat();
    let one = commands::ask(&place.at("out"), prompt, &both);
    let two = commands::ask(&other, prompt, &both);
    assert_eq!(one["visual_tokens"], 24 * 9);
    assert_eq!(
        (&one["tokens"], &one["cache_lengths"]),
        (&two["tokens"], &two["cache_lengths"])
    );
    let checks = place.valid();
    assert!(
        checks.iter().any(|c| c == "clips: two images"),
        "{checks:?}"
    );
    let shown = commands::duet(&["inspect", &base]);
    assert!(
        shown.stdout.contains("of a file of two towers"),
        "{}",
        shown.stdout
    );
}

/// LanguageBind's own tower: frames attend to each other in every block before tokens do. The attention that scores
/// is the one over a frame's tokens.
#[test]
fn a_tower_whose_frames_see_each_other_is_scored_by_the_attention_within_a_frame() {
    let base = with_video_encoder("temporal");
    let (_, tower) = base.towers().find(|(_, t)| t.video).expect("a video tower");
    // Four live blocks of two attentions each.
    assert_eq!(
        (tower.layers, tower.patches(), tower.cls, tower.frames),
        (8, Some(81), true, Some(8))
    );
    let folder = root().join("models/video_llava/goldens");
    let text = std::fs::read_to_string(folder.join("temporal.json")).expect("temporal.json");
    let goldens: Json = serde_json::from_str(&text).expect("temporal.json");
    let stored = tensors(&folder.join("temporal.safetensors"));
    let cases = goldens["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 2);
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let vlm = rewritten(&base, &case["recipe"].to_string());
        let (found, chosen) = encode(&vlm, "video");
        let merged = case["merged"].as_array().expect("frames");
        assert_eq!(merged.len(), 8);
        for (frame, merged) in merged.iter().enumerate() {
            for (set, field) in [(DOMINANT, "dominant"), (ANCHORS, "anchors")] {
                assert_eq!(
                    list(&merged[field]),
                    chosen[set][frame],
                    "{name}: {field} of frame {frame}"
                );
            }
        }
        let want = &stored[name];
        let found = unmarked(&found, want.shape()[2]);
        let apart = difference(&want.f32s().expect("numbers"), &found);
        assert!(apart <= LIMIT, "{name}: {apart:.1e}");
    }
}
