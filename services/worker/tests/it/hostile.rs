//! Processes that do not do what they should, and systems that have no room: the agent and its machine are none the worse.

use std::time::Duration;

use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message as Say;
use attune_proto::v1::{self, Severity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::time::{Instant, sleep};

use crate::support::{Scheduler, world};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// The lines of the log that were passed on so far.
fn log(scheduler: &Scheduler) -> Vec<v1::JobNote> {
    let said = scheduler.said();
    let note = |said: &Said| match said {
        Said::AttemptReport(report) => match report.report.as_ref()? {
            Report::Note(note) if note.topic == "log" => Some(note.clone()),
            _ => None,
        },
        _ => None,
    };
    said.iter().filter_map(note).collect()
}

/// The processes that a script told of: `left ID`.
fn left(scheduler: &Scheduler) -> Vec<i32> {
    log(scheduler).iter().filter_map(|note| note.message.strip_prefix("left ")?.parse().ok()).collect()
}

fn is_alive(id: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// Children of this process that have ended and that nobody has asked for their ends.
fn zombies() -> Vec<String> {
    let own = std::process::id().to_string();
    let stats = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let stats = stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let of_own = |stat: &String| {
        let mut rest = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        rest.next() == Some("Z") && rest.next() == Some(&own)
    };
    stats.filter(of_own).collect()
}

/// Resident memory of this process.
fn memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    resident.unwrap().trim().parse::<u64>().unwrap() << 10
}

/// A35: a process whose log is a flood, with progress in the middle and a line without an end.
#[tokio::test]
async fn a_flood_in_the_log_is_passed_on_in_part_and_keeps_nothing_else_from_being_heard() {
    const LINES: u64 = 300_000;
    let script = format!(
        r#"
running
yes 'the same again' | head -n {LINES} >&2 &
progress 1
progress 2
wait
head -c 150000000 /dev/zero | tr '\0' x >&2
printf '\n\377\376 no text\n' >&2
say '{{"event":"finished","summary":{{"steps":3,"tokens":30,"trained_parameters":4,"tokens_per_second":5.0,"peak_memory_bytes":6,"before":{{}},"after":{{}}}}}}'
"#
    );
    let before = memory_bytes();
    let world = world(&script, |_, _| {}).await;
    world.scheduler.offer(1, &[]);
    let outcome = world.scheduler.outcome().await;
    assert!(matches!(outcome, Outcome::Succeeded(_)), "{outcome:?}");
    let grown = memory_bytes().saturating_sub(before);
    assert!(grown < 48 << 20, "{grown} bytes more than before");
    let notes = log(&world.scheduler);
    let (marks, lines): (Vec<_>, Vec<_>) = notes.iter().partition(|note| note.severity() == Severity::Warning);
    assert!((100..=500).contains(&lines.len()), "{} lines", lines.len());
    assert!(lines.iter().all(|note| note.message.len() < 2100));
    let dropped = |note: &&v1::JobNote| -> u64 {
        let number = note.message.strip_prefix("dropped ").and_then(|rest| rest.split(' ').next());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{note:?}"))
    };
    // None is lost without a word: two lines come after the flood.
    assert_eq!(marks.iter().map(dropped).sum::<u64>() + lines.len() as u64, LINES + 2);
}

/// A36: what leaves its group, its session and its parent, hears no signal and has no variables ends with its attempt,
/// however that ends.
#[tokio::test]
async fn nothing_that_a_process_started_outlives_it() {
    // Each tells of itself and stays, with the pipes of the process open.
    const LEAVES: &str = r#"
stays='trap "" TERM HUP INT; echo left $$ >&2; for i in 1 2 3 4 5 6 7 8 9; do sleep 600; done'
bash -c "$stays" &
setsid bash -c "$stays" &
(setsid bash -c "$stays" &)
(env -i /usr/bin/setsid /bin/bash -c "$stays" &)
(setsid bash -c "(setsid bash -c '$stays' &)" &)
(set -m; (bash -c "$stays" &) )
running
"#;
    const N_LEFT: usize = 6;
    for (what, then) in [
        ("it is let go", "sleep 600"),
        ("it ends by itself", "while [ ! -e $work/../../go ]; do sleep 0.05; done; exit 5"),
        ("it is killed", "while [ ! -e $work/../../go ]; do sleep 0.05; done; kill -KILL $$"),
        ("its agent ends", "sleep 600"),
    ] {
        let world = world(&format!("{LEAVES}{then}"), |config, _| config.grace = Duration::from_millis(200)).await;
        world.scheduler.offer(1, &[]);
        let deadline = Instant::now() + PATIENCE;
        let ids = loop {
            let ids = left(&world.scheduler);
            if ids.len() == N_LEFT {
                break ids;
            }
            assert!(Instant::now() < deadline, "{what}: {ids:?} of {N_LEFT}: {:?}", log(&world.scheduler));
            sleep(Duration::from_millis(10)).await;
        };
        assert!(ids.iter().all(|id| is_alive(*id)), "{what}: {ids:?}");
        match what {
            "it is let go" => {
                world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 1, message: String::new() }));
                world.scheduler.wait("farewell", |said| matches!(said, Said::CohortGone(_)).then_some(())).await;
            }
            "its agent ends" => {
                // It has nobody left to tell.
                world.stop.request();
                let deadline = Instant::now() + PATIENCE;
                // Whom it killed has ended before it has asked for all ends.
                while ids.iter().any(|id| is_alive(*id)) || !zombies().is_empty() {
                    assert!(Instant::now() < deadline, "{what}: {ids:?}, {:?}", zombies());
                    sleep(Duration::from_millis(10)).await;
                }
            }
            _ => {
                std::fs::write(world.folder().join("worker/attempts/1/go"), "").unwrap();
                let failure = world.scheduler.failure().await;
                assert!(failure.exit_code == Some(5) || failure.signal == Some(9), "{what}: {failure:?}");
            }
        }
        // All are gone before anybody hears of the end.
        let alive: Vec<i32> = ids.into_iter().filter(|id| is_alive(*id)).collect();
        assert!(alive.is_empty(), "{what}: {alive:?} are left");
        assert_eq!(zombies(), Vec::<String>::new(), "{what}");
    }
}

