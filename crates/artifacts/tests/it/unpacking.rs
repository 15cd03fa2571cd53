//! A hostile or broken source on the other side of an unpack (A22, A29, F35).

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use attune_artifacts::{Causes, Error, Kind, Manifest, Unpack, manifest::File};
use bytes::Bytes;

use crate::support::{bytes, named, tree};

fn manifest(files: &[(&str, &[u8])]) -> Arc<Manifest> {
    let file = |(path, content): &(&str, &[u8])| {
        let blob = named(content);
        File { path: (*path).to_owned(), size_bytes: blob.size_bytes, digest: blob.digest }
    };
    Arc::new(Manifest::new(Kind::Report, files.iter().map(file).collect(), Causes::default()).unwrap())
}

#[tokio::test]
async fn files_come_in_order_and_appear_together() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("out");
    let big = bytes(1, 2_000_000);
    let manifest = manifest(&[("a/big", &big), ("a/empty", b""), ("z", b"zz")]);
    let mut unpack = Unpack::to(&dest, manifest.digest()).await.unwrap();
    unpack.begin(manifest).await.unwrap();
    for piece in big.chunks(300_000) {
        unpack.write("a/big", Bytes::copy_from_slice(piece)).await.unwrap();
        assert!(!dest.try_exists().unwrap());
    }
    unpack.write("z", Bytes::from_static(b"zz")).await.unwrap();
    assert!(!dest.try_exists().unwrap());
    unpack.finish().await.unwrap();
    assert_eq!(tree(dir.path()), ["out/", "out/a/", "out/a/big", "out/a/empty", "out/z"]);
    assert!(fs::read(dest.join("a/big")).unwrap() == big);
}

#[tokio::test]
async fn whatever_a_source_does_wrong_nothing_appears() {
    let files: &[(&str, &[u8])] = &[("a", b"aaaa"), ("b", b"bbbb")];
    let good = manifest(files);
    let other = manifest(&[("a", b"aaaa")]);
    let begin = Some(good.clone());
    type Writes = &'static [(&'static str, &'static [u8])];
    let cases: Vec<(&str, Option<Arc<Manifest>>, Writes)> = vec![
        ("no manifest", None, &[]),
        ("another manifest", Some(other), &[]),
        ("nothing", begin.clone(), &[]),
        ("the last file is missing", begin.clone(), &[("a", b"aaaa")]),
        ("the last file is cut", begin.clone(), &[("a", b"aaaa"), ("b", b"bb")]),
        ("a bit is flipped", begin.clone(), &[("a", b"aaac"), ("b", b"bbbb")]),
        ("one byte too many", begin.clone(), &[("a", b"aaaaa")]),
        ("one byte too many, later", begin.clone(), &[("a", b"aa"), ("a", b"aaa")]),
        ("wrong order", begin.clone(), &[("b", b"bbbb"), ("a", b"aaaa")]),
        ("a file in pieces between another", begin.clone(), &[("a", b"aa"), ("b", b"bbbb"), ("a", b"aa")]),
        ("a file twice", begin.clone(), &[("a", b"aaaa"), ("a", b"aaaa")]),
        ("a file that is not in the manifest", begin.clone(), &[("c", b"c")]),
        ("a path that leads outside", begin.clone(), &[("../../evil", b"aaaa")]),
        ("an absolute path", begin.clone(), &[("/tmp/evil", b"aaaa")]),
        ("bytes after the end", begin.clone(), &[("a", b"aaaa"), ("b", b"bbbb"), ("b", b"b")]),
    ];
    for (name, first, writes) in cases {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("deep/out");
        let mut unpack = Unpack::to(&dest, good.digest()).await.unwrap();
        let mut result = match first {
            Some(manifest) => unpack.begin(manifest).await,
            None => Ok(()),
        };
        for (path, content) in writes {
            if result.is_ok() {
                result = unpack.write(path, Bytes::from_static(content)).await;
            }
        }
        let result = match result {
            Ok(()) => unpack.finish().await.map(drop),
            Err(error) => {
                drop(unpack);
                Err(error)
            }
        };
        assert!(matches!(result, Err(Error::Mismatch { .. })), "{name}: {result:?}");
        assert_eq!(tree(dir.path()), ["deep/"], "{name}");
    }
}

#[tokio::test]
async fn what_is_at_the_destination_is_never_touched() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = manifest(&[("a", b"a")]);
    fs::write(dir.path().join("file"), "mine").unwrap();
    fs::create_dir_all(dir.path().join("full/of")).unwrap();
    for name in ["file", "full"] {
        let error = Unpack::to(&dir.path().join(name), manifest.digest()).await.unwrap_err().to_string();
        assert!(error.contains("name a new folder") && error.contains(name), "{error}");
    }
    // Somebody fills the destination while the bytes come.
    let dest = dir.path().join("late");
    let mut unpack = Unpack::to(&dest, manifest.digest()).await.unwrap();
    unpack.begin(manifest.clone()).await.unwrap();
    unpack.write("a", Bytes::from_static(b"a")).await.unwrap();
    fs::create_dir(&dest).unwrap();
    fs::write(dest.join("mine"), "mine").unwrap();
    assert!(matches!(unpack.finish().await, Err(Error::Refused { .. })));
    assert_eq!(tree(dir.path()), ["file", "full/", "full/of/", "late/", "late/mine"]);
    // A link at the destination is not written through.
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    let dest = dir.path().join("link");
    let mut unpack = Unpack::to(&dest, manifest.digest()).await.unwrap();
    unpack.begin(manifest.clone()).await.unwrap();
    unpack.write("a", Bytes::from_static(b"a")).await.unwrap();
    unpack.finish().await.unwrap_err();
    assert_eq!(tree(outside.path()), [""; 0]);
    // An empty folder is what people make before they pull into it.
    let dest = dir.path().join("empty");
    fs::create_dir(&dest).unwrap();
    let mut unpack = Unpack::to(&dest, manifest.digest()).await.unwrap();
    unpack.begin(manifest).await.unwrap();
    unpack.write("a", Bytes::from_static(b"a")).await.unwrap();
    unpack.finish().await.unwrap();
    assert_eq!(tree(&dest), ["a"]);
}

#[test]
fn a_manifest_cannot_name_a_place_outside() {
    let digest = named(b"a").digest;
    for path in ["../a", "/a", "a/../../b", "a\\..\\b", "C:/a", ".ssh/keys", "a\0", "-rf"] {
        let text = serde_json::json!({
            "files": [{"digest": digest.to_string(), "path": path, "size_bytes": 1}],
            "format": 1,
            "kind": "report",
        });
        let error = Manifest::parse(attune_artifacts::canonical::to_string(&text).as_bytes()).unwrap_err().to_string();
        assert!(error.contains("`files[0].path` is "), "{path:?}: {error}");
    }
}
