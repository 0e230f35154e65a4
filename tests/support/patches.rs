//! Vision encoders of patch rows (Qwen2-VL, Qwen2.5-VL): running them, and what the PyTorch reference recorded of
//! their merges (`models/qwen_vl/merge_goldens.py`).

use std::path::Path;

use duet_onnx::arch::Vlm;
use duet_onnx::passes::KEPT_OUTPUT;
use duet_onnx::runtime::{Session, Tensor, Value};
use duet_onnx::validate::scenario::Seeded;
use serde::Deserialize;

use super::goldens::tensors;
use super::models::{difference, index_rows, numbers, open, probed, rewritten, root};

/// Largest allowed difference of a feature from PyTorch, in standard deviations.
const LIMIT: f64 = 1e-4;

const DOMINANT: &str = "duet/token_merge/dominant_indices";
const ANCHORS: &str = "duet/token_merge/anchor_indices";

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

/// An image of a case.
#[derive(Deserialize)]
pub(crate) struct Image {
    /// Time, height and width in patches.
    pub(crate) grid: [i64; 3],
    seed: u64,
    tokens: usize,
    dominant: Vec<usize>,
    anchors: Vec<usize>,
    kept: Vec<usize>,
}

/// What an encoder gave for the images of one call.
pub(crate) struct Found {
    pub(crate) features: Vec<f32>,
    /// Number of features.
    pub(crate) rows: usize,
    /// Their places, where the encoder says them.
    pub(crate) kept: Option<Vec<usize>>,
    /// What was chosen, where the encoder was [`opened`].
    pub(crate) dominant: Vec<usize>,
    pub(crate) anchors: Vec<usize>,
}

/// Runs an encoder on images whose pixels are numbers from `seed`: those that the goldens were recorded with (`pixels`
/// of models/qwen_vl/merge_goldens.py).
pub(crate) fn run(session: &mut Session, grids: &[[i64; 3]], seed: u64, width: usize) -> Found {
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
    let inside = |name: &str| match out.get(name) {
        Ok(value) => index_rows(&value.to_tensor().expect("a tensor")).concat(),
        Err(_) => Vec::new(),
    };
    let kept = out.get(KEPT_OUTPUT).ok().map(|value| {
        let tensor = value.to_tensor().expect("a tensor");
        let all = tensor.i64s().expect("int64");
        all.iter()
            .map(|i| usize::try_from(*i).expect("a place"))
            .collect()
    });
    let features = out.first().expect("features");
    Found {
        rows: features.shape()[0],
        features: numbers(features),
        kept,
        dominant: inside(DOMINANT),
        anchors: inside(ANCHORS),
    }
}

/// A merged encoder, opened with a look at what it chooses.
pub(crate) fn opened(vlm: &Vlm, text: &str) -> Session {
    let done = rewritten(vlm, text);
    let inside = [DOMINANT.to_owned(), ANCHORS.to_owned()];
    open(&probed(&done.parts[0].model, &inside), Path::new("merged"))
}

/// Every case of a set of goldens through one form, for the images that it takes.
pub(crate) fn as_pytorch_has_it(name: &str, vlm: &Vlm, set: &str, takes: impl Fn(&Image) -> bool) {
    let folder = root().join("models/qwen_vl/goldens");
    let path = folder.join(format!("{set}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let goldens: Goldens =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let want = tensors(&folder.join(format!("{set}.safetensors")));
    let mut compared = 0;
    for case in &goldens.cases {
        let images = case.images.iter().enumerate().filter(|(_, i)| takes(i));
        let images: Vec<_> = images.collect();
        if images.is_empty() {
            continue;
        }
        let mut session = opened(vlm, &case.recipe.to_string());
        for (i, image) in images {
            let about = format!("{name}, {}, {:?}", case.name, image.grid);
            let found = run(&mut session, &[image.grid], image.seed, goldens.pixel_width);
            assert_eq!(found.kept.as_ref(), Some(&image.kept), "{about}");
            let mut dominant = found.dominant;
            dominant.sort_unstable();
            assert_eq!(dominant, image.dominant, "{about}");
            // One is made of what is there where there is none, and left out.
            let anchors = &found.anchors[..image.anchors.len()];
            assert_eq!(anchors, image.anchors, "{about}");
            let want = want[&format!("{}.{i}.features", case.name)]
                .f32s()
                .expect("numbers");
            let apart = difference(&want, &found.features);
            assert!(apart < LIMIT, "{about}: {apart:.1e}");
            assert!(found.rows <= image.tokens, "{about}");
            compared += 1;
        }
    }
    assert!(compared >= 5, "{name}: {compared} images compared");
}
