//! `duet diff`'s renderings: goldens of one report in every format, hostile names
//! in every format, the JSON document against its committed schema, SARIF against
//! what the standard requires, and a comment that never gets too long.

mod common;
mod diff_report;
#[path = "commands/markup.rs"]
mod markup;
#[path = "commands/schema.rs"]
mod schema;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use diff_report::*;
use duet_onnx::diff::render::{COMMENT_LIMIT, Format, View, about, render};
use duet_onnx::diff::{Class, FileKind, Kind, Options, Report, compare};
use markup::well_formed;
use serde_json::Value;

const FULL: View = View {
    full: true,
    colour: false,
};

fn short(report: &Report, format: Format) -> String {
    render(report, format, View::default())
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/diff_formats")
        .join(name)
}

fn rewritten() -> Report {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/llava/fixtures");
    let options = Options {
        context: 2,
        ..Options::default()
    };
    compare(
        &root.join("ts-sdpa-mha"),
        &root.join("ts-eager-mha"),
        &options,
    )
    .expect("two fixtures")
}

// ---- goldens ----

#[test]
fn every_format_of_a_report_with_a_bit_of_everything() {
    let report = everything();
    for (format, file) in [
        (Format::Text, "everything.txt"),
        (Format::Json, "everything.json"),
        (Format::Markdown, "everything.md"),
        (Format::Html, "everything.html"),
        (Format::Junit, "everything.junit.xml"),
        (Format::Sarif, "everything.sarif"),
    ] {
        common::golden(&case(file), &short(&report, format));
    }
    common::golden(
        &case("everything.full.txt"),
        &render(&report, Format::Text, FULL),
    );
}

#[test]
fn colours_change_nothing_but_colours() {
    let report = everything();
    let view = View {
        full: false,
        colour: true,
    };
    let coloured = render(&report, Format::Text, view);
    assert!(coloured.contains("\u{1b}[32m+"), "what is new is green");
    let mut plain = String::new();
    let mut rest = coloured.as_str();
    while let Some((before, code)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        rest = code.split_once('m').expect("a whole code").1;
    }
    assert_eq!(plain + rest, short(&report, Format::Text));
}

#[test]
fn equal_and_identical_models_are_told_apart() {
    let text = |edit: &dyn Fn(&mut duet_onnx::diff::FileReport)| {
        let mut file = file("model.onnx", FileKind::Model, Vec::new());
        edit(&mut file);
        short(&report(vec![file]), Format::Text)
    };
    let same = text(&|f| f.same_bytes = true);
    assert!(same.contains("Identical: the same bytes."), "{same}");
    let renamed = text(&|f| f.renames.nodes = vec![("a".into(), "b".into())]);
    assert!(
        renamed.contains("Equal: the same computation, but for names."),
        "{renamed}"
    );
    assert!(renamed.contains("1 node renamed"), "{renamed}");
    let cosmetic = text(&|f| {
        f.changes = vec![change(
            Class::Cosmetic,
            Kind::GraphName,
            "graph name: a → b",
            Vec::new(),
        )];
    });
    assert!(cosmetic.contains("but for cosmetics"), "{cosmetic}");
    let ignored = text(&|f| {
        let mut change = change(
            Class::Metadata,
            Kind::Producer,
            "producer: a → b",
            Vec::new(),
        );
        change.ignored = Some("--ignore metadata".into());
        f.changes = vec![change];
    });
    assert!(
        ignored.contains("Nothing that counts changed. 1 change is not counted."),
        "{ignored}"
    );
}

