//! The header of a file from anywhere, validated before anything in it is used (A24).

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use attune_spec::Fault;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::dtype::{Dtype, size_bytes};
use super::{METADATA, at};
use crate::error::{Error, Result};

/// Longest header, as in the reference implementation.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 32;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes lie, counted from the file's start.
    pub bytes: std::ops::Range<u64>,
}

/// A validated header: the tensors tile the file without overlap or hole, and their lengths agree with their shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    tensors: BTreeMap<String, Info>,
    metadata: BTreeMap<String, String>,
}

impl Header {
    /// Reads and validates the header of the file at `path`. Blocks.
    ///
    /// # Errors
    /// [`Error::Refused`] with every fault, each at its tensor; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let mut file = fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
        let size = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        Self::read_from(&mut file, size, &path.display().to_string())
    }

    /// The same for a source that stands at its start and has `size_bytes` bytes; `what` names it in errors. Never
    /// allocates more than the source is long.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn read_from(source: &mut impl Read, size_bytes: u64, what: &str) -> Result<Self> {
        let refuse = |fault: Fault| Error::Refused { what: what.to_owned(), faults: vec![fault] };
        let whole = |message: String| refuse(Fault::new("", message));
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::UnexpectedEof => whole(format!("is cut: it ends before its {size_bytes} bytes")),
            _ => Error::io("read", Path::new(what), e),
        };
        if size_bytes < 8 {
            return Err(whole(format!("has {size_bytes} bytes; a safetensors file has at least 8")));
        }
        let mut length = [0; 8];
        source.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > size_bytes - 8 {
            let message = format!(
                "says that its header has {length} bytes, but {} follow; it is cut or no safetensors file",
                size_bytes - 8
            );
            return Err(whole(message));
        }
        if length > HEADER_BYTES_MAX {
            return Err(whole(format!("has a header of {length} bytes; at most {HEADER_BYTES_MAX} are allowed")));
        }
        let mut text = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        source.read_exact(&mut text).map_err(failed)?;
        if text.first() != Some(&b'{') {
            return Err(whole("has a header that does not start with '{'; it is no safetensors file".into()));
        }
        let raw: RawHeader = serde_json::from_slice(&text).map_err(|e| {
            let text: String = e.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).take(300).collect();
            whole(format!("has a header that cannot be read: {text}"))
        })?;
        raw.validate(8 + length, size_bytes).map_err(|faults| Error::Refused { what: what.to_owned(), faults })
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Info> {
        &self.tensors
    }

    /// The free texts of the header, such as `format: pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// The header as it stands in the file, repeated names included.
