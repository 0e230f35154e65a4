//! `duet diff`

use std::path::PathBuf;

use super::{Global, Outcome, print_json};
use crate::diff::{Options, compare};

/// Arguments of `duet diff`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Model file or directory
    a: PathBuf,
    /// What it is compared with
    b: PathBuf,
    /// Relative tolerance for weights
    #[arg(long, default_value_t = 0.0, value_name = "R")]
    rtol: f64,
    /// Absolute tolerance for weights
    #[arg(long, default_value_t = 0.0, value_name = "A")]
    atol: f64,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, _global: &Global) -> anyhow::Result<Outcome> {
    let options = Options {
        rtol: arguments.rtol,
        atol: arguments.atol,
        ..Options::default()
    };
    let report = compare(&arguments.a, &arguments.b, &options)?;
    if arguments.json {
        print_json(&serde_json::to_value(&report)?)?;
    } else {
        for file in report.files.iter().filter(|f| !f.changes.is_empty()) {
            anstream::println!("{}", file.path);
            for change in &file.changes {
                let repeats = change.places.len();
                let times = if repeats > 1 {
                    format!(" (×{repeats})")
                } else {
                    String::new()
                };
                anstream::println!("  {}: {}{times}", change.class.word(), change.title);
            }
        }
    }
    Ok(if report.differs() {
        Outcome::Failed
    } else {
        Outcome::Done
    })
}
