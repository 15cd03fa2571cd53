//! A thin typed client of the services: where the server is, for which project one speaks, who one is, deadlines, retries of
//! calls that are safe to retry, and the two streams that carry an artifact's bytes.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tonic_types::StatusExt as _;

pub use crate::certificate::ends_soon;
pub use crate::endpoint::{ConnectError, Tls, TlsFiles};
use crate::endpoint::{deepest, endpoint};
use crate::v1::{
    self, artifact_service_client::ArtifactServiceClient, audit_service_client::AuditServiceClient,
    fleet_service_client::FleetServiceClient, job_service_client::JobServiceClient,
    method_service_client::MethodServiceClient, token_service_client::TokenServiceClient,
    worker_service_client::WorkerServiceClient,
};
use crate::{CHUNK_BYTES_MAX, Class, MESSAGE_BYTES_MAX, Retry, Secret};

/// Largest number of digests in one question for missing blobs.
const QUERY_DIGESTS_MAX: usize = 10_000;

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// The project that it speaks for.
    pub project: Project,
    /// Longest time until a connection stands.
    pub connect_timeout: Duration,
    /// Longest time of one unary call.
    pub call_timeout: Duration,
    /// How often a call that is safe to retry is made again when the server cannot answer now.
    pub retries: u32,
    /// Wait before the first retry; doubles with each.
    pub retry_wait: Duration,
    /// What is sent with every call to prove who it is that calls.
    pub token: Option<Secret>,
    /// Whom to trust, and how to prove who one is, where a server's URL begins with `https://`.
    pub tls: Tls,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            project: Project::default(),
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(60),
            retries: 4,
            retry_wait: Duration::from_millis(200),
            token: None,
            tls: Tls::default(),
        }
    }
}

/// A client. Cheap to clone; clones share connections.
///
/// It may know several servers, as where one scheduler leads and others follow. It speaks to one until that cannot answer, and then to the
/// next.
#[derive(Debug, Clone)]
pub struct Client {
    servers: Arc<Servers>,
    options: Arc<Options>,
    bearer: Bearer,
}

#[derive(Debug)]
struct Servers {
    urls: String,
    channels: RwLock<Vec<Channel>>,
    /// What new connections are made with.
    tls: Mutex<Tls>,
    /// Which one is spoken to, counted on with each turn.
    at: AtomicUsize,
}

/// Puts the credential beside every call. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Bearer(Arc<RwLock<Option<MetadataValue<Ascii>>>>);

