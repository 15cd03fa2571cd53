//! Blobs and manifests as objects, in a local folder or behind S3.
//!
//! Keys are `projects/<project>/blobs/<first two digits>/<64 digits>` and `projects/<project>/manifests/…`: the tenant is
//! part of every key, so a digest that one project knows says nothing about another project's bytes.

mod blobs;
mod body;
#[cfg(test)]
mod faults;
mod location;
mod manifests;
mod probe;
#[cfg(test)]
mod testing;
mod unfinished;
mod upload;

pub use blobs::{BlobStore, Put};
pub use body::BlobBody;
