//! From answers to numbers: accuracy, what is kept of the first model's, agreement, visual tokens; in all and for
//! each type of question.

use std::collections::{BTreeMap, HashMap};

use super::answers::{Answer, SetId};
use super::dataset::{DataSet, Question, pair};
use super::error::{EvalError, Result};
use super::metric::{Counts, Metric};
use super::statistics::{Cell, Compared, Estimate, Sample};

/// Answers that are compared.
#[derive(Debug, Clone)]
pub struct Contestant {
    /// For tables.
    pub name: String,
    /// The model's digest; none for answers of another program.
    pub digest: Option<String>,
    /// By id.
    pub answers: HashMap<String, Answer>,
}

/// How draws are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bootstrap {
    /// How many.
    pub resamples: usize,
    /// Of the random numbers.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            resamples: 10_000,
            seed: 0,
        }
    }
}

/// Some questions: all, or those of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The type; none for all.
    pub name: Option<String>,
    /// Questions.
    pub questions: usize,
    /// Images (clips, sets of images) that they are about; a question about none counts as one.
    pub images: usize,
}

/// What a model reaches within a scope.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// Mean worth of an answer, 0 to 1.
    pub accuracy: Estimate,
    /// MME's score, where all questions are MME's: 100 · Σ over types of (accuracy + accuracy+).
    pub points: Option<Estimate>,
    /// The same over the first model's (points over points, where there are points); none for the first model, and
    /// where that has 0.
    pub kept: Option<Estimate>,
    /// Share of questions with the first model's very answer; none for the first model.
    pub agreement: Option<f64>,
    /// `precision`, `recall`, `f1`, `yes_ratio` of yes and no, `accuracy_plus` of pairs.
    pub rates: BTreeMap<&'static str, f64>,
}

/// Visual tokens, mean over the questions about pictures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Visual {
    /// That enter the decoder.
    pub entering: f64,
    /// That a layer sees, mean over the layers: measured as lengths of caches.
    pub by_layer: f64,
    /// How much less that is than the first model's, 0 to 1; none for the first model, or if its own are not known.
    pub reduction: Option<f64>,
}

/// A model's line.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its digest; none for answers of another program.
    pub digest: Option<String>,
    /// None if the answers do not say.
    pub visual: Option<Visual>,
    /// Mean seconds of an answer, without the vision encoder; none if the answers do not say.
    pub seconds: Option<f64>,
    /// One for each scope.
    pub scores: Vec<Score>,
}

/// How much more a model keeps than another that is not the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Index of a model.
    pub model: usize,
    /// Index of the other.
    pub other: usize,
    /// Difference of what they keep.
    pub kept_more: Estimate,
}

/// Everything.
#[derive(Debug, Clone)]
pub struct Table {
    /// The set.
    pub dataset: SetId,
    /// Its metric, if it has one.
    pub metric: Option<Metric>,
    /// How intervals were made.
    pub bootstrap: Bootstrap,
    /// All questions first, then the types by name.
    pub scopes: Vec<Scope>,
    /// The first is what the others are compared with.
    pub rows: Vec<Row>,
    /// All pairs of models but the first.
    pub pairs: Vec<Pair>,
}

/// Scores of one question, by model.
struct Scored<'a> {
    question: &'a Question,
    cluster: usize,
    worth: Vec<f64>,
    answers: Vec<&'a Answer>,
}

