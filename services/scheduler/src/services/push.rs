//! Bytes come in: a header, then the missing blobs one after another. The artifact becomes visible at the end, in one
//! transaction, after every digest was found right; under the epoch of the attempt that made it, if one did.

use std::time::Duration;

use attune_artifacts::{BlobRef, Kind, Manifest};
use attune_proto::Class;
use attune_proto::convert::Faults;
use attune_proto::convert::id::field;
use attune_proto::error::invalid_argument;
use attune_proto::v1::{self, attempt_commit::Commit as Told, push_artifact_request::Part};
use attune_scheduler_core::{Answer, Commit, Input, JobKey};
use attune_spec::id::{Epoch, JobId, Project, Step, Tag, WorkerId};
use attune_spec::{Fault, FieldPath};
use attune_store::artifact::{Cause, File, Maker, NewArtifact};
use attune_store::change::Write;
use bytes::Bytes;
use futures::stream;
use tonic::{Status, Streaming};

use super::artifacts::whole;
use super::invalid;
use crate::clock::Clock;
use crate::context::Context;
use crate::guard::Caller;
use crate::ledger::Extra;
use crate::{status, view};

/// Longest name of a result's role.
const ROLE_BYTES_MAX: usize = 63;

/// A checked header.
pub(crate) struct Header {
    pub(crate) project: Project,
    manifest: Manifest,
    tags: Vec<Tag>,
    pub(crate) attempt: Option<Attempt>,
}

/// On whose behalf an artifact is committed.
pub(crate) struct Attempt {
    pub(crate) key: JobKey,
    pub(crate) epoch: Epoch,
    pub(crate) worker: WorkerId,
    commit: Commit,
    role: String,
    told: v1::AttemptCommit,
}

/// Takes a push to its end.
pub(crate) async fn push(
    context: &Context,
    caller: &Caller,
    incoming: Streaming<v1::PushArtifactRequest>,
) -> Result<v1::PushArtifactResponse, Status> {
    let mut chunks = Chunks { incoming, patience: context.call_limit, next: None, failed: None };
    let first = chunks.message().await?.and_then(|message| message.part);
    let Some(Part::Header(first)) = first else {
        return Err(invalid(Fault::new("header", "is missing; expected it in the first message")));
    };
    let header = read(caller, first)?;
    #[cfg(feature = "failpoints")]
    let header = match fail::eval("scheduler::epoch_unchecked", |_| ()) {
        Some(()) => crate::planted::taken_for_the_newest(context, header).await?,
        None => header,
    };
    caller.concerns(&header.manifest.digest());
    let attempt = header.attempt.as_ref();
    let attempt = attempt.map(|attempt| (&attempt.key.job, attempt.epoch, &attempt.worker));
    caller.may_push(&context.store, &header.project, attempt, !header.tags.is_empty()).await?;
    let (size, max) = (header.manifest.size_bytes(), context.artifact_bytes_max);
    if size > max {
        return Err(Class::TooLarge.status(format!("the artifact has {size} bytes; this server takes {max} at most")));
    }
    if let Some(attempt) = &header.attempt {
        // Nobody's bytes are taken in vain: the answer that counts comes with the transaction.
        let row = context.store.job(&attempt.key.project, &attempt.key.job).await.map_err(status::store)?;
        if row.epoch != attempt.epoch || row.state.is_final() {
            let message = format!("epoch {} of job {} is over", attempt.epoch, attempt.key);
            return Err(Class::StaleEpoch.status(message));
        }
    }
    within_quota(context, &header).await?;
    blobs(context, &header, &mut chunks).await?;
    let Header { project, manifest, .. } = &header;
    let (project, digest) = (project.clone(), manifest.digest());
    let was_visible = context.store.artifact(&project, digest).await.is_ok();
    {
        // From here until the row is stored, no blob is deleted.
        let _kept = context.sweep.read().await;
        context
            .blobs
            .put_manifest(&project, manifest)
            .await
            .map_err(|error| status::artifacts(error, "header.manifest"))?;
        fail::fail_point!("scheduler::before_artifact_row", |what| Err(status::store(crate::planted::failure(
            what.as_deref()
        ))));
        commit(context, caller, header).await?;
    }
    let artifact = whole(context, &project, digest).await?;
    Ok(v1::PushArtifactResponse { artifact: Some(artifact), created: !was_visible })
}

