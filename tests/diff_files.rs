//! `duet diff` of directories: which files are compared, as what, and what no
//! file, link or config can hide.

#![cfg(unix)]

#[path = "diff_report/command.rs"]
mod command;
mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use command::*;
use common::*;
use duet_onnx::proto::{ModelProto, TensorProto};

/// Compares, and finds these texts in the report.
#[track_caller]
fn finds(pair: &Pair, options: &[&str], expected: &[&str]) {
    let found = pair.diff(options);
    code(&found, 1);
    let text = stdout(&found);
    for line in expected {
        assert!(text.contains(line), "'{line}' is not in:\n{text}");
    }
}

/// Compares, and is refused with these texts.
#[track_caller]
fn refuses(found: &std::process::Output, expected: &[&str]) {
    code(found, 2);
    assert_eq!(stdout(found), "");
    let text = stderr(found);
    for line in expected {
        assert!(text.contains(line), "'{line}' is not in:\n{text}");
    }
}

fn pipe(pair: &Pair, name: &str) -> String {
    let path = pair.path(name);
    let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo");
    assert!(made.success());
    path.to_str().expect("UTF-8").to_owned()
}

/// A model whose weight `w` lies in `location`, with one more initializer.
fn with_data(more: TensorProto) -> ModelProto {
    let mut made = simple("pytorch", &W);
    made.graph.as_mut().expect("a graph").initializer.push(more);
    made
}

#[test]
fn subjects_of_many_changed_keys_stay_their_own() {
    let pair = Pair::new();
    let config = |size: usize, shift: usize| {
        let all: Vec<String> = (0..40)
            .map(|i| format!("\"k{i}\": {}", i + shift))
            .collect();
        format!(
            "{{\"image_size\": {size}, \"vision\": {{\"image_mean\": {size}, {0}}}, {0}}}",
            all.join(", ")
        )
    };
    pair.write("a/config.json", config(336, 0));
    pair.write("b/config.json", config(448, 1));
    let judge = |rules: &str| {
        let policy = format!("version: 1\nrules:\n{rules}");
        let policy = pair.write("policy.yaml", policy);
        pair.diff(&["--policy", &policy])
    };
    let deny = "  - deny: config\n    subject: \"SUBJECT\"\n  - allow: config\n";
    for subject in [
        "image_*",
        "image_size",
        "vision.image_mean",
        "k39",
        "vision.k0",
    ] {
        let found = judge(&deny.replace("SUBJECT", subject));
        code(&found, 1);
        let rule = format!("deny config, subject {subject}");
        assert!(stdout(&found).contains(&rule), "{}", stdout(&found));
    }
    code(&judge(&deny.replace("SUBJECT", "image_mean")), 0);
    // An allowance of the one key is none of the other forty.
    code(
        &judge("  - allow: config\n    subject: \"image_size\"\n"),
        1,
    );
    let all =
        "  - allow: config\n    subject: \"k*\"\n  - allow: config\n    subject: \"vision.*\"\n";
    code(&judge(all), 1);
    let rest = "  - allow: config\n    subject: \"image_size\"\n";
    code(&judge(&format!("{all}{rest}")), 0);
}

#[test]
fn a_model_that_names_a_config_as_its_data_does_not_hide_it() {
    for (location, length, dims) in [
        ("tokenizer.json", "0", 0),
        ("tokenizer.json", "16", 4),
        ("tokenizer.model", "16", 4),
        ("merges.dat", "0", 0),
    ] {
        let pair = Pair::new();
        let entries = [("location", location), ("offset", "0"), ("length", length)];
        let made = encode(&with_data(external("hidden", &[dims], &entries)));
        for (side, end) in [("a", "1"), ("b", "2")] {
            pair.write(&format!("{side}/onnx/model.onnx"), &made);
            let text = format!("\"0123456789abcdef {end}\"");
            pair.write(&format!("{side}/onnx/{location}"), text);
        }
        finds(&pair, &[], &["1 config change in 1 of 3 files"]);
    }
}

#[test]
fn data_of_one_side_is_a_file_on_the_other() {
    let pair = Pair::new();
    let entries = [("location", "w.bin"), ("offset", "0"), ("length", "16")];
    let data: Vec<u8> = W.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut made = simple("pytorch", &W);
    made.graph.as_mut().expect("a graph").initializer = vec![external("w", &[4], &entries)];
    pair.write("a/onnx/model.onnx", encode(&made));
    pair.write("a/onnx/w.bin", &data);
    code(&pair.diff(&[]), 0);
    // Left behind as it was, and as another file that nothing reads.
    pair.write("b/onnx/w.bin", &data);
    code(&pair.diff(&[]), 0);
    pair.write("b/onnx/w.bin", b"something else");
    finds(&pair, &[], &["contents changed (16 → 14 bytes)"]);
    // As data of both it is compared by tensor: what lies behind is no weight.
    pair.write("b/onnx/model.onnx", encode(&made));
    pair.write("b/onnx/w.bin", [&data[..], b"more"].concat());
    code(&pair.diff(&[]), 0);
}

