//! What all formats say in the same words.

use std::collections::{BTreeSet, HashMap};

pub(super) use super::places::{at, place, spot};
use crate::diff::change::worst;
use crate::diff::report::{
    Change, Class, FileReport, Kind, Presence, Report, Verdict, WeightChange,
};
use crate::readable::bytes;

/// Text from a file, safe on one line: characters that break lines, move the
/// cursor or turn the direction of reading are shown by their number.
pub(in crate::diff) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if hidden(c) => out.push_str(&format!("\\u{{{:x}}}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

/// Characters that show nothing, or something else than they are.
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff0}'..='\u{ffff}'
        )
}

/// A whole number with thousands set apart.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `1 node`, `2,000 nodes`.
pub(super) fn number(n: usize, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{} {what}{s}", count(n as u64))
}

/// `a`, `a and b`, `a, b and c`.
pub(super) fn list(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [init @ .., last] => format!("{} and {last}", init.join(", ")),
    }
}

/// What a class is about, for headings.
pub(super) fn meaning(class: Class) -> &'static str {
    match class {
        Class::Contract => "what clients rely on: inputs and outputs",
        Class::Version => "which runtimes take the file",
        Class::Structure => "what is computed",
        Class::Weights => "the numbers it is computed with",
        Class::Config => "files beside the models",
        Class::Shapes => "stated types of intermediate values",
        Class::Metadata => "what the file says of itself",
        Class::Cosmetic => "nothing acts on it; does not count",
    }
}

/// What a kind means, in one sentence: the rules of SARIF, and the manual.
pub fn about(kind: Kind) -> &'static str {
    match kind {
        Kind::InputAdded => "The model has an input that it did not have.",
        Kind::InputRemoved => "An input of the model is gone.",
        Kind::InputRenamed => "An input of the model has another name.",
        Kind::InputType => "An input of the model has another type or other dimensions.",
        Kind::InputOrder => "The inputs of the model are in another order.",
        Kind::OutputAdded => "The model has an output that it did not have.",
        Kind::OutputRemoved => "An output of the model is gone.",
        Kind::OutputRenamed => "An output of the model has another name.",
        Kind::OutputType => "An output of the model has another type or other dimensions.",
        Kind::OutputOrder => "The outputs of the model are in another order.",
        Kind::IrVersion => "The file is of another IR version.",
        Kind::Opset => "An operator set is of another version, or is new or gone.",
        Kind::NodesAdded => "Nodes were inserted.",
        Kind::NodesRemoved => "Nodes were removed.",
        Kind::NodesReplaced => "Nodes have others in their place.",
        Kind::Rewrite => "A pass of duet inserted nodes.",
        Kind::Attribute => "A node has another value for an attribute.",
        Kind::Rewired => "An input of a node comes from elsewhere.",
        Kind::OutputRewired => "An output of the model is computed elsewhere.",
        Kind::OutputsAsked => "A node gives other optional outputs.",
        Kind::FunctionAdded => "The model has a function that it did not have.",
        Kind::FunctionRemoved => "A function of the model is gone.",
        Kind::FunctionSignature => "A function has another signature.",
        Kind::Quantization => "A value has another quantisation annotation.",
        Kind::Opaque => "A part that is compared byte for byte changed.",
        Kind::ModelAdded => "There is a model file that was not there.",
        Kind::ModelRemoved => "A model file is gone.",
        Kind::ModelRenamed => "A model file has another name.",
        Kind::WeightValues => "Elements of a constant changed.",
        Kind::WeightType => "A constant has another element type.",
        Kind::WeightShape => "A constant has other dimensions.",
        Kind::WeightSource => "A constant has become computed, or the other way round.",
        Kind::ConfigAdded => "A config has a key that it did not have.",
        Kind::ConfigRemoved => "A key of a config is gone.",
        Kind::ConfigChanged => "A key of a config has another value.",
        Kind::FileAdded => "There is a file that was not there.",
        Kind::FileRemoved => "A file is gone.",
        Kind::FileChanged => "A file has other contents.",
        Kind::ValueType => "An intermediate value is stated to have another type.",
        Kind::Producer => "The file names another producer or version.",
        Kind::Metadata => "A key of the model's metadata changed.",
        Kind::ElementMetadata => "Metadata of a part of the model changed.",
        Kind::DocString => "A doc string changed.",
        Kind::GraphName => "A graph, a function or its domain has another name.",
        Kind::OperandOrder => "A commutative operator has its operands in another order.",
        Kind::DefaultAttribute => "Only one side spells an attribute's default out.",
        Kind::TypeStated => "Only one side states a value's type.",
        Kind::UnusedInitializer => "An initializer that nothing reads came, went or changed.",
        Kind::UnusedOpset => "An operator set that no node needs came or went.",
    }
}

