//! Safetensors: eight bytes of header length (little endian), a JSON header, the tensors' bytes end to end.
//!
//! The header is validated before anything is used. The public `safetensors` crate would need the whole file in memory
//! and lets the last of two equal names win, so the check is our own and is held to that crate in its tests.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Read, Write as _};
use std::path::Path;

use attune_spec::Fault;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Longest header, as in the reference implementation.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 32;
const METADATA: &str = "__metadata__";

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal,)*) => {
        /// The type of a tensor's elements.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Every type, narrow ones first.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The written form.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Bits of one element.
            pub const fn bits(self) -> u64 {
                match self { $(Self::$variant => $bits,)* }
            }

            fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// 4-bit float.
    F4 "F4" 4,
    /// 6-bit float, 2 exponent bits.
    F6E2m3 "F6_E2M3" 6,
    /// 6-bit float, 3 exponent bits.
    F6E3m2 "F6_E3M2" 6,
    /// Boolean, one byte.
    Bool "BOOL" 8,
    /// Unsigned 8-bit integer.
    U8 "U8" 8,
    /// Signed 8-bit integer.
    I8 "I8" 8,
    /// 8-bit float, 5 exponent bits.
    F8E5m2 "F8_E5M2" 8,
    /// 8-bit float, 4 exponent bits.
    F8E4m3 "F8_E4M3" 8,
    /// 8-bit exponent.
    F8E8m0 "F8_E8M0" 8,
    /// 8-bit float, 4 exponent bits, one zero.
    F8E4m3Fnuz "F8_E4M3FNUZ" 8,
    /// 8-bit float, 5 exponent bits, one zero.
    F8E5m2Fnuz "F8_E5M2FNUZ" 8,
    /// Signed 16-bit integer.
    I16 "I16" 16,
    /// Unsigned 16-bit integer.
    U16 "U16" 16,
    /// 16-bit float.
    F16 "F16" 16,
    /// 16-bit float with the exponent of a 32-bit one.
    Bf16 "BF16" 16,
    /// Signed 32-bit integer.
    I32 "I32" 32,
    /// Unsigned 32-bit integer.
    U32 "U32" 32,
    /// 32-bit float.
    F32 "F32" 32,
    /// Complex number of two 32-bit floats.
    C64 "C64" 64,
    /// 64-bit float.
    F64 "F64" 64,
    /// Signed 64-bit integer.
    I64 "I64" 64,
    /// Unsigned 64-bit integer.
    U64 "U64" 64,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

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
        for (name, raw) in self.tensors {
            match raw.check(data_bytes) {
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

/// Bytes of a tensor; nothing when they overflow or do not end on a byte.
fn size_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let bits = shape.iter().try_fold(dtype.bits(), |bits, n| bits.checked_mul(*n))?;
    bits.is_multiple_of(8).then_some(bits / 8)
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

/// A fault at a tensor, whose name comes from the file and may be anything.
fn at(name: &str, message: impl Into<String>) -> Fault {
    let shown: String = name.chars().map(|c| if c.is_control() { '?' } else { c }).take(200).collect();
    Fault::new(shown.as_str(), message)
}

/// A tensor to be written: its bytes in row-major order, little endian.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub data: &'a [u8],
}

/// Writes `tensors` to `path`: the same tensors in any order give the same bytes, and the file appears only when it is
/// complete. Blocks.
///
/// # Errors
/// [`Error::Refused`] when a name repeats or the bytes do not fit the shape; [`Error::Io`], [`Error::Full`].
pub fn write(path: &Path, tensors: &[Tensor<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut sorted: Vec<&Tensor<'_>> = tensors.iter().collect();
    // Wide elements first, so that each tensor starts at a multiple of its element size.
    sorted.sort_by(|a, b| b.dtype.bits().cmp(&a.dtype.bits()).then_with(|| a.name.cmp(&b.name)));
    let mut faults = Vec::new();
    let mut names = std::collections::BTreeSet::new();
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.into(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for tensor in &sorted {
        if tensor.name == METADATA || !names.insert(&tensor.name) {
            faults.push(at(&tensor.name, "is there twice"));
        }
        let shape: Vec<u64> = tensor.shape.iter().map(|n| *n as u64).collect();
        let size = tensor.data.len() as u64;
        if size_bytes(tensor.dtype, &shape) != Some(size) {
            faults.push(at(&tensor.name, format!("is {} of shape {shape:?}, but has {size} bytes", tensor.dtype)));
        }
        let info = serde_json::json!({"dtype": tensor.dtype.as_str(), "shape": shape, "data_offsets": [offset, offset + size]});
        header.insert(tensor.name.clone(), info);
        offset += size;
    }
    if !faults.is_empty() {
        return Err(Error::Refused { what: path.display().to_string(), faults });
    }
    let mut text = serde_json::Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    super::write_file(path, |file| {
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        sorted.iter().try_for_each(|tensor| file.write_all(tensor.data))
    })
}
