//! Both graphs around a change, drawn side by side: a node that is in both stands
//! in the same row, so that what was inserted shows as a gap on the other side.

use std::collections::HashMap;
use std::fmt::Write;

use super::html::escape;
use super::words::clean;
use crate::diff::report::{Context, ContextNode, NodeState};

/// More nodes on one side than this are no longer a picture.
const MOST: usize = 150;

/// Nodes beside each other.
const COLUMNS: usize = 7;

const WIDTH: usize = 148;
const HEIGHT: usize = 36;
const GAP_X: usize = 14;
const GAP_Y: usize = 26;
const MARGIN: usize = 14;

/// The drawing, or why there is none.
pub(super) fn draw(context: &Context) -> String {
    if context.a.is_empty() && context.b.is_empty() {
        return String::new();
    }
    let most = context.a.len().max(context.b.len());
    if most > MOST {
        return format!("<p class=\"note\">{most} nodes around it are too many to draw.</p>\n");
    }
    let (mut rows_a, mut rows_b) = rows(context);
    spread(&mut rows_a, &mut rows_b);
    let height = rows_a.iter().chain(&rows_b).max().map_or(0, |r| r + 1);
    let draw = |title, nodes: &[ContextNode], rows: &[usize]| {
        (!nodes.is_empty()).then(|| side(title, nodes, rows, height))
    };
    let sides = [
        draw("before", &context.a, &rows_a),
        draw("after", &context.b, &rows_b),
    ];
    // Columns as wide as what is in them, so that both sides have one scale and
    // rows stand beside each other.
    let sides: Vec<(usize, String)> = sides.into_iter().flatten().collect();
    let columns: Vec<String> = sides
        .iter()
        .map(|(width, _)| format!("minmax(0,{width}fr)"))
        .collect();
    let drawn: String = sides.into_iter().map(|s| s.1).collect();
    format!(
        "<div class=\"graphs\" style=\"grid-template-columns:{}\">{drawn}</div>\n",
        columns.join(" ")
    )
}

/// Gives a row of too many nodes several lines, on both sides the same.
fn spread(rows_a: &mut [usize], rows_b: &mut [usize]) {
    let height = rows_a
        .iter()
        .chain(rows_b.iter())
        .max()
        .map_or(0, |r| r + 1);
    let filled = |rows: &[usize], row: usize| rows.iter().filter(|r| **r == row).count();
    let mut start = 0;
    let starts: Vec<usize> = (0..height)
        .map(|row| {
            let most = filled(rows_a, row).max(filled(rows_b, row));
            let at = start;
            start += most.div_ceil(COLUMNS);
            at
        })
        .collect();
    for rows in [rows_a, rows_b] {
        let mut seen = vec![0; height];
        for row in rows.iter_mut() {
            let of = *row;
            *row = starts[of] + seen[of] / COLUMNS;
            seen[of] += 1;
        }
    }
}

/// Which node gives a name, on one side.
fn producers(nodes: &[ContextNode]) -> HashMap<&str, usize> {
    let outputs = nodes
        .iter()
        .enumerate()
        .flat_map(|(i, n)| n.outputs.iter().map(move |o| (o, i)));
    outputs
        .filter(|(o, _)| !o.is_empty())
        .map(|(o, i)| (o.as_str(), i))
        .collect()
}

/// Edges from an earlier to a later node.
fn edges(nodes: &[ContextNode]) -> Vec<(usize, usize)> {
    let of = producers(nodes);
    let mut found = Vec::new();
    for (to, node) in nodes.iter().enumerate() {
        let from = node
            .inputs
            .iter()
            .filter_map(|i| of.get(i.as_str()).copied());
        let mut from: Vec<usize> = from.filter(|f| *f < to).collect();
        from.sort_unstable();
        from.dedup();
        found.extend(from.into_iter().map(|f| (f, to)));
    }
    found
}

