//! Schedulers that follow: what they answer themselves, what they pass on, and that nobody notices who leads.
#![expect(clippy::disallowed_methods, reason = "what waits beside the test ends with it, and is asked for its result")]

use std::time::Duration;

use attune_proto::client::Options;
use attune_proto::v1::{self, JobState, TokenRole};
use attune_proto::{Class, Client, Secret};
use prost::Message as _;
use sqlx::{Executor as _, PgConnection, Row as _};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::fixtures::{create, events, get, inputs, job, states, until};
use crate::matrix::{self, boundless};
use crate::postgres::Postgres;
use crate::server::{LIMIT, Server, cut};
use crate::worker::{Worker, attempt};

/// The lock of who leads, and how it is waited for.
const WAIT_FOR_LOCK: &str = "SELECT pg_advisory_lock(107152797953637)";

/// One that leads and one that follows, over a database of their own.
struct Pair {
    postgres: Postgres,
    leader: Server,
    follower: Server,
}

impl Pair {
    async fn start() -> Option<Self> {
        let postgres = Postgres::fresh().await?;
        let database = postgres.database();
        let leader = Server::start_with(|config| config.database = database);
        Some(Self::of(postgres, leader).await)
    }

    async fn guarded() -> Option<Self> {
        let postgres = Postgres::fresh().await?;
        let database = postgres.database();
        let leader = Server::guarded(|config| {
            config.database = database;
            boundless(config);
        });
        leader.admin_secret();
        Some(Self::of(postgres, leader).await)
    }

    async fn of(postgres: Postgres, leader: Server) -> Self {
        // A connection says only that it listens: it leads when it answers, and until then the other one could.
        answering(&leader.url()).await;
        let follower = leader.follower();
        connected(&follower.url()).await;
        let pair = Self { postgres, leader, follower };
        pair.until_followed().await;
        pair
    }

    /// Waits until the follower passes calls on: they are not known to it, or refused, but answered.
    async fn until_followed(&self) {
        let client = Client::lazy(&self.follower.url(), Options { retries: 0, ..Options::default() }).unwrap();
        for _ in 0..400 {
            match client.fleet().list_workers(v1::ListWorkersRequest::default()).await {
                Err(status) if status.code() == Code::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(25)).await;
                }
                Err(status) if status.code() == Code::Unauthenticated && self.announced().await.is_empty() => {}
                _ => return,
            }
        }
        panic!("the follower finds nobody to follow");
    }

    async fn announced(&self) -> String {
        let mut direct = self.postgres.direct().await;
        direct.fetch_one("SELECT leader FROM terms").await.unwrap().get("leader")
    }
}

/// Waits until somebody at `url` answers a call, be it by a refusal.
async fn answering(url: &str) {
    connected(url).await;
    let client = Client::lazy(url, Options { retries: 0, ..Options::default() }).unwrap();
    for _ in 0..400 {
        match client.fleet().list_workers(v1::ListWorkersRequest::default()).await {
            Err(status) if status.code() == Code::Unavailable => tokio::time::sleep(Duration::from_millis(25)).await,
            _ => return,
        }
    }
    panic!("nobody answers at {url}");
}

