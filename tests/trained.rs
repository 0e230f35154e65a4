//! The trained model: how much accuracy the recipes made for it keep, and that ONNX Runtime answers what the PyTorch
//! implementation of the method answers.

mod commands;

use commands::{BOTH, Place, duet, runtime, source, text};

const MODEL: &str = "models/vqa/llava";
const TEST: &str = "models/vqa/test";
/// Recipes, and the least share of accuracy that they keep of these questions.
const RECIPES: [(&str, f64); 3] = [("tiles-65", 0.96), ("tiles-43", 0.94), ("tiles-21", 0.92)];
/// Questions: a slice of the test set, whole pictures.
const QUESTIONS: &str = "240";

/// Runs `duet eval` on a slice of the test set.
fn eval(models: &[&str], rest: &[&str]) -> serde_json::Value {
    runtime();
    let test = source(TEST);
    let mut all = vec!["eval"];
    all.extend(models);
    all.extend(["--dataset", text(&test), "--limit", QUESTIONS]);
    all.extend(["--threads", "2", "--resamples", "200", "--json"]);
    all.extend(rest);
    duet(&all).json()
}

fn value(row: &serde_json::Value, what: &str) -> f64 {
    row["all"][what]["value"].as_f64().expect("a number")
}

#[test]
fn most_of_the_accuracy_is_kept_on_few_tokens() {
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
    let mut models = vec![text(&base)];
    models.extend(rewritten.iter().map(|p| text(p)));
    let table = eval(&models, &[]);
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
    let answers = |name: &str| source("models/vqa/answers").join(format!("torch-{name}.jsonl"));
    for (model, name) in models
        .iter()
        .zip(["llava", "tiles-65", "tiles-43", "tiles-21"])
    {
        let torch = answers(name);
        let compared = eval(&[model], &["--answers", text(&torch)]);
        let same = compared["models"][1]["all"]["agreement"].as_f64();
        assert_eq!(same, Some(1.0), "{name}: PyTorch answers otherwise");
    }
}
