//! Where data lies: a local path, a `file:` URL, an object of an S3-compatible store, or memory.

use std::fs::File;
use std::io::{BufReader, Cursor, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

use crate::error::Error;

/// How a file's bytes are to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line.
    JsonLines,
    /// Comma-separated values with a header line.
    Csv,
    /// Apache Parquet.
    Parquet,
}

impl Format {
    /// The format that the name's extension says, if it is one of ours.
    fn of(name: &str) -> Option<Self> {
        let (_, extension) = name.rsplit_once('.')?;
        match extension.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "csv" => Some(Self::Csv),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// One data file, named but not yet opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    name: Arc<str>,
    place: Place,
    format: Format,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Local(PathBuf),
    S3 { bucket: String, key: String },
    Memory(Bytes),
}

/// An opened file: a local one is read as it is needed, a remote one was fetched whole.
pub(crate) enum Input {
    File(File),
    Bytes(Bytes),
}

impl Input {
    pub(crate) fn into_read(self) -> Box<dyn Read + Send> {
        match self {
            Self::File(file) => Box::new(BufReader::with_capacity(1 << 16, file)),
            Self::Bytes(bytes) => Box::new(Cursor::new(bytes)),
        }
    }
}

impl Source {
    /// Reads the written form: a path, `file:///path` or `s3://bucket/key`, ending in `.jsonl`, `.ndjson`, `.csv` or
    /// `.parquet`.
    ///
    /// # Errors
    /// [`Error::Source`] for another scheme, a pattern, or an extension that names no format.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let error = |message: String| Error::Source { url: text.to_owned(), message };
        if text.is_empty() {
            return Err(error("is empty; expected a path, file:///path or s3://bucket/key".to_owned()));
        }
        if text.contains(['*', '?']) {
            return Err(error("is a pattern; name one file for each domain".to_owned()));
        }
        let place = match text.split_once("://") {
            None => Place::Local(PathBuf::from(text)),
            Some(("file", _)) => {
                let url = Url::parse(text).map_err(|e| error(format!("is not a URL: {e}")))?;
                let path = url.to_file_path();
                Place::Local(path.map_err(|()| error("names another host; expected file:///path".to_owned()))?)
            }
            Some(("s3", rest)) => match rest.split_once('/') {
                Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                    Place::S3 { bucket: bucket.to_owned(), key: key.to_owned() }
                }
                _ => return Err(error("has no bucket or no key; expected s3://bucket/key".to_owned())),
            },
            Some((scheme, _)) => {
                let message = format!("has the scheme {scheme:?}; expected a path, file:///path or s3://bucket/key");
                return Err(error(message));
            }
        };
        let format = Format::of(text).ok_or_else(|| {
            error("does not say its format; expected a name in .jsonl, .ndjson, .csv or .parquet".to_owned())
        })?;
        Ok(Self { name: text.into(), place, format })
    }

    /// A local file that messages call by another name than its path: a cached copy of a file that was pushed.
    ///
    /// # Errors
    /// [`Error::Source`] if `name` does not say the format.
    pub fn cached(path: &Path, name: &str) -> Result<Self, Error> {
        let named = Self::parse(name)?;
        Ok(Self { place: Place::Local(path.to_owned()), ..named })
    }

    /// A file whose bytes are in memory already.
    ///
    /// # Errors
    /// [`Error::Source`] if `name` does not say the format.
    pub fn in_memory(name: &str, bytes: Bytes) -> Result<Self, Error> {
        let named = Self::parse(name)?;
        Ok(Self { place: Place::Memory(bytes), ..named })
    }

    /// The source as written.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The format that its name says.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The path, if it is a local file.
    pub fn local_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Local(path) => Some(path),
            Place::S3 { .. } | Place::Memory(_) => None,
        }
    }

    /// Opens the file; blocks until a remote object has arrived whole.
    pub(crate) fn open(&self) -> Result<Input, Error> {
        match &self.place {
            Place::Local(path) => open_local(&self.name, path),
            Place::S3 { bucket, key } => {
                // Without a process-wide provider rustls panics at the first handshake; one that is already there stays.
                let _ = rustls::crypto::ring::default_provider().install_default();
                let store = AmazonS3Builder::from_env()
                    .with_bucket_name(bucket)
                    .build()
                    .map_err(|e| remote_error(&self.name, &e))?;
                fetch(&self.name, Arc::new(store), key)
            }
            Place::Memory(bytes) => Ok(Input::Bytes(bytes.clone())),
        }
    }
}

