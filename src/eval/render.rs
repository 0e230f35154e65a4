//! The table as JSON (`docs/eval.schema.json`), as Markdown, and as rows of cells for terminals.

use serde_json::{Map, Value, json};

use super::statistics::{Estimate, LEVEL};
use super::table::{Row, Score, Table};
use crate::readable::markdown_table;

/// One document.
pub fn json(table: &Table) -> Value {
    let all = &table.scopes[0];
    let models: Vec<Value> = table.rows.iter().map(|row| model(table, row)).collect();
    let pairs = table.pairs.iter().map(|pair| {
        json!({
            "model": table.rows[pair.model].name,
            "other": table.rows[pair.other].name,
            "kept_more": estimate(&pair.kept_more),
        })
    });
    json!({
        "schema_version": 1,
        "dataset": {
            "name": table.dataset.name,
            "digest": table.dataset.digest,
            "questions": all.questions,
            "images": all.images,
        },
        "metric": table.metric.map(super::Metric::name),
        "intervals": {
            "level": LEVEL,
            "drawn": "images",
            "resamples": table.bootstrap.resamples,
            "seed": table.bootstrap.seed,
        },
        "models": models,
        "pairs": pairs.collect::<Vec<_>>(),
    })
}

fn model(table: &Table, row: &Row) -> Value {
    let visual = row.visual.map(|v| {
        json!({
            "entering": v.entering,
            "by_layer_average": v.by_layer,
            "reduction": v.reduction,
            "from": "cache lengths",
        })
    });
    let scopes = table.scopes.iter().zip(&row.scores);
    let mut types = Map::new();
    for (scope, own) in scopes.skip(1) {
        let name = scope.name.clone().unwrap_or_default();
        types.insert(name, score(scope.questions, scope.images, own));
    }
    let all = &table.scopes[0];
    json!({
        "name": row.name,
        "digest": row.digest,
        "visual_tokens": visual,
        "seconds_per_question": row.seconds,
        "all": score(all.questions, all.images, &row.scores[0]),
        "types": types,
    })
}

fn score(questions: usize, images: usize, score: &Score) -> Value {
    json!({
        "questions": questions,
        "images": images,
        "accuracy": estimate(&score.accuracy),
        "points": score.points.as_ref().map(estimate),
        "kept": score.kept.as_ref().map(estimate),
        "agreement": score.agreement,
        "rates": score.rates,
    })
}

fn estimate(estimate: &Estimate) -> Value {
    let (low, high) = estimate.interval.unzip();
    json!({ "value": estimate.value, "low": low, "high": high })
}

/// Head and rows, first all questions, then, if there are types, each type in a column of its own.
pub fn rows(table: &Table) -> Vec<Vec<Vec<String>>> {
    let mut parts = vec![overall(table)];
    if table.scopes.len() > 1 {
        parts.push(by_type(table));
    }
    parts
}

const NOT_KNOWN: &str = "–";

fn overall(table: &Table) -> Vec<Vec<String>> {
    let with_points = table.rows.iter().any(|row| row.scores[0].points.is_some());
    let names: Vec<&'static str> = table.rows[0].scores[0].rates.keys().copied().collect();
    let mut head = vec![
        "model".to_owned(),
        "visual tokens".into(),
        "fewer".into(),
        "accuracy".into(),
    ];
    head.extend(with_points.then(|| "score".to_owned()));
    head.extend(["kept".to_owned(), "same answers".to_owned()]);
    head.extend(names.iter().map(|name| name.replace('_', " ")));
    let rows = table.rows.iter().map(|row| {
        let score = &row.scores[0];
        let visual = row.visual;
        let reduction = visual.and_then(|v| v.reduction);
        let mut cells = vec![
            row.name.clone(),
            visual.map_or(NOT_KNOWN.into(), |v| format!("{:.2}", v.by_layer)),
            reduction.map_or(NOT_KNOWN.into(), |r| format!("{:.1} %", 100.0 * r)),
            percent(Some(&score.accuracy)),
        ];
        cells.extend(with_points.then(|| number(score.points.as_ref())));
        cells.push(percent(score.kept.as_ref()));
        cells.push(share(score.agreement));
        cells.extend(
            names
                .iter()
                .map(|name| share(score.rates.get(name).copied())),
        );
        cells
    });
    std::iter::once(head).chain(rows).collect()
}

fn by_type(table: &Table) -> Vec<Vec<String>> {
    let with_points = table.scopes[1..]
        .iter()
        .zip(&table.rows[0].scores[1..])
        .all(|(_, score)| score.points.is_some());
    let mut head = vec!["model".to_owned()];
    head.extend(table.scopes[1..].iter().map(|scope| {
        let name = scope.name.as_deref().unwrap_or_default();
        format!("{name} ({})", scope.questions)
    }));
    let rows = table.rows.iter().map(|row| {
        let cells = row.scores[1..].iter().map(|score| {
            let own = match with_points {
                true => number(score.points.as_ref()),
                false => percent(Some(&score.accuracy)),
            };
            match &score.kept {
                Some(kept) => format!("{own}, kept {:.1} %", 100.0 * kept.value),
                None => own,
            }
        });
        std::iter::once(row.name.clone()).chain(cells).collect()
    });
    std::iter::once(head).chain(rows).collect()
}

/// `98.2 % [97.0, 99.1]`
fn percent(of: Option<&Estimate>) -> String {
    let Some(of) = of else {
        return NOT_KNOWN.into();
    };
    let value = format!("{:.1} %", 100.0 * of.value);
    match of.interval {
        Some((low, high)) => format!("{value} [{:.1}, {:.1}]", 100.0 * low, 100.0 * high),
        None => value,
    }
}

fn number(of: Option<&Estimate>) -> String {
    let Some(of) = of else {
        return NOT_KNOWN.into();
    };
    match of.interval {
        Some((low, high)) => format!("{:.1} [{low:.1}, {high:.1}]", of.value),
        None => format!("{:.1}", of.value),
    }
}

fn share(of: Option<f64>) -> String {
    of.map_or(NOT_KNOWN.into(), |share| format!("{:.1} %", 100.0 * share))
}

/// One line on what the numbers are of.
pub fn caption(table: &Table) -> String {
    let all = &table.scopes[0];
    let metric = table.metric.map_or("several metrics", super::Metric::name);
    format!(
        "{}: {} questions about {} images, {metric}. Visual tokens: mean over the decoder's layers, measured as lengths \
         of caches. Kept: of the first model's. In brackets: {:.0} % of {} draws of images (seed {}).",
        table.dataset.name,
        all.questions,
        all.images,
        100.0 * LEVEL,
        table.bootstrap.resamples,
        table.bootstrap.seed
    )
}

/// Tables in Markdown.
pub fn markdown(table: &Table) -> String {
    let mut text = format!("{}\n", caption(table));
    for part in rows(table) {
        text.push('\n');
        let rows = part.iter();
        let rows = rows.map(|row| row.iter().map(|c| c.replace('|', "\\|")).collect());
        text.push_str(&markdown_table(&rows.collect::<Vec<_>>()));
    }
    text
}
