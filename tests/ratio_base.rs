//! `ratio_base: current` on models other than Qwen's: against the layer-exact reference, with padding, grouped keys, further
//! turns and discarded tokens that leave in the decoder. (Against PyTorch: `qwen_vl.rs`.)

mod commands;
#[macro_use]
mod support;

use duet_onnx::validate::{Options, check};

use support::models::{parts_at, recipe, rewritten, root};

fn prune(more: &str) -> String {
    format!(
        "visual_prune: {{drops: [{{after_layer: 1, keep: 0.7}}, {{after_layer: 3, keep: 0.5}}, \
         {{after_layer: 6, keep: 0.25}}]{more}}}"
    )
}

#[test]
fn every_form_drops_what_the_reference_drops() {
    commands::runtime();
    let current = prune(", ratio_base: current");
    for (fixture, text) in [
        (
            "ts-eager-gqa",
            format!("version: 1\npasses: [{{{current}}}]"),
        ),
        (
            "dynamo18-mha",
            format!(
                "version: 1\npasses: [{{token_merge: {{dominant: 30, contextual: 5}}}}, {{{}}}]",
                prune(", ratio_base: current, text: salient, positions: keep")
            ),
        ),
        (
            "dynamo23-gqa",
            format!(
                "version: 1\npasses: [{{token_merge: {{dominant: 30, contextual: 5, placement: decoder}}}}, {{{current}}}]"
            ),
        ),
    ] {
        let base = parts_at(&root().join("models/llava/fixtures").join(fixture));
        let options = Options {
            session: support::models::options(),
            seed: 5,
        };
        let new = rewritten(&base, &text);
        let report = check(&base, &new, &recipe(&text), &options, &mut |_| ());
        let report = report.unwrap_or_else(|e| panic!("{fixture}: {e}"));
        assert!(report.passed(), "{fixture}: {report:?}");
        // Another schedule than the stamped one is told from it.
        let other = text.replace(", ratio_base: current", "");
        let report = check(&base, &new, &recipe(&other), &options, &mut |_| ());
        assert!(!report.expect("a report").passed(), "{fixture}");
    }
}

/// With one drop point both mean the same, to the byte.
#[test]
fn one_drop_is_the_methods() {
    let base = parts_at(&root().join("models/llava/fixtures/ts-sdpa-mha"));
    let kept = |more: &str| {
        let text = format!(
            "version: 1\npasses: [{{visual_prune: {{drops: [{{after_layer: 2, keep: 0.3}}]{more}}}}}]"
        );
        let done = recipe(&text);
        let prune = done
            .pass::<duet_onnx::passes::VisualPrune>()
            .expect("a schedule");
        (prune.tokens_per_layer(81, 4), rewritten(&base, &text))
    };
    let ((a, _), (b, _)) = (kept(""), kept(", ratio_base: current"));
    assert_eq!((&a, &a), (&b, &vec![81, 81, 24, 24]));
}

/// What a layer sees with the public code's ratios: 37.5 % for [0.5, 0.25], a quarter for [0.5, 0].
#[test]
fn what_layers_see_is_counted() {
    let seen = |drops: &str| {
        let text = format!(
            "version: 1\npasses: [{{visual_prune: {{drops: [{drops}], ratio_base: current}}}}]"
        );
        let done = recipe(&text);
        let prune = done
            .pass::<duet_onnx::passes::VisualPrune>()
            .expect("a schedule");
        prune.tokens_per_layer(640, 4)
    };
    let half = "{after_layer: 1, keep: 0.5}";
    assert_eq!(
        seen(&format!("{half}, {{after_layer: 2, keep: 0.25}}")),
        [640, 320, 240, 240]
    );
    assert_eq!(
        seen(&format!("{half}, {{after_layer: 3, keep: 0.0}}")),
        [640, 320, 320, 160]
    );
}
