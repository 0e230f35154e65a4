//! The exported fixtures, rewriting them in memory, and running them with a look inside.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ndarray::Array2;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{DataType, Dim, Model, Patch, ValueType, verify};
use duet_onnx::onnx::{ModelDir, read, serialize};
use duet_onnx::passes::{Entry, REGISTRY, Recipe, Stage, rewrite};
use duet_onnx::runtime::{
    Cache, CacheHeads, Decoder, Embedder, Outputs, RuntimeError, Session, SessionOptions,
    StepInput, StepOutput, Tensor, Value, WholeModel, lay_out_pixels, scatter,
};

/// Every exported model that ships with the sources.
pub(crate) const FIXTURES: [&str; 9] = [
    "ts-eager-mha",
    "ts-eager-gqa",
    "ts-sdpa-mha",
    "ts-sdpa-gqa",
    "dynamo18-mha",
    "dynamo18-gqa",
    "dynamo23-mha",
    "dynamo23-gqa",
    "demo",
];

/// The golden set of a fixture.
pub(crate) fn set_of(fixture: &str) -> &str {
    fixture.rsplit('-').next().unwrap_or(fixture)
}

/// The directory of this package.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The parts of a fixture, recognised.
pub(crate) fn fixture(name: &str) -> Vlm {
    fixture_at(&root().join("models/llava/fixtures").join(name))
}

/// The parts of a model directory, recognised: one of each.
pub(crate) fn fixture_at(path: &Path) -> Vlm {
    let vlm = parts_at(path);
    let found = (vlm.towers().count(), vlm.decoders().count());
    assert!(
        found.0 == 1 && found.1 >= 1,
        "{}: towers and decoders {found:?}",
        path.display()
    );
    vlm
}

