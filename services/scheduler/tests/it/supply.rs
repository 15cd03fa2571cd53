//! Workers that come when jobs wait and go when none do, from an engine of the test's.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attune_proto::v1::connect_response::Message;
use attune_proto::v1::{self, JobState};
use attune_proto::{Client, v1::CancelJobRequest};
use attune_scheduler::providers::{ProviderError, WorkerPool, WorkerProvider};
use attune_scheduler_core::Devices;
use attune_scheduler_core::supply::{Pool, REQUEST_LABEL, RequestId, Standing};

use crate::fixtures::{create, get, inputs, job};
use crate::server::{LIMIT, Server};
use crate::worker::{Worker, attempt, register};

/// An engine that starts nothing by itself.
#[derive(Debug, Default)]
struct Engine {
    has: Mutex<BTreeMap<RequestId, Standing>>,
    told_to_end: Mutex<Vec<RequestId>>,
    is_broken: Mutex<bool>,
    is_closed: Mutex<bool>,
}

fn broken() -> ProviderError {
    ProviderError { engine: "the test", doing: "do anything", why: "it is broken".to_owned() }
}

#[tonic::async_trait]
impl WorkerProvider for Engine {
    async fn list(&self) -> Result<BTreeMap<RequestId, Standing>, ProviderError> {
        if *self.is_broken.lock().unwrap() { Err(broken()) } else { Ok(self.has.lock().unwrap().clone()) }
    }

    async fn ask(&self, request: &RequestId) -> Result<(), ProviderError> {
        self.has.lock().unwrap().insert(request.clone(), Standing::Waiting);
        Ok(())
    }

    async fn give_back(&self, request: &RequestId) -> Result<(), ProviderError> {
        self.told_to_end.lock().unwrap().push(request.clone());
        Ok(())
    }

    async fn withdraw(&self, request: &RequestId) -> Result<(), ProviderError> {
        self.has.lock().unwrap().remove(request);
        Ok(())
    }

    fn rendered(&self, request: &RequestId) -> String {
        request.to_string()
    }

    async fn close(&self) {
        *self.is_closed.lock().unwrap() = true;
    }
}

impl Engine {
    /// Waits until it has `n` requests, and gives them.
    async fn has(&self, n: usize) -> Vec<RequestId> {
        for _ in 0..LIMIT.as_millis() / 25 {
            let has: Vec<RequestId> = self.has.lock().unwrap().keys().cloned().collect();
            if has.len() == n {
                return has;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("{:?} is not {n}", self.has);
    }

    /// Starts a request: its worker registers.
    async fn start(&self, client: &Client, request: &RequestId) -> Worker {
        self.has.lock().unwrap().insert(request.clone(), Standing::Running);
        let labels = [(REQUEST_LABEL.to_owned(), request.to_string())].into_iter().collect();
        Worker::connect_with(client, v1::Register { labels, ..register(&format!("w-{request}")) }).await.0
    }
}

fn server(engine: &Arc<Engine>, max: u32) -> Server {
    let pool = Pool {
        name: "test".parse().unwrap(),
        devices: Devices { n_cpu: 1, n_cuda: 0 },
        labels: BTreeMap::new(),
        min: 0,
        max,
        idle: Duration::from_secs(1),
        start: Duration::from_secs(60),
    };
    let provider = Arc::clone(engine) as Arc<dyn WorkerProvider>;
    Server::start_with(|config| {
        config.pools = vec![WorkerPool { pool, look: Duration::from_millis(50), provider }];
    })
}

#[tokio::test]
async fn a_worker_is_asked_for_trains_idles_is_drained_and_given_back() {
    let engine = Arc::<Engine>::default();
    let mut server = server(&engine, 2);
    let client = server.client().await;
    inputs(&client).await;
    assert_eq!(engine.has(0).await, []);
    let made = create(&client, "r1", &job()).await.unwrap();
    let request = engine.has(1).await.remove(0);
    let mut worker = engine.start(&client, &request).await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, made.job_id);
    worker.begin(&attempt(&offer)).await;
    // It runs for longer than it may idle.
    for _ in 0..15 {
        worker.beat(&[crate::worker::running(&offer)]).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(engine.told_to_end.lock().unwrap().is_empty());
    worker.succeed(&offer).await;
    assert_eq!(get(&client, &made.job_id).await.unwrap().state(), JobState::Succeeded);
    while engine.told_to_end.lock().unwrap().is_empty() {
        worker.beat(&[]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(engine.told_to_end.lock().unwrap().as_slice(), std::slice::from_ref(&request));
    let workers = client.fleet().list_workers(v1::ListWorkersRequest::default()).await.unwrap().into_inner().workers;
    assert!(workers[0].draining, "{workers:?}");

    // Nothing new goes there: another one is asked for, and no third one, for two is the most.
    let waits = create(&client, "r2", &job()).await.unwrap();
    create(&client, "r3", &job()).await.unwrap();
    let both = engine.has(2).await;
    assert!(!worker.has(|message| matches!(message, Message::LeaseOffer(_))).await);
    worker.beat(&[]).await;
    assert_eq!(engine.has.lock().unwrap().len(), 2);

    // It ends; what waits in the engine's line is withdrawn once its job is gone.
    drop(worker);
    engine.has.lock().unwrap().remove(&request);
    let last = engine.has(2).await;
    assert!(both.iter().any(|id| last.contains(id)), "{both:?} {last:?}");
    for made in client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner().jobs {
        let cancel = CancelJobRequest { job_id: made.job_id.clone(), ..CancelJobRequest::default() };
        let done = client.jobs().cancel_job(cancel).await;
        assert!(done.is_ok() || made.state() == JobState::Succeeded, "{done:?}");
    }
    assert_eq!(get(&client, &waits.job_id).await.unwrap().state(), JobState::Cancelled);
    engine.has(0).await;
    server.stop().await.unwrap();
    assert!(*engine.is_closed.lock().unwrap());
}

#[tokio::test]
async fn an_engine_that_is_broken_costs_nothing_but_workers() {
    let engine = Arc::<Engine>::default();
    *engine.is_broken.lock().unwrap() = true;
    let server = server(&engine, 1);
    let client = server.client().await;
    inputs(&client).await;
    let made = create(&client, "r1", &job()).await.unwrap();
    // A worker that somebody started does the work.
    let mut worker = Worker::connect(&client, "w-own").await;
    let offer = worker.offer().await;
    assert_eq!(attempt(&offer).job_id, made.job_id);
    assert_eq!(engine.has(0).await, []);
    create(&client, "r2", &job()).await.unwrap();
    *engine.is_broken.lock().unwrap() = false;
    engine.has(1).await;
}
