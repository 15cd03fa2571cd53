//! Cohorts of several attempts: one process, and an end for each.

use std::time::Duration;

use attune_proto::convert::time;
use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::attempt_report::Report;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message as Say;
use attune_proto::v1::{self, FailureCause};

use crate::support::{Scheduler, world};

/// Says that lanes 1 and 2 run as well as lane 0, and what ends a lane well.
const LANES: &str = r#"
running
for lane in 1 2; do
  say "{\"lane\":$lane,\"event\":\"running\",\"step\":0,\"total_steps\":3,\"kernel_profile\":\"test\",\"pinned\":{}}"
done
finished() {
  say "{\"lane\":$1,\"event\":\"finished\",\"summary\":{\"steps\":3,\"tokens\":30,\"trained_parameters\":4,\"tokens_per_second\":5.0,\"peak_memory_bytes\":6,\"before\":{},\"after\":{}}}"
}
"#;

fn script(rest: &str) -> String {
    format!("{LANES}\n{rest}")
}

/// Waits until so many attempts say that they run.
async fn running(scheduler: &Scheduler, attempts: &[v1::AttemptRef]) {
    for attempt in attempts {
        let runs = |said: &Said| match said {
            Said::AttemptReport(report) if report.attempt.as_ref() == Some(attempt) => {
                matches!(report.report, Some(Report::Running(_))).then_some(())
            }
            _ => None,
        };
        scheduler.wait("start", runs).await;
    }
}

#[tokio::test]
async fn each_lane_ends_for_itself_while_the_others_go_on() {
    let rest = r#"
made a one
say '{"lane":1,"event":"failed","class":"input","message":"a.jsonl:3: bad","faults":[]}'
say "{\"lane\":2,\"event\":\"output\",\"role\":\"merged\",\"kind\":\"report\",\"folder\":\"$work/a\",\"peak_memory_bytes\":1125899906842624}"
finished 2
read -r stop
echo "told: $stop" >&2
say '{"event":"stopped","step":1}'
"#;
    let world = world(&script(rest), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(5, 3, &[]);
    let (Outcome::Failed(failure), false) = world.scheduler.end_of(&attempts[1]).await else { panic!("not its own") };
    assert_eq!((failure.cause(), failure.message.as_str()), (FailureCause::DataFault, "a.jsonl:3: bad"));
    let (Outcome::Succeeded(done), false) = world.scheduler.end_of(&attempts[2]).await else { panic!("no success") };
    assert_eq!(done.outputs.len(), 1);
    let push = world.scheduler.0.pushes.lock().unwrap()[0].attempt.clone().unwrap();
    assert_eq!((push.job_id.as_str(), push.epoch), ("j5-2", 5), "stored under the lane's own attempt");
    // The scheduler says that these are over; the third is asked to stop.
    for attempt in &attempts[1..] {
        world.scheduler.say(Say::DropAttempt(v1::DropAttempt { attempt: Some(attempt.clone()) }));
    }
    let purpose = v1::StopPurpose::Pause as i32;
    let stop = v1::StopAttempt { attempt: Some(attempts[0].clone()), purpose, grace: None };
    world.scheduler.say(Say::StopAttempt(stop));
    let (outcome, is_shared) = world.scheduler.end_of(&attempts[0]).await;
    assert!(matches!(outcome, Outcome::Stopped(_)) && !is_shared, "{outcome:?}");
    let held = |said: &Said| match said {
        Said::Heartbeat(beat) => (beat.running.first()?.attempts == attempts[..1]).then_some(()),
        _ => None,
    };
    world.scheduler.wait("heartbeat with what is left", held).await;
}

#[tokio::test]
async fn a_process_that_dies_takes_its_lanes_and_nobody_is_blamed() {
    let rest = "finished 2; sleep 1; echo 'the ground shakes' >&2; kill -SEGV $$; sleep 9";
    let world = world(&script(rest), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(1, 3, &[]);
    assert!(matches!(world.scheduler.end_of(&attempts[2]).await, (Outcome::Succeeded(_), false)));
    for attempt in &attempts[..2] {
        let (Outcome::Failed(failure), true) = world.scheduler.end_of(attempt).await else { panic!("not shared") };
        assert_eq!((failure.cause(), failure.signal), (FailureCause::ChildKilled, Some(11)));
        assert!(failure.message.ends_with("; 2 jobs shared it, so each runs alone next"), "{failure:?}");
        assert!(failure.last_log_lines.iter().any(|line| line == "the ground shakes"), "{failure:?}");
    }
}

#[tokio::test]
async fn the_last_lane_left_is_to_blame() {
    let world = world(&script("finished 1; finished 2; sleep 1; exit 5"), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(1, 3, &[]);
    let (Outcome::Failed(failure), false) = world.scheduler.end_of(&attempts[0]).await else { panic!("not its own") };
    assert_eq!((failure.cause(), failure.exit_code), (FailureCause::ChildExited, Some(5)));
}

#[tokio::test]
async fn an_attempt_that_is_over_leaves_the_process() {
    let rest = r#"
read -r command
echo "told: $command" >&2
while [ ! -e go ]; do sleep 0.05; done
finished 0
finished 2
"#;
    let world = world(&script(rest), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(1, 3, &[]);
    running(&world.scheduler, &attempts).await;
    world.scheduler.say(Say::DropAttempt(v1::DropAttempt { attempt: Some(attempts[1].clone()) }));
    let told = |report: &Report| match report {
        Report::Note(note) if note.topic == "log" => Some(note.message.clone()),
        _ => None,
    };
    assert_eq!(world.scheduler.report("note", told).await, r#"told: {"lane":1,"command":"leave"}"#);
    // The log and the messages are two pipes: who has finished has no log any more.
    std::fs::write(world.folder().join("worker/attempts/1/go"), "").unwrap();
    for lane in [0, 2] {
        assert!(matches!(world.scheduler.end_of(&attempts[lane]).await, (Outcome::Succeeded(_), false)));
    }
}

#[tokio::test]
async fn a_lane_that_does_not_stop_in_time_is_left_behind() {
    let rest = "read -r stop; read -r leave; echo \"told: $leave\" >&2; sleep 1; finished 0; finished 2";
    let world = world(&script(rest), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(1, 3, &[]);
    running(&world.scheduler, &attempts).await;
    let grace = Some(time::duration(Duration::from_millis(300)));
    let purpose = v1::StopPurpose::Cancel as i32;
    world.scheduler.say(Say::StopAttempt(v1::StopAttempt { attempt: Some(attempts[1].clone()), purpose, grace }));
    let (Outcome::Failed(failure), false) = world.scheduler.end_of(&attempts[1]).await else { panic!("no failure") };
    assert!(failure.message.contains("grace"), "{}", failure.message);
    for lane in [0, 2] {
        assert!(matches!(world.scheduler.end_of(&attempts[lane]).await, (Outcome::Succeeded(_), false)));
    }
}

#[tokio::test]
async fn lanes_are_killed_together_when_the_cohort_is_over() {
    let world = world(&script("sleep 60"), |_, _| {}).await;
    let attempts = world.scheduler.offer_lanes(4, 3, &[]);
    running(&world.scheduler, &attempts).await;
    world.scheduler.say(Say::KillCohort(v1::KillCohort { cohort_id: 4, message: String::new() }));
    world.scheduler.wait("farewell", |said| matches!(said, Said::CohortGone(_)).then_some(())).await;
}
