//! What a model says of itself before its first node: versions, producer,
//! metadata, and the contract with its clients (inputs and outputs).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::change::short;
use super::report::{Change, Class, Kind, Place, Spot};
use crate::ir::{Dim, Model, ValueId, ValueType};
use crate::onnx::details::ModelDetails;

/// Pairs of inputs and outputs: what the graphs are entered and left by.
#[derive(Debug, Default)]
pub(super) struct Interface {
    /// Inputs that correspond.
    pub(super) inputs: Vec<(ValueId, ValueId)>,
    /// Outputs that correspond: their positions.
    pub(super) outputs: Vec<(usize, usize)>,
}

/// Versions, producer and metadata.
pub(super) fn compare(
    a: (&Model, &ModelDetails),
    b: (&Model, &ModelDetails),
    found: &mut Vec<Change>,
) {
    let ((ma, da), (mb, db)) = (a, b);
    let differ = |class, kind, what: &str, before: String, after: String| {
        let title = match (before.is_empty(), after.is_empty()) {
            (true, false) => format!("{what} added: {}", short(&after)),
            (false, true) => format!("{what} removed: {}", short(&before)),
            _ => format!("{what}: {} → {}", short(&before), short(&after)),
        };
        let change = Change::new(class, kind, title).values(before.clone(), after.clone());
        (before != after).then_some(change)
    };
    let version = Class::Version;
    found.extend(differ(
        version,
        Kind::IrVersion,
        "IR version",
        ma.ir_version.to_string(),
        mb.ir_version.to_string(),
    ));
    opsets(ma, &ma.opset_imports, mb, &mb.opset_imports, "", found);
    let meta = Class::Metadata;
    let texts = [
        ("producer", &ma.producer, &mb.producer),
        (
            "producer version",
            &da.producer_version,
            &db.producer_version,
        ),
        ("model domain", &da.domain, &db.domain),
    ];
    for (what, before, after) in texts {
        let change = differ(meta, Kind::Producer, what, before.clone(), after.clone());
        found.extend(change.map(|c| c.subject(what)));
    }
    let number = |n: i64| if n == 0 { String::new() } else { n.to_string() };
    let change = differ(
        meta,
        Kind::Producer,
        "model version",
        number(da.model_version),
        number(db.model_version),
    );
    found.extend(change.map(|c| c.subject("model version")));
    let of = |m: &Model| -> BTreeMap<String, String> {
        let all = m.metadata.iter().map(|e| (e.key.clone(), e.value.clone()));
        all.collect()
    };
    let (before, after) = (of(ma), of(mb));
    for key in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        let value = |m: &BTreeMap<String, String>| m.get(key).cloned();
        let (old, new) = (value(&before), value(&after));
        if old == new {
            continue;
        }
        let title = match (&old, &new) {
            (None, Some(new)) => format!("metadata '{key}' added: {}", line(new)),
            (Some(old), None) => format!("metadata '{key}' removed: {}", line(old)),
            (old, new) => {
                let text = |t: &Option<String>| line(t.as_deref().unwrap_or(""));
                format!("metadata '{key}': {} → {}", text(old), text(new))
            }
        };
        let change = Change::new(meta, Kind::Metadata, title).subject(key);
        found.push(change.values(old.unwrap_or_default(), new.unwrap_or_default()));
    }
    if da.remarks.doc != db.remarks.doc {
        let title = "doc string of the model changed";
        let change = Change::new(Class::Cosmetic, Kind::DocString, title);
        found.push(change.values(da.remarks.doc.clone(), db.remarks.doc.clone()));
    }
    let rest = |d: &ModelDetails| {
        let mut by: BTreeMap<u32, Vec<bytes::Bytes>> = BTreeMap::new();
        for (number, bytes) in &d.remarks.opaque {
            by.entry(*number).or_default().push(bytes.clone());
        }
        by
    };
    let (before, after) = (rest(da), rest(db));
    for number in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        if before.get(number) != after.get(number) {
            let what = match number {
                20 => "training information".to_owned(),
                26 => "device configurations".to_owned(),
                other => format!("field {other}, which this version does not know,"),
            };
            let title = format!("{what} changed");
            found.push(Change::new(Class::Structure, Kind::Opaque, title).subject(what));
        }
    }
}

/// First line of a value, quoted.
fn line(text: &str) -> String {
    let first = text.lines().next().unwrap_or("");
    let more = if text.lines().count() > 1 { " …" } else { "" };
    format!("\"{}\"{more}", short(first))
}