/// Compares answers to the questions of some clusters.
///
/// # Errors
/// There is no model or no question, or a question without an answer.
pub fn tabulate(
    set: &DataSet,
    clusters: &[usize],
    models: &[Contestant],
    bootstrap: Bootstrap,
) -> Result<Table> {
    if models.is_empty() {
        return Err(EvalError::Mismatch("no answers to compare".into()));
    }
    let scored = score(set, clusters, models)?;
    if scored.is_empty() {
        return Err(EvalError::Mismatch(format!(
            "{}: no question is left of the part that was asked for",
            set.root.display()
        )));
    }
    let mut types: BTreeMap<&str, Vec<&Scored<'_>>> = BTreeMap::new();
    for one in &scored {
        for name in &one.question.types {
            types.entry(name).or_default().push(one);
        }
    }
    let all: Vec<&Scored<'_>> = scored.iter().collect();
    let mut parts: Vec<(Option<&str>, Vec<&Scored<'_>>)> = vec![(None, all)];
    parts.extend(types.into_iter().map(|(name, of)| (Some(name), of)));

    let mut scopes = Vec::with_capacity(parts.len());
    let mut columns: Vec<Vec<Score>> = vec![Vec::new(); models.len()];
    let mut pairs = Vec::new();
    for (name, of) in &parts {
        let measured = Measured::new(of, models.len(), bootstrap);
        scopes.push(Scope {
            name: name.map(str::to_owned),
            questions: of.len(),
            images: measured.images,
        });
        for (model, column) in columns.iter_mut().enumerate() {
            column.push(measured.score(of, model));
        }
        if name.is_none() {
            pairs = measured.pairs(models.len());
        }
    }
    let rows = models.iter().zip(columns).enumerate();
    let rows = rows.map(|(index, (model, scores))| Row {
        name: model.name.clone(),
        digest: model.digest.clone(),
        visual: visual(&scored, index),
        seconds: mean(scored.iter().map(|s| s.answers[index].seconds)),
        scores,
    });
    Ok(Table {
        dataset: SetId {
            name: set.name.clone(),
            digest: set.digest.clone(),
        },
        metric: set.metric(),
        bootstrap,
        rows: rows.collect(),
        scopes,
        pairs,
    })
}

fn score<'a>(
    set: &'a DataSet,
    clusters: &[usize],
    models: &'a [Contestant],
) -> Result<Vec<Scored<'a>>> {
    let mut scored = Vec::new();
    let mut missing: Vec<Vec<&str>> = vec![Vec::new(); models.len()];
    for &cluster in clusters {
        for &index in &set.clusters[cluster].questions {
            let question = &set.questions[index];
            let mut answers = Vec::with_capacity(models.len());
            for (model, missing) in models.iter().zip(&mut missing) {
                match model.answers.get(&question.id) {
                    Some(answer) => answers.push(answer),
                    None => missing.push(&question.id),
                }
            }
            if answers.len() == models.len() {
                let worth = answers
                    .iter()
                    .map(|a| question.metric.score(question, &a.answer));
                scored.push(Scored {
                    question,
                    cluster,
                    worth: worth.collect(),
                    answers,
                });
            }
        }
    }
    for (model, missing) in models.iter().zip(&missing) {
        if let Some(first) = missing.first() {
            let more = match missing.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            return Err(EvalError::Mismatch(format!(
                "{}: no answer to question {first}{more}",
                model.name
            )));
        }
    }
    Ok(scored)
}

/// Statistics of a scope.
struct Measured {
    images: usize,
    accuracy: Compared,
    points: Option<Compared>,
}

impl Measured {
    fn new(of: &[&Scored<'_>], models: usize, bootstrap: Bootstrap) -> Self {
        let Bootstrap { resamples, seed } = bootstrap;
        let mut images: BTreeMap<usize, Cell> = BTreeMap::new();
        for one in of {
            let cell = images
                .entry(one.cluster)
                .or_insert_with(|| empty(0, models));
            add(cell, &one.worth);
        }
        let mut sample = Sample::new(models, 1, 1.0);
        let count = images.len();
        images
            .into_values()
            .for_each(|cell| sample.push(vec![cell]));
        let paired = of.iter().all(|one| one.question.metric == Metric::Mme);
        Self {
            images: count,
            accuracy: Compared::new(&sample, resamples, seed),
            points: paired.then(|| Compared::new(&points(of, models), resamples, seed)),
        }
    }

    fn score(&self, of: &[&Scored<'_>], model: usize) -> Score {
        let main = self.points.as_ref().unwrap_or(&self.accuracy);
        let same = of
            .iter()
            .filter(|s| s.answers[0].answer == s.answers[model].answer);
        Score {
            accuracy: self.accuracy.value(model),
            points: self.points.as_ref().map(|p| p.value(model)),
            kept: main.kept(model).filter(|_| model > 0),
            agreement: (model > 0).then(|| same.count() as f64 / of.len() as f64),
            rates: rates(of, model),
        }
    }

    fn pairs(&self, models: usize) -> Vec<Pair> {
        let main = self.points.as_ref().unwrap_or(&self.accuracy);
        let all = (1..models).flat_map(|a| (a + 1..models).map(move |b| (a, b)));
        all.filter_map(|(model, other)| {
            let kept_more = main.kept_more(model, other)?;
            Some(Pair {
                model,
                other,
                kept_more,
            })
        })
        .collect()
    }
}

fn empty(bucket: usize, models: usize) -> Cell {
    Cell {
        bucket,
        count: 0.0,
        sums: vec![0.0; models],
    }
}

fn add(cell: &mut Cell, worth: &[f64]) {
    cell.count += 1.0;
    for (sum, worth) in cell.sums.iter_mut().zip(worth) {
        *sum += worth;
    }
}

/// Pairs of questions: for each, its first question's cluster and type, and which models have both right.
fn pairs_of<'a>(of: &[&Scored<'a>], models: usize) -> Vec<(usize, &'a str, Vec<f64>)> {
    let mut pairs: BTreeMap<&str, (usize, &str, Vec<f64>)> = BTreeMap::new();
    for one in of {
        let kind = one.question.types.first().map_or("", String::as_str);
        let fresh = || (one.cluster, kind, vec![1.0; models]);
        let (_, _, both) = pairs.entry(pair(one.question)).or_insert_with(fresh);
        for (both, worth) in both.iter_mut().zip(&one.worth) {
            *both *= worth;
        }
    }
    pairs.into_values().collect()
}

