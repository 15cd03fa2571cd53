//! What a confined process may touch, tried from within: the test starts itself again as that process.

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use attune_trainer::confine::{Confined, confine};
use attune_trainer::protocol::{Request, Seat};
use attune_trainer::run::{End, run};

use crate::support::{Outside, Small};

/// Says to the process within where everything is.
const WITHIN: &str = "ATTUNE_TEST_CONFINED";

/// What is tried, and whether it was possible.
type Tried = BTreeMap<String, bool>;

/// A request whose base has a link to a file in `place`, where something else lies as well; with another process of its run, if it
/// has a `seat`.
fn request(small: &Small, place: &Path, seat: bool) -> Request {
    // As Hugging Face's cache has it.
    let (named, blob) = (small.path("base/tokenizer.json"), place.join("blob"));
    std::fs::copy(&named, &blob).unwrap();
    std::fs::remove_file(&named).unwrap();
    std::os::unix::fs::symlink(blob, named).unwrap();
    let (mut request, _) = small.request(small.plan(&[]), 1, None);
    request.work = place.join("work");
    std::fs::create_dir_all(&request.work).unwrap();
    request.seat = seat.then(|| Seat { rank: 0, size: 2, host: [127, 0, 0, 1].into() });
    std::fs::write(place.join("secret"), "of another job").unwrap();
    request
}

/// What the process within does: it confines itself, runs the job, and tries what it may not.
fn within(place: &Path, port: u16, seat: bool) -> Result<Tried, String> {
    let small = Small::with_weights();
    let request = request(&small, place, seat);
    let parent = std::os::unix::process::parent_id();
    let confined = confine(std::slice::from_ref(&request)).unwrap();
    if confined != Confined::Fully {
        return Err(format!("skipped: this kernel confines a process {confined:?}"));
    }
    let mut tried = Tried::new();
    let mut note = |what: &str, possible: bool| tried.insert(what.to_owned(), possible);
    if !seat {
        let outside = Outside::default();
        let end = run(&request, &outside);
        note("the job", matches!(end, Ok(End::Finished(_))));
    }
    note("a file of another job", std::fs::read(place.join("secret")).is_ok());
    note("a file in another's place", std::fs::write(place.join("new"), "").is_ok());
    note("a change of an input", std::fs::write(small.path("sums.jsonl"), "").is_ok());
    note("the agent's environment", std::fs::read(format!("/proc/{parent}/environ")).is_ok());
    note("its own state", std::fs::read("/proc/self/status").is_ok());
    note("what memory there is", std::fs::read("/proc/meminfo").is_ok());
    note("another program", Command::new("/bin/true").status().is_ok());
    note("a copy of itself", is_copied());
    note("a thread", std::thread::Builder::new().spawn(|| {}).is_ok_and(|thread| thread.join().is_ok()));
    note("a connection", TcpStream::connect(("127.0.0.1", port)).is_ok());
    note("a port", TcpListener::bind("127.0.0.1:0").is_ok());
    let parent = nix::unistd::Pid::from_raw(i32::try_from(parent).unwrap());
    note("a signal to the agent", nix::sys::signal::kill(parent, None).is_ok());
    Ok(tried)
}

/// Whether a copy of this process can be made, which ends at once.
#[expect(unsafe_code, reason = "there is no other way to ask")]
fn is_copied() -> bool {
    // SAFETY: the copy does nothing but end.
    match unsafe { nix::unistd::fork() } {
        // SAFETY: nothing of this process runs on the way out.
        Ok(nix::unistd::ForkResult::Child) => unsafe { nix::libc::_exit(0) },
        copy => copy.is_ok(),
    }
}

/// Runs this test again as the process within, or is that process; why nothing was tried, if so.
fn tried(test: &str, seat: bool) -> Result<Tried, String> {
    let name = format!("confined::{test}");
    if let Ok(told) = std::env::var(WITHIN) {
        let (port, place) = told.split_once(' ').unwrap();
        let tried = within(Path::new(place), port.parse().unwrap(), seat);
        std::fs::write(Path::new(place).join("work/tried.json"), serde_json::to_string(&tried).unwrap()).unwrap();
        return Err("this was tried from within".to_owned());
    }
    let (place, listener) = (tempfile::tempdir().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let told = format!("{} {}", listener.local_addr().unwrap().port(), place.path().display());
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(WITHIN, told)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    let found = place.path().join("work/tried.json");
    serde_json::from_slice::<Result<Tried, String>>(&std::fs::read(found).unwrap()).unwrap()
}

fn possible(tried: &Tried) -> Vec<&str> {
    tried.iter().filter(|(_, possible)| **possible).map(|(what, _)| what.as_str()).collect()
}

#[test]
fn a_job_alone_runs_and_touches_nothing_but_its_own() {
    let tried = match tried("a_job_alone_runs_and_touches_nothing_but_its_own", false) {
        Ok(tried) => tried,
        Err(why) => return println!("{why}"),
    };
    assert_eq!(possible(&tried), ["a thread", "its own state", "the job", "what memory there is"], "{tried:?}");
    assert_eq!(tried.len(), 13);
}

#[test]
fn a_process_of_several_speaks_to_the_others() {
    let tried = match tried("a_process_of_several_speaks_to_the_others", true) {
        Ok(tried) => tried,
        Err(why) => return println!("{why}"),
    };
    let expected = ["a connection", "a port", "a thread", "its own state", "what memory there is"];
    assert_eq!(possible(&tried), expected, "{tried:?}");
}
