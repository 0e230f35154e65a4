//! Qwen2.5-VL and Qwen2-VL from pictures and a question to an answer, as `duet run` does it.
//!
//! The expected tokens (`models/qwen_vl/goldens/answers.json`) are those of Transformers' own models, processors and
//! `generate`, on the weights that the fixtures were exported from.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod commands;
mod common;
#[macro_use]
mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use commands::{Place, duet, source};
use common::{node, value};
use duet_onnx::proto::{ModelProto, TensorProto};
use duet_onnx::runtime::{
    GenerateOptions, ImageProcessor, Message, Pixels, Prepared, SessionOptions, VlmFiles,
    VlmPipeline,
};
use prost::Message as _;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use support::packed::contents;

/// Directories and the models that they were exported from.
const FIXTURES: [(&str, &str); 3] = [
    ("ts-sdpa", "qwen2.5-vl"),
    ("dynamo18", "qwen2.5-vl"),
    ("qwen2-vl", "qwen2-vl"),
];
const VISION: &str = "model/onnx/vision_encoder.onnx";

#[derive(Deserialize)]
struct Goldens {
    answers: BTreeMap<String, Vec<Answer>>,
    clips: BTreeMap<String, Clip>,
    recipes: BTreeMap<String, Json>,
    settings: BTreeMap<String, Json>,
    pictures: Vec<Picture>,
}

#[derive(Deserialize)]
struct Answer {
    name: String,
    images: Vec<String>,
    question: String,
    prompt: String,
    grids: Vec<[usize; 3]>,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    halved: Option<Vec<u32>>,
    pruned: Option<Vec<u32>>,
    pruned_lengths: Option<Vec<usize>>,
    both: Option<Vec<u32>>,
    both_lengths: Option<Vec<usize>>,
    further: Option<String>,
    answer: Option<String>,
    further_tokens: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Clip {
    grid: [usize; 3],
    question: String,
    prompt: String,
    prompt_tokens: usize,
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Picture {
    setting: String,
    name: String,
    size: [usize; 2],
    grid: [usize; 3],
}

impl Answer {
    /// Tokens of each picture.
    fn counts(&self) -> impl Iterator<Item = usize> {
        self.grids.iter().map(|[t, h, w]| t * h * w / 4)
    }
}

fn goldens() -> Goldens {
    let text = std::fs::read_to_string(source("models/qwen_vl/goldens/answers.json"));
    serde_json::from_str(&text.expect("answers.json")).expect("answers.json")
}

/// A fixture's directory, packed files unpacked, as `model` of a place with a recipe.
fn place(fixture: &str, recipe: &str) -> Place {
    let place = Place::new(recipe);
    let root = source("models/qwen_vl/fixtures").join(fixture);
    for folder in ["", "onnx"] {
        for entry in std::fs::read_dir(root.join(folder)).expect("a fixture") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy();
            let to = Path::new("model").join(folder).join(name.as_ref());
            let to = to.to_str().expect("UTF-8");
            if path.is_file() {
                place.write(to.strip_suffix(".gz").unwrap_or(to), &contents(&path));
            }
        }
    }
    place
}

fn picture(name: &str) -> String {
    let path = source("models/llava/images").join(format!("{name}.png"));
    path.to_str().expect("UTF-8").to_owned()
}

/// `duet run` on a chat: its JSON document.
#[track_caller]
fn ask(model: &str, answer: &Answer) -> Json {
    commands::runtime();
    let pictures: Vec<String> = answer.images.iter().map(|n| picture(n)).collect();
    let mut all = vec!["run", model, "--prompt", &answer.question, "--json"];
    all.extend(["--max-new-tokens", "16", "--threads", "1"]);
    for picture in &pictures {
        all.extend(["--image", picture]);
    }
    duet(&all).json()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Json) -> Vec<T> {
    serde_json::from_value(value.clone()).expect("numbers")
}

#[test]
fn answers_are_those_of_transformers() {
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let place = place(fixture, "");
        let cases = &goldens.answers[family];
        assert!(cases.len() >= 5, "{family}: chats are recorded");
        for case in cases {
            let what = format!("{fixture}, {}", case.name);
            let found = ask(&place.at("model"), case);
            assert_eq!(found["prompt"], case.prompt, "{what}");
            assert_eq!(found["prompt_tokens"], case.prompt_tokens, "{what}");
            let visual: usize = case.counts().sum();
            assert_eq!(found["visual_tokens"], visual, "{what}");
            assert_eq!(numbers::<u32>(&found["tokens"]), case.tokens, "{what}");
        }
    }
}

