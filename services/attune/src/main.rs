//! The command line: assembly of what the rooms offer, and nothing that a room could hold.
//!
//! [`command`] has one file for each noun, [`mod@print`] is what people and programs read, [`demo`] is the material of the
//! built-in demonstration. Data goes to standard output, everything else to standard error.

mod advise;
mod command;
mod demo;
mod experiment;
mod job_file;
mod print;
mod remote;
mod speaker;
mod stack;
mod words;

use std::process::ExitCode;

use clap::Parser as _;

use command::Arguments;
use print::Out;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _scenario = fail::FailScenario::setup();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version arrive here as well, with status 0; a reader that went away is no error.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(print::USAGE));
        }
    };
    let json = arguments.global.json;
    let mut out = Out::new(json);
    let end = command::run(arguments, &mut out).and_then(|()| out.flush());
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // What was written before the failure belongs before its message.
            drop(out.flush());
            failure.report(json);
            ExitCode::from(failure.status)
        }
    }
}
