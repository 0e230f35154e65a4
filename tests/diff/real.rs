//! Pairs that others made: two exporters, ONNX Runtime's optimiser, and our own rewrites.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use duet_onnx::diff::{
    Class, FileKind, Kind, ModelDiff, Options, Presence, Verdict, compare, compare_models,
};
use duet_onnx::ir::{DataType, Model};
use duet_onnx::onnx::{ModelDir, read, read_bytes};
use duet_onnx::proto::TensorProto;

use crate::common::*;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

fn between(a: &Model, b: &Model) -> ModelDiff {
    compare_models(a, b, &Options::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn titles(found: &ModelDiff) -> Vec<String> {
    let all = found.changes.iter();
    all.map(|c| format!("{}: {} ×{}", c.class.word(), c.title, c.places.len()))
        .collect()
}

/// What a rewrite did is told as inserted by its passes, and nothing else about the network.
#[test]
fn of_a_rewrite_only_what_was_inserted_appears() {
    for dir in fixture_dirs() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let found = ModelDir::open(&dir).unwrap();
        let base: BTreeMap<PathBuf, Model> = found
            .files
            .iter()
            .map(|f| (f.relative.clone(), read(&found.path(f)).unwrap()))
            .collect();
        let mut told = Vec::new();
        for part in &rewritten(&dir, RECIPE).vlm.parts {
            let before = &base[&part.file];
            let found = between(before, &part.model);
            let all = titles(&found);
            for change in &found.changes {
                match change.class {
                    Class::Structure => assert_eq!(change.kind, Kind::Rewrite, "{name}: {all:#?}"),
                    Class::Weights | Class::Version => panic!("{name}: {all:#?}"),
                    _ => {}
                }
                for spot in change.places.iter().flat_map(|p| &p.added) {
                    let node = spot.node.as_deref().unwrap_or("");
                    assert!(node.starts_with("duet/"), "{name}: {node}");
                }
            }
            let ours = |n: &&duet_onnx::ir::NodeId| {
                let node = part.model.node(**n);
                node.name.starts_with("duet/") && !node.is("Constant")
            };
            let inserted = part.model.graph().nodes.iter().filter(ours).count();
            assert_eq!(found.facts.added, inserted, "{name}: {all:#?}");
            let rewrites = found.changes.iter().filter(|c| c.kind == Kind::Rewrite);
            let placed: usize = rewrites
                .flat_map(|c| &c.places)
                .map(|p| p.added.len())
                .sum();
            assert_eq!(placed, inserted, "{name}: every node is told once");
            told.extend(all);
        }
        for wanted in [
            "visual_prune/drop1 inserted after layer 2 ",
            "visual_prune/drop2 inserted after layer 4 ",
            "token_merge/select inserted",
        ] {
            assert!(
                told.iter().any(|t| t.contains(wanted)),
                "{name}: no {wanted} in {told:#?}"
            );
        }
    }
}

/// Other names, other operators, one network: no weight is said to have changed.
#[test]
fn two_exporters_share_their_weights() {
    let of = |name: &str, file: &str| {
        read(
            &models()
                .join("llava/fixtures")
                .join(name)
                .join("onnx")
                .join(file),
        )
        .unwrap()
    };
    for file in ["vision_encoder.onnx", "decoder_model_merged.onnx"] {
        for (a, b) in [
            ("ts-sdpa-mha", "dynamo18-mha"),
            ("ts-eager-gqa", "ts-sdpa-gqa"),
            ("dynamo18-gqa", "dynamo23-gqa"),
        ] {
            let found = between(&of(a, file), &of(b, file));
            let all = titles(&found);
            let weights = found.changes.iter().filter(|c| c.class == Class::Weights);
            for change in weights.filter(|c| c.kind == Kind::WeightValues) {
                let largest = change
                    .places
                    .iter()
                    .filter_map(|p| Some(p.weights.as_ref()?.elements))
                    .max();
                assert!(largest <= Some(8), "{a} → {b} {file}: {all:#?}");
            }
            assert!(found.changes.len() < 60, "{a} → {b} {file}: {all:#?}");
            let facts = &found.facts;
            assert!(
                facts.matched * 5 > facts.nodes_b.min(facts.nodes_a) * 2,
                "{a} → {b} {file}: {facts:?} {all:#?}"
            );
            let attention = found.changes.iter().filter(|c| c.class == Class::Structure);
            assert!(attention.count() > 0, "{a} → {b}");
        }
    }
}

fn unpacked(path: &Path) -> Model {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    flate2::read::GzDecoder::new(file)
        .read_to_end(&mut bytes)
        .unwrap();
    read_bytes(&path.display().to_string(), bytes.into()).unwrap_or_else(|e| panic!("{e}"))
}

/// What ONNX Runtime fused is told as fused, once for all layers.
#[test]
fn fusions_of_onnx_runtime_are_told_as_such() {
    for (file, wanted) in [
        (
            "decoder_model_merged.onnx",
            [
                ("SimplifiedLayerNormalization", 17),
                ("com.microsoft::QuickGelu", 8),
                ("com.microsoft::FusedMatMul", 8),
            ],
        ),
        (
            "vision_encoder.onnx",
            [
                ("com.microsoft::BiasGelu", 1),
                ("com.microsoft::QuickGelu", 4),
                ("com.microsoft::FusedMatMul", 4),
            ],
        ),
    ] {
        let before = read(&models().join("llava/fixtures/ts-sdpa-mha/onnx").join(file)).unwrap();
        let after = unpacked(
            &models()
                .join("forms/packed/ort-extended-ts-sdpa-mha")
                .join(format!("{file}.gz")),
        );
        let found = between(&before, &after);
        let all = titles(&found);
        for (operator, times) in wanted {
            let fused = found
                .changes
                .iter()
                .filter(|c| c.title.contains(&format!("fused into {operator}")));
            let places: usize = fused.map(|c| c.places.len()).sum();
            assert_eq!(places, times, "{operator}: {all:#?}");
        }
        assert!(
            !found.changes.iter().any(|c| c.class == Class::Weights),
            "{all:#?}"
        );
    }
}

/// Directories: file by file, configs by key, data files with their models.
#[test]
fn directories_are_compared_file_by_file() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let json = |text: &str| text.as_bytes().to_vec();
    let small = encode(&chain()).to_vec();
    let stored = encode(&model(graph(
        "stored",
        &[value("x", FLOAT, &[2])],
        &[value("y", FLOAT, &[2])],
        &[external(
            "w",
            &[2],
            &[("location", "w.bin"), ("length", "8")],
        )],
        &[node("Add", &["x", "w"], &["y"])],
    )));
    let files = |config: &str, bytes: [f32; 2], extra: &'static str| {
        vec![
            ("config.json", json(config)),
            ("onnx/same.onnx", small.clone()),
            ("onnx/stored.onnx", stored.to_vec()),
            (
                "onnx/w.bin",
                bytes.iter().flat_map(|v| v.to_le_bytes()).collect(),
            ),
            ("notes.txt", json("as it is")),
            (extra, json("only here")),
        ]
    };
    let sides = [
        (
            &a,
            files(r#"{"a": 1, "size": {"h": 336}}"#, [1.0, 2.0], "old.txt"),
        ),
        (
            &b,
            files(r#"{"size": {"h": 224}, "a": 1.0}"#, [1.0, 3.0], "new.txt"),
        ),
    ];
    for (dir, files) in &sides {
        for (name, contents) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
    }
    let report = compare(a.path(), b.path(), &Options::default()).unwrap();
    let told: Vec<(String, Verdict, Vec<String>)> = report
        .files
        .iter()
        .map(|f| {
            (
                f.path.clone(),
                f.verdict,
                f.changes.iter().map(|c| c.title.clone()).collect(),
            )
        })
        .collect();
    let found = |path: &str| {
        told.iter()
            .find(|t| t.0 == path)
            .unwrap_or_else(|| panic!("{path}: {told:#?}"))
    };
    assert_eq!(found("config.json").2, ["'size.h': 336 → 224"]);
    assert_eq!(found("onnx/same.onnx").1, Verdict::Identical);
    assert_eq!(
        found("onnx/stored.onnx").2,
        ["constant of Add (input 1): [1.0, 2.0] → [1.0, 3.0]"]
    );
    assert_eq!(found("notes.txt").1, Verdict::Identical);
    assert!(
        !told.iter().any(|t| t.0.ends_with("w.bin")),
        "a model's data is compared with the model"
    );
    let kinds: Vec<(String, FileKind, Presence)> = report
        .files
        .iter()
        .filter(|f| f.presence != Presence::Both)
        .map(|f| (f.path.clone(), f.kind, f.presence))
        .collect();
    assert_eq!(
        kinds,
        [
            ("new.txt".into(), FileKind::Other, Presence::OnlyB),
            ("old.txt".into(), FileKind::Other, Presence::OnlyA),
        ]
    );
    assert!(report.differs());
    // And a directory with itself.
    let same = compare(a.path(), a.path(), &Options::default()).unwrap();
    assert_eq!((same.verdict, same.counts.len()), (Verdict::Identical, 0));
}

/// One bit of one element is one changed element, in every type; and 1.0 is 1.
#[test]
fn weights_of_every_type() {
    let holding = |dtype: DataType, raw: Vec<u8>| {
        let tensor = TensorProto {
            name: Some("w".into()),
            data_type: Some(dtype.code()),
            dims: vec![64],
            raw_data: Some(raw.into()),
            ..Default::default()
        };
        load(&model(graph(
            "g",
            &[],
            &[value("y", dtype.code(), &[64])],
            &[tensor],
            &[node("Neg", &["w"], &["y"])],
        )))
    };
    let one: BTreeMap<i32, Vec<u8>> = [
        (1, 1f32.to_le_bytes().to_vec()),
        (2, vec![1]),
        (3, vec![1]),
        (4, vec![1, 0]),
        (5, vec![1, 0]),
        (6, vec![1, 0, 0, 0]),
        (7, vec![1, 0, 0, 0, 0, 0, 0, 0]),
        (9, vec![1]),
        (10, vec![0x00, 0x3c]),
        (11, 1f64.to_le_bytes().to_vec()),
        (12, vec![1]),
        (13, vec![1]),
        (16, vec![0x80, 0x3f]),
        (17, vec![0x38]),
        (18, vec![0x40]),
        (19, vec![0x3c]),
        (20, vec![0x40]),
        (21, vec![1]),
        (22, vec![1]),
        (23, vec![2]),
        (24, vec![127]),
        (25, vec![1]),
        (26, vec![1]),
    ]
    .into();
    for (code, start) in one {
        let dtype = DataType::from_code(code);
        let length = dtype.byte_len(64).unwrap() as usize;
        let mut raw = vec![0; length];
        let zero = holding(dtype, raw.clone());
        raw[..start.len()].copy_from_slice(&start);
        let single = holding(dtype, raw.clone());
        let found = between(&zero, &single);
        let told = found
            .changes
            .iter()
            .find(|c| c.kind == Kind::WeightValues)
            .unwrap_or_else(|| panic!("{dtype}"));
        let w = told.weights.as_ref().unwrap();
        assert_eq!(
            (w.changed, w.first, w.elements),
            (1, Some(0), 64),
            "{dtype}"
        );
        let norm = w.norm_b.unwrap();
        assert!((norm - 1.0).abs() < 1e-9, "{dtype}: {norm}");
        // The last bit of the last element.
        let last = raw.len() - 1;
        raw[last] ^= 0x80;
        let found = between(&single, &holding(dtype, raw));
        let w = found.changes[0].weights.as_ref().unwrap();
        assert_eq!((w.changed, w.first), (1, Some(63)), "{dtype}");
    }
}
