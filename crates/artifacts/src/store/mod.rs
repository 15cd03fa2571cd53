//! Blobs and manifests as objects, in a local folder or behind S3.
//!
//! Keys are `projects/<project>/blobs/<first two digits>/<64 digits>` and `projects/<project>/manifests/…`: the tenant is
//! part of every key, so a digest that one project knows says nothing about another project's bytes.

mod blobs;
mod body;
mod bucket;
#[cfg(test)]
mod faults;
mod get;
mod location;
mod manifests;
mod probe;
mod put;
mod ranges;
#[cfg(test)]
mod resumed;
mod shelf;
#[cfg(test)]
mod testing;
mod unfinished;
mod upload;

pub use blobs::BlobStore;
pub use body::BlobBody;
pub use put::Put;
