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
}

pub(super) fn run(arguments: &Arguments, out: &mut Out) -> Result<(), Failure> {
    let file = &arguments.job.file;
    match check(&arguments.job) {
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

fn check(arguments: &JobFileArguments) -> Result<(), Failure> {
    let job = job_file::read(&arguments.file, &arguments.set)?;
    match job.site_faults()? {
        Some(faults) if !faults.is_empty() => Err(Failure::invalid(&arguments.file, faults)),
        Some(_) | None => Ok(()),
    }
}
