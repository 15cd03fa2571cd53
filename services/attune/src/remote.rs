//! The server that a command speaks to.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use attune_artifacts::Cache;
use attune_proto::client::{Options, Tls, TlsFiles};
use attune_proto::convert::id;
use attune_proto::words::Word as _;
use attune_proto::{Client, Secret, v1};
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
    /// The project that jobs and artifacts belong to; that of the token, or `default`, if it is left out.
    #[arg(long, global = true, value_name = "NAME", env = "ATTUNE_PROJECT", help_heading = "Global options")]
    pub(crate) project: Option<Project>,
    /// The token that proves who calls. Other users of this machine see it here: --token-file hides it, and so does the variable.
    #[arg(long, global = true, value_name = "TOKEN", env = "ATTUNE_TOKEN", help_heading = "Global options")]
    #[arg(hide_env_values = true, value_parser = unseen)]
    token: Option<Secret>,
    /// A file that holds the token; read unless a token is given itself.
    #[arg(long, global = true, value_name = "FILE", env = "ATTUNE_TOKEN_FILE", help_heading = "Global options")]
    token_file: Option<PathBuf>,
    /// Certificates of the authorities that may vouch for the server (PEM); those of the system if it is left out.
    #[arg(long, global = true, value_name = "FILE", env = "ATTUNE_CA", help_heading = "Global options")]
    ca: Option<PathBuf>,
    /// The certificate to show to a server that asks for one (PEM, with its chain).
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "ATTUNE_CERT",
        requires = "key",
        help_heading = "Global options"
    )]
    cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "ATTUNE_KEY",
        requires = "cert",
        help_heading = "Global options"
    )]
    key: Option<PathBuf>,
}

/// Takes a secret as it is: whatever is wrong with it is said later, without it.
fn unseen(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text))
}

/// The text of a file.
pub(crate) fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::file(path, &error))
}

/// The certificates of a file of PEM.
pub(crate) fn certificates(path: &Path) -> Result<String, Failure> {
    pem(path, "-----BEGIN CERTIFICATE-----", "certificate")
}

/// The private key of a file of PEM.
pub(crate) fn key(path: &Path) -> Result<Secret, Failure> {
    pem(path, "PRIVATE KEY-----", "private key").map(Secret::new)
}

fn pem(path: &Path, mark: &str, what: &str) -> Result<String, Failure> {
    let text = read(path)?;
    if text.contains(mark) {
        return Ok(text);
    }
    Err(Failure::usage(format!("{} holds no {what}; expected one as PEM, with a line {mark:?} in it", path.display())))
}

impl Server {
    /// A server that asks nobody who calls.
    pub(crate) fn at(url: &str) -> Self {
        let (server, project) = (url.to_owned(), None);
        Self { server, project, token: None, token_file: None, ca: None, cert: None, key: None }
    }

    /// How the server is reached, and who calls.
    pub(crate) fn options(&self) -> Result<Options, Failure> {
        let (from, token) = match (&self.token, &self.token_file) {
            (Some(token), _) => ("the token".to_owned(), Some(token.expose().to_owned())),
            (None, Some(path)) => (path.display().to_string(), Some(read(path)?)),
            (None, None) => (String::new(), None),
        };
        let token = token.map(|text| text.parse::<Secret>()).transpose();
        let token = token.map_err(|what| Failure::usage(format!("{from} {what}")))?;
        let (project, tls) = (self.project.clone().unwrap_or_default(), self.tls()?);
        Ok(Options { project, token, tls, ..Options::default() })
    }

    /// What encrypted connections are made with.
    pub(crate) fn tls(&self) -> Result<Tls, Failure> {
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((certificates(cert)?, self::key(key)?)),
            _ => None,
        };
        let files = TlsFiles { ca: self.ca.clone(), identity: self.cert.clone().zip(self.key.clone()) };
        Ok(Tls { ca: self.ca.as_deref().map(certificates).transpose()?, identity, files })
    }

    /// The file that holds the token, if it is from there.
    pub(crate) fn token_file(&self) -> Option<&Path> {
        self.token_file.as_deref().filter(|_| self.token.is_none())
    }

    /// A client of the server.
    pub(crate) async fn connect(&self) -> Result<Client, Failure> {
        let options = self.options()?;
        let has_token = options.token.is_some();
        let client = Client::connect(&self.server, options).await.map_err(|error| {
            let unreachable = matches!(error, attune_proto::client::ConnectError::Unreachable { .. });
            let failure = Failure::failed(error.to_string());
            if unreachable && self.server.starts_with("https://") {
                failure.with_hint("is it up, and does --ca FILE name the authority that vouches for it?")
            } else if unreachable {
                failure.with_hint("start one with `attune up`, or name another with --server URL")
            } else {
                Failure { status: crate::print::USAGE, ..failure }
            }
        })?;
        if self.project.is_some() || !has_token {
            return Ok(client);
        }
        // Whose the token is, the server knows.
        let caller = caller(&client).await?;
        match caller.project.as_str() {
            "" => Ok(client),
            project => {
                let project = id::project(project).map_err(|fault| Failure::failed(fault.to_string()))?;
                Ok(client.for_project(project))
            }
        }
    }
}

/// Who the server says that calls.
pub(crate) async fn caller(client: &Client) -> Result<v1::GetCallerResponse, Failure> {
    let client = client.clone();
    let ask = || {
        let (mut tokens, asked) = (client.tokens(), client.request(v1::GetCallerRequest::default()));
        async move { tokens.get_caller(asked).await }
    };
    Ok(client.retrying(ask).await?)
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

/// The folders of a base and of adapters on it.
pub(crate) fn folders<'p>(
    base: &Place,
    adapters: impl IntoIterator<Item = &'p Place>,
    server: &Server,
) -> Result<(PathBuf, Vec<PathBuf>), Failure> {
    block_on(async {
        let base = folder(base, v1::ArtifactKind::Model, server).await?;
        let mut found = Vec::new();
        for adapter in adapters {
            found.push(folder(adapter, v1::ArtifactKind::Adapter, server).await?);
        }
        Ok((base, found))
    })
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
