//! `token_merge: placement: decoder`: as many features as before come out of the vision encoder, and the
//! decoder drops the discarded ones behind its first layer.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod commands;
#[macro_use]
mod support;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Patch, Tensor as Weight, verify};
use duet_onnx::passes::{PassError, rewrite};
use duet_onnx::runtime::{Cache, StepInput, Tensor};
use duet_onnx::validate::scenario::{Seeded, standard};
use ndarray::Array2;

use commands::Place;
use support::conversation::{apart, hold};
use support::forms;
use support::goldens::Goldens;
use support::models::{
    Pool, Runner, fixture, fixture_at, kept, parts_at, recipe, recipe_text, rewritten, root,
    set_of, sizes, whole_fixture,
};
use support::packed::unpacked;
use support::reports::{failures, validated};

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values (fp32).
const LIMIT: f64 = 1e-4;

/// Largest allowed relative difference where two graphs compute the same thing.
const SAME: f64 = 1e-5;

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

fn valid(name: &str, base: &Vlm, recipes: &[String]) {
    let mut problems = Vec::new();
    for text in recipes {
        let report = validated(base, &rewritten(base, text), text, 4);
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
    // The full-size one takes many times as long.
    let few = if name == "demo" { 1..2 } else { 0..4 };
    valid(name, &fixture(name), &recipes()[few]);
}

/// The PyTorch reference's goldens: features and marks, kept sets, cache lengths, logits of prompts and steps.
fn reproduces_pytorch(name: &str) {
    if name == "demo" {
        return;
    }
    let goldens = Goldens::read(&format!("{}-placed", set_of(name)));
    let sets = goldens.reproduced(name, &fixture(name), LIMIT);
    assert!(sets > 0, "{name}: no index set");
}

/// All tokens dominant: features, logits and caches are the unmodified model's.
fn keeping_everything_changes_nothing(name: &str) {
    let base = fixture(name);
    let mut pool = Pool::default();
    let plain = pool.open(&base);
    let (edge, width) = sizes(&base);
    let all = "{dominant: 1.0, contextual: 0, placement: decoder}";
    let nothing = "{drops: [{after_layer: 1, keep: 1.0}, {after_layer: 3, keep: 1.0}]}";
    let texts = [
        recipe_text(&[("token_merge", all)], ""),
        recipe_text(&[("token_merge", all), ("visual_prune", nothing)], ""),
    ];
    let mut scenarios = standard(400, 11);
    if edge > 200 {
        scenarios.truncate(2);
    }
    for scenario in &scenarios {
        let want = hold(&plain, scenario, edge, width);
        for text in &texts {
            let found = hold(&pool.open(&rewritten(&base, text)), scenario, edge, width);
            let apart = apart(&want, &found);
            assert!(
                apart <= SAME,
                "{name}, {}: {apart:.1e}\n{text}",
                scenario.name
            );
        }
    }
}

on_every_fixture!(
    rewritten_models_are_valid,
    reproduces_pytorch,
    keeping_everything_changes_nothing,
);

/// Logits of a conversation: two rows, of which one has two images, then steps of so many tokens. Discarded
/// features hold `noise` times random numbers instead of zeros.
fn answers(
    base: &Vlm,
    runner: &Runner,
    steps: &[usize],
    noise: f32,
) -> (Vec<Vec<f32>>, Vec<Vec<usize>>) {
    let (edge, width) = sizes(base);
    let mut rng = Seeded::new(31);
    let encoded = runner.encode(Seeded::new(3).images(3, 3, edge, edge).into());
    let mut discarded = 0;
    let mut features = Vec::new();
    for image in &encoded.features {
        let mut data = image.f32s().expect("features").into_owned();
        for row in data.chunks_exact_mut(width + 1) {
            if row[width] > 1.5 {
                discarded += 1;
                row[..width]
                    .iter_mut()
                    .for_each(|x| *x += noise * rng.normal());
            }
        }
        features.push(Tensor::new(image.shape().to_vec(), data).expect("features"));
    }
    assert!(discarded > 0, "nothing was discarded");
    let n = features[0].shape()[0];
    let length = 2 * n + 15;
    // A row with an image, padded on the left, and one with two.
    let visual = Array2::from_shape_fn((2, length), |(row, i)| match row {
        0 => (length - 9 - n..length - 9).contains(&i),
        // (Nothing before the first: its discarded features see no token at all.)
        _ => (0..n).contains(&i) || (7 + n..7 + 2 * n).contains(&i),
    });
    let mask = Array2::from_shape_fn((2, length), |(row, i)| {
        i64::from(row == 1 || i + 14 + n >= length)
    });
    let ids = Array2::from_shape_fn((2, length), |(r, i)| (20 + r + i % 30) as i64);
    let (mut logits, mut lengths) = (Vec::new(), Vec::new());
    let mut cache: Option<Cache> = None;
    let mut say = |embeds, mask: Array2<i64>, cache: &mut Option<Cache>| {
        let mut input = StepInput::new(embeds);
        input.mask = Some(mask);
        let output = runner.step(&input, cache.as_ref());
        logits.push(output.last_logits().expect("logits").into_iter().collect());
        lengths.push(output.cache.lengths());
        assert!(!kept(&output).is_empty(), "no drop point was found");
        *cache = Some(output.cache);
    };
    say(runner.embed(&ids, &visual, &features), mask, &mut cache);
    for (step, &length) in steps.iter().enumerate() {
        let ids = Array2::from_shape_fn((2, length), |(r, i)| (33 + 7 * step + r + i) as i64);
        say(
            runner.embed_text(&ids),
            Array2::ones((2, length)),
            &mut cache,
        );
    }
    (logits, lengths)
}

/// Whatever discarded features hold, nothing that comes out depends on it: not the prompt's logits, not those of
/// later steps, in which the client's mask has ones for their columns of the first layer's cache. The rows have
/// different numbers of them, so some stay for later layers. (Read off features of noise, whose keys would not be
/// zeros by themselves.) Without the part that finds keys of zeros, the steps do depend on it.
fn discarded_features_have_no_say(name: &str, base: &Vlm, steps: &[usize]) {
    let text = recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], "");
    let changed = rewritten(base, &text);
    let runner = Runner::open(&changed);
    let (want, lengths) = answers(base, &runner, steps, 0.0);
    assert!(
        want.iter().flatten().all(|v| v.is_finite()),
        "{name}: logits"
    );
    let (found, _) = answers(base, &runner, steps, 3.0);
    assert_eq!(want, found, "{name}: logits depend on what was discarded");
    // The smaller number leaves.
    let n = lengths[0][0];
    assert!(
        lengths[0][1] < n && lengths[0][2] < lengths[0][1],
        "{name}: {lengths:?}"
    );
    let grown: Vec<usize> = lengths[steps.len()]
        .iter()
        .zip(&lengths[0])
        .map(|(a, b)| a - b)
        .collect();
    let all: usize = steps.iter().sum();
    assert!(grown.iter().all(|g| *g == all), "{name}: {lengths:?}");

    let broken = Runner::open(&without_the_cache_s_mask(&changed));
    let (want, _) = answers(base, &broken, steps, 0.0);
    let (found, _) = answers(base, &broken, steps, 3.0);
    assert_eq!(want[0], found[0], "{name}: the prompt needs no cache");
    for (step, (want, found)) in want.iter().zip(&found).enumerate().skip(1) {
        assert_ne!(
            want, found,
            "{name}: step {step} does not show that columns count"
        );
    }
}

