//! Storing what an attempt makes: checkpoints and results, with their causes, under the attempt's epoch.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attune_artifacts::{self as artifacts, Causes, Kind};
use attune_proto::convert::time::timestamp;
use attune_proto::{Class, Client, v1};
use attune_spec::id::{Digest, Step, Tokens};
use attune_spec::job::Plan;
use attune_spec::job::plan::Input;
use attune_trainer::kernel::CODE_VERSION;
use attune_trainer::protocol::{OutputKind, OutputRole, Summary};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;

use crate::attempt::Task;
use crate::clock;
use crate::cohort::Node;
use crate::transfer::{self, PushError};

/// First wait before a push is tried again; doubles up to the longest.
const RETRY_WAIT: Duration = Duration::from_millis(250);
/// Longest wait before a push is tried again.
const RETRY_WAIT_MAX: Duration = Duration::from_secs(10);

/// A folder that the process announced.
#[derive(Debug)]
pub(crate) enum Item {
    /// The whole state after a step.
    Checkpoint { step: Step, folder: PathBuf },
    /// A result.
    Output { role: OutputRole, kind: OutputKind, folder: PathBuf },
}

/// A folder that is an artifact now.
#[derive(Debug)]
pub(crate) enum Stored {
    /// Checkpoint of a step.
    Checkpoint { step: Step, digest: Digest },
    /// Result in a role.
    Output { role: String, digest: Digest },
}

/// Why a folder could not become an artifact.
#[derive(Debug)]
pub(crate) struct UploadError {
    pub(crate) cause: v1::FailureCause,
    pub(crate) message: String,
}

/// Everything that a plan reads, by its role in a lineage.
pub(crate) fn roles(plan: &Plan) -> Vec<(String, &Input)> {
    let mut roles = vec![("base".to_owned(), &plan.base)];
    roles.extend(plan.domains.iter().map(|domain| (format!("data.{}", domain.name), &domain.input)));
    roles.extend(plan.validation.iter().map(|set| (format!("validation.{}", set.name), &set.input)));
    let from = plan.stack.iter().filter_map(|slot| slot.from.as_ref().map(|from| (&slot.name, from)));
    roles.extend(from.map(|(name, from)| (format!("slot.{name}"), from)));
    roles.extend(plan.statistics.iter().map(|statistics| ("statistics".to_owned(), statistics)));
    roles
}

/// Stores the folders of one attempt.
#[derive(Debug)]
pub(crate) struct Uploader {
    client: Client,
    patience: Duration,
    commit: v1::AttemptCommit,
    causes: Causes,
    /// Roles of inputs that are read where they lie, by what the run calls them.
    located: Vec<(String, String)>,
    facts: v1::RunFacts,
}

impl Uploader {
    pub(crate) fn new(node: &Arc<Node>, task: &Task) -> Self {
        let mut inputs = BTreeMap::new();
        let mut located = Vec::new();
        for (role, input) in roles(&task.plan) {
            match input {
                Input::Artifact(digest) => drop(inputs.insert(role, *digest)),
                Input::Url(place) | Input::Path(place) => located.push((place.clone(), role)),
            }
        }
        let plan = artifacts::canonical::digest(&serde_json::to_value(&task.plan).unwrap_or_default());
        Self {
            client: node.client.for_project(task.attempt.project.clone()),
            patience: node.store_patience,
            commit: v1::AttemptCommit {
                job_id: task.attempt.job.to_string(),
                epoch: task.attempt.epoch.0,
                worker_id: node.worker.clone(),
                commit: None,
                facts: None,
            },
            causes: Causes {
                code_version: Some(CODE_VERSION.to_owned()),
                inputs,
                kernel_profile: None,
                logical_shards: Some(task.plan.logical_shards),
                plan: Some(plan),
            },
            located,
            facts: v1::RunFacts { start_time: Some(timestamp(clock::unix_ms())), ..Default::default() },
        }
    }

    /// Takes what is known once steps begin.
    pub(crate) fn running(&mut self, kernel_profile: String, pinned: BTreeMap<String, Digest>) {
        self.causes.kernel_profile = Some(kernel_profile);
        for (place, digest) in pinned {
            let roles = self.located.iter().filter(|(known, _)| *known == place);
            self.causes.inputs.extend(roles.map(|(_, role)| (role.clone(), digest)));
        }
    }

