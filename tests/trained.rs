//! The trained models: how much accuracy the recipes made for them keep, and that ONNX Runtime answers what the PyTorch
//! implementation of the method answers.

mod commands;

use std::collections::HashMap;
use std::path::Path;

use commands::{BOTH, Place, duet, runtime, source, text};

/// A trained model, its questions (a slice of the test set, whole pictures or clips) and, of each recipe made for it, the
/// least share of accuracy that it keeps and the visual tokens of a layer.
struct Trained {
    model: &'static str,
    test: &'static str,
    questions: &'static str,
    recipes: &'static [(&'static str, f64, f64)],
}

const PICTURES: Trained = Trained {
    model: "llava",
    test: "models/vqa/test",
    questions: "240",
    recipes: &[
        ("tiles-65", 0.97, 65.0),
        ("tiles-43", 0.97, 43.25),
        ("tiles-21", 0.96, 21.25),
    ],
};

const CLIPS: Trained = Trained {
    model: "film",
    test: "models/vqa/test-clips",
    questions: "120",
    recipes: &[("clips-188", 0.98, 188.0), ("clips-26", 0.75, 26.0)],
};

fn value(row: &serde_json::Value, what: &str) -> f64 {
    row["all"][what]["value"].as_f64().expect("a number")
}

#[test]
fn most_of_the_accuracy_is_kept_on_few_tokens() {
    keeps(&PICTURES);
}

#[test]
fn most_of_the_accuracy_is_kept_on_few_tokens_of_clips() {
    keeps(&CLIPS);
}

#[track_caller]
fn keeps(trained: &Trained) {
    runtime();
    let place = Place::new(BOTH);
    let base = source("models/vqa").join(trained.model);
    let rewritten = trained.recipes.iter().map(|(recipe, ..)| {
        let out = place.path(recipe);
        let ran = duet(&[
            "rewrite",
            text(&base),
            "--recipe",
            recipe,
            "--out",
            text(&out),
        ]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        out
    });
    let rewritten: Vec<_> = rewritten.collect();
    let (test, out) = (source(trained.test), place.path("out"));
    let mut all = vec!["eval", text(&base)];
    all.extend(rewritten.iter().map(|p| text(p)));
    all.extend([
        "--dataset",
        text(&test),
        "--limit",
        trained.questions,
        "--out",
        text(&out),
    ]);
    all.extend(["--threads", "2", "--resamples", "200", "--json"]);
    let table = duet(&all).json();
    let rows = table["models"].as_array().expect("models");
    let first = value(&rows[0], "accuracy");
    assert!(
        first >= 0.95,
        "the unmodified model knows its task: {first}"
    );
    for (row, (recipe, least, stated)) in rows[1..].iter().zip(trained.recipes) {
        let kept = value(row, "kept");
        assert!(kept >= *least, "{recipe}: {kept}");
        let tokens = row["visual_tokens"]["by_layer_average"].as_f64();
        assert!(
            (tokens.expect("measured") - stated).abs() < 1e-9,
            "{recipe}: {tokens:?}"
        );
    }

    // What the PyTorch implementation answers, question by question.
    for name in std::iter::once(trained.model).chain(trained.recipes.iter().map(|r| r.0)) {
        let torch = answers(&source("models/vqa/answers").join(format!("torch-{name}.jsonl")));
        let ours = answers(&out.join(format!("{name}.jsonl")));
        assert_eq!(ours.len().to_string(), trained.questions);
        for (id, answer) in ours {
            assert_eq!(
                torch.get(&id),
                Some(&answer),
                "{name}, {id}: PyTorch answers otherwise"
            );
        }
    }
}

/// Answers of a file by the questions' ids.
fn answers(path: &Path) -> HashMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text.lines().map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let of = |key: &str| line[key].as_str().map(str::to_owned);
        of("id").zip(of("answer"))
    });
    lines.flatten().collect()
}
