//! The whole system: real processes, real clients, real kills.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod kills;
mod main_job;
mod support;
mod wrong_input;
