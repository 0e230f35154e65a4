//! GQA: `testdev_balanced_questions.json` (`{"ID": {"question", "imageId", "answer", "types": {"structural",
//! "semantic", …}, …}}`), and LLaVA's `llava_gqa_testdev_balanced.jsonl`, whose `question_id` is the same.

use serde_json::{Map, Value, json};

use super::{Converted, Result, SHORT_PROMPT, Source, text};
use crate::eval::error::EvalError;
use crate::eval::metric::Metric;

const WANTED: &str = "expected testdev_balanced_questions.json (an object of questions with `imageId` and `answer`) and, \
                      if prompts are to be LLaVA's, llava_gqa_testdev_balanced.jsonl";

pub(super) fn read(files: &[Source]) -> Result<Converted> {
    let (mut set, mut llava) = (None, None);
    for file in files {
        let document = file.document().and_then(Value::as_object);
        let first = document.and_then(|d| d.values().next()?.get("imageId"));
        match (document, first, file.llava()) {
            (Some(document), Some(_), _) => set = Some((file, document)),
            (_, _, Some(lines)) => llava = Some((file, lines)),
            _ => return Err(file.wrong(WANTED)),
        }
    }
    let (file, set) = set.ok_or_else(|| EvalError::Mismatch(WANTED.into()))?;
    let (questions, prompt): (Result<Vec<Value>>, _) = match llava {
        None => {
            let each = set.iter().map(|(id, value)| line(file, id, value, None));
            (each.collect(), SHORT_PROMPT)
        }
        Some((prompts, lines)) => {
            let each = lines.iter().map(|(number, object)| {
                let wrong = |reason: String| prompts.wrong_line(*number, reason);
                let id = text(object, "question_id").map_err(wrong)?;
                let value = set.get(&id).ok_or_else(|| {
                    wrong(format!("question {id} is not in {}", file.path.display()))
                })?;
                let prompt = text(object, "text").map_err(wrong)?;
                line(file, &id, value, Some(&prompt))
            });
            (each.collect(), "{question}")
        }
    };
    Ok(Converted {
        name: "GQA",
        metric: Metric::Gqa,
        prompt,
        max_new_tokens: 16,
        questions: questions?,
        images: Vec::new(),
    })
}

fn line(file: &Source, id: &str, value: &Value, prompt: Option<&str>) -> Result<Value> {
    let empty = Map::new();
    let object = value.as_object().unwrap_or(&empty);
    let get = |key: &str| {
        text(object, key).map_err(|reason| file.wrong(format!("question {id}: {reason}")))
    };
    let own = get("question")?;
    let kind = |key: &str| Some(object.get("types")?.get(key)?.as_str()?.to_owned());
    let types: Vec<String> = [kind("structural"), kind("semantic")]
        .into_iter()
        .flatten()
        .collect();
    Ok(json!({
        "id": id,
        "image": format!("{}.jpg", get("imageId")?),
        "question": prompt.unwrap_or(&own),
        "answer": get("answer")?,
        "type": types,
    }))
}
