//! The process that trains: reads a request and commands, writes events.

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control::Control;
use crate::error::Error;
use crate::protocol::{Command, Event, FailureClass, Request, VERSION};
use crate::run;

/// The exit status of a run that failed and said why.
const FAILED: u8 = 1;
/// The exit status of a process whose agent is gone.
const ORPHANED: i32 = 3;

/// Commands in, events out.
struct Wires<W> {
    out: Mutex<W>,
    stop: AtomicBool,
    checkpoint: AtomicBool,
}

impl<W: Write + Send> Control for Wires<W> {
    fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn take_checkpoint_request(&self) -> bool {
        self.checkpoint.swap(false, Ordering::Relaxed)
    }

    fn emit(&self, event: Event) {
        let mut out = self.out.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let line = serde_json::to_string(&event).unwrap_or_default();
        // An agent that no longer reads has closed our input as well, which ends the process.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// Runs one attempt: a request on the first line of `input`, commands on the lines after it, events on `out`. When the input
/// ends while the run goes on, the process ends: its agent is gone.
pub fn run_attempt(mut input: impl BufRead + Send + 'static, out: impl Write + Send + 'static) -> ExitCode {
    let wires = std::sync::Arc::new(Wires {
        out: Mutex::new(out),
        stop: AtomicBool::new(false),
        checkpoint: AtomicBool::new(false),
    });
    let request = match read_request(&mut input) {
        Ok(request) => request,
        Err(message) => {
            wires.emit(Event::Failed { class: FailureClass::Internal, message, faults: Vec::new() });
            return ExitCode::from(FAILED);
        }
    };
    let listening = std::sync::Arc::clone(&wires);
    let work = request.work.clone();
    std::thread::spawn(move || listen(input, &listening, &work));
    let end = catch_unwind(AssertUnwindSafe(|| run::run(&request, &*wires)))
        .unwrap_or_else(|panic| Err(Error::Panic(run::words(&*panic))));
    match end {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            wires.emit(Event::Failed { class: error.class(), message: error.to_string(), faults: error.faults() });
            ExitCode::from(FAILED)
        }
    }
}

fn read_request(input: &mut impl BufRead) -> Result<Request, String> {
    let mut line = String::new();
    input.read_line(&mut line).map_err(|error| format!("the request cannot be read: {error}"))?;
    let request: Request =
        serde_json::from_str(&line).map_err(|error| format!("the request is not understood: {error}"))?;
    if request.version != VERSION {
        return Err(format!("the request has version {}; this program reads {VERSION}", request.version));
    }
    Ok(request)
}

#[expect(clippy::exit, reason = "without its agent the process has nobody to report to")]
fn listen<W: Write + Send>(input: impl BufRead, wires: &Wires<W>, work: &std::path::Path) {
    for line in input.lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(Command::CheckpointAndStop) => wires.stop.store(true, Ordering::Relaxed),
            Ok(Command::Checkpoint) => wires.checkpoint.store(true, Ordering::Relaxed),
            // The copy in the store is the one that counts; a folder that cannot be removed goes with the work folder.
            Ok(Command::CheckpointStored { step }) => {
                drop(std::fs::remove_dir_all(work.join(format!("checkpoint-{step}"))))
            }
            // A command of a newer agent: what this program does not know, it does not do.
            Err(_) => {}
        }
    }
    std::process::exit(ORPHANED);
}
