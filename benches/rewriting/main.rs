//! What rewriting costs, step by step, on decoders of 200, 2,000 and 20,000 nodes:
//!
//! ```text
//! cargo bench --bench rewriting [-- FILTER]
//! python benches/growth.py          how the times grow with the nodes
//! ```
//!
//! A model is a fixture's graph with one of its layers repeated, and data files of holes: what is measured does not
//! depend on weights.

mod layers;

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, criterion_main};
use duet_onnx::arch::{Role, Vlm};
use duet_onnx::diff::{Options, compare};
use duet_onnx::ir::{Model, verify};
use duet_onnx::onnx::{read, serialize};
use duet_onnx::passes::{Recipe, rewrite};

const SIZES: [usize; 3] = [200, 2_000, 20_000];

/// A model, and what is made of it once.
struct Case {
    nodes: usize,
    path: PathBuf,
    rewritten_path: PathBuf,
    renamed_path: PathBuf,
    vlm: Vlm,
    rewritten: Model,
    recipe: Recipe,
    folder: tempfile::TempDir,
}

impl Case {
    fn new(nodes: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, depth) = layers::decoder(folder.path(), nodes);
        let model = read(&path).expect("a model");
        let nodes = model.graph().nodes.len();
        let vlm = Vlm::new(vec![("decoder.onnx".into(), String::new(), model)]);
        let recipe = recipe(depth);
        let mut done = rewrite(vlm.clone(), &recipe).expect("rewritten");
        let rewritten = done.vlm.parts.remove(0).model;
        let rewritten_path = folder.path().join("rewritten.onnx");
        let renamed_path = folder.path().join("renamed.onnx");
        write(&rewritten, &rewritten_path);
        layers::renamed(&path, &renamed_path);
        Self {
            nodes,
            path,
            rewritten_path,
            renamed_path,
            vlm,
            rewritten,
            recipe,
            folder,
        }
    }
}

/// Half of the visual tokens leave after half of the layers, all after three quarters.
fn recipe(depth: usize) -> Recipe {
    let (half, late) = (depth / 2, depth * 3 / 4);
    let mut drops = format!("{{ after_layer: {half}, keep: 0.5 }}");
    if late > half {
        drops += &format!(", {{ after_layer: {late}, keep: 0.0 }}");
    }
    let text = format!(
        "version: 1\npasses:\n  - visual_prune: {{ drops: [{drops}], positions: renumber }}\nmarker: input\n"
    );
    Recipe::parse(&text).expect("a recipe")
}

fn write(model: &Model, path: &PathBuf) {
    let file = File::create(path).expect("a file");
    let text = serialize(verify(model).expect("a sound model"));
    text.write_to(path, &file).expect("written");
}

fn rewriting(criterion: &mut Criterion) {
    let cases = SIZES.map(Case::new);
    let each =
        |criterion: &mut Criterion,
         name: &str,
         bench: &dyn Fn(&mut BenchmarkGroup<'_, WallTime>, BenchmarkId, &Case)| {
            let mut group = criterion.benchmark_group(name);
            group
                .sample_size(10)
                .measurement_time(Duration::from_secs(3));
            for case in &cases {
                bench(&mut group, BenchmarkId::from_parameter(case.nodes), case);
            }
            group.finish();
        };
    each(criterion, "parse", &|group, id, case| {
        group.bench_function(id, |b| b.iter(|| read(&case.path).expect("a model")));
    });
    each(criterion, "verify", &|group, id, case| {
        let model = &case.vlm.parts[0].model;
        group.bench_function(id, |b| b.iter(|| verify(model).map(|_| ()).expect("sound")));
    });
    each(criterion, "recognise", &|group, id, case| {
        let model = &case.vlm.parts[0].model;
        group.bench_function(id, |b| b.iter(|| Role::of(model)));
    });
    each(criterion, "rewrite", &|group, id, case| {
        let again = || case.vlm.clone();
        group.bench_function(id, |b| {
            b.iter_batched(
                again,
                |vlm| rewrite(vlm, &case.recipe).expect("rewritten"),
                BatchSize::PerIteration,
            );
        });
    });
    each(criterion, "write", &|group, id, case| {
        let path = case.folder.path().join("written.onnx");
        group.bench_function(id, |b| b.iter(|| write(&case.rewritten, &path)));
    });
    let options = Options::default();
    each(criterion, "diff", &|group, id, case| {
        let diff = || compare(&case.path, &case.rewritten_path, &options).expect("compared");
        group.bench_function(id, |b| b.iter(diff));
    });
    each(criterion, "diff-renamed", &|group, id, case| {
        let diff = || compare(&case.path, &case.renamed_path, &options).expect("compared");
        group.bench_function(id, |b| b.iter(diff));
    });
}

/// Criterion's own macro for this makes a public function without documentation.
fn benches() {
    let mut criterion = Criterion::default().configure_from_args();
    rewriting(&mut criterion);
}

criterion_main!(benches);
