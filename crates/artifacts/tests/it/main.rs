//! The room from outside: its public interface over real folders, real processes and, where there is one, a real server.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod bundles;
mod caching;
mod compatibility;
mod conformance;
mod disk;
mod eviction;
#[cfg(feature = "failpoints")]
mod failpoints;
mod golden;
mod support;
mod unpacking;
