//! For a terminal: a change log, gravest first, repeats in one line.

use std::fmt::Write;

use anstyle::{AnsiColor, Style};

use super::words::{self, Sign, clean};
use super::{Report, View};
use crate::diff::report::{Change, Class, FileReport, Verdict};

const HEAD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default();
const NEW: Style = AnsiColor::Cyan.on_default();
const PLAIN: Style = Style::new();

/// Changes of one class, and lines of one value, that are spelled out unless
/// everything is asked for.
const SHOWN: usize = 20;
const LINES: usize = 40;

pub(super) fn render(report: &Report, view: View) -> String {
    let mut page = Page {
        view,
        out: String::new(),
    };
    page.header(report);
    let several = report.files.len() > 1;
    let (quiet, told): (Vec<_>, Vec<_>) = report.files.iter().partition(|f| is_quiet(f));
    for file in told {
        page.file(file, several);
    }
    if several && !quiet.is_empty() {
        let names: Vec<String> = quiet.iter().map(|f| words::file_name(f)).collect();
        let shown = if view.full || names.len() <= 4 {
            names.join(", ")
        } else {
            format!("{}, … (--full lists them)", names[..3].join(", "))
        };
        let text = format!("identical: {}: {shown}", words::number(quiet.len(), "file"));
        page.blank();
        page.line(0, DIM, &text);
    }
    page.out
}

/// Whether there is nothing to say of a file.
fn is_quiet(file: &FileReport) -> bool {
    file.verdict == Verdict::Identical && file.changes.is_empty() && file.renames.is_empty()
}

struct Page {
    view: View,
    out: String,
}

impl Page {
    fn paint(&self, style: Style, text: &str) -> String {
        if self.view.colour && style != PLAIN && !text.is_empty() {
            format!("{style}{text}{style:#}")
        } else {
            text.to_owned()
        }
    }

    fn line(&mut self, indent: usize, style: Style, text: &str) {
        let text = self.paint(style, text);
        let _ = writeln!(self.out, "{:indent$}{text}", "");
    }

    fn blank(&mut self) {
        self.out.push('\n');
    }

    fn header(&mut self, report: &Report) {
        let paths = format!("{} → {}", clean(&report.a), clean(&report.b));
        self.line(0, HEAD, &paths);
        let style = if report.differs() { BAD } else { GOOD };
        self.line(0, style, &words::verdict(report));
        if let Some(text) = words::rewritten(report) {
            self.line(0, PLAIN, &text);
        }
        let Some(policy) = &report.policy else { return };
        for rule in &policy.rules {
            let (style, mark) = match &rule.violation {
                Some(_) => (BAD, "✗"),
                None => (GOOD, "✓"),
            };
            if rule.violation.is_none() && !self.view.full {
                continue;
            }
            let mark = self.paint(style, mark);
            let why = rule
                .violation
                .as_deref()
                .map_or_else(|| words::number(rule.places, "place"), clean);
            let _ = writeln!(self.out, "  {mark} {}: {why}", clean(&rule.rule));
        }
    }

    fn file(&mut self, file: &FileReport, several: bool) {
        let indent = if several { 2 } else { 0 };
        self.blank();
        if several {
            let name = self.paint(HEAD, &words::file_name(file));
            let verdict = self.paint(DIM, &format!("  {}", words::file_verdict(file)));
            let _ = writeln!(self.out, "{name}{verdict}");
        }
        for class in Class::ALL {
            let of_class = |c: &&Change| c.class == class && c.ignored.is_none();
            let changes: Vec<&Change> = file.changes.iter().filter(of_class).collect();
            if !changes.is_empty() {
                self.class(class, &changes, indent);
            }
        }
        let ignored: Vec<&Change> = file
            .changes
            .iter()
            .filter(|c| c.ignored.is_some())
            .collect();
        self.ignored(&ignored, indent);
        self.footer(file, indent);
    }

    fn class(&mut self, class: Class, changes: &[&Change], indent: usize) {
        let head = self.paint(HEAD, class.word());
        let note = self.paint(DIM, &format!("  {}", words::meaning(class)));
        let _ = writeln!(self.out, "{:indent$}{head}{note}", "");
        let changes = if self.view.full {
            changes.iter().map(|c| (*c).clone()).collect()
        } else {
            words::fold(changes)
        };
        let shown = if self.view.full { changes.len() } else { SHOWN };
        for change in changes.iter().take(shown) {
            self.change(change, indent + 2);
        }
        if changes.len() > shown {
            let more = changes.len() - shown;
            let text = format!("… {} more (--full lists them)", words::count(more as u64));
            self.line(indent + 2, DIM, &text);
        }
    }

