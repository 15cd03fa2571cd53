//! A worker as the scheduler sees it now. Nothing of it is stored: workers come back by themselves.

use std::collections::BTreeMap;

use attune_spec::id::{CohortId, Name, WorkerId};

use crate::{Attempt, Device, Devices};

/// Number of a worker's connection, given by the shell; a later connection has a larger number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session(pub u64);

/// A cohort that a worker says it runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holding {
    /// The cohort.
    pub cohort: CohortId,
    /// Its attempts that run.
    pub attempts: Vec<Attempt>,
    /// The kind of the devices it occupies.
    pub device: Device,
    /// How many devices it occupies.
    pub n_devices: u32,
}

/// Devices that a cohort occupies on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Occupied {
    /// Their kind.
    pub device: Device,
    /// Their number.
    pub n_devices: u32,
    /// Whether the cohort is over, so that they come free as soon as its processes are gone.
    pub releasing: bool,
}

/// A registered worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Worker {
    /// Its name.
    pub id: WorkerId,
    /// Its newest connection.
    pub session: Session,
    /// Whether that connection stands. A worker without one gets no offers, but keeps its leases until they end.
    pub connected: bool,
    /// Whether it is to get nothing new.
    pub draining: bool,
    /// All its devices.
    pub devices: Devices,
    /// Memory of each device, by kind, where it is known.
    pub memory: BTreeMap<Device, u64>,
    /// What a job's `resources.labels` are compared with.
    pub labels: BTreeMap<String, String>,
    /// The name of its process, another after each start.
    pub process: Option<Name>,
    /// Whether it finishes what it runs and gets nothing new: it is of an earlier version.
    pub outdated: bool,
    /// Offers in a row that it had no room for.
    pub n_declined: u32,
    /// Whether it is left alone for a while because of that.
    pub rests: bool,
    /// The number of its newest heartbeat in this session.
    pub beat: u64,
    /// What occupies its devices.
    pub occupied: BTreeMap<CohortId, Occupied>,
}

impl Worker {
    /// The devices that nothing occupies.
    pub fn free(&self) -> Devices {
        self.occupied.values().fold(self.devices, |free, used| free.without(used.device, used.n_devices))
    }
}
