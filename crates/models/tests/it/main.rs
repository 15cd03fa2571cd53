//! Models against the reference implementation, and the properties of the walk.

mod export;
mod folder;
mod golden;
mod support;
mod walk;
