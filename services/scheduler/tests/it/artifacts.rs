//! Artifacts: in, out, tagged, deleted.

use std::sync::Arc;

use attune_artifacts::{Causes, Kind, hash};
use attune_proto::error::Class;
use attune_proto::v1::{self, pull_artifact_response::Part};
use bytes::Bytes;

use crate::fixtures::{Memory, bundle, create, inputs, job, push};
use crate::server::Server;

#[tokio::test]
async fn what_is_pushed_comes_back_as_it_was() {
    let server = Server::start();
    let client = server.client().await;
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let files: [(&str, &[u8]); 3] = [("a/big.bin", &big), ("empty", b""), ("z.txt", b"text")];
    let made = bundle(Kind::Report, &files, Causes::default());
    let (digest, blobs) = (made.0.digest().to_string(), made.0.blobs());
    let names: Vec<_> = blobs.iter().map(|blob| blob.digest).collect();
    assert_eq!(client.missing(&names).await.unwrap(), names);
    let first = push(&client, &made, None, &["report"]).await.unwrap();
    assert!(first.created);
    assert!(client.missing(&names).await.unwrap().is_empty());
    // What is there is not sent again, and pushing it again is no error.
    let empty = (made.0.clone(), Arc::new(Memory::default()));
    let second = push(&client, &empty, None, &[]).await.unwrap();
    assert_eq!((second.created, second.artifact), (false, first.artifact));

    for (reference, paths, expected) in
        [("report", vec![], &files[..]), (digest.as_str(), vec!["z.txt".to_owned()], &files[2..])]
    {
        let (header, mut stream) = client.pull(reference, &paths, None).await.unwrap();
        assert_eq!(header.manifest, made.0.bytes());
        assert_eq!(header.artifact.unwrap().files.len(), 3);
        let mut found: Vec<(String, Vec<u8>)> = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            let Some(Part::Chunk(chunk)) = message.part else { panic!("a second header") };
            assert!(chunk.data.len() <= attune_proto::CHUNK_BYTES_MAX);
            if found.last().is_none_or(|(path, _)| *path != chunk.path) {
                found.push((chunk.path.clone(), Vec::new()));
            }
            let (_, bytes) = found.last_mut().unwrap();
            assert_eq!(bytes.len() as u64, chunk.offset_bytes);
            bytes.extend_from_slice(&chunk.data);
        }
        let expected: Vec<(String, Vec<u8>)> =
            expected.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
        assert!(found == expected, "{:?}", found.iter().map(|(p, b)| (p, b.len())).collect::<Vec<_>>());
    }
    let unknown = client.pull("report", &["nothing".to_owned()], None).await.unwrap_err();
    assert_eq!(Class::of(&unknown), Class::Invalid);
    assert_eq!(Class::of(&client.pull("nothing", &[], None).await.unwrap_err()), Class::NotFound);
}

