//! Every packed form (`models/forms/packed`) through the program: what is recognised, both passes, keep-everything,
//! caches, decoding, and how far the result is from its reference.
//!
//! The outcome is the table in `docs/forms.md`, which has to be what is committed; `DUET_BLESS=1` writes it. It holds
//! what is the same on every machine: numbers of sets and steps that were compared, and the limits that held.
//! `cargo test --release --test forms -- --nocapture` prints the differences themselves.

#![allow(clippy::print_stdout, reason = "tests print what they measured")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use serde_json::Value;

use duet_onnx::arch::Role;
use support::forms::{Form, all, form};
use support::goldens::{Client, Goldens};
use support::models::{Pool, fixture_at, open_whole, rewritten, root, runtime, sizes};

/// Both stages: drops in the middle and to zero.
const BOTH: &str = "version: 1
passes:
  - token_merge: {dominant: 20, contextual: 4}
  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}
";

/// Both passes, and nothing is merged or dropped.
const EVERYTHING: &str = "version: 1
passes:
  - token_merge: {dominant: 1.0, contextual: 0, cls: drop}
  - visual_prune: {drops: [{after_layer: 2, keep: 1.0}]}
";

/// Largest difference from PyTorch in fp32, in standard deviations.
const LIMIT: f64 = 1e-4;

/// Forms that are refused, with words of the reason.
const REFUSED: &[(&str, &str)] = &[("genaidir-int4-gqa", "visual")];

