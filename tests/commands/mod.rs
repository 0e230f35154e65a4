//! What the tests of the command line share: running it, and building model
//! directories out of the fixtures.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::print_stderr, reason = "an installation announces itself")]

pub(crate) mod markup;
pub(crate) mod schema;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Merges 81 patches into 36 tokens and drops twice.
pub(crate) const BOTH: &str = "version: 1
passes:
  - token_merge: {dominant: 30, contextual: 6}
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}
";

/// The merge alone.
pub(crate) const MERGE: &str = "version: 1
passes:
  - token_merge: {dominant: 30, contextual: 6}
";

/// Merges 81 patches, of an image and of each frame of a clip, into 24 tokens and drops twice.
pub(crate) const CLIPS: &str = "version: 1
passes:
  - token_merge: {dominant: 20, contextual: 4}
  - visual_prune: {drops: [{after_layer: 4, keep: 0.5}, {after_layer: 6, keep: 0.0}]}
";

/// Names of the parts in the fixtures.
pub(crate) const PARTS: [&str; 3] = ["vision_encoder", "embed_tokens", "decoder_model_merged"];

/// A file of the sources.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A model file of a fixture.
pub(crate) fn part(fixture: &str, name: &str) -> PathBuf {
    source("models/llava/fixtures").join(format!("{fixture}/onnx/{name}.onnx"))
}

/// What a command gave.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The one JSON document on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).expect("one JSON document")
    }
}

/// Runs the binary.
pub(crate) fn duet(arguments: &[&str]) -> Ran {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(arguments)
        .env("NO_COLOR", "1")
        .output()
        .expect("the binary starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran {
        code: output.status.code().expect("no signal"),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

/// Runs `validate` on one thread: several tests run at a time, and threads that wait for work keep the cores busy.
pub(crate) fn validate(arguments: &[&str]) -> Ran {
    duet(&[&["validate", "--threads", "1"], arguments].concat())
}

/// Answers a question: four tokens.
#[track_caller]
pub(crate) fn ask(model: &str, prompt: &str, rest: &[&str]) -> serde_json::Value {
    runtime();
    let mut all = vec!["run", model, "--prompt", prompt];
    all.extend(["--max-new-tokens", "4", "--threads", "1", "--json"]);
    all.extend(rest);
    duet(&all).json()
}

/// Installs ONNX Runtime if the machine has none: commands that run models do
/// not download it themselves.
pub(crate) fn runtime() {
    duet_onnx::runtime::ensure(&mut |line| eprintln!("{line}")).expect("ONNX Runtime");
}

/// A temporary directory with a recipe in it.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new(recipe: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("recipe.yaml"), recipe).expect("written");
        Self { dir }
    }

    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// As an argument.
    pub(crate) fn at(&self, relative: &str) -> String {
        self.path(relative).to_str().expect("UTF-8").to_owned()
    }

    /// Copies a file, making its folder.
    pub(crate) fn put(&self, from: &Path, to: &str) {
        let bytes = std::fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        self.write(to, &bytes);
    }

    /// Writes a file, making its folder.
    pub(crate) fn write(&self, to: &str, bytes: &[u8]) {
        let to = self.path(to);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("made");
        std::fs::write(&to, bytes).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    }

    /// Copies the files of a folder, not of those in it.
    pub(crate) fn copy_files(&self, from: &Path, to: &str) {
        for entry in std::fs::read_dir(from).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_file() {
                let name = path.file_name().expect("a name").to_string_lossy();
                self.put(&path, &format!("{to}/{name}"));
            }
        }
    }

    /// Copies a model directory as the fixtures have it.
    pub(crate) fn copy(&self, from: &Path, to: &str) {
        self.copy_files(from, to);
        self.copy_files(&from.join("onnx"), &format!("{to}/onnx"));
    }

    /// The graphs of a fixture, and nothing beside them, as a model directory.
    pub(crate) fn graphs(&self, fixture: &str, to: &str) {
        for name in PARTS {
            self.put(&part(fixture, name), &format!("{to}/onnx/{name}.onnx"));
        }
    }

    /// The configs and tokenizer of the fixtures, into a folder.
    pub(crate) fn configs(&self, folder: &str) {
        self.copy_files(&source("models/llava/fixtures/ts-sdpa-gqa"), folder);
    }

    /// `rewrite MODEL --recipe recipe.yaml` and what follows.
    pub(crate) fn rewrite(&self, model: &str, rest: &[&str]) -> Ran {
        let (model, recipe) = (self.at(model), self.at("recipe.yaml"));
        let mut all = vec!["rewrite", &model, "--recipe", &recipe];
        all.extend(rest);
        duet(&all)
    }

    /// Rewrites `model` to `out`, which has to succeed.
    #[track_caller]
    pub(crate) fn rewritten(&self, rest: &[&str]) -> Ran {
        let out = self.at("out");
        let ran = self.rewrite("model", &[&["--out", &out], rest].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran
    }

    /// `validate model out --json`, which has to succeed: names of the checks.
    #[track_caller]
    pub(crate) fn valid(&self) -> Vec<String> {
        runtime();
        let ran = validate(&[&self.at("model"), &self.at("out"), "--json"]);
        assert_eq!(ran.code, 0, "{}\n{}", ran.stderr, ran.stdout);
        let report = ran.json();
        let findings = report["findings"].as_array().expect("findings");
        let name = |f: &serde_json::Value| f["check"].as_str().expect("a name").to_owned();
        findings.iter().map(name).collect()
    }

    /// Answers a question about a picture.
    #[track_caller]
    pub(crate) fn answer(&self, model: &str, rest: &[&str]) -> serde_json::Value {
        let picture = source("models/llava/images/street.png");
        let picture = ["--image", picture.to_str().expect("UTF-8")];
        ask(
            &self.at(model),
            "What is it?",
            &[&picture[..], rest].concat(),
        )
    }

    /// Files below a folder with their contents.
    pub(crate) fn files(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let root = self.path(folder);
        let (mut found, mut todo) = (BTreeMap::new(), vec![root.clone()]);
        while let Some(at) = todo.pop() {
            for entry in std::fs::read_dir(&at).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    let name = path.strip_prefix(&root).expect("below").to_string_lossy();
                    found.insert(name.into_owned(), std::fs::read(&path).expect("read"));
                }
            }
        }
        found
    }

    /// Names of the files below a folder that end so.
    pub(crate) fn names(&self, folder: &str, end: &str) -> Vec<String> {
        let all = self.files(folder).into_keys();
        all.filter(|n| n.ends_with(end)).collect()
    }
}
