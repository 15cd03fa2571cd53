//! Jobs that several workers train together: the same bits as on one, and one failed attempt when a rank is lost.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use attune_proto::v1::{self, JobState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::kills::prepare;
use crate::support::{Cluster, SMALL, outputs};

/// Long enough to be hit in the middle, with checkpoints on the way.
fn job(base: &str, workers: u32) -> Vec<String> {
    let fixed = ["tune.steps=300", "tune.checkpoint.every_steps=50"];
    let own = [format!("base={base}"), format!("resources.workers={workers}")];
    SMALL.into_iter().chain(fixed).map(str::to_owned).chain(own).collect()
}

fn submit(cluster: &Cluster, job: &[String]) -> String {
    cluster.submit(&cluster.path("world/chat.yaml"), &job.iter().map(String::as_str).collect::<Vec<_>>())
}

#[tokio::test]
async fn a_job_on_two_workers_has_the_bits_of_one_and_outlives_the_loss_of_a_rank() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let alone = submit(&cluster, &job(&base, 1));
    let expected: BTreeMap<String, String> = outputs(&cluster.ends(&alone, JobState::Succeeded).await);

    let waits = submit(&cluster, &job(&base, 2));
    let queued = cluster.wait(&waits, "reason", |job| job.state() == JobState::Queued && !job.message.is_empty()).await;
    assert!(queued.message.contains("worker"), "{}", queued.message);
    let second = cluster.another_worker("two");
    let ended = cluster.ends(&waits, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts, outputs(&ended)), (1, 0, expected.clone()));

    // A rank dies: one failed attempt, told by the worker that knows why; a rank that says nothing more is the same.
    let id = submit(&cluster, &job(&base, 2));
    let hit = [(&second, Signal::SIGKILL), (cluster.worker.as_ref().unwrap(), Signal::SIGSTOP)];
    for (epoch, (worker, signal)) in (1..).zip(hit) {
        let trains =
            |job: &v1::Job| job.epoch == epoch && job.state() == JobState::Running && !job.checkpoint.is_empty();
        cluster.wait(&id, "training", trains).await;
        kill(Pid::from_raw(worker.children()[0]), signal).unwrap();
        cluster.wait(&id, "next attempt", |job| job.epoch == epoch + 1).await;
    }
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts), (3, 2), "{ended:#?}");
    assert_eq!(outputs(&ended), expected);
    let events = String::from_utf8(cluster.run(["jobs", "events", &id]).stdout).unwrap();
    assert!(events.contains("of 2: the training process was killed by signal 9"), "the rank is named: {events}");

    // A worker is lost with its rank.
    let id = submit(&cluster, &job(&base, 2));
    cluster.wait(&id, "training", |job| job.state() == JobState::Running && !job.checkpoint.is_empty()).await;
    second.kill();
    cluster.wait(&id, "end of the attempt", |job| job.state() != JobState::Running).await;
    let _again = cluster.another_worker("two");
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&ended), expected);
}

#[tokio::test]
async fn a_job_on_two_workers_is_paused_resumed_and_cancelled_as_one() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let _second = cluster.another_worker("two");
    let id = submit(&cluster, &job(&base, 2));
    let trains = |job: &v1::Job| job.state() == JobState::Running && job.progress.is_some();
    cluster.wait(&id, "training", trains).await;
    assert!(cluster.run(["jobs", "pause", &id]).status.success());
    let paused = cluster.wait(&id, "pause", |job| job.state() == JobState::Paused).await;
    assert!(!paused.checkpoint.is_empty() && paused.failed_attempts == 0, "{paused:#?}");
    assert!(cluster.run(["jobs", "resume", &id]).status.success());
    let resumed = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((resumed.epoch, resumed.failed_attempts), (2, 0));

    let id = submit(&cluster, &job(&base, 2));
    cluster.wait(&id, "training", trains).await;
    assert!(cluster.run(["jobs", "cancel", &id]).status.success());
    cluster.ends(&id, JobState::Cancelled).await;
    // Both workers are free again.
    let last = submit(&cluster, &job(&base, 2));
    assert_eq!(outputs(&cluster.ends(&last, JobState::Succeeded).await), outputs(&resumed));
}

/// F27: a rank's memory loses a bit of a weight in the middle of a run.
#[tokio::test]
async fn a_bit_that_one_rank_loses_ends_the_attempt_and_is_in_no_result() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let alone = submit(&cluster, &job(&base, 1));
    let expected = outputs(&cluster.ends(&alone, JobState::Succeeded).await);
    // Past the middle: the next attempt goes on from a checkpoint and has fewer steps before it.
    let planted = [("FAILPOINTS", "trainer::bit_lost=250*off->1*return->off")];
    let _second = cluster.another_worker_with("two", &planted);
    let id = submit(&cluster, &job(&base, 2));
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts), (2, 1), "{ended:#?}");
    assert_eq!(outputs(&ended), expected);
    let events = String::from_utf8(cluster.run(["jobs", "events", &id]).stdout).unwrap();
    println!("{events}");
    let failed = events.lines().find(|line| line.contains("one of them has lost a bit")).expect(&events);
    assert!(failed.contains("corrupt") || events.contains("bytes did not match their digest"), "{events}");
    // Both ranks, each with what it had.
    assert!(["rank 0, with digest", "rank 1, with digest"].iter().all(|rank| failed.contains(rank)), "{failed}");
}