fn duet(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(arguments)
        .env("NO_COLOR", "1")
        .output()
        .expect("the program runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// One row of the table.
#[derive(Default)]
struct Row {
    recognised: String,
    merge: String,
    prune: String,
    keep: String,
    caches: String,
    decode: String,
    parity: String,
    /// For the person who runs the test.
    measured: String,
    /// What must not be.
    problems: Vec<String>,
}

impl Row {
    fn cells(&self) -> [&str; 7] {
        [
            &self.recognised,
            &self.merge,
            &self.prune,
            &self.keep,
            &self.caches,
            &self.decode,
            &self.parity,
        ]
    }
}

/// What `inspect --json` finds, part by part, in words.
fn structure(path: &Path) -> Result<String, String> {
    let output = duet(&["inspect", "--json", text(path)]);
    // Nothing recognised is an outcome (exit code 1), with a document.
    let Ok(document) = serde_json::from_slice::<Value>(&output.stdout) else {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    };
    let mut found: Vec<String> = Vec::new();
    for part in parts(&document) {
        let of = |key: &str| part[key].as_i64().map_or("?".into(), |n| n.to_string());
        if part["blocks"].is_i64() {
            let cls = if part["cls"] == true { "CLS + " } else { "" };
            found.push(format!(
                "tower {} × {} heads, {cls}{} patches",
                of("blocks"),
                of("heads"),
                of("patches")
            ));
        } else if part["layers"].is_i64() && part["heads"].is_i64() {
            found.push(format!(
                "decoder {} × {}/{} heads of {}",
                of("layers"),
                of("heads"),
                of("kv_heads"),
                of("head_dim")
            ));
        }
    }
    // Vision first, and one line for decoders that say the same.
    found.sort_by_key(|s| s.starts_with("decoder"));
    found.dedup();
    Ok(found.join("; "))
}

/// Every object with a recognised structure in what `inspect` prints.
fn parts(document: &Value) -> Vec<&Value> {
    match document {
        Value::Object(map) => {
            let own = map.contains_key("blocks") || map.contains_key("layers");
            let inside = map.values().flat_map(parts);
            own.then_some(document).into_iter().chain(inside).collect()
        }
        Value::Array(list) => list.iter().flat_map(parts).collect(),
        _ => Vec::new(),
    }
}

/// The findings of `validate --json`, summed up.
#[derive(Default)]
struct Checked {
    passed: bool,
    sets: usize,
    steps: usize,
    features: f64,
    logits: f64,
    tolerance: f64,
    failed: Vec<String>,
}

fn validate(base: &Path, new: &Path) -> Result<Checked, String> {
    // Two forms are tested at a time, and threads that wait for work keep the cores busy.
    let (base, new) = (text(base), text(new));
    let output = duet(&["validate", "--json", "--threads", "1", base, new]);
    let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    };
    let mut checked = Checked {
        passed: output.status.success(),
        features: report["worst_features"].as_f64().expect("a number"),
        logits: report["worst_logits"].as_f64().expect("a number"),
        tolerance: report["tolerance"].as_f64().expect("a number"),
        ..Checked::default()
    };
    for finding in report["findings"].as_array().expect("findings") {
        let detail = finding["detail"].as_str().expect("a text");
        if finding["passed"] != true {
            checked
                .failed
                .push(format!("{}: {detail}", finding["check"]));
        }
        let before = |word: &str| {
            let (head, _) = detail.split_once(word)?;
            head.rsplit(' ').next()?.parse::<usize>().ok()
        };
        checked.sets += before(" kept sets").unwrap_or(0);
        checked.steps += before(" steps").unwrap_or(0);
    }
    Ok(checked)
}

/// Rewrites into `out`.
fn rewrite(base: &Path, recipe: &str, out: &Path) -> Result<(), String> {
    fs::remove_dir_all(out).ok();
    let file = out.with_extension("yaml");
    fs::write(&file, recipe).expect("a recipe");
    let output = duet(&[
        "rewrite",
        "--quiet",
        text(base),
        "--recipe",
        text(&file),
        "--out",
        text(out),
    ]);
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// The limit that a difference keeps: the same on every machine, as the difference is not.
fn within(difference: f64, limit: f64) -> String {
    if difference <= limit {
        format!("≤ {limit:.0e} σ")
    } else {
        format!("{difference:.0e} σ, expected {limit:.0e}")
    }
}

fn row(form: &Form, folder: &Path) -> Row {
    let base = form.unpack(folder);
    let mut row = Row::default();
    match structure(&base) {
        Ok(found) => row.recognised = found,
        Err(why) => row.problems.push(why),
    }
    let out = folder.join(format!("{}-both", form.name));
    let refused = REFUSED.iter().find(|(name, _)| *name == form.name);
    match (rewrite(&base, BOTH, &out), refused) {
        (Ok(()), None) => {}
        (Err(why), Some((_, words))) => {
            if !why.contains(words) {
                row.problems.push(format!(
                    "expected a refusal that says '{words}', found: {why}"
                ));
            }
            row.merge = "refused".into();
            row.prune = "refused".into();
            return row;
        }
        (Ok(()), Some(_)) => {
            row.problems
                .push("expected a refusal, and it was rewritten".into());
            return row;
        }
        (Err(why), None) => {
            row.problems.push(why);
            return row;
        }
    }
    if form.error.is_some() {
        row.merge = "written".into();
        row.prune = "written".into();
        row.parity = "ONNX Runtime does not load the unmodified file".into();
        if let Ok(checked) = validate(&base, &out) {
            let what = "expected ONNX Runtime to refuse the unmodified file, and it was validated";
            row.problems
                .push(format!("{what} ({} steps)", checked.steps));
        }
        return row;
    }
    let both = validate(&base, &out).unwrap_or_else(|why| {
        row.problems.push(why);
        Checked::default()
    });
    row.problems.extend(both.failed.iter().cloned());
    let good = |yes: bool| if yes { "equal" } else { "NOT equal" };
    row.merge = good(both.passed).into();
    row.prune = format!("{} sets", both.sets);
    row.caches = good(both.passed).into();
    row.decode = format!("{} steps", both.steps);
    let keep = rewrite(&base, EVERYTHING, &out).and_then(|()| validate(&base, &out));
    match keep {
        Ok(keep) => {
            row.problems.extend(keep.failed.iter().cloned());
            row.keep = within(keep.logits, keep.tolerance);
            row.measured = format!(
                "features {:.1e}, logits {:.1e} σ; keep everything {:.1e} σ",
                both.features, both.logits, keep.logits
            );
        }
        Err(why) => row.problems.push(format!("keep everything: {why}")),
    }
    match &form.goldens {
        Some(set) => parity(form, set, &base, &mut row),
        None => row.parity = format!("unmodified file, {}", within(both.logits, both.tolerance)),
    }
    fs::remove_dir_all(&out).ok();
    row
}

/// Compares an fp32 form with what PyTorch recorded.
fn parity(form: &Form, set: &str, path: &Path, row: &mut Row) {
    let base = fixture_at(path);
    let goldens = Goldens::read(set);
    let mut pool = Pool::default();
    let (mut features, mut logits, mut sets, mut cases) = (0f64, 0f64, 0, 0);
    let whole = matches!(base.parts[0].role, Role::Whole(_));
    let edge = sizes(&base).0;
    for case in goldens.cases.iter().filter(|case| case.fits(form)) {
        let changed = |text: &str| rewritten(&base, text);
        let outcome = if whole {
            // Some files take no other number of rows and images; positions are the file's own.
            if !case.one_image() || case.keeps_positions() {
                continue;
            }
            let mut model = open_whole(&changed(&case.recipe.to_string()));
            goldens.run_whole(case, &mut model, edge)
        } else {
            let runner = pool.open(&changed(&case.recipe.to_string()));
            goldens.run(case, &runner, Client::default())
        };
        features = features.max(outcome.features);
        logits = logits.max(outcome.logits);
        sets += outcome.sets;
        cases += 1;
        let named = |p: &String| format!("{}: {p}", case.name);
        row.problems.extend(outcome.problems.iter().map(named));
    }
    if !(features <= LIMIT && logits <= LIMIT) {
        row.problems.push(format!(
            "PyTorch: features {features:.1e} σ, logits {logits:.1e} σ"
        ));
    }
    row.measured += &format!("; PyTorch features {features:.1e}, logits {logits:.1e} σ");
    row.parity = format!(
        "PyTorch, {cases} cases, {sets} sets, {}",
        within(features.max(logits), LIMIT)
    );
}

#[test]
fn every_form_is_recognised_rewritten_and_right() {
    runtime();
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("forms");
    fs::create_dir_all(&folder).expect("a folder");
    let only = std::env::var("DUET_FORM").unwrap_or_default();
    let chosen = |f: &Form| only.is_empty() || f.name.contains(&only);
    let work: Vec<Form> = all().into_iter().filter(chosen).collect();
    let next = Mutex::new(work.iter());
    let rows = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(form) = next.lock().expect("no panic").next() else {
                        return;
                    };
                    let row = row(form, &folder);
                    println!(
                        "{:28} {} {}",
                        form.name,
                        row.measured,
                        row.problems.join("\n    ")
                    );
                    rows.lock()
                        .expect("no panic")
                        .insert(form.name.clone(), row);
                }
            });
        }
    });
    let rows = rows.into_inner().expect("no panic");
    let bad: Vec<String> = rows
        .iter()
        .filter(|(_, row)| !row.problems.is_empty())
        .map(|(name, row)| format!("{name}:\n    {}", row.problems.join("\n    ")))
        .collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    if only.is_empty() {
        compare(&table(&work, &rows));
    }
}

