//! `duet rewrite --static`: every size in every graph is a number, and what comes out is what the rewritten model of
//! open shapes gives.

mod commands;
mod support;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Dim, Model, ValueId, loose};
use duet_onnx::passes::{FixedShapes, PADDING_KEY, rewrite_fixed};
use duet_onnx::validate::scenario::{Scenario, Seeded, Turn};
use duet_onnx::validate::{Options, check_fixed};

use commands::{duet, source};
use support::conversation::{apart, hold};
use support::forms::form;
use support::models::{
    FALL, MERGE, PLACED, Runner, TO_KEEP, fixture, options, parts_at, recipe, recipe_text,
    rewritten, runtime, sizes,
};

const NOTHING: &str = "{drops: [{after_layer: 3, keep: 1.0}]}";

fn both() -> String {
    recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], "")
}

fn shapes(text: &str) -> FixedShapes {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn fixed(base: &Vlm, text: &str, sizes: &str) -> Vlm {
    let done = rewrite_fixed(base.clone(), &recipe(text), &shapes(sizes));
    done.unwrap_or_else(|e| panic!("{e} with\n{text}")).vlm
}

fn refused(base: &Vlm, text: &str, sizes: &str) -> String {
    let done = rewrite_fixed(base.clone(), &recipe(text), &shapes(sizes));
    done.map(|_| ()).expect_err("refused").to_string()
}

/// The sizes that a file states of a value.
fn dims(model: &Model, value: ValueId) -> Option<Vec<i64>> {
    let shape = model.value(value).ty.as_ref()?.shape()?;
    shape.iter().map(Dim::known).collect()
}

fn input(model: &Model, name: &str) -> Vec<i64> {
    let value = model
        .input(name)
        .unwrap_or_else(|| panic!("no input {name}"));
    dims(model, value).unwrap_or_else(|| panic!("{name} is not fixed"))
}

fn output(model: &Model, name: &str) -> Vec<i64> {
    let value = model
        .output(name)
        .unwrap_or_else(|| panic!("no output {name}"));
    dims(model, value).unwrap_or_else(|| panic!("{name} is not fixed"))
}

fn file<'a>(vlm: &'a Vlm, stem: &str) -> &'a Model {
    let named = |p: &&duet_onnx::arch::Part| p.file.file_stem().is_some_and(|s| s == stem);
    let found = vlm.parts.iter().find(named);
    &found.unwrap_or_else(|| panic!("no {stem}")).model
}

/// Every value that a node gives has a stated type of numbers, no node computes a size, and what decides a shape
/// (how many are kept, what is reshaped to) is a constant.
fn numbers_only(name: &str, vlm: &Vlm) {
    let decides = |op: &str| match op {
        "TopK" | "Reshape" | "Expand" | "Tile" => Some(1..2),
        "Slice" => Some(1..5),
        "Range" => Some(0..3),
        "ConstantOfShape" => Some(0..1),
        _ => None,
    };
    for part in &vlm.parts {
        if matches!(part.role, Role::Unknown(_)) {
            continue;
        }
        let (model, label) = (&part.model, part.label());
        let open: Vec<String> = loose(model).iter().map(ToString::to_string).collect();
        assert!(open.is_empty(), "{name} {label}: {open:#?}");
        for &id in &model.graph().nodes {
            let node = model.node(id);
            for &value in node.outputs.iter().flatten() {
                let is_constant = node.is("Constant");
                assert!(
                    is_constant || dims(model, value).is_some(),
                    "{name} {label}: {} gives '{}', whose type is {:?}",
                    model.describe(id),
                    model.name(value),
                    model.value(value).ty
                );
            }
            for slot in decides(&node.op_type).into_iter().flatten() {
                let Some(value) = node.input(slot) else {
                    continue;
                };
                let constant = duet_onnx::ir::consts::constant(model, value);
                assert!(
                    constant.is_some(),
                    "{name} {label}: input {slot} of {}",
                    model.describe(id)
                );
            }
        }
    }
}

#[test]
fn every_size_is_a_number() {
    let texts = [
        both(),
        recipe_text(&[("token_merge", PLACED), ("visual_prune", TO_KEEP)], ""),
        recipe_text(&[("visual_prune", NOTHING)], ""),
        recipe_text(
            &[
                ("uniform_drop", "{keep: 20}"),
                ("fast_v", "{after_layer: 2, keep: 0.5}"),
            ],
            "",
        ),
    ];
    for name in [
        "ts-eager-mha",
        "ts-sdpa-gqa",
        "dynamo18-gqa",
        "dynamo23-mha",
    ] {
        let base = fixture(name);
        for text in &texts {
            numbers_only(name, &fixed(&base, text, "prompt=20,answer=8"));
        }
    }
    for name in [
        "genai-fp32-gqa",
        "genai-int4-gqa",
        "genai09-mha-mha",
        "fp16-ts-sdpa-mha",
        "q4f16-dynamo18-mha",
        "int8-ts-eager-gqa",
        "ort-extended-ts-sdpa-mha",
        "idefics3-plain-ts-sdpa",
        "gemma3-ts-sdpa",
        "function-dynamo18-mha",
        "split-ts-sdpa-gqa",
    ] {
        let base = parts_at(&form(name).directory());
        numbers_only(
            name,
            &fixed(&base, &both(), "prompt=20,images=2,answer=8,batch=2"),
        );
    }
}

