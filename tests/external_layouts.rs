//! Where weights lie outside a model file: every way of writing them, every way
//! of taking them along.

mod commands;
mod common;

use std::collections::{BTreeMap, BTreeSet};

use commands::*;
use common::{decode, encode};
use duet_onnx::proto::{
    ModelProto, StringStringEntryProto, TensorProto, tensor_proto::DataLocation,
};

/// How the weights of a model are laid out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Inline,
    /// `NAME.onnx_data` beside each graph.
    OneFile,
    /// A file for each tensor.
    PerTensor,
    /// `weights/NAME.bin`.
    SubFolder,
    /// One file for all graphs.
    Shared,
    /// Large tensors outside, small ones inline.
    Mixed,
}

const ALL: [How; 6] = [
    How::Inline,
    How::OneFile,
    How::PerTensor,
    How::SubFolder,
    How::Shared,
    How::Mixed,
];

impl How {
    fn location(self, name: &str, tensor: usize) -> String {
        match self {
            Self::Inline | Self::OneFile | Self::Mixed => format!("{name}.onnx_data"),
            Self::PerTensor => format!("{name}-{tensor}"),
            Self::SubFolder => format!("weights/{name}.bin"),
            Self::Shared => "all.bin".into(),
        }
    }

    fn outside(self, tensor: &TensorProto) -> bool {
        let bytes = tensor.raw_data.as_ref().map_or(0, |d| d.len());
        match self {
            Self::Inline => false,
            Self::Mixed => bytes >= 2000,
            _ => bytes > 0,
        }
    }
}

/// Moves the weights of a model into files, `files` holding what is in them.
fn externalise(
    mut model: ModelProto,
    name: &str,
    how: How,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> ModelProto {
    let graph = model.graph.as_mut().expect("a graph");
    for (index, tensor) in graph.initializer.iter_mut().enumerate() {
        if !how.outside(tensor) {
            continue;
        }
        let location = how.location(name, index);
        let data = tensor.raw_data.take().expect("raw data");
        let file = files.entry(location.clone()).or_default();
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value),
        };
        tensor.external_data = vec![
            entry("location", location),
            entry("offset", file.len().to_string()),
            entry("length", data.len().to_string()),
        ];
        tensor.data_location = Some(DataLocation::External.into());
        file.extend(&data);
    }
    model
}

/// A fixture with its weights laid out so.
fn laid_out(how: How, recipe: &str) -> Place {
    let place = Place::new(recipe);
    place.configs("model");
    write(&place, how, "");
    place
}

/// Writes the graphs of a variant and their data.
fn write(place: &Place, how: How, variant: &str) {
    let mut files = BTreeMap::new();
    for name in PARTS {
        let bytes = std::fs::read(part("ts-eager-mha", name)).expect("a fixture");
        let name = format!("{name}{variant}");
        let model = externalise(decode(&bytes), &name, how, &mut files);
        place.write(&format!("model/onnx/{name}.onnx"), &encode(&model));
    }
    for (location, bytes) in files {
        place.write(&format!("model/onnx/{location}"), &bytes);
    }
}

/// Files of a folder that are no graphs and no configs.
fn data(place: &Place, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let mut all = place.files(&format!("{folder}/onnx"));
    all.retain(|name, _| !name.ends_with(".onnx"));
    all
}

#[test]
fn a_copy_has_the_same_data_files_and_computes_the_same() {
    let mut answers = BTreeSet::new();
    for how in ALL {
        let place = laid_out(how, BOTH);
        let source = place.files("model");
        assert_eq!(data(&place, "model").is_empty(), how == How::Inline);
        place.rewritten(&[]);
        assert!(data(&place, "model") == data(&place, "out"), "{how:?}");
        assert!(
            place.files("model") == source,
            "{how:?}: the source changed"
        );
        place.valid();
        let answer = place.answer("out", &[]);
        assert_eq!(answer["visual_tokens"], 36, "{how:?}");
        answers.insert(answer["tokens"].to_string());
    }
    assert_eq!(answers.len(), 1, "{answers:?}");
}

#[cfg(unix)]
#[test]
fn hard_links_share_every_data_file() {
    use std::os::unix::fs::MetadataExt;
    for how in ALL {
        let place = laid_out(how, BOTH);
        let ran = place.rewritten(&["--data", "hardlink"]);
        assert!(ran.stderr.contains("hard-linked"), "{}", ran.stderr);
        for name in data(&place, "model").keys() {
            let inode = |folder: &str| {
                let path = place.path(&format!("{folder}/onnx/{name}"));
                std::fs::metadata(path).expect("there").ino()
            };
            assert_eq!(inode("model"), inode("out"), "{how:?}: {name}");
        }
        let inode = |path: &str| std::fs::metadata(place.path(path)).expect("there").ino();
        assert_ne!(inode("model/config.json"), inode("out/config.json"));
        place.valid();
    }
}

