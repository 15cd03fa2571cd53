//! Workers that prove who they are: each touches the attempts that it holds, and nothing else.

use attune_artifacts::{Causes, Kind};
use attune_proto::v1::connect_request::Message as Said;
use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, JobState, TokenRole};
use attune_proto::{Class, Client};
use attune_spec::id::Project;
use tonic::{Code, Status};

use crate::fixtures::{bundle, create, inputs, job, push};
use crate::server::Server;
use crate::worker::{Worker, attempt, register, running};

/// A server with two workers of two names, of which the first has an attempt of a job in project `a`.
struct Scene {
    server: Server,
    admin: Client,
    of_a: Client,
    one: Client,
    two: Client,
    worker: Worker,
    offer: v1::LeaseOffer,
    job: v1::Job,
}

async fn scene() -> Scene {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let of_a = admin.for_project(Project::new("a").unwrap());
    inputs(&of_a).await;
    let [one, two] = ["one", "two"].map(|name| async {
        let (_, secret) = server.token(&admin, None, TokenRole::Worker, name).await;
        server.client_as(Some(secret)).await.for_project(Project::new("a").unwrap())
    });
    let (one, two) = (one.await, two.await);
    let job = create(&of_a, "r1", &job()).await.unwrap();
    let mut worker = Worker::connect(&one, "w1").await;
    let offer = worker.offer().await;
    worker.beat(&[running(&offer)]).await;
    Scene { server, admin, of_a, one, two, worker, offer, job }
}

/// A report, a heartbeat, a commit and a word about a cohort, all of another worker's attempt (A4).
#[tokio::test]
async fn a_worker_does_nothing_to_anothers_attempt() {
    let Scene { server: _server, of_a, one, two, mut worker, offer, job, .. } = scene().await;
    let at = attempt(&offer);
    worker.begin(&at).await;
    let mut other = Worker::connect(&two, "w2").await;
    // It says that it runs the cohort, that the attempt has failed, that the cohort is refused and gone.
    let ack = other.beat(&[running(&offer)]).await;
    assert!(ack.cohort_ids.is_empty());
    other.fail(&at, v1::FailureCause::Internal, "by somebody else").await;
    for said in [
        Said::LeaseRefused(v1::LeaseRefused { cohort_id: offer.cohort_id, ..Default::default() }),
        Said::CohortGone(v1::CohortGone { cohort_id: offer.cohort_id }),
        Said::LeaseAccepted(v1::LeaseAccepted { cohort_id: offer.cohort_id }),
    ] {
        other.say(said).await;
    }
    other.beat(&[]).await;
    // Bytes, for an attempt that is not its own: by its own id, by that of the worker whose it is, by one that nobody has.
    let direct = async |client: &Client, at: &v1::AttemptRef, id: &str| {
        let made = bundle(Kind::Checkpoint, &[("empty", b"")], Causes::default());
        let attempt = v1::AttemptCommit {
            job_id: at.job_id.clone(),
            epoch: at.epoch,
            worker_id: id.to_owned(),
            commit: Some(v1::attempt_commit::Commit::CheckpointStep(3)),
            facts: None,
        };
        let header = v1::PushHeader {
            project: "a".to_owned(),
            manifest: made.0.bytes().clone(),
            attempt: Some(attempt),
            tags: Vec::new(),
        };
        let part = v1::push_artifact_request::Part::Header(header);
        let parts = futures::stream::iter([v1::PushArtifactRequest { part: Some(part) }]);
        client.artifacts().push_artifact(parts).await.unwrap_err()
    };
    let absent = v1::AttemptRef { job_id: "j-none".to_owned(), ..at.clone() };
    for id in ["w2", "w1", "w3"] {
        let (refused, none) = (direct(&two, &at, id).await, direct(&two, &absent, id).await);
        assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
        assert_eq!(refused.message().replace(&job.job_id, "j-none"), none.message());
    }
    assert_eq!(other.checkpoint(&at, 3).await.unwrap_err().code(), Code::NotFound);
    // Epochs that never were, or are over (A5).
    for epoch in [0, 2, 3, u64::MAX >> 1, u64::MAX] {
        let forged = v1::AttemptRef { epoch, ..at.clone() };
        assert_eq!(worker.checkpoint(&forged, 3).await.unwrap_err().code(), Code::NotFound, "{epoch}");
        assert_eq!(direct(&one, &forged, "w1").await.code(), Code::NotFound, "{epoch}");
    }
    let now = get_of(&of_a, &job.job_id).await;
    assert_eq!((now.state(), now.epoch, now.failed_attempts), (JobState::Running, 1, 0));
    // The one whose it is goes on.
    worker.checkpoint(&at, 5).await.unwrap();
    worker.succeed(&offer).await;
    assert_eq!(until_of(&of_a, &job.job_id, JobState::Succeeded).await.epoch, 1);
}

