use super::*;

fn header(shard: Option<Shard>) -> Header {
    Header::new(
        ModelId {
            name: "base".into(),
            digest: "m".into(),
            place: 0,
        },
        SetId {
            name: "tiles".into(),
            digest: "d".into(),
        },
        Settings {
            version: "1".into(),
            decoding: "greedy".into(),
            max_new_tokens: 4,
            providers: Vec::new(),
        },
        shard,
    )
}

fn answer(id: &str) -> Answer {
    Answer {
        id: id.into(),
        answer: format!("the answer to {id}"),
        tokens: vec![1, 2],
        visual_tokens: Some(36),
        visual_tokens_by_layer: Some(20.25),
        seconds: Some(0.5),
    }
}

/// Wherever a kill cuts the file off, the answers before it are there, and the run goes on.
#[test]
fn a_file_that_was_cut_off_anywhere_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.jsonl");
    let all = [answer("1"), answer("2"), answer("3")];
    let (mut file, before) = AnswerFile::open(&path, &header(None)).unwrap();
    assert!(before.is_empty());
    all.iter().for_each(|a| file.push(a).unwrap());
    drop(file);
    let whole = std::fs::read(&path).unwrap();
    let ends: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] == b'\n').collect();
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let (mut file, found) = AnswerFile::open(&path, &header(None)).unwrap();
        let lines = ends.iter().filter(|end| **end < cut).count();
        assert_eq!(found, all[..lines.saturating_sub(1)], "cut at {cut}");
        all[found.len()..]
            .iter()
            .for_each(|a| file.push(a).unwrap());
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), whole, "cut at {cut}");
    }
}

#[test]
fn answers_of_another_run_are_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.jsonl");
    let (mut file, _) = AnswerFile::open(&path, &header(None)).unwrap();
    file.push(&answer("1")).unwrap();
    let busy = AnswerFile::open(&path, &header(None))
        .unwrap_err()
        .to_string();
    assert!(busy.contains("another run writes to it"), "{busy}");
    drop(file);
    type Change = fn(&mut Header);
    let changes: [(Change, &str); 6] = [
        (
            |h| h.model.digest = "x".into(),
            "the model's files have the digest m there and x now",
        ),
        (
            |h| h.dataset.digest = "x".into(),
            "the data set has the digest d there and x now",
        ),
        (
            |h| h.settings.max_new_tokens = 9,
            "at most 4 there and 9 now",
        ),
        (
            |h| h.settings.providers = vec!["cuda".into()],
            "[] there and [cuda] now",
        ),
        (
            |h| h.settings.version = "2".into(),
            "version is 1 there and 2 now",
        ),
        (
            |h| h.shard = Some("1/2".into()),
            "part of the set is all there and 1/2 now",
        ),
    ];
    for (change, says) in changes {
        let mut other = header(None);
        change(&mut other);
        let said = AnswerFile::open(&path, &other).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
    // Another name or place is the same model.
    let mut moved = header(None);
    moved.model.name = "elsewhere".into();
    moved.model.place = 3;
    let (_, found) = AnswerFile::open(&path, &moved).unwrap();
    assert_eq!(found, [answer("1")]);
}

#[test]
fn answers_of_other_programs_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("torch.jsonl");
    let text = "{\"id\": \"a\", \"answer\": \" red \"}\n\n{\"question_id\": 7, \"text\": \"blue\", \"metadata\": {}}\n";
    std::fs::write(&path, text).unwrap();
    let (header, answers) = read(&path).unwrap();
    assert!(header.is_none());
    let found: Vec<(&str, &str)> = answers.iter().map(|a| (&*a.id, &*a.answer)).collect();
    assert_eq!(found, [("a", "red"), ("7", "blue")]);
    for (text, says) in [
        (
            "{\"id\": \"a\", \"answer\": \"x\"}\n{\"id\": \"a\", \"answer\": \"y\"}",
            "torch.jsonl:2: question a is answered on line 1 too",
        ),
        ("{\"id\": \"a\"}", "torch.jsonl:1: `answer` is missing"),
        ("{\"answer\": \"a\"}", "`id` is missing"),
        (
            "{\"id\": \"a\", \"answer\": 3}",
            "`answer` is missing or no string",
        ),
        ("\nred", "torch.jsonl:2: no JSON"),
    ] {
        std::fs::write(&path, text).unwrap();
        let said = read(&path).unwrap_err().to_string();
        assert!(said.contains(says), "{said}");
    }
    // Nor is such a file appended to.
    std::fs::write(&path, "{\"id\": \"a\", \"answer\": \"x\"}\n").unwrap();
    let said = AnswerFile::open(&path, &self::header(None))
        .unwrap_err()
        .to_string();
    assert!(said.contains("nothing says which model"), "{said}");
}
