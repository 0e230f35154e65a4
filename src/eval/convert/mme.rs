//! MME: its directory (`MME_Benchmark_release_version`: for each category a folder of images and texts, or `images/`
//! and `questions_answers_YN/`; a text holds two lines `question<TAB>Yes|No`), or an export of one table as JSON lines
//! or as tab-separated values (`question_id` or `index`, `image` as a file name or in base64, `question`, `answer`,
//! `category`). LLaVA's `llava_mme.jsonl` holds prompts for the directory: both questions of an image have the same
//! `question_id`, and each is found in the texts as `convert_answer_to_mme.py` finds it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Content, Converted, Result, SHORT, Source, text};
use crate::eval::error::EvalError;
use crate::eval::metric::Metric;

const WANTED: &str = "expected MME's directory (a folder for each category) or a table of it (.jsonl or .tsv with \
                      `question`, `answer` and `category`) and, if prompts are to be LLaVA's, llava_mme.jsonl";

/// What every question of MME ends in.
const PLEASE: &str = "Please answer yes or no.";

/// The two halves of the published score.
const PERCEPTION: [&str; 10] = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "ocr",
];
const COGNITION: [&str; 4] = [
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
];

/// One question of a pair.
#[derive(Clone)]
struct Item {
    category: String,
    /// Relative to the folder of images.
    image: String,
    question: String,
    answer: String,
}

pub(super) fn read(files: &[PathBuf]) -> Result<Converted> {
    let (mut items, mut llava, mut images) = (Vec::new(), None, Vec::new());
    for file in files {
        if file.is_dir() {
            items.extend(directory(file)?);
            continue;
        }
        if file.extension().is_some_and(|end| end == "tsv") {
            items.extend(table(file, rows(file)?, &mut images)?);
            continue;
        }
        let source = Source::read(file)?;
        if source.llava().is_some() {
            llava = Some(source);
        } else if let Content::Lines(lines) = source.content {
            items.extend(table(file, lines, &mut images)?);
        } else {
            return Err(source.wrong(WANTED));
        }
    }
    if items.is_empty() {
        return Err(EvalError::Mismatch(WANTED.into()));
    }
    if let Some(prompts) = &llava {
        items = by_prompts(&items, prompts)?;
    }
    let mut pairs: BTreeMap<String, usize> = BTreeMap::new();
    let questions = items.iter().map(|item| {
        let group = format!("{}/{}", item.category, item.image);
        let number = pairs.entry(group.clone()).or_default();
        *number += 1;
        item.line(&format!("{group}#{number}"), &group)
    });
    Ok(Converted {
        name: "MME",
        metric: Metric::Mme,
        prompt: "{question}",
        max_new_tokens: 16,
        questions: questions.collect(),
        images,
    })
}

impl Item {
    fn line(&self, id: &str, group: &str) -> Value {
        let lower = self.category.to_lowercase();
        let half = match lower.as_str() {
            c if PERCEPTION.contains(&c) => Some("perception"),
            c if COGNITION.contains(&c) => Some("cognition"),
            _ => None,
        };
        let types: Vec<&str> = std::iter::once(self.category.as_str())
            .chain(half)
            .collect();
        json!({
            "id": id,
            "image": self.image,
            "question": self.question,
            "answer": self.answer,
            "type": types,
            "group": group,
        })
    }
}

/// Entries of a directory by name.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(EvalError::io(dir))? {
        found.push(entry.map_err(EvalError::io(dir))?.path());
    }
    found.sort();
    Ok(found)
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn directory(root: &Path) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for folder in entries(root)?.into_iter().filter(|p| p.is_dir()) {
        let category = name(&folder);
        let (pictures, texts, inner) = match folder.join("images").is_dir() {
            true => (
                folder.join("images"),
                folder.join("questions_answers_YN"),
                "images/",
            ),
            false => (folder.clone(), folder.clone(), ""),
        };
        // eval_tool/ and the like hold no questions.
        if !texts.is_dir() {
            continue;
        }
        let mut by_stem: HashMap<String, String> = HashMap::new();
        for picture in entries(&pictures)? {
            let end = picture
                .extension()
                .map(|e| e.to_string_lossy().to_lowercase());
            if end.is_some_and(|e| matches!(e.as_str(), "jpg" | "jpeg" | "png")) {
                let stem = picture.file_stem().unwrap_or_default().to_string_lossy();
                by_stem.insert(stem.into_owned(), name(&picture));
            }
        }
        for file in entries(&texts)? {
            if file.extension().is_none_or(|end| end != "txt") {
                continue;
            }
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            let Some(picture) = by_stem.get(&*stem) else {
                return Err(EvalError::file(
                    &file,
                    format!("no image {stem}.jpg or .png beside it"),
                ));
            };
            let text = std::fs::read_to_string(&file).map_err(EvalError::io(&file))?;
            for (index, line) in text.lines().enumerate() {
                if line.trim().is_empty() {
                    continue;
                }
                let Some((question, answer)) = line.trim().split_once('\t') else {
                    return Err(EvalError::line(
                        &file,
                        index + 1,
                        "expected question<TAB>Yes or No",
                    ));
                };
                items.push(Item {
                    category: category.clone(),
                    image: format!("{category}/{inner}{picture}"),
                    question: question.to_owned(),
                    answer: answer.trim().to_owned(),
                });
            }
        }
    }
    Ok(items)
}

