//! The same conversation with two models: seeded prompts, images and decode steps.

use ndarray::Array2;

use duet_onnx::runtime::{Cache, StepInput, Tensor, Value};
use duet_onnx::validate::scenario::{Scenario, Seeded, Turn, lay_out};

use super::models::{Runner, difference, kept, numbers};

/// Everything one run of the decoder gave.
pub(crate) struct Record {
    /// All rows of logits, and their shape.
    pub(crate) logits: (Vec<usize>, Vec<f32>),
    /// Keys and values of every layer.
    pub(crate) caches: Vec<Value>,
    /// Length of every layer's cache.
    pub(crate) lengths: Vec<usize>,
    /// Kept indices of every drop point, for each row.
    pub(crate) kept: Vec<Vec<Vec<usize>>>,
    /// `[rows, tokens]` that were given, true at image features.
    pub(crate) visual: Array2<bool>,
    /// `[rows, tokens]` that were given, 0 for padding.
    pub(crate) mask: Array2<i64>,
}

/// What a whole conversation gave.
#[derive(Default)]
pub(crate) struct Transcript {
    /// Features of every image, without any marker channel.
    pub(crate) features: Vec<Vec<f32>>,
    /// Every run of the decoder.
    pub(crate) steps: Vec<Record>,
}

/// Holds a conversation. `size` is the edge of the images, `width` that of plain features.
pub(crate) fn hold(runner: &Runner, scenario: &Scenario, size: usize, width: usize) -> Transcript {
    let mut rng = Seeded::new(77);
    let mut transcript = Transcript::default();
    let mut cache: Option<Cache> = None;
    for turn in &scenario.turns {
        let images = turn.images().iter().sum::<usize>();
        let mut features: Vec<Tensor> = Vec::new();
        if images > 0 {
            let pixels = rng.images(images, 3, size, size);
            features = runner.encode(pixels.into()).features;
        }
        for feature in &features {
            let wide = feature.shape()[1];
            let rows = feature.f32s().expect("features");
            let plain = rows
                .chunks_exact(wide)
                .flat_map(|row| row[..width].to_vec());
            transcript.features.push(plain.collect());
        }
        let counts: Vec<usize> = features.iter().map(|f| f.shape()[0]).collect();
        let layout = lay_out(turn, &counts);
        let mut input = StepInput::new(runner.embed(&layout.ids, &layout.visual, &features));
        input.mask = Some(layout.mask.clone());
        input.visual = Some(layout.visual.clone());
        step(runner, &input, &layout.visual, &mut cache, &mut transcript);
        for number in 0..scenario.decode {
            let ids = Array2::from_shape_fn((turn.rows.len(), 1), |(row, _)| {
                (29 + 17 * row + 5 * number) as i64
            });
            let mut input = StepInput::new(runner.embed_text(&ids));
            input.mask = Some(Array2::ones(ids.dim()));
            let nothing = Array2::from_elem(ids.dim(), false);
            step(runner, &input, &nothing, &mut cache, &mut transcript);
        }
    }
    transcript
}

fn step(
    runner: &Runner,
    input: &StepInput,
    visual: &Array2<bool>,
    cache: &mut Option<Cache>,
    transcript: &mut Transcript,
) {
    let output = runner.step(input, cache.as_ref());
    transcript.steps.push(Record {
        logits: (output.logits.shape().to_vec(), numbers(&output.logits)),
        caches: output.cache.values().to_vec(),
        lengths: output.cache.lengths(),
        kept: kept(&output),
        visual: visual.clone(),
        mask: input.mask.clone().expect("every step here has a mask"),
    });
    *cache = Some(output.cache);
}

/// Largest difference between two transcripts that are meant to be equal, in standard deviations:
/// features, all rows of the logits, all caches.
pub(crate) fn apart(want: &Transcript, found: &Transcript) -> f64 {
    let mut worst: f64 = 0.0;
    assert_eq!(want.features.len(), found.features.len(), "images");
    for (a, b) in want.features.iter().zip(&found.features) {
        worst = worst.max(difference(a, b));
    }
    assert_eq!(want.steps.len(), found.steps.len(), "steps");
    for (a, b) in want.steps.iter().zip(&found.steps) {
        assert_eq!(a.logits.0, b.logits.0, "shape of the logits");
        assert_eq!(a.lengths, b.lengths, "cache lengths");
        worst = worst.max(difference(&a.logits.1, &b.logits.1));
        for (x, y) in a.caches.iter().zip(&b.caches) {
            assert_eq!(x.shape(), y.shape(), "shape of a cache");
            worst = worst.max(difference(&numbers(x), &numbers(y)));
        }
    }
    worst
}

/// Conversations without any image: one row, a padded batch, two turns.
pub(crate) fn text_only(vocabulary: i64) -> Vec<Scenario> {
    let mut rng = Seeded::new(5);
    let mut turn = |rows: &[usize]| Turn {
        rows: rows.iter().map(|n| vec![rng.ids(*n, vocabulary)]).collect(),
    };
    vec![
        Scenario {
            name: "text",
            turns: vec![turn(&[12])],
            decode: 3,
        },
        Scenario {
            name: "a batch of texts, padded",
            turns: vec![turn(&[9, 4])],
            decode: 3,
        },
        Scenario {
            name: "two turns of text",
            turns: vec![turn(&[7]), turn(&[5])],
            decode: 2,
        },
    ]
}
