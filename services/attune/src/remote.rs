//! The server that a command speaks to.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use attune_artifacts::Cache;
use attune_proto::client::Options;
use attune_proto::convert::id;
use attune_proto::words::Word as _;
use attune_proto::{Client, v1};
use attune_spec::id::{Digest, Project};
use attune_spec::job::Reference;
use attune_worker::transfer::Remote;

use crate::print::Failure;

/// Where a server listens if nobody says otherwise.
pub(crate) const DEFAULT_ADDRESS: &str = "127.0.0.1:7070";

/// Which server, and for whom.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Server {
    /// Address of the server; several with commas between where schedulers stand by for one another.
    #[arg(long, global = true, value_name = "URL[,URL…]", env = "ATTUNE_SERVER", help_heading = "Global options")]
    #[arg(default_value_t = format!("http://{DEFAULT_ADDRESS}"))]
    pub(crate) server: String,
    /// The project that jobs and artifacts belong to.
    #[arg(long, global = true, value_name = "NAME", env = "ATTUNE_PROJECT", help_heading = "Global options")]
    #[arg(default_value_t = Project::default())]
    pub(crate) project: Project,
}

impl Server {
    /// A client of the server.
    pub(crate) async fn connect(&self) -> Result<Client, Failure> {
        let options = Options { project: self.project.clone(), ..Options::default() };
        Client::connect(&self.server, options).await.map_err(|error| {
            let unreachable = matches!(error, attune_proto::client::ConnectError::Unreachable { .. });
            let failure = Failure::failed(error.to_string());
            if unreachable {
                failure.with_hint("start one with `attune up`, or name another with --server URL")
            } else {
                Failure { status: crate::print::USAGE, ..failure }
            }
        })
    }
}

/// Runs the asynchronous part of a command.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("no runtime can be started: {error}")))?;
    runtime.block_on(work)
}

/// An artifact by digest or tag.
pub(crate) async fn artifact(client: &Client, reference: &str) -> Result<v1::Artifact, Failure> {
    let asked = v1::GetArtifactRequest { project: client.project().to_string(), reference: reference.to_owned() };
    let client = client.clone();
    let ask = || {
        let (mut artifacts, asked) = (client.artifacts(), client.request(asked.clone()));
        async move { artifacts.get_artifact(asked).await }
    };
    client.retrying(ask).await?.artifact.ok_or_else(|| Failure::failed("the server's answer holds no artifact"))
}

/// The digest of an artifact that a server named.
pub(crate) fn digest(text: &str) -> Result<Digest, Failure> {
    id::field("digest", text).map_err(|fault| Failure::failed(fault.to_string()))
}

/// A model, adapter or data file by path, digest or tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// On this machine.
    Local(PathBuf),
    /// On the server.
    Stored(String),
}

impl FromStr for Place {
    type Err = String;

    /// A text that names something on this machine is that; otherwise it is read as a job file would.
    fn from_str(text: &str) -> Result<Self, String> {
        if Path::new(text).try_exists().unwrap_or(false) {
            return Ok(Self::Local(PathBuf::from(text)));
        }
        match text.parse::<Reference>() {
            Ok(Reference::Path(path)) => Ok(Self::Local(PathBuf::from(path))),
            Ok(reference @ (Reference::Digest(_) | Reference::Tag(_))) => Ok(Self::Stored(reference.to_string())),
            Ok(Reference::Url(url)) => Err(format!("{url} is an object; expected a folder, a digest or a tag")),
            Ok(stage @ Reference::Stage { .. }) => Err(format!("{stage} means something in a recipe only")),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The folder of a place: itself, or the copy in this user's cache of a stored artifact that must be of `kind`.
pub(crate) async fn folder(place: &Place, kind: v1::ArtifactKind, server: &Server) -> Result<PathBuf, Failure> {
    match place {
        Place::Local(_) => local(place),
        Place::Stored(_) => fetch(&server.connect().await?, place, kind, &cache_folder()?).await,
    }
}

fn local(place: &Place) -> Result<PathBuf, Failure> {
    match place {
        Place::Local(path) if path.is_dir() => Ok(path.clone()),
        Place::Local(path) => Err(Failure::usage(format!("{}: there is no such folder", path.display()))),
        Place::Stored(reference) => Err(Failure::usage(format!("{reference} is not a folder on this machine"))),
    }
}

/// The folder of a place: itself, or the copy in `cache` of a stored artifact that must be of `kind`, fetched if it is not
/// there.
pub(crate) async fn fetch(
    client: &Client,
    place: &Place,
    kind: v1::ArtifactKind,
    cache: &Path,
) -> Result<PathBuf, Failure> {
    let Place::Stored(reference) = place else { return local(place) };
    let found = artifact(client, reference).await?;
    if found.kind() != kind {
        let (is, expected) = (found.kind().word(), kind.word());
        return Err(Failure::usage(format!("{reference} is of kind {is}; expected {expected}")));
    }
    let digest = digest(&found.digest)?;
    let cache = Cache::open(cache).await?;
    let cached = cache.fetch(client.project(), &digest, &Remote::new(client.clone())).await?;
    Ok(cached.dir().to_owned())
}

/// Where this user's copies of artifacts are kept.
pub(crate) fn cache_folder() -> Result<PathBuf, Failure> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("ATTUNE_CACHE")
        .or_else(|| of("XDG_CACHE_HOME").map(|folder| folder.join("attune")))
        .or_else(|| of("HOME").map(|folder| folder.join(".cache/attune")))
        .ok_or_else(|| Failure::usage("there is no home folder to keep artifacts in; set ATTUNE_CACHE to a folder"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_here_or_there() {
        assert_eq!("./nowhere".parse(), Ok(Place::Local("./nowhere".into())));
        assert_eq!("src".parse(), Ok(Place::Local("src".into())));
        assert_eq!("demo-base:latest".parse(), Ok(Place::Stored("demo-base:latest".to_owned())));
        assert!("s3://bucket/model".parse::<Place>().is_err());
    }
}
