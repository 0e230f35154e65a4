//! Rewritten fixtures against the PyTorch reference, and against the unmodified fixtures where the
//! two have to agree.
//!
//! The goldens (`models/llava/goldens`) were recorded by an independent PyTorch implementation of the
//! method. Every fixture of a set of weights has to reproduce every case of the set: which patches and
//! tokens are selected and how long each layer's cache is, exactly; merged features and last-row logits
//! of the prompt and of every decode step within [`LIMIT`].
//!
//! `cargo test --release --test parity -- --nocapture` prints the largest differences.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

#[macro_use]
mod support;

use duet_onnx::passes::VisualPrune;
use duet_onnx::runtime::{RuntimeError, StepInput, StepOutput, Value as Handle};
use duet_onnx::validate::reference::{ReferenceDecoder, StepIn};
use duet_onnx::validate::scenario::Seeded;
use ndarray::{Array2, Array3, Axis};
use serde_json::Value;

use support::conversation::{apart, hold, text_only};
use support::goldens::{Client, Goldens};
use support::models::{
    Pool, Runner, difference, fixture, kept, numbers, options, recipe, recipe_text, rewritten,
    set_of, sizes,
};

/// Largest allowed difference from PyTorch, in standard deviations of the reference's values (fp32).
const LIMIT: f64 = 1e-4;

/// Largest allowed relative difference where two graphs compute the same thing.
const SAME: f64 = 1e-5;

fn reproduces_pytorch(name: &str) {
    Goldens::read(set_of(name)).reproduced(name, &fixture(name), LIMIT);
}

/// The recipe with another marker; what it says besides stays.
fn with_marker(recipe: &Value, marker: &str, span: Option<(usize, usize)>) -> String {
    let mut recipe = recipe.clone();
    recipe["marker"] = marker.into();
    if let Some((start, count)) = span {
        recipe["span"] = serde_json::json!({ "start": start, "count": count });
    }
    recipe.to_string()
}

/// Cases that tell markers apart: with and without padding, several images, rows without one, further
/// turns with and without an image; and the full-size model's own. (The remaining cases differ in what
/// is selected, which no marker has a say in.)
const MARKED: [&str; 11] = [
    "prune",
    "both-second-turn",
    "prune-spread",
    "prune-image-last",
    "both",
    "both-padded",
    "both-one-and-two",
    "both-second-image",
    "both-text-row",
    "both-192",
    "both-192-shapes",
];

/// Where the decoder knows its visual tokens from makes no difference: an input, a channel of the
/// embeddings, or (where one span describes them) a fixed place give the same logits, bit for bit.
fn markers_agree(name: &str) {
    let base = fixture(name);
    let goldens = Goldens::read(set_of(name));
    let mut pool = Pool::default();
    let (mut inputs, mut spans) = (0, 0);
    for case in goldens
        .cases
        .iter()
        .filter(|c| MARKED.contains(&c.name.as_str()))
    {
        let mut ask = |text: &str| {
            let runner = pool.open(&rewritten(&base, text));
            let outcome = goldens.run(case, &runner, Client::default());
            assert!(
                outcome.problems.is_empty(),
                "{name}, {}: {:?}\n{text}",
                case.name,
                outcome.problems
            );
            outcome.all_logits
        };
        let channel = ask(&with_marker(&case.recipe, "channel", None));
        let input = ask(&with_marker(&case.recipe, "input", None));
        assert_eq!(
            bits(&channel),
            bits(&input),
            "{name}, {}: channel and input",
            case.name
        );
        inputs += 1;
        // A model for each span: the plain cases are enough.
        let plain =
            ["prune", "both", "both-second-turn", "prune-image-last"].contains(&case.name.as_str());
        let plain = plain || name == "demo";
        if let Some(span) = goldens.span(case).filter(|_| plain) {
            let fixed = ask(&with_marker(&case.recipe, "static", Some(span)));
            assert_eq!(
                bits(&channel),
                bits(&fixed),
                "{name}, {}: channel and static",
                case.name
            );
            spans += 1;
        }
    }
    println!("{name}: {inputs} cases with two markers, {spans} with a fixed span, bit for bit");
    assert!(
        inputs >= 2 && spans >= 1,
        "{name}: {inputs} and {spans} cases compared"
    );
}

