//! `duet explain`: indices against PyTorch's, coordinates against second ways of computing them, and the picture.

#[path = "../commands/mod.rs"]
mod commands;
mod pytorch;
#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use commands::{Place, duet, source, text};
use duet_onnx::runtime::{Packing, Pixels, Tensor};
use serde_json::{Value as Json, json};

use support::forms::form;
use support::packed::unpacked;

const QUESTION: &str = "What is it?";

fn picture(name: &str) -> String {
    text(&source("models/llava/images").join(format!("{name}.png"))).to_owned()
}

/// `duet explain --json` of one token's answer.
#[track_caller]
fn explained(model: &str, prompt: &str, rest: &[&str]) -> Json {
    commands::runtime();
    let mut all = vec!["explain", model, "--prompt", prompt, "--json"];
    all.extend(["--max-new-tokens", "1", "--threads", "1"]);
    all.extend(rest);
    duet(&all).json()
}

fn list(value: &Json) -> Vec<usize> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

/// What is left of a choice: tokens as they are, and anchors.
type Left = (BTreeSet<usize>, BTreeSet<usize>);

/// The same of each image of a stage, of images with one choice each.
fn left(stage: &Json) -> Vec<Left> {
    let images = stage["images"].as_array().expect("images");
    images
        .iter()
        .map(|image| choice(&image["chosen"][0]))
        .collect()
}

/// The same of each choice of an image.
fn choices(image: &Json) -> Vec<Left> {
    let chosen = image["chosen"].as_array().expect("choices");
    chosen.iter().map(choice).collect()
}

fn choice(chosen: &Json) -> Left {
    let clusters = chosen["contextual"].as_array().expect("contextual");
    let anchors = clusters
        .iter()
        .map(|c| c["anchor"].as_u64().expect("an anchor"));
    (
        list(&chosen["dominant"]).into_iter().collect(),
        anchors
            .map(|a| usize::try_from(a).expect("small"))
            .collect(),
    )
}

/// A rewritten directory says what the recipe in memory does, and so does a whole model in one file, of the same
/// weights.
#[test]
fn other_forms_of_a_model_say_the_same() {
    let street = picture("street");
    let seen = ["--image", street.as_str()];
    let place = Place::new(commands::BOTH);
    place.copy(&source("models/llava/fixtures/ts-sdpa-gqa"), "model");
    let recipe = place.at("recipe.yaml");
    let ask = |model: &str, rest: &[&str]| {
        explained(&place.at(model), QUESTION, &[&seen[..], rest].concat())
    };
    let in_memory = ask("model", &["--recipe", &recipe]);
    place.rewritten(&[]);
    let written = ask("out", &[]);
    for what in ["images", "stages", "answer"] {
        assert_eq!(written[what], in_memory[what], "{what}");
    }
    let beside = place.rewrite("model", &["--beside", "duet"]);
    assert_eq!(beside.code, 0, "{}", beside.stderr);
    assert_eq!(
        ask("model", &["--variant", "duet"])["stages"],
        in_memory["stages"]
    );

    let name = "vlm-batch-dynamo18-gqa";
    form(name).unpack(&place.path("forms"));
    let folder = format!("forms/{name}");
    let found = ask(&folder, &["--recipe", &recipe]);
    let stages = found["stages"].as_array().expect("stages");
    let same = in_memory["stages"].as_array().expect("stages");
    assert_eq!(stages.len(), same.len(), "{name}");
    for (stage, same) in stages.iter().zip(same) {
        for what in ["kept", "images", "layers"] {
            assert_eq!(stage[what], same[what], "{name}: {what} of {same}");
        }
    }
}

