//! The pass over small models, held to what linears read and to the gradients that full tuning gets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod inputs;
mod support;
mod weights;
