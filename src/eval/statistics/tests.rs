//! Against numbers that NumPy and SciPy give.

use super::*;

/// `np.quantile([3, 1, 2, 10], [0, 0.1, 0.5, 0.975, 1])`
#[test]
fn quantiles_are_numpys() {
    let sorted = [1.0, 2.0, 3.0, 10.0];
    for (share, expected) in [
        (0.0, 1.0),
        (0.1, 1.3),
        (0.5, 2.5),
        (0.975, 9.475),
        (1.0, 10.0),
    ] {
        assert!(
            (quantile(&sorted, share) - expected).abs() < 1e-12,
            "{share}"
        );
    }
    assert!(quantile(&[], 0.5).is_nan());
}

/// 40 images of 1 to 4 questions: the first model misses one of every seventh image, the second up to two.
fn images() -> Sample {
    let mut sample = Sample::new(2, 1, 1.0);
    for i in 0..40_usize {
        let count = 1 + i % 4;
        let first = count - usize::from(i % 7 == 3);
        let second = count - count.min(i * i % 3);
        sample.push(vec![Cell {
            bucket: 0,
            count: count as f64,
            sums: vec![first as f64, second as f64],
        }]);
    }
    sample
}

fn near(found: Estimate, value: f64, low: f64, high: f64, within: f64) {
    assert!((found.value - value).abs() < 1e-12, "{found:?}");
    let (l, h) = found.interval.expect("an interval");
    assert!(
        (l - low).abs() < within && (h - high).abs() < within,
        "{found:?}"
    );
}

/// The same draws in NumPy (SplitMix64 in Python, `np.quantile` of Σ scores / Σ questions).
#[test]
fn intervals_are_numpys_for_the_same_draws() {
    let compared = Compared::new(&images(), 2000, 7);
    let exact = 1e-12;
    near(
        compared.value(0),
        0.94,
        0.8924652118912081,
        0.9807738095238094,
        exact,
    );
    near(
        compared.value(1),
        0.74,
        0.6666666666666666,
        0.8058476788773761,
        exact,
    );
    let kept = compared.kept(1).expect("the first is right at times");
    near(
        kept,
        0.7872340425531915,
        0.7023809523809523,
        0.8666666666666666,
        exact,
    );
    let more = compared.kept_more(1, 0).expect("as above");
    near(
        more,
        -0.2 / 0.94,
        -0.29761904761904767,
        -0.1333333333333334,
        exact,
    );
}

/// `scipy.stats.bootstrap(paired=True, method="percentile", n_resamples=99999)` of SciPy 1.17 over its own draws.
#[test]
fn intervals_are_scipys_but_for_the_draws() {
    let compared = Compared::new(&images(), 20_000, 1);
    near(
        compared.value(0),
        0.94,
        0.8921568627450981,
        0.9801980198019802,
        2e-3,
    );
    near(
        compared.value(1),
        0.74,
        0.6666666666666666,
        0.8061224489795918,
        3e-3,
    );
    let kept = compared.kept(1).expect("the first is right at times");
    near(
        kept,
        0.7872340425531915,
        0.7037037037037037,
        0.8674698795180723,
        3e-3,
    );
}

/// What the models have in common cancels out: a model that errs where the first does keeps all of it.
#[test]
fn draws_are_the_same_for_all_models() {
    let mut sample = Sample::new(2, 1, 1.0);
    for i in 0..30 {
        let sums = vec![f64::from(i % 2), f64::from(i % 2)];
        sample.push(vec![Cell {
            bucket: 0,
            count: 1.0,
            sums,
        }]);
    }
    let compared = Compared::new(&sample, 500, 3);
    let kept = compared.kept(1).expect("right at times");
    assert_eq!((kept.value, kept.interval), (1.0, Some((1.0, 1.0))));
    let (low, high) = compared.value(1).interval.expect("an interval");
    assert!(low < 0.4 && high > 0.6, "{low} {high}");
}

#[test]
fn means_of_several_buckets_add_up() {
    let mut sample = Sample::new(1, 2, 100.0);
    let cell = |bucket, count, sum| Cell {
        bucket,
        count,
        sums: vec![sum],
    };
    sample.push(vec![cell(0, 2.0, 1.0), cell(1, 1.0, 0.0)]);
    sample.push(vec![cell(0, 2.0, 2.0), cell(1, 1.0, 1.0)]);
    // 100 · (3/4 + 1/2)
    assert_eq!(sample.values(), [125.0]);
    // An image that has one of the buckets only: a draw without the other keeps its mean.
    sample.push(vec![cell(0, 2.0, 0.0)]);
    for draw in sample.draws(200, 0) {
        assert!((0.0..=200.0).contains(&draw[0]), "{draw:?}");
    }
}

#[test]
fn what_cannot_be_estimated_is_left_out() {
    let mut sample = Sample::new(2, 1, 1.0);
    let cell = |sums| Cell {
        bucket: 0,
        count: 1.0,
        sums,
    };
    sample.push(vec![cell(vec![0.0, 1.0])]);
    // One image says nothing of others, and a share of nothing is nothing.
    let compared = Compared::new(&sample, 100, 0);
    assert_eq!(
        compared.value(1),
        Estimate {
            value: 1.0,
            interval: None
        }
    );
    assert_eq!(compared.kept(1), None);
    assert_eq!(compared.kept_more(1, 0), None);
}
