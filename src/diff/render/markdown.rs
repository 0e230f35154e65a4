//! A comment on a pull request. Everything that comes from a file stands in code
//! blocks or code spans, where no name can format, mention or link anything; the
//! whole never exceeds what GitHub takes.

use super::words::{self, Sign, clean};
use super::{COMMENT_LIMIT, Report, View};
use crate::diff::report::{Change, Class, FileReport, Verdict};

/// Left free for the note that something was cut and for closing what is open.
const RESERVE: usize = 600;

/// Lines of one class in a folded block unless everything is asked for.
const SHOWN: usize = 50;

/// Rows of the table of files.
const ROWS: usize = 60;

pub(super) fn render(report: &Report, view: View) -> String {
    let mut page = Page {
        out: String::new(),
        left: 0,
    };
    let mark = if report.differs() { "❌" } else { "✅" };
    let verdict = html(&words::verdict(report));
    page.put(&format!("### {mark} duet diff\n\n<b>{verdict}</b><br>\n"));
    page.put(&format!(
        "<code>{}</code> → <code>{}</code>\n\n",
        html(&cut(&report.a)),
        html(&cut(&report.b))
    ));
    if let Some(text) = words::rewritten(report) {
        page.put(&format!("{}\n\n", html(&text)));
    }
    policy(report, &mut page);
    let several = report.files.len() > 1;
    let quiet = |f: &&FileReport| {
        f.verdict == Verdict::Identical && f.changes.is_empty() && f.renames.is_empty()
    };
    let told: Vec<&FileReport> = report.files.iter().filter(|f| !quiet(f)).collect();
    if several && !told.is_empty() {
        table(&told, &mut page);
    }
    for file in &told {
        self::file(file, several, view, &mut page);
    }
    let identical = report.files.len() - told.len();
    if several && identical > 0 {
        page.put(&format!(
            "{} identical.\n",
            words::number(identical, "file")
        ));
    }
    if page.left > 0 {
        page.out.push_str(&format!(
            "\n> {} more did not fit into a comment ({COMMENT_LIMIT} bytes). `duet diff --format html` shows everything.\n",
            words::number(page.left, "line")
        ));
    }
    page.out
}

struct Page {
    out: String,
    /// Lines that did not fit.
    left: usize,
}

impl Page {
    /// Whether so many bytes still fit.
    fn fits(&self, bytes: usize) -> bool {
        self.left == 0 && self.out.len() + bytes <= COMMENT_LIMIT - RESERVE
    }

    /// A piece as a whole, or nothing of it.
    fn put(&mut self, text: &str) {
        if self.fits(text.len()) {
            self.out.push_str(text);
        } else {
            self.left += text.lines().filter(|l| !l.is_empty()).count();
        }
    }

    /// A folded block of lines; as many of them as fit.
    fn block(&mut self, summary: &str, open: bool, lines: &[String]) {
        let longest = lines.iter().map(|l| ticks(l)).max().unwrap_or(0);
        let fence = "`".repeat((longest + 1).max(3));
        let open = if open { " open" } else { "" };
        let head = format!("<details{open}><summary>{summary}</summary>\n\n{fence}diff\n");
        let tail = format!("{fence}\n\n</details>\n\n");
        let first = lines.first().map_or(0, String::len);
        if !self.fits(head.len() + first + 1 + tail.len()) {
            self.left += lines.len();
            return;
        }
        self.out.push_str(&head);
        for line in lines {
            if self.fits(line.len() + 1 + tail.len()) {
                self.out.push_str(line);
                self.out.push('\n');
            } else {
                self.left += 1;
            }
        }
        self.out.push_str(&tail);
    }
}

