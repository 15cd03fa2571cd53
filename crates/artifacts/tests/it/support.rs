//! What several tests need: bytes, names, folders to push.

use std::fs;
use std::path::Path;

use attune_artifacts::{BlobRef, Error, hash};
use attune_spec::id::Project;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};

/// `len` bytes that differ from place to place and by `seed`.
pub(crate) fn bytes(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(len + 8);
    while all.len() < len {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(len);
    all.into()
}

pub(crate) fn named(bytes: &[u8]) -> BlobRef {
    BlobRef { digest: hash::bytes(bytes), size_bytes: bytes.len() as u64 }
}

/// The bytes in pieces of `piece` bytes.
pub(crate) fn body(bytes: &Bytes, piece: usize) -> BoxStream<'static, Result<Bytes, Error>> {
    let pieces: Vec<_> = bytes.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    stream::iter(pieces).boxed()
}

pub(crate) fn project(name: &str) -> Project {
    Project::new(name).unwrap()
}

/// A small safetensors file with one tensor.
pub(crate) fn weights(name: &str, data: &[u8]) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[0,{}]}}}}"#, data.len(), data.len());
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Writes a model folder as Hugging Face has it, in two shards, and returns its files' paths, sorted.
pub(crate) fn model_folder(at: &Path) -> Vec<&'static str> {
    fs::create_dir_all(at.join("extra")).unwrap();
    let index = r#"{"metadata":{"total_size":7},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    fs::write(at.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    fs::write(at.join("model.safetensors.index.json"), index).unwrap();
    fs::write(at.join("model-00001-of-00002.safetensors"), weights("a", b"abcd")).unwrap();
    fs::write(at.join("model-00002-of-00002.safetensors"), weights("b", b"xyz")).unwrap();
    fs::write(at.join("tokenizer.json"), "{\"version\": \"1.0\"}\r\n").unwrap();
    fs::write(at.join("extra/notes.txt"), "").unwrap();
    fs::write(at.join("extra/more.bin"), bytes(3, 300_000)).unwrap();
    vec![
        "config.json",
        "extra/more.bin",
        "extra/notes.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
}

/// Every file and folder below `at`, relative and sorted; folders end in `/`.
pub(crate) fn tree(at: &Path) -> Vec<String> {
    fn walk(root: &Path, at: &Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if path.is_dir() && !path.is_symlink() {
                all.push(format!("{name}/"));
                walk(root, &path, all);
            } else {
                all.push(name);
            }
        }
    }
    let mut all = Vec::new();
    walk(at, at, &mut all);
    all.sort();
    all
}