/// The model in which no key counts as zeros.
fn without_the_cache_s_mask(vlm: &Vlm) -> Vlm {
    let mut vlm = vlm.clone();
    let mut found = 0;
    for part in &mut vlm.parts {
        if !matches!(part.role, Role::Decoder(_)) {
            continue;
        }
        let model = &part.model;
        let mut patch = Patch::new(model, "broken");
        let never = patch.constant(Weight::f32_scalar("", -1.0));
        for &id in &model.graph().nodes {
            let node = model.node(id);
            let largest = node.input(0).and_then(|v| model.producer_node(v));
            if node.is("Equal") && largest.is_some_and(|n| n.is("ReduceMax")) {
                patch.rewire(id, 1, never);
                found += 1;
            }
        }
        let plan = patch.finish();
        part.model = part.model.clone().apply(plan).expect("a patch");
        verify(&part.model).expect("well-formed");
    }
    // (A graph that only starts a cache reads none.)
    assert!(found > 0, "no decoder masks columns of its cache");
    vlm
}

#[test]
fn discarded_features_have_no_say_in_exported_decoders() {
    for name in [
        "ts-eager-gqa",
        "ts-sdpa-mha",
        "dynamo18-gqa",
        "dynamo23-mha",
    ] {
        discarded_features_have_no_say(name, &fixture(name), &[1, 1, 1, 6, 1]);
    }
}

