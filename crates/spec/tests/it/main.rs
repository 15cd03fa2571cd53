//! The job file as a user meets it: read against the methods of this build.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod job_file;
