//! The one table from a class of error to gRPC code, HTTP status and exit status, and faults in status details.
//!
//! A service states the [`Class`] where the error arises; everything a client sees follows from it. A client reads the
//! class back from `google.rpc.ErrorInfo`, so that two classes with one gRPC code stay apart.

use std::collections::HashMap;
use std::time::Duration;

use attune_spec::Fault;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// `domain` of every `google.rpc.ErrorInfo` that Attune sends.
pub const DOMAIN: &str = "attune";

/// Budget for encoded faults in one status. Details travel in a header, base64-encoded, and common gRPC clients refuse
/// headers beyond 8 KiB; faults beyond the budget are counted in the last one.
const FAULT_BYTES_MAX: usize = 4 << 10;
/// Longest message of a status, bytes, for the same reason.
const MESSAGE_BYTES_MAX: usize = 1 << 10;

/// Whether the same call may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Another try can only fail in the same way.
    Never,
    /// Another try may succeed, if the call is safe to retry.
    Later,
}

/// What one row of the table says about a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Code of the gRPC status.
    pub code: Code,
    /// Status of an HTTP answer.
    pub http_status: u16,
    /// Exit status of the command line.
    pub exit_status: u8,
    /// `reason` of `google.rpc.ErrorInfo`; unique in the table.
    pub reason: &'static str,
    /// Whether the same call may succeed later.
    pub retry: Retry,
}

/// Class of an error: what a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The request or job file is wrong; comes with faults.
    Invalid,
    /// No or no valid credential.
    Unauthenticated,
    /// The credential does not allow this.
    PermissionDenied,
    /// No such job, artifact, tag or method; also what belongs to others.
    NotFound,
    /// It exists already and is different.
    AlreadyExists,
    /// The request id was used before for something else.
    RequestIdReused,
    /// The job's state does not allow this.
    IllegalState,
    /// The attempt has been replaced by a newer one.
    StaleEpoch,
    /// Something else was made from it, or a tag has moved since.
    Conflict,
    /// A concurrent change won; read again and repeat.
    Aborted,
    /// A quota or limit of the project is used up.
    QuotaExceeded,
    /// The disk or bucket is full.
    StorageFull,
    /// Something is larger than this server takes.
    TooLarge,
    /// The server, its database or its store cannot answer now.
    Unavailable,
    /// The deadline passed.
    DeadlineExceeded,
    /// The caller gave up.
    Cancelled,
    /// Stored bytes do not match their digest.
    Corrupt,
    /// This server does not have that.
    Unimplemented,
    /// A bug.
    Internal,
}

impl Class {
    /// Every class.
    pub const ALL: [Self; 19] = [
        Self::Invalid,
        Self::Unauthenticated,
        Self::PermissionDenied,
        Self::NotFound,
        Self::AlreadyExists,
        Self::RequestIdReused,
        Self::IllegalState,
        Self::StaleEpoch,
        Self::Conflict,
        Self::Aborted,
        Self::QuotaExceeded,
        Self::StorageFull,
        Self::TooLarge,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::Corrupt,
        Self::Unimplemented,
        Self::Internal,
    ];

