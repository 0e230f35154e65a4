use std::collections::BTreeMap;
use std::path::PathBuf;

use ndarray::{Array2, ArrayD, IxDyn};
use serde_json::Value as Json;

use super::*;
use crate::runtime::image::Pixels;
use crate::runtime::library::ensure;
use crate::runtime::sampling::Sampler;
use crate::runtime::template::Message;
use crate::runtime::test_models::{models_dir, stored};
use crate::runtime::vision::scatter;

const FIXTURES: [&str; 8] = [
    "ts-eager-mha",
    "ts-sdpa-mha",
    "dynamo18-mha",
    "dynamo23-mha",
    "ts-eager-gqa",
    "ts-sdpa-gqa",
    "dynamo18-gqa",
    "dynamo23-gqa",
];

fn files(fixture: &str) -> VlmFiles {
    let configs = models_dir().join("fixtures").join(fixture);
    let onnx = |name: &str| configs.join("onnx").join(format!("{name}.onnx"));
    VlmFiles {
        vision_encoder: onnx("vision_encoder"),
        embed_tokens: onnx("embed_tokens"),
        decoder: onnx("decoder_model_merged"),
        configs,
    }
}

fn open(fixture: &str) -> VlmPipeline {
    ensure(&mut |_| ()).unwrap();
    let options = SessionOptions {
        intra_threads: 1,
        ..SessionOptions::default()
    };
    VlmPipeline::open(&files(fixture), &options).unwrap()
}

fn picture(name: &str) -> Pixels {
    Pixels::open(models_dir().join("images").join(format!("{name}.png"))).unwrap()
}

/// What PyTorch gives, by name.
struct Goldens {
    floats: BTreeMap<String, ArrayD<f32>>,
    ints: BTreeMap<String, Array2<i64>>,
}

impl Goldens {
    fn read(path: PathBuf) -> Self {
        let bytes = stored(&path);
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut found = Self {
            floats: BTreeMap::new(),
            ints: BTreeMap::new(),
        };
        for (name, tensor) in tensors.iter() {
            let shape = IxDyn(tensor.shape());
            match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    let (data, _) = tensor.data().as_chunks::<4>();
                    let data = data.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    let array = ArrayD::from_shape_vec(shape, data).unwrap();
                    found.floats.insert(name.to_string(), array);
                }
                safetensors::Dtype::I64 => {
                    let (data, _) = tensor.data().as_chunks::<8>();
                    let data = data.iter().map(|b| i64::from_le_bytes(*b)).collect();
                    let array = ArrayD::from_shape_vec(shape, data).unwrap();
                    found
                        .ints
                        .insert(name.to_string(), array.into_dimensionality().unwrap());
                }
                _ => {}
            }
        }
        found
    }

    fn case(set: &str, case: &str) -> Self {
        Self::read(models_dir().join(format!("goldens/{set}/{case}.safetensors")))
    }
}

/// Largest difference, in standard deviations of what is expected.
fn distance(found: &ArrayD<f32>, expected: &ArrayD<f32>) -> f32 {
    assert_eq!(found.shape(), expected.shape());
    let largest = (found - expected).iter().fold(0f32, |m, v| m.max(v.abs()));
    largest / expected.std(0.0)
}