/// A36: a process that makes two of itself again and again, each in a session of its own.
#[tokio::test]
async fn a_bomb_of_processes_ends_with_its_attempt() {
    let script = r#"
bomb() { echo "left $BASHPID" >&2; sleep 0.3; (setsid bash -c "$(declare -f bomb); bomb" &); bomb & wait; }
running
setsid bash -c "$(declare -f bomb); bomb" &
sleep 600
"#;
    let world = world(script, |_, _| {}).await;
    world.scheduler.offer(1, &[]);
    let deadline = Instant::now() + PATIENCE;
    while left(&world.scheduler).len() < 24 {
        assert!(Instant::now() < deadline, "{:?}", log(&world.scheduler));
        sleep(Duration::from_millis(10)).await;
    }
    world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 1, message: String::new() }));
    world.scheduler.wait("farewell", |said| matches!(said, Said::CohortGone(_)).then_some(())).await;
    let folder = world.folder().canonicalize().unwrap().display().to_string();
    let is_of_the_attempt = |entry: std::fs::DirEntry| {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let id = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        (read("environ").contains(&folder) && id.is_some_and(is_alive)).then(|| read("cmdline"))
    };
    let alive: Vec<String> =
        std::fs::read_dir("/proc").unwrap().filter_map(Result::ok).filter_map(is_of_the_attempt).collect();
    assert_eq!(alive, Vec::<String>::new());
}

/// F31: a worker that may open no more files takes no work, says so, and is heard of as ever.
#[tokio::test]
async fn a_worker_without_room_refuses_work_and_is_heard_of() {
    let ttl = Duration::from_millis(600);
    let world = world("running; sleep 600", |_, state| *state.ttl.lock().unwrap() = ttl).await;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    // The next file to open has the smallest free number.
    let next = std::os::fd::AsRawFd::as_raw_fd(&std::fs::File::open("/dev/null").unwrap());
    setrlimit(Resource::RLIMIT_NOFILE, next as u64 + 2, hard).unwrap();
    world.scheduler.offer(1, &[]);
    let refused = world
        .scheduler
        .wait("refusal", |said| match said {
            Said::LeaseRefused(refused) => Some(refused.clone()),
            _ => None,
        })
        .await;
    assert_eq!(refused.refusal(), v1::LeaseRefusal::Busy);
    assert!(refused.message.contains("cannot open 32 more files"), "{refused:?}");
    // For longer than a lease.
    let of_beat = |said: &Said| match said {
        Said::Heartbeat(beat) => Some(beat.sequence),
        _ => None,
    };
    let beats = || world.scheduler.said().iter().filter_map(of_beat).max().unwrap_or(0);
    let (before, deadline) = (beats(), Instant::now() + PATIENCE);
    while beats() < before + 12 {
        assert!(Instant::now() < deadline, "no heartbeats");
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(*world.scheduler.0.connections.borrow(), 1, "over the connection that was there");
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    world.scheduler.offer(2, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
}
