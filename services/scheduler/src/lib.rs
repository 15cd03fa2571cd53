//! The scheduler's shell: who may ask, what is stored, who is told. What is decided is the core's.
//!
//! ```text
//! a call or message -> guard: who calls -> services (decode, check) -> front -> desk: core step -> one transaction -> answer -> actions
//!                                                                                             -> hub: watchers read the log on
//! ```
//!
//! The one invariant: nobody is told of anything that is not stored. The desk is one task; it owns the core, and a core
//! whose changes could not be stored is thrown away. The process may be killed at any moment.
//!
//! Of several schedulers over one database one leads. Those that follow have no desk: they answer what they read, and pass the rest on
//! (`replica`, `relay`, `follow`).
//!
//! Deliberately absent: decisions (`attune-scheduler-core`), SQL (`attune-store`), the layout of bytes
//! (`attune-artifacts`), the words of the contract (`attune-proto`), and everything that trains.

mod config;
mod error;

mod certificates;
mod clock;

mod guard;

mod follow;
mod relay;
mod replica;

mod context;
mod front;
mod hub;
mod limits;
mod links;

mod ledger;
mod log;
mod messages;
mod rows;

mod desk;

mod addresses;
mod admit;
mod forecast;
mod stages;
mod sweep;

mod status;
mod view;

#[cfg(feature = "failpoints")]
mod planted;

mod services;

pub mod providers;

mod frames;
mod incoming;
mod server;

pub use attune_store::Database;
pub use config::{Auth, CallLimits, Config, Limits, Timings, Tls, Tokens};
pub use error::Error;
pub use guard::{Oidc, new_token};
pub use server::{Scheduler, serve};
