//! `duet plan --calibrate`: the make-up of a budget that keeps most accuracy on a data set.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

use super::eval::ask::{Named, Task, ask};
use super::{Engine, Global, load, rewrite, style};
use crate::eval::halving::{Reached, Standing, rounds, search};
use crate::eval::table::Bootstrap;
use crate::eval::{Answer, Contestant, DataSet, tabulate};
use crate::onnx::unfinished::Unfinished;
use crate::onnx::{DataMode, write_out};
use crate::passes::{BudgetShape, MakeUp, Recipe, Space, make_ups};
use crate::random::SplitMix64;

/// Images of the first round at least: fewer tell candidates apart by chance alone.
const LEAST: usize = 16;

/// Arguments of a search.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Search the make-up (dominant, contextual, drop layers, ratios) that keeps most accuracy on a data set
    ///
    /// A data set is as for duet eval (docs/eval.md). Give a part of the training or validation data: what was
    /// searched on says nothing of itself any more, so never the set that results are reported on.
    #[arg(long, value_name = "DIR")]
    calibrate: Option<PathBuf>,
    /// Make-ups to try at most
    #[arg(long, default_value_t = 48, value_name = "N", requires = "calibrate",
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    candidates: usize,
    /// Questions of the data set to use at most
    #[arg(long, value_name = "N", requires = "calibrate")]
    limit: Option<usize>,
    /// Seed of the order of images, and of which make-ups are tried
    #[arg(long, default_value_t = 0, value_name = "N", requires = "calibrate")]
    seed: u64,
    #[command(flatten)]
    engine: Engine,
}

impl Arguments {
    /// The data set, if a search is asked for.
    pub(super) fn dataset(&self) -> Option<&Path> {
        self.calibrate.as_deref()
    }
}

/// What a search found.
pub(super) struct Found {
    /// The winner's recipe, with what was searched as a comment.
    pub(super) recipe: String,
    /// Visual tokens that each layer sees under it.
    pub(super) tokens: Vec<i64>,
    /// Their mean.
    pub(super) average: f64,
    /// Everything that was tried, for programs.
    pub(super) document: Value,
}

/// A search in progress.
struct Trial<'a> {
    model: &'a Path,
    set: &'a DataSet,
    /// Clusters in the order in which they are asked.
    clusters: &'a [usize],
    engine: &'a Engine,
    make_ups: &'a [MakeUp],
    /// Answers so far: of the unreduced model, and of each candidate.
    base: HashMap<String, Answer>,
    known: Vec<HashMap<String, Answer>>,
}

/// Searches; `first` is the recipe that is made without a search.
pub(super) fn run(
    model: &Path,
    shape: &BudgetShape,
    budget: f64,
    first: &str,
    arguments: &Arguments,
    global: &Global,
) -> anyhow::Result<Found> {
    let set = DataSet::open(arguments.dataset().unwrap_or(Path::new(".")))?;
    let space = Space::of(shape).ok_or_else(|| {
        anyhow!("--calibrate: how many tokens an image has is not known; say it (--tokens or --image-size)")
    })?;
    let all =
        make_ups(&space, budget, Some(first)).map_err(|e| anyhow!("{}: {e}", model.display()))?;
    let mut random = SplitMix64::new(arguments.seed);
    let make_ups = some(all, arguments.candidates, &mut random);
    let mut clusters = set.select(arguments.limit, None);
    shuffle(&mut clusters, &mut random);
    if clusters.len() < 2 {
        bail!(
            "{}: one image tells nothing; give a set of more",
            set.root.display()
        );
    }
    let mut trial = Trial {
        model,
        set: &set,
        clusters: &clusters,
        engine: &arguments.engine,
        known: vec![HashMap::new(); make_ups.len()],
        make_ups: &make_ups,
        base: HashMap::new(),
    };
    let rounds = rounds(make_ups.len(), clusters.len(), LEAST);
    for (number, round) in rounds.iter().enumerate() {
        global.say(format!(
            "round {} of {}: {} make-ups, {} images",
            number + 1,
            rounds.len(),
            round.candidates,
            round.clusters
        ));
    }
    let standings = search(make_ups.len(), &rounds, &mut |candidate, count| {
        let reached = trial.reach(candidate, count)?;
        global.say(format!(
            "  {}: accuracy {:.1} % on {count} images, {:.1} % of the answers unchanged",
            words(&make_ups[candidate]),
            100.0 * reached.accuracy,
            100.0 * reached.agreement
        ));
        anyhow::Ok(reached)
    })?;
    let winner = standings
        .first()
        .ok_or_else(|| anyhow!("no make-up was tried"))?;
    let unreduced = accuracy(&set, &clusters, &trial.base)?;
    report(&make_ups, &standings, unreduced, global);
    let of_set = Searched {
        set: &set,
        images: clusters.len(),
        tried: make_ups.len(),
        budget,
        unreduced,
    };
    let best = &make_ups[winner.candidate];
    Ok(Found {
        recipe: of_set.comment(best, winner, first) + &best.recipe,
        tokens: best.tokens.clone(),
        average: best.average,
        document: of_set.json(&make_ups, &standings),
    })
}

