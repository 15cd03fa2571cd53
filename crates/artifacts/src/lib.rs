//! Where results are kept: bytes named by their BLAKE3 digest, bundles of files named by the digest of their manifest,
//! and the file formats that Attune reads from and writes for others.
//!
//! The one invariant: **bytes that leave this room are the bytes that were named.** Digest and length are checked when
//! something is written and again whenever it is read, and nothing half-written is ever found under its final name.
//!
//! An artifact is made in three steps: its blobs are stored, then its manifest object, then the control plane inserts
//! the row that makes it visible (tags, lineage edges and the [`CommitRecord`] stand beside that row). Only the first
//! two steps happen here.
//!
//! Deliberately absent: the database and its epochs (`store`), gRPC (`proto`, the services), tensors and everything that
//! computes on them (the training half reads and writes bytes and shapes through [`formats`]).

pub mod canonical;
pub mod error;
pub mod hash;
pub mod path;

pub mod lineage;
pub mod manifest;

pub mod store;

pub mod bundle;
mod content;
mod folder;

pub mod cache;
mod eviction;
pub mod unpack;

pub mod formats;

pub use bundle::Bundle;
pub use cache::{Cache, Cached};
pub use error::{Error, Result};
pub use lineage::{Causes, CommitRecord};
pub use manifest::{BlobRef, File, Kind, Manifest};
pub use store::{BlobBody, BlobStore, Put};
pub use unpack::{Source, Unpack};
