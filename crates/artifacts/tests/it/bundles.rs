//! From folders and files as people have them to artifacts and back.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use attune_artifacts::{BlobStore, Bundle, Causes, Error, Kind, Source as _, Unpack};
use attune_spec::id::Project;

use crate::support::{bytes, model_folder, tree, weights};

/// The faults of a refused input, as text.
async fn refused(input: &Path, kind: Option<Kind>) -> Vec<String> {
    match Bundle::read(input, kind).await {
        Err(Error::Refused { faults, .. }) => faults
            .iter()
            .map(|fault| if fault.path.as_str().is_empty() { fault.message.clone() } else { fault.to_string() })
            .collect(),
        other => panic!("{}: {other:?}", input.display()),
    }
}

#[tokio::test]
async fn a_model_folder_is_pushed_and_comes_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let paths = model_folder(&folder);
    fs::write(folder.join(".gitattributes"), "x").unwrap();
    fs::create_dir(folder.join(".cache")).unwrap();
    let bundle = Bundle::read(&folder, None).await.unwrap();
    assert_eq!(bundle.kind(), Kind::Model);
    assert_eq!(bundle.skipped(), [".cache", ".gitattributes"]);

    let store = BlobStore::open(dir.path().join("store").to_str().unwrap()).await.unwrap();
    let project = Project::default();
    let manifest = bundle.push(&store, &project, Causes::default()).await.unwrap();
    assert_eq!(manifest.files().iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), paths);
    // Again, and from a copy at another place: the same name, and nothing more is stored.
    let stored = store.blobs(&project).await.unwrap();
    let copy = dir.path().join("elsewhere/copy");
    model_folder(&copy);
    let again =
        Bundle::read(&copy, Some(Kind::Model)).await.unwrap().push(&store, &project, Causes::default()).await.unwrap();
    assert_eq!(again.digest(), manifest.digest());
    assert_eq!(store.blobs(&project).await.unwrap(), stored);

    let out = dir.path().join("out/model");
    let mut unpack = Unpack::to(&out, manifest.digest()).await.unwrap();
    store.pull(&project, &manifest.digest(), &mut unpack).await.unwrap();
    assert_eq!(unpack.finish().await.unwrap(), out);
    for path in &paths {
        assert!(fs::read(out.join(path)).unwrap() == fs::read(folder.join(path)).unwrap(), "{path}");
    }
    assert_eq!(tree(&out).len(), paths.len() + 1);
    assert_eq!(tree(&dir.path().join("out")).iter().filter(|path| !path.starts_with("model")).count(), 0);
    // What came back can be pushed again under the same name.
    assert_eq!(Bundle::read(&out, None).await.unwrap().manifest(Causes::default()).unwrap(), manifest);
}

#[tokio::test]
async fn a_model_without_weights_is_the_start_of_a_job_from_scratch() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let bundle = Bundle::read(dir.path(), None).await.unwrap();
    assert_eq!((bundle.kind(), bundle.manifest(Causes::default()).unwrap().files().len()), (Kind::Model, 2));
    // Weights that no loader would find are no start of anything.
    fs::write(dir.path().join("model-00001-of-00002.safetensors"), weights("a", b"a")).unwrap();
    let faults = refused(dir.path(), None).await;
    assert_eq!(
        faults,
        [
            "`model.safetensors` is missing, and so is model.safetensors.index.json; \"model-00001-of-00002.safetensors\" would not be found without one"
        ]
    );
}