/// Discarded features that leave in the decoder are counted in other coordinates than features that never came out;
/// the patches that are left are the same.
#[test]
fn both_placements_leave_the_same_patches() {
    let qwen = unpacked(&source("models/qwen_vl/fixtures/ts-sdpa"));
    let next = unpacked(&source("models/llava_next/fixtures/llava-next"));
    let llava = source("models/llava/fixtures/dynamo23-gqa");
    for (model, tokens) in [(&qwen, None), (&llava, Some(81)), (&next, None)] {
        let mut found = Vec::new();
        for placement in ["encoder", "decoder"] {
            let mut merge = json!({"dominant": 0.3, "contextual": 5, "placement": placement});
            if *model != qwen {
                merge["cls"] = "drop".into();
            }
            let drops = json!([{"after_layer": 2, "keep": 0.5}, {"after_layer": 4, "keep": 0.25}]);
            let recipe = json!({"version": 1, "passes": [
                {"token_merge": merge},
                {"visual_prune": {"drops": drops, "positions": "keep"}},
            ]});
            let place = Place::new(&recipe.to_string());
            let (street, shapes) = (picture("street"), picture("shapes"));
            let mut seen = vec!["--image", street.as_str()];
            if *model != next {
                seen.extend(["--image", shapes.as_str()]);
            }
            let recipe = place.at("recipe.yaml");
            seen.extend(["--recipe", recipe.as_str()]);
            found.push(explained(text(model), QUESTION, &seen));
        }
        let what = model.display();
        let [encoder, decoder] = [0, 1].map(|i| found[i]["stages"].as_array().expect("stages"));
        assert_eq!((encoder.len(), decoder.len()), (4, 5), "{what}");
        assert_eq!(encoder[0]["layers"], Json::Null, "{what}");
        assert_eq!(
            decoder[1]["layers"],
            json!({"first": 1, "last": 1}),
            "{what}"
        );
        if let Some(tokens) = tokens {
            assert_eq!(decoder[1]["images"][0]["tokens"], tokens, "{what}");
            assert_eq!(
                decoder[1]["images"][0]["discarded"],
                tokens - 24 - 5,
                "{what}"
            );
        }
        // The merge in layer 1, with what it discarded, and behind it.
        let same = [(1, 1), (1, 2), (2, 3), (3, 4)];
        // With one position for each token, what is dropped later depends on the positions.
        let compared = if *model == qwen { 4 } else { 2 };
        for (a, b) in same.into_iter().take(compared) {
            let (a, b) = (&encoder[a], &decoder[b]);
            let images = a["images"].as_array().expect("images");
            for (a, b) in images.iter().zip(b["images"].as_array().expect("images")) {
                let (a, b) = (choices(a), choices(b));
                if *model != next {
                    assert_eq!(a, b, "{what}");
                    continue;
                }
                // Of packed crops the padding is cut off, with what was chosen there.
                assert!(a != b && a[0] == b[0], "{what}");
                let within = |(a, b): (&Left, &Left)| b.0.is_subset(&a.0) && b.1.is_subset(&a.1);
                assert!(a.iter().zip(&b).all(within), "{what}: {a:?} {b:?}");
            }
        }
        // Layers see what their caches hold.
        for document in &found {
            agrees_with_caches(document, &what.to_string());
        }
    }
}

/// Each layer's cache holds the prompt's text and the tokens of its stage.
#[track_caller]
fn agrees_with_caches(document: &Json, what: &str) {
    let lengths = list(&document["answer"]["cache_lengths"]);
    let count = |stage: &Json| list(&json!([stage["visual_tokens"]]))[0];
    let mut words = BTreeSet::new();
    let mut seen = 0;
    for stage in document["stages"].as_array().expect("stages") {
        if stage["layers"].is_null() {
            continue;
        }
        let [first, last] = ["first", "last"].map(|end| list(&json!([stage["layers"][end]]))[0]);
        for layer in first..=last {
            words.insert(lengths[layer - 1] - count(stage));
            seen += 1;
        }
    }
    assert_eq!((words.len(), seen), (1, lengths.len()), "{what}: {words:?}");
}

