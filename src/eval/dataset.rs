//! Data sets: a directory of `dataset.json`, `questions.jsonl` and pictures, checked before anything runs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::error::{EvalError, Result};
use super::metric::Metric;

/// Tokens of an answer at most, where a data set says nothing: enough for a word or a phrase.
const USUAL_TOKENS: usize = 16;

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Unique in the set.
    pub id: String,
    /// Its line in `questions.jsonl`, from 1.
    pub line: usize,
    /// Images, relative to the set, in the order in which they go in.
    pub images: Vec<String>,
    /// A clip, relative to the set: a folder of frames or a file.
    pub video: Option<String>,
    /// What is asked, without the set's prompt around it.
    pub text: String,
    /// References.
    pub answers: Vec<String>,
    /// What there is to choose among.
    pub choices: Vec<String>,
    /// Kinds of question that it is counted under.
    pub types: Vec<String>,
    /// Questions that are scored together (MME's pairs).
    pub group: Option<String>,
    /// How it is scored.
    pub metric: Metric,
}

/// Questions about the same pictures: they share a run of the vision encoder, and are drawn together by the
/// bootstrap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Indices of questions, ascending.
    pub questions: Vec<usize>,
}

/// Part of a set, for several machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which one, from 1.
    pub index: usize,
    /// Of how many.
    pub count: usize,
}

impl Shard {
    /// `2/8`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let number = |s: &str| s.trim().parse::<usize>().ok();
        let parts = text
            .split_once('/')
            .and_then(|(i, n)| number(i).zip(number(n)));
        match parts {
            Some((index, count)) if 1 <= index && index <= count => Ok(Self { index, count }),
            _ => Err(format!(
                "'{text}' is no part; expected i/n with i from 1 to n, as in 2/8"
            )),
        }
    }

    /// Whether the cluster of that index is in this part.
    pub fn holds(self, cluster: usize) -> bool {
        cluster % self.count == self.index - 1
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// A data set.
#[derive(Debug, Clone)]
pub struct DataSet {
    /// Its directory.
    pub root: PathBuf,
    /// Its name, or the directory's.
    pub name: String,
    /// What is said to the model, with `{question}` where the question goes.
    pub prompt: String,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// In the file's order.
    pub questions: Vec<Question>,
    /// Questions by what they are about, in order of first appearance.
    pub clusters: Vec<Cluster>,
    /// BLAKE3 of questions, settings and pictures.
    pub digest: String,
}

impl DataSet {
    /// Reads and checks a set.
    ///
    /// # Errors
    /// Whatever is missing, of another type than it should be, there twice, or outside of the directory, with file
    /// and line.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            return Err(EvalError::file(
                root,
                "no such directory; expected a data set: dataset.json, questions.jsonl and its pictures",
            ));
        }
        let settings_file = root.join("dataset.json");
        let settings_text = read(&settings_file)?;
        let settings = Settings::parse(&settings_file, &settings_text)?;
        let file = root.join("questions.jsonl");
        let text = read(&file)?;
        let mut questions = Vec::new();
        let mut lines = BTreeMap::new();
        let mut known = BTreeSet::new();
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if line.trim().is_empty() {
                continue;
            }
            let wrong = |reason: String| EvalError::line(&file, number, reason);
            let question = parse(line, number, settings.metric).map_err(wrong)?;
            if let Some(first) = lines.insert(question.id.clone(), number) {
                let id = &question.id;
                let reason = format!("the id {id} is that of line {first} too; ids are unique");
                return Err(wrong(reason));
            }
            let pictures = question.images.iter().map(|image| (image, false));
            for (path, clip) in pictures.chain(question.video.iter().map(|v| (v, true))) {
                if known.insert((path.clone(), clip)) {
                    there(root, path, clip).map_err(wrong)?;
                }
            }
            questions.push(question);
        }
        if questions.is_empty() {
            return Err(EvalError::file(
                &file,
                "no question; expected one JSON object a line",
            ));
        }
        whole_pairs(&file, &questions)?;
        let pictures: BTreeSet<&str> = known.iter().map(|(path, _)| path.as_str()).collect();
        let digest = digest(root, &settings_text, &text, &pictures)?;
        let name = settings.name.unwrap_or_else(|| {
            let name = root.canonicalize().unwrap_or_else(|_| root.to_owned());
            let name = name.file_name().map(|n| n.to_string_lossy().into_owned());
            name.unwrap_or_else(|| "dataset".into())
        });
        Ok(Self {
            root: root.to_owned(),
            name,
            prompt: settings.prompt,
            max_new_tokens: settings.max_new_tokens,
            clusters: clusters(&questions),
            questions,
            digest,
        })
    }

    /// What a model is told for a question.
    pub fn prompt(&self, question: &Question) -> String {
        self.prompt.replace("{question}", &question.text)
    }

    /// Indices of the clusters to be run: of the first `limit` questions, no picture's questions cut in two (but one
    /// picture at least), those of a shard.
    pub fn select(&self, limit: Option<usize>, shard: Option<Shard>) -> Vec<usize> {
        let mut questions = 0;
        let within = self
            .clusters
            .iter()
            .enumerate()
            .take_while(|(at, cluster)| {
                questions += cluster.questions.len();
                *at == 0 || limit.is_none_or(|limit| questions <= limit)
            });
        let within = within.map(|(at, _)| at);
        within
            .filter(|at| shard.is_none_or(|shard| shard.holds(*at)))
            .collect()
    }

    /// The one metric of all questions, if there is one.
    pub fn metric(&self) -> Option<Metric> {
        let first = self.questions.first()?.metric;
        let same = self.questions.iter().all(|q| q.metric == first);
        same.then_some(first)
    }
}

