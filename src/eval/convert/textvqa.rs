//! TextVQA: `TextVQA_0.5.1_val.json` (`{"data": [{"question_id", "image_id", "question", "answers": [ten], …}]}`), and
//! LLaVA's `llava_textvqa_val_v051_ocr.jsonl`, whose `question_id` is the image's: its lines are found by image and
//! question in lower case, as `eval_textvqa.py` does.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{Converted, Result, SHORT_PROMPT, Source, asked, text};
use crate::eval::error::EvalError;
use crate::eval::metric::Metric;

const WANTED: &str = "expected TextVQA_0.5.1_val.json (an object with a list `data` of questions with `image_id` and \
                      `answers`) and, if prompts are to be LLaVA's, llava_textvqa_val_v051_ocr.jsonl";

pub(super) fn read(files: &[Source]) -> Result<Converted> {
    let (mut set, mut llava) = (None, None);
    for file in files {
        let data = file.document().and_then(|d| d.get("data")?.as_array());
        match (data, file.llava()) {
            (Some(data), _) => set = Some((file, data)),
            (None, Some(lines)) => llava = Some((file, lines)),
            (None, None) => return Err(file.wrong(WANTED)),
        }
    }
    let (file, data) = set.ok_or_else(|| EvalError::Mismatch(WANTED.into()))?;
    let mut items: Vec<Item> = Vec::with_capacity(data.len());
    for (index, value) in data.iter().enumerate() {
        let wrong = |reason: String| file.wrong(format!("`data`, item {index}: {reason}"));
        let object = value.as_object().ok_or_else(|| wrong("no object".into()))?;
        items.push(Item::read(object).map_err(wrong)?);
    }
    let (questions, prompt) = match llava {
        None => (
            items.iter().map(|item| item.line(&item.question)).collect(),
            SHORT_PROMPT,
        ),
        Some((file, lines)) => (by_prompts(&items, file, lines)?, "{question}"),
    };
    Ok(Converted {
        name: "TextVQA",
        metric: Metric::Vqa,
        prompt,
        max_new_tokens: 32,
        questions,
        images: Vec::new(),
    })
}

struct Item {
    id: String,
    image: String,
    question: String,
    answers: Vec<Value>,
}

impl Item {
    fn read(object: &Map<String, Value>) -> std::result::Result<Self, String> {
        let answers = object.get("answers").and_then(Value::as_array);
        let answers =
            answers.ok_or("`answers` is missing; the test split has none and cannot be scored")?;
        Ok(Self {
            id: text(object, "question_id")?,
            image: text(object, "image_id")?,
            question: text(object, "question")?,
            answers: answers.clone(),
        })
    }

    fn line(&self, question: &str) -> Value {
        json!({
            "id": self.id,
            "image": format!("{}.jpg", self.image),
            "question": question,
            "answers": self.answers,
        })
    }
}

fn by_prompts(
    items: &[Item],
    file: &Source,
    lines: &[(usize, Map<String, Value>)],
) -> Result<Vec<Value>> {
    let mut known: HashMap<(String, String), Vec<&Item>> = HashMap::new();
    for item in items.iter().rev() {
        let key = (item.image.clone(), item.question.to_lowercase());
        known.entry(key).or_default().push(item);
    }
    let found = lines.iter().map(|(number, object)| {
        let wrong = |reason: String| file.wrong_line(*number, reason);
        let (image, prompt) = (
            text(object, "question_id").map_err(wrong)?,
            text(object, "text").map_err(wrong)?,
        );
        let key = (image, asked(&prompt).to_lowercase());
        // A question that is there twice is taken once for each line.
        let item = known.get_mut(&key).and_then(Vec::pop).ok_or_else(|| {
            wrong(format!(
                "no question '{}' about image {} is in the annotations, or not as often",
                key.1, key.0
            ))
        })?;
        Ok(item.line(&prompt))
    });
    found.collect()
}
