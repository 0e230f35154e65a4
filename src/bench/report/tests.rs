use super::*;
use crate::bench::job::LengthTime;

/// Four layers of 2 time units a token and a head of 1 a row; a step costs each layer 1 for a token in the cache and
/// the head 1. A unit is a second divided by 1000, and in each round twice as long as in the one before.
fn prefill(tokens: &[usize], rows: usize) -> f64 {
    (2 * tokens.iter().sum::<usize>() + rows) as f64 / 1e3
}

fn step_of(tokens: &[usize]) -> f64 {
    (tokens.iter().sum::<usize>() + 1) as f64 / 1e3
}

const SLOW: [f64; 3] = [1.0, 2.0, 4.0];

/// How much longer than is ideal the rewritten model takes in each round. The median of the ratios is that of the first,
/// the ratio of the medians that of the second.
const LONGER: [f64; 3] = [1.1, 1.5, 1.0];

fn about(name: &str, tokens: [usize; 4], recipe: bool) -> About {
    About {
        name: name.into(),
        path: format!("/models/{name}"),
        recipe: recipe.then(|| "version: 1".into()),
        schedule: Ok(Schedule {
            visual: tokens.iter().map(|n| n - 20).collect(),
            tokens: tokens.to_vec(),
            padded: false,
            cache_bytes: Some(tokens.iter().sum::<usize>() * 8),
        }),
        vision: false,
        embed: true,
        whole: false,
        decoder: true,
    }
}

fn turn(tokens: [usize; 4], rows: usize, slow: f64) -> Turn {
    Turn {
        embed: Some(0.001),
        prefill: Some(prefill(&tokens, rows) * slow),
        decode: vec![step_of(&tokens) * slow, step_of(&tokens) * slow * 9.0, 0.0],
        decode_embed: vec![0.0; 3],
        prompt_tokens: tokens[0],
        visual_tokens: tokens[0] - 20,
        cache_lengths: tokens.to_vec(),
        cache_bytes: tokens.iter().sum::<usize>() * 8,
        cache_element: 4,
        logits_rows: rows,
        ..Turn::default()
    }
}

fn circumstances() -> Circumstances {
    Circumstances {
        library: "libonnxruntime.so.1".into(),
        build: "test".into(),
        threads: 2,
        providers: Vec::new(),
        rounds: 3,
        warm_up: 1,
        images: 1,
        text_tokens: 20,
        new_tokens: 3,
        seed: 0,
    }
}

const BASE: [usize; 4] = [100; 4];
const CUT: [usize; 4] = [60, 60, 40, 20];

/// Measured in three rounds, each slower than the one before.
fn measured() -> Measured {
    let at = |tokens: usize| {
        let times = SLOW.map(|slow| LengthTime {
            prefill: prefill(&[tokens; 4], tokens) * slow,
            decode: vec![step_of(&[tokens; 4]) * slow],
        });
        (tokens, times.to_vec())
    };
    let head = |rows: usize| (rows, SLOW.map(|slow| rows as f64 / 1e3 * slow).to_vec());
    Measured {
        turns: vec![
            SLOW.map(|slow| turn(BASE, 100, slow)).to_vec(),
            [0, 1, 2]
                .map(|round| Turn {
                    prefill: Some(prefill(&CUT, 20) * SLOW[round] * LONGER[round]),
                    ..turn(CUT, 20, SLOW[round])
                })
                .to_vec(),
        ],
        memory: vec![Ok(1_000_000), Err("nobody knows".into())],
        lengths: vec![at(20), at(60)],
        heads: vec![head(1), head(20), head(100)],
        no_lengths: None,
        rounds: 3,
    }
}