/// Runs a recorded case at the level of tensors: rows padded on the left, several turns on one cache.
fn replay(vlm: &mut VlmPipeline, set: &str, case: &str, turns: &[&[&str]]) {
    let goldens = Goldens::case(set, case);
    let pixels = Goldens::read(models_dir().join("goldens/pixels.safetensors.gz"));
    let mut cache: Option<Cache> = None;
    for (turn, images) in turns.iter().enumerate() {
        let images: Vec<_> = images
            .iter()
            .map(|name| pixels.floats[*name].clone().into_dimensionality().unwrap())
            .collect();
        let Vision::Images(encoder) = &mut vlm.vision else {
            panic!("an encoder of images");
        };
        let features = encoder.encode(&images).unwrap();
        if !images.is_empty() {
            let rows: Vec<ArrayD<f32>> = features.iter().map(|f| f.to_array().unwrap()).collect();
            let views: Vec<_> = rows.iter().map(|row| row.view()).collect();
            let all = ndarray::stack(ndarray::Axis(0), &views).unwrap();
            assert!(distance(&all, &goldens.floats[&format!("turn{turn}.image_features")]) < 1e-4);
        }
        let ids = goldens.ints[&format!("turn{turn}.input_ids")].clone();
        let placeholder = i64::from(vlm.text.image_token().unwrap().id);
        let visual = ids.map(|id| *id == placeholder);
        let embeds = vlm.embedder.run(ids.clone()).unwrap().to_tensor().unwrap();
        let embeds = scatter(embeds, visual.as_slice().unwrap(), &features).unwrap();
        let mut input = StepInput::new(Value::new(embeds).unwrap());
        let mask = &goldens.ints[&format!("turn{turn}.attention_mask")];
        input.mask = Some(
            mask.slice(ndarray::s![.., mask.ncols() - ids.ncols()..])
                .to_owned(),
        );
        let mut output = match &cache {
            Some(cache) => vlm.decoder.step(&input, cache).unwrap(),
            None => vlm.decoder.prefill(&input).unwrap(),
        };
        assert_eq!(output.cache.mask(), mask);
        let check = |output: &crate::runtime::decoder::StepOutput, name: String| {
            let found = output.last_logits().unwrap().into_dyn();
            let distance = distance(&found, &goldens.floats[&name]);
            assert!(distance < 1e-4, "{case}, {name}: {distance}");
        };
        check(&output, format!("turn{turn}.logits"));
        for step in 0..3 {
            let ids = goldens.ints[&format!("turn{turn}.step{step}.input_ids")].clone();
            let greedy: Vec<i64> = output
                .last_logits()
                .unwrap()
                .outer_iter()
                .map(|row| Sampler::new(Sampling::Greedy).pick(&row.to_vec()).unwrap() as i64)
                .collect();
            assert_eq!(
                greedy,
                ids.column(0).to_vec(),
                "{case}, turn {turn}, step {step}"
            );
            let input = StepInput::new(vlm.embedder.run(ids).unwrap());
            output = vlm.decoder.step(&input, &output.cache).unwrap();
            check(&output, format!("turn{turn}.step{step}.logits"));
        }
        cache = Some(output.cache);
    }
}

#[test]
fn every_fixture_gives_what_pytorch_gives() {
    for fixture in FIXTURES {
        let set = &fixture[fixture.len() - 3..];
        let mut vlm = open(fixture);
        replay(&mut vlm, set, "baseline", &[&["street"]]);
        replay(&mut vlm, set, "baseline-padded", &[&["street", "noise"]]);
        if set == "mha" {
            replay(
                &mut vlm,
                set,
                "baseline-two-turns",
                &[&["street"], &["noise"]],
            );
        }
    }
}