impl Bearer {
    fn show(&self, token: Option<&Secret>) {
        let value = token.and_then(|token| {
            let mut value = MetadataValue::try_from(format!("Bearer {}", token.expose())).ok()?;
            // Whoever shows the headers of a call does not show this one.
            value.set_sensitive(true);
            Some(value)
        });
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A connection that says with every call who calls.
pub type Line = InterceptedService<Channel, Bearer>;

/// The blobs of an artifact that is pushed, by digest.
pub trait Blobs: Send + Sync {
    /// The bytes of a blob from `start` on, in pieces of any size.
    fn open(&self, digest: &Digest, start: u64) -> BoxStream<'static, Result<Bytes, String>>;
}

/// An artifact to push.
#[derive(Debug, Clone, Default)]
pub struct Push {
    /// The manifest file.
    pub manifest: Bytes,
    /// The digests of its blobs, without repetition.
    pub blobs: Vec<Digest>,
    /// The attempt on whose behalf it is committed.
    pub attempt: Option<v1::AttemptCommit>,
    /// Tags that move to it.
    pub tags: Vec<String>,
}

impl Client {
    /// A client of the servers at `urls`, separated by commas, which need not be up yet: connections are made when they are needed.
    ///
    /// # Errors
    /// [`ConnectError::Url`]. Must be called within a tokio runtime.
    pub fn lazy(urls: &str, options: Options) -> Result<Self, ConnectError> {
        Ok(Self::of(urls, channels(urls, &options)?, 0, options))
    }

    /// A client that speaks to the server at this place first.
    fn of(urls: &str, channels: Vec<Channel>, at: usize, options: Options) -> Self {
        let (channels, tls) = (RwLock::new(channels), Mutex::new(options.tls.clone()));
        let servers = Servers { urls: urls.to_owned(), channels, tls, at: AtomicUsize::new(at) };
        let bearer = Bearer::default();
        bearer.show(options.token.as_ref());
        Self { servers: Arc::new(servers), options: Arc::new(options), bearer }
    }

    /// A client of the servers at `urls`, separated by commas, connected to the first that answers.
    ///
    /// # Errors
    /// [`ConnectError`]; that of the last one if none answers.
    pub async fn connect(urls: &str, options: Options) -> Result<Self, ConnectError> {
        let mut channels = channels(urls, &options)?;
        let mut unreachable = None;
        for (at, url) in urls.split(',').map(str::trim).enumerate() {
            match endpoint(url, &options)?.connect().await {
                Ok(channel) => {
                    channels[at] = channel;
                    return Ok(Self::of(urls, channels, at, options));
                }
                Err(error) => {
                    unreachable = Some(ConnectError::Unreachable { url: url.to_owned(), reason: deepest(&error) });
                }
            }
        }
        unreachable.map_or_else(|| Ok(Self::of(urls, channels, 0, options)), Err)
    }

    /// Speaks to the next server from now on, where there are several.
    pub fn turn(&self) {
        self.servers.at.fetch_add(1, Ordering::Relaxed);
    }

    /// The connection to the server that is spoken to now; what goes by it carries no credential of this client.
    pub fn channel(&self) -> Channel {
        let channels = self.servers.channels.read().unwrap_or_else(PoisonError::into_inner);
        channels[self.servers.at.load(Ordering::Relaxed) % channels.len()].clone()
    }

    /// Proves who calls by another token from now on; so do the clones of this client.
    pub fn present(&self, token: &Secret) {
        self.bearer.show(Some(token));
    }

    /// What new connections are made with.
    pub fn tls(&self) -> Tls {
        self.servers.tls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files again that certificates are from; whether they are others. Then new connections are made with those, by the
    /// clones of this client as well; what goes on goes on. Files that cannot be used change nothing.
    ///
    /// # Errors
    /// [`ConnectError::Tls`] if they cannot be.
    pub async fn renew(&self) -> Result<bool, ConnectError> {
        let before = self.tls();
        if before.files == TlsFiles::default() {
            return Ok(false);
        }
        let urls = &self.servers.urls;
        let failed = |reason| ConnectError::Tls { url: urls.clone(), reason };
        let tls = before.files.read().await.map_err(failed)?;
        if tls == before {
            return Ok(false);
        }
        let renewed = channels(urls, &Options { tls: tls.clone(), ..(*self.options).clone() })?;
        *self.servers.channels.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        *self.servers.tls.lock().unwrap_or_else(PoisonError::into_inner) = tls;
        Ok(true)
    }

    /// The project that this client speaks for.
    pub fn project(&self) -> &Project {
        &self.options.project
    }

    /// The same connection, for another project.
    #[must_use]
    pub fn for_project(&self, project: Project) -> Self {
        let options = Options { project, ..(*self.options).clone() };
        Self { servers: Arc::clone(&self.servers), options: Arc::new(options), bearer: self.bearer.clone() }
    }

    /// Jobs.
    pub fn jobs(&self) -> JobServiceClient<Line> {
        JobServiceClient::with_interceptor(self.channel(), self.bearer.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Artifacts.
    pub fn artifacts(&self) -> ArtifactServiceClient<Line> {
        ArtifactServiceClient::with_interceptor(self.channel(), self.bearer.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The fleet and its projects.
    pub fn fleet(&self) -> FleetServiceClient<Line> {
        FleetServiceClient::with_interceptor(self.channel(), self.bearer.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Methods.
    pub fn methods(&self) -> MethodServiceClient<Line> {
        MethodServiceClient::with_interceptor(self.channel(), self.bearer.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The workers' stream.
    pub fn workers(&self) -> WorkerServiceClient<Line> {
        WorkerServiceClient::with_interceptor(self.channel(), self.bearer.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Tokens, and who the caller is.
    pub fn tokens(&self) -> TokenServiceClient<Line> {
        TokenServiceClient::with_interceptor(self.channel(), self.bearer.clone())
    }

    /// The audit log.
    pub fn audit(&self) -> AuditServiceClient<Line> {
        AuditServiceClient::with_interceptor(self.channel(), self.bearer.clone())
    }

    /// A request with this client's deadline for unary calls.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.options.call_timeout);
        request
    }

    /// Makes a call that is safe to retry, again while the server cannot answer now.
    ///
    /// # Errors
    /// The last status.
    pub async fn retrying<T, F>(&self, call: impl Fn() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut wait = self.options.retry_wait;
        for _ in 0..self.options.retries {
            match call().await {
                Err(status) if Class::of(&status).row().retry == Retry::Later => {
                    if status.code() == tonic::Code::Unavailable {
                        self.turn();
                    }
                    // A server that is asked too often says when to come again.
                    let told = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
                    tokio::time::sleep(wait.max(told.min(self.options.call_timeout))).await;
                }
                other => return other.map(tonic::Response::into_inner),
            }
            wait *= 2;
        }
        call().await.map(tonic::Response::into_inner)
    }

    /// The blobs of `digests` that the server does not have.
    ///
    /// # Errors
    /// The server's status.
    pub async fn missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, Status> {
        Ok(self.wanted(digests).await?.into_iter().map(|(digest, _)| digest).collect())
    }

    /// The blobs of `digests` that the server does not have, each with the number of its first bytes that it has.
    async fn wanted(&self, digests: &[Digest]) -> Result<Vec<(Digest, u64)>, Status> {
        let mut missing = Vec::new();
        for part in digests.chunks(QUERY_DIGESTS_MAX) {
            let asked = v1::QueryMissingBlobsRequest {
                project: self.project().to_string(),
                digests: part.iter().map(ToString::to_string).collect(),
            };
            let client = self.clone();
            let query = move || {
                let (mut artifacts, asked) = (client.artifacts(), client.request(asked.clone()));
                async move { artifacts.query_missing_blobs(asked).await }
            };
            let answer = self.retrying(query).await?;
            let kept = answer.kept_bytes.iter().copied().chain(std::iter::repeat(0));
            for (digest, kept) in answer.missing.iter().zip(kept) {
                let known = part.iter().find(|known| known.to_string() == *digest);
                let known = *known.ok_or_else(|| {
                    Class::Internal.status(format!("the server misses {digest:?}, which nobody asked about"))
                })?;
                missing.push((known, kept));
            }
        }
        Ok(missing)
    }

    /// Stores an artifact: sends the blobs that the server does not have. A push that is cut is made again, and sends what
    /// is still missing: of a large blob what the server has not kept. Tries that bring it no further are bounded.
    ///
    /// # Errors
    /// The server's status, or one of class [`Class::Aborted`] with what `blobs` says when it cannot be read.
    pub async fn push(&self, push: &Push, blobs: Arc<dyn Blobs>) -> Result<v1::PushArtifactResponse, Status> {
        let (mut left, mut wait, mut best) = (self.options.retries, self.options.retry_wait, None);
        loop {
            let wanted = self.wanted(&push.blobs).await?;
            let reached = (Reverse(wanted.len()), wanted.iter().map(|(_, kept)| kept).sum::<u64>());
            if best.is_none_or(|best| reached > best) {
                (left, wait, best) = (self.options.retries, self.options.retry_wait, Some(reached));
            }
            let broken: Arc<Mutex<Option<String>>> = Arc::default();
            let sent: BTreeSet<Digest> = wanted.iter().map(|(digest, _)| *digest).collect();
            let parts = parts(self.header(push), wanted, Arc::clone(&blobs), Arc::clone(&broken));
            let answer = self.artifacts().push_artifact(parts).await;
            if let Some(message) = broken.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Err(Class::Aborted.status(message));
            }
            match answer {
                Err(status) if left > 0 && (cut_short(&status) || self.is_swept(push, &sent, &status).await) => {
                    if status.code() == tonic::Code::Unavailable {
                        self.turn();
                    }
                    tokio::time::sleep(wait).await;
                    (left, wait) = (left - 1, wait * 2);
                }
                other => return other.map(tonic::Response::into_inner),
            }
        }
    }

    /// Whether a push was refused because blobs that were there when it began have gone since.
    async fn is_swept(&self, push: &Push, sent: &BTreeSet<Digest>, refused: &Status) -> bool {
        if Class::of(refused) != Class::Invalid {
            return false;
        }
        let missing = self.missing(&push.blobs).await.unwrap_or_default();
        missing.iter().any(|digest| !sent.contains(digest))
    }

    fn header(&self, push: &Push) -> v1::PushHeader {
        v1::PushHeader {
            project: self.project().to_string(),
            manifest: push.manifest.clone(),
            attempt: push.attempt.clone(),
            tags: push.tags.clone(),
        }
    }

    /// Starts reading the artifact `reference` (a digest or tag), or only its files `paths`; of those what comes from `from`
    /// on, a file and a byte of it, for a pull that was cut.
    ///
    /// # Errors
    /// The server's status; one of class [`Class::Internal`] if it does not begin with a header.
    pub async fn pull(
        &self,
        reference: &str,
        paths: &[String],
        from: Option<(&str, u64)>,
    ) -> Result<(v1::PullHeader, Streaming<v1::PullArtifactResponse>), Status> {
        use v1::pull_artifact_response::Part;
        let asked = v1::PullArtifactRequest {
            project: self.project().to_string(),
            reference: reference.to_owned(),
            paths: paths.to_vec(),
            from_path: from.map(|(path, _)| path.to_owned()).unwrap_or_default(),
            from_offset_bytes: from.map_or(0, |(_, byte)| byte),
        };
        let client = self.clone();
        let ask = move || {
            let (mut artifacts, asked) = (client.artifacts(), asked.clone());
            async move { artifacts.pull_artifact(asked).await }
        };
        let mut parts = self.retrying(ask).await?;
        match parts.message().await?.and_then(|message| message.part) {
            Some(Part::Header(header)) => Ok((header, parts)),
            _ => Err(Class::Internal.status("the server's stream does not begin with a header")),
        }
    }
}

/// Connections to servers, made when they are needed.
fn channels(urls: &str, options: &Options) -> Result<Vec<Channel>, ConnectError> {
    urls.split(',').map(|url| Ok(endpoint(url.trim(), options)?.connect_lazy())).collect()
}

/// Whether a stream of bytes ended for a reason that may be gone when it is begun again.
pub fn cut_short(status: &Status) -> bool {
    // A connection that is lost in the middle of a stream is told as a call that the other side gave up, or by words of HTTP/2.
    let class = Class::of(status);
    class.row().retry == Retry::Later && class != Class::QuotaExceeded
        || status.get_details_error_info().is_none() && matches!(class, Class::Cancelled | Class::Internal)
}

/// The messages of a push. A blob that cannot be read leaves its error in `broken` and ends the stream early; the server
/// refuses what is not whole.
fn parts(
    header: v1::PushHeader,
    wanted: Vec<(Digest, u64)>,
    blobs: Arc<dyn Blobs>,
    broken: Arc<Mutex<Option<String>>>,
) -> Parts {
    use v1::push_artifact_request::Part;
    let chunks =
        stream::iter(wanted).flat_map(move |(digest, start)| chunks(digest, start, blobs.open(&digest, start)));
    let chunks = chunks.scan((), move |(), chunk| {
        let chunk = chunk.map_err(|message| *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(message));
        std::future::ready(chunk.ok())
    });
    let all = stream::iter([Part::Header(header)]).chain(chunks.map(Part::Chunk));
    Parts(all.map(|part| v1::PushArtifactRequest { part: Some(part) }).boxed())
}

/// A boxed stream under a name of its own: the compiler cannot see that a call with the bare box may move between threads.
struct Parts(BoxStream<'static, v1::PushArtifactRequest>);

impl Stream for Parts {
    type Item = v1::PushArtifactRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

/// The pieces of a blob from `start` on, cut to the largest size of a chunk; an empty blob is one empty chunk.
fn chunks(
    digest: Digest,
    start: u64,
    pieces: BoxStream<'static, Result<Bytes, String>>,
) -> BoxStream<'static, Result<v1::BlobChunk, String>> {
    let name = digest.to_string();
    let cut = pieces.flat_map(|piece| match piece {
        Ok(mut piece) => {
            let mut parts = Vec::new();
            while !piece.is_empty() {
                parts.push(Ok(piece.split_to(piece.len().min(CHUNK_BYTES_MAX))));
            }
            stream::iter(parts).boxed()
        }
        Err(message) => stream::iter([Err(message)]).boxed(),
    });
    let numbered = cut.scan(start, {
        let name = name.clone();
        move |offset, piece| {
            let chunk = piece.map(|data| {
                let at = *offset;
                *offset += data.len() as u64;
                v1::BlobChunk { digest: name.clone(), offset_bytes: at, data }
            });
            std::future::ready(Some(chunk))
        }
    });
    // The digest of no bytes is known: such a blob has no pieces but must be mentioned.
    if digest == Digest::from_bytes(*blake3::hash(b"").as_bytes()) {
        let empty = v1::BlobChunk { digest: name, offset_bytes: 0, data: Bytes::new() };
        return stream::iter([Ok(empty)]).boxed();
    }
    numbered.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(digest: Digest, pieces: Vec<Result<Bytes, String>>) -> Vec<Result<(u64, usize), String>> {
        let all = chunks(digest, 0, stream::iter(pieces).boxed()).collect::<Vec<_>>().await;
        all.into_iter().map(|chunk| chunk.map(|chunk| (chunk.offset_bytes, chunk.data.len()))).collect()
    }

    #[tokio::test]
    async fn pieces_are_cut_and_numbered() {
        let digest = Digest::from_bytes([1; 32]);
        let big = Bytes::from(vec![7; CHUNK_BYTES_MAX + 5]);
        let found = collect(digest, vec![Ok(Bytes::from_static(b"abc")), Ok(big), Err("gone".to_owned())]).await;
        let end = 3 + CHUNK_BYTES_MAX as u64;
        assert_eq!(found, [Ok((0, 3)), Ok((3, CHUNK_BYTES_MAX)), Ok((end, 5)), Err("gone".to_owned())]);
    }

    #[tokio::test]
    async fn an_empty_blob_is_mentioned() {
        let digest = Digest::from_bytes(*blake3::hash(b"").as_bytes());
        assert_eq!(collect(digest, Vec::new()).await, [Ok((0, 0))]);
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_one_is_refused_and_a_silent_one_is_named() {
        for bad in ["", "not a url", "127.0.0.1:7070", "http://", "ftp://127.0.0.1:7070"] {
            assert!(matches!(Client::lazy(bad, Options::default()), Err(ConnectError::Url { .. })), "{bad}");
        }
        let tls = Tls { ca: Some("no certificate".to_owned()), ..Tls::default() };
        let options = Options { tls, ..Options::default() };
        let error = Client::lazy("http://127.0.0.1:7070", options).unwrap_err();
        assert!(matches!(error, ConnectError::Clear { .. }), "{error}");
        let error = Client::connect("http://127.0.0.1:1", Options::default()).await.unwrap_err();
        assert!(error.to_string().starts_with("no server answers at http://127.0.0.1:1: "), "{error}");
    }
}