#[tokio::test]
async fn all_faults_of_a_model_come_at_once() {
    let dir = tempfile::tempdir().unwrap();
    model_folder(dir.path());
    let at = |name: &str| dir.path().join(name);
    fs::write(at("config.json"), "{\n \"model_type\": 7}").unwrap();
    fs::write(
        at("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "model-00002-of-00002.safetensors", "c": "gone.safetensors"}}"#,
    )
    .unwrap();
    fs::write(at("model-00001-of-00002.safetensors"), &weights("a", b"abcd")[..20]).unwrap();
    fs::write(at("extra/old.bin"), [&[0x80, 2][..], b"}q\x00."].concat()).unwrap();
    let faults = refused(dir.path(), Some(Kind::Model)).await.join("\n");
    for expected in [
        "`config.json` has no text `model_type`",
        "`model.safetensors.index.json` says that \"a\" is in \"model-00002-of-00002.safetensors\", and it is not",
        "`model.safetensors.index.json` names \"gone.safetensors\", which is missing",
        "`model-00001-of-00002.safetensors` says that its header has",
        "`extra/old.bin` is a Python pickle",
    ] {
        assert!(faults.contains(expected), "{expected} is not among\n{faults}");
    }
    assert_eq!(faults.lines().count(), 5, "{faults}");
    fs::write(at("config.json"), "{\n  \"model_type\": ").unwrap();
    assert!(refused(dir.path(), None).await.iter().any(|fault| fault.contains("`config.json` is not JSON: line 2")));
}

#[tokio::test]
async fn what_runs_code_when_loaded_is_refused_by_content_whatever_its_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let npy =
        [b"\x93NUMPY\x01\x00v\x00".as_slice(), b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"].concat();
    let plain_npy =
        [b"\x93NUMPY\x01\x00v\x00".as_slice(), b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n1234"]
            .concat();
    for (name, content, expected) in [
        ("model.safetensors", &b"\x80\x02}q\x00."[..], "is a Python pickle"),
        ("model.safetensors", b"\x80\x05\x95", "is a Python pickle"),
        ("pytorch_model.bin", b"PK\x03\x04rest", "is a zip archive"),
        ("tokenizer.json", b"PK\x05\x06", "is a zip archive"),
        ("vectors.npy", &npy, "is a NumPy file of Python objects"),
        // Protocol 0 is text and has no mark; its usual names are refused.
        ("training_args.pt", b"cos\nsystem\n(S'id'\ntR.", "is a .pt file"),
        ("x.PKL", b"cos\nsystem\n", "is a .pkl file"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        // As a model, and as something whose files are otherwise free.
        for kind in [None, Some(Kind::Report), Some(Kind::Checkpoint), Some(Kind::Dataset)] {
            let faults = refused(dir.path(), kind).await;
            let here: Vec<_> = faults.iter().filter(|fault| fault.starts_with(&format!("`{name}`"))).collect();
            assert!(here.len() == 1 && here[0].contains(expected), "{name} as {kind:?}: {faults:?}");
            assert!(here[0].contains("convert it to safetensors and leave it out"), "{here:?}");
        }
        fs::remove_file(path).unwrap();
    }
    // A lone file is refused for what it is, not for what it is not.
    let lone = dir.path().join("adapter_model.bin");
    fs::write(&lone, b"\x80\x02}q\x00.").unwrap();
    assert!(refused(&lone, None).await[0].contains("is a Python pickle"));
    fs::remove_file(lone).unwrap();
    fs::write(dir.path().join("numbers.npy"), plain_npy).unwrap();
    Bundle::read(dir.path(), None).await.unwrap();
}

#[tokio::test]
async fn a_polyglot_is_no_safetensors_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    // A good file with an archive behind it: zip readers look at the end.
    let mut file = weights("a", b"abcd");
    file.extend_from_slice(b"PK\x05\x06");
    file.resize(file.len() + 18, 0);
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    assert_eq!(refused(dir.path(), None).await, ["`model.safetensors` has 22 bytes after its last tensor"]);
}

#[tokio::test]
async fn a_dataset_is_a_file_or_a_folder_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("train.jsonl"), "{\"text\": \"é\"}\n").unwrap();
    let bundle = Bundle::read(&at("train.jsonl"), None).await.unwrap();
    assert_eq!((bundle.kind(), bundle.skipped().len()), (Kind::Dataset, 0));
    let manifest = bundle.manifest(Causes::default()).unwrap();
    assert_eq!((manifest.files().len(), manifest.files()[0].path.as_str()), (1, "train.jsonl"));
    fs::write(at("part.parquet"), b"PAR1xxxxPAR1").unwrap();
    fs::write(at("rows.csv"), "a,b\n1,2\n").unwrap();
    fs::write(at("README.md"), "").unwrap();
    assert_eq!(Bundle::read(dir.path(), None).await.unwrap().kind(), Kind::Dataset);

    for (name, content, expected) in [
        ("a.jsonl", &b""[..], "`a.jsonl` is empty"),
        ("a.jsonl", b"\xff\xfe{", "`a.jsonl` is not UTF-8 text: byte 0 starts no character"),
        ("a.csv", b"a\x00b", "`a.csv` is not text: it has NUL bytes"),
        ("a.parquet", b"PAR1xxxxPAR", "`a.parquet` is not a whole Parquet file"),
        ("a.parquet", b"PAR", "`a.parquet` is not a whole Parquet file"),
        ("a.json", b"[]", "`a.json` is one JSON document; data is one JSON object per line, in a .jsonl file"),
        (
            "a.jsonl.gz",
            b"\x1f\x8b",
            "`a.jsonl.gz` is compressed; decompress it first, expected .jsonl, .csv or .parquet",
        ),
        ("a.txt", b"x", "`a.txt` is not a data file; expected .jsonl, .csv or .parquet"),
    ] {
        fs::write(at(name), content).unwrap();
        assert_eq!(refused(&at(name), Some(Kind::Dataset)).await, [expected]);
        fs::remove_file(at(name)).unwrap();
    }
    // A character that is cut by the end of the part that is looked at is none of our business.
    fs::write(
        at("long.jsonl"),
        "é".repeat(40_000).as_bytes()[1..].iter().map(|_| b'a').chain("é".repeat(40_000).bytes()).collect::<Vec<_>>(),
    )
    .unwrap();
    Bundle::read(&at("long.jsonl"), None).await.unwrap();
}

