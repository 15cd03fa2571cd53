//! What people and programs read: tables, JSON, progress, errors.
//!
//! Data goes to standard output, everything else to standard error. A reader that goes away is success.

mod failure;
pub(crate) mod manual;
mod out;
mod progress;
mod table;

pub(crate) use failure::{FAILED, Failure, USAGE};
pub(crate) use out::Out;
pub(crate) use progress::Progress;
pub(crate) use table::{Column, Table};
