//! The queued jobs of one project, in the order in which they go.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::num::NonZeroU32;

use super::{Ask, Tenant};
use crate::project::{Fleet, Usage};
use crate::{Device, JobKey, Memory, Resources};

/// The priority, the place among equals and the key of a job, and its group.
type Head<'a> = (Reverse<i32>, u64, &'a JobKey, usize);

/// A line: its groups, of which the one goes on whose first job is next. It is read as far as it is looked at.
pub(super) struct Line<'a, I> {
    tenant: Tenant,
    share: u64,
    /// Kinds of which what is left to the project is kept for one of its jobs.
    kept: Vec<Device>,
    groups: Vec<Group<'a, I>>,
    /// The first job of each group, by priority and age.
    heads: BinaryHeap<Reverse<Head<'a>>>,
}

/// The jobs of a line that ask for the same.
pub(super) struct Group<'a, I> {
    /// The number of what they ask for, the same in all lines.
    pub(super) wish: usize,
    /// Whether a gang for one of them was looked for in vain: none will be found for those behind it either.
    pub(super) is_in_vain: bool,
    /// Whether it is not looked at any more.
    pub(super) is_given_up: bool,
    /// What was read and not taken; nothing in the place of a job that was placed with one before it.
    seen: VecDeque<Option<Ask<'a>>>,
    rest: I,
}

/// Jobs that are placed together with one before them.
pub(super) struct Lanes<'a> {
    pub(super) behind: Vec<&'a JobKey>,
    /// What all of them take of a device's memory.
    pub(super) memory: Memory,
    /// Whether they wait for no more: one of them has waited long enough, or no more of them can be placed together.
    pub(super) is_gathered: bool,
}

impl<'a, I: Iterator<Item = Ask<'a>>> Group<'a, I> {
    /// Jobs that ask for the same, if there are any; `number` numbers what they ask for.
    pub(super) fn new(mut rest: I, number: impl FnOnce(&'a Resources) -> usize) -> Option<Self> {
        let first = rest.next()?;
        let (wish, seen) = (number(first.resources), VecDeque::from([Some(first)]));
        Some(Self { wish, is_in_vain: false, is_given_up: false, seen, rest })
    }

    /// Reads on until there is a job, or none, in this place.
    fn get(&mut self, at: usize) -> Option<&mut Option<Ask<'a>>> {
        while self.seen.len() <= at {
            self.seen.push_back(Some(self.rest.next()?));
        }
        self.seen.get_mut(at)
    }

    fn head(&mut self) -> Option<Ask<'a>> {
        loop {
            if let Some(ask) = *self.get(0)? {
                return Some(ask);
            }
            self.seen.pop_front();
        }
    }

    /// A job that was taken, with those behind it that may share its process and fit `limit` bytes with it; these are taken too. The
    /// first is placed even where it alone is expected to take more.
    pub(super) fn lanes(&mut self, first: &Ask<'a>, max_lanes: NonZeroU32, limit: u64) -> Lanes<'a> {
        let (mut behind, mut memory, n_most) = (Vec::new(), first.memory, max_lanes.get() as usize - 1);
        let (mut is_full, mut gathers, mut at) = (false, first.gathers, 0);
        // Who shares with nobody looks no further.
        while behind.len() < n_most && first.share.is_some() {
            let Some(seen) = self.get(at) else { break };
            at += 1;
            let Some(other) = seen.filter(|other| first.fits(other)) else { continue };
            let together = memory.with(other.memory);
            if together.total() > limit {
                is_full = true;
                continue;
            }
            memory = together;
            gathers &= other.gathers;
            behind.push(other.key);
            *seen = None;
        }
        is_full |= behind.len() == n_most;
        Lanes { behind, memory, is_gathered: is_full || !gathers }
    }
}

impl<'a, I: Iterator<Item = Ask<'a>>> Line<'a, I> {
    pub(super) fn new(tenant: Tenant, groups: Vec<Group<'a, I>>, fleet: &Fleet) -> Self {
        let share = tenant.usage.share(fleet, tenant.policy.weight);
        let mut line = Self { tenant, share, kept: Vec::new(), groups, heads: BinaryHeap::new() };
        for at in 0..line.groups.len() {
            line.line_up(at);
        }
        line
    }

    /// Puts the first job of a group that has one and is not given up among those that can be next, and says whether it did.
    pub(super) fn line_up(&mut self, at: usize) -> bool {
        let group = &mut self.groups[at];
        let head = if group.is_given_up { None } else { group.head() };
        self.heads.extend(head.map(|ask| Reverse((Reverse(ask.priority), ask.order, ask.key, at))));
        head.is_some()
    }

    /// The next job.
    pub(super) fn head(&self) -> Option<Head<'a>> {
        self.heads.peek().map(|Reverse(head)| *head)
    }

    /// Takes the next job, with the number of its group, which has to be lined up again.
    pub(super) fn take(&mut self) -> Option<(usize, Ask<'a>)> {
        let Reverse((.., at)) = self.heads.pop()?;
        Some((at, self.groups[at].seen.pop_front()??))
    }

    pub(super) fn group(&mut self, at: usize) -> &mut Group<'a, I> {
        &mut self.groups[at]
    }

    /// How many groups it has.
    pub(super) fn n_groups(&self) -> usize {
        self.groups.len()
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

    /// The kinds of devices, best first, of which the project may have as many more and that are kept for none of its jobs.
    pub(super) fn kinds(&self, resources: &Resources) -> Cow<'static, [Device]> {
        let all = resources.device.kinds();
        let may_have = |kind: &Device| self.tenant.has_room(resources, *kind) && !self.kept.contains(kind);
        if all.iter().all(may_have) {
            return Cow::Borrowed(all);
        }
        all.iter().copied().filter(may_have).collect()
    }

    /// Keeps what the project may still have of a kind for a job that needs more of it now; a job that needs more than it may ever have
    /// keeps nothing.
    pub(super) fn keep(&mut self, resources: &Resources, kind: Device) {
        if self.tenant.policy.max_of(kind).is_none_or(|max| resources.n_total() <= max) {
            self.kept.push(kind);
        }
    }
}