#[test]
fn repeats_are_told_by_layers_then_by_number() {
    let one = |places| {
        let title = "attribute 'axis' of Softmax: -1 → 1";
        let all = vec![change(Class::Structure, Kind::Attribute, title, places)];
        short(
            &report(vec![file("m.onnx", FileKind::Model, all)]),
            Format::Text,
        )
    };
    let softmax = |name: &str, layer| at("Softmax", name, layer);
    let layers = [0, 1, 2, 5, 7, 8].map(|l| softmax("x", Some(l))).to_vec();
    assert!(one(layers).contains("→ 1, in layers 0–2, 5, 7, 8\n"));
    let twice = [0, 0, 1, 1].map(|l| softmax("x", Some(l))).to_vec();
    assert!(one(twice).contains("→ 1, 4 times, in layers 0, 1\n"));
    let most = [Some(0), Some(1), None].map(|l| softmax("x", l)).to_vec();
    assert!(one(most).contains("→ 1, 3 times, in layers 0, 1 and 1 elsewhere\n"));
    let single = one(vec![softmax("/a", Some(3))]);
    assert!(single.contains("→ 1, at '/a' (layer 3)\n"), "{single}");
    let mixed = vec![
        softmax("/a", Some(3)),
        softmax("/b", None),
        softmax("/c", None),
    ];
    let mixed = one(mixed);
    assert!(
        mixed.contains("in 3 places: '/a'; '/b'; and 1 more\n"),
        "{mixed}"
    );
}

// ---- hostile names ----

fn no_control(text: &str) {
    let bad = |c: &char| (c.is_control() && *c != '\n') || ('\u{202a}'..='\u{202e}').contains(c);
    assert_eq!(text.chars().find(bad), None);
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let report = hostile();
    for view in [View::default(), FULL] {
        let text = render(&report, Format::Text, view);
        no_control(&text);
        assert!(text.contains("\\u{202e}<img"), "shown by its number");
    }
}

#[test]
fn hostile_names_are_text_in_html() {
    let page = short(&hostile(), Format::Html);
    no_control(&page);
    let void = ["meta", "br", "input"];
    let seen = well_formed(&page, &void);
    let known = "a b body details div figcaption figure footer g h1 h2 h3 head header html input label meta \
                 nav p path pre rect section span style summary svg table td text th title tr br";
    let known: BTreeSet<&str> = known.split(' ').collect();
    let strange: Vec<&String> = seen
        .iter()
        .filter(|n| !known.contains(n.as_str()))
        .collect();
    assert_eq!(strange, [""; 0]);
    // Self-contained: nothing is loaded, nothing runs.
    for forbidden in [
        "http:",
        "https:",
        "//",
        "url(",
        "@import",
        "<script",
        "src=\"",
        "javascript:",
    ] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    assert!(page.contains("default-src 'none'"));
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;"));
}

#[test]
fn hostile_names_are_text_in_junit() {
    let xml = short(&hostile(), Format::Junit);
    no_control(&xml);
    let seen = well_formed(
        xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n")
            .expect("a declaration"),
        &[],
    );
    let seen: Vec<&str> = seen.iter().map(String::as_str).collect();
    assert_eq!(
        seen,
        ["failure", "system", "testcase", "testsuite", "testsuites"]
    );
    assert!(!xml.contains("]]>"));
}

/// What stands outside of fenced blocks; checks that fences match.
fn outside_of_fences(text: &str) -> String {
    let mut fence: Option<String> = None;
    let mut out = String::new();
    for line in text.lines() {
        let ticks = line.chars().take_while(|c| *c == '`').count();
        match &fence {
            None if ticks >= 3 => fence = Some("`".repeat(ticks)),
            None => out = out + line + "\n",
            // A line that could close the block earlier than meant would be the end.
            Some(f) if ticks >= f.len() => {
                assert_eq!(line, f, "only our own fence closes");
                fence = None;
            }
            Some(_) => {}
        }
    }
    assert_eq!(fence, None, "a block is left open");
    out
}

#[test]
fn hostile_names_are_text_in_markdown() {
    let report = hostile();
    for view in [View::default(), FULL] {
        let text = render(&report, Format::Markdown, view);
        no_control(&text);
        let outside = outside_of_fences(&text);
        let seen = well_formed(&outside.replace("\n> ", "\n"), &["br"]);
        let known: BTreeSet<&str> = ["b", "br", "code", "details", "h4", "sub", "summary"].into();
        assert!(seen.iter().all(|n| known.contains(n.as_str())), "{seen:?}");
        assert!(
            !outside.contains("@user") && !outside.contains("#1 "),
            "no mention, no reference"
        );
        assert!(outside.contains("&#64;user"));
    }
}

