//! The queued jobs, project by project, in the order in which they go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use attune_spec::id::{Digest, Project, WorkerId};

use crate::job::Place;
use crate::{Job, Memory, Resources};

/// The queued jobs, and how many of each project ask for the same: once all that a project asks for has been looked for in vain,
/// nobody looks further in its line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Queue {
    lines: BTreeMap<Project, Line>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Line {
    places: BTreeMap<Place, Asked>,
    /// What its jobs ask for, each once, and how many do.
    kinds: BTreeMap<Arc<Resources>, usize>,
}

/// What is looked at of a queued job, none of which changes while it is queued: a walk through the queue then looks up no job.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    pub(crate) resources: Arc<Resources>,
    /// The workers that ran it last.
    pub(crate) prefer: BTreeSet<WorkerId>,
    /// The workers that were lost with it.
    pub(crate) avoid: BTreeSet<WorkerId>,
    pub(crate) share: Option<Digest>,
    pub(crate) memory: Memory,
}

impl Asked {
    fn of(job: &Job, resources: Arc<Resources>) -> Self {
        let (share, memory) = (job.shares().copied(), job.request.memory);
        let mut asked = Self { resources, prefer: job.workers.clone(), avoid: job.lost_workers.clone(), share, memory };
        if job.n_offers_refused > 0 {
            // One of them has just refused it, and has no more of its inputs than others.
            asked.avoid.append(&mut asked.prefer);
        }
        asked
    }
}

impl Queue {
    pub(crate) fn insert(&mut self, job: &Job) {
        let line = self.lines.entry(job.key.project.clone()).or_default();
        let known = line.kinds.get_key_value(&job.request.resources).map(|(resources, _)| Arc::clone(resources));
        let resources = known.unwrap_or_else(|| Arc::new(job.request.resources.clone()));
        if line.places.insert(job.place(), Asked::of(job, Arc::clone(&resources))).is_none() {
            *line.kinds.entry(resources).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, job: &Job) {
        let Some(line) = self.lines.get_mut(&job.key.project) else { return };
        if line.places.remove(&job.place()).is_some()
            && let Some(count) = line.kinds.get_mut(&job.request.resources)
        {
            *count -= 1;
            if *count == 0 {
                line.kinds.remove(&job.request.resources);
            }
        }
        if line.places.is_empty() {
            self.lines.remove(&job.key.project);
        }
    }

    /// A queued job's place, and what it asks for.
    pub(crate) fn get(&self, job: &Job) -> Option<(&Place, &Asked)> {
        self.lines.get(&job.key.project)?.places.get_key_value(&job.place())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Each project with its jobs, first one first, and how many different things they ask for.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (&Project, &BTreeMap<Place, Asked>, usize)> {
        self.lines.iter().map(|(project, line)| (project, &line.places, line.kinds.len()))
    }

    /// All of them, by priority and age.
    pub(crate) fn in_order(&self) -> Vec<&Place> {
        let mut all: Vec<&Place> = self.lines.values().flat_map(|line| line.places.keys()).collect();
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
