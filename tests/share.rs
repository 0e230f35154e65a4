//! Whole shares of counts as the inserted nodes compute them, in ONNX Runtime and tract.

mod commands;
mod common;

use common::*;
use duet_onnx::ir::Model;
use duet_onnx::runtime::{Session, SessionOptions, Tensor, Value, tract};

/// n `[k]` → ⌊n · ratio⌋.
fn graph_of(ratio: f64) -> Model {
    let plain = load(&model(graph(
        "share",
        &[value("n", INT64, &[-1])],
        &[value("kept", INT64, &[-1])],
        &[],
        &[node("Identity", &["n"], &["kept"])],
    )));
    let (n, last) = (find(&plain, "n"), producer(&plain, "kept"));
    patched(&plain, |p| {
        let kept = p.share(n, ratio);
        p.rewire(last, 0, kept);
    })
}

#[allow(clippy::cast_possible_truncation, reason = "that is what is tested")]
fn in_doubles(n: i64, ratio: f64) -> i64 {
    (n as f64 * ratio) as i64
}

#[test]
fn nodes_compute_what_doubles_give() {
    commands::runtime();
    // Behind the decimal ones lie bounds: their doubles are less than the fraction that is meant.
    let below = |p: f64, q: f64| f64::from_bits((p / q).to_bits() - 1);
    let ratios = [
        0.0,
        1.0,
        0.5,
        0.29,
        0.7,
        0.1,
        1.0 / 3.0,
        0.0157,
        below(1.0, 2.0),
        below(3.0, 7.0),
        below(9.0, 11.0),
        below(1.0, 3.0),
    ];
    let far = (1i64 << 24) - 1;
    let denominators = [2, 3, 7, 10, 11, 100, 10_000];
    let multiples = denominators
        .iter()
        .flat_map(|q| (1..=50).map(move |k| far / q / k * q));
    let counts: Vec<i64> = (0..2500).chain(multiples).chain([far]).collect();
    let mut rounded_down = 0;
    for ratio in ratios {
        let bytes = bytes_of(&graph_of(ratio));
        let wanted: Vec<i64> = counts.iter().map(|n| in_doubles(*n, ratio)).collect();
        let given = || Tensor::new([counts.len()], counts.clone()).expect("a vector");
        let mut session =
            Session::from_bytes(&bytes, "share", &SessionOptions::default()).expect("opens");
        let n = Value::new(given()).expect("a value");
        let found = session.run(&[("n", &n)]).expect("runs");
        let found = found
            .get("kept")
            .expect("an output")
            .to_tensor()
            .expect("a tensor");
        assert_eq!(
            found.slice::<i64>().expect("int64"),
            wanted,
            "ONNX Runtime, {ratio:?}"
        );
        let found = tract::run_once(&bytes, &[("n", given())]).expect("runs");
        assert_eq!(
            found[0].1.slice::<i64>().expect("int64"),
            wanted,
            "tract, {ratio:?}"
        );
        // How often the product with the fraction that is meant would have been one more.
        rounded_down += counts
            .iter()
            .zip(&wanted)
            .filter(|(n, w)| in_doubles(**n, ratio.next_up()) > **w)
            .count();
    }
    assert!(
        rounded_down > 100,
        "{rounded_down} counts where the rounding decides"
    );
}
