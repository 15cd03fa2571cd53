//! Where a server is, and what an encrypted connection to it is made with.

use std::path::PathBuf;
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::Secret;
use crate::certificate::ends_soon;
use crate::client::Options;

/// What an encrypted connection is made with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificates of the authorities that may vouch for a server, as PEM; those of the system without.
    pub ca: Option<String>,
    /// The certificate that this client shows, as PEM with its chain, and its key.
    pub identity: Option<(String, Secret)>,
    /// Where these were read from, if they may be renewed there.
    pub files: TlsFiles,
}

/// The files of a [`Tls`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Of its authorities.
    pub ca: Option<PathBuf>,
    /// Of its certificate and that one's key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl TlsFiles {
    /// What is in them now.
    ///
    /// # Errors
    /// One that cannot be read, or that holds something else, by its name.
    pub(crate) async fn read(&self) -> Result<Tls, String> {
        let read = async |path: &PathBuf, mark: &str| {
            let text = tokio::fs::read_to_string(path).await.map_err(|error| format!("{}: {error}", path.display()))?;
            let is_whole = text.contains(mark);
            if is_whole { Ok(text) } else { Err(format!("{} has no line with {mark:?}", path.display())) }
        };
        const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
        let ca = match &self.ca {
            Some(path) => Some(read(path, CERTIFICATE).await?),
            None => None,
        };
        let identity = match &self.identity {
            Some((certificate, key)) => {
                Some((read(certificate, CERTIFICATE).await?, Secret::new(read(key, "PRIVATE KEY-----").await?)))
            }
            None => None,
        };
        Ok(Tls { ca, identity, files: self.clone() })
    }
}

impl Tls {
    /// [`ends_soon`] of the certificate that this client shows.
    pub fn ends_soon(&self, now: i64) -> Option<String> {
        self.identity.as_ref().and_then(|(certificate, _)| ends_soon(certificate, now))
    }

    fn is_given(&self) -> bool {
        self.ca.is_some() || self.identity.is_some()
    }
}

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address cannot be one.
    #[error("server {url:?} is not a URL such as http://127.0.0.1:7070")]
    Url {
        /// What was given.
        url: String,
    },
    /// Something for encrypted connections is given, and the address asks for one in the clear.
    #[error(
        "server {url:?} is reached in the clear, and a certificate is given; expected a URL that begins with https://"
    )]
    Clear {
        /// What was given.
        url: String,
    },
    /// No encrypted connection can be made with what is given.
    #[error("no encrypted connection can be made to {url}: {reason}")]
    Tls {
        /// The address.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Nobody answers there.
    #[error("no server answers at {url}: {reason}")]
    Unreachable {
        /// The address.
        url: String,
        /// The deepest cause.
        reason: String,
    },
}

/// Where a server is, and how it is reached.
pub(crate) fn endpoint(url: &str, options: &Options) -> Result<Endpoint, ConnectError> {
    let bad = || ConnectError::Url { url: url.to_owned() };
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|_| bad())?;
    let endpoint = match (endpoint.uri().scheme_str(), endpoint.uri().host()) {
        // Whoever names an authority means to speak to nobody else.
        (Some("http"), Some(_)) if options.tls.is_given() => return Err(ConnectError::Clear { url: url.to_owned() }),
        (Some("http"), Some(_)) => endpoint,
        (Some("https"), Some(_)) => {
            let failed = |reason| ConnectError::Tls { url: url.to_owned(), reason };
            endpoint.tls_config(tls(&options.tls, options.connect_timeout)).map_err(|error| failed(deepest(&error)))?
        }
        _ => return Err(bad()),
    };
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(15))
        .keep_alive_timeout(Duration::from_secs(20)))
}

fn tls(given: &Tls, timeout: Duration) -> ClientTlsConfig {
    let mut config = ClientTlsConfig::new().timeout(timeout);
    config = match &given.ca {
        Some(ca) => config.ca_certificate(Certificate::from_pem(ca)),
        None => config.with_native_roots(),
    };
    match &given.identity {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key.expose())),
        None => config,
    }
}

/// The deepest cause of an error.
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
