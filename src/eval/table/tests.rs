use super::*;
use crate::eval::render;

/// A set without a directory: `tabulate` reads questions only.
fn set(metric: Metric, questions: &[(&str, &str, &str, &str)]) -> DataSet {
    let questions: Vec<Question> = questions
        .iter()
        .enumerate()
        .map(|(index, (id, image, kind, answer))| Question {
            id: (*id).into(),
            line: index + 1,
            images: vec![(*image).into()],
            video: None,
            text: "What?".into(),
            answers: vec![(*answer).into()],
            choices: Vec::new(),
            types: kind.split(' ').map(str::to_owned).collect(),
            group: None,
            metric,
        })
        .collect();
    DataSet {
        root: "set".into(),
        name: "set".into(),
        prompt: "{question}".into(),
        max_new_tokens: 4,
        clusters: crate::eval::dataset::clusters(&questions),
        questions,
        digest: "d".into(),
    }
}

fn contestant(name: &str, answers: &[(&str, &str)], layers: Option<f64>) -> Contestant {
    let answer = |(id, text): &(&str, &str)| {
        let answer = Answer {
            id: (*id).into(),
            answer: (*text).into(),
            tokens: Vec::new(),
            visual_tokens: layers.map(|_| 81),
            visual_tokens_by_layer: layers,
            seconds: None,
        };
        (answer.id.clone(), answer)
    };
    Contestant {
        name: name.into(),
        digest: layers.map(|_| name.into()),
        answers: answers.iter().map(answer).collect(),
    }
}

const ALL: [usize; 3] = [0, 1, 2];
const FEW: Bootstrap = Bootstrap {
    resamples: 200,
    seed: 0,
};

#[test]
fn the_first_model_is_what_others_are_compared_with() {
    let questions = [
        ("1", "a.png", "colour", "red"),
        ("2", "a.png", "count", "2"),
        ("3", "b.png", "colour", "blue"),
        ("4", "c.png", "colour hard", "green"),
    ];
    let set = set(Metric::Exact, &questions);
    let models = [
        contestant(
            "base",
            &[("1", "red"), ("2", "two"), ("3", "blue"), ("4", "black")],
            Some(81.0),
        ),
        contestant(
            "duet",
            &[("1", "red"), ("2", "2"), ("3", "pink"), ("4", "black")],
            Some(27.0),
        ),
        contestant(
            "torch",
            &[("1", "red"), ("2", "two"), ("3", "blue"), ("4", "black")],
            None,
        ),
    ];
    let table = tabulate(&set, &ALL, &models, FEW).unwrap();
    let scopes: Vec<(Option<&str>, usize, usize)> = table
        .scopes
        .iter()
        .map(|s| (s.name.as_deref(), s.questions, s.images))
        .collect();
    let expected = [
        (None, 4, 3),
        (Some("colour"), 3, 3),
        (Some("count"), 1, 1),
        (Some("hard"), 1, 1),
    ];
    assert_eq!(scopes, expected);
    let [base, duet, torch] = &table.rows[..] else {
        panic!("{:?}", table.rows);
    };
    assert_eq!(
        (base.scores[0].accuracy.value, duet.scores[0].accuracy.value),
        (0.75, 0.5)
    );
    assert_eq!(
        (base.scores[0].kept, base.scores[0].agreement),
        (None, None)
    );
    assert_eq!(duet.scores[0].kept.unwrap().value, 0.5 / 0.75);
    // "two" and "2" are worth the same and are not the same answer.
    assert_eq!(duet.scores[0].agreement, Some(0.5));
    assert_eq!(duet.scores[2].accuracy.value, 1.0);
    // Nobody has the hard one: nothing to keep.
    assert_eq!(
        (duet.scores[3].accuracy.value, duet.scores[3].kept),
        (0.0, None)
    );
    assert_eq!(torch.scores[0].agreement, Some(1.0));
    assert_eq!((torch.visual, torch.digest.as_deref()), (None, None));
    let visual = duet.visual.unwrap();
    assert_eq!((visual.entering, visual.by_layer), (81.0, 27.0));
    assert!((visual.reduction.unwrap() - 2.0 / 3.0).abs() < 1e-12);
    assert_eq!(base.visual.unwrap().reduction, None);
    let pairs: Vec<(usize, usize)> = table.pairs.iter().map(|p| (p.model, p.other)).collect();
    assert_eq!(pairs, [(1, 2)]);
    assert!((table.pairs[0].kept_more.value - (0.5 - 0.75) / 0.75).abs() < 1e-12);

    let text = render::markdown(&table);
    assert!(
        text.contains("| duet | 27.00 | 66.7 % | 50.0 % ["),
        "{text}"
    );
    assert!(
        text.contains("| model | colour (3) | count (1) | hard (1) |"),
        "{text}"
    );
    let json = render::json(&table);
    assert_eq!(json["models"][1]["types"]["colour"]["questions"], 3);
    assert_eq!(json["models"][2]["visual_tokens"], serde_json::Value::Null);
}

