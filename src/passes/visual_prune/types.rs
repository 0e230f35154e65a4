//! What a rewritten decoder states about its lengths.

use std::collections::HashSet;

use super::stage::{Plan, Stage};
use crate::ir::{Dim, Patch, ValueId, ValueType};

/// Name of the length of past and new tokens, where a file has none for it.
const TOTAL_LENGTH: &str = "total_sequence_length";

impl Plan<'_, '_> {
    /// What a graph that takes a past says to be as long as the new tokens, and is
    /// longer: mask and caches of the first `layers` layers. Merged exports state
    /// the lengths of their branch without a past for both. A runtime that plans
    /// buffers by named lengths gets by with that in one graph and fails in
    /// another, with more nodes to share buffers between.
    fn misnamed(&self, layers: usize) -> Vec<ValueId> {
        let decoder = self.decoder;
        let dim = |v: ValueId, axis: usize| {
            let shape = self.model.value(v).ty.as_ref()?.shape()?;
            shape.get(axis).filter(|d| matches!(d, Dim::Param(_)))
        };
        let Some(new) = dim(decoder.embeds, 1) else {
            return Vec::new();
        };
        let first = &decoder.layers[..layers];
        if first.iter().any(|l| l.past.is_none()) {
            return Vec::new();
        }
        let caches = first.iter().filter_map(|l| l.present);
        let caches = caches.flat_map(|(key, value)| [(key, 2), (value, 2)]);
        let mask = decoder.attention_mask.map(|m| (m, 1));
        let all = caches.chain(mask);
        all.filter(|(v, axis)| dim(*v, *axis) == Some(new))
            .map(|(v, _)| v)
            .collect()
    }

    /// Brings stated types up to date.
    pub(super) fn types(&mut self, stages: &[Stage]) {
        let model = self.model;
        let Some(behind) = self.cuts.behind.first() else {
            return;
        };
        let outputs: HashSet<ValueId> = model.graph().outputs.iter().copied().collect();
        for &value in behind {
            if model.value(value).ty.is_some() && !outputs.contains(&value) {
                self.patch.forget_type(value);
            }
        }
        let rename = |patch: &mut Patch<'_>, value: ValueId, axis: usize, name: String| {
            if let Some(ValueType::Tensor {
                dtype,
                shape: Some(dims),
            }) = &model.value(value).ty
                && axis < dims.len()
                // (Logits of the last row only stay one row.)
                && !matches!(dims[axis], Dim::Known(_))
            {
                let mut dims = dims.clone();
                dims[axis] = Dim::param(name);
                patch.set_type(value, ValueType::tensor(*dtype, dims));
            }
        };
        for value in self.misnamed(stages.get(1).map_or(self.decoder.depth(), |s| s.first)) {
            let axis = if Some(value) == self.decoder.attention_mask {
                1
            } else {
                2
            };
            rename(self.patch, value, axis, TOTAL_LENGTH.to_owned());
        }
        for (number, stage) in stages.iter().enumerate().skip(1) {
            let label = &stage.label;
            for layer in &self.decoder.layers[self.span(number)] {
                for value in layer.past.into_iter().flat_map(|(k, v)| [k, v]) {
                    rename(
                        self.patch,
                        value,
                        2,
                        format!("past_sequence_length_{label}"),
                    );
                }
                for value in layer.present.into_iter().flat_map(|(k, v)| [k, v]) {
                    rename(
                        self.patch,
                        value,
                        2,
                        format!("total_sequence_length_{label}"),
                    );
                }
            }
        }
        let last = &stages[stages.len() - 1].label;
        if behind.contains(&self.decoder.logits) {
            rename(
                self.patch,
                self.decoder.logits,
                1,
                format!("sequence_length_{last}"),
            );
        }
    }
}