/// Whether something came, went, or is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Added,
    Removed,
    Changed,
}

impl Sign {
    pub(super) fn of(change: &Change) -> Self {
        match change.kind {
            Kind::InputAdded
            | Kind::OutputAdded
            | Kind::NodesAdded
            | Kind::Rewrite
            | Kind::FunctionAdded
            | Kind::ModelAdded
            | Kind::ConfigAdded
            | Kind::FileAdded => Self::Added,
            Kind::InputRemoved
            | Kind::OutputRemoved
            | Kind::NodesRemoved
            | Kind::FunctionRemoved
            | Kind::ModelRemoved
            | Kind::ConfigRemoved
            | Kind::FileRemoved => Self::Removed,
            Kind::Opset
            | Kind::UnusedOpset
            | Kind::Producer
            | Kind::Metadata
            | Kind::ElementMetadata
            | Kind::DocString
            | Kind::UnusedInitializer => match (&change.before, &change.after) {
                (None, Some(_)) => Self::Added,
                (Some(_), None) => Self::Removed,
                // Grouped, with another value at each place.
                (None, None) if change.title.ends_with(" added") => Self::Added,
                (None, None) if change.title.ends_with(" removed") => Self::Removed,
                _ => Self::Changed,
            },
            _ => Self::Changed,
        }
    }

    pub(super) fn mark(self) -> char {
        match self {
            Self::Added => '+',
            Self::Removed => '-',
            Self::Changed => '~',
        }
    }
}

/// Changes of one kind that differ in nothing but the values are folded from so
/// many on.
const ALIKE: usize = 4;

/// Changes as short renderings list them: `constant of Mul: 0.1 → 0.2`, `constant
/// of Mul: 0.3 → 0.4` and so on are one line. The order is that of the first ones.
pub(super) fn fold(changes: &[&Change]) -> Vec<Change> {
    let key = |c: &Change| {
        let (head, _) = c.title.split_once(": ")?;
        let values = c.before.is_some() && c.after.is_some();
        values.then(|| (c.kind, head.to_owned(), c.ignored.clone()))
    };
    let mut numbers: HashMap<(Kind, String, Option<String>), usize> = HashMap::new();
    for change in changes {
        if let Some(key) = key(change) {
            *numbers.entry(key).or_default() += 1;
        }
    }
    let mut places: HashMap<(Kind, String, Option<String>), usize> = HashMap::new();
    let mut out: Vec<Change> = Vec::new();
    for &change in changes {
        let alike = key(change).filter(|k| numbers[k] >= ALIKE && change.class != Class::Contract);
        let Some(key) = alike else {
            out.push(change.clone());
            continue;
        };
        match places.get(&key) {
            Some(&at) => {
                let into: &mut Change = &mut out[at];
                into.places.extend(change.places.iter().cloned());
                into.weights = match (into.weights.take(), change.weights.clone()) {
                    (Some(one), Some(other)) => Some(worst(one, other)),
                    (one, other) => one.or(other),
                };
            }
            None => {
                let mut first = change.clone();
                let n = numbers[&key];
                let (head, values) = change.title.split_once(": ").unwrap_or_default();
                first.title = format!("{head}: {n} different changes, the first {values}");
                places.insert(key, out.len());
                out.push(first);
            }
        }
    }
    out
}

/// What passes of duet did to the models, if they did anything.
pub(super) fn rewritten(report: &Report) -> Option<String> {
    let all = || report.files.iter().flat_map(|f| &f.changes);
    let passes: BTreeSet<&str> = all().filter_map(|c| c.pass.as_deref()).collect();
    if passes.is_empty() {
        return None;
    }
    let passes: Vec<String> = passes.into_iter().map(clean).collect();
    let other = all().any(|c| {
        matches!(c.class, Class::Structure | Class::Weights | Class::Version) && c.pass.is_none()
    });
    let rest = if other {
        "other parts of the graphs changed as well"
    } else {
        "nothing else changed in graphs and weights"
    };
    Some(format!("Rewritten by duet: {}; {rest}.", list(&passes)))
}

