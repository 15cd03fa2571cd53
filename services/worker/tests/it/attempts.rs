//! How attempts end, and what is said about it.

use std::time::Duration;

use attune_proto::Class;
use attune_proto::convert::time;
use attune_proto::v1::attempt_commit::Commit;
use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message as Say;
use attune_proto::v1::{self, FailureCause};

use crate::support::world;

/// A run that does everything.
const WHOLE: &str = r#"
say '{"event":"starting","phase":"base"}'
say '{"event":"note","topic":"data/a","message":"1 of 2 rows are bad"}'
running
progress 1
say '{"event":"metrics","step":1,"tokens":10,"metrics":[{"name":"train/loss","value":2.5}]}'
made checkpoint-2 two
say "{\"event\":\"checkpoint\",\"step\":2,\"folder\":\"$work/checkpoint-2\"}"
read -r stored
echo "told: $stored" >&2
progress 3
made report r; made adapter a
say "{\"event\":\"output\",\"role\":\"report\",\"kind\":\"report\",\"folder\":\"$work/report\",\"peak_memory_bytes\":1125899906842624}"
say "{\"event\":\"output\",\"role\":\"merged\",\"kind\":\"report\",\"folder\":\"$work/adapter\",\"peak_memory_bytes\":1125899906842624}"
say '{"event":"finished","summary":{"steps":3,"tokens":30,"trained_parameters":4,"tokens_per_second":5.0,"peak_memory_bytes":6,"before":{},"after":{}}}'
"#;

#[tokio::test]
async fn a_whole_attempt_is_reported_stored_and_let_go() {
    let world = world(WHOLE, |_, _| {}).await;
    let attempt = world.scheduler.offer(7, &[]);
    world.scheduler.wait("acceptance", |said| matches!(said, Said::LeaseAccepted(_)).then_some(())).await;
    let checkpoint = world
        .scheduler
        .report("checkpoint", |report| match report {
            Report::Checkpoint(checkpoint) => Some(checkpoint.clone()),
            _ => None,
        })
        .await;
    assert_eq!(checkpoint.step, 2);
    let point = world
        .scheduler
        .report("metrics", |report| match report {
            Report::Metrics(metrics) => Some(metrics.points[0].clone()),
            _ => None,
        })
        .await;
    assert_eq!((point.name.as_str(), point.value, point.step), ("train/loss", 2.5, 1));
    let note = async |topic: &str| {
        let of = |report: &Report| match report {
            Report::Note(note) if note.topic == topic => Some(note.message.clone()),
            _ => None,
        };
        world.scheduler.report("note", of).await
    };
    assert_eq!(note("data/a").await, "1 of 2 rows are bad");
    assert_eq!(note("log").await, r#"told: {"command":"checkpoint_stored","step":2}"#);
    let Outcome::Succeeded(succeeded) = world.scheduler.outcome().await else { panic!("not a success") };
    let roles: Vec<_> = succeeded.outputs.iter().map(|output| output.role.as_str()).collect();
    assert_eq!(roles, ["merged", "report"]);

    let pushes = world.scheduler.0.pushes.lock().unwrap().clone();
    let commits: Vec<_> = pushes.iter().map(|push| push.attempt.clone().unwrap()).collect();
    assert!(commits.iter().all(|commit| commit.epoch == 7 && commit.job_id == attempt.job_id));
    assert_eq!(commits[0].commit, Some(Commit::CheckpointStep(2)));
    let facts = commits[2].facts.unwrap();
    assert_eq!((facts.tokens, facts.peak_memory_bytes), (30, 1 << 50));
    let manifest = String::from_utf8(pushes[0].manifest.to_vec()).unwrap();
    assert!(manifest.contains(r#""kernel_profile":"test""#) && manifest.contains(r#""plan":"blake3:"#), "{manifest}");

    world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 7, message: String::new() }));
    world.scheduler.wait("farewell", |said| matches!(said, Said::CohortGone(_)).then_some(())).await;
    // What is let go frees its device.
    world.scheduler.forget();
    world.scheduler.offer(8, &[]);
    world.scheduler.wait("acceptance", |said| matches!(said, Said::LeaseAccepted(_)).then_some(())).await;
}