#[test]
fn hostile_names_are_strings_in_sarif_and_json() {
    let report = hostile();
    let json: Report = serde_json::from_str(&short(&report, Format::Json)).expect("valid JSON");
    assert_eq!(json, report);
    let sarif = short(&report, Format::Sarif);
    no_control(&sarif);
    let log: Value = serde_json::from_str(&sarif).expect("valid JSON");
    sarif_holds(&log);
}

// ---- SARIF ----

/// What the standard requires of every part that is there (2.1.0, sections 3.13 to 3.30).
#[track_caller]
fn sarif_holds(log: &Value) {
    assert_eq!(log["version"], "2.1.0");
    assert!(log["$schema"].as_str().expect("a schema").contains("sarif"));
    let runs = log["runs"].as_array().expect("runs");
    assert_eq!(runs.len(), 1);
    let driver = &runs[0]["tool"]["driver"];
    assert_eq!(driver["name"], "duet diff");
    let rules = driver["rules"].as_array().expect("rules");
    let ids: Vec<&str> = rules
        .iter()
        .map(|r| r["id"].as_str().expect("an id"))
        .collect();
    assert_eq!(
        ids.iter().collect::<BTreeSet<_>>().len(),
        ids.len(),
        "rules are unique"
    );
    for rule in rules {
        assert!(
            !rule["shortDescription"]["text"]
                .as_str()
                .expect("a text")
                .is_empty()
        );
        level(&rule["defaultConfiguration"]["level"]);
    }
    let results = runs[0]["results"].as_array().expect("results");
    assert!(!results.is_empty());
    for result in results {
        assert!(
            !result["message"]["text"]
                .as_str()
                .expect("a message")
                .is_empty()
        );
        let index = result["ruleIndex"].as_u64().expect("an index") as usize;
        assert_eq!(result["ruleId"], ids[index]);
        level(&result["level"]);
        let locations = result["locations"].as_array().expect("locations");
        assert!(!locations.is_empty());
        for location in locations {
            let physical = &location["physicalLocation"];
            let uri = physical["artifactLocation"]["uri"].as_str().expect("a URI");
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._~/%:".contains(c);
            assert!(!uri.is_empty() && uri.chars().all(plain), "{uri}");
            assert!(physical["region"]["startLine"].as_u64().expect("a line") >= 1);
            for logical in location["logicalLocations"]
                .as_array()
                .into_iter()
                .flatten()
            {
                assert!(logical["fullyQualifiedName"].is_string());
            }
        }
        for suppression in result["suppressions"].as_array().into_iter().flatten() {
            assert_eq!(suppression["kind"], "external");
        }
    }
}

fn level(value: &Value) {
    let known = ["none", "note", "warning", "error"];
    assert!(known.contains(&value.as_str().expect("a level")), "{value}");
}

#[test]
fn sarif_has_what_the_standard_requires() {
    for report in [everything(), rewritten()] {
        let log: Value = serde_json::from_str(&short(&report, Format::Sarif)).expect("JSON");
        sarif_holds(&log);
        let results = log["runs"][0]["results"].as_array().expect("results");
        let changes: usize = report.files.iter().map(|f| f.changes.len()).sum();
        assert_eq!(results.len(), changes);
        let prints: BTreeSet<&str> = results
            .iter()
            .map(|r| {
                r["partialFingerprints"]["duetDiff/v1"]
                    .as_str()
                    .expect("one")
            })
            .collect();
        assert!(
            prints.len() + 2 >= results.len(),
            "fingerprints tell results apart"
        );
    }
}

// ---- JSON ----

fn committed() -> Value {
    schema::committed("docs/diff.schema.json")
}

