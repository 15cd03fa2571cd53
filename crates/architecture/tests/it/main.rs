//! `config.json` texts of public models, and what is read from them.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value, reason = "helpers of tests are tests")]

mod configs;
mod faults;
mod reshape;
mod resolve;
