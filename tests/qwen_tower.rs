//! Qwen2.5-VL's vision tower: rows of patches in a grid that only the run tells, merged by counts that the graph
//! computes.
//!
//! The goldens (`models/qwen_vl/goldens/merge.json`) were recorded by an independent implementation in PyTorch, whose
//! tower is compared with Transformers' own. One file is asked about grids of many sizes, below and above the budget.

mod support;

use std::path::Path;

use duet_onnx::arch::{Role, VisionTower, Vlm};
use duet_onnx::ir::{Model, Patch};
use duet_onnx::passes::{KEPT_OUTPUT, TokenMerge, merge_budget, rewrite};
use duet_onnx::validate::Finding;

use support::models::{open, parts_at, recipe, rewritten, root};
use support::packed::unpacked;
use support::patches::{as_pytorch_has_it, opened, run};
use support::reports::{failures, validated};

fn fixture(name: &str) -> Vlm {
    parts_at(&unpacked(
        &root().join("models/qwen_vl/fixtures").join(name),
    ))
}

fn tower(vlm: &Vlm) -> (&Model, &VisionTower) {
    match &vlm.parts[0].role {
        Role::Vision(tower) => (&vlm.parts[0].model, tower),
        Role::Unknown(why) => panic!("not recognised: {why:?}"),
        other => panic!("recognised as {}", other.name()),
    }
}

#[test]
fn the_merge_is_what_pytorch_has() {
    let name = "vision-ts-sdpa";
    as_pytorch_has_it(name, &fixture(name), "merge", |_| true);
}

#[test]
fn what_was_recognised_is_said() {
    let vlm = fixture("vision-ts-sdpa");
    let (model, tower) = tower(&vlm);
    let rows = tower.rows.as_ref().expect("rows of patches");
    assert_eq!(rows.per, 4);
    assert_eq!(rows.grid.map(|v| model.name(v)), Some("image_grid_thw"));
    // Blocks 0 and 2 have windows; 1 and 3 do not.
    assert_eq!((tower.layers, rows.windowed, rows.moves.len()), (4, 2, 1));
    assert_eq!(
        (tower.heads, tower.head_dim, tower.width),
        (2, 16, Some(32))
    );
    assert_eq!(
        (tower.feature_width, tower.tokens, tower.cls),
        (Some(32), None, false)
    );
    assert!(tower.open());
}

#[test]
fn every_number_of_tokens_runs() {
    let vlm = fixture("vision-ts-sdpa");
    let mut base = open(&vlm.parts[0].model, Path::new("base"));
    for merge in [
        "{dominant: 6, contextual: 3}",
        "{dominant: 0.4, contextual: 0.2}",
        "{dominant: 0, contextual: 3}",
        "{dominant: 0.0, contextual: 0.3}",
        "{dominant: 4, contextual: 5, selector: uniform}",
        "{dominant: 4, contextual: 2, selector: local}",
        "{dominant: 0, contextual: 0.34, selector: local, cluster_width: 1}",
        "{dominant: 1.0, contextual: 0}",
        "{dominant: 0.1, contextual: 0}",
    ] {
        let text = merge_only(merge);
        let recipe = recipe(&text);
        let pass = recipe.pass::<TokenMerge>().expect("a merge");
        let mut session = opened(&vlm, &text);
        for tokens in 1..=14 {
            let grid = [1, 2, 2 * tokens];
            let found = run(&mut session, &[grid], 3, 96);
            let kept = found.kept.expect("a list of places");
            // The counts of the method, one token where they come to none.
            let counts = merge_budget(pass, tokens, false);
            assert_eq!(
                kept.len() as i64,
                counts.total().max(1),
                "{merge}: {tokens}"
            );
            assert!(
                kept.windows(2).all(|w| w[0] < w[1]),
                "{merge}: {tokens}: {kept:?}"
            );
            assert!(
                kept.iter().all(|k| *k < tokens as usize),
                "{merge}: {tokens}: {kept:?}"
            );
            assert!(
                found.features.iter().all(|x| x.is_finite()),
                "{merge}: {tokens}"
            );
            if kept.len() == tokens as usize {
                let plain = run(&mut base, &[grid], 3, 96);
                let alone = found.anchors.is_empty() || found.dominant.len() == tokens as usize;
                if alone {
                    assert_eq!(plain.features, found.features, "{merge}: {tokens}");
                }
            }
        }
    }
}

/// Tower, embedding and decoder of one model.
fn whole() -> Vlm {
    let mut vlm = fixture("ts-sdpa");
    vlm.parts
        .retain(|part| !matches!(part.role, Role::Vision(_)));
    vlm.parts.extend(fixture("vision-ts-sdpa").parts);
    vlm
}

fn merge_only(merge: &str) -> String {
    format!("version: 1\npasses: [token_merge: {merge}]")
}

#[test]
fn the_tower_alone_validates() {
    let base = fixture("vision-ts-sdpa");
    for merge in [
        "{dominant: 7, contextual: 3}",
        "{dominant: 0.4, contextual: 0.2}",
        "{dominant: 6, contextual: 4, selector: uniform}",
        "{dominant: 5, contextual: 3, selector: local}",
        "{dominant: 0.3, contextual: 0}",
        "{dominant: 40, contextual: 9}",
    ] {
        let text = merge_only(merge);
        let report = validated(&base, &rewritten(&base, &text), &text, 5);
        assert!(report.passed(), "{merge}: {:#?}", failures(&report));
        assert!(
            report.findings.iter().any(|f| f.check.contains("tract")),
            "{merge}"
        );
    }
}

