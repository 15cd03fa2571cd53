//! One walk through the queue.
//!
//! Seats only get fewer while it lasts, and so does what a project may have. What found no gang once finds none behind, and what could not
//! even keep workers is not looked for any more.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use super::line::{Group, Lanes, Line};
use super::{Ask, Extent, Gang, Tenant};
use crate::project::{Fleet, Usage};
use crate::seats::Seats;
use crate::{Device, JobKey, Resources};

/// How many jobs that ask for the same are looked for, once nothing is free, that others may make way for: the next look finds the next
/// ones.
const MAX_WAITING: usize = 64;

/// The next job of a line: its priority, its project's share, its place among equals, its key, and the line.
type Head<'a> = (Reverse<i32>, u64, u64, &'a JobKey, usize);

/// What is known of a wish, whatever project has it.
#[derive(Debug, Clone, Default)]
struct Wish {
    /// It neither found a gang nor kept a worker.
    is_hopeless: bool,
    n_waiting: usize,
}

/// A fleet that is being filled.
pub(super) struct Walk<'a, 'f, I> {
    fleet: &'f mut Seats<'a>,
    /// All that the fleet has.
    whole: Fleet,
    max_lanes: NonZeroU32,
    extent: Extent,
    lines: Vec<Line<'a, I>>,
    /// The next job of each line, by whose turn it is.
    heads: BTreeSet<Head<'a>>,
    wishes: Vec<Wish>,
    /// Groups of jobs of which one may still find a gang.
    n_hoping: usize,
    gangs: Vec<Gang<'a>>,
    waiting: Vec<(&'a JobKey, &'a Resources)>,
}

impl<'a, 'f, I: Iterator<Item = Ask<'a>>> Walk<'a, 'f, I> {
    pub(super) fn new(
        queue: impl IntoIterator<Item = (Tenant, impl IntoIterator<Item = I>)>,
        fleet: &'f mut Seats<'a>,
        max_lanes: NonZeroU32,
        extent: Extent,
    ) -> Self {
        let whole = fleet.whole();
        let mut numbers: BTreeMap<&Resources, usize> = BTreeMap::new();
        let mut number = |resources| {
            let next = numbers.len();
            *numbers.entry(resources).or_insert(next)
        };
        let mut lines = Vec::new();
        for (tenant, groups) in queue {
            let groups = groups.into_iter().filter_map(|jobs| Group::new(jobs, &mut number)).collect();
            lines.push(Line::new(tenant, groups, &whole));
        }
        let n_hoping = lines.iter().map(Line::n_groups).sum();
        let wishes = vec![Wish::default(); numbers.len()];
        let (heads, gangs, waiting) = Default::default();
        Self { fleet, whole, max_lanes, extent, lines, heads, wishes, n_hoping, gangs, waiting }
    }

    pub(super) fn run(mut self) -> (Vec<Gang<'a>>, Vec<(&'a JobKey, &'a Resources)>) {
        (0..self.lines.len()).for_each(|idx| self.line_up(idx));
        while let Some((Reverse(priority), .., idx)) = self.heads.pop_first() {
            let is_idle = self.fleet.is_idle();
            let goes_on = match self.extent {
                Extent::Gangs => is_idle && self.n_hoping > 0,
                Extent::Waiting { least } => is_idle || least.is_some_and(|least| priority > least),
            };
            if !goes_on {
                break;
            }
            if let Some((at, ask)) = self.lines[idx].take() {
                self.look(idx, at, &ask, is_idle);
                if !self.lines[idx].line_up(at) {
                    self.in_vain(idx, at);
                }
            }
            self.line_up(idx);
        }
        (self.gangs, self.waiting)
    }

    /// Puts the next job of a line among the heads.
    fn line_up(&mut self, idx: usize) {
        let share = self.lines[idx].share();
        let head = self.lines[idx].head();
        self.heads.extend(head.map(|(priority, order, key, _)| (priority, share, order, key, idx)));
    }

    /// No job of a group will find a gang any more. Says whether that was not known.
    fn in_vain(&mut self, idx: usize, at: usize) -> bool {
        let is_new = !std::mem::replace(&mut self.lines[idx].group(at).is_in_vain, true);
        self.n_hoping -= usize::from(is_new);
        is_new
    }

    /// Looks for a gang for a job of a group.
    fn look(&mut self, idx: usize, at: usize, ask: &Ask<'a>, is_idle: bool) {
        let kinds = self.lines[idx].kinds(ask.resources);
        let group = self.lines[idx].group(at);
        let wish = &mut self.wishes[group.wish];
        if wish.is_hopeless {
            group.is_given_up = true;
            return;
        }
        let gang = if group.is_in_vain { None } else { self.fleet.gang(ask, &kinds) };
        let limit = gang.as_ref().and_then(|(device, gang)| self.fleet.memory(*device, gang)).unwrap_or(u64::MAX);
        let lanes = group.lanes(ask, self.max_lanes, limit);
        let is_found = gang.is_some();
        if let Some((device, gang)) = gang.filter(|_| lanes.is_gathered) {
            return self.fill(idx, ask, lanes, device, gang);
        }
        if self.fleet.keep(ask, &kinds) {
            wish.n_waiting += 1;
            group.is_given_up = !is_idle && wish.n_waiting >= MAX_WAITING;
            let is_new = !is_found && self.in_vain(idx, at);
            let is_told = is_new || !is_found && self.extent != Extent::Gangs;
            self.waiting.extend(is_told.then_some((ask.key, ask.resources)));
        } else if !is_found {
            group.is_given_up = true;
            let all = ask.resources.device.kinds();
            wish.is_hopeless = *kinds == *all;
            // What its project may not have now it may have later.
            for kind in all.iter().filter(|kind| !kinds.contains(kind)) {
                if self.fleet.could_hold(ask, *kind) {
                    self.lines[idx].keep(ask.resources, *kind);
                }
            }
        }
    }

    /// Gives a gang to the jobs that were found for it.
    fn fill(&mut self, idx: usize, ask: &Ask<'a>, lanes: Lanes<'a>, device: Device, seats: Vec<usize>) {
        let n_devices = ask.resources.n_devices.get();
        seats.iter().for_each(|&seat| self.fleet.take(seat, device, n_devices));
        self.lines[idx].charge(&Usage::of_gang(device, n_devices, seats.len(), lanes.memory), &self.whole);
        let keys = std::iter::once(ask.key).chain(lanes.behind).collect();
        self.gangs.push(Gang { resources: ask.resources, keys, device, seats });
    }
}
