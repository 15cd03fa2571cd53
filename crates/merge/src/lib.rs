//! Arithmetic on what was learned: several adapters to one.
//!
//! ```text
//! folders -> pairs, site by site -> combined(pairs, weights, merge, space) -> a pair -> folder
//! ```
//!
//! A merge ([`MERGES`]) says what tensors of one shape become together, entry by entry or over all of them. A [`Space`] says which
//! tensors these are: the factors of adapters, each kind by itself, or the changes of a weight that they are factors of, of which factors
//! are made again. In the words of PEFT's `add_weighted_adapter` a merge and a space are one `combination_type`: [`words`].
//!
//! The one invariant: what comes out depends on the numbers, the weights and the seed alone; sites know nothing of each other.
//!
//! Deliberately absent: folders, models, bases.

mod error;
mod merges;
mod pairs;
mod parts;
pub mod words;

pub use error::Error;
pub use merges::MERGES;
pub use pairs::{Drawn, Pair, Space, combined};
