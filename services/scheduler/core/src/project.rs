//! What projects may have of a fleet, and what each has.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use attune_spec::id::Project;

use crate::placement::Seat;
use crate::{Device, Devices, Memory};

/// What a project may have; a project of which nobody has said anything may have all, with weight 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Its weight in the fair share: of two projects with work, one of weight 2 gets twice as much as one of weight 1.
    pub weight: NonZeroU32,
    /// Shares of processors that its jobs may occupy together.
    pub max_cpu: Option<u32>,
    /// Cards that its jobs may occupy together.
    pub max_cuda: Option<u32>,
    /// Jobs that it may have which have neither ended nor run, stages not counted.
    pub max_queued: Option<u32>,
    /// Bytes of artifacts that it may keep; it is for whoever stores these to hold to it.
    pub max_bytes: Option<u64>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { weight: NonZeroU32::MIN, max_cpu: None, max_cuda: None, max_queued: None, max_bytes: None }
    }
}

impl Policy {
    /// Devices of a kind that the project's jobs may occupy together.
    pub const fn max_of(&self, kind: Device) -> Option<u32> {
        match kind {
            Device::Cpu => self.max_cpu,
            Device::Cuda => self.max_cuda,
        }
    }
}

/// The whole of a fleet, of which projects have shares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fleet {
    devices: Devices,
    cpu_bytes: u64,
    cuda_bytes: u64,
}

impl Fleet {
    /// What these seats have, free or not.
    pub fn of<'s>(seats: impl IntoIterator<Item = &'s Seat<'s>>) -> Self {
        let mut fleet = Self::default();
        seats.into_iter().for_each(|seat| fleet.add(seat));
        fleet
    }

    pub(crate) fn add(&mut self, seat: &Seat<'_>) {
        let bytes = |kind: Device| {
            let each = seat.memory.get(&kind).copied().unwrap_or_default();
            each.saturating_mul(u64::from(seat.devices.of(kind)))
        };
        self.devices = self.devices.and(seat.devices);
        self.cpu_bytes = self.cpu_bytes.saturating_add(bytes(Device::Cpu));
        self.cuda_bytes = self.cuda_bytes.saturating_add(bytes(Device::Cuda));
    }
}

/// What a project occupies. A worker that several projects share is no resource of its own: its devices are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Usage {
    devices: Devices,
    cpu_bytes: u64,
    cuda_bytes: u64,
}

/// The unit of shares: the whole of a fleet for a project of weight 1.
const WHOLE: u128 = 1 << 32;

impl Usage {
    /// A gang of `n_devices` devices of a kind on each of `n_workers` workers, each with jobs that take this memory.
    pub fn of_gang(kind: Device, n_devices: u32, n_workers: usize, memory: Memory) -> Self {
        let all = u64::from(n_devices).saturating_mul(n_workers as u64);
        let devices = Devices::default().with(kind, u32::try_from(all).unwrap_or(u32::MAX));
        let mut usage = Self { devices, ..Self::default() };
        let bytes = memory.total().saturating_mul(u64::from(usage.devices.of(kind)));
        match kind {
            Device::Cpu => usage.cpu_bytes = bytes,
            Device::Cuda => usage.cuda_bytes = bytes,
        }
        usage
    }

    /// The devices of it.
    pub const fn devices(&self) -> Devices {
        self.devices
    }

    /// Whether it is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// More of it.
    pub fn add(&mut self, more: &Self) {
        self.devices = self.devices.and(more.devices);
        self.cpu_bytes = self.cpu_bytes.saturating_add(more.cpu_bytes);
        self.cuda_bytes = self.cuda_bytes.saturating_add(more.cuda_bytes);
    }

    /// Less of it.
    pub fn remove(&mut self, less: &Self) {
        for kind in [Device::Cpu, Device::Cuda] {
            self.devices = self.devices.without(kind, less.devices.of(kind));
        }
        self.cpu_bytes = self.cpu_bytes.saturating_sub(less.cpu_bytes);
        self.cuda_bytes = self.cuda_bytes.saturating_sub(less.cuda_bytes);
    }

    /// The dominant share, over the weight: the largest part that it is of anything that the fleet has: devices of each kind, and their
    /// memory. In parts of 2^32; of devices that the fleet has not any more it has all, of memory that nobody knows nothing.
    pub fn share(&self, fleet: &Fleet, weight: NonZeroU32) -> u64 {
        let pairs = [
            (u64::from(self.devices.n_cpu), u64::from(fleet.devices.n_cpu), WHOLE),
            (u64::from(self.devices.n_cuda), u64::from(fleet.devices.n_cuda), WHOLE),
            (self.cpu_bytes, fleet.cpu_bytes, 0),
            (self.cuda_bytes, fleet.cuda_bytes, 0),
        ];
        let part = |(used, all, of_none): (u64, u64, u128)| match (used, all) {
            (0, _) => 0,
            (_, 0) => of_none,
            (used, all) => u128::from(used) * WHOLE / u128::from(all),
        };
        let dominant = pairs.into_iter().map(part).max().unwrap_or_default() / u128::from(weight.get());
        u64::try_from(dominant).unwrap_or(u64::MAX)
    }
}

