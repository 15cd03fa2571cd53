//! What a job asks for and what a worker has.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use crate::ParseError;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// A share of the processor.
    Cpu,
    /// An NVIDIA card.
    Cuda,
}

impl Device {
    /// The kind's stored name.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl FromStr for Device {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(ParseError::new("device", text)),
        }
    }
}

/// Which kind of device a job takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wanted {
    /// Cards where a whole gang of them is free, else processors.
    Any,
    /// This kind only.
    Only(Device),
}

impl Wanted {
    /// The kinds to try, best first.
    pub const fn kinds(self) -> &'static [Device] {
        match self {
            Self::Any => &[Device::Cuda, Device::Cpu],
            Self::Only(Device::Cpu) => &[Device::Cpu],
            Self::Only(Device::Cuda) => &[Device::Cuda],
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Only(device) => device.fmt(f),
        }
    }
}

impl FromStr for Wanted {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text == "any" { Ok(Self::Any) } else { text.parse().map(Self::Only) }
    }
}

/// The gang that a job asks for. It is granted whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resources {
    /// Number of distinct workers.
    pub n_workers: NonZeroU32,
    /// Number of devices on each of them.
    pub n_devices: NonZeroU32,
    /// The kind of all devices.
    pub device: Wanted,
    /// Labels that every worker of the gang must carry.
    pub labels: BTreeMap<String, String>,
}

impl Resources {
    /// How many devices the whole gang has.
    pub const fn n_total(&self) -> u32 {
        self.n_workers.get().saturating_mul(self.n_devices.get())
    }
}

impl Default for Resources {
    /// One device of any kind on one worker.
    fn default() -> Self {
        Self { n_workers: NonZeroU32::MIN, n_devices: NonZeroU32::MIN, device: Wanted::Any, labels: BTreeMap::new() }
    }
}

/// What a job is expected to take of a device's memory, in bytes; all 0 where nobody knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Memory {
    /// The process and the base: once for all jobs that share them.
    pub base: u64,
    /// What the job trains, with gradients and the optimiser's state.
    pub own: u64,
    /// A pass over the job's own rows.
    pub pass: u64,
    /// The largest pass that it takes part in beside others; no less than its own.
    pub full_pass: u64,
}

impl Memory {
    /// What jobs take that share a process.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            base: self.base.max(other.base),
            own: self.own.saturating_add(other.own),
            pass: self.pass.saturating_add(other.pass),
            full_pass: self.full_pass.max(other.full_pass),
        }
    }

    /// All of it.
    pub fn total(self) -> u64 {
        self.base.saturating_add(self.own).saturating_add(self.pass.min(self.full_pass))
    }
}

/// A number of devices of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Devices {
    /// Number of shares of the processor.
    pub n_cpu: u32,
    /// Number of cards.
    pub n_cuda: u32,
}

impl Devices {
    /// The number of devices of one kind.
    pub const fn of(self, kind: Device) -> u32 {
        match kind {
            Device::Cpu => self.n_cpu,
            Device::Cuda => self.n_cuda,
        }
    }

    /// These and others.
    #[must_use]
    pub const fn and(self, more: Self) -> Self {
        Self { n_cpu: self.n_cpu.saturating_add(more.n_cpu), n_cuda: self.n_cuda.saturating_add(more.n_cuda) }
    }

    /// These and `n` devices of `kind`.
    #[must_use]
    pub const fn with(self, kind: Device, n: u32) -> Self {
        match kind {
            Device::Cpu => self.and(Self { n_cpu: n, n_cuda: 0 }),
            Device::Cuda => self.and(Self { n_cpu: 0, n_cuda: n }),
        }
    }

    /// What is left when `n` devices of `kind` are taken away; never less than none.
    #[must_use]
    pub const fn without(self, kind: Device, n: u32) -> Self {
        match kind {
            Device::Cpu => Self { n_cpu: self.n_cpu.saturating_sub(n), ..self },
            Device::Cuda => Self { n_cuda: self.n_cuda.saturating_sub(n), ..self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_that_share_a_process_have_one_base_and_no_more_than_one_full_pass() {
        let job = |own, pass| Memory { base: 100, own, pass, full_pass: 40 };
        assert_eq!(job(5, 30).total(), 135);
        let two = job(5, 30).with(job(7, 5));
        assert_eq!(two.total(), 100 + 12 + 35);
        assert_eq!(two.with(job(1, 20)).total(), 100 + 13 + 40);
        assert_eq!(Memory::default().with(job(5, 30)), job(5, 30));
    }

    #[test]
    fn names_round_trip() {
        for wanted in [Wanted::Any, Wanted::Only(Device::Cpu), Wanted::Only(Device::Cuda)] {
            assert_eq!(wanted.to_string().parse::<Wanted>().unwrap(), wanted);
        }
        assert!("tpu".parse::<Wanted>().is_err());
    }

    #[test]
    fn taking_more_than_there_is_leaves_none() {
        let devices = Devices { n_cpu: 2, n_cuda: 1 };
        assert_eq!(devices.without(Device::Cpu, 3), Devices { n_cpu: 0, n_cuda: 1 });
        assert_eq!(devices.without(Device::Cuda, 1).of(Device::Cuda), 0);
    }
}
