//! Two paths as pairs of files: models, JSON configs, and everything else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::change::{group, short};
use super::report::{
    Change, Class, FileKind, FileReport, Kind, Place, Presence, Renames, Spot, Verdict,
};
use super::{DiffError, Options, json, model};
use crate::ir::{AttrValue, Model, Tensor, TensorData};
use crate::onnx::read;

/// Texts up to this size are carried in the report as they are.
const SHOWN: u64 = 4096;

pub(super) fn compare(a: &Path, b: &Path, options: &Options) -> Result<Vec<FileReport>, DiffError> {
    let meta_a = a.metadata().map_err(DiffError::io(a))?;
    let meta_b = b.metadata().map_err(DiffError::io(b))?;
    for (path, meta) in [(a, &meta_a), (b, &meta_b)] {
        if !meta.is_dir() && !is_nothing(path) {
            regular(path)?;
        }
    }
    match (meta_a.is_dir(), meta_b.is_dir()) {
        (true, true) => directories(a, b, options),
        // What git names where a file is on one side only.
        (false, false) if is_nothing(a) != is_nothing(b) => {
            let (path, presence) = if is_nothing(a) {
                (b, Presence::OnlyB)
            } else {
                (a, Presence::OnlyA)
            };
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Ok(vec![alone(&name, path, presence)?])
        }
        (false, false) => {
            let name = |p: &Path| {
                p.file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned()
            };
            // What is named explicitly is a model unless it says that it is JSON.
            let kind = match (kind(a), kind(b)) {
                (FileKind::Json, FileKind::Json) => FileKind::Json,
                _ => FileKind::Model,
            };
            let mut file = entry(name(a), kind, Presence::Both);
            file.path_b = (name(a) != name(b)).then(|| name(b));
            both(&mut file, a, b, options)?;
            Ok(vec![file])
        }
        (true, false) => Err(DiffError::Mixed {
            directory: a.to_owned(),
            file: b.to_owned(),
        }),
        (false, true) => Err(DiffError::Mixed {
            directory: b.to_owned(),
            file: a.to_owned(),
        }),
    }
}

fn is_nothing(path: &Path) -> bool {
    path == Path::new("/dev/null")
}

/// Refuses what is no file before it is opened: a pipe waits for a writer, and a
/// device need not end.
pub(super) fn regular(path: &Path) -> Result<(), DiffError> {
    use std::os::unix::fs::FileTypeExt;
    let ty = path.metadata().map_err(DiffError::io(path))?.file_type();
    let what = match ty {
        t if t.is_file() => return Ok(()),
        t if t.is_dir() => "a directory",
        t if t.is_fifo() => "a named pipe",
        t if t.is_socket() => "a socket",
        t if t.is_char_device() || t.is_block_device() => "a device",
        _ => "something else",
    };
    Err(DiffError::Special {
        path: path.to_owned(),
        what,
    })
}

fn kind(path: &Path) -> FileKind {
    match path.extension().and_then(|e| e.to_str()) {
        Some("onnx") => FileKind::Model,
        Some("json") => FileKind::Json,
        _ => FileKind::Other,
    }
}

fn entry(path: String, kind: FileKind, presence: Presence) -> FileReport {
    FileReport {
        path,
        path_b: None,
        kind,
        presence,
        verdict: Verdict::Identical,
        same_bytes: false,
        model: None,
        changes: Vec::new(),
        storage: Vec::new(),
        renames: Renames::default(),
    }
}

/// Compares a file that is on both sides.
fn both(file: &mut FileReport, a: &Path, b: &Path, options: &Options) -> Result<(), DiffError> {
    match file.kind {
        FileKind::Model => model::files(file, a, b, options),
        FileKind::Json => {
            file.same_bytes = same_bytes(a, b)?;
            if !file.same_bytes {
                file.changes = match json::files(a, b)? {
                    Ok(found) => group(found),
                    // Told byte for byte: what cannot be read by key could be anything.
                    Err(reason) => vec![other(a, b, &reason)?],
                };
            }
            Ok(())
        }
        FileKind::Other => {
            file.same_bytes = same_bytes(a, b)?;
            if !file.same_bytes {
                file.changes = vec![other(a, b, "")?];
            }
            Ok(())
        }
    }
}

/// A change of a file that nothing more is known about, and why.
fn other(a: &Path, b: &Path, reason: &str) -> Result<Change, DiffError> {
    let size = |p: &Path| p.metadata().map(|m| m.len()).map_err(DiffError::io(p));
    let (old, new) = (size(a)?, size(b)?);
    let text = |p: &Path, size: u64| -> String {
        let read = (size <= SHOWN).then(|| std::fs::read_to_string(p).ok());
        read.flatten().unwrap_or_default()
    };
    let mut title = if old == new {
        format!("contents changed ({old} bytes)")
    } else {
        format!("contents changed ({old} → {new} bytes)")
    };
    if !reason.is_empty() {
        title.push_str(&format!(", not compared by key: {reason}"));
    }
    let change = Change::new(Class::Config, Kind::FileChanged, title);
    Ok(change.values(text(a, old), text(b, new)))
}

