//! The import rule and what goes with it, checked on the source text.
//!
//! ```text
//! cli → all        validate → runtime, passes, arch, onnx, ir       eval → runtime
//! bench → runtime, passes, arch, onnx, ir                           explain → runtime, passes, ir
//! diff → onnx, ir  passes → arch, ir     arch → ir     runtime → onnx, ir
//! onnx → proto, ir                       ir, proto → nothing of ours
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Which of our modules each may name.
const RULE: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "validate",
            "eval",
            "bench",
            "explain",
            "diff",
            "passes",
            "arch",
            "runtime",
            "onnx",
            "ir",
            "proto",
            "suggest",
            "random",
            "readable",
            "statistics",
        ],
    ),
    (
        "validate",
        &["runtime", "passes", "arch", "onnx", "ir", "random"],
    ),
    (
        "bench",
        &[
            "runtime",
            "passes",
            "arch",
            "onnx",
            "ir",
            "random",
            "readable",
            "statistics",
        ],
    ),
    ("eval", &["runtime", "random", "readable", "statistics"]),
    ("explain", &["runtime", "passes", "ir"]),
    ("diff", &["onnx", "ir", "suggest", "readable"]),
    ("passes", &["arch", "ir", "suggest", "random"]),
    ("arch", &["ir"]),
    ("runtime", &["onnx", "ir", "random"]),
    ("onnx", &["proto", "ir"]),
    ("ir", &["random"]),
    ("proto", &[]),
    // Words for messages; knows nothing of models.
    ("suggest", &[]),
    // Numbers from a seed.
    ("random", &[]),
    // Medians and quantiles.
    ("statistics", &[]),
    // Numbers, markup and tables.
    ("readable", &[]),
];

/// Crates that only some modules may name.
const CRATES: &[(&str, &[&str])] = &[
    ("ort", &["runtime", "validate"]),
    ("tract_onnx", &["runtime", "validate"]),
    ("prost", &["proto", "onnx"]),
    ("clap", &["cli", "main"]),
    ("anyhow", &["cli", "main"]),
    // Recipes, profiles, policies.
    ("serde_yaml", &["passes", "arch", "diff"]),
];

const MAX_LINES: usize = 700;

/// A source file: its module (first folder, or stem), path and text.
struct Source {
    module: String,
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(below: &str) -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![root().join(below)]);
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let read = |path: PathBuf| {
        let relative = path.strip_prefix(&src).unwrap().to_owned();
        let first = relative
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_string_lossy()
            .into_owned();
        Source {
            module: first.strip_suffix(".rs").unwrap_or(&first).to_owned(),
            path: relative.display().to_string(),
            text: fs::read_to_string(&path).unwrap(),
        }
    };
    let all: Vec<Source> = rust_files("src").into_iter().map(read).collect();
    assert!(all.len() > 40, "the sources were not found");
    all
}

/// The text without comments and the contents of string literals, as far as a
/// line at a time shows them.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let mut inside = false;
        let mut before = ' ';
        let mut rest = line.chars().peekable();
        while let Some(c) = rest.next() {
            if inside {
                if c == '\\' {
                    rest.next();
                } else if c == '"' {
                    inside = false;
                    out.push('"');
                }
            } else if c == '"' && before != '\'' {
                inside = true;
                out.push('"');
            } else if c == '/' && rest.peek() == Some(&'/') {
                break;
            } else {
                out.push(c);
            }
            before = c;
        }
        out.push('\n');
    }
    out
}

fn is_ident(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Positions behind every occurrence of `name` that stands as a word of its own.
fn words<'t>(text: &'t str, name: &str) -> Vec<(&'t str, &'t str)> {
    let found = text
        .match_indices(name)
        .map(|(at, _)| (&text[..at], &text[at + name.len()..]));
    let alone = |(before, after): &(&str, &str)| {
        !before.ends_with(is_ident) && !after.starts_with(is_ident)
    };
    found.filter(alone).collect()
}

/// First names of the paths in `a::b`, `{a, b::{c, d}}`.
fn first_names(path: &str) -> Vec<String> {
    let name = |s: &str| s.chars().take_while(|c| is_ident(*c)).collect::<String>();
    let Some(list) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                found.push(name(list[start..at].trim_start()));
                start = at + 1;
            }
            '}' if depth == 0 => {
                found.push(name(list[start..at].trim_start()));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    found.retain(|n| !n.is_empty());
    found
}

/// Our top-level modules that a file at `depth` folders below `src` names.
fn imports(code: &str, depth: usize) -> BTreeSet<String> {
    let ours: BTreeSet<&str> = RULE.iter().map(|r| r.0).collect();
    let up = "super::".repeat(depth);
    let mut found = BTreeSet::new();
    for prefix in ["crate::", "duet_onnx::", up.as_str()] {
        for (at, _) in code.match_indices(prefix) {
            let before = &code[..at];
            let continues = before.ends_with(is_ident) || before.ends_with("::");
            if !continues && !prefix.is_empty() {
                found.extend(first_names(code[at + prefix.len()..].trim_start()));
            }
        }
    }
    found.retain(|name| ours.contains(name.as_str()));
    found
}

/// Module levels between a file's own scope and the crate.
fn depth(path: &str) -> usize {
    let folders = path.matches('/').count();
    if path.ends_with("mod.rs") {
        folders
    } else {
        folders + 1
    }
}

