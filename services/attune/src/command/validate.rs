//! `attune validate`: all faults of a job file at once.

use attune_spec::stages::{self, StageSpec};
use serde_json::{Value, json};

use crate::job_file::{self, JobFileArguments};
use crate::print::manual::written;
use crate::print::{Failure, Out};

/// Checks a job file and says everything that is wrong with it, with field paths; of a recipe, what its stages are made of.
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
        Ok(stages) if out.is_json() => {
            let mut told = json!({"file": file, "valid": true, "faults": []});
            if !stages.is_empty() {
                let slots =
                    |stage: &StageSpec| stage.job.tune.slots().into_iter().map(|(_, slot)| json!(slot)).collect();
                let told_of = |stage: &StageSpec| json!({"name": stage.name, "stack": Value::Array(slots(stage))});
                told["stages"] = stages.iter().map(told_of).collect();
            }
            out.document(&told)
        }
        Ok(stages) => {
            out.line(&format!("{file} is valid"))?;
            for stage in stages {
                let slots: Vec<String> =
                    stage.job.tune.slots().into_iter().map(|(_, slot)| written(&json!(slot))).collect();
                out.line(&format!("  stage {}: {}", stage.name, slots.join(", ")))?;
            }
            Ok(())
        }
        Err(failure) if out.is_json() => {
            let message = &failure.message;
            out.document(&json!({"file": file, "valid": false, "message": message, "faults": failure.faults}))?;
            Err(Failure::silent(failure.status))
        }
        Err(failure) => Err(failure),
    }
}

/// What is right by itself and with the rest; the stages that are known of a recipe.
fn check(arguments: &Arguments) -> Result<Vec<StageSpec>, Failure> {
    let name = &arguments.job.file;
    let job = job_file::read(name, &arguments.job.set)?;
    let mut faults = job.site_faults()?.unwrap_or_default();
    if !arguments.server_paths {
        faults.extend(job.absent());
    }
    if !faults.is_empty() {
        return Err(Failure::invalid(name, faults));
    }
    Ok(if job.spec.recipe.is_some() { stages::known(&job.spec, &[]).unwrap_or_default() } else { Vec::new() })
}
