//! What files say that they are, and what they are. Names are a hint; the first bytes decide, and formats that can run
//! code when they are loaded are refused whatever they are called.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use attune_spec::Fault;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::folder::{self, Found};
use crate::formats::safetensors;
use crate::manifest::Kind;

/// Bytes at the start of a text file that are looked at; the data room reads every row.
const HEAD_BYTES: u64 = 64 << 10;
/// Largest JSON file that is read whole here.
const JSON_BYTES_MAX: u64 = 64 << 20;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
const DATA_FORM: &str = "expected .jsonl, .csv or .parquet";

/// The kind of a folder or file, by what is in it.
pub(crate) fn recognise(files: &[Found]) -> Result<Kind, Fault> {
    let has = |name: &str| files.iter().any(|file| file.path == name);
    if has(ADAPTER_CONFIG) {
        return Ok(Kind::Adapter);
    }
    if has(CONFIG) {
        return Ok(Kind::Model);
    }
    if files.iter().any(|file| is_data(&file.path)) {
        return Ok(Kind::Dataset);
    }
    let names: Vec<_> = files.iter().take(5).map(|file| file.path.as_str()).collect();
    Err(Fault::new(
        "",
        format!(
            "is not a model ({CONFIG}), an adapter ({ADAPTER_CONFIG}) or data ({DATA_FORM}); found {}",
            if names.is_empty() { "no files".into() } else { names.join(", ") }
        ),
    ))
}

/// Every fault of the files of an artifact of `kind`. Reads headers and small files, never whole weights.
pub(crate) fn check(root: &Path, files: &[Found], kind: Kind) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    let mut headers = BTreeMap::new();
    for found in files {
        let path = found.path.as_str();
        let mut file = folder::open(root, &found.real)?;
        let size = file.metadata().map_err(|e| Error::io("read", &root.join(&found.real), e))?.len();
        let head = head(&mut file).map_err(|e| Error::io("read", &root.join(&found.real), e))?;
        if let Some(message) = dangerous(path, &head) {
            faults.push(Fault::new(path, message));
        } else if extension(path) == "safetensors" {
            match safetensors::Header::read_from(&mut file, size, path) {
                Ok(header) => drop(headers.insert(path, header)),
                Err(Error::Refused { faults: found, .. }) => {
                    faults.extend(found.into_iter().map(|fault| match fault.path.as_str() {
                        "" => Fault::new(path, fault.message),
                        tensor => Fault::new(path, format!("has the tensor {tensor:?}, which {}", fault.message)),
                    }));
                }
                Err(other) => return Err(other),
            }
        } else if kind == Kind::Dataset
            && let Some(message) = not_data(path, &head, &mut file, size)
        {
            faults.push(Fault::new(path, message));
        }
    }
    let folder = Folder { root, files, headers };
    match kind {
        Kind::Model => folder.check_model(&mut faults)?,
        Kind::Adapter => folder.check_adapter(&mut faults)?,
        Kind::Dataset | Kind::TaskVector | Kind::Mixture | Kind::Statistics | Kind::Checkpoint | Kind::Report => {}
    }
    Ok(faults)
}

struct Folder<'a> {
    root: &'a Path,
    files: &'a [Found],
    headers: BTreeMap<&'a str, safetensors::Header>,
}