/// Three significant digits; numbers that are nothing as what they are.
fn figure(x: f64) -> String {
    if x == 0.0 {
        "0".into()
    } else if (1e-3..1e4).contains(&x.abs()) {
        let digits = (2 - x.abs().log10().floor() as i32).max(0) as usize;
        format!("{x:.digits$}")
    } else {
        format!("{x:.2e}")
    }
}

/// A share in percent; never "0 %" for something nor "100 %" for less than all.
fn share(part: u64, whole: u64) -> String {
    let percent = part as f64 / whole.max(1) as f64 * 100.0;
    if part == 0 || part == whole {
        format!("{percent:.0} %")
    } else if percent < 0.01 {
        "< 0.01 %".into()
    } else if percent > 99.99 {
        "> 99.99 %".into()
    } else if percent < 10.0 {
        format!("{percent:.2} %")
    } else {
        format!("{percent:.1} %")
    }
}

/// Numbers of a change of weights; none where the title shows both numbers.
pub(super) fn numbers(change: &Change) -> String {
    match &change.weights {
        Some(w) if w.elements <= 1 && change.before.is_some() => String::new(),
        Some(w) => weights(w),
        None => String::new(),
    }
}

/// Numbers of a changed constant in one line; empty where elements could not be
/// compared.
pub(super) fn weights(w: &WeightChange) -> String {
    if w.changed == 0 {
        return String::new();
    }
    let mut parts = vec![format!(
        "{} of {} elements ({})",
        count(w.changed),
        count(w.elements),
        share(w.changed, w.elements)
    )];
    if w.changed == w.signs_of_zero {
        parts.push("only signs of zeros".into());
    } else {
        if let Some(x) = w.max_abs {
            parts.push(format!("max |Δ| {}", figure(x)));
        }
        if let Some(x) = w.max_rel {
            parts.push(format!("max |Δ|/|a| {}", figure(x)));
        }
        if let (Some(a), Some(d)) = (w.norm_a, w.norm_diff)
            && a > 0.0
        {
            parts.push(format!("‖Δ‖/‖a‖ {}", figure(d / a)));
        }
        if w.signs_of_zero > 0 {
            parts.push(format!("{} signs of zero", count(w.signs_of_zero)));
        }
    }
    if w.non_finite > 0 {
        parts.push(format!("{} NaN or infinite", count(w.non_finite)));
    }
    if w.beyond != w.changed {
        parts.push(format!("{} beyond the tolerance", count(w.beyond)));
    }
    // Of a tensor that changed as a whole nothing is gained by its first element.
    if let Some(first) = w.first.filter(|_| w.changed < w.elements) {
        parts.push(format!("first at {first}"));
    }
    parts.join(", ")
}

/// A class as an adjective: `2 weight changes`.
fn adjective(class: Class) -> &'static str {
    match class {
        Class::Weights => "weight",
        Class::Shapes => "shape",
        other => other.word(),
    }
}

/// `2 contract, 1 structure`.
fn counted<'a>(counts: impl Iterator<Item = (&'a Class, &'a usize)>) -> Vec<String> {
    let counts = counts.filter(|(class, n)| class.counts() && **n > 0);
    counts
        .map(|(class, n)| format!("{} {}", count(*n as u64), adjective(*class)))
        .collect()
}

/// What the comparison came to, in one sentence.
pub(super) fn verdict(report: &Report) -> String {
    let text = outcome(report);
    match &report.policy {
        None => text,
        Some(policy) if policy.passed() => format!("Allowed by {}. {text}", clean(&policy.path)),
        Some(policy) => format!("Denied by {}. {text}", clean(&policy.path)),
    }
}

fn outcome(report: &Report) -> String {
    let several = report.files.len() > 1;
    let ignored = match report.ignored {
        0 => String::new(),
        n => format!(" {} not counted.", ignored_changes(n)),
    };
    match report.verdict {
        Verdict::Identical if several => {
            format!(
                "Identical: {}, the same bytes.{ignored}",
                number(report.files.len(), "file")
            )
        }
        Verdict::Identical => format!("Identical: the same bytes.{ignored}"),
        // Whoever allows another computation is not told that it is the same.
        Verdict::Equal if report.files.iter().any(tolerated) => {
            format!("Nothing that counts changed.{ignored}")
        }
        Verdict::Equal => format!("Equal: the same computation{}.{ignored}", only(report)),
        Verdict::Different => {
            let counts = counted(report.counts.iter());
            let total: usize = report
                .counts
                .iter()
                .filter(|(c, _)| c.counts())
                .map(|(_, n)| n)
                .sum();
            let s = if total == 1 { "" } else { "s" };
            let files = if several {
                let changed = report
                    .files
                    .iter()
                    .filter(|f| f.verdict == Verdict::Different)
                    .count();
                format!(" in {changed} of {} files", report.files.len())
            } else {
                String::new()
            };
            format!("Different: {} change{s}{files}.{ignored}", list(&counts))
        }
    }
}