fn open(place: &Place) -> VlmPipeline {
    commands::runtime();
    let onnx = |name: &str| place.path(&format!("model/onnx/{name}.onnx"));
    let files = VlmFiles {
        vision_encoder: onnx("vision_encoder"),
        embed_tokens: onnx("embed_tokens"),
        decoder: onnx("decoder_model_merged"),
        configs: place.path("model"),
    };
    let options = SessionOptions {
        intra_threads: 1,
        ..SessionOptions::default()
    };
    VlmPipeline::open(&files, &options).expect("a model")
}

fn options() -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: 16,
        ..GenerateOptions::default()
    }
}

#[test]
fn a_second_question_goes_on_where_the_answer_ended() {
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let mut model = open(&place(fixture, ""));
        let with_turns = goldens.answers[family].iter();
        let case = with_turns
            .clone()
            .find(|c| c.further.is_some())
            .expect("a chat of two turns");
        let images: Vec<Pixels> = case
            .images
            .iter()
            .map(|n| Pixels::open(picture(n)).expect("a picture"))
            .collect();
        let first = Message::user(images.len(), case.question.as_str());
        let prepared = model
            .prepare(std::slice::from_ref(&first), &images)
            .expect("prepared");
        let mut go_on = |_: &_| ControlFlow::Continue(());
        let said = model
            .generate(&prepared, None, &options(), &mut go_on)
            .expect("an answer");
        assert_eq!(said.tokens, case.tokens, "{fixture}");
        assert_eq!(Some(&said.text), case.answer.as_ref(), "{fixture}");
        let messages = [
            first,
            Message::assistant(said.text.as_str()),
            Message::user(0, case.further.as_deref().unwrap_or_default()),
        ];
        let prepared = model
            .prepare_follow_up(&said, &messages, &[])
            .expect("prepared");
        let found = model
            .generate(&prepared, Some(&said.cache), &options(), &mut go_on)
            .expect("an answer");
        assert_eq!(Some(found.tokens), case.further_tokens, "{fixture}");
    }
}

/// Makes the encoder leave out the tokens at odd places and say so.
fn halve(place: &Place) {
    let path = place.path(VISION);
    let mut model =
        ModelProto::decode(std::fs::read(&path).expect("read").as_slice()).expect("ONNX");
    let graph = model.graph.as_mut().expect("a graph");
    let features = "image_features";
    for node in &mut graph.node {
        for output in node.output.iter_mut().filter(|o| *o == features) {
            *output = "all_features".into();
        }
    }
    let scalar = |name: &str, n: i64| TensorProto {
        name: Some(name.into()),
        data_type: Some(common::INT64),
        int64_data: vec![n],
        ..Default::default()
    };
    graph
        .initializer
        .extend([scalar("from", 0), scalar("step", 2)]);
    graph.node.extend([
        node("Shape", &["all_features"], &["all_shape"]),
        node("Gather", &["all_shape", "from"], &["all_count"]),
        node(
            "Range",
            &["from", "all_count", "step"],
            &["kept_token_indices"],
        ),
        node(
            "Gather",
            &["all_features", "kept_token_indices"],
            &[features],
        ),
    ]);
    graph
        .output
        .push(value("kept_token_indices", common::INT64, &[-1]));
    std::fs::write(path, model.encode_to_vec()).expect("written");
}

/// What is left of a picture keeps its places in the grid, and the text behind it does not notice.
#[test]
fn tokens_that_the_encoder_leaves_out_leave_holes() {
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let place = place(fixture, "");
        halve(&place);
        for case in &goldens.answers[family] {
            let what = format!("{fixture}, {}", case.name);
            let found = ask(&place.at("model"), case);
            let visual: usize = case.counts().map(|n| n.div_ceil(2)).sum();
            assert_eq!(found["visual_tokens"], visual, "{what}");
            let expected = case.halved.as_ref().unwrap_or(&case.tokens);
            assert_eq!(numbers::<u32>(&found["tokens"]), *expected, "{what}");
        }
    }
}

