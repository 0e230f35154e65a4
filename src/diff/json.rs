//! JSON configs, key by key: the order of keys and the layout say nothing.

use std::path::Path;

use serde_json::Value;

use super::DiffError;
use super::change::short;
use super::report::{Change, Class, Kind, Place, Spot};

/// More changes below one key than this are told as one.
const SPELLED_OUT: usize = 24;

pub(super) fn files(a: &Path, b: &Path) -> Result<Vec<Change>, DiffError> {
    let read = |path: &Path| -> Result<Value, DiffError> {
        let text = std::fs::read(path).map_err(DiffError::io(path))?;
        serde_json::from_slice(&text).map_err(|reason| DiffError::Json {
            path: path.to_owned(),
            reason,
        })
    };
    Ok(compare(&read(a)?, &read(b)?))
}

/// Changes from `a` to `b`, by key.
pub(super) fn compare(a: &Value, b: &Value) -> Vec<Change> {
    let mut leaves = Vec::new();
    walk(a, b, &mut Vec::new(), &mut leaves);
    // Thousands of changed entries of one table (a vocabulary) are one change.
    let mut by_parent: std::collections::BTreeMap<String, Vec<Leaf>> = Default::default();
    let mut order: Vec<String> = Vec::new();
    for leaf in leaves {
        let parent = text(&leaf.path[..leaf.path.len().saturating_sub(1)]);
        if !by_parent.contains_key(&parent) {
            order.push(parent.clone());
        }
        by_parent.entry(parent).or_default().push(leaf);
    }
    let mut found = Vec::new();
    for parent in order {
        let leaves = by_parent.remove(&parent).unwrap_or_default();
        let many = leaves.len() > SPELLED_OUT;
        let count = leaves.len();
        found.extend(
            leaves
                .into_iter()
                .map(|leaf| leaf.change(many.then_some((&parent, count)))),
        );
    }
    found
}

/// One difference.
struct Leaf {
    path: Vec<String>,
    old: Option<Value>,
    new: Option<Value>,
}

impl Leaf {
    /// As a change; one of `count` below a key where there are many.
    fn change(self, many: Option<(&String, usize)>) -> Change {
        let path = text(&self.path);
        let shown = |v: &Option<Value>| v.as_ref().map(Value::to_string).unwrap_or_default();
        let (old, new) = (shown(&self.old), shown(&self.new));
        let (kind, word) = match (&self.old, &self.new) {
            (None, _) => (Kind::ConfigAdded, "added"),
            (_, None) => (Kind::ConfigRemoved, "removed"),
            _ => (Kind::ConfigChanged, "changed"),
        };
        let title = match many {
            Some((parent, _)) if parent.is_empty() => format!("entries {word}"),
            Some((parent, _)) => format!("entries of '{parent}' {word}"),
            None => match kind {
                Kind::ConfigAdded => format!("'{path}' added: {}", short(&new)),
                Kind::ConfigRemoved => format!("'{path}' removed: {}", short(&old)),
                _ => format!("'{path}': {} → {}", short(&old), short(&new)),
            },
        };
        let subject = many.map_or_else(|| path.clone(), |(parent, _)| parent.clone());
        let spot = || Some(Spot::value(path.clone()));
        let place = Place {
            a: self.old.as_ref().and_then(|_| spot()),
            b: self.new.as_ref().and_then(|_| spot()),
            ..Place::default()
        };
        Change::new(Class::Config, kind, title)
            .subject(subject)
            .values(old, new)
            .at(place)
    }
}

/// `a.b[2]`; a key that is no plain word in quotes.
fn text(path: &[String]) -> String {
    let mut out = String::new();
    for part in path {
        if !part.starts_with('[') && !out.is_empty() {
            out.push('.');
        }
        out.push_str(part);
    }
    out
}

fn key(name: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    if !name.is_empty() && name.chars().all(plain) {
        name.to_owned()
    } else {
        format!("{name:?}")
    }
}