#[test]
fn the_schedule_gives_the_sizes() {
    let base = fixture("ts-sdpa-gqa");
    let vlm = fixed(&base, &both(), "prompt=20,images=2,answer=8,batch=3");
    let vision = file(&vlm, "vision_encoder");
    assert_eq!(input(vision, "pixel_values"), [6, 3, 126, 126]);
    assert_eq!(output(vision, "image_features"), [6, 30, 33]);
    assert_eq!(input(file(&vlm, "embed_tokens"), "input_ids"), [3, 80]);
    // 60 visual tokens, 30 behind layer 3, none behind layer 6.
    let prompt = file(&vlm, "decoder_model");
    assert_eq!(input(prompt, "inputs_embeds"), [3, 80, 33]);
    assert_eq!(input(prompt, "attention_mask"), [3, 80]);
    assert_eq!(prompt.graph().inputs.len(), 3, "no cache goes in");
    let columns = |model: &Model, what: &str| -> Vec<i64> {
        (0..8)
            .map(|l| output(model, &format!("{what}.{l}.key"))[2])
            .collect()
    };
    assert_eq!(columns(prompt, "present"), [80, 80, 80, 50, 50, 50, 20, 20]);
    assert_eq!(output(prompt, "logits")[..2], [3, 20]);
    let step = file(&vlm, "decoder_with_past_model");
    assert_eq!(input(step, "inputs_embeds"), [3, 1, 33]);
    assert_eq!(input(step, "attention_mask"), [3, 88]);
    assert_eq!(input(step, "past_key_values.0.key"), [3, 2, 87, 8]);
    assert_eq!(input(step, "past_key_values.7.value"), [3, 2, 27, 8]);
    assert_eq!(columns(step, "present"), [88, 88, 88, 58, 58, 58, 28, 28]);
    // Nothing is visual in a step: its drop points are gone.
    for &id in &step.graph().nodes {
        let node = step.node(id);
        assert!(
            !node.is("TopK") && !node.is("GatherND"),
            "{}",
            step.describe(id)
        );
    }
    assert_eq!(step.metadata(PADDING_KEY), Some("left"));
    let group = parts_at(&form("genai-fp32-gqa").directory());
    let group = fixed(&group, &both(), "prompt=20");
    assert_eq!(
        file(&group, "decoder_model").metadata(PADDING_KEY),
        Some("right")
    );
}

/// A conversation with one image, of a prompt as long as it may be and of a shorter one, and a second question.
fn same_answers(name: &str, base: &Vlm, text: &str, sizes_text: &str, images: usize, batch: usize) {
    let (open, closed) = (
        Runner::open(&rewritten(base, text)),
        Runner::open(&fixed(base, text, sizes_text)),
    );
    let (size, width) = sizes(base);
    for (number, text_tokens) in [20usize, 13].into_iter().enumerate() {
        let mut rng = Seeded::new(3 + number as u64);
        let row = |rng: &mut Seeded| -> Vec<Vec<i64>> {
            let mut segments = vec![rng.ids(3, 90); images];
            segments.push(rng.ids(text_tokens - 3 * images, 90));
            segments
        };
        let mut turns = vec![Turn {
            rows: (0..batch).map(|_| row(&mut rng)).collect(),
        }];
        turns.push(Turn {
            rows: (0..batch).map(|_| vec![rng.ids(3, 90)]).collect(),
        });
        let scenario = Scenario {
            name: "fixed",
            turns,
            decode: 2,
        };
        let want = hold(&open, &scenario, size, width);
        let found = hold(&closed, &scenario, size, width);
        let worst = apart(&want, &found);
        assert!(worst < 1e-4, "{name}: {worst} standard deviations\n{text}");
    }
}

