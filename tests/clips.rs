//! Clips that are asked about: `duet run --video`, and further turns with clips of their own. (What a clip's frames
//! become: `video.rs`.)

mod commands;
#[macro_use]
mod support;

use std::path::PathBuf;

use duet_onnx::runtime::{
    Clip, ClipEncoder, GenerateOptions, Message, Token, Value, VlmFiles, VlmPipeline, scatter,
    video,
};
use serde_json::Value as Json;

use support::models::root;

fn folder() -> PathBuf {
    root().join("models/video_llava/fixtures/ts-sdpa")
}

/// `duet run --video` on the clip that ships: frames, placeholders, both towers, and the answer that PyTorch gives.
#[test]
fn a_clip_is_asked_about() {
    let path = root().join("models/video_llava/goldens/clip.json");
    let golden: Json =
        serde_json::from_str(&std::fs::read_to_string(path).expect("clip.json")).expect("JSON");
    let text = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
    let clip = text(commands::source("models/video_llava/images/ball.gif"));
    let picture = text(commands::source("models/llava/images/street.png"));
    let ask = |model: &str, more: &[&str]| {
        let prompt = golden["prompt"].as_str().expect("a prompt");
        commands::ask(model, prompt, &[&["--video", &clip], more].concat())
    };
    let base = text(folder());
    let answer = ask(&base, &[]);
    assert_eq!(answer["tokens"], golden["tokens"]);
    assert_eq!(answer["visual_tokens"], golden["visual_tokens"]);

    let place = commands::Place::new(commands::CLIPS);
    place.copy(&folder(), "model");
    let rewrite = place.rewritten(&[]);
    let shown = format!("{}{}", rewrite.stdout, rewrite.stderr);
    assert!(
        shown.contains("a clip of 8 frames by layer: 1–4: 192, 5–6: 96, 7–8: 0"),
        "{shown}"
    );
    let answer = ask(&place.at("out"), &["--image", &picture]);
    // 24 tokens of the image, 24 of each of 8 frames.
    assert_eq!(answer["visual_tokens"], 24 * 9);
    let lengths: Vec<i64> =
        serde_json::from_value(answer["cache_lengths"].clone()).expect("a list");
    let words = lengths[0] - 24 * 9;
    let want = [words + 216, words + 108, words];
    assert_eq!([lengths[0], lengths[4], lengths[6]], want);
    let config = std::fs::read_to_string(place.path("out/config.json")).expect("a config");
    let config: Json = serde_json::from_str(&config).expect("JSON");
    assert_eq!(
        (&config["image_seq_length"], &config["video_seq_length"]),
        (&Json::from(24), &Json::from(192))
    );

    let checks = place.valid();
    assert!(
        checks.iter().any(|c| c == "clips: two images"),
        "{checks:?}"
    );

    let plain = text(commands::source("models/llava/fixtures/ts-sdpa-mha"));
    let refused = commands::duet(&["run", &plain, "--video", &clip, "--prompt", "What?"]);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(
        refused.stderr.contains("sees no clips"),
        "{}",
        refused.stderr
    );
}

/// Another question, about another clip, on the cache of an answer: what a prompt of both turns gives from nothing.
#[test]
fn a_second_clip_goes_on_from_the_cache() {
    commands::runtime();
    let options = duet_onnx::runtime::SessionOptions {
        intra_threads: 1,
        ..Default::default()
    };
    let onnx = |name: &str| folder().join(format!("onnx/{name}.onnx"));
    let files = VlmFiles {
        vision_encoder: onnx("vision_encoder"),
        embed_tokens: onnx("embed_tokens"),
        decoder: onnx("decoder_model_merged"),
        configs: folder(),
    };
    let clips = ClipEncoder::open(&onnx("video_encoder"), &folder(), &options).expect("clips");
    let mut vlm = VlmPipeline::open(&files, &options)
        .expect("a model")
        .with_clips(clips);
    let ball = commands::source("models/video_llava/images/ball.gif");
    let frames = video::sample(&ball, 8).expect("frames");
    let backward = Clip::from(frames.iter().rev().cloned().collect::<Vec<_>>());
    let forward = Clip::from(frames);
    let generate = GenerateOptions {
        max_new_tokens: 5,
        ..Default::default()
    };
    let mut go_on = |_: &Token| std::ops::ControlFlow::Continue(());
    let first = [Message::user_with(0, 1, "What is it?")];
    let prepared = vlm
        .prepare_with_clips(&first, &[], std::slice::from_ref(&forward))
        .expect("a prompt");
    let answer = vlm
        .generate(&prepared, None, &generate, &mut go_on)
        .expect("an answer");
    let messages = [
        first[0].clone(),
        Message::assistant(answer.text.trim()),
        Message::user_with(0, 1, "And this one?"),
    ];
    let given = std::slice::from_ref(&backward);
    let turn = vlm
        .prepare_follow_up_with_clips(&answer, &messages, &[], given)
        .expect("another turn");
    assert_eq!(turn.visual.iter().filter(|v| **v).count(), 8 * 82);
    let second = vlm
        .generate(&turn, Some(&answer.cache), &generate, &mut go_on)
        .expect("an answer");

    let mut whole = turn.clone();
    let said = &answer.tokens[..answer.tokens.len() - 1];
    whole.ids = [prepared.ids.as_slice(), said, &turn.ids].concat();
    whole.visual = [
        prepared.visual.clone(),
        vec![false; said.len()],
        turn.visual.clone(),
    ]
    .concat();
    whole.salient = vec![false; whole.ids.len()];
    let features = vlm
        .clips
        .as_mut()
        .expect("clips")
        .encode(&[forward, backward.clone()]);
    let embeds = vlm
        .embedder
        .run_row(&whole.ids)
        .expect("embeddings")
        .to_tensor();
    let embeds = scatter(
        embeds.expect("numbers"),
        &whole.visual,
        &features.expect("features"),
    );
    whole.embeds = Value::new(embeds.expect("as many places as features")).expect("embeddings");
    let again = vlm
        .generate(&whole, None, &generate, &mut go_on)
        .expect("an answer");
    assert_eq!(again.tokens, second.tokens);
    assert_eq!(again.cache_lengths, second.cache_lengths);

    for (clips, said) in [
        (&[][..], "mentions 1 clips, 0 are given"),
        (&[backward.clone(), backward], "2 are given"),
    ] {
        let error = vlm
            .prepare_follow_up_with_clips(&answer, &messages, &[], clips)
            .expect_err("another number of clips");
        assert!(error.to_string().contains(said), "{error}");
    }
}
