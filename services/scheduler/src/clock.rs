//! The only place of this room that reads a clock, and the only source of names that depend on one.

use attune_scheduler_core::Timestamp;
use attune_scheduler_core::supply::RequestId;
use attune_spec::id::{JobId, Name};
use attune_store::UtcMs;

/// The two clocks: a monotonic one that decisions are made by, and the calendar, for records that people read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: std::time::Instant,
}

impl Clock {
    /// A clock whose zero is now.
    #[expect(clippy::disallowed_methods, reason = "the one reader of the monotonic clock")]
    pub(crate) fn start() -> Self {
        Self { start: std::time::Instant::now() }
    }

    /// The time for the core.
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from_millis(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// The calendar's time, for records only.
    #[expect(clippy::disallowed_methods, reason = "the one reader of the calendar")]
    pub(crate) fn utc() -> UtcMs {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        UtcMs(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }
}

/// Digits that sort like their values; without those that are mistaken for others.
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Digits of an id behind its prefix: 48 bits of time and 42 bits of counter and chance.
const ID_DIGITS: u32 = 18;

/// A new job id. Ids of one process sort in the order in which they were made, those of several by millisecond.
pub(crate) fn job_id() -> JobId {
    JobId::new(id_of("j", uuid::Uuid::now_v7().as_u128())).expect("the digits are letters and digits in lower case")
}

/// A new name for a worker that is asked for.
pub(crate) fn request_id() -> RequestId {
    let name = Name::new(id_of("r", uuid::Uuid::now_v7().as_u128()));
    RequestId(name.expect("the digits are letters and digits in lower case"))
}

/// A request's id in what is only shown: nobody has made that request.
pub(crate) fn shown_request_id() -> RequestId {
    RequestId(Name::new(id_of("r", 0)).expect("the digits are letters and digits in lower case"))
}

/// The id with this prefix for a version 7 UUID: its time and the next 42 bits, without the bits that say which version it is.
fn id_of(prefix: &str, uuid: u128) -> String {
    let time = uuid >> 80;
    let after_version = (uuid >> 64) & 0xfff;
    let after_variant = (uuid >> 32) & 0x3fff_ffff;
    let bits = (time << 42) | (after_version << 30) | after_variant;
    let digit = |place: u32| char::from(DIGITS[((bits >> (5 * place)) & 31) as usize]);
    prefix.chars().chain(['-']).chain((0..ID_DIGITS).rev().map(digit)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_ids_sort_in_the_order_in_which_they_were_made() {
        let ids: Vec<JobId> = (0..10_000).map(|_| job_id()).collect();
        assert!(ids.is_sorted_by(|a, b| a < b));
        assert_eq!(ids[0].as_str().len(), 20);
    }

    #[test]
    fn a_later_millisecond_gives_a_larger_id() {
        let first = id_of("j", 0x0190_0000_0000_7fff_bfff_ffff_ffff_ffff);
        let later = id_of("j", 0x0190_0000_0001_7000_8000_0000_0000_0000);
        assert!(first < later, "{first} {later}");
    }

    #[test]
    fn the_clocks_go_forward() {
        let clock = Clock::start();
        assert!(clock.now() <= clock.now());
        assert!(Clock::utc() > UtcMs(1_600_000_000_000));
    }
}