/// MME's score as a sum of means: accuracy and accuracy+ of each type.
fn points(of: &[&Scored<'_>], models: usize) -> Sample {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for one in of {
        let next = kinds.len();
        let kind = one.question.types.first().map_or("", String::as_str);
        kinds.entry(kind).or_insert(next);
    }
    let mut images: BTreeMap<usize, BTreeMap<usize, Cell>> = BTreeMap::new();
    let mut put = |cluster: usize, bucket: usize, worth: &[f64]| {
        let cells = images.entry(cluster).or_default();
        add(
            cells.entry(bucket).or_insert_with(|| empty(bucket, models)),
            worth,
        );
    };
    for one in of {
        let kind = one.question.types.first().map_or("", String::as_str);
        put(one.cluster, 2 * kinds[kind], &one.worth);
    }
    for (cluster, kind, both) in pairs_of(of, models) {
        put(cluster, 2 * kinds[kind] + 1, &both);
    }
    let mut sample = Sample::new(models, 2 * kinds.len(), 100.0);
    for cells in images.into_values() {
        sample.push(cells.into_values().collect());
    }
    sample
}

/// Rates of many answers together.
fn rates(of: &[&Scored<'_>], model: usize) -> BTreeMap<&'static str, f64> {
    let all = |metric: Metric| of.iter().all(|one| one.question.metric == metric);
    let (pope, mme) = (all(Metric::Pope), all(Metric::Mme));
    if !pope && !mme {
        return BTreeMap::new();
    }
    let mut counts = Counts::default();
    for one in of {
        let metric = one.question.metric;
        let read = metric.reads(&one.answers[model].answer);
        counts.add(read, one.question.yes() == Some(true));
    }
    let mut rates = counts.rates();
    if mme {
        let pairs = pairs_of(of, model + 1);
        let right: f64 = pairs.iter().map(|(_, _, both)| both[model]).sum();
        rates.insert("accuracy_plus", right / pairs.len().max(1) as f64);
    }
    rates
}

fn visual(scored: &[Scored<'_>], model: usize) -> Option<Visual> {
    let about = || {
        let seen = |s: &&Scored<'_>| !s.question.images.is_empty() || s.question.video.is_some();
        scored.iter().filter(seen)
    };
    let by_layer = |model: usize| mean(about().map(|s| s.answers[model].visual_tokens_by_layer));
    let own = by_layer(model)?;
    let first = by_layer(0).filter(|first| model > 0 && *first > 0.0);
    Some(Visual {
        entering: mean(about().map(|s| s.answers[model].visual_tokens.map(|n| n as f64)))?,
        by_layer: own,
        reduction: first.map(|first| 1.0 - own / first),
    })
}

/// The mean of numbers that are all there.
fn mean(numbers: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let all: Vec<f64> = numbers.collect::<Option<_>>()?;
    (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
}

#[cfg(test)]
mod tests;
