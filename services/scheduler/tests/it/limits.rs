//! Those who say too much, or nothing.

use std::time::Duration;

use attune_proto::v1;
use attune_proto::{Class, Client};
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::codegen::http::{Method, Request};

use crate::contract::Raw;
use crate::server::{LIMIT, Server};

fn impatient() -> Server {
    Server::start_with(|config| {
        config.timings.greeting_limit = Duration::from_millis(300);
        config.timings.call_limit = Duration::from_millis(300);
        config.limits.connections = 16;
    })
}

async fn is_well(client: &Client) {
    client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap();
}

/// A14: connections that say nothing, or one byte now and then, are closed; others are none the worse for it.
#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let server = impatient();
    let client = server.client().await;
    let address = server.url().replace("http://", "");
    for said in [&b""[..], b"PRI * HTTP"] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        for byte in said {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "{said:?} keeps a connection for ever");
    }
    // One that has said what it wants may be quiet.
    tokio::time::sleep(Duration::from_millis(500)).await;
    is_well(&client).await;
}

/// A14: a question that is never finished, a push whose next part never comes, a worker that does not say who it is.
#[tokio::test]
async fn a_call_that_is_never_finished_is_ended() {
    let server = impatient();
    let client = server.client().await;
    let channel = tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let never = futures::stream::pending::<Vec<u8>>();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/attune.v1.JobService/ListJobs");
    let asked = tokio::time::timeout(LIMIT, grpc.client_streaming(tonic::Request::new(never), path, Raw)).await;
    let ended = asked.expect("it ends").unwrap_err();
    assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended:?}");

    let (manifest, _) = crate::fixtures::bundle(
        attune_artifacts::Kind::Report,
        &[("a", b"never sent")],
        attune_artifacts::Causes::default(),
    );
    let header = v1::PushHeader { manifest: manifest.bytes().clone(), ..Default::default() };
    let header = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Header(header)) };
    let parts = futures::stream::iter([header]).chain(futures::stream::pending());
    let pushed = tokio::time::timeout(LIMIT, client.artifacts().push_artifact(parts)).await.expect("it ends");
    assert_eq!(Class::of(&pushed.unwrap_err()), Class::DeadlineExceeded);

    let silent = futures::stream::pending::<v1::ConnectRequest>();
    let mut heard = client.workers().connect(silent).await.unwrap().into_inner();
    let last = tokio::time::timeout(LIMIT, heard.message()).await.expect("it ends");
    assert!(last.unwrap().is_none());
    is_well(&client).await;
}

/// A15: there are as many connections as allowed, and room again when some have gone.
#[tokio::test]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let server = Server::start_with(|config| {
        config.limits.connections = 8;
        config.timings.greeting_limit = Duration::from_secs(60);
    });
    let client = server.client().await;
    let address = server.url().replace("http://", "");
    let mut open = Vec::new();
    let n_closed = async |open: &mut Vec<TcpStream>| {
        let mut n_closed = 0;
        for stream in open {
            // Whoever is taken in is greeted.
            let mut bytes = [0; 64];
            let read = tokio::time::timeout(LIMIT, stream.read(&mut bytes)).await.expect("a greeting or the end");
            n_closed += usize::from(matches!(read, Ok(0) | Err(_)));
        }
        n_closed
    };
    for _ in 0..8 {
        open.push(TcpStream::connect(&address).await.unwrap());
    }
    assert_eq!(n_closed(&mut open).await, 5, "one address has half, and one of its four is the client's");
    is_well(&client).await;
    drop(open);
    let again = async {
        // Closed at once, for as long as the server has not noticed that others have gone.
        while n_closed(&mut vec![TcpStream::connect(&address).await.unwrap()]).await > 0 {}
    };
    tokio::time::timeout(LIMIT, again).await.expect("there is room again");
}

/// A16: a message that says that it has four gigabytes is refused by its first five bytes.
#[tokio::test]
async fn a_length_without_a_body_is_refused_before_there_is_room_for_it() {
    let server = Server::start();
    let client = server.client().await;
    let stream = TcpStream::connect(server.url().replace("http://", "")).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(connection);
    for path in ["JobService/ListJobs", "ArtifactService/PushArtifact", "TokenService/GetCaller"] {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/attune.v1.{path}", server.url()))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        requests = requests.ready().await.unwrap();
        let (response, mut body) = requests.send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]), false).unwrap();
        let answer = tokio::time::timeout(LIMIT, response).await.expect("an answer without the body").unwrap();
        assert_eq!(answer.headers()["grpc-status"], "11", "{path}: {answer:?}");
        assert!(answer.headers()["grpc-message"].to_str().unwrap().contains("length"), "{answer:?}");
    }
    is_well(&client).await;
}

/// An artifact that is too large is refused by what it says of itself, and one that says too little by its bytes.
#[tokio::test]
async fn an_artifact_has_a_largest_size() {
    let server = Server::start_with(|config| config.limits.artifact_bytes = 100);
    let client = server.client().await;
    let of = |bytes: &[u8]| {
        let kind = attune_artifacts::Kind::Report;
        crate::fixtures::bundle(kind, &[("a", bytes)], attune_artifacts::Causes::default())
    };
    crate::fixtures::push(&client, &of(&[7; 100]), None, &[]).await.unwrap();
    let refused = crate::fixtures::push(&client, &of(&[7; 101]), None, &[]).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::TooLarge);
    assert_eq!(refused.message(), "the artifact has 101 bytes; this server takes 100 at most");
    let files = vec![attune_artifacts::File {
        path: "a".to_owned(),
        size_bytes: 10,
        digest: attune_artifacts::hash::bytes(&[8; 4000]),
    }];
    let lies = attune_artifacts::Manifest::new(attune_artifacts::Kind::Report, files, Default::default()).unwrap();
    let memory = std::sync::Arc::clone(&of(&[8; 4000]).1);
    let refused = crate::fixtures::push(&client, &(lies, memory), None, &[]).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Invalid, "{refused:?}");
}

/// A12: headers that are too large end the call that has them.
#[tokio::test]
async fn large_headers_are_refused() {
    let server = Server::start();
    let client = server.client().await;
    let mut request = tonic::Request::new(v1::ListJobsRequest::default());
    for n in 0..8 {
        let name = tonic::metadata::MetadataKey::from_bytes(format!("x-{n}").as_bytes()).unwrap();
        request.metadata_mut().insert(name, "a".repeat(8 << 10).parse().unwrap());
    }
    client.jobs().list_jobs(request).await.unwrap_err();
    is_well(&client).await;
}
