//! `duet textconv` and `duet diff` as git's tools, in a scratch repository.

#[path = "diff_report/command.rs"]
mod command;
mod common;

use std::fs;
use std::process::{Command, Output};

use command::*;
use common::*;
use duet_onnx::proto::ModelProto;
use tempfile::TempDir;

/// A repository of its own, untouched by the user's settings.
struct Repository {
    dir: TempDir,
}

impl Repository {
    fn new() -> Self {
        let repository = Self {
            dir: tempfile::tempdir().expect("a directory"),
        };
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository
    }

    fn try_git(&self, arguments: &[&str]) -> Output {
        Command::new("git")
            .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
            .args(arguments)
            .current_dir(self.dir.path())
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_SYSTEM", "/dev/null")
            .env("GIT_PAGER", "cat")
            .env("NO_COLOR", "1")
            .output()
            .expect("git starts")
    }

    fn git(&self, arguments: &[&str]) -> String {
        let output = self.try_git(arguments);
        assert!(
            output.status.success(),
            "git {arguments:?}: {}",
            stderr(&output)
        );
        stdout(&output)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.dir.path().join(name), contents).expect("written");
    }

    fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", "state"]);
    }
}

#[test]
fn git_diff_shows_models_as_lines() {
    let repository = Repository::new();
    let binary = env!("CARGO_BIN_EXE_duet");
    repository.write(".gitattributes", "*.onnx diff=onnx\n");
    repository.git(&[
        "config",
        "diff.onnx.textconv",
        &format!("'{binary}' textconv"),
    ]);
    let mut old = simple("pytorch", &W);
    let far = |length: &str| {
        external(
            "far",
            &[4],
            &[("location", "w.bin"), ("offset", "64"), ("length", length)],
        )
    };
    let graph = |m: &mut ModelProto, f: &dyn Fn(&mut duet_onnx::proto::GraphProto)| {
        f(m.graph.as_mut().expect("a graph"))
    };
    graph(&mut old, &|g| {
        g.initializer.push(far("16"));
        g.initializer.push(floats("big", &[32], &[0.5; 32]));
        g.node.push(node("Mul", &["far", "big"], &["unread"]));
    });
    repository.write("model.onnx", encode(&old));
    repository.write("broken.onnx", "no model");
    repository.write(
        "pointer.onnx",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    );
    repository.commit();
    let mut new = old.clone();
    new.metadata_props[0].value = Some("first line\nanother line".into());
    graph(&mut new, &|g| {
        g.node[0].op_type = Some("Abs".into());
        g.node[1].attribute.push(int("axis", 1));
        let mut other = [0.5; 32];
        other[31] = f32::from_bits(0.5_f32.to_bits() + 1);
        g.initializer[2] = floats("big", &[32], &other);
    });
    repository.write("model.onnx", encode(&new));
    repository.write("broken.onnx", "still no model");
    repository.write(
        "pointer.onnx",
        "version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 12\n",
    );
    let diff = repository.git(&["diff"]);
    let changed: Vec<&str> = diff
        .lines()
        .filter(|l| l.starts_with(['+', '-']) && !l.starts_with("+++") && !l.starts_with("---"))
        .collect();
    let digests: Vec<&&str> = changed
        .iter()
        .filter(|l| l.contains("constant big float[32] blake3:"))
        .collect();
    assert_eq!(digests.len(), 2, "one bit of one weight: {diff}");
    for line in [
        "-  | second line",
        "+  | another line",
        "-  n = Neg(x)  # Neg_n",
        "+  n = Abs(x)  # Neg_n",
        "+    axis = 1",
        "-oid sha256:00",
        "+oid sha256:01",
    ] {
        assert!(changed.contains(&line), "'{line}' is not in:\n{diff}");
    }
    assert!(diff.contains("no model: not a valid ONNX file"), "{diff}");
    // Nothing else changed, so nothing else is shown.
    assert_eq!(
        changed
            .iter()
            .filter(|l| !l.contains("no model") && !l.contains(" bytes, blake3:"))
            .count(),
        9,
        "{diff}"
    );
    // External data is told by its place, though the file is nowhere.
    let text = stdout(&duet(&[
        "textconv",
        repository
            .dir
            .path()
            .join("model.onnx")
            .to_str()
            .expect("UTF-8"),
    ]));
    assert!(
        text.contains("constant far float[4] in w.bin 64..80"),
        "{text}"
    );
    assert!(
        text.contains("constant w float[4] = 1.0, 2.0, 3.0, 4.0"),
        "{text}"
    );
    code(&duet(&["textconv", "nowhere.onnx"]), 2);
}

#[test]
fn git_difftool_compares_models() {
    let repository = Repository::new();
    let tool = format!(
        "'{}' diff \"$LOCAL\" \"$REMOTE\"",
        env!("CARGO_BIN_EXE_duet")
    );
    repository.git(&["config", "difftool.duet.cmd", &tool]);
    repository.write("model.onnx", encode(&simple("pytorch", &W)));
    repository.write("gone.onnx", encode(&simple("pytorch", &W)));
    repository.commit();
    repository.write("model.onnx", encode(&simple("other", &W)));
    repository.write("new file.onnx", encode(&simple("pytorch", &W)));
    fs::remove_file(repository.dir.path().join("gone.onnx")).expect("removed");
    repository.git(&["add", "--all"]);
    let shown = repository.git(&[
        "difftool",
        "--no-prompt",
        "--tool=duet",
        "--no-renames",
        "--cached",
        "HEAD",
    ]);
    for line in [
        "producer: pytorch → other",
        "+ model file added",
        "- model file removed",
    ] {
        assert!(shown.contains(line), "'{line}' is not in:\n{shown}");
    }
    let trusting = [
        "difftool",
        "--no-prompt",
        "--tool=duet",
        "--trust-exit-code",
        "HEAD",
        "--",
        "model.onnx",
    ];
    // git's own code for a tool that ended with 1 is another one.
    assert!(!repository.try_git(&trusting).status.success());
}
