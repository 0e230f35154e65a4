//! Colours and tables. anstream strips the codes where they do not belong.

use std::fmt::{Display, Write};

use anstyle::{AnsiColor, Reset, Style};

pub(super) use crate::readable::bytes;

/// Headings.
pub(super) const HEAD: Style = Style::new().bold();
/// What is fine.
pub(super) const GOOD: Style = AnsiColor::Green.on_default();
/// What is not.
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
/// What is new.
pub(super) const NEW: Style = AnsiColor::Cyan.on_default();
/// Side remarks.
pub(super) const DIM: Style = Style::new().dimmed();
/// Back to normal.
pub(super) const RESET: Reset = Reset;

/// Columns aligned by width; the first to the left, the others to the right.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        let cells = rows.iter().filter_map(|r| r.get(c));
        cells.map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c].saturating_sub(cell.chars().count()));
            let _ = if c == 0 {
                write!(line, " {cell}{pad}")
            } else {
                write!(line, "  {pad}{cell}")
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// `1–16: 576, 17–24: 288` from a count for each layer.
pub(super) fn layers<T: PartialEq + Display>(counts: &[T]) -> String {
    let mut parts = Vec::new();
    let mut start = 0;
    for end in 1..=counts.len() {
        if end == counts.len() || counts[end] != counts[start] {
            let range = if end - start == 1 {
                format!("{end}")
            } else {
                format!("{}–{end}", start + 1)
            };
            parts.push(format!("{range}: {}", counts[start]));
            start = end;
        }
    }
    parts.join(", ")
}
