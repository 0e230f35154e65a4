//! `duet demo`: the main job, start to end, on the model that ships: real questions about real pictures, before and
//! after.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use include_dir::{Dir, include_dir};

use super::counts::{average, tokens_by_layer};
use super::eval::ask::{Named, Task, ask};
use super::rewrite::outputs;
use super::{Engine, Global, Outcome, load, run::millis, style};
use crate::eval::table::Bootstrap;
use crate::eval::{Contestant, DataSet, render, tabulate};
use crate::onnx::unfinished::Unfinished;
use crate::onnx::{DataMode, write_out};
use crate::passes::rewrite;
use crate::runtime::{
    self, CacheHeads, GenerateOptions, Generation, Message, Pixels, VlmFiles, VlmPipeline,
};
use crate::statistics::median;
use crate::validate::{Options, check};

/// Arguments of `duet demo`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Recipe: a built-in name or a YAML file; may be repeated
    #[arg(long, value_name = "NAME_OR_FILE", default_values = RECIPES)]
    recipe: Vec<String>,
    /// Ask the first N questions only (no picture's questions are cut in two)
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Timed runs of each model, interleaved
    #[arg(long, default_value_t = 9, value_name = "N")]
    runs: usize,
    #[command(flatten)]
    engine: Engine,
}

/// DUET-VLM's three budgets of LLaVA-1.5, in proportion.
const RECIPES: [&str; 3] = ["tiles-65", "tiles-43", "tiles-21"];

/// The bundled model: a small LLaVA-1.5 that was trained for the project (models/vqa), exported by PyTorch.
static MODEL: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/vqa/llava");
/// Pictures that it has not seen, and questions about them.
static TEST: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/vqa/test");

