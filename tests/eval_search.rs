//! What comes before and after `duet eval`: public sets converted, make-ups searched, and the table's document against
//! its committed schema.

mod commands;

use commands::{BOTH, Place, duet, runtime, schema, source, text};
use duet_onnx::passes::{Recipe, TokenMerge, VisualPrune};
use serde_json::{Value, json};

const MODEL: &str = "models/llava/fixtures/ts-sdpa-gqa";

/// Pictures cut out of the two that ship.
fn pictures(place: &Place, folder: &str, count: u32) {
    std::fs::create_dir_all(place.path(folder)).expect("made");
    for (name, offset) in [("street", 0), ("shapes", count / 2)] {
        let path = source("models/llava/images").join(format!("{name}.png"));
        let whole = image::open(path).expect("a picture");
        for part in 0..count / 2 {
            let cut = whole.crop_imm(10 * part, 12 * part, 150, 150);
            let to = place.path(&format!("{folder}/{:02}.png", offset + part));
            cut.save(to).expect("saved");
        }
    }
}

/// A set whose references are what the unmodified model answers, so that accuracy is agreement.
fn own_answers(place: &Place, count: u32) {
    pictures(place, "set/images", count);
    place.write(
        "set/dataset.json",
        br#"{"schema_version": 1, "max_new_tokens": 2}"#,
    );
    let write = |answers: &dyn Fn(&str) -> String| {
        let lines = (0..count).map(|i| {
            let id = format!("{i:02}");
            let answer = answers(&id);
            let image = format!("images/{id}.png");
            json!({ "id": id, "image": image, "question": "What is it?", "answer": answer, "type": "what" }).to_string()
        });
        place.write(
            "set/questions.jsonl",
            lines.collect::<Vec<_>>().join("\n").as_bytes(),
        );
    };
    write(&|_| "?".into());
    let (set, out, model) = (place.at("set"), place.at("first"), source(MODEL));
    let ran = duet(&[
        "eval",
        text(&model),
        "--dataset",
        &set,
        "--out",
        &out,
        "--threads",
        "1",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let lines = std::fs::read_to_string(place.path("first/ts-sdpa-gqa.jsonl")).expect("answers");
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    write(&|id| {
        let found = lines
            .iter()
            .find(|line| line["id"] == id)
            .expect("an answer");
        found["answer"].as_str().expect("a text").to_owned()
    });
}

#[test]
fn a_search_ends_with_a_recipe_that_keeps_the_budget() {
    runtime();
    let place = Place::new(BOTH);
    own_answers(&place, 18);
    let (set, recipe, model) = (place.at("set"), place.at("found.yaml"), source(MODEL));
    let mut plan = vec![
        "plan",
        text(&model),
        "--budget",
        "30",
        "--calibrate",
        &set,
        "-o",
        &recipe,
    ];
    plan.extend(["--candidates", "5", "--threads", "1", "--json"]);
    let ran = duet(&plan);
    let document = ran.json();
    let search = &document["search"];
    assert_eq!(
        (&search["unreduced_accuracy"], &search["budget"]),
        (&json!(1.0), &json!(30.0))
    );
    let tried = search["tried"].as_array().expect("a list");
    assert_eq!(tried.len(), 5);
    for one in tried {
        assert!(one["average"].as_f64().expect("a number") <= 30.0, "{one}");
        // The very answer is right; another may be once both are normalised.
        assert!(
            one["accuracy"].as_f64() >= one["agreement"].as_f64(),
            "{one}"
        );
    }
    // The last round is over everything, and ordered.
    let last: Vec<f64> = tried
        .iter()
        .filter(|one| one["images"] == 18)
        .map(|one| one["accuracy"].as_f64().expect("a number"))
        .collect();
    assert!(
        last.len() >= 3 && last.is_sorted_by(|a, b| a >= b),
        "{last:?}"
    );

    let written = std::fs::read_to_string(place.path("found.yaml")).expect("a recipe");
    assert_eq!(document["recipe"], json!(written));
    assert!(
        written.starts_with("# The best of 5 make-ups of 30.00 visual tokens per layer"),
        "{written}"
    );
    let parsed = Recipe::parse(&written).expect("a recipe");
    let entering = parsed
        .pass::<TokenMerge>()
        .map_or(81, |m| m.dominant.of(81) + m.contextual.of(81));
    let seen = match parsed.pass::<VisualPrune>() {
        Some(prune) => prune.tokens_per_layer(entering, 8),
        None => vec![entering; 8],
    };
    assert_eq!(document["visual_tokens"]["by_layer"], json!(seen));

    // What the search measured is what eval measures of the rewritten model.
    let out = place.at("out");
    let done = duet(&["rewrite", text(&model), "--recipe", &recipe, "--out", &out]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let table = duet(&[
        "eval",
        text(&model),
        &out,
        "--dataset",
        &set,
        "--threads",
        "1",
        "--json",
    ])
    .json();
    conforms(&table);
    let new = &table["models"][1];
    assert_eq!(new["all"]["accuracy"]["value"], tried[0]["accuracy"]);
    assert_eq!(new["all"]["agreement"], tried[0]["agreement"]);
    assert_eq!(
        new["visual_tokens"]["by_layer_average"],
        tried[0]["average"]
    );
    assert_eq!(
        table["models"][0]["all"]["accuracy"],
        json!({ "value": 1.0, "low": 1.0, "high": 1.0 })
    );

    // The same again, as everything is seeded.
    std::fs::remove_file(place.path("found.yaml")).expect("removed");
    assert_eq!(duet(&plan).json(), document);
}

#[test]
fn what_cannot_be_searched_is_refused() {
    runtime();
    let place = Place::new(BOTH);
    pictures(&place, "set/images", 2);
    place.write("set/dataset.json", br#"{"schema_version": 1}"#);
    let line =
        r#"{"id": "0", "image": "images/00.png", "question": "What is it?", "answer": "a house"}"#;
    place.write("set/questions.jsonl", line.as_bytes());
    let (set, model, qwen) = (
        place.at("set"),
        source(MODEL),
        source("models/qwen_vl/fixtures/ts-sdpa"),
    );
    for (arguments, says) in [
        (
            vec![text(&model), "--budget", "30", "--calibrate", &set],
            "one image tells nothing",
        ),
        (
            vec![text(&model), "--budget", "30", "--calibrate", "nowhere"],
            "no such directory",
        ),
        (
            vec![
                text(&model),
                "--budget",
                "30",
                "--calibrate",
                &set,
                "--method",
                "visionzip",
            ],
            "with --method visionzip there is nothing to search",
        ),
        (
            vec![text(&model), "--budget", "30", "--candidates", "4"],
            "--calibrate",
        ),
        (
            vec![text(&qwen), "--reduction", "67%", "--calibrate", &set],
            "--tokens",
        ),
        (
            vec![text(&qwen), "--budget", "30", "--calibrate", &set],
            "--tokens",
        ),
    ] {
        let ran = duet(&[&["plan"], &arguments[..]].concat());
        assert_eq!(ran.code, 2, "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(says), "{arguments:?}: {}", ran.stderr);
    }
}

/// POPE from its file to its table.
#[test]
fn a_public_set_is_converted_and_asked() {
    runtime();
    let place = Place::new(BOTH);
    pictures(&place, "val2014", 4);
    let lines = (0..4).flat_map(|picture| {
        [("dog", "yes"), ("car", "no")].map(|(what, label)| {
            let asked = format!("Is there a {what} in the image?");
            json!({ "question_id": 2 * picture + 1, "image": format!("{picture:02}.png"), "text": asked, "label": label })
        })
    });
    let lines: Vec<String> = lines
        .enumerate()
        .map(|(index, mut line)| {
            line["question_id"] = json!(index + 1);
            line.to_string()
        })
        .collect();
    place.write("coco_pope_random.json", lines.join("\n").as_bytes());
    let (file, images, set) = (
        place.at("coco_pope_random.json"),
        place.at("val2014"),
        place.at("sets/pope"),
    );
    let convert = [
        "eval", "convert", "pope", &file, "--images", &images, "--out", &set,
    ];
    let ran = duet(&convert);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("8 questions about 4 images"),
        "{}",
        ran.stderr
    );
    let again = duet(&convert);
    assert_eq!(again.code, 2);
    assert!(
        again.stderr.contains("is there already"),
        "{}",
        again.stderr
    );
    let model = source(MODEL);
    let ran = duet(&[
        "eval",
        text(&model),
        "--dataset",
        &set,
        "--threads",
        "1",
        "--max-new-tokens",
        "2",
        "--json",
    ]);
    let table = ran.json();
    conforms(&table);
    // Random words are neither "no" nor "not", so the model says yes.
    let all = &table["models"][0]["all"];
    assert_eq!(
        (&all["accuracy"]["value"], &all["rates"]["yes_ratio"]),
        (&json!(0.5), &json!(1.0))
    );
    assert_eq!(
        (&all["rates"]["precision"], &all["rates"]["recall"]),
        (&json!(0.5), &json!(1.0))
    );
    assert_eq!(table["models"][0]["types"]["random"]["questions"], 8);
    let wrong = duet(&[
        "eval",
        "convert",
        "gqa",
        &file,
        "--images",
        &images,
        "--out",
        &place.at("x"),
    ]);
    assert_eq!(wrong.code, 2);
    assert!(
        wrong.stderr.contains("testdev_balanced_questions.json"),
        "{}",
        wrong.stderr
    );
}

/// A document is what `docs/eval.schema.json` says.
fn conforms(document: &Value) {
    let mut broken = document.clone();
    broken["models"][0]["all"]["accuracy"]["value"] = json!("much");
    broken["models"][0]["more"] = json!(1);
    broken.as_object_mut().expect("an object").remove("pairs");
    schema::conforms("docs/eval.schema.json", document, &broken, 3);
}
