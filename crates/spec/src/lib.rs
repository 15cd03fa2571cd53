//! What a job says and what can be said in one: identifiers, the job file, faults with field paths, and the
//! description of every method.
//!
//! The one invariant: a job that passes this room's checks names only things that exist, with parameters in range. The
//! scheduler, the command line and the trainer call the same checks, so none of them can disagree.
//!
//! Deliberately absent: tensors, files, clocks, networks. Method *types* live with their methods in the training half;
//! what travels here is their card and JSON Schema (`methods/<name>.json`). Recipes are here themselves: they make jobs of a
//! job, and nothing else.

pub mod id;

pub mod fault;
pub mod suggest;

pub mod method;

pub mod job;

pub mod axis;
pub mod recipes;
pub mod stages;

pub use fault::{Fault, FieldPath};