#[test]
fn the_whole_model_validates() {
    let base = whole();
    let prune =
        "visual_prune: {drops: [{after_layer: 1, keep: 0.6}, {after_layer: 3, keep: 0.25}]}";
    for (merge, more) in [
        ("{dominant: 7, contextual: 3, placement: encoder}", ""),
        (
            "{dominant: 0.4, contextual: 0.2, placement: encoder}",
            prune,
        ),
        ("{dominant: 7, contextual: 3}", prune),
        ("{dominant: 5, contextual: 2, selector: local}", ""),
    ] {
        let text = format!("version: 1\npasses: [token_merge: {merge}, {more}]");
        let text = text.replace(", ]", "]");
        let report = validated(&base, &rewritten(&base, &text), &text, 5);
        assert!(report.passed(), "{text}: {:#?}", failures(&report));
        assert!(report.findings.len() > 12, "{text}: {report:?}");
    }
}

/// A change to what was recognised.
type Break = fn(&mut VisionTower);

/// A tower that was recognised wrongly gives another model, and the validation says so.
#[test]
fn what_is_recognised_wrongly_fails() {
    let base = fixture("vision-ts-sdpa");
    let text = merge_only("{dominant: 5, contextual: 3}");
    let broken: [(&str, Break); 4] = [
        ("order", |t| t.rows.as_mut().expect("rows").moves.clear()),
        ("mask", |t| t.site.masks.clear()),
        ("scale", |t| t.site.post_scale *= -1.0),
        ("keys", |t| {
            let rows = t.rows.as_mut().expect("rows");
            rows.key = rows.query.clone();
        }),
    ];
    for (what, break_it) in broken {
        let mut other = base.clone();
        let Role::Vision(tower) = &mut other.parts[0].role else {
            panic!("a tower");
        };
        break_it(tower);
        let made = rewritten(&other, &text);
        let report = validated(&base, &made, &text, 5);
        // Beside the structure, which compares bytes, what both compute.
        let numbers = report.findings.iter().filter(|f| f.check.contains("image"));
        assert!(numbers.into_iter().any(|f| !f.passed), "{what}: {report:?}");
    }
}

/// A file that says of other tokens that they came out is another model, too.
#[test]
fn places_that_are_told_wrongly_fail() {
    let base = fixture("vision-ts-sdpa");
    let text = merge_only("{dominant: 5, contextual: 3}");
    let mut made = rewritten(&base, &text);
    let model = &made.parts[0].model;
    let told = model.find(KEPT_OUTPUT).expect("places");
    let last = model.producer_of(told).expect("a node");
    let mut patch = Patch::new(model, "tampered");
    let (places, one) = (model.node(last).input(0).expect("places"), patch.i64(1));
    let next = patch.op("Add", &[places, one]);
    patch.rewire(last, 0, next);
    let plan = patch.finish();
    made.parts[0].model = model.clone().apply(plan).expect("the patch applies");
    let report = validated(&base, &made, &text, 5);
    let told = |f: &Finding| !f.passed && f.detail.contains(KEPT_OUTPUT);
    assert!(report.findings.iter().any(told), "{report:?}");
    assert!(report.worst_features <= 1e-4, "{}", report.worst_features);
}

#[test]
fn the_features_stay_in_their_places_for_the_decoder() {
    let base = whole();
    let text = merge_only("{dominant: 5, contextual: 2}");
    let done = rewritten(&base, &text);
    let at = done.towers().next().expect("a tower").0;
    let mut placed = open(&done.parts[at].model, Path::new("placed"));
    let alone = fixture("vision-ts-sdpa");
    let mut fewer = opened(&alone, &text);
    for grid in [[1, 8, 8], [1, 2, 6], [2, 6, 10]] {
        let (all, few) = (
            run(&mut placed, &[grid], 9, 96),
            run(&mut fewer, &[grid], 9, 96),
        );
        let tokens = usize::try_from(grid.iter().product::<i64>() / 4).expect("a count");
        assert_eq!((all.rows, all.kept), (tokens, None));
        let kept = few.kept.expect("places");
        let wide = all.features.len() / tokens;
        for (place, row) in all.features.chunks(wide).enumerate() {
            let (row, mark) = row.split_at(wide - 1);
            match kept.binary_search(&place) {
                Ok(at) => {
                    assert_eq!(mark, [1.0]);
                    assert_eq!(row, &few.features[at * (wide - 1)..][..wide - 1]);
                }
                Err(_) => assert!(mark == [2.0] && row.iter().all(|x| *x == 0.0)),
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let vlm = fixture("vision-ts-sdpa");
    let refusal = |merge: &str| {
        let text = format!("version: 1\npasses: [token_merge: {merge}]");
        let error = rewrite(vlm.clone(), &recipe(&text)).map(|_| ());
        error.expect_err("a refusal").to_string()
    };
    assert!(refusal("{dominant: 0, contextual: 0.0}").contains("leave no token"));
    let cls = refusal("{dominant: 5, contextual: 3, cls: keep}");
    assert!(
        cls.contains("vision_encoder") && cls.contains("CLS token, and it has none"),
        "{cls}"
    );
}