/// Tokens of packed crops: where each comes from is asked of the packing itself, with features that are numbers.
#[test]
fn packed_crops_are_followed_to_their_patches() {
    let recipe = "version: 1
passes:
  - visual_prune: {drops: [{after_layer: 2, keep: 0.5}, {after_layer: 4, keep: 0.25}]}
";
    let place = Place::new(recipe);
    let (file, street) = (place.at("recipe.yaml"), picture("street"));
    let size = Pixels::open(&street)
        .map(|p| (p.height(), p.width()))
        .expect("a picture");
    for (name, visual) in [("llava-next", 166), ("llava-onevision", 106)] {
        let model = unpacked(&source("models/llava_next/fixtures").join(name));
        let found = explained(
            text(&model),
            QUESTION,
            &["--image", &street, "--recipe", &file],
        );
        agrees_with_caches(&found, name);
        let stages = found["stages"].as_array().expect("stages");
        assert_eq!(stages[0]["visual_tokens"], visual, "{name}");
        let path = model.join("config.json");
        let config: Json =
            serde_json::from_str(&std::fs::read_to_string(&path).expect("config")).expect("JSON");
        let width = config["image_newline"].as_array().expect("a newline").len();
        let packing = Packing::from_json(&config, &path)
            .expect("a config")
            .expect("crops");
        // One channel for each token of each crop: what a packed token is made of is where it is not 0.
        let (crops, tokens) = (5, 36);
        assert_eq!(
            found["images"][0]["pictures"].as_array().map(Vec::len),
            Some(crops)
        );
        let newline: Vec<f64> =
            serde_json::from_value(config["image_newline"].clone()).expect("numbers");
        let mut from: Vec<BTreeSet<(usize, usize)>> = Vec::new();
        for start in (0..crops * tokens).step_by(width) {
            let crop = |c: usize| {
                let mut data = vec![0f32; tokens * width];
                for t in 0..tokens {
                    let number = c * tokens + t;
                    if (start..start + width).contains(&number) {
                        data[t * width + number - start] = 1e6;
                    }
                }
                Tensor::new([tokens, width], data).expect("features")
            };
            let crops: Vec<Tensor> = (0..crops).map(crop).collect();
            let packed = packing.pack(&crops, size).expect("packed");
            let packed = packed.f32s().expect("numbers");
            for (n, row) in packed.chunks(width).enumerate() {
                if from.len() <= n {
                    from.push(BTreeSet::new());
                }
                let is_newline = row
                    .iter()
                    .zip(&newline)
                    .all(|(a, b)| (f64::from(*a) - b).abs() < 1e-3);
                let large = row
                    .iter()
                    .enumerate()
                    .filter(|(_, v)| **v > 1.0 && !is_newline);
                from[n].extend(large.map(|(i, _)| ((start + i) / tokens, (start + i) % tokens)));
            }
        }
        assert_eq!(from.len(), visual, "{name}");
        for stage in stages {
            let mut want: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); crops];
            let mut newlines = 0;
            for number in list(&stage["kept"]) {
                newlines += usize::from(from[number].is_empty());
                from[number].iter().for_each(|&(crop, token)| {
                    want[crop].insert(token);
                });
            }
            let image = &stage["images"][0];
            assert_eq!(image["newlines"], newlines, "{name}");
            let chosen: Vec<BTreeSet<usize>> = choices(image).into_iter().map(|c| c.0).collect();
            assert_eq!(chosen, want, "{name}");
        }
        assert!(stages.len() == 3 && newlines_of(&stages[0]) > 5, "{name}");
    }
}

fn newlines_of(stage: &Json) -> u64 {
    stage["images"][0]["newlines"].as_u64().expect("a count")
}

