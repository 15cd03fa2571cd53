//! Manifests as objects: written last, under their own digest, by one conditional create.

use attune_spec::Fault;
use attune_spec::FieldPath;
use attune_spec::id::{Digest, Project};
use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStoreExt as _, PutMode, PutPayload};

use super::blobs::BlobStore;
use super::get::repeat;
use crate::error::{Error, Result};
use crate::hash;
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest};

impl BlobStore {
    /// Stores a manifest whose blobs are all there. Repeating it is harmless. The artifact becomes visible when the
    /// control plane commits its row, not here.
    ///
    /// # Errors
    /// [`Error::Refused`] naming each file whose blob is missing; otherwise what the store answered.
    pub async fn put_manifest(&self, project: &Project, manifest: &Manifest) -> Result<()> {
        fail::fail_point!("artifacts::before_manifest", |_| Err(self.injected("artifacts::before_manifest")));
        let missing = self.missing(project, &manifest.blobs()).await?;
        if !missing.is_empty() {
            let at = |i: usize| FieldPath::root().field("files").index(i).field("digest");
            let files = manifest.files().iter().enumerate().filter(|(_, file)| missing.contains(&file.blob()));
            let faults = files.map(|(i, file)| {
                let message =
                    format!("is {}, the bytes of {:?}, which are not stored; send them first", file.digest, file.path);
                Fault { path: at(i), message }
            });
            return Err(Error::Refused { what: "the manifest".into(), faults: faults.collect() });
        }
        let key = manifest_key(project, &manifest.digest());
        let failed = |e| Error::from_store(self.place(), format!("storing manifest {}", manifest.digest()), e);
        let body = || PutPayload::from(manifest.bytes().clone());
        match self.inner.objects.put_opts(&key, body(), PutMode::Create.into()).await {
            Ok(_) => {}
            // Somebody was first, or an earlier try of ours was (F33, F34): equal bytes are success, and others can only
            // be a corrupt object, since the key is the digest.
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {
                if self.manifest(project, &manifest.digest()).await.is_err() {
                    tracing::error!(place = self.place(), %project, digest = %manifest.digest(), "corrupt manifest replaced");
                    self.inner.objects.put(&key, body()).await.map_err(failed)?;
                }
            }
            // The answer may be lost on its way back, and the object be there all the same.
            Err(e) if failed_late(&e) && self.manifest(project, &manifest.digest()).await.is_ok() => {}
            Err(e) => return Err(failed(e)),
        }
        fail::fail_point!("artifacts::after_manifest", |_| Err(self.injected("artifacts::after_manifest")));
        Ok(())
    }

    /// Reads and checks the manifest named `digest`.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Corrupt`] when what is stored has another digest.
    pub async fn manifest(&self, project: &Project, digest: &Digest) -> Result<Manifest> {
        repeat(|| self.read_manifest(project, digest)).await
    }

    async fn read_manifest(&self, project: &Project, digest: &Digest) -> Result<Manifest> {
        let corrupt = |found: String| Error::Corrupt {
            what: format!("manifest {digest}"),
            place: self.place().to_owned(),
            expected: digest.to_string(),
            found,
        };
        let failed = |e| match e {
            StoreError::NotFound { .. } => self.not_found("manifest", digest),
            other => Error::from_store(self.place(), format!("reading manifest {digest}"), other),
        };
        let found = self.inner.objects.get(&manifest_key(project, digest)).await.map_err(failed)?;
        // Before anything is held in memory.
        if found.meta.size > MANIFEST_BYTES_MAX as u64 {
            return Err(corrupt(format!("{} bytes", found.meta.size)));
        }
        let bytes: Bytes = found.bytes().await.map_err(failed)?;
        let actual = hash::bytes(&bytes);
        if actual != *digest {
            return Err(corrupt(format!("{actual} ({} bytes)", bytes.len())));
        }
        Manifest::parse(&bytes)
    }

    /// Whether a manifest object is there, unread.
    ///
    /// # Errors
    /// What the store answered, other than that it has no such object.
    pub async fn has_manifest(&self, project: &Project, digest: &Digest) -> Result<bool> {
        match self.inner.objects.head(&manifest_key(project, digest)).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(e) => Err(Error::from_store(self.place(), format!("looking for manifest {digest}"), e)),
        }
    }

    /// Every manifest object of a project, committed or not; for sweeps.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn manifests(&self, project: &Project) -> Result<Vec<Digest>> {
        Ok(self.list(project, "manifests", i64::MAX).await?.into_iter().map(|found| found.digest).collect())
    }

    /// Deletes a manifest object; one that is not there counts as deleted. Its row in the control plane goes first.
    ///
    /// # Errors
    /// What the store answered.
    pub async fn delete_manifest(&self, project: &Project, digest: &Digest) -> Result<()> {
        self.delete(&manifest_key(project, digest)).await
    }
}

/// Whether the request may have been carried out although it failed.
fn failed_late(error: &StoreError) -> bool {
    matches!(error, StoreError::Generic { .. } | StoreError::JoinError { .. })
}

fn manifest_key(project: &Project, digest: &Digest) -> Path {
    let hex = digest.hex();
    Path::from(format!("projects/{project}/manifests/{}/{hex}", &hex[..2]))
}
