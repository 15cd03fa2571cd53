//! `attune demo`: the main job, end to end, on material that is made here.

use std::path::PathBuf;

use serde_json::json;

use crate::demo::{self, CHAT_JOB, TEXT_JOB, World};
use crate::print::{Failure, Out};

/// The seed of the demonstration's world.
const SEED: u64 = 7;

/// Writes a small invented world, a base that knows nothing, and the two jobs that teach it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  attune demo --files demo && attune validate demo/text.yaml")]
pub(crate) struct Arguments {
    /// Where the files go; existing ones of the same name are replaced.
    #[arg(long, value_name = "FOLDER")]
    files: PathBuf,
    /// The seed of the world.
    #[arg(long, value_name = "N", default_value_t = SEED)]
    seed: u64,
}

pub(super) fn run(arguments: &Arguments, out: &mut Out) -> Result<(), Failure> {
    let written = demo::write(&arguments.files, &World::new(arguments.seed))?;
    if out.is_json() {
        let jobs = [TEXT_JOB, CHAT_JOB].map(|job| arguments.files.join(job.file));
        return out.document(&json!({"files": written, "jobs": jobs}));
    }
    for path in written {
        out.line(&path.display().to_string())?;
    }
    Ok(())
}