/// The first, and of the others as many as there may be, drawn.
fn some(mut all: Vec<MakeUp>, most: usize, random: &mut SplitMix64) -> Vec<MakeUp> {
    if all.len() > most {
        let mut rest = all.split_off(1);
        shuffle(&mut rest, random);
        rest.truncate(most - 1);
        all.extend(rest);
    }
    all
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], random: &mut SplitMix64) {
    for end in (1..items.len()).rev() {
        items.swap(end, random.below(end as u64 + 1) as usize);
    }
}

impl Trial<'_> {
    /// A candidate's answers to the first `count` clusters, compared with the unreduced model's.
    fn reach(&mut self, candidate: usize, count: usize) -> anyhow::Result<Reached> {
        let clusters = &self.clusters[..count];
        let base = self.more(self.model, &self.base, clusters)?;
        self.base.extend(base);
        let left = self.left(&self.known[candidate], clusters);
        if !left.is_empty() {
            // Written for this round alone: rewritten models may be large, and rewriting is not what takes time.
            let made = Unfinished::made(tempfile::tempdir);
            let (place, _unfinished) =
                made.context("a temporary directory for a rewritten model")?;
            let out = place.path().join("model");
            write(self.model, &self.make_ups[candidate].recipe, &out)?;
            let more = self.more(&out, &self.known[candidate], clusters)?;
            self.known[candidate].extend(more);
        }
        let models = [
            ("unreduced", &self.base),
            ("candidate", &self.known[candidate]),
        ];
        let models = models.map(|(name, answers)| Contestant {
            name: name.into(),
            digest: None,
            answers: answers.clone(),
        });
        let none = Bootstrap {
            resamples: 0,
            seed: 0,
        };
        let table = tabulate(self.set, clusters, &models, none)?;
        let score = &table.rows[1].scores[0];
        Ok(Reached {
            accuracy: score.accuracy.value,
            agreement: score.agreement.unwrap_or(0.0),
        })
    }

    fn left(&self, known: &HashMap<String, Answer>, clusters: &[usize]) -> Vec<usize> {
        let open = |cluster: &&usize| {
            let mut questions = self.set.clusters[**cluster].questions.iter();
            questions.any(|q| !known.contains_key(&self.set.questions[*q].id))
        };
        clusters.iter().filter(open).copied().collect()
    }

    /// Answers that are not there yet.
    fn more(
        &self,
        model: &Path,
        known: &HashMap<String, Answer>,
        clusters: &[usize],
    ) -> anyhow::Result<HashMap<String, Answer>> {
        let left = self.left(known, clusters);
        if left.is_empty() {
            return Ok(HashMap::new());
        }
        let task = Task {
            set: self.set,
            clusters: &left,
            shard: None,
            max_new_tokens: self.set.max_new_tokens,
            engine: self.engine,
            out: None,
        };
        let quiet = Global {
            quiet: true,
            verbose: 0,
        };
        let named = Named {
            path: model.to_owned(),
            variant: None,
            name: model.display().to_string(),
        };
        let found = ask(&task, &[named], &quiet)?;
        Ok(found
            .into_iter()
            .next()
            .map(|c| c.answers)
            .unwrap_or_default())
    }
}