#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawInfo)>,
    metadata: Option<BTreeMap<String, String>>,
    repeated: Vec<String>,
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA {
                        header.tensors.push((name, map.next_value()?));
                    } else if header.metadata.replace(map.next_value()?).is_some() {
                        header.repeated.push(name);
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

impl RawHeader {
    fn validate(self, data_start: u64, size_bytes: u64) -> Result<Header, Vec<Fault>> {
        let data_bytes = size_bytes - data_start;
        let mut faults: Vec<_> = self.repeated.iter().map(|name| at(name, "is there twice")).collect();
        let mut tensors = BTreeMap::new();
        let mut spans = Vec::new();
        // A file that was cut has them by the hundred, for one reason.
        let mut beyond = Vec::new();
        for (name, raw) in self.tensors {
            match raw.check(data_bytes) {
                Err(message) if raw.data_offsets[1] > data_bytes => beyond.push((raw.data_offsets, name, message)),
                Err(message) => faults.push(at(&name, message)),
                Ok((dtype, shape)) => {
                    let [start, end] = raw.data_offsets;
                    spans.push((start, end, name.clone()));
                    let info = Info { dtype, shape, bytes: data_start + start..data_start + end };
                    if tensors.insert(name.clone(), info).is_some() {
                        faults.push(at(&name, "is there twice"));
                    }
                }
            }
        }
        beyond.sort();
        if let Some((_, name, message)) = beyond.first() {
            let more = match beyond.len() - 1 {
                0 => String::new(),
                more => format!(", {more} more of its tensors among the missing"),
            };
            faults.push(at(name, format!("{message}{more}")));
        }
        // With a faulty tensor left out, a hole would be reported where it lies; one explanation is enough.
        if faults.is_empty() {
            faults.extend(check_tiling(spans, data_bytes));
        }
        if faults.is_empty() {
            Ok(Header { tensors, metadata: self.metadata.unwrap_or_default() })
        } else {
            faults.truncate(100);
            Err(faults)
        }
    }
}

impl RawInfo {
    fn check(&self, data_bytes: u64) -> Result<(Dtype, Vec<usize>), String> {
        let shown: String = self.dtype.chars().take(40).collect();
        let dtype = Dtype::from_name(&self.dtype).ok_or_else(|| format!("has the unknown dtype {shown:?}"))?;
        if self.shape.len() > RANK_MAX {
            return Err(format!("has {} dimensions; at most {RANK_MAX} are allowed", self.shape.len()));
        }
        let [start, end] = self.data_offsets;
        if start > end || end > data_bytes {
            return Err(format!(
                "lies at {start} .. {end}, but the data has {data_bytes} bytes; the file is cut or wrong"
            ));
        }
        let size = size_bytes(dtype, &self.shape)
            .ok_or_else(|| format!("has the shape {:?}, which has no length in bytes", self.shape))?;
        if size != end - start {
            return Err(format!("is {dtype} of shape {:?}, {size} bytes, but lies at {start} .. {end}", self.shape));
        }
        let shape = self.shape.iter().map(|n| usize::try_from(*n).map_err(|_| format!("has a dimension of {n}")));
        Ok((dtype, shape.collect::<Result<_, _>>()?))
    }
}

/// The first place where the spans do not lie end to end over the whole data.
fn check_tiling(mut spans: Vec<(u64, u64, String)>, data_bytes: u64) -> Option<Fault> {
    spans.sort();
    let mut covered = 0;
    for (start, end, name) in &spans {
        if *start != covered {
            let how = if *start < covered { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Some(at(name, format!("lies at {start} .. {end}: it {how}, which ends at {covered}")));
        }
        covered = *end;
    }
    (covered != data_bytes).then(|| Fault::new("", format!("has {} bytes after its last tensor", data_bytes - covered)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        Header::read_from(&mut &*bytes, bytes.len() as u64, "x.safetensors")
    }

    fn refusal(bytes: &[u8]) -> String {
        match read(bytes) {
            Err(error @ Error::Refused { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}"#;

    #[test]
    fn a_good_header_says_where_each_tensor_lies() {
        let bytes = file(GOOD, 9);
        let header = read(&bytes).unwrap();
        let start = bytes.len() as u64 - 9;
        let a = Info { dtype: Dtype::F32, shape: vec![2, 1], bytes: start..start + 8 };
        let b = Info { dtype: Dtype::U8, shape: vec![], bytes: start + 8..start + 9 };
        assert_eq!(*header.tensors(), BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]));
        assert_eq!(header.metadata()["format"], "pt");
        // Padding of the header, no tensors at all, and an empty tensor are all in use.
        read(&file(&format!("{GOOD}    "), 9)).unwrap();
        read(&file("{}", 0)).unwrap();
        read(&file(r#"{"e":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]}}"#, 0)).unwrap();
    }

    #[test]
    fn attacks_are_refused_with_the_tensor_and_the_reason() {
        let one = |info: &str| format!(r#"{{"t":{{{info}}}}}"#);
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        let deep = format!("{{\"t\":{}", "[".repeat(100_000));
        let many = format!("[{}1]", "1,".repeat(40));
        let max = u64::MAX;
        let cases: Vec<(&str, String, usize, &str)> = vec![
            ("unknown dtype", one(r#""dtype":"OBJ","shape":[1],"data_offsets":[0,1]"#), 1, "`t` has the unknown dtype \"OBJ\""),
            ("wrong length", one(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4, "`t` is F32 of shape [2], 8 bytes"),
            ("negative shape", one(r#""dtype":"U8","shape":[-1],"data_offsets":[0,1]"#), 1, "cannot be read"),
            ("shape overflow", one(&format!(r#""dtype":"F32","shape":[{max},{max}],"data_offsets":[0,4]"#)), 4, "which has no length in bytes"),
            ("overflow to a right length", one(r#""dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]"#), 16, "which has no length in bytes"),
            ("half a byte", one(r#""dtype":"F4","shape":[3],"data_offsets":[0,1]"#), 1, "which has no length in bytes"),
            ("offsets past the end", one(r#""dtype":"U8","shape":[9],"data_offsets":[0,9]"#), 8, "but the data has 8 bytes"),
            ("offsets backwards", one(r#""dtype":"U8","shape":[1],"data_offsets":[1,0]"#), 1, "lies at 1 .. 0"),
            ("huge offsets", one(&format!(r#""dtype":"U8","shape":[1],"data_offsets":[{},{max}]"#, max - 1)), 1, "but the data has 1 bytes"),
            ("too many dimensions", one(&format!(r#""dtype":"U8","shape":{many},"data_offsets":[0,1]"#)), 1, "has 41 dimensions"),
            ("cut in two tensors", two("[0,4]", "[4,8]"), 2, "the file is cut or wrong, 1 more of its tensors among the missing"),
            ("overlap", two("[0,4]", "[2,6]"), 6, "`b` lies at 2 .. 6: it overlaps"),
            ("hole", two("[0,4]", "[6,10]"), 10, "`b` lies at 6 .. 10: it leaves a hole"),
            ("hole at the start", two("[1,5]", "[5,9]"), 9, "`a` lies at 1 .. 5: it leaves a hole"),
            ("same place", two("[0,4]", "[0,4]"), 4, "`b` lies at 0 .. 4: it overlaps"),
            ("trailing bytes", two("[0,4]", "[4,8]"), 9, "has 1 bytes after its last tensor"),
            ("no tensors, some data", "{}".into(), 5, "has 5 bytes after its last tensor"),
            ("equal names", r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#.into(), 2, "`a` is there twice"),
            ("equal metadata", r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "`__metadata__` is there twice"),
            ("deep nesting", deep, 0, "cannot be read"),
            ("not an object", "[]".into(), 0, "does not start with '{'"),
            ("leading space", format!(" {GOOD}"), 9, "does not start with '{'"),
            ("two documents", "{}{}".into(), 0, "cannot be read"),
            ("not JSON", "{\u{1b}[31m".into(), 0, "cannot be read"),
            ("missing field", one(r#""dtype":"U8","shape":[1]"#), 1, "missing field `data_offsets`"),
        ];
        for (name, header, data, expected) in cases {
            let text = refusal(&file(&header, data));
            assert!(text.contains(expected), "{name}: {text}");
            assert!(!text.chars().any(char::is_control), "{name}: {text:?} is not safe to print");
        }
        // The message must not grow with the file.
        let bad = |i: usize| format!(r#""{i}{}":{{"dtype":"?","shape":[],"data_offsets":[0,0]}}"#, "n".repeat(1000));
        let header = format!("{{{}}}", (0..2000).map(bad).collect::<Vec<_>>().join(","));
        assert!(refusal(&file(&header, 0)).len() < 20_000);
    }

    #[test]
    fn lengths_that_lie_are_refused_before_anything_is_allocated() {
        for size in 0..8 {
            assert!(refusal(&vec![0; size]).contains("at least 8"));
        }
        for length in [3, 1 << 20, HEADER_BYTES_MAX, HEADER_BYTES_MAX + 1, u64::MAX, u64::MAX - 7] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend_from_slice(b"{}");
            assert!(refusal(&bytes).contains(&format!("says that its header has {length} bytes, but 2 follow")));
        }
        // A real file of that size would be read; the limit is on the header.
        struct Endless;
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let n = buffer.len().min(8);
                buffer[..n].copy_from_slice(&(HEADER_BYTES_MAX + 1).to_le_bytes()[..n]);
                Ok(n)
            }
        }
        let error = Header::read_from(&mut Endless, u64::MAX, "x").unwrap_err().to_string();
        assert!(error.contains("has a header of 100000001 bytes"), "{error}");
    }

    #[test]
    fn a_file_cut_at_any_byte_is_refused() {
        let bytes = file(GOOD, 9);
        for cut in 0..bytes.len() {
            refusal(&bytes[..cut]);
            // The same when the announced size is right and the source ends early.
            let error =
                Header::read_from(&mut &bytes[..cut.min(bytes.len() - 10)], bytes.len() as u64, "x").unwrap_err();
            assert!(error.to_string().contains("is cut"), "{cut}: {error}");
        }
    }

    proptest! {
        /// Whatever is accepted here, the reference implementation accepts, with the same tensors in the same places.
        #[test]
        fn what_is_accepted_the_reference_reads_alike(
            changes in prop::collection::vec((0..GOOD.len(), prop::sample::select(b"0123456789{}[]\",:-U8F324Bab. ".to_vec())), 0..3),
            data in 0_usize..12,
        ) {
            let mut header = GOOD.as_bytes().to_vec();
            for (at, byte) in changes {
                header[at] = byte;
            }
            let bytes = file(std::str::from_utf8(&header).unwrap(), data);
            if let Ok(ours) = read(&bytes) {
                let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
                prop_assert_eq!(ours.tensors().len(), theirs.len());
                for (name, info) in ours.tensors() {
                    let view = theirs.tensor(name).unwrap();
                    prop_assert_eq!(view.shape(), info.shape.as_slice());
                    let place = info.bytes.start as usize..info.bytes.end as usize;
                    prop_assert_eq!(view.data(), &bytes[place]);
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = read(&file(&String::from_utf8_lossy(&bytes), 8));
        }
    }
}
