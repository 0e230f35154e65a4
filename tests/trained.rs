//! The trained model: how much accuracy the recipes made for it keep, and that ONNX Runtime answers what the PyTorch
//! implementation of the method answers.

mod commands;

use std::collections::HashMap;
use std::path::Path;

use commands::{BOTH, Place, duet, runtime, source, text};

const MODEL: &str = "models/vqa/llava";
const TEST: &str = "models/vqa/test";
/// Recipes, and the least share of accuracy that they keep of these questions.
const RECIPES: [(&str, f64); 3] = [("tiles-65", 0.96), ("tiles-43", 0.94), ("tiles-21", 0.92)];
/// Questions: a slice of the test set, whole pictures.
const QUESTIONS: &str = "240";

fn value(row: &serde_json::Value, what: &str) -> f64 {
    row["all"][what]["value"].as_f64().expect("a number")
}

#[test]
fn most_of_the_accuracy_is_kept_on_few_tokens() {
    runtime();
    let place = Place::new(BOTH);
    let base = source(MODEL);
    let rewritten = RECIPES.map(|(recipe, _)| {
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
    let (test, out) = (source(TEST), place.path("out"));
    let mut all = vec!["eval", text(&base)];
    all.extend(rewritten.iter().map(|p| text(p)));
    all.extend([
        "--dataset",
        text(&test),
        "--limit",
        QUESTIONS,
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
    for (row, (recipe, least)) in rows[1..].iter().zip(RECIPES) {
        let kept = value(row, "kept");
        assert!(kept >= least, "{recipe}: {kept}");
        let tokens = row["visual_tokens"]["by_layer_average"].as_f64();
        let stated: f64 = match recipe {
            "tiles-65" => 65.0,
            "tiles-43" => 43.25,
            _ => 21.25,
        };
        assert!(
            (tokens.expect("measured") - stated).abs() < 1e-9,
            "{recipe}: {tokens:?}"
        );
    }

    // What the PyTorch implementation answers, question by question.
    for name in ["llava", "tiles-65", "tiles-43", "tiles-21"] {
        let torch = answers(&source("models/vqa/answers").join(format!("torch-{name}.jsonl")));
        let ours = answers(&out.join(format!("{name}.jsonl")));
        assert_eq!(ours.len().to_string(), QUESTIONS);
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
