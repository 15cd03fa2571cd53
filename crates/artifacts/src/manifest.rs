//! The manifest: which files an artifact has, of which kind it is and what it was made from. Its canonical JSON bytes
//! are hashed to the artifact's name, so two makers of the same thing arrive at the same name.
//!
//! A manifest that comes from outside is untrusted: everything in it is bounded and checked before it is used, and bytes
//! that are not the canonical form of what they say are refused.

use std::fmt;
use std::str::FromStr;

use attune_spec::id::Digest;
use attune_spec::{Fault, FieldPath};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::lineage::Causes;
use crate::{canonical, hash, path};

/// The format that is written. Every format that was ever released stays readable.
pub const FORMAT: u32 = 1;
/// Most files in one artifact.
pub const FILES_MAX: usize = 10_000;
/// Largest manifest, in bytes of its canonical JSON; fits a gRPC message of default size.
pub const MANIFEST_BYTES_MAX: usize = 3 << 20;
/// Largest file, 4 TiB.
pub const FILE_BYTES_MAX: u64 = 1 << 42;

/// What an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A whole model in Hugging Face's layout.
    Model,
    /// An adapter in PEFT's layout.
    Adapter,
    /// Tuned weights minus base weights.
    TaskVector,
    /// Rows of training or evaluation data.
    Dataset,
    /// A data mixture: which domains in which proportions.
    Mixture,
    /// Statistics of a model over data.
    Statistics,
    /// The whole state of an attempt.
    Checkpoint,
    /// Measurements and tables.
    Report,
}

impl Kind {
    /// Every kind, in the order of the design's table.
    pub const ALL: [Self; 8] = [
        Self::Model,
        Self::Adapter,
        Self::TaskVector,
        Self::Dataset,
        Self::Mixture,
        Self::Statistics,
        Self::Checkpoint,
        Self::Report,
    ];

    /// The written form.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Adapter => "adapter",
            Self::TaskVector => "task_vector",
            Self::Dataset => "dataset",
            Self::Mixture => "mixture",
            Self::Statistics => "statistics",
            Self::Checkpoint => "checkpoint",
            Self::Report => "report",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str);
            let shown: String = text.chars().take(40).collect();
            let hint = attune_spec::suggest::hint(&shown, names);
            let message = format!("is {shown:?}; expected one of {}{hint}", names.join(", "));
            Error::Refused { what: "the artifact kind".into(), faults: vec![Fault::new("kind", message)] }
        })
    }
}

/// Some bytes by name and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobRef {
    /// The BLAKE3 digest of the bytes.
    pub digest: Digest,
    /// How many there are.
    pub size_bytes: u64,
}

impl fmt::Display for BlobRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.digest, self.size_bytes)
    }
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Relative path, `/` between folders; see [`crate::path::check`].
    pub path: String,
    /// Length.
    pub size_bytes: u64,
    /// The BLAKE3 digest of its bytes.
    pub digest: Digest,
}

impl File {
    /// The bytes that it holds.
    pub fn blob(&self) -> BlobRef {
        BlobRef { digest: self.digest, size_bytes: self.size_bytes }
    }
}

/// The stored form of format 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Format1 {
    format: u32,
    kind: Kind,
    files: Vec<File>,
    #[serde(default, skip_serializing_if = "is_default")]
    causes: Causes,
}

fn is_default(causes: &Causes) -> bool {
    *causes == Causes::default()
}

/// A checked manifest and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    content: Format1,
    bytes: Bytes,
    digest: Digest,
}

impl Manifest {
    /// The manifest of `files` (sorted here), with every fault at once if it cannot be one.
    ///
    /// # Errors
    /// [`Error::Refused`] with a fault for each path, size, count or cause that is not allowed.
    pub fn new(kind: Kind, mut files: Vec<File>, causes: Causes) -> Result<Self> {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Self::checked(Format1 { format: FORMAT, kind, files, causes })
    }

