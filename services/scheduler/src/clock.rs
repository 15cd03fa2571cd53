//! The only place of this room that reads a clock, and the only source of names that depend on one.

use std::sync::{Mutex, OnceLock, PoisonError};

use attune_scheduler_core::Timestamp;
use attune_scheduler_core::supply::RequestId;
use attune_spec::id::{JobId, Name};
use attune_store::UtcMs;

/// The calendar as it was when this process first looked, and how far the monotonic clock has gone since.
static ANCHOR: OnceLock<(UtcMs, std::time::Instant)> = OnceLock::new();

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// What people read.
    pub(crate) date: UtcMs,
    /// What spans of time are measured by: the date, if nobody had set the calendar since this process started.
    pub(crate) steady: UtcMs,
}

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

    /// This moment.
    #[expect(clippy::disallowed_methods, reason = "the other reader of the monotonic clock")]
    pub(crate) fn moment() -> Moment {
        let date = Self::utc();
        let (first, start) = ANCHOR.get_or_init(|| (date, std::time::Instant::now()));
        let since = i64::try_from(start.elapsed().as_millis()).unwrap_or(i64::MAX);
        Moment { date, steady: UtcMs(first.0.saturating_add(since)) }
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

/// The number in the largest job id so far.
static LARGEST: Mutex<u128> = Mutex::new(0);

/// A new job id. Ids sort in the order in which they were made, whatever the calendar says, as long as whoever makes them was told
/// of those that there are.
pub(crate) fn job_id() -> JobId {
    let mut largest = LARGEST.lock().unwrap_or_else(PoisonError::into_inner);
    *largest = next_after(*largest, bits(uuid::Uuid::now_v7().as_u128()));
    JobId::new(id_of("j", *largest)).expect("the digits are letters and digits in lower case")
}

/// Every id from now on is larger than this one. One that was not made here is not.
pub(crate) fn ids_follow(job: &JobId) {
    if let Some(number) = number_of(job.as_str()) {
        let mut largest = LARGEST.lock().unwrap_or_else(PoisonError::into_inner);
        *largest = number.max(*largest);
    }
}

/// The number of a new id: the one by the calendar, unless that has gone back.
fn next_after(largest: u128, by_calendar: u128) -> u128 {
    by_calendar.max(largest + 1)
}

/// The number in a job id; none in one that was not made here.
fn number_of(id: &str) -> Option<u128> {
    let digits = id.strip_prefix("j-").filter(|digits| digits.len() == ID_DIGITS as usize)?;
    digits.bytes().try_fold(0, |number, digit| {
        let value = DIGITS.iter().position(|known| *known == digit)?;
        Some((number << 5) | value as u128)
    })
}

/// A new name for a worker that is asked for.
pub(crate) fn request_id() -> RequestId {
    let name = Name::new(id_of("r", bits(uuid::Uuid::now_v7().as_u128())));
    RequestId(name.expect("the digits are letters and digits in lower case"))
}

/// A request's id in what is only shown: nobody has made that request.
pub(crate) fn shown_request_id() -> RequestId {
    RequestId(Name::new(id_of("r", 0)).expect("the digits are letters and digits in lower case"))
}

/// A version 7 UUID's time and its next 42 bits, without the bits that say which version it is.
fn bits(uuid: u128) -> u128 {
    let time = uuid >> 80;
    let after_version = (uuid >> 64) & 0xfff;
    let after_variant = (uuid >> 32) & 0x3fff_ffff;
    (time << 42) | (after_version << 30) | after_variant
}

/// The id with this prefix for a number of 90 bits.
fn id_of(prefix: &str, bits: u128) -> String {
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
        let first = id_of("j", bits(0x0190_0000_0000_7fff_bfff_ffff_ffff_ffff));
        let later = id_of("j", bits(0x0190_0000_0001_7000_8000_0000_0000_0000));
        assert!(first < later, "{first} {later}");
    }

    #[test]
    fn ids_grow_although_the_calendar_goes_back() {
        let tomorrow = bits(0x0190_0000_0001_7000_8000_0000_0000_0000);
        let today = bits(0x0180_0000_0000_7fff_bfff_ffff_ffff_ffff);
        let last = id_of("j", tomorrow);
        assert_eq!(number_of(&last), Some(tomorrow));
        let next = id_of("j", next_after(tomorrow, today));
        assert!(last < next, "{last} {next}");
        assert_eq!(next_after(today, tomorrow), tomorrow);
        for other in ["j-1", "j-stage-of-another-one", "r-0000000000000000aa"] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    #[test]
    fn the_clocks_go_forward() {
        let clock = Clock::start();
        assert!(clock.now() <= clock.now());
        assert!(Clock::utc() > UtcMs(1_600_000_000_000));
        let (first, second) = (Clock::moment(), Clock::moment());
        assert!(first.steady <= second.steady && first.steady.0.abs_diff(first.date.0) < 60_000);
    }
}