/// The longest run of backticks.
fn ticks(line: &str) -> usize {
    line.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Text inside of HTML that Markdown leaves alone.
fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in clean(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Inside of a paragraph these would still format, link or mention.
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '@' | '#' | '!' | '$' => {
                out.push_str(&format!("&#{};", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out
}

/// A name that is not longer than a line.
fn cut(text: &str) -> String {
    const LENGTH: usize = 200;
    if text.chars().count() <= LENGTH {
        return text.to_owned();
    }
    let start: String = text.chars().take(LENGTH).collect();
    format!("{start}…")
}

fn policy(report: &Report, page: &mut Page) {
    let Some(policy) = &report.policy else { return };
    let lines: Vec<String> = policy
        .rules
        .iter()
        .map(|rule| match &rule.violation {
            Some(why) => format!("- {}: {}", clean(&rule.rule), clean(why)),
            None => format!("  {}: kept", clean(&rule.rule)),
        })
        .collect();
    let broken = policy
        .rules
        .iter()
        .filter(|r| r.violation.is_some())
        .count();
    let summary = match broken {
        0 => "Policy: every rule is kept".to_owned(),
        n => format!("Policy: {} broken", words::number(n, "rule")),
    };
    page.block(&summary, broken > 0, &lines);
}

/// Which file changed how much.
fn table(files: &[&FileReport], page: &mut Page) {
    page.put("| file | result |\n|---|---|\n");
    for file in files.iter().take(ROWS) {
        let name = html(&cut(&words::file_name(file)));
        let row = format!("| <code>{name}</code> | {} |\n", words::file_verdict(file));
        page.put(&row);
    }
    if files.len() > ROWS {
        page.put(&format!("| … | {} more |\n", files.len() - ROWS));
    }
    page.put("\n");
}

fn file(file: &FileReport, several: bool, view: View, page: &mut Page) {
    if several {
        let name = html(&cut(&words::file_name(file)));
        page.put(&format!("<h4><code>{name}</code></h4>\n\n"));
    }
    for class in Class::ALL {
        let of_class = |c: &&Change| c.class == class && c.ignored.is_none();
        let changes: Vec<&Change> = file.changes.iter().filter(of_class).collect();
        if changes.is_empty() {
            continue;
        }
        let summary = format!(
            "<b>{}</b> ({}): {}",
            class.word(),
            changes.len(),
            words::meaning(class)
        );
        // What breaks others is seen without a click.
        page.block(&summary, class <= Class::Weights, &lines(&changes, view));
    }
    let ignored: Vec<&Change> = file
        .changes
        .iter()
        .filter(|c| c.ignored.is_some())
        .collect();
    if !ignored.is_empty() {
        let summary = format!("not counted ({})", ignored.len());
        page.block(&summary, false, &lines(&ignored, view));
    }
    let mut notes: Vec<String> = file.storage.iter().map(|n| clean(&n.text)).collect();
    notes.extend(words::renamed(file));
    notes.extend(words::facts(file));
    if !notes.is_empty() {
        let notes: Vec<String> = notes.iter().map(|n| html(n)).collect();
        page.put(&format!("<sub>{}</sub>\n\n", notes.join("<br>")));
    }
}

/// Changes as lines of a `diff` block: GitHub colours them by the first character.
fn lines(changes: &[&Change], view: View) -> Vec<String> {
    let changes: Vec<Change> = if view.full {
        changes.iter().map(|c| (*c).clone()).collect()
    } else {
        words::fold(changes)
    };
    let shown = if view.full { changes.len() } else { SHOWN };
    let mut lines = Vec::new();
    for change in &changes[..shown.min(changes.len())] {
        let mark = match Sign::of(change) {
            Sign::Added => '+',
            Sign::Removed => '-',
            Sign::Changed => '!',
        };
        let title = clean(&change.title);
        lines.push(format!("{mark} {title}{}", words::at(change)));
        let numbers = words::numbers(change);
        if !numbers.is_empty() {
            lines.push(format!("      {numbers}"));
        }
        if let Some(why) = &change.ignored {
            lines.push(format!("      not counted: {}", clean(why)));
        }
        if view.full && change.places.len() > 1 {
            for place in &change.places {
                let layer = place
                    .layer
                    .map_or_else(String::new, |l| format!(" (layer {l})"));
                lines.push(format!("      at {}{layer}", words::place(place)));
            }
        }
    }
    if changes.len() > shown {
        lines.push(format!("  … {} more", changes.len() - shown));
    }
    lines
}
