//! Policies: what they let through, place by place, and what they refuse to read.

mod diff_report;

use diff_report::*;
use duet_onnx::diff::policy::{Policy, Selection, ignore};
use duet_onnx::diff::{Change, Class, FileKind, Kind, Place, Report, Verdict, WeightChange};

/// A model with these changes, judged.
fn judged(policy: &str, changes: Vec<Change>) -> Report {
    let mut report = report(vec![file("onnx/model.onnx", FileKind::Model, changes)]);
    let policy = Policy::parse(policy).unwrap_or_else(|e| panic!("{e}: {policy}"));
    policy.apply(&mut report);
    report
}

fn violations(report: &Report) -> Vec<String> {
    let policy = report.policy.as_ref().expect("a policy");
    let broken = policy.rules.iter().filter_map(|r| {
        let why = r.violation.as_ref()?;
        Some(format!("{}: {why}", r.rule))
    });
    broken.collect()
}

fn passes(policy: &str, changes: Vec<Change>) -> bool {
    let report = judged(policy, changes);
    assert_eq!(report.differs(), !violations(&report).is_empty());
    !report.differs()
}

fn metadata() -> Change {
    Change {
        subject: Some("duet.recipe".into()),
        ..change(
            Class::Metadata,
            Kind::Metadata,
            "metadata 'duet.recipe' added",
            Vec::new(),
        )
    }
}

fn axis(layers: std::ops::Range<u32>) -> Change {
    let places = layers.map(|l| at("Softmax", &format!("/layers.{l}/Softmax"), Some(l)));
    let title = "attribute 'axis' of Softmax: -1 → 1";
    let all = change(Class::Structure, Kind::Attribute, title, places.collect());
    Change {
        subject: Some("axis".into()),
        ..all
    }
}

#[test]
fn without_a_rule_everything_that_counts_is_denied() {
    assert!(passes("version: 1", Vec::new()));
    let report = judged("version: 1", vec![metadata(), axis(0..3)]);
    assert_eq!(
        violations(&report),
        ["deny everything else: changes at 4 places allowed by no rule"]
    );
    assert_eq!(report.verdict, Verdict::Different);
    let cosmetic = change(
        Class::Cosmetic,
        Kind::DocString,
        "doc string changed",
        Vec::new(),
    );
    assert!(passes("version: 1", vec![cosmetic.clone()]));
    // Only if somebody says so.
    assert!(!passes(
        "version: 1\nrules: [{deny: cosmetic}]",
        vec![cosmetic.clone()]
    ));
    assert!(!passes(
        "version: 1\nrules: [{deny: doc-string}]",
        vec![cosmetic]
    ));
    assert!(passes(
        "version: 1\ndefault: allow",
        vec![metadata(), axis(0..3)]
    ));
}

#[test]
fn the_first_rule_that_fits_decides() {
    let both = vec![metadata(), axis(0..2)];
    assert!(passes(
        "version: 1\nrules: [{allow: [metadata, structure]}]",
        both.clone()
    ));
    assert!(passes("version: 1\nrules: [{allow: all}]", both.clone()));
    assert!(!passes(
        "version: 1\nrules: [{allow: metadata}]",
        both.clone()
    ));
    let first = "version: 1\ndefault: allow\nrules: [{deny: attribute}, {allow: structure}]";
    assert!(!passes(first, both.clone()));
    let second = "version: 1\ndefault: allow\nrules: [{allow: structure}, {deny: attribute}]";
    assert!(passes(second, both.clone()));
    let report = judged(
        "version: 1\nrules: [{allow: metadata}, {allow: structure}]",
        both,
    );
    assert_eq!(report.verdict, Verdict::Equal);
    assert_eq!(report.ignored, 2);
    let reasons = report.files[0].changes.iter().map(|c| c.ignored.as_deref());
    assert_eq!(
        reasons.collect::<Vec<_>>(),
        [Some("allow metadata"), Some("allow structure")]
    );
}