/// F11: one of two ranks takes many times as long as the other.
#[tokio::test]
async fn a_rank_that_holds_up_the_other_is_named_and_the_job_goes_on() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let planted = [("FAILPOINTS", "trainer::after_step=sleep(300)")];
    let _second = cluster.another_worker_with("two", &planted);
    let mut job = job(&base, 2);
    job.push("tune.steps=40".to_owned());
    let id = submit(&cluster, &job);
    // The first of a gang's workers is that of rank 0.
    let running = cluster.wait(&id, "training", |job| job.state() == JobState::Running).await;
    let second = std::fs::read_to_string(cluster.path("two/worker-id")).unwrap();
    let slow = u32::from(second.trim() != running.worker_id);
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts), (1, 0), "{ended:#?}");
    let events = String::from_utf8(cluster.run(["jobs", "events", &id]).stdout).unwrap();
    let named: Vec<&str> = events.lines().filter(|line| line.contains("holds up the others")).collect();
    let words = [format!("rank {slow} holds up"), format!("rank {} waits for rank {slow} for ", 1 - slow)];
    assert!(words.iter().all(|words| named[0].contains(words)), "{named:?}");
    assert_eq!(named.len(), 1, "it is said once: {events}");
    let metrics = String::from_utf8(cluster.run(["jobs", "metrics", &id]).stdout).unwrap();
    let waits = |rank: u32| format!("time/waiting_for_rank_{rank}");
    assert!(metrics.contains(&waits(slow)) && metrics.contains(&waits(1 - slow)), "{metrics}");
}

/// The ports at which a process listens.
fn ports(process: i32) -> Vec<u16> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().filter_map(Result::ok);
    let links = links.filter_map(|link| Some(std::fs::read_link(link.path()).ok()?.display().to_string()));
    let own: Vec<String> =
        links.filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let table = std::fs::read_to_string(format!("/proc/{process}/net/tcp")).unwrap_or_default();
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // The local address, the state that means listening, and the socket.
        let listens = fields.get(3) == Some(&"0A") && own.iter().any(|own| fields.get(9) == Some(&own.as_str()));
        u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok().filter(|_| listens)
    };
    table.lines().filter_map(port).collect()
}

/// F12, A39: whoever connects to the port of a gang and does not belong to the run is turned away, and the run is as if
/// nobody had.
#[tokio::test]
async fn strangers_at_the_port_of_a_gang_change_nothing() {
    let cluster = Cluster::start().await;
    let base = prepare(&cluster).await;
    let alone = submit(&cluster, &job(&base, 1));
    let expected = outputs(&cluster.ends(&alone, JobState::Succeeded).await);
    // The other one takes its time, in which the first one listens.
    let _second = cluster.another_worker_with("two", &[("FAILPOINTS", "trainer::before_meeting=sleep(6000)")]);
    let id = submit(&cluster, &job(&base, 2));
    cluster.wait(&id, "start", |job| job.state() == JobState::Starting).await;
    let deadline = tokio::time::Instant::now() + crate::support::PATIENCE;
    let port = loop {
        let children = cluster.worker.as_ref().unwrap().children();
        if let Some(port) = children.into_iter().flat_map(ports).next() {
            break port;
        }
        assert!(tokio::time::Instant::now() < deadline, "nobody listens\n{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    };
    let silent: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    let mut garbage = connect();
    // It may be closed in the middle.
    let _ = garbage.write_all(&[0xff; 65_536]);
    // A rank of an earlier attempt: the right words, and tokens that are none any more.
    let earlier = std::thread::spawn({
        let hello = [&b"attune\x00\x02"[..], &1_u32.to_le_bytes(), &[7; 32]].concat();
        let mut old = connect();
        move || {
            old.write_all(&hello).unwrap();
            let mut answer = [0; 64];
            if old.read_exact(&mut answer).is_err() {
                return None;
            }
            let _ = old.write_all(&[9; 32]);
            let mut more = [0; 1];
            Some(old.read(&mut more).unwrap_or(0))
        }
    });
    let ended = cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((ended.epoch, ended.failed_attempts), (1, 0), "{ended:#?}");
    assert_eq!(outputs(&ended), expected);
    // It hears a proof that it cannot answer, or that the run has no such rank; in any case the end of the connection.
    assert!(matches!(earlier.join().unwrap(), None | Some(0)));
    for mut stream in silent.into_iter().chain([garbage]) {
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0, "nothing is said to strangers");
    }
}
