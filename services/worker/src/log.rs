//! What a process writes, line by line, however much it is: no line takes more room than it may, and of a flood a part is
//! passed on, with the number of lines that are not.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::time::{Instant, sleep_until};

/// Lines that are passed on at once.
const AT_ONCE: f64 = 100.0;
/// Lines of a second that are passed on in the long run.
const PER_SECOND: f64 = 5.0;
/// Lines that are passed on in all.
const IN_ALL: u64 = 500;
/// Longest time for which nobody is told that lines are missing.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// A line, without its end.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Line {
    /// What there is room for; bytes that are no text are shown as such.
    pub(crate) text: String,
    /// Bytes for which there was none.
    pub(crate) cut: u64,
}

/// The lines of a pipe.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    pipe: Option<BufReader<R>>,
    /// What has come of the next line.
    begun: Vec<u8>,
    cut: u64,
    max_bytes: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most so many bytes; what is longer is cut.
    pub(crate) fn new(pipe: R, max_bytes: usize) -> Self {
        Self { pipe: Some(BufReader::new(pipe)), begun: Vec::new(), cut: 0, max_bytes }
    }

    /// Whether there is nothing more to come.
    pub(crate) fn is_over(&self) -> bool {
        self.pipe.is_none()
    }

    /// Reads no more.
    pub(crate) fn close(&mut self) {
        self.pipe = None;
    }

    /// The next line; nothing at the end. Can be cancelled: what has come of a line stays.
    pub(crate) async fn next(&mut self) -> Option<Line> {
        loop {
            let pipe = self.pipe.as_mut()?;
            // A pipe that cannot be read has nothing more to say.
            let found = pipe.fill_buf().await.unwrap_or_default();
            if found.is_empty() {
                self.pipe = None;
                return (!self.begun.is_empty() || self.cut > 0).then(|| self.take());
            }
            let end = found.iter().position(|byte| *byte == b'\n');
            let part = &found[..end.unwrap_or(found.len())];
            let room = part.len().min(self.max_bytes - self.begun.len());
            self.begun.extend_from_slice(&part[..room]);
            self.cut += (part.len() - room) as u64;
            let n_read = part.len() + usize::from(end.is_some());
            pipe.consume(n_read);
            if end.is_some() {
                return Some(self.take());
            }
        }
    }

    fn take(&mut self) -> Line {
        let text = String::from_utf8_lossy(&self.begun).into_owned();
        // One long line does not keep its room.
        self.begun = Vec::new();
        Line { text, cut: std::mem::take(&mut self.cut) }
    }
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is passed on.
    Passed,
    /// It is counted.
    Dropped,
}

/// How fast lines are passed on.
#[derive(Debug)]
pub(crate) struct Pace {
    room: f64,
    since: Instant,
    left: u64,
    dropped: u64,
    tell_at: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { room: AT_ONCE, since: now, left: IN_ALL, dropped: 0, tell_at: now }
    }

    /// Takes a line.
    pub(crate) fn take(&mut self, now: Instant) -> Taken {
        self.room = (self.room + now.saturating_duration_since(self.since).as_secs_f64() * PER_SECOND).min(AT_ONCE);
        self.since = now;
        if self.room >= 1.0 && self.left > 0 {
            self.room -= 1.0;
            self.left -= 1;
            return Taken::Passed;
        }
        if self.dropped == 0 {
            self.tell_at = now + TELL_AFTER;
        }
        self.dropped += 1;
        Taken::Dropped
    }

    /// Waits until it is time to tell how many lines were dropped since it was told last.
    pub(crate) async fn dropped(&mut self) -> u64 {
        // Once nothing is passed on any more, the end tells how much is missing.
        if self.dropped == 0 || self.left == 0 {
            std::future::pending::<()>().await;
        }
        sleep_until(self.tell_at).await;
        std::mem::take(&mut self.dropped)
    }

    /// How many were dropped, if any were.
    pub(crate) fn take_dropped(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.dropped)).filter(|n| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(bytes: &[u8], max_bytes: usize) -> Vec<Line> {
        let (mut lines, mut all) = (Lines::new(bytes, max_bytes), Vec::new());
        while let Some(line) = lines.next().await {
            assert!(lines.begun.capacity() <= 2 * max_bytes);
            all.push(line);
        }
        assert!(lines.is_over() && lines.next().await.is_none());
        all
    }

    fn line(text: &str, cut: u64) -> Line {
        Line { text: text.to_owned(), cut }
    }

    #[tokio::test]
    async fn lines_are_cut_where_there_is_no_room_and_nothing_else_is_lost() {
        assert_eq!(all(b"one\n\ntwo", 3).await, [line("one", 0), line("", 0), line("two", 0)]);
        assert_eq!(all(b"", 3).await, []);
        // Longer than any buffer, and without an end.
        let long = [vec![b'x'; 100_000], b"\nnext\n".to_vec(), vec![b'y'; 50_000]].concat();
        assert_eq!(all(&long, 8).await, [line("xxxxxxxx", 99_992), line("next", 0), line("yyyyyyyy", 49_992)]);
        // What is no text is a line as any other.
        assert_eq!(all(b"\xff\x00\nafter\n", 8).await, [line("\u{fffd}\0", 0), line("after", 0)]);
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_flood_a_part_is_passed_on_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let n_passed = |pace: &mut Pace, n: usize, now| (0..n).filter(|_| pace.take(now) == Taken::Passed).count();
        assert_eq!(n_passed(&mut pace, 1_000_000, start), 100);
        assert_eq!(pace.dropped().await, 999_900);
        assert_eq!(start.elapsed(), TELL_AFTER);
        assert_eq!(pace.take_dropped(), None);
        // A quarter of the room is there again.
        assert_eq!(n_passed(&mut pace, 100, start + TELL_AFTER), 25);
        // A trickle is passed on, up to what there is in all.
        let trickle = (1..10_000).map(|second| start + Duration::from_secs(10 + second));
        let n_trickle = trickle.filter(|now| pace.take(*now) == Taken::Passed).count();
        assert_eq!(100 + 25 + n_trickle, 500);
        assert_eq!(pace.take_dropped(), Some(75 + 9_999 - n_trickle as u64));
    }
}
