//! What `duet diff` finds, one file a case: two models in ONNX's textual syntax and what is found.
//! `DUET_BLESS=1 cargo test --test diff` rewrites what is expected.
//!
//! ```text
//! # what the case shows
//! == a                       a model
//! == b                       another; or `== b: a` and edits of it, one a line (tests/diff/edit.rs)
//! == edit a                  edits of a model as it is so far (or of b)
//! == file a/w.bin: 1.0 2.0   floats of a data file
//! == found                   verdict, changes, storage, number of names
//! ```

mod common;
#[path = "diff/edit.rs"]
mod edit;
#[path = "diff/parse.rs"]
mod parse;
#[path = "diff/random.rs"]
mod random;
#[path = "diff/real.rs"]
mod real;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use common::*;
use duet_onnx::diff::{Options, Place, Report, Spot, compare};

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/diff/cases");
    let mut found: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "txt"))
        .collect();
    found.sort();
    assert!(found.len() >= 40, "{} cases", found.len());
    found
}

/// Heading and contents of each section; the remark in front is the first.
fn sections(text: &str) -> Vec<(String, String)> {
    let mut all = vec![(String::new(), String::new())];
    for line in text.lines() {
        match line.strip_prefix("== ") {
            Some(heading) => all.push((heading.to_owned(), String::new())),
            None => {
                let last = all.last_mut().unwrap();
                last.1 += line;
                last.1.push('\n');
            }
        }
    }
    all
}

/// Options that a case states: `== options: rtol 0.1`.
fn options(heading: &str) -> Options {
    let mut options = Options::default();
    let words: Vec<&str> = heading.split(' ').collect();
    for pair in words.chunks(2) {
        match pair {
            ["rtol", value] => options.rtol = value.parse().unwrap(),
            ["atol", value] => options.atol = value.parse().unwrap(),
            other => panic!("option {other:?}"),
        }
    }
    options
}

