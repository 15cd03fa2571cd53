//! The queued jobs, project by project, in the order in which they go.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::{Digest, Project, WorkerId};

use crate::job::Place;
use crate::{Job, Memory, Resources};

/// The queued jobs of each project, by what they ask for: once one of those that ask for the same has been looked for in vain, those
/// behind it need not be looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Queue {
    lines: BTreeMap<Project, BTreeMap<Resources, BTreeMap<Place, Asked>>>,
}

/// What is looked at of a queued job beside its resources, none of which changes while it is queued: a walk through the queue then looks
/// up no job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    /// The workers that ran it last.
    pub(crate) prefer: BTreeSet<WorkerId>,
    /// The workers that were lost with it.
    pub(crate) avoid: BTreeSet<WorkerId>,
    pub(crate) share: Option<Digest>,
    pub(crate) memory: Memory,
}

impl Asked {
    fn of(job: &Job) -> Self {
        let (share, memory) = (job.shares().copied(), job.request.memory);
        let mut asked = Self { prefer: job.workers.clone(), avoid: job.lost_workers.clone(), share, memory };
        if job.n_offers_refused > 0 {
            // One of them has just refused it, and has no more of its inputs than others.
            asked.avoid.append(&mut asked.prefer);
        }
        asked
    }
}

/// A queued job: what it asks for, its place, and the rest.
pub(crate) type Queued<'q> = (&'q Resources, &'q Place, &'q Asked);

impl Queue {
    pub(crate) fn insert(&mut self, job: &Job) {
        let line = self.lines.entry(job.key.project.clone()).or_default();
        if !line.contains_key(&job.request.resources) {
            line.insert(job.request.resources.clone(), BTreeMap::new());
        }
        let places = line.get_mut(&job.request.resources);
        places.map(|places| places.insert(job.place(), Asked::of(job)));
    }

    pub(crate) fn remove(&mut self, job: &Job) {
        let Some(line) = self.lines.get_mut(&job.key.project) else { return };
        let Some(places) = line.get_mut(&job.request.resources) else { return };
        places.remove(&job.place());
        if places.is_empty() {
            line.remove(&job.request.resources);
        }
        if line.is_empty() {
            self.lines.remove(&job.key.project);
        }
    }

    /// A queued job.
    pub(crate) fn get(&self, job: &Job) -> Option<Queued<'_>> {
        let (resources, places) = self.lines.get(&job.key.project)?.get_key_value(&job.request.resources)?;
        places.get_key_value(&job.place()).map(|(place, asked)| (resources, place, asked))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Each project with its jobs: those that ask for the same together, the first one first.
    pub(crate) fn lines(
        &self,
    ) -> impl Iterator<Item = (&Project, impl Iterator<Item = impl Iterator<Item = Queued<'_>>>)> {
        self.lines.iter().map(|(project, line)| {
            let groups = line.iter();
            (project, groups.map(|(wish, places)| places.iter().map(move |(place, asked)| (wish, place, asked))))
        })
    }

    /// All of them, by priority and age.
    pub(crate) fn in_order(&self) -> Vec<&Place> {
        let lines = self.lines.values().flat_map(BTreeMap::values);
        let mut all: Vec<&Place> = lines.flat_map(BTreeMap::keys).collect();
        all.sort_unstable();
        all
    }
}

impl<'j> FromIterator<&'j Job> for Queue {
    fn from_iter<I: IntoIterator<Item = &'j Job>>(jobs: I) -> Self {
        let mut queue = Self::default();
        jobs.into_iter().for_each(|job| queue.insert(job));
        queue
    }
}