/// The row of each node: below everything that it reads, and where its partner is
/// as far as that is possible (two graphs may order the same nodes differently).
fn rows(context: &Context) -> (Vec<usize>, Vec<usize>) {
    let (edges_a, edges_b) = (edges(&context.a), edges(&context.b));
    let mut rows_a = vec![0; context.a.len()];
    let mut rows_b = vec![0; context.b.len()];
    let place = |nodes: &[ContextNode]| -> HashMap<u32, usize> {
        nodes
            .iter()
            .enumerate()
            .filter_map(|(i, n)| Some((n.pair?, i)))
            .collect()
    };
    let (in_a, in_b) = (place(&context.a), place(&context.b));
    let pairs: Vec<(usize, usize)> = in_a
        .iter()
        .filter_map(|(pair, a)| Some((*a, *in_b.get(pair)?)))
        .collect();
    // Each round moves rows down only; crossed pairs would move for ever.
    for _ in 0..MOST {
        let before = (rows_a.clone(), rows_b.clone());
        for &(from, to) in &edges_a {
            rows_a[to] = rows_a[to].max(rows_a[from] + 1);
        }
        for &(from, to) in &edges_b {
            rows_b[to] = rows_b[to].max(rows_b[from] + 1);
        }
        if rows_a.iter().chain(&rows_b).any(|r| *r >= 2 * MOST) {
            break;
        }
        for &(a, b) in &pairs {
            let row = rows_a[a].max(rows_b[b]);
            (rows_a[a], rows_b[b]) = (row, row);
        }
        if before == (rows_a.clone(), rows_b.clone()) {
            break;
        }
    }
    // What only starts something stands right above what reads it.
    let settle = |rows: &mut Vec<usize>, edges: &[(usize, usize)], nodes: &[ContextNode]| {
        for i in (0..nodes.len()).rev() {
            let below = edges.iter().filter(|e| e.0 == i).map(|e| rows[e.1]).min();
            let above = edges.iter().any(|e| e.1 == i);
            if let Some(below) = below
                && !above
                && nodes[i].state != NodeState::Same
                && nodes[i].state != NodeState::Modified
            {
                rows[i] = rows[i].max(below.saturating_sub(1));
            }
        }
    };
    settle(&mut rows_a, &edges_a, &context.a);
    settle(&mut rows_b, &edges_b, &context.b);
    // Rows that both sides leave empty say nothing.
    let mut used: Vec<usize> = rows_a.iter().chain(&rows_b).copied().collect();
    used.sort_unstable();
    used.dedup();
    let dense = |row: &usize| used.binary_search(row).unwrap_or(0);
    (
        rows_a.iter().map(dense).collect(),
        rows_b.iter().map(dense).collect(),
    )
}

