//! The store's contract, run over every backend.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stderr, reason = "who skips a test says why")]

mod access;
mod postgres;
mod rules;
mod sqlite;
mod suite;
