//! Attribute defaults of ONNX's operators, by version.
//!
//! An attribute that one file spells out and another leaves to its default is the
//! same attribute, and one that both leave out is not if its default changed
//! between their operator sets (`Softmax`'s axis at 13). The table is made from the
//! schemas of the onnx package by `models/diff/defaults.py`. Operators of other
//! domains have no defaults here: what they leave out is taken as left out.

use std::collections::HashMap;
use std::sync::OnceLock;

use crate::ir::AttrValue;

const TABLE: &str = include_str!("defaults.txt");

/// A default value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Default {
    Int(i64),
    Float(u32),
    Text(Vec<u8>),
    Ints(Vec<i64>),
    Floats(Vec<u32>),
    Texts(Vec<Vec<u8>>),
}

impl Default {
    /// Whether an attribute has this value.
    pub(super) fn is(&self, value: &AttrValue) -> bool {
        match (self, value) {
            (Self::Int(d), AttrValue::Int(v)) => d == v,
            (Self::Float(d), AttrValue::Float(v)) => *d == v.to_bits(),
            (Self::Text(d), AttrValue::String(v)) => d == v,
            (Self::Ints(d), AttrValue::Ints(v)) => d == v,
            (Self::Floats(d), AttrValue::Floats(v)) => {
                d.len() == v.len() && d.iter().zip(v).all(|(d, v)| *d == v.to_bits())
            }
            (Self::Texts(d), AttrValue::Strings(v)) => {
                d.len() == v.len() && d.iter().zip(v).all(|(d, v)| d == v)
            }
            _ => false,
        }
    }

    /// In words.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Int(v) => v.to_string(),
            Self::Float(v) => format!("{:?}", f32::from_bits(*v)),
            Self::Text(v) => format!("{:?}", String::from_utf8_lossy(v)),
            Self::Ints(v) => format!("{v:?}"),
            Self::Floats(v) => {
                let all: Vec<f32> = v.iter().map(|b| f32::from_bits(*b)).collect();
                format!("{all:?}")
            }
            Self::Texts(v) => {
                let all: Vec<_> = v.iter().map(|s| String::from_utf8_lossy(s)).collect();
                format!("{all:?}")
            }
        }
    }

    fn parse(kind: &str, text: &str) -> Option<Self> {
        let list = || text.split(',').filter(|s| !s.is_empty());
        let bits = |s: &str| u32::from_str_radix(s, 16).ok();
        Some(match kind {
            "i" => Self::Int(text.parse().ok()?),
            "f" => Self::Float(bits(text)?),
            "s" => Self::Text(unquoted(text)?),
            "I" => Self::Ints(list().map(|s| s.parse().ok()).collect::<Option<_>>()?),
            "F" => Self::Floats(list().map(bits).collect::<Option<_>>()?),
            "S" => Self::Texts(list().map(unquoted).collect::<Option<_>>()?),
            _ => return None,
        })
    }
}

fn unquoted(text: &str) -> Option<Vec<u8>> {
    let (mut out, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let hex = [rest.next()?, rest.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?);
        } else {
            out.push(byte);
        }
    }
    Some(out)
}

type Row = (i64, Vec<(&'static str, Default)>);

/// Rows by domain and operator.
type Table = HashMap<&'static str, HashMap<&'static str, Vec<Row>>>;

fn table() -> &'static Table {
    static PARSED: OnceLock<Table> = OnceLock::new();
    PARSED.get_or_init(|| {
        let mut all = Table::new();
        for line in TABLE.lines().filter(|l| !l.starts_with('#')) {
            let mut words = line.split(' ');
            let (Some(domain), Some(op), Some(since)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let domain = if domain == "-" { "" } else { domain };
            let stated = words.filter_map(|word| {
                let (name, value) = word.split_once('=')?;
                let (kind, value) = value.split_once(':')?;
                Some((name, Default::parse(kind, value)?))
            });
            let row = (since.parse().unwrap_or(1), stated.collect());
            all.entry(domain)
                .or_default()
                .entry(op)
                .or_default()
                .push(row);
        }
        all
    })
}

/// The defaults of an operator in a version of its operator set.
pub(super) fn of(domain: &str, op: &str, version: i64) -> &'static [(&'static str, Default)] {
    let rows = table().get(domain).and_then(|t| t.get(op));
    let row = rows.and_then(|r| r.iter().rev().find(|(since, _)| *since <= version));
    row.map_or(&[], |(_, defaults)| defaults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_and_follows_versions() {
        let axis = |version| of("", "Softmax", version).to_vec();
        assert_eq!(axis(12), [("axis", Default::Int(1))]);
        assert_eq!(axis(13), [("axis", Default::Int(-1))]);
        assert_eq!(axis(23), axis(13));
        assert_eq!(of("", "NoSuchOp", 17), []);
        assert_eq!(of("com.microsoft", "Softmax", 17), []);
        let lines = TABLE.lines().filter(|l| !l.starts_with('#'));
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let domain = if words[0] == "-" { "" } else { words[0] };
            let found = of(domain, words[1], words[2].parse().expect("a version"));
            assert_eq!(found.len(), words.len() - 3, "{line}");
        }
    }
}