/// Pictures whose questions are shown.
const SHOWN: usize = 2;

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    runtime::ensure(&mut |line| global.say(line))?;
    let mut engine = arguments.engine.clone();
    if engine.threads == 0 {
        engine.threads = 2;
    }
    let made = Unfinished::made(tempfile::tempdir);
    let (work, _unfinished) = made.context("a temporary directory for the demonstration")?;
    let (base, test) = (work.path().join("llava"), work.path().join("test"));
    for (from, to) in [(&MODEL, &base), (&TEST, &test)] {
        std::fs::create_dir(to)?;
        from.extract(to)
            .with_context(|| format!("unpacking into {}", to.display()))?;
    }

    heading("1. What was recognised");
    let load::Selected { dir, vlm, .. } = load::select(&base, &[], global)?;
    for (_, t) in vlm.towers() {
        anstream::println!(
            "  vision tower   {} live blocks, {} heads, {}{} patches",
            t.layers,
            t.heads,
            if t.cls { "CLS + " } else { "" },
            t.patches().unwrap_or(0)
        );
    }
    for (_, d) in vlm.decoders() {
        anstream::println!(
            "  decoder        {} layers, {} heads, {} key/value heads, width {}",
            d.depth(),
            d.heads.unwrap_or(0),
            d.kv_heads,
            d.width.unwrap_or(0)
        );
    }

    heading("2. What was inserted");
    let mut models = vec![base.clone()];
    let mut rewritten = Vec::new();
    for name in &arguments.recipe {
        let recipe = load::recipe(name)?;
        let stem = Path::new(name).file_stem().unwrap_or_default();
        let out = work.path().join(stem);
        let started = Instant::now();
        let done = rewrite(vlm.clone(), &recipe)?;
        write_out(
            &dir,
            &outputs(&dir, &done, &recipe, None)?,
            &out,
            DataMode::Copy,
        )?;
        let took = started.elapsed();
        anstream::println!("  {}", stem.to_string_lossy());
        for (pass, summary) in &done.summaries {
            anstream::println!("    {}{pass:<13}{}  {summary}", style::NEW, style::RESET);
        }
        let inserted: usize = done.changes.iter().map(|c| c.inserted).sum();
        anstream::println!(
            "    {inserted} nodes; rewritten and written in {:.1} ms",
            millis(took)
        );
        models.push(out);
        rewritten.push((recipe, done));
    }

    heading("3. Visual tokens, layer by layer");
    let names: Vec<String> = models.iter().map(|m| name_of(m)).collect();
    let mut columns = Vec::new();
    for (recipe, _) in &rewritten {
        if let Some((before, after)) = tokens_by_layer(&vlm, recipe) {
            if columns.is_empty() {
                columns.push(before);
            }
            columns.push(after);
        }
    }
    layers(&names, &columns);

    heading("4. Do they compute what the method says?");
    global
        .say("  comparing with the unmodified model run layer by layer around an ndarray oracle …");
    let options = Options {
        session: engine.options(),
        seed: 0,
    };
    let mut passed = true;
    for ((recipe, done), name) in rewritten.iter().zip(&names[1..]) {
        let report = check(&vlm, &done.vlm, recipe, &options, &mut |step| {
            global.detail(step)
        })?;
        passed &= report.passed();
        match report.passed() {
            true => {
                let checks = report.findings.len();
                anstream::println!("  {name}: valid, {checks} checks, 0 failed");
            }
            false => {
                anstream::println!("  {name}");
                super::validate::print(&report);
            }
        }
    }

    heading("5. Questions about pictures that the model has not seen");
    let set = DataSet::open(&test)?;
    let clusters = set.select(arguments.limit, None);
    let task = Task {
        set: &set,
        clusters: &clusters,
        shard: None,
        max_new_tokens: set.max_new_tokens,
        engine: &engine,
        out: None,
    };
    let named: Vec<Named> = models
        .iter()
        .zip(&names)
        .map(|(path, name)| Named {
            path: path.clone(),
            variant: None,
            name: name.clone(),
        })
        .collect();
    let answered = ask(&task, &named, global)?;
    questions(&set, &clusters, &answered);
    let table = tabulate(&set, &clusters, &answered, Bootstrap::default())?;
    for part in render::rows(&table) {
        anstream::println!("\n{}", style::table(&part));
    }
    anstream::println!(
        "  {}{}{}",
        style::DIM,
        render::caption(&table),
        style::RESET
    );

    heading("6. Side by side");
    let heads = vlm.decoders().next();
    let heads = heads.and_then(|(_, d)| load::heads_of((d.kv_heads, d.head_dim)));
    side_by_side(
        &models,
        &names,
        (&set, &clusters),
        heads,
        arguments.runs.max(1),
        &engine,
    )?;
    anstream::println!(
        "\n  {}which tokens survive where, as a picture: duet explain MODEL --recipe {} --image FILE --prompt TEXT --out \
         seen.png{}",
        style::DIM,
        arguments.recipe.last().map_or("NAME", String::as_str),
        style::RESET
    );
    Ok(if passed {
        Outcome::Done
    } else {
        Outcome::Failed
    })
}

fn heading(text: &str) {
    anstream::println!("\n{}{text}{}", style::HEAD, style::RESET);
}