    /// Takes how far the run is.
    pub(crate) fn progress(&mut self, step: Step, tokens: Tokens, tokens_per_second: f64) {
        self.facts.step = step.0;
        self.facts.tokens = tokens.0;
        self.facts.tokens_per_second = tokens_per_second;
    }

    /// Takes how the run went.
    pub(crate) fn finished(&mut self, summary: &Summary) {
        self.progress(summary.steps, summary.tokens, summary.tokens_per_second);
        self.memory(summary.peak_memory_bytes);
    }

    /// Takes the largest memory of the process so far.
    pub(crate) fn memory(&mut self, peak_memory_bytes: u64) {
        self.facts.peak_memory_bytes = self.facts.peak_memory_bytes.max(peak_memory_bytes);
    }

    /// Stores a folder; again for as long as the service may come back.
    pub(crate) fn store(&self, item: Item) -> BoxFuture<'static, Result<Stored, UploadError>> {
        use v1::attempt_commit::Commit;
        let (folder, kind, commit) = match &item {
            Item::Checkpoint { step, folder } => (folder, Kind::Checkpoint, Commit::CheckpointStep(step.0)),
            Item::Output { role, kind, folder } => {
                let kind = match kind {
                    OutputKind::Adapter => Kind::Adapter,
                    OutputKind::Model => Kind::Model,
                    OutputKind::Report => Kind::Report,
                    OutputKind::Statistics => Kind::Statistics,
                };
                (folder, kind, Commit::OutputRole(output_role(role, kind)))
            }
        };
        let folder = folder.clone();
        let facts = v1::RunFacts { finish_time: Some(timestamp(clock::unix_ms())), ..self.facts };
        let commit = v1::AttemptCommit { commit: Some(commit), facts: Some(facts), ..self.commit.clone() };
        let (client, causes, patience) = (self.client.clone(), self.causes.clone(), self.patience);
        async move {
            fail::fail_point!("worker::before_push", |_| {
                crate::attempt::kill_this_process();
                unreachable!("the process was killed")
            });
            let give_up = Instant::now() + patience;
            let mut wait = RETRY_WAIT;
            let pushed = loop {
                let push =
                    transfer::push(&client, &folder, Some(kind), causes.clone(), Some(commit.clone()), Vec::new());
                match push.await {
                    Ok(pushed) => break pushed,
                    Err(error) if error.retry() && Instant::now() < give_up => {
                        tracing::warn!(folder = %folder.display(), %error, "a push failed; trying again");
                        tokio::time::sleep(wait).await;
                        wait = (wait * 2).min(RETRY_WAIT_MAX);
                    }
                    Err(error) => return Err(upload_error(&error)),
                }
            };
            fail::fail_point!("worker::after_push", |_| {
                crate::attempt::kill_this_process();
                unreachable!("the process was killed")
            });
            Ok(match item {
                Item::Checkpoint { step, .. } => Stored::Checkpoint { step, digest: pushed.digest },
                Item::Output { role, .. } => Stored::Output { role: output_role(&role, kind), digest: pushed.digest },
            })
        }
        .boxed()
    }
}

fn output_role(role: &OutputRole, kind: Kind) -> String {
    match role {
        OutputRole::Merged => "merged".to_owned(),
        OutputRole::Report => "report".to_owned(),
        OutputRole::Statistics => "statistics".to_owned(),
        OutputRole::Result if kind == Kind::Model => "model".to_owned(),
        OutputRole::Result => "adapter".to_owned(),
        OutputRole::Further(slot) => format!("adapter-{slot}"),
    }
}

fn upload_error(error: &PushError) -> UploadError {
    let cause = match error {
        PushError::Server(status) => match Class::of(status) {
            Class::StaleEpoch | Class::IllegalState | Class::NotFound => v1::FailureCause::LeaseExpired,
            // The worker may not speak for the attempt any more.
            Class::PermissionDenied | Class::Unauthenticated => v1::FailureCause::LeaseExpired,
            Class::StorageFull | Class::QuotaExceeded => v1::FailureCause::DiskFull,
            Class::Corrupt => v1::FailureCause::Corrupt,
            Class::Invalid | Class::TooLarge | Class::Internal => v1::FailureCause::Internal,
            _ => v1::FailureCause::StoreUnavailable,
        },
        PushError::Local(artifacts::Error::Full { .. }) => v1::FailureCause::DiskFull,
        PushError::Local(_) => v1::FailureCause::Internal,
    };
    UploadError { cause, message: format!("a result could not be stored: {error}") }
}
