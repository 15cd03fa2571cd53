//! What a command makes on this machine of artifacts: a folder, or an artifact of its own that says what it came of.

use std::path::{Path, PathBuf};

use attune_artifacts::{Causes, Kind, canonical};
use attune_spec::id::Digest;
use attune_trainer::kernel;
use attune_worker::transfer;
use serde_json::Value;

use super::submit::cannot_push;
use crate::print::{Failure, Out};
use crate::remote::{Place, Server, artifact, block_on, digest};

/// Where what is made goes.
#[derive(Debug, clap::Args)]
pub(super) struct Goes {
    /// The new folder.
    #[arg(long, value_name = "FOLDER", required_unless_present_any = ["tag", "dry_run"])]
    pub(super) to: Option<PathBuf>,
    /// Stores what is made, and moves this tag to it; may be given several times.
    #[arg(long = "tag", value_name = "NAME:LABEL")]
    tag: Vec<String>,
    /// Checks what is asked for and says what would be made, and makes nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl Goes {
    /// Whether nothing is where something is to be made.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match self.to.as_ref().filter(|to| to.try_exists().unwrap_or(true)) {
            Some(to) => Err(Failure::usage(format!("{} is there already; expected a new folder", to.display()))),
            None => Ok(()),
        }
    }
}

/// An adapter that lies in a folder that will go.
pub(super) struct Made<'a> {
    /// The folder.
    pub(super) folder: &'a Path,
    /// What it was made of, by what part each had in it.
    pub(super) of: Vec<(String, &'a Place)>,
    /// How.
    pub(super) plan: Value,
}

/// What something is called where paths mean nothing; `otherwise` where its path has no name.
pub(super) fn name(place: &Place, otherwise: &str) -> String {
    match place {
        Place::Local(path) => {
            path.file_name().map_or_else(|| otherwise.to_owned(), |name| name.to_string_lossy().into_owned())
        }
        Place::Stored(reference) => reference.clone(),
    }
}

impl Made<'_> {
    /// Copies it to a new folder, and stores it under tags, as is asked for: its digest then.
    pub(super) fn keep(&self, goes: &Goes, server: &Server) -> Result<Option<Digest>, Failure> {
        if let Some(to) = &goes.to {
            copy(self.folder, to)?;
        }
        if goes.tag.is_empty() { Ok(None) } else { self.store(&goes.tag, server).map(Some) }
    }

    /// Stores it, with what it was made of as far as the server has it.
    fn store(&self, tags: &[String], server: &Server) -> Result<Digest, Failure> {
        block_on(async {
            let client = server.connect().await?;
            let mut causes = Causes::default();
            for (role, place) in &self.of {
                let Place::Stored(reference) = place else { continue };
                causes.inputs.insert(role.clone(), digest(&artifact(&client, reference).await?.digest)?);
            }
            causes.plan = Some(canonical::digest(&self.plan));
            causes.code_version = Some(kernel::CODE_VERSION.to_owned());
            let pushed = transfer::push(&client, self.folder, Some(Kind::Adapter), causes, None, tags.to_vec());
            Ok(pushed.await.map_err(|error| cannot_push(self.folder, error))?.digest)
        })
    }
}

/// Says where it is: a line each.
pub(super) fn places(to: Option<&Path>, stored: Option<Digest>, out: &mut Out) -> Result<(), Failure> {
    let where_to = [to.map(|to| to.display().to_string()), stored.map(|digest| digest.to_string())];
    where_to.into_iter().flatten().try_for_each(|place| out.line(&place))
}

fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(to).map_err(|error| Failure::file(to, &error))?;
    for entry in std::fs::read_dir(from).map_err(|error| Failure::file(from, &error))? {
        let entry = entry.map_err(|error| Failure::file(from, &error))?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
            continue;
        }
        std::fs::copy(entry.path(), &target).map_err(|error| Failure::file(&target, &error))?;
    }
    Ok(())
}