#[tokio::test]
async fn a_crash_is_told_by_its_signal_and_the_last_lines_of_the_log() {
    for (script, cause, signal, code) in [
        ("echo 'the ground shakes' >&2; kill -SEGV $$; sleep 9", FailureCause::ChildKilled, Some(11), None),
        ("echo 'the ground shakes' >&2; kill -ABRT $$; sleep 9", FailureCause::ChildKilled, Some(6), None),
        ("echo 'the ground shakes' >&2; exit 101", FailureCause::ChildPanicked, None, Some(101)),
        ("echo 'the ground shakes' >&2; exit 5", FailureCause::ChildExited, None, Some(5)),
        ("running; echo 'the ground shakes' >&2; exit 0", FailureCause::ChildExited, None, Some(0)),
    ] {
        let world = world(script, |_, _| {}).await;
        world.scheduler.offer(1, &[]);
        let failure = world.scheduler.failure().await;
        assert_eq!((failure.cause(), failure.signal, failure.exit_code), (cause, signal, code), "{script}");
        assert!(failure.last_log_lines.iter().any(|line| line == "the ground shakes"), "{failure:?}");
    }
}

#[tokio::test]
async fn what_the_process_says_about_its_failure_is_passed_on() {
    let script = r#"say '{"event":"failed","class":"input","message":"a.jsonl:3: bad","faults":[{"path":"data","message":"m"}]}'; exit 1"#;
    let world = world(script, |_, _| {}).await;
    world.scheduler.offer(1, &[]);
    let failure = world.scheduler.failure().await;
    assert_eq!((failure.cause(), failure.message.as_str()), (FailureCause::SpecFault, "a.jsonl:3: bad"));
    assert_eq!(failure.faults[0].path, "data");
}

#[tokio::test]
async fn a_process_that_babbles_is_ended() {
    let world = world("say hello; sleep 60", |_, _| {}).await;
    world.scheduler.offer(1, &[]);
    let failure = world.scheduler.failure().await;
    assert_eq!(failure.cause(), FailureCause::Internal);
    assert!(failure.message.contains("\"hello\""), "{}", failure.message);
}

#[tokio::test]
async fn a_process_that_makes_no_progress_is_killed() {
    let world = world("running; progress 1; sleep 60", |_, _| {}).await;
    world.scheduler.offer(1, &[("limits.stall_seconds", "1")]);
    let failure = world.scheduler.failure().await;
    assert_eq!(failure.cause(), FailureCause::Hung);
    assert!(failure.message.contains("1 seconds"), "{}", failure.message);
}

