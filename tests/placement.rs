//! `token_merge: placement: decoder`: as many features as before come out of the vision encoder, and the
//! decoder drops the discarded ones behind its first layer.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

#[macro_use]
mod support;

use duet_onnx::arch::Vlm;
use duet_onnx::validate::{Options, Report, check};

use support::forms;
use support::models::{fixture, options, parts_at, recipe, recipe_text, rewritten, runtime};

const MERGE: &str = "{dominant: 30, contextual: 6, placement: decoder}";
const UNIFORM: &str = "{dominant: 0.3, contextual: 9, selector: uniform, placement: decoder}";
const LOCAL: &str = "{dominant: 24, contextual: 5, selector: local, cls: drop, placement: decoder}";
const FALL: &str = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";
/// The first drop is where discarded features leave.
const AT_ONCE: &str =
    "{drops: [{after_layer: 1, keep: 0.6}, {after_layer: 3, keep: 0.3}], text: last}";
const KEEP: &str =
    "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 4, keep: 0.2}], positions: keep}";

/// The merge alone with every selector, and both passes.
fn recipes() -> Vec<String> {
    let merge = |m| ("token_merge", m);
    let prune = |p| ("visual_prune", p);
    vec![
        recipe_text(&[merge(MERGE)], ""),
        recipe_text(&[merge(UNIFORM), prune(FALL)], ""),
        recipe_text(&[merge(LOCAL), prune(AT_ONCE)], ""),
        recipe_text(&[merge(MERGE), prune(KEEP)], ""),
    ]
}

fn validated(base: &Vlm, changed: &Vlm, text: &str) -> Report {
    runtime();
    let options = Options {
        session: options(),
        seed: 4,
    };
    let report = check(base, changed, &recipe(text), &options, &mut |_| ());
    report.unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn failures(report: &Report) -> Vec<String> {
    let failed = report.findings.iter().filter(|f| !f.passed);
    failed
        .map(|f| format!("{}: {}", f.check, f.detail))
        .collect()
}

fn valid(name: &str, base: &Vlm, recipes: &[String]) {
    let mut problems = Vec::new();
    for text in recipes {
        let report = validated(base, &rewritten(base, text), text);
        println!(
            "{name}: {} findings, logits within {:.1e}, features within {:.1e}",
            report.findings.len(),
            report.worst_logits,
            report.worst_features
        );
        if !report.passed() {
            problems.push(format!("{text}\n{:#?}", failures(&report)));
        }
        let says = |what: &str| report.findings.iter().any(|f| f.check.contains(what));
        for what in ["one image", "tract: discarded tokens"] {
            assert!(says(what), "{name}: nothing was said about '{what}'");
        }
    }
    assert!(problems.is_empty(), "{name}:\n{}", problems.join("\n"));
}

fn rewritten_models_are_valid(name: &str) {
    valid(name, &fixture(name), &recipes());
}

on_every_fixture!(rewritten_models_are_valid);

/// Packed forms: GroupQueryAttention, MultiHeadAttention, half precision, quantised, towers of other kinds.
fn form_is_valid(name: &str) {
    let form = forms::form(name);
    let base = parts_at(&form.directory());
    valid(name, &base, &recipes()[..2]);
}

macro_rules! forms_are_valid {
    ($($test:ident),* $(,)?) => {
        mod forms_are_valid {
            $(#[test]
            fn $test() {
                super::form_is_valid(&stringify!($test).replace('_', "-"));
            })*
        }
    };
}

forms_are_valid!(
    genaivlm_fp32_gqa,
    genai_fp32_mha,
    fp16_ts_sdpa_mha,
    int8_ts_eager_gqa,
    if_ts_eager_mha,
    split_ts_sdpa_gqa,
);
