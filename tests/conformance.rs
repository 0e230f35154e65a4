//! What every pass has to hold to, whichever it is: the tests loop over the registry.
//!
//! A new pass is held to all of this on every fixture, with the parameters that its entry states: with its
//! keep-everything parameters the outputs are the unmodified model's; what it selects is unique, sorted
//! and in range; text is never dropped; lengths agree from layer to layer; the interface, operator sets
//! and everything it did not touch stay as they were; the same recipe gives the same bytes; a second run
//! and parameters that do not fit are refused with a message that says what to do.

#[macro_use]
mod support;

use std::collections::HashSet;
use std::fs;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Model, ValueId, verify};
use duet_onnx::onnx::serialize;
use duet_onnx::passes::{
    Entry, PassError, REGISTRY, Recipe, SALIENT_MASK_INPUT, Stage, TokenMerge, VISUAL_MASK_INPUT,
    merge_budget, rewrite,
};
use duet_onnx::validate::scenario::{Scenario, Seeded, standard};

use support::conversation::{Record, Transcript, apart, hold};
use support::models::{Pool, Runner, fixture, pairs, recipe, recipe_text, rewritten, root, sizes};

/// Largest allowed difference, relative to the standard deviation, where nothing may change.
const SAME: f64 = 1e-5;

/// The entry of a pass.
fn entry(pass: &str) -> &'static Entry {
    let mut all = REGISTRY.iter();
    all.find(|e| e.name == pass).expect("a registered pass")
}

/// Each pass with each of its sample parameters, and passes together.
fn recipes() -> Vec<String> {
    recipes_of(usize::MAX)
}

/// The same with so many samples of each pass.
fn recipes_of(samples: usize) -> Vec<String> {
    let each = REGISTRY.iter().flat_map(|e| {
        let samples = e.samples.iter().take(samples);
        samples.map(|p| recipe_text(&[(e.name, p)], ""))
    });
    let mut all: Vec<String> = each.collect();
    let together = |pair: [&'static Entry; 2], rest| {
        let passes = pair.map(|e| (e.name, e.samples[0]));
        recipe_text(&passes, rest)
    };
    all.extend(pairs().into_iter().map(|pair| together(pair, "")));
    all.push(together(pairs()[0], "marker: input\n"));
    all
}

fn vocabulary(vlm: &Vlm) -> i64 {
    let (_, decoder) = vlm.decoders().next().expect("a decoder");
    decoder.vocabulary.expect("the vocabulary's size")
}

/// Conversations to hold with a model: all kinds with the small ones; some with the full-size one, which
/// takes many times as long.
fn scenarios(vlm: &Vlm) -> Vec<Scenario> {
    let few = [
        "one image",
        "two images",
        "batch of two, padded on the left",
        "a second image on the same cache",
    ];
    let mut all = standard(vocabulary(vlm), 11);
    if sizes(vlm).0 > 200 {
        all.retain(|s| few.contains(&s.name));
        assert_eq!(all.len(), few.len());
    }
    all
}

fn transcripts(vlm: &Vlm, runner: &Runner) -> Vec<Transcript> {
    let (edge, width) = sizes(vlm);
    scenarios(vlm)
        .iter()
        .map(|s| hold(runner, s, edge, width))
        .collect()
}

