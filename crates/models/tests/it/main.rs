//! Models against the reference implementation, and the properties of the walk.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod asides;
mod components;
#[cfg(feature = "cuda")]
mod device;
mod encoders;
mod export;
mod folder;
mod generating;
mod golden;
mod gradients;
mod lookups;
mod low_rank;
mod passes;
mod places;
mod sequences;
mod sides;
mod support;
mod surgery;
mod tables;
mod walk;
mod whole;
