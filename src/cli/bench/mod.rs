//! `duet bench`

mod files;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::Context;

use self::files::Models;
use self::worker::Process;
use super::eval::ask::named;
use super::plan::image_size;
use super::{Engine, Global, Outcome, print_json, style};
use crate::bench::report::{About, Circumstances};
use crate::bench::{Performer, Report, Settings, ideal, profile, render, rounds};
use crate::onnx::unfinished::Unfinished;
use crate::runtime::{Runtime, providers};

pub(super) use worker::serve;

/// Arguments of `duet bench`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The model as it was: a directory or an .onnx file
    base: PathBuf,
    /// Rewritten forms of it
    rewritten: Vec<PathBuf>,
    /// Rounds that count; in each, all models are run in turns. Left out: as many as fit into about 45 seconds, 3 to 25
    #[arg(long, value_name = "N", value_parser = count(1))]
    runs: Option<usize>,
    /// Turns of each model before the first round
    #[arg(long, default_value = "1", value_name = "N", value_parser = count(1))]
    warm_up: usize,
    /// Tokens of text in the prompt, beside the image's
    #[arg(long, default_value = "32", value_name = "N", value_parser = count(2))]
    prompt_tokens: usize,
    /// Decode steps in each turn, all on the cache that the prompt leaves; fewer, but at least 3, once they took half a
    /// second
    #[arg(long, default_value = "8", value_name = "N", value_parser = count(0))]
    new_tokens: usize,
    /// Images (crops, clips) in the prompt
    #[arg(long, default_value = "1", value_name = "N", value_parser = count(1))]
    images: usize,
    /// Size of an image, as in 1280x720, for models that take any
    #[arg(long, value_name = "WxH", value_parser = image_size)]
    image_size: Option<(usize, usize)>,
    /// Visual tokens of an image, where no vision encoder gives them [default: 576]
    #[arg(long, value_name = "N", value_parser = count(1))]
    visual_tokens: Option<usize>,
    /// Seed of the random pixels and token ids
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Precision of the files to use (fp16, q4, default, …), or the suffix of an earlier --beside
    ///
    /// One for all models, or one for each: `duet bench DIR DIR --variant default --variant duet`.
    #[arg(long, value_name = "NAME")]
    variant: Vec<String>,
    /// Also say where the time goes, by ONNX Runtime's profiler, in runs of their own
    #[arg(long)]
    profile: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Write the table to this file, in Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write a chart of the prompt's times to this file, in SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Threads inside an operator (0: one for each core)
    #[arg(long, default_value = "2", value_name = "N", value_parser = super::thread_count())]
    threads: usize,
    /// Execution providers, best first (cpu, cuda, tensorrt, openvino, …)
    #[arg(long = "provider", value_name = "NAME")]
    providers: Vec<String>,
}

/// A count of at least so many, and no more than a machine could ever hold.
fn count(least: u64) -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(least..=1 << 20)
}

