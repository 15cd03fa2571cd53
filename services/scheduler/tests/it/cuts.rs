//! Connections that are cut in the middle of a push or a pull, which go on where they were.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use attune_artifacts::{Causes, Kind};
use attune_proto::client::{Blobs, Options, Push};
use attune_proto::error::Class;
use attune_proto::v1::pull_artifact_response::Part;
use attune_proto::{Client, v1};
use attune_spec::id::Digest;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::fixtures::{bundle, push};
use crate::server::Server;

const MIB: usize = 1 << 20;

/// Carries connections to a server, and cuts the first few after so many bytes to it.
#[derive(Default)]
struct Proxy {
    cuts: AtomicUsize,
    carried: AtomicU64,
}

impl Proxy {
    async fn start(to: SocketAddr, cuts: usize, after: u64) -> (Arc<Self>, String, JoinSet<()>) {
        let proxy = Arc::new(Self { cuts: AtomicUsize::new(cuts), ..Self::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let this = Arc::clone(&proxy);
        let mut listening = JoinSet::new();
        listening.spawn(async move {
            let mut carrying = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let this = Arc::clone(&this);
                carrying.spawn(async move { this.carry(client, to, after).await });
            }
        });
        (proxy, url, listening)
    }

    async fn carry(&self, client: TcpStream, to: SocketAddr, after: u64) {
        let server = TcpStream::connect(to).await.unwrap();
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let up = async {
            let (mut buffer, mut sent) = (vec![0; 64 << 10], 0);
            while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
                sent += n as u64;
                self.carried.fetch_add(n as u64, Ordering::SeqCst);
                if to_server.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
                let take = |left: usize| left.checked_sub(1);
                if sent > after && self.cuts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
                    return;
                }
            }
        };
        let down = async { tokio::io::copy(&mut from_server, &mut to_client).await };
        // Both halves of both connections end with this.
        tokio::select! { () = up => {}, _ = down => {} }
    }
}

/// One blob, which notes where it is opened.
struct Opened {
    bytes: Bytes,
    starts: Mutex<Vec<u64>>,
}

impl Blobs for Opened {
    fn open(&self, _: &Digest, start: u64) -> BoxStream<'static, Result<Bytes, String>> {
        self.starts.lock().unwrap().push(start);
        let rest = self.bytes.slice(start as usize..);
        let pieces: Vec<_> = rest.chunks(MIB).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        stream::iter(pieces).boxed()
    }
}

fn numbers(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_cut_sends_the_rest() {
    let server = Server::start();
    let direct = server.client().await;
    let (proxy, url, _listening) = Proxy::start(server.address(), 3, 10 * MIB as u64).await;
    let options = Options { retries: 1, retry_wait: Duration::from_millis(50), ..Options::default() };
    let client = Client::connect(&url, options).await.unwrap();
    let bytes = numbers(40 * MIB + 11);
    let (manifest, _) = bundle(Kind::Report, &[("big", &bytes)], Causes::default());
    let blob = manifest.blobs()[0].digest;
    let opened = Arc::new(Opened { bytes: bytes.into(), starts: Mutex::default() });
    let asked = Push { manifest: manifest.bytes().clone(), blobs: vec![blob], ..Push::default() };
    // Three cuts with one retry: each brought it further, so the retries begin anew.
    let pushed = client.push(&asked, Arc::clone(&opened) as Arc<dyn Blobs>).await.unwrap();
    assert!(pushed.created);
    let starts = opened.starts.lock().unwrap().clone();
    assert_eq!((starts.len(), starts[0]), (4, 0), "{starts:?}");
    assert!(starts.windows(2).all(|pair| pair[1] >= pair[0] + (8 * MIB) as u64), "{starts:?}");
    let carried = proxy.carried.load(Ordering::SeqCst) as usize;
    assert!(carried < 70 * MIB, "{carried} bytes were sent for 40 MiB");
    assert!(direct.missing(&[blob]).await.unwrap().is_empty());

    // What nobody keeps cannot be gone on with, and the answer says to ask again.
    let (other, _) = bundle(Kind::Report, &[("other", &numbers(20 * MIB))], Causes::default());
    let header = v1::PushHeader { manifest: other.bytes().clone(), ..v1::PushHeader::default() };
    let chunk =
        v1::BlobChunk { digest: other.blobs()[0].digest.to_string(), offset_bytes: 8 << 20, data: Bytes::new() };
    let parts = [v1::push_artifact_request::Part::Header(header), v1::push_artifact_request::Part::Chunk(chunk)];
    let parts = stream::iter(parts.map(|part| v1::PushArtifactRequest { part: Some(part) }));
    let refused = direct.artifacts().push_artifact(parts).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Aborted, "{refused:?}");
}

#[tokio::test]
async fn a_pull_begins_where_it_is_asked_to() {
    let server = Server::start();
    let client = server.client().await;
    let big = numbers(9 * MIB);
    let files: [(&str, &[u8]); 4] = [("a", b"first"), ("big", &big), ("empty", b""), ("z", b"last")];
    let made = bundle(Kind::Report, &files, Causes::default());
    push(&client, &made, None, &["t"]).await.unwrap();
    for (path, start, expected) in [
        ("big", 0, vec![("big", &big[..]), ("empty", b""), ("z", b"last")]),
        ("big", 5 * MIB as u64 + 1, vec![("big", &big[5 * MIB + 1..]), ("empty", b""), ("z", b"last")]),
        ("big", 9 * MIB as u64, vec![("empty", b""), ("z", b"last")]),
        ("z", 3, vec![("z", b"t")]),
    ] {
        let (_, mut parts) = client.pull("t", &[], Some((path, start))).await.unwrap();
        let (mut found, mut at) = (Vec::<(String, Vec<u8>)>::new(), start);
        while let Some(message) = parts.message().await.unwrap() {
            let Some(Part::Chunk(chunk)) = message.part else { panic!("a second header") };
            if found.last().is_none_or(|(path, _)| *path != chunk.path) {
                at = if chunk.path == path { start } else { 0 };
                found.push((chunk.path.clone(), Vec::new()));
            }
            assert_eq!(chunk.offset_bytes, at);
            at += chunk.data.len() as u64;
            found.last_mut().unwrap().1.extend_from_slice(&chunk.data);
        }
        let expected: Vec<_> = expected.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
        assert!(found == expected, "from {start} of {path}");
    }
    for from in [("a", 6), ("nothing", 0), ("", 1)] {
        let refused = client.pull("t", &[], Some(from)).await.unwrap_err();
        assert_eq!(Class::of(&refused), Class::Invalid, "{from:?}: {refused:?}");
    }
}
