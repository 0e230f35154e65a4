use super::*;

const SETTINGS: &str = r#"{"schema_version": 1, "name": "tiles", "prompt": "{question} Answer:", "max_new_tokens": 4}"#;

struct Place(tempfile::TempDir);

impl Place {
    fn new(questions: &str) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        place.write("dataset.json", SETTINGS);
        place.write("questions.jsonl", questions);
        for picture in [
            "images/1.png",
            "images/2.png",
            "clips/1/0.png",
            "clips/1/1.png",
        ] {
            place.write(picture, picture);
        }
        place
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn open(&self) -> Result<DataSet> {
        DataSet::open(self.0.path())
    }

    fn refused(&self) -> String {
        self.open().expect_err("refused").to_string()
    }
}

const GOOD: &str = r#"
{"id": "1-1", "image": "images/1.png", "question": "Which colour?", "answer": "red", "type": "colour", "tile": [0, 1]}
{"id": 2, "image": "images/2.png", "question": "How many?", "answers": ["3", "three"], "type": ["count", "hard"]}
{"id": "1-2", "image": "images/1.png", "question": "Is it round?", "answer": "no", "metric": "pope"}
{"id": "c", "video": "clips/1", "question": "Which way?", "answer": "left"}
{"id": "two", "images": ["images/1.png", "images/2.png"], "question": "Same?", "answer": "yes"}
{"id": "t", "question": "1 + 1?", "answer": "2"}
{"id": "u", "question": "2 + 2?", "answer": "4"}
"#;

#[test]
fn questions_are_read_and_gathered_by_what_they_are_about() {
    let set = Place::new(GOOD).open().unwrap();
    assert_eq!((set.name.as_str(), set.max_new_tokens), ("tiles", 4));
    let ids: Vec<&str> = set.questions.iter().map(|q| q.id.as_str()).collect();
    assert_eq!(ids, ["1-1", "2", "1-2", "c", "two", "t", "u"]);
    assert_eq!(set.questions[0].line, 2);
    assert_eq!(set.questions[1].types, ["count", "hard"]);
    assert_eq!(set.questions[1].answers, ["3", "three"]);
    assert_eq!(set.prompt(&set.questions[0]), "Which colour? Answer:");
    assert_eq!(
        (set.questions[0].metric, set.questions[2].metric),
        (Metric::Exact, Metric::Pope)
    );
    assert_eq!(set.metric(), None);
    let clusters: Vec<&[usize]> = set
        .clusters
        .iter()
        .map(|c| c.questions.as_slice())
        .collect();
    assert_eq!(clusters, [&[0, 2][..], &[1], &[3], &[4], &[5], &[6]]);
}

