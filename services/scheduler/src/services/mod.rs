//! The services of the contract: decode, ask, answer. Who calls was looked at before, and says which project a call is about.

pub(crate) mod artifacts;
pub(crate) mod audit;
pub(crate) mod fleet;
pub(crate) mod jobs;
pub(crate) mod methods;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod reports;
pub(crate) mod tokens;
pub(crate) mod watch;
pub(crate) mod workers;

use attune_proto::error::invalid_argument;
use attune_spec::Fault;
use tonic::Status;

/// The stream of an answer.
pub(crate) type Answers<T> = tokio_stream::wrappers::ReceiverStream<Result<T, Status>>;

/// Answers of a stream that may wait for their reader.
pub(crate) const WAITING_ANSWERS: usize = 16;

/// One fault as a status.
pub(crate) fn invalid(fault: Fault) -> Status {
    invalid_argument(&[fault])
}

/// The number of rows of a page.
pub(crate) fn page_size(asked: u32, default: u32, max: u32) -> Result<u32, Status> {
    match asked {
        0 => Ok(default),
        asked if asked <= max => Ok(asked),
        asked => Err(invalid(Fault::new("page_size", format!("is {asked}; expected 1 ..= {max}")))),
    }
}

/// A page token; the first page has none.
pub(crate) fn page_token(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// The value of an enum field.
pub(crate) fn known<T: TryFrom<i32>>(value: i32, path: &str) -> Result<T, Status> {
    T::try_from(value).map_err(|_| invalid(Fault::new(path, format!("has the value {value}, which is not known here"))))
}