/// Rewrites a fixture and asks it: tokens and cache lengths are those that `expected` gives, and without pictures
/// the tokens of the unmodified model.
fn reproduces<'a>(
    fixture: &str,
    cases: &'a [Answer],
    recipe: &Json,
    expected: impl Fn(&'a Answer) -> Option<(&'a Vec<u32>, Vec<usize>)>,
) {
    let place = place(fixture, &recipe.to_string());
    place.rewritten(&[]);
    for case in cases {
        let what = format!("{fixture}, {}, {recipe}", case.name);
        let (tokens, lengths) = match expected(case) {
            Some((tokens, lengths)) => (tokens, Some(lengths)),
            None if case.images.is_empty() => (&case.tokens, None),
            // A choice was too close.
            None => continue,
        };
        let found = ask(&place.at("out"), case);
        assert_eq!(numbers::<u32>(&found["tokens"]), *tokens, "{what}");
        if let Some(lengths) = lengths {
            assert_eq!(numbers::<usize>(&found["cache_lengths"]), lengths, "{what}");
        }
    }
}

#[test]
fn a_pruned_decoder_answers_as_the_reference_does() {
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let recipe = &goldens.recipes["pruned"];
        reproduces(fixture, &goldens.answers[family], recipe, |case| {
            Some((case.pruned.as_ref()?, case.pruned_lengths.clone()?))
        });
    }
}

/// Fewer features than the grid has tokens, each at its place; and all of them, of which the decoder drops the
/// discarded behind its first layer: the same answers.
#[test]
fn a_merged_model_answers_as_the_reference_does() {
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let cases = &goldens.answers[family];
        for placement in ["encoder", "decoder"] {
            let mut recipe = goldens.recipes["both"].clone();
            recipe["passes"][0]["token_merge"]["placement"] = json!(placement);
            reproduces(fixture, cases, &recipe, |case| {
                let mut lengths = case.both_lengths.clone()?;
                if placement == "decoder" {
                    lengths[0] = case.prompt_tokens;
                }
                Some((case.both.as_ref()?, lengths))
            });
        }
    }
}

/// The formula of `drawn` in `models/qwen_vl/answers.py`.
fn drawn([width, height]: [usize; 2]) -> Pixels {
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            for c in 0..3 {
                let value = 3 * x * x + 7 * (c + 1) * y + 5 * (x * y % 31);
                let square = 90 * ((x / 8 + y / 8 + c) % 2);
                rgb.push(((value + square) % 256) as u8);
            }
        }
    }
    Pixels::new(width, height, rgb).expect("a picture")
}

#[test]
fn patches_are_those_of_transformers() {
    let goldens = goldens();
    let bytes = std::fs::read(source("models/qwen_vl/goldens/patches.safetensors")).expect("read");
    let stored = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    assert!(goldens.pictures.len() >= 14);
    let (mut all, mut apart, mut worst) = (0usize, 0usize, 0u8);
    for picture in &goldens.pictures {
        let Picture {
            setting,
            name,
            size,
            grid,
        } = picture;
        let what = format!("{setting}, {name}");
        let image = match name.as_str() {
            "street" | "shapes" => Pixels::open(self::picture(name)).expect("a picture"),
            _ => drawn(*size),
        };
        assert_eq!([image.width(), image.height()], *size, "{what}");
        let read = |more: Json| {
            let mut config = goldens.settings[setting].clone();
            let object = config.as_object_mut().expect("an object");
            object.extend(more.as_object().expect("an object").clone());
            let made = ImageProcessor::from_json(&config, Path::new("config.json"));
            let made = made
                .expect("a processor")
                .patches(std::slice::from_ref(&image));
            made.expect("patches")
        };
        // Bytes, before rescaling and normalising.
        let plain = read(json!({"do_rescale": false, "do_normalize": false}));
        assert_eq!(plain.grid, *grid, "{what}");
        let golden = stored.tensor(&format!("{setting}.{name}")).expect("stored");
        let [patches, 3, square] = *golden.shape() else {
            panic!("{what}: {:?}", golden.shape());
        };
        assert_eq!(plain.values.dim(), (patches, 3 * 2 * square), "{what}");
        let rescaled = read(json!({}));
        let mean = [0.481_454_66, 0.457_827_5, 0.408_210_73f32];
        let std = [0.268_629_54, 0.261_302_6, 0.275_777_1f32];
        for (at, expected) in golden.data().iter().enumerate() {
            let (patch, channel, pixel) = (at / square / 3, at / square % 3, at % square);
            for moment in 0..2 {
                let place = [patch, (channel * 2 + moment) * square + pixel];
                let byte = plain.values[place];
                let difference = (byte as u8).abs_diff(*expected);
                all += 1;
                apart += usize::from(difference > 0);
                worst = worst.max(difference);
                let normal = (byte / 255.0 - mean[channel]) / std[channel];
                assert!((rescaled.values[place] - normal).abs() < 1e-5, "{what}");
            }
        }
    }
    println!(
        "{} pictures: {apart} of {all} bytes differ, by {worst} at most",
        goldens.pictures.len()
    );
    // As fast_image_resize is to Pillow, see image/pixels.rs.
    assert!(
        worst <= 2 && apart * 100 < all,
        "{apart} of {all} by {worst}"
    );
}