#[test]
fn limits_and_parts_keep_what_is_about_a_picture_together() {
    let set = Place::new(GOOD).open().unwrap();
    assert_eq!(set.select(None, None), [0, 1, 2, 3, 4, 5]);
    assert_eq!(set.select(Some(3), None), [0, 1]);
    assert_eq!(set.select(Some(1), None), [0], "one picture at least");
    let part = |text: &str| set.select(Some(6), Some(Shard::parse(text).unwrap()));
    assert_eq!(part("1/2"), [0, 2, 4]);
    assert_eq!(part("2/2"), [1, 3]);
    for wrong in ["0/2", "3/2", "1", "a/b", "1/0", ""] {
        assert!(Shard::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn what_is_no_data_set_is_refused_with_file_and_line() {
    let first = r#"{"id": "a", "image": "images/1.png", "question": "What?", "answer": "red"}"#;
    for (second, says) in [
        (
            r#"{"id": "a", "question": "What?", "answer": "x"}"#,
            "line 1 too",
        ),
        (
            r#"{"id": "b", "image": "images/9.png", "question": "What?", "answer": "x"}"#,
            "9.png",
        ),
        (
            r#"{"id": "b", "image": "../dataset.json", "question": "What?", "answer": "x"}"#,
            "leaves the data set",
        ),
        (
            r#"{"id": "b", "image": "/etc/hosts", "question": "What?", "answer": "x"}"#,
            "leaves the data set",
        ),
        (
            r#"{"id": "b", "image": "images", "question": "What?", "answer": "x"}"#,
            "no image file",
        ),
        (r#"{"id": "b", "question": "What?"}"#, "no answer"),
        (
            r#"{"id": "b", "question": "What?", "answers": []}"#,
            "no answer",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": 3}"#,
            "`answer` is 3",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": "x", "answers": ["y"]}"#,
            "both `answer`",
        ),
        (
            r#"{"id": "b", "question": " ", "answer": "x"}"#,
            "`question` is empty",
        ),
        (r#"{"id": "b", "answer": "x"}"#, "`question` is missing"),
        (r#"{"question": "What?", "answer": "x"}"#, "`id` is missing"),
        (
            r#"{"id": 1.5, "question": "What?", "answer": "x"}"#,
            "`id` is 1.5",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": "x", "metric": "bleu"}"#,
            "one of exact, vqa",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": "x", "metric": "pope"}"#,
            "yes or no",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": "x", "metric": "vqa"}"#,
            "four people",
        ),
        (
            r#"{"id": "b", "image": "images/1.png", "video": "clips/1", "question": "?", "answer": "x"}"#,
            "one or the other",
        ),
        (
            r#"{"id": "b", "question": "What?", "answer": "x""#,
            "no JSON at column",
        ),
        (r#"["id"]"#, "expected a JSON object"),
        (
            r#"{"id": "b", "image": "images/1.png", "question": "?", "answer": "yes", "metric": "mme"}"#,
            "two questions",
        ),
    ] {
        let said = Place::new(&format!("{first}\n{second}\n")).refused();
        assert!(
            said.contains("questions.jsonl:2: ") && said.contains(says),
            "{second}: {said}"
        );
    }
    let said = Place::new("\n\n").refused();
    assert!(said.contains("questions.jsonl: no question"), "{said}");
    let empty = Place::new(first);
    empty.write("images/1.png", "");
    assert!(empty.refused().contains("1.png is empty"));
}

#[test]
fn settings_are_checked() {
    for (settings, says) in [
        ("{", "dataset.json: "),
        ("[]", "expected a JSON object"),
        (r#"{"name": "x"}"#, "`schema_version` is missing"),
        (r#"{"schema_version": 2}"#, "this program knows 1"),
        (
            r#"{"schema_version": 1, "prompt": "Answer:"}"#,
            "no place for the question",
        ),
        (r#"{"schema_version": 1, "max_new_tokens": 0}"#, "above 0"),
        (r#"{"schema_version": 1, "metric": "f1"}"#, "one of exact"),
        (r#"{"schema_version": 1, "name": 3}"#, "`name` is 3"),
    ] {
        let place = Place::new(GOOD);
        place.write("dataset.json", settings);
        let said = place.refused();
        assert!(said.contains(says), "{settings}: {said}");
    }
    let place = Place::new(GOOD);
    place.write("dataset.json", r#"{"schema_version": 1}"#);
    let set = place.open().unwrap();
    assert_eq!(
        (set.prompt.as_str(), set.max_new_tokens),
        ("{question}", USUAL_TOKENS)
    );
}

#[test]
fn the_digest_is_of_everything_that_is_asked() {
    let digest = |place: &Place| place.open().unwrap().digest;
    let place = Place::new(GOOD);
    let before = digest(&place);
    assert_eq!(before, digest(&Place::new(GOOD)), "wherever the set lies");
    place.write("images/3.png", "nobody asks about it");
    assert_eq!(before, digest(&place));
    let mut seen = BTreeSet::from([before]);
    for (name, text) in [
        ("images/1.png", "another picture"),
        ("clips/1/1.png", "another frame"),
        ("clips/1/2.png", "one frame more"),
        ("dataset.json", r#"{"schema_version": 1}"#),
        ("questions.jsonl", &GOOD[1..]),
    ] {
        place.write(name, text);
        assert!(seen.insert(digest(&place)), "{name}");
    }
}
