//! What the PyTorch reference recorded: `models/llava/goldens`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::{Array2, Axis, concatenate};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use duet_onnx::arch::Vlm;
use duet_onnx::runtime::{
    Cache, DType, Packing, StepInput, StepOutput, Tensor, Value, WholeInput, WholeModel,
    concatenate as crops_after_another,
};

use super::models::{
    ANCHORS, DOMINANT, Pool, Runner, difference, index_rows, kept, kept_name, rewritten, root,
};
use super::packed::contents;

/// Cases of one set of weights.
#[derive(Deserialize)]
pub(crate) struct Goldens {
    layers: usize,
    image_token_id: i64,
    pixels: PathBuf,
    /// The cases.
    pub(crate) cases: Vec<Case>,
    #[serde(skip)]
    folder: PathBuf,
    #[serde(skip)]
    images: HashMap<String, Tensor>,
    /// For images of several crops: how these become the tokens of a prompt.
    #[serde(skip)]
    packing: Option<Packing>,
}

/// A recipe and a conversation.
#[derive(Deserialize)]
pub(crate) struct Case {
    /// Name, also of its tensor file.
    pub(crate) name: String,
    /// As in a recipe file.
    pub(crate) recipe: serde_json::Value,
    /// Turns on the same cache.
    pub(crate) turns: Vec<Turn>,
}

impl Case {
    /// Whether tokens keep their positions.
    pub(crate) fn keeps_positions(&self) -> bool {
        let passes = self.recipe["passes"].as_array().expect("passes");
        passes
            .iter()
            .any(|p| p["visual_prune"]["positions"] == "keep")
    }

    /// Whether discarded features come out in their places.
    pub(crate) fn placed(&self) -> bool {
        let passes = self.recipe["passes"].as_array().expect("passes");
        let mut merges = passes.iter().map(|p| &p["token_merge"]);
        merges.any(|m| m["placement"] == "decoder")
    }

    /// Whether the first prompt is one row with one image.
    pub(crate) fn one_image(&self) -> bool {
        matches!(self.turns[0].images.as_slice(), [images] if images.len() == 1)
    }

    /// Whether a form can play it: GroupQueryAttention takes no padding on the left, and no second
    /// prompt on a cache in a batch; some decoders take one token at a time on a cache.
    pub(crate) fn fits(&self, form: &super::forms::Form) -> bool {
        let batch = self.turns.iter().any(|t| t.images.len() > 1);
        !(form.heading.contains("GenAI") && batch || form.single_steps && self.turns.len() > 1)
    }
}

/// A prompt and the decode steps after it.
#[derive(Deserialize)]
pub(crate) struct Turn {
    /// Images of each row.
    pub(crate) images: Vec<Vec<String>>,
    visual_tokens: Vec<usize>,
    merged: Vec<Merged>,
    /// Places of tokens that are kept as they are, of each image.
    #[serde(default)]
    kept: Option<Vec<Vec<usize>>>,
    drops: Vec<DropPoint>,
    cache_lengths: Vec<usize>,
    cache_lengths_after_decode: Vec<usize>,
}

#[derive(Deserialize)]
struct Merged {
    dominant: Vec<usize>,
    anchors: Vec<usize>,
}

#[derive(Deserialize)]
struct DropPoint {
    after_layer: usize,
    kept: Vec<Vec<usize>>,
}

/// How a client counts.
#[derive(Clone, Copy, Default)]
pub(crate) struct Client {
    /// Added to every position id.
    pub(crate) first_position: i64,
}

/// What came out of running a case.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Largest difference of features, in standard deviations.
    pub(crate) features: f64,
    /// Largest difference of last-row logits, in standard deviations.
    pub(crate) logits: f64,
    /// Runs of the decoder.
    pub(crate) steps: usize,
    /// Index sets that were compared, dominant and anchor sets and kept rows.
    pub(crate) sets: usize,
    /// What differed that must not.
    pub(crate) problems: Vec<String>,
    /// Last-row logits of every step.
    pub(crate) all_logits: Vec<Vec<f32>>,
}

