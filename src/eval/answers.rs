//! Answers in files of JSON lines, written as they come.
//!
//! The first line of a file says what the answers are of: model, data set and settings, by digest. The next are one
//! answer each. A file is only ever appended to, so a run that was killed goes on where it was; what a kill cut off
//! is the end of a line without a newline, and is dropped.
//!
//! Files of other programs have no such first line and need `id` and `answer` alone (or LLaVA's `question_id` and
//! `text`).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::dataset::Shard;
use super::error::{EvalError, Result};

/// What the first line is told by.
const FORMAT: &str = "duet-eval-answers";

/// Which model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelId {
    /// A name for tables, and of the file.
    pub name: String,
    /// BLAKE3 of its files.
    pub digest: String,
    /// Its place among the models of the run, from 0; the first is what others are compared with.
    pub place: usize,
}

/// Which data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetId {
    /// Its name.
    pub name: String,
    /// Its digest.
    pub digest: String,
}

/// What else an answer depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// This program's version.
    pub version: String,
    /// How tokens are chosen.
    pub decoding: String,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Execution providers that were asked for, in order.
    pub providers: Vec<String>,
}

/// The first line of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    format: String,
    schema_version: u64,
    /// Which model answers.
    pub model: ModelId,
    /// What it is asked.
    pub dataset: SetId,
    /// How.
    pub settings: Settings,
    /// Which part of the set, as `2/8`; none if it is all.
    pub shard: Option<String>,
}

impl Header {
    /// Of a run.
    pub fn new(model: ModelId, dataset: SetId, settings: Settings, shard: Option<Shard>) -> Self {
        Self {
            format: FORMAT.into(),
            schema_version: 1,
            model,
            dataset,
            settings,
            shard: shard.map(|shard| shard.to_string()),
        }
    }

    /// The first thing in which answers of this run differ from those of another, if any. Places and names of
    /// models may.
    pub fn differs(&self, other: &Self) -> Option<String> {
        let Self {
            format: _,
            schema_version: _,
            model,
            dataset,
            settings,
            shard,
        } = self;
        let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "all".into());
        let pairs = [
            (
                "the model's files have the digest",
                &model.digest,
                &other.model.digest,
            ),
            (
                "the data set has the digest",
                &dataset.digest,
                &other.dataset.digest,
            ),
            (
                "the program's version is",
                &settings.version,
                &other.settings.version,
            ),
            ("decoding is", &settings.decoding, &other.settings.decoding),
        ];
        let texts = pairs.map(|(what, a, b)| (what, a.clone(), b.clone()));
        let more = [
            (
                "tokens of an answer are at most",
                settings.max_new_tokens.to_string(),
                other.settings.max_new_tokens.to_string(),
            ),
            (
                "execution providers are",
                format!("[{}]", settings.providers.join(", ")),
                format!("[{}]", other.settings.providers.join(", ")),
            ),
            ("the part of the set is", show(shard), show(&other.shard)),
        ];
        let mut all = texts.into_iter().chain(more);
        all.find(|(_, own, others)| own != others)
            .map(|(what, own, others)| format!("{what} {others} there and {own} now"))
    }
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The question's id.
    pub id: String,
    /// The text, trimmed.
    pub answer: String,
    /// Its tokens, an end-of-sequence token included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<u32>,
    /// Visual tokens that entered the decoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visual_tokens: Option<usize>,
    /// Visual tokens that a layer saw, mean over the layers, as the lengths of the caches after the prompt tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visual_tokens_by_layer: Option<f64>,
    /// Seconds from the prompt to the end of the answer, without the vision encoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// A file that answers are appended to.
#[derive(Debug)]
pub struct AnswerFile {
    file: File,
    path: PathBuf,
}