#[tokio::test]
async fn bytes_that_are_not_what_they_are_called_are_refused_and_nothing_is_visible() {
    let server = Server::start();
    let client = server.client().await;
    let (manifest, memory) = bundle(Kind::Report, &[("a", b"right"), ("b", b"other")], Causes::default());
    let digest = hash::bytes(b"right");
    let mut wrong = Memory(memory.0.clone());
    wrong.0.insert(digest, Bytes::from_static(b"wrong"));
    let refused = push(&client, &(manifest.clone(), Arc::new(wrong)), None, &["t"]).await.unwrap_err();
    assert_eq!(Class::of(&refused), Class::Invalid, "{refused:?}");
    assert_eq!(client.missing(&[digest]).await.unwrap(), [digest]);

    // A push that leaves a blob out says which.
    let header = v1::PushHeader { manifest: manifest.bytes().clone(), ..Default::default() };
    let header = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Header(header)) };
    let refused = client.artifacts().push_artifact(futures::stream::iter([header.clone()])).await.unwrap_err();
    assert!(refused.message().contains("the bytes of \"a\""), "{refused:?}");
    // Bytes that are not at their place, or of no blob of the manifest.
    for (name, offset, class) in
        [(digest.to_string(), 3, Class::Aborted), (hash::bytes(b"?").to_string(), 0, Class::Invalid)]
    {
        let chunk = v1::BlobChunk { digest: name, offset_bytes: offset, data: Bytes::from_static(b"right") };
        let chunk = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Chunk(chunk)) };
        let parts = futures::stream::iter([header.clone(), chunk]);
        let refused = client.artifacts().push_artifact(parts).await.unwrap_err();
        assert_eq!(Class::of(&refused), class, "{refused:?}");
    }
    let mut other = manifest.bytes().to_vec();
    other.push(b' ');
    let header = v1::PushHeader { manifest: other.into(), ..Default::default() };
    let header = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Header(header)) };
    let refused = client.artifacts().push_artifact(futures::stream::iter([header])).await.unwrap_err();
    assert!(refused.message().contains("canonical"), "{refused:?}");

    let get = v1::GetArtifactRequest { reference: manifest.digest().to_string(), ..Default::default() };
    assert_eq!(Class::of(&client.artifacts().get_artifact(get).await.unwrap_err()), Class::NotFound);
    let list = client.artifacts().list_artifacts(v1::ListArtifactsRequest::default()).await.unwrap();
    assert!(list.into_inner().artifacts.is_empty());
}

#[tokio::test]
async fn tags_move_when_they_are_where_one_thinks() {
    let server = Server::start();
    let client = server.client().await;
    let one = bundle(Kind::Report, &[("a", b"1")], Causes::default());
    let two = bundle(Kind::Report, &[("a", b"2")], Causes::default());
    push(&client, &one, None, &["t"]).await.unwrap();
    push(&client, &two, None, &[]).await.unwrap();
    let (one, two) = (one.0.digest().to_string(), two.0.digest().to_string());
    let tag = async |reference: &str, expected: Option<&str>| {
        let request = v1::TagArtifactRequest {
            tag: "t".to_owned(),
            reference: reference.to_owned(),
            expected_digest: expected.map(str::to_owned),
            ..Default::default()
        };
        client.artifacts().tag_artifact(request).await.map(|answer| answer.into_inner())
    };
    assert_eq!(Class::of(&tag(&two, Some(&two)).await.unwrap_err()), Class::Conflict);
    let moved = tag(&two, Some(&one)).await.unwrap();
    assert_eq!((moved.previous_digest, moved.artifact.unwrap().tags), (one.clone(), vec!["t:latest".to_owned()]));
    let named = v1::ListArtifactsRequest { tag_name: "t".to_owned(), ..Default::default() };
    let named = client.artifacts().list_artifacts(named).await.unwrap().into_inner().artifacts;
    assert_eq!(named.len(), 1);
    let untag = || v1::UntagArtifactRequest { project: String::new(), tag: "t".to_owned() };
    let untagged = client.artifacts().untag_artifact(untag()).await.unwrap().into_inner();
    assert_eq!(untagged.previous_digest, two);
    assert_eq!(client.artifacts().untag_artifact(untag()).await.unwrap().into_inner().previous_digest, "");
}

#[tokio::test]
async fn what_is_needed_is_not_deleted_and_what_is_not_goes_with_its_bytes() {
    let server = Server::start();
    let client = server.client().await;
    inputs(&client).await;
    let get = v1::GetArtifactRequest { reference: "rows".to_owned(), ..Default::default() };
    let rows = client.artifacts().get_artifact(get).await.unwrap().into_inner().artifact.unwrap();
    let delete = async |digest: &str| {
        let request = v1::DeleteArtifactRequest { project: String::new(), digest: digest.to_owned() };
        client.artifacts().delete_artifact(request).await.map(|answer| answer.into_inner().deleted)
    };
    // Tagged, then used by a job that has not ended, then not at all.
    assert_eq!(Class::of(&delete(&rows.digest).await.unwrap_err()), Class::Conflict);
    let made = create(&client, "r1", &job()).await.unwrap();
    let untag = v1::UntagArtifactRequest { project: String::new(), tag: "rows".to_owned() };
    client.artifacts().untag_artifact(untag).await.unwrap();
    let used = delete(&rows.digest).await.unwrap_err();
    assert!(used.message().contains(&made.job_id), "{used:?}");
    let cancel = v1::CancelJobRequest { project: String::new(), job_id: made.job_id };
    client.jobs().cancel_job(cancel).await.unwrap();
    assert!(delete(&rows.digest).await.unwrap());
    assert!(!delete(&rows.digest).await.unwrap());
    let blob = rows.files[0].digest.parse().unwrap();
    assert_eq!(client.missing(&[blob]).await.unwrap(), [blob]);
}