#[track_caller]
fn refused(place: &Place, rest: &[&str]) -> String {
    commands::runtime();
    let model = place.at("model");
    let ran = duet(&[&["run", &model, "--prompt", "What is it?"], rest].concat());
    assert_eq!(ran.code, 2, "{}{}", ran.stdout, ran.stderr);
    ran.stderr
}

#[test]
fn what_does_not_fit_is_said() {
    let place = place("ts-sdpa", "");
    let street = picture("street");
    // A sliver.
    let sliver = place.path("sliver.png");
    image::RgbImage::new(402, 2).save(&sliver).expect("saved");
    let error = refused(&place, &["--image", sliver.to_str().expect("UTF-8")]);
    assert!(
        error.contains("402×2") && error.contains("200 times"),
        "{error}"
    );
    // Another model's image processor.
    let config = place.path("model/preprocessor_config.json");
    let own = std::fs::read_to_string(&config).expect("read");
    place.write(
        "model/preprocessor_config.json",
        br#"{"image_processor_type": "CLIPImageProcessor"}"#,
    );
    let error = refused(&place, &["--image", &street]);
    assert!(error.contains("Qwen2VLImageProcessor"), "{error}");
    // None at all.
    std::fs::remove_file(&config).expect("removed");
    let error = refused(&place, &["--image", &street]);
    assert!(error.contains("preprocessor_config.json"), "{error}");
    // Another edge of tokens than the encoder's: it says what it gives, and what was expected.
    place.write(
        "model/preprocessor_config.json",
        own.replace("\"merge_size\": 2", "\"merge_size\": 1")
            .as_bytes(),
    );
    let error = refused(&place, &["--image", &street]);
    assert!(error.contains("kept_token_indices"), "{error}");
}

/// An encoder of whole images tells no grid; what the decoder needs is asked for.
#[test]
fn a_decoder_with_three_positions_asks_for_the_grid() {
    let place = place("ts-sdpa", "");
    place.put(&commands::part("ts-sdpa-gqa", "vision_encoder"), VISION);
    let from = source("models/llava/fixtures/ts-sdpa-gqa/preprocessor_config.json");
    place.put(&from, "model/preprocessor_config.json");
    let error = refused(&place, &["--image", &picture("street")]);
    assert!(
        error.contains("M-RoPE") && error.contains("image_grid_thw"),
        "{error}"
    );
    // Without an image there is nothing to ask for.
    let goldens = goldens();
    let text = goldens.answers["qwen2.5-vl"]
        .iter()
        .find(|a| a.images.is_empty());
    let text = text.expect("a chat without pictures");
    let found = ask(&place.at("model"), text);
    assert_eq!(numbers::<u32>(&found["tokens"]), text.tokens);
}