#[test]
fn a_repeated_change_is_judged_place_by_place() {
    let policy = "version: 1\nrules:\n  - {allow: attribute, scope: \"/layers.1*\"}";
    let report = judged(policy, vec![axis(0..12)]);
    // Layers 1, 10 and 11 are allowed, nine others are not.
    assert_eq!(
        violations(&report),
        ["deny everything else: changes at 9 places allowed by no rule"]
    );
    let parts: Vec<(usize, bool)> = report.files[0]
        .changes
        .iter()
        .map(|c| (c.places.len(), c.ignored.is_some()))
        .collect();
    assert_eq!(parts, [(9, false), (3, true)]);
    assert!(passes(policy, vec![axis(10..12)]));
    let subject = "version: 1\nrules:\n  - {allow: attribute, subject: axi?}";
    assert!(passes(subject, vec![axis(0..12)]));
    let other = "version: 1\nrules:\n  - {allow: attribute, subject: axes}";
    assert!(!passes(other, vec![axis(0..12)]));
    assert!(!passes(
        "version: 1\nrules: [{allow: metadata, scope: \"*\"}]",
        vec![metadata()]
    ));
    assert!(passes(
        "version: 1\nrules: [{allow: metadata, subject: \"duet.*\"}]",
        vec![metadata()]
    ));
    for (pattern, fits) in [
        ("onnx/*", true),
        ("*.onnx", true),
        ("model.onnx", false),
        ("*", true),
    ] {
        let policy = format!("version: 1\nrules: [{{allow: metadata, file: \"{pattern}\"}}]");
        assert_eq!(passes(&policy, vec![metadata()]), fits, "{pattern}");
    }
}

#[test]
fn an_allowed_scope_holds_all_that_changed_there_a_denied_one_any() {
    let added = |names: &[&str]| {
        let place = Place {
            added: names.iter().map(|n| node("Mul", n)).collect(),
            ..Place::default()
        };
        vec![change(
            Class::Structure,
            Kind::NodesAdded,
            "nodes inserted",
            vec![place],
        )]
    };
    let allow = "version: 1\nrules: [{allow: structure, scope: \"/vision/*\"}]";
    assert!(passes(allow, added(&["/vision/a", "/vision/b"])));
    assert!(!passes(allow, added(&["/vision/a", "/decoder/b"])));
    let deny = "version: 1\ndefault: allow\nrules: [{deny: structure, scope: \"/vision/*\"}]";
    assert!(!passes(deny, added(&["/vision/a", "/decoder/b"])));
    assert!(passes(deny, added(&["/decoder/a", "/decoder/b"])));
    // A node without a name lies in no scope.
    assert!(!passes(allow, added(&["/vision/a", ""])));
    // Patterns that need going back, and one that a naive matcher never ends with.
    let glob = |pattern: &str, name: &str| {
        let policy = format!("version: 1\nrules: [{{allow: structure, scope: '{pattern}'}}]");
        passes(&policy, added(&[name]))
    };
    assert!(glob("*a*b?c", "xxaabbbzc"));
    assert!(!glob("*a*b?c", "xxaabbbzd"));
    assert!(glob("é?", "éü") && !glob("é?", "é"));
    assert!(!glob(&"*a".repeat(40), &"a".repeat(39)));
    assert!(!glob(&format!("{}b", "a*".repeat(60)), &"a".repeat(5000)));
}