impl Outcome {
    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, want: &T, found: &T) {
        if want != found {
            self.problems
                .push(format!("{what}: expected {want:?}, found {found:?}"));
        }
    }
}

/// The tensors of a safetensors file, packed or not.
pub(crate) fn tensors(path: &Path) -> HashMap<String, Tensor> {
    let bytes = contents(path);
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{e}"));
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let shape = view.shape().to_vec();
        let words = |n: usize| view.data().chunks_exact(n);
        let tensor = match view.dtype() {
            Dtype::F32 => {
                let data = words(4).map(|c| f32::from_le_bytes(c.try_into().expect("4 bytes")));
                Tensor::new(shape, data.collect::<Vec<_>>())
            }
            Dtype::I64 => {
                let data = words(8).map(|c| i64::from_le_bytes(c.try_into().expect("8 bytes")));
                Tensor::new(shape, data.collect::<Vec<_>>())
            }
            Dtype::BOOL => Tensor::new(
                shape,
                view.data().iter().map(|b| *b != 0).collect::<Vec<_>>(),
            ),
            Dtype::U8 => Tensor::new(shape, view.data().to_vec()),
            other => panic!("{name}: elements of type {other:?}"),
        };
        (name, tensor.expect("shape and data agree"))
    };
    file.tensors().into_iter().map(read).collect()
}

/// An 8-bit crop `[3, height, width]` rescaled and normalised as the fixture's own configuration says.
fn normalise(crop: &Tensor, config: &serde_json::Value) -> Tensor {
    let number = |v: &serde_json::Value| v.as_f64().expect("a number");
    let scale = number(&config["rescale_factor"]);
    let pixels: &[u8] = crop.slice().expect("8-bit pixels");
    let plane: usize = crop.shape().iter().rev().take(2).product();
    let data = pixels.iter().enumerate().map(|(i, &p)| {
        let channel = i / plane % 3;
        let (mean, std) = (
            &config["image_mean"][channel],
            &config["image_std"][channel],
        );
        ((f64::from(p) * scale - number(mean)) / number(std)) as f32
    });
    Tensor::new(crop.shape().to_vec(), data.collect::<Vec<_>>()).expect("as many pixels as before")
}

pub(crate) fn integers(tensor: &Tensor) -> Array2<i64> {
    let [rows, columns] = *tensor.shape() else {
        panic!("{:?} is no matrix", tensor.shape());
    };
    let data = tensor.i64s().expect("integers").into_owned();
    Array2::from_shape_vec((rows, columns), data).expect("as many as its shape says")
}

impl Goldens {
    /// Reads a set.
    pub(crate) fn read(set: &str) -> Self {
        let folder = root().join("models/llava/goldens").join(set);
        let text = fs::read_to_string(folder.join("cases.json")).expect("cases.json");
        let mut goldens: Self = serde_json::from_str(&text).expect("cases.json");
        let stored = tensors(&folder.join(&goldens.pixels));
        goldens.images = if stored.values().all(|t| t.slice::<u8>().is_ok()) {
            let config = root().join(format!(
                "models/llava/fixtures/{set}/preprocessor_config.json"
            ));
            let text = fs::read_to_string(config).expect("preprocessor_config.json");
            let config: serde_json::Value = serde_json::from_str(&text).expect("configuration");
            let size = config["crop_size"]["height"].as_u64().expect("crop height");
            let fitting = stored.iter().filter_map(|(name, crop)| {
                let (name, edge) = name.split_once('.')?;
                (edge == size.to_string()).then(|| (name.to_owned(), normalise(crop, &config)))
            });
            fitting.collect()
        } else {
            stored
        };
        goldens.folder = folder;
        goldens
    }

