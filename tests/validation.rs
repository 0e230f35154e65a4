//! `duet validate`'s core: rewritten models pass every check, and models that were tampered with fail
//! the check that is there for it.

#[macro_use]
mod support;

use bytes::Bytes;
use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{DataType, Model, Patch, TensorData, verify};
use duet_onnx::onnx::{read_bytes, serialize};
use duet_onnx::validate::Report;

use support::models::{fixture, kept_name, recipe_text, rewritten};
use support::reports::failures;

const MERGE: &str = "{dominant: 30, contextual: 6}";
const PRUNE: &str = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";

fn both() -> String {
    recipe_text(&[("token_merge", MERGE), ("visual_prune", PRUNE)], "")
}

/// The other choices: another selector and budget, CLS left out, salient text, positions kept, the mark
/// as an input.
fn other() -> String {
    let merge = "{dominant: 0.2, contextual: 5, selector: local, cls: drop}";
    let prune = "{drops: [{after_layer: 3, keep: 0.4}], text: salient, positions: keep}";
    recipe_text(
        &[("token_merge", merge), ("visual_prune", prune)],
        "marker: input\n",
    )
}

/// What is found with the inputs of these tests.
fn validated(base: &Vlm, made: &Vlm, text: &str) -> Report {
    support::reports::validated(base, made, text, 4)
}

fn rewritten_models_are_valid(name: &str) {
    let base = fixture(name);
    for text in [both(), other()] {
        let report = validated(&base, &rewritten(&base, &text), &text);
        assert!(report.passed(), "{name}: {:#?}\n{text}", failures(&report));
        let says = |what: &str| report.findings.iter().any(|f| f.check.contains(what));
        for what in [
            "interface",
            "weights",
            "reproducible",
            "one image",
            "second question",
            "tract",
        ] {
            assert!(says(what), "{name}: nothing was said about '{what}'");
        }
        assert!(
            report.worst_logits <= 1e-4 && report.worst_features <= 1e-4,
            "{name}"
        );
    }
}

on_every_fixture!(rewritten_models_are_valid);

/// The file of a role, changed by `change`.
fn tampered(vlm: &Vlm, role: fn(&Role) -> bool, change: impl Fn(&Model) -> Model) -> Vlm {
    let mut vlm = vlm.clone();
    let part = vlm
        .parts
        .iter_mut()
        .find(|p| role(&p.role))
        .expect("a file of this role");
    part.model = change(&part.model);
    verify(&part.model).expect("tampering leaves a well-formed graph");
    vlm
}

fn decoder(role: &Role) -> bool {
    matches!(role, Role::Decoder(_))
}

fn vision(role: &Role) -> bool {
    matches!(role, Role::Vision(_))
}

/// What each of the fixtures here is tampered with.
const TAMPERED: [&str; 2] = ["ts-sdpa-mha", "dynamo23-gqa"];

/// Findings that have failed must include these, and running the models beside each other shows it too.
fn fails(report: &Report, checks: &[&str], what: &str) {
    assert!(!report.passed(), "{what} was not noticed");
    let failed = failures(report);
    for check in checks {
        let found = failed.iter().any(|f| f.contains(check));
        assert!(found, "{what}: expected '{check}' among {failed:#?}");
    }
    let ran = failed
        .iter()
        .any(|f| f.starts_with("one image") || f.starts_with("two images"));
    assert!(ran, "{what}: the numbers do not show it: {failed:#?}");
}

#[test]
fn another_recipes_file_under_this_recipes_stamp_is_noticed() {
    for name in TAMPERED {
        let base = fixture(name);
        let claimed = both();
        let milder = PRUNE.replace("keep: 0.5", "keep: 0.6");
        let real = recipe_text(&[("token_merge", MERGE), ("visual_prune", &milder)], "");
        let swapped = tampered(&rewritten(&base, &real), decoder, |model| {
            let mut patch = Patch::new(model, "stamp");
            patch.metadata("duet.recipe", &claimed);
            let plan = patch.finish();
            model.clone().apply(plan).expect("metadata can be set")
        });
        let report = validated(&base, &swapped, &claimed);
        fails(
            &report,
            &["reproducible", "cache lengths", "another set is kept"],
            name,
        );
    }
}

