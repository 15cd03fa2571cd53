//! Leases, broken connections and farewells.

use std::sync::atomic::Ordering;
use std::time::Duration;

use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message as Say;
use attune_proto::v1::{self, FailureCause};

use crate::support::{agent_ends, world};

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_the_process_before_the_scheduler_may_give_it_away() {
    let ttl = Duration::from_millis(1200);
    let world = world("running; sleep 60", |_, state| *state.ttl.lock().unwrap() = ttl).await;
    world.scheduler.offer(1, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
    // Long after a lease without answers it still runs, because it is renewed.
    tokio::time::sleep(ttl * 2).await;
    world.scheduler.0.mute.store(true, Ordering::Relaxed);
    let muted = tokio::time::Instant::now();
    let failure = world.scheduler.failure().await;
    assert_eq!(failure.cause(), FailureCause::LeaseExpired);
    assert!(muted.elapsed() < ttl, "fenced after {:?}", muted.elapsed());
}

#[tokio::test]
async fn a_broken_connection_leaves_the_attempt_alone_and_loses_no_report() {
    let script = r#"
running
for i in $(seq 200); do progress $i; sleep 0.05; if [ -e "$work/../end" ]; then break; fi; done
"#;
    let world = world(script, |_, _| {}).await;
    let attempt = world.scheduler.offer(3, &[]);
    world.scheduler.report("progress", |report| matches!(report, Report::Progress(_)).then_some(())).await;
    // From here on nothing is acknowledged; then the line breaks.
    world.scheduler.0.mute.store(true, Ordering::Relaxed);
    let last = |report: &Report| match report {
        Report::Progress(progress) if progress.step > 10 => Some(progress.step),
        _ => None,
    };
    let unanswered = world.scheduler.report("progress", last).await;
    world.scheduler.forget();
    world.scheduler.hang_up();
    let again = world.scheduler.connection(2).await;
    assert_eq!(again.running.len(), 1);
    assert_eq!(again.running[0].attempts, [attempt]);
    let resent = world
        .scheduler
        .report("the report that was not answered", |report| match report {
            Report::Progress(progress) => Some(progress.step),
            _ => None,
        })
        .await;
    assert!(resent <= unanswered, "{resent} came before {unanswered}");
}

#[tokio::test]
async fn an_agent_that_is_asked_to_stop_lets_its_attempts_stop_first() {
    let script = r#"running; read -r command; say '{"event":"stopped","step":0}'"#;
    let world = world(script, |_, _| {}).await;
    let attempt = world.scheduler.offer(1, &[]);
    world.scheduler.report("start", |report| matches!(report, Report::Running(_)).then_some(())).await;
    world.stop.request();
    world.scheduler.wait("drain", |said| matches!(said, Said::Drain(_)).then_some(())).await;
    let purpose = v1::StopPurpose::Preempt as i32;
    world.scheduler.say(Say::StopAttempt(v1::StopAttempt { attempt: Some(attempt), purpose, grace: None }));
    assert!(matches!(world.scheduler.outcome().await, Outcome::Stopped(_)));
    world.scheduler.offer(2, &[]);
    let refused = |said: &Said| match said {
        Said::LeaseRefused(refused) => Some(refused.refusal()),
        _ => None,
    };
    assert_eq!(world.scheduler.wait("refusal", refused).await, v1::LeaseRefusal::Draining);
    world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 1, message: String::new() }));
    agent_ends().await;
}

#[tokio::test]
async fn an_unknown_cohort_is_gone() {
    let world = world("running", |_, _| {}).await;
    world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 99, message: String::new() }));
    let gone = |said: &Said| match said {
        Said::CohortGone(gone) => Some(gone.cohort_id),
        _ => None,
    };
    assert_eq!(world.scheduler.wait("farewell", gone).await, 99);
    world.stop.request();
    agent_ends().await;
}
