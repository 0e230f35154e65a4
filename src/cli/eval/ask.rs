//! Asking models the questions of a data set.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::progress::Progress;
use super::{AskArguments, digest, report};
use crate::cli::load::{self, Runnable};
use crate::cli::{Engine, Global, Outcome, run};
use crate::eval::answers::{self, SetId};
use crate::eval::{
    Answer, AnswerFile, Contestant, DataSet, Header, ModelId, Pictures, Question, Runner, Settings,
    Shard, tabulate,
};
use crate::onnx::ModelDir;
use crate::runtime::WholePipeline;

/// Decoded images that are kept for the next model.
const PICTURE_BYTES: usize = 256 << 20;

/// What is asked of every model.
pub(in crate::cli) struct Task<'a> {
    pub(in crate::cli) set: &'a DataSet,
    /// Which of its clusters.
    pub(in crate::cli) clusters: &'a [usize],
    pub(in crate::cli) shard: Option<Shard>,
    pub(in crate::cli) max_new_tokens: usize,
    pub(in crate::cli) engine: &'a Engine,
    /// Where answers go.
    pub(in crate::cli) out: Option<&'a Path>,
}

/// A model as it was named.
pub(in crate::cli) struct Named {
    pub(in crate::cli) path: PathBuf,
    pub(in crate::cli) variant: Option<String>,
    /// For tables and files.
    pub(in crate::cli) name: String,
}

pub(super) fn run(arguments: &AskArguments, global: &Global) -> anyhow::Result<Outcome> {
    let Some(dataset) = &arguments.dataset else {
        bail!("name a data set (--dataset)");
    };
    let set = DataSet::open(dataset)?;
    let clusters = set.select(arguments.limit, arguments.shard);
    let others = arguments.answers.iter().map(|file| from_file(file, &set));
    let others = others.collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(out) = &arguments.out {
        std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    }
    let task = Task {
        set: &set,
        clusters: &clusters,
        shard: arguments.shard,
        max_new_tokens: arguments.max_new_tokens.unwrap_or(set.max_new_tokens),
        engine: &arguments.engine,
        out: arguments.out.as_deref(),
    };
    let mut models = ask(
        &task,
        &named(&arguments.models, &arguments.variant)?,
        global,
    )?;
    models.extend(others);
    distinct(&models)?;
    let table = tabulate(&set, &clusters, &models, arguments.shown.bootstrap())?;
    let name = match arguments.shard {
        Some(shard) => format!("table.{}-of-{}", shard.index, shard.count),
        None => "table".into(),
    };
    let out = task.out.map(|dir| (dir, name.as_str()));
    report::show(&table, &arguments.shown, out, global)
}

/// A model that is about to be asked.
struct Candidate {
    dir: ModelDir,
    model: Runnable,
    name: String,
    digest: String,
    file: Option<AnswerFile>,
    known: HashMap<String, Answer>,
}

/// Asks every model what it has not answered yet. All files are opened and compared before the first model runs.
pub(in crate::cli) fn ask(
    task: &Task<'_>,
    models: &[Named],
    global: &Global,
) -> anyhow::Result<Vec<Contestant>> {
    let questions = || {
        let clusters = task.clusters.iter().map(|c| &task.set.clusters[*c]);
        clusters.flat_map(|c| c.questions.iter().map(|q| &task.set.questions[*q]))
    };
    let mut candidates = Vec::with_capacity(models.len());
    for (place, model) in models.iter().enumerate() {
        candidates.push(candidate(task, model, place)?);
    }
    let total = questions().count() * candidates.len();
    let answered = |c: &Candidate| questions().filter(|q| c.known.contains_key(&q.id)).count();
    let mut progress = Progress::new(total, candidates.iter().map(answered).sum(), global);
    let mut pictures = Pictures::new(PICTURE_BYTES);
    let mut contestants = Vec::with_capacity(candidates.len());
    for mut candidate in candidates {
        let before = answered(&candidate);
        if before > 0 {
            let name = &candidate.name;
            global.say(format!("{name}: {before} answers are there already"));
        }
        let asked = answer_all(task, &mut candidate, &mut pictures, &mut progress);
        progress.clear();
        asked?;
        contestants.push(Contestant {
            name: candidate.name,
            digest: Some(candidate.digest),
            answers: candidate.known,
        });
    }
    Ok(contestants)
}