async fn connected(url: &str) -> Channel {
    for _ in 0..400 {
        if let Ok(channel) = Endpoint::from_shared(url.to_owned()).unwrap().connect().await {
            return channel;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("nobody answers at {url}");
}

/// The whole table of who may do what, asked of one that follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_by_everybody_is_answered_by_a_follower_as_by_the_one_that_leads() {
    let Some(pair) = Pair::guarded().await else { return };
    matrix::everybody(&pair.leader, &pair.follower.url()).await;
}

/// What a follower reads is what the one that leads reads, byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_follower_reads_are_the_same_bytes() {
    let Some(pair) = Pair::guarded().await else { return };
    let admin = pair.leader.admin().await;
    let of_a = admin.for_project("a".parse().unwrap());
    inputs(&of_a).await;
    let there = matrix::things(&pair.leader, &admin, &of_a, 1).await;
    let (_, secret) = pair.leader.token(&admin, Some("a"), TokenRole::Admin, "reader").await;
    let mut channels = Vec::new();
    for server in [&pair.leader, &pair.follower] {
        channels.push(connected(&server.url()).await);
    }
    // Whoever calls for the first time is noted as having done so.
    let reads = matrix::table().into_iter().filter(|row| {
        let verb = row.rpc.rsplit('/').next().unwrap_or_default();
        ["Get", "List", "Pull", "Watch", "Query"].iter().any(|reads| verb.starts_with(reads))
    });
    let mut n_compared = 0;
    for row in reads {
        let message = (row.make)("a", &there);
        let mut answers = Vec::new();
        for channel in &channels {
            let mut answer = matrix::call(channel, Some(&secret), row.rpc, message.clone()).await.unwrap();
            if row.rpc == "TokenService/ListTokens" {
                // When it was used last is noted a moment later.
                let mut list = v1::ListTokensResponse::decode(&*answer).unwrap();
                assert!(list.tokens.len() >= 2);
                list.tokens.iter_mut().for_each(|token| token.use_time = None);
                answer = list.encode_to_vec();
            }
            answers.push(answer);
        }
        assert_eq!(answers[0], answers[1], "{}", row.rpc);
        n_compared += usize::from(!answers[0].is_empty());
    }
    assert!(n_compared >= 14, "{n_compared}");
    // What a queued job waits for is in no row.
    let follower = pair.follower.client_as(Some(secret)).await.for_project("a".parse().unwrap());
    let asked = v1::GetJobRequest { project: "a".to_owned(), job_id: there.job.clone() };
    let shown = follower.jobs().get_job(asked).await.unwrap().into_inner().job.unwrap();
    assert!(shown.message.ends_with("no worker is connected that takes new work"), "{shown:?}");
}

/// Who calls is the caller, whoever passes the call on, and it is written down once.
#[tokio::test]
async fn a_call_that_is_passed_on_is_its_callers() {
    let Some(pair) = Pair::guarded().await else { return };
    let admin = pair.leader.admin().await;
    let (id, secret) = pair.leader.token(&admin, Some("a"), TokenRole::Submitter, "sub").await;
    let (viewer_id, viewer) = pair.leader.token(&admin, Some("a"), TokenRole::Viewer, "view").await;
    inputs(&admin.for_project("a".parse().unwrap())).await;
    let follower = pair.follower.client_as(Some(secret)).await.for_project("a".parse().unwrap());
    let made = create(&follower, "r1", &job()).await.unwrap();
    // Its own write is there for whoever made it.
    let asked = v1::GetJobRequest { project: "a".to_owned(), job_id: made.job_id.clone() };
    follower.jobs().get_job(asked.clone()).await.unwrap();
    // A refusal by a follower is written down as well, of a call that it passes on and of one that it answers.
    let viewer = pair.follower.client_as(Some(viewer)).await;
    let denied = create(&viewer.for_project("a".parse().unwrap()), "r2", &job()).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    let foreign = v1::ListJobsRequest { project: "b".to_owned(), ..Default::default() };
    assert_eq!(viewer.jobs().list_jobs(foreign).await.unwrap_err().code(), Code::NotFound);
    let nobody = Client::lazy(&pair.follower.url(), Options { retries: 0, ..Options::default() }).unwrap();
    assert_eq!(nobody.jobs().get_job(asked).await.unwrap_err().code(), Code::Unauthenticated);
    let list = v1::ListAuditRecordsRequest { page_size: 1000, ..Default::default() };
    let records = admin.audit().list_audit_records(list).await.unwrap().into_inner().records;
    let of = |caller: &str| -> Vec<(String, String, String, String)> {
        let own = records.iter().filter(|record| record.caller == caller);
        own.map(|r| (r.rpc.clone(), r.target.clone(), r.outcome.clone(), r.peer.clone())).rev().collect()
    };
    let record = |rpc: &str, target: &str, outcome: &str| {
        (rpc.to_owned(), target.to_owned(), outcome.to_owned(), "127.0.0.1".to_owned())
    };
    assert_eq!(of(&id), [record("JobService/CreateJob", &made.job_id, "OK")]);
    assert_eq!(
        of(&viewer_id),
        [record("JobService/CreateJob", "", "PERMISSION_DENIED"), record("JobService/ListJobs", "", "NOT_FOUND")]
    );
}

