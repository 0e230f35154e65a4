//! The binary, small models, and two directories to compare.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use duet_onnx::proto::{ModelProto, StringStringEntryProto};
use tempfile::TempDir;

use crate::common::*;

pub(crate) fn duet(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(arguments)
        .env("NO_COLOR", "1")
        .output()
        .expect("the binary starts")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub(crate) fn code(output: &Output, expected: i32) {
    let found = output.status.code();
    let (out, err) = (stdout(output), stderr(output));
    assert_eq!(found, Some(expected), "stdout: {out}\nstderr: {err}");
}

/// `out = Add(Neg(x), w)` with names and metadata of one's own.
pub(crate) fn simple(producer: &str, weights: &[f32]) -> ModelProto {
    let nodes = [
        node("Neg", &["x"], &["n"]),
        node("Add", &["n", "w"], &["out"]),
    ];
    let mut made = model(graph(
        "g",
        &[value("x", FLOAT, &[4])],
        &[value("out", FLOAT, &[4])],
        &[floats("w", &[4], weights)],
        &nodes,
    ));
    made.producer_name = Some(producer.into());
    made.metadata_props.push(StringStringEntryProto {
        key: Some("note".into()),
        value: Some("first line\nsecond line".into()),
    });
    made
}

pub(crate) const W: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

/// Two directories with models and configs, and their paths.
pub(crate) struct Pair {
    pub(crate) dir: TempDir,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let pair = Self { dir };
        for side in ["a", "b"] {
            fs::create_dir_all(pair.path(side).join("onnx")).expect("created");
            let file = pair.path(side).join("onnx/model.onnx");
            fs::write(file, encode(&simple("pytorch", &W))).expect("written");
            let config = pair.path(side).join("config.json");
            fs::write(config, "{\"image_size\": 336, \"hidden_size\": 64}").expect("written");
        }
        pair
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, contents).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    }

    /// Compares the directories.
    pub(crate) fn diff(&self, options: &[&str]) -> Output {
        let (a, b) = (self.path("a"), self.path("b"));
        let paths = [a.to_str().expect("UTF-8"), b.to_str().expect("UTF-8")];
        duet(&[&["diff"], options, &paths].concat())
    }
}
