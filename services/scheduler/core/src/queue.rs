//! The queued jobs, project by project, in the order in which they go.

use std::collections::{BTreeMap, BTreeSet};

use attune_spec::id::Project;

use crate::job::Place;
use crate::{Job, Resources};

/// The queued jobs, and how many of each project ask for the same: once all that a project asks for has been looked for in vain,
/// nobody looks further in its line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Queue {
    lines: BTreeMap<Project, Line>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Line {
    places: BTreeSet<Place>,
    asked: BTreeMap<Resources, usize>,
}

impl Queue {
    pub(crate) fn insert(&mut self, job: &Job) {
        let line = self.lines.entry(job.key.project.clone()).or_default();
        if line.places.insert(job.place()) {
            *line.asked.entry(job.request.resources.clone()).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, job: &Job) {
        let Some(line) = self.lines.get_mut(&job.key.project) else { return };
        if line.places.remove(&job.place())
            && let Some(count) = line.asked.get_mut(&job.request.resources)
        {
            *count -= 1;
            if *count == 0 {
                line.asked.remove(&job.request.resources);
            }
        }
        if line.places.is_empty() {
            self.lines.remove(&job.key.project);
        }
    }

    pub(crate) fn contains(&self, job: &Job) -> bool {
        self.lines.get(&job.key.project).is_some_and(|line| line.places.contains(&job.place()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Each project with its jobs, first one first, and how many different things they ask for.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (&Project, &BTreeSet<Place>, usize)> {
        self.lines.iter().map(|(project, line)| (project, &line.places, line.asked.len()))
    }

    /// All of them, by priority and age.
    pub(crate) fn in_order(&self) -> Vec<&Place> {
        let mut all: Vec<&Place> = self.lines.values().flat_map(|line| &line.places).collect();
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
