//! ONNX Runtime's profile, summed by what nodes are for.
//!
//! The profile is a JSON list of events; each node of a run is one, named `<node>_kernel_time`. Nodes that a pass
//! inserted are named `duet/<pass>/<scope>/…`, also inside of names that ONNX Runtime makes when it fuses or adds nodes
//! (`…/MatMulScaleFusion/`, `InsertedPrecisionFreeCast_…`). All others are the base's. A node that the runtime makes
//! and names after none (`Gather_token_39`, arithmetic of shapes) counts as the base's.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::error::{BenchError, Result};
use crate::passes::{REGISTRY, Stage};
use crate::statistics::median;

/// Whether a pass chooses among the vision encoder's tokens.
fn of_the_encoder(pass: &str) -> bool {
    let mut entries = REGISTRY.iter();
    entries.any(|e| e.name == pass && e.stage == Stage::Encoder)
}

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The unmodified model's.
    Base,
    /// Choosing and merging tokens of the vision encoder.
    Merge,
    /// Making, reading and splitting off the marks of visual tokens.
    Marker,
    /// Scores of visual tokens and the choice by them.
    Ranking,
    /// Gathering what stays at a drop point.
    Gather,
    /// Masks, positions and rotary tables of each stage behind a drop point.
    Stage,
    /// Filling caches up to one length.
    Padding,
    /// Whatever else was inserted.
    Other,
}

impl Group {
    /// All, in order.
    pub const ALL: [Self; 8] = [
        Self::Base,
        Self::Merge,
        Self::Marker,
        Self::Ranking,
        Self::Gather,
        Self::Stage,
        Self::Padding,
        Self::Other,
    ];

    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base nodes",
            Self::Merge => "merge",
            Self::Marker => "marker",
            Self::Ranking => "ranking",
            Self::Gather => "gather",
            Self::Stage => "masks of stages",
            Self::Padding => "cache padding",
            Self::Other => "other inserted",
        }
    }

    /// Of a node.
    pub fn of(name: &str, op: &str) -> Self {
        let Some((_, path)) = name.split_once("duet/") else {
            return Self::Base;
        };
        let mut parts = path.split('/');
        let pass = parts.next().unwrap_or_default();
        let scope = parts.next().unwrap_or_default();
        let numbered = |word: &str| {
            let rest = scope.strip_prefix(word);
            rest.is_some_and(|r| !r.is_empty() && r.bytes().all(|b| b.is_ascii_digit()))
        };
        match (pass, scope) {
            ("padded", _) => Self::Padding,
            (_, "entry" | "marker") => Self::Marker,
            _ if numbered("drop") => match op.starts_with("Gather") && op != "Gather" {
                true => Self::Gather,
                false => Self::Ranking,
            },
            _ if numbered("stage") => Self::Stage,
            _ if of_the_encoder(pass) => Self::Merge,
            _ => Self::Other,
        }
    }
}

/// Time of a group in one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupTime {
    /// Which.
    pub group: Group,
    /// Nodes that ran.
    pub nodes: usize,
    /// Their time together.
    pub ms: f64,
}

/// Where the time of a part of a model goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// The model.
    pub model: String,
    /// `vision` or `prefill`.
    pub part: &'static str,
    /// Time of all nodes together.
    pub total_ms: f64,
    /// Time by group, those that have nodes; their sum is the total.
    pub groups: Vec<GroupTime>,
    /// Time of all inserted nodes as a share of the base's total of the same part; none of the base.
    pub inserted_of_base: Option<f64>,
}

impl Profile {
    /// Reads a profile of some turns, of which the first warms up. A node's time is the median of its times in the
    /// others.
    ///
    /// # Errors
    /// The file cannot be read, or is no profile.
    pub fn read(model: &str, part: &'static str, file: &Path, turns: usize) -> Result<Self> {
        let bad = |reason: String| BenchError::Worker {
            model: model.to_owned(),
            reason: format!("ONNX Runtime's profile {}: {reason}", file.display()),
        };
        let text = std::fs::read_to_string(file).map_err(|e| bad(e.to_string()))?;
        let events: Value = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        let Some(events) = events.as_array() else {
            return Err(bad("expected a list of events".into()));
        };
        Self::of(model, part, events, turns)
            .ok_or_else(|| bad(format!("expected runs of {turns} turns")))
    }