#[tokio::test]
async fn what_is_nothing_known_is_said_to_be_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = Bundle::read(&dir.path().join("gone"), None).await.unwrap_err();
    assert!(matches!(&error, Error::NotFound { what, .. } if what.ends_with("gone")), "{error}");
    assert!(refused(dir.path(), None).await[0].contains("found no files"));
    assert_eq!(refused(dir.path(), Some(Kind::Checkpoint)).await, ["has no files"]);
    fs::write(dir.path().join("notes.txt"), "x").unwrap();
    let fault = refused(dir.path(), None).await;
    assert_eq!(
        fault,
        [
            "is not a model (config.json), an adapter (adapter_config.json) or data (expected .jsonl, .csv or .parquet); found notes.txt"
        ]
    );
    let faults = refused(dir.path(), Some(Kind::Adapter)).await;
    assert_eq!(faults, ["`adapter_config.json` is missing", "`adapter_model.safetensors` is missing"]);
    assert_eq!(Bundle::read(dir.path(), Some(Kind::Report)).await.unwrap().kind(), Kind::Report);
}

#[tokio::test]
async fn links_inside_are_followed_and_links_outside_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("data");
    fs::create_dir(&folder).unwrap();
    fs::write(dir.path().join("secret.jsonl"), "secret\n").unwrap();
    fs::write(folder.join("a.jsonl"), "{}\n").unwrap();
    symlink("a.jsonl", folder.join("b.jsonl")).unwrap();
    let manifest = Bundle::read(&folder, None).await.unwrap().manifest(Causes::default()).unwrap();
    assert_eq!((manifest.files().len(), manifest.blobs().len()), (2, 1));
    symlink("../secret.jsonl", folder.join("c.jsonl")).unwrap();
    let faults = refused(&folder, None).await;
    assert!(
        faults.len() == 1 && faults[0].starts_with("`c.jsonl` is a symbolic link to a place outside"),
        "{faults:?}"
    );
    assert!(faults[0].contains("cp -rL"), "{faults:?}");
    // The input itself may be a link: that is how its owner names it.
    symlink(folder.join("a.jsonl"), dir.path().join("named.jsonl")).unwrap();
    let bundle = Bundle::read(&dir.path().join("named.jsonl"), None).await.unwrap();
    assert_eq!(bundle.manifest(Causes::default()).unwrap().files()[0].path, "named.jsonl");
}

#[tokio::test]
async fn a_file_that_is_changed_or_swapped_between_hashing_and_sending_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(dir.path().join("secret"), "SECRET\n").unwrap();
    fs::write(&path, "{\"n\": 1}\n").unwrap();
    let store = BlobStore::open("memory://").await.unwrap();
    let project = Project::default();
    let bundle = Bundle::read(&path, None).await.unwrap();
    fs::write(&path, "{\"n\": 2}\n").unwrap();
    let error = bundle.push(&store, &project, Causes::default()).await.unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    fs::remove_file(&path).unwrap();
    symlink("secret", &path).unwrap();
    let error = bundle.push(&store, &project, Causes::default()).await.unwrap_err();
    assert!(matches!(error, Error::BrokenOff { .. }), "{error}");
    assert_eq!(store.blobs(&project).await.unwrap(), []);
    assert_eq!(store.manifests(&project).await.unwrap(), []);
}

#[tokio::test]
async fn a_folder_of_too_many_files_and_one_of_colliding_names_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..10_002 {
        fs::write(dir.path().join(format!("{i}.jsonl")), "").unwrap();
    }
    assert_eq!(refused(dir.path(), Some(Kind::Report)).await, ["has more than 10000 files"]);
    let dir = tempfile::tempdir().unwrap();
    for name in ["README.jsonl", "readme.jsonl"] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    let text = match Bundle::read(dir.path(), None).await {
        Ok(bundle) => bundle.manifest(Causes::default()).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(text.contains("is \"readme.jsonl\", which collides with \"README.jsonl\""), "{text}");
}

#[tokio::test]
async fn equal_files_are_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.jsonl", "b.jsonl"] {
        fs::write(dir.path().join(name), bytes(1, 100).iter().map(|b| b'a' + b % 26).collect::<Vec<_>>()).unwrap();
    }
    let store = BlobStore::open("memory://").await.unwrap();
    let bundle = Bundle::read(dir.path(), None).await.unwrap();
    let manifest = bundle.push(&store, &Project::default(), Causes::default()).await.unwrap();
    assert_eq!(manifest.files().len(), 2);
    assert_eq!(store.blobs(&Project::default()).await.unwrap(), manifest.blobs());
}
