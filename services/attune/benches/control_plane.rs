//! What the control plane does in a second: jobs taken in, the end of a job told to a thousand watchers, artifacts in and out, a small job
//! from its submission to its first step. Real processes, one machine.
//!
//! `cargo bench -p attune --features failpoints --profile dev --bench control_plane` over SQLite; with `ATTUNE_BENCH_DATABASE`, the URL of an
//! empty database of PostgreSQL, over that (`tests/services/postgres.sh` starts a server). `-- JOBS WATCHERS MEBIBYTES` changes how much.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on stops, and prints what it found"
)]
#![allow(clippy::disallowed_methods, reason = "this program measures time")]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use attune_artifacts::{Causes, Kind, Source as _, Unpack};
use attune_proto::client::Options;
use attune_proto::v1::JobState;
use attune_proto::{Client, v1};
use attune_spec::job::{read_value, read_yaml};
use attune_spec::method::Catalogue;
use attune_worker::transfer::{self, Remote};

/// A process that ends with its value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn attune(arguments: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attune"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Process(command.spawn().unwrap())
}

async fn client(url: &str) -> Client {
    loop {
        match Client::connect(url, Options::default()).await {
            Ok(client) => return client,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn message(yaml: &str) -> v1::JobSpec {
    let spec = read_value(&read_yaml(yaml).unwrap(), Catalogue::embedded()).unwrap();
    attune_proto::convert::job::to_message(&spec).unwrap()
}

async fn create(client: &Client, request: &str, spec: v1::JobSpec) -> String {
    let asked = v1::CreateJobRequest {
        project: client.project().to_string(),
        request_id: request.to_owned(),
        spec: Some(spec),
        validate_only: false,
    };
    client.jobs().create_job(asked).await.unwrap().into_inner().job.unwrap().job_id
}

async fn push(client: &Client, folder: &Path, kind: Kind, tag: &str) -> String {
    let pushed = transfer::push(client, folder, Some(kind), Causes::default(), None, vec![tag.to_owned()]);
    pushed.await.unwrap().digest.to_string()
}

/// Waits for an event of a job with this state; when it came.
async fn until(client: &Client, job: &str, state: JobState) -> Instant {
    let asked =
        v1::WatchJobRequest { project: client.project().to_string(), job_id: job.to_owned(), after_sequence: 0 };
    let mut events = client.jobs().watch_job(asked).await.unwrap().into_inner();
    while let Some(answer) = events.message().await.unwrap() {
        let changed = answer.event.and_then(|event| event.event);
        if let Some(v1::job_event::Event::StateChange(change)) = changed
            && change.to() == state
        {
            return Instant::now();
        }
    }
    panic!("job {job} ended before it was {state:?}");
}

fn told(name: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!("{name:<52} {:>9.1} {:>9.1} {:>9.1}", at(0.5), at(0.99), at(1.0));
}

const JOB: &str = "
version: 1
name: bench
base: base
data: {domains: [{name: rows, source: rows}], max_length: 16}
tune: {adapter: {method: lora, rank: 2}, steps: 10, batch_tokens: 32}
";

const BASE: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 32, "tie_word_embeddings": true}"#;

async fn submissions(url: &str, n_jobs: usize) {
    for n_clients in [1, 16] {
        let begun = Instant::now();
        let mut tasks = Vec::new();
        for at in 0..n_clients {
            let client = client(url).await;
            tasks.push(tokio::spawn(async move {
                let (spec, mut took) = (message(JOB), Vec::new());
                for number in 0..n_jobs / n_clients {
                    let asked = Instant::now();
                    create(&client, &format!("r-{n_clients}-{at}-{number}"), spec.clone()).await;
                    took.push(asked.elapsed());
                }
                took
            }));
        }
        let mut took = Vec::new();
        for task in tasks {
            took.extend(task.await.unwrap());
        }
        let per_second = took.len() as f64 / begun.elapsed().as_secs_f64();
        told(&format!("a submission, {n_clients} at once ({per_second:.0} a second)"), took);
    }
}

async fn watchers(url: &str, n_watchers: usize) {
    let owner = client(url).await;
    let job = create(&owner, "watched", message(JOB)).await;
    let (ready, mut arrived) = tokio::sync::mpsc::channel(n_watchers);
    let mut tasks = Vec::new();
    let mut several = Vec::new();
    for at in 0..n_watchers {
        if at % 100 == 0 {
            several.push(client(url).await);
        }
        let (client, job, ready) = (several[at / 100].clone(), job.clone(), ready.clone());
        tasks.push(tokio::spawn(async move {
            let asked = v1::WatchJobRequest { project: client.project().to_string(), job_id: job, after_sequence: 0 };
            let mut events = client.jobs().watch_job(asked).await.unwrap().into_inner();
            events.message().await.unwrap().unwrap();
            ready.send(()).await.unwrap();
            while events.message().await.unwrap().is_some() {}
            Instant::now()
        }));
    }
    for _ in 0..n_watchers {
        arrived.recv().await.unwrap();
    }
    let asked = Instant::now();
    let cancel = v1::CancelJobRequest { project: owner.project().to_string(), job_id: job };
    owner.jobs().cancel_job(cancel).await.unwrap();
    let mut took = Vec::new();
    for task in tasks {
        took.push(task.await.unwrap().saturating_duration_since(asked));
    }
    told(&format!("the end of a job, told to {n_watchers} watchers"), took);
}

/// Bytes a second through the disk with nobody between, and through the store.
async fn transfers(url: &str, folder: &Path, mebibytes: usize) {
    let (client, size) = (client(url).await, mebibytes << 20);
    let source = folder.join("source");
    std::fs::create_dir(&source).unwrap();
    let file = source.join("blob.bin");
    // Nothing that could be made smaller.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(size / 8)
    .flatten()
    .collect();
    let speed = |begun: Instant| size as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut open = std::fs::File::create(&file).unwrap();
    open.write_all(&bytes).unwrap();
    open.sync_all().unwrap();
    let written = speed(begun);
    let begun = Instant::now();
    let mut read = Vec::with_capacity(size);
    std::fs::File::open(&file).unwrap().read_to_end(&mut read).unwrap();
    let read_speed = speed(begun);
    let begun = Instant::now();
    let digest = push(&client, &source, Kind::Report, "large").await;
    let pushed = speed(begun);
    let begun = Instant::now();
    let digest = digest.parse().unwrap();
    let mut unpack = Unpack::to(&folder.join("pulled"), digest).await.unwrap();
    Remote::new(client.clone()).pull(client.project(), &digest, &mut unpack).await.unwrap();
    unpack.finish().await.unwrap();
    let pulled = speed(begun);
    println!(
        "\n{mebibytes} MiB, in MB/s: written and synced {written:.0}, read from memory {read_speed:.0}, pushed {pushed:.0}, pulled {pulled:.0}"
    );
}

async fn first_step(url: &str, folder: &Path) {
    let work = folder.join("worker");
    let _worker = attune(&["worker", "--server", url, "--work-dir", work.to_str().unwrap(), "--name", "bench"]);
    let world = folder.join("world");
    let made = Command::new(env!("CARGO_BIN_EXE_attune")).args(["demo", "--files"]).arg(&world).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let client = client(url).await;
    let submit = |file: &str, more: &[String]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_attune"));
        command.args(["--json", "submit", world.join(file).to_str().unwrap()]).env("ATTUNE_SERVER", url);
        let small = ["tune.batch_tokens=256", "data.max_length=64", "tune.logical_shards=2", "data.validation=[]"];
        for set in small.into_iter().chain(more.iter().map(String::as_str)) {
            command.args(["--set", set]);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let job: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        job["id"].as_str().unwrap().to_owned()
    };
    let base = submit("text.yaml", &["tune.steps=2".to_owned()]);
    until(&client, &base, JobState::Succeeded).await;
    let asked = v1::GetJobRequest { project: String::new(), job_id: base };
    let base = client.jobs().get_job(asked).await.unwrap().into_inner().job.unwrap();
    let base = base.outputs.iter().find(|output| output.role == "model").unwrap().digest.clone();
    // Once, so that the worker has the inputs.
    let warm = submit("chat.yaml", &[format!("base={base}"), "tune.steps=1".to_owned()]);
    until(&client, &warm, JobState::Succeeded).await;
    let asked = v1::GetJobRequest { project: String::new(), job_id: warm };
    let warm = client.jobs().get_job(asked).await.unwrap().into_inner().job.unwrap();
    let (mut running, mut ended) = (Vec::new(), Vec::new());
    for number in 0..20 {
        let mut spec = warm.spec.clone().unwrap();
        spec.name = format!("first-step-{number}");
        let begun = Instant::now();
        let job = create(&client, &format!("first-{number}"), spec).await;
        running.push(until(&client, &job, JobState::Running).await - begun);
        ended.push(until(&client, &job, JobState::Succeeded).await - begun);
    }
    told("from submission to the first step", running);
    told("to the end of a job of one step, all stored", ended);
}

#[tokio::main]
async fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|text| text.parse().ok()).collect();
    let at = |index: usize, default: usize| numbers.get(index).copied().unwrap_or(default);
    let (n_jobs, n_watchers, mebibytes) = (at(0, 2000), at(1, 1000), at(2, 256));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (listen, url) = (format!("127.0.0.1:{port}"), format!("http://127.0.0.1:{port}"));
    let database = std::env::var("ATTUNE_BENCH_DATABASE").unwrap_or_else(|_| path("attune.db"));
    let _scheduler =
        attune(&["scheduler", "--listen", &listen, "--database", &database, "--artifacts", &path("artifacts")]);
    let owner = client(&url).await;
    for (name, file, content, kind) in
        [("base", "config.json", BASE, Kind::Model), ("rows", "rows.jsonl", "{\"text\": \"a\"}\n", Kind::Dataset)]
    {
        let source = folder.path().join(name);
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join(file), content).unwrap();
        push(&owner, &source, kind, name).await;
    }
    let kind = if database.contains("://") { "PostgreSQL" } else { "SQLite" };
    println!("over {kind}\n\n{:<52} {:>9} {:>9} {:>9}", "milliseconds", "median", "99 %", "longest");
    Box::pin(first_step(&url, folder.path())).await;
    submissions(&url, n_jobs).await;
    watchers(&url, n_watchers).await;
    transfers(&url, folder.path(), mebibytes).await;
}
