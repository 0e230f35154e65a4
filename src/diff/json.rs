//! JSON configs, key by key: the order of keys and the layout say nothing.

use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value};

use super::DiffError;
use super::change::short;
use super::report::{Change, Class, Kind, Place, Spot};

/// More changes below one key than this are told as one.
const SPELLED_OUT: usize = 24;

/// Changes between two files; or why one of them cannot be compared by key.
pub(super) fn files(a: &Path, b: &Path) -> Result<Result<Vec<Change>, String>, DiffError> {
    let read = |path: &Path| std::fs::read(path).map_err(DiffError::io(path));
    Ok(texts(&read(a)?, &read(b)?))
}

fn texts(a: &[u8], b: &[u8]) -> Result<Vec<Change>, String> {
    // Integers beyond 64 bits would be rounded. They are held as strings that start
    // with a mark that neither text can contain.
    let mark = blake3::hash(&[a, b].concat()).to_hex().to_string();
    let parse = |text: &[u8], which: &str| {
        // As it is first: what the marks repair was no JSON.
        let plain = serde_json::from_slice::<Unique>(text);
        let plain = plain.map_err(|reason| format!("the {which} one is no JSON: {reason}"))?;
        let marked = marked(text, &mark);
        Ok::<Value, String>(match serde_json::from_slice::<Unique>(&marked) {
            Ok(value) => value.0,
            Err(_) => plain.0,
        })
    };
    Ok(compare(&parse(a, "old")?, &parse(b, "new")?, &mark))
}

/// A value's text without the marks in it.
fn shown(value: &Value, mark: &str) -> String {
    let mut text = value.to_string();
    let opening = format!("\"{mark}");
    while let Some(at) = text.find(&opening).filter(|_| !mark.is_empty()) {
        let from = at + opening.len();
        let end = text[from..].find('"').map_or(text.len(), |n| from + n);
        let number = text[from..end].to_owned();
        text.replace_range(at..(end + 1).min(text.len()), &number);
    }
    text
}

/// The text with integers that no 64 bits hold as strings behind a mark.
fn marked(text: &[u8], mark: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let length = match rest[0] {
            b'"' => {
                let mut end = 1;
                while end < rest.len() && rest[end] != b'"' {
                    end += if rest[end] == b'\\' { 2 } else { 1 };
                }
                (end + 1).min(rest.len())
            }
            b'-' | b'0'..=b'9' => {
                let part = |c: &u8| c.is_ascii_digit() || b"+-.eE".contains(c);
                rest.iter().take_while(|c| part(c)).count()
            }
            _ => 1,
        };
        let token = &rest[..length];
        let literal = std::str::from_utf8(token).unwrap_or_default();
        let whole = token[0] != b'"' && token.iter().any(u8::is_ascii_digit);
        if whole
            && !literal.contains(['.', 'e', 'E'])
            && literal.parse::<i64>().is_err()
            && literal.parse::<u64>().is_err()
        {
            out.extend_from_slice(format!("\"{mark}{literal}\"").as_bytes());
        } else {
            out.extend_from_slice(token);
        }
        at += length;
    }
    out
}

/// A value in which no object has a key twice: readers differ in which one counts.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut all = serde_json::Map::new();
        while let Some((key, Unique(value))) = entries.next_entry::<String, Unique>()? {
            if all.contains_key(&key) {
                let shown = short(&key);
                return Err(A::Error::custom(format!("key {shown:?} is there twice")));
            }
            all.insert(key, value);
        }
        Ok(Value::Object(all))
    }
}

/// Changes from `a` to `b`, by key; `mark` starts the strings that stand for integers.
fn compare(a: &Value, b: &Value, mark: &str) -> Vec<Change> {
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
                .map(|leaf| leaf.change(many.then_some((&parent, count)), mark)),
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
    fn change(self, many: Option<(&String, usize)>, mark: &str) -> Change {
        let path = text(&self.path);
        let shown = |v: &Option<Value>| v.as_ref().map(|v| shown(v, mark)).unwrap_or_default();
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
            // An integer as the float that it is, not as the nearest one.
            let whole = |int: &Number, float: &Number| {
                let float = float.as_f64().filter(|_| !int.is_f64() && float.is_f64());
                float.is_some_and(|f| f.fract() == 0.0 && int.as_i128() == Some(f as i128))
            };
            x == y || whole(x, y) || whole(y, x)
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
        let found = compare(&parse(a), &parse(b), "");
        found.into_iter().map(|c| c.title).collect()
    }

    #[test]
    fn order_layout_and_spelling_of_numbers_say_nothing() {
        let a = r#"{"a": 1, "b": {"c": [1, 2.0], "d": null}}"#;
        let b = r#"{"b":{"d":null,"c":[1.0,2]},"a":1.0}"#;
        assert_eq!(titles(a, b), [""; 0]);
        assert_eq!(titles("9007199254740993", "9007199254740992").len(), 1);
        assert_eq!(titles("9007199254740993", "9007199254740992.0").len(), 1);
        assert_eq!(titles("-0", "0.0"), [""; 0]);
        assert_eq!(titles("1", "true").len(), 1);
        assert_eq!(titles("0.1", "0.10000001").len(), 1);
    }

    #[test]
    fn integers_are_compared_digit_by_digit() {
        // As tokenizers of Transformers have it.
        let config = |max: &str, other: &str| {
            format!("{{\"model_max_length\": {max}, \"note\": \"x {max}\", \"n\": [{other}]}}")
        };
        let max = "1000000000000000019884624838656";
        let a = config(max, "-99999999999999999999");
        let same = config(max, "-99999999999999999999 ");
        assert_eq!(texts(a.as_bytes(), same.as_bytes()), Ok(Vec::new()));
        let b = config(
            "1000000000000000019884624838657",
            "-99999999999999999998, 1e30",
        );
        let found = texts(a.as_bytes(), b.as_bytes()).expect("JSON");
        let found: Vec<String> = found.into_iter().map(|c| c.title).collect();
        assert_eq!(
            found,
            [
                format!("'model_max_length': {max} → 1000000000000000019884624838657"),
                format!("'note': \"x {max}\" → \"x 1000000000000000019884624838657\""),
                "'n[0]': -99999999999999999999 → -99999999999999999998".into(),
                "'n[1]' added: 1e+30".into(),
            ]
        );
    }

    #[test]
    fn what_cannot_be_compared_by_key_says_why() {
        for (b, why) in [
            (&b"{\"a\": NaN}"[..], "the new one is no JSON"),
            (b"{\"a\": -Infinity}", "the new one is no JSON"),
            (
                b"{\"a\": [{\"b\": 1, \"b\": 2}]}",
                "key \"b\" is there twice",
            ),
        ] {
            let reason = texts(b"{\"a\": 1}", b).expect_err("no plain JSON");
            assert!(reason.contains(why), "{reason}");
        }
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
        let found = super::super::change::group(compare(&parse(table(0)), &parse(table(1)), ""));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].title, "entries of 'model.vocab' changed");
        assert_eq!(found[0].places.len(), 3000);
    }
}