fn read(caller: &Caller, header: v1::PushHeader) -> Result<Header, Status> {
    let project = caller.project(&header.project)?;
    let mut faults = Faults::new();
    let mut tags = Vec::with_capacity(header.tags.len());
    for (index, tag) in header.tags.iter().enumerate() {
        tags.extend(faults.field(field::<Tag>(&format!("header.tags[{index}]"), tag)));
    }
    let manifest = match Manifest::parse(&header.manifest) {
        Ok(manifest) => Some(manifest),
        Err(attune_artifacts::Error::Refused { faults: found, .. }) => {
            let path = FieldPath::from("header.manifest");
            faults.take::<()>(Err(found.into_iter().map(|fault| fault.under(&path)).collect()));
            None
        }
        Err(error) => return Err(status::artifacts(error, "header.manifest")),
    };
    let kind = manifest.as_ref().map(Manifest::kind);
    let attempt = header.attempt.and_then(|told| faults.take(read_attempt(told, &project, kind)));
    let header = manifest.map(|manifest| Header { project, manifest, tags, attempt });
    faults.finish(header).map_err(|faults| invalid_argument(&faults))
}

fn read_attempt(told: v1::AttemptCommit, project: &Project, kind: Option<Kind>) -> Result<Attempt, Vec<Fault>> {
    let mut faults = Faults::new();
    let job = faults.field(field::<JobId>("header.attempt.job_id", &told.job_id));
    let worker = faults.field(field::<WorkerId>("header.attempt.worker_id", &told.worker_id));
    let commit = match &told.commit {
        None => {
            faults.push(Fault::new(
                "header.attempt",
                "says not what the artifact is to the job; expected a step or role",
            ));
            None
        }
        Some(Told::CheckpointStep(step)) => {
            if kind.is_some_and(|kind| kind != Kind::Checkpoint) {
                faults.push(Fault::new(
                    "header.attempt.checkpoint_step",
                    "is given for an artifact that is no checkpoint",
                ));
            }
            Some((Commit::Checkpoint(Step(*step)), String::new()))
        }
        Some(Told::OutputRole(role)) => {
            let is_word =
                !role.is_empty() && role.len() <= ROLE_BYTES_MAX && role.bytes().all(|b| b.is_ascii_graphic());
            if !is_word {
                let message = format!("is {role:?}; expected 1 to {ROLE_BYTES_MAX} printable ASCII characters");
                faults.push(Fault::new("header.attempt.output_role", message));
            }
            Some((Commit::Output, role.clone()))
        }
    };
    let attempt = job.zip(worker).zip(commit).map(|((job, worker), (commit, role))| Attempt {
        key: JobKey::new(project.clone(), job),
        epoch: Epoch(told.epoch),
        worker,
        commit,
        role,
        told,
    });
    faults.finish(attempt)
}

/// Whether the project may keep these bytes as well. Checkpoints and results of attempts are kept in any case: what was trained is not
/// lost for it, and the next push or job is refused.
async fn within_quota(context: &Context, header: &Header) -> Result<(), Status> {
    if header.attempt.is_some() {
        return Ok(());
    }
    let Some(max) = context.front.project(&header.project).await?.policy.max_bytes else { return Ok(()) };
    let kept = context.store.kept_bytes(&header.project).await.map_err(status::store)?;
    let blobs = header.manifest.blobs();
    let digests: Vec<_> = blobs.iter().map(|blob| blob.digest).collect();
    let new = context.store.unreferenced(&header.project, &digests).await.map_err(status::store)?;
    let more: u64 = blobs.iter().filter(|blob| new.contains(&blob.digest)).map(|blob| blob.size_bytes).sum();
    if kept.saturating_add(more) <= max {
        return Ok(());
    }
    let message = format!(
        "project {} keeps {kept} bytes of artifacts and may keep {max}; these are {more} more: delete some, or ask for more",
        header.project
    );
    Err(Class::QuotaExceeded.status(message))
}

/// Stores every blob that comes.
async fn blobs(context: &Context, header: &Header, chunks: &mut Chunks) -> Result<(), Status> {
    let known = header.manifest.blobs();
    while let Some((name, start)) = chunks.peek().await?.map(|chunk| (chunk.digest.clone(), chunk.offset_bytes)) {
        let blob = known.iter().find(|blob| blob.digest.to_string() == name).copied().ok_or_else(|| {
            invalid(Fault::new("chunk.digest", format!("is {name:?}, which is no blob of the manifest")))
        })?;
        let body = Box::pin(chunks.of(blob, &name, start));
        let stored = context.blobs.put_from(&header.project, blob, start, body).await;
        if let Some(failed) = chunks.failed.take() {
            return Err(failed);
        }
        stored.map_err(|error| status::artifacts(error, "chunk"))?;
        // A blob that was there already was not read to its end.
        while chunks.peek().await?.is_some_and(|chunk| chunk.digest == name) {
            chunks.next = None;
        }
    }
    Ok(())
}

