//! Small samples in the very forms of the published files, their oddities included.

use super::*;
use crate::eval::DataSet;

struct Place(tempfile::TempDir);

impl Place {
    fn new(files: &[(&str, &str)]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for (name, text) in files {
            place.write(name, text);
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn convert(&self, format: Format, files: &[&str], images: Option<&str>) -> Result<DataSet> {
        let files: Vec<PathBuf> = files.iter().map(|name| self.path(name)).collect();
        let images = images.map(|name| self.path(name));
        let out = self.path("out");
        convert(format, &files, images.as_deref(), Images::Copy, &out)?;
        DataSet::open(&out)
    }

    fn refused(&self, format: Format, files: &[&str], images: Option<&str>) -> String {
        let error = self.convert(format, files, images).expect_err("refused");
        assert!(!self.path("out").exists(), "{error}");
        error.to_string()
    }
}

fn line(of: &[(&str, &str)]) -> String {
    let object: Map<String, Value> = of
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).into()))
        .collect();
    Value::Object(object).to_string()
}

/// Two questions about one image, and one that people asked in other letters.
fn textvqa() -> Place {
    let item = |id: u64, image: &str, question: &str, answers: [&str; 10]| {
        json!({
            "question": question, "image_id": image, "image_classes": ["Watch"], "image_width": 1024,
            "image_height": 681, "answers": answers, "question_tokens": ["what"], "question_id": id, "set_name": "val",
        })
    };
    let nine = "181f00d3ee2b2076";
    let data = [
        item(34602, nine, "what is the time?", ["10:08"; 10]),
        item(
            34603,
            nine,
            "what brand of watch is that?",
            [
                "nug0",
                "nug0",
                "hug0",
                "nug0",
                "nuga",
                "nug0",
                "nug0",
                "nug0",
                "nug0",
                "unanswerable",
            ],
        ),
        item(
            34604,
            "97b1112b17015396",
            "Whats the lowest number yard line that you can see?",
            ["30"; 10],
        ),
    ];
    let set = json!({ "dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data });
    let prompts = [
        line(&[
            ("question_id", nine),
            ("image", "181f00d3ee2b2076.jpg"),
            (
                "text",
                "What is the time?\nReference OCR token: N, u, g0\nAnswer the question using a single word or phrase.",
            ),
            ("category", "default"),
        ]),
        line(&[
            ("question_id", nine),
            ("image", "181f00d3ee2b2076.jpg"),
            (
                "text",
                "What brand of watch is that?\nReference OCR token: N, u, g0\nAnswer the question using a single word or phrase.",
            ),
            ("category", "default"),
        ]),
        line(&[
            ("question_id", "97b1112b17015396"),
            ("image", "97b1112b17015396.jpg"),
            (
                "text",
                "Whats the lowest number yard line that you can see?\nReference OCR token: \nAnswer the question using a single word or phrase.",
            ),
            ("category", "default"),
        ]),
    ];
    Place::new(&[
        ("TextVQA_0.5.1_val.json", &set.to_string()),
        ("llava.jsonl", &prompts.join("\n")),
        ("train_images/181f00d3ee2b2076.jpg", "a watch"),
        ("train_images/97b1112b17015396.jpg", "a field"),
        ("train_images/0054c91397f2fe05.jpg", "nobody asks"),
    ])
}

#[test]
fn textvqa_has_ten_answers_and_llavas_prompts() {
    let files = ["TextVQA_0.5.1_val.json", "llava.jsonl"];
    let place = textvqa();
    let set = place
        .convert(Format::TextVqa, &files, Some("train_images"))
        .unwrap();
    assert_eq!(
        (set.metric(), set.questions.len(), set.clusters.len()),
        (Some(Metric::Vqa), 3, 2)
    );
    let second = &set.questions[1];
    assert_eq!((second.id.as_str(), second.answers.len()), ("34603", 10));
    let said = set.prompt(second);
    assert!(
        said.starts_with("What brand of watch is that?\nReference OCR token: N, u, g0\nAnswer"),
        "{said}"
    );
    assert_eq!(second.metric.score(second, "Nug0."), 1.0);
    assert!((second.metric.score(second, "nuga") - 0.3).abs() < 1e-12);
    assert!(
        !place.path("out/images/0054c91397f2fe05.jpg").exists(),
        "copies are of what is asked"
    );
    // Without prompts the set's own questions, and LLaVA's words around them.
    let plain = textvqa()
        .convert(Format::TextVqa, &files[..1], Some("train_images"))
        .unwrap();
    assert_eq!(
        plain.prompt(&plain.questions[0]),
        "what is the time?\nAnswer the question using a single word or phrase."
    );
    assert!(
        textvqa()
            .refused(Format::TextVqa, &files[1..], Some("train_images"))
            .contains("TextVQA_0.5.1_val.json")
    );
    assert!(
        textvqa()
            .refused(Format::TextVqa, &files, None)
            .contains("--images")
    );
    let place = textvqa();
    std::fs::remove_file(place.path("train_images/97b1112b17015396.jpg")).unwrap();
    assert!(
        place
            .refused(Format::TextVqa, &files, Some("train_images"))
            .contains("97b1112b17015396.jpg: no such image")
    );
    // A prompt that the annotations do not know.
    let place = textvqa();
    place.write(
        "llava.jsonl",
        &line(&[
            ("question_id", "x"),
            ("image", "x.jpg"),
            ("text", "Why?"),
            ("category", "default"),
        ]),
    );
    let said = place.refused(Format::TextVqa, &files, Some("train_images"));
    assert!(
        said.contains("llava.jsonl:1: no question 'why?' about image x"),
        "{said}"
    );
}

#[cfg(unix)]
#[test]
fn images_are_linked_unless_they_are_to_be_copied() {
    let place = textvqa();
    let (files, images) = (
        [place.path("TextVQA_0.5.1_val.json")],
        place.path("train_images"),
    );
    let out = place.path("sets/textvqa");
    let written = convert(Format::TextVqa, &files, Some(&images), Images::Link, &out).unwrap();
    assert_eq!(
        written,
        Written {
            questions: 3,
            images: 2
        }
    );
    assert!(out.join("images").symlink_metadata().unwrap().is_symlink());
    assert_eq!(DataSet::open(&out).unwrap().questions.len(), 3);
    let again = convert(Format::TextVqa, &files, Some(&images), Images::Link, &out).unwrap_err();
    assert!(again.to_string().contains("is there already"), "{again}");
    assert_eq!(
        std::fs::read_dir(place.path("sets")).unwrap().count(),
        1,
        "nothing is left behind"
    );
}

const SNOW: &str = "COCO_val2014_000000310196.jpg";

/// Ids begin at 1 in each file; one question was misspelt and later put right.
fn pope() -> Place {
    let own = |id: u64, text: &str, label: &str| {
        json!({ "question_id": id, "image": SNOW, "text": text, "label": label }).to_string()
    };
    let llava = |id: u64, text: &str, category: &str| {
        let text = format!("{text}\nAnswer the question using a single word or phrase.");
        json!({ "question_id": id, "image": SNOW, "text": text, "category": category }).to_string()
    };
    let adversarial = [
        own(1, "Is there a snowboard in the image?", "yes"),
        own(2, "Is there an umbrella in the image?", "no"),
    ];
    let random = [
        own(1, "Is there a snowboard in the image?", "yes"),
        own(2, "Is there a bed in the image?", "no"),
    ];
    let prompts = [
        llava(1, "Is there a snowboard in the image?", "adversarial"),
        llava(2, "Is there an umbrella in the imange?", "adversarial"),
        llava(3001, "Is there a snowboard in the image?", "random"),
        llava(3002, "Is there a bed in the image?", "random"),
        llava(6001, "Is there a person in the image?", "popular"),
    ];
    Place::new(&[
        ("coco_pope_adversarial.json", &adversarial.join("\n")),
        ("coco_pope_random.json", &(random.join("\n") + "\n")),
        ("llava_pope_test.jsonl", &prompts.join("\n")),
        (&format!("val2014/{SNOW}"), "snow"),
    ])
}

#[test]
fn pope_has_a_file_for_each_category() {
    let labels = ["coco_pope_adversarial.json", "coco_pope_random.json"];
    let set = pope()
        .convert(Format::Pope, &labels, Some("val2014"))
        .unwrap();
    let found: Vec<(&str, &str, &str)> = set
        .questions
        .iter()
        .map(|q| (q.id.as_str(), q.answers[0].as_str(), q.types[0].as_str()))
        .collect();
    assert_eq!(
        found,
        [
            ("adversarial-1", "yes", "adversarial"),
            ("adversarial-2", "no", "adversarial"),
            ("random-1", "yes", "random"),
            ("random-2", "no", "random")
        ]
    );
    let all = [&labels[..], &["llava_pope_test.jsonl"]].concat();
    let set = pope().convert(Format::Pope, &all, Some("val2014")).unwrap();
    let ids: Vec<&str> = set.questions.iter().map(|q| q.id.as_str()).collect();
    assert_eq!(
        ids,
        ["1", "2", "3001", "3002"],
        "of the popular ones no labels were given"
    );
    assert!(
        set.prompt(&set.questions[1])
            .starts_with("Is there an umbrella in the imange?\nAnswer")
    );
    assert_eq!(set.questions[1].answers, ["no"]);
    // One file of one line is a file of lines all the same.
    let place = pope();
    let text = std::fs::read_to_string(place.path(labels[0])).unwrap();
    place.write(labels[0], text.lines().next().unwrap());
    assert_eq!(
        place
            .convert(Format::Pope, &labels[..1], Some("val2014"))
            .unwrap()
            .questions
            .len(),
        1
    );
    assert!(
        pope()
            .refused(Format::Pope, &["llava_pope_test.jsonl"], Some("val2014"))
            .contains("coco_pope_random.json")
    );
}

fn gqa() -> Place {
    let question = |question: &str, image: &str, answer: &str, structural: &str| {
        json!({
            "semantic": [{ "operation": "select", "dependencies": [], "argument": "scene" }], "entailed": [], "equivalent": [],
            "question": question, "imageId": image, "isBalanced": true, "groups": { "global": null, "local": "06-x" },
            "answer": answer, "semanticStr": "select: scene", "annotations": { "answer": {}, "question": {}, "fullAnswer": {} },
            "types": { "detailed": "weatherVerify", "semantic": "global", "structural": structural }, "fullAnswer": "No.",
        })
    };
    let set = json!({
        "201307251": question("Is it overcast?", "n161313", "no", "verify"),
        "201640614": question("Who is wearing the dress?", "n235859", "woman", "query"),
    });
    let prompts = [
        line(&[
            ("question_id", "201640614"),
            ("image", "n235859.jpg"),
            (
                "text",
                "Who is wearing the dress?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "default"),
        ]),
        line(&[
            ("question_id", "201307251"),
            ("image", "n161313.jpg"),
            (
                "text",
                "Is it overcast?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "default"),
        ]),
    ];
    Place::new(&[
        ("testdev_balanced_questions.json", &set.to_string()),
        ("llava_gqa_testdev_balanced.jsonl", &prompts.join("\n")),
        ("images/n161313.jpg", "sky"),
        ("images/n235859.jpg", "dress"),
    ])
}

#[test]
fn gqa_is_one_object_of_questions() {
    let files = [
        "llava_gqa_testdev_balanced.jsonl",
        "testdev_balanced_questions.json",
    ];
    let set = gqa().convert(Format::Gqa, &files, Some("images")).unwrap();
    let first = &set.questions[0];
    assert_eq!(
        (first.id.as_str(), first.answers[0].as_str()),
        ("201640614", "woman")
    );
    assert_eq!(first.types, ["query", "global"]);
    assert_eq!(
        set.prompt(first),
        "Who is wearing the dress?\nAnswer the question using a single word or phrase."
    );
    let plain = gqa()
        .convert(Format::Gqa, &files[1..], Some("images"))
        .unwrap();
    assert_eq!(plain.questions[0].id, "201307251");
    assert_eq!(
        plain.prompt(&plain.questions[0]),
        "Is it overcast?\nAnswer the question using a single word or phrase."
    );
    assert!(
        gqa()
            .refused(Format::Gqa, &files[..1], Some("images"))
            .contains("testdev_balanced_questions.json")
    );
}

/// Both layouts of a category, a final line without an end, and two spaces in front of the last sentence.
fn mme() -> Place {
    let prompts = [
        line(&[
            ("question_id", "code_reasoning/0020.png"),
            ("image", "code_reasoning/0020.png"),
            (
                "text",
                "Is a python code shown in the picture?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "code_reasoning"),
        ]),
        line(&[
            ("question_id", "code_reasoning/0020.png"),
            ("image", "code_reasoning/0020.png"),
            (
                "text",
                "Is a c++ code shown in the picture?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "code_reasoning"),
        ]),
        line(&[
            ("question_id", "artwork/images/14777.jpg"),
            ("image", "artwork/images/14777.jpg"),
            (
                "text",
                "Does this artwork belong to the type of religious?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "artwork"),
        ]),
        line(&[
            ("question_id", "artwork/images/14777.jpg"),
            ("image", "artwork/images/14777.jpg"),
            (
                "text",
                "Does this artwork belong to the type of historical?\nAnswer the question using a single word or phrase.",
            ),
            ("category", "artwork"),
        ]),
    ];
    Place::new(&[
        (
            "MME/code_reasoning/0020.txt",
            "Is a c++ code shown in the picture? Please answer yes or no.\tYes\nIs a python code shown in the picture?  Please answer yes or no.\tNo",
        ),
        ("MME/code_reasoning/0020.png", "code"),
        (
            "MME/artwork/questions_answers_YN/14777.txt",
            "Does this artwork belong to the type of religious? Please answer yes or no.\tYes\nDoes this artwork belong to the type of historical? Please answer yes or no.\tNo\n\n",
        ),
        ("MME/artwork/images/14777.jpg", "art"),
        ("MME/eval_tool/readme.md", "not a category"),
        ("llava_mme.jsonl", &prompts.join("\n")),
    ])
}

#[test]
fn mme_is_pairs_in_folders() {
    let set = mme().convert(Format::Mme, &["MME"], None).unwrap();
    assert_eq!(
        (set.metric(), set.questions.len(), set.clusters.len()),
        (Some(Metric::Mme), 4, 2)
    );
    let first = &set.questions[0];
    assert_eq!(
        (first.id.as_str(), first.answers[0].as_str()),
        ("artwork/artwork/images/14777.jpg#1", "Yes")
    );
    assert_eq!(first.types, ["artwork", "perception"]);
    assert_eq!(set.questions[2].types, ["code_reasoning", "cognition"]);
    assert!(
        set.prompt(first)
            .ends_with("religious? Please answer yes or no.")
    );

    let set = mme()
        .convert(Format::Mme, &["MME", "llava_mme.jsonl"], None)
        .unwrap();
    let first = &set.questions[0];
    assert_eq!(
        set.prompt(first),
        "Is a python code shown in the picture?\nAnswer the question using a single word or phrase."
    );
    assert_eq!(
        (first.answers[0].as_str(), first.images[0].as_str()),
        ("No", "images/code_reasoning/0020.png")
    );
    assert!(
        mme()
            .refused(Format::Mme, &["llava_mme.jsonl"], None)
            .contains("MME's directory")
    );
    let place = mme();
    place.write("MME/count/0001.txt", "How many?\tYes\n");
    assert!(
        place
            .refused(Format::Mme, &["MME"], None)
            .contains("no image 0001.jpg or .png")
    );
    let place = mme();
    place.write(
        "MME/code_reasoning/0020.txt",
        "Is it? Please answer yes or no. Yes\n",
    );
    let said = place.refused(Format::Mme, &["MME"], None);
    assert!(
        said.contains("0020.txt:1: expected question<TAB>Yes or No"),
        "{said}"
    );
    // Half a pair.
    let place = mme();
    place.write(
        "MME/code_reasoning/0020.txt",
        "Is it? Please answer yes or no.\tYes\n",
    );
    assert!(place.refused(Format::Mme, &["MME"], None).contains("has 1"));
}

#[test]
fn mme_is_also_one_table() {
    let row = |question: &str, answer: &str| {
        line(&[
            ("question_id", "code_reasoning/0020.png"),
            ("question", question),
            ("answer", answer),
            ("category", "code_reasoning"),
        ])
    };
    let place = mme();
    place.write(
        "mme.jsonl",
        &[
            row("Is it? Please answer yes or no.", "Yes"),
            row("Is it not? Please answer yes or no.", "No"),
        ]
        .join("\n"),
    );
    let set = place
        .convert(Format::Mme, &["mme.jsonl"], Some("MME"))
        .unwrap();
    assert_eq!(set.questions[0].images, ["images/code_reasoning/0020.png"]);
    assert_eq!(set.questions[0].group, set.questions[1].group);

    // The image itself, in base64, once for each of its questions; quoted as pandas does.
    let bytes: Vec<u8> = (0..=255).cycle().take(700).collect();
    let data = encoded(&bytes);
    let rows = [
        "index\timage\tquestion\tanswer\tcategory".to_owned(),
        format!("0\t{data}\t\"Is it a \"\"code\"\"? Please answer yes or no.\"\tYes\tOCR"),
        format!("1\t{data}\tIs it not? Please answer yes or no.\tNo\tOCR"),
    ];
    let place = mme();
    place.write("mme.tsv", &rows.join("\n"));
    let set = place.convert(Format::Mme, &["mme.tsv"], None).unwrap();
    assert_eq!(
        set.questions[0].text,
        "Is it a \"code\"? Please answer yes or no."
    );
    assert_eq!(set.questions[1].images, ["images/OCR/0000.jpg"]);
    assert_eq!(
        std::fs::read(place.path("out/images/OCR/0000.jpg")).unwrap(),
        bytes
    );
    place.write("short.tsv", "index\tquestion\n0\n");
    let said = convert(
        Format::Mme,
        &[place.path("short.tsv")],
        None,
        Images::Copy,
        &place.path("x"),
    )
    .unwrap_err();
    assert!(
        said.to_string()
            .contains("short.tsv:2: 1 cells, the head has 2"),
        "{said}"
    );
}

/// Base64, to check the decoder against.
fn encoded(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    bytes
        .chunks(3)
        .map(|three| {
            let bits = three
                .iter()
                .fold(0_u32, |bits, b| bits << 8 | u32::from(*b))
                << (8 * (3 - three.len()));
            (0..4)
                .map(|at| match at <= three.len() {
                    true => char::from(LETTERS[(bits >> (18 - 6 * at) & 63) as usize]),
                    false => '=',
                })
                .collect::<String>()
        })
        .collect()
}

fn sqa() -> Place {
    let problem = |question: &str,
                   choices: &[&str],
                   answer: u64,
                   hint: &str,
                   image: Option<&str>| {
        json!({
            "question": question, "choices": choices, "answer": answer, "hint": hint, "image": image, "task": "closed choice",
            "grade": "grade2", "subject": "natural science", "topic": "physics", "category": "Magnets", "skill": "s",
            "lecture": "l", "solution": "s", "split": "test",
        })
    };
    let problems = json!({
        "1": problem("Which is a train problem?", &["a", "b"], 0, "", None),
        "4": problem("Which of these states is farthest north?", &["West Virginia", "Louisiana", "Arizona", "Oklahoma"], 0, "", Some("image.png")),
        "5": problem("Will these magnets attract?", &["attract", "repel"], 1, "Two magnets are placed as shown.", None),
    });
    let splits = json!({ "train": ["1"], "val": [], "test": ["4", "5"] });
    let talk = |said: &str, answer: &str| json!([{ "from": "human", "value": said }, { "from": "gpt", "value": answer }]);
    let llava = json!([
        { "id": "4", "conversations": talk("<image>\nWhich of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma", "The answer is A."), "image": "4/image.png" },
        { "id": "5", "conversations": talk("Context: Two magnets are placed as shown.\nWill these magnets attract?\nA. attract\nB. repel", "The answer is B.") },
    ]);
    Place::new(&[
        ("problems.json", &problems.to_string()),
        ("pid_splits.json", &splits.to_string()),
        ("llava_test_CQM-A.json", &llava.to_string()),
        ("images/test/4/image.png", "states"),
    ])
}

#[test]
fn sqa_is_letters_of_choices() {
    let own = ["pid_splits.json", "problems.json"];
    let set = sqa().convert(Format::Sqa, &own, Some("images")).unwrap();
    let [north, magnets] = &set.questions[..] else {
        panic!("the test split has two: {:?}", set.questions);
    };
    assert_eq!(north.images, ["images/test/4/image.png"]);
    assert_eq!(north.types, ["natural science", "with image"]);
    assert_eq!(
        (magnets.answers[0].as_str(), magnets.images.len()),
        ("B", 0)
    );
    assert_eq!(
        set.prompt(magnets),
        "Context: Two magnets are placed as shown.\nWill these magnets attract?\nA. attract\nB. repel\nAnswer with the \
         option's letter from the given choices directly."
    );
    // LLaVA's folder of images is the split's own.
    let all = ["problems.json", "llava_test_CQM-A.json"];
    let set = sqa()
        .convert(Format::Sqa, &all, Some("images/test"))
        .unwrap();
    assert_eq!(set.questions[0].images, ["images/4/image.png"]);
    assert!(
        set.prompt(&set.questions[0])
            .starts_with("Which of these states is farthest north?\nA. West")
    );
    assert_eq!(set.questions[0].metric.score(&set.questions[0], "A"), 1.0);
    assert!(
        sqa()
            .refused(Format::Sqa, &own[..1], Some("images"))
            .contains("problems.json")
    );
    let place = sqa();
    place.write("pid_splits.json", r#"{"test": ["9"]}"#);
    assert!(
        place
            .refused(Format::Sqa, &own, Some("images"))
            .contains("problem 9 is missing")
    );
}

#[test]
fn what_is_no_file_of_the_set_is_refused() {
    for format in [Format::TextVqa, Format::Pope, Format::Gqa, Format::Sqa] {
        let place = Place::new(&[
            ("x.json", "[1, 2]"),
            ("y.jsonl", "{\"a\": 1}\n{\"a\": 2}\n"),
            ("z.json", "{\"a\":"),
        ]);
        for file in ["x.json", "y.jsonl"] {
            let said = place.refused(format, &[file], None);
            assert!(
                said.contains("expected") || said.contains("item 0"),
                "{format:?}: {said}"
            );
        }
        let said = place.refused(format, &["z.json"], None);
        assert!(
            said.contains("z.json:1: neither a JSON document nor JSON lines"),
            "{said}"
        );
    }
}
