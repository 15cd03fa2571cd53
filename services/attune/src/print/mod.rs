//! What people and programs read: tables, JSON, progress, errors.
//!
//! Data goes to standard output, everything else to standard error. A reader that goes away is success.

use std::io::Write as _;

mod failure;
pub(crate) mod manual;
mod out;
mod progress;
mod table;

pub(crate) use failure::{FAILED, Failure, USAGE};
pub(crate) use out::Out;
pub(crate) use progress::Progress;
pub(crate) use table::{Column, Table};

/// A line for people on standard error. There is nobody left to tell when that is gone.
pub(crate) fn note(text: &str) {
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}
