//! `attune completions`: a shell's completion script, made from the definitions of the arguments.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::print::{Failure, Out};

/// Prints a completion script for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune completions bash > ~/.local/share/bash-completion/completions/attune")]
pub(crate) struct Arguments {
    /// The shell.
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments, out: &mut Out) -> Result<(), Failure> {
    let mut command = super::Arguments::command();
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command, "attune", &mut script);
    out.text(&String::from_utf8_lossy(&script))
}