fn read(file: &Path) -> Result<String> {
    let bytes = std::fs::read(file).map_err(EvalError::io(file))?;
    String::from_utf8(bytes).map_err(|_| EvalError::file(file, "is not UTF-8"))
}

/// `dataset.json`.
struct Settings {
    name: Option<String>,
    metric: Metric,
    prompt: String,
    max_new_tokens: usize,
}

impl Settings {
    fn parse(file: &Path, text: &str) -> Result<Self> {
        let wrong = |reason: String| EvalError::file(file, reason);
        let value: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let object = value
            .as_object()
            .ok_or_else(|| wrong("expected a JSON object".into()))?;
        let fields = Fields(object);
        match fields.0.get("schema_version") {
            Some(version) if version.as_u64() == Some(1) => {}
            Some(version) => {
                return Err(wrong(format!(
                    "`schema_version` is {version}; this program knows 1"
                )));
            }
            None => return Err(wrong("`schema_version` is missing; expected 1".into())),
        }
        let metric = match fields.text("metric").map_err(wrong)? {
            Some(name) => metric(&name).map_err(wrong)?,
            None => Metric::Exact,
        };
        let prompt = fields.text("prompt").map_err(wrong)?;
        let prompt = prompt.unwrap_or_else(|| "{question}".into());
        if !prompt.contains("{question}") {
            return Err(wrong(format!(
                "`prompt` is '{prompt}', which has no place for the question; expected {{question}} in it"
            )));
        }
        let max_new_tokens = match fields.0.get("max_new_tokens") {
            None | Some(Value::Null) => USUAL_TOKENS,
            Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(n) if n > 0 => n,
                _ => {
                    return Err(wrong(format!(
                        "`max_new_tokens` is {value}, expected a whole number above 0"
                    )));
                }
            },
        };
        Ok(Self {
            name: fields.text("name").map_err(wrong)?,
            metric,
            prompt,
            max_new_tokens,
        })
    }
}

fn metric(name: &str) -> std::result::Result<Metric, String> {
    Metric::named(name).ok_or_else(|| {
        let names = Metric::ALL.map(Metric::name).join(", ");
        format!("`metric` is '{name}', expected one of {names}")
    })
}

/// Typed access to an object's keys. Keys that nobody asks for are carried along.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn text(&self, key: &str) -> std::result::Result<Option<String>, String> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(format!("`{key}` is {other}, expected a string")),
        }
    }

    /// A string or a whole number.
    fn name(&self, key: &str) -> std::result::Result<Option<String>, String> {
        match self.0.get(key) {
            Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
                Ok(Some(number.to_string()))
            }
            Some(Value::Number(number)) => Err(format!(
                "`{key}` is {number}, expected a whole number or a string"
            )),
            _ => self.text(key),
        }
    }

    fn texts(&self, key: &str) -> std::result::Result<Vec<String>, String> {
        let wrong = |found: &Value| format!("`{key}` is {found}, expected a list of strings");
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| wrong(item)))
                .collect(),
            Some(other) => Err(wrong(other)),
        }
    }

    /// One string, or a list of them.
    fn one_or_more(&self, one: &str, more: &str) -> std::result::Result<Vec<String>, String> {
        let (single, several) = (self.text(one)?, self.texts(more)?);
        match (single, several.is_empty()) {
            (Some(_), false) => Err(format!(
                "both `{one}` and `{more}` are given; one of them will do"
            )),
            (Some(single), true) => Ok(vec![single]),
            (None, _) => Ok(several),
        }
    }
}