#[test]
fn a_changed_weight_is_noticed() {
    for name in TAMPERED {
        let base = fixture(name);
        let text = both();
        for role in [decoder as fn(&Role) -> bool, vision] {
            let changed = tampered(&rewritten(&base, &text), role, |model| {
                // A matrix whose every number counts, found by its own bytes in the file.
                let inline = |v: &&duet_onnx::ir::ValueId| {
                    let tensor = model.value(**v).initializer.as_ref();
                    tensor.is_some_and(|t| {
                        t.dims.len() == 2
                            && matches!(&t.data, TensorData::Raw(b) if b.len() >= 4096)
                    })
                };
                let value = model
                    .graph()
                    .initializers
                    .iter()
                    .find(inline)
                    .expect("a matrix");
                let tensor = model.value(*value).initializer.as_ref().expect("a matrix");
                let bytes = tensor.bytes(model.external()).expect("inline");
                let mut file = serialize(verify(model).expect("rewritten")).to_vec();
                let at = file
                    .windows(bytes.len())
                    .position(|w| w == &bytes[..])
                    .expect("the weight is in the file");
                for number in file[at..at + bytes.len()].chunks_exact_mut(4) {
                    let value = f32::from_le_bytes(number.try_into().expect("4 bytes"));
                    number.copy_from_slice(&(value * 1.05).to_le_bytes());
                }
                read_bytes("tampered", Bytes::from(file)).expect("still a model")
            });
            let report = validated(&base, &changed, &text);
            fails(&report, &["weights", "reproducible"], name);
        }
    }
}

#[test]
fn a_gather_index_off_by_one_is_noticed() {
    for name in TAMPERED {
        let base = fixture(name);
        let text = both();
        let off = tampered(&rewritten(&base, &text), decoder, |model| {
            let kept = model.find(&kept_name(1)).expect("kept indices");
            let readers = model.value(kept).uses.clone();
            let mut patch = Patch::new(model, "tampered");
            let (one, zero) = (patch.i64(1), patch.i64(0));
            let less = patch.op("Sub", &[kept, one]);
            let less = patch.op("Max", &[less, zero]);
            for reader in readers {
                patch.rewire(reader.node, reader.slot, less);
            }
            let plan = patch.finish();
            model.clone().apply(plan).expect("the patch applies")
        });
        let report = validated(&base, &off, &text);
        fails(&report, &["reproducible"], name);
        // What it says it kept is right; what it went on with is not.
        let failed = failures(&report);
        assert!(failed.iter().all(|f| !f.contains("weights")), "{failed:#?}");
    }
}

/// What ONNX Runtime stops at is a finding of the model, not a validation that could not be carried out.
#[test]
fn a_model_that_stops_at_run_time_is_noticed() {
    let base = fixture(TAMPERED[0]);
    let text = both();
    let beyond = |model: &Model, name: &str| {
        let kept = model.find(name).expect("indices");
        let readers = model.value(kept).uses.clone();
        let mut patch = Patch::new(model, "tampered");
        let far = patch.i64(100_000);
        let far = patch.op("Add", &[kept, far]);
        for reader in readers {
            patch.rewire(reader.node, reader.slot, far);
        }
        let plan = patch.finish();
        model.clone().apply(plan).expect("the patch applies")
    };
    let dominant = "duet/token_merge/dominant_indices";
    let stops = [
        tampered(&rewritten(&base, &text), vision, |m| beyond(m, dominant)),
        tampered(&rewritten(&base, &text), decoder, |m| {
            beyond(m, &kept_name(1))
        }),
        // A word that the engine does not know: the file does not open.
        tampered(&rewritten(&base, &text), decoder, |model| {
            let mut patch = Patch::new(model, "tampered");
            let logits = model.graph().outputs[0];
            let last = model.producer_of(logits).expect("a node");
            let first = model.node(last).input(0).expect("an input");
            let unknown = patch.op("NoSuchOperator", &[first]);
            patch.rewire(last, 0, unknown);
            let plan = patch.finish();
            model.clone().apply(plan).expect("the patch applies")
        }),
    ];
    for made in stops {
        let failed = failures(&validated(&base, &made, &text));
        let said = |f: &String| f.contains("the rewritten model does not run: ");
        assert!(failed.iter().any(said), "{failed:#?}");
    }
}

