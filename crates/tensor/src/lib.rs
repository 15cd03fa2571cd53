//! What candle lacks for training, with no idea of a model: reproducible randomness, safe differentiable operations,
//! frozen weights whose gradient is never computed, a local reverse pass, searches that need none, weights in memory-mapped files, and the kernels that
//! a training step spends its time in.
//!
//! The one invariant: no operation here cuts a gradient silently, and no random number depends on anything but its
//! logical index. Everything differentiable is checked in f64 against central differences.
//!
//! Deliberately absent: models, sites, adapters, losses, and any other room of this project.

pub mod error;

pub mod permutation;
pub mod rng;

pub mod autograd;
mod blocks;
pub mod bytes;
mod circulant;
pub mod cma_es;
mod fourier;
pub mod frozen;
mod kronecker;
pub mod linalg;
pub mod nsga2;
pub mod ops;
mod ordered;
mod products;
pub mod quantized;
mod scaled;

pub mod mapped;

pub mod kernels;
pub mod reading;
pub mod store;
pub mod view;

pub mod testing;

pub use error::Error;
pub use frozen::FrozenWeight;
pub use mapped::{Mapped, MappedTensor};
pub use quantized::Quantized;
pub use rng::Rng;