fn parse(line: &str, number: usize, usual: Metric) -> std::result::Result<Question, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| {
        // The line within the text is 1; the file's is in front of the message.
        format!("no JSON at column {}: {}", e.column(), cause(&e))
    })?;
    let object = value.as_object().ok_or("expected a JSON object")?;
    let fields = Fields(object);
    let need = |key: &str| format!("`{key}` is missing");
    let id = fields.name("id")?.ok_or_else(|| need("id"))?;
    if id.is_empty() {
        return Err("`id` is empty".into());
    }
    let images = fields.one_or_more("image", "images")?;
    let video = fields.text("video")?;
    if !images.is_empty() && video.is_some() {
        return Err("`video` and images are given; a question is about one or the other".into());
    }
    let text = fields.text("question")?.ok_or_else(|| need("question"))?;
    if text.trim().is_empty() {
        return Err("`question` is empty".into());
    }
    let answers = fields.one_or_more("answer", "answers")?;
    if answers.is_empty() {
        return Err("no answer: `answer` (a string) or `answers` (a list) is missing".into());
    }
    let types = match object.get("type") {
        Some(Value::Array(_)) => fields.texts("type")?,
        _ => fields.text("type")?.into_iter().collect(),
    };
    let question = Question {
        id,
        line: number,
        images,
        video,
        text,
        answers,
        choices: fields.texts("choices")?,
        types,
        group: fields.name("group")?,
        metric: match fields.text("metric")? {
            Some(name) => metric(&name)?,
            None => usual,
        },
    };
    match question.metric.refuses(&question) {
        Some(reason) => Err(reason),
        None => Ok(question),
    }
}

/// serde's words without its line and column.
fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Whether a picture is inside the set and there.
fn there(root: &Path, path: &str, clip: bool) -> std::result::Result<(), String> {
    let inside = Path::new(path)
        .components()
        .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if path.is_empty() || !inside {
        return Err(format!(
            "'{path}' leaves the data set; pictures are named by paths below its directory"
        ));
    }
    let at = root.join(path);
    let meta = std::fs::metadata(&at).map_err(|e| format!("{}: {e}", at.display()))?;
    match clip {
        false if !meta.is_file() => Err(format!("{} is no image file", at.display())),
        _ if meta.is_file() && meta.len() == 0 => Err(format!("{} is empty", at.display())),
        _ => Ok(()),
    }
}

/// MME's accuracy+ is of pairs.
fn whole_pairs(file: &Path, questions: &[Question]) -> Result<()> {
    let mut pairs: BTreeMap<&str, Vec<&Question>> = BTreeMap::new();
    for question in questions.iter().filter(|q| q.metric == Metric::Mme) {
        pairs.entry(pair(question)).or_default().push(question);
    }
    match pairs.into_iter().find(|(_, of)| of.len() != 2) {
        None => Ok(()),
        Some((name, of)) => Err(EvalError::line(
            file,
            of[0].line,
            format!(
                "metric mme scores two questions of a `group` (left out: of an image) together, '{name}' has {}",
                of.len()
            ),
        )),
    }
}

/// What MME's questions are paired by.
pub(super) fn pair(question: &Question) -> &str {
    let image = || question.images.first().map(String::as_str);
    question.group.as_deref().or_else(image).unwrap_or_default()
}

/// Questions by what they see; a question about nothing stands alone, but for a group's.
pub(super) fn clusters(questions: &[Question]) -> Vec<Cluster> {
    /// Images, clip, group of questions about nothing.
    type About<'a> = (&'a [String], Option<&'a str>, Option<&'a str>);
    let mut known: HashMap<About<'_>, usize> = HashMap::new();
    let mut clusters: Vec<Cluster> = Vec::new();
    for (index, question) in questions.iter().enumerate() {
        let blind = question.images.is_empty() && question.video.is_none();
        let group = question.group.as_deref().filter(|_| blind);
        if blind && group.is_none() {
            clusters.push(Cluster {
                questions: vec![index],
            });
            continue;
        }
        let key = (question.images.as_slice(), question.video.as_deref(), group);
        let at = *known.entry(key).or_insert(clusters.len());
        match clusters.get_mut(at) {
            Some(cluster) => cluster.questions.push(index),
            None => clusters.push(Cluster {
                questions: vec![index],
            }),
        }
    }
    clusters
}

fn digest(
    root: &Path,
    settings: &str,
    questions: &str,
    pictures: &BTreeSet<&str>,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut part = |name: &str, bytes: &[u8]| {
        for piece in [name.as_bytes(), bytes] {
            hasher.update(&(piece.len() as u64).to_le_bytes());
            hasher.update(piece);
        }
    };
    part("dataset.json", settings.as_bytes());
    part("questions.jsonl", questions.as_bytes());
    for picture in pictures {
        let at = root.join(picture);
        for (name, file) in files(picture, &at)? {
            part(&name, &std::fs::read(&file).map_err(EvalError::io(&file))?);
        }
    }
    Ok(hasher.finalize().to_hex().as_str()[..32].to_owned())
}

/// A picture's file, or the frames of a folder by name.
fn files(name: &str, at: &Path) -> Result<Vec<(String, PathBuf)>> {
    if !at.is_dir() {
        return Ok(vec![(name.to_owned(), at.to_owned())]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(at).map_err(EvalError::io(at))? {
        let path = entry.map_err(EvalError::io(at))?.path();
        if path.is_file() {
            let own = path.file_name().unwrap_or_default().to_string_lossy();
            found.push((format!("{name}/{own}"), path));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
