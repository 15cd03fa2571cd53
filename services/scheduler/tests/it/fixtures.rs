//! Artifacts and jobs that tests are made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_artifacts::{Causes, File, Kind, Manifest, hash};
use attune_proto::client::{Blobs, Push};
use attune_proto::{Client, v1};
use attune_spec::id::Digest;
use attune_spec::job::read_value;
use attune_spec::method::Catalogue;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde_json::{Value, json};

/// The blobs of a bundle that is held in memory.
#[derive(Default)]
pub(crate) struct Memory(pub(crate) BTreeMap<Digest, Bytes>);

impl Blobs for Memory {
    fn open(&self, digest: &Digest, start: u64) -> BoxStream<'static, Result<Bytes, String>> {
        let found = self.0.get(digest).ok_or_else(|| format!("{digest} is not in memory"));
        stream::iter([found.map(|bytes| bytes.slice(start as usize..))]).boxed()
    }
}

/// A bundle in memory.
pub(crate) fn bundle(kind: Kind, files: &[(&str, &[u8])], causes: Causes) -> (Manifest, Arc<Memory>) {
    let mut memory = Memory::default();
    let mut listed = Vec::new();
    for (path, bytes) in files {
        let digest = hash::bytes(bytes);
        memory.0.insert(digest, Bytes::copy_from_slice(bytes));
        listed.push(File { path: (*path).to_owned(), size_bytes: bytes.len() as u64, digest });
    }
    (Manifest::new(kind, listed, causes).unwrap(), Arc::new(memory))
}

/// Pushes a bundle.
pub(crate) async fn push(
    client: &Client,
    (manifest, memory): &(Manifest, Arc<Memory>),
    attempt: Option<v1::AttemptCommit>,
    tags: &[&str],
) -> Result<v1::PushArtifactResponse, tonic::Status> {
    let push = Push {
        manifest: manifest.bytes().clone(),
        blobs: manifest.blobs().iter().map(|blob| blob.digest).collect(),
        attempt,
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
    };
    client.push(&push, Arc::clone(memory) as Arc<dyn Blobs>).await
}

/// The `config.json` of a model that fits into a test.
pub(crate) fn model_config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 32, "tie_word_embeddings": true,
    })
}

/// Pushes a base model and a dataset, tagged `base` and `rows`.
pub(crate) async fn inputs(client: &Client) {
    let config = model_config().to_string();
    let base = bundle(Kind::Model, &[("config.json", config.as_bytes())], Causes::default());
    push(client, &base, None, &["base"]).await.unwrap();
    let rows = bundle(Kind::Dataset, &[("rows.jsonl", b"{\"text\": \"a\"}\n")], Causes::default());
    push(client, &rows, None, &["rows"]).await.unwrap();
}

/// A job over these inputs.
pub(crate) fn job() -> Value {
    json!({
        "version": 1, "name": "test-job", "base": "base",
        "data": {"domains": [{"name": "rows", "source": "rows"}], "max_length": 16},
        "tune": {"adapter": {"method": "lora", "rank": 2}, "steps": 10, "batch_tokens": 32},
        "outputs": {"tag": "result"},
        "limits": {"max_attempts": 2},
    })
}

/// A job's message.
pub(crate) fn message(job: &Value) -> v1::JobSpec {
    let spec = read_value(job, Catalogue::embedded()).unwrap();
    attune_proto::convert::job::to_message(&spec).unwrap()
}

/// Creates a job.
pub(crate) async fn create(client: &Client, request: &str, job: &Value) -> Result<v1::Job, tonic::Status> {
    create_message(client, request, message(job)).await
}

/// Creates a job from its message.
pub(crate) async fn create_message(
    client: &Client,
    request: &str,
    spec: v1::JobSpec,
) -> Result<v1::Job, tonic::Status> {
    let request = v1::CreateJobRequest {
        project: client.project().to_string(),
        request_id: request.to_owned(),
        spec: Some(spec),
        validate_only: false,
    };
    client.jobs().create_job(request).await.map(|answer| answer.into_inner().job.unwrap())
}

/// A job as it is now.
pub(crate) async fn get(client: &Client, job: &str) -> Result<v1::Job, tonic::Status> {
    let request = v1::GetJobRequest { project: String::new(), job_id: job.to_owned() };
    client.jobs().get_job(request).await.map(|answer| answer.into_inner().job.unwrap())
}

/// Waits until a job is in a state.
pub(crate) async fn until(client: &Client, job: &str, state: v1::JobState) -> v1::Job {
    let mut last = None;
    for _ in 0..400 {
        let now = get(client, job).await.unwrap();
        if now.state() == state {
            return now;
        }
        last = Some(now);
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    panic!("{job} does not become {state:?}: {last:?}");
}

/// The events of a job after a number, to its end or up to `n` of them.
pub(crate) async fn events(client: &Client, job: &str, after: u64, n: usize) -> Vec<v1::JobEvent> {
    let request = v1::WatchJobRequest { project: String::new(), job_id: job.to_owned(), after_sequence: after };
    let mut stream = client.jobs().watch_job(request).await.unwrap().into_inner();
    let mut found = Vec::new();
    while found.len() < n {
        let next = tokio::time::timeout(crate::server::LIMIT, stream.message()).await.expect("an event or the end");
        match next.unwrap() {
            Some(answer) => found.push(answer.event.unwrap()),
            None => break,
        }
    }
    found
}

/// The states that events lead through.
pub(crate) fn states(events: &[v1::JobEvent]) -> Vec<v1::JobState> {
    let state = |event: &v1::JobEvent| match &event.event {
        Some(v1::job_event::Event::StateChange(change)) => Some(change.to()),
        _ => None,
    };
    events.iter().filter_map(state).collect()
}
