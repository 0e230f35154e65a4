//! The token embedding: ids in, rows of a table out.

use super::NoMatch;
use crate::ir::{DataType, Model, ValueId};

/// A graph that turns token ids into embeddings.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `[batch, sequence]` token ids.
    pub ids: ValueId,
    /// `[batch, sequence, width]` embeddings.
    pub output: ValueId,
    /// Element type of the embeddings.
    pub dtype: DataType,
    /// Width, if the file states it.
    pub width: Option<i64>,
}

impl Embedding {
    /// Recognises a graph with one integer input and one floating-point output
    /// that comes from a table look-up.
    ///
    /// # Errors
    /// What did not fit.
    pub fn recognise(model: &Model) -> Result<Self, NoMatch> {
        let want = "a token embedding (integer ids in, one floating-point tensor out)";
        let graph = model.graph();
        let inputs: Vec<ValueId> = graph
            .inputs
            .iter()
            .copied()
            .filter(|&v| model.value(v).initializer.is_none())
            .collect();
        let ([ids], [output]) = (inputs.as_slice(), graph.outputs.as_slice()) else {
            let found = format!(
                "{} inputs and {} outputs",
                inputs.len(),
                graph.outputs.len()
            );
            return Err(NoMatch::new(want, found));
        };
        let ty = |v: ValueId| model.value(v).ty.as_ref().and_then(|t| t.dtype());
        if !matches!(ty(*ids), Some(DataType::Int64 | DataType::Int32)) {
            return Err(NoMatch::new(
                want,
                format!("input '{}' is no integer tensor", model.name(*ids)),
            ));
        }
        let Some(dtype) = ty(*output).filter(|t| t.is_float()) else {
            let name = model.name(*output);
            return Err(NoMatch::new(
                want,
                format!("output '{name}' is no floating-point tensor"),
            ));
        };
        let looks_up = graph.nodes.iter().any(|&n| {
            let node = model.node(n);
            node.op_type == "Gather" || node.op_type == "GatherBlockQuantized"
        });
        if !looks_up {
            return Err(NoMatch::new(want, "no Gather in the graph"));
        }
        let shape = model.value(*output).ty.as_ref().and_then(|t| t.shape());
        Ok(Self {
            ids: *ids,
            output: *output,
            dtype,
            width: shape.and_then(|s| s.last()).and_then(crate::ir::Dim::known),
        })
    }
}
