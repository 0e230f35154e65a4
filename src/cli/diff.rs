//! `duet diff`

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::builder::PossibleValue;

use super::{Global, Outcome};
use crate::diff::policy::{Policy, Selection, ignore};
use crate::diff::render::{Format, View, render};
use crate::diff::{Options, compare};

/// Arguments of `duet diff`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes: 0 the same, or allowed by the policy; 1 different, or denied; 2 usage or input error"
)]
pub(super) struct Arguments {
    /// Model file or directory
    a: PathBuf,
    /// What it is compared with
    b: PathBuf,
    /// How to write the result
    #[arg(long, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    format: Format,
    /// Print one JSON document (--format json)
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Every place, renamed name and value in full (text and markdown)
    #[arg(long)]
    full: bool,
    /// Rules about what may change (YAML; see docs/diff.md)
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Do not count changes of these classes or kinds
    #[arg(long, value_name = "CLASS", value_delimiter = ',')]
    ignore: Vec<String>,
    /// Relative tolerance for weights: |b − a| ≤ atol + rtol·|a| [default: the policy's, else 0]
    #[arg(long, value_name = "R", value_parser = tolerance)]
    rtol: Option<f64>,
    /// Absolute tolerance for weights [default: the policy's, else 0]
    #[arg(long, value_name = "A", value_parser = tolerance)]
    atol: Option<f64>,
    /// Nodes around a change that json and html show [default: 2 for html, else 0]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Write to a file as well, in the format of its ending: .txt .json .md .html .xml (JUnit) .sarif
    #[arg(long, short, value_name = "FILE")]
    output: Vec<PathBuf>,
}

impl clap::ValueEnum for Format {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.word()))
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number of 0 or more".into()),
    }
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let format = if arguments.json {
        Format::Json
    } else {
        arguments.format
    };
    // What was asked for is checked before gigabytes are read.
    let outputs = arguments
        .output
        .iter()
        .map(|path| Ok((path, ending(path)?)));
    let outputs: Vec<(&PathBuf, Format)> = outputs.collect::<anyhow::Result<_>>()?;
    let policy = arguments.policy.as_deref().map(Policy::read).transpose()?;
    let ignored = arguments.ignore.iter().map(|w| w.trim());
    let ignored = Selection::parse(ignored.filter(|w| !w.is_empty()), "--ignore")?;
    let stated = |of: fn(&Policy) -> Option<f64>| policy.as_ref().and_then(of).unwrap_or(0.0);
    let draws = format == Format::Html || outputs.iter().any(|o| o.1 == Format::Html);
    let options = Options {
        rtol: arguments.rtol.unwrap_or_else(|| stated(|p| p.rtol)),
        atol: arguments.atol.unwrap_or_else(|| stated(|p| p.atol)),
        context: arguments.context.unwrap_or(if draws { 2 } else { 0 }),
        ..Options::default()
    };
    let mut report = compare(&arguments.a, &arguments.b, &options)?;
    ignore(&mut report, &ignored);
    if let Some(policy) = &policy {
        policy.apply(&mut report);
    }
    let full = arguments.full || global.verbose > 0;
    for (path, format) in outputs {
        let view = View {
            full,
            colour: false,
        };
        save(path, &render(&report, format, view))?;
    }
    let view = View {
        full,
        // anstream takes the codes out where they do not belong.
        colour: format == Format::Text,
    };
    print(&render(&report, format, view))?;
    Ok(if report.differs() {
        Outcome::Failed
    } else {
        Outcome::Done
    })
}

/// The format that a file's ending asks for.
fn ending(path: &Path) -> anyhow::Result<Format> {
    let format = match path.extension().and_then(|e| e.to_str()) {
        Some("txt") => Format::Text,
        Some("json") => Format::Json,
        Some("md") => Format::Markdown,
        Some("html") => Format::Html,
        Some("xml") => Format::Junit,
        Some("sarif") => Format::Sarif,
        _ => anyhow::bail!(
            "--output {}: expected a file ending in .txt, .json, .md, .html, .xml or .sarif",
            path.display()
        ),
    };
    Ok(format)
}

fn save(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{} could not be written", path.display()))
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no error.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("stdout could not be written"),
    }
}