/// The chunks of a push, one seen ahead.
struct Chunks {
    incoming: Streaming<v1::PushArtifactRequest>,
    /// How long the next message may take to come.
    patience: Duration,
    next: Option<v1::BlobChunk>,
    failed: Option<Status>,
}

impl Chunks {
    async fn message(&mut self) -> Result<Option<v1::PushArtifactRequest>, Status> {
        let next = tokio::time::timeout(self.patience, self.incoming.message()).await;
        next.unwrap_or_else(|_| Err(Class::DeadlineExceeded.status("the next part of the push did not come in time")))
    }

    async fn peek(&mut self) -> Result<Option<&v1::BlobChunk>, Status> {
        if self.next.is_none() {
            self.next = match self.message().await?.map(|message| message.part) {
                None => None,
                Some(Some(Part::Chunk(chunk))) => Some(chunk),
                Some(Some(Part::Header(_))) => return Err(invalid(Fault::new("header", "came twice"))),
                // A part of a newer client.
                Some(None) => return Err(invalid(Fault::new("part", "is missing or not known here"))),
            };
        }
        Ok(self.next.as_ref())
    }

    /// The bytes of one blob from `start` on, up to the first chunk of another.
    fn of<'a>(
        &'a mut self,
        blob: BlobRef,
        name: &'a str,
        start: u64,
    ) -> impl futures::Stream<Item = Result<Bytes, Status>> + Send + 'a {
        stream::unfold((self, start), move |(chunks, seen)| async move {
            let found = match chunks.peek().await {
                Ok(Some(chunk)) if chunk.digest == name => Ok(chunk.offset_bytes),
                Ok(_) => return None,
                Err(status) => Err(status),
            };
            let checked = found.and_then(|offset| {
                if offset == seen {
                    return Ok(());
                }
                let message = format!("is {offset} of blob {}; expected {seen}, which comes next", blob.digest);
                Err(invalid(Fault::new("chunk.offset_bytes", message)))
            });
            match checked {
                Ok(()) => {
                    let data = chunks.next.take().map(|chunk| chunk.data).unwrap_or_default();
                    let seen = seen + data.len() as u64;
                    Some((Ok(data), (chunks, seen)))
                }
                Err(status) => {
                    chunks.failed = Some(status.clone());
                    Some((Err(status), (chunks, seen)))
                }
            }
        })
    }
}

/// Makes the artifact visible.
async fn commit(context: &Context, caller: &Caller, header: Header) -> Result<(), Status> {
    let Header { project, manifest, tags, attempt } = header;
    let maker = attempt.as_ref().map(|attempt| Maker {
        job: attempt.key.job.clone(),
        epoch: attempt.epoch,
        record: view::record(&attempt.told),
    });
    let file = |file: &attune_artifacts::File| File {
        path: file.path.clone(),
        blob: file.digest,
        size_bytes: file.size_bytes,
    };
    let causes = manifest.causes().inputs.iter();
    let artifact = Box::new(NewArtifact {
        project,
        digest: manifest.digest(),
        kind: manifest.kind().to_string(),
        size_bytes: manifest.size_bytes(),
        files: manifest.files().iter().map(file).collect(),
        causes: causes.map(|(role, digest)| Cause { role: role.clone(), digest: *digest }).collect(),
        maker,
        tags,
        now: Clock::utc(),
    });
    let Some(Attempt { key, epoch, worker, commit, role, .. }) = attempt else {
        return context.front.write_for(caller, vec![Write::Artifact(artifact)]).await;
    };
    let digest = manifest.digest();
    let extra = Extra { artifact: Some(artifact), role, ..Extra::default() };
    let input = Input::Commit { key, epoch, worker, commit, digest };
    match context.front.step_for(caller, input, extra).await? {
        Answer::Done | Answer::Repeated => Ok(()),
        Answer::Refused(refusal) => Err(status::refusal(&refusal)),
    }
}
