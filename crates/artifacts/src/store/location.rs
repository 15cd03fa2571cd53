//! From a location as a person writes it to an object store.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::client::{HttpConnector as _, ReqwestConnector};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::bucket::Bucket;
use super::unfinished;
use crate::error::{Error, Result};

const FORM: &str = "expected a folder, file:///folder, s3://bucket/prefix or memory://";

/// An opened location and how it is named in messages (never with credentials).
pub(super) struct Opened {
    pub(super) objects: Arc<dyn ObjectStore>,
    pub(super) place: String,
    /// A folder's lock, to be held as long as the store is used.
    pub(super) writers: Option<fs::File>,
    /// The bucket, if it is one.
    pub(super) bucket: Option<Bucket>,
}

/// Opens `location`, making the folder if it is a local one.
pub(super) async fn open(location: &str) -> Result<Opened> {
    let unusable = |reason: String| Error::Unusable { place: location.to_owned(), reason };
    // Whatever has no scheme is a folder, so that a relative path and a drive letter work as people expect.
    if !location.contains("://") {
        if location.is_empty() {
            return Err(unusable(FORM.into()));
        }
        return open_folder(PathBuf::from(location)).await;
    }
    let url = Url::parse(location).map_err(|e| unusable(format!("{e}; {FORM}")))?;
    match url.scheme() {
        "file" => {
            let path =
                url.to_file_path().map_err(|()| unusable("a file URL has three slashes: file:///folder".into()))?;
            open_folder(path).await
        }
        "memory" => {
            Ok(Opened { objects: Arc::new(InMemory::new()), place: "memory://".into(), writers: None, bucket: None })
        }
        "s3" => open_s3(&url),
        scheme => Err(unusable(format!("{scheme:?} is not a known scheme; {FORM}"))),
    }
}

async fn open_folder(path: PathBuf) -> Result<Opened> {
    let opened = tokio::task::spawn_blocking(move || {
        let root = make_folder(&path)?;
        let writers = unfinished::lock_and_sweep(&root)?;
        Ok::<_, Error>((root, writers))
    });
    let (root, writers) = opened.await.expect("opening a folder does not panic and is not cancelled")?;
    let place = root.display().to_string();
    let store = LocalFileSystem::new_with_prefix(&root).map_err(|e| Error::from_store(&place, "opening it", e))?;
    // Without fsync a power cut could lose an artifact whose row the database has already made durable.
    Ok(Opened { objects: Arc::new(store.with_fsync(true)), place, writers, bucket: None })
}

fn make_folder(path: &Path) -> Result<PathBuf> {
    fs::create_dir_all(path).map_err(|e| Error::io("create the folder", path, e))?;
    path.canonicalize().map_err(|e| Error::io("open", path, e))
}

/// S3 and what speaks its protocol: credentials, region and endpoint from the standard `AWS_*` variables.
fn open_s3(url: &Url) -> Result<Opened> {
    let bucket = url.host_str().unwrap_or_default();
    let prefix = url.path().trim_matches('/');
    let place = if prefix.is_empty() { format!("s3://{bucket}") } else { format!("s3://{bucket}/{prefix}") };
    if bucket.is_empty() || !url.username().is_empty() || url.query().is_some() {
        let reason = "expected s3://bucket/prefix; credentials and endpoint come from the AWS_* environment variables";
        return Err(Error::Unusable { place, reason: reason.into() });
    }
    // The libraries below link no provider of their own choice; a second call loses and that is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // No limit on a whole request, which would cut large bodies; a limit on silence instead.
    let client = ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(Duration::from_secs(10))
        .with_read_timeout(Duration::from_secs(60));
    let mut builder = AmazonS3Builder::from_env()
        .with_client_options(client.clone())
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(false)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 8,
            retry_timeout: Duration::from_secs(120),
        });
    // Whoever writes an http:// endpoint has decided about encryption; asking twice (AWS_ALLOW_HTTP) helps nobody.
    if builder.get_config_value(&AmazonS3ConfigKey::Endpoint).is_some_and(|url| url.starts_with("http://")) {
        builder = builder.with_allow_http(true);
    }
    let region = builder.get_config_value(&AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
    let is_signed = builder.get_config_value(&AmazonS3ConfigKey::SkipSignature).is_none_or(|skip| skip != "true");
    let failed = |e| Error::from_store(&place, "opening it", e);
    let store = builder.build().map_err(failed)?;
    let bucket_url = format!("{}/{bucket}", endpoint.trim_end_matches('/'));
    let bucket_url =
        Url::parse(&bucket_url).map_err(|e| Error::Unusable { place: place.clone(), reason: e.to_string() })?;
    let client = client.with_allow_http(bucket_url.scheme() == "http");
    let bucket = Bucket {
        client: ReqwestConnector::default().connect(&client).map_err(failed)?,
        credentials: is_signed.then(|| store.credentials().clone()),
        region,
        url: bucket_url,
        prefix: if prefix.is_empty() { "projects/".to_owned() } else { format!("{prefix}/projects/") },
    };
    let objects: Arc<dyn ObjectStore> =
        if prefix.is_empty() { Arc::new(store) } else { Arc::new(PrefixStore::new(store, prefix)) };
    Ok(Opened { objects, place, writers: None, bucket: Some(bucket) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn locations_that_cannot_be_stores_say_what_would_do() {
        for (location, part) in [
            ("", "expected a folder"),
            ("gs://bucket", "\"gs\" is not a known scheme"),
            ("s3://", "expected s3://bucket/prefix"),
            ("s3://key:secret@bucket/x", "AWS_*"),
            ("file://host/x", "three slashes"),
        ] {
            let error = open(location).await.err().unwrap().to_string();
            assert!(error.contains(part) && !error.contains("secret@"), "{location}: {error}");
        }
    }

    #[tokio::test]
    async fn a_folder_is_made_and_named_in_full() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let opened = open(&format!("file://{}", path.display())).await.unwrap();
        assert_eq!(opened.place, path.canonicalize().unwrap().display().to_string());
    }

    #[tokio::test]
    async fn an_s3_location_opens_without_a_call() {
        assert_eq!(open("s3://bucket/some/prefix/").await.unwrap().place, "s3://bucket/some/prefix");
    }
}
