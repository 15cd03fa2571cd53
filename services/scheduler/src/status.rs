//! Errors as callers see them: each is given its class of the contract's table here, and nowhere else.

use attune_proto::Class;
use attune_proto::error::invalid_argument;
use attune_scheduler_core::{Refusal, RefusalKind};
use attune_spec::{Fault, FieldPath};
use tonic::Status;

/// What the store says.
#[expect(clippy::needless_pass_by_value, reason = "the form that `map_err` takes")]
pub(crate) fn store(error: attune_store::Error) -> Status {
    use attune_store::Error as E;
    let class = match &error {
        E::NotFound { .. } => Class::NotFound,
        E::RequestReused { .. } => Class::RequestIdReused,
        E::StaleEpoch { .. } => Class::StaleEpoch,
        E::Conflict(_) | E::InUse(_) => Class::Conflict,
        E::Invalid(message) => return invalid_argument(&[Fault::new("", message.clone())]),
        E::Unavailable(_) | E::Follows | E::Replaced { .. } => Class::Unavailable,
        E::Corrupt(_) => Class::Corrupt,
        _ => Class::Internal,
    };
    if class == Class::Internal || class == Class::Corrupt {
        tracing::error!(%error, "the database failed");
    }
    class.status(error.to_string())
}

/// What the artifact store says about a request; faults are seen from `path`.
pub(crate) fn artifacts(error: attune_artifacts::Error, path: &str) -> Status {
    use attune_artifacts::Error as E;
    let class = match error {
        E::Refused { faults, .. } => {
            let outer = FieldPath::from(path);
            let faults: Vec<Fault> = faults.into_iter().map(|fault| fault.under(&outer)).collect();
            return invalid_argument(&faults);
        }
        E::Mismatch { .. } => Class::Invalid,
        E::NotFound { .. } => Class::NotFound,
        E::Corrupt { .. } => Class::Corrupt,
        E::Full { .. } => Class::StorageFull,
        E::Unavailable { .. } => Class::Unavailable,
        E::BrokenOff { .. } => Class::Cancelled,
        E::Gone { .. } => Class::Aborted,
        _ => Class::Internal,
    };
    if class == Class::Internal || class == Class::Corrupt {
        tracing::error!(error = &error as &dyn std::error::Error, "the artifact store failed");
    }
    class.status(error.to_string())
}

/// What the core refuses.
pub(crate) fn refusal(refusal: &Refusal) -> Status {
    let class = match refusal.kind() {
        RefusalKind::NotFound => Class::NotFound,
        RefusalKind::Exists => Class::AlreadyExists,
        RefusalKind::Precondition => Class::IllegalState,
        RefusalKind::AttemptOver => Class::StaleEpoch,
        RefusalKind::OverQuota => Class::QuotaExceeded,
        RefusalKind::Superseded | RefusalKind::Unregistered => Class::Conflict,
    };
    class.status(refusal.to_string())
}

/// A stored row that this version cannot read.
pub(crate) fn unreadable(error: &crate::Error) -> Status {
    tracing::error!(%error, "a stored row cannot be read");
    Class::Corrupt.status(error.to_string())
}

/// The scheduler is about to end.
pub(crate) fn shuts_down() -> Status {
    Class::Unavailable.status("the scheduler shuts down; try again later")
}