/// A report of given numbers, for renderings.
pub(in crate::bench) fn report() -> Report {
    let mut measured = measured();
    let times = |values: [f64; 3], turns: &mut Vec<Turn>| {
        for (turn, value) in turns.iter_mut().zip(values) {
            turn.prefill = Some(value);
        }
    };
    times([0.9, 1.0, 0.9], &mut measured.turns[0]);
    times([0.25, 0.3, 0.5], &mut measured.turns[1]);
    let about = [
        about("base", BASE, false),
        about("a <b> & \"c\" | d", CUT, true),
    ];
    let mut report = Report::new(&about, &measured, circumstances(), None);
    report.models[1].prefill = Reading::Known(Time {
        median_ms: 300.0,
        min_ms: 250.0,
        max_ms: 500.0,
        speedup: Some(3.6),
        rounds_ms: vec![250.0, 300.0, 500.0],
    });
    report.models[1].ideal_prefill = Reading::Known(Ideal {
        median_ms: 280.0,
        share: 1.0,
        rounds_ms: vec![280.0; 3],
    });
    report
}

#[test]
fn ratios_are_medians_of_the_rounds_and_ideals_those_of_the_same_round() {
    let about = [about("base", BASE, false), about("cut", CUT, true)];
    let report = Report::new(&about, &measured(), circumstances(), None);
    let [base, cut] = report.models.as_slice() else {
        panic!("two models");
    };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
    let time = base.prefill.known().unwrap();
    near(time.median_ms, 1800.0);
    near(time.min_ms, 900.0);
    near(time.max_ms, 3600.0);
    near(time.speedup.unwrap(), 1.0);
    // 2 · 180 + 20 = 380 ideally in the first round, twice that in the second.
    let ideal = cut.ideal_prefill.known().unwrap();
    near(ideal.median_ms, 760.0);
    near(ideal.share, 1.0 / 1.1);
    near(
        cut.prefill.known().unwrap().speedup.unwrap(),
        900.0 / (380.0 * 1.1),
    );
    near(base.ideal_prefill.known().unwrap().share, 1.0);
    // A turn's step is the median of its steps.
    near(cut.decode_step.known().unwrap().median_ms, 362.0);
    near(cut.ideal_decode_step.known().unwrap().share, 1.0);
    near(*cut.tokens_per_second.known().unwrap(), 1000.0 / 362.0);
    let cache = cut.cache.known().unwrap();
    assert_eq!((cache.bytes, cache.as_scheduled), (180 * 8, Some(true)));
    near(cache.smaller.unwrap(), 400.0 / 180.0);
    assert_eq!(cut.peak_memory_bytes.why(), Some("nobody knows"));
    assert_eq!(base.vision.why(), Some("the model has no vision encoder"));
    assert_eq!(report.base_at_lengths.known().map(Vec::len), Some(2));
}

#[test]
fn a_cache_that_is_not_the_schedules_is_told() {
    let mut measured = measured();
    for turn in &mut measured.turns[1] {
        turn.cache_lengths[3] += 1;
    }
    let about = [about("base", BASE, false), about("cut", CUT, true)];
    let report = Report::new(&about, &measured, circumstances(), None);
    let cache = report.models[1].cache.known().unwrap();
    assert_eq!(cache.as_scheduled, Some(false));
    let notes = crate::bench::render::notes(&report);
    assert!(
        notes
            .iter()
            .any(|n| n.starts_with("cut: its cache has 1440 bytes")),
        "{notes:?}"
    );
}

#[test]
fn without_lengths_there_is_a_reason_instead_of_an_ideal() {
    let mut measured = measured();
    (measured.lengths, measured.heads) = (Vec::new(), Vec::new());
    measured.no_lengths = Some("it is headless".into());
    let about = [about("base", BASE, false), about("cut", CUT, true)];
    let report = Report::new(&about, &measured, circumstances(), None);
    let cut = &report.models[1];
    assert_eq!(cut.ideal_prefill.why(), Some("it is headless"));
    assert_eq!(cut.ideal_decode_step.why(), Some("it is headless"));
    assert_eq!(report.base_head.why(), Some("it is headless"));
    assert!(cut.prefill.known().is_some());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(
        json["models"][1]["ideal_prefill"]["not_measured"],
        "it is headless"
    );
}
