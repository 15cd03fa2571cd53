//! The whole system: real processes, real clients, real kills.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "the table of kills is evidence")]
#![allow(clippy::print_stderr, reason = "who skips a test says why")]

mod chaos;
mod clocks;
mod damage;
mod encrypted;
mod exhausted;
mod failover;
mod forecasts;
mod full;
mod gangs;
mod grids;
mod guarded;
mod kills;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod lanes;
mod main_job;
mod names;
mod poison;
mod postgres;
mod processes;
mod proxy;
mod recipes;
mod slurm;
mod support;
mod surroundings;
mod turns;
mod wrong_input;
