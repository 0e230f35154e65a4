//! Token ids to embeddings.

use ndarray::Array2;

use super::error::{Result, RuntimeError};
use super::session::{Port, Session};
use super::tensor::{DType, Tensor};
use super::value::Value;
use super::vision::describe;

/// An open embedding model: a table of tokens that, in ONNX Runtime GenAI's form, also puts image features in
/// their places.
#[derive(Debug)]
pub struct Embedder {
    session: Session,
    ids: Port,
    features: Option<Port>,
}

impl Embedder {
    /// Takes a session over after looking at its interface.
    ///
    /// # Errors
    /// The model needs something else than one input of ids and, at most, one of image features.
    pub fn new(session: Session) -> Result<Self> {
        let whole = |port: &&Port| matches!(port.dtype, Some(DType::I64 | DType::I32));
        let float = |port: &&Port| port.dtype.is_some_and(DType::is_float);
        let inputs = session.inputs();
        let (ids, features) = (inputs.iter().find(whole), inputs.iter().find(float));
        match (ids.cloned(), features.cloned(), inputs.len()) {
            (Some(ids), None, 1) => Ok(Self {
                ids,
                features: None,
                session,
            }),
            (Some(ids), Some(features), 2) => Ok(Self {
                ids,
                features: Some(features),
                session,
            }),
            _ => Err(RuntimeError::Interface {
                model: session.model().to_string(),
                expected:
                    "an embedding model with an input input_ids int64[batch, tokens] and, at most, \
                           one of image features"
                        .into(),
                found: describe(inputs),
            }),
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// True if the model puts image features in their places itself, so that they are given to
    /// [`run_with`](Self::run_with) and not to [`scatter`](super::scatter).
    pub fn takes_features(&self) -> bool {
        self.features.is_some()
    }

    /// Embeddings of ids `[batch, tokens]`: `[batch, tokens, width]`.
    ///
    /// # Errors
    /// An id is outside the table, or the run fails.
    pub fn run(&mut self, ids: Array2<i64>) -> Result<Value> {
        self.run_with(ids, &[])
    }

    /// Embeddings of ids `[batch, tokens]` with the features of the images, `[rows, width]` each, in the places
    /// of the image token: `[batch, tokens, width]`.
    ///
    /// # Errors
    /// The model takes no features; those of several images differ in number where the model wants them in one
    /// tensor; an id is outside the table, or the run fails.
    pub fn run_with(&mut self, ids: Array2<i64>, features: &[Tensor]) -> Result<Value> {
        let fixed = |axis: usize| self.ids.dims.get(axis).and_then(|dim| dim.fixed());
        if let (None, Some(rows), Some(tokens)) = (&self.features, fixed(0), fixed(1))
            && ids.nrows() == rows
            && ids.ncols() != tokens
        {
            return self.run_fixed(&ids, tokens);
        }
        let ids: Tensor = match self.ids.dtype {
            Some(DType::I32) => ids.map(|id| i32::try_from(*id).unwrap_or(i32::MAX)).into(),
            _ => ids.into(),
        };
        let ids = Value::new(ids)?;
        let outputs = match &self.features {
            Some(port) => {
                let all = Value::new(together(port, &self.session, features)?)?;
                let feed = [(self.ids.name.as_str(), &ids), (port.name.as_str(), &all)];
                self.session.run(&feed)?
            }
            None if features.is_empty() => self.session.run(&[(&self.ids.name, &ids)])?,
            None => {
                return Err(RuntimeError::Interface {
                    model: self.session.model().to_string(),
                    expected: "an embedding model that takes image features".into(),
                    found: describe(self.session.inputs()),
                });
            }
        };
        outputs.first().cloned()
    }

    /// Embeddings of any number of tokens by a graph that takes `tokens` of them: in parts, the last one filled up
    /// with the first token of the table.
    fn run_fixed(&mut self, ids: &Array2<i64>, tokens: usize) -> Result<Value> {
        let (rows, all) = ids.dim();
        let mut parts = Vec::new();
        for from in (0..all).step_by(tokens.max(1)) {
            let part = Array2::from_shape_fn((rows, tokens), |(row, at)| {
                ids.get((row, from + at)).copied().unwrap_or(0)
            });
            parts.push(self.run_with(part, &[])?.to_tensor()?);
        }
        let width = parts[0].shape()[2];
        let (dtype, mut data) = (parts[0].dtype(), Vec::with_capacity(rows * all * width));
        let numbers: Vec<_> = parts.iter().map(Tensor::f32s).collect::<Result<_>>()?;
        for row in 0..rows {
            for at in 0..all {
                let start = (row * tokens + at % tokens) * width;
                data.extend_from_slice(&numbers[at / tokens][start..start + width]);
            }
        }
        Value::new(Tensor::new([rows, all, width], data)?.cast_float(dtype)?)
    }

    /// Embeddings of one row of tokens.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_row(&mut self, ids: &[u32]) -> Result<Value> {
        self.run(Array2::from_shape_fn((1, ids.len()), |(_, i)| {
            i64::from(ids[i])
        }))
    }
}

/// The features of all images in the one tensor that an input takes: `[images, rows, width]` or
/// `[rows, width]`; no rows if there is no image.
fn together(port: &Port, session: &Session, features: &[Tensor]) -> Result<Tensor> {
    let wrong = |expected: String, found: String| RuntimeError::Interface {
        model: session.model().to_string(),
        expected,
        found,
    };
    let rank = port.dims.len();
    if !(2..=3).contains(&rank) {
        let expected = "image features [images, rows, width] or [rows, width]";
        return Err(wrong(expected.into(), port.to_string()));
    }
    let dtype = port.dtype.unwrap_or(DType::F32);
    let Some(first) = features.first() else {
        let fixed = |axis: usize| port.dims.get(axis).and_then(|dim| dim.fixed());
        let output = session.outputs().first();
        let width = fixed(rank - 1).or_else(|| output?.dims.last()?.fixed());
        let mut shape = vec![0, fixed(1).unwrap_or(1), width.unwrap_or(1)];
        if rank == 2 {
            shape.remove(1);
        }
        return Tensor::zeros(dtype, shape);
    };
    let rows: usize = features.iter().map(|f| f.shape()[0]).sum();
    let width = first.shape().last().copied().unwrap_or(0);
    let shape = if rank == 3 {
        if features.iter().any(|f| f.shape() != first.shape()) {
            return Err(wrong(
                "images with the same number of features".into(),
                features
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
            ));
        }
        vec![features.len(), first.shape()[0], width]
    } else {
        vec![rows, width]
    };
    let mut data = Vec::with_capacity(rows * width);
    for feature in features {
        data.extend_from_slice(&feature.f32s()?);
    }
    Tensor::new(shape, data)?.cast_float(dtype)
}
