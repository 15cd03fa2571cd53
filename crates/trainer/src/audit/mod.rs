//! What models are like that were trained, apart from the runs that trained them.
//!
//! The one invariant: a number that is made of a few items says how sure it is.
//!
//! Reading order: [`bootstrap`] (how sure a number is), [`measure`] (what a model makes of texts), [`fairness`] (what runs of few directions
//! keep of their base that a run of all weights gets rid of), [`drift`] (whether texts are still like those that a model learned),
//! [`answers`] (how good, how faithful and how safe what it says is).

pub mod answers;
pub mod bootstrap;
pub mod drift;
pub mod fairness;
pub mod measure;