    /// Reads a manifest that came from outside.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is too large, not of a known format, has unknown fields, is not in canonical form, or
    /// says something that [`Manifest::new`] would refuse.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let refuse = |fault: Fault| Error::Refused { what: "the manifest".into(), faults: vec![fault] };
        if bytes.len() > MANIFEST_BYTES_MAX {
            let message = format!("is {} bytes; at most {MANIFEST_BYTES_MAX} are allowed", bytes.len());
            return Err(refuse(Fault::new("", message)));
        }
        // The format is looked at first, so that a newer manifest is named as such and not as one with unknown fields.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let invalid = |e: serde_json::Error| refuse(Fault::new("", format!("is not a manifest: {}", printable(&e))));
        let head: Head = serde_json::from_slice(bytes).map_err(invalid)?;
        if head.format != FORMAT {
            let message = format!("is {}; this version reads format {FORMAT}", head.format);
            return Err(refuse(Fault::new("format", message)));
        }
        let manifest = Self::checked(serde_json::from_slice(bytes).map_err(invalid)?)?;
        if manifest.bytes != bytes {
            let message = "is not in canonical form (compact, keys and files sorted, defaults left out)";
            return Err(refuse(Fault::new("", message)));
        }
        Ok(manifest)
    }

    fn checked(content: Format1) -> Result<Self> {
        let mut faults = check_files(&content.files);
        faults.extend(content.causes.check().into_iter().map(|fault| fault.under(&"causes".into())));
        if faults.is_empty() {
            let value = serde_json::to_value(&content).expect("a manifest has string keys only");
            let bytes = Bytes::from(canonical::to_string(&value));
            if bytes.len() <= MANIFEST_BYTES_MAX {
                let digest = hash::bytes(&bytes);
                return Ok(Self { content, bytes, digest });
            }
            let message = format!("is {} bytes; at most {MANIFEST_BYTES_MAX} are allowed", bytes.len());
            faults.push(Fault::new("", message));
        }
        Err(Error::Refused { what: "the manifest".into(), faults })
    }

    /// The artifact's name: the digest of [`Manifest::bytes`].
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The canonical JSON.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the artifact is.
    pub fn kind(&self) -> Kind {
        self.content.kind
    }

    /// Its files, sorted by path; at least one.
    pub fn files(&self) -> &[File] {
        &self.content.files
    }

    /// The file at `path`.
    pub fn file(&self, path: &str) -> Option<&File> {
        let at = self.files().binary_search_by(|file| file.path.as_str().cmp(path)).ok()?;
        self.files().get(at)
    }

    /// What it was made from.
    pub fn causes(&self) -> &Causes {
        &self.content.causes
    }

    /// The distinct blobs behind its files, sorted.
    pub fn blobs(&self) -> Vec<BlobRef> {
        let mut blobs: Vec<_> = self.files().iter().map(File::blob).collect();
        blobs.sort_unstable();
        blobs.dedup();
        blobs
    }

    /// Sum of the lengths of its files.
    pub fn size_bytes(&self) -> u64 {
        self.files().iter().map(|file| file.size_bytes).sum()
    }
}

/// Every fault in the list of files, up to a limit that keeps the answer small.
fn check_files(files: &[File]) -> Vec<Fault> {
    const FAULTS_MAX: usize = 100;
    let list = FieldPath::root().field("files");
    if files.is_empty() || files.len() > FILES_MAX {
        let message = format!("has {} entries; expected 1 ..= {FILES_MAX}", files.len());
        return vec![Fault { path: list, message }];
    }
    let mut faults = Vec::new();
    let mut collisions = path::Collisions::default();
    let mut sizes = std::collections::BTreeMap::new();
    for (i, file) in files.iter().enumerate() {
        if faults.len() >= FAULTS_MAX {
            break;
        }
        let at = |field: &str| list.index(i).field(field);
        if let Err(message) = path::check(&file.path).and_then(|()| collisions.add(&file.path)) {
            faults.push(Fault { path: at("path"), message });
        }
        if file.size_bytes > FILE_BYTES_MAX {
            let message = format!("is {}; at most {FILE_BYTES_MAX} is allowed", file.size_bytes);
            faults.push(Fault { path: at("size_bytes"), message });
        }
        let known = *sizes.entry(file.digest).or_insert(file.size_bytes);
        if known != file.size_bytes {
            let message = format!("is {}, but {known} for another file of the same digest", file.size_bytes);
            faults.push(Fault { path: at("size_bytes"), message });
        }
    }
    if faults.is_empty() && !files.is_sorted_by(|a, b| a.path < b.path) {
        faults.push(Fault { path: list, message: "is not sorted by path".into() });
    }
    faults
}

