//! ONNX Runtime's own fusions survive a rewrite: what it fuses in the unmodified graph (attention, norms,
//! scaled products, activations), it still fuses in the rewritten one.
//!
//! Both graphs are optimised by the runtime and written out. Of the rewritten one, nodes that come from what
//! a pass inserted (their names say so) are left out: they may not make up for a loss. What is left may not
//! be less than in the base, with one exception that follows from what a drop point is:
//!
//! - behind a drop point the residual stream is a gathered tensor, so where the base fuses the sum that ends
//!   a layer with the norm that begins the next (`Skip…LayerNormalization`), sum and norm stand apart there:
//!   for each drop point one such fusion less, and one plain norm or none more. All norms together may
//!   not be less.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Model, TensorData, verify};
use duet_onnx::onnx::{ModelDir, read, serialize};
use duet_onnx::passes::{VisualPrune, rewrite};
use duet_onnx::runtime::{Optimization, Session};

use support::forms;
use support::models::{FIXTURES, options, recipe, recipe_text, root, runtime};

/// Groups of fused operators; the counts of a group are added up.
const GROUPS: [(&str, &[&str]); 5] = [
    (
        "attention",
        &[
            "Attention",
            "MultiHeadAttention",
            "GroupQueryAttention",
            "QAttention",
            "RotaryEmbedding",
        ],
    ),
    (
        "norm",
        &[
            "LayerNormalization",
            "SimplifiedLayerNormalization",
            "RMSNormalization",
            "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization",
        ],
    ),
    ("scaled product", &["FusedMatMul", "TransposeMatMul"]),
    (
        "activation",
        &["QuickGelu", "Gelu", "BiasGelu", "FastGelu", "BiasSplitGelu"],
    ),
    (
        PRODUCTS,
        &[
            "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat",
            "QLinearMatMul",
            "QGemm",
            "MatMulNBits",
        ],
    ),
];

/// The group of products with quantised weights.
const PRODUCTS: &str = "quantised product";

/// Fusions of a sum with the norm behind it.
const SKIPS: [&str; 2] = ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"];

/// Every fixture and every packed form that ONNX Runtime loads unmodified.
fn bases() -> Vec<(String, Vlm)> {
    let fixtures = FIXTURES.map(|name| {
        (
            name.to_owned(),
            root().join("models/llava/fixtures").join(name),
        )
    });
    let forms = forms::all().into_iter().filter(|f| f.error.is_none());
    let forms = forms.map(|f| (f.name.clone(), f.directory()));
    let mut found = Vec::new();
    for (name, path) in fixtures.into_iter().chain(forms) {
        let dir = ModelDir::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let parts = dir.files.iter().map(|file| {
            let model = read(&dir.path(file)).unwrap_or_else(|e| panic!("{name}: {e}"));
            (file.relative.clone(), file.variant.clone(), model)
        });
        found.push((name.clone(), Vlm::new(parts.collect())));
    }
    found
}

/// The files that hold a model's external data.
fn locations(model: &Model) -> BTreeSet<String> {
    let values = model.graph().initializers.iter();
    let tensors = values.filter_map(|v| model.value(*v).initializer.as_ref());
    tensors
        .filter_map(|t| match &t.data {
            TensorData::External(reference) => Some(reference.location.clone()),
            TensorData::Raw(_) | TensorData::Strings(_) => None,
        })
        .collect()
}

