//! `logits: last`: one row of logits, the numbers of which are those of the last row of all; caches as they were.

#[macro_use]
mod support;

use duet_onnx::arch::Vlm;
use duet_onnx::passes::{Recipe, rewrite};
use duet_onnx::validate::scenario::standard;
use duet_onnx::validate::{Options, check};

use support::conversation::{Transcript, hold, text_only};
use support::models::{
    MERGE, Pool, fixture, numbers, options, parts_at, recipe, recipe_text, rewritten, runtime,
    sizes,
};

const FALL: &str = "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 6, keep: 0.25}]}";

fn text(settings: &str) -> String {
    recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], settings)
}

/// Every step of every conversation: images, several, none, padding, further turns.
fn on_fixture(name: &str) {
    runtime();
    let base = fixture(name);
    let (edge, width) = sizes(&base);
    let mut pool = Pool::default();
    let all = pool.open(&rewritten(&base, &text("logits: all")));
    let last = pool.open(&rewritten(&base, &text("logits: last")));
    let mut scenarios = standard(400, 23);
    scenarios.extend(text_only(400));
    if edge > 200 {
        scenarios.truncate(2);
    }
    let mut cut = 0;
    for scenario in &scenarios {
        let want: Transcript = hold(&all, scenario, edge, width);
        let found = hold(&last, scenario, edge, width);
        for (number, (want, found)) in want.steps.iter().zip(&found.steps).enumerate() {
            let place = format!("{name}, {}, step {number}", scenario.name);
            let (shape, rows) = &want.logits;
            let (batch, tokens, vocabulary) = (shape[0], shape[1], shape[2]);
            assert_eq!(found.logits.0, [batch, 1, vocabulary], "{place}: logits");
            cut += usize::from(tokens > 1);
            let wanted = rows
                .chunks_exact(tokens * vocabulary)
                .flat_map(|row| &row[(tokens - 1) * vocabulary..]);
            let apart = wanted
                .zip(&found.logits.1)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            // Logits have a standard deviation of about 3.
            assert!(apart < 1e-4, "{place}: logits differ by {apart}");
            assert_eq!(want.kept, found.kept, "{place}: kept tokens");
            for (a, b) in want.caches.iter().zip(&found.caches) {
                assert!(numbers(a) == numbers(b), "{place}: a cache");
            }
        }
    }
    // Transformers' dynamo exports give all rows, like the others.
    assert!(cut > 0, "{name}: no step had several rows");
}

on_every_fixture!(on_fixture);

fn valid(name: &str, base: &Vlm, settings: &str) {
    runtime();
    let text = text(settings);
    let changed = rewritten(base, &text);
    let options = Options {
        session: options(),
        seed: 9,
    };
    let report = check(base, &changed, &recipe(&text), &options, &mut |_| ());
    let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
    let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
    assert!(report.passed(), "{name}: {failed:#?}");
}

/// Branches, two files, half precision, attention that holds its cache, sums fused with norms, padded caches.
#[test]
fn forms_are_valid() {
    for (name, settings) in [
        ("if-ts-eager-mha", "logits: last"),
        ("split-ts-sdpa-gqa", "logits: last"),
        ("fp16-ts-sdpa-mha", "logits: last"),
        ("genai-fp32-gqa", "logits: last"),
        ("genai09-mha-mha", "kv: padded\nlogits: last"),
    ] {
        let form = support::forms::form(name);
        valid(name, &parts_at(&form.directory()), settings);
    }
}

/// Alone, without any pass: of the unmodified decoder only what is behind the last attention changes.
#[test]
fn it_needs_no_pass() {
    runtime();
    let base = fixture("ts-sdpa-gqa");
    let done = rewrite(base, &recipe("version: 1\nlogits: last\n")).expect("a rewrite");
    let inserted: Vec<_> = done.changes.iter().map(|c| (c.pass, c.inserted)).collect();
    assert_eq!(inserted, [("last_logits", 1)]);
}

#[test]
fn the_flag_adds_to_the_recipe() {
    let added = |text: &str| {
        let recipe = Recipe::parse(text).expect("a recipe");
        recipe.with_last_logits().map(|r| r.text)
    };
    assert_eq!(
        added("version: 1\npasses: []\n").expect("a recipe"),
        "version: 1\npasses: []\nlogits: last\n"
    );
    let twice = added("version: 1\nlogits: last").expect("a recipe");
    assert_eq!(twice, "version: 1\nlogits: last");
    let error = added("version: 1\nlogits: all\n").unwrap_err().to_string();
    assert!(error.contains("logits: all"), "{error}");
    let error = added("{version: 1}").unwrap_err().to_string();
    assert!(error.contains("braces"), "{error}");
}

#[test]
fn without_a_decoder_it_is_refused() {
    let mut base = fixture("ts-sdpa-gqa");
    base.parts
        .retain(|p| p.file.ends_with("vision_encoder.onnx"));
    let error = rewrite(base, &recipe("version: 1\nlogits: last\n")).unwrap_err();
    assert!(error.to_string().contains("no decoder"), "{error}");
}