#[test]
fn modules_import_only_what_the_rule_allows() {
    let mut wrong = Vec::new();
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources() {
        if matches!(file.module.as_str(), "lib" | "main") {
            continue;
        }
        let rule = RULE.iter().find(|r| r.0 == file.module);
        let (_, allowed) =
            rule.unwrap_or_else(|| panic!("src/{} is in no layer of the rule", file.path));
        for name in imports(&code(&file.text), depth(&file.path)) {
            if name != file.module && !allowed.contains(&name.as_str()) {
                wrong.push(format!(
                    "src/{}: {} may not use {name}",
                    file.path, file.module
                ));
            }
            seen.entry(file.module.clone()).or_default().insert(name);
        }
    }
    assert_eq!(wrong, [""; 0]);
    // The scan sees the imports that are there.
    for (module, name) in [
        ("passes", "arch"),
        ("passes", "ir"),
        ("arch", "ir"),
        ("onnx", "proto"),
        ("onnx", "ir"),
    ] {
        assert!(
            seen[module].contains(name),
            "{module} → {name} was not seen: {seen:?}"
        );
    }
}

#[test]
fn crates_are_used_only_where_the_rule_allows() {
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in sources() {
        let code = code(&file.text);
        for (name, allowed) in CRATES {
            let used = words(&code, name).iter().any(|(before, after)| {
                let imported = before.ends_with("use ") || before.ends_with("extern crate ");
                let path = after.starts_with("::") && !before.ends_with("::");
                imported || path
            });
            if used && !allowed.contains(&file.module.as_str()) {
                wrong.push(format!(
                    "src/{}: {name} belongs in {}",
                    file.path,
                    allowed.join(", ")
                ));
            }
            if used {
                seen.insert(*name);
            }
        }
    }
    assert_eq!(wrong, [""; 0]);
    for name in ["prost", "serde_yaml"] {
        assert!(seen.contains(name), "{name} was not seen");
    }
}

#[test]
fn the_library_neither_prints_nor_exits() {
    let forbidden = ["println", "eprintln", "print", "eprint", "dbg"];
    let mut wrong = Vec::new();
    for file in sources() {
        let code = code(&file.text);
        let interactive = matches!(file.module.as_str(), "cli" | "main");
        for name in forbidden.iter().filter(|n| !interactive || **n == "dbg") {
            if words(&code, name)
                .iter()
                .any(|(_, after)| after.starts_with('!'))
            {
                wrong.push(format!("src/{}: {name}!", file.path));
            }
        }
        for name in ["exit", "abort"] {
            let exits = |(before, _): &(&str, &str)| before.ends_with("process::");
            if !interactive && words(&code, name).iter().any(exits) {
                wrong.push(format!("src/{}: process::{name}", file.path));
            }
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn nothing_is_left_to_do_and_no_test_is_skipped() {
    // Spelled in two parts, so that this file passes its own test.
    let macros = [["to", "do"], ["unimple", "mented"]].map(|p| p.concat());
    let attribute = ["#[ig", "nore"].concat();
    let mut wrong = Vec::new();
    for path in ["src", "tests", "proto"].into_iter().flat_map(rust_files) {
        let text = fs::read_to_string(&path).unwrap();
        let code = code(&text);
        let shown = path.strip_prefix(root()).unwrap().display().to_string();
        for name in &macros {
            if words(&code, name)
                .iter()
                .any(|(_, after)| after.starts_with('!'))
            {
                wrong.push(format!("{shown}: {name}!"));
            }
        }
        if code.contains(&attribute) {
            wrong.push(format!("{shown}: a skipped test"));
        }
        for line in text.lines() {
            if let Some((_, comment)) = line.split_once("//")
                && ["TO", "FIX"]
                    .iter()
                    .zip(["DO", "ME"])
                    .any(|(a, b)| comment.contains(&[*a, b].concat()))
            {
                wrong.push(format!("{shown}: {}", line.trim()));
            }
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn files_are_short_enough_to_read() {
    let mut wrong = Vec::new();
    for path in ["src", "tests", "proto"].into_iter().flat_map(rust_files) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        if lines > MAX_LINES {
            wrong.push(format!(
                "{}: {lines} lines; split it by meaning",
                path.display()
            ));
        }
    }
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn every_file_says_what_it_is_for() {
    // A module's own tests are what their name says.
    let silent = |file: &Source| !file.text.starts_with("//!") && !file.path.ends_with("/tests.rs");
    let wrong: Vec<String> = sources()
        .iter()
        .filter(|f| silent(f))
        .map(|f| f.path.clone())
        .collect();
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn the_scan_finds_what_it_looks_for() {
    let names = |text: &str, depth| imports(&code(text), depth).into_iter().collect::<Vec<_>>();
    assert_eq!(names("use crate::ir::Model;", 1), ["ir"]);
    assert_eq!(
        names("use crate::{\n    arch::{Vlm, Role},\n    onnx,\n};", 1),
        ["arch", "onnx"]
    );
    assert_eq!(
        names("fn f() { let x: crate::passes::Recipe; }", 1),
        ["passes"]
    );
    assert_eq!(names("use super::super::onnx::read;", 2), ["onnx"]);
    assert_eq!(
        names("use super::super::onnx::read;", 3),
        [""; 0],
        "crate::ir::onnx, say"
    );
    assert_eq!(
        names(
            "// crate::onnx\n/// [`crate::arch`]\nlet s = \"crate::cli\";",
            1
        ),
        [""; 0]
    );
    assert_eq!(names("let c = '\"'; use crate::arch;", 1), ["arch"]);
    assert_eq!(names("pub(in crate::ir) struct A;", 1), ["ir"]);
    assert_eq!(
        (
            depth("ir/mod.rs"),
            depth("ir/verify.rs"),
            depth("ir/verify/tests.rs")
        ),
        (1, 2, 3)
    );
    assert_eq!(words("sort::by(ort::x)", "ort").len(), 1);
    assert_eq!(words("println!(); eprintln!()", "println").len(), 1);
    assert_eq!(code("a // b\n\"x // \\\" y\" + c"), "a \n\"\" + c\n");
}
