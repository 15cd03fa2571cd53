//! Pulls that are cut go on from the byte where they were.

use std::collections::VecDeque;
use std::time::Duration;

use attune_artifacts::{Causes, Error, Kind, Manifest, Source as _, Unpack, hash, manifest::File};
use attune_proto::client::Options;
use attune_proto::v1::attempt_finished::Outcome;
use attune_proto::v1::pull_artifact_response::Part;
use attune_proto::{Class, Client, v1};
use attune_spec::id::Project;
use attune_worker::transfer::Remote;
use bytes::Bytes;
use tonic::{Code, Status};

use crate::support::world;

const CHUNK: usize = 1000;

/// An artifact, and after how many chunks each pull of it is cut, with which status.
pub(crate) struct Pulled {
    files: Vec<(&'static str, Bytes)>,
    manifest: Manifest,
    cuts: VecDeque<(usize, Status)>,
    asked: Vec<(String, u64)>,
    /// A bit of this file is wrong in all pulls of this number and before.
    wrong: usize,
}

impl Pulled {
    fn new(files: Vec<(&'static str, Bytes)>, cuts: impl IntoIterator<Item = (usize, Status)>) -> Self {
        let listed = files.iter().map(|(path, bytes)| File {
            path: (*path).to_owned(),
            size_bytes: bytes.len() as u64,
            digest: hash::bytes(bytes),
        });
        let manifest = Manifest::new(Kind::Report, listed.collect(), Causes::default()).unwrap();
        Self { files, manifest, cuts: cuts.into_iter().collect(), asked: Vec::new(), wrong: 0 }
    }

    pub(crate) fn answer(&mut self, asked: &v1::PullArtifactRequest) -> Vec<Result<v1::PullArtifactResponse, Status>> {
        self.asked.push((asked.from_path.clone(), asked.from_offset_bytes));
        let header = v1::PullHeader { artifact: None, manifest: self.manifest.bytes().clone() };
        let mut parts = vec![Part::Header(header)];
        let at = self.files.iter().position(|(path, _)| *path == asked.from_path).unwrap_or(0);
        for (i, (path, bytes)) in self.files[at..].iter().enumerate() {
            let start = if i == 0 { asked.from_offset_bytes as usize } else { 0 };
            for (n, piece) in bytes[start..].chunks(CHUNK).enumerate() {
                let mut data = piece.to_vec();
                if self.asked.len() <= self.wrong {
                    data[0] ^= 1;
                }
                let offset_bytes = (start + n * CHUNK) as u64;
                parts.push(Part::Chunk(v1::FileChunk { path: (*path).to_owned(), offset_bytes, data: data.into() }));
            }
        }
        let cut = self.cuts.pop_front();
        parts.truncate(cut.as_ref().map_or(usize::MAX, |(chunks, _)| chunks + 1));
        let parts = parts.into_iter().map(|part| Ok(v1::PullArtifactResponse { part: Some(part) }));
        parts.chain(cut.map(|(_, status)| Err(status))).collect()
    }
}

fn files() -> Vec<(&'static str, Bytes)> {
    let big: Vec<u8> = (0..4500).map(|i| (i % 251) as u8).collect();
    vec![("a", Bytes::from_static(b"x")), ("b/big", big.into()), ("c", Bytes::new()), ("d", Bytes::from_static(b"end"))]
}

/// What a pull gives, and what was asked for in turn.
async fn pull(pulled: Pulled) -> (Result<(), Error>, Vec<(String, u64)>) {
    let folder = tempfile::tempdir().unwrap();
    let (expected, digest) = (pulled.files.clone(), pulled.manifest.digest());
    let mut address = String::new();
    let world = world("exit 0", |config, state| {
        address.clone_from(&config.scheduler);
        *state.pulled.lock().unwrap() = Some(pulled);
    })
    .await;
    let options = Options { retries: 0, ..Options::default() };
    let remote = Remote::new(Client::lazy(&address, options).unwrap()).patient(Duration::from_millis(300));
    let dest = folder.path().join("out");
    let mut unpack = Unpack::to(&dest, digest).await.unwrap();
    let mut result = remote.pull(&Project::default(), &digest, &mut unpack).await;
    if result.is_ok() {
        result = unpack.finish().await.map(drop);
    }
    if result.is_ok() {
        for (path, bytes) in expected {
            assert_eq!(std::fs::read(dest.join(path)).unwrap(), bytes, "{path}");
        }
    }
    let asked = world.scheduler.0.pulled.lock().unwrap().take().unwrap().asked;
    (result, asked)
}

#[tokio::test]
async fn a_pull_that_is_cut_goes_on_from_the_byte_where_it_was() {
    let unknown = || Status::new(Code::Unknown, "the connection is gone");
    let cuts = [
        (0, Class::Unavailable.status("not now")),
        (3, unknown()),
        (1, Status::new(Code::Cancelled, "h2")),
        (2, Class::Unavailable.status("again")),
        (1, unknown()),
    ];
    let (result, asked) = pull(Pulled::new(files(), cuts)).await;
    result.unwrap();
    let asked: Vec<_> = asked.iter().map(|(path, byte)| (path.as_str(), *byte)).collect();
    assert_eq!(asked, [("", 0), ("a", 0), ("b/big", 2000), ("b/big", 3000), ("d", 0)]);
}

#[tokio::test]
async fn a_pull_that_comes_no_further_gives_up_and_refusals_are_final() {
    let cuts = (0..100).map(|_| (0, Class::Unavailable.status("not now")));
    let (result, asked) = pull(Pulled::new(files(), cuts)).await;
    assert!(matches!(result, Err(Error::Unavailable { .. })), "{result:?}");
    assert!((2..6).contains(&asked.len()), "{asked:?}");
    let (result, asked) = pull(Pulled::new(files(), [(2, Class::Corrupt.status("a bit is wrong"))])).await;
    assert!(result.is_err() && asked.len() == 1, "{asked:?}");
}

#[tokio::test]
async fn what_was_resumed_is_checked_as_a_whole() {
    let mut pulled = Pulled::new(files(), [(4, Status::new(Code::Unknown, "gone"))]);
    pulled.files.remove(0);
    let mut again = Pulled::new(pulled.files, pulled.cuts);
    again.wrong = 1;
    let (result, asked) = pull(again).await;
    assert_eq!(asked.len(), 2);
    assert!(matches!(result, Err(Error::Mismatch { .. })), "{result:?}");
}

#[tokio::test]
async fn an_input_stays_while_it_is_used_and_then_no_longer_than_the_bound_allows() {
    let script = r#"
input=$(printf '%s' "$request" | sed 's/.*"inputs":{"[^"]*":"\([^"]*\)".*/\1/')
running
[ "$(cat "$input/d")" = end ] || exit 3
say '{"event":"finished","summary":{"steps":3,"tokens":30,"trained_parameters":4,"tokens_per_second":5.0,"peak_memory_bytes":6,"before":{},"after":{}}}'
"#;
    let pulled = Pulled::new(files(), []);
    let digest = pulled.manifest.digest();
    let mut cache = std::path::PathBuf::new();
    let world = world(script, |config, state| {
        config.cache_bytes_max = Some(1);
        cache = config.work_dir.join("cache/default").join(digest.hex());
        *state.pulled.lock().unwrap() = Some(pulled);
    })
    .await;
    world.scheduler.offer(1, &[("base", &digest.to_string())]);
    assert!(matches!(world.scheduler.outcome().await, Outcome::Succeeded(_)));
    // Nothing holds it any more, and a byte is less than it has.
    let gone = async {
        while cache.try_exists().unwrap() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("the input goes");
}