fn name_of(model: &Path) -> String {
    model
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Tokens by layer: a column for each model.
fn layers(names: &[String], columns: &[Vec<i64>]) {
    let mut rows = vec![vec!["layer".to_owned()]];
    rows[0].extend(names.iter().cloned());
    let Some(first) = columns.first() else { return };
    for layer in 0..first.len() {
        let mut row = vec![(layer + 1).to_string()];
        row.extend(columns.iter().map(|c| c[layer].to_string()));
        rows.push(row);
    }
    let mut means = vec!["average".to_owned()];
    means.extend(columns.iter().map(|c| format!("{:.2}", average(c))));
    rows.push(means);
    let mut fewer = vec!["fewer".to_owned()];
    fewer.extend(
        columns
            .iter()
            .map(|c| format!("{:.1} %", 100.0 * (1.0 - average(c) / average(first)))),
    );
    rows.push(fewer);
    anstream::print!("{}", style::table(&rows));
}

/// The questions about the first pictures with what each model answers.
fn questions(set: &DataSet, clusters: &[usize], models: &[Contestant]) {
    let mut rows = vec![vec![
        "picture".to_owned(),
        "question".into(),
        "right".into(),
    ]];
    rows[0].extend(models.iter().map(|m| m.name.clone()));
    let shown = clusters.iter().take(SHOWN).map(|c| &set.clusters[*c]);
    for question in shown.flat_map(|c| c.questions.iter().map(|q| &set.questions[*q])) {
        let mut row = vec![
            question.images.join(", "),
            question.text.clone(),
            question.answers.join(", "),
        ];
        row.extend(models.iter().map(|m| {
            let answer = m.answers.get(&question.id);
            answer.map_or(String::new(), |a| a.answer.clone())
        }));
        rows.push(row);
    }
    anstream::print!("{}", style::table(&rows));
}

/// Runs all models in turns on the same picture and question.
fn side_by_side(
    models: &[PathBuf],
    names: &[String],
    (set, clusters): (&DataSet, &[usize]),
    heads: Option<CacheHeads>,
    runs: usize,
    engine: &Engine,
) -> anyhow::Result<()> {
    let open = |dir: &PathBuf| -> anyhow::Result<VlmPipeline> {
        let file = |name: &str| dir.join("onnx").join(format!("{name}.onnx"));
        let files = VlmFiles {
            vision_encoder: file("vision_encoder"),
            embed_tokens: file("embed_tokens"),
            decoder: file("decoder_model_merged"),
            configs: dir.to_owned(),
        };
        let options = engine.options();
        Ok(VlmPipeline::open_with_heads(&files, &options, heads)?)
    };
    let mut open = models
        .iter()
        .map(open)
        .collect::<anyhow::Result<Vec<_>>>()?;
    let asked = clusters
        .first()
        .and_then(|c| set.clusters[*c].questions.first());
    let asked = &set.questions[*asked.context("the data set has no question")?];
    let picture = asked.images.iter().map(|i| Pixels::open(set.root.join(i)));
    let picture = picture.collect::<Result<Vec<_>, _>>()?;
    let messages = [Message::user(picture.len(), set.prompt(asked))];
    let options = GenerateOptions {
        max_new_tokens: 16,
        ignore_eos: true,
        ..Default::default()
    };
    let mut seen: Vec<Vec<Generation>> = vec![Vec::new(); open.len()];
    for round in 0..=runs {
        for (model, answers) in open.iter_mut().zip(&mut seen) {
            let prepared = model.prepare(&messages, &picture)?;
            let answer =
                model.generate(
                    &prepared,
                    None,
                    &options,
                    &mut |_| ControlFlow::Continue(()),
                )?;
            // The first round warms up.
            if round > 0 {
                answers.push(answer);
            }
        }
    }
    let row = |what: &str, cell: &dyn Fn(&[Generation]) -> String| {
        let mut row = vec![what.to_owned()];
        row.extend(seen.iter().map(|answers| cell(answers)));
        row
    };
    let typical = |answers: &[Generation], of: fn(&Generation) -> Duration| {
        let times: Vec<f64> = answers.iter().map(|a| millis(of(a))).collect();
        median(&times)
    };
    let time = |what: &str, of: fn(&Generation) -> Duration| {
        let first = typical(&seen[0], of);
        row(what, &|answers| {
            let own = typical(answers, of);
            format!("{own:.2} ms  {:.2}×", first / own)
        })
    };
    let mut head = vec![String::new()];
    head.extend(names.iter().cloned());
    let first = seen[0][0].cache_bytes as f64;
    let rows = [
        head,
        row("visual tokens in", &|a| a[0].visual_tokens.to_string()),
        time("vision encoder", |g| g.timing.vision),
        time("prefill", |g| g.timing.prefill),
        time("decode step", |g| {
            let steps = &g.timing.decode;
            steps.iter().sum::<Duration>() / u32::try_from(steps.len().max(1)).unwrap_or(1)
        }),
        row("cache", &|a| {
            let bytes = a[0].cache_bytes;
            format!(
                "{}  {:.2}×",
                style::bytes(bytes as u64),
                first / bytes as f64
            )
        }),
    ];
    anstream::print!("{}", style::table(&rows));
    anstream::println!(
        "  {}medians of {runs} interleaved runs, {} threads{}",
        style::DIM,
        engine.threads,
        style::RESET
    );
    Ok(())
}