/// Pushes that break off leave blobs, which go; what artifacts refer to stays, while pushes and deletions go on beside the sweeps.
#[tokio::test]
async fn what_broken_pushes_leave_is_deleted_and_nothing_else() {
    let server = Server::start_with(|config| {
        config.timings.housekeeping = std::time::Duration::from_millis(5);
        config.timings.orphan_grace = std::time::Duration::ZERO;
    });
    let client = server.client().await;
    // Blobs arrive, and then the push leaves another one out.
    let (manifest, memory) = bundle(Kind::Report, &[("a", b"left"), ("b", b"missing")], Causes::default());
    let left = hash::bytes(b"left");
    let header = v1::PushHeader { manifest: manifest.bytes().clone(), ..Default::default() };
    let header = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Header(header)) };
    let chunk = v1::BlobChunk { digest: left.to_string(), offset_bytes: 0, data: memory.0[&left].clone() };
    let chunk = v1::PushArtifactRequest { part: Some(v1::push_artifact_request::Part::Chunk(chunk)) };
    // The project is known from its first event on.
    push(&client, &bundle(Kind::Report, &[("x", b"first")], Causes::default()), None, &[]).await.unwrap();
    client.artifacts().push_artifact(futures::stream::iter([header, chunk])).await.unwrap_err();
    let gone = async {
        while client.missing(&[left]).await.unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(crate::server::LIMIT, gone).await.expect("the blob goes");

    // Artifacts that share blobs come and go beside it. A push whose blobs were swept from under it is made again.
    let shared: Vec<u8> = b"shared".repeat(1000);
    let rounds = (0..4u8).map(|who| {
        let (client, shared) = (client.clone(), shared.clone());
        async move {
            for round in 0..12u8 {
                let own = [who, round];
                let made = bundle(Kind::Report, &[("own", &own), ("shared", &shared)], Causes::default());
                while let Err(refused) = push(&client, &made, None, &[]).await {
                    assert_eq!(Class::of(&refused), Class::Invalid, "{refused:?}");
                    assert!(refused.message().contains("send them first"), "{refused:?}");
                }
                if round % 2 == 0 {
                    let digest = made.0.digest().to_string();
                    let request = v1::DeleteArtifactRequest { project: String::new(), digest };
                    client.artifacts().delete_artifact(request).await.unwrap();
                }
            }
        }
    });
    futures::future::join_all(rounds).await;
    let list = client.artifacts().list_artifacts(v1::ListArtifactsRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.artifacts.len(), 4 * 6 + 1);
    for artifact in list.artifacts {
        let (_, mut parts) = client.pull(&artifact.digest, &[], None).await.unwrap();
        while parts.message().await.unwrap().is_some() {}
    }
}

#[tokio::test]
async fn projects_do_not_see_each_other() {
    let server = Server::start();
    let client = server.client().await;
    let made = bundle(Kind::Report, &[("a", b"1")], Causes::default());
    push(&client, &made, None, &["t"]).await.unwrap();
    let other = client.for_project(attune_spec::id::Project::new("other").unwrap());
    let blob = made.0.blobs()[0].digest;
    assert_eq!(other.missing(&[blob]).await.unwrap(), [blob]);
    for reference in ["t".to_owned(), made.0.digest().to_string()] {
        assert_eq!(Class::of(&other.pull(&reference, &[], None).await.unwrap_err()), Class::NotFound);
    }
}