/// So many folders are no model's; links can make more of few.
const FOLDERS: usize = 10_000;

/// Files below a directory by relative path; hidden ones (`.git`, `.cache`) are
/// not a model's. Links are what they lead to.
fn list(root: &Path) -> Result<BTreeMap<String, PathBuf>, DiffError> {
    let refuse = |path: &Path, reason: String| DiffError::Listing {
        path: path.to_owned(),
        reason,
    };
    let real = |path: &Path| path.canonicalize().map_err(DiffError::io(path));
    let mut found = BTreeMap::new();
    // A folder, its relative path, and where it and those that it lies in really are.
    let mut todo = vec![(root.to_owned(), String::new(), vec![real(root)?])];
    let mut folders = 0;
    while let Some((at, prefix, above)) = todo.pop() {
        folders += 1;
        if folders > FOLDERS {
            let reason = format!("more than {FOLDERS} folders; compare a model's directory");
            return Err(refuse(root, reason));
        }
        for item in std::fs::read_dir(&at).map_err(DiffError::io(&at))? {
            let item = item.map_err(DiffError::io(&at))?;
            let name = item.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            let path = item.path();
            let relative = format!("{prefix}{name}");
            if path.metadata().map_err(DiffError::io(&path))?.is_dir() {
                let target = real(&path)?;
                if above.contains(&target) {
                    let reason = "a link to a folder that it lies in itself, without end; \
                                  remove it, or compare the folders inside";
                    return Err(refuse(&path, reason.into()));
                }
                let inside = above.iter().cloned().chain([target]).collect();
                todo.push((path, format!("{relative}/"), inside));
                continue;
            }
            regular(&path)?;
            if let Some(other) = found.insert(relative, path.clone()) {
                let reason = format!("no UTF-8, and the same name otherwise as {other:?}");
                return Err(refuse(&path, reason));
            }
        }
    }
    Ok(found)
}

fn directories(a: &Path, b: &Path, options: &Options) -> Result<Vec<FileReport>, DiffError> {
    let (files_a, files_b) = (list(a)?, list(b)?);
    let mut reports: Vec<FileReport> = Vec::new();
    // Data files of the models of each side.
    let (mut data_a, mut data_b) = (BTreeSet::new(), BTreeSet::new());
    let is_model = |name: &&String| kind(Path::new(name)) == FileKind::Model;
    let only = |one: &BTreeMap<String, PathBuf>, other: &BTreeMap<String, PathBuf>| {
        let models = one
            .keys()
            .filter(is_model)
            .filter(|n| !other.contains_key(*n));
        models.cloned().collect::<Vec<_>>()
    };
    // The only model that has no counterpart is the other side's only one, renamed.
    let renamed = match (
        only(&files_a, &files_b).as_slice(),
        only(&files_b, &files_a).as_slice(),
    ) {
        ([x], [y]) => Some((x.clone(), y.clone())),
        _ => None,
    };
    for (name, path_a) in files_a.iter().filter(|(n, _)| is_model(n)) {
        let partner = match &renamed {
            Some((x, y)) if x == name => Some(y),
            _ => Some(name),
        };
        let Some(path_b) = partner.and_then(|n| files_b.get(n)) else {
            reports.push(alone(name, path_a, Presence::OnlyA)?);
            data_a.extend(locations(name, &read(path_a)?));
            continue;
        };
        let mut file = entry(name.clone(), FileKind::Model, Presence::Both);
        file.path_b = partner.filter(|n| *n != name).cloned();
        both(&mut file, path_a, path_b, options)?;
        if let Some(new) = &file.path_b {
            file.changes.push(renaming(name, new));
            file.changes.sort_by_key(|c| c.class);
        }
        data_a.extend(locations(name, &read(path_a)?));
        data_b.extend(locations(partner.unwrap_or(name), &read(path_b)?));
        reports.push(file);
    }
    for (name, path_b) in files_b.iter().filter(|(n, _)| is_model(n)) {
        let is_renamed = renamed.as_ref().is_some_and(|(_, y)| y == name);
        if !files_a.contains_key(name) && !is_renamed {
            reports.push(alone(name, path_b, Presence::OnlyB)?);
            data_b.extend(locations(name, &read(path_b)?));
        }
    }
    // A model's data was compared with the model, tensor by tensor. What is data on
    // one side only is a file as any other.
    let rest: BTreeSet<&String> = files_a.keys().chain(files_b.keys()).collect();
    let is_data = |name: &String| {
        (data_a.contains(name) || !files_a.contains_key(name))
            && (data_b.contains(name) || !files_b.contains_key(name))
    };
    for name in rest.into_iter().filter(|n| !is_model(n) && !is_data(n)) {
        match (files_a.get(name), files_b.get(name)) {
            (Some(path_a), Some(path_b)) => {
                let mut file = entry(name.clone(), kind(path_a), Presence::Both);
                both(&mut file, path_a, path_b, options)?;
                reports.push(file);
            }
            (Some(path), None) => reports.push(alone(name, path, Presence::OnlyA)?),
            (None, Some(path)) => reports.push(alone(name, path, Presence::OnlyB)?),
            (None, None) => {}
        }
    }
    reports.sort_by(|x, y| x.path.cmp(&y.path));
    Ok(reports)
}