/// One side's drawing, and its width.
fn side(title: &str, nodes: &[ContextNode], rows: &[usize], height: usize) -> (usize, String) {
    let edges = edges(nodes);
    // Columns: beside each other in a row, ordered by where their inputs are.
    let mut by_row: Vec<Vec<usize>> = vec![Vec::new(); height];
    for (i, row) in rows.iter().enumerate() {
        by_row[*row].push(i);
    }
    let mut center = vec![0.0_f64; nodes.len()];
    let widest = by_row.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let step = (WIDTH + GAP_X) as f64;
    for row in &mut by_row {
        let wish = |i: usize, center: &[f64]| {
            let above: Vec<f64> = edges
                .iter()
                .filter(|e| e.1 == i)
                .map(|e| center[e.0])
                .collect();
            let sum: f64 = above.iter().sum();
            if above.is_empty() {
                widest as f64 * step / 2.0
            } else {
                sum / above.len() as f64
            }
        };
        let wishes: HashMap<usize, f64> = row.iter().map(|i| (*i, wish(*i, &center))).collect();
        row.sort_by(|x, y| wishes[x].total_cmp(&wishes[y]).then(x.cmp(y)));
        let mean = row.iter().map(|i| wishes[i]).sum::<f64>() / row.len().max(1) as f64;
        let total = row.len() as f64 * step;
        let limit = widest as f64 * step - total;
        let start = (mean - total / 2.0).clamp(0.0, limit.max(0.0));
        for (column, i) in row.iter().enumerate() {
            center[*i] = start + (column as f64 + 0.5) * step;
        }
    }
    let w = widest * (WIDTH + GAP_X) + 2 * MARGIN;
    let h = height * (HEIGHT + GAP_Y) + 2 * MARGIN;
    let x = |i: usize| center[i] + MARGIN as f64;
    let y = |i: usize| (MARGIN + GAP_Y / 2 + rows[i] * (HEIGHT + GAP_Y)) as f64;
    let mut out = format!(
        "<figure><figcaption>{title}</figcaption><svg style=\"width:100%;max-width:{w}px;min-width:{}px\" viewBox=\"0 0 {w} {h}\" role=\"img\">",
        // Shrunk to fit, but not so far that nobody can read it.
        w * 45 / 100
    );
    for (from, to) in &edges {
        let (x1, y1) = (x(*from), y(*from) + HEIGHT as f64);
        let (x2, y2) = (x(*to), y(*to));
        let bend = ((y2 - y1) / 2.0).max(8.0);
        let _ = write!(
            out,
            "<path class=\"edge\" d=\"M{x1:.0} {y1:.0}C{x1:.0} {:.0} {x2:.0} {:.0} {x2:.0} {y2:.0}\"/>",
            y1 + bend,
            y2 - bend
        );
    }
    let has_input = |i: usize| edges.iter().any(|e| e.1 == i);
    let has_reader = |i: usize| edges.iter().any(|e| e.0 == i);
    for (i, node) in nodes.iter().enumerate() {
        let (cx, top) = (x(i), y(i));
        let left = cx - WIDTH as f64 / 2.0;
        // A stub where data comes from or goes to what is not drawn.
        if !has_input(i) && node.inputs.iter().any(|n| !n.is_empty()) {
            let _ = write!(
                out,
                "<path class=\"stub\" d=\"M{cx:.0} {:.0}V{top:.0}\"/>",
                top - 10.0
            );
        }
        if !has_reader(i) {
            let bottom = top + HEIGHT as f64;
            let _ = write!(out, "<path class=\"stub\" d=\"M{cx:.0} {bottom:.0}v10\"/>");
        }
        let state = match node.state {
            NodeState::Same => "same",
            NodeState::Modified => "modified",
            NodeState::Removed => "removed",
            NodeState::Added => "added",
        };
        let names = |list: &[String]| list.iter().map(|n| clean(n)).collect::<Vec<_>>().join(", ");
        let tip = format!(
            "{} '{}' ({state})\ninputs: {}\noutputs: {}",
            clean(&node.op),
            clean(&node.name),
            names(&node.inputs),
            names(&node.outputs)
        );
        let _ = write!(
            out,
            "<g class=\"node {state}\"><title>{}</title><rect x=\"{left:.0}\" y=\"{top:.0}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"5\"/>\
             <text class=\"op\" x=\"{cx:.0}\" y=\"{:.0}\">{}</text><text class=\"name\" x=\"{cx:.0}\" y=\"{:.0}\">{}</text></g>",
            escape(&tip),
            top + 15.0,
            escape(&end(&clean(&node.op), 18)),
            top + 29.0,
            escape(&end(&clean(label(node)), 25)),
        );
    }
    out.push_str("</svg></figure>");
    (w, out)
}

/// What a node is known by.
fn label(node: &ContextNode) -> &str {
    if node.name.is_empty() {
        node.outputs
            .iter()
            .find(|o| !o.is_empty())
            .map_or("", String::as_str)
    } else {
        &node.name
    }
}

/// The end of a name, which tells more than its beginning.
fn end(text: &str, length: usize) -> String {
    let total = text.chars().count();
    if total <= length {
        return text.to_owned();
    }
    let rest: String = text.chars().skip(total - length + 1).collect();
    format!("…{rest}")
}
