//! Cache inputs and outputs by layer number.

use std::collections::BTreeMap;

use crate::ir::{Model, ValueId, cache_name};

/// Key and value tensors of each layer, whatever order the interface has.
pub(in crate::arch) struct Caches {
    pub(super) present: BTreeMap<usize, (ValueId, ValueId)>,
    pub(super) past: BTreeMap<usize, (ValueId, ValueId)>,
}

impl Caches {
    pub(super) fn of(model: &Model) -> Self {
        let graph = model.graph();
        let pairs = |values: &[ValueId], what: &str| {
            let (mut keys, mut others) = (BTreeMap::new(), BTreeMap::new());
            for &value in values {
                if let Some((layer, is_key)) = cache_name(model.name(value), what) {
                    let map = if is_key { &mut keys } else { &mut others };
                    map.insert(layer, value);
                }
            }
            keys.into_iter()
                .filter_map(|(layer, key)| Some((layer, (key, *others.get(&layer)?))))
                .collect()
        };
        Self {
            present: pairs(&graph.outputs, "present"),
            past: pairs(&graph.inputs, "past"),
        }
    }

    /// Whether an input is part of a cache.
    pub(in crate::arch) fn takes(name: &str) -> bool {
        cache_name(name, "past").is_some()
    }

    /// Whether an output is part of a cache.
    pub(super) fn holds(name: &str) -> bool {
        cache_name(name, "present").is_some()
    }
}