#[tokio::test]
async fn a_stop_ends_at_a_checkpoint() {
    let script = r#"
running
read -r command
made checkpoint-1 one
say "{\"event\":\"checkpoint\",\"step\":1,\"folder\":\"$work/checkpoint-1\"}"
say '{"event":"stopped","step":1}'
"#;
    let world = world(script, |_, _| {}).await;
    let attempt = world.scheduler.offer(1, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
    let purpose = v1::StopPurpose::Pause as i32;
    world.scheduler.say(Say::StopAttempt(v1::StopAttempt { attempt: Some(attempt), purpose, grace: None }));
    let Outcome::Stopped(stopped) = world.scheduler.outcome().await else { panic!("not stopped") };
    assert_eq!(stopped.purpose(), v1::StopPurpose::Pause);
    assert_eq!(stopped.checkpoint.unwrap().step, 1);
}

#[tokio::test]
async fn a_stop_that_is_not_heard_ends_in_a_kill() {
    let world = world("running; sleep 60", |_, _| {}).await;
    let attempt = world.scheduler.offer(1, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
    let grace = Some(time::duration(Duration::from_millis(300)));
    let purpose = v1::StopPurpose::Cancel as i32;
    world.scheduler.say(Say::StopAttempt(v1::StopAttempt { attempt: Some(attempt), purpose, grace }));
    let failure = world.scheduler.failure().await;
    assert_eq!(failure.cause(), FailureCause::Hung);
    assert!(failure.message.contains("grace"), "{}", failure.message);
}

#[tokio::test]
async fn a_push_that_fails_for_a_while_is_made_again() {
    let refuse = [Class::Unavailable, Class::Unavailable];
    let world = world(WHOLE, |_, state| state.refuse.lock().unwrap().extend(refuse)).await;
    world.scheduler.offer(1, &[]);
    assert!(matches!(world.scheduler.outcome().await, Outcome::Succeeded(_)));
    assert_eq!(world.scheduler.0.pushes.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_full_store_and_a_stale_epoch_end_the_attempt_with_their_cause() {
    for (class, cause) in
        [(Class::StorageFull, FailureCause::DiskFull), (Class::StaleEpoch, FailureCause::LeaseExpired)]
    {
        let world = world(WHOLE, |_, state| state.refuse.lock().unwrap().push_back(class)).await;
        world.scheduler.offer(1, &[]);
        let failure = world.scheduler.failure().await;
        assert_eq!(failure.cause(), cause, "{failure:?}");
        assert!(failure.message.contains("refused by the test"), "{failure:?}");
    }
}

#[tokio::test]
async fn a_worker_without_a_free_device_refuses() {
    let world = world("running; sleep 60", |_, _| {}).await;
    world.scheduler.offer(1, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
    world.scheduler.offer(2, &[]);
    let refused = world
        .scheduler
        .wait("refusal", |said| match said {
            Said::LeaseRefused(refused) => Some(refused.clone()),
            _ => None,
        })
        .await;
    assert_eq!((refused.cohort_id, refused.refusal()), (2, v1::LeaseRefusal::Busy));
}

/// F14: what stores is away while the scheduler is there. The attempt goes on, and its worker is heard of, until there is no more
/// patience; then the failure says what was missing.
#[tokio::test]
async fn a_store_that_stays_away_is_waited_for_and_then_named() {
    const PATIENCE: Duration = Duration::from_secs(3);
    let script = r#"
running
made checkpoint-1 one
say "{\"event\":\"checkpoint\",\"step\":1,\"folder\":\"$work/checkpoint-1\"}"
for i in $(seq 2 1000); do progress $i; sleep 0.05; done
"#;
    let ttl = Duration::from_millis(900);
    let world = world(script, |config, state| {
        config.store_patience = PATIENCE;
        *state.ttl.lock().unwrap() = ttl;
        state.refuse.lock().unwrap().extend([Class::Unavailable; 1000]);
    })
    .await;
    let began = tokio::time::Instant::now();
    world.scheduler.offer(1, &[]);
    let failure = world.scheduler.failure().await;
    assert!(began.elapsed() >= PATIENCE, "{:?}", began.elapsed());
    assert_eq!(failure.cause(), FailureCause::StoreUnavailable);
    assert!(failure.message.contains("could not be stored: refused by the test"), "{failure:?}");
    let (mut beats, mut steps) = (0, Vec::new());
    for said in world.scheduler.said() {
        match said {
            Said::Heartbeat(_) => beats += 1,
            Said::AttemptReport(report) => {
                steps.extend(report.report.and_then(|report| match report {
                    Report::Progress(progress) => Some(progress.step),
                    _ => None,
                }));
            }
            _ => {}
        }
    }
    assert!(beats >= 10, "{beats} heartbeats in more than three leases");
    assert!(steps.len() > 3 && steps.is_sorted() && steps.last() > Some(&20), "training went on: {steps:?}");
    let tries = 1000 - world.scheduler.0.refuse.lock().unwrap().len();
    // 250, 500, 1000 and 2000 ms apart.
    assert!((3..=6).contains(&tries), "{tries} tries");
    assert_eq!(*world.scheduler.0.connections.borrow(), 1);
}
