//! Qwen's vision towers in the forms that people have (`models/qwen_vl/vision_forms.py`): recognised, and merged as the
//! PyTorch reference has it. Forms of other precision are compared with their own unmodified file.

mod support;

use std::path::{Path, PathBuf};

use duet_onnx::arch::{Mask, Role, VisionTower, Vlm};

use support::models::{open, parts_at, rewritten, root};
use support::packed::contents;
use support::patches::{as_pytorch_has_it, run};
use support::reports::{failures, validated};

/// The one grid of the form without a grid input.
const FIXED: [i64; 3] = [1, 10, 14];

/// A packed form, recognised.
fn form(name: &str) -> Vlm {
    altered(name, |bytes| bytes)
}

/// The same with its bytes changed first.
fn altered(name: &str, change: fn(Vec<u8>) -> Vec<u8>) -> Vlm {
    let packed = root().join(format!(
        "models/qwen_vl/fixtures/{name}/onnx/vision_encoder.onnx.gz"
    ));
    let plain = contents(&packed);
    // Each test has a place of its own, since tests run at once.
    let test = std::thread::current()
        .name()
        .unwrap_or("main")
        .replace("::", "-");
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join("qwen_exports")
        .join(test)
        .join(name);
    std::fs::create_dir_all(folder.join("onnx")).expect("a folder");
    std::fs::write(folder.join("onnx/vision_encoder.onnx"), change(plain)).expect("a file");
    parts_at(&folder)
}

fn tower(vlm: &Vlm) -> &VisionTower {
    match &vlm.parts[0].role {
        Role::Vision(tower) => tower,
        Role::Unknown(why) => panic!("not recognised: {why:?}"),
        other => panic!("recognised as {}", other.name()),
    }
}

#[test]
fn attention_in_loops_over_windows_as_genai_has_it() {
    let vlm = form("vision-genai");
    let found = tower(&vlm);
    let rows = found.rows.as_ref().expect("rows of patches");
    let model = &vlm.parts[0].model;
    assert!(model.node(found.site.node).op_type == "Loop");
    assert!(matches!(found.site.masks[..], [Mask::Segments(_)]));
    assert_eq!(
        (
            found.layers,
            rows.windowed,
            found.heads,
            found.head_dim,
            rows.per
        ),
        (4, 2, 2, 16, 4)
    );
    as_pytorch_has_it("vision-genai", &vlm, "merge", |image| image.grid != FIXED);
}

/// A loop that does not go over all segments is no such attention, and neither is another mask.
#[test]
fn loops_that_are_something_else_are_refused() {
    let vlm = altered("vision-genai", |bytes| {
        // The operator of one node in front: field 4, four bytes. As long, and not the number of bounds.
        let (from, to) = (*b"\x22\x04Size", *b"\x22\x04Sign");
        let mut bytes = bytes;
        let places = bytes.len() - from.len();
        for at in 0..places {
            if bytes[at..at + from.len()] == from {
                bytes[at..at + from.len()].copy_from_slice(&to);
            }
        }
        bytes
    });
    let Role::Unknown(why) = &vlm.parts[0].role else {
        panic!("recognised");
    };
    let said = format!("{why:?}");
    assert!(said.contains("as many rounds as"), "{said}");
}

#[test]
fn without_the_segments_another_model_comes_out() {
    let base = form("vision-genai");
    let text =
        "version: 1\npasses: [token_merge: {dominant: 5, contextual: 3, placement: encoder}]";
    let mut other = base.clone();
    let Role::Vision(tower) = &mut other.parts[0].role else {
        panic!("a tower");
    };
    tower.site.masks.clear();
    let made = rewritten(&other, text);
    let report = validated(&base, &made, text, 5);
    let mut images = report.findings.iter().filter(|f| f.check.contains("image"));
    assert!(images.any(|f| !f.passed), "{report:?}");
}

/// GenAI's form takes several images of one grid; they are one set of tokens.
#[test]
fn several_images_in_one_call_are_one_set() {
    let vlm = form("vision-genai");
    let mut base = open(&vlm.parts[0].model, Path::new("base"));
    let keep_all = "version: 1\npasses: [token_merge: {dominant: 1.0, contextual: 0}]";
    let some = "version: 1\npasses: [token_merge: {dominant: 9, contextual: 3}]";
    let grids = [[1, 6, 10], [1, 6, 10]];
    let plain = run(&mut base, &grids, 7, 96).features;
    let mut all = open(&rewritten(&vlm, keep_all).parts[0].model, Path::new("all"));
    assert_eq!(run(&mut all, &grids, 7, 96).features, plain);
    let mut fewer = open(&rewritten(&vlm, some).parts[0].model, Path::new("fewer"));
    let kept = run(&mut fewer, &grids, 7, 96).kept.expect("places");
    assert!(kept.len() == 12 && kept.iter().all(|k| *k < 30), "{kept:?}");
}

#[test]
fn one_grid_for_each_file() {
    let vlm = form("vision-fixed-ts-eager");
    let found = tower(&vlm);
    let rows = found.rows.as_ref().expect("rows of patches");
    assert_eq!((rows.grid, found.candidates()), (None, Some(35)));
    as_pytorch_has_it("vision-fixed-ts-eager", &vlm, "merge", |image| {
        image.grid == FIXED
    });
}

#[test]
fn qwen2_has_no_windows() {
    let vlm = form("vision-qwen2-ts-sdpa");
    let rows = tower(&vlm).rows.as_ref().expect("rows of patches");
    assert_eq!((rows.windowed, rows.moves.len(), rows.per), (0, 0, 4));
    as_pytorch_has_it("vision-qwen2-ts-sdpa", &vlm, "merge-qwen2", |_| true);
}

/// As Transformers 4.49 has it: the mask is filled by slices, for one frame.
#[test]
fn qwen2_of_an_older_transformers() {
    let vlm = form("t449-qwen2-sdpa");
    let rows = tower(&vlm).rows.as_ref().expect("rows of patches");
    let grid = rows.grid.map(|v| vlm.parts[0].model.name(v));
    assert_eq!(grid, Some("grid_thw"));
    as_pytorch_has_it("t449-qwen2-sdpa", &vlm, "merge-qwen2", |image| {
        image.grid[0] == 1
    });
}

/// What is merged is what the unmodified file of the same precision has, layer by layer.
#[test]
fn other_precisions_validate() {
    for name in [
        "vision-fp16",
        "vision-int8",
        "vision-genai-int4",
        "vision-genai",
    ] {
        let base = form(name);
        for merge in [
            "{dominant: 7, contextual: 3, placement: encoder}",
            "{dominant: 0.4, contextual: 0.2, placement: encoder}",
        ] {
            let text = format!("version: 1\npasses: [token_merge: {merge}]");
            let made = rewritten(&base, &text);
            let report = validated(&base, &made, &text, 5);
            assert!(report.passed(), "{name}, {merge}: {:#?}", failures(&report));
            let images = report.findings.iter().filter(|f| f.check.contains("image"));
            assert!(images.count() > 0, "{name}: {report:?}");
        }
    }
}