#[test]
fn an_answer_that_is_missing_is_named() {
    let set = set(
        Metric::Exact,
        &[
            ("1", "a.png", "x", "red"),
            ("2", "b.png", "x", "red"),
            ("3", "c.png", "x", "red"),
        ],
    );
    let models = [contestant("base", &[("1", "red")], None)];
    let said = tabulate(&set, &ALL, &models, FEW).unwrap_err().to_string();
    assert_eq!(said, "base: no answer to question 2 and 1 more");
    // What was not asked need not be answered.
    assert_eq!(
        tabulate(&set, &[0], &models, FEW).unwrap().scopes[0].questions,
        1
    );
    assert!(tabulate(&set, &[], &models, FEW).is_err());
    assert!(tabulate(&set, &[0], &[], FEW).is_err());
}

/// Two images of one type and one of another: accuracies 3/4 and 1/2, accuracies+ 1/2 and 0, as `calculation.py`
/// counts, 100 · (3/4 + 1/2 + 1/2 + 0) in all.
#[test]
fn mme_scores_types_and_pairs() {
    let questions = [
        ("1", "a.png", "count perception", "Yes"),
        ("2", "a.png", "count perception", "No"),
        ("3", "b.png", "count perception", "Yes"),
        ("4", "b.png", "count perception", "No"),
        ("5", "c.png", "ocr perception", "Yes"),
        ("6", "c.png", "ocr perception", "No"),
    ];
    let set = set(Metric::Mme, &questions);
    let answers = [
        ("1", "Yes"),
        ("2", "no."),
        ("3", "yes"),
        ("4", "Yes"),
        ("5", "a pear"),
        ("6", "No"),
    ];
    let models = [
        contestant("base", &answers, None),
        contestant("same", &answers, None),
    ];
    let table = tabulate(&set, &ALL, &models, FEW).unwrap();
    let base = &table.rows[0].scores;
    assert_eq!(base[0].points.unwrap().value, 175.0);
    assert_eq!(base[0].accuracy.value, 4.0 / 6.0);
    assert!((base[0].rates["accuracy_plus"] - 1.0 / 3.0).abs() < 1e-12);
    let by_type: Vec<f64> = base[1..].iter().map(|s| s.points.unwrap().value).collect();
    assert_eq!(by_type, [125.0, 50.0, 175.0]);
    assert_eq!(table.rows[1].scores[0].kept.unwrap().value, 1.0);
    let text = render::markdown(&table);
    assert!(
        text.contains("| score |") && text.contains("| 175.0 ["),
        "{text}"
    );
}

#[test]
fn pope_has_its_rates() {
    let questions = [
        ("1", "a.png", "random", "yes"),
        ("2", "a.png", "random", "no"),
        ("3", "b.png", "popular", "yes"),
        ("4", "c.png", "popular", "no"),
    ];
    let set = set(Metric::Pope, &questions);
    let answers = [
        ("1", "Yes"),
        ("2", "Yes"),
        ("3", "No, there is not"),
        ("4", "no"),
    ];
    let table = tabulate(&set, &ALL, &[contestant("base", &answers, None)], FEW).unwrap();
    let rates = &table.rows[0].scores[0].rates;
    let found: Vec<(&str, f64)> = rates.iter().map(|(name, rate)| (*name, *rate)).collect();
    assert_eq!(
        found,
        [
            ("f1", 0.5),
            ("precision", 0.5),
            ("recall", 0.5),
            ("yes_ratio", 0.5)
        ]
    );
}
