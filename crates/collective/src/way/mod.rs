//! Which way the letters of a run go: over the mesh alone, or the long ones over a link between the processes' devices.
//!
//! All processes come to the same answer: each says what it has, and unless all have the same nobody uses his.

use std::collections::BTreeMap;

use crate::carried::{Carried, Link, Stopped};
use crate::error::Error;
use crate::mesh::Mesh;
use crate::{Letters, Wire};

/// Keeps all letters on the mesh where it is set to `tcp`.
pub const VARIABLE: &str = "ATTUNE_LINK";

/// The way, and why, in words for who runs the job.
pub struct Way {
    /// The wire.
    pub wire: Box<dyn Wire>,
    /// What was found.
    pub words: String,
}

/// A process's device, before it is joined to those of others.
pub(crate) trait End {
    /// What it becomes.
    type Link: Link + 'static;

    /// What would join it.
    fn link(&self) -> String;

    /// What no other device in the world has.
    fn device(&self) -> [u8; 16];

    /// A name for a new group, from which all members find one another.
    fn new_group(&self) -> Result<Vec<u8>, String>;

    /// Meets the others of a group, which come to it as well.
    fn join(self, group: &[u8], mesh: &Mesh) -> Result<Self::Link, Stopped>;
}

/// Joins the devices of a mesh's processes, if each has one of its own and NCCL of one version; otherwise the mesh carries
/// everything. All processes call it. `card` is the number of this one's device.
///
/// # Errors
/// [`Error`]: a process is lost meanwhile.
pub fn over(mesh: Mesh, card: Option<u32>) -> Result<Way, Error> {
    let wants_tcp = std::env::var_os(VARIABLE).is_some_and(|value| value == "tcp");
    let end = match card {
        None => Err("works on no NVIDIA device".to_owned()),
        Some(_) if wants_tcp => Err(format!("has {VARIABLE}=tcp")),
        Some(card) => end(card),
    };
    choose(mesh, end)
}

#[cfg(feature = "cuda")]
fn end(card: u32) -> Result<crate::nccl::Device, String> {
    crate::nccl::Device::of(card)
}

#[cfg(not(feature = "cuda"))]
fn end(_: u32) -> Result<Never, String> {
    Err("was built without the feature `cuda`".to_owned())
}

pub(crate) fn choose<E: End>(mut mesh: Mesh, end: Result<E, String>) -> Result<Way, Error> {
    let said = mesh.exchange(Letters::All(Offer::of(&end).written()))?.letters;
    let offers: Vec<Offer> = said.iter().map(|bytes| Offer::read(bytes)).collect();
    let over_tcp = |mesh, words| Ok(Way { wire: Box::new(mesh), words: format!("gradients go over TCP: {words}") });
    let end = match (end, obstacle(&offers)) {
        (Ok(end), None) => end,
        (Err(words), None) => return over_tcp(mesh, words),
        (_, Some(words)) => return over_tcp(mesh, words),
    };
    let link = end.link();
    // The first one names the group; an empty name is none.
    let named = if mesh.rank() == 0 { end.new_group() } else { Ok(Vec::new()) };
    let heard = mesh.exchange(Letters::All(named.clone().unwrap_or_default()))?.letters;
    let joined = match (heard[0].as_slice(), named) {
        (_, Err(words)) => Err(words),
        ([], _) => Err("does not know the group".to_owned()),
        (group, _) => match end.join(group, &mesh) {
            Err(Stopped::By(error)) => return Err(error),
            Err(Stopped::Failed(words)) => Err(words),
            Ok(link) => Ok(link),
        },
    };
    // Unless all have their ends, nobody uses his.
    let words = joined.as_ref().err().cloned().unwrap_or_default();
    let all = mesh.exchange(Letters::All(words.into_bytes()))?.letters;
    let failed = (0..).zip(&all).find(|(_, words)| !words.is_empty());
    match (joined, failed) {
        (Ok(joined), None) => {
            Ok(Way { wire: Box::new(Carried::new(mesh, joined)), words: format!("gradients go by {link}") })
        }
        (_, failed) => {
            let said = failed.map(|(rank, words): (u32, _)| (rank, String::from_utf8_lossy(words).into_owned()));
            let (rank, words) = said.unwrap_or_default();
            over_tcp(mesh, format!("{link} fails at process {rank}, which says: {words}"))
        }
    }
}

/// What a process has.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Offer {
    /// A device, and what would join it to others.
    Device { device: [u8; 16], link: String },
    /// Nothing, and why.
    Nothing(String),
}

impl Offer {
    fn of(end: &Result<impl End, String>) -> Self {
        match end {
            Ok(end) => Self::Device { device: end.device(), link: end.link() },
            Err(words) => Self::Nothing(words.clone()),
        }
    }

    fn written(&self) -> Vec<u8> {
        match self {
            Self::Device { device, link } => [&[1][..], device, link.as_bytes()].concat(),
            Self::Nothing(words) => [&[0][..], words.as_bytes()].concat(),
        }
    }

    fn read(bytes: &[u8]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match bytes.split_first() {
            Some((1, rest)) => match rest.split_first_chunk() {
                Some((device, link)) => Self::Device { device: *device, link: text(link) },
                None => Self::Nothing("says nothing clear of its device".to_owned()),
            },
            Some((_, words)) => Self::Nothing(text(words)),
            None => Self::Nothing("says nothing of its device".to_owned()),
        }
    }
}

/// Why processes that have this cannot be joined.
fn obstacle(offers: &[Offer]) -> Option<String> {
    let (mut links, mut devices) = (BTreeMap::new(), BTreeMap::new());
    for (rank, offer) in offers.iter().enumerate() {
        let (device, link) = match offer {
            Offer::Device { device, link } => (device, link),
            Offer::Nothing(words) => return Some(format!("process {rank} {words}")),
        };
        if let Some(other) = devices.insert(device, rank) {
            return Some(format!("processes {other} and {rank} share a device"));
        }
        links.entry(link).or_insert(rank);
    }
    let mut links = links.into_iter();
    let (one, other) = (links.next()?, links.next()?);
    Some(format!("process {} has {}, process {} {}", one.1, one.0, other.1, other.0))
}

/// What a build without devices has.
#[cfg(not(feature = "cuda"))]
enum Never {}

#[cfg(not(feature = "cuda"))]
impl End for Never {
    type Link = Self;

    fn link(&self) -> String {
        match *self {}
    }

    fn device(&self) -> [u8; 16] {
        match *self {}
    }

    fn new_group(&self) -> Result<Vec<u8>, String> {
        match *self {}
    }

    fn join(self, _: &[u8], _: &Mesh) -> Result<Self, Stopped> {
        match self {}
    }
}

#[cfg(not(feature = "cuda"))]
impl Link for Never {
    fn name(&self) -> &'static str {
        match *self {}
    }

    fn carry(
        &mut self,
        _: &[crate::carried::Letter<'_>],
        _: &mut [(u32, Vec<u8>)],
        _: &mut crate::carried::Watch<'_>,
    ) -> Result<(), Stopped> {
        match *self {}
    }
}

#[cfg(test)]
mod tests;
