//! Too many frames, too many at once, and what only looks like a message: whoever sends it is refused, and nobody else notices.

use attune_artifacts::Causes;
use attune_proto::v1::{self, JobState};
use attune_proto::{Class, Client};
use futures::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use crate::contract::Raw;
use crate::fixtures::{create, create_message, events, get, inputs, job, message, states};
use crate::server::{LIMIT, Server};
use crate::worker::{Worker, attempt};

/// Many at once.
const MANY: usize = 100;

async fn is_well(client: &Client) {
    client.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap();
}

/// Kinds of frames of HTTP/2 (RFC 9113, 6).
mod frame {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
    pub(super) const END_HEADERS: u8 = 4;
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// More than a connection may send of frames that carry nothing.
const MANY_FRAMES: usize = 100_000;

/// `POST /` over `http`, by their places in HPACK's table.
const REQUEST: [u8; 3] = [0x83, 0x86, 0x84];

/// Says all of it on a connection of its own and gives what came back until the server closed that.
async fn flood(server: &Server, frames: &[Vec<u8>]) -> Vec<u8> {
    let stream = TcpStream::connect(server.url().replace("http://", "")).await.unwrap();
    let (mut hears, mut says) = stream.into_split();
    let mut all = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    all.extend(frame(frame::SETTINGS, 0, 0, &[]));
    all.extend(frames.concat());
    let say = async {
        // It is closed in the middle.
        let _ = says.write_all(&all).await;
        std::future::pending::<()>().await;
    };
    let hear = async {
        let (mut heard, mut bytes) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = hears.read(&mut bytes).await {
            heard.extend_from_slice(&bytes[..n]);
        }
        heard
    };
    tokio::select! {
        () = say => unreachable!(),
        heard = tokio::time::timeout(LIMIT, hear) => heard.expect("the connection is closed"),
    }
}

#[tokio::test]
async fn floods_of_frames_end_the_connection_that_sends_them() {
    let server = Server::start();
    let client = server.client().await;
    let odd = |n: u32| 2 * n + 1;
    let resets = (0..20_000).flat_map(|n| {
        let opened = frame(frame::HEADERS, frame::END_HEADERS, odd(n), &REQUEST);
        [opened, frame(frame::RST_STREAM, 0, odd(n), &8_u32.to_be_bytes())]
    });
    // Many headers of one letter each, and no end of them.
    let headers = [0, 1, b'a', 1, b'b'].repeat(3000);
    let unending = (0..1000).map(|_| frame(frame::CONTINUATION, 0, 1, &headers));
    let begun = frame(frame::HEADERS, 0, 1, &REQUEST);
    // A call that is begun and never comes to a message.
    let opened = frame(frame::HEADERS, frame::END_HEADERS, 1, &REQUEST);
    let empty = (0..MANY_FRAMES).map(|_| frame(frame::DATA, 0, 1, &[]));
    let on_no_stream = (0..100).map(|_| frame(frame::DATA, 0, 1, &[]));
    for (what, frames) in [
        ("streams that are reset at once", resets.collect::<Vec<_>>()),
        ("headers without an end", std::iter::once(begun).chain(unending).collect()),
        ("data of no stream", on_no_stream.collect()),
        // A13: what is cheap to send and has to be answered, or looked at.
        ("pings", vec![frame(frame::PING, 0, 0, &[7; 8]); MANY_FRAMES]),
        ("settings", vec![frame(frame::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]); MANY_FRAMES]),
        ("settings that say nothing", vec![frame(frame::SETTINGS, 0, 0, &[]); MANY_FRAMES]),
        ("windows that grow by a byte", vec![frame(frame::WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()); MANY_FRAMES]),
        ("data without any", std::iter::once(opened).chain(empty).collect()),
    ] {
        flood(&server, &frames).await;
        let asked = tokio::time::timeout(LIMIT, is_well(&client)).await;
        assert!(asked.is_ok(), "{what}: others wait");
    }
}

#[tokio::test]
async fn bytes_that_are_no_message_are_refused() {
    let server = Server::start();
    let client = server.client().await;
    let channel = tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    let cases: [(&str, Vec<u8>); 6] = [
        ("groups within groups", vec![0x7b; 10_000]),
        ("a text that is none", vec![0x0a, 2, 0xff, 0xfe]),
        ("a number in place of a text", vec![0x08, 1]),
        ("a number without an end", [vec![0x28], vec![0xff; 11]].concat()),
        ("a text longer than the message", vec![0x0a, 0x7f, b'a']),
        ("a field without a number", vec![0x02, 0]),
    ];
    for (what, bytes) in cases {
        grpc.ready().await.unwrap();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static("/attune.v1.JobService/ListJobs");
        let refused = grpc.unary(tonic::Request::new(bytes), path, Raw).await.unwrap_err();
        assert!(matches!(refused.code(), Code::Internal | Code::InvalidArgument), "{what}: {refused:?}");
        is_well(&client).await;
    }
}