/// Frames of a clip beside an image, in files of their own and in one file of two towers.
#[test]
fn frames_of_clips_are_told_apart() {
    let place = Place::new(commands::CLIPS);
    let folder = source("models/video_llava/fixtures/ts-sdpa");
    place.copy(&folder, "model");
    place.copy(&folder, "together");
    std::fs::remove_file(place.path("together/onnx/video_encoder.onnx")).expect("removed");
    let encoder = source("models/video_llava/fixtures/together/vision_encoder.onnx.gz");
    let encoder = support::packed::contents(&encoder);
    place.write("together/onnx/vision_encoder.onnx", &encoder);
    let clip = text(&source("models/video_llava/images/ball.gif")).to_owned();
    let (street, recipe) = (picture("street"), place.at("recipe.yaml"));
    let out = place.at("clip.png");
    let seen = ["--video", &clip, "--image", &street, "--recipe", &recipe];
    let found = explained(
        &place.at("model"),
        QUESTION,
        &[&seen[..], &["--out", &out]].concat(),
    );
    agrees_with_caches(&found, "Video-LLaVA");
    let images = found["images"].as_array().expect("images");
    let kinds: Vec<&Json> = images.iter().map(|i| &i["kind"]).collect();
    assert_eq!(kinds, ["image", "clip"]);
    assert_eq!(images[1]["pictures"].as_array().map(Vec::len), Some(8));
    assert_eq!(images[1]["pictures"][7]["rows"], 9);

    // 24 tokens of the image, then 24 of each frame: CLS, 19 patches, 4 contextual.
    let stages = found["stages"].as_array().expect("stages");
    let frames = choices(&stages[1]["images"][1]);
    assert_eq!(frames.len(), 8);
    assert!(frames.iter().all(|(d, c)| d.len() == 19 && c.len() == 4));
    assert!(
        frames.windows(2).any(|pair| pair[0] != pair[1]),
        "the ball moves"
    );
    assert_eq!(stages[1]["images"][1]["cls"], 8);
    let order: Vec<(Vec<usize>, Vec<usize>)> = stages[1]["images"][1]["chosen"]
        .as_array()
        .expect("frames")
        .iter()
        .map(|chosen| {
            let clusters = chosen["contextual"].as_array().expect("contextual");
            let anchors = clusters.iter().map(|c| c["anchor"].clone());
            (list(&chosen["dominant"]), list(&anchors.collect()))
        })
        .collect();
    let stage = &stages[2];
    let mut want = vec![Left::default(); 8];
    let mut cls = 0;
    for number in list(&stage["kept"]).into_iter().filter(|n| *n >= 24) {
        let (frame, token) = ((number - 24) / 24, (number - 24) % 24);
        match token {
            0 => cls += 1,
            1..20 => drop(want[frame].0.insert(order[frame].0[token - 1])),
            _ => drop(want[frame].1.insert(order[frame].1[token - 20])),
        }
    }
    assert_eq!(choices(&stage["images"][1]), want);
    assert_eq!(stage["images"][1]["cls"], cls);
    let drawn = Pixels::open(&out).expect("a picture");
    assert!(drawn.width() > 700 && drawn.height() > 400);

    let joined = explained(&place.at("together"), QUESTION, &seen);
    assert_eq!(joined["stages"], found["stages"]);
}

/// A clip of a tower of patch rows: frames of tokens, of which each spans two of the clip's.
#[test]
fn grids_of_clips_have_a_picture_for_each_frame_of_tokens() {
    let model = unpacked(&source("models/qwen_vl/fixtures/ts-sdpa"));
    let place = Place::new(
        "version: 1
passes:
  - token_merge: {dominant: 0.5, contextual: 0.1, placement: encoder}
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}
",
    );
    let clip = text(&source("models/video_llava/images/ball.gif")).to_owned();
    let (recipe, out) = (place.at("recipe.yaml"), place.at("out.png"));
    let found = explained(
        text(&model),
        QUESTION,
        &["--video", &clip, "--recipe", &recipe, "--out", &out],
    );
    agrees_with_caches(&found, "a clip of a grid");
    let image = &found["images"][0];
    let pictures = image["pictures"].as_array().expect("pictures");
    let plane = |p: &Json| {
        p["rows"]
            .as_u64()
            .zip(p["columns"].as_u64())
            .map(|(r, c)| r * c)
    };
    let all: u64 = pictures.iter().filter_map(plane).sum();
    let stages = found["stages"].as_array().expect("stages");
    assert!(pictures.len() > 1, "{image}");
    assert_eq!(stages[0]["visual_tokens"], all);
    assert_eq!(stages[0]["images"][0]["chosen"][0]["of"], all);
    assert!(Path::new(&out).is_file());
}

