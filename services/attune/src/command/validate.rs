//! `attune validate`: all faults of a job file at once.

use serde_json::json;

use crate::job_file::{self, JobFileArguments};
use crate::print::{Failure, Out};

/// Checks a job file and says everything that is wrong with it, with field paths.
#[derive(Debug, clap::Args)]
#[command(after_help = "The sites that `targets` names are checked where the base is a folder on this machine.

Examples:
  attune validate job.yaml
  attune validate job.yaml --set tune.adapter.rank=64 --json")]
pub(crate) struct Arguments {
    #[command(flatten)]
    job: JobFileArguments,
    /// Does not look for paths: they lie on the server, below its --data-root.
    #[arg(long)]
    server_paths: bool,
}

pub(super) fn run(arguments: &Arguments, out: &mut Out) -> Result<(), Failure> {
    let file = &arguments.job.file;
    match check(arguments) {
        Ok(()) if out.is_json() => out.document(&json!({"file": file, "valid": true, "faults": []})),
        Ok(()) => out.line(&format!("{file} is valid")),
        Err(failure) if out.is_json() => {
            let message = &failure.message;
            out.document(&json!({"file": file, "valid": false, "message": message, "faults": failure.faults}))?;
            Err(Failure::silent(failure.status))
        }
        Err(failure) => Err(failure),
    }
}

fn check(arguments: &Arguments) -> Result<(), Failure> {
    let name = &arguments.job.file;
    let job = job_file::read(name, &arguments.job.set)?;
    let mut faults = job.site_faults()?.unwrap_or_default();
    if !arguments.server_paths {
        faults.extend(job.absent());
    }
    if faults.is_empty() { Ok(()) } else { Err(Failure::invalid(name, faults)) }
}
