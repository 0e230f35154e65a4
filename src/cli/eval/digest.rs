//! The digest of a model: of the files that an answer depends on, wherever they lie.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::arch::FileModel;
use crate::cli::load::{self, Runnable};
use crate::onnx::read;

/// Configurations that decide what goes into a model and what its tokens mean.
const CONFIGS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// BLAKE3 of the graphs, their external data and the configurations, by path below `root`.
pub(super) fn of(root: &Path, model: &Runnable) -> anyhow::Result<String> {
    let graphs: Vec<&PathBuf> = match model {
        Runnable::Whole(file) => vec![file],
        Runnable::Trio(trio) => {
            let some = [&trio.vision, &trio.embed, &trio.decoder].into_iter();
            some.chain(&trio.video).chain(&trio.prompt).collect()
        }
    };
    let mut files: BTreeSet<PathBuf> = BTreeSet::new();
    for graph in graphs {
        let relative = graph.strip_prefix(root).unwrap_or(graph).to_owned();
        let read = read(graph).with_context(|| graph.display().to_string())?;
        let held = FileModel {
            file: relative.clone(),
            model: Cow::Owned(read),
        };
        files.extend(load::data_files(&held));
        for suffix in suffixes(&relative) {
            for name in ["config", "processor_config"] {
                files.insert(PathBuf::from(format!("{name}{suffix}.json")));
            }
        }
        files.insert(relative);
    }
    files.extend(CONFIGS.map(PathBuf::from));
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let at = root.join(&file);
        if !at.is_file() {
            continue;
        }
        let name = file.to_string_lossy();
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hash(&at, &mut hasher).with_context(|| format!("reading {}", at.display()))?;
    }
    Ok(hasher.finalize().to_hex().as_str()[..32].to_owned())
}

/// `_q4_duet` and `_duet` of `decoder_q4_duet.onnx`: what patched configurations beside the originals may end in.
fn suffixes(file: &Path) -> Vec<String> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let all = stem.match_indices('_').map(|(at, _)| stem[at..].to_owned());
    all.collect()
}

/// Length and contents, in blocks: weights are larger than memory may be.
fn hash(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    hasher.update(&file.metadata()?.len().to_le_bytes());
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(()),
            n => hasher.update(&block[..n]),
        };
    }
}