/// With the parameters that the registry names for it, every pass alone and all together leave features,
/// logits and caches as the unmodified model gives them.
fn keep_everything(name: &str) {
    let base = fixture(name);
    let mut pool = Pool::default();
    let want = transcripts(&base, &pool.open(&base));
    let alone = REGISTRY.iter().map(|e| vec![(e.name, e.keep_everything)]);
    let mut recipes: Vec<Vec<(&str, &str)>> = alone.collect();
    if sizes(&base).0 > 200 {
        // The full-size one takes many times as long: there each pass in company only.
        recipes.clear();
    }
    let all = |pair: [&'static Entry; 2]| pair.map(|e| (e.name, e.keep_everything)).to_vec();
    recipes.extend(pairs().into_iter().map(all));
    for passes in recipes {
        let text = recipe_text(&passes, "");
        let changed = rewritten(&base, &text);
        let found = transcripts(&base, &pool.open(&changed));
        for ((want, found), scenario) in want.iter().zip(&found).zip(scenarios(&base)) {
            let worst = apart(want, found);
            let place = format!("{name}, {}:\n{text}", scenario.name);
            assert!(
                worst <= SAME,
                "outputs differ by {worst:.1e} standard deviations; {place}"
            );
        }
    }
}

/// What is selected is unique, sorted and in range, holds every token that is not visual, and the
/// lengths of caches and logits follow from it, over prompts, decode steps and further turns.
fn selections(name: &str) {
    let base = fixture(name);
    let mut pool = Pool::default();
    let samples = match sizes(&base).0 > 200 {
        true => 1,
        false => usize::MAX,
    };
    for text in recipes_of(samples) {
        let parsed = recipe(&text);
        let runner = pool.open(&rewritten(&base, &text));
        if let Some(merge) = parsed.pass::<TokenMerge>() {
            merged(&base, merge, &runner, &format!("{name}\n{text}"));
        }
        let drops: Vec<usize> = parsed.pruning().map_or_else(Vec::new, |p| {
            p.prune.drops.iter().map(|d| d.after_layer).collect()
        });
        for (transcript, scenario) in transcripts(&base, &runner).iter().zip(scenarios(&base)) {
            let place = format!("{name}, {}:\n{text}", scenario.name);
            let mut before = vec![0; transcript.steps[0].lengths.len()];
            for step in &transcript.steps {
                step_agrees(step, &drops, &before, &place);
                before.clone_from(&step.lengths);
            }
        }
    }
}

fn merged(base: &Vlm, merge: &TokenMerge, runner: &Runner, place: &str) {
    let (edge, _) = sizes(base);
    let (_, tower) = base.towers().next().expect("a vision encoder");
    let patches = tower.candidates().expect("a fixed number of patches");
    let budget = merge_budget(merge, patches, tower.cls);
    let encoded = runner.encode(Seeded::new(9).images(3, 3, edge, edge).into());
    assert_eq!(encoded.features.len(), 3, "{place}");
    let count = |n: i64| usize::try_from(n).expect("a count");
    for features in &encoded.features {
        assert_eq!(
            features.shape()[0],
            count(budget.total()),
            "features; {place}"
        );
    }
    let empty = vec![vec![]; 3];
    let dominant = encoded.dominant.as_ref().unwrap_or(&empty);
    let anchors = encoded.anchors.as_ref().unwrap_or(&empty);
    for (dominant, anchors) in dominant.iter().zip(anchors) {
        assert_eq!(
            dominant.len(),
            count(budget.dominant),
            "dominant patches; {place}"
        );
        assert_eq!(anchors.len(), count(budget.contextual), "anchors; {place}");
        assert!(
            dominant.windows(2).all(|p| p[0] < p[1]),
            "dominant patches ascend; {place}"
        );
        let all: HashSet<&usize> = dominant.iter().chain(anchors).collect();
        assert_eq!(
            all.len(),
            dominant.len() + anchors.len(),
            "no patch twice; {place}"
        );
        assert!(
            all.iter().all(|p| **p < count(patches)),
            "patches in range; {place}"
        );
    }
}

/// One run of the decoder. `drops` are the layers after which tokens leave, `before` the lengths of the
/// caches before the run.
fn step_agrees(step: &Record, drops: &[usize], before: &[usize], place: &str) {
    let (rows, entered) = step.visual.dim();
    assert_eq!(
        step.kept.len(),
        drops.len(),
        "drop points with kept indices; {place}"
    );
    // For each row the tokens that are left, as indices into what entered.
    let mut left: Vec<Vec<usize>> = vec![(0..entered).collect(); rows];
    let mut lengths = vec![entered];
    for kept in &step.kept {
        assert_eq!(kept.len(), rows, "rows of kept indices; {place}");
        for (row, (kept, left)) in kept.iter().zip(&mut left).enumerate() {
            assert!(
                kept.windows(2).all(|p| p[0] < p[1]),
                "kept indices ascend: {kept:?}; {place}"
            );
            assert!(
                kept.iter().all(|i| *i < left.len()),
                "kept indices in range: {kept:?}; {place}"
            );
            let must_stay =
                |i: &usize| !step.visual[[row, left[*i]]] || step.mask[[row, left[*i]]] == 0;
            let stays: HashSet<&usize> = kept.iter().collect();
            let gone = (0..left.len()).find(|i| must_stay(i) && !stays.contains(i));
            assert_eq!(
                gone, None,
                "a token that is no visual one was dropped; {place}"
            );
            *left = kept.iter().map(|i| left[*i]).collect();
        }
        assert!(
            left.iter().all(|r| r.len() == left[0].len()),
            "rows of one length; {place}"
        );
        lengths.push(left[0].len());
    }
    for (layer, (now, before)) in step.lengths.iter().zip(before).enumerate() {
        let stage = drops.iter().take_while(|after| **after <= layer).count();
        assert_eq!(
            now - before,
            lengths[stage],
            "tokens that layer {layer} saw; {place}"
        );
    }
    assert_eq!(
        step.logits.0[1],
        lengths[drops.len()],
        "rows of logits; {place}"
    );
    assert!(
        step.logits.1.iter().all(|v| v.is_finite()),
        "logits are finite; {place}"
    );
}

fn interface(model: &Model, values: &[ValueId]) -> Vec<String> {
    let describe = |v: &ValueId| {
        let ty = model.value(*v).ty.as_ref();
        let rank = ty.and_then(|t| t.shape()).map(<[_]>::len);
        format!(
            "{} {:?} rank {rank:?}",
            model.name(*v),
            ty.and_then(|t| t.dtype())
        )
    };
    values.iter().map(describe).collect()
}

/// Interface, operator sets, names of what was inserted, stamps, and what must stay byte for byte.
fn files(name: &str) {
    let base = fixture(name);
    let merge = (
        "token_merge",
        "{dominant: 30, contextual: 6, placement: decoder}",
    );
    let prune = ("visual_prune", entry("visual_prune").samples[2]);
    let placed = [recipe_text(&[merge], ""), recipe_text(&[merge, prune], "")];
    for text in recipes().into_iter().chain(placed) {
        let place = format!("{name}:\n{text}");
        let done = rewrite(base.clone(), &recipe(&text)).unwrap_or_else(|e| panic!("{e}; {place}"));
        let again = rewritten(&fixture(name), &text);
        for (index, (old, new)) in base.parts.iter().zip(&done.vlm.parts).enumerate() {
            let (before, after) = (&old.model, &new.model);
            let place = format!("{}, {place}", old.file.display());
            let bytes =
                serialize(verify(after).unwrap_or_else(|e| panic!("{e}; {place}"))).to_vec();
            let other = &again.parts[index].model;
            let other =
                serialize(verify(other).unwrap_or_else(|e| panic!("{e}; {place}"))).to_vec();
            assert!(bytes == other, "the same recipe gives other bytes; {place}");
            let passes: HashSet<&str> = done
                .changes
                .iter()
                .filter(|c| c.part == index)
                .map(|c| c.pass)
                .collect();
            if passes.is_empty() {
                let path = root()
                    .join("models/llava/fixtures")
                    .join(name)
                    .join(&old.file);
                let original = fs::read(path).expect("the fixture");
                assert!(
                    bytes == original,
                    "no pass changed it, yet its bytes differ; {place}"
                );
                continue;
            }
            assert_eq!(
                after.metadata("duet.recipe"),
                Some(text.as_str()),
                "{place}"
            );
            assert_eq!(
                after.metadata("duet.version"),
                Some(env!("CARGO_PKG_VERSION")),
                "{place}"
            );
            assert_eq!(before.ir_version, after.ir_version, "{place}");
            assert_eq!(before.opset_imports, after.opset_imports, "{place}");
            let outputs = |m: &Model| interface(m, &m.graph().outputs);
            assert_eq!(outputs(before), outputs(after), "{place}");
            let (want, found) = (
                interface(before, &before.graph().inputs),
                interface(after, &after.graph().inputs),
            );
            assert_eq!(want, found[..want.len()], "{place}");
            let ours = [VISUAL_MASK_INPUT, SALIENT_MASK_INPUT];
            for added in &after.graph().inputs[want.len()..] {
                assert!(
                    ours.contains(&after.name(*added)),
                    "'{}'; {place}",
                    after.name(*added)
                );
            }
            scoped(before, after, &passes, &place);
        }
    }
}

/// Every node and initializer that the base does not have lies under `duet/<pass>/` of a pass that
/// changed the file, and says so.
fn scoped(before: &Model, after: &Model, passes: &HashSet<&str>, place: &str) {
    let own = |name: &str| {
        let pass = name
            .strip_prefix("duet/")
            .and_then(|rest| rest.split_once('/'));
        pass.is_some_and(|(pass, rest)| passes.contains(pass) && !rest.is_empty())
    };
    let old_outputs: HashSet<&str> = before
        .graph()
        .nodes
        .iter()
        .flat_map(|n| before.node(*n).outputs.iter().flatten())
        .map(|v| before.name(*v))
        .collect();
    let mut inserted = 0;
    for id in &after.graph().nodes {
        let node = after.node(*id);
        match &node.pass {
            Some(pass) => {
                inserted += 1;
                assert!(
                    passes.contains(pass.as_str()),
                    "{}; {place}",
                    after.describe(*id)
                );
                assert!(own(&node.name), "{}; {place}", after.describe(*id));
                for value in node.outputs.iter().flatten() {
                    // A graph output keeps its name whatever computes it.
                    let name = after.name(*value);
                    assert!(own(name) || after.is_output(*value), "'{name}'; {place}");
                }
            }
            None => {
                let known = node.outputs.iter().flatten().any(|v| {
                    // What was a graph output and no longer is was renamed.
                    old_outputs.contains(after.name(*v)) || own(after.name(*v))
                });
                assert!(known, "{} came from nowhere; {place}", after.describe(*id));
            }
        }
    }
    assert!(
        inserted > 0,
        "a pass that changed the file inserted nothing; {place}"
    );
    let old: HashSet<&str> = before
        .graph()
        .initializers
        .iter()
        .map(|v| before.name(*v))
        .collect();
    for value in &after.graph().initializers {
        let name = after.name(*value);
        assert!(old.contains(name) || own(name), "'{name}'; {place}");
    }
}

on_every_fixture!(keep_everything, selections, files);

#[test]
fn a_second_run_is_refused() {
    for name in ["ts-sdpa-mha", "dynamo23-gqa"] {
        let base = fixture(name);
        for first in recipes() {
            let once = rewritten(&base, &first);
            for second in [recipes()[0].clone(), first.clone()] {
                let error = rewrite(once.clone(), &recipe(&second)).expect_err("a second run");
                let PassError::Rewritten {
                    recipe, version, ..
                } = &error
                else {
                    panic!("{error}");
                };
                assert_eq!(recipe, &first);
                assert_eq!(version, env!("CARGO_PKG_VERSION"));
                let message = error.to_string();
                assert!(
                    message.contains(&first) && message.contains("original"),
                    "{message}"
                );
            }
        }
    }
}

#[test]
fn a_recipe_without_passes_changes_nothing() {
    for name in support::models::FIXTURES {
        let done =
            rewrite(fixture(name), &recipe("version: 1\npasses: []")).expect("nothing to do");
        assert!(done.changes.is_empty());
        for part in &done.vlm.parts {
            let bytes = serialize(verify(&part.model).expect("a fixture")).to_vec();
            let path = root()
                .join("models/llava/fixtures")
                .join(name)
                .join(&part.file);
            assert!(
                bytes == fs::read(path).expect("the fixture"),
                "{name}: {}",
                part.file.display()
            );
        }
    }
}

/// A recipe that does not fit is an error that says each of these, and nothing is changed.
fn refused(vlm: &Vlm, text: &str, says: &[&str]) {
    let before: Vec<Vec<u8>> = vlm
        .parts
        .iter()
        .map(|p| serialize(verify(&p.model).expect("a fixture")).to_vec())
        .collect();
    let error = match Recipe::parse(text) {
        Err(error) => error,
        Ok(recipe) => match rewrite(vlm.clone(), &recipe) {
            Err(error) => error,
            Ok(_) => panic!("expected an error saying {says:?} with\n{text}"),
        },
    };
    let message = error.to_string();
    assert!(
        matches!(error, PassError::Recipe(_) | PassError::Requires { .. }),
        "found only after planning: {error:?}"
    );
    for part in says {
        assert!(message.contains(part), "expected '{part}' in: {message}");
    }
    for (part, before) in vlm.parts.iter().zip(before) {
        let now = serialize(verify(&part.model).expect("a fixture")).to_vec();
        assert!(
            now == before,
            "{} was changed by a refused recipe",
            part.file.display()
        );
    }
}

#[test]
fn parameters_that_do_not_fit_are_refused() {
    let prune =
        |drops: &str| recipe_text(&[("visual_prune", &format!("{{drops: [{drops}]}}"))], "");
    let merge = |parameters: &str| recipe_text(&[("token_merge", parameters)], "");
    let one = |pass: &str, parameters: &str| recipe_text(&[(pass, parameters)], "");
    for name in ["ts-eager-mha", "dynamo23-gqa"] {
        let vlm = fixture(name);
        let cases: &[(String, &[&str])] = &[
            // Layers that are not there, and a drop after the last.
            (
                prune("{after_layer: 40, keep: 0.5}"),
                &["after layer 40", "8 layers", "after layer 7"],
            ),
            (
                prune("{after_layer: 8, keep: 0.5}"),
                &["after layer 8", "after layer 7"],
            ),
            (
                prune("{after_layer: 0, keep: 0.5}"),
                &["after_layer is 0", "from 1"],
            ),
            (prune("{after_layer: -1, keep: 0.5}"), &["after_layer"]),
            // Schedules that do not fall.
            (
                prune("{after_layer: 2, keep: 0.5}, {after_layer: 4, keep: 0.6}"),
                &["keep rises from 0.5", "0.6", "must fall"],
            ),
            (
                prune("{after_layer: 4, keep: 0.5}, {after_layer: 2, keep: 0.4}"),
                &["after_layer 2 follows 4", "rising layer"],
            ),
            (
                prune("{after_layer: 4, keep: 0.5}, {after_layer: 4, keep: 0.4}"),
                &["after_layer 4 follows 4"],
            ),
            (prune(""), &["'drops' is empty", "at least one"]),
            // Ratios that are none.
            (
                prune("{after_layer: 2, keep: 1.5}"),
                &["keep is 1.5", "0.0 to 1.0"],
            ),
            (prune("{after_layer: 2, keep: -0.1}"), &["keep is -0.1"]),
            (prune("{after_layer: 2, keep: .nan}"), &["keep is NaN"]),
            (prune("{after_layer: 2, keep: half}"), &["keep"]),
            (prune("{after_layer: 2}"), &["keep"]),
            // Merges that leave nothing, or mean nothing.
            (
                merge("{dominant: 0, contextual: 4}"),
                &["dominant is 0", "CLS", "cls: drop"],
            ),
            (
                merge("{dominant: 0, contextual: 0, cls: drop}"),
                &["leave no token"],
            ),
            (
                merge("{dominant: 4, contextual: 4, cluster_width: 0}"),
                &["cluster_width is 0", "expected 1 to"],
            ),
            (
                merge("{dominant: 1.5, contextual: 4}"),
                &["1.5 is no ratio", "0.0 to 1.0"],
            ),
            (
                merge("{dominant: -3, contextual: 4}"),
                &["-3 is no token count"],
            ),
            (merge("{dominant: 4}"), &["contextual"]),
            (
                merge("{dominant: 4, contextual: 1, selector: best}"),
                &["best", "attention"],
            ),
            (
                merge("{dominant: 4, contextual: 1, clss: drop}"),
                &["'clss'", "did you mean 'cls'?"],
            ),
            // Other passes' parameters.
            (
                one("random_drop", "{keep: 0}"),
                &["random_drop", "keep leaves none of 81"],
            ),
            (one("uniform_drop", "{keep: 1.5}"), &["1.5 is no ratio"]),
            (one("div_prune", "{keep: 0.001}"), &["keep leaves none"]),
            (
                one("random_drop", "{keep: 3, sed: 1}"),
                &["'sed'", "did you mean 'seed'?"],
            ),
            (one("div_prune", "{}"), &["keep"]),
            (
                one("fast_v", "{keep: 0.5, after_layer: 8}"),
                &["after layer 8", "after layer 7"],
            ),
            (one("fast_v", "{keep: 1.5}"), &["keep is 1.5", "0.0 to 1.0"]),
            // Two that do one thing.
            (
                recipe_text(
                    &[
                        ("token_merge", "{dominant: 4, contextual: 1}"),
                        ("div_prune", "{keep: 4}"),
                    ],
                    "",
                ),
                &["token_merge and div_prune both", "one of them"],
            ),
            (
                recipe_text(
                    &[
                        ("visual_prune", "{drops: [{after_layer: 2, keep: 0.5}]}"),
                        ("fast_v", "{keep: 0.5}"),
                    ],
                    "",
                ),
                &["visual_prune and fast_v both", "in the decoder"],
            ),
            (
                recipe_text(
                    &[
                        (
                            "token_merge",
                            "{dominant: 4, contextual: 1, placement: decoder}",
                        ),
                        ("fast_v", "{keep: 0.5, after_layer: 1}"),
                    ],
                    "",
                ),
                &["rank_layer: previous after layer 1", "drop after layer 2"],
            ),
            // Markers that cannot be made.
            (
                format!("{}marker: token-id\n", prune("{after_layer: 2, keep: 0.5}")),
                &["token-id", "input_ids", "marker: channel"],
            ),
            (
                format!("{}marker: static\n", prune("{after_layer: 2, keep: 0.5}")),
                &["span"],
            ),
            (
                format!(
                    "{}marker: static\nspan: {{start: -1, count: 4}}\n",
                    prune("{after_layer: 2, keep: 0.5}")
                ),
                &["span", "start >= 0"],
            ),
        ];
        for (text, says) in cases {
            refused(&vlm, text, says);
        }
    }
}

/// The fixture without the files that `keep` does not want.
fn only(name: &str, keep: fn(&Role) -> bool) -> Vlm {
    let mut vlm = fixture(name);
    vlm.parts.retain(|part| keep(&part.role));
    vlm
}

#[test]
fn a_model_without_the_part_a_pass_works_on_is_refused() {
    let merge = recipe_text(&[("token_merge", entry("token_merge").samples[0])], "");
    let prune = recipe_text(&[("visual_prune", entry("visual_prune").samples[0])], "");
    for name in ["ts-sdpa-gqa", "dynamo18-mha"] {
        let blind = only(name, |r| !matches!(r, Role::Vision(_)));
        refused(
            &blind,
            &merge,
            &[
                "vision tower",
                "none was recognised",
                "decoder_model_merged.onnx",
            ],
        );
        refused(
            &blind,
            &prune,
            &[
                "no vision encoder",
                "whole model directory",
                "marker: input",
            ],
        );
        for pass in REGISTRY.iter().filter(|e| e.stage == Stage::Encoder) {
            let text = recipe_text(&[(pass.name, pass.samples[0])], "");
            refused(
                &blind,
                &text,
                &[pass.name, "vision tower", "none was recognised"],
            );
        }
        let mute = only(name, |r| !matches!(r, Role::Decoder(_)));
        refused(
            &mute,
            &prune,
            &["decoder", "none was recognised", "vision_encoder.onnx"],
        );
        let wordless = only(name, |r| !matches!(r, Role::Embedding(_)));
        refused(&wordless, &prune, &["no token embedding", "marker: static"]);
        // One file on its own is enough for what needs no more.
        let tower = only(name, |r| matches!(r, Role::Vision(_)));
        assert!(rewrite(tower, &recipe(&merge)).is_ok());
        let decoder = only(name, |r| matches!(r, Role::Decoder(_)));
        let alone = format!("{prune}marker: input\n");
        assert!(rewrite(decoder, &recipe(&alone)).is_ok());
    }
}