fn bits(logits: &[Vec<f32>]) -> Vec<Vec<u32>> {
    let row = |row: &Vec<f32>| row.iter().map(|v| v.to_bits()).collect();
    logits.iter().map(row).collect()
}

/// Clients that count positions from one, in the prompt and while decoding, get what the others get:
/// rotary embeddings are relative, and renumbering keeps the distance. The goldens' cases without a
/// pass show it for the unmodified model, the others for rewritten ones: the same sets are kept, and
/// logits are within the same limit of the reference, which counts from zero.
fn positions_from_one(name: &str) {
    let base = fixture(name);
    let goldens = Goldens::read(set_of(name));
    let mut pool = Pool::default();
    let wanted = [
        "baseline",
        "prune",
        "prune-last-keep",
        "both",
        "both-padded",
        "both-second-turn",
        "both-192",
    ];
    let client = Client { first_position: 1 };
    let mut worst: f64 = 0.0;
    for case in goldens
        .cases
        .iter()
        .filter(|c| wanted.contains(&c.name.as_str()))
    {
        let runner = pool.open(&rewritten(&base, &case.recipe.to_string()));
        let outcome = goldens.run(case, &runner, client);
        let place = format!("{name}, {}", case.name);
        assert!(
            outcome.problems.is_empty(),
            "{place}: {:?}",
            outcome.problems
        );
        assert!(
            outcome.logits <= LIMIT,
            "{place}: logits differ by {:.1e}",
            outcome.logits
        );
        worst = worst.max(outcome.logits);
    }
    println!("{name}: counting from one, logits within {worst:.1e}");
}

const MERGE: &str = "{dominant: 30, contextual: 6}";
const PRUNE: &str = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";

/// Both passes, as a client would use them.
fn both() -> String {
    recipe_text(&[("token_merge", MERGE), ("visual_prune", PRUNE)], "")
}

/// Clients that give `np.ones_like(input_ids)` as the mask while decoding, one column instead of the
/// past's and its own. These exports read the mask at every key's place, so the unmodified model
/// refuses the run, and the rewritten one has to refuse it as well instead of computing something.
/// With the full mask, the same call gives what the standard loop gives, in both.
fn short_masks(name: &str) {
    let base = fixture(name);
    let (edge, _) = sizes(&base);
    for text in ["version: 1\npasses: []".to_owned(), both()] {
        let runner = Runner::open(&rewritten(&base, &text));
        let place = format!("{name}\n{text}");
        for batch in [1, 2] {
            let features = runner
                .encode(Seeded::new(3).images(batch, 3, edge, edge).into())
                .features;
            let rows = features[0].shape()[0];
            let length = rows + 14;
            let visual =
                Array2::from_shape_fn((batch, length), |(_, i)| (5..5 + rows).contains(&i));
            let ids = Array2::from_shape_fn((batch, length), |(r, i)| (20 + r + i % 30) as i64);
            let mut input = StepInput::new(runner.embed(&ids, &visual, &features));
            input.visual = Some(visual);
            let cache = runner.step(&input, None).cache;
            let next = Array2::from_elem((batch, 1), 33);
            let standard = runner.step(&StepInput::new(runner.embed_text(&next)), Some(&cache));
            let given = |columns: usize| {
                let mask = Array2::ones((batch, columns));
                let position = Array2::from_elem((batch, 1), length as i64);
                runner.step_as_given(runner.embed_text(&next), mask, position, &cache)
            };
            let full = given(length + 1).unwrap_or_else(|e| panic!("{e}; {place}"));
            let logits = full.get("logits").expect("logits");
            assert_eq!(numbers(logits), numbers(&standard.logits), "{place}");
            for columns in [1, length] {
                let error =
                    given(columns).expect_err("a mask shorter than the past and this token");
                let RuntimeError::Run { reason, .. } = &error else {
                    panic!("expected the run to fail, not {error}; {place}");
                };
                assert!(
                    reason.contains("ind"),
                    "expected an index out of range: {reason}; {place}"
                );
            }
        }
    }
}