/// Whether a change does not count only because somebody said so.
fn tolerated(file: &FileReport) -> bool {
    let mut all = file.changes.iter();
    all.any(|c| c.ignored.is_some() && c.class.counts())
}

fn ignored_changes(n: usize) -> String {
    match n {
        1 => "1 change is".into(),
        n => format!("{} changes are", count(n as u64)),
    }
}

/// In what two equal sides differ all the same.
fn only(report: &Report) -> String {
    let mut parts = Vec::new();
    if report.files.iter().any(|f| !f.renames.is_empty()) {
        parts.push("names".to_owned());
    }
    if report.files.iter().any(|f| !f.storage.is_empty()) {
        parts.push("storage".to_owned());
    }
    if report.counts.get(&Class::Cosmetic).is_some_and(|n| *n > 0) {
        parts.push("cosmetics".to_owned());
    }
    match parts.as_slice() {
        [] => ", written in another way".into(),
        [one] if one == "storage" => ", stored in another way".into(),
        parts => format!(", but for {}", list(parts)),
    }
}

/// A file's name, both if it has two.
pub(super) fn file_name(file: &FileReport) -> String {
    match &file.path_b {
        Some(b) => format!("{} → {}", clean(&file.path), clean(b)),
        None => clean(&file.path),
    }
}

/// What happened to a file, in a few words.
pub(super) fn file_verdict(file: &FileReport) -> String {
    match (file.presence, file.verdict) {
        (Presence::OnlyA, _) => "removed".into(),
        (Presence::OnlyB, _) => "added".into(),
        (_, Verdict::Identical) => "identical".into(),
        (_, Verdict::Equal) if tolerated(file) => "nothing that counts".into(),
        (_, Verdict::Equal) => "equal".into(),
        (_, Verdict::Different) => {
            let mut counts = std::collections::BTreeMap::new();
            for change in file.changes.iter().filter(|c| c.ignored.is_none()) {
                *counts.entry(change.class).or_insert(0_usize) += 1;
            }
            counted(counts.iter()).join(", ")
        }
    }
}

/// Sizes of both models in one line.
pub(super) fn facts(file: &FileReport) -> Option<String> {
    let f = file.model.as_ref()?;
    let both = |a: usize, b: usize, what| {
        let now = number(b, what);
        if a == b {
            now
        } else {
            format!("{} → {now}", count(a as u64))
        }
    };
    let mut nodes = both(f.nodes_a, f.nodes_b, "node");
    let parts: Vec<String> = [
        (f.modified, "modified"),
        (f.removed, "removed"),
        (f.added, "added"),
    ]
    .iter()
    .filter(|(n, _)| *n > 0)
    .map(|(n, word)| format!("{} {word}", count(*n as u64)))
    .collect();
    if !parts.is_empty() {
        nodes.push_str(&format!(" ({})", parts.join(", ")));
    }
    let mut constants = both(f.constants_a, f.constants_b, "constant");
    if f.weights_changed > 0 {
        constants.push_str(&format!(" ({} changed)", count(f.weights_changed as u64)));
    }
    let size = if f.weight_bytes_a == f.weight_bytes_b {
        bytes(f.weight_bytes_a)
    } else {
        format!("{} → {}", bytes(f.weight_bytes_a), bytes(f.weight_bytes_b))
    };
    Some(format!("{nodes}; {constants}, {size}"))
}

/// `212 values and 40 nodes renamed`.
pub(super) fn renamed(file: &FileReport) -> Option<String> {
    let r = &file.renames;
    let some = |n: usize, what| (n > 0).then(|| number(n, what));
    let parts: Vec<String> = [some(r.values.len(), "value"), some(r.nodes.len(), "node")]
        .into_iter()
        .flatten()
        .collect();
    (!parts.is_empty()).then(|| format!("{} renamed", list(&parts)))
}