#[test]
fn answers_are_those_of_open_shapes() {
    runtime();
    for name in [
        "ts-eager-mha",
        "ts-sdpa-gqa",
        "dynamo18-gqa",
        "dynamo23-mha",
    ] {
        let base = fixture(name);
        same_answers(name, &base, &both(), "prompt=20,answer=8", 1, 1);
        let to_keep = recipe_text(&[("token_merge", PLACED), ("visual_prune", TO_KEEP)], "");
        same_answers(name, &base, &to_keep, "prompt=20,answer=8", 1, 1);
    }
    let base = fixture("ts-sdpa-mha");
    same_answers(
        "two images, two rows",
        &base,
        &both(),
        "prompt=20,images=2,answer=8,batch=2",
        2,
        2,
    );
    let nothing = recipe_text(&[("visual_prune", NOTHING)], "");
    same_answers(
        "everything kept",
        &base,
        &nothing,
        "prompt=20,answer=8",
        1,
        1,
    );
    let told = recipe_text(
        &[("token_merge", MERGE), ("visual_prune", FALL)],
        "marker: input",
    );
    same_answers("marker: input", &base, &told, "prompt=20,answer=8", 1, 1);
}

/// Lengths of rows instead of a mask, a cache inside the operator, two files.
#[test]
fn answers_of_fused_attention_are_those_of_open_shapes() {
    runtime();
    for name in [
        "genai-fp32-gqa",
        "genai-fp32-unpacked-gqa",
        "genai-gemma2",
        "split-ts-sdpa-gqa",
    ] {
        let base = parts_at(&form(name).directory());
        same_answers(name, &base, &both(), "prompt=20,answer=8", 1, 1);
    }
}

#[test]
fn half_precision_and_quantised_forms_are_valid() {
    runtime();
    for name in [
        "fp16-ts-sdpa-mha",
        "genai-fp16-rotary-mha",
        "q4-ts-sdpa-gqa",
        "genai-int4-gqa",
    ] {
        let base = parts_at(&form(name).directory());
        let (text, shapes) = (both(), shapes("prompt=21,answer=6"));
        let vlm = rewrite_fixed(base.clone(), &recipe(&text), &shapes)
            .unwrap_or_else(|e| panic!("{e}"))
            .vlm;
        let options = Options {
            session: options(),
            seed: 4,
        };
        let report = check_fixed(&base, &vlm, &recipe(&text), &shapes, &options, &mut |_| ());
        let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
        let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
        assert!(failed.is_empty(), "{name}: {failed:#?}");
        let ran = report
            .findings
            .iter()
            .filter(|f| f.check.contains("fixed shapes"));
        assert_eq!(ran.count(), 2, "{name}");
    }
}

/// The check compares: files of another schedule are not valid.
#[test]
fn other_files_are_not_valid() {
    runtime();
    let base = fixture("ts-eager-gqa");
    let other = recipe_text(
        &[
            ("token_merge", MERGE),
            (
                "visual_prune",
                "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 6, keep: 0.0}]}",
            ),
        ],
        "",
    );
    let vlm = fixed(&base, &other, "prompt=21,answer=6");
    let options = Options {
        session: options(),
        seed: 4,
    };
    let text = recipe(&both());
    let report = check_fixed(
        &base,
        &vlm,
        &text,
        &shapes("prompt=21,answer=6"),
        &options,
        &mut |_| (),
    );
    let report = report.expect("a report");
    for what in [
        "decoder_model.onnx: reproducible",
        "fixed shapes: full prompt",
    ] {
        let failed = report
            .findings
            .iter()
            .any(|f| !f.passed && f.check.contains(what));
        assert!(failed, "{what}: {:#?}", report.findings);
    }
}

#[test]
fn what_has_no_fixed_shapes_is_refused_by_name() {
    let base = fixture("ts-eager-mha");
    let with = |rest: &str| recipe_text(&[("visual_prune", FALL)], rest);
    let refusals = [
        (
            refused(&base, &with("kv: padded"), "prompt=20"),
            "kv: padded",
        ),
        (
            refused(
                &base,
                &recipe_text(
                    &[(
                        "visual_prune",
                        "{drops: [{after_layer: 3, keep: 0.5}], ratio_base: current}",
                    )],
                    "",
                ),
                "prompt=20",
            ),
            "ratio_base: current",
        ),
        (
            refused(
                &base,
                &with("marker: static\nspan: {start: 5, count: 81}"),
                "prompt=20",
            ),
            "marker: static",
        ),
        (
            refused(
                &parts_at(&form("if-ts-eager-mha").directory()),
                &both(),
                "prompt=20",
            ),
            "branches of an If",
        ),
        (
            refused(
                &parts_at(&form("vlm-ts-sdpa-mha").directory()),
                &both(),
                "prompt=20",
            ),
            "NonZero '/net/model/NonZero'",
        ),
        (
            refused(
                &parts_at(&form("osc-t457-dynamo18-mha").directory()),
                &both(),
                "prompt=20",
            ),
            "Range 'node_Range_56'",
        ),
        (
            refused(
                &parts_at(&form("genaivlm-fp32-gqa").directory()),
                &both(),
                "prompt=20",
            ),
            "embedding.onnx",
        ),
        (
            refused(
                &parts_at(&source("models/qwen_vl/fixtures/ts-sdpa")),
                &both(),
                "prompt=20",
            ),
            "rows of patches",
        ),
        (
            refused(
                &parts_at(&source("models/video_llava/fixtures/ts-sdpa")),
                &both(),
                "prompt=20",
            ),
            "takes clips",
        ),
    ];
    for (message, part) in refusals {
        assert!(message.contains(part), "{message}");
    }
    for (text, part) in [
        ("images=1", "prompt=N is missing"),
        ("promt=64", "did you mean 'prompt'?"),
        ("prompt=0", "from 1 to"),
        ("prompt", "KEY=N"),
        ("prompt=3,prompt=4", "twice"),
    ] {
        let error = text.parse::<FixedShapes>().expect_err(text);
        assert!(error.contains(part), "{error}");
    }
    let said = shapes("answer=9, prompt=64,visual=30");
    assert_eq!(
        said.to_string(),
        "prompt=64,images=1,visual=30,answer=9,batch=1"
    );
    assert_eq!(shapes(&said.to_string()), said);
}

