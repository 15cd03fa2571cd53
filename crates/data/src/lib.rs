//! From files to packed batches: readers, forms, chat templates, tokenisation, mixing, packing.
//!
//! The one invariant: which documents a step sees is a pure function of the plan and the step. The order of a domain, the
//! domain of each draw and the place in a pack come from keyed randomness and counters; the state of a stream is a handful
//! of numbers, and a resumed run goes on without reading anything twice.
//!
//! Deliberately absent: models, tensors, the control plane. Files are read as a whole when a run starts.
//!
//! Reading order: [`source`], `readers` and `forms` (rows), [`template`] and [`tokenizer`] (text to tokens), [`encode`],
//! [`classes`], [`dataset`], [`mixing`], [`stream`] (which document comes next), [`loader`] (packing), [`preview`].

pub mod error;
pub mod origin;

mod forms;
mod readers;
pub mod source;

pub mod template;
pub mod tokenizer;

pub mod classes;
pub mod dataset;
pub mod encode;

pub mod loader;
pub mod mixing;
pub mod stream;

pub mod preview;

pub use attune_points::View;
pub use classes::{Classes, Labelled};
pub use dataset::{Dataset, Reading};
pub use encode::Encoder;
pub use error::Error;
pub use forms::{Conversation, Message};
pub use loader::{Loader, Packing};
pub use mixing::MIXINGS;
pub use source::Source;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
