//! Numbers, markup and tables as several renderings write them.

/// Text with what has a meaning in HTML and XML escaped, in elements and in quoted
/// attributes. `apostrophe`: what is written for one.
pub(crate) fn markup(text: &str, apostrophe: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str(apostrophe),
            c => out.push(c),
        }
    }
    out
}

/// Three digits or more: `0.123`, `12.3`, `1234`.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A byte count for people: `999 B`, `12.3 MB`.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KB", "MB", "GB"] {
        if value < 1000.0 {
            return match unit {
                "B" => format!("{count} B"),
                _ => format!("{} {unit}", digits(value)),
            };
        }
        value /= 1000.0;
    }
    format!("{} TB", digits(value))
}

/// A number with at most two digits behind the point.
pub(crate) fn rounded(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A table in Markdown: the first row is its head, the first column to the left, the others to the right. Cells are
/// Markdown already.
pub(crate) fn markdown_table(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text.push_str(&format!("| {} |\n", row.join(" | ")));
        if index == 0 {
            let others = row.len().saturating_sub(1);
            text.push_str(&format!("|---|{}\n", "---:|".repeat(others)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let found = [0, 999, 1000, 12_345_678, 5_000_000_000_000].map(bytes);
        assert_eq!(found, ["0 B", "999 B", "1.00 KB", "12.3 MB", "5.00 TB"]);
        let found = [0.0123, 1.234, 12.34, 123.4, 1234.5].map(digits);
        assert_eq!(found, ["0.012", "1.23", "12.3", "123", "1234"]);
        let found = [196.0, 43.25, 0.5, 0.004].map(rounded);
        assert_eq!(found, ["196", "43.25", "0.5", "0"]);
    }

    #[test]
    fn markup_is_escaped_and_tables_have_a_rule() {
        assert_eq!(
            markup("<a b=\"c\">&'", "&apos;"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&apos;"
        );
        let rows = [["a", "b", "c"], ["1", "2", "3"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(
            markdown_table(&rows),
            "| a | b | c |\n|---|---:|---:|\n| 1 | 2 | 3 |\n"
        );
    }
}
