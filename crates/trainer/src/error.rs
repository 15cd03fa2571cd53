//! Why a run ended without its result.

use std::path::PathBuf;

use attune_spec::Fault;
use attune_spec::id::Step;

use crate::protocol::FailureClass;

/// A run that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Fields of the job do not fit its inputs.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Faults(Vec<Fault>),
    /// Validation sets did not come to what the job asks of them.
    #[error("{}; the result is not kept", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Gate(Vec<Fault>),
    /// Data cannot be used; names file and line.
    #[error(transparent)]
    Data(#[from] attune_data::Error),
    /// The base cannot be used; names file and tensor.
    #[error(transparent)]
    Model(#[from] attune_models::Error),
    /// An adapter folder cannot be used.
    #[error(transparent)]
    Adapter(#[from] attune_adapt::Error),
    /// A pass or a guard failed.
    #[error(transparent)]
    Pass(#[from] attune_points::Error),
    /// Another rank is gone.
    #[error(transparent)]
    Collective(#[from] attune_collective::Error),
    /// The processes of a run cannot be told of each other.
    #[error("the processes of the run cannot meet: {0}")]
    Meeting(String),
    /// Ranks that train the same parameters have had others: a bit was lost somewhere.
    #[error(
        "up to step {step} the parameters of rank {rank}, with digest {digest}, were not those of rank {own}, with digest \
         {own_digest}: one of them has lost a bit"
    )]
    Diverged {
        /// This rank.
        own: u32,
        /// What its parameters hash to, those of all steps.
        own_digest: blake3::Hash,
        /// The first rank that differs from it.
        rank: u32,
        /// What the parameters of that one hash to.
        digest: blake3::Hash,
        /// Steps done.
        step: Step,
    },
    /// A checkpoint cannot be written, or is not of this job.
    #[error("checkpoint {}: {message}", folder.display())]
    Checkpoint {
        /// The checkpoint.
        folder: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A file of the run's own cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own account.
        #[source]
        source: std::io::Error,
    },
    /// An artifact that the plan names was not handed over, or is not what the plan needs.
    #[error("input {input}: {message}")]
    Input {
        /// The artifact or the path.
        input: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A thread of the run panicked.
    #[error("a rank of the run panicked: {0}")]
    Panic(String),
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::Pass(source.into())
    }
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// What can be done about it.
    pub fn class(&self) -> FailureClass {
        use attune_points::Error as Pass;
        if self.is_of_a_full_disk() {
            return FailureClass::DiskFull;
        }
        match self {
            Self::Faults(_) | Self::Input { .. } => FailureClass::Input,
            Self::Gate(_) => FailureClass::Gate,
            Self::Data(error) if error.retry() => FailureClass::Io,
            Self::Data(attune_data::Error::Read { .. }) => FailureClass::Io,
            Self::Data(_) | Self::Adapter(_) => FailureClass::Input,
            Self::Model(attune_models::Error::Io { source, .. }) if source.kind() != std::io::ErrorKind::NotFound => {
                FailureClass::Io
            }
            Self::Model(_) => FailureClass::Input,
            Self::Pass(Pass::NotFinite { .. }) => FailureClass::NotFinite,
            Self::Pass(Pass::Disconnected { .. } | Pass::NoSignal { .. }) => FailureClass::NoGradient,
            Self::Pass(Pass::Refused(_)) => FailureClass::Input,
            Self::Io { .. }
            | Self::Pass(Pass::Io { .. })
            | Self::Checkpoint { .. }
            | Self::Collective(attune_collective::Error::Link { .. }) => FailureClass::Io,
            Self::Pass(Pass::LostRank(_)) => FailureClass::LostRank,
            Self::Collective(error) if error.is_of_a_lost_rank() => FailureClass::LostRank,
            Self::Diverged { .. }
            | Self::Pass(Pass::Damaged(_))
            | Self::Collective(attune_collective::Error::Damaged { .. }) => FailureClass::Corrupt,
            Self::Pass(_) | Self::Collective(_) | Self::Panic(_) | Self::Meeting(_) => FailureClass::Internal,
        }
    }

    /// Whether a disk without room is the deepest cause, whatever was to be written.
    fn is_of_a_full_disk(&self) -> bool {
        let chain = std::iter::successors(Some(self as &(dyn std::error::Error + 'static)), |at| at.source());
        let mut systems = chain.filter_map(|at| at.downcast_ref::<std::io::Error>());
        systems.any(|error| error.kind() == std::io::ErrorKind::StorageFull)
    }

    /// The fields of the job at fault.
    pub fn faults(&self) -> Vec<Fault> {
        match self {
            Self::Faults(faults) | Self::Gate(faults) => faults.clone(),
            Self::Data(attune_data::Error::Fault(fault)) => vec![fault.clone()],
            _ => Vec::new(),
        }
    }
}