/// From picture and question to tokens, all steps our own.
#[test]
fn questions_are_answered_with_the_recorded_tokens() {
    for fixture in ["ts-sdpa-mha", "dynamo23-gqa"] {
        let mut vlm = open(fixture);
        let set = &fixture[fixture.len() - 3..];
        let cases = models_dir().join(format!("goldens/{set}/cases.json"));
        let cases = read_json(&cases).unwrap().unwrap();
        let case = cases["cases"]
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["name"] == "baseline");
        let turn = &case.unwrap()["turns"][0];
        let expected: Vec<u32> = turn["decode"]
            .as_array()
            .unwrap()
            .iter()
            .map(|row: &Json| row[0].as_u64().unwrap() as u32)
            .collect();

        let messages = [Message::user(1, "What is it?")];
        let prepared = vlm.prepare(&messages, &[picture("street")]).unwrap();
        assert_eq!(prepared.prompt, turn["prompts"][0].as_str().unwrap());
        assert_eq!(prepared.features_per_image, [81]);
        let mut streamed = String::new();
        let mut tokens = Vec::new();
        let options = GenerateOptions {
            max_new_tokens: 24,
            ..GenerateOptions::default()
        };
        let answer = vlm
            .generate(&prepared, None, &options, &mut |token| {
                streamed.push_str(&token.text);
                tokens.push(token.id);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(answer.tokens[..3], expected);
        assert_eq!(answer.tokens, tokens);
        assert_eq!(answer.text, vlm.text.decode(&tokens, true).unwrap());
        assert!(answer.text.starts_with(&streamed));
        assert_eq!((answer.prompt_tokens, answer.visual_tokens), (92, 81));
        assert_eq!(answer.cache_lengths, [92; 8]);
        let heads = if set == "mha" { 4 } else { 2 };
        assert_eq!(answer.cache_bytes, 2 * 8 * heads * 92 * 8 * 4);
        assert_eq!(answer.timing.decode.len(), answer.tokens.len() - 1);
        assert_eq!(answer.cache.tokens(), 92 + answer.tokens.len() - 1);
    }
}

#[test]
fn another_turn_on_the_cache_equals_the_whole_conversation() {
    let mut vlm = open("ts-sdpa-gqa");
    let options = GenerateOptions {
        max_new_tokens: 6,
        ..GenerateOptions::default()
    };
    let mut go_on = |_: &Token| ControlFlow::Continue(());
    let street = picture("street");
    let shapes = picture("shapes");
    let first = [Message::user(1, "What is it?")];
    let prepared = vlm.prepare(&first, std::slice::from_ref(&street)).unwrap();
    let answer = vlm.generate(&prepared, None, &options, &mut go_on).unwrap();
    let messages = [
        first[0].clone(),
        Message::assistant(answer.text.trim()),
        Message::user(1, "And this one?"),
    ];
    let shapes = std::slice::from_ref(&shapes);
    let turn = vlm.prepare_follow_up(&answer, &messages, shapes).unwrap();
    let second = vlm
        .generate(&turn, Some(&answer.cache), &options, &mut go_on)
        .unwrap();
    assert_eq!(second.visual_tokens, 81);
    assert_eq!(second.prompt, turn.prompt);

    // The same tokens from nothing.
    let mut ids = prepared.ids.clone();
    let eos = usize::from(answer.stop == Stop::Eos);
    ids.extend(&answer.tokens[..answer.tokens.len() - 1]);
    assert_eq!(
        turn.ids[0] == answer.tokens[answer.tokens.len() - 1],
        eos == 0
    );
    ids.extend(&turn.ids);
    let placeholder = vlm.text.image_token().unwrap().id;
    let visual: Vec<bool> = ids.iter().map(|id| *id == placeholder).collect();
    let features = vlm.encode_images(&[street, shapes[0].clone()]).unwrap();
    let embeds = vlm.embedder.run_row(&ids).unwrap().to_tensor().unwrap();
    let embeds = Value::new(scatter(embeds, &visual, &features).unwrap()).unwrap();
    let whole = Prepared {
        ids,
        visual,
        embeds,
        ..turn.clone()
    };
    let mut whole = Prepared {
        salient: vec![false; whole.ids.len()],
        ..whole
    };
    whole.prompt.clear();
    let again = vlm.generate(&whole, None, &options, &mut go_on).unwrap();
    assert_eq!(again.tokens, second.tokens);
    assert_eq!(again.cache_lengths, second.cache_lengths);

    let other = [
        first[0].clone(),
        Message::assistant("Something else"),
        messages[2].clone(),
    ];
    let error = vlm
        .prepare_follow_up(&answer, &other, shapes)
        .unwrap_err()
        .to_string();
    assert!(error.contains("does not go on"), "{error}");
    let error = vlm
        .prepare_follow_up(&answer, &messages, &[])
        .unwrap_err()
        .to_string();
    assert!(error.contains("mentions 1 images, 0 are given"), "{error}");
}

#[test]
fn prompts_without_and_with_two_images() {
    let mut vlm = open("dynamo18-gqa");
    let none = vlm
        .prepare(&[Message::user(0, "Is there a dog?")], &[])
        .unwrap();
    assert!(none.visual.iter().all(|v| !v) && none.features_per_image.is_empty());
    let two = [picture("street"), picture("shapes")];
    let both = vlm.prepare(&[Message::user(2, "Compare.")], &two).unwrap();
    assert_eq!(both.features_per_image, [81, 81]);
    assert_eq!(both.visual.iter().filter(|v| **v).count(), 162);
    assert_eq!(both.embeds.shape(), [1, both.ids.len(), 32]);
    // One batch of two images is the same as two batches of one.
    let alone = vlm.encode_images(&two[1..]).unwrap();
    let together = vlm.encode_images(&two).unwrap();
    let (alone, together) = (
        alone[0].to_array().unwrap(),
        together[1].to_array().unwrap(),
    );
    assert!(distance(&together, &alone) < 1e-5);

    let error = vlm
        .prepare(&[Message::user(1, "?")], &two)
        .unwrap_err()
        .to_string();
    assert!(error.contains("mentions 1 images, 2 are given"), "{error}");
    let error = vlm
        .prepare_prompt("no picture".into(), 0..0, &two)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("0 image placeholders (`<image>`) for 2 images"),
        "{error}"
    );
}

