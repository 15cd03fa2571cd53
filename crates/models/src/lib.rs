//! A model's structure put to work: loading, the walk forward and in reverse, generation, export.
//!
//! The one invariant: the walk is layer by layer. A block's `graph` of differentiable operations defines it; its forward and
//! reverse on views of rows are held to that. The reverse walk takes the blocks from the top and stops below the lowest
//! block that anybody wants a gradient from. Logits of a whole batch never exist. Frozen weights get no gradient unless a
//! sink asks for it.
//!
//! Deliberately absent: methods of other points than surgery and quantisation (they arrive as `dyn Adapter` and `dyn Objective`), data, files other than a model's own.
//!
//! Reading order: [`base`] (frozen weights), [`stack`] (components at sites), [`context`] (what a block's graph sees; `tables`),
//! [`pass`] (views of rows, several parts at once), [`block`], [`model`] (`graphs`, its oracle; `outputs`), [`generate`],
//! [`surgery`] (another model made of a base) and its methods in [`surgeries`], [`quantizations`] (linears in few bits), [`export`].

pub mod error;

pub mod base;
mod folder;
pub mod stack;

mod attention;
pub mod context;
mod rope;
pub mod routing;

pub mod block;
mod cache;
mod flops;
mod graphs;
mod head;
mod loss;
pub mod model;
mod outputs;
pub mod pass;
mod regions;
pub mod scope;
mod tables;
pub mod vectors;

pub mod quantizations;
pub mod surgeries;
pub mod surgery;

pub mod dropout;
pub mod export;
pub mod generate;

pub use base::Base;
pub use error::Error;
pub use generate::Request;
pub use model::{Model, Pass, Together, grad_together, score_together};
pub use quantizations::QUANTIZATIONS;
pub use routing::{Auxiliary, LoadBalance, Routing};
pub use stack::{Slot, Stack};
pub use surgeries::SURGERIES;
