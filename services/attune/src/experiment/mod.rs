//! A grid of jobs that differ in a few fields, and what came of each: [`matrix`] says which jobs, [`record`] keeps what came of
//! them, [`curve`] how soon that came, [`kept`] what they kept of their base, [`stability`] how much a setting and chance did, [`report`] makes a table of it, or [`searched`] one of a search, and [`plot`] a picture.
//!
//! The one invariant: a record names the job that it is of by everything that the job says, so a grid that was cut off, or
//! changed, goes on with what is missing.

pub(crate) mod curve;
pub(crate) mod kept;
pub(crate) mod matrix;
pub(crate) mod plot;
pub(crate) mod record;
pub(crate) mod report;
pub(crate) mod searched;
mod stability;
