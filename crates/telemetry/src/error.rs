//! What can go wrong while setting up a log or running tasks.

/// A log that could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The filter text does not parse.
    #[error("the log filter {filter:?} ({origin}) is not valid: {reason}; expected LEVEL or TARGET=LEVEL, by commas")]
    Filter {
        /// The text as given.
        filter: String,
        /// Where it came from: `ATTUNE_LOG`, or `default`.
        origin: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// Another subscriber is already installed in this process.
    #[error("the log is already set up in this process; call `Logging::install` once, at the start of `main`")]
    AlreadyInstalled,
}

/// A background task that did not end well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskFailure {
    /// The task returned an error.
    #[error("task {task:?} failed: {message}")]
    Failed {
        /// Name of the task.
        task: &'static str,
        /// The error with its sources, outermost first.
        message: String,
    },
    /// The task panicked.
    #[error("task {task:?} panicked: {message}")]
    Panicked {
        /// Name of the task.
        task: &'static str,
        /// The text of the panic.
        message: String,
    },
    /// The task was still running when the time for an orderly shutdown was over, and was dropped at an await.
    #[error("task {task:?} did not stop in the time given for shutdown and was dropped")]
    Overran {
        /// Name of the task.
        task: &'static str,
    },
    /// The runtime dropped the task before it ended.
    #[error("task {task:?} was dropped before it ended")]
    Lost {
        /// Name of the task.
        task: &'static str,
    },
}

impl TaskFailure {
    /// The name of the task that failed.
    pub fn task(&self) -> &'static str {
        match self {
            Self::Failed { task, .. } | Self::Panicked { task, .. } | Self::Overran { task } | Self::Lost { task } => {
                task
            }
        }
    }
}
