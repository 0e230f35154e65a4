//! The command line: clap on one side, the library on the other.
//!
//! Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 a
//! check that failed, 2 usage or input error.

mod bench;
mod calibrate;
mod clients;
mod counts;
mod demo;
mod diff;
mod eval;
mod explain;
mod family;
mod inspect;
mod interrupt;
mod load;
mod plan;
mod rewrite;
mod run;
mod runtime;
mod style;
mod textconv;
mod validate;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Makes exported vision-language models process fewer visual tokens.
#[derive(Debug, Parser)]
#[command(name = "duet", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
struct Global {
    /// Print results only
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print more (twice: even more)
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Global {
    /// One line of progress on stderr.
    fn say(&self, line: impl std::fmt::Display) {
        if !self.quiet {
            anstream::eprintln!("{line}");
        }
    }

    /// A line for `-v` only.
    fn detail(&self, line: impl std::fmt::Display) {
        if !self.quiet && self.verbose > 0 {
            anstream::eprintln!("{line}");
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what is recognised in a model: tower, projector, decoder layers, drop points
    Inspect(inspect::Arguments),
    /// Make a recipe for a budget of visual tokens
    Plan(plan::Arguments),
    /// Rewrite a model with a recipe
    Rewrite(rewrite::Arguments),
    /// Answer a question about images with ONNX Runtime
    Run(run::Arguments),
    /// Check that a rewritten model computes what its recipe says
    Validate(validate::Arguments),
    /// Compare the speed and memory of a model and its rewritten forms
    Bench(bench::Arguments),
    /// One model of duet bench, in a process of its own
    #[command(hide = true)]
    BenchWorker,
    /// Measure how much accuracy models keep on a data set
    Eval(eval::Arguments),
    /// Show which visual tokens survive where, for a question
    Explain(explain::Arguments),
    /// Say what changed between two models or model directories
    Diff(diff::Arguments),
    /// Print a model as lines of text, for git diff
    Textconv(textconv::Arguments),
    /// The main job on the model that ships with the project
    Demo(demo::Arguments),
    /// Find or install ONNX Runtime's shared library
    Runtime(runtime::Arguments),
}

/// How ONNX Runtime is to be used.
#[derive(Debug, Args, Clone)]
struct Engine {
    /// Threads inside an operator (0: one for each core)
    #[arg(long, default_value = "0", value_name = "N", value_parser = thread_count())]
    threads: usize,
    /// Execution providers, best first (cpu, cuda, tensorrt, openvino, …)
    #[arg(long = "provider", value_name = "NAME")]
    providers: Vec<String>,
}

/// A number of threads; thousands only wait for each other.
fn thread_count() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(0..=1024)
}

impl Engine {
    fn options(&self) -> crate::runtime::SessionOptions {
        crate::runtime::SessionOptions {
            intra_threads: self.threads,
            providers: self.providers.clone(),
            ..Default::default()
        }
    }
}

/// A path to a model.
#[derive(Debug, Args, Clone)]
struct ModelArgument {
    /// Model directory or .onnx file
    path: PathBuf,
}

/// Writes a text file, never a half-written one in the place of an earlier one.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    // As any file that a program creates: temporary ones are for their owner alone.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder.unwrap_or(Path::new(".")))?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Everything held.
    Done,
    /// A check failed.
    Failed,
}

/// Runs the command line and returns the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    interrupt::watch();
    interrupt::watch_output();
    let global = &cli.global;
    let outcome = match &cli.command {
        Command::Inspect(arguments) => inspect::run(arguments, global),
        Command::Plan(arguments) => plan::run(arguments, global),
        Command::Rewrite(arguments) => rewrite::run(arguments, global),
        Command::Run(arguments) => run::run(arguments, global),
        Command::Validate(arguments) => validate::run(arguments, global),
        Command::Bench(arguments) => bench::run(arguments, global),
        Command::BenchWorker => bench::serve(),
        Command::Eval(arguments) => eval::run(arguments, global),
        Command::Explain(arguments) => explain::run(arguments, global),
        Command::Diff(arguments) => diff::run(arguments, global),
        Command::Textconv(arguments) => textconv::run(arguments, global),
        Command::Demo(arguments) => demo::run(arguments, global),
        Command::Runtime(arguments) => runtime::run(arguments, global),
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::from(1),
        Err(error) => {
            let said = message(&error);
            anstream::eprintln!("{}error:{} {said}", style::BAD, style::RESET);
            ExitCode::from(2)
        }
    }
}

/// An error and its causes on one line; a cause that the words before it end in is not said again.
fn message(error: &anyhow::Error) -> String {
    let mut said = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !said.ends_with(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

/// Prints one JSON document on stdout.
fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    anstream::println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let missing = std::io::Error::other("no such file");
        let error = crate::runtime::RuntimeError::Io {
            path: "clip".into(),
            source: missing,
        };
        let error = anyhow::Error::new(error).context("opening the clip");
        assert_eq!(message(&error), "opening the clip: clip: no such file");
        let other = anyhow::anyhow!("inner").context("outer");
        assert_eq!(message(&other), "outer: inner");
    }
}
