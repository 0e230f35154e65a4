//! One page: an overview, every change with its places, and both graphs around
//! it. Nothing is loaded from anywhere, and no script is needed.

use std::fmt::Write;

use super::words::{self, Sign, clean};
use super::{Report, about, graph};
use crate::diff::report::{Change, Class, FileReport, Verdict};
use crate::readable::markup;

/// Places, and renamed names, in a table.
const ROWS: usize = 500;

/// Places of a change, and nodes at them, that are listed without a click.
const UNFOLDED: usize = 12;

/// Changes that are unfolded at first.
const OPEN: usize = 6;

const STYLE: &str = include_str!("page.css");

/// Text inside of HTML, in elements and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    markup(text, "&#39;")
}

/// Text from a file, on one line.
fn safe(text: &str) -> String {
    escape(&clean(text))
}

/// Text from a file with its lines.
fn lines(text: &str) -> String {
    text.lines().map(safe).collect::<Vec<_>>().join("\n")
}

pub(super) fn render(report: &Report) -> String {
    let mut out = String::new();
    let title = format!("{} → {}", safe(&report.a), safe(&report.b));
    let _ = writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>duet diff: {title}</title>\n<style>\n{STYLE}</style></head><body>"
    );
    let state = if report.differs() { "bad" } else { "good" };
    let _ = writeln!(
        out,
        "<header><h1>{title}</h1><p class=\"verdict {state}\">{}</p></header>",
        safe(&words::verdict(report))
    );
    if let Some(text) = words::rewritten(report) {
        let _ = writeln!(out, "<p>{}</p>", escape(&text));
    }
    policy(report, &mut out);
    filter(report, &mut out);
    let quiet = |f: &&FileReport| {
        f.verdict == Verdict::Identical && f.changes.is_empty() && f.renames.is_empty()
    };
    let told: Vec<(usize, &FileReport)> = report
        .files
        .iter()
        .enumerate()
        .filter(|(_, f)| !quiet(f))
        .collect();
    if report.files.len() > 1 {
        overview(report, &mut out);
    }
    let mut open = OPEN;
    for (i, file) in told {
        self::file(i, file, &mut open, &mut out);
    }
    let _ = writeln!(
        out,
        "<footer>duet {}</footer></body></html>",
        safe(&report.duet)
    );
    out
}

fn policy(report: &Report, out: &mut String) {
    let Some(policy) = &report.policy else { return };
    let _ = writeln!(
        out,
        "<section class=\"policy\"><h2>Policy {}</h2><table><tr><th>rule</th><th>places</th><th>result</th></tr>",
        safe(&policy.path)
    );
    for rule in &policy.rules {
        let (state, result) = match &rule.violation {
            Some(why) => ("bad", safe(why)),
            None => ("good", "kept".to_owned()),
        };
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td class=\"{state}\">{result}</td></tr>",
            safe(&rule.rule),
            rule.places
        );
    }
    out.push_str("</table></section>\n");
}

/// A box for each class that shows or hides its changes; CSS does the rest.
fn filter(report: &Report, out: &mut String) {
    let used = |class: &Class| {
        let mut all = report.files.iter().flat_map(|f| &f.changes);
        all.any(|c| c.class == *class)
    };
    let used: Vec<Class> = Class::ALL.into_iter().filter(used).collect();
    if used.is_empty() {
        return;
    }
    out.push_str("<nav class=\"filter\">");
    for class in used {
        let word = class.word();
        let n = report.counts.get(&class).copied().unwrap_or(0);
        let _ = write!(
            out,
            "<label title=\"{}\"><input type=\"checkbox\" id=\"show-{word}\" checked> <b class=\"tag {word}\">{word}</b> {n}</label>",
            words::meaning(class)
        );
    }
    if report.ignored > 0 {
        let n = report.ignored;
        let _ = write!(
            out,
            "<label><input type=\"checkbox\" id=\"show-ignored\" checked> not counted {n}</label>"
        );
    }
    out.push_str("</nav>\n");
}

fn overview(report: &Report, out: &mut String) {
    out.push_str("<table class=\"files\"><tr><th>file</th><th>result</th></tr>\n");
    for (i, file) in report.files.iter().enumerate() {
        let name = escape(&words::file_name(file));
        let told = file.verdict != Verdict::Identical || !file.changes.is_empty();
        let name = if told {
            format!("<a href=\"#f{i}\">{name}</a>")
        } else {
            name
        };
        let state = match file.verdict {
            Verdict::Different => "bad",
            _ => "good",
        };
        let verdict = escape(&words::file_verdict(file));
        let _ = writeln!(
            out,
            "<tr><td>{name}</td><td class=\"{state}\">{verdict}</td></tr>"
        );
    }
    out.push_str("</table>\n");
}

fn file(index: usize, file: &FileReport, open: &mut usize, out: &mut String) {
    let name = escape(&words::file_name(file));
    let _ = writeln!(
        out,
        "<section class=\"file\" id=\"f{index}\"><h2>{name}</h2>"
    );
    if let Some(facts) = words::facts(file) {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(&facts));
    }
    for class in Class::ALL {
        let of_class = file.changes.iter().filter(|c| c.class == class);
        let mut changes: Vec<&Change> = of_class.collect();
        changes.sort_by_key(|c| c.ignored.is_some());
        if changes.is_empty() {
            continue;
        }
        let word = class.word();
        let _ = writeln!(
            out,
            "<div class=\"class {word}\"><h3><b class=\"tag {word}\">{word}</b> {}</h3>",
            words::meaning(class)
        );
        for change in changes {
            self::change(change, open, out);
        }
        out.push_str("</div>\n");
    }
    for note in &file.storage {
        let _ = writeln!(out, "<p class=\"note\">storage: {}</p>", safe(&note.text));
    }
    names(file, out);
    out.push_str("</section>\n");
}