fn run(path: &Path) -> (String, String) {
    let text = fs::read_to_string(path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (None, None);
    let mut given = Options::default();
    let mut expected = String::new();
    for side in ["a", "b"] {
        fs::create_dir(dir.path().join(side)).unwrap();
    }
    for (heading, contents) in sections(&text) {
        match heading.split_once(": ").unwrap_or((&heading, "")) {
            ("", _) => assert!(
                contents.starts_with("# "),
                "{}: what it shows",
                path.display()
            ),
            ("a", _) => a = Some(parse::model(&contents)),
            ("b", "") => b = Some(parse::model(&contents)),
            ("b", "a") => {
                let mut model: duet_onnx::proto::ModelProto = a.clone().expect("a comes first");
                let lines = contents.lines().filter(|l| !l.trim().is_empty());
                lines.for_each(|line| edit::edit(&mut model, line));
                b = Some(model);
            }
            ("edit a" | "edit b", _) => {
                let side = if heading == "edit a" { &mut a } else { &mut b };
                let model = side.as_mut().expect("a model comes first");
                let lines = contents.lines().filter(|l| !l.trim().is_empty());
                lines.for_each(|line| edit::edit(model, line));
            }
            ("options", words) => given = options(words),
            ("found", _) => expected = contents,
            (heading, numbers) => {
                let name = heading
                    .strip_prefix("file ")
                    .unwrap_or_else(|| panic!("{heading}"));
                let all = numbers.split(' ').map(|n| n.parse::<f32>().unwrap());
                let bytes: Vec<u8> = all.flat_map(f32::to_le_bytes).collect();
                fs::write(dir.path().join(name), bytes).unwrap();
            }
        }
    }
    let paths = ["a", "b"].map(|side| dir.path().join(side).join("model.onnx"));
    for (path, model) in paths.iter().zip([a, b]) {
        fs::write(path, encode(&model.expect("two models"))).unwrap();
    }
    let report =
        compare(&paths[0], &paths[1], &given).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (expected, shown(&report))
}

/// Everything that a report says, but for numbers that say nothing.
fn shown(report: &Report) -> String {
    let mut out = String::new();
    let file = &report.files[0];
    let word = |v: serde_json::Value| v.as_str().unwrap_or("").to_owned();
    let _ = writeln!(
        out,
        "{}",
        word(serde_json::to_value(report.verdict).unwrap())
    );
    for change in &file.changes {
        let _ = writeln!(
            out,
            "{} {}: {}",
            change.class.word(),
            change.kind.word(),
            change.title
        );
        if let Some(reason) = &change.ignored {
            let _ = writeln!(out, "    ignored: {reason}");
        }
        for place in &change.places {
            let _ = writeln!(out, "    {}", at(place));
        }
        if let Some(w) = &change.weights {
            let _ = writeln!(
                out,
                "    {} of {} elements, max abs {}, max rel {}, not finite {}, signs of zero {}, norm {} → {}",
                w.changed,
                w.elements,
                number(w.max_abs),
                number(w.max_rel),
                w.non_finite,
                w.signs_of_zero,
                number(w.norm_a),
                number(w.norm_b),
            );
        }
    }
    for note in &file.storage {
        let _ = writeln!(out, "storage: {}", note.text);
    }
    let (nodes, values) = (file.renames.nodes.len(), file.renames.values.len());
    if nodes + values > 0 {
        let _ = writeln!(out, "renamed: {nodes} nodes, {values} values");
    }
    let facts = file.model.as_ref().expect("two models");
    let _ = writeln!(
        out,
        "nodes: {} and {}: {} in both ({} modified), {} removed, {} added",
        facts.nodes_a, facts.nodes_b, facts.matched, facts.modified, facts.removed, facts.added
    );
    out
}

fn number(n: Option<f64>) -> String {
    n.map_or("–".into(), |n| format!("{:.4}", n))
}

fn at(place: &Place) -> String {
    let spot = |s: &Spot| {
        let mut parts: Vec<String> = Vec::new();
        parts.extend(s.op.clone());
        parts.extend(
            s.node
                .clone()
                .filter(|n| !n.is_empty())
                .map(|n| format!("'{n}'")),
        );
        parts.extend(s.slot.map(|n| format!("input {n}")));
        parts.extend(s.value.clone());
        parts.join(" ")
    };
    let one = |s: &Option<Spot>| s.as_ref().map_or("–".into(), spot);
    let mut text = format!("{} | {}", one(&place.a), one(&place.b));
    if !place.graph.is_empty() {
        text = format!("in {}: {text}", place.graph);
    }
    if let Some(layer) = place.layer {
        text = format!("{text} (layer {layer})");
    }
    let list = |all: &[Spot]| all.iter().map(spot).collect::<Vec<_>>().join(", ");
    if place.removed.len() + place.added.len() > 0 {
        text = format!(
            "{text}; removed [{}] added [{}]",
            list(&place.removed),
            list(&place.added)
        );
    }
    text
}

#[test]
fn every_case_is_found_as_it_says() {
    let bless = std::env::var_os("DUET_BLESS").is_some_and(|v| v == "1");
    let mut wrong = Vec::new();
    for path in cases() {
        let (expected, found) = run(&path);
        if expected == found {
            continue;
        }
        if bless {
            let text = fs::read_to_string(&path).unwrap();
            let kept = text.split("== found\n").next().unwrap();
            fs::write(&path, format!("{kept}== found\n{found}")).unwrap();
        } else {
            wrong.push(format!(
                "{} (- expected, + found)\n{}",
                path.display(),
                diff(&expected, &found)
            ));
        }
    }
    let hint = "if the changes are meant, DUET_BLESS=1 cargo test --test diff rewrites the files";
    assert!(wrong.is_empty(), "{}\n{hint}", wrong.join("\n"));
}

/// Whatever is said going one way is said the other way round as well.
#[test]
fn both_directions_have_the_same_verdict() {
    for path in cases() {
        let text = fs::read_to_string(&path).unwrap();
        let verdict = |text: &str| text.lines().next().unwrap_or("").to_owned();
        let (_, forwards) = run(&path);
        let swapped = tempfile::tempdir().unwrap();
        let name = swapped.path().join(path.file_name().unwrap());
        // Sides are exchanged by exchanging their files.
        let mut model = (None, None);
        for (heading, contents) in sections(&text) {
            match heading.as_str() {
                "a" => model.0 = Some(contents),
                "b" => model.1 = Some(contents),
                _ => {}
            }
        }
        let (Some(a), Some(b)) = model else { continue };
        if text.contains("== file ") || text.contains("== edit ") {
            continue;
        }
        let options = text
            .lines()
            .find(|l| l.starts_with("== options"))
            .unwrap_or("");
        fs::write(
            &name,
            format!("# swapped\n== a\n{b}== b\n{a}{options}\n== found\n"),
        )
        .unwrap();
        let (_, backwards) = run(&name);
        assert_eq!(
            verdict(&forwards),
            verdict(&backwards),
            "{}",
            path.display()
        );
    }
}