#[test]
fn links_are_what_they_lead_to() {
    let pair = Pair::new();
    for side in ["a", "b"] {
        fs::create_dir(pair.path(&format!("store-{side}"))).expect("created");
        pair.write(
            &format!("store-{side}/extra.json"),
            format!("{{\"side\": \"{side}\"}}"),
        );
        symlink(
            pair.path(&format!("store-{side}")),
            pair.path(side).join("linked"),
        )
        .expect("linked");
    }
    finds(&pair, &[], &["'side': \"a\" → \"b\""]);
    fs::remove_file(pair.path("b/linked")).expect("removed");
    finds(&pair, &[], &["linked/extra.json"]);
    // The same folder twice is no circle.
    symlink(pair.path("store-a"), pair.path("b/linked")).expect("linked");
    symlink(pair.path("store-a"), pair.path("b/again")).expect("linked");
    finds(&pair, &[], &["again/extra.json"]);
    fs::remove_file(pair.path("b/again")).expect("removed");
    code(&pair.diff(&[]), 0);
    symlink(pair.path("b"), pair.path("b/onnx/up")).expect("linked");
    refuses(
        &pair.diff(&[]),
        &["b/onnx/up: a link to a folder that it lies in"],
    );
    fs::remove_file(pair.path("b/onnx/up")).expect("removed");
    symlink(pair.path("nowhere"), pair.path("b/lost.bin")).expect("linked");
    refuses(&pair.diff(&[]), &["b/lost.bin: "]);
}

#[test]
fn configs_that_are_no_strict_json_are_compared_byte_by_byte() {
    let pair = Pair::new();
    let nan = "{\"image_size\": NaN, \"scale\": Infinity}";
    pair.write("a/config.json", nan);
    pair.write("b/config.json", nan);
    code(&pair.diff(&[]), 0);
    pair.write(
        "b/config.json",
        "{\"image_size\": NaN, \"scale\": -Infinity}",
    );
    finds(
        &pair,
        &[],
        &["contents changed", "not compared by key", "no JSON"],
    );
    pair.write("a/config.json", "{\"a\": 1, \"a\": 2}");
    pair.write("b/config.json", "{\"a\": 3, \"a\": 2}");
    finds(&pair, &[], &["key \"a\" is there twice"]);
    pair.write(
        "a/config.json",
        "{\"max\": 1000000000000000019884624838656}",
    );
    pair.write(
        "b/config.json",
        "{\"max\": 1000000000000000019884624838657}",
    );
    let line = "'max': 1000000000000000019884624838656 → 1000000000000000019884624838657";
    finds(&pair, &[], &[line]);
}

#[test]
fn what_is_no_file_is_refused_before_it_is_opened() {
    let pair = Pair::new();
    let model = pair.path("a/onnx/model.onnx");
    let model = model.to_str().expect("UTF-8");
    let fifo = pipe(&pair, "waiting");
    refuses(&duet(&["diff", &fifo, model]), &[&fifo, "a named pipe"]);
    refuses(&duet(&["diff", model, &fifo]), &[&fifo, "a named pipe"]);
    refuses(
        &duet(&["diff", model, "/dev/zero"]),
        &["/dev/zero", "a device"],
    );
    refuses(&duet(&["textconv", &fifo]), &[&fifo, "a named pipe"]);
    for policy in ["/dev/zero", &fifo] {
        refuses(
            &pair.diff(&["--policy", policy]),
            &[policy, "expected a file"],
        );
    }
    let long = pair.write("long.yaml", "# \n".repeat(1 << 19));
    refuses(
        &pair.diff(&["--policy", &long]),
        &[&long, "bytes are no policy"],
    );
    // What git names for a file that is not there.
    code(&duet(&["diff", "/dev/null", model]), 1);
    pipe(&pair, "b/onnx/waiting.json");
    refuses(&pair.diff(&[]), &["b/onnx/waiting.json", "a named pipe"]);
}

#[test]
fn another_name_of_a_model_counts() {
    let pair = Pair::new();
    fs::rename(
        pair.path("b/onnx/model.onnx"),
        pair.path("b/onnx/other.onnx"),
    )
    .expect("renamed");
    let line = "model file renamed: onnx/model.onnx → onnx/other.onnx";
    finds(&pair, &[], &[line, "1 structure change"]);
    code(&pair.diff(&["--ignore", "model-renamed"]), 0);
    let policy = "version: 1\nrules:\n  - allow: model-renamed\n    subject: \"onnx/other.onnx\"\n";
    let policy = pair.write("policy.yaml", policy);
    code(&pair.diff(&["--policy", &policy]), 0);
    let json = stdout(&pair.diff(&["--format", "json"]));
    assert!(json.contains("\"kind\": \"model-renamed\""), "{json}");
    // Two files that are named are compared whatever their names.
    let (a, b) = (
        pair.path("a/onnx/model.onnx"),
        pair.path("b/onnx/other.onnx"),
    );
    let (a, b) = (a.to_str().expect("UTF-8"), b.to_str().expect("UTF-8"));
    code(&duet(&["diff", a, b]), 0);
}

#[test]
fn lines_tell_omitted_inputs_and_declared_outputs() {
    let pair = Pair::new();
    let nodes = [
        node("Clip", &["x", "", "_"], &["out"]),
        node("Neg", &["_"], &["n"]),
    ];
    let made = model(graph(
        "g",
        &[value("x", FLOAT, &[4]), value("_", FLOAT, &[])],
        &[value("out", FLOAT, &[4]), value("x", FLOAT, &[7])],
        &[],
        &nodes,
    ));
    let file = pair.write("m.onnx", encode(&made));
    let found = duet(&["textconv", &file]);
    code(&found, 0);
    let text = stdout(&found);
    for line in [
        "out = Clip(x, _, \"_\")",
        "n = Neg(\"_\")",
        "input x float[4]",
        "output x float[7]",
    ] {
        assert!(text.contains(line), "'{line}' is not in:\n{text}");
    }
}
