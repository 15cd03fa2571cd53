//! Rules of this repository that no compiler and no lint checks.
//!
//! Each rule is a test that names every violation at once, as `file:line: what`. A rule that has exceptions lists them
//! beside it, each with its reason.

mod layers;
mod methods;
mod repository;
mod sources;
mod text;
