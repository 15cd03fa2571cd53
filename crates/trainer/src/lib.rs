//! One run: from a resolved plan to its artifacts.
//!
//! The one invariant: everything that a step depends on is in the plan or in the checkpoint. A run that is killed and goes
//! on from a checkpoint ends with the bytes of one that was left alone; so does one with more ranks.
//!
//! Deliberately absent: the control plane. A run reads folders and writes folders; the worker's agent moves them.
//!
//! Reading order: [`protocol`] (what goes in and out), [`attempt`] (the process), [`cohort`] (several runs in it)
//! with `meeting` and `together`, `setup` (plan to parts) with `trained`, [`component`] and `calibration`, [`run`] (the loop), `engine`, [`steps`]
//! with `answers` (what the model says by itself and what that is worth), `copies` (losses of several copies of a text), `scope` (objectives that see a whole step), `guard`, `checkpoint`, `pin`, `evaluate`, `output`; apart from runs, [`audit`] (what trained models are like)
//! [`combine`] (several adapters to one) and [`to_lora`] (one of whatever method to plain LoRA).
//!
//! As a library, a run is ten lines:
//!
//! ```no_run
//! use attune_trainer::{control::Quiet, protocol::Request, run};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let text = std::fs::read_to_string("request.json")?;
//!     let request: Request = serde_json::from_str(&text)?;
//!     let end = run::run(&request, &Quiet)?;
//!     println!("{end:?}");
//!     Ok(())
//! }
//! ```

pub mod error;
pub mod protocol;

pub mod attempt;
pub mod audit;
pub mod card;
pub mod cohort;
pub mod combine;
pub mod component;
pub mod confine;
pub mod control;
pub mod run;
pub mod to_lora;

mod agreement;
mod answers;
mod calibration;
mod checkpoint;
pub mod classes;
mod copies;
mod engine;
mod evaluate;
mod experts;
pub mod few;
mod fit;
mod gang;
mod guard;
mod meeting;
mod merged;
mod output;
mod pin;
mod scope;
mod scores;
mod setup;
mod spent;
pub mod steps;
mod together;
mod trained;
mod turns;
mod update;

pub mod kernel;
pub mod methods;
mod resident;

pub use error::Error;
pub use steps::STEP_RULES;

// The tests beside the code use the same small job as those outside.
#[cfg(test)]
extern crate self as attune_trainer;
#[cfg(test)]
#[expect(dead_code, reason = "the tests outside use the rest")]
mod support {
    include!("../tests/it/support.rs");
}
