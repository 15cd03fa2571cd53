//! The agent against a scheduler that obeys the test, with a shell script in the place of the training process.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod attempts;
mod hostile;
mod lanes;
mod lease;
mod support;
mod transfer;
