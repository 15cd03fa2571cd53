//! The scheduler from outside: a real server on a real port, a real client, and a worker that does what it is told.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod artifacts;
mod contract;
mod cuts;
#[cfg(feature = "failpoints")]
mod faults;
mod fixtures;
mod fleet;
mod floods;
mod followers;
mod gangs;
mod guard;
mod identities;
mod jobs;
mod life;
mod limits;
mod matrix;
mod postgres;
mod projects;
mod provider;
mod recipes;
mod restart;
mod server;
mod supply;
mod tls;
mod worker;