/// Nobody takes another's id, and whoever changes the token under one name keeps it.
#[tokio::test]
async fn a_worker_id_belongs_to_the_name_that_first_used_it() {
    let Scene { server, admin, two, mut worker, offer, of_a, job, .. } = scene().await;
    let at = attempt(&offer);
    let mut thief = Worker::open(&two, register("w1")).await;
    let Some(Message::Refused(refused)) = thief.next().await else { panic!("it is refused") };
    assert_eq!(refused.reason(), v1::RefusalReason::Invalid);
    assert!(refused.message.contains("belongs to another credential"), "{refused:?}");
    worker.beat(&[running(&offer)]).await;
    // Another token of the same name goes on as the same worker.
    let (_, secret) = server.token(&admin, None, TokenRole::Worker, "one").await;
    let renewed = server.client_as(Some(secret)).await.for_project(Project::new("a").unwrap());
    let (again, registered) =
        Worker::connect_with(&renewed, v1::Register { running: vec![running(&offer)], ..register("w1") }).await;
    assert_eq!(registered.cohort_ids, [offer.cohort_id]);
    let mut again = again.go_on(&worker);
    again.begin(&at).await;
    again.succeed(&offer).await;
    until_of(&of_a, &job.job_id, JobState::Succeeded).await;
    let records = admin.audit().list_audit_records(v1::ListAuditRecordsRequest::default()).await.unwrap().into_inner();
    let refused = |record: &&v1::AuditRecord| record.name == "two" && record.outcome == "PERMISSION_DENIED";
    let record = records.records.iter().find(refused).expect("it is written down");
    assert_eq!((record.rpc.as_str(), record.target.as_str()), ("WorkerService/Connect", "w1"));
}

