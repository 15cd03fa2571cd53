//! Schedulers that end, or are ended, and start again over what they left.

use std::time::Duration;

use attune_proto::error::Class;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, JobState, RefusalReason};
use attune_scheduler::{Error, serve};

use crate::fixtures::{create, events, get, inputs, job, states, until};
use crate::server::{Server, config};
use crate::worker::{Worker, attempt, register, running};

#[tokio::test]
async fn a_scheduler_that_is_asked_to_end_tells_everybody_and_goes_on_later() {
    let mut server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut worker = Worker::connect(&client, "w-1").await;
    let made = create(&client, "r1", &job()).await.unwrap();
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    let watch = v1::WatchJobRequest { job_id: made.job_id.clone(), ..Default::default() };
    let mut watch = client.jobs().watch_job(watch).await.unwrap().into_inner();
    assert!(watch.message().await.unwrap().is_some());

    server.stop().await.unwrap();
    let refused = worker
        .expect(|message| match message {
            Message::Refused(refused) => Some(refused.clone()),
            _ => None,
        })
        .await;
    assert_eq!(refused.reason(), RefusalReason::Unavailable);
    let cut = loop {
        match watch.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a watch that is cut must not look like one that has ended"),
            Err(status) => break status,
        }
    };
    assert_eq!(Class::of(&cut), Class::Unavailable);

    server.restart().await;
    let client = server.client().await;
    let with = v1::Register { running: vec![running(&offer)], ..register("w-1") };
    let (again, registered) = Worker::connect_with(&client, with).await;
    let mut worker = again.go_on(&worker);
    assert_eq!(registered.cohort_ids, [offer.cohort_id]);
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Running);
    worker.succeed(&offer).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
    let seen = events(&client, &made.job_id, 0, usize::MAX).await;
    assert_eq!(states(&seen).len(), 4);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_killed_scheduler_takes_its_workers_back_and_gives_up_those_that_stay_away() {
    let mut server = Server::with_short_leases();
    let client = server.client().await;
    inputs(&client).await;
    let mut kept = Worker::connect(&client, "w-1").await;
    let first = create(&client, "r1", &job()).await.unwrap();
    let first_offer = kept.offer().await;
    kept.begin(&attempt(&first_offer)).await;
    kept.checkpoint(&attempt(&first_offer), 7).await.unwrap();
    let mut lost = Worker::connect(&client, "w-2").await;
    let second = create(&client, "r2", &job()).await.unwrap();
    let second_offer = lost.offer().await;
    lost.begin(&attempt(&second_offer)).await;

    server.kill();
    server.restart().await;
    let client = server.client().await;
    let with = v1::Register { running: vec![running(&first_offer)], ..register("w-1") };
    let mut kept = Worker::connect_with(&client, with).await.0.go_on(&kept);
    // The other one does not come back: its job queues again once a lease has passed, and not before.
    assert_eq!(get(&client, &second.job_id).await.unwrap().state(), JobState::Running);
    let again = loop {
        kept.beat(&[running(&first_offer)]).await;
        let now = get(&client, &second.job_id).await.unwrap();
        if now.state() == JobState::Queued {
            break now;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!((again.epoch, again.failed_attempts), (1, 1));
    kept.succeed(&first_offer).await;
    assert_eq!(get(&client, &first.job_id).await.unwrap().state(), JobState::Succeeded);
    let offer = kept.offer().await;
    assert_eq!((attempt(&offer).job_id, attempt(&offer).epoch), (second.job_id.clone(), 2));
    kept.begin(&attempt(&offer)).await;
    kept.succeed(&offer).await;
    until(&client, &second.job_id, JobState::Succeeded).await;
}

#[tokio::test]
async fn a_scheduler_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing() {
    let mut server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let mut made = Vec::new();
    for round in 0..6 {
        // The kill falls somewhere into these calls; whoever got no answer asks again.
        let requests: Vec<String> = (0..4).map(|n| format!("r{round}-{n}")).collect();
        let client = server.client().await;
        let asking = async {
            for request in &requests {
                let _ = create(&client, request, &job()).await;
            }
        };
        let killing = async {
            tokio::time::sleep(Duration::from_millis(7 * (round + 1))).await;
        };
        tokio::select! {
            () = asking => {}
            () = killing => {}
        }
        server.kill();
        server.restart().await;
        let client = server.client().await;
        for request in &requests {
            made.push(create(&client, request, &job()).await.unwrap().job_id);
        }
    }
    let client = server.client().await;
    let list = v1::ListJobsRequest { page_size: 1000, ..Default::default() };
    let jobs = client.jobs().list_jobs(list).await.unwrap().into_inner().jobs;
    let mut found: Vec<String> = jobs.into_iter().map(|job| job.job_id).collect();
    found.sort();
    made.sort();
    assert_eq!(found, made);
}

#[tokio::test]
async fn a_second_scheduler_on_the_same_database_does_not_start() {
    let server = Server::start();
    server.client().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refused = serve(config(&server.folder), listener, std::future::pending()).await.unwrap_err();
    assert!(matches!(refused, Error::Store(_)), "{refused:?}");
    assert!(refused.to_string().contains("in use by another scheduler"), "{refused}");
}
