//! `ratio_base: current` on models other than Qwen's: against the layer-exact reference, with padding, grouped keys, further
//! turns and discarded tokens that leave in the decoder. (Against PyTorch: `qwen_vl.rs`.)

#[macro_use]
mod support;

use duet_onnx::passes::VisualPrune;
use duet_onnx::validate::scenario::standard;

use support::conversation::{apart, hold};
use support::models::{Pool, parts_at, recipe, rewritten, root, sizes};
use support::reports::{failures, validated};

fn prune(more: &str) -> String {
    format!(
        "visual_prune: {{drops: [{{after_layer: 1, keep: 0.7}}, {{after_layer: 3, keep: 0.5}}, \
         {{after_layer: 6, keep: 0.25}}]{more}}}"
    )
}

#[test]
fn every_form_drops_what_the_reference_drops() {
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
        let new = rewritten(&base, &text);
        let report = validated(&base, &new, &text, 5);
        assert!(report.passed(), "{fixture}: {:#?}", failures(&report));
        // Another schedule than the stamped one is told from it.
        let other = text.replace(", ratio_base: current", "");
        assert!(!validated(&base, &new, &other, 5).passed(), "{fixture}");
    }
}

/// What `layers` layers see of so many tokens.
fn seen(text: &str, entered: i64, layers: usize) -> Vec<i64> {
    let recipe = recipe(text);
    let prune = recipe.pass::<VisualPrune>().expect("a schedule");
    prune.tokens_per_layer(entered, layers)
}

/// With one drop point both mean the same: the same tokens stay, and the same logits come out.
#[test]
fn one_drop_is_the_methods() {
    let base = parts_at(&root().join("models/llava/fixtures/ts-sdpa-mha"));
    let (edge, width) = sizes(&base);
    let mut pool = Pool::default();
    let [entered, current] = ["", ", ratio_base: current"].map(|more| {
        let text = format!(
            "version: 1\npasses: [{{visual_prune: {{drops: [{{after_layer: 2, keep: 0.3}}]{more}}}}}]"
        );
        assert_eq!(seen(&text, 81, 4), [81, 81, 24, 24]);
        pool.open(&rewritten(&base, &text))
    });
    for scenario in standard(400, 11) {
        let want = hold(&entered, &scenario, edge, width);
        let found = hold(&current, &scenario, edge, width);
        let apart = apart(&want, &found);
        assert!(apart <= 1e-5, "{}: {apart:.1e}", scenario.name);
    }
}

/// What a layer sees with the public code's ratios: 37.5 % for [0.5, 0.25], a quarter for [0.5, 0].
#[test]
fn what_layers_see_is_counted() {
    let seen = |drops: &str| {
        let text = format!(
            "version: 1\npasses: [{{visual_prune: {{drops: [{drops}], ratio_base: current}}}}]"
        );
        seen(&text, 640, 4)
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