#[test]
fn weights_are_allowed_up_to_their_limits() {
    let of = |w: WeightChange| vec![weights("weights of MatMul changed", &[("/q", 0, w)])];
    let allow = |limit: &str| format!("version: 1\nrules: [{{allow: weights, {limit}}}]");
    // 41 of 4096 elements by at most 0.001; ‖Δ‖/‖a‖ = 0.000125.
    let small = || of(weight(41, 0.001));
    assert!(passes(&allow("max_abs: 0.001"), small()));
    assert!(!passes(&allow("max_abs: 0.0009"), small()));
    assert!(passes(&allow("max_relative: 1.25e-4"), small()));
    assert!(!passes(&allow("max_relative: 1.2e-4"), small()));
    assert!(passes(&allow("max_share: 0.0101"), small()));
    assert!(!passes(&allow("max_share: 0.01"), small()));
    assert!(!passes(&allow("max_abs: 1, max_share: 0.01"), small()));
    // What is not a number is within no limit.
    let nan = || {
        of(WeightChange {
            non_finite: 1,
            ..weight(41, 0.001)
        })
    };
    assert!(!passes(&allow("max_abs: 1"), nan()));
    // Other dimensions cannot be compared; without a limit they are allowed.
    let shape = || {
        of(WeightChange {
            changed: 0,
            max_abs: None,
            norm_a: None,
            norm_b: None,
            norm_diff: None,
            ..weight(0, 0.0)
        })
    };
    assert!(!passes(&allow("max_abs: 1"), shape()));
    assert!(!passes(&allow("max_share: 1"), shape()));
    assert!(passes("version: 1\nrules: [{allow: weights}]", shape()));
    // From zero to something is no small relative change.
    let zero = || {
        of(WeightChange {
            norm_a: Some(0.0),
            ..weight(41, 0.001)
        })
    };
    assert!(!passes(&allow("max_relative: 1000"), zero()));
    // Two tensors in one change: each by its own numbers, and what is left is told by its own.
    let two = vec![weights(
        "weights of MatMul changed",
        &[("/a", 0, weight(1, 0.5)), ("/b", 1, weight(2, 0.001))],
    )];
    let report = judged(&allow("max_abs: 0.01"), two);
    let left: Vec<&Change> = report.files[0]
        .changes
        .iter()
        .filter(|c| c.ignored.is_none())
        .collect();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].places[0].layer, Some(0));
    assert_eq!(left[0].weights.as_ref().and_then(|w| w.max_abs), Some(0.5));
}

#[test]
fn exactly_these_rewrites_this_many_times() {
    let two = || vec![rewrite("visual_prune", 4), rewrite("visual_prune", 6)];
    let policy = |n: &str| format!("version: 1\nrewrites: {{{n}}}");
    assert!(passes(&policy("visual_prune: 2"), two()));
    let few = judged(&policy("visual_prune: 3"), two());
    assert_eq!(
        violations(&few),
        ["rewrite visual_prune, exactly 3 times: expected exactly 3 times, found at 2 places"]
    );
    let missing = judged(&policy("visual_prune: 2, token_merge: 1"), two());
    assert_eq!(
        violations(&missing),
        ["rewrite token_merge, exactly once: expected exactly once, it is not there"]
    );
    assert!(
        missing.differs(),
        "a missing rewrite is no change, but it fails"
    );
    let other = judged(&policy("token_merge: 1"), {
        let mut all = two();
        all.push(rewrite("token_merge", 0));
        all
    });
    assert_eq!(
        violations(&other),
        ["no other rewrites: changes at 2 places"]
    );
    // Parts of a pass: the named ones are counted, what else belongs to it goes along.
    let parts = |drops: u32| {
        let of = |part: &str| Change {
            subject: Some(part.into()),
            ..rewrite("visual_prune", 4)
        };
        let mut all = vec![of("entry"), of("stage1")];
        all.extend((0..drops).map(|i| of(&format!("drop{i}"))));
        all
    };
    assert!(passes(&policy("visual_prune/drop*: 2"), parts(2)));
    assert!(!passes(&policy("visual_prune/drop*: 2"), parts(3)));
    assert!(!passes(&policy("visual_prune/drop*: 2"), parts(1)));
    assert!(!passes(
        &policy("visual_prune/drop*: 2, visual_prune: 1"),
        parts(2)
    ));
    assert!(passes(
        &policy("visual_prune/drop*: 2, visual_prune: 2"),
        parts(2)
    ));
    assert!(!passes(&policy("token_merge/select: 0"), parts(1)));
    // An empty list allows none; no list leaves them to the rules.
    assert!(!passes("version: 1\ndefault: allow\nrewrites: {}", two()));
    assert!(passes("version: 1\ndefault: allow", two()));
    let rule = "version: 1\nrules: [{allow: rewrite, pass: visual_*, times: 2}]";
    assert!(passes(rule, two()));
    assert!(!passes(rule, Vec::new()));
    assert!(!passes(rule, vec![rewrite("visual_prune", 4)]));
}

