//! `attune attempt`: the process that trains, started by a worker. It speaks the messages of `attune_trainer::protocol`
//! on standard input and output, and logs to standard error.

use std::io::BufReader;
use std::process::ExitCode;

use attune_telemetry::Logging;

use crate::print::{FAILED, Failure};

pub(super) fn run() -> Result<(), Failure> {
    Logging::default().install().map_err(|error| Failure::usage(error.to_string()))?;
    let end = attune_trainer::attempt::run_attempt(BufReader::new(std::io::stdin()), std::io::stdout());
    // The reason went to the agent as an event.
    if end == ExitCode::SUCCESS { Ok(()) } else { Err(Failure::silent(FAILED)) }
}
