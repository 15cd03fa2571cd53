//! The whole of it: a job waits, a Pod is asked for, its worker trains, idles, and is given back; and what becomes of it when a Pod, the
//! scheduler or the API server goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use attune_proto::v1::{self, JobState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::engine::{pool, role};
use super::kubelet::Kubelet;
use super::server::Server;
use super::world::{Kind, is_ended};
use crate::kills::prepare;
use crate::support::{Cluster, PATIENCE, SMALL, outputs};

/// A worker's token; nobody asks for it here, so whatever it says does.
const TOKEN: &str = "atn_0000000000000000_0123456789abcdef";

/// A scheduler of workers from Kubernetes.
struct Scene {
    cluster: Cluster,
    server: Server,
    /// The processes of Pods, by their names.
    processes: Arc<Mutex<BTreeMap<String, i32>>>,
}

impl Scene {
    async fn start() -> Self {
        let server = Server::start(2, &role());
        let cluster = Cluster::start_with_pool(|cluster| {
            let mut pool = pool(&server.kubeconfig(), &json!({}));
            let own = json!({
                "idle": "1s", "start": "60s", "look": "1s", "server": cluster.url(), "program": env!("CARGO_BIN_EXE_attune"),
                "worker": {"grace": "5s", "labels": {"from": "kubernetes"}},
            });
            for (name, value) in own.as_object().unwrap() {
                pool[name] = value.clone();
            }
            pool
        })
        .await;
        let secret = BTreeMap::from([("secret".to_owned(), TOKEN.to_owned())]);
        let processes = Arc::default();
        let kubelet = Kubelet {
            api: Arc::clone(&server.api),
            secrets: BTreeMap::from([("attune-worker".to_owned(), secret)]),
            log: cluster.path("worker.log"),
            processes: Arc::clone(&processes),
        };
        #[expect(clippy::disallowed_methods, reason = "a node ends with its test")]
        tokio::spawn(kubelet.work());
        Self { cluster, server, processes }
    }

    /// The Jobs that have not ended.
    fn open(&self) -> Vec<Value> {
        self.server.api.world.all(Kind::Job).into_iter().filter(|job| !is_ended(job)).collect()
    }

    async fn until(&self, what: &str, mut fits: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !fits() {
            let pods = self.server.api.world.all(Kind::Pod);
            assert!(Instant::now() < deadline, "no {what}: {:#?} {pods:#?}\n{}", self.open(), self.cluster.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_none_is_left(&self) {
        self.until("end of all", || self.open().is_empty() && self.processes.lock().unwrap().is_empty()).await;
    }

    fn scheduler_says(&self, words: &str) -> bool {
        std::fs::read_to_string(self.cluster.path("scheduler.log")).unwrap().contains(words)
    }
}

fn trains(job: &v1::Job) -> bool {
    job.state() == JobState::Running && !job.checkpoint.is_empty()
}

#[tokio::test]
async fn pods_are_asked_for_train_are_given_back_and_may_be_killed_with_whoever_asked() {
    let mut scene = Scene::start().await;
    assert!(scene.open().is_empty());
    let base = prepare(&scene.cluster).await;
    scene.until_none_is_left().await;
    let base = format!("base={base}");
    let own =
        [base.as_str(), "tune.steps=300", "tune.checkpoint.every_steps=50", "resources.labels={from: kubernetes}"];
    let set: Vec<&str> = SMALL.into_iter().chain(own).collect();
    let chat = scene.cluster.path("world/chat.yaml");

    // It waits for a node, which is said; then there is one.
    scene.server.api.world.change(|state| state.nodes = 0);
    let id = scene.cluster.submit(&chat, &set);
    scene.until("word of the wait", || scene.scheduler_says("Unschedulable: 0/0 nodes are available")).await;
    scene.server.api.world.change(|state| state.nodes = 2);
    let undisturbed = scene.cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((undisturbed.epoch, undisturbed.failed_attempts), (1, 0));
    scene.until_none_is_left().await;
    assert!(scene.scheduler_says("is given back"), "{}", scene.cluster.logs());
    assert!(!scene.server.api.world.all(Kind::Job).iter().any(|job| job.to_string().contains(TOKEN)));

    // The kernel kills a worker in the middle: another one is asked for, the bits are the same.
    let id = scene.cluster.submit(&chat, &set);
    scene.cluster.wait(&id, "training", trains).await;
    let [process] = scene.processes.lock().unwrap().values().copied().collect::<Vec<_>>()[..] else {
        panic!("not one")
    };
    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    let job = scene.cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!(outputs(&job), outputs(&undisturbed));
    assert!(job.epoch > 1, "{job:#?}");
    assert!(scene.scheduler_says("container worker, exit status 137, Error"), "{}", scene.cluster.logs());
    scene.until_none_is_left().await;

    // The scheduler is killed: the next one finds the Pod that the first had asked for. The API server goes as well, and nobody misses it
    // until something is to be given back.
    let id = scene.cluster.submit(&chat, &set);
    scene.cluster.wait(&id, "training", trains).await;
    let [before] = &scene.open()[..] else { panic!("{:?}", scene.open()) };
    let before = before["metadata"]["uid"].clone();
    scene.cluster.scheduler.take().unwrap().kill();
    scene.cluster.start_scheduler(&[]).await;
    scene.server.stop();
    let job = scene.cluster.ends(&id, JobState::Succeeded).await;
    assert_eq!((outputs(&job), job.epoch), (outputs(&undisturbed), 1));
    scene.until("word of the server", || scene.scheduler_says("the API server does not answer")).await;
    assert_eq!(scene.open().iter().map(|job| &job["metadata"]["uid"]).collect::<Vec<_>>(), [&before]);
    scene.server.come_back();
    scene.until_none_is_left().await;

    // Three jobs, two Pods at the most, none in the end.
    let jobs: Vec<String> = (0..3).map(|_| scene.cluster.submit(&chat, &set)).collect();
    for id in jobs {
        scene.cluster.ends(&id, JobState::Succeeded).await;
    }
    scene.until_none_is_left().await;
    assert_eq!(scene.server.api.world.jobs_max(), 2);
}