fn open_local(name: &str, path: &Path) -> Result<Input, Error> {
    let read_error = |source| Error::Read { file: name.to_owned(), source };
    let file = File::open(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => Error::File { file: name.to_owned(), message: "there is no such file".to_owned() },
        _ => read_error(source),
    })?;
    if file.metadata().map_err(read_error)?.is_dir() {
        let message = "is a folder; name one file for each domain".to_owned();
        return Err(Error::File { file: name.to_owned(), message });
    }
    Ok(Input::File(file))
}

/// Fetches an object on a thread of its own: the caller may or may not be inside a runtime, and blocks either way.
fn fetch(name: &str, store: Arc<dyn ObjectStore>, key: &str) -> Result<Input, Error> {
    let path = object_store::path::Path::parse(key).map_err(|e| Error::Source {
        url: name.to_owned(),
        message: format!("has a key that object stores do not accept: {e}"),
    })?;
    let get = move || -> Result<Bytes, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Read { file: name.to_owned(), source })?;
        runtime.block_on(async {
            let object = store.get(&path).await.map_err(|e| remote_error(name, &e))?;
            object.bytes().await.map_err(|e| remote_error(name, &e))
        })
    };
    let done = std::thread::scope(|scope| scope.spawn(get).join());
    let lost =
        || Error::Remote { url: name.to_owned(), message: "the fetching thread panicked".to_owned(), retry: false };
    Ok(Input::Bytes(done.map_err(|_| lost())??))
}

fn remote_error(name: &str, error: &object_store::Error) -> Error {
    let retry = matches!(error, object_store::Error::Generic { .. });
    let message = match error {
        object_store::Error::NotFound { .. } => "there is no such object".to_owned(),
        // The words of a store can be a document; a message is one line.
        other => other.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    };
    Error::Remote { url: name.to_owned(), message, retry }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn fault(text: &str) -> String {
        Source::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn paths_and_urls_are_read_and_others_are_refused_by_what_would_be_right() {
        let source = Source::parse("file:///data/a%20b.jsonl").unwrap();
        assert_eq!((source.local_path(), source.format()), (Some(Path::new("/data/a b.jsonl")), Format::JsonLines));
        let source = Source::parse("s3://bucket/train/rows.parquet").unwrap();
        assert_eq!(source.place, Place::S3 { bucket: "bucket".to_owned(), key: "train/rows.parquet".to_owned() });
        assert_eq!(source.format(), Format::Parquet);
        insta::assert_snapshot!(fault("s3://bucket/*.parquet"), @r#"data source "s3://bucket/*.parquet" is a pattern; name one file for each domain"#);
        insta::assert_snapshot!(fault("s3://bucket"), @r#"data source "s3://bucket" has no bucket or no key; expected s3://bucket/key"#);
        insta::assert_snapshot!(fault("gs://bucket/a.csv"), @r#"data source "gs://bucket/a.csv" has the scheme "gs"; expected a path, file:///path or s3://bucket/key"#);
        insta::assert_snapshot!(fault("rows.txt"), @r#"data source "rows.txt" does not say its format; expected a name in .jsonl, .ndjson, .csv or .parquet"#);
    }

    #[test]
    fn a_missing_file_and_a_folder_are_said_so() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.jsonl");
        let error = Source::parse(missing.to_str().unwrap()).unwrap().open().err().unwrap();
        assert_eq!(error.to_string(), format!("{}: there is no such file", missing.display()));
        let inner = folder.path().join("d.jsonl");
        std::fs::create_dir(&inner).unwrap();
        let error = Source::parse(inner.to_str().unwrap()).unwrap().open().err().unwrap();
        assert!(error.to_string().ends_with("is a folder; name one file for each domain"), "{error}");
    }

    #[test]
    fn an_object_arrives_whole_inside_and_outside_a_runtime() {
        let store = Arc::new(InMemory::new());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(store.put(&"train/a.jsonl".into(), Bytes::from_static(b"{}").into())).unwrap();
        let read = |store: Arc<InMemory>| {
            let mut text = String::new();
            let input = fetch("s3://bucket/train/a.jsonl", store, "train/a.jsonl")?;
            input.into_read().read_to_string(&mut text).unwrap();
            Ok::<_, Error>(text)
        };
        assert_eq!(read(Arc::clone(&store)).unwrap(), "{}");
        assert_eq!(runtime.block_on(async { read(Arc::clone(&store)) }).unwrap(), "{}");
        let error = fetch("s3://bucket/b.jsonl", store, "b.jsonl").err().unwrap();
        let said = "s3://bucket/b.jsonl: cannot be read from the object store: there is no such object";
        assert_eq!((error.retry(), error.to_string().as_str()), (false, said));
        let refused = object_store::Error::Generic { store: "S3", source: "<?xml?>\n  <Error>".into() };
        let error = remote_error("s3://bucket/b.jsonl", &refused);
        assert!(error.retry() && error.to_string().ends_with("<?xml?> <Error>"), "{error}");
    }
}
