//! A cohort: the attempts that one gang of child processes runs. Several where jobs share a base, as lanes of one process.
//!
//! Lease and crash belong to the cohort, epoch and commit to the attempt. A cohort's members only ever leave; when the
//! last one has left, the cohort is over and its row goes.

use attune_spec::id::{CohortId, Epoch, WorkerId};

use crate::{Device, JobKey};

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// The job.
    pub key: JobKey,
    /// The fencing token.
    pub epoch: Epoch,
}

/// The part of a gang that one worker runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share {
    /// The worker.
    pub worker: WorkerId,
    /// Its place in the gang. Rank 0 leads: it commits, and it says when an attempt is done.
    pub rank: u32,
    /// The kind of its devices.
    pub device: Device,
    /// How many devices it gives.
    pub n_devices: u32,
}

/// A cohort's row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cohort {
    /// Never used twice in the life of a control plane.
    pub id: CohortId,
    /// The attempts that have not ended.
    pub attempts: Vec<Attempt>,
    /// The gang, by rank; whole from the first moment to the last.
    pub shares: Vec<Share>,
}

impl Cohort {
    /// The share of `worker`, if it is in the gang.
    pub fn share(&self, worker: &WorkerId) -> Option<&Share> {
        self.shares.iter().find(|share| share.worker == *worker)
    }

    /// Whether `worker` leads the gang.
    pub fn is_led_by(&self, worker: &WorkerId) -> bool {
        self.share(worker).is_some_and(|share| share.rank == 0)
    }
}