/// An error text without control characters, short enough for one line.
fn printable(error: &serde_json::Error) -> String {
    error.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).take(300).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn file(path: &str, byte: u8) -> File {
        File { path: path.into(), size_bytes: u64::from(byte), digest: Digest::from_bytes([byte; 32]) }
    }

    fn faults(result: Result<Manifest>) -> Vec<String> {
        match result.unwrap_err() {
            Error::Refused { faults, .. } => faults.iter().map(ToString::to_string).collect(),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_name_depends_on_content_and_causes_only() {
        let one = Manifest::new(Kind::Adapter, vec![file("b", 1), file("a", 2)], Causes::default()).unwrap();
        let two = Manifest::new(Kind::Adapter, vec![file("a", 2), file("b", 1)], Causes::default()).unwrap();
        assert_eq!(one, two);
        assert_eq!(Manifest::parse(one.bytes()).unwrap(), one);
        let causes = Causes { logical_shards: Some(8), ..Causes::default() };
        let other = Manifest::new(Kind::Adapter, vec![file("a", 2), file("b", 1)], causes).unwrap();
        assert_ne!(other.digest(), one.digest());
        assert_eq!(one.file("b").unwrap().size_bytes, 1);
        assert!(one.file("c").is_none());
        assert_eq!(one.size_bytes(), 3);
    }

    #[test]
    fn all_faults_come_at_once_with_their_paths() {
        let mut huge = file("ok", 3);
        huge.size_bytes = u64::MAX;
        let files = vec![file("../x", 1), file("A", 2), file("a", 3), huge];
        let causes = Causes { logical_shards: Some(0), ..Causes::default() };
        let faults = faults(Manifest::new(Kind::Model, files, causes));
        for (fault, start) in faults.iter().zip([
            "`files[0].path` is \"../x\"",
            "`files[2].path` is \"a\", which collides with \"A\"",
            "`files[3].size_bytes` is 18446744073709551615; at most",
            "`files[3].size_bytes` is 18446744073709551615, but 3 for",
            "`causes.logical_shards` is 0",
        ]) {
            assert!(fault.starts_with(start), "{fault} does not start with {start}");
        }
        assert_eq!(faults.len(), 5, "{faults:?}");
    }

    #[test]
    fn only_canonical_bytes_of_a_known_format_are_read() {
        let causes =
            Causes { inputs: BTreeMap::from([("base".into(), Digest::from_bytes([9; 32]))]), ..Causes::default() };
        let manifest = Manifest::new(Kind::Dataset, vec![file("a", 1), file("b", 2)], causes).unwrap();
        let text = std::str::from_utf8(manifest.bytes()).unwrap();
        let swap = |from: &str, to: &str| {
            assert!(text.contains(from), "{from} is not in {text}");
            faults(Manifest::parse(text.replacen(from, to, 1).as_bytes())).join("; ")
        };
        assert!(swap("{", "{ ").contains("canonical"));
        assert!(swap("\"format\":1", "\"format\":2").contains("`format` is 2; this version reads format 1"));
        assert!(swap("\"format\":1", "\"format\":1,\"x\":1").contains("unknown field `x`"));
        assert!(swap("\"format\":1", "\"format\":1,\"kind\":\"dataset\"").contains("duplicate field"));
        assert!(swap("\"path\":\"a\"", "\"path\":\"c\"").contains("not sorted"));
        assert!(swap("\"path\":\"a\"", "\"path\":\"\\u0061\"").contains("canonical"));
        assert!(swap("\"causes\":{", "\"causes\":{\"plan\":null,").contains("canonical"));
        assert!(swap("dataset", "pickle").contains("unknown variant"));
        assert!(faults(Manifest::parse(b"")).join("").contains("is not a manifest"));
        assert!(faults(Manifest::parse("[".repeat(100_000).as_bytes())).join("").contains("is not a manifest"));
    }

    #[test]
    fn a_million_entries_are_refused() {
        let files = (0..1_000_000u32).map(|i| file(&i.to_string(), 1)).collect();
        assert_eq!(
            faults(Manifest::new(Kind::Dataset, files, Causes::default())),
            ["`files` has 1000000 entries; expected 1 ..= 10000"]
        );
        assert!(faults(Manifest::new(Kind::Dataset, vec![], Causes::default()))[0].contains("has 0 entries"));
        assert!(faults(Manifest::parse(&vec![b' '; MANIFEST_BYTES_MAX + 1]))[0].contains("at most"));
    }

    #[test]
    fn a_kind_is_read_back_and_a_slip_is_named() {
        for kind in Kind::ALL {
            assert_eq!(kind.as_str().parse::<Kind>().unwrap(), kind);
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert!("adaptor".parse::<Kind>().unwrap_err().to_string().contains("did you mean \"adapter\"?"));
    }
}