#[test]
fn beside_shares_the_data_wherever_it_lies() {
    for how in ALL {
        let place = laid_out(how, BOTH);
        let before = place.files("model");
        let ran = place.rewrite("model", &["--beside", "duet"]);
        assert_eq!(ran.code, 0, "{how:?}: {}", ran.stderr);
        let after = place.files("model");
        assert!(
            before.iter().all(|(name, bytes)| after[name] == *bytes),
            "{how:?}"
        );
        let mut new: Vec<&str> = after.keys().map(String::as_str).collect();
        new.retain(|name| !before.contains_key(*name) && !name.ends_with(".json"));
        assert_eq!(
            new,
            PARTS
                .iter()
                .map(|p| format!("onnx/{p}_duet.onnx"))
                .collect::<BTreeSet<_>>()
                .iter()
                .collect::<Vec<_>>(),
            "{how:?}"
        );
        let answer = place.answer("model", &["--variant", "duet"]);
        assert_eq!(answer["visual_tokens"], 36, "{how:?}");
    }
}

#[test]
fn data_that_no_written_model_refers_to_stays_behind() {
    for how in ALL {
        // The variants share a data file only with How::Shared.
        let place = laid_out(How::Inline, MERGE);
        write(&place, how, "_fp16");
        place.write("model/onnx/unrelated.bin", b"kept");
        place.rewritten(&["--variant", "default"]);
        let left: Vec<String> = data(&place, "out").into_keys().collect();
        assert_eq!(left, ["unrelated.bin"], "{how:?}");
        place.valid();
        let place = laid_out(How::Inline, MERGE);
        write(&place, how, "_fp16");
        place.rewritten(&["--variant", "fp16"]);
        assert!(data(&place, "out") == data(&place, "model"), "{how:?}");
    }
}

#[test]
fn data_that_several_variants_share_comes_along_with_one_of_them() {
    let place = laid_out(How::Shared, MERGE);
    for name in PARTS {
        let from = place.path(&format!("model/onnx/{name}.onnx"));
        place.put(&from, &format!("model/onnx/{name}_q4.onnx"));
    }
    place.rewritten(&["--variant", "q4"]);
    assert_eq!(
        data(&place, "out").into_keys().collect::<Vec<_>>(),
        ["all.bin"]
    );
    place.valid();
}

#[test]
fn a_single_file_takes_its_data_along_wherever_it_lies() {
    for how in ALL {
        let place = laid_out(how, MERGE);
        let file = place.at("model/onnx/vision_encoder.onnx");
        let (recipe, out) = (place.at("recipe.yaml"), place.at("out"));
        let ran = duet(&["rewrite", &file, "--recipe", &recipe, "--out", &out]);
        assert_eq!(ran.code, 0, "{how:?}: {}", ran.stderr);
        let written = place.files("out");
        let mut source = data(&place, "model");
        source.retain(|name, _| how == How::Shared || name.contains("vision_encoder"));
        assert_eq!(written.len(), source.len() + 1, "{how:?}");
        assert!(
            source.iter().all(|(name, bytes)| written[name] == *bytes),
            "{how:?}"
        );
        runtime();
        let ran = validate(&[&file, &place.at("out/vision_encoder.onnx")]);
        assert_eq!(ran.code, 0, "{how:?}: {}{}", ran.stdout, ran.stderr);
    }
}

#[test]
fn what_onnx_itself_writes_is_taken() {
    for name in ["one-file", "per-tensor", "sub-folder"] {
        let place = Place::new(BOTH);
        place.configs("model");
        for part_name in ["vision_encoder", "decoder_model_merged"] {
            place.put(
                &part("ts-sdpa-gqa", part_name),
                &format!("model/onnx/{part_name}.onnx"),
            );
        }
        let from = source("models/forms/fixtures/external").join(name);
        let mut todo = vec![from.clone()];
        while let Some(folder) = todo.pop() {
            for entry in std::fs::read_dir(folder).expect("a fixture") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    let below = path.strip_prefix(&from).expect("below").to_string_lossy();
                    place.put(&path, &format!("model/onnx/{below}"));
                }
            }
        }
        assert_eq!(data(&place, "model").len(), 1, "{name}");
        place.rewritten(&[]);
        assert!(data(&place, "model") == data(&place, "out"), "{name}");
        place.valid();
        assert_eq!(place.answer("out", &[])["visual_tokens"], 36, "{name}");
        let ran = place.rewrite("model", &["--beside", "duet"]);
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        let answer = place.answer("model", &["--variant", "duet"]);
        assert_eq!(answer["visual_tokens"], 36, "{name}");
    }
}
