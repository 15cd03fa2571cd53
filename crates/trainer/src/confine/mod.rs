//! What the process that trains may touch: what its requests name, the system's libraries, and nothing else.
//!
//! A model's or a data set's files come from strangers, and a fault in what reads them would be theirs to use. By the kernel's Landlock
//! the process gives up, before it opens the first of them, every file that is not its own: those of other jobs, the tokens of the
//! worker, its memory and environment in `/proc`. It starts no program and no other process of its own, cannot signal or trace processes
//! beside it, and where nothing is read by URL and
//! no other process takes part, it opens no TCP connection either.
//!
//! Kernels without Landlock confine nothing but what it starts, older ones a part; which, [`Confined`] says. Processes that work on an NVIDIA device are not
//! confined: what its driver opens is not written down anywhere.

mod alone;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use attune_spec::job::plan::Input;
use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
    path_beneath_rules,
};

use crate::protocol::Request;

/// What the kernel refused, although it knows how.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Landlock's rules.
    #[error(transparent)]
    Rules(#[from] RulesetError),
    /// The filter of what it starts.
    #[error(transparent)]
    Filter(#[from] seccompiler::Error),
}

/// How far a process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confined {
    /// In all that is said above.
    Fully,
    /// As far as this kernel goes.
    Partly,
    /// Not at all: this kernel has no Landlock, or it is off.
    Not,
    /// Not at all: it works on an NVIDIA device.
    OnDevice,
}

/// What a program reads wherever it runs: libraries, certificates, names of hosts, what processor and memory there are.
const OF_SYSTEM: [&str; 15] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/nix/store",
    "/sys",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys",
    "/proc/filesystems",
];

/// Variables that name files with which objects are read by URL: certificates, and what proves to a cloud who asks.
const OF_REMOTE: [&str; 4] =
    ["SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"];

/// Devices that are no hardware.
const DEVICES: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// The kernel's interface that is asked for: with scopes of signals.
const WANTED: ABI = ABI::V6;

/// The most entries of a folder that are looked at for links out of it.
const ENTRIES_MAX: usize = 100_000;

/// Gives up what none of the requests names. It holds for this thread and all that it starts, so it comes before any other thread.
///
/// # Errors
/// [`Refused`].
pub fn confine(requests: &[Request]) -> Result<Confined, Refused> {
    if requests.iter().any(|request| request.card.is_some()) {
        return Ok(Confined::OnDevice);
    }
    alone::stay()?;
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(WANTED))?;
    let mut of_remote = Vec::new();
    if requests.iter().all(is_alone) {
        ruleset = ruleset.handle_access(AccessNet::from_all(WANTED))?;
    } else {
        of_remote.extend(OF_REMOTE.iter().filter_map(std::env::var_os).map(PathBuf::from));
    }
    let own = std::env::current_exe().ok();
    let of_requests = requests.iter().flat_map(read);
    let read = OF_SYSTEM.iter().map(PathBuf::from).chain(own).chain(of_remote).chain(of_requests);
    let written = requests.iter().map(|request| request.work.clone());
    // What is not there is left out: who asks for it says so.
    let status = ruleset
        .scope(Scope::from_all(WANTED))?
        .create()?
        .add_rules(path_beneath_rules(read.collect::<BTreeSet<_>>(), AccessFs::ReadFile | AccessFs::ReadDir))?
        .add_rules(path_beneath_rules(written, AccessFs::from_all(WANTED)))?
        .add_rules(path_beneath_rules(DEVICES, AccessFs::ReadFile | AccessFs::WriteFile))?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Confined::Fully,
        RulesetStatus::PartiallyEnforced => Confined::Partly,
        RulesetStatus::NotEnforced => Confined::Not,
    })
}

/// Whether a run needs nobody else: it reads nothing by URL, and no other process is of it.
fn is_alone(request: &Request) -> bool {
    let is_remote = |input: &Input| matches!(input, Input::Url(url) if of_file(url).is_none());
    request.seat.is_none() && !request.plan.inputs().any(is_remote)
}

/// The path of a `file:` URL.
fn of_file(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").map(PathBuf::from)
}

/// Where a request reads: its inputs, and what links in them lead to.
fn read(request: &Request) -> Vec<PathBuf> {
    let named = request.plan.inputs().filter_map(|input| match input {
        Input::Path(path) => Some(PathBuf::from(path)),
        Input::Url(url) => of_file(url),
        Input::Artifact(_) => None,
    });
    let mut places: Vec<PathBuf> = named.collect();
    let mut led = Vec::new();
    let mut left = ENTRIES_MAX;
    // A folder of Hugging Face's cache has links to where the files are; artifacts are copies without links.
    places.iter().for_each(|place| links(place, &mut led, &mut left));
    places.extend(led);
    places.extend(request.inputs.values().cloned());
    places.extend(request.resume.clone());
    places
}

/// Where the links in a folder lead.
fn links(folder: &Path, led: &mut Vec<PathBuf>, left: &mut usize) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
        if *left == 0 {
            return;
        }
        *left -= 1;
        match entry.file_type() {
            Ok(kind) if kind.is_symlink() => led.extend(std::fs::canonicalize(entry.path())),
            Ok(kind) if kind.is_dir() => links(&entry.path(), led, left),
            _ => {}
        }
    }
}
