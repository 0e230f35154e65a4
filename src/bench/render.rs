//! A report as tables, Markdown and a chart.

use std::fmt::Write;

use super::profile::{Group, Profile};
use super::report::{Ideal, ModelReport, Reading, Report, Time};
use crate::readable::{bytes, digits, markdown_table, markup, rounded};

/// What stands where nothing was measured.
const NONE: &str = "–";

/// `12.3 (12.1–13.0)  2.10×`
fn time(time: &Time) -> String {
    let range = format!("({}–{})", digits(time.min_ms), digits(time.max_ms));
    let speedup = time.speedup.map_or(String::new(), |s| format!("  {s:.2}×"));
    format!("{} {range}{speedup}", digits(time.median_ms))
}

fn cell<T>(reading: &Reading<T>, of: impl Fn(&T) -> String) -> String {
    reading.known().map_or(NONE.to_owned(), of)
}

/// What is ideal for a model that a recipe made; any other is its own ideal.
fn ideal(model: &ModelReport, reading: &Reading<Ideal>, of: impl Fn(&Ideal) -> String) -> String {
    match model.recipe {
        Some(_) => cell(reading, of),
        None => NONE.to_owned(),
    }
}

/// `307 → 191.75`
fn tokens(model: &ModelReport) -> String {
    match model.average_visual_tokens {
        Some(average) if (average - model.visual_tokens as f64).abs() > 1e-9 => {
            format!("{} → {}", model.visual_tokens, rounded(average))
        }
        _ => model.visual_tokens.to_string(),
    }
}

/// One row of the table: what, and a cell for each model.
fn row(what: &str, models: &[ModelReport], cell: impl Fn(&ModelReport) -> String) -> Vec<String> {
    let mut row = vec![what.to_owned()];
    row.extend(models.iter().map(cell));
    row
}

/// The tables: the first row of each is its head.
pub fn tables(report: &Report) -> Vec<Vec<Vec<String>>> {
    let models = &report.models;
    let taken = |i: &Ideal| digits(i.median_ms);
    let share = |i: &Ideal| format!("{:.1} %", 100.0 * i.share);
    let mut rows = vec![
        row("milliseconds", models, |m| m.name.clone()),
        row("visual tokens", models, tokens),
        row("vision encoder", models, |m| cell(&m.vision, time)),
        row("embeddings", models, |m| cell(&m.embed, time)),
        row("prefill", models, |m| cell(&m.prefill, time)),
        row("  ideal", models, |m| ideal(m, &m.ideal_prefill, taken)),
        row("  share of ideal", models, |m| {
            ideal(m, &m.ideal_prefill, share)
        }),
        row("to first token", models, |m| {
            cell(&m.time_to_first_token, time)
        }),
        row("decode step", models, |m| cell(&m.decode_step, time)),
        row("  ideal", models, |m| ideal(m, &m.ideal_decode_step, taken)),
        row("  share of ideal", models, |m| {
            ideal(m, &m.ideal_decode_step, share)
        }),
        row("tokens/s", models, |m| {
            cell(&m.tokens_per_second, |t| digits(*t))
        }),
        row("cache", models, |m| {
            cell(&m.cache, |c| {
                let smaller = c.smaller.map_or(String::new(), |s| format!("  {s:.2}×"));
                format!("{}{smaller}", bytes(c.bytes as u64))
            })
        }),
        row("peak memory", models, |m| {
            cell(&m.peak_memory_bytes, |b| bytes(*b))
        }),
    ];
    // What no model has is said below, not shown.
    rows.retain(|row| row[1..].iter().any(|cell| cell != NONE));
    let mut tables = vec![rows];
    if let Some(profiles) = &report.profiles {
        tables.extend(
            ["vision", "prefill"]
                .iter()
                .filter_map(|part| profile(profiles, part)),
        );
    }
    tables
}

/// Where the time of a part goes: a column for each model.
fn profile(profiles: &[Profile], part: &str) -> Option<Vec<Vec<String>>> {
    let own: Vec<&Profile> = profiles.iter().filter(|p| p.part == part).collect();
    own.first()?;
    let head = match part {
        "vision" => "nodes of the vision encoder, ms",
        _ => "nodes of the prefill, ms",
    };
    let mut rows = vec![vec![head.to_owned()]];
    rows[0].extend(own.iter().map(|p| p.model.clone()));
    for group in Group::ALL {
        let times = own
            .iter()
            .map(|p| p.groups.iter().find(|g| g.group == group));
        let times: Vec<_> = times.collect();
        if times.iter().all(Option::is_none) {
            continue;
        }
        let mut row = vec![group.name().to_owned()];
        row.extend(times.iter().map(|t| {
            t.map_or(NONE.to_owned(), |t| {
                format!("{} ({})", digits(t.ms), t.nodes)
            })
        }));
        rows.push(row);
    }
    let mut row = vec!["all".to_owned()];
    row.extend(own.iter().map(|p| digits(p.total_ms)));
    rows.push(row);
    let mut row = vec!["inserted, of the base's".to_owned()];
    row.extend(own.iter().map(|p| {
        p.inserted_of_base
            .map_or(NONE.to_owned(), |s| format!("{:.2} %", 100.0 * s))
    }));
    rows.push(row);
    Some(rows)
}

