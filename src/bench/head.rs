//! The base's head alone: what turns the last layer's output into logits.
//!
//! A rewritten graph runs its head on fewer rows, so what the head costs must not be counted to the layers. It is cut
//! out of the unmodified graph at the last place that all data passes through before the vocabulary's weight.

use std::path::{Path, PathBuf};

use super::error::{BenchError, Result};
use super::inputs;
use crate::arch::{Decoder, Role, Vlm};
use crate::ir::{DataType, Dim, Model, ValueId, ValueType, extract, verify};
use crate::onnx::{read, serialize};
use crate::random::SplitMix64;
use crate::runtime::{DType, Session, SessionOptions, Value};

/// An open head.
#[derive(Debug)]
pub(super) struct Head {
    session: Session,
    width: usize,
}

impl Head {
    /// Cuts the head out of a decoder's file and opens it.
    pub(super) fn open(path: &Path, options: &SessionOptions) -> Result<Self> {
        let name = path.display().to_string();
        let vlm = Vlm::new(vec![(PathBuf::from(path), String::new(), read(path)?)]);
        let parts = vlm.parts.iter().filter_map(|p| match &p.role {
            Role::Decoder(decoder) => Some((&p.model, decoder.as_ref())),
            _ => None,
        });
        // Of two branches either will do.
        let (model, decoder) = parts.last().ok_or_else(|| {
            BenchError::Input(format!(
                "{name}: no decoder is recognised, so no head is found"
            ))
        })?;
        let (cut, dtype, width) = place(model, decoder).ok_or_else(|| {
            BenchError::Input(format!(
                "{name}: between the last layer and the logits no weight has a side of {} (the vocabulary), so the \
                 head is not told from the layers",
                decoder.vocabulary.unwrap_or(0)
            ))
        })?;
        let open = |dtype: DataType| -> Result<Session> {
            let rows = || ValueType::tensor(dtype, vec![Dim::Unknown; 3]);
            let logits = model.value(decoder.logits).ty.clone();
            let logits = logits.unwrap_or_else(rows);
            let head = extract(model, &[(cut, rows())], &[(decoder.logits, logits)])?;
            let bytes = serialize(verify(&head).map_err(|e| BenchError::Input(e.to_string()))?);
            Ok(Session::from_bytes(
                &bytes.to_vec(),
                &format!("{name} (head)"),
                options,
            )?)
        };
        // Norms of half-precision models may come out in single precision.
        let mut session = open(dtype);
        for other in [DataType::Float, DataType::Float16, DataType::Bfloat16] {
            if session.is_err() && other != dtype {
                session = open(other).or(session);
            }
        }
        Ok(Self {
            session: session?,
            width,
        })
    }

    /// Seconds that it takes for so many rows.
    pub(super) fn run(&mut self, rows: usize, random: &mut SplitMix64) -> Result<f64> {
        let port = &self.session.inputs()[0];
        let (name, dtype) = (port.name.clone(), port.dtype.unwrap_or(DType::F32));
        let hidden = inputs::embeddings(random, rows, self.width, false, dtype)?;
        let hidden = Value::new(hidden)?;
        let before = self.session.spent();
        self.session.run(&[(&name, &hidden)])?;
        Ok((self.session.spent() - before).as_secs_f64())
    }
}

/// The last value that all data passes through before the vocabulary's weight, its type and its width.
fn place(model: &Model, decoder: &Decoder) -> Option<(ValueId, DataType, usize)> {
    let vocabulary = decoder.vocabulary?;
    let single = decoder.residuals.iter().rev().filter(|cut| cut.len() == 1);
    for cut in single.map(|cut| cut[0]).filter(|c| *c != decoder.logits) {
        if let Some((weight, rest)) = weight_behind(model, cut, decoder.logits, vocabulary) {
            let width = decoder.width.filter(|w| *w > 0).or(rest)?;
            let stated = model.value(cut).ty.as_ref().and_then(ValueType::dtype);
            let dtype = stated.unwrap_or(if weight.is_float() {
                weight
            } else {
                decoder.dtype
            });
            return Some((cut, dtype, usize::try_from(width).ok()?));
        }
    }
    None
}

/// The weight with a side of `vocabulary` that is read between two values: its type, and its other side.
fn weight_behind(
    model: &Model,
    from: ValueId,
    to: ValueId,
    vocabulary: i64,
) -> Option<(DataType, Option<i64>)> {
    let (mut stack, mut seen) = (vec![to], std::collections::HashSet::new());
    while let Some(value) = stack.pop() {
        if value == from || !seen.insert(value) {
            continue;
        }
        if let Some(tensor) = &model.value(value).initializer
            && tensor.dims.len() >= 2
            && tensor.dims.contains(&vocabulary)
        {
            let other = tensor.dims.iter().find(|d| **d != vocabulary).copied();
            return Some((tensor.dtype, other.filter(|_| tensor.dims.len() == 2)));
        }
        if let Some(node) = model.producer_node(value) {
            stack.extend(node.inputs.iter().flatten());
        }
    }
    None
}