impl AnswerFile {
    /// Opens or makes a file. Answers that are there already come out, if they are of the same run.
    ///
    /// # Errors
    /// The file is another's or somebody writes to it, a line cannot be read, or the answers are of another model,
    /// data set or setting.
    pub fn open(path: &Path, header: &Header) -> Result<(Self, Vec<Answer>)> {
        let io = || EvalError::io(path);
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        let mut file = options.open(path).map_err(io())?;
        // A file system without locks is no reason not to run.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(EvalError::file(
                path,
                "another run writes to it; choose another --out, or wait",
            ));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io())?;
        let whole = text
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(io())?;
            file.seek(SeekFrom::End(0)).map_err(io())?;
            text.truncate(whole);
        }
        let mut this = Self {
            file,
            path: path.to_owned(),
        };
        if text.is_empty() {
            this.line(header)?;
            return Ok((this, Vec::new()));
        }
        let (found, answers) = parse(path, &text)?;
        let found = found.ok_or_else(|| {
            EvalError::line(
                path,
                1,
                "is no file of answers of this program: nothing says which model they are of",
            )
        })?;
        if let Some(difference) = header.differs(&found) {
            return Err(EvalError::file(
                path,
                format!(
                    "holds answers of another run: {difference}; choose another --out, or remove the file"
                ),
            ));
        }
        Ok((this, answers))
    }

    /// Appends an answer.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn push(&mut self, answer: &Answer) -> Result<()> {
        self.line(answer)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut text =
            serde_json::to_string(value).map_err(|e| EvalError::file(&self.path, e.to_string()))?;
        text.push('\n');
        // One call, so that a kill leaves whole lines or the start of one.
        self.file
            .write_all(text.as_bytes())
            .map_err(EvalError::io(&self.path))
    }
}

/// Answers of a file, and what they are of if it says so. An id that is there twice is an error.
///
/// # Errors
/// The file cannot be read, or a line is no answer.
pub fn read(path: &Path) -> Result<(Option<Header>, Vec<Answer>)> {
    let text = std::fs::read(path).map_err(EvalError::io(path))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &[u8]) -> Result<(Option<Header>, Vec<Answer>)> {
    let text = std::str::from_utf8(text).map_err(|_| EvalError::file(path, "is not UTF-8"))?;
    let (mut header, mut answers) = (None, Vec::new());
    let mut lines: BTreeMap<String, usize> = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |reason: String| EvalError::line(path, number, reason);
        let value: Value =
            serde_json::from_str(line).map_err(|e| wrong(format!("no JSON: {e}")))?;
        if value.get("format").and_then(Value::as_str) == Some(FORMAT) {
            let version = value.get("schema_version").and_then(Value::as_u64);
            if version != Some(1) {
                return Err(wrong(format!(
                    "`schema_version` is {version:?}; this program knows 1"
                )));
            }
            if header.is_some() {
                return Err(wrong("a second header; expected answers".into()));
            }
            header = Some(serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?);
            continue;
        }
        let answer = answer(value).map_err(wrong)?;
        if let Some(first) = lines.insert(answer.id.clone(), number) {
            return Err(wrong(format!(
                "question {} is answered on line {first} too",
                answer.id
            )));
        }
        answers.push(answer);
    }
    Ok((header, answers))
}

fn answer(value: Value) -> std::result::Result<Answer, String> {
    let Value::Object(mut object) = value else {
        return Err("expected a JSON object with `id` and `answer`".into());
    };
    // LLaVA's names.
    for (name, other) in [("id", "question_id"), ("answer", "text")] {
        if !object.contains_key(name)
            && let Some(value) = object.get(other).cloned()
        {
            object.insert(name.into(), value);
        }
    }
    if let Some(number) = object.get("id").filter(|id| id.is_i64() || id.is_u64()) {
        let text = number.to_string();
        object.insert("id".into(), text.into());
    }
    for name in ["id", "answer"] {
        if !object.get(name).is_some_and(Value::is_string) {
            return Err(format!(
                "`{name}` is missing or no string; expected `id` and `answer`"
            ));
        }
    }
    // Of another program's further keys none is known to mean what ours do.
    let mut answer: Answer =
        serde_json::from_value(Value::Object(object)).map_err(|e| e.to_string())?;
    answer.answer = answer.answer.trim().to_owned();
    Ok(answer)
}

#[cfg(test)]
mod tests;
