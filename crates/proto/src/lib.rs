//! The public contract: generated messages and services of `attune.v1`, their conversion to and from domain types, the
//! table of errors, and a thin typed client.
//!
//! The one invariant: what goes through a conversion and back is unchanged, and what cannot be converted is reported
//! with every fault and its field path at once. Generated types stay inside this room and the edges of services.
//!
//! Deliberately absent: decisions, storage, the training half. Error texts are written where errors arise; here they
//! only get their gRPC code, HTTP status and exit status.

/// Messages, clients and servers generated from `proto/attune/v1`; documented there, field by field.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::large_futures,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("attune.v1");
}

/// The encoded descriptor set of all of `proto/`, with imports and comments, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("attune_descriptor");

/// Version of the protocol between worker and scheduler that this code speaks.
pub const WORKER_PROTOCOL_VERSION: u32 = 2;
/// The version before, whose workers finish the attempts that they have and are offered no other.
pub const WORKER_PROTOCOL_VERSION_BEFORE: u32 = WORKER_PROTOCOL_VERSION - 1;

/// Largest encoded message that clients and servers accept: a manifest of 4 MiB and room around it.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Largest piece of a blob or file in one message of a stream.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

mod certificate;
pub mod client;
pub mod convert;
mod endpoint;
pub mod error;
pub mod secret;
pub mod words;

pub use client::Client;
pub use error::{Class, Retry};
pub use secret::Secret;

#[cfg(test)]
mod lint;