/// What the scheduler keeps count of for a project. Derived from jobs and cohorts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Account {
    /// What its cohorts occupy.
    pub(crate) usage: Usage,
    /// Its jobs that have neither ended nor run, stages not counted.
    pub(crate) n_queued: u32,
}

impl Account {
    pub(crate) fn is_empty(&self) -> bool {
        self.usage.is_empty() && self.n_queued == 0
    }
}

/// The accounts of all projects that have anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Accounts {
    of: BTreeMap<Project, Account>,
}

impl Accounts {
    /// A project's.
    pub(crate) fn of(&self, project: &Project) -> Option<&Account> {
        self.of.get(project)
    }

    /// The projects that have anything.
    pub(crate) fn projects(&self) -> impl Iterator<Item = &Project> {
        self.of.keys()
    }

    /// Changes a project's.
    pub(crate) fn change(&mut self, project: &Project, change: impl FnOnce(&mut Account)) {
        let account = self.of.entry(project.clone()).or_default();
        change(account);
        if account.is_empty() {
            self.of.remove(project);
        }
    }
}

#[cfg(test)]
mod tests {
    use attune_spec::id::WorkerId;

    use super::*;

    fn weight(n: u32) -> NonZeroU32 {
        NonZeroU32::new(n).unwrap()
    }

    /// Four workers of four shares and two cards each; cards of 100 bytes.
    fn fleet() -> Fleet {
        let (memory, labels) = (BTreeMap::from([(Device::Cuda, 100)]), BTreeMap::new());
        let workers = ["a", "b", "c", "d"].map(|name| WorkerId::new(name).unwrap());
        let devices = Devices { n_cpu: 4, n_cuda: 2 };
        let seat = |worker| Seat { worker, devices, free: Devices::default(), memory: &memory, labels: &labels };
        Fleet::of(&workers.iter().map(seat).collect::<Vec<_>>())
    }

    const QUARTER: u64 = 1 << 30;

    #[test]
    fn the_largest_part_of_anything_counts() {
        let of = |kind, n_devices, n_workers, own| {
            let memory = Memory { own, ..Memory::default() };
            Usage::of_gang(kind, n_devices, n_workers, memory).share(&fleet(), weight(1))
        };
        assert_eq!(of(Device::Cpu, 2, 2, 0), QUARTER, "four shares of sixteen");
        assert_eq!(of(Device::Cuda, 2, 1, 10), QUARTER, "two cards of eight");
        assert_eq!(of(Device::Cuda, 1, 1, 600), 3 * QUARTER, "most of the memory");
        assert_eq!(of(Device::Cpu, 4, 1, 5), QUARTER, "memory that nobody knows");
        let gone = Usage::of_gang(Device::Cpu, 1, 1, Memory::default());
        assert_eq!(gone.share(&Fleet::default(), weight(1)), 4 * QUARTER, "of a fleet that is not there");
        assert_eq!(Usage::default().share(&fleet(), weight(1)), 0);
    }

    #[test]
    fn a_heavier_project_has_a_smaller_share_of_as_much() {
        let usage = Usage::of_gang(Device::Cpu, 4, 2, Memory::default());
        assert_eq!(usage.share(&fleet(), weight(2)), QUARTER);
    }

    #[test]
    fn what_was_added_can_be_removed() {
        let gang = |kind| Usage::of_gang(kind, 2, 2, Memory { own: 7, ..Memory::default() });
        let (one, other) = (gang(Device::Cpu), gang(Device::Cuda));
        let mut both = one;
        both.add(&other);
        assert_eq!(both.devices(), Devices { n_cpu: 4, n_cuda: 4 });
        assert_eq!((both.cpu_bytes, both.cuda_bytes), (28, 28));
        both.remove(&one);
        assert_eq!(both, other);
        both.remove(&other);
        assert!(both.is_empty());
    }

    #[test]
    fn accounts_of_nothing_are_not_kept() {
        let (mut accounts, project) = (Accounts::default(), Project::default());
        accounts.change(&project, |account| account.n_queued += 1);
        assert_eq!(accounts.of(&project).map(|account| account.n_queued), Some(1));
        accounts.change(&project, |account| account.n_queued -= 1);
        assert_eq!(accounts, Accounts::default());
    }
}