/// What the runtime makes of a model: counts by operator, of the nodes that were there and of those that were
/// inserted; `None` if it cannot open the model.
fn optimised(model: &Model, at: &Path) -> Option<[BTreeMap<String, usize>; 2]> {
    let mut options = options();
    options.data_dir = model.external().directory();
    options.optimization = Optimization::All;
    options.optimized_model = Some(at.to_path_buf());
    let bytes = serialize(verify(model).unwrap_or_else(|e| panic!("{e}"))).to_vec();
    Session::from_bytes(&bytes, "fusions", &options).ok()?;
    // Where the optimised graph refers to the model's data files, the reader wants to see them.
    for file in locations(model) {
        let from = options
            .data_dir
            .as_ref()
            .expect("external data has a folder")
            .join(&file);
        let to = at.with_file_name(&file);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        std::fs::copy(from, to).expect("a data file");
    }
    let optimised = read(at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
    let mut counts = [BTreeMap::new(), BTreeMap::new()];
    for &node in &optimised.graph().nodes {
        let node = optimised.node(node);
        // A fusion is named after a node that went into it. Outputs say nothing of a node with a name: the
        // value that was the features is renamed where a mark is put behind it.
        let inserted = match node.name.as_str() {
            "" => {
                let mut outputs = node.outputs.iter().flatten();
                outputs.all(|v| optimised.name(*v).contains("duet/"))
            }
            name => name.contains("duet/"),
        };
        let of_kind = &mut counts[usize::from(inserted)];
        *of_kind.entry(node.op_type.clone()).or_insert(0) += 1;
    }
    Some(counts)
}

fn sum(counts: &BTreeMap<String, usize>, operators: &[&str]) -> usize {
    operators.iter().filter_map(|o| counts.get(*o)).sum()
}

/// Passes for a model: those that it has a part for.
fn passes_for(vlm: &Vlm) -> Vec<(&'static str, String)> {
    let mut passes = Vec::new();
    if vlm.towers().next().is_some() {
        passes.push((
            "token_merge",
            "{dominant: 6, contextual: 2, cls: drop}".into(),
        ));
    }
    if let Some((_, decoder)) = vlm.decoders().next() {
        let (first, second) = (decoder.depth() / 3, 2 * decoder.depth() / 3);
        passes.push((
            "visual_prune",
            format!("{{drops: [{{after_layer: {first}, keep: 0.5}}, {{after_layer: {second}, keep: 0.0}}]}}"),
        ));
    }
    passes
}

#[test]
fn what_the_runtime_fuses_it_still_fuses() {
    runtime();
    let work = tempfile::tempdir().expect("a directory");
    let (mut compared, mut fused, mut lost) = (0, BTreeMap::<&str, usize>::new(), Vec::new());
    for (name, base) in bases() {
        let passes = passes_for(&base);
        let passes: Vec<(&str, &str)> = passes.iter().map(|(n, p)| (*n, p.as_str())).collect();
        if passes.is_empty() {
            continue;
        }
        let recipe = recipe(&recipe_text(&passes, ""));
        // Forms that are refused say so in their own tests.
        let Ok(done) = rewrite(base.clone(), &recipe) else {
            continue;
        };
        let drops = recipe.pass::<VisualPrune>().map_or(0, |p| p.drops.len());
        for (old, new) in base.parts.iter().zip(&done.vlm.parts) {
            let drops = match old.role {
                Role::Decoder(_) | Role::Whole(_) => drops,
                Role::Vision(_) => 0,
                _ => continue,
            };
            let place = format!("{name}: {}", old.file.display());
            let Some([before, _]) = optimised(&old.model, &work.path().join("base.onnx")) else {
                continue;
            };
            let after = optimised(&new.model, &work.path().join("new.onnx"));
            let [after, inserted] =
                after.unwrap_or_else(|| panic!("{place}: the rewritten model does not open"));
            compared += 1;
            for (group, operators) in GROUPS {
                let (had, mut has) = (sum(&before, operators), sum(&after, operators));
                if group == PRODUCTS {
                    // The layer behind a drop reads queries and keys that the ranking has made.
                    has += sum(&inserted, operators).min(2 * drops);
                }
                *fused.entry(group).or_default() += had;
                if has < had {
                    lost.push(format!("{place}: {group}: {had}, now {has}"));
                }
            }
            let (had, has) = (sum(&before, &SKIPS), sum(&after, &SKIPS));
            if has + drops < had {
                lost.push(format!(
                    "{place}: sums fused with norms: {had}, now {has} with {drops} drops"
                ));
            }
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
    assert!(compared >= 75, "only {compared} files were compared");
    // Quantised models are not among the fixtures everywhere.
    for (group, _) in &GROUPS[..4] {
        assert!(
            fused.get(group).is_some_and(|n| *n > 0),
            "nothing of '{group}' is fused in any model"
        );
    }
}
