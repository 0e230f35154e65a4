//! Public sets, in the files in which people have them, as data sets of ours.
//!
//! Each set has a module that knows its published files, and LLaVA's question files for it
//! (`playground/data/eval` of haotian-liu/LLaVA), which hold the prompts that published numbers were made with but no
//! answers: given both, questions and prompts are LLaVA's and answers the set's. Which file is which is seen by what
//! it holds, so their order does not matter.

mod gqa;
mod mme;
mod pope;
mod sqa;
mod textvqa;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::error::{EvalError, Result};
use super::metric::Metric;

/// What LLaVA-1.5 is told behind a question that is answered in a word or two.
const SHORT: &str = "\nAnswer the question using a single word or phrase.";
const SHORT_PROMPT: &str = "{question}\nAnswer the question using a single word or phrase.";

/// A public set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// TextVQA 0.5.1.
    TextVqa,
    /// POPE.
    Pope,
    /// GQA.
    Gqa,
    /// MME.
    Mme,
    /// ScienceQA.
    Sqa,
}

/// What a data set is made of.
#[derive(Debug)]
struct Converted {
    name: &'static str,
    metric: Metric,
    /// Around every question.
    prompt: &'static str,
    max_new_tokens: usize,
    /// Lines of `questions.jsonl`; `image` is relative to the set's folder of images.
    questions: Vec<Value>,
    /// Images that the set's own file holds.
    images: Vec<(String, Vec<u8>)>,
}

/// How the images reach the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    /// A symbolic link to the folder.
    Link,
    /// Copies of those that are asked about.
    Copy,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Questions.
    pub questions: usize,
    /// Images that they are about.
    pub images: usize,
}

/// Writes a data set to `out`, which is new. `images` is the folder that the set's image names are relative to; MME's
/// may be left out, since its own directory holds them. The result is opened before it is put in its place, so every
/// image is there.
///
/// # Errors
/// A file is none of the set's, a question has no answer, an image is missing, or `out` is there.
pub fn convert(
    format: Format,
    files: &[PathBuf],
    images: Option<&Path>,
    how: Images,
    out: &Path,
) -> Result<Written> {
    if out.symlink_metadata().is_ok() {
        return Err(EvalError::file(
            out,
            "is there already; name a new directory",
        ));
    }
    let converted = match format {
        Format::TextVqa => textvqa::read(&sources(files)?)?,
        Format::Pope => pope::read(&sources(files)?)?,
        Format::Gqa => gqa::read(&sources(files)?)?,
        Format::Mme => mme::read(files)?,
        Format::Sqa => sqa::read(&sources(files)?, images)?,
    };
    let folder = match images {
        Some(images) => Some(images.to_owned()),
        None => files.iter().find(|f| f.is_dir()).cloned(),
    };
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(EvalError::io(parent))?;
    let place = tempfile::Builder::new()
        .prefix(".duet-convert-")
        .tempdir_in(parent)
        .map_err(EvalError::io(parent))?;
    // Temporary directories are their maker's alone; a data set is as readable as others.
    let new = place.path().join("set");
    std::fs::create_dir(&new).map_err(EvalError::io(&new))?;
    write(&new, &converted)?;
    put_images(&new, &converted, folder.as_deref(), how)?;
    let set = super::DataSet::open(&new)?;
    let about = set.questions.iter().flat_map(|q| &q.images);
    let written = Written {
        questions: set.questions.len(),
        images: about.collect::<std::collections::BTreeSet<_>>().len(),
    };
    std::fs::rename(&new, out).map_err(EvalError::io(out))?;
    Ok(written)
}

fn write(dir: &Path, converted: &Converted) -> Result<()> {
    let settings = json!({
        "schema_version": 1,
        "name": converted.name,
        "metric": converted.metric.name(),
        "prompt": converted.prompt,
        "max_new_tokens": converted.max_new_tokens,
    });
    let put = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(EvalError::io(&path))
    };
    put("dataset.json", format!("{settings:#}\n"))?;
    let mut lines = String::new();
    for question in &converted.questions {
        let mut question = question.clone();
        if let Some(image) = question.get_mut("image")
            && let Some(name) = image.as_str()
        {
            *image = format!("images/{name}").into();
        }
        lines.push_str(&format!("{question}\n"));
    }
    put("questions.jsonl", lines)
}