/// Keys with a bias, which are not zeros for features of zeros; half precision; an attention that adds the bias
/// itself; a decoder in two files.
#[test]
fn discarded_features_have_no_say_in_other_forms() {
    for name in [
        "qwen2-ts-sdpa",
        "fp16io-ts-eager-mha",
        "genai09-mha-mha",
        "split-ts-sdpa-gqa",
    ] {
        let form = forms::form(name);
        let base = fixture_at(&form.directory());
        let steps: &[usize] = if form.single_steps {
            &[1, 1]
        } else {
            &[1, 1, 6, 1]
        };
        discarded_features_have_no_say(name, &base, steps);
    }
}

/// Packed forms: GroupQueryAttention, MultiHeadAttention, half precision, quantised, other families and towers.
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
    genai09_mha_mha,
    fp16_ts_sdpa_mha,
    int8_ts_eager_gqa,
    if_ts_eager_mha,
    split_ts_sdpa_gqa,
    qwen2_dynamo23,
    gemma3_ts_sdpa,
    siglip_ts_eager,
    idefics3_plain_ts_sdpa,
);

/// Crops of one image; frames of a clip, whose features hold CLS, one after the other or in one list.
#[test]
fn crops_and_clips_are_valid() {
    for (name, folder) in [
        ("llava-next", "llava_next/fixtures/llava-next"),
        ("llava-onevision", "llava_next/fixtures/llava-onevision"),
        ("video-llava", "video_llava/fixtures/ts-sdpa"),
    ] {
        let base = parts_at(&unpacked(&root().join("models").join(folder)));
        let merge = "{dominant: 12, contextual: 3, placement: decoder}";
        let text = recipe_text(&[("token_merge", merge), ("visual_prune", AT_ONCE)], "");
        valid(name, &base, &[text]);
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let base = fixture("ts-sdpa-mha");
    let refused = |vlm: &Vlm, merge: &str, rest: &str| -> String {
        let text = recipe_text(&[("token_merge", merge)], rest);
        match rewrite(vlm.clone(), &recipe(&text)) {
            Err(error @ PassError::Requires { .. }) => error.to_string(),
            Err(error) => panic!("{error}\n{text}"),
            Ok(_) => panic!("not refused:\n{text}"),
        }
    };
    let says = |message: String, words: &[&str]| {
        for word in words {
            assert!(message.contains(word), "expected '{word}' in: {message}");
        }
    };
    let keep = MERGE.replace('}', ", cls: keep}");
    says(refused(&base, &keep, ""), &["CLS", "use 'cls: drop'"]);
    for rest in [
        "marker: input\n",
        "marker: token-id\n",
        "marker: static\nspan: {start: 4, count: 81}\n",
    ] {
        says(
            refused(&base, MERGE, rest),
            &["placement: decoder", "placement: encoder"],
        );
    }
    let mut alone = base.clone();
    alone.parts.retain(|p| matches!(p.role, Role::Vision(_)));
    says(
        refused(&alone, MERGE, ""),
        &["decoder", "placement: encoder"],
    );
    let whole = whole_fixture("vlm-batch-dynamo18-gqa");
    says(
        refused(&whole, MERGE, ""),
        &["whole model", "placement: encoder"],
    );
}

/// On the command line: the client's configs stay as they are, the first layer counts in what is said, and the
/// model answers.
#[test]
fn no_config_of_the_client_changes() {
    let recipe =
        "version: 1\npasses:\n  - token_merge: {dominant: 30, contextual: 6, placement: decoder}\n";
    for prunes in [false, true] {
        let more = "  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}\n";
        let place = Place::new(&format!("{recipe}{}", if prunes { more } else { "" }));
        place.configs("model");
        place.graphs("ts-sdpa-gqa", "model");
        let ran = place.rewritten(&[]);
        let layers = match prunes {
            true => "visual tokens by layer: 1: 81, 2–3: 36, 4–8: 18; average 30.38",
            false => "visual tokens by layer: 1: 81, 2–8: 36; average 41.62",
        };
        for what in [
            layers,
            "81 features come out",
            "masked in the decoder's first layer",
        ] {
            assert!(
                ran.stderr.contains(what),
                "expected '{what}' in:\n{}",
                ran.stderr
            );
        }
        let (before, after) = (place.files("model"), place.files("out"));
        for (name, bytes) in before.iter().filter(|(n, _)| !n.ends_with(".onnx")) {
            assert!(after[name] == *bytes, "{name} changed");
        }
        place.valid();
        assert_eq!(place.answer("out", &[])["visual_tokens"], 81);
    }
}
