//! POPE: `coco_pope_{random,popular,adversarial}.json`, which are JSON lines in spite of their name (`{"question_id",
//! "image", "text", "label"}`, ids from 1 in each), and LLaVA's `llava_pope_test.jsonl`, which has all three with
//! their `category` and no labels.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::{Content, Converted, Result, SHORT_PROMPT, Source, asked, text};
use crate::eval::error::EvalError;
use crate::eval::metric::Metric;

const WANTED: &str = "expected coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json (JSON lines \
                      with `image`, `text` and `label`) and, if prompts are to be LLaVA's, llava_pope_test.jsonl";

/// One labelled question.
struct Item {
    id: String,
    image: String,
    question: String,
    label: String,
}

pub(super) fn read(files: &[Source]) -> Result<Converted> {
    let mut sets: BTreeMap<String, Vec<Item>> = BTreeMap::new();
    let mut llava = None;
    for file in files {
        match (labelled(file)?, file.llava()) {
            (Some((category, items)), _) => {
                if sets.insert(category.clone(), items).is_some() {
                    return Err(file.wrong(format!("a second file of the category {category}")));
                }
            }
            (None, Some(lines)) => llava = Some((file, lines)),
            (None, None) => return Err(file.wrong(WANTED)),
        }
    }
    if sets.is_empty() {
        return Err(EvalError::Mismatch(WANTED.into()));
    }
    let (questions, prompt) = match llava {
        None => {
            let each = sets.iter().flat_map(|(category, items)| {
                let line = |item: &Item| {
                    item.line(&format!("{category}-{}", item.id), category, &item.question)
                };
                items.iter().map(line).collect::<Vec<_>>()
            });
            (each.collect(), SHORT_PROMPT)
        }
        Some((file, lines)) => (by_prompts(&sets, file, lines)?, "{question}"),
    };
    Ok(Converted {
        name: "POPE",
        metric: Metric::Pope,
        prompt,
        max_new_tokens: 16,
        questions,
        images: Vec::new(),
    })
}

impl Item {
    fn line(&self, id: &str, category: &str, question: &str) -> Value {
        json!({
            "id": id,
            "image": self.image,
            "question": question,
            "answer": self.label,
            "type": category,
        })
    }
}

fn labelled(file: &Source) -> Result<Option<(String, Vec<Item>)>> {
    let Content::Lines(lines) = &file.content else {
        return Ok(None);
    };
    if !lines.iter().all(|(_, object)| object.contains_key("label")) {
        return Ok(None);
    }
    let items = lines.iter().map(|(number, object)| {
        let get = |key: &str| text(object, key).map_err(|reason| file.wrong_line(*number, reason));
        Ok(Item {
            id: get("question_id")?,
            image: get("image")?,
            question: get("text")?,
            label: get("label")?,
        })
    });
    // coco_pope_random.json, aokvqa_pope_random.json
    let stem = file.path.file_stem().unwrap_or_default().to_string_lossy();
    let category = stem.rsplit('_').next().unwrap_or(&stem).to_owned();
    Ok(Some((category, items.collect::<Result<_>>()?)))
}

fn by_prompts(
    sets: &BTreeMap<String, Vec<Item>>,
    file: &Source,
    lines: &[(usize, Map<String, Value>)],
) -> Result<Vec<Value>> {
    let mut known: HashMap<(&str, &str, &str), &Item> = HashMap::new();
    for (category, items) in sets {
        for item in items {
            known.insert((category, &item.image, &item.question), item);
        }
    }
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut questions = Vec::with_capacity(lines.len());
    for (number, object) in lines {
        let get = |key: &str| text(object, key).map_err(|reason| file.wrong_line(*number, reason));
        let (id, image, prompt) = (get("question_id")?, get("image")?, get("text")?);
        let category = get("category")?;
        let place = places.entry(category.clone()).or_default();
        *place += 1;
        let Some(items) = sets.get(&category) else {
            // A category of which no labels were given is left out.
            continue;
        };
        // Later releases corrected the spelling of some questions, in the same order.
        let same_place = || items.get(*place - 1).filter(|item| item.image == image);
        let key = (category.as_str(), image.as_str(), asked(&prompt));
        let item = known
            .get(&key)
            .copied()
            .or_else(same_place)
            .ok_or_else(|| {
                let question = key.2;
                file.wrong_line(
                    *number,
                    format!("no label of category {category} for '{question}' about {image}"),
                )
            })?;
        questions.push(item.line(&id, &category, &prompt));
    }
    Ok(questions)
}