    /// The table.
    pub const fn row(self) -> Row {
        use Retry::{Later, Never};
        let (code, http_status, exit_status, reason, retry) = match self {
            Self::Invalid => (Code::InvalidArgument, 400, 2, "INVALID", Never),
            Self::Unauthenticated => (Code::Unauthenticated, 401, 1, "UNAUTHENTICATED", Never),
            Self::PermissionDenied => (Code::PermissionDenied, 403, 1, "PERMISSION_DENIED", Never),
            Self::NotFound => (Code::NotFound, 404, 1, "NOT_FOUND", Never),
            Self::AlreadyExists => (Code::AlreadyExists, 409, 1, "ALREADY_EXISTS", Never),
            Self::RequestIdReused => (Code::AlreadyExists, 409, 1, "REQUEST_ID_REUSED", Never),
            Self::IllegalState => (Code::FailedPrecondition, 409, 1, "ILLEGAL_STATE", Never),
            Self::StaleEpoch => (Code::FailedPrecondition, 409, 1, "STALE_EPOCH", Never),
            Self::Conflict => (Code::FailedPrecondition, 409, 1, "CONFLICT", Never),
            Self::Aborted => (Code::Aborted, 409, 1, "ABORTED", Later),
            Self::QuotaExceeded => (Code::ResourceExhausted, 429, 1, "QUOTA_EXCEEDED", Later),
            Self::StorageFull => (Code::ResourceExhausted, 507, 1, "STORAGE_FULL", Never),
            Self::TooLarge => (Code::OutOfRange, 413, 1, "TOO_LARGE", Never),
            Self::Unavailable => (Code::Unavailable, 503, 1, "UNAVAILABLE", Later),
            Self::DeadlineExceeded => (Code::DeadlineExceeded, 504, 1, "DEADLINE_EXCEEDED", Later),
            Self::Cancelled => (Code::Cancelled, 499, 1, "CANCELLED", Never),
            Self::Corrupt => (Code::DataLoss, 500, 1, "CORRUPT", Never),
            Self::Unimplemented => (Code::Unimplemented, 501, 1, "UNIMPLEMENTED", Never),
            Self::Internal => (Code::Internal, 500, 1, "INTERNAL", Never),
        };
        Row { code, http_status, exit_status, reason, retry }
    }

    /// A status of this class. The message is lower case, says what is wrong, where, and what would do.
    pub fn status(self, message: impl Into<String>) -> Status {
        let row = self.row();
        let details = ErrorDetails::with_error_info(row.reason, DOMAIN, HashMap::new());
        Status::with_error_details(row.code, cut(message.into(), MESSAGE_BYTES_MAX), details)
    }

    /// A status of this class that says when to come again.
    pub fn status_after(self, message: impl Into<String>, wait: Duration) -> Status {
        let row = self.row();
        let mut details = ErrorDetails::with_error_info(row.reason, DOMAIN, HashMap::new());
        details.set_retry_info(Some(wait));
        Status::with_error_details(row.code, cut(message.into(), MESSAGE_BYTES_MAX), details)
    }

    /// The class of a status: by its `ErrorInfo`, else by its code, for statuses that a proxy or the library made.
    pub fn of(status: &Status) -> Self {
        let info = status.get_details_error_info();
        info.filter(|info| info.domain == DOMAIN)
            .and_then(|info| Self::ALL.into_iter().find(|class| class.row().reason == info.reason))
            .unwrap_or_else(|| Self::of_code(status.code()))
    }

    const fn of_code(code: Code) -> Self {
        match code {
            Code::InvalidArgument => Self::Invalid,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::PermissionDenied => Self::PermissionDenied,
            Code::NotFound => Self::NotFound,
            Code::AlreadyExists => Self::AlreadyExists,
            Code::FailedPrecondition => Self::Conflict,
            Code::Aborted => Self::Aborted,
            Code::ResourceExhausted => Self::QuotaExceeded,
            Code::OutOfRange => Self::TooLarge,
            // A connection that breaks in the middle of a call is reported as unknown.
            Code::Unavailable | Code::Unknown => Self::Unavailable,
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::Cancelled => Self::Cancelled,
            Code::DataLoss => Self::Corrupt,
            Code::Unimplemented => Self::Unimplemented,
            Code::Internal | Code::Ok => Self::Internal,
        }
    }
}

