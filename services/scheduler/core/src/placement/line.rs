//! The queued jobs of one project, in the order in which they go.

use std::collections::HashSet;
use std::num::NonZeroU32;

use super::{Ask, Tenant};
use crate::project::{Fleet, Usage};
use crate::{Device, JobKey, Memory, Resources};

/// A line that is read as far as it is looked at.
pub(super) struct Line<'a, I> {
    tenant: Tenant,
    share: u64,
    /// Kinds of which what is left to the project is kept for one of its jobs.
    kept: Vec<Device>,
    /// What is not looked for any more.
    hopeless: HashSet<&'a Resources>,
    rest: I,
    seen: Vec<Ask<'a>>,
    is_settled: Vec<bool>,
    next: usize,
}

/// Jobs that are placed together.
pub(super) struct Lanes {
    pub(super) keys: Vec<JobKey>,
    /// What they take of a device's memory.
    pub(super) memory: Memory,
    /// Whether they wait for no more: one of them has waited long enough, or no more of them can be placed together.
    pub(super) is_gathered: bool,
}

impl<'a, I: Iterator<Item = Ask<'a>>> Line<'a, I> {
    pub(super) fn new(tenant: Tenant, rest: I, fleet: &Fleet) -> Self {
        let share = tenant.usage.share(fleet, tenant.policy.weight);
        let (kept, hopeless, seen, is_settled) = Default::default();
        Self { tenant, share, kept, hopeless, rest, seen, is_settled, next: 0 }
    }

    fn get(&mut self, at: usize) -> Option<Ask<'a>> {
        while self.seen.len() <= at {
            self.seen.push(self.rest.next()?);
            self.is_settled.push(false);
        }
        Some(self.seen[at])
    }

    /// The first job that was not looked at yet and asks for what is looked for; none once nothing is any more.
    pub(super) fn head(&mut self) -> Option<Ask<'a>> {
        if self.hopeless.len() >= self.tenant.n_wishes {
            return None;
        }
        loop {
            let ask = self.get(self.next)?;
            if !self.is_settled[self.next] && self.hopes(ask.resources) {
                return Some(ask);
            }
            self.next += 1;
        }
    }

    /// The one that [`Self::head`] found, with its place, and goes on to the next.
    pub(super) fn take(&mut self) -> Option<(usize, Ask<'a>)> {
        let ask = self.get(self.next)?;
        self.next += 1;
        Some((self.next - 1, ask))
    }

    /// The project's dominant share of the fleet, over its weight.
    pub(super) const fn share(&self) -> u64 {
        self.share
    }

    /// Adds to what the project has.
    pub(super) fn charge(&mut self, more: &Usage, fleet: &Fleet) {
        self.tenant.usage.add(more);
        self.share = self.tenant.usage.share(fleet, self.tenant.policy.weight);
    }

    /// Whether this is looked for.
    pub(super) fn hopes(&self, resources: &Resources) -> bool {
        !self.hopeless.contains(resources)
    }

    /// Looks for it no more.
    pub(super) fn give_up(&mut self, resources: &'a Resources) {
        self.hopeless.insert(resources);
    }

    /// The kinds of devices, best first, of which the project may have as many more and that are kept for none of its jobs.
    pub(super) fn kinds(&self, resources: &Resources) -> Vec<Device> {
        let mut kinds = self.tenant.kinds(resources);
        kinds.retain(|kind| !self.kept.contains(kind));
        kinds
    }

    /// Keeps what the project may still have of a kind for a job that needs more of it now; a job that needs more than it may ever have
    /// keeps nothing.
    pub(super) fn keep(&mut self, resources: &Resources, kind: Device) {
        if self.tenant.policy.max_of(kind).is_none_or(|max| resources.n_total() <= max) {
            self.kept.push(kind);
        }
    }

    /// A job with those behind it that may share its process and fit `limit` bytes with it; all of them are settled. The first is
    /// placed even where it alone is expected to take more.
    pub(super) fn lanes(&mut self, first: usize, max_lanes: NonZeroU32, limit: u64) -> Lanes {
        let ask = self.seen[first];
        let (mut lanes, mut memory, mut is_full) = (vec![first], ask.memory, false);
        let mut at = first;
        // Who shares with nobody looks no further.
        while lanes.len() < max_lanes.get() as usize && ask.share.is_some() {
            at += 1;
            let Some(other) = self.get(at) else { break };
            if self.is_settled[at] || !ask.fits(&other) {
                continue;
            }
            let together = memory.with(other.memory);
            if together.total() > limit {
                is_full = true;
                continue;
            }
            memory = together;
            lanes.push(at);
        }
        is_full |= lanes.len() == max_lanes.get() as usize;
        lanes.iter().for_each(|&lane| self.is_settled[lane] = true);
        let is_gathered = is_full || lanes.iter().any(|&lane| !self.seen[lane].gathers);
        let keys = lanes.into_iter().map(|lane| self.seen[lane].key.clone()).collect();
        Lanes { keys, memory, is_gathered }
    }
}
