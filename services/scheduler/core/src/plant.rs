//! Defects that tests plant, to prove that the simulation would find them. Outside of tests there are none.

/// A defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Plant {
    /// A message of an old epoch is taken for one of the newest.
    EpochUnchecked,
    /// An attempt may commit after it is over.
    CommitAfterEnd,
    /// A grant does not raise the epoch.
    EpochReused,
    /// A failed job waits without a timer.
    BackoffForgotten,
    /// Devices of a cohort that is over stay occupied.
    DevicesForgotten,
    /// A job whose dependencies are met stays where it is.
    DependantsForgotten,
    /// A job that ignores the request to stop is waited for without end.
    StopForgotten,
    /// Failures are not counted.
    FailuresUncounted,
    /// A repeated checkpoint message takes the job back to it.
    CheckpointGoesBack,
    /// A worker that comes back is not asked what it runs.
    HoldingIgnored,
    /// The lease of a lost worker never ends.
    LeaseEndless,
    /// After a restart, leases end at once.
    NoGrace,
    /// Jobs behind a cancelled one are not looked at.
    KeptForgotten,
    /// Whoever is in the gang speaks for it.
    LeaderUnchecked,
    /// Whoever knows the epoch speaks for it.
    WorkerUnchecked,
    /// An offer leaves the checkpoint out.
    OfferFromScratch,
    /// The row of a new cohort is not stored.
    CohortUnstored,
    /// Workers are expired for the scheduler's own silence.
    StallBlamed,
    /// The crash of a shared process is charged to every job in it.
    InnocentsCharged,
    /// A job that was in a shared process when it died is packed with others again.
    SoloForgotten,
    /// Jobs are packed together whatever they need.
    KeyUnchecked,
    /// Jobs are packed together whether the device holds them or not.
    MemoryIgnored,
    /// One job's end ends all that share its process.
    LanesEndTogether,
    /// Projects have whatever there is.
    QuotaIgnored,
    /// A job is preempted for one that is not more urgent.
    EqualsPreempted,
    /// An offer that a worker refuses is charged to its job.
    RefusalsCharged,
}

#[cfg(test)]
impl Plant {
    pub(crate) const ALL: [Self; 26] = [
        Self::EpochUnchecked,
        Self::CommitAfterEnd,
        Self::EpochReused,
        Self::BackoffForgotten,
        Self::DevicesForgotten,
        Self::DependantsForgotten,
        Self::StopForgotten,
        Self::FailuresUncounted,
        Self::CheckpointGoesBack,
        Self::HoldingIgnored,
        Self::LeaseEndless,
        Self::NoGrace,
        Self::KeptForgotten,
        Self::LeaderUnchecked,
        Self::WorkerUnchecked,
        Self::OfferFromScratch,
        Self::CohortUnstored,
        Self::StallBlamed,
        Self::InnocentsCharged,
        Self::SoloForgotten,
        Self::KeyUnchecked,
        Self::MemoryIgnored,
        Self::LanesEndTogether,
        Self::QuotaIgnored,
        Self::EqualsPreempted,
        Self::RefusalsCharged,
    ];
}
