//! `JUnit` XML: a suite for each file, a case for each class of changes (and for
//! each rule of a policy), so that a CI page shows by name what failed.

use std::fmt::Write;

use super::Report;
use super::words::{self, Sign, clean};
use crate::diff::report::{Change, Class, FileKind, FileReport};
use crate::readable::markup;

struct Case {
    name: String,
    /// Heading and text of a failure.
    failure: Option<(String, String)>,
    /// What there is to say without a failure.
    output: String,
}

pub(super) fn render(report: &Report) -> String {
    let mut suites: Vec<(String, Vec<Case>)> = Vec::new();
    if let Some(policy) = &report.policy {
        let cases = policy.rules.iter().map(|rule| Case {
            name: rule.rule.clone(),
            failure: rule.violation.clone().map(|why| (why.clone(), why)),
            output: format!("{} decided", words::number(rule.places, "place")),
        });
        suites.push((format!("policy {}", policy.path), cases.collect()));
    }
    for file in &report.files {
        suites.push((words::file_name(file), cases(file)));
    }
    let total: usize = suites.iter().map(|s| s.1.len()).sum();
    let failed = |cases: &[Case]| cases.iter().filter(|c| c.failure.is_some()).count();
    let failures: usize = suites.iter().map(|s| failed(&s.1)).sum();
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        out,
        "<testsuites name=\"duet diff\" tests=\"{total}\" failures=\"{failures}\" errors=\"0\">"
    );
    for (name, cases) in &suites {
        let name = xml(name);
        let _ = writeln!(
            out,
            "  <testsuite name=\"{name}\" tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"0\">",
            cases.len(),
            failed(cases)
        );
        for case in cases {
            put(&name, case, &mut out);
        }
        out.push_str("  </testsuite>\n");
    }
    out.push_str("</testsuites>\n");
    out
}

fn put(suite: &str, case: &Case, out: &mut String) {
    let head = format!(
        "<testcase classname=\"{suite}\" name=\"{}\"",
        xml(&case.name)
    );
    if case.failure.is_none() && case.output.is_empty() {
        let _ = writeln!(out, "    {head}/>");
        return;
    }
    let _ = writeln!(out, "    {head}>");
    if let Some((message, text)) = &case.failure {
        let message = xml(message);
        let _ = writeln!(
            out,
            "      <failure message=\"{message}\" type=\"difference\">{}</failure>",
            xml_lines(text)
        );
    }
    if !case.output.is_empty() {
        let _ = writeln!(
            out,
            "      <system-out>{}</system-out>",
            xml_lines(&case.output)
        );
    }
    out.push_str("    </testcase>\n");
}

/// One case for each class that a file of this kind can change in.
fn cases(file: &FileReport) -> Vec<Case> {
    let possible = |class: &Class| match file.kind {
        FileKind::Model => *class != Class::Config,
        FileKind::Json | FileKind::Other => *class == Class::Config,
    };
    // A change of another class would not be lost for it.
    let has = |class: &Class| file.changes.iter().any(|c| c.class == *class);
    let classes = Class::ALL.into_iter().filter(|c| possible(c) || has(c));
    classes.map(|class| case(file, class)).collect()
}

fn case(file: &FileReport, class: Class) -> Case {
    let of_class = file.changes.iter().filter(|c| c.class == class);
    let (counted, ignored): (Vec<&Change>, Vec<&Change>) =
        of_class.partition(|c| c.ignored.is_none());
    let text = |changes: &[&Change]| {
        changes
            .iter()
            .map(|c| line(c))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let failed = class.counts() && !counted.is_empty();
    let mut output = Vec::new();
    if !failed && !counted.is_empty() {
        output.push(text(&counted));
    }
    if !ignored.is_empty() {
        output.push(text(&ignored));
    }
    Case {
        name: class.word().to_owned(),
        failure: failed.then(|| {
            let first = counted.first().map_or("", |c| c.title.as_str());
            let message = match counted.len() {
                1 => clean(first),
                n => format!("{n} changes, the first: {}", clean(first)),
            };
            (message, text(&counted))
        }),
        output: output.join("\n"),
    }
}

fn line(change: &Change) -> String {
    let numbers = words::numbers(change);
    let numbers = if numbers.is_empty() {
        numbers
    } else {
        format!(" [{numbers}]")
    };
    let why = change.ignored.as_ref();
    let why = why.map_or_else(String::new, |w| format!(" (not counted: {})", clean(w)));
    let title = clean(&change.title);
    format!(
        "{} {title}{}{numbers}{why}",
        Sign::of(change).mark(),
        words::at(change)
    )
}

/// Text of an attribute or element on one line. `clean` has removed what XML 1.0
/// cannot hold.
fn xml(text: &str) -> String {
    markup(&clean(text), "&apos;")
}

/// Text of several lines, none of which holds a control character.
fn xml_lines(text: &str) -> String {
    text.lines().map(xml).collect::<Vec<_>>().join("\n")
}
