//! Moving artifacts between a folder and the artifact service, checked at both ends.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use attune_artifacts::{self as artifacts, BlobRef, Bundle, Causes, Kind, Manifest, Unpack};
use attune_proto::client::{Blobs, Push, cut_short};
use attune_proto::{Class, Client, Retry, v1};
use attune_spec::Fault;
use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use tokio::time::Instant;
use tonic::Status;

/// How long a pull tries to go on, while not one byte more comes, unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(30);
/// First and longest wait before a pull goes on.
const WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The artifact service as a source of artifacts. A pull that is cut goes on from the byte where it was.
#[derive(Debug, Clone)]
pub struct Remote {
    client: Client,
    patience: Duration,
}

impl Remote {
    /// A source behind `client`.
    pub fn new(client: Client) -> Self {
        Self { client, patience: PATIENCE }
    }

    /// The same, which gives up when nothing has come for `patience`.
    #[must_use]
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Takes what comes, from where `into` is, until the end or a cut.
    async fn go_on(&self, client: &Client, digest: &Digest, into: &mut Unpack) -> Result<(), Cut> {
        use v1::pull_artifact_response::Part;
        let what = digest.to_string();
        let from = into.place();
        if into.has_begun() && from.is_none() {
            // The cut came after the last byte.
            return Ok(());
        }
        let from = from.as_ref().map(|(path, byte)| (path.as_str(), *byte));
        let (header, mut parts) = client.pull(&what, &[], from).await.map_err(Cut::Status)?;
        if from.is_none() {
            into.begin(Arc::new(Manifest::parse(&header.manifest)?)).await?;
        }
        let mut first = from.map(|(_, byte)| byte);
        while let Some(message) = parts.message().await.map_err(Cut::Status)? {
            let Some(Part::Chunk(chunk)) = message.part else {
                return Err(Cut::Status(Class::Internal.status("a second header came in the middle of the files")));
            };
            if let Some(expected) = first.take()
                && chunk.offset_bytes != expected
            {
                let message = format!("the pull goes on at byte {} instead of {expected}", chunk.offset_bytes);
                return Err(Cut::Status(Class::Internal.status(message)));
            }
            into.write(&chunk.path, chunk.data).await?;
        }
        Ok(())
    }
}

/// Why a pull came to no end.
enum Cut {
    Status(Status),
    Local(artifacts::Error),
}

impl From<artifacts::Error> for Cut {
    fn from(error: artifacts::Error) -> Self {
        Self::Local(error)
    }
}

#[async_trait]
impl artifacts::Source for Remote {
    async fn pull(&self, project: &Project, digest: &Digest, into: &mut Unpack) -> artifacts::Result<()> {
        let client = self.client.for_project(project.clone());
        let (mut give_up, mut wait, mut place) = (Instant::now() + self.patience, WAIT.0, into.place());
        loop {
            let status = match self.go_on(&client, digest, into).await {
                Ok(()) => return Ok(()),
                Err(Cut::Local(error)) => return Err(error),
                Err(Cut::Status(status)) => status,
            };
            let now = into.place();
            if now != place {
                (give_up, wait, place) = (Instant::now() + self.patience, WAIT.0, now);
            }
            if !cut_short(&status) || Instant::now() >= give_up {
                return Err(error(&digest.to_string(), status));
            }
            tracing::warn!(%digest, place = ?place, error = status.message(), "a pull was cut; going on from there");
            if Class::of(&status) == Class::Unavailable {
                client.turn();
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(WAIT.1);
        }
    }
}

/// What a status of the artifact service means for `what` was moved.
fn error(what: &str, status: Status) -> artifacts::Error {
    let class = Class::of(&status);
    let place = "the server".to_owned();
    let doing = format!("{what}: {}", status.message());
    match class {
        Class::NotFound => artifacts::Error::NotFound { what: what.to_owned(), place },
        // Not the asker's fault, and another attempt may ask for something else.
        Class::Corrupt => artifacts::Error::Corrupt {
            what: what.to_owned(),
            place,
            expected: "bytes of the digests that its manifest names".to_owned(),
            found: status.message().to_owned(),
        },
        Class::StorageFull => artifacts::Error::Full { place, source: status.into() },
        Class::PermissionDenied | Class::Unauthenticated => {
            artifacts::Error::Denied { place, doing, source: status.into() }
        }
        _ if class.row().retry == Retry::Later => artifacts::Error::Unavailable { place, doing, source: status.into() },
        _ => artifacts::Error::Refused { what: what.to_owned(), faults: vec![Fault::new("", status.message())] },
    }
}

/// The files of a bundle as blobs of a push.
struct Files {
    bundle: Bundle,
    blobs: Vec<BlobRef>,
}

impl Blobs for Files {
    fn open(&self, digest: &Digest, start: u64) -> BoxStream<'static, Result<Bytes, String>> {
        let body = self
            .blobs
            .iter()
            .find(|blob| blob.digest == *digest)
            .ok_or_else(|| format!("no file has the digest {digest}"))
            .and_then(|blob| self.bundle.body_from(*blob, start).map_err(|error| error.to_string()));
        match body {
            Ok(body) => body.map(|piece| piece.map_err(|error| error.to_string())).boxed(),
            Err(message) => stream::iter([Err(message)]).boxed(),
        }
    }
}

/// Why a folder could not be stored as an artifact.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// What lies in the folder cannot be an artifact, or cannot be read.
    #[error(transparent)]
    Local(#[from] artifacts::Error),
    /// The server did not take it.
    #[error("{}", .0.message())]
    Server(#[from] Status),
}

impl PushError {
    /// Whether the same push may succeed later.
    pub fn retry(&self) -> bool {
        match self {
            Self::Local(error) => error.retry(),
            Self::Server(status) => Class::of(status).row().retry == Retry::Later,
        }
    }
}

/// What a pushed folder became.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// The artifact.
    pub artifact: v1::Artifact,
    /// Its digest.
    pub digest: Digest,
    /// Whether this push made it visible.
    pub created: bool,
    /// Hidden files and folders, which were left out.
    pub skipped: Vec<String>,
}

/// Stores what lies at `path` as an artifact of the client's project: only the blobs that the server does not have are
/// sent. With `attempt` it is committed on behalf of that attempt, under its epoch.
///
/// # Errors
/// [`PushError`].
pub async fn push(
    client: &Client,
    path: &Path,
    kind: Option<Kind>,
    causes: Causes,
    attempt: Option<v1::AttemptCommit>,
    tags: Vec<String>,
) -> Result<Pushed, PushError> {
    let bundle = Bundle::read(path, kind).await?;
    let manifest = bundle.manifest(causes)?;
    let blobs = manifest.blobs();
    let push = Push {
        manifest: manifest.bytes().clone(),
        blobs: blobs.iter().map(|blob| blob.digest).collect(),
        attempt,
        tags,
    };
    let skipped = bundle.skipped().to_vec();
    let answer = client.push(&push, Arc::new(Files { bundle, blobs })).await?;
    let artifact = answer.artifact.unwrap_or_default();
    Ok(Pushed { artifact, digest: manifest.digest(), created: answer.created, skipped })
}
