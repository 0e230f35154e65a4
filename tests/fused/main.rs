//! Attention operators that hold the cache, the rotary embedding or packed projections: the same small
//! decoder, once in plain operators and once fused, has to lose the same tokens and give the same logits.
//! (What plain decoders must give is held against PyTorch elsewhere.)

mod build;
#[path = "../common/mod.rs"]
mod common;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use build::{Form, GROUP, Kind, Numbers, WIDTH, decoder};
use duet_onnx::arch::{Role, Vlm, cache_heads};
use duet_onnx::passes::SALIENT_MASK_INPUT;
use duet_onnx::runtime::{CacheHeads, Decoder, StepInput, Tensor, Value};
use duet_onnx::validate::{Options, check};
use ndarray::{Array2, Array3};
use support::models::{kept_name, open, options, probed, recipe, rewritten};

fn text(positions: &str) -> String {
    format!(
        "version: 1\nmarker: input\npasses:\n  - visual_prune: {{positions: {positions}, drops: \
         [{{after_layer: 1, keep: 0.6}}, {{after_layer: 3, keep: 0.25}}]}}\n"
    )
}

/// What a conversation gives: kept sets, cache lengths and last logits of every step.
type Seen = Vec<(Vec<Vec<i64>>, Vec<usize>, Vec<f32>)>;

fn converse(form: Form, fused: bool, recipe: &str, batch: usize) -> Seen {
    let vlm = rewritten(&decoder(form, fused), recipe);
    let names = [kept_name(1), kept_name(2)];
    let model = probed(&vlm.parts[0].model, &names);
    let session = open(&model, Path::new("decoder"));
    let heads = CacheHeads {
        count: form.key_heads as usize,
        width: form.head_dim as usize,
    };
    let mut run = Decoder::with_heads(session, Some(heads)).expect("a decoder");
    let mut cache = run.empty_cache(batch).expect("an empty cache");
    let mut numbers = Numbers(99);
    let mut seen = Seen::new();
    // A prompt with an image, two steps, and (a batch of one) another prompt.
    let mut turns: Vec<(usize, std::ops::Range<usize>)> = vec![(17, 3..13), (1, 0..0), (1, 0..0)];
    if batch == 1 {
        turns.extend([(9, 1..7), (1, 0..0)]);
    }
    for (length, visual) in turns {
        let embeds =
            Array3::from_shape_fn((batch, length, WIDTH as usize), |_| 2.0 * numbers.next());
        let mut input = StepInput::new(Value::new(Tensor::from(embeds)).expect("a tensor"));
        input.visual = Some(Array2::from_shape_fn((batch, length), |(_, i)| {
            visual.contains(&i)
        }));
        let out = run
            .step(&input, &cache)
            .unwrap_or_else(|e| panic!("{form:?}: {e}"));
        let kept = names.iter().map(|name| {
            let found = out
                .extra
                .iter()
                .find(|(n, _)| n == name)
                .expect("kept indices");
            found
                .1
                .to_tensor()
                .expect("a tensor")
                .i64s()
                .expect("integers")
                .to_vec()
        });
        let logits = out.last_logits().expect("logits").iter().copied().collect();
        seen.push((kept.collect(), out.cache.lengths(), logits));
        cache = out.cache;
    }
    seen
}

fn agrees(form: Form, positions: &str) {
    let recipe_text = text(positions);
    for batch in [1, 2] {
        let want = converse(form, false, &recipe_text, batch);
        let found = converse(form, true, &recipe_text, batch);
        // Both drops did something: 10 visual tokens, 6 and then 2 of them stay.
        assert_eq!(want[0].1, [17, 13, 13, 9], "{form:?}");
        assert_eq!(want.len(), found.len());
        for (step, (want, found)) in want.iter().zip(&found).enumerate() {
            assert_eq!(want.0, found.0, "{form:?}, step {step}: kept sets");
            assert_eq!(want.1, found.1, "{form:?}, step {step}: cache lengths");
            let worst = want
                .2
                .iter()
                .zip(&found.2)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(
                worst < 2e-4,
                "{form:?}, step {step}: logits differ by {worst}"
            );
        }
    }
    // And the layer-exact reference agrees with the fused one.
    is_valid(&decoder(form, true), &recipe_text);
}

fn is_valid(base: &Vlm, recipe_text: &str) {
    let changed = rewritten(base, recipe_text);
    let how = Options {
        session: options(),
        seed: 3,
    };
    let report = check(base, &changed, &recipe(recipe_text), &how, &mut |_| ()).expect("a report");
    let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
    assert!(report.passed(), "{failed:#?}");
    let found = |what: &str| report.findings.iter().find(|f| f.check.contains(what));
    assert!(found("tract: drop point 2").is_some());
    assert!(
        found("one image")
            .expect("the scenario")
            .detail
            .contains("8 kept sets equal")
    );
    // What cannot be asked of the unmodified model is said, not passed over.
    let (_, decoder) = base.decoders().next().expect("a decoder");
    let padded = found("padded on the left").expect("the scenario");
    assert_eq!(padded.detail.contains("left out"), !decoder.takes_padding());
}

#[test]
fn packed_group_query_attention() {
    agrees(GROUP, "renumber");
    agrees(GROUP, "keep");
}

