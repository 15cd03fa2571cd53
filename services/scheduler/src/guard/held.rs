//! What a worker may touch: the attempts that it holds, and of artifacts what these read and make.

use attune_proto::Class;
use attune_proto::convert::id::Reference;
use attune_spec::id::{Digest, Epoch, JobId, Project, WorkerId};
use attune_store::Store;
use tonic::Status;

use super::Caller;
use crate::rows::JobDocument;
use crate::status;

/// A project or artifact is looked at by a worker only if an attempt of it is there.
impl Caller {
    /// Whether the caller, if it is a worker, holds something in a project.
    pub(crate) async fn may_look(&self, store: &Store, project: &Project) -> Result<(), Status> {
        let Some(owner) = self.owner() else { return Ok(()) };
        if store.held(project, owner).await.map_err(status::store)?.is_empty() {
            return Err(self.foreign(project));
        }
        Ok(())
    }

    /// Whether the caller, if it is a worker, may read an artifact: one that its attempts read, or the checkpoint that they go
    /// on from. Others are to it as if they were not there.
    pub(crate) async fn may_read(&self, store: &Store, project: &Project, named: &Reference) -> Result<(), Status> {
        let Some(owner) = self.owner() else { return Ok(()) };
        let absent = |what, name: String| {
            status::store(attune_store::Error::NotFound { what, name, project: project.to_string() })
        };
        let digest: Digest = match named {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => return Err(absent("tag", tag.to_string())),
        };
        let held = store.held(project, owner).await.map_err(status::store)?;
        for job in &held {
            let document = JobDocument::read(&job.core).map_err(|error| status::unreadable(&error))?;
            if document.checkpoint.is_some_and(|checkpoint| checkpoint.digest == digest) {
                return Ok(());
            }
        }
        let jobs: Vec<_> = held.iter().map(|held| &held.job).collect();
        match store.is_input(project, &jobs, digest).await.map_err(status::store)? {
            true => Ok(()),
            false => Err(absent("artifact", digest.to_string())),
        }
    }

    /// Whether the caller may push on behalf of an attempt (of none, if none is given): a worker for attempts of its own and for
    /// nothing else, and nobody but a worker for any attempt.
    pub(crate) async fn may_push(
        &self,
        store: &Store,
        project: &Project,
        attempt: Option<(&JobId, Epoch, &WorkerId)>,
        has_tags: bool,
    ) -> Result<(), Status> {
        let denied = |message: &str| Err(Class::PermissionDenied.status(message));
        if self.id().is_none() {
            return Ok(());
        }
        let (owner, (job, epoch, worker)) = match (self.owner(), attempt) {
            (None, None) => return Ok(()),
            (None, Some(_)) => return denied("only the worker of an attempt pushes on its behalf"),
            (Some(_), None) => return denied("a worker pushes only on behalf of an attempt"),
            (Some(_), Some(_)) if has_tags => return denied("a worker moves no tags; the job's move when it succeeds"),
            (Some(owner), Some(attempt)) => (owner, attempt),
        };
        let is_own = store.owner(worker).await.map_err(status::store)?.is_some_and(|of| of == owner);
        let attempts = store.attempts(project, job).await.map_err(status::store)?;
        let is_there = attempts.iter().any(|row| row.epoch == epoch && row.workers.contains(worker));
        if is_own && is_there {
            return Ok(());
        }
        let (what, name) = ("job", job.to_string());
        Err(status::store(attune_store::Error::NotFound { what, name, project: project.to_string() }))
    }
}