fn change(change: &Change, open: &mut usize, out: &mut String) {
    let sign = Sign::of(change);
    let class = match sign {
        Sign::Added => "plus",
        Sign::Removed => "minus",
        Sign::Changed => "tilde",
    };
    let ignored = if change.ignored.is_some() {
        " ignored"
    } else {
        ""
    };
    let body = details(change);
    let head = format!(
        "<span class=\"sign {class}\">{}</span> <span class=\"title\">{}</span><span class=\"at\">{}</span>",
        sign.mark(),
        safe(&change.title),
        escape(&words::at(change))
    );
    if body.is_empty() {
        let _ = writeln!(out, "<div class=\"change{ignored}\">{head}</div>");
        return;
    }
    let unfolded = if change.ignored.is_none() && change.context.is_some() && *open > 0 {
        *open -= 1;
        " open"
    } else {
        ""
    };
    let _ = writeln!(
        out,
        "<details class=\"change{ignored}\"{unfolded}><summary title=\"{}\">{head}</summary>\n{body}</details>",
        escape(about(change.kind))
    );
}

/// What there is below a change's line; empty if the line says it all.
fn details(change: &Change) -> String {
    let mut out = String::new();
    if let Some(why) = &change.ignored {
        let _ = writeln!(out, "<p class=\"note\">Not counted: {}.</p>", safe(why));
    }
    let numbers = words::numbers(change);
    if !numbers.is_empty() {
        let _ = writeln!(out, "<p>{}</p>", escape(&numbers));
    }
    let hidden = |v: &Option<String>| {
        v.as_ref()
            .is_some_and(|v| !change.title.contains(v.as_str()))
    };
    if hidden(&change.before) || hidden(&change.after) {
        out.push_str("<div class=\"values\">");
        for (class, value) in [("minus", &change.before), ("plus", &change.after)] {
            let text = lines(value.as_deref().unwrap_or(""));
            let _ = write!(out, "<pre class=\"{class}\">{text}</pre>");
        }
        out.push_str("</div>\n");
    }
    if let Some(context) = &change.context {
        out.push_str(&graph::draw(context));
        if change.places.len() > 1 && !out.is_empty() {
            out.push_str("<p class=\"note\">Drawn for the first place.</p>\n");
        }
    }
    out.push_str(&places(change));
    out
}

fn places(change: &Change) -> String {
    let nodes = |p: &crate::diff::report::Place| !p.added.is_empty() || !p.removed.is_empty();
    let told = match change.places.as_slice() {
        [] => true,
        [one] => !nodes(one) && (one.a == one.b || one.a.is_none() || one.b.is_none()),
        _ => false,
    };
    if told {
        return String::new();
    }
    let listed = change
        .places
        .iter()
        .map(|p| 1 + p.added.len() + p.removed.len());
    let many = listed.sum::<usize>() > UNFOLDED;
    let mut out = String::new();
    if many {
        let n = words::number(change.places.len(), "place");
        let _ = writeln!(out, "<details><summary>{n}</summary>");
    }
    out.push_str(
        "<table class=\"places\"><tr><th>layer</th><th>before</th><th>after</th><th></th></tr>\n",
    );
    for place in change.places.iter().take(ROWS) {
        let layer = place.layer.map_or_else(String::new, |l| l.to_string());
        let spot = |s: &Option<_>| {
            s.as_ref()
                .map_or_else(String::new, |s| escape(&words::spot(s)))
        };
        let list = |class: &str, all: &[_]| -> String {
            if all.is_empty() {
                return String::new();
            }
            let all: Vec<String> = all.iter().map(|s| escape(&words::spot(s))).collect();
            format!("<div class=\"{class}\">{}</div>", all.join("<br>"))
        };
        let graph = if place.graph.is_empty() {
            String::new()
        } else {
            format!("in {}", safe(&place.graph))
        };
        let numbers = place
            .weights
            .as_ref()
            .map(words::weights)
            .unwrap_or_default();
        let _ = writeln!(
            out,
            "<tr><td>{layer}</td><td>{}{}</td><td>{}{}</td><td>{graph} {}</td></tr>",
            spot(&place.a),
            list("minus", &place.removed),
            spot(&place.b),
            list("plus", &place.added),
            escape(&numbers),
        );
    }
    if change.places.len() > ROWS {
        let more = change.places.len() - ROWS;
        let _ = writeln!(out, "<tr><td colspan=\"4\">… {more} more</td></tr>");
    }
    out.push_str("</table>\n");
    if many {
        out.push_str("</details>\n");
    }
    out
}

fn names(file: &FileReport, out: &mut String) {
    let Some(text) = words::renamed(file) else {
        return;
    };
    let _ = writeln!(
        out,
        "<details class=\"names\"><summary>{}</summary><table>",
        escape(&text)
    );
    let all = file.renames.nodes.iter().map(|n| ("node", n));
    let all = all.chain(file.renames.values.iter().map(|v| ("value", v)));
    for (what, (old, new)) in all.clone().take(ROWS) {
        let _ = writeln!(
            out,
            "<tr><td>{what}</td><td>{}</td><td>{}</td></tr>",
            safe(old),
            safe(new)
        );
    }
    let total = all.count();
    if total > ROWS {
        let _ = writeln!(
            out,
            "<tr><td colspan=\"3\">… {} more</td></tr>",
            total - ROWS
        );
    }
    out.push_str("</table></details>\n");
}