/// Rows of a tab-separated file by its head.
fn rows(path: &Path) -> Result<Vec<(usize, Map<String, Value>)>> {
    let text = std::fs::read_to_string(path).map_err(EvalError::io(path))?;
    let mut lines = text.lines().enumerate();
    let head: Vec<&str> = lines
        .next()
        .map_or(Vec::new(), |(_, line)| line.split('\t').collect());
    let rows = lines
        .filter(|(_, line)| !line.is_empty())
        .map(|(index, line)| {
            let cells: Vec<&str> = line.split('\t').collect();
            if cells.len() != head.len() {
                return Err(EvalError::line(
                    path,
                    index + 1,
                    format!("{} cells, the head has {}", cells.len(), head.len()),
                ));
            }
            let named = head
                .iter()
                .zip(cells)
                .map(|(name, cell)| ((*name).to_owned(), unquoted(cell).into()));
            Ok((index + 1, named.collect()))
        });
    rows.collect()
}

/// As pandas writes cells that hold quotes.
fn unquoted(cell: &str) -> String {
    match cell.strip_prefix('"').and_then(|c| c.strip_suffix('"')) {
        Some(inner) => inner.replace("\"\"", "\""),
        None => cell.to_owned(),
    }
}

fn table(
    path: &Path,
    rows: Vec<(usize, Map<String, Value>)>,
    images: &mut Vec<(String, Vec<u8>)>,
) -> Result<Vec<Item>> {
    let mut known: HashMap<Vec<u8>, String> = HashMap::new();
    let mut items = Vec::with_capacity(rows.len());
    for (number, row) in &rows {
        let get =
            |key: &str| text(row, key).map_err(|reason| EvalError::line(path, *number, reason));
        let category = get("category")?;
        let id = get("question_id").or_else(|_| get("index"));
        // A name, or the file itself.
        let named = get("image_path").or_else(|_| get("image"));
        let image = match named {
            Ok(image) if image.len() < 256 => image,
            Ok(data) => {
                let bytes = base64(&data).ok_or_else(|| {
                    EvalError::line(path, *number, "`image` is neither a file name nor base64")
                })?;
                let next = known.len();
                let end = if bytes.starts_with(b"\x89PNG") {
                    "png"
                } else {
                    "jpg"
                };
                let name = || format!("{category}/{next:04}.{end}");
                let name = known.entry(bytes).or_insert_with_key(|bytes| {
                    let name = name();
                    images.push((name.clone(), bytes.clone()));
                    name
                });
                name.clone()
            }
            // The exports of Hugging Face name the image in the id.
            Err(_) => id?,
        };
        items.push(Item {
            category,
            image,
            question: get("question")?,
            answer: get("answer")?,
        });
    }
    Ok(items)
}

/// The standard alphabet, padded or not.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

/// The questions in LLaVA's words and order.
fn by_prompts(items: &[Item], prompts: &Source) -> Result<Vec<Item>> {
    let mut known: HashMap<(&str, String, String), &Item> = HashMap::new();
    let stem = |image: &str| {
        let path = Path::new(image).file_stem().unwrap_or_default();
        path.to_string_lossy().into_owned()
    };
    for item in items {
        // Some texts have two spaces in front of the last sentence.
        let plain = item.question.replace(PLEASE, "").trim().to_owned();
        known.insert((&item.category, stem(&item.image), plain), item);
    }
    let lines = prompts.llava().unwrap_or_default();
    let found = lines.iter().map(|(number, object)| {
        let wrong = |reason: String| prompts.wrong_line(*number, reason);
        let id = text(object, "question_id").map_err(wrong)?;
        let prompt = text(object, "text").map_err(wrong)?;
        let category = id.split('/').next().unwrap_or_default();
        let plain = prompt
            .replace(SHORT.trim(), "")
            .replace(PLEASE, "")
            .trim()
            .to_owned();
        let item = known
            .get(&(category, stem(&id), plain.clone()))
            .ok_or_else(|| wrong(format!("no question '{plain}' is in the texts of {id}")))?;
        Ok(Item {
            question: prompt,
            ..(*item).clone()
        })
    });
    found.collect()
}