    /// Reads a set of images of several crops, which belongs to the model directory `fixture`.
    pub(crate) fn read_crops(folder: PathBuf, fixture: &Path) -> Self {
        let text = fs::read_to_string(folder.join("cases.json")).expect("cases.json");
        let mut goldens: Self = serde_json::from_str(&text).expect("cases.json");
        let json = |name: &str| -> serde_json::Value {
            let text = fs::read_to_string(fixture.join(name)).expect("a configuration");
            serde_json::from_str(&text).expect("a configuration")
        };
        let preprocessor = json("preprocessor_config.json");
        let stored = tensors(&folder.join(&goldens.pixels));
        goldens.images = stored
            .into_iter()
            .map(|(name, stored)| {
                let size = name.ends_with(".size");
                (
                    name,
                    if size {
                        stored
                    } else {
                        normalise(&stored, &preprocessor)
                    },
                )
            })
            .collect();
        let packing = Packing::from_json(&json("config.json"), &fixture.join("config.json"));
        goldens.packing = packing.expect("a configuration");
        assert!(goldens.packing.is_some(), "{}", fixture.display());
        goldens.folder = folder;
        goldens
    }

    /// Features as they go to the places of each image: of images of several crops packed, or, where the crops
    /// are merged, one after the other.
    fn placed(&self, names: &[&str], features: Vec<Tensor>, merged: bool) -> Vec<Tensor> {
        let Some(packing) = &self.packing else {
            return features;
        };
        let mut rest = features.as_slice();
        let each = names.iter().map(|name| {
            let (own, others) = rest.split_at(self.images[*name].shape()[0]);
            rest = others;
            let size = self.images[&format!("{name}.size")].i64s().expect("a size");
            let side = |at: usize| usize::try_from(size[at]).expect("a size");
            let together = match merged {
                true => crops_after_another(own),
                false => packing.pack(own, (side(0), side(1))),
            };
            together.unwrap_or_else(|e| panic!("{name}: {e}"))
        });
        each.collect()
    }

    /// Pixels of the named images: `[images, 3, height, width]`.
    pub(crate) fn pixels(&self, names: &[&str]) -> Tensor {
        let mut data: Vec<f32> = Vec::new();
        let mut shape = vec![0];
        for name in names {
            let image = &self.images[*name];
            shape.truncate(1);
            // One image, or several crops of one.
            shape[0] += image.shape().iter().rev().skip(3).product::<usize>();
            shape.extend(&image.shape()[image.shape().len() - 3..]);
            data.extend(&*image.f32s().expect("pixels"));
        }
        Tensor::new(shape, data).expect("images of one size")
    }

    /// The single span of visual tokens that all rows share in the first prompt and that no later
    /// prompt adds to: what `marker: static` can describe.
    pub(crate) fn span(&self, case: &Case) -> Option<(usize, usize)> {
        let stored = tensors(&self.folder.join(format!("{}.safetensors", case.name)));
        let ids = integers(&stored["turn0.input_ids"]);
        if case.turns[1..]
            .iter()
            .any(|t| t.visual_tokens.iter().any(|n| *n > 0))
        {
            return None;
        }
        let spans = ids.outer_iter().map(|row| {
            let visual = |id: &i64| *id == self.image_token_id;
            let start = row.iter().position(visual)?;
            let count = row.iter().filter(|id| visual(id)).count();
            row.iter()
                .skip(start)
                .take(count)
                .all(visual)
                .then_some((start, count))
        });
        let spans: Vec<_> = spans.collect();
        spans
            .windows(2)
            .all(|pair| pair[0] == pair[1])
            .then_some(spans[0])?
    }

