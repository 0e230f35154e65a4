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

#[test]
fn sweep() {
    runtime();
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut pass: Vec<(&str, String)> = Vec::new();
    let full = |kv: &str| recipe_text(&[("token_merge", MERGE), ("visual_prune", FALL)], kv);
    pass.push(("both", full("")));
    pass.push(("placed", recipe_text(&[("token_merge", "{dominant: 24, contextual: 6, cls: drop, placement: decoder}"), ("visual_prune", FALL)], "")));
    pass.push(("keep", recipe_text(&[("token_merge", MERGE), ("visual_prune", "{drops: [{after_layer: 1, keep: 0.6}, {after_layer: 5, keep: 0.29}], positions: keep}")], "")));
    for form in support::forms::all() {
        if !form.name.contains(&only) { continue; }
        let base = support::models::parts_at(&form.directory());
        for (what, text) in &pass {
            let shapes: FixedShapes = "prompt=20,answer=8".parse().unwrap();
            let dynamic = match duet_onnx::passes::rewrite(base.clone(), &recipe(text)) { Ok(d) => d.vlm, Err(e) => { println!("{} {what}: dynamic {}", form.name, e.to_string().lines().next().unwrap()); continue } };
            let vlm = match rewrite_fixed(base.clone(), &recipe(text), &shapes) { Ok(d) => d.vlm, Err(e) => { println!("{} {what}: REFUSED {}", form.name, e.to_string().lines().next().unwrap()); continue } };
            let open: Vec<String> = vlm.parts.iter().filter(|p| !matches!(p.role, Role::Unknown(_))).flat_map(|p| loose(&p.model)).map(|o| o.to_string()).collect();
            if !open.is_empty() { println!("{} {what}: LOOSE {:?}", form.name, &open[..open.len().min(3)]); }
            let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let a = Runner::open(&dynamic);
                let b = Runner::open(&vlm);
                let (size, width) = sizes(&base);
                let mut rng = Seeded::new(3);
                let mut out = Vec::new();
                for (before, after) in [(4, 16), (3, 9)] {
                    let turn = Turn { rows: vec![vec![rng.ids(before, 90), rng.ids(after, 90)]] };
                    let scenario = Scenario { name: "x", turns: vec![turn], decode: 5 };
                    let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| apart(&hold(&a, &scenario, size, width), &hold(&b, &scenario, size, width))));
                    out.push(r.map_err(|e| e.downcast_ref::<String>().cloned().unwrap_or_default()));
                }
                out
            }));
            println!("{} {what}: {:?}", form.name, run.map_err(|e| e.downcast_ref::<String>().cloned().unwrap_or_default()));
        }
    }
}
