//! `duet eval`: models asked about images and a clip, runs that are cut off and go on, parts that are put together,
//! answers of others, and what is refused.

mod commands;

use std::collections::BTreeMap;

use commands::{BOTH, Place, Ran, duet, runtime, source, text};
use serde_json::{Value, json};

const MODEL: &str = "models/llava/fixtures/ts-sdpa-gqa";

/// A place with a rewritten model (`out`) and a data set (`set`): three pictures, two questions each, and one without
/// a picture.
fn place() -> Place {
    runtime();
    let place = Place::new(BOTH);
    let model = source(MODEL);
    let out = place.at("out");
    let recipe = place.at("recipe.yaml");
    let ran = duet(&["rewrite", text(&model), "--recipe", &recipe, "--out", &out]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let street = image::open(source("models/llava/images/street.png")).expect("a picture");
    for (name, picture) in [
        ("1.png", street.crop_imm(0, 0, 200, 150)),
        ("2.png", street.crop_imm(150, 100, 200, 150)),
    ] {
        std::fs::create_dir_all(place.path("set/images")).expect("made");
        picture
            .save(place.path(&format!("set/images/{name}")))
            .expect("saved");
    }
    place.put(
        &source("models/llava/images/shapes.png"),
        "set/images/3.png",
    );
    place.write(
        "set/dataset.json",
        br#"{"schema_version": 1, "name": "three", "prompt": "{question}", "max_new_tokens": 3}"#,
    );
    let mut lines = Vec::new();
    for picture in 1..=3 {
        for (kind, asked) in [("what", "What is it?"), ("where", "Where is the house?")] {
            lines.push(json!({
                "id": format!("{picture}-{kind}"),
                "image": format!("images/{picture}.png"),
                "question": asked,
                "answer": "a house",
                "type": kind,
                "seed": picture,
            }));
        }
    }
    lines.push(
        json!({ "id": "none", "question": "What is it?", "answer": "nothing", "type": "what" }),
    );
    place.write("set/questions.jsonl", jsonl(&lines).as_bytes());
    place
}

fn jsonl(lines: &[Value]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// `eval` of the unmodified and the rewritten model.
fn eval(place: &Place, more: &[&str]) -> Ran {
    let model = source(MODEL);
    let (out, set) = (place.at("out"), place.at("set"));
    let mut all = vec![
        "eval",
        text(&model),
        &out,
        "--dataset",
        &set,
        "--threads",
        "1",
    ];
    all.extend(more);
    duet(&all)
}

/// Answers of a file by id.
fn answers(place: &Place, file: &str) -> BTreeMap<String, Value> {
    let text = std::fs::read_to_string(place.path(file)).expect("answers");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines
        .filter(|line| line["format"].is_null())
        .map(|line| (line["id"].as_str().expect("an id").to_owned(), line))
        .collect()
}

#[test]
fn models_are_asked_what_duet_run_asks_them() {
    let place = place();
    let answered = place.at("answers");
    let table = eval(&place, &["--out", &answered, "--json"]).json();
    let [base, new] = [&table["models"][0], &table["models"][1]];
    assert_eq!(
        (&base["name"], &new["name"]),
        (&json!("ts-sdpa-gqa"), &json!("out"))
    );
    assert_eq!(table["dataset"]["questions"], 7);
    assert_eq!(table["dataset"]["images"], 4);
    // 81 patches in each of 8 layers; 36 of them in three, 18 in two, none in three.
    assert_eq!(base["visual_tokens"]["by_layer_average"], 81.0);
    assert_eq!(new["visual_tokens"]["entering"], 36.0);
    assert_eq!(new["visual_tokens"]["by_layer_average"], 18.0);
    let reduction = new["visual_tokens"]["reduction"]
        .as_f64()
        .expect("a number");
    assert!((reduction - 63.0 / 81.0).abs() < 1e-12);
    assert_eq!(
        (&base["all"]["kept"], &base["all"]["agreement"]),
        (&Value::Null, &Value::Null)
    );
    // Weights are random: no answer is right, and there is nothing to keep.
    assert_eq!(new["all"]["accuracy"]["value"], 0.0);
    assert_eq!(new["all"]["kept"], Value::Null);
    assert_eq!(new["types"]["where"]["questions"], 3);

    // Every answer, although the encoder ran once for both questions of a picture.
    let model = source(MODEL);
    for (path, file) in [
        (text(&model).to_owned(), "ts-sdpa-gqa"),
        (place.at("out"), "out"),
    ] {
        let found = answers(&place, &format!("answers/{file}.jsonl"));
        assert_eq!(found.len(), 7);
        for (id, answer) in found {
            let (picture, kind) = id.split_once('-').unwrap_or(("", "what"));
            let asked = if kind == "what" {
                "What is it?"
            } else {
                "Where is the house?"
            };
            let picture = place.at(&format!("set/images/{picture}.png"));
            let mut run = vec!["run", &path, "--prompt", asked, "--max-new-tokens", "3"];
            run.extend(["--threads", "1", "--json"]);
            if id != "none" {
                run.extend(["--image", &picture]);
            }
            let alone = duet(&run).json();
            assert_eq!(alone["tokens"], answer["tokens"], "{file}, {id}");
            let said = alone["text"].as_str().expect("a text").trim().to_owned();
            assert_eq!(json!(said), answer["answer"], "{file}, {id}");
        }
    }
    // The table is in the files as well.
    let written: Value =
        serde_json::from_slice(&std::fs::read(place.path("answers/table.json")).expect("a table"))
            .expect("JSON");
    assert_eq!(written, table);
    let markdown = std::fs::read_to_string(place.path("answers/table.md")).expect("a table");
    let shown = eval(&place, &["--out", &answered, "--format", "markdown"]);
    assert_eq!(
        (shown.code, &shown.stdout),
        (0, &markdown),
        "{}",
        shown.stderr
    );
    assert!(
        markdown.contains("| out | 18.00 | 77.8 % | 0.0 % ["),
        "{markdown}"
    );
    let shown = eval(&place, &["--out", &answered]);
    assert!(shown.stdout.contains("18.00"), "{}", shown.stdout);
    assert!(
        shown.stderr.contains("out: 7 answers are there already"),
        "{}",
        shown.stderr
    );
}

#[test]
fn a_run_that_was_cut_off_goes_on() {
    let place = place();
    let answered = place.at("answers");
    let first = eval(&place, &["--out", &answered, "--json", "--limit", "4"]).json();
    assert_eq!(first["dataset"]["questions"], 4);
    // As a kill leaves it: two answers and the start of a third. One is marked, to see that it is not asked again.
    let file = place.path("answers/out.jsonl");
    let whole = std::fs::read_to_string(&file).expect("answers");
    let lines: Vec<&str> = whole.lines().collect();
    let mut marked: Value = serde_json::from_str(lines[1]).expect("JSON");
    let (id, was) = (marked["id"].clone(), marked["answer"].clone());
    marked["answer"] = json!("a house");
    let cut = format!("{}\n{marked}\n{}\n{}", lines[0], lines[2], &lines[3][..20]);
    std::fs::write(&file, &cut).expect("written");
    let second = eval(&place, &["--out", &answered, "--json"]).json();
    assert_eq!(second["dataset"]["questions"], 7);
    let found = answers(&place, "answers/out.jsonl");
    assert_eq!(found.len(), 7);
    assert_ne!(was, json!("a house"));
    assert_eq!(found[id.as_str().expect("an id")]["answer"], "a house");
    // Only the marked one is "right".
    let right = second["models"][1]["all"]["accuracy"]["value"]
        .as_f64()
        .expect("a number");
    assert!((right - 1.0 / 7.0).abs() < 1e-12, "{right}");

    // Answers of another setting, set or model are not taken for these.
    let other = eval(&place, &["--out", &answered, "--max-new-tokens", "2"]);
    assert_eq!(other.code, 2);
    assert!(
        other.stderr.contains("at most 3 there and 2 now"),
        "{}",
        other.stderr
    );
    let config = place.path("out/generation_config.json");
    let before = std::fs::read_to_string(&config).expect("a config");
    std::fs::write(&config, format!("{before}\n")).expect("written");
    let other = eval(&place, &["--out", &answered]);
    assert_eq!(other.code, 2);
    assert!(
        other.stderr.contains("out.jsonl") && other.stderr.contains("the model's files"),
        "{}",
        other.stderr
    );
    std::fs::write(&config, before).expect("written");
    place.put(
        &source("models/llava/images/shapes.png"),
        "set/images/1.png",
    );
    let other = eval(&place, &["--out", &answered]);
    assert_eq!(other.code, 2);
    assert!(
        other.stderr.contains("the data set has the digest"),
        "{}",
        other.stderr
    );
}

#[test]
fn parts_give_what_the_whole_gives() {
    let place = place();
    let whole = eval(&place, &["--json"]).json();
    let (a, b) = (place.at("a"), place.at("b"));
    for (part, out) in [("1/3", &a), ("2/3", &a), ("3/3", &b)] {
        let ran = eval(&place, &["--shard", part, "--out", out]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let set = place.at("set");
    let merge = |parts: &[&str], more: &[&str]| {
        let all = [&["eval", "merge"], parts, &["--dataset", &set], more].concat();
        duet(&all)
    };
    let together = place.at("together");
    let ran = merge(&[&a, &b], &["--json", "--out", &together]);
    let mut merged = ran.json();
    let mut expected = whole;
    for table in [&mut merged, &mut expected] {
        for model in table["models"].as_array_mut().expect("models") {
            model["seconds_per_question"] = Value::Null;
        }
    }
    assert_eq!(merged, expected);
    // What was put together is a run's: nothing is left to ask.
    let again = eval(&place, &["--out", &together]);
    assert!(
        again
            .stderr
            .contains("ts-sdpa-gqa: 7 answers are there already"),
        "{}",
        again.stderr
    );

    let missing = merge(&[&a], &[]);
    assert_eq!(missing.code, 2);
    assert!(
        missing.stderr.contains("part 3/3 is not there"),
        "{}",
        missing.stderr
    );
    let twice = merge(&[&a, &b, &place.at("a/out.2-of-3.jsonl")], &[]);
    assert_eq!(twice.code, 2);
    let says = twice.stderr.contains("out.2-of-3.jsonl and in")
        && twice.stderr.contains("give each part once");
    assert!(says, "{}", twice.stderr);
    // A part that was ended early.
    let file = place.path("b/out.3-of-3.jsonl");
    let text = std::fs::read_to_string(&file).expect("answers");
    let lines: Vec<&str> = text.lines().collect();
    std::fs::write(&file, format!("{}\n{}\n", lines[0], lines[1])).expect("written");
    let early = merge(&[&a, &b], &[]);
    assert!(
        early.stderr.contains("part 3/3 (") && early.stderr.contains("is not finished"),
        "{}",
        early.stderr
    );
}

#[test]
fn answers_of_another_program_are_compared_question_by_question() {
    let place = place();
    let answered = place.at("answers");
    assert_eq!(eval(&place, &["--out", &answered]).code, 0);
    let lines: Vec<Value> = answers(&place, "answers/ts-sdpa-gqa.jsonl")
        .into_iter()
        .map(|(id, answer)| {
            let said = if id == "2-what" {
                json!("a house")
            } else {
                answer["answer"].clone()
            };
            json!({ "id": id, "answer": said })
        })
        .collect();
    place.write("torch.jsonl", jsonl(&lines).as_bytes());
    let torch = place.at("torch.jsonl");
    let ran = eval(&place, &["--out", &answered, "--answers", &torch, "--json"]);
    let table = ran.json();
    let other = &table["models"][2];
    assert_eq!(
        (&other["name"], &other["visual_tokens"]),
        (&json!("torch"), &Value::Null)
    );
    let agreement = other["all"]["agreement"].as_f64().expect("a number");
    assert!((agreement - 6.0 / 7.0).abs() < 1e-12);

    // As a check: 6 of 7 is not all, and no model alone is compared with itself.
    let model = source(MODEL);
    let set = place.at("set");
    let check = |share: &str, more: &[&str]| {
        let mut all = vec![
            "eval",
            text(&model),
            "--dataset",
            &set,
            "--answers",
            &torch,
            "--threads",
            "1",
        ];
        all.extend(["--require-agreement", share]);
        all.extend(more);
        duet(&all)
    };
    let failed = check("100%", &[]);
    assert_eq!(failed.code, 1);
    assert!(
        failed
            .stderr
            .contains("torch: same answers 85.71 %, required 100.00 %"),
        "{}",
        failed.stderr
    );
    assert_eq!(check("85%", &[]).code, 0);
    // Nothing was right, so that nothing can be said of what is kept.
    let failed = check("0", &["--require-kept", "99%"]);
    assert_eq!(failed.code, 1);
    assert!(
        failed.stderr.contains("accuracy kept not known"),
        "{}",
        failed.stderr
    );

    // Answers alone need no model, and all questions have to be answered, no others.
    let alone = duet(&["eval", "--dataset", &set, "--answers", &torch, "--json"]).json();
    assert!(
        (alone["models"][0]["all"]["accuracy"]["value"]
            .as_f64()
            .expect("a number")
            - 1.0 / 7.0)
            .abs()
            < 1e-12
    );
    place.write("torch.jsonl", jsonl(&lines[1..]).as_bytes());
    let few = duet(&["eval", "--dataset", &set, "--answers", &torch]);
    assert_eq!(few.code, 2);
    assert!(
        few.stderr.contains("torch: no answer to question 1-what"),
        "{}",
        few.stderr
    );
    place.write("torch.jsonl", br#"{"id": "17", "answer": "a house"}"#);
    let more = duet(&["eval", "--dataset", &set, "--answers", &torch]);
    assert!(
        more.stderr.contains("question 17 is none of"),
        "{}",
        more.stderr
    );
}

/// What `--beside` wrote lies in the same directory as what it was made of.
#[test]
fn variants_of_a_directory_are_compared() {
    let place = place();
    place.configs("both");
    place.graphs("ts-sdpa-gqa", "both");
    let ran = place.rewrite("both", &["--beside", "duet"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let (both, set) = (place.at("both"), place.at("set"));
    let mut arguments = vec![
        "eval",
        &both,
        &both,
        "--dataset",
        &set,
        "--threads",
        "1",
        "--json",
    ];
    arguments.extend(["--variant", "default", "--variant", "duet"]);
    let table = duet(&arguments).json();
    assert_eq!(table["models"][0]["name"], "both-default");
    assert_eq!(table["models"][1]["name"], "both-duet");
    let apart = eval(&place, &["--json"]).json();
    for model in 0..2 {
        for key in ["visual_tokens", "all", "types"] {
            assert_eq!(
                table["models"][model][key], apart["models"][model][key],
                "{key}"
            );
        }
    }
    arguments.extend(["--variant", "duet"]);
    let ran = duet(&arguments);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr
            .contains("--variant is given 3 times for 2 models"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_model_that_fails_names_the_question_and_keeps_the_answers_so_far() {
    let place = place();
    place.write("set/images/2.png", b"no picture at all");
    let answered = place.at("answers");
    let ran = eval(&place, &["--out", &answered]);
    assert_eq!(ran.code, 2);
    let says =
        ran.stderr.contains("ts-sdpa-gqa, question 2-what: image") && ran.stderr.contains("2.png");
    assert!(says, "{}", ran.stderr);
    let found: Vec<String> = answers(&place, "answers/ts-sdpa-gqa.jsonl")
        .into_keys()
        .collect();
    assert_eq!(found, ["1-what", "1-where"]);
}

#[test]
fn bad_data_sets_and_arguments_are_refused_before_anything_runs() {
    let place = place();
    let answered = place.at("answers");
    let lines = std::fs::read_to_string(place.path("set/questions.jsonl")).expect("questions");
    place.write(
        "set/questions.jsonl",
        lines.replace("images/3.png", "images/4.png").as_bytes(),
    );
    let ran = eval(&place, &["--out", &answered]);
    assert_eq!(ran.code, 2);
    let says = ran.stderr.contains("questions.jsonl:5: ") && ran.stderr.contains("4.png");
    assert!(says, "{}", ran.stderr);
    assert!(!place.path("answers").exists());
    place.write("set/questions.jsonl", lines.as_bytes());
    for (arguments, says) in [
        (vec!["--shard", "1/2"], "--out"),
        (vec!["--shard", "3/2", "--out", &answered], "expected i/n"),
        (vec!["--variant", "q4"], "no file of variant 'q4'"),
        (vec!["--require-kept", "much"], "expected 99%"),
        (vec!["--max-new-tokens", "0"], "0"),
        (vec!["--answers", "nowhere.jsonl"], "nowhere.jsonl"),
    ] {
        let ran = eval(&place, &arguments);
        assert_eq!(ran.code, 2, "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(says), "{arguments:?}: {}", ran.stderr);
    }
    assert_eq!(duet(&["eval"]).code, 2);
    let model = source(MODEL);
    let none = duet(&["eval", text(&model), "--dataset", &place.at("nowhere")]);
    assert_eq!(none.code, 2);
    assert!(none.stderr.contains("no such directory"), "{}", none.stderr);
}

/// A clip and a picture, with a model that sees both; and a picture, with a model that sees clips in no way.
#[test]
fn clips_are_asked_about() {
    runtime();
    let place = Place::new(BOTH);
    place.put(
        &source("models/video_llava/images/ball.gif"),
        "set/clips/ball.gif",
    );
    place.put(&source("models/llava/images/street.png"), "set/street.png");
    place.write(
        "set/dataset.json",
        br#"{"schema_version": 1, "max_new_tokens": 3}"#,
    );
    let lines = [
        json!({ "id": "c", "video": "clips/ball.gif", "question": "What happens?", "answer": "a ball" }),
        json!({ "id": "p", "image": "street.png", "question": "What is it?", "answer": "a street" }),
    ];
    place.write("set/questions.jsonl", jsonl(&lines).as_bytes());
    let (set, answered) = (place.at("set"), place.at("answers"));
    let model = source("models/video_llava/fixtures/ts-sdpa");
    let arguments = [
        "--dataset",
        &set,
        "--out",
        &answered,
        "--threads",
        "1",
        "--json",
    ];
    let table = duet(&[&["eval", text(&model)], &arguments[..]].concat()).json();
    assert_eq!(table["dataset"]["images"], 2);
    let found = answers(&place, "answers/ts-sdpa.jsonl");
    // 8 frames of 82 tokens (CLS counted), one picture of 81.
    assert_eq!(
        (&found["c"]["visual_tokens"], &found["p"]["visual_tokens"]),
        (&json!(656), &json!(81))
    );
    let clip = place.at("set/clips/ball.gif");
    let alone = [
        "run",
        text(&model),
        "--video",
        &clip,
        "--prompt",
        "What happens?",
    ];
    let alone = duet(
        &[
            &alone[..],
            &["--max-new-tokens", "3", "--threads", "1", "--json"],
        ]
        .concat(),
    )
    .json();
    assert_eq!(alone["tokens"], found["c"]["tokens"]);

    let plain = source(MODEL);
    let ran = duet(&["eval", text(&plain), "--dataset", &set, "--threads", "1"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.stderr.contains("ts-sdpa-gqa, question c: "),
        "{}",
        ran.stderr
    );
}