impl Folder<'_> {
    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.path == name)
    }

    fn check_model(&self, faults: &mut Vec<Fault>) -> Result<()> {
        self.object_with(CONFIG, "model_type", faults)?;
        if !self.has(INDEX) {
            // Without any weights it is a model to be trained from scratch; with some, they must be found by their name.
            if !self.has(WEIGHTS)
                && let Some(found) = self.files.iter().find(|file| extension(&file.path) == "safetensors")
            {
                let message = format!("is missing, and so is {INDEX}; {:?} would not be found without one", found.path);
                faults.push(Fault::new(WEIGHTS, message));
            }
            return Ok(());
        }
        let Some(index) = self.json(INDEX, faults)? else { return Ok(()) };
        let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
            faults.push(Fault::new(INDEX, "has no object `weight_map`"));
            return Ok(());
        };
        let mut missing = std::collections::BTreeSet::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().unwrap_or_default();
            match self.headers.get(shard) {
                // A file that is there but was refused has its fault already.
                None if self.has(shard) => {}
                None => drop(missing.insert(shard)),
                Some(header) if header.tensors().contains_key(tensor) => {}
                Some(_) => {
                    faults.push(Fault::new(INDEX, format!("says that {tensor:?} is in {shard:?}, and it is not")))
                }
            }
        }
        faults.extend(missing.into_iter().map(|shard| Fault::new(INDEX, format!("names {shard:?}, which is missing"))));
        Ok(())
    }

    fn check_adapter(&self, faults: &mut Vec<Fault>) -> Result<()> {
        self.object_with(ADAPTER_CONFIG, "peft_type", faults)?;
        if !self.has(ADAPTER_WEIGHTS) {
            faults.push(Fault::new(ADAPTER_WEIGHTS, "is missing"));
        }
        Ok(())
    }

    /// Demands a JSON object with a text at `key`.
    fn object_with(&self, name: &str, key: &str, faults: &mut Vec<Fault>) -> Result<()> {
        if !self.has(name) {
            faults.push(Fault::new(name, "is missing"));
        } else if let Some(value) = self.json(name, faults)?
            && value.get(key).and_then(Value::as_str).is_none()
        {
            faults.push(Fault::new(name, format!("has no text `{key}`")));
        }
        Ok(())
    }

    fn json(&self, name: &str, faults: &mut Vec<Fault>) -> Result<Option<Value>> {
        let Some(found) = self.files.iter().find(|file| file.path == name) else { return Ok(None) };
        let mut text = Vec::new();
        let file = folder::open(self.root, &found.real)?;
        let read = file.take(JSON_BYTES_MAX + 1).read_to_end(&mut text);
        read.map_err(|e| Error::io("read", &self.root.join(&found.real), e))?;
        if text.len() as u64 > JSON_BYTES_MAX {
            faults.push(Fault::new(name, format!("is larger than {JSON_BYTES_MAX} bytes")));
            return Ok(None);
        }
        match serde_json::from_slice(&text) {
            Ok(value) => Ok(Some(value)),
            Err(e) => {
                faults.push(Fault::new(name, format!("is not JSON: line {} column {}", e.line(), e.column())));
                Ok(None)
            }
        }
    }
}

fn extension(path: &str) -> String {
    Path::new(path).extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

fn is_data(path: &str) -> bool {
    matches!(extension(path).as_str(), "jsonl" | "csv" | "parquet")
}

fn head(file: &mut fs::File) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.by_ref().take(HEAD_BYTES).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(head)
}

/// Why a file must not be kept, whatever it is called.
fn dangerous(path: &str, head: &[u8]) -> Option<String> {
    let convert = "which can run code when it is loaded; convert it to safetensors and leave it out";
    // A header of safetensors may have a length whose bytes are those that a pickle begins with. What is called so is opened so.
    let is_safetensors = extension(path) == "safetensors" && matches!(head, [_, _, _, _, 0, 0, 0, 0, b'{', ..]);
    match head {
        _ if is_safetensors => {}
        [0x80, 2..=5, ..] => return Some(format!("is a Python pickle, {convert}")),
        // torch.save writes a zip archive of pickles.
        [b'P', b'K', 3 | 5, 4 | 6, ..] => {
            return Some(format!("is a zip archive (PyTorch's .bin and .pt files are), {convert}"));
        }
        _ => {}
    }
    if head.starts_with(b"\x93NUMPY")
        && head.iter().take(256).collect::<Vec<_>>().windows(2).any(|w| *w[0] == b'|' && *w[1] == b'O')
    {
        return Some(format!("is a NumPy file of Python objects, {convert}"));
    }
    let extension = extension(path);
    // Old pickles are text and have no mark of their own.
    matches!(extension.as_str(), "pkl" | "pickle" | "pt" | "pth" | "ckpt" | "joblib")
        .then(|| format!("is a .{extension} file, {convert}"))
}

/// Why a file of a dataset cannot be data.
fn not_data(path: &str, head: &[u8], file: &mut fs::File, size: u64) -> Option<String> {
    if matches!(path.rsplit('/').next(), Some("README.md" | "LICENSE" | "LICENSE.txt" | "dataset_info.json")) {
        return None;
    }
    if size == 0 {
        return Some("is empty".into());
    }
    match extension(path).as_str() {
        "parquet" => {
            let mut tail = [0; 4];
            let read = file.seek(SeekFrom::End(-4)).and_then(|_| file.read_exact(&mut tail));
            (read.is_err() || !head.starts_with(b"PAR1") || &tail != b"PAR1")
                .then(|| "is not a whole Parquet file".into())
        }
        "jsonl" | "csv" => {
            let text = match std::str::from_utf8(head) {
                Ok(text) => text,
                // A character may be cut by the end of the head.
                Err(e) if e.error_len().is_none() && size > HEAD_BYTES => "",
                Err(e) => return Some(format!("is not UTF-8 text: byte {} starts no character", e.valid_up_to())),
            };
            text.contains('\0').then(|| "is not text: it has NUL bytes".into())
        }
        "json" => Some("is one JSON document; data is one JSON object per line, in a .jsonl file".into()),
        "gz" | "zst" | "bz2" | "xz" => Some(format!("is compressed; decompress it first, {DATA_FORM}")),
        _ => Some(format!("is not a data file; {DATA_FORM}")),
    }
}