/// The trained model, from the command line: written, looked at, asked, validated.
#[test]
fn the_command_line_writes_asks_and_validates() {
    runtime();
    let scratch = tempfile::tempdir().expect("a directory");
    let at = |name: &str| commands::text(&scratch.path().join(name)).to_owned();
    let trained = |path: &str| commands::text(&source("models/vqa").join(path)).to_owned();
    let (model, image) = (trained("llava"), trained("test/images/000.png"));
    let (open, closed) = (at("open"), at("closed"));
    let rewrite = |rest: &[&str]| {
        let arguments = ["rewrite", &model, "--recipe", "tiles-43"];
        duet(&[&arguments, rest].concat())
    };
    rewrite(&["--out", &open, "--json", "-q"]).json();
    let sizes = ["--static", "prompt=40", "--static", "answer=4"];
    let said = rewrite(&[&["--out", &closed, "--json", "-q"], &sizes[..]].concat()).json();
    assert_eq!(
        said["static"]["shapes"],
        "prompt=40,images=1,answer=4,batch=1"
    );
    let files = said["static"]["files"].as_array().expect("a list");
    assert_eq!(files.len(), 4);
    let size = |name: &str, way: &str, what: &str| -> i64 {
        let named = |f: &&serde_json::Value| f["file"] == format!("onnx/{name}.onnx");
        let file = files
            .iter()
            .find(named)
            .unwrap_or_else(|| panic!("no {name}: {said}"));
        file[way][what][1]
            .as_i64()
            .unwrap_or_else(|| panic!("no {what}: {said}"))
    };
    let visual = size("vision_encoder", "outputs", "image_features");
    let tokens = size("decoder_model", "inputs", "inputs_embeds");
    assert_eq!(tokens, 40 + visual);
    let decoder = scratch.path().join("closed/onnx/decoder_model_merged.onnx");
    assert!(
        !decoder.exists(),
        "the decoder for any length is not carried over"
    );
    let looked = duet(&["inspect", &closed, "--json"]).json();
    assert!(
        looked
            .to_string()
            .contains("prompt=40,images=1,answer=4,batch=1"),
        "{looked}"
    );
    let ask = |model: &str, question: &str, rest: &[&str]| {
        let arguments = ["run", model, "--image", &image, "--prompt", question];
        duet(&[&arguments, rest].concat())
    };
    for question in [
        "Which digit does the pink tile show?",
        "What letter is on the yellow tile?",
    ] {
        let limit = ["--max-new-tokens", "4", "--json"];
        let want = ask(&open, question, &limit).json();
        let found = ask(&closed, question, &limit).json();
        assert_eq!(want["tokens"], found["tokens"], "{question}");
        assert_eq!(want["cache_lengths"], found["cache_lengths"]);
    }
    let long = "Which digit does the pink tile show? ".repeat(9);
    let ran = ask(&closed, &long, &[]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    let most = format!("at most {tokens} tokens in a prompt");
    assert!(ran.stderr.contains(&most), "{}", ran.stderr);
    let ran = duet(&["run", &closed, "--prompt", "Which digit?"]);
    let exactly = format!("{visual} visual tokens");
    assert!(
        ran.stderr.contains(&exactly) && ran.code == 2,
        "{}",
        ran.stderr
    );
    let report = duet(&["validate", &model, &closed, "--json"]).json();
    assert!(
        report.to_string().contains("fixed shapes: full prompt"),
        "{report}"
    );
    let beside = rewrite(&["--beside", "x", "--static", "prompt=40"]);
    assert_eq!(beside.code, 2);
}