/// The parts of a model directory, whatever they are.
pub(crate) fn parts_at(path: &Path) -> Vlm {
    let name = path.display();
    let dir = ModelDir::open(path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut models = Vec::new();
    for file in &dir.files {
        let at = dir.path(file);
        let model = read(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        verify(&model).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        models.push((file.relative.clone(), file.variant.clone(), model));
    }
    Vlm::new(models)
}

/// Merges 81 patches into 30 tokens.
pub(crate) const MERGE: &str = "{dominant: 24, contextual: 6}";

/// The same, with the discarded ones leaving in the decoder.
pub(crate) const PLACED: &str = "{dominant: 24, contextual: 6, placement: decoder}";

/// Drops half, then everything.
pub(crate) const FALL: &str = "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 6, keep: 0.0}]}";

/// Drops some twice, and does not renumber.
pub(crate) const TO_KEEP: &str =
    "{drops: [{after_layer: 1, keep: 0.6}, {after_layer: 5, keep: 0.29}], positions: keep}";

/// Whole models in one file, of the same weights as the fixtures whose names end as theirs.
pub(crate) const WHOLE: [&str; 2] = ["vlm-batch-dynamo18-gqa", "vlm-batch-dynamo23-mha"];

/// The directory of a whole model.
pub(crate) fn whole_folder(name: &str) -> PathBuf {
    super::forms::form(name).directory()
}

/// A whole model, recognised.
pub(crate) fn whole_fixture(name: &str) -> Vlm {
    let path = whole_folder(name).join("onnx/model.onnx");
    let model = read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
    verify(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
    Vlm::new(vec![("onnx/model.onnx".into(), String::new(), model)])
}

/// Opens a whole model, with everything selected in it as further outputs.
pub(crate) fn open_whole(vlm: &Vlm) -> WholeModel {
    let part = &vlm.parts[0];
    let mut inside = vec![DOMINANT.to_owned(), ANCHORS.to_owned()];
    inside.extend((1..=4).map(kept_name));
    let session = open(&probed(&part.model, &inside), &part.file);
    WholeModel::new(session).unwrap_or_else(|e| panic!("{e}"))
}

/// A recipe of these passes.
pub(crate) fn recipe(text: &str) -> Recipe {
    Recipe::parse(text).unwrap_or_else(|e| panic!("{e} in\n{text}"))
}

/// Pairs of a pass for the encoder and one for the decoder: each of all is in one.
pub(crate) fn pairs() -> Vec<[&'static Entry; 2]> {
    let of = |stage| REGISTRY.iter().filter(move |e| e.stage == stage);
    let (encoder, decoder) = (of(Stage::Encoder).count(), of(Stage::Decoder).count());
    let first = of(Stage::Encoder).cycle();
    let second = of(Stage::Decoder).cycle();
    let all = first.zip(second).take(encoder.max(decoder));
    all.map(|(a, b)| [a, b]).collect()
}

/// A recipe's text from its passes, each `name: {parameters}`.
pub(crate) fn recipe_text(passes: &[(&str, &str)], rest: &str) -> String {
    let mut text = String::from("version: 1\npasses:\n");
    for (name, parameters) in passes {
        text.push_str(&format!("  - {name}: {parameters}\n"));
    }
    text.push_str(rest);
    text
}

/// The fixture rewritten with a recipe's text.
pub(crate) fn rewritten(base: &Vlm, text: &str) -> Vlm {
    let done = rewrite(base.clone(), &recipe(text)).unwrap_or_else(|e| panic!("{e} with\n{text}"));
    done.vlm
}

/// How sessions are opened: small models run best on one thread, and the test harness runs several
/// tests at once.
pub(crate) fn options() -> SessionOptions {
    SessionOptions {
        intra_threads: 1,
        ..SessionOptions::default()
    }
}

/// Loads ONNX Runtime, installing it on a machine that has none.
#[allow(clippy::print_stderr, reason = "a download is announced, never silent")]
pub(crate) fn runtime() {
    duet_onnx::runtime::ensure(&mut |line| eprintln!("{line}")).unwrap_or_else(|e| panic!("{e}"));
}

/// Opens a model that exists in memory only.
pub(crate) fn open(model: &Model, name: &Path) -> Session {
    runtime();
    let bytes = serialize(verify(model).unwrap_or_else(|e| panic!("{}: {e}", name.display())));
    let mut options = options();
    options.data_dir = model.external().directory();
    Session::from_bytes(&bytes.to_vec(), &name.display().to_string(), &options)
        .unwrap_or_else(|e| panic!("{e}"))
}

/// The model with the named inserted values as further outputs, those that it has.
pub(crate) fn probed(model: &Model, names: &[String]) -> Model {
    let mut patch = Patch::new(model, "probe");
    for name in names {
        if let Some(value) = model.find(name) {
            let ty = ValueType::tensor(DataType::Int64, vec![Dim::Unknown; 2]);
            patch.add_output(value, ty);
        }
    }
    let plan = patch.finish();
    model.clone().apply(plan).unwrap_or_else(|e| panic!("{e}"))
}

/// Rows of indices, read off a probe `[rows, width]`.
pub(crate) fn index_rows(tensor: &Tensor) -> Vec<Vec<usize>> {
    let [rows, width] = *tensor.shape() else {
        panic!("indices are {:?}, expected [rows, width]", tensor.shape());
    };
    let all = tensor.i64s().expect("indices are integers");
    let index = |i: usize| usize::try_from(all[i]).expect("an index is not negative");
    let row = |r: usize| (r * width..(r + 1) * width).map(index).collect();
    (0..rows).map(row).collect()
}

/// What the vision encoder gave for some images.
pub(crate) struct Encoded {
    /// For each image `[features, width]`, marker channel included.
    pub(crate) features: Vec<Tensor>,
    /// Dominant patches of each image, if the model selects any.
    pub(crate) dominant: Option<Vec<Vec<usize>>>,
    /// Anchors of each image's contextual tokens, in output order, if it makes any.
    pub(crate) anchors: Option<Vec<Vec<usize>>>,
    /// Places of tokens that the features decide to keep, of each image, if they do.
    pub(crate) chosen: Option<Vec<Vec<usize>>>,
}

/// The three open parts of a model.
pub(crate) struct Runner {
    vision: Rc<RefCell<Session>>,
    pixels: String,
    embedder: Rc<RefCell<Embedder>>,
    /// The decoder, with the kept indices of every drop point as further outputs.
    pub(crate) decoder: Rc<RefCell<Decoder>>,
}

/// Open parts by what is in them: opening a session takes far longer than running it, and recipes
/// that differ in one pass only share the parts that the other pass makes.
#[derive(Default)]
pub(crate) struct Pool {
    visions: HashMap<Vec<u8>, Rc<RefCell<Session>>>,
    embedders: HashMap<Vec<u8>, Rc<RefCell<Embedder>>>,
    decoders: HashMap<Vec<u8>, Rc<RefCell<Decoder>>>,
}

pub(crate) const DOMINANT: &str = "duet/token_merge/dominant_indices";
pub(crate) const ANCHORS: &str = "duet/token_merge/anchor_indices";

/// Places of the tokens that are kept because of their features.
pub(crate) const CHOSEN: &str = "duet/div_prune/kept_indices";

/// The name of a drop point's kept indices; drop points count from 1.
pub(crate) fn kept_name(drop: usize) -> String {
    format!("duet/visual_prune/drop{drop}/kept_indices")
}

/// The same of FastV's.
const FAST_V: &str = "duet/fast_v/drop1/kept_indices";

/// The names of the indices kept where discarded features leave: whichever pass plans the decoder.
pub(crate) const LEFT: [&str; 2] = [
    "duet/token_merge/drop0/kept_indices",
    "duet/visual_prune/drop0/kept_indices",
];

/// The file's bytes but for the stamp.
fn contents(model: &Model) -> Vec<u8> {
    let mut patch = Patch::new(model, "stamp");
    patch.metadata("duet.recipe", "");
    let plan = patch.finish();
    let plain = model.clone().apply(plan).expect("metadata can be set");
    let bytes = serialize(verify(&plain).unwrap_or_else(|e| panic!("{e}")));
    bytes.to_vec()
}

/// Opens a model's decoder, in one file or two, with the kept indices of every drop point as
/// further outputs.
pub(crate) fn open_decoder(vlm: &Vlm) -> Decoder {
    let mut vlm = vlm.clone();
    let all: Vec<usize> = vlm.decoders().map(|(i, _)| i).collect();
    // The graph that goes on from a cache, or the only one.
    let goes_on = |i: &usize| match &vlm.parts[*i].role {
        Role::Decoder(d) => d.layers[0].past.is_some(),
        _ => false,
    };
    let main = all.iter().copied().find(goes_on).unwrap_or(all[0]);
    let Role::Decoder(decoder) = vlm.parts[main].role.clone() else {
        panic!("a whole model has no decoder of its own");
    };
    let mut inside: Vec<String> = (1..=decoder.depth()).map(kept_name).collect();
    inside.extend(LEFT.map(str::to_owned));
    inside.push(FAST_V.to_owned());
    for &part in &all {
        vlm.parts[part].model = probed(&vlm.parts[part].model, &inside);
    }
    let files = vlm.files().unwrap_or_else(|e| panic!("{e}"));
    let session = |file: &Path| {
        let found = files
            .iter()
            .find(|f| f.file == file)
            .expect("the decoder's file");
        open(&found.model, file)
    };
    let size = |n: i64| usize::try_from(n).expect("a size");
    let heads = CacheHeads {
        count: size(decoder.kv_heads),
        width: size(decoder.head_dim),
    };
    let file = vlm.parts[main].file.clone();
    let mut run =
        Decoder::with_heads(session(&file), Some(heads)).unwrap_or_else(|e| panic!("{e}"));
    let mut files_of = all.iter().map(|i| &vlm.parts[*i].file);
    if let Some(prompt) = files_of.find(|f| **f != file) {
        run = run
            .with_prompt(session(prompt))
            .unwrap_or_else(|e| panic!("{e}"));
    }
    run
}

impl Pool {
    /// Opens a model, rewritten or not.
    pub(crate) fn open(&mut self, vlm: &Vlm) -> Runner {
        let (at, tower) = vlm.towers().next().expect("a vision encoder");
        let part = &vlm.parts[at];
        let pixels = part.model.name(tower.pixels).to_owned();
        let vision = self
            .visions
            .entry(contents(&part.model))
            .or_insert_with(|| {
                let inside = [DOMINANT, ANCHORS, CHOSEN].map(str::to_owned);
                Rc::new(RefCell::new(open(
                    &probed(&part.model, &inside),
                    &part.file,
                )))
            });
        let (at, _) = vlm.embeddings().next().expect("a token embedding");
        let part = &vlm.parts[at];
        let embedder = self
            .embedders
            .entry(contents(&part.model))
            .or_insert_with(|| {
                let embedder = Embedder::new(open(&part.model, &part.file));
                Rc::new(RefCell::new(embedder.unwrap_or_else(|e| panic!("{e}"))))
            });
        let (at, _) = vlm.decoders().next().expect("a decoder");
        let decoder = self
            .decoders
            .entry(contents(&vlm.parts[at].model))
            .or_insert_with(|| Rc::new(RefCell::new(open_decoder(vlm))));
        Runner {
            vision: Rc::clone(vision),
            pixels,
            embedder: Rc::clone(embedder),
            decoder: Rc::clone(decoder),
        }
    }
}

impl Runner {
    /// Opens a model on its own.
    pub(crate) fn open(vlm: &Vlm) -> Self {
        Pool::default().open(vlm)
    }

    /// Features of pixels `[images, 3, height, width]`.
    pub(crate) fn encode(&self, pixels: Tensor) -> Encoded {
        let mut session = self.vision.borrow_mut();
        let rank = session.input(&self.pixels).expect("pixels").dims.len();
        let pixels = lay_out_pixels(pixels, rank).expect("pixels");
        let value = Value::new(pixels).expect("pixels");
        let outputs = session.run(&[(&self.pixels, &value)]);
        let outputs = outputs.unwrap_or_else(|e| panic!("{e}"));
        let features = outputs.first().and_then(Value::to_tensor);
        let features = features.expect("features");
        let [images, rows, width] = *features.shape() else {
            panic!("features are {:?}", features.shape());
        };
        let all = features.f32s().expect("features are numbers");
        let indices = |name: &str| {
            let value = outputs.get(name).ok()?;
            Some(index_rows(&value.to_tensor().expect("indices")))
        };
        Encoded {
            features: (0..images)
                .map(|i| {
                    let part = &all[i * rows * width..(i + 1) * rows * width];
                    Tensor::new([rows, width], part.to_vec()).expect("one image's features")
                })
                .collect(),
            dominant: indices(DOMINANT),
            anchors: indices(ANCHORS),
            chosen: indices(CHOSEN),
        }
    }

    /// Embeddings of ids with the features, in order, at the places of `visual`.
    pub(crate) fn embed(
        &self,
        ids: &Array2<i64>,
        visual: &Array2<bool>,
        features: &[Tensor],
    ) -> Value {
        let mut embedder = self.embedder.borrow_mut();
        if embedder.takes_features() {
            // ONNX Runtime GenAI's puts the features in their places itself.
            let embeds = embedder.run_with(ids.clone(), features);
            return embeds.unwrap_or_else(|e| panic!("{e}"));
        }
        let embeds = embedder.run(ids.clone());
        let embeds = embeds.and_then(|e| e.to_tensor()).expect("embeddings");
        let visual: Vec<bool> = visual.iter().copied().collect();
        let filled = scatter(embeds, &visual, features).unwrap_or_else(|e| panic!("{e}"));
        Value::new(filled).expect("embeddings")
    }

    /// Embeddings of text.
    pub(crate) fn embed_text(&self, ids: &Array2<i64>) -> Value {
        self.embed(ids, &Array2::from_elem(ids.dim(), false), &[])
    }

    /// One run of the decoder, from an empty cache if none is given.
    pub(crate) fn step(&self, input: &StepInput, cache: Option<&Cache>) -> StepOutput {
        let mut decoder = self.decoder.borrow_mut();
        let output = match cache {
            Some(cache) => decoder.step(input, cache),
            None => decoder.prefill(input),
        };
        output.unwrap_or_else(|e| panic!("{e}"))
    }

    /// One run as a client might write it: `mask` and `positions` go to the decoder as they are.
    pub(crate) fn step_as_given(
        &self,
        embeds: Value,
        mask: Array2<i64>,
        positions: Array2<i64>,
        cache: &Cache,
    ) -> Result<Outputs, RuntimeError> {
        let mut decoder = self.decoder.borrow_mut();
        let session = decoder.session_mut();
        let past: Vec<String> = session
            .inputs()
            .iter()
            .filter(|port| port.name.starts_with("past_key_values."))
            .map(|port| port.name.clone())
            .collect();
        let (mask, positions) = (Value::new(mask.into())?, Value::new(positions.into())?);
        let mut feed = vec![
            ("inputs_embeds", &embeds),
            ("attention_mask", &mask),
            ("position_ids", &positions),
        ];
        feed.extend(past.iter().map(String::as_str).zip(cache.values()));
        session.run(&feed)
    }
}

/// The kept indices of every drop point in a step, for each row; first of all, where there is such a
/// place, those that stay where discarded features leave.
pub(crate) fn kept(output: &StepOutput) -> Vec<Vec<Vec<usize>>> {
    let left = output
        .extra
        .iter()
        .filter(|(n, _)| LEFT.contains(&n.as_str()));
    let mut all: Vec<_> = left
        .map(|(_, value)| index_rows(&value.to_tensor().expect("indices")))
        .collect();
    for drop in 1.. {
        let name = kept_name(drop);
        let mut extra = output.extra.iter();
        let found = extra.find(|(n, _)| *n == name || drop == 1 && n == FAST_V);
        let Some((_, value)) = found else {
            return all;
        };
        all.push(index_rows(&value.to_tensor().expect("indices")));
    }
    all
}

/// A value's elements.
pub(crate) fn numbers(value: &Value) -> Vec<f32> {
    let tensor = value.to_tensor().expect("a tensor");
    tensor.f32s().expect("numbers").into_owned()
}

/// Edge of a model's images and width of its features.
pub(crate) fn sizes(vlm: &Vlm) -> (usize, usize) {
    let (at, tower) = vlm.towers().next().expect("a vision encoder");
    let shape = vlm.parts[at].model.value(tower.pixels).ty.as_ref();
    let edge = shape
        .and_then(|t| t.shape()?.last()?.known())
        .expect("the size of images");
    let width = tower.feature_width.expect("the width of features");
    (
        usize::try_from(edge).expect("a size"),
        usize::try_from(width).expect("a width"),
    )
}

/// Largest difference in units of the standard deviation of `want`. Where `want` is NaN, `found` has
/// to be NaN too (a fully masked row of an unmodified model), else the difference is infinite.
pub(crate) fn difference(want: &[f32], found: &[f32]) -> f64 {
    assert_eq!(want.len(), found.len(), "numbers of elements");
    let finite: Vec<f64> = want
        .iter()
        .filter(|v| v.is_finite())
        .map(|&v| f64::from(v))
        .collect();
    let count = finite.len().max(1) as f64;
    let mean = finite.iter().sum::<f64>() / count;
    let variance = finite.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
    let mut worst: f64 = 0.0;
    for (a, b) in want.iter().zip(found) {
        let apart = (f64::from(*a) - f64::from(*b)).abs();
        match (a.is_finite(), b.is_finite()) {
            (true, true) => worst = worst.max(apart),
            _ if a.is_nan() && b.is_nan() || a == b => {}
            _ => return f64::INFINITY,
        }
    }
    if worst == 0.0 {
        0.0
    } else {
        worst / variance.sqrt()
    }
}