/// How it was measured, what was not measured and why, and caches that are not as they should be.
pub fn notes(report: &Report) -> Vec<String> {
    let how = &report.measured;
    let mut notes = vec![format!(
        "medians (smallest–largest) of {} interleaved rounds, {}; {} image(s) and {} tokens of text, random; {}",
        how.rounds,
        match (how.threads, how.providers.is_empty()) {
            (0, true) => "a thread for each core".to_owned(),
            (n, true) => format!("{n} thread(s)"),
            (_, false) => how.providers.join(", "),
        },
        how.images,
        how.text_tokens,
        how.library
    )];
    for model in &report.models {
        if let Some(cache) = model.cache.known()
            && cache.as_scheduled == Some(false)
        {
            let bytes = cache.scheduled_bytes.unwrap_or(0);
            notes.push(format!(
                "{}: its cache has {} bytes, and by its recipe {bytes}; see tokens_by_layer in the JSON document",
                model.name, cache.bytes
            ));
        }
        let fields = [
            ("vision encoder", model.vision.why()),
            ("embeddings", model.embed.why()),
            ("prefill", model.prefill.why()),
            ("ideal prefill", model.ideal_prefill.why()),
            ("to first token", model.time_to_first_token.why()),
            ("decode step", model.decode_step.why()),
            ("ideal decode step", model.ideal_decode_step.why()),
            ("cache", model.cache.why()),
            ("peak memory", model.peak_memory_bytes.why()),
        ];
        let mut said: Vec<(Vec<&str>, &str)> = Vec::new();
        for (field, why) in fields {
            let Some(why) = why else { continue };
            match said.iter_mut().find(|(_, other)| *other == why) {
                Some((fields, _)) => fields.push(field),
                None => said.push((vec![field], why)),
            }
        }
        let each = said.into_iter();
        notes.extend(
            each.map(|(fields, why)| format!("{}: no {}: {why}", model.name, fields.join(", "))),
        );
    }
    notes
}

/// The tables and notes in Markdown.
pub fn markdown(report: &Report) -> String {
    let escaped = |text: &str| {
        text.replace('\\', "\\\\")
            .replace('|', "\\|")
            .replace('\n', " ")
    };
    let mut text = String::new();
    for table in tables(report) {
        let rows = table.iter();
        let rows = rows.map(|row| row.iter().map(|c| escaped(c.trim())).collect());
        text.push_str(&markdown_table(&rows.collect::<Vec<_>>()));
        text.push('\n');
    }
    for note in notes(report) {
        let _ = writeln!(text, "- {}", escaped(&note));
    }
    text
}

/// Text inside XML; what XML cannot hold is left out.
fn xml(text: &str) -> String {
    let lacking = |c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}');
    markup(&text.replace(lacking, " "), "'")
}

/// Left edge of the bars.
const LEFT: f64 = 180.0;
/// Length of the longest.
const LONGEST: f64 = 380.0;
/// Height of a bar with the gap to the next.
const STEP: usize = 34;