/// A stream at a follower ends with the token under which it is open, whoever revoked it.
#[tokio::test]
async fn a_token_that_is_revoked_is_so_at_every_scheduler() {
    let Some(pair) = Pair::guarded().await else { return };
    let admin = pair.leader.admin().await;
    let of_a = admin.for_project("a".parse().unwrap());
    inputs(&of_a).await;
    let made = create(&of_a, "r1", &job()).await.unwrap();
    let (token_id, secret) = pair.leader.token(&admin, Some("a"), TokenRole::Viewer, "view").await;
    let follower = pair.follower.client_as(Some(secret)).await;
    let asked = v1::WatchJobRequest { project: "a".to_owned(), job_id: made.job_id, after_sequence: 0 };
    let mut stream = follower.jobs().watch_job(asked).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let revoke = v1::RevokeTokenRequest { project: String::new(), token_id };
    admin.tokens().revoke_token(revoke).await.unwrap();
    assert_eq!(cut(&mut stream).await.code(), Code::Unauthenticated);
}

/// A client and a worker that know the follower alone: the one that leads is killed, and both go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_without_a_gap_when_the_one_that_leads_is_gone() {
    let Some(mut pair) = Pair::start().await else { return };
    let client = pair.follower.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &job()).await.unwrap();
    assert_eq!(get(&client, &made.job_id).await.unwrap().job_id, made.job_id);
    let watch = {
        let (client, job) = (client.clone(), made.job_id.clone());
        tokio::spawn(async move { events(&client, &job, 0, usize::MAX).await })
    };
    let mut worker = Worker::connect(&client, "w-1").await;
    let offer = worker.offer().await;
    worker.begin(&attempt(&offer)).await;
    until(&client, &made.job_id, JobState::Running).await;

    pair.leader.kill();
    // Writes are refused with the reason until this one leads, and then done, once.
    let mut n_refused = 0;
    let second = loop {
        match create(&client, "r2", &job()).await {
            Ok(job) => break job,
            Err(status) => {
                assert_eq!(Class::of(&status), Class::Unavailable, "{status:?}");
                n_refused += 1;
                assert!(n_refused < 2000, "nobody leads: {status:?}");
                // What is read is there meanwhile.
                assert_eq!(get(&client, &made.job_id).await.unwrap().job_id, made.job_id);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    assert_eq!(create(&client, "r2", &job()).await.unwrap().job_id, second.job_id);
    drop(worker);
    let mut worker = Worker::connect(&client, "w-1").await;
    for _ in 0..2 {
        let offer = worker.offer().await;
        worker.begin(&attempt(&offer)).await;
        worker.succeed(&offer).await;
    }
    let seen = tokio::time::timeout(LIMIT, watch).await.expect("the watch ends").unwrap();
    assert_eq!(states(&seen).last(), Some(&JobState::Succeeded));
    assert!(seen.is_sorted_by(|a, b| a.sequence < b.sequence));
    // The stream that was open all the time has what one has that is opened now.
    assert_eq!(seen, events(&client, &made.job_id, 0, usize::MAX).await);
    until(&client, &second.job_id, JobState::Succeeded).await;
}

/// While nobody leads, what is in the database is answered, and the rest is refused with the reason.
#[tokio::test]
async fn a_follower_of_nobody_reads() {
    let Some(mut pair) = Pair::start().await else { return };
    let client = pair.follower.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &job()).await.unwrap();
    // Somebody who does not serve has the lock next.
    let mut direct = pair.postgres.direct().await;
    let waits = tokio::spawn(async move { direct.execute(WAIT_FOR_LOCK).await.map(|_| direct) });
    let mut other = pair.postgres.direct().await;
    while !is_waited_for(&mut other).await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    pair.leader.stop().await.unwrap();
    let holder = waits.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;

    let found = get(&client, &made.job_id).await.unwrap();
    assert!(found.message.ends_with("; no scheduler leads that would say what it waits for"), "{found:?}");
    let pulled = client.pull("base", &[], None).await.unwrap().0;
    assert!(pulled.artifact.is_some());
    let seen = events(&client, &made.job_id, 0, 1).await;
    assert_eq!(seen.len(), 1);
    let refused = create(&client, "r2", &job()).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Unavailable);
    let said = "no scheduler leads now; this scheduler follows, and answers what it reads from the database";
    assert_eq!(refused.message(), said);
    let workers = client.fleet().list_workers(v1::ListWorkersRequest::default()).await.unwrap_err();
    assert_eq!((workers.code(), workers.message()), (Code::Unavailable, said));

    drop(holder);
    let deadline = tokio::time::Instant::now() + LIMIT;
    while let Err(status) = create(&client, "r2", &job()).await {
        assert!(tokio::time::Instant::now() < deadline, "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn is_waited_for(direct: &mut PgConnection) -> bool {
    let found = "SELECT COUNT(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = \
                 (SELECT oid FROM pg_database WHERE datname = current_database())";
    direct.fetch_one(found).await.unwrap().get::<i64, _>("n") > 0
}

/// A call goes one hop, keeps its deadline, and does not wait for one that leads no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_goes_one_hop_and_no_longer_than_its_deadline() {
    let Some(pair) = Pair::start().await else { return };
    let client = Client::connect(&pair.follower.url(), Options { retries: 0, ..Options::default() }).await.unwrap();
    let announce = async |url: &str| {
        let mut direct = pair.postgres.direct().await;
        sqlx::query("UPDATE terms SET leader = $1").bind(url.to_owned()).execute(&mut direct).await.unwrap();
    };
    // Until the one that follows has seen it.
    let refused = async |request: &dyn Fn() -> tonic::Request<v1::ListWorkersRequest>| {
        let deadline = tokio::time::Instant::now() + LIMIT;
        loop {
            match client.fleet().list_workers(request()).await {
                Err(status) => return status,
                Ok(answer) => assert!(tokio::time::Instant::now() < deadline, "{answer:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    announce(&pair.follower.url()).await;
    let list = || v1::ListWorkersRequest::default();
    // A call that is on its way when another leader is announced is refused for that.
    let hop = async {
        loop {
            let hop = refused(&|| tonic::Request::new(list())).await;
            if !hop.message().contains("led last") {
                return hop;
            }
        }
    };
    let hop = tokio::time::timeout(LIMIT, hop).await.expect("the one that is announced is asked");
    assert_eq!(hop.code(), Code::Unavailable);
    assert!(hop.message().contains("passed on to a scheduler that does not lead"), "{hop:?}");
    // Nobody makes a leader pass anything on, or is believed an address, by a header of his own.
    let mut asked = tonic::Request::new(list());
    asked.metadata_mut().insert("attune-passed-on", "guess".parse().unwrap());
    pair.leader.client().await.fleet().list_workers(asked).await.unwrap();

    // One that is stopped takes connections and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    announce(&format!("http://{}", silent.local_addr().unwrap())).await;
    let short = || {
        let mut asked = tonic::Request::new(list());
        asked.set_timeout(Duration::from_millis(300));
        asked
    };
    // The one before is asked until it is seen; what it refuses says nothing of deadlines.
    let late = async {
        loop {
            let begun = tokio::time::Instant::now();
            let late = refused(&short).await;
            if late.code() != Code::Unavailable {
                assert!(begun.elapsed() < Duration::from_secs(3));
                return late;
            }
        }
    };
    let late = tokio::time::timeout(LIMIT, late).await.expect("the one that is silent is seen");
    assert!(matches!(late.code(), Code::Cancelled | Code::DeadlineExceeded), "{late:?}");
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.fleet().list_workers(list()).await })
    };
    announce(&pair.leader.url()).await;
    let given_up = tokio::time::timeout(LIMIT, waiting).await.expect("it is not waited for").unwrap().unwrap_err();
    assert_eq!(given_up.code(), Code::Unavailable, "{given_up:?}");
    client.fleet().list_workers(list()).await.unwrap();
}

/// A stranger's secret is refused by a follower as by anybody, also while nobody leads.
#[tokio::test]
async fn a_follower_of_nobody_tells_strangers_nothing() {
    let Some(mut pair) = Pair::guarded().await else { return };
    let mut direct = pair.postgres.direct().await;
    let waits = tokio::spawn(async move { direct.execute(WAIT_FOR_LOCK).await.map(|_| direct) });
    let mut other = pair.postgres.direct().await;
    while !is_waited_for(&mut other).await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    pair.leader.stop().await.unwrap();
    let _holder = waits.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    for (secret, expected) in [
        (None, Code::Unauthenticated),
        (Some(Secret::new("attune_0")), Code::Unauthenticated),
        (Some(pair.leader.admin_secret()), Code::Unavailable),
    ] {
        let client = pair.follower.client_as(secret).await;
        let refused = client.fleet().list_workers(v1::ListWorkersRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), expected, "{refused:?}");
    }
}