/// A worker reads what its attempts read, in their project, while they last.
#[tokio::test]
async fn a_worker_reads_what_its_attempts_read() {
    let Scene { server: _server, admin, of_a, one, two, mut worker, offer, job } = scene().await;
    let secret = bundle(Kind::Report, &[("a", b"other work")], Causes::default());
    push(&of_a, &secret, None, &["secret"]).await.unwrap();
    let base = offer.attempts[0].inputs[0].digest.clone();
    assert!(base.starts_with("blake3:"), "{offer:?}");
    let of = |client: &Client, project: &str| client.for_project(Project::new(project).unwrap());
    let pull = async |client: &Client, project: &str, reference: &str| -> Result<(), Status> {
        let (_, mut parts) = of(client, project).pull(reference, &[], None).await?;
        while parts.message().await?.is_some() {}
        Ok(())
    };
    for input in &offer.attempts[0].inputs {
        pull(&one, "a", &input.digest).await.unwrap();
    }
    let at = attempt(&offer);
    worker.begin(&at).await;
    let digest = worker.checkpoint(&at, 3).await.unwrap();
    pull(&one, "a", &digest).await.unwrap();
    // Another artifact of the project, the same by its tag, the same in another project; all this for a worker without attempts.
    let other = secret.0.digest().to_string();
    let absent = format!("blake3:{}", "0".repeat(64));
    for (client, project, reference) in [
        (&one, "a", other.as_str()),
        (&one, "a", "secret"),
        (&one, "a", "base"),
        (&one, "b", &base),
        (&two, "a", &base),
        (&two, "a", &other),
    ] {
        let refused = pull(client, project, reference).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{project} {reference}: {refused:?}");
        if reference.starts_with("blake3:") {
            let none = pull(client, project, &absent).await.unwrap_err();
            assert_eq!(refused.message().replace(reference, "ID"), none.message().replace(&absent, "ID"));
        }
    }
    // It asks for blobs where it has work, and pushes for its attempts alone, and moves no tags (A3, A7).
    let blob = secret.0.blobs()[0].digest;
    assert!(of(&one, "a").missing(&[blob]).await.is_ok());
    assert_eq!(of(&one, "b").missing(&[blob]).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(of(&two, "a").missing(&[blob]).await.unwrap_err().code(), Code::NotFound);
    let made = bundle(Kind::Report, &[("a", b"other work")], Causes::default());
    assert_eq!(push(&of(&one, "a"), &made, None, &[]).await.unwrap_err().code(), Code::PermissionDenied);
    let commit = v1::AttemptCommit {
        job_id: at.job_id.clone(),
        epoch: at.epoch,
        worker_id: "w1".to_owned(),
        commit: Some(v1::attempt_commit::Commit::OutputRole("report".to_owned())),
        facts: None,
    };
    let tagged = push(&of(&one, "a"), &made, Some(commit.clone()), &["base"]).await.unwrap_err();
    assert_eq!(tagged.code(), Code::PermissionDenied);
    // Nor does a user push for an attempt.
    let forged = push(&of_a, &made, Some(commit), &[]).await.unwrap_err();
    assert_eq!(Class::of(&forged), Class::PermissionDenied);
    let connected = admin.workers().connect(futures::stream::empty()).await;
    assert_eq!(connected.unwrap_err().code(), Code::PermissionDenied, "an admin is no worker");
    worker.succeed(&offer).await;
    until_of(&of_a, &job.job_id, JobState::Succeeded).await;
    assert_eq!(pull(&one, "a", &base).await.unwrap_err().code(), Code::NotFound, "what has ended is not its own");
}

/// A29: the digest of another project's bytes is no proof that one has them.
#[tokio::test]
async fn a_digest_proves_nothing() {
    let server = Server::guarded(|_| {});
    let admin = server.admin().await;
    let made = bundle(Kind::Report, &[("weights", b"what only a has")], Causes::default());
    push(&admin.for_project(Project::new("a").unwrap()), &made, None, &["w"]).await.unwrap();
    let (_, secret) = server.token(&admin, Some("b"), TokenRole::Submitter, "bert").await;
    let bert = server.client_as(Some(secret)).await.for_project(Project::new("b").unwrap());
    let blob = made.0.blobs()[0].digest;
    let none = attune_artifacts::hash::bytes(b"what nobody has");
    assert_eq!(bert.missing(&[blob, none]).await.unwrap(), [blob, none], "neither is told from the other");
    // The manifest without the bytes.
    let without = (made.0.clone(), std::sync::Arc::new(crate::fixtures::Memory::default()));
    let header = v1::PushHeader { project: "b".to_owned(), manifest: made.0.bytes().clone(), ..Default::default() };
    let part = v1::push_artifact_request::Part::Header(header);
    let parts = futures::stream::iter([v1::PushArtifactRequest { part: Some(part) }]);
    let refused = bert.artifacts().push_artifact(parts).await.unwrap_err();
    assert!(refused.message().contains("which are not stored; send them first"), "{refused:?}");
    assert!(push(&bert, &without, None, &[]).await.is_err());
    let get = v1::GetArtifactRequest { project: "b".to_owned(), reference: made.0.digest().to_string() };
    assert_eq!(bert.artifacts().get_artifact(get).await.unwrap_err().code(), Code::NotFound);
    // With the bytes it is as new here as anything, and what is done to it here is not done there.
    assert!(push(&bert, &made, None, &[]).await.unwrap().created);
    let delete = v1::DeleteArtifactRequest { project: "b".to_owned(), digest: made.0.digest().to_string() };
    assert_eq!(bert.artifacts().delete_artifact(delete.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    admin.artifacts().delete_artifact(delete).await.unwrap();
    let (_, mut parts) = admin.for_project(Project::new("a").unwrap()).pull("w", &[], None).await.unwrap();
    while parts.message().await.unwrap().is_some() {}
}

async fn get_of(client: &Client, job: &str) -> v1::Job {
    let request = v1::GetJobRequest { project: client.project().to_string(), job_id: job.to_owned() };
    client.jobs().get_job(request).await.unwrap().into_inner().job.unwrap()
}

async fn until_of(client: &Client, job: &str, state: JobState) -> v1::Job {
    for _ in 0..400 {
        let now = get_of(client, job).await;
        if now.state() == state {
            return now;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("{job} does not become {state:?}");
}
