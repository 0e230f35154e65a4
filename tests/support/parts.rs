//! Parts cut out of rewritten fixtures, fed with random tensors and run by both engines.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{DataType, Dim, Model, ValueId, ValueType, extract, verify};
use duet_onnx::onnx::serialize;
use duet_onnx::runtime::{DType, Tensor, Value, tract};
use duet_onnx::validate::scenario::Seeded;
use ndarray::{Array2, Array3, Array4};
use proptest::prelude::*;

use super::models::{fixture, open};

/// Largest allowed difference of values, relative to their size where that is above one.
const CLOSE: f32 = 1e-5;

/// Scores this close to each other, relative to their size, and not equal are not told apart.
pub(crate) const APART: f32 = 4e-6;

/// Where scores are equal.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ties {
    /// Nowhere: keys and queries are noise.
    None,
    /// Between many tokens: every key is one of a few, each with a single 1 or −1.
    FewKeys,
    /// Everywhere: all keys are one.
    OneKey,
    /// Everywhere: queries are zero. Keys are noise.
    NoQuery,
}

pub(crate) fn ties() -> impl Strategy<Value = Ties> {
    prop_oneof![
        2 => Just(Ties::None),
        3 => Just(Ties::FewKeys),
        1 => Just(Ties::OneKey),
        1 => Just(Ties::NoQuery),
    ]
}

impl Ties {
    /// Queries and keys `[rows, heads, tokens, head_dim]`.
    pub(crate) fn projections(
        self,
        rng: &mut Seeded,
        (rows, heads, key_heads, tokens, head_dim): (usize, usize, usize, usize, usize),
    ) -> (Array4<f32>, Array4<f32>) {
        let zero = matches!(self, Self::NoQuery);
        let query = Array4::from_shape_fn((rows, heads, tokens, head_dim), |_| {
            if zero { 0.0 } else { rng.normal() * 1.5 }
        });
        let kinds = match self {
            Self::None | Self::NoQuery => 0,
            Self::FewKeys => 2 * head_dim as u64,
            Self::OneKey => 1,
        };
        let key = if kinds == 0 {
            Array4::from_shape_fn((rows, key_heads, tokens, head_dim), |_| rng.normal() * 1.5)
        } else {
            let kind = Array2::from_shape_fn((rows, tokens), |_| (rng.bits() % kinds) as usize);
            Array4::from_shape_fn((rows, key_heads, tokens, head_dim), |(r, _, t, d)| {
                let kind = kind[[r, t]];
                match (kind / 2 == d, kind % 2 == 0) {
                    (true, true) => 1.0,
                    (true, false) => -1.0,
                    _ => 0.0,
                }
            })
        };
        (query, key)
    }
}

/// `[rows, heads, tokens, head_dim]` as projections give it: `[rows, tokens, heads · head_dim]`.
pub(crate) fn joined(x: &Array4<f32>) -> Array3<f32> {
    let (rows, heads, tokens, head_dim) = x.dim();
    let moved = x
        .view()
        .permuted_axes([0, 2, 1, 3])
        .as_standard_layout()
        .into_owned();
    let joined = moved.into_shape_with_order((rows, tokens, heads * head_dim));
    joined.expect("as many elements as before")
}

/// One part of a fixture on its own: what a pass needs of it, read once for each test thread.
pub(crate) fn part(name: &'static str, keep: fn(&Role) -> bool, kind: &'static str) -> Vlm {
    thread_local! {
        static READ: RefCell<HashMap<(&'static str, &'static str), Vlm>> = RefCell::default();
    }
    READ.with_borrow_mut(|read| {
        let entry = read.entry((name, kind)).or_insert_with(|| {
            let mut vlm = fixture(name);
            vlm.parts.retain(|part| keep(&part.role));
            vlm
        });
        entry.clone()
    })
}

