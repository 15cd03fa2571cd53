//! What a bucket of S3 can do beyond the common interface of object stores: list uploads that were never completed, and
//! end them. Their parts are invisible, and paid for, until somebody does.

use std::time::Duration;

use jiff::Timestamp;
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody};
use serde::Deserialize;
use url::Url;

use crate::error::{Cause, Error, Result};

/// Longest time of one request.
const REQUEST_TIME: Duration = Duration::from_secs(60);
/// Most pages of one list, of 1000 uploads each.
const PAGES_MAX: usize = 100;

/// A bucket, and who asks.
#[derive(Debug)]
pub(super) struct Bucket {
    pub(super) client: HttpClient,
    pub(super) credentials: Option<AwsCredentialProvider>,
    pub(super) region: String,
    /// The bucket's own URL.
    pub(super) url: Url,
    /// What the names of all objects of this store begin with; ends with a slash.
    pub(super) prefix: String,
}

/// A page of uploads, in S3's words.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    #[serde(default)]
    is_truncated: bool,
    next_key_marker: Option<String>,
    next_upload_id_marker: Option<String>,
    #[serde(default, rename = "Upload")]
    uploads: Vec<Unfinished>,
}

/// An upload that was begun.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Unfinished {
    key: String,
    upload_id: String,
    initiated: String,
}

impl Bucket {
    /// Ends the uploads to this store that began at `time_ms` or before, and counts them.
    pub(super) async fn abort_unfinished(&self, place: &str, time_ms: i64) -> Result<usize> {
        let failed = |source: Cause| {
            let doing = "looking for unfinished uploads".to_owned();
            Error::Unavailable { place: place.to_owned(), doing, source }
        };
        let mut aborted = 0;
        let mut marker: Option<(String, String)> = None;
        for _ in 0..PAGES_MAX {
            let page = self.page(marker.take()).await.map_err(failed)?;
            // What does not say when it began in a form that is known is left alone.
            let begun = |upload: &Unfinished| upload.initiated.parse().map(Timestamp::as_millisecond).ok();
            let old = page.uploads.iter().filter(|upload| begun(upload).is_some_and(|begun| begun <= time_ms));
            for upload in old.filter(|upload| upload.key.starts_with(&self.prefix)) {
                self.abort(upload).await.map_err(failed)?;
                tracing::info!(place, key = upload.key, begun = upload.initiated, "an unfinished upload was removed");
                aborted += 1;
            }
            marker = page.next_key_marker.filter(|_| page.is_truncated).zip(page.next_upload_id_marker);
            if marker.is_none() {
                break;
            }
        }
        Ok(aborted)
    }

    async fn page(&self, after: Option<(String, String)>) -> Result<Page, Cause> {
        let mut url = self.url.clone();
        url.query_pairs_mut().append_pair("prefix", &self.prefix).append_pair("uploads", "");
        if let Some((key, id)) = &after {
            url.query_pairs_mut().append_pair("key-marker", key).append_pair("upload-id-marker", id);
        }
        let (status, body) = self.ask("GET", &url).await?;
        if status != 200 {
            return Err(format!("the list of uploads was answered with {status}").into());
        }
        Ok(quick_xml::de::from_str(&body)?)
    }

    async fn abort(&self, upload: &Unfinished) -> Result<(), Cause> {
        let mut url = self.url.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(upload.key.split('/'));
        }
        url.query_pairs_mut().append_pair("uploadId", &upload.upload_id);
        let (status, _) = self.ask("DELETE", &url).await?;
        // Somebody else may have ended it meanwhile.
        if matches!(status, 200 | 204 | 404) {
            Ok(())
        } else {
            Err(format!("its end was answered with {status}").into())
        }
    }

    async fn ask(&self, method: &str, url: &Url) -> Result<(u16, String), Cause> {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = method.parse()?;
        *request.uri_mut() = url.as_str().parse()?;
        if let Some(credentials) = &self.credentials {
            let credential = credentials.get_credential().await?;
            AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None)?;
        }
        let answer = async {
            let response = self.client.execute(request).await?;
            let status = response.status().as_u16();
            Ok::<_, Cause>((status, String::from_utf8_lossy(&response.into_body().bytes().await?).into_owned()))
        };
        tokio::time::timeout(REQUEST_TIME, answer).await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_uploads_is_read() {
        let text = r#"<?xml version="1.0" encoding="UTF-8"?>
            <ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
              <Bucket>b</Bucket><KeyMarker></KeyMarker><UploadIdMarker></UploadIdMarker>
              <NextKeyMarker>a/y</NextKeyMarker><NextUploadIdMarker>2</NextUploadIdMarker>
              <MaxUploads>2</MaxUploads><IsTruncated>true</IsTruncated>
              <Upload><Key>a/x &amp; z</Key><UploadId>1</UploadId>
                <Initiator><ID>i</ID><DisplayName>d</DisplayName></Initiator><StorageClass>STANDARD</StorageClass>
                <Initiated>2010-11-10T20:48:33.000Z</Initiated></Upload>
              <Upload><Key>a/y</Key><UploadId>2</UploadId><Initiated>2010-11-10T20:48:34Z</Initiated></Upload>
            </ListMultipartUploadsResult>"#;
        let page: Page = quick_xml::de::from_str(text).unwrap();
        assert!(page.is_truncated);
        assert_eq!((page.next_key_marker.as_deref(), page.next_upload_id_marker.as_deref()), (Some("a/y"), Some("2")));
        let keys: Vec<_> = page.uploads.iter().map(|upload| (upload.key.as_str(), upload.upload_id.as_str())).collect();
        assert_eq!(keys, [("a/x & z", "1"), ("a/y", "2")]);
        assert_eq!(page.uploads[0].initiated.parse().map(Timestamp::as_millisecond).ok(), Some(1_289_422_113_000));
        let none = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>";
        assert!(quick_xml::de::from_str::<Page>(none).unwrap().uploads.is_empty());
    }
}
