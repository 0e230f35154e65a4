//! `duet runtime`

use super::{Global, Outcome};
use crate::runtime::{Runtime, install, library::Places, providers};

/// Arguments of `duet runtime`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Say which library is used, how it was found and what it can do
    Show,
    /// Install the pinned ONNX Runtime with pip into the user's cache
    Install,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    match arguments.action {
        Action::Show => {
            let library = Places::of_process().find()?;
            let runtime = Runtime::load(library)?;
            anstream::println!("library    {}", runtime.library().path.display());
            anstream::println!("found      {}", runtime.library().origin);
            anstream::println!("build      {}", runtime.build_info());
            anstream::println!("providers  {}", providers::available()?.join(", "));
        }
        Action::Install => {
            let path = install::install(&mut |line| global.say(line))?;
            anstream::println!("{}", path.display());
        }
    }
    Ok(Outcome::Done)
}
