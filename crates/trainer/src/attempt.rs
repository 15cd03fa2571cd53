//! The process that trains: reads a request, or several, and commands; writes events.

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use attune_collective::Peer;

use crate::cohort;
use crate::control::Control;
use crate::error::Error;
use crate::protocol::{self, Cohort, Command, Event, FailureClass, Request, Tagged, VERSION};
use crate::run;

/// The exit status of a run that failed and said why.
const FAILED: u8 = 1;
/// The exit status of a process whose agent is gone.
const ORPHANED: i32 = 3;

/// One lane: commands in, events out.
struct Wires<W> {
    lane: u32,
    out: Arc<Mutex<W>>,
    work: PathBuf,
    stop: AtomicBool,
    checkpoint: AtomicBool,
    leave: AtomicBool,
    peers: Mutex<Option<Vec<protocol::Peer>>>,
    told: Condvar,
}

impl<W: Write + Send> Wires<W> {
    fn new(lane: u32, out: &Arc<Mutex<W>>, work: PathBuf) -> Self {
        let flag = || AtomicBool::new(false);
        let (peers, told) = (Mutex::default(), Condvar::new());
        Self { lane, out: Arc::clone(out), work, stop: flag(), checkpoint: flag(), leave: flag(), peers, told }
    }

    fn hear(&self, command: &Command) {
        match command {
            Command::CheckpointAndStop => self.stop.store(true, Ordering::Relaxed),
            Command::Checkpoint => self.checkpoint.store(true, Ordering::Relaxed),
            Command::Leave => self.leave.store(true, Ordering::Relaxed),
            Command::Peers { peers } => *self.lock() = Some(peers.clone()),
            // The copy in the store is the one that counts; a folder that cannot be removed goes with the work folder.
            Command::CheckpointStored { step } => {
                drop(std::fs::remove_dir_all(self.work.join(format!("checkpoint-{step}"))));
            }
        }
        // With the lock, or the word could come between a look and the sleep after it.
        drop(self.lock());
        self.told.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<protocol::Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: &Error) {
        self.emit(Event::Failed { class: error.class(), message: error.to_string(), faults: error.faults() });
    }
}

impl<W: Write + Send> Control for Wires<W> {
    fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn leave_requested(&self) -> bool {
        self.leave.load(Ordering::Relaxed)
    }

    fn take_checkpoint_request(&self) -> bool {
        self.checkpoint.swap(false, Ordering::Relaxed)
    }

    fn emit(&self, event: Event) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let line = serde_json::to_string(&Tagged { lane: self.lane, message: event }).unwrap_or_default();
        // An agent that no longer reads has closed our input as well, which ends the process.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    fn meet(&self, own: &Peer) -> Result<Option<Vec<Peer>>, Error> {
        self.emit(Event::Listening { peer: own.into() });
        // However long the others take to fetch what they need: the agent ends this process when they do not come.
        let waits = |peers: &mut Option<_>| peers.is_none() && !self.stop_requested() && !self.leave_requested();
        let told = self.told.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        let read = |peer: &protocol::Peer| Peer::try_from(peer).map_err(Error::Meeting);
        told.as_ref().map(|peers| peers.iter().map(read).collect()).transpose()
    }
}

/// Runs what the first line of `input` asks for, with commands on the lines after it and events on `out`. When the input
/// ends while a run goes on, the process ends: its agent is gone. `before` sees the requests before anything of theirs is touched, while
/// there is no other thread, and may refuse them.
///
/// The status of one run is that of the process. Several are lanes that each say how they ended; the process has then
/// done all that it had to.
pub fn run_attempt(
    mut input: impl BufRead + Send + 'static,
    out: impl Write + Send + 'static,
    before: impl FnOnce(&[Request]) -> Result<(), String>,
) -> ExitCode {
    let out = Arc::new(Mutex::new(out));
    let requests = read_requests(&mut input).and_then(|requests| before(&requests).map(|()| requests));
    let requests = match requests {
        Ok(requests) => requests,
        Err(message) => {
            let wires = Wires::new(0, &out, PathBuf::new());
            wires.emit(Event::Failed { class: FailureClass::Internal, message, faults: Vec::new() });
            return ExitCode::from(FAILED);
        }
    };
    let wires = |(lane, request): (u32, &Request)| Wires::new(lane, &out, request.work.clone());
    let lanes: Arc<Vec<_>> = Arc::new((0..).zip(&requests).map(wires).collect());
    let listening = Arc::clone(&lanes);
    std::thread::spawn(move || listen(input, &listening));
    if let ([request], [wires]) = (requests.as_slice(), lanes.as_slice()) {
        let end = catch_unwind(AssertUnwindSafe(|| run::run(request, wires)))
            .unwrap_or_else(|panic| Err(Error::Panic(run::words(&*panic))));
        let Err(error) = end else { return ExitCode::SUCCESS };
        wires.fail(&error);
        return ExitCode::from(FAILED);
    }
    let runs: Vec<(&Request, &dyn Control)> =
        requests.iter().zip(lanes.iter()).map(|(request, wires)| (request, wires as &dyn Control)).collect();
    cohort::run(&runs, &|lane, end| {
        if let (Err(error), Some(wires)) = (end, lanes.get(lane)) {
            wires.fail(&error);
        }
    });
    ExitCode::SUCCESS
}

fn read_requests(input: &mut impl BufRead) -> Result<Vec<Request>, String> {
    let mut line = String::new();
    input.read_line(&mut line).map_err(|error| format!("the request cannot be read: {error}"))?;
    let unclear = |error: serde_json::Error| format!("the request is not understood: {error}");
    let value: serde_json::Value = serde_json::from_str(&line).map_err(unclear)?;
    let requests = if value.get("lanes").is_some() {
        let cohort: Cohort = serde_json::from_value(value).map_err(unclear)?;
        check_version(cohort.version)?;
        cohort.lanes
    } else {
        vec![serde_json::from_value(value).map_err(unclear)?]
    };
    requests.iter().try_for_each(|request| check_version(request.version))?;
    if requests.is_empty() { Err("the request has no lane".to_owned()) } else { Ok(requests) }
}

fn check_version(version: u32) -> Result<(), String> {
    if version == VERSION {
        return Ok(());
    }
    Err(format!("the request has version {version}; this program reads {VERSION}"))
}

#[expect(clippy::exit, reason = "without its agent the process has nobody to report to")]
fn listen<W: Write + Send>(input: impl BufRead, lanes: &[Wires<W>]) {
    for line in input.lines() {
        let Ok(line) = line else { break };
        // A command of a newer agent: what this program does not know, it does not do.
        if let Ok(told) = serde_json::from_str::<Tagged<Command>>(&line)
            && let Some(wires) = lanes.get(told.lane as usize)
        {
            wires.hear(&told.message);
        }
    }
    std::process::exit(ORPHANED);
}