/// `duet rewrite MODEL --recipe … --out OUT`.
fn write(model: &Path, recipe: &str, out: &Path) -> anyhow::Result<()> {
    let quiet = Global {
        quiet: true,
        verbose: 0,
    };
    let recipe = Recipe::parse(recipe)?;
    let selected = load::select(model, &[], &quiet)?;
    let done = crate::passes::rewrite(selected.vlm, &recipe)?;
    let outputs = rewrite::outputs(&selected.dir, &done, &recipe, None)?;
    write_out(&selected.dir, &outputs, out, DataMode::Copy)?;
    Ok(())
}

fn accuracy(
    set: &DataSet,
    clusters: &[usize],
    answers: &HashMap<String, Answer>,
) -> anyhow::Result<f64> {
    let base = Contestant {
        name: "unreduced".into(),
        digest: None,
        answers: answers.clone(),
    };
    let none = Bootstrap {
        resamples: 0,
        seed: 0,
    };
    Ok(tabulate(set, clusters, &[base], none)?.rows[0].scores[0]
        .accuracy
        .value)
}

/// `187 + 15, 50 % after 6, 0 % after 9`
fn words(make_up: &MakeUp) -> String {
    let mut parts = Vec::new();
    if let (Some(dominant), Some(contextual)) = (make_up.dominant, make_up.contextual) {
        parts.push(format!("{dominant} + {contextual}"));
    }
    for (after, keep) in &make_up.drops {
        parts.push(format!("{} % after {after}", (1e4 * keep).round() / 100.0));
    }
    match parts.is_empty() {
        true => "everything".into(),
        false => parts.join(", "),
    }
}

fn report(make_ups: &[MakeUp], standings: &[Standing], unreduced: f64, global: &Global) {
    let head = ["make-up", "average", "images", "accuracy", "unchanged"].map(str::to_owned);
    let rows = standings.iter().map(|s| {
        let make_up = &make_ups[s.candidate];
        vec![
            words(make_up),
            format!("{:.2}", make_up.average),
            s.clusters.to_string(),
            format!("{:.1} %", 100.0 * s.reached.accuracy),
            format!("{:.1} %", 100.0 * s.reached.agreement),
        ]
    });
    let rows: Vec<Vec<String>> = std::iter::once(head.to_vec()).chain(rows).collect();
    global.say(style::table(&rows).trim_end());
    global.say(format!(
        "the unreduced model: accuracy {:.1} %; the first of the list is the recipe",
        100.0 * unreduced
    ));
}

/// What a recipe's comment and the document tell of a search.
struct Searched<'a> {
    set: &'a DataSet,
    images: usize,
    tried: usize,
    budget: f64,
    unreduced: f64,
}

impl Searched<'_> {
    fn comment(&self, winner: &MakeUp, standing: &Standing, first: &str) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "# The best of {} make-ups of {:.2} visual tokens per layer (this one: {:.2}) by successive halving\n\
             # on {} ({} images, BLAKE3 {}): accuracy {:.2} % there, the unreduced model {:.2} %.",
            self.tried,
            self.budget,
            winner.average,
            self.set.name,
            self.images,
            self.set.digest,
            100.0 * standing.reached.accuracy,
            100.0 * self.unreduced
        );
        if winner.recipe == first {
            text += "# It is what duet plan makes without a search.\n";
        }
        text
    }

    fn json(&self, make_ups: &[MakeUp], standings: &[Standing]) -> Value {
        let tried = standings.iter().map(|s| {
            let make_up = &make_ups[s.candidate];
            json!({
                "dominant": make_up.dominant,
                "contextual": make_up.contextual,
                "drops": make_up.drops.iter().map(|(after, keep)| json!({ "after_layer": after, "keep": keep })).collect::<Vec<_>>(),
                "average": make_up.average,
                "images": s.clusters,
                "accuracy": s.reached.accuracy,
                "agreement": s.reached.agreement,
            })
        });
        json!({
            "dataset": { "name": self.set.name, "digest": self.set.digest, "images": self.images },
            "budget": self.budget,
            "unreduced_accuracy": self.unreduced,
            "tried": tried.collect::<Vec<_>>(),
        })
    }
}