/// Lengths of the base at most, besides its own.
const LENGTHS: usize = 5;

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    writable(arguments)?;
    let mut paths = vec![arguments.base.clone()];
    paths.extend(arguments.rewritten.iter().cloned());
    let named = named(&paths, &arguments.variant)?;
    let engine = Engine {
        threads: arguments.threads,
        providers: arguments.providers.clone(),
    };
    let models = Models::read(&named, arguments, &engine)?;
    for provider in &engine.providers {
        providers::check(provider)?;
    }

    let mut processes = Vec::new();
    for (named, job) in named.iter().zip(&models.jobs) {
        global.say(format!("{}: opening", named.name));
        processes.push(Process::start(&named.name, job)?);
    }
    let settings = Settings {
        warm_up: arguments.warm_up,
        runs: arguments.runs,
    };
    let mut schedules = Vec::new();
    let sweep = |turns: &[crate::bench::Turn]| {
        schedules = models.schedules(turns);
        let depth = match schedules.first() {
            Some(Ok(schedule)) => schedule.tokens.len(),
            Some(Err(why)) => return Err(why.clone()),
            None => 0,
        };
        if models.jobs[0].files.decoder.is_none() || depth == 0 {
            return Err(
                "the base has no decoder of its own, whose prompt could be shortened".into(),
            );
        }
        let all = schedules
            .iter()
            .flatten()
            .flat_map(|s| s.tokens.iter().copied());
        let own = turns[0].prompt_tokens;
        let mut lengths = ideal::lengths(all.chain([own]), LENGTHS + 1);
        // A head's time grows evenly with its rows.
        let mut heads = vec![1];
        heads.extend(lengths.first());
        heads.extend(lengths.last());
        heads.dedup();
        lengths.retain(|n| *n != own);
        Ok((lengths, heads))
    };
    let mut performers: Vec<&mut dyn Performer> = Vec::new();
    for process in &mut processes {
        performers.push(process);
    }
    let measured = rounds::measure(&mut performers, settings, sweep, &mut |step| {
        global.say(step);
    })?;
    let profiles = match arguments.profile {
        true => Some(profiles(&mut performers, global)?),
        false => None,
    };

    let about: Vec<About> = models.about(&named, schedules);
    let runtime = Runtime::get()?;
    let library = runtime.library().path.file_name().unwrap_or_default();
    let circumstances = Circumstances {
        library: library.to_string_lossy().into_owned(),
        build: runtime.build_info().to_owned(),
        threads: arguments.threads,
        providers: arguments.providers.clone(),
        rounds: measured.rounds,
        warm_up: arguments.warm_up,
        images: arguments.images,
        text_tokens: models.jobs[0].inputs.text.iter().sum(),
        new_tokens: arguments.new_tokens,
        seed: arguments.seed,
    };
    let report = Report::new(&about, &measured, circumstances, profiles);
    if arguments.json {
        print_json(&serde_json::to_value(&report)?)?;
    } else {
        print(&report);
    }
    for (file, text) in [
        (&arguments.markdown, render::markdown(&report)),
        (&arguments.svg, render::svg(&report)),
    ] {
        if let Some(file) = file {
            super::write_whole(file, &text)
                .with_context(|| format!("writing {}", file.display()))?;
            global.detail(format!("wrote {}", file.display()));
        }
    }
    Ok(Outcome::Done)
}

/// Makes sure that the files that are asked for can be written, before minutes are spent.
fn writable(arguments: &Arguments) -> anyhow::Result<()> {
    let files = [&arguments.markdown, &arguments.svg];
    if let [Some(table), Some(chart)] = files
        && table == chart
    {
        anyhow::bail!(
            "--markdown and --svg both name {}; give each a file of its own",
            table.display()
        );
    }
    for file in files.into_iter().flatten() {
        let folder = file.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let name = file.display();
        if !folder.is_dir() {
            anyhow::bail!("{name}: there is no folder {}", folder.display());
        }
        if file.is_dir() {
            anyhow::bail!("{name} is a directory; expected the name of a file");
        }
        tempfile::tempfile_in(folder)
            .with_context(|| format!("{name}: no file can be written to {}", folder.display()))?;
    }
    Ok(())
}

/// Profiles of all models, one after the other, compared with the base's.
fn profiles(
    models: &mut [&mut dyn Performer],
    global: &Global,
) -> anyhow::Result<Vec<profile::Profile>> {
    let made = Unfinished::made(tempfile::tempdir);
    let (folder, _unfinished) = made.context("a temporary directory for profiles")?;
    let mut found: Vec<profile::Profile> = Vec::new();
    for (at, model) in models.iter_mut().enumerate() {
        global.say(format!("{}: profile", model.name()));
        let own = folder.path().join(at.to_string());
        std::fs::create_dir(&own)?;
        for profile in rounds::profile(*model, &own)? {
            let base = found.iter().find(|p| at > 0 && p.part == profile.part);
            let compared = match base {
                Some(base) => profile.beside(base),
                None => profile,
            };
            found.push(compared);
        }
    }
    Ok(found)
}

/// The tables, for people.
fn print(report: &Report) {
    for table in render::tables(report) {
        anstream::println!("{}", style::table(&table));
    }
    for line in render::notes(report) {
        anstream::println!("{}{line}{}", style::DIM, style::RESET);
    }
}