fn candidate(task: &Task<'_>, named: &Named, place: usize) -> anyhow::Result<Candidate> {
    let name = named.name.as_str();
    let (dir, model) = load::runnable(&named.path, named.variant.as_deref())?;
    let digest = digest::of(&dir.root, &model)?;
    let header = Header::new(
        ModelId {
            name: name.to_owned(),
            digest: digest.clone(),
            place,
        },
        SetId {
            name: task.set.name.clone(),
            digest: task.set.digest.clone(),
        },
        Settings {
            version: env!("CARGO_PKG_VERSION").into(),
            decoding: "greedy".into(),
            max_new_tokens: task.max_new_tokens,
            providers: task.engine.providers.clone(),
        },
        task.shard,
    );
    let mut known = HashMap::new();
    let mut file = None;
    if let Some(out) = task.out {
        let (opened, answers) = AnswerFile::open(&out.join(file_name(name, task.shard)), &header)?;
        known = answers.into_iter().map(|a| (a.id.clone(), a)).collect();
        file = Some(opened);
    }
    Ok(Candidate {
        dir,
        model,
        name: name.to_owned(),
        digest,
        file,
        known,
    })
}

/// `NAME.jsonl`, `NAME.2-of-8.jsonl`
pub(super) fn file_name(name: &str, shard: Option<Shard>) -> String {
    match shard {
        Some(shard) => format!("{name}.{}-of-{}.jsonl", shard.index, shard.count),
        None => format!("{name}.jsonl"),
    }
}

fn answer_all(
    task: &Task<'_>,
    candidate: &mut Candidate,
    pictures: &mut Pictures,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    let left: Vec<Vec<&Question>> = task
        .clusters
        .iter()
        .map(|cluster| {
            let all = task.set.clusters[*cluster].questions.iter();
            let all = all.map(|q| &task.set.questions[*q]);
            all.filter(|q| !candidate.known.contains_key(&q.id))
                .collect()
        })
        .filter(|questions: &Vec<_>| !questions.is_empty())
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    let Candidate {
        dir,
        model,
        name,
        file,
        known,
        digest: _,
    } = candidate;
    let mut runner = match model {
        Runnable::Whole(path) => {
            let options = task.engine.options();
            Runner::Whole(Box::new(WholePipeline::open(path, &dir.root, &options)?))
        }
        Runnable::Trio(trio) => Runner::Parts(Box::new(run::open(&dir.root, trio, task.engine)?)),
    };
    progress.begin();
    for questions in left {
        runner.answer(
            name,
            task.set,
            &questions,
            task.max_new_tokens,
            pictures,
            &mut |answer| {
                if let Some(file) = &mut *file {
                    file.push(&answer)?;
                }
                known.insert(answer.id.clone(), answer);
                progress.step(name);
                Ok(())
            },
        )?;
    }
    Ok(())
}

