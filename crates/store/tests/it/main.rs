//! The store's contract, run over every backend.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod postgres;
mod sqlite;
mod suite;
