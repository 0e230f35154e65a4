//! What the ranking at a drop point computes of the next layer is not computed again.

mod support;

use std::collections::BTreeMap;

use duet_onnx::ir::Model;

use support::models::{FIXTURES, fixture, recipe_text, rewritten};

/// How many nodes read each matrix of weights.
fn readers(model: &Model) -> BTreeMap<String, usize> {
    let values = model.graph().initializers.iter().map(|v| model.value(*v));
    let matrix = |dims: &[i64]| dims.len() == 2 && dims.iter().all(|d| *d > 8);
    let matrices = values.filter(|v| v.initializer.as_ref().is_some_and(|t| matrix(&t.dims)));
    matrices.map(|v| (v.name.clone(), v.uses.len())).collect()
}

/// Ranked drops clone the projections of queries and keys; where the layer's own stayed beside them, their weights
/// would be read twice, also in every decode step.
#[test]
fn no_weight_is_read_twice() {
    let drops = "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 6, keep: 0.25}]}";
    for settings in ["", ", positions: keep"] {
        let text = recipe_text(
            &[
                ("token_merge", "{dominant: 24, contextual: 6}"),
                (
                    "visual_prune",
                    &drops.replace("]}", &format!("]{settings}}}")),
                ),
            ],
            "",
        );
        for name in FIXTURES {
            let base = fixture(name);
            let changed = rewritten(&base, &text);
            let mut matrices = 0;
            for (old, new) in base.parts.iter().zip(&changed.parts) {
                let old = readers(&old.model);
                for (weight, readers) in readers(&new.model) {
                    if weight.starts_with("duet/") {
                        continue;
                    }
                    matrices += 1;
                    assert_eq!(
                        old.get(&weight),
                        Some(&readers),
                        "{name}: readers of {weight}"
                    );
                }
            }
            assert!(matrices > 50, "{name}: only {matrices} matrices");
        }
    }
}