fn put_images(dir: &Path, converted: &Converted, folder: Option<&Path>, how: Images) -> Result<()> {
    let to = dir.join("images");
    let names: std::collections::BTreeSet<&str> = converted
        .questions
        .iter()
        .filter_map(|q| q.get("image")?.as_str())
        .collect();
    if !converted.images.is_empty() {
        for (name, bytes) in &converted.images {
            let path = to.join(name);
            let parent = path.parent().unwrap_or(&to);
            std::fs::create_dir_all(parent).map_err(EvalError::io(parent))?;
            std::fs::write(&path, bytes).map_err(EvalError::io(&path))?;
        }
        return Ok(());
    }
    if names.is_empty() {
        return Ok(());
    }
    let folder = folder.ok_or_else(|| {
        EvalError::Mismatch("name the folder of the set's images (--images)".into())
    })?;
    for name in &names {
        let path = folder.join(name);
        if !path.is_file() {
            return Err(EvalError::file(
                &path,
                "no such image; --images is the folder that the set's names are relative to",
            ));
        }
    }
    match how {
        Images::Link => link(folder, &to),
        Images::Copy => names.iter().try_for_each(|name| {
            let (from, to) = (folder.join(name), to.join(name));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent).map_err(EvalError::io(parent))?;
            }
            std::fs::copy(&from, &to).map_err(EvalError::io(&from))?;
            Ok(())
        }),
    }
}

#[cfg(unix)]
fn link(folder: &Path, to: &Path) -> Result<()> {
    let folder = folder.canonicalize().map_err(EvalError::io(folder))?;
    std::os::unix::fs::symlink(&folder, to).map_err(EvalError::io(to))
}

#[cfg(not(unix))]
fn link(_: &Path, to: &Path) -> Result<()> {
    Err(EvalError::file(
        to,
        "links to folders need rights of their own on this system; copy the images (--copy)",
    ))
}

/// A file, and what is in it.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// One JSON document.
    One(Value),
    /// JSON lines, each with its number.
    Lines(Vec<(usize, Map<String, Value>)>),
}

impl Source {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(EvalError::io(path))?;
        let text = String::from_utf8(text).map_err(|_| EvalError::file(path, "is not UTF-8"))?;
        // A document of one line is a document unless its keys are a question's.
        let lines = || -> std::result::Result<Vec<_>, (usize, String)> {
            let all = text.lines().enumerate();
            all.filter(|(_, line)| !line.trim().is_empty())
                .map(|(index, line)| match serde_json::from_str(line) {
                    Ok(Value::Object(object)) => Ok((index + 1, object)),
                    Ok(_) => Err((index + 1, "expected a JSON object".into())),
                    Err(e) => Err((index + 1, e.to_string())),
                })
                .collect()
        };
        let question = |object: &Map<String, Value>| {
            object.contains_key("question_id") && !object.contains_key("data")
        };
        let content = match (lines(), serde_json::from_str(&text)) {
            (Ok(lines), Err(_)) => Content::Lines(lines),
            (Ok(lines), Ok(_)) if lines.iter().all(|(_, object)| question(object)) => {
                Content::Lines(lines)
            }
            (_, Ok(value)) => Content::One(value),
            (Err((line, reason)), Err(_)) => {
                return Err(EvalError::line(
                    path,
                    line,
                    format!("neither a JSON document nor JSON lines: {reason}"),
                ));
            }
        };
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }

    fn wrong(&self, reason: impl Into<String>) -> EvalError {
        EvalError::file(&self.path, reason)
    }

    fn wrong_line(&self, line: usize, reason: impl Into<String>) -> EvalError {
        EvalError::line(&self.path, line, reason)
    }

    /// A LLaVA question file's lines.
    fn llava(&self) -> Option<&[(usize, Map<String, Value>)]> {
        match &self.content {
            Content::Lines(lines) => {
                let asks = |(_, object): &(usize, Map<String, Value>)| {
                    let has = |key: &str| object.contains_key(key);
                    has("question_id") && has("image") && has("text") && !has("label")
                };
                (!lines.is_empty() && lines.iter().all(asks)).then_some(lines)
            }
            Content::One(_) => None,
        }
    }

    fn document(&self) -> Option<&Value> {
        match &self.content {
            Content::One(value) => Some(value),
            Content::Lines(_) => None,
        }
    }
}

fn sources(files: &[PathBuf]) -> Result<Vec<Source>> {
    files.iter().map(|file| Source::read(file)).collect()
}

/// The question in a LLaVA prompt: without the hint of OCR tokens, which may stand before or behind it, and without
/// what is said of the form of the answer (`prompt_processor` in LLaVA's `eval_textvqa.py`).
fn asked(prompt: &str) -> &str {
    let mut lines = prompt.split('\n');
    let first = lines.next().unwrap_or_default();
    match first.starts_with("Reference OCR token:") {
        true => lines.next().unwrap_or_default(),
        false => first,
    }
}

/// A string, or a number as one.
fn text(object: &Map<String, Value>, key: &str) -> std::result::Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(other) => Err(format!("`{key}` is {other}, expected a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

#[cfg(test)]
mod tests;
