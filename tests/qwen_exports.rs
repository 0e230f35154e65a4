//! Qwen's vision towers in the forms that people have (`models/qwen_vl/vision_forms.py`): recognised, and merged as the
//! PyTorch reference has it. Forms of other precision are compared with their own unmodified file.

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};

use duet_onnx::arch::{Mask, Role, VisionTower, Vlm};
use duet_onnx::passes::KEPT_OUTPUT;
use duet_onnx::runtime::{Session, Tensor, Value};
use duet_onnx::validate::scenario::Seeded;
use duet_onnx::validate::{Options, check};
use serde::Deserialize;

use support::goldens::tensors;
use support::models::{difference, numbers, open, parts_at, recipe, rewritten, root};

/// Largest allowed difference of a feature from PyTorch, in standard deviations.
const LIMIT: f64 = 1e-4;
/// The one grid of the form without a grid input.
const FIXED: [i64; 3] = [1, 10, 14];

#[derive(Deserialize)]
struct Goldens {
    pixel_width: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    recipe: serde_json::Value,
    images: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {
    grid: [i64; 3],
    seed: u64,
    kept: Vec<i64>,
}

/// A packed form, recognised.
fn form(name: &str) -> Vlm {
    altered(name, |bytes| bytes)
}

/// The same with its bytes changed first.
fn altered(name: &str, change: fn(Vec<u8>) -> Vec<u8>) -> Vlm {
    let packed = root().join(format!(
        "models/qwen_vl/fixtures/{name}/onnx/vision_encoder.onnx.gz"
    ));
    let bytes = std::fs::read(&packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(bytes.as_slice())
        .read_to_end(&mut plain)
        .unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
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

/// Features and places that an encoder gives for images whose pixels are numbers from `seed`.
fn run(
    session: &mut Session,
    grids: &[[i64; 3]],
    seed: u64,
    width: usize,
) -> (Vec<f32>, Option<Vec<i64>>) {
    let patches: i64 = grids.iter().map(|g| g.iter().product::<i64>()).sum();
    let patches = usize::try_from(patches).expect("grids");
    let mut rng = Seeded::new(seed);
    let data: Vec<f32> = (0..patches * width)
        .map(|_| (rng.bits() >> 56) as f32 / 64.0 - 2.0)
        .collect();
    let pixels = Value::new(Tensor::new([patches, width], data).expect("pixels")).expect("a value");
    let thw = Tensor::new([grids.len(), 3], grids.concat()).expect("grids");
    let thw = Value::new(thw).expect("a value");
    let names: Vec<(String, bool)> = session
        .inputs()
        .iter()
        .map(|port| (port.name.clone(), port.dtype.is_some_and(|d| d.is_float())))
        .collect();
    let feed: Vec<(&str, &Value)> = names
        .iter()
        .map(|(name, float)| (name.as_str(), if *float { &pixels } else { &thw }))
        .collect();
    let out = session
        .run(&feed)
        .unwrap_or_else(|e| panic!("{grids:?}: {e}"));
    let kept = out.get(KEPT_OUTPUT).ok().map(|value| {
        let tensor = value.to_tensor().expect("a tensor");
        tensor.i64s().expect("int64").to_vec()
    });
    (numbers(out.first().expect("features")), kept)
}

/// Every case of a set of goldens through one form, for the images that it can take.
fn as_pytorch_has_it(name: &str, set: &str, takes: impl Fn(&Image) -> bool) {
    let vlm = form(name);
    let folder = root().join("models/qwen_vl/goldens");
    let text = std::fs::read_to_string(folder.join(format!("{set}.json"))).expect("goldens");
    let goldens: Goldens = serde_json::from_str(&text).expect("goldens");
    let want = tensors(&folder.join(format!("{set}.safetensors")));
    let mut compared = 0;
    for case in &goldens.cases {
        let images = case.images.iter().enumerate().filter(|(_, i)| takes(i));
        let images: Vec<_> = images.collect();
        if images.is_empty() {
            continue;
        }
        let done = rewritten(&vlm, &case.recipe.to_string());
        let mut session = open(&done.parts[0].model, Path::new(name));
        for (i, image) in images {
            let about = format!("{name}, {}, {:?}", case.name, image.grid);
            let (features, kept) =
                run(&mut session, &[image.grid], image.seed, goldens.pixel_width);
            assert_eq!(kept.as_ref(), Some(&image.kept), "{about}");
            let want = want[&format!("{}.{i}.features", case.name)]
                .f32s()
                .expect("numbers");
            let apart = difference(&want, &features);
            assert!(apart < LIMIT, "{about}: {apart:.1e}");
            compared += 1;
        }
    }
    assert!(compared >= 5, "{name}: {compared} images compared");
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
    as_pytorch_has_it("vision-genai", "merge", |image| image.grid != FIXED);
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
    support::models::runtime();
    let options = Options {
        session: support::models::options(),
        seed: 5,
    };
    let made = rewritten(&other, text);
    let report = check(&base, &made, &recipe(text), &options, &mut |_| ()).expect("a report");
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
    let (plain, _) = run(&mut base, &grids, 7, 96);
    let mut all = open(&rewritten(&vlm, keep_all).parts[0].model, Path::new("all"));
    assert_eq!(run(&mut all, &grids, 7, 96).0, plain);
    let mut fewer = open(&rewritten(&vlm, some).parts[0].model, Path::new("fewer"));
    let kept = run(&mut fewer, &grids, 7, 96).1.expect("places");
    assert!(kept.len() == 12 && kept.iter().all(|k| *k < 30), "{kept:?}");
}

#[test]
fn one_grid_for_each_file() {
    let vlm = form("vision-fixed-ts-eager");
    let found = tower(&vlm);
    let rows = found.rows.as_ref().expect("rows of patches");
    assert_eq!((rows.grid, found.candidates()), (None, Some(35)));
    as_pytorch_has_it("vision-fixed-ts-eager", "merge", |image| {
        image.grid == FIXED
    });
}

#[test]
fn qwen2_has_no_windows() {
    let vlm = form("vision-qwen2-ts-sdpa");
    let rows = tower(&vlm).rows.as_ref().expect("rows of patches");
    assert_eq!((rows.windowed, rows.moves.len(), rows.per), (0, 0, 4));
    as_pytorch_has_it("vision-qwen2-ts-sdpa", "merge-qwen2", |_| true);
}

/// As Transformers 4.49 has it: the mask is filled by slices, for one frame.
#[test]
fn qwen2_of_an_older_transformers() {
    let vlm = form("t449-qwen2-sdpa");
    let rows = tower(&vlm).rows.as_ref().expect("rows of patches");
    let grid = rows.grid.map(|v| vlm.parts[0].model.name(v));
    assert_eq!(grid, Some("grid_thw"));
    as_pytorch_has_it("t449-qwen2-sdpa", "merge-qwen2", |image| image.grid[0] == 1);
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
            support::models::runtime();
            let options = Options {
                session: support::models::options(),
                seed: 5,
            };
            let made = rewritten(&base, &text);
            let report = check(&base, &made, &recipe(&text), &options, &mut |_| ())
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
            assert!(failed.is_empty(), "{name}, {merge}: {failed:#?}");
            let images = report.findings.iter().filter(|f| f.check.contains("image"));
            assert!(images.count() > 0, "{name}: {report:?}");
        }
    }
}
