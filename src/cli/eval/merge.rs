//! `duet eval merge`: answers to the parts of a set, put together.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::ask::{self, to_set};
use super::{Shown, report};
use crate::cli::{Global, Outcome};
use crate::eval::answers;
use crate::eval::{Answer, AnswerFile, Contestant, DataSet, Header, Shard, tabulate};

/// Arguments of `duet eval merge`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Files of answers, or directories of them (--out of the parts)
    #[arg(value_name = "OUT", required = true)]
    parts: Vec<PathBuf>,
    /// The data set that was asked
    #[arg(long, value_name = "DIR")]
    dataset: PathBuf,
    /// Directory for the answers of all parts in one file for each model, and for the table
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The --limit that the parts were asked with
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    shown: Shown,
}

/// A file of answers.
struct Part {
    path: PathBuf,
    header: Header,
    answers: Vec<Answer>,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let set = DataSet::open(&arguments.dataset)?;
    let clusters = set.select(arguments.limit, None);
    let parts = read(&arguments.parts, &set)?;
    let mut models: BTreeMap<(usize, &str, &str), Vec<&Part>> = BTreeMap::new();
    for part in &parts {
        let model = &part.header.model;
        let known = models
            .keys()
            .find(|(_, n, d)| *n == model.name && *d == model.digest);
        let key = known
            .copied()
            .unwrap_or((model.place, &model.name, &model.digest));
        models.entry(key).or_default().push(part);
    }
    let mut contestants = Vec::with_capacity(models.len());
    for ((_, name, digest), parts) in &models {
        let answers = together(name, parts, &set, &clusters)?;
        contestants.push(Contestant {
            name: (*name).to_owned(),
            digest: Some((*digest).to_owned()),
            answers,
        });
    }
    ask::distinct(&contestants)?;
    if let Some(out) = &arguments.out {
        std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
        for (parts, model) in models.values().zip(&contestants) {
            write(out, &parts[0].header, model, &set, &clusters)?;
        }
    }
    let table = tabulate(&set, &clusters, &contestants, arguments.shown.bootstrap())?;
    let out = arguments.out.as_deref().map(|dir| (dir, "table"));
    report::show(&table, &arguments.shown, out, global)
}

/// All files of answers, which have to be of one set and one kind of run.
fn read(paths: &[PathBuf], set: &DataSet) -> anyhow::Result<Vec<Part>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let before = files.len();
            for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
                let file = entry?.path();
                if file.extension().is_some_and(|end| end == "jsonl") {
                    files.push(file);
                }
            }
            if files.len() == before {
                bail!("{}: no answers (.jsonl) in it", path.display());
            }
            files[before..].sort();
        } else {
            files.push(path.clone());
        }
    }
    let mut parts: Vec<Part> = Vec::with_capacity(files.len());
    for path in files {
        let (header, answers) = answers::read(&path)?;
        let Some(header) = header else {
            bail!(
                "{}: nothing says which model the answers are of; answers of other programs go to duet eval --answers",
                path.display()
            );
        };
        to_set(&path, &header, set)?;
        if let Some(first) = parts.first()
            && header.settings != first.header.settings
        {
            let mut other = first.header.clone();
            other.model = header.model.clone();
            other.shard = header.shard.clone();
            let difference = header.differs(&other).unwrap_or_default();
            bail!(
                "{} and {} are of different runs: {difference}",
                first.path.display(),
                path.display()
            );
        }
        parts.push(Part {
            path,
            header,
            answers,
        });
    }
    Ok(parts)
}

/// A model's answers to all questions, each of one part.
fn together(
    name: &str,
    parts: &[&Part],
    set: &DataSet,
    clusters: &[usize],
) -> anyhow::Result<HashMap<String, Answer>> {
    let mut from: HashMap<&str, &Path> = HashMap::new();
    let mut all = HashMap::new();
    for part in parts {
        for answer in &part.answers {
            if let Some(first) = from.insert(&answer.id, &part.path) {
                bail!(
                    "{name}: question {} is answered in {} and in {}; give each part once",
                    answer.id,
                    first.display(),
                    part.path.display()
                );
            }
            all.insert(answer.id.clone(), answer.clone());
        }
    }
    let shards: Vec<Shard> = parts
        .iter()
        .filter_map(|p| Shard::parse(p.header.shard.as_deref()?).ok())
        .collect();
    let mut missing: BTreeMap<Option<usize>, Vec<&str>> = BTreeMap::new();
    for &cluster in clusters {
        let count = shards.first().map(|s| s.count);
        let owner = count.map(|count| cluster % count + 1);
        for &question in &set.clusters[cluster].questions {
            let id = set.questions[question].id.as_str();
            if !all.contains_key(id) {
                missing.entry(owner).or_default().push(id);
            }
        }
    }
    let Some((owner, ids)) = missing.first_key_value() else {
        return Ok(all);
    };
    let count = shards.first().map_or(1, |s| s.count);
    let whose = match owner {
        Some(index) => {
            let there = parts
                .iter()
                .find(|p| p.header.shard.as_deref() == Some(&*format!("{index}/{count}")));
            match there {
                Some(part) => format!(
                    "part {index}/{count} ({}) is not finished: ",
                    part.path.display()
                ),
                None => format!("part {index}/{count} is not there: "),
            }
        }
        None => format!("{} is not finished: ", parts[0].path.display()),
    };
    let more = match ids.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let others = match missing.len() {
        1 => String::new(),
        n => format!("; {} more parts lack answers", n - 1),
    };
    bail!(
        "{name}: {whose}no answer to question {}{more}{others}",
        ids[0]
    )
}

/// One file, as a run over the whole set would have written it.
fn write(
    out: &Path,
    header: &Header,
    model: &Contestant,
    set: &DataSet,
    clusters: &[usize],
) -> anyhow::Result<()> {
    let whole = Header::new(
        header.model.clone(),
        header.dataset.clone(),
        header.settings.clone(),
        None,
    );
    let path = out.join(ask::file_name(&model.name, None));
    let (mut file, known) = AnswerFile::open(&path, &whole)?;
    let known: std::collections::HashSet<String> = known.into_iter().map(|a| a.id).collect();
    for cluster in clusters {
        for question in &set.clusters[*cluster].questions {
            let id = &set.questions[*question].id;
            if let Some(answer) = model.answers.get(id).filter(|_| !known.contains(id)) {
                file.push(answer)?;
            }
        }
    }
    Ok(())
}
