//! What can go wrong inside a pass.

use attune_architecture::SiteId;

use crate::params::TensorId;

/// The result of anything that computes on tensors.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the training half, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the tensor library failed: a shape or dtype that does not fit, or memory that is not there.
    #[error("{what}: {source}")]
    Tensor {
        /// What was being computed, and at which site.
        what: String,
        /// The library's own account.
        #[source]
        source: candle_core::Error,
    },
    /// A tensor that a component asked for by name is not among its parameters.
    #[error("{component} asks for tensor {name:?}, which it did not declare; declared are {declared:?}")]
    UnknownTensor {
        /// The attachment or block that asked.
        component: String,
        /// The name asked for.
        name: String,
        /// All names that would have been answered.
        declared: Vec<String>,
    },
    /// A value is not finite. Names the tensor and the step: the run must not go on.
    #[error("{what} of {tensor} is not finite at step {step}; lower the learning rate or clip gradients")]
    NotFinite {
        /// `gradient` or `value`.
        what: &'static str,
        /// The tensor at fault.
        tensor: TensorId,
        /// The optimiser step at which it was seen.
        step: u64,
    },
    /// A trainable tensor that no backward pass wrote: it is not connected to the loss.
    #[error("no backward pass wrote a gradient for {tensor}; it is not connected to the loss")]
    Disconnected {
        /// The tensor at fault.
        tensor: TensorId,
    },
    /// A trainable tensor whose gradient was zero in each of the first steps, without a declared reason to be quiet.
    #[error("the gradient of {tensor} was zero in each of the first {steps} steps; it does not learn")]
    NoSignal {
        /// The tensor at fault.
        tensor: TensorId,
        /// How many steps were watched.
        steps: u64,
    },
    /// A statistic that nobody measured: what needs it has to ask for it.
    #[error("{what} was not measured at {site}")]
    NotMeasured {
        /// What was asked for.
        what: String,
        /// Where.
        site: SiteId,
    },
    /// The device that computes has failed; results since then are worth nothing.
    #[error(transparent)]
    Device(#[from] attune_tensor::kernels::Fault),
    /// Another process or thread of the run is not there any more, or says nothing; why, it knows itself.
    #[error("{0}")]
    LostRank(String),
    /// What another process sent came as something else; both digests are in the message.
    #[error("{0}")]
    Damaged(String),
    /// A request that this engine cannot serve, with what would do.
    #[error("{0}")]
    Refused(String),
    /// Input and output (a checkpoint, a weight file) failed.
    #[error("{what}: {source}")]
    Io {
        /// The file and what was done with it.
        what: String,
        /// The system's own account.
        #[source]
        source: std::io::Error,
    },
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::Tensor { what: "tensor operation".to_owned(), source }
    }
}

/// Says what was being computed when the tensor library failed.
pub trait Context<T> {
    /// Attaches `what` (computed only on failure) to the error.
    ///
    /// # Errors
    /// The same failure, with its context.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, candle_core::Error> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Tensor { what: what(), source })
    }
}
