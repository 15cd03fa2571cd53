//! The built binary, as a person or a script meets it: exit status, standard output, standard error.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod answers;
mod attempt;
mod data;
mod drift;
mod experiment;
mod fairness;
mod generate;
mod help;
mod merge;
mod methods;
mod render;
mod server;
mod support;
mod validate;
