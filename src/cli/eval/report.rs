//! The table on stdout and in files, and what was required of it.

use std::path::Path;

use anyhow::Context;

use super::{Format, Shown};
use crate::cli::{Global, Outcome, print_json, style};
use crate::eval::render;
use crate::eval::table::{Bootstrap, Table};

impl Shown {
    pub(super) fn bootstrap(&self) -> Bootstrap {
        Bootstrap {
            resamples: self.resamples,
            seed: self.seed,
        }
    }
}

/// Shows a table, and writes it to `out` if there is one.
pub(super) fn show(
    table: &Table,
    shown: &Shown,
    out: Option<(&Path, &str)>,
    global: &Global,
) -> anyhow::Result<Outcome> {
    let document = render::json(table);
    if let Some((dir, name)) = out {
        let text = serde_json::to_string_pretty(&document)? + "\n";
        for (end, text) in [("json", text), ("md", render::markdown(table))] {
            let path = dir.join(format!("{name}.{end}"));
            crate::cli::write_whole(&path, &text)
                .with_context(|| format!("writing {}", path.display()))?;
        }
        global.detail(format!("wrote {}/{name}.json and .md", dir.display()));
    }
    let format = if shown.json {
        Format::Json
    } else {
        shown.format
    };
    match format {
        Format::Json => print_json(&document)?,
        Format::Markdown => anstream::print!("{}", render::markdown(table)),
        Format::Text => {
            for part in render::rows(table) {
                anstream::println!("{}", style::table(&part));
            }
            global.say(render::caption(table));
        }
    }
    Ok(required(table, shown, global))
}

fn required(table: &Table, shown: &Shown, global: &Global) -> Outcome {
    let mut outcome = Outcome::Done;
    let mut check = |name: &str, what: &str, found: Option<f64>, least: Option<f64>| {
        let Some(least) = least else { return };
        // A share of questions is a quotient of counts: no rounding decides.
        if found.is_none_or(|found| found < least - 1e-9) {
            let found = found.map_or("not known".into(), |f| format!("{:.2} %", 100.0 * f));
            global.say(format!(
                "{name}: {what} {found}, required {:.2} %",
                100.0 * least
            ));
            outcome = Outcome::Failed;
        }
    };
    for row in table.rows.iter().skip(1) {
        let score = &row.scores[0];
        let kept = score.kept.map(|kept| kept.value);
        check(&row.name, "accuracy kept", kept, shown.require_kept);
        check(
            &row.name,
            "same answers",
            score.agreement,
            shown.require_agreement,
        );
    }
    outcome
}
