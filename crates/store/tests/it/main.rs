//! The store's contract, run over every backend.

mod sqlite;
mod suite;
