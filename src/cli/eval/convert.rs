//! `duet eval convert`

use std::path::PathBuf;

use crate::cli::{Global, Outcome};
use crate::eval::convert::{Format, Images, convert};

/// Arguments of `duet eval convert`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The set
    #[arg(value_enum, value_name = "FORMAT")]
    format: Set,
    /// Its files as published, and LLaVA's question file if the prompts are to be LLaVA's (docs/eval.md lists them)
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Folder of its images (MME: left out, its directory holds them)
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Data set to write, a new directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Copy the images that are asked about, instead of a link to their folder
    #[arg(long)]
    copy: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Set {
    Textvqa,
    Pope,
    Gqa,
    Mme,
    /// ScienceQA
    Sqa,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let format = match arguments.format {
        Set::Textvqa => Format::TextVqa,
        Set::Pope => Format::Pope,
        Set::Gqa => Format::Gqa,
        Set::Mme => Format::Mme,
        Set::Sqa => Format::Sqa,
    };
    let how = if arguments.copy {
        Images::Copy
    } else {
        Images::Link
    };
    let images = arguments.images.as_deref();
    let written = convert(format, &arguments.files, images, how, &arguments.out)?;
    global.say(format!(
        "wrote {}: {} questions about {} images",
        arguments.out.display(),
        written.questions,
        written.images
    ));
    Ok(Outcome::Done)
}