/// ONNX Runtime GenAI's layout of the same model.
#[test]
fn a_genai_directory_is_run() {
    let from = place("ts-sdpa", "");
    let place = Place::new("");
    for (name, bytes) in from.files("model") {
        let to = match name.as_str() {
            "onnx/vision_encoder.onnx" => "qwen2_5_vl-vision.onnx",
            "onnx/embed_tokens.onnx" => "qwen2_5_vl-embedding.onnx",
            "onnx/decoder_model_merged.onnx" => "model.onnx",
            other => other,
        };
        place.write(&format!("model/{to}"), &bytes);
    }
    let config = json!({
        "model": {
            "type": "qwen2_5_vl",
            "image_token_id": 4,
            "video_token_id": 397,
            "vision_start_token_id": 398,
            "decoder": {
                "filename": "model.onnx",
                "head_size": 8, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 5,
                "num_key_value_heads": 2,
                "inputs": {"inputs_embeds": "inputs_embeds", "attention_mask": "attention_mask",
                           "position_ids": "position_ids"},
                "outputs": {"logits": "logits"},
            },
            "embedding": {"filename": "qwen2_5_vl-embedding.onnx",
                          "inputs": {"input_ids": "input_ids"}, "outputs": {"inputs_embeds": "inputs_embeds"}},
            "vision": {"filename": "qwen2_5_vl-vision.onnx", "config_filename": "processor_config.json",
                       "spatial_merge_size": 2, "tokens_per_second": 4.0, "patch_size": 4,
                       "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
                       "outputs": {"image_features": "image_features"}},
        },
        "search": {"max_length": 4096},
    });
    place.write("model/genai_config.json", config.to_string().as_bytes());
    let goldens = goldens();
    for case in &goldens.answers["qwen2.5-vl"] {
        let found = ask(&place.at("model"), case);
        assert_eq!(
            numbers::<u32>(&found["tokens"]),
            case.tokens,
            "{}",
            case.name
        );
    }
    // GenAI's own description of the image processor is another thing than Transformers'.
    std::fs::remove_file(place.path("model/preprocessor_config.json")).expect("removed");
    let own = json!({"processor": {"name": "qwen2_5_image_processor", "transforms": []}});
    place.write("model/processor_config.json", own.to_string().as_bytes());
    let error = refused(&place, &["--image", &picture("street")]);
    assert!(error.contains("preprocessor_config.json"), "{error}");
}

/// Two frames of each second of a GIF, whose rows of patches have the times that they were taken at.
#[test]
fn clips_are_seen_as_transformers_sees_them() {
    commands::runtime();
    let clip = source("models/video_llava/images/ball.gif");
    let clip = clip.to_str().expect("UTF-8");
    let goldens = goldens();
    for (fixture, family) in FIXTURES {
        let place = place(fixture, "");
        let golden = &goldens.clips[family];
        let model = place.at("model");
        let mut all = vec!["run", &model, "--prompt", &golden.question, "--video", clip];
        all.extend(["--json", "--max-new-tokens", "16", "--threads", "1"]);
        let found = duet(&all).json();
        assert_eq!(found["prompt"], golden.prompt, "{fixture}");
        assert_eq!(found["prompt_tokens"], golden.prompt_tokens, "{fixture}");
        let visual: usize = golden.grid.iter().product();
        assert_eq!(found["visual_tokens"], visual / 4, "{fixture}");
        let tokens = numbers::<u32>(&found["tokens"]);
        assert_eq!(tokens, golden.tokens, "{fixture}");
    }
}

/// What the pipeline tells of the places of tokens, for clients in Rust.
#[test]
fn prepared_prompts_tell_how_tokens_lie() {
    let mut model = open(&place("ts-sdpa", ""));
    let images = ["street", "shapes"].map(|n| Pixels::open(picture(n)).expect("a picture"));
    let messages = [Message::user(2, "Compare.")];
    let Prepared { blocks, visual, .. } = model.prepare(&messages, &images).expect("prepared");
    let blocks = blocks.expect("grids are known");
    let sizes: Vec<_> = blocks
        .iter()
        .map(|b| (b.grid.time, b.grid.height, b.grid.width))
        .collect();
    assert_eq!(sizes, [(1, 5, 7), (1, 7, 5)]);
    assert!(blocks.iter().all(|b| b.kept.is_none()));
    assert_eq!(visual.iter().filter(|v| **v).count(), 70);
    let none = model.prepare(&[Message::user(0, "Compare.")], &[]);
    assert_eq!(none.expect("prepared").blocks, Some(Vec::new()));
}
