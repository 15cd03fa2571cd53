//! The built-in demonstration: an invented world, a tiny base that has never read anything, and two jobs. The first
//! teaches the base the world as plain text; the second teaches it to answer questions about that world, also those
//! that no training row answers.
//!
//! Everything is made here from a seed: the same seed gives the same bytes, and nothing is downloaded.

mod base;
mod jobs;
mod world;

use std::path::{Path, PathBuf};

use crate::print::Failure;

pub(crate) use jobs::{CHAT_JOB, TEXT_JOB};
pub(crate) use world::World;

/// The folder of the base.
const BASE: &str = "base";

/// Writes everything that the demonstration needs into `folder`: base, data, job files. Returns what was written, in the
/// order in which one would read it.
pub(crate) fn write(folder: &Path, world: &World) -> Result<Vec<PathBuf>, Failure> {
    let mut written = Vec::new();
    let mut put = |name: String, bytes: &[u8]| -> Result<(), Failure> {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(|error| Failure::file(parent, &error))?;
        std::fs::write(&path, bytes).map_err(|error| Failure::file(&path, &error))?;
        written.push(path);
        Ok(())
    };
    for (name, bytes) in world.files() {
        put(name.to_owned(), bytes.as_bytes())?;
    }
    for (name, bytes) in base::files(world)? {
        put(format!("{BASE}/{name}"), &bytes)?;
    }
    for job in [TEXT_JOB, CHAT_JOB] {
        put(job.file.to_owned(), job.yaml.as_bytes())?;
    }
    Ok(written)
}

#[cfg(test)]
mod tests;
