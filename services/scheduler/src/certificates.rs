//! What connections are encrypted with: read from files, and read again when these change.
//!
//! A connection keeps what it was made with. Files that cannot be used, as they may be while somebody writes them, change nothing.

use std::io::Error as IoError;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use attune_proto::client::ends_soon;
use futures::{Stream, StreamExt as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::clock::Clock;
use crate::config::Tls;
use crate::error::Error;

/// The protocol that is spoken behind the handshake.
const PROTOCOL: &[u8] = b"h2";

/// What new connections are encrypted with.
pub(crate) struct Certificates {
    files: Tls,
    current: RwLock<Arc<ServerConfig>>,
}

impl Certificates {
    /// Reads the files.
    ///
    /// # Errors
    /// [`Error::Tls`] when no connection can be made with them.
    pub(crate) async fn open(files: &Tls) -> Result<Self, Error> {
        let seen = Seen::read(files).await.map_err(Error::Tls)?;
        let config = seen.config().map_err(Error::Tls)?;
        Ok(Self { files: files.clone(), current: RwLock::new(Arc::new(config)) })
    }

    /// Looks at the files again and again, as often as `interval` says.
    pub(crate) async fn keep(self: Arc<Self>, interval: Duration) {
        // What was read at the start is read once more, which does no harm.
        let (mut last, mut told) = (None, None);
        loop {
            tokio::time::sleep(interval).await;
            let read = Seen::read(&self.files).await;
            let ends = read.as_ref().ok().and_then(Seen::ends_soon);
            if let Some(when) = ends.as_ref().filter(|when| told.as_ref() != Some(*when)) {
                let certificate = self.files.certificate.display();
                tracing::warn!(%certificate, when, "a certificate ends soon; put a renewed one in its place");
            }
            told = ends;
            if last.as_ref() == Some(&read) {
                continue;
            }
            match read.as_ref().map_err(Clone::clone).and_then(Seen::config) {
                Ok(config) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                    if last.is_some() {
                        tracing::info!(certificate = %self.files.certificate.display(), "new connections use renewed certificates");
                    }
                }
                Err(why) => {
                    tracing::error!(
                        why,
                        "certificates have changed and cannot be used; new connections use the old ones"
                    );
                }
            }
            last = Some(read);
        }
    }

    /// Connections behind their handshakes. One whose handshake fails or takes longer than `patience` is dropped; `at_once` of
    /// them may be in it.
    pub(crate) fn encrypt<C>(
        self: Arc<Self>,
        connections: impl Stream<Item = std::io::Result<C>>,
        patience: Duration,
        at_once: usize,
    ) -> impl Stream<Item = std::io::Result<TlsStream<C>>>
    where
        C: AsyncRead + AsyncWrite + Unpin,
    {
        let shaken = connections.map(move |connection| {
            let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
            async move {
                let late = || IoError::new(std::io::ErrorKind::TimedOut, "the handshake took too long");
                tokio::time::timeout(patience, TlsAcceptor::from(config).accept(connection?))
                    .await
                    .map_err(|_| late())?
            }
        });
        shaken.buffer_unordered(at_once.max(1)).filter_map(|shaken| {
            std::future::ready(match shaken {
                Ok(stream) => Some(Ok(stream)),
                Err(error) => {
                    tracing::debug!(%error, "no encrypted connection came about");
                    None
                }
            })
        })
    }
}

/// The files as they were read.
#[derive(PartialEq, Eq)]
struct Seen {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Seen {
    /// What is to be said of when the first of the certificates ends, if it is soon.
    fn ends_soon(&self) -> Option<String> {
        let now = Clock::utc().0 / 1000;
        let of = |pem: &Vec<u8>| ends_soon(std::str::from_utf8(pem).ok()?, now);
        of(&self.certificate).or_else(|| self.client_ca.as_ref().and_then(of))
    }

    async fn read(files: &Tls) -> Result<Self, String> {
        Ok(Self {
            certificate: read(&files.certificate).await?,
            key: read(&files.key).await?,
            client_ca: match &files.client_ca {
                Some(file) => Some(read(file).await?),
                None => None,
            },
        })
    }

    /// What connections are made with; why none can be. No bytes of the key are said.
    fn config(&self) -> Result<ServerConfig, String> {
        let failed = |error: rustls::Error| error.to_string();
        let chain = certificates(&self.certificate, "the certificate")?;
        let key =
            PrivateKeyDer::from_pem_slice(&self.key).map_err(|_| "the key is no private key as PEM".to_owned())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions().map_err(failed)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(pem, "the authorities of clients")? {
                    roots.add(authority).map_err(failed)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| error.to_string())?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(config)
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    tokio::fs::read(path).await.map_err(|error| format!("{}: {error}", path.display()))
}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!("{what} is empty; expected PEM with a line \"-----BEGIN CERTIFICATE-----\"")),
        Err(error) => Err(format!("{what} cannot be read as PEM: {error}")),
    }
}