/// A tower whose tokens are several patches each, and methods that keep patches as they are.
#[test]
fn shuffled_patches_and_other_methods_are_explained() {
    let place = Place::new("version: 1\npasses:\n  - uniform_drop: {keep: 10}\n");
    let street = picture("street");
    let model = source("models/llava/fixtures/ts-eager-gqa");
    let recipe = place.at("recipe.yaml");
    let ask = |model: &Path| {
        explained(
            text(model),
            QUESTION,
            &["--image", &street, "--recipe", &recipe],
        )
    };
    let found = ask(&model);
    let want: Vec<usize> = (0..10).map(|i| (2 * i + 1) * 81 / 20).collect();
    assert_eq!(
        list(&found["stages"][1]["images"][0]["chosen"][0]["dominant"]),
        want
    );
    assert_eq!(found["stages"][1]["pass"], "uniform_drop");
    assert_eq!(found["images"][0]["pictures"][0]["rows"], 9);

    // 18×18 patches, nine of which are a token.
    let name = "forms/idefics3-plain-ts-sdpa";
    form("idefics3-plain-ts-sdpa").unpack(&place.path("forms"));
    let config = json!({
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 168, "width": 168},
    });
    let config = config.to_string();
    place.write(
        &format!("{name}/preprocessor_config.json"),
        config.as_bytes(),
    );
    let merge = "version: 1\npasses:\n  - token_merge: {dominant: 4, contextual: 2}\n";
    place.write("recipe.yaml", merge.as_bytes());
    let found = ask(&place.path(name));
    let picture = &found["images"][0]["pictures"][0];
    assert_eq!(
        [
            &picture["rows"],
            &picture["columns"],
            &picture["token_edge"]
        ],
        [6, 6, 28]
    );
    let (dominant, anchors) = choice(&found["stages"][1]["images"][0]["chosen"][0]);
    assert_eq!((dominant.len(), anchors.len()), (4, 2));
}

fn pixel(image: &Pixels, x: usize, y: usize) -> [u8; 3] {
    let at = (y * image.width() + x) * 3;
    std::array::from_fn(|c| image.rgb()[at + c])
}

/// What dimmed patches fade into.
const SLATE: [f32; 3] = [58.0, 64.0, 82.0];

/// `share` of the second colour, the rest of the first.
fn blend(first: [f32; 3], second: [f32; 3], share: f32) -> [f32; 3] {
    std::array::from_fn(|c| first[c] + (second[c] - first[c]) * share)
}