    /// Runs every case of a rewritten model and compares with what PyTorch recorded: features, kept sets, cache
    /// lengths, logits of prompts and steps, within `limit` standard deviations. Returns how many index sets were
    /// compared.
    #[track_caller]
    #[allow(clippy::print_stdout, reason = "what was compared, with --nocapture")]
    pub(crate) fn reproduced(&self, name: &str, base: &Vlm, limit: f64) -> usize {
        let mut pool = Pool::default();
        let (mut features, mut logits, mut steps, mut sets) = (0f64, 0f64, 0, 0);
        let mut problems = Vec::new();
        for case in &self.cases {
            let runner = pool.open(&rewritten(base, &case.recipe.to_string()));
            let outcome = self.run(case, &runner, Client::default());
            features = features.max(outcome.features);
            logits = logits.max(outcome.logits);
            steps += outcome.steps;
            sets += outcome.sets;
            let mut found = outcome.problems;
            if !(outcome.features <= limit && outcome.logits <= limit) {
                found.push(format!(
                    "features differ by {:.1e} and logits by {:.1e} standard deviations",
                    outcome.features, outcome.logits
                ));
            }
            problems.extend(found.iter().map(|p| format!("{}: {p}", case.name)));
        }
        println!(
            "{name}: {} cases, {steps} steps, {sets} index sets; features within {features:.1e}, logits within \
             {logits:.1e}",
            self.cases.len()
        );
        assert!(problems.is_empty(), "{name}:\n{}", problems.join("\n"));
        sets
    }

    /// Runs a case through a model and compares everything that was recorded.
    pub(crate) fn run(&self, case: &Case, runner: &Runner, client: Client) -> Outcome {
        let stored = tensors(&self.folder.join(format!("{}.safetensors", case.name)));
        let mut outcome = Outcome::default();
        let mut cache: Option<Cache> = None;
        for (number, turn) in case.turns.iter().enumerate() {
            let of = |name: &str| &stored[&format!("turn{number}.{name}")];
            let ids = integers(of("input_ids"));
            let visual = ids.mapv(|id| id == self.image_token_id);
            let names: Vec<&str> = turn.images.iter().flatten().map(String::as_str).collect();
            let mut features = Vec::new();
            if !names.is_empty() {
                let encoded = runner.encode(self.pixels(&names));
                let want = of("image_features");
                self.merged(&encoded, turn, case.placed(), want, &mut outcome);
                features = self.placed(&names, encoded.features, !turn.merged.is_empty());
            }
            let mask = integers(of("attention_mask"));
            let before = match &cache {
                Some(cache) => cache.mask().clone(),
                None => Array2::zeros((ids.nrows(), 0)),
            };
            let new = mask.slice(ndarray::s![.., before.ncols()..]).to_owned();
            let whole = concatenate(Axis(1), &[before.view(), new.view()]).expect("same rows");
            assert_eq!(
                whole, mask,
                "{}: the recorded mask goes on from the one before",
                case.name
            );
            let salient = stored.get(&format!("turn{number}.salient_token_mask"));
            let positions = integers(of("position_ids")) + client.first_position;
            let input = StepInput {
                embeds: runner.embed(&ids, &visual, &features),
                ids: None,
                mask: Some(new),
                positions: Some(positions.into()),
                blocks: None,
                visual: Some(visual),
                salient: salient.map(|t| integers(t).mapv(|v| v != 0)),
            };
            let output = self.step(runner, &input, cache.as_ref(), of("logits"), &mut outcome);
            outcome.equal(
                &format!("turn {number}: cache lengths"),
                &turn.cache_lengths,
                &output.cache.lengths(),
            );
            let found = kept(&output);
            assert!(
                turn.drops
                    .windows(2)
                    // Discarded features may leave where others do.
                    .all(|d| d[0].after_layer < d[1].after_layer
                        || case.placed() && d[1].after_layer == 1)
            );
            let want: Vec<Vec<Vec<usize>>> = turn.drops.iter().map(|d| d.kept.clone()).collect();
            outcome.sets += want.iter().map(Vec::len).sum::<usize>();
            outcome.equal(&format!("turn {number}: kept indices"), &want, &found);
            cache = Some(output.cache);
            self.decode(runner, &stored, number, &mut cache, client, &mut outcome);
            let lengths = cache.as_ref().map_or_else(Vec::new, Cache::lengths);
            assert_eq!(lengths.len(), self.layers);
            outcome.equal(
                &format!("turn {number}: cache lengths after decoding"),
                &turn.cache_lengths_after_decode,
                &lengths,
            );
        }
        outcome
    }