/// A bar for each model's prefill, with a mark where its ideal is, and the spread of the rounds as a thin line.
pub fn svg(report: &Report) -> String {
    let times = report.models.iter().filter_map(|m| m.prefill.known());
    let longest = times.map(|t| t.max_ms).fold(f64::MIN_POSITIVE, f64::max);
    let at = |ms: f64| LEFT + LONGEST * ms / longest;
    let height = 46 + STEP * report.models.len() + 26;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"720\" height=\"{height}\" viewBox=\"0 0 720 {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"720\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"15\" font-weight=\"bold\">Prefill, ms</text>\n"
    );
    for (index, model) in report.models.iter().enumerate() {
        let top = 42 + STEP * index;
        let (middle, base) = (top + 10, top + 15);
        let name = xml(&shortened(&model.name));
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{base}\" text-anchor=\"end\">{name}</text>",
            LEFT - 8.0
        );
        let Some(time) = model.prefill.known() else {
            let _ = writeln!(
                out,
                "<text x=\"{LEFT:.0}\" y=\"{base}\">not measured</text>"
            );
            continue;
        };
        let colour = if index == 0 { "#9aa5b1" } else { "#3b7dd8" };
        let _ = writeln!(
            out,
            "<rect x=\"{LEFT:.0}\" y=\"{top}\" width=\"{:.1}\" height=\"20\" fill=\"{colour}\"/>",
            at(time.median_ms) - LEFT
        );
        let _ = writeln!(
            out,
            "<line x1=\"{:.1}\" y1=\"{middle}\" x2=\"{:.1}\" y2=\"{middle}\" stroke=\"#222222\"/>",
            at(time.min_ms),
            at(time.max_ms)
        );
        let ideal = model.ideal_prefill.known().filter(|_| index > 0);
        if let Some(ideal) = ideal {
            let x = at(ideal.median_ms);
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\" stroke=\"#d9480f\" stroke-width=\"2\"/>",
                top - 4,
                top + 24
            );
        }
        let speedup = time.speedup.filter(|_| index > 0);
        let speedup = speedup.map_or(String::new(), |s| format!(", {s:.2}×"));
        let share = ideal.map_or(String::new(), |i| {
            format!(", {:.0} % of ideal", 100.0 * i.share)
        });
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{base}\">{}{speedup}{share}</text>",
            at(time.max_ms) + 8.0,
            digits(time.median_ms)
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"16\" y=\"{}\" fill=\"#555555\" font-size=\"11\">Bars: medians; thin lines: all rounds; red: ideal \
         time of the token schedule</text>\n</svg>",
        height - 12
    );
    out
}

/// A name that fits in front of the bars.
fn shortened(name: &str) -> String {
    match name.chars().count() {
        n if n > 24 => {
            let end: String = name.chars().skip(n - 23).collect();
            format!("…{end}")
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn tables_say_what_was_measured_and_notes_why_not() {
        let report = report();
        let table = &tables(&report)[0];
        let row = |what: &str| table.iter().find(|r| r[0] == what).map(|r| &r[1..]);
        let is = |what: &str, cells: [&str; 2]| {
            assert_eq!(row(what).unwrap(), cells, "{what}");
        };
        is("milliseconds", ["base", "a <b> & \"c\" | d"]);
        is("visual tokens", ["80", "40 → 25"]);
        is("prefill", ["900 (900–1000)  1.00×", "300 (250–500)  3.60×"]);
        is("  ideal", ["–", "280"]);
        is("  share of ideal", ["–", "100.0 %"]);
        is("cache", ["3.20 KB  1.00×", "1.44 KB  2.22×"]);
        is("peak memory", ["1.00 MB", "–"]);
        assert!(row("vision encoder").is_none(), "no model has one");
        let notes = notes(&report);
        let has = |text: &str| assert!(notes.iter().any(|n| n.contains(text)), "{text}: {notes:?}");
        has("base: no vision encoder, to first token: the model has no vision encoder");
        has("d: no peak memory: nobody knows");
        has("medians (smallest–largest) of 3 interleaved rounds, 2 thread(s)");
        let text = markdown(&report);
        assert!(
            text.starts_with("| milliseconds | base | a <b> & \"c\" \\| d |\n|---|---:|---:|\n"),
            "{text}"
        );
    }

    #[test]
    fn the_chart_has_a_bar_for_each_model_and_a_mark_for_its_ideal() {
        let report = report();
        let chart = svg(&report);
        assert_eq!(chart, svg(&report), "the same report gives the same chart");
        // The longest round, 1000 ms, is as long as bars get.
        let bar = |width: &str| format!("width=\"{width}\" height=\"20\"");
        assert!(
            chart.contains(&bar("342.0")) && chart.contains(&bar("114.0")),
            "{chart}"
        );
        let ideal = "<line x1=\"286.4\" y1=\"72\" x2=\"286.4\"";
        assert!(chart.contains(ideal), "{chart}");
        assert_eq!(
            chart.matches("#d9480f").count(),
            1,
            "the base is its own ideal"
        );
        assert!(
            chart.contains("a &lt;b&gt; &amp; &quot;c&quot; | d"),
            "{chart}"
        );
    }

    #[test]
    fn what_xml_cannot_hold_is_left_out() {
        assert_eq!(xml("a\u{1}\u{ffff}\n<é>"), "a   &lt;é&gt;");
        assert_eq!(
            shortened("abcdefghijklmnopqrstuvwxyz"),
            "…defghijklmnopqrstuvwxyz"
        );
    }
}
