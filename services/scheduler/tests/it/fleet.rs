//! Workers that come, go, and disagree.

use attune_proto::error::Class;
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, FailureCause, JobState, RefusalReason};

use crate::fixtures::{create, events, get, inputs, job, until};
use crate::server::Server;
use crate::worker::{Worker, attempt, register, running};

async fn refusal(worker: &mut Worker) -> v1::Refused {
    worker
        .expect(|message| match message {
            Message::Refused(refused) => Some(refused.clone()),
            _ => None,
        })
        .await
}

#[tokio::test]
async fn a_wrong_registration_is_refused_with_its_faults() {
    let server = Server::start();
    let client = server.client().await;
    let mut worker = Worker::open(&client, v1::Register { protocol_version: 99, ..register("w-1") }).await;
    let refused = refusal(&mut worker).await;
    assert_eq!(refused.reason(), RefusalReason::ProtocolVersion);
    assert!(refused.message.contains("99"), "{}", refused.message);
    assert!(worker.next().await.is_none());

    let bad = v1::Register { worker_id: "W 1".to_owned(), devices: Vec::new(), ..register("w-1") };
    let refused = refusal(&mut Worker::open(&client, bad).await).await;
    assert_eq!(refused.reason(), RefusalReason::Invalid);
    assert!(refused.message.contains("worker_id") && refused.message.contains("devices"), "{}", refused.message);
}

#[tokio::test]
async fn a_newer_connection_takes_over_and_keeps_what_runs() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut old = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = old.offer().await;
    old.begin(&attempt(&offer)).await;
    let with = v1::Register { running: vec![running(&offer)], ..register("w-1") };
    let (new, registered) = Worker::connect_with(&client, with).await;
    let mut new = new.go_on(&old);
    assert_eq!(registered.cohort_ids, [offer.cohort_id]);
    assert_eq!(refusal(&mut old).await.reason(), RefusalReason::Superseded);
    assert_eq!(new.beat(&[running(&offer)]).await.cohort_ids, [offer.cohort_id]);
    new.succeed(&offer).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
}

#[tokio::test]
async fn a_silent_worker_loses_its_job_and_may_not_commit_any_more() {
    let server = Server::with_short_leases();
    let client = server.client().await;
    inputs(&client).await;
    let mut zombie = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let first = zombie.offer().await;
    zombie.begin(&attempt(&first)).await;
    zombie.checkpoint(&attempt(&first), 3).await.unwrap();

    // It says nothing for a lease; another worker goes on from its checkpoint.
    let mut other = Worker::connect(&client, "w-2").await;
    let second = loop {
        other.beat(&[]).await;
        let offer = |message: &Message| matches!(message, Message::LeaseOffer(_));
        if other.has(offer).await {
            break other.offer().await;
        }
    };
    assert_eq!((attempt(&second).epoch, second.attempts[0].checkpoint_step), (2, 3));
    let now = get(&client, &made.job_id).await.unwrap();
    assert_eq!(now.failure.as_ref().unwrap().cause(), FailureCause::WorkerLost);

    let refused = zombie.checkpoint(&attempt(&first), 5).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::StaleEpoch);
    let refused = zombie.output(&attempt(&first), "adapter", Default::default()).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::StaleEpoch);
    // Nobody may commit in another's name either.
    let theirs = v1::AttemptRef { epoch: 2, ..attempt(&first) };
    assert_eq!(Class::of(&zombie.checkpoint(&theirs, 5).await.unwrap_err()), Class::StaleEpoch);
    other.begin(&attempt(&second)).await;
    other.succeed(&second).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
}

/// F39: a worker of the version before comes back from an upgrade of the scheduler.
#[tokio::test]
async fn a_worker_of_the_version_before_finishes_its_attempt_and_is_sent_home() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    let protocol_version = attune_proto::WORKER_PROTOCOL_VERSION_BEFORE;
    let before = |running| v1::Register { protocol_version, running, ..register("w-1") };

    let (old, registered) = Worker::connect_with(&client, before(vec![running(&offer)])).await;
    let mut old = old.go_on(&worker);
    assert_eq!(registered.cohort_ids, [offer.cohort_id]);
    let next = create(&client, "r2", &job()).await.unwrap();
    old.checkpoint(&attempt(&offer), 3).await.unwrap();
    assert_eq!(old.beat(&[running(&offer)]).await.cohort_ids, [offer.cohort_id]);
    old.succeed(&offer).await;
    let done = get(&client, &made.job_id).await.unwrap();
    assert_eq!((done.state(), done.epoch, done.failed_attempts), (JobState::Succeeded, 1, 0));
    // Its place is free, and nothing is offered to it.
    assert!(!old.has(|message| matches!(message, Message::LeaseOffer(_))).await);
    old.say(Said::Heartbeat(v1::Heartbeat { sequence: 99, ..Default::default() })).await;
    let refused = refusal(&mut old).await;
    assert_eq!(refused.reason(), RefusalReason::ProtocolVersion);
    let said = format!("version {protocol_version} of the protocol; this scheduler speaks {}", protocol_version + 1);
    assert!(refused.message.contains(&said), "{}", refused.message);

    // Whoever has nothing to finish is not taken in; nor is one that is older still, or newer, whatever it has.
    for register in [
        before(Vec::new()),
        v1::Register { protocol_version: protocol_version - 1, ..before(vec![running(&offer)]) },
        v1::Register { protocol_version: protocol_version + 2, ..before(vec![running(&offer)]) },
    ] {
        let mut refused_at_once = Worker::open(&client, register).await;
        assert_eq!(refusal(&mut refused_at_once).await.reason(), RefusalReason::ProtocolVersion);
    }
    let mut renewed = Worker::connect(&client, "w-1").await;
    assert_eq!(attempt(&renewed.offer().await).job_id, next.job_id);
}