/// A value by name with what may be said of its type.
pub(crate) fn border(
    model: &Model,
    name: &str,
    dtype: DataType,
    rank: usize,
) -> (ValueId, ValueType) {
    let value = model
        .find(name)
        .unwrap_or_else(|| panic!("no value '{name}'"));
    (value, ValueType::tensor(dtype, vec![Dim::Unknown; rank]))
}

/// What the wanted values depend on, not looking behind the given ones.
pub(crate) fn needed(model: &Model, given: &[ValueId], wanted: &[ValueId]) -> HashSet<ValueId> {
    let mut seen = HashSet::new();
    let mut stack = wanted.to_vec();
    while let Some(value) = stack.pop() {
        if !seen.insert(value) || given.contains(&value) {
            continue;
        }
        if let Some(node) = model.producer_node(value) {
            stack.extend(node.inputs.iter().flatten());
        }
    }
    seen
}

/// What an engine gave, by name.
pub(crate) type Given = HashMap<String, Tensor>;

/// Cuts the part between the inputs and the outputs out and runs it with both engines. Inputs that it
/// does not need are left out.
pub(crate) fn run_part(
    model: &Model,
    inputs: Vec<(&str, Tensor)>,
    outputs: &[(ValueId, ValueType)],
) -> Result<[(&'static str, Given); 2], TestCaseError> {
    let dtype = |tensor: &Tensor| match tensor.dtype() {
        DType::I64 => DataType::Int64,
        DType::Bool => DataType::Bool,
        _ => DataType::Float,
    };
    let wanted: Vec<ValueId> = outputs.iter().map(|(v, _)| *v).collect();
    let all: Vec<ValueId> = inputs
        .iter()
        .filter_map(|(name, _)| model.find(name))
        .collect();
    let needed = needed(model, &all, &wanted);
    let inputs: Vec<(&str, Tensor)> = inputs
        .into_iter()
        .filter(|(name, _)| model.find(name).is_some_and(|v| needed.contains(&v)))
        .collect();
    let borders: Vec<(ValueId, ValueType)> = inputs
        .iter()
        .map(|(name, t)| border(model, name, dtype(t), t.shape().len()))
        .collect();
    let fail = |e: &dyn std::fmt::Display| TestCaseError::fail(e.to_string());
    let cut = extract(model, &borders, outputs).map_err(|e| fail(&e))?;
    let mut session = open(&cut, Path::new("a part"));
    let values: Vec<(&str, Value)> = inputs
        .iter()
        .map(|(name, tensor)| (*name, Value::new(tensor.clone()).expect("a value")))
        .collect();
    let feed: Vec<(&str, &Value)> = values.iter().map(|(name, value)| (*name, value)).collect();
    let first = session.run(&feed).map_err(|e| fail(&e))?;
    let first = first
        .iter()
        .map(|(name, v)| (name.to_owned(), v.to_tensor().expect("a tensor")));
    let bytes = serialize(verify(&cut).map_err(|e| fail(&e))?).to_vec();
    let second = tract::run_once(&bytes, &inputs).map_err(|e| fail(&e))?;
    Ok([
        ("ONNX Runtime", first.collect()),
        ("tract", second.into_iter().collect()),
    ])
}

/// Whether single precision tells these scores apart wherever they are not equal.
pub(crate) fn told_apart(scores: &[f32]) -> bool {
    let mut sorted = scores.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted
        .windows(2)
        .all(|pair| pair[0] == pair[1] || pair[1] - pair[0] > APART * pair[1].abs())
}

pub(crate) fn close(want: &[f32], found: &[f32]) -> bool {
    want.len() == found.len()
        && want
            .iter()
            .zip(found)
            .all(|(a, b)| (a - b).abs() <= CLOSE * a.abs().max(1.0))
}

/// Features: `[rows, tokens, width]` of noise.
pub(crate) fn noise(rng: &mut Seeded, dims: (usize, usize, usize)) -> Array3<f32> {
    Array3::from_shape_fn(dims, |_| rng.normal())
}