/// The trained model and its recipe: text, picture, and what is drawn where.
#[test]
fn the_picture_shows_what_is_left() {
    commands::runtime();
    let place = Place::new("");
    let model = source("models/vqa/llava");
    let image = text(&source("models/vqa/test/images/000.png")).to_owned();
    let out = place.at("seen.png");
    let prompt = "Which digit does the pink tile show?";
    let all = [
        "explain",
        text(&model),
        "--recipe",
        "tiles-21",
        "--image",
        &image,
    ];
    let rest = ["--prompt", prompt, "--out", &out, "--threads", "1"];
    let ran = duet(&[&all[..], &rest[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for line in [
        "vision encoder",
        "token_merge",
        "99 as they are + 19 contextual + 1 CLS",
        "visual_prune after layer 9",
        "10–12",
    ] {
        assert!(ran.stdout.contains(line), "{line}:\n{}", ran.stdout);
    }
    assert!(ran.stderr.contains("seen.png"), "{}", ran.stderr);
    // The right answer, alone in the last line.
    assert_eq!(
        ran.stdout.trim().lines().last(),
        Some("2"),
        "{}",
        ran.stdout
    );

    let found = explained(
        text(&model),
        prompt,
        &["--recipe", "tiles-21", "--image", &image],
    );
    let seen = Pixels::open(&out).expect("a picture");
    let shown = Pixels::open(&image).expect("a picture");
    // 196 pixels are shown as 392, a patch as 28.
    let (edge, patch) = (392, 28);
    assert_eq!(
        (shown.width(), shown.height()),
        (196, 196),
        "as the encoder sees it"
    );
    let same = |left: usize, top: usize, places: &[usize]| {
        places.iter().all(|place| {
            let (y, x) = (place / 14 * patch, place % 14 * patch);
            (0..patch * patch).all(|i| {
                let (y, x) = (y + i / patch, x + i % patch);
                pixel(&seen, left + x, top + y) == pixel(&shown, x / 2, y / 2)
            })
        })
    };
    let all: Vec<usize> = (0..196).collect();
    let tops: Vec<usize> = (0..seen.height() - edge)
        .filter(|top| same(14, *top, &all))
        .collect();
    let [top] = tops[..] else {
        panic!("the whole image is drawn once at the left: {tops:?}");
    };
    let stages = found["stages"].as_array().expect("stages");
    let mut left = 14;
    let mut tinted = 0;
    for stage in &stages[1..3] {
        let (dominant, anchors) = choice(&stage["images"][0]["chosen"][0]);
        let kept: Vec<usize> = dominant.iter().copied().collect();
        let next = (left + edge..seen.width() - edge).find(|x| same(*x, top, &kept));
        left = next.unwrap_or_else(|| panic!("no panel with {kept:?}"));
        let middle = |place: usize| {
            let (y, x) = (
                place / 14 * patch + patch / 2,
                place % 14 * patch + patch / 2,
            );
            (pixel(&seen, left + x, top + y), pixel(&shown, x / 2, y / 2))
        };
        // Each token's cluster is told by the colour of its anchor's frame.
        let mut frame_of = BTreeMap::new();
        for cluster in stage["images"][0]["chosen"][0]["contextual"]
            .as_array()
            .expect("clusters")
        {
            let anchor = list(&json!([cluster["anchor"]]))[0];
            let frame = pixel(&seen, left + anchor % 14 * patch, top + anchor / 14 * patch);
            frame_of.extend(list(&cluster["members"]).into_iter().map(|m| (m, frame)));
        }
        for place in 0..196 {
            if dominant.contains(&place) {
                continue;
            }
            assert!(!same(left, top, &[place]), "patch {place} is not as it was");
            let (inner, original) = middle(place);
            // A contextual token's anchor is clear inside of its frame; others are not.
            assert_eq!(inner == original, anchors.contains(&place), "patch {place}");
            if anchors.contains(&place) {
                continue;
            }
            let grey = original.map(u16::from).iter().sum::<u16>() / 3;
            let want = match frame_of.get(&place) {
                Some(frame) => blend(
                    blend(original.map(f32::from), SLATE, 0.45),
                    frame.map(f32::from),
                    0.4,
                ),
                None => blend([f32::from(grey); 3], SLATE, 0.72),
            };
            let near = inner
                .iter()
                .zip(want)
                .all(|(a, b)| (f32::from(*a) - b).abs() < 1.5);
            assert!(near, "patch {place} is {inner:?}, expected {want:?}");
        }
        tinted += frame_of.len();
    }
    assert!(tinted > 19, "{tinted} tokens were merged into 19");
    assert_eq!(stages[3]["visual_tokens"], 0);
    assert_eq!(stages[3]["kept"], json!([]));
}

#[test]
fn what_cannot_be_explained_says_what_to_do() {
    let place = Place::new(commands::BOTH);
    place.copy(&source("models/llava/fixtures/ts-sdpa-gqa"), "model");
    place.rewritten(&[]);
    place.write("there.png", b"mine");
    let street = picture("street");
    let (model, written) = (place.at("model"), place.at("out"));
    let (recipe, there, new) = (
        place.at("recipe.yaml"),
        place.at("there.png"),
        place.at("new.png"),
    );
    let fails = |rest: &[&str], say: &str| {
        commands::runtime();
        let ran = duet(&[&["explain", "--prompt", "?"], rest].concat());
        assert_eq!(ran.code, 2, "{rest:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(say), "{rest:?}: {}", ran.stderr);
        assert!(!Path::new(&new).exists());
    };
    let seen = ["--image", street.as_str(), "--out", new.as_str()];
    fails(
        &[&[model.as_str()], &seen[..]].concat(),
        "--recipe NAME_OR_FILE",
    );
    fails(
        &[&[written.as_str(), "--recipe", &recipe], &seen[..]].concat(),
        "rewritten already",
    );
    for (target, say) in [
        (there.as_str(), "nothing is replaced"),
        ("seen.jpg", "ends in .png"),
    ] {
        let asked = [model.as_str(), "--recipe", &recipe, "--image", &street];
        fails(&[&asked[..], &["--out", target]].concat(), say);
    }
    fails(&[written.as_str(), "--out", &new], "--image");
    fails(&[written.as_str(), "--image", &street], "--out");
    fails(
        &[&[model.as_str(), "--recipe", "llava-next-640"], &seen[..]].concat(),
        "llava-next-640",
    );
    assert_eq!(std::fs::read(&there).expect("read"), b"mine");
    let clips: PathBuf = source("models/video_llava/images/ball.gif");
    fails(
        &[written.as_str(), "--video", text(&clips), "--out", &new],
        "sees no clips",
    );
    place.write(
        "cls.yaml",
        b"version: 1\npasses:\n  - token_merge: {dominant: 1, contextual: 0}\n",
    );
    let cls = place.at("cls.yaml");
    fails(
        &[&[model.as_str(), "--recipe", &cls], &seen[..]].concat(),
        "CLS alone",
    );
}
