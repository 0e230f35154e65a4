//! `duet textconv`: models as text for `git diff`.

use std::path::PathBuf;

use super::diff::print;
use super::{Global, Outcome};
use crate::diff::textconv;

/// Arguments of `duet textconv`.
#[derive(Debug, clap::Args)]
#[command(after_help = "In a repository:
  echo '*.onnx diff=onnx' >> .gitattributes
  git config diff.onnx.textconv 'duet textconv'
  git config diff.onnx.cachetextconv true")]
pub(super) struct Arguments {
    /// Model file
    file: PathBuf,
}

pub(super) fn run(arguments: &Arguments, _global: &Global) -> anyhow::Result<Outcome> {
    print(&textconv(&arguments.file)?)?;
    Ok(Outcome::Done)
}