/// One model is one structure, whatever made its file.
#[test]
fn the_same_model_is_recognised_alike_in_every_form() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("alike");
    let plain = |set: &str| {
        let path = match set {
            "mha" | "gqa" => root().join(format!("models/llava/fixtures/ts-sdpa-{set}")),
            _ => return None,
        };
        Some(structure(&path).expect("a fixture is recognised"))
    };
    let mut compared = 0;
    for form in all() {
        let set = form.name.rsplit('-').next().expect("a name").to_owned();
        let widened =
            form.goldens.as_deref().is_some_and(|g| g != set) || form.heading.contains("GenAI");
        let Some(want) = plain(&set).filter(|_| !widened) else {
            continue;
        };
        let found =
            structure(&form.unpack(&folder)).unwrap_or_else(|why| panic!("{}: {why}", form.name));
        assert_eq!(found, want, "{}", form.name);
        compared += 1;
    }
    assert!(compared >= 14, "{compared} forms of the fixtures' weights");
}

/// The table as Markdown.
fn table(forms: &[Form], rows: &BTreeMap<String, Row>) -> String {
    let mut headings: Vec<&str> = Vec::new();
    for form in forms {
        if !headings.contains(&form.heading.as_str()) {
            headings.push(&form.heading);
        }
    }
    headings.sort_unstable();
    let mut out = String::new();
    for heading in headings {
        out += &format!(
            "\n### {heading}\n\n| form | made by | recognised | merge | prune: kept sets equal | keep everything | cache lengths | decoding | parity |\n"
        );
        out += "|---|---|---|---|---|---|---|---|---|\n";
        for form in forms.iter().filter(|f| f.heading == heading) {
            let cells = rows[&form.name].cells().join(" | ");
            out += &format!("| `{}` | {} | {cells} |\n", form.name, form.how);
        }
    }
    out
}

/// Compares the table with the one in the documentation, or writes it there.
fn compare(table: &str) {
    let path = root().join("docs/forms.md");
    let document = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (start, end) = ("<!-- table: tests/forms.rs -->\n", "<!-- end of table -->");
    let (head, rest) = document.split_once(start).expect("the start of the table");
    let (old, tail) = rest.split_once(end).expect("the end of the table");
    if std::env::var_os("DUET_BLESS").is_some() {
        fs::write(&path, format!("{head}{start}{table}\n{end}{tail}")).expect("written");
        return;
    }
    assert_eq!(
        old.trim(),
        table.trim(),
        "docs/forms.md is not what this test found; DUET_BLESS=1 writes it"
    );
}

/// A packed form is what the tools made: its files hash to what a second unpacking gives.
#[test]
fn forms_unpack_to_whole_directories() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("unpacked");
    let at = form("genai-int4-gqa").unpack(&folder);
    let graph = fs::metadata(at.join("onnx/decoder_model_merged.onnx")).expect("the decoder");
    let data = fs::metadata(at.join("onnx/decoder_model_merged.onnx.data")).expect("its weights");
    assert!(graph.len() > 10_000 && data.len() > 100_000);
}
