//! Passes on views of rows: forward and reverse, with hand-written gradients, over several parts at once.
//!
//! A pass takes *parts*: documents with components, parameters, objective and gradient sink of their own. All parts go
//! through the base's products together; what belongs to one part (its components, its sums over rows) runs on its rows
//! alone and in the same order as without the others, so that a part's results have the same bits in any company. Parts of
//! one job are its logical shards; parts of several jobs are lanes.
//!
//! Reading order: [`arena`], [`times`], [`parts`] (who owns which rows), `weight`, `forms` (what becomes one), `linear` (a site with its components), `blend` and `alone` (components that blend others, and what the base gives by itself), `norm`, `branch`, `prefix` and `aside` (components of
//! whole blocks), `sequence` and `table` (components with rows of their own), `places` (components that add to rows by their places), `side` (components that carry rows from block to block),
//! `local` (what has no hand-written gradient), then the blocks, `head`, [`walk`], and
//! `outputs`.

pub mod arena;
mod peak;
pub mod times;

pub mod parts;

pub(crate) mod alone;
pub(crate) mod aside;
pub(crate) mod blend;
pub(crate) mod branch;
pub(crate) mod forms;
pub(crate) mod linear;
pub(crate) mod local;
pub(crate) mod lookups;
pub(crate) mod norm;
pub(crate) mod places;
pub(crate) mod prefix;
pub(crate) mod sequence;
pub(crate) mod side;
pub(crate) mod table;
pub(crate) mod weight;

pub(crate) mod ends;
pub(crate) mod head;
pub(crate) mod outputs;
pub mod walk;

pub use arena::{Activations, Arena, Mat, Rows};
pub use parts::{PassCx, Sinks};
pub use peak::gemm_peak;
pub use times::{Stopwatch, Times, Work};
