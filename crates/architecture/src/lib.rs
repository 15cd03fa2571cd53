//! What a decoder is made of, read from the `config.json` of a Hugging Face folder: blocks, sites with their shapes,
//! the tensors its files must hold, ties, and counts of parameters, FLOPs and bytes in closed form.
//!
//! The one invariant: an [`Architecture`] that exists is consistent. Every field was checked, no product of its
//! dimensions overflows, and every site and tensor it names has a definite shape.
//!
//! Deliberately absent: tensors, files and clocks. The scheduler resolves targets and forecasts memory with this room
//! alone; whoever has a folder reads `config.json` and hands its bytes in.

pub mod error;
pub mod site;

pub mod activation;
pub mod family;
pub mod rope;

mod config;
mod fields;
mod modules;
mod rope_config;
mod windows;

pub mod count;
pub mod targets;

pub mod decoder;
pub mod head;
pub mod reshape;

pub use activation::Activation;
pub use decoder::{
    Architecture, BlockInfo, BlockKind, Experts, MlpKind, NormKind, NormPlacement, Positions, Projections, QkNorm,
};
pub use error::Error;
pub use family::Family;
pub use head::{HeadKind, PooledRow, Pooling};
pub use rope::{Rope, RopeScaling};
pub use site::{Place, Site, SiteId, SiteKind, TensorInfo, TensorPart};
