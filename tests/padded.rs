//! `kv: padded`: every output has the shape that the unmodified decoder gives it, and holds what the ragged rewrite
//! computes, behind filler.

#[macro_use]
mod support;

use duet_onnx::arch::Vlm;
use duet_onnx::passes::FILLER;
use duet_onnx::runtime::Value;
use duet_onnx::validate::scenario::standard;
use duet_onnx::validate::{Options, check};

use support::conversation::{Record, Transcript, hold, text_only};
use support::models::{
    FALL, MERGE, PLACED, Pool, TO_KEEP, fixture, numbers, options, parts_at, recipe, recipe_text,
    rewritten, runtime, sizes,
};

fn texts(kv: &str, both: bool) -> Vec<String> {
    let kv = format!("kv: {kv}");
    let text = |passes: &[(&str, &str)]| recipe_text(passes, &kv);
    let mut texts = vec![text(&[("token_merge", MERGE), ("visual_prune", FALL)])];
    if both {
        texts.push(text(&[("token_merge", PLACED), ("visual_prune", TO_KEEP)]));
        texts.push(text(&[("token_merge", PLACED)]));
    }
    texts
}

/// The columns of a padded cache `[b, h, S, d]` behind the filler that makes it longer than `length`.
fn behind_filler(padded: &Value, length: usize) -> Vec<f32> {
    let all = numbers(padded);
    let &[batch, heads, whole, width] = padded.shape() else {
        panic!("a cache of shape {:?}", padded.shape());
    };
    let front = (whole - length) * width;
    let mut rest = Vec::with_capacity(batch * heads * length * width);
    for head in all.chunks_exact(whole * width) {
        assert!(head[..front].iter().all(|x| *x == FILLER), "filler");
        rest.extend(&head[front..]);
    }
    rest
}

/// That a step of the padded model is one of the ragged model, filled up.
fn same_step(place: &str, ragged: &Record, padded: &Record) {
    assert_eq!(ragged.kept, padded.kept, "{place}: kept tokens");
    let whole = ragged.lengths[0];
    assert!(
        padded.lengths.iter().all(|l| *l == whole),
        "{place}: {:?}",
        padded.lengths
    );
    for (ragged, padded) in ragged.caches.iter().zip(&padded.caches) {
        assert_eq!(padded.shape()[2], whole, "{place}: length of a cache");
        let rest = behind_filler(padded, ragged.shape()[2]);
        assert!(rest == numbers(ragged), "{place}: contents of a cache");
    }
    let (tokens, shape) = (padded.mask.ncols(), &ragged.logits.0);
    // A model that gives the last row's logits alone goes on doing so.
    let all = if shape[1] == 1 && tokens > 1 {
        1
    } else {
        tokens
    };
    assert_eq!(
        padded.logits.0,
        [shape[0], all, shape[2]],
        "{place}: logits"
    );
    let front = (all - shape[1]) * shape[2];
    let rows = |r: &Record, front: usize| -> Vec<f32> {
        let row = r.logits.0[1] * r.logits.0[2];
        let rows = r.logits.1.chunks_exact(row);
        rows.flat_map(|row| row[front..].to_vec()).collect()
    };
    assert!(
        rows(ragged, 0) == rows(padded, front),
        "{place}: logits are other numbers"
    );
}

/// Every step of every conversation: images, several, none, padding, further turns.
fn holds_what_ragged_caches_hold(name: &str, base: &Vlm, both: bool) {
    let (edge, width) = sizes(base);
    let mut pool = Pool::default();
    let mut scenarios = standard(400, 23);
    scenarios.extend(text_only(400));
    if edge > 200 {
        scenarios.truncate(2);
    }
    let mut shorter = 0;
    for (ragged, padded) in texts("ragged", both).iter().zip(texts("padded", both)) {
        let (ragged, padded) = (
            pool.open(&rewritten(base, ragged)),
            pool.open(&rewritten(base, &padded)),
        );
        for scenario in &scenarios {
            let want: Transcript = hold(&ragged, scenario, edge, width);
            let found = hold(&padded, scenario, edge, width);
            assert_eq!(want.steps.len(), found.steps.len());
            for (number, (want, found)) in want.steps.iter().zip(&found.steps).enumerate() {
                let place = format!("{name}, {}, step {number}", scenario.name);
                same_step(&place, want, found);
                shorter += usize::from(want.lengths.last() < want.lengths.first());
            }
        }
    }
    assert!(shorter > 0, "{name}: no cache was filled up");
}

fn on_fixture(name: &str) {
    runtime();
    holds_what_ragged_caches_hold(name, &fixture(name), name != "demo");
}

on_every_fixture!(on_fixture);

/// `duet validate`'s reference knows nothing of filler, and agrees.
fn valid(name: &str, base: &Vlm, both: bool) {
    runtime();
    for text in texts("padded", both) {
        let options = Options {
            session: options(),
            seed: 9,
        };
        let changed = rewritten(base, &text);
        let report = check(base, &changed, &recipe(&text), &options, &mut |_| ());
        let report = report.unwrap_or_else(|e| panic!("{name}: {e}\n{text}"));
        let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
        assert!(report.passed(), "{name}: {failed:#?}\n{text}");
    }
}

#[test]
fn fixtures_are_valid() {
    for name in ["ts-sdpa-mha", "dynamo23-gqa"] {
        valid(name, &fixture(name), true);
    }
}

/// Branches, two files, half precision, attention that holds its cache.
#[test]
fn forms_are_valid() {
    for (name, both) in [
        ("if-ts-eager-mha", false),
        ("split-ts-sdpa-gqa", false),
        ("fp16-ts-sdpa-mha", false),
        ("genai-fp32-gqa", true),
        ("genai09-mha-mha", true),
    ] {
        let form = support::forms::form(name);
        valid(name, &parts_at(&form.directory()), both);
    }
}

/// Filler of another number than what is counted is not taken for filler: the check would notice.
#[test]
fn ragged_caches_are_not_valid_as_padded_ones() {
    runtime();
    let base = fixture("ts-eager-gqa");
    let text = &texts("padded", false)[0];
    let ragged = rewritten(&base, &texts("ragged", false)[0]);
    let options = Options {
        session: options(),
        seed: 9,
    };
    let report = check(&base, &ragged, &recipe(text), &options, &mut |_| ()).expect("a report");
    let lengths = |check: &str| {
        let mut findings = report.findings.iter();
        findings.any(|f| !f.passed && f.check.contains(check))
    };
    assert!(lengths("one image"), "{:#?}", report.findings);
}

#[test]
fn a_decoder_without_a_cache_is_refused() {
    let text = recipe_text(&[("visual_prune", FALL)], "kv: padded");
    let base = support::models::whole_fixture(support::models::WHOLE[0]);
    let error = duet_onnx::passes::rewrite(base, &recipe(&text)).unwrap_err();
    assert!(
        error.to_string().contains("kv: padded is about caches"),
        "{error}"
    );
}