fn walk(a: &Value, b: &Value, path: &mut Vec<String>, found: &mut Vec<Leaf>) {
    let mut leaf = |path: &[String], old: Option<&Value>, new: Option<&Value>| {
        found.push(Leaf {
            path: path.to_vec(),
            old: old.cloned(),
            new: new.cloned(),
        });
    };
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            for (name, old) in x {
                path.push(key(name));
                match y.get(name) {
                    Some(new) => walk(old, new, path, found),
                    None => found.push(Leaf {
                        path: path.clone(),
                        old: Some(old.clone()),
                        new: None,
                    }),
                }
                path.pop();
            }
            for (name, new) in y.iter().filter(|(name, _)| !x.contains_key(*name)) {
                path.push(key(name));
                found.push(Leaf {
                    path: path.clone(),
                    old: None,
                    new: Some(new.clone()),
                });
                path.pop();
            }
        }
        (Value::Array(x), Value::Array(y)) => {
            // What is equal at both ends stays in place, so that one inserted
            // entry is one change.
            let head = x.iter().zip(y).take_while(|(p, q)| same(p, q)).count();
            let rest = x.len().min(y.len()) - head;
            let ends = x.iter().rev().zip(y.iter().rev());
            let tail = ends.take(rest).take_while(|(p, q)| same(p, q)).count();
            let (mid_x, mid_y) = (&x[head..x.len() - tail], &y[head..y.len() - tail]);
            for i in 0..mid_x.len().max(mid_y.len()) {
                path.push(format!("[{}]", head + i));
                match (mid_x.get(i), mid_y.get(i)) {
                    (Some(old), Some(new)) => walk(old, new, path, found),
                    (old, new) => found.push(Leaf {
                        path: path.clone(),
                        old: old.cloned(),
                        new: new.cloned(),
                    }),
                }
                path.pop();
            }
        }
        (x, y) if same(x, y) => {}
        (x, y) => leaf(path, Some(x), Some(y)),
    }
}

/// Equality of JSON values: numbers by value (`1` and `1.0`), objects without
/// regard to order.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            x == y || (x.is_f64() || y.is_f64()) && x.as_f64().is_some() && x.as_f64() == y.as_f64()
        }
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(k, v)| y.get(k).is_some_and(|w| same(v, w)))
        }
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(p, q)| same(p, q))
        }
        (x, y) => x == y,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titles(a: &str, b: &str) -> Vec<String> {
        let parse = |t: &str| serde_json::from_str::<Value>(t).expect("the test's JSON");
        let found = compare(&parse(a), &parse(b));
        found.into_iter().map(|c| c.title).collect()
    }

    #[test]
    fn order_layout_and_spelling_of_numbers_say_nothing() {
        let a = r#"{"a": 1, "b": {"c": [1, 2.0], "d": null}}"#;
        let b = r#"{"b":{"d":null,"c":[1.0,2]},"a":1.0}"#;
        assert_eq!(titles(a, b), [""; 0]);
        assert_eq!(titles("9007199254740993", "9007199254740992").len(), 1);
        assert_eq!(titles("1", "true").len(), 1);
        assert_eq!(titles("0.1", "0.10000001").len(), 1);
    }

    #[test]
    fn every_difference_is_found_at_its_key() {
        let a = r#"{"size": {"h": 336}, "mean": [0.1, 0.2, 0.3], "gone": true, "x y": 1}"#;
        let b = r#"{"size": {"h": 224}, "mean": [0.1, 0.25, 0.2, 0.3], "new": [], "x y": "1"}"#;
        assert_eq!(
            titles(a, b),
            [
                "'size.h': 336 → 224",
                "'mean[1]' added: 0.25",
                "'gone' removed: true",
                "'\"x y\"': 1 → \"1\"",
                "'new' added: []",
            ]
        );
    }

    #[test]
    fn a_changed_vocabulary_is_one_change() {
        let table = |shift: usize| {
            let all = (0..3000).map(|i| format!("\"t{i}\": {}", i + shift));
            format!(
                "{{\"model\": {{\"vocab\": {{{}}}}}}}",
                all.collect::<Vec<_>>().join(",")
            )
        };
        let parse = |t: String| serde_json::from_str::<Value>(&t).expect("the test's JSON");
        let found = super::super::change::group(compare(&parse(table(0)), &parse(table(1))));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].title, "entries of 'model.vocab' changed");
        assert_eq!(found[0].places.len(), 3000);
    }
}
