//! The queued jobs, in the order in which they go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeTo;

use crate::job::Place;
use crate::{Job, Resources};

/// The queued jobs, and how many of them ask for the same: once all that is asked for has been looked for in vain, nobody looks further.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Queue {
    places: BTreeSet<Place>,
    asked: BTreeMap<Resources, usize>,
}

impl Queue {
    pub(crate) fn insert(&mut self, job: &Job) {
        if self.places.insert(job.place()) {
            *self.asked.entry(job.request.resources.clone()).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, job: &Job) {
        if self.places.remove(&job.place())
            && let Some(count) = self.asked.get_mut(&job.request.resources)
        {
            *count -= 1;
            if *count == 0 {
                self.asked.remove(&job.request.resources);
            }
        }
    }

    pub(crate) fn contains(&self, job: &Job) -> bool {
        self.places.contains(&job.place())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// First one first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Place> {
        self.places.iter()
    }

    /// Those before a job.
    pub(crate) fn ahead(&self, of: RangeTo<&Place>) -> impl Iterator<Item = &Place> {
        self.places.range::<Place, _>(..of.end)
    }

    /// How many different things its jobs ask for.
    pub(crate) fn n_wishes(&self) -> usize {
        self.asked.len()
    }
}

impl<'j> FromIterator<&'j Job> for Queue {
    fn from_iter<I: IntoIterator<Item = &'j Job>>(jobs: I) -> Self {
        let mut queue = Self::default();
        jobs.into_iter().for_each(|job| queue.insert(job));
        queue
    }
}
