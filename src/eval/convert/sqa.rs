//! ScienceQA: `problems.json` (`{"ID": {"question", "choices", "answer": index, "hint", "image", "subject", "split",
//! …}}`), `pid_splits.json` (`{"test": [ids], …}`; the test split is taken), and LLaVA's `llava_test_CQM-A.json`, a list
//! of conversations whose `id` is the problem's.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Converted, Result, Source, text};
use crate::eval::error::EvalError;
use crate::eval::metric::Metric;

const WANTED: &str = "expected problems.json, pid_splits.json and, if prompts are to be LLaVA's, llava_test_CQM-A.json";

/// What LLaVA-1.5 is told behind a multiple-choice question (`--single-pred-prompt` of `model_vqa_science.py`).
const CHOOSE: &str = "{question}\nAnswer with the option's letter from the given choices directly.";

const SPLIT: &str = "test";

pub(super) fn read(files: &[Source], images: Option<&Path>) -> Result<Converted> {
    let (mut problems, mut splits, mut llava) = (None, None, None);
    for file in files {
        match file.document() {
            Some(Value::Array(list)) => llava = Some((file, list)),
            Some(Value::Object(all)) => match all.get(SPLIT) {
                Some(Value::Array(ids)) => splits = Some(ids),
                _ if all.values().all(|p| p.get("choices").is_some()) => {
                    problems = Some((file, all))
                }
                _ => return Err(file.wrong(WANTED)),
            },
            _ => return Err(file.wrong(WANTED)),
        }
    }
    let missing = || EvalError::Mismatch(WANTED.into());
    let (file, problems) = problems.ok_or_else(missing)?;
    let problem = |id: &str| {
        let found = problems.get(id).and_then(Value::as_object);
        found.ok_or_else(|| file.wrong(format!("problem {id} is missing")))
    };
    let mut questions = Vec::new();
    match llava {
        Some((conversations, list)) => {
            for (index, entry) in list.iter().enumerate() {
                let wrong = |reason: &str| conversations.wrong(format!("item {index}: {reason}"));
                let object = entry.as_object().ok_or_else(|| wrong("no object"))?;
                let id = text(object, "id").map_err(|reason| wrong(&reason))?;
                let first = object
                    .get("conversations")
                    .and_then(|c| c.get(0)?.get("value")?.as_str());
                let said = first.ok_or_else(|| wrong("no conversation"))?;
                let question = said.replace("<image>", "");
                let image = object
                    .get("image")
                    .and_then(Value::as_str)
                    .map(str::to_owned);
                questions.push(line(file, &id, problem(&id)?, question.trim(), image)?);
            }
        }
        None => {
            for id in splits.ok_or_else(missing)? {
                let id = id.as_str().map_or_else(|| id.to_string(), str::to_owned);
                let object = problem(&id)?;
                let image = object.get("image").and_then(Value::as_str);
                let image = image.map(|name| place(&id, object, name, images));
                let question = written(file, &id, object)?;
                questions.push(line(file, &id, object, &question, image)?);
            }
        }
    }
    Ok(Converted {
        name: "ScienceQA",
        metric: Metric::Sqa,
        prompt: CHOOSE,
        max_new_tokens: 16,
        questions,
        images: Vec::new(),
    })
}

/// Images lie in a folder for each problem, those of all splits in one folder or in one for each split.
fn place(id: &str, problem: &Map<String, Value>, name: &str, images: Option<&Path>) -> String {
    let split = problem
        .get("split")
        .and_then(Value::as_str)
        .unwrap_or(SPLIT);
    let flat = format!("{id}/{name}");
    match images {
        Some(images) if images.join(split).join(&flat).is_file() => format!("{split}/{flat}"),
        _ => flat,
    }
}

fn choices(problem: &Map<String, Value>) -> Option<Vec<&str>> {
    problem
        .get("choices")?
        .as_array()?
        .iter()
        .map(Value::as_str)
        .collect()
}

/// Context, question and lettered choices.
fn written(file: &Source, id: &str, problem: &Map<String, Value>) -> Result<String> {
    let wrong = |reason: String| file.wrong(format!("problem {id}: {reason}"));
    let hint = problem
        .get("hint")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .trim();
    let mut lines: Vec<String> = Vec::new();
    if !hint.is_empty() {
        lines.push(format!("Context: {hint}"));
    }
    lines.push(text(problem, "question").map_err(wrong)?);
    let choices =
        choices(problem).ok_or_else(|| wrong("`choices` is no list of strings".into()))?;
    lines.extend(
        choices
            .iter()
            .zip('A'..)
            .map(|(choice, letter)| format!("{letter}. {choice}")),
    );
    Ok(lines.join("\n"))
}

fn line(
    file: &Source,
    id: &str,
    problem: &Map<String, Value>,
    question: &str,
    image: Option<String>,
) -> Result<Value> {
    let wrong = |reason: &str| file.wrong(format!("problem {id}: {reason}"));
    let choices = choices(problem).ok_or_else(|| wrong("`choices` is no list of strings"))?;
    let index = problem.get("answer").and_then(Value::as_u64);
    let letter = index
        .and_then(|at| u8::try_from(at).ok())
        .filter(|at| usize::from(*at) < choices.len())
        .map(|at| char::from(b'A' + at).to_string());
    let letter = letter.ok_or_else(|| wrong("`answer` is not the index of a choice"))?;
    let subject = problem.get("subject").and_then(Value::as_str);
    let seen = if image.is_some() {
        "with image"
    } else {
        "without image"
    };
    let types: Vec<&str> = subject.into_iter().chain([seen]).collect();
    let mut line = json!({ "id": id });
    if let Some(image) = image {
        line["image"] = image.into();
    }
    line["question"] = question.into();
    line["choices"] = choices.into();
    line["answer"] = letter.into();
    line["type"] = types.into();
    Ok(line)
}
