//! What a model does before anything trains: on data, inputs of its linears, gradients of its weights and their squares; keys and values of
//! texts.
//!
//! The one invariant: a statistic is measured once, by one pass over the data for all that is wanted, and its bits depend on the
//! model, the data and the sites alone: not on ranks, threads, or how many micro-batches go through the model together.
//!
//! Deliberately absent: models, data and objectives (they come through [`Model`] and as layouts), and what anybody does with
//! what is found.
//!
//! Reading order: [`wanted`] (who wants what where), [`mod@measure`] (the pass), `inputs` and `gradients` (its sums), `texts`, [`mod@file`].

pub mod error;

pub mod wanted;

mod gradients;
mod inputs;
pub mod measure;
mod texts;

pub mod file;

pub use error::Error;
pub use measure::{Model, Seen, measure};
pub use wanted::Wanted;