/// A status that carries every fault as a `google.rpc.BadRequest.FieldViolation`. With more faults than fit into a
/// header, the last violation says how many are missing.
pub fn invalid_argument(faults: &[Fault]) -> Status {
    let row = Class::Invalid.row();
    let mut violations = Vec::with_capacity(faults.len());
    let mut left = FAULT_BYTES_MAX;
    for (index, fault) in faults.iter().enumerate() {
        let message = cut(fault.message.clone(), MESSAGE_BYTES_MAX);
        let path = cut(fault.path.as_str().to_owned(), MESSAGE_BYTES_MAX);
        // Eight bytes are the tags and lengths around the two texts.
        let size = path.len() + message.len() + 8;
        if size > left {
            violations.push(FieldViolation::new("", format!("has {} more faults", faults.len() - index)));
            break;
        }
        left -= size;
        violations.push(FieldViolation::new(path, message));
    }
    let message = match faults {
        [] => "the request is not valid".to_owned(),
        [only] => only.to_string(),
        [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
    };
    let mut details = ErrorDetails::with_bad_request(violations);
    details.set_error_info(row.reason, DOMAIN, HashMap::new());
    Status::with_error_details(row.code, cut(message, MESSAGE_BYTES_MAX), details)
}

/// The faults that a status carries; empty if it carries none.
pub fn faults(status: &Status) -> Vec<Fault> {
    let Some(request) = status.get_details_bad_request() else { return Vec::new() };
    request.field_violations.into_iter().map(|v| Fault::new(v.field.as_str(), v.description)).collect()
}

/// `text` cut to at most `bytes_max` bytes at a character, with `…` where something is missing.
fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let end = (0..=bytes_max - '…'.len_utf8()).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_class_comes_back_from_its_status() {
        for class in Class::ALL {
            let status = class.status("job \"a\" is not there");
            assert_eq!(Class::of(&status), class);
            assert_eq!(status.code(), class.row().code);
            assert_eq!(status.message(), "job \"a\" is not there");
        }
    }

    #[test]
    fn a_status_says_when_to_come_again() {
        let status = Class::QuotaExceeded.status_after("too many calls", Duration::from_millis(1500));
        assert_eq!(Class::of(&status), Class::QuotaExceeded);
        let info = status.get_details_retry_info().unwrap();
        assert_eq!(info.retry_delay, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn the_table_is_total_and_its_reasons_are_unique() {
        let reasons: BTreeSet<_> = Class::ALL.iter().map(|class| class.row().reason).collect();
        assert_eq!(reasons.len(), Class::ALL.len());
        for class in Class::ALL {
            let row = class.row();
            assert!((400..600).contains(&row.http_status), "{class:?}");
            assert_eq!(row.exit_status, if class == Class::Invalid { 2 } else { 1 }, "{class:?}");
        }
    }

    #[test]
    fn a_status_without_details_has_the_class_of_its_code() {
        for code in 0..=16 {
            let code = Code::from_i32(code);
            let class = Class::of(&Status::new(code, "made elsewhere"));
            if !matches!(code, Code::Ok | Code::Unknown) {
                assert_eq!(class.row().code, code);
            }
        }
    }

    #[test]
    fn faults_round_trip_through_a_status() {
        let given = vec![
            Fault::new("tune.stack[0].rank", "is 0; expected 1 ..= 4096"),
            Fault::new("", "has no `kind`; expected one of tune, merge"),
        ];
        let status = invalid_argument(&given);
        assert_eq!(faults(&status), given);
        assert_eq!(Class::of(&status), Class::Invalid);
        assert_eq!(status.message(), "`tune.stack[0].rank` is 0; expected 1 ..= 4096 (and 1 more)");
        assert!(faults(&Class::NotFound.status("no job")).is_empty());
    }

    #[test]
    fn many_faults_fit_into_a_header_and_the_rest_is_counted() {
        let given: Vec<_> =
            (0..10_000).map(|i| Fault::new(format!("data.domains[{i}].weight").as_str(), "is -1")).collect();
        let status = invalid_argument(&given);
        assert!(status.details().len() < 6 << 10, "{}", status.details().len());
        let back = faults(&status);
        let (last, kept) = back.split_last().unwrap();
        assert_eq!(kept, &given[..kept.len()]);
        assert_eq!(last.message, format!("has {} more faults", given.len() - kept.len()));
    }

    #[test]
    fn a_cut_text_stays_within_its_limit_at_a_character() {
        assert_eq!(cut("abc".to_owned(), 3), "abc");
        assert_eq!(cut("ääää".to_owned(), 6), "ä…");
        assert!(cut("é".repeat(5000), 1024).len() <= 1024);
    }
}
