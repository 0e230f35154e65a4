//! Cache inputs and outputs by layer number.

use std::collections::BTreeMap;

use crate::ir::{Model, ValueId};

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

/// (layer, is key) of a cache name such as `present.3.key`,
/// `past_key_values.3.value` or `past_key_3`.
fn cache_name(name: &str, what: &str) -> Option<(usize, bool)> {
    let rest = name.strip_prefix(what)?;
    let digits: String = rest
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    let layer = digits.parse().ok()?;
    // `past_key_values` holds both words: the layer's own word comes last.
    let own = rest.replace("key_values", "");
    match (own.contains("key"), own.contains("value")) {
        (true, false) => Some((layer, true)),
        (false, true) => Some((layer, false)),
        _ => None,
    }
}
