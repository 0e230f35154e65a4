//! `duet eval`

pub(super) mod ask;
mod convert;
mod digest;
mod merge;
mod progress;
mod report;

use std::path::PathBuf;

use super::{Engine, Global, Outcome};
use crate::eval::Shard;

/// Arguments of `duet eval`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Arguments {
    #[command(subcommand)]
    other: Option<Other>,
    #[command(flatten)]
    ask: AskArguments,
}

#[derive(Debug, clap::Subcommand)]
enum Other {
    /// Put the answers to the parts of a set together (--shard)
    Merge(merge::Arguments),
    /// Make a data set of a public one: TextVQA, POPE, GQA, MME, ScienceQA
    Convert(convert::Arguments),
}

/// Arguments of asking models.
#[derive(Debug, clap::Args)]
struct AskArguments {
    /// Model directories or .onnx files; the first is what the others are compared with
    #[arg(value_name = "PATH", required_unless_present = "answers")]
    models: Vec<PathBuf>,
    /// Data set: a directory of dataset.json, questions.jsonl and pictures (docs/eval.md)
    #[arg(long, value_name = "DIR", required = true)]
    dataset: Option<PathBuf>,
    /// Answers of another program, scored like a model's: JSON lines with id and answer; may be repeated
    #[arg(long, value_name = "FILE")]
    answers: Vec<PathBuf>,
    /// Directory for answers, as they come, and for the table; a run that was ended goes on from there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Ask the first N questions only (no picture's questions are cut in two)
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Ask the i-th of n parts of the set, as in 2/8; duet eval merge puts them together
    #[arg(long, value_name = "I/N", value_parser = Shard::parse, requires = "out")]
    shard: Option<Shard>,
    /// Precision of the files to use (fp16, q4, default, …), or the suffix of an earlier --beside
    ///
    /// One for all models, or one for each: `duet eval DIR DIR --variant default --variant duet`.
    #[arg(long, value_name = "NAME")]
    variant: Vec<String>,
    /// Tokens of an answer at most, instead of what the data set says
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    max_new_tokens: Option<usize>,
    #[command(flatten)]
    shown: Shown,
    #[command(flatten)]
    engine: Engine,
}

/// How the table is made and shown.
#[derive(Debug, clap::Args)]
struct Shown {
    /// Form of the table
    #[arg(long, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Draws of images for the intervals
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    resamples: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Fail (exit code 1) if a model keeps less of the first one's accuracy, as in 99%
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    require_kept: Option<f64>,
    /// Fail (exit code 1) if a model gives the first one's answer to a smaller share of the questions, as in 100%
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    require_agreement: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
    Markdown,
}

/// `99%` or `99` or `0.99`.
fn percent(text: &str) -> Result<f64, String> {
    let (number, percent) = match text.strip_suffix('%') {
        Some(number) => (number, true),
        None => (text, false),
    };
    let value: Result<f64, _> = number.trim().parse();
    match value {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(match percent || value > 2.0 {
            true => value / 100.0,
            false => value,
        }),
        _ => Err(format!("'{text}' is no share; expected 99%")),
    }
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    match &arguments.other {
        Some(Other::Merge(merge)) => merge::run(merge, global),
        Some(Other::Convert(convert)) => convert::run(convert, global),
        None => ask::run(&arguments.ask, global),
    }
}
