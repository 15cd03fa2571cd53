//! `attune attempt`: the process that trains, started by a worker. It speaks the messages of `attune_trainer::protocol`
//! on standard input and output, and logs to standard error.

use std::io::BufReader;
use std::process::ExitCode;

use attune_telemetry::Logging;

use attune_trainer::confine::{Confined, confine};

use crate::print::{FAILED, Failure};

pub(super) fn run() -> Result<(), Failure> {
    Logging::default().install().map_err(|error| Failure::usage(error.to_string()))?;
    by_small_pages();
    let (input, out) = (BufReader::new(std::io::stdin()), std::io::stdout());
    let end = attune_trainer::attempt::run_attempt(input, out, |requests| {
        match confine(requests) {
            Ok(Confined::Fully | Confined::OnDevice) => {}
            Ok(Confined::Partly) => tracing::debug!("this kernel confines the process in part"),
            Ok(Confined::Not) => tracing::warn!("this kernel has no Landlock: the process may touch what its user may"),
            Err(error) => return Err(format!("the process cannot be confined: {error}")),
        }
        Ok(())
    });
    // The reason went to the agent as an event.
    if end == ExitCode::SUCCESS { Ok(()) } else { Err(Failure::silent(FAILED)) }
}

/// Takes memory by small pages. A huge one is taken whole for the first byte of it that is used, which came to a sixth of a job's memory
/// and made it as chance would have it; steps take the same time without.
fn by_small_pages() {
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::debug!(%error, "huge pages stay on");
    }
}