/// A file that only one side has.
fn alone(name: &str, path: &Path, presence: Presence) -> Result<FileReport, DiffError> {
    let kind = kind(path);
    let size = path.metadata().map_err(DiffError::io(path))?.len();
    let added = presence == Presence::OnlyB;
    let (class, what, kinds) = match kind {
        FileKind::Model => (
            Class::Structure,
            "model file",
            (Kind::ModelAdded, Kind::ModelRemoved),
        ),
        _ => (Class::Config, "file", (Kind::FileAdded, Kind::FileRemoved)),
    };
    let (word, change) = if added {
        ("added", kinds.0)
    } else {
        ("removed", kinds.1)
    };
    let mut file = entry(name.to_owned(), kind, presence);
    let spot = Some(Spot::value(name));
    let place = match added {
        true => Place {
            b: spot,
            ..Place::default()
        },
        false => Place {
            a: spot,
            ..Place::default()
        },
    };
    let title = format!("{what} {word} ({size} bytes)");
    file.changes = vec![
        Change::new(class, change, title)
            .subject(short(name))
            .at(place),
    ];
    Ok(file)
}

/// A model that is found by another name, whatever it computes.
fn renaming(old: &str, new: &str) -> Change {
    let title = format!("model file renamed: {old} → {new}");
    let place = Place {
        a: Some(Spot::value(old)),
        b: Some(Spot::value(new)),
        ..Place::default()
    };
    Change::new(Class::Structure, Kind::ModelRenamed, title)
        .subject(old)
        .values(old, new)
        .at(place)
}

/// Endings of files that others than the runtime read: they are compared even if
/// a model says that its weights lie in them.
const NO_DATA: [&str; 14] = [
    "json", "jsonl", "txt", "yaml", "yml", "toml", "xml", "ini", "cfg", "md", "py", "jinja",
    "jinja2", "model",
];

/// Data files that a model has weights in, relative to the directory that is compared.
fn locations(name: &str, model: &Model) -> BTreeSet<String> {
    let folder = name.rfind('/').map_or("", |at| &name[..=at]);
    let mut found = BTreeSet::new();
    let mut add = |tensor: &Tensor| {
        if let TensorData::External(reference) = &tensor.data {
            let location = reference.location.trim_start_matches("./");
            let ending = location.rsplit_once('.').map(|(_, e)| e.to_lowercase());
            let text = ending.is_some_and(|e| NO_DATA.contains(&e.as_str()));
            // Nothing of the file was compared for what is empty.
            let empty = reference.length == Some(0) || tensor.element_count() == Some(0);
            if !text && !empty {
                found.insert(format!("{folder}{location}"));
            }
        }
    };
    for (_, graph) in model.graphs() {
        for value in &graph.initializers {
            if let Some(tensor) = &model.value(*value).initializer {
                add(tensor);
            }
        }
        for attribute in graph.nodes.iter().flat_map(|n| &model.node(*n).attributes) {
            if let AttrValue::Tensor(tensor) = &attribute.value {
                add(tensor);
            }
        }
    }
    found
}

/// Whether two files have the same contents.
pub(super) fn same_bytes(a: &Path, b: &Path) -> Result<bool, DiffError> {
    let open = |p: &Path| File::open(p).map_err(DiffError::io(p));
    let (mut file_a, mut file_b) = (open(a)?, open(b)?);
    let size = |f: &File, p: &Path| f.metadata().map(|m| m.len()).map_err(DiffError::io(p));
    if size(&file_a, a)? != size(&file_b, b)? {
        return Ok(false);
    }
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = file_a.read(&mut one).map_err(DiffError::io(a))?;
        if n == 0 {
            return Ok(true);
        }
        file_b
            .read_exact(&mut other[..n])
            .map_err(DiffError::io(b))?;
        if one[..n] != other[..n] {
            return Ok(false);
        }
    }
}