/// Operator sets of models or functions. `of` says whose, with a space in front.
pub(super) fn opsets(
    model_a: &Model,
    a: &[(String, i64)],
    model_b: &Model,
    b: &[(String, i64)],
    of: &str,
    found: &mut Vec<Change>,
) {
    let map = |list: &[(String, i64)]| -> BTreeMap<String, i64> {
        let named = |d: &str| if d.is_empty() { "ai.onnx" } else { d }.to_owned();
        list.iter().map(|(d, v)| (named(d), *v)).collect()
    };
    let (before, after) = (map(a), map(b));
    for domain in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
        let (old, new) = (before.get(domain), after.get(domain));
        if old == new {
            continue;
        }
        let used = uses(model_a, domain) || uses(model_b, domain);
        let (class, kind) = if used || (old.is_some() && new.is_some()) {
            (Class::Version, Kind::Opset)
        } else {
            (Class::Cosmetic, Kind::UnusedOpset)
        };
        let text = |v: Option<&i64>| v.map(ToString::to_string).unwrap_or_default();
        let (old, new) = (text(old), text(new));
        let title = match (old.is_empty(), new.is_empty()) {
            (true, _) => format!("operator set {domain} {new}{of} added"),
            (_, true) => format!("operator set {domain} {old}{of} removed"),
            _ => format!("operator set {domain}{of}: {old} → {new}"),
        };
        found.push(
            Change::new(class, kind, title)
                .subject(domain)
                .values(old, new),
        );
    }
}

/// Whether any node is of the domain.
fn uses(model: &Model, domain: &str) -> bool {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    let mut nodes = model.graphs().flat_map(|(_, g)| &g.nodes);
    nodes.any(|n| model.node(*n).domain == domain)
}

/// Inputs and outputs of the main graphs.
pub(super) fn contract(a: &Model, b: &Model, found: &mut Vec<Change>) -> Interface {
    let (inputs_a, inputs_b) = (&a.graph().inputs, &b.graph().inputs);
    let pairs = pair(a, inputs_a, b, inputs_b);
    let put = Io {
        word: "input",
        added: Kind::InputAdded,
        removed: Kind::InputRemoved,
        renamed: Kind::InputRenamed,
        ty: Kind::InputType,
        order: Kind::InputOrder,
    };
    put.compare(a, inputs_a, b, inputs_b, &pairs, found);
    let inputs = pairs.iter().map(|(i, j)| (inputs_a[*i], inputs_b[*j]));
    let (outputs_a, outputs_b) = (&a.graph().outputs, &b.graph().outputs);
    let outputs = pair(a, outputs_a, b, outputs_b);
    let put = Io {
        word: "output",
        added: Kind::OutputAdded,
        removed: Kind::OutputRemoved,
        renamed: Kind::OutputRenamed,
        ty: Kind::OutputType,
        order: Kind::OutputOrder,
    };
    put.compare(a, outputs_a, b, outputs_b, &outputs, found);
    Interface {
        inputs: inputs.collect(),
        outputs,
    }
}

/// Positions that correspond: by name, then the rest by place and type.
fn pair(a: &Model, list_a: &[ValueId], b: &Model, list_b: &[ValueId]) -> Vec<(usize, usize)> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    for (j, value) in list_b.iter().enumerate() {
        places.entry(b.name(*value)).or_insert(j);
    }
    let mut taken = vec![false; list_b.len()];
    let mut pairs = Vec::new();
    let mut left = Vec::new();
    for (i, value) in list_a.iter().enumerate() {
        match places.get(a.name(*value)) {
            Some(&j) if !taken[j] => {
                taken[j] = true;
                pairs.push((i, j));
            }
            _ => left.push(i),
        }
    }
    let same = |i: usize, j: usize| a.value(list_a[i]).ty == b.value(list_b[j]).ty;
    // Same place first, then in order; the last one of each side is the other's
    // whatever its type.
    left.retain(|&i| {
        let here = i < taken.len() && !taken[i] && same(i, i);
        if here {
            taken[i] = true;
            pairs.push((i, i));
        }
        !here
    });
    left.retain(|&i| {
        let found = (0..taken.len()).find(|&j| !taken[j] && same(i, j));
        if let Some(j) = found {
            taken[j] = true;
            pairs.push((i, j));
        }
        found.is_none()
    });
    let rest: Vec<usize> = (0..taken.len()).filter(|j| !taken[*j]).collect();
    if let ([i], [j]) = (left.as_slice(), rest.as_slice())
        && i == j
        && list_a.len() == list_b.len()
    {
        pairs.push((*i, *j));
    }
    pairs.sort_unstable();
    pairs
}

/// Words and kinds of inputs or of outputs.
struct Io {
    word: &'static str,
    added: Kind,
    removed: Kind,
    renamed: Kind,
    ty: Kind,
    order: Kind,
}