    /// Runs the first prompt of a case through a whole model in one file and compares what was recorded of it;
    /// without drops the steps after it too. (With drops, a file without a cache ranks anew in every step, and
    /// the reference does not.)
    pub(crate) fn run_whole(&self, case: &Case, model: &mut WholeModel, edge: usize) -> Outcome {
        let stored = tensors(&self.folder.join(format!("{}.safetensors", case.name)));
        let mut outcome = Outcome::default();
        let turn = &case.turns[0];
        let of = |name: &str| stored.get(&format!("turn0.{name}"));
        let names: Vec<&str> = turn.images.iter().flatten().map(String::as_str).collect();
        let pixels = match names.as_slice() {
            [] => Tensor::zeros(DType::F32, [1, 3, edge, edge]).expect("no pixels"),
            names => self.pixels(names),
        };
        let mut ids = integers(of("input_ids").expect("ids"));
        let mut mask = integers(of("attention_mask").expect("a mask"));
        let salient = of("salient_token_mask").map(|t| integers(t).mapv(|v| v != 0));
        for step in 0.. {
            let input = WholeInput {
                ids: ids.clone(),
                pixels: pixels.clone(),
                mask: Some(mask.clone()),
                visual: Some(ids.mapv(|id| id == self.image_token_id)),
                salient: salient.clone().filter(|s| s.dim() == ids.dim()),
            };
            let output = model
                .run(&input)
                .unwrap_or_else(|e| panic!("{}: {e}", case.name));
            let logits: Vec<f32> = output.last_logits().expect("logits").into_iter().collect();
            let want = match step {
                0 => of("logits"),
                n => of(&format!("step{}.logits", n - 1)),
            };
            let want = want.expect("logits").f32s().expect("logits");
            outcome.logits = outcome.logits.max(difference(&want, &logits));
            outcome.steps += 1;
            if step == 0 {
                self.selected(turn, &output.extra, &mut outcome);
            }
            let next = of(&format!("step{step}.input_ids")).filter(|_| turn.drops.is_empty());
            let Some(next) = next else {
                return outcome;
            };
            let next = integers(next);
            let ones = Array2::ones(next.dim());
            ids = concatenate(Axis(1), &[ids.view(), next.view()]).expect("same rows");
            mask = concatenate(Axis(1), &[mask.view(), ones.view()]).expect("same rows");
        }
        outcome
    }

    /// Compares index sets that a whole model gave as further outputs.
    fn selected(&self, turn: &Turn, extra: &[(String, Value)], outcome: &mut Outcome) {
        let rows = |name: &str| {
            let found = extra.iter().find(|(n, _)| n == name);
            found.map(|(_, v)| index_rows(&v.to_tensor().expect("indices")))
        };
        if !turn.merged.is_empty() {
            let of = |f: fn(&Merged) -> &Vec<usize>| turn.merged.iter().map(f).cloned().collect();
            let sets: [(&str, &str, Vec<Vec<usize>>); 2] = [
                ("dominant patches", DOMINANT, of(|m| &m.dominant)),
                ("anchors", ANCHORS, of(|m| &m.anchors)),
            ];
            for (what, name, want) in sets {
                outcome.sets += want.len();
                let none = vec![vec![]; want.len()];
                outcome.equal(what, &want, &rows(name).unwrap_or(none));
            }
        }
        for (number, drop) in turn.drops.iter().enumerate() {
            outcome.sets += drop.kept.len();
            let found = rows(&kept_name(number + 1)).unwrap_or_default();
            outcome.equal(&format!("kept at drop {}", number + 1), &drop.kept, &found);
        }
    }

