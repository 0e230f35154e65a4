use super::*;

fn question(metric: Metric, answers: &[&str]) -> Question {
    Question {
        id: "q".into(),
        line: 1,
        images: vec!["a.png".into()],
        video: None,
        text: "What?".into(),
        answers: answers.iter().map(|a| (*a).to_owned()).collect(),
        choices: Vec::new(),
        types: Vec::new(),
        group: None,
        metric,
    }
}

#[test]
fn exact_answers_are_equal_after_normalisation() {
    let red = question(Metric::Exact, &["red", "crimson"]);
    for (answer, worth) in [
        ("Red.", 1.0),
        ("the CRIMSON", 1.0),
        ("dark red", 0.0),
        ("", 0.0),
    ] {
        assert_eq!(Metric::Exact.score(&red, answer), worth, "{answer}");
    }
    let two = question(Metric::Exact, &["2"]);
    assert_eq!(Metric::Exact.score(&two, "two"), 1.0);
}

/// With ten answers of which 0, 1, 2, 3 and 4 agree the published evaluators give 0, 0.3, 0.6, 0.9 and 1.
#[test]
fn soft_accuracy_leaves_each_answer_out_in_turn() {
    for (agree, worth) in [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)] {
        let answers: Vec<String> = (0..10)
            .map(|i| {
                if i < agree {
                    "Nous les gosses".into()
                } else {
                    format!("other {i}")
                }
            })
            .collect();
        let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
        let of = question(Metric::Vqa, &answers);
        let found = Metric::Vqa.score(&of, "nous les gosses.");
        assert!((found - worth).abs() < 1e-12, "{agree}: {found}");
    }
    assert!(
        Metric::Vqa
            .refuses(&question(Metric::Vqa, &["a", "b", "c"]))
            .is_some()
    );
    assert!(
        Metric::Vqa
            .refuses(&question(Metric::Vqa, &["a"; 10]))
            .is_none()
    );
}

#[test]
fn gqa_wants_the_very_word() {
    let no = question(Metric::Gqa, &["no"]);
    for (answer, worth) in [
        ("No", 1.0),
        ("no.", 1.0),
        ("no..", 1.0),
        ("no, it is", 0.0),
        ("the no", 0.0),
    ] {
        assert_eq!(Metric::Gqa.score(&no, answer), worth, "{answer}");
    }
}

/// Read as `eval_pope.py` reads: the first sentence, without commas, split at spaces.
#[test]
fn pope_is_yes_unless_it_says_no() {
    let read = |answer| Metric::Pope.reads(answer);
    for no in [
        "no",
        "No",
        "No, there is not",
        "there is not. Yes",
        "It has no dog",
    ] {
        assert_eq!(read(no), Some(false), "{no}");
    }
    for yes in ["yes", "", "NO", "Yes. No", "nothing", "no\nyes"] {
        assert_eq!(read(yes), Some(true), "{yes}");
    }
    let yes = question(Metric::Pope, &["yes"]);
    assert_eq!(Metric::Pope.score(&yes, "Yes"), 1.0);
    assert!(
        Metric::Pope
            .refuses(&question(Metric::Pope, &["maybe"]))
            .is_some()
    );
}

/// Read as `calculation.py` reads: lower case, the first four letters.
#[test]
fn mme_is_read_off_the_first_letters() {
    let read = |answer| Metric::Mme.reads(answer);
    for (answer, expected) in [
        ("Yes", Some(true)),
        ("no.", Some(false)),
        (" Yes", Some(true)),
        ("It's no", None),
        ("know", Some(false)),
        ("", None),
    ] {
        assert_eq!(read(answer), expected, "{answer}");
    }
    // Neither is wrong, whatever the reference.
    for reference in ["Yes", "No"] {
        let of = question(Metric::Mme, &[reference]);
        assert_eq!(Metric::Mme.score(&of, "perhaps"), 0.0);
    }
}

/// Read as `eval_science_qa.py` reads.
#[test]
fn a_choice_is_a_letter() {
    let mut of = question(Metric::Sqa, &["B"]);
    of.choices = ["iron", "copper", "tin"].map(str::to_owned).to_vec();
    for (answer, worth) in [
        ("B", 1.0),
        (" B ", 1.0),
        ("B. copper", 1.0),
        ("B\nbecause", 1.0),
        ("I think so. The answer is B.", 1.0),
        ("The answer is B", 1.0),
        ("The answer is A, no: The answer is B.", 1.0),
        ("A", 0.0),
        ("b", 0.0),
        ("copper", 0.0),
        ("B: copper", 0.0),
        // A letter beyond the choices is none of them.
        ("E", 0.0),
    ] {
        assert_eq!(Metric::Sqa.score(&of, answer), worth, "{answer}");
    }
    of.answers = vec!["copper".into()];
    assert_eq!(Metric::Sqa.score(&of, "B"), 1.0);
    assert!(Metric::Sqa.refuses(&of).is_none());
    of.answers = vec!["D".into()];
    assert!(
        Metric::Sqa
            .refuses(&of)
            .expect("no fourth choice")
            .contains("'D'")
    );
    assert!(
        Metric::Sqa
            .refuses(&question(Metric::Sqa, &["A"]))
            .expect("no choices")
            .contains("choices")
    );
}

/// scikit-learn's precision, recall and F1 of 5 rights among 8 yes, 9 yes in truth.
#[test]
fn rates_of_yes_and_no() {
    let mut counts = Counts::default();
    for (read, right, times) in [
        (Some(true), true, 5),
        (Some(true), false, 3),
        (Some(false), true, 4),
        (Some(false), false, 7),
        (None, true, 1),
    ] {
        (0..times).for_each(|_| counts.add(read, right));
    }
    let rates = counts.rates();
    let near = |name: &str, value: f64| assert!((rates[name] - value).abs() < 1e-12, "{name}");
    near("precision", 0.625);
    near("recall", 5.0 / 9.0);
    near("f1", 2.0 * 0.625 * (5.0 / 9.0) / (0.625 + 5.0 / 9.0));
    near("yes_ratio", 8.0 / 20.0);
    // Nobody said yes: there is no precision.
    let mut silent = Counts::default();
    silent.add(Some(false), false);
    assert!(!silent.rates().contains_key("precision"));
    assert_eq!(silent.rates()["yes_ratio"], 0.0);
}
