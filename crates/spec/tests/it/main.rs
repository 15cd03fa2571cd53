//! The job file as a user meets it: read against the methods of this build.

mod job_file;