#[test]
fn separate_group_query_attention_with_interleaved_rotary_embedding() {
    let form = Form {
        kind: Kind::Group { packed: false },
        interleaved: true,
        skip: false,
        ..GROUP
    };
    agrees(form, "renumber");
    agrees(form, "keep");
}

#[test]
fn partly_rotated_and_soft_capped_group_query_attention() {
    let form = Form {
        head_dim: 32,
        rotated: 16,
        softcap: 0.8,
        ..GROUP
    };
    agrees(form, "renumber");
    agrees(form, "keep");
}

#[test]
fn group_query_attention_without_a_rotary_embedding() {
    let form = Form {
        kind: Kind::Group { packed: false },
        rotated: 0,
        ..GROUP
    };
    agrees(form, "renumber");
}

#[test]
fn multi_head_attention_with_its_cache_and_a_bias() {
    let form = Form {
        kind: Kind::MultiHead,
        key_heads: 4,
        rotated: 0,
        ..GROUP
    };
    agrees(form, "renumber");
}

#[test]
fn multi_head_attention_over_a_cache() {
    let form = Form {
        kind: Kind::MultiHeadOver,
        key_heads: 4,
        ..GROUP
    };
    agrees(form, "renumber");
    agrees(form, "keep");
}

#[test]
fn a_soft_cap_changes_what_is_kept() {
    let kept = |softcap: f32| {
        let form = Form { softcap, ..GROUP };
        converse(form, true, &text("renumber"), 1)[0].0.clone()
    };
    assert_ne!(kept(0.0), kept(0.05));
}

#[test]
fn the_cut_gathers_the_sum_and_its_norm() {
    let base = decoder(GROUP, true);
    let (at, found) = base.decoders().next().expect("a decoder");
    let model = &base.parts[at].model;
    assert_eq!(
        (found.heads, found.kv_heads, found.head_dim),
        (Some(4), 2, 16)
    );
    for layer in &found.layers[1..] {
        // Outputs of one operator, norm and sum, so that neither is computed twice.
        let producers: Vec<_> = layer
            .boundary
            .iter()
            .map(|v| model.producer_of(*v))
            .collect();
        assert_eq!(producers.len(), 2);
        assert_eq!(producers[0], producers[1]);
    }
    let changed = rewritten(&base, &text("renumber"));
    let after = &changed.parts[at].model;
    let count = |m: &duet_onnx::ir::Model, op: &str| {
        m.graph()
            .nodes
            .iter()
            .filter(|n| m.node(**n).op_type == op)
            .count()
    };
    let skip = "SkipSimplifiedLayerNormalization";
    assert_eq!(count(model, skip), count(after, skip));
    assert!(!found.takes_padding());
    assert!(after.input(SALIENT_MASK_INPUT).is_none());
}

#[test]
fn kept_positions_take_the_rotary_embedding_out() {
    let base = decoder(GROUP, true);
    let attributes = |vlm: &Vlm| -> Vec<i64> {
        let m = &vlm.parts[0].model;
        let all = m.graph().nodes.iter().map(|n| m.node(*n));
        let group = all.filter(|n| n.is_ms("GroupQueryAttention"));
        group
            .map(|n| n.attr_int("do_rotary").unwrap_or(0))
            .collect()
    };
    assert_eq!(
        attributes(&rewritten(&base, &text("renumber"))),
        [1, 1, 1, 1]
    );
    assert_eq!(attributes(&rewritten(&base, &text("keep"))), [1, 0, 0, 0]);
}

#[test]
fn a_cache_of_the_window_only_is_refused() {
    let base = decoder(GROUP, true);
    let model = &base.parts[0].model;
    let group = model.graph().nodes.iter().copied();
    let group = group
        .filter(|n| model.node(*n).is_ms("GroupQueryAttention"))
        .last()
        .expect("one");
    let mut patch = duet_onnx::ir::Patch::new(model, "window");
    patch.set_attribute(group, duet_onnx::ir::int("sliding_window_cache", 1));
    let plan = patch.finish();
    let Role::Unknown(reasons) = Role::of(&model.clone().apply(plan).expect("applies")) else {
        panic!("it was recognised");
    };
    let found = reasons
        .iter()
        .map(|r| r.to_string())
        .find(|r| r.contains("decoder layer 3"));
    let found = found.expect("a reason for the layer");
    assert!(found.contains("sliding_window_cache"), "{found}");
}

#[test]
fn standard_attention_with_its_cache() {
    let form = Form {
        kind: Kind::Standard,
        ..GROUP
    };
    agrees(form, "renumber");
}

#[test]
fn int8_rounding_between_operators() {
    let form = Form {
        rounded: true,
        softcap: 0.8,
        ..GROUP
    };
    is_valid(&decoder(form, false), &text("renumber"));
}

#[test]
fn an_undeclared_head_width_is_found_and_told() {
    let base = decoder(GROUP, true);
    let changed = rewritten(&base, &text("renumber"));
    for vlm in [&base, &changed] {
        assert_eq!(cache_heads(&vlm.parts[0].model), Some((2, 16)));
    }
    let error = Decoder::new(open(&base.parts[0].model, Path::new("decoder"))).unwrap_err();
    assert!(
        error.to_string().contains("past_key_values.0.key"),
        "{error}"
    );
}