    /// The greedy steps that the reference recorded after a turn.
    fn decode(
        &self,
        runner: &Runner,
        stored: &HashMap<String, Tensor>,
        turn: usize,
        cache: &mut Option<Cache>,
        client: Client,
        outcome: &mut Outcome,
    ) {
        for step in 0.. {
            let of = |name: &str| stored.get(&format!("turn{turn}.step{step}.{name}"));
            let (Some(ids), Some(positions), Some(logits)) =
                (of("input_ids"), of("position_ids"), of("logits"))
            else {
                assert!(step >= 3, "at least three decode steps are recorded");
                return;
            };
            let ids = integers(ids);
            let mut input = StepInput::new(runner.embed_text(&ids));
            input.positions = Some((integers(positions) + client.first_position).into());
            let output = self.step(runner, &input, cache.as_ref(), logits, outcome);
            for rows in kept(&output) {
                let all = vec![vec![0]; ids.nrows()];
                outcome.equal(
                    &format!("turn {turn}, step {step}: kept indices"),
                    &all,
                    &rows,
                );
            }
            *cache = Some(output.cache);
        }
    }

    fn step(
        &self,
        runner: &Runner,
        input: &StepInput,
        cache: Option<&Cache>,
        want: &Tensor,
        outcome: &mut Outcome,
    ) -> StepOutput {
        let output = runner.step(input, cache);
        let logits: Vec<f32> = output.last_logits().expect("logits").into_iter().collect();
        let apart = difference(&want.f32s().expect("logits"), &logits);
        outcome.logits = outcome.logits.max(apart);
        outcome.steps += 1;
        outcome.all_logits.push(logits);
        output
    }

    /// Compares features and, where the recipe merges, what was selected.
    fn merged(
        &self,
        encoded: &super::models::Encoded,
        turn: &Turn,
        placed: bool,
        want: &Tensor,
        outcome: &mut Outcome,
    ) {
        let [images, rows, width] = *want.shape() else {
            panic!("recorded features are {:?}", want.shape());
        };
        let mut found = Vec::with_capacity(want.len());
        for (image, features) in encoded.features.iter().enumerate() {
            let (n, w) = (features.shape()[0], features.shape()[1]);
            outcome.equal("features of an image", &rows, &n);
            // The last channel may be the marker's.
            assert!(w == width || w == width + 1, "features have width {w}");
            let all = features.f32s().expect("features");
            for (at, row) in all.chunks_exact(w).enumerate() {
                found.extend(&row[..width]);
                let gone = placed && {
                    let merged = &turn.merged[image];
                    !merged.dominant.contains(&at) && !merged.anchors.contains(&at)
                };
                let mark = if gone { 2f32 } else { 1f32 };
                if w > width && row[width].to_bits() != mark.to_bits() {
                    outcome
                        .problems
                        .push(format!("a feature's marker is {}", row[width]));
                }
            }
        }
        outcome.equal("number of features", &(images * rows * width), &found.len());
        if found.len() == want.len() {
            let apart = difference(&want.f32s().expect("features"), &found);
            outcome.features = outcome.features.max(apart);
        }
        if let (Some(want), Some(found)) = (&turn.kept, &encoded.chosen) {
            outcome.sets += want.len();
            outcome.equal("tokens kept by their features", want, found);
        }
        if turn.merged.is_empty() {
            return;
        }
        let none = vec![vec![]; images];
        for (what, want, found) in [
            (
                "dominant patches",
                turn.merged
                    .iter()
                    .map(|m| m.dominant.clone())
                    .collect::<Vec<_>>(),
                &encoded.dominant,
            ),
            (
                "anchors",
                turn.merged.iter().map(|m| m.anchors.clone()).collect(),
                &encoded.anchors,
            ),
        ] {
            outcome.sets += want.len();
            outcome.equal(what, &want, found.as_ref().unwrap_or(&none));
        }
    }
}