/// Text without an image, alone, in a padded batch and over two turns: the rewritten model's logits
/// and caches are the unmodified model's, in the prompt and while decoding.
fn text_is_untouched(name: &str) {
    let base = fixture(name);
    let mut pool = Pool::default();
    let plain = pool.open(&base);
    let (edge, width) = sizes(&base);
    let mut worst: f64 = 0.0;
    let other = "{drops: [{after_layer: 1, keep: 0.3}, {after_layer: 6, keep: 0.1}], text: last, positions: keep}";
    let recipes = [
        both(),
        recipe_text(&[("visual_prune", other)], ""),
        recipe_text(
            &[(
                "token_merge",
                "{dominant: 9, contextual: 4, selector: local}",
            )],
            "",
        ),
        recipe_text(&[("visual_prune", PRUNE)], "marker: input\n"),
    ];
    for text in recipes {
        let runner = pool.open(&rewritten(&base, &text));
        for scenario in text_only(400) {
            let want = hold(&plain, &scenario, edge, width);
            let found = hold(&runner, &scenario, edge, width);
            let apart = apart(&want, &found);
            assert!(
                apart <= SAME,
                "{name}, {}: {apart:.1e}\n{text}",
                scenario.name
            );
            worst = worst.max(apart);
        }
    }
    println!("{name}: text only, within {worst:.1e}");
}

/// A client whose positions are one too high while decoding only. That changes what the unmodified
/// model computes, so the standard loop is no measure: the rewritten model has to compute what the
/// unmodified one, run in stages between the drop points, computes with the same positions.
fn positions_one_too_high_while_decoding(name: &str) {
    let base = fixture(name);
    let text = recipe_text(&[("visual_prune", PRUNE)], "marker: input\n");
    let parsed = recipe(&text);
    let (at, decoder) = base.decoders().next().expect("a decoder");
    let prune = parsed.pass::<VisualPrune>();
    let model = &base.parts[at].model;
    let mut reference =
        ReferenceDecoder::open(model, decoder, prune, &options()).expect("reference");
    let runner = Runner::open(&rewritten(&base, &text));
    let width = usize::try_from(decoder.width.expect("the width")).expect("a width");
    let mut rng = Seeded::new(21);
    let (batch, prompt, steps) = (2, 40, 3);
    let mut state = reference.start(batch).expect("an empty cache");
    let mut cache = None;
    let mut standard: f64 = 0.0;
    for step in 0..=steps {
        let (length, shift) = if step == 0 { (prompt, 0) } else { (1, 1) };
        let first = if step == 0 { 0 } else { prompt + step - 1 };
        let input = StepIn {
            embeds: Array3::from_shape_fn((batch, length, width), |_| rng.normal()),
            mask: Array2::ones((batch, length)),
            positions: Array3::from_shape_fn((1, batch, length), |(_, _, i)| {
                (first + i + shift) as i64
            }),
            visual: Array2::from_shape_fn((batch, length), |(_, i)| (4..34).contains(&i)),
            gone: Array2::from_elem((batch, length), false),
            salient: Array2::from_elem((batch, length), false),
            ids: None,
        };
        let want = reference.step(&mut state, &input).expect("reference");
        let embeds = Handle::new(input.embeds.clone().into()).expect("embeddings");
        let mut given = StepInput::new(embeds);
        given.visual = Some(input.visual.clone());
        let plain = runner.step(&given, cache.as_ref());
        let row = input.positions.index_axis(Axis(0), 0).to_owned();
        given.positions = Some(row.into());
        let found = runner.step(&given, cache.as_ref());
        let logits =
            |o: &StepOutput| -> Vec<f32> { o.last_logits().expect("logits").into_iter().collect() };
        let apart = difference(
            &want.logits.iter().copied().collect::<Vec<_>>(),
            &logits(&found),
        );
        assert!(apart <= LIMIT, "{name}, step {step}: {apart:.1e}");
        assert_eq!(want.kept, kept(&found), "{name}, step {step}");
        assert_eq!(want.lengths, found.cache.lengths(), "{name}, step {step}");
        standard = standard.max(difference(&logits(&plain), &logits(&found)));
        cache = Some(found.cache);
    }
    assert!(
        standard > LIMIT,
        "{name}: the positions make no difference here ({standard:.1e})"
    );
}

on_every_fixture!(
    reproduces_pytorch,
    markers_agree,
    positions_from_one,
    positions_one_too_high_while_decoding,
    short_masks,
    text_is_untouched,
);