#[tokio::test]
async fn a_refused_lease_goes_to_somebody_else() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut busy = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = busy.offer().await;
    let refusal = v1::LeaseRefusal::Draining as i32;
    let message = "the worker is leaving".to_owned();
    busy.say(Said::LeaseRefused(v1::LeaseRefused { cohort_id: offer.cohort_id, refusal, message })).await;
    busy.release(offer.cohort_id).await;
    let mut free = Worker::connect(&client, "w-2").await;
    let offer = free.offer().await;
    assert_eq!(attempt(&offer).job_id, made.job_id);
    free.begin(&attempt(&offer)).await;
    free.succeed(&offer).await;
    let done = until(&client, &made.job_id, JobState::Succeeded).await;
    assert_eq!((done.worker_id.as_str(), done.failed_attempts), ("w-2", 0));
    let told = events(&client, &made.job_id, 0, usize::MAX).await.into_iter().find_map(|event| match event.event {
        Some(v1::job_event::Event::AttemptFailed(failure)) => Some((failure.cause(), failure.message)),
        _ => None,
    });
    let said = "worker w-1 refused the attempt: the worker is leaving".to_owned();
    assert_eq!(told, Some((FailureCause::OfferRefused, said)));
}

#[tokio::test]
async fn reports_are_recorded_once_and_strangers_are_not_believed() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let mut stranger = Worker::connect_with(&client, v1::Register { draining: true, ..register("w-2") }).await.0;
    let made = create(&client, "r1", &job()).await.unwrap();
    let it = attempt(&worker.offer().await);
    worker.begin(&it).await;
    let point = |value| v1::MetricPoint { name: "train/loss".to_owned(), step: 1, value, ..Default::default() };
    let report =
        |value| v1::attempt_report::Report::Metrics(v1::AttemptMetrics { points: vec![point(value)], dropped: 0 });
    stranger.report_as(&it, 1, report(9.0)).await;
    worker.report_as(&it, 3, report(1.0)).await;
    worker.report_as(&it, 3, report(2.0)).await;
    worker.report_as(&it, 2, report(3.0)).await;
    let list = v1::ListMetricsRequest { job_id: made.job_id.clone(), ..Default::default() };
    let points = client.jobs().list_metrics(list).await.unwrap().into_inner().points;
    assert_eq!(points.iter().map(|point| point.value).collect::<Vec<_>>(), [1.0]);
    let failed = v1::attempt_finished::Outcome::Failed(v1::Failure::default());
    let failed = v1::AttemptFinished { outcome: Some(failed), shared: false };
    stranger.report_as(&it, 2, v1::attempt_report::Report::Finished(failed)).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Running);
}

#[tokio::test]
async fn a_worker_that_leaves_in_good_order_costs_its_job_nothing() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    worker.say(Said::Drain(v1::Drain::default())).await;
    let stop = worker
        .expect(|message| match message {
            Message::StopAttempt(stop) => Some(stop.clone()),
            _ => None,
        })
        .await;
    assert_eq!(stop.purpose(), v1::StopPurpose::Preempt);
    worker.checkpoint(&it, 2).await.unwrap();
    worker.finish(&it, v1::attempt_finished::Outcome::Stopped(v1::AttemptStopped::default())).await;
    worker.release(offer.cohort_id).await;
    let queued = get(&client, &made.job_id).await.unwrap();
    assert_eq!((queued.state(), queued.failed_attempts), (JobState::Queued, 0));
    let mut next = Worker::connect(&client, "w-2").await;
    assert_eq!(next.offer().await.attempts[0].checkpoint_step, 2);
}