    fn change(&mut self, change: &Change, indent: usize) {
        let sign = Sign::of(change);
        let style = match sign {
            Sign::Added => GOOD,
            Sign::Removed => BAD,
            Sign::Changed => NEW,
        };
        let mark = self.paint(style, &sign.mark().to_string());
        let at = self.paint(DIM, &words::at(change));
        let title = clean(&change.title);
        let _ = writeln!(self.out, "{:indent$}{mark} {title}{at}", "");
        let numbers = words::numbers(change);
        if !numbers.is_empty() {
            self.line(indent + 4, DIM, &numbers);
        }
        if self.view.full {
            self.details(change, indent + 4);
        }
    }

    /// Both values where the title has only the beginning of one, and every place.
    fn details(&mut self, change: &Change, indent: usize) {
        for (mark, value) in [("- ", &change.before), ("+ ", &change.after)] {
            let Some(value) = value
                .as_ref()
                .filter(|v| !change.title.contains(v.as_str()))
            else {
                continue;
            };
            let total = value.lines().count();
            for line in value.lines().take(LINES) {
                self.line(indent, DIM, &format!("{mark}{}", clean(line)));
            }
            if total > LINES {
                let text = format!("{mark}… {} more lines", total - LINES);
                self.line(indent, DIM, &text);
            }
        }
        let told = change.places.len() == 1 && change.places[0].added.is_empty();
        for place in &change.places {
            if !(told && place.removed.is_empty()) {
                let layer = place
                    .layer
                    .map_or_else(String::new, |l| format!(" (layer {l})"));
                let numbers = match &place.weights {
                    Some(w) if change.places.len() > 1 => match words::weights(w) {
                        text if text.is_empty() => text,
                        text => format!(": {text}"),
                    },
                    _ => String::new(),
                };
                let text = format!("{}{layer}{numbers}", words::place(place));
                if !text.is_empty() {
                    self.line(indent, DIM, &format!("at {text}"));
                }
            }
            for (mark, nodes) in [('-', &place.removed), ('+', &place.added)] {
                for node in nodes {
                    self.line(indent + 2, DIM, &format!("{mark} {}", words::spot(node)));
                }
            }
        }
    }

    fn ignored(&mut self, changes: &[&Change], indent: usize) {
        if changes.is_empty() {
            return;
        }
        if self.view.full {
            let head = self.paint(HEAD, "not counted");
            let _ = writeln!(self.out, "{:indent$}{head}", "");
            for change in changes {
                let why = clean(change.ignored.as_deref().unwrap_or(""));
                self.change(change, indent + 2);
                self.line(indent + 6, DIM, &format!("not counted: {why}"));
            }
            return;
        }
        // One line for each reason, in the order of the changes.
        let mut reasons: Vec<(&str, usize)> = Vec::new();
        for change in changes {
            let why = change.ignored.as_deref().unwrap_or("");
            match reasons.iter_mut().find(|(w, _)| *w == why) {
                Some((_, n)) => *n += 1,
                None => reasons.push((why, 1)),
            }
        }
        for (why, n) in reasons {
            let text = format!(
                "not counted: {} ({})",
                words::number(n, "change"),
                clean(why)
            );
            self.line(indent, DIM, &text);
        }
    }

    fn footer(&mut self, file: &FileReport, indent: usize) {
        for note in &file.storage {
            self.line(indent, DIM, &format!("storage  {}", clean(&note.text)));
        }
        if let Some(text) = words::renamed(file) {
            let more = if self.view.full {
                ""
            } else {
                " (--full lists them)"
            };
            self.line(indent, DIM, &format!("names    {text}{more}"));
            if self.view.full {
                let all = file.renames.nodes.iter().map(|n| ("node", n));
                let all = all.chain(file.renames.values.iter().map(|v| ("value", v)));
                for (what, (old, new)) in all {
                    let text = format!("{what} '{}' → '{}'", clean(old), clean(new));
                    self.line(indent + 4, DIM, &text);
                }
            }
        }
        if let Some(facts) = words::facts(file) {
            self.line(indent, DIM, &format!("size     {facts}"));
        }
    }
}