#[test]
fn what_is_ignored_already_is_not_judged() {
    let mut report = report(vec![file(
        "m.onnx",
        FileKind::Model,
        vec![metadata(), axis(0..2)],
    )]);
    ignore(
        &mut report,
        &Selection::parse(["structure"], "--ignore").expect("a class"),
    );
    let why = report.files[0].changes[1].ignored.clone();
    assert_eq!(why.as_deref(), Some("--ignore structure"));
    let policy =
        Policy::parse("version: 1\nrules: [{deny: structure}, {allow: metadata, times: 1}]");
    policy.expect("a policy").apply(&mut report);
    assert!(!report.differs(), "{:?}", violations(&report));
    assert_eq!(report.ignored, 2);
}

#[test]
fn what_is_no_policy_is_refused_with_the_reason() {
    let cases: &[(&str, &str)] = &[
        ("", "expected the policy to be a mapping"),
        ("- a", "expected the policy to be a mapping"),
        ("version: 2", "version 2 is not known; expected 1"),
        ("rules: []", "missing field `version`"),
        (
            "version: 1\nrulse: []",
            "unknown key 'rulse' in the policy; did you mean 'rules'?",
        ),
        ("version: 1\n7: 1", "unknown key"),
        (
            "version: 1\nrules: [{alow: weights}]",
            "unknown key 'alow' in rule 1; did you mean 'allow'?",
        ),
        (
            "version: 1\nrules: [{allow: all}, {allow: wieghts}]",
            "unknown class 'wieghts' in rule 2; did you mean 'weights'?",
        ),
        (
            "version: 1\nrules: [{allow: doc_string}]",
            "did you mean 'doc-string'?",
        ),
        (
            "version: 1\nrules: [{scope: x}]",
            "rule 1: expected either 'allow' or 'deny'",
        ),
        (
            "version: 1\nrules: [{allow: all, deny: all}]",
            "rule 1: expected either 'allow' or 'deny'",
        ),
        (
            "version: 1\nrules: [{allow: []}]",
            "rule 1: allow names nothing",
        ),
        (
            "version: 1\nrules: [allow]",
            "expected rule 1 to be a mapping",
        ),
        (
            "version: 1\nrules: [{deny: weights, max_abs: 1}]",
            "max_abs says how much is allowed",
        ),
        (
            "version: 1\nrules: [{deny: rewrite, times: 1}]",
            "times says how often something is expected",
        ),
        (
            "version: 1\nrules: [{allow: weights, max_abs: -1}]",
            "rule 1: max_abs: -1 is no limit",
        ),
        (
            "version: 1\nrules: [{allow: weights, max_share: .nan}]",
            "NaN is no limit",
        ),
        ("version: 1\nrtol: -0.5", "rtol: -0.5 is no limit"),
        ("version: 1\natol: much", "invalid type"),
        (
            "version: 1\ndefault: maybe",
            "expected 'allow' or 'deny', found 'maybe'",
        ),
        ("version: 1\nrewrites: {visual_prune: -1}", "invalid value"),
        ("version: 1\nversion: 1", "duplicate"),
        ("a: &a [*a]", ""),
    ];
    for (text, expected) in cases {
        match Policy::parse(text) {
            Ok(policy) => panic!("accepted: {text}: {policy:?}"),
            Err(e) => assert!(e.to_string().contains(expected), "{text}: {e}"),
        }
    }
}

#[test]
fn every_word_selects_what_it_names() {
    for class in Class::ALL {
        for kind in Kind::ALL {
            let change = change(class, kind, "x", Vec::new());
            let holds = |word: &str| {
                Selection::parse([word], "here")
                    .expect("a known word")
                    .holds(&change)
            };
            assert!(holds("all") && holds(class.word()));
            // 'metadata' is a class and a kind of it.
            if kind != Kind::Metadata {
                assert!(holds(&kind.word()), "{}", kind.word());
            }
            let other = Class::ALL[(class as usize + 1) % Class::ALL.len()];
            assert!(!holds(other.word()));
        }
    }
    assert!(Selection::parse(["weigths"], "--ignore").is_err());
}