    /// The same of events; none if they hold no whole number of runs for each turn.
    fn of(model: &str, part: &'static str, events: &[Value], turns: usize) -> Option<Self> {
        let micros = |event: &Value, key: &str| event[key].as_f64().unwrap_or(0.0);
        let runs = events.iter().filter(|e| e["name"] == "model_run");
        let mut starts: Vec<f64> = runs.map(|e| micros(e, "ts")).collect();
        starts.sort_by(f64::total_cmp);
        if starts.is_empty() || !starts.len().is_multiple_of(turns.max(1)) {
            return None;
        }
        // Where each turn begins; it may be several runs (images one by one).
        let starts: Vec<f64> = starts
            .chunks(starts.len() / turns.max(1))
            .map(|c| c[0])
            .collect();
        // A node is what has its name, the how many-th in the turn it is.
        let mut nodes: BTreeMap<(&str, usize), (Group, Vec<f64>)> = BTreeMap::new();
        let mut seen: HashMap<(usize, &str), usize> = HashMap::new();
        for event in events {
            let name = event["name"].as_str().unwrap_or_default();
            let Some(name) = name.strip_suffix("_kernel_time") else {
                continue;
            };
            let op = event["args"]["op_name"].as_str().unwrap_or_default();
            let turn = starts.partition_point(|start| *start <= micros(event, "ts"));
            // What holds other nodes takes their time: they are events of their own.
            let holds = ["If", "Loop", "Scan"].contains(&op);
            if event["cat"] != "Node" || holds || turn <= usize::from(turns > 1) {
                continue;
            }
            let number = seen.entry((turn, name)).or_default();
            let times = nodes.entry((name, *number));
            *number += 1;
            let (_, times) = times.or_insert((Group::of(name, op), Vec::new()));
            times.push(micros(event, "dur") / 1e3);
        }
        let mut groups: Vec<GroupTime> = Vec::new();
        for (group, times) in nodes.into_values() {
            let ms = median(&times);
            match groups.iter_mut().find(|g| g.group == group) {
                Some(found) => {
                    found.nodes += 1;
                    found.ms += ms;
                }
                None => groups.push(GroupTime {
                    group,
                    nodes: 1,
                    ms,
                }),
            }
        }
        groups.sort_by_key(|g| g.group);
        Some(Self {
            model: model.to_owned(),
            part,
            total_ms: groups.iter().map(|g| g.ms).sum(),
            groups,
            inserted_of_base: None,
        })
    }

    /// Time of the inserted nodes.
    pub fn inserted_ms(&self) -> f64 {
        let inserted = self.groups.iter().filter(|g| g.group != Group::Base);
        inserted.map(|g| g.ms).sum()
    }

    /// Compares the inserted nodes' time with the base's.
    #[must_use]
    pub fn beside(mut self, base: &Self) -> Self {
        self.inserted_of_base = Some(self.inserted_ms() / base.total_ms);
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_are_told_by_their_names() {
        let of = Group::of;
        assert_eq!(of("/decoder/layers.0/MatMul", "MatMul"), Group::Base);
        assert_eq!(of("", "Gather"), Group::Base);
        assert_eq!(
            of("duet/token_merge/score/Softmax", "Softmax"),
            Group::Merge
        );
        assert_eq!(
            of("duet/token_merge/marker/Concat", "Concat"),
            Group::Marker
        );
        assert_eq!(of("duet/visual_prune/entry/Slice", "Slice"), Group::Marker);
        assert_eq!(of("duet/visual_prune/drop1/TopK", "TopK"), Group::Ranking);
        assert_eq!(
            of("duet/visual_prune/drop12/Gather_6", "Gather"),
            Group::Ranking
        );
        assert_eq!(
            of("duet/fast_v/drop1/GatherND_5", "GatherND"),
            Group::Gather
        );
        assert_eq!(
            of("duet/visual_prune/stage2/Expand", "Expand"),
            Group::Stage
        );
        assert_eq!(of("duet/padded/stage1/Concat", "Concat"), Group::Padding);
        let fused = "duet/visual_prune/drop1/MatMul_3/MatMulScaleFusion/";
        assert_eq!(of(fused, "FusedMatMul"), Group::Ranking);
        let added = "InsertedPrecisionFreeCast_duet/visual_prune/stage1/Sin";
        assert_eq!(of(added, "Cast"), Group::Stage);
        assert_eq!(of("duet/new_pass/dropout/Mul", "Mul"), Group::Other);
    }

    fn event(name: &str, op: &str, ts: u64, dur: u64) -> Value {
        json!({"cat": "Node", "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}})
    }

    fn run(ts: u64) -> Value {
        json!({"cat": "Session", "name": "model_run", "ts": ts, "dur": 90})
    }

    /// Of three turns the first warms up; a node's time is the median of the others, and the groups are all of it.
    #[test]
    fn groups_are_complete() {
        let turn = |at: u64, times: [u64; 4]| {
            [
                event("a_kernel_time", "MatMul", at + 10, times[0]),
                event("a_fence_before", "MatMul", at + 9, 1),
                event(
                    "duet/p/drop1/GatherND_kernel_time",
                    "GatherND",
                    at + 20,
                    times[1],
                ),
                event("duet/p/drop1/TopK_kernel_time", "TopK", at + 21, times[2]),
                event("branch_kernel_time", "If", at + 1, 9000),
                // Two nodes of one name.
                event("_kernel_time", "Add", at + 30, times[3]),
                event("_kernel_time", "Add", at + 31, 1000),
                run(at),
            ]
        };
        let mut events =
            vec![json!({"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5})];
        events.extend(turn(100, [50_000, 7000, 7000, 7000]));
        events.extend(turn(200, [4000, 600, 200, 900]));
        events.extend(turn(300, [4400, 400, 300, 1100]));
        let profile = Profile::of("m", "prefill", &events, 3).unwrap();
        let found: Vec<_> = profile
            .groups
            .iter()
            .map(|g| (g.group, g.nodes, g.ms))
            .collect();
        let want = [
            (Group::Base, 3, 6.2),
            (Group::Ranking, 1, 0.25),
            (Group::Gather, 1, 0.5),
        ];
        assert_eq!(found, want);
        assert_eq!((profile.total_ms, profile.inserted_ms()), (6.95, 0.75));
        let base = Profile::of(
            "b",
            "prefill",
            &[run(0), event("a_kernel_time", "MatMul", 1, 7500)],
            1,
        );
        assert_eq!(profile.beside(&base.unwrap()).inserted_of_base, Some(0.1));
        assert!(Profile::of("m", "prefill", &events, 2).is_none());
        assert!(Profile::of("m", "prefill", &[], 2).is_none());
    }
}