impl Io {
    fn compare(
        &self,
        a: &Model,
        list_a: &[ValueId],
        b: &Model,
        list_b: &[ValueId],
        pairs: &[(usize, usize)],
        found: &mut Vec<Change>,
    ) {
        let new = |kind, title: String| Change::new(Class::Contract, kind, title);
        let word = self.word;
        let shown = |m: &Model, v: ValueId| match &m.value(v).ty {
            Some(ty) => format!("'{}' {ty}", m.name(v)),
            None => format!("'{}'", m.name(v)),
        };
        let at = |va: Option<ValueId>, vb: Option<ValueId>| Place {
            a: va.map(|v| Spot::value(a.name(v))),
            b: vb.map(|v| Spot::value(b.name(v))),
            ..Place::default()
        };
        let paired_a: BTreeSet<usize> = pairs.iter().map(|p| p.0).collect();
        let paired_b: BTreeSet<usize> = pairs.iter().map(|p| p.1).collect();
        for (i, &value) in list_a.iter().enumerate() {
            if !paired_a.contains(&i) {
                let title = format!("{word} {} removed", shown(a, value));
                let change = new(self.removed, title).subject(a.name(value));
                found.push(change.at(at(Some(value), None)));
            }
        }
        for (j, &value) in list_b.iter().enumerate() {
            if !paired_b.contains(&j) {
                let title = format!("{word} {} added", shown(b, value));
                let change = new(self.added, title).subject(b.name(value));
                found.push(change.at(at(None, Some(value))));
            }
        }
        for &(i, j) in pairs {
            let (va, vb) = (list_a[i], list_b[j]);
            let (name_a, name_b) = (a.name(va), b.name(vb));
            if name_a != name_b {
                let title = format!("{word} '{name_a}' renamed to '{name_b}'");
                let change = new(self.renamed, title).subject(name_a);
                found.push(change.values(name_a, name_b).at(at(Some(va), Some(vb))));
            }
            let default = |m: &Model, v: ValueId| m.value(v).initializer.is_some();
            if self.ty == Kind::InputType && default(a, va) != default(b, vb) {
                let words = |has| if has { "with a default" } else { "required" };
                let (old, new_) = (words(default(a, va)), words(default(b, vb)));
                let title = format!("{word} '{name_b}': {old} → {new_}");
                let change = new(self.ty, title).subject(name_b);
                found.push(change.values(old, new_).at(at(Some(va), Some(vb))));
            }
            let (ty_a, ty_b) = (&a.value(va).ty, &b.value(vb).ty);
            if ty_a == ty_b {
                continue;
            }
            let renames = renamed_dims(ty_a.as_ref(), ty_b.as_ref());
            if let Some(renames) = renames {
                for (old, new_) in renames {
                    let title = format!("dimension name of {word}s: {old} → {new_}");
                    let change = new(self.ty, title).subject(old.clone()).values(old, new_);
                    found.push(change.at(at(Some(va), Some(vb))));
                }
                continue;
            }
            let text = |ty: &Option<ValueType>| ty.as_ref().map_or("no type".into(), type_text);
            let (old, new_) = (text(ty_a), text(ty_b));
            let title = format!("{word} '{name_b}': {old} → {new_}");
            let change = new(self.ty, title).subject(name_b).values(old, new_);
            found.push(change.at(at(Some(va), Some(vb))));
        }
        if pairs.windows(2).any(|w| w[0].1 > w[1].1) {
            let names = |m: &Model, list: &[ValueId], of: &BTreeSet<usize>| {
                let named = list.iter().enumerate().filter(|(i, _)| of.contains(i));
                named
                    .map(|(_, v)| m.name(*v))
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            let (old, new_) = (names(a, list_a, &paired_a), names(b, list_b, &paired_b));
            let title = format!("order of the {word}s: {} → {}", short(&old), short(&new_));
            found.push(new(self.order, title).values(old, new_));
        }
    }
}

/// A type in words; types that are no dense tensors are told by their bytes.
pub(super) fn type_text(ty: &ValueType) -> String {
    match ty {
        ValueType::Tensor { .. } => ty.to_string(),
        ValueType::Other(bytes) => {
            let hex: String = bytes.iter().take(16).map(|b| format!("{b:02x}")).collect();
            format!("other type ({} bytes: {hex})", bytes.len())
        }
    }
}

/// Old and new names of dimensions, if nothing else about two types differs.
pub(super) fn renamed_dims(
    a: Option<&ValueType>,
    b: Option<&ValueType>,
) -> Option<Vec<(String, String)>> {
    let (a, b) = (a?, b?);
    let (dims_a, dims_b) = (a.shape()?, b.shape()?);
    if a.dtype() != b.dtype() || dims_a.len() != dims_b.len() {
        return None;
    }
    let mut renames = Vec::new();
    for pair in dims_a.iter().zip(dims_b) {
        match pair {
            (x, y) if x == y => {}
            (Dim::Param(x), Dim::Param(y)) => {
                let rename = (x.clone(), y.clone());
                if !renames.contains(&rename) {
                    renames.push(rename);
                }
            }
            _ => return None,
        }
    }
    Some(renames)
}