/// A document is what the committed schema says.
#[track_caller]
fn validate(value: &Value) {
    assert_eq!(schema::wrong(&committed(), value), [""; 0]);
}

#[test]
fn the_json_document_is_what_its_schema_says() {
    let mut judged = everything();
    let policy = "version: 1\nrewrites: {token_merge: 1}\nrules: [{allow: metadata}]";
    let policy = duet_onnx::diff::policy::Policy::parse(policy).expect("a policy");
    policy.apply(&mut judged);
    for report in [everything(), hostile(), rewritten(), judged] {
        let value: Value = serde_json::from_str(&short(&report, Format::Json)).expect("JSON");
        validate(&value);
    }
}

#[test]
fn the_schema_names_every_kind_and_class() {
    let schema = committed();
    let listed = |name: &str| -> Vec<String> {
        let all = schema["$defs"][name]["enum"].as_array().expect("a list");
        all.iter()
            .map(|w| w.as_str().expect("a word").to_owned())
            .collect()
    };
    assert_eq!(listed("kind"), Kind::ALL.map(Kind::word));
    assert_eq!(listed("class"), Class::ALL.map(Class::word));
    for class in Class::ALL {
        let counts = &schema["properties"]["counts"]["properties"];
        assert!(counts.get(class.word()).is_some());
    }
}

#[test]
#[should_panic(expected = "'extra' is not described")]
fn the_schema_test_notices_a_new_field() {
    let mut value = serde_json::to_value(everything()).expect("JSON");
    value["files"][1]["changes"][0]["extra"] = Value::Bool(true);
    validate(&value);
}

// ---- length ----

#[test]
fn a_comment_is_never_longer_than_allowed() {
    for (n, width) in [(5000, 20), (200, 2000), (30, 30_000), (1, 200_000)] {
        let changes = (0..n).map(|i| {
            let title = format!("change {i} {}", "é".repeat(width));
            change(Class::ALL[i % 8], Kind::Attribute, &title, Vec::new())
        });
        let mut changes: Vec<_> = changes.collect();
        changes.sort_by_key(|c| c.class);
        let files = (0..150).map(|i| {
            let own = if i == 0 {
                changes.clone()
            } else {
                changes[..1].to_vec()
            };
            file(
                &format!("folder {i}/{}", "n".repeat(width)),
                FileKind::Model,
                own,
            )
        });
        let report = report(files.collect());
        for view in [View::default(), FULL] {
            let text = render(&report, Format::Markdown, view);
            assert!(
                text.len() <= COMMENT_LIMIT,
                "{} for {n} × {width}",
                text.len()
            );
            // Short, the longest list is cut by number before it is cut by length.
            let cut = text.contains("did not fit into a comment");
            let counted = text.contains("  … ") && !view.full;
            assert!(cut || counted, "{n} × {width}");
            let outside = outside_of_fences(&text);
            well_formed(&outside.replace("\n> ", "\n"), &["br"]);
        }
    }
    let text = short(&everything(), Format::Markdown);
    assert!(!text.contains("did not fit"));
}

#[test]
fn a_page_of_a_hundred_changes_stays_one_page() {
    let report = rewritten();
    let page = short(&report, Format::Html);
    well_formed(&page, &["meta", "br", "input"]);
    let drawn = page.matches("<svg").count();
    assert!(drawn >= 2, "{drawn} graphs");
    assert!(page.len() < 8 << 20, "{} bytes", page.len());
}

#[test]
fn every_kind_is_explained_once() {
    let all: BTreeSet<&str> = Kind::ALL.into_iter().map(about).collect();
    assert_eq!(all.len(), Kind::ALL.len());
    let manual =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/diff.md"));
    let manual = manual.expect("docs/diff.md");
    for kind in Kind::ALL {
        let row = format!("| `{}` | {} |", kind.word(), about(kind));
        assert!(manual.contains(&row), "docs/diff.md has no row {row}");
    }
}