/// Answers of another program, or of an earlier run.
fn from_file(path: &Path, set: &DataSet) -> anyhow::Result<Contestant> {
    let (header, answers) = answers::read(path)?;
    if let Some(header) = &header {
        to_set(path, header, set)?;
    }
    let ids: std::collections::HashSet<&str> =
        set.questions.iter().map(|q| q.id.as_str()).collect();
    if let Some(stranger) = answers.iter().find(|a| !ids.contains(a.id.as_str())) {
        bail!(
            "{}: question {} is none of {}",
            path.display(),
            stranger.id,
            set.root.display()
        );
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    Ok(Contestant {
        name: stem.into_owned(),
        digest: header.map(|header| header.model.digest),
        answers: answers.into_iter().map(|a| (a.id.clone(), a)).collect(),
    })
}

/// Whether the answers of a file are to the questions of a set.
pub(super) fn to_set(path: &Path, header: &Header, set: &DataSet) -> anyhow::Result<()> {
    if header.dataset.digest != set.digest {
        bail!(
            "{}: the answers are to another data set, {} with the digest {}; {} has {}",
            path.display(),
            header.dataset.name,
            header.dataset.digest,
            set.root.display(),
            set.digest
        );
    }
    Ok(())
}

pub(super) fn distinct(models: &[Contestant]) -> anyhow::Result<()> {
    let mut known = std::collections::BTreeSet::new();
    match models.iter().find(|m| !known.insert(m.name.as_str())) {
        Some(twice) => bail!(
            "two sets of answers are named {}; rename a file",
            twice.name
        ),
        None => Ok(()),
    }
}

/// Models with their variants: one for all, or one for each.
pub(in crate::cli) fn named(models: &[PathBuf], variants: &[String]) -> anyhow::Result<Vec<Named>> {
    let variant = |index: usize| match variants {
        [one] => Some(one.clone()),
        several => several.get(index).cloned(),
    };
    if variants.len() > 1 && variants.len() != models.len() {
        bail!(
            "--variant is given {} times for {} models; expected one for all of them, or one for each",
            variants.len(),
            models.len()
        );
    }
    let variants: Vec<Option<String>> = (0..models.len()).map(variant).collect();
    let names = names(models, &variants);
    let all = models.iter().zip(variants).zip(names);
    Ok(all
        .map(|((path, variant), name)| Named {
            path: path.clone(),
            variant,
            name,
        })
        .collect())
}

/// Names of models for tables and files: the last parts of each path that tell them apart, and the variant.
fn names(models: &[PathBuf], variants: &[Option<String>]) -> Vec<String> {
    let whole: Vec<Vec<String>> = models
        .iter()
        .map(|path| {
            let path = path.canonicalize().unwrap_or_else(|_| path.clone());
            let path = match path.extension() {
                Some(end) if end == "onnx" => path.with_extension(""),
                _ => path,
            };
            let parts = path.components().map(|c| c.as_os_str().to_string_lossy());
            parts.map(|part| plain(&part)).collect()
        })
        .collect();
    let mut used: BTreeMap<String, usize> = BTreeMap::new();
    let tail = |parts: &[String], n: usize| parts[parts.len().saturating_sub(n)..].join("-");
    let name = |index: usize, n: usize| match &variants[index] {
        Some(variant) => format!("{}-{}", tail(&whole[index], n), plain(variant)),
        None => tail(&whole[index], n),
    };
    (0..whole.len())
        .map(|index| {
            let alone = |n: &usize| {
                let own = name(index, *n);
                (0..whole.len())
                    .filter(|other| name(*other, *n) == own)
                    .count()
                    == 1
            };
            let n = (1..=whole[index].len()).find(alone).unwrap_or(1);
            let name = name(index, n);
            let times = used.entry(name.clone()).or_default();
            *times += 1;
            match *times {
                1 => name,
                n => format!("{name}-{n}"),
            }
        })
        .collect()
}

/// A name that is a file's as well.
fn plain(part: &str) -> String {
    let keep = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    part.chars()
        .map(|c| if keep(c) { c } else { '-' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_what_tells_them_apart() {
        let paths = [
            "/m/base",
            "/a/duet",
            "/b/duet/",
            "/m/base",
            "/x/v 1/file.onnx",
        ];
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        assert_eq!(
            names(&paths, &[const { None }; 5]),
            ["base", "a-duet", "b-duet", "base-2", "file"]
        );
        let found = |variants: &[&str]| {
            let variants: Vec<String> = variants.iter().map(|v| (*v).to_owned()).collect();
            let found = named(&[paths[0].clone(), paths[3].clone()], &variants);
            found.map(|all| all.into_iter().map(|n| n.name).collect::<Vec<_>>())
        };
        assert_eq!(found(&["q4"]).unwrap(), ["base-q4", "base-q4-2"]);
        assert_eq!(
            found(&["default", "duet"]).unwrap(),
            ["base-default", "base-duet"]
        );
        assert!(found(&["a", "b", "c"]).is_err());
    }
}