#[test]
fn a_scale_on_a_merged_token_is_noticed() {
    for name in TAMPERED {
        let base = fixture(name);
        let text = recipe_text(&[("token_merge", MERGE)], "");
        let scaled = tampered(&rewritten(&base, &text), vision, |model| {
            let merged = model
                .find("duet/token_merge/merged_tokens")
                .expect("merged tokens");
            let readers = model.value(merged).uses.clone();
            let mut patch = Patch::new(model, "tampered");
            let factor = patch.f32(1.01);
            let more = patch.op("Mul", &[merged, factor]);
            for reader in readers {
                patch.rewire(reader.node, reader.slot, more);
            }
            let plan = patch.finish();
            model.clone().apply(plan).expect("the patch applies")
        });
        let report = validated(&base, &scaled, &text);
        fails(&report, &["reproducible"], name);
        assert!(report.worst_features > 1e-4, "{}", report.worst_features);
    }
}

#[test]
fn a_discarded_feature_marked_as_kept_is_noticed() {
    for name in TAMPERED {
        let base = fixture(name);
        let merge = "{dominant: 30, contextual: 6, placement: decoder}";
        let text = recipe_text(&[("token_merge", merge)], "");
        let marked = tampered(&rewritten(&base, &text), vision, |model| {
            // Features and their marks are put together last.
            let last = model.producer_of(model.graph().outputs[0]).expect("a node");
            let marks = model.node(last).input(1).expect("marks");
            let mut patch = Patch::new(model, "tampered");
            let one = patch.f32(1.0);
            let all_kept = patch.op("Min", &[marks, one]);
            patch.rewire(last, 1, all_kept);
            let plan = patch.finish();
            model.clone().apply(plan).expect("the patch applies")
        });
        let report = validated(&base, &marked, &text);
        let mark = "the marker channel of a feature is 1, not 2";
        fails(&report, &["reproducible", mark, "cache lengths"], name);
        assert!(report.worst_features <= 1e-4, "{}", report.worst_features);
    }
}

/// Every second score is a quarter better than it should be: the best tokens stay the best, but some
/// that should just be kept go for some that should just not be.
fn favouring(model: &Model, scores: &str) -> Model {
    let scores = model.find(scores).expect("scores");
    let readers = model.value(scores).uses.clone();
    let mut patch = Patch::new(model, "tampered");
    let length = patch.size_of(scores, 1);
    let every = patch.iota(length);
    let two = patch.i64(2);
    let odd = patch.op("Mod", &[every, two]);
    let odd = patch.cast(odd, DataType::Float);
    let (little, one) = (patch.f32(0.25), patch.f32(1.0));
    let more = patch.op("Mul", &[odd, little]);
    let factor = patch.op("Add", &[more, one]);
    let changed = patch.op("Mul", &[scores, factor]);
    for reader in readers {
        patch.rewire(reader.node, reader.slot, changed);
    }
    let plan = patch.finish();
    model.clone().apply(plan).expect("the patch applies")
}

#[test]
fn a_ranking_that_is_a_little_wrong_is_no_near_tie() {
    for name in TAMPERED {
        let base = fixture(name);
        let text = both();
        let pruned = tampered(&rewritten(&base, &text), decoder, |model| {
            favouring(model, "duet/visual_prune/drop1/scores")
        });
        let report = validated(&base, &pruned, &text);
        fails(&report, &["reproducible", "another set is kept"], name);
        let merged = tampered(&rewritten(&base, &text), vision, |model| {
            favouring(model, "duet/token_merge/score")
        });
        let report = validated(&base, &merged, &text);
        fails(&report, &["reproducible"], name);
        assert!(report.worst_features > 1e-2, "{}", report.worst_features);
    }
}