#[test]
fn salient_tokens_are_those_of_the_question() {
    let mut vlm = open("ts-eager-mha");
    let messages = [Message::user(1, "What is it?")];
    let prepared = vlm.prepare(&messages, &[picture("street")]).unwrap();
    let marked: String = prepared
        .ids
        .iter()
        .zip(&prepared.salient)
        .filter(|(_, salient)| **salient)
        .map(|(id, _)| vlm.text.decode(&[*id], false).unwrap())
        .collect();
    assert_eq!(marked.replace(' ', ""), "What?:");
    assert_eq!(prepared.salient.last(), Some(&true));
    assert!(
        prepared
            .visual
            .iter()
            .zip(&prepared.salient)
            .all(|(v, s)| !(*v && *s))
    );
}

#[test]
fn answers_end_when_told() {
    let mut vlm = open("ts-eager-mha");
    let prepared = vlm.prepare(&[Message::user(0, "Why?")], &[]).unwrap();
    let mut run = |options: GenerateOptions, stop_after: usize| {
        let mut seen = 0;
        vlm.generate(&prepared, None, &options, &mut |_| {
            seen += 1;
            if seen == stop_after {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap()
    };
    let options = |n| GenerateOptions {
        max_new_tokens: n,
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let long = run(options(5), 0);
    assert_eq!(
        (long.stop, long.tokens.len(), long.timing.decode.len()),
        (Stop::Length, 5, 4)
    );
    let short = run(options(5), 2);
    assert_eq!(
        (short.stop, &short.tokens[..]),
        (Stop::Caller, &long.tokens[..2])
    );
    let none = run(options(0), 0);
    assert_eq!(
        (none.tokens.len(), none.cache.tokens()),
        (0, prepared.ids.len())
    );
    let mut random = |seed| {
        let sampling = Sampling::Random {
            temperature: 2.0,
            top_k: 50,
            top_p: 0.9,
            seed,
        };
        run(
            GenerateOptions {
                sampling,
                ..options(12)
            },
            0,
        )
        .tokens
    };
    assert_eq!(random(1), random(1));
    assert_ne!(random(1), random(2));
}

#[test]
fn an_end_of_sequence_token_ends_the_answer() {
    // The configuration decides which tokens end an answer, so any token can be made to.
    let mut vlm = open("ts-eager-mha");
    let prepared = vlm.prepare(&[Message::user(0, "Why?")], &[]).unwrap();
    let options = GenerateOptions {
        max_new_tokens: 4,
        ..GenerateOptions::default()
    };
    let mut go_on = |_: &Token| ControlFlow::Continue(());
    let answer = vlm.generate(&prepared, None, &options, &mut go_on).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(
            files("ts-eager-mha").configs.join(name),
            dir.path().join(name),
        )
        .unwrap();
    }
    let eos = format!("{{\"eos_token_id\": [399, {}]}}", answer.tokens[1]);
    std::fs::write(dir.path().join("generation_config.json"), eos).unwrap();
    vlm.text = TextProcessor::from_dir(dir.path()).unwrap();
    let ended = vlm.generate(&prepared, None, &options, &mut go_on).unwrap();
    let first = answer
        .tokens
        .iter()
        .position(|t| *t == answer.tokens[1])
        .unwrap();
    assert_eq!(ended.stop, Stop::Eos);
    assert_eq!(ended.tokens, answer.tokens[..=first]);
}

#[test]
fn the_question_is_found_in_the_prompt() {
    let messages = [Message::user(1, " What is it? ")];
    let prompt = "USER: <image>\nWhat is it? ASSISTANT:";
    assert_eq!(&prompt[question(prompt, &messages)], "What is it?");
    assert_eq!(question(prompt, &[Message::user(1, "")]), 0..0);
    assert_eq!(question("CHANGED", &messages), 0..7);
    assert_eq!(question("", &[]), 0..0);
}

#[test]
fn a_missing_file_is_named() {
    ensure(&mut |_| ()).unwrap();
    let mut files = files("ts-eager-mha");
    files.decoder = files.decoder.with_file_name("gone.onnx");
    let error = VlmPipeline::open(&files, &SessionOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("gone.onnx"), "{error}");
}