#[tokio::test]
async fn names_that_would_do_harm_are_refused_and_repeated_harmlessly() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let long = "a".repeat(1 << 20);
    let names =
        ["", &long, "a\0b", "a\nb", "\u{1b}[31mred", "a\u{202e}b", "..", "a/b", "a\\b", "%2e%2e%252f", "\u{430}bc"];
    for name in names {
        let mut spec = message(&job());
        spec.name = name.to_owned();
        let of_job = create_message(&client, "r1", spec).await.unwrap_err();
        let mut spec = message(&job());
        spec.labels.insert(name.to_owned(), "x".to_owned());
        let of_label = create_message(&client, "r2", spec).await.unwrap_err();
        let asked = v1::GetJobRequest { project: String::new(), job_id: name.to_owned() };
        let of_id = client.jobs().get_job(asked).await.unwrap_err();
        for refused in [of_job, of_label, of_id] {
            assert_eq!(Class::of(&refused), Class::Invalid, "{name:?}: {refused:?}");
            let said = refused.message();
            assert!(!said.chars().any(|c| c.is_control() && c != '\n') && !said.contains('\u{202e}'), "{said:?}");
            assert!(said.len() < 2000, "{} bytes about a name", said.len());
        }
    }
    is_well(&client).await;
}

#[tokio::test]
async fn many_at_once_take_no_more_than_is_left() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let policy = v1::ProjectPolicy { max_queued: Some(3), ..Default::default() };
    let asked = v1::SetProjectPolicyRequest { project: "default".to_owned(), policy: Some(policy) };
    client.fleet().set_project_policy(asked).await.unwrap();
    let mut small = job();
    small["outputs"] = json!({});
    let all = join_all((0..MANY).map(|n| {
        let (client, small) = (client.clone(), &small);
        async move { create(&client, &format!("r{n}"), small).await }
    }))
    .await;
    let (made, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(Result::is_ok);
    assert_eq!(made.len(), 3);
    assert!(refused.into_iter().all(|refused| Class::of(&refused.unwrap_err()) == Class::QuotaExceeded));
}

#[tokio::test]
async fn many_cancels_are_one_and_a_success_beside_them_is_told() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let cancel = |id: &str| v1::CancelJobRequest { project: String::new(), job_id: id.to_owned() };
    let queued = create(&client, "r1", &job()).await.unwrap().job_id;
    let all = join_all((0..MANY).map(|_| {
        let client = client.clone();
        let asked = cancel(&queued);
        async move { client.jobs().cancel_job(asked).await }
    }))
    .await;
    assert!(all.iter().any(Result::is_ok), "{all:?}");
    let said = events(&client, &queued, 0, usize::MAX).await;
    assert_eq!(states(&said).iter().filter(|state| **state == JobState::Cancelled).count(), 1, "{said:?}");

    // A cancel while the attempt tells of its success: one of the two ends the job, and the other is told which.
    let mut worker = Worker::connect(&client, "w-1").await;
    let raced = create(&client, "r2", &job()).await.unwrap().job_id;
    let offer = worker.offer().await;
    let it = attempt(&offer);
    worker.begin(&it).await;
    let digest = worker.output(&it, "adapter", Causes::default()).await.unwrap();
    let outputs = vec![v1::JobOutput { role: "adapter".to_owned(), digest }];
    let succeeded = v1::attempt_finished::Outcome::Succeeded(v1::AttemptSucceeded { outputs });
    let asked = cancel(&raced);
    let wish = async { client.jobs().cancel_job(asked).await };
    let (wished, ()) = tokio::join!(wish, worker.finish(&it, succeeded));
    let ended = [JobState::Succeeded, JobState::Cancelled];
    // The events of a job end with it.
    let said = states(&events(&client, &raced, 0, usize::MAX).await);
    assert_eq!(said.iter().filter(|state| ended.contains(state)).count(), 1, "{said:?}");
    if let Err(refused) = wished {
        let last = get(&client, &raced).await.unwrap().state();
        assert_eq!((Class::of(&refused), last), (Class::IllegalState, JobState::Succeeded), "{refused:?}");
        assert!(refused.message().contains("succeeded"), "{refused:?}");
    }
}
