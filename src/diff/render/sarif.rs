//! SARIF 2.1.0: what code-scanning pages read. A rule for each kind of change, a
//! result for each change with the places as logical locations.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::words::{self, clean};
use super::{Report, about};
use crate::diff::report::{Change, Class, FileReport, Kind, Place, Presence, Spot};

/// Locations of one result; more are in the text and in the JSON report.
const LOCATIONS: usize = 50;

pub(super) fn render(report: &Report) -> String {
    let kinds: BTreeSet<Kind> = report
        .files
        .iter()
        .flat_map(|f| f.changes.iter().map(|c| c.kind))
        .collect();
    let kinds: Vec<Kind> = kinds.into_iter().collect();
    let class_of = |kind: Kind| {
        let mut all = report.files.iter().flat_map(|f| &f.changes);
        all.find(|c| c.kind == kind)
            .map_or(Class::Cosmetic, |c| c.class)
    };
    let mut rules: Vec<Value> = kinds
        .iter()
        .map(|&kind| {
            let class = class_of(kind);
            json!({
                "id": kind.word(),
                "shortDescription": { "text": about(kind) },
                "fullDescription": { "text": format!("{} Class {}: {}.", about(kind), class.word(), words::meaning(class)) },
                "defaultConfiguration": { "level": level(class) },
                "properties": { "tags": [class.word()] },
            })
        })
        .collect();
    let mut results = Vec::new();
    for file in &report.files {
        for change in &file.changes {
            let index = kinds.iter().position(|k| *k == change.kind).unwrap_or(0);
            results.push(result(report, file, change, index));
        }
    }
    // A broken rule is a result of its own: a rewrite that is missing has no change.
    if let Some(policy) = &report.policy {
        let index = rules.len();
        rules.push(json!({
            "id": "policy",
            "shortDescription": { "text": "A rule of the policy is broken." },
            "defaultConfiguration": { "level": "error" },
        }));
        for rule in &policy.rules {
            let Some(why) = &rule.violation else { continue };
            results.push(json!({
                "ruleId": "policy",
                "ruleIndex": index,
                "level": "error",
                "message": { "text": format!("{}: {}", clean(&rule.rule), clean(why)) },
                "locations": [{
                    "physicalLocation": {
                        "artifactLocation": { "uri": uri(&policy.path) },
                        "region": { "startLine": 1 },
                    },
                }],
                "partialFingerprints": { "duetDiff/v1": fingerprint(&["policy", &rule.rule]) },
            }));
        }
    }
    let log = json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "duet diff",
                "version": report.duet,
                "rules": rules,
            } },
            "columnKind": "unicodeCodePoints",
            "invocations": [{ "executionSuccessful": true }],
            "results": results,
        }],
    });
    let text = serde_json::to_string_pretty(&log);
    text.unwrap_or_default() + "\n"
}

fn level(class: Class) -> &'static str {
    match class {
        Class::Contract | Class::Version | Class::Structure | Class::Weights => "error",
        Class::Config | Class::Shapes => "warning",
        Class::Metadata | Class::Cosmetic => "note",
    }
}

fn result(report: &Report, file: &FileReport, change: &Change, index: usize) -> Value {
    let numbers = words::numbers(change);
    let numbers = if numbers.is_empty() {
        numbers
    } else {
        format!(" ({numbers})")
    };
    let text = format!("{}{}{numbers}", clean(&change.title), words::at(change));
    let address = uri(&address(report, file));
    let locations: Vec<Value> = change
        .places
        .iter()
        .take(LOCATIONS)
        .map(|place| {
            let mut location = json!({
                "physicalLocation": {
                    "artifactLocation": { "uri": address },
                    // A model has no lines; pages that show results ask for one.
                    "region": { "startLine": 1 },
                },
            });
            let logical = logical(place);
            if !logical.is_empty() {
                location["logicalLocations"] = Value::Array(logical);
            }
            location
        })
        .collect();
    let mut result = json!({
        "ruleId": change.kind.word(),
        "ruleIndex": index,
        "level": level(change.class),
        "message": { "text": text },
        "locations": locations,
        "partialFingerprints": {
            "duetDiff/v1": fingerprint(&[&file.path, &change.kind.word(), &change.title]),
        },
        "properties": { "class": change.class.word(), "places": change.places.len() },
    });
    if let Some(why) = &change.ignored {
        result["suppressions"] = json!([{ "kind": "external", "justification": clean(why) }]);
    }
    result
}

/// The file on the side that has it now.
fn address(report: &Report, file: &FileReport) -> String {
    let (root, path) = match file.presence {
        Presence::OnlyA => (&report.a, &file.path),
        _ => (&report.b, file.path_b.as_ref().unwrap_or(&file.path)),
    };
    // A side that is one file is named by itself.
    let name = root.rsplit('/').next().unwrap_or(root);
    if name == path && report.files.len() == 1 {
        root.clone()
    } else {
        format!("{}/{path}", root.trim_end_matches('/'))
    }
}

/// A path as a reference: what is not plain is percent-encoded.
fn uri(path: &str) -> String {
    let mut out = String::new();
    if path.starts_with('/') {
        out.push_str("file://");
    }
    for byte in path.trim_start_matches("./").bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

fn logical(place: &Place) -> Vec<Value> {
    let graph = if place.graph.is_empty() {
        "main graph"
    } else {
        &place.graph
    };
    let of = |spot: &Spot| {
        let node = spot.node.as_ref().filter(|n| !n.is_empty());
        let (name, kind) = match (node, &spot.value) {
            (Some(node), _) => (node, "node"),
            (None, Some(value)) => (value, "value"),
            (None, None) => return None,
        };
        Some(json!({
            "name": clean(name),
            "kind": kind,
            "fullyQualifiedName": format!("{}/{}", clean(graph), clean(name)),
        }))
    };
    let now = place.b.as_ref().or(place.a.as_ref()).and_then(of);
    let first = || place.added.first().or(place.removed.first()).and_then(of);
    now.or_else(first).into_iter().collect()
}

/// A stable name of a result: 64-bit FNV-1a of its parts.
fn fingerprint(parts: &[&str]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}
