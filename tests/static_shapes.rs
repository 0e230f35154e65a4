//! `duet rewrite --static`: every size in every graph is a number, and what comes out is what the rewritten model of
//! open shapes gives.

#[macro_use]
mod support;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::loose;
use duet_onnx::passes::{FixedShapes, rewrite_fixed};

use support::models::{fixture, recipe, recipe_text};

const MERGE: &str = "{dominant: 24, contextual: 6}";
const FALL: &str = "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 6, keep: 0.0}]}";

fn fixed(base: &Vlm, text: &str, shapes: &str) -> Vlm {
    let shapes: FixedShapes = shapes.parse().unwrap();
    let done = rewrite_fixed(base.clone(), &recipe(text), &shapes);
    done.unwrap_or_else(|e| panic!("{e} with\n{text}")).vlm
}

#[test]
fn every_size_is_a_number() {
    for name in support::models::FIXTURES {
        if name == "demo" { continue; }
        let text = recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], "");
        let vlm = fixed(&fixture(name), &text, "prompt=20,answer=8");
        for part in &vlm.parts {
            let kind = match &part.role { Role::Decoder(_) => "decoder", _ => "" };
            let nodes = part.model.graph().nodes.len();
            let open: Vec<String> = loose(&part.model).iter().map(ToString::to_string).collect();
            println!("{name} {} {kind} {nodes} nodes", part.file.display());
            assert!(open.is_empty(), "{name} {}: {open:#?}", part.label());
        }
    }
}

use support::conversation::{apart, hold};
use support::models::{Runner, rewritten, runtime, sizes};
use duet_onnx::validate::scenario::{Scenario, Seeded, Turn};

#[test]
fn answers_are_those_of_open_shapes() {
    runtime();
    for name in ["ts-eager-mha", "ts-sdpa-gqa", "dynamo18-gqa", "dynamo23-mha"] {
        let base = fixture(name);
        let text = recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], "");
        let open = Runner::open(&rewritten(&base, &text));
        let vlm = fixed(&base, &text, "prompt=20,answer=8");
        let closed = Runner::open(&vlm);
        let (size, width) = sizes(&base);
        let vocabulary = 90;
        for (before, after) in [(4, 16), (3, 9)] {
            let mut rng = Seeded::new(3);
            let turn = Turn { rows: vec![vec![rng.ids(before, vocabulary), rng.ids(after, vocabulary)]] };
            let scenario = Scenario { name: "x", turns: vec![turn], decode: 5 };
            let a = hold(&open, &scenario, size, width);
            let b = hold(&closed, &scenario, size, width);
            println!("{name} {before}+{after}: {:e} {:?}", apart(&a, &b), b.steps[0].lengths);
        }
    }
}
