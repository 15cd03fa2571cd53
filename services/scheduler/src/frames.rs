//! Frames of HTTP/2 that carry nothing: a connection may send so many of them, and no more.
//!
//! What answers pings, settings, windows and empty data is cheap, and is asked for at no cost to whoever asks. The library below
//! bounds resets and headers without an end; these it takes for as long as they come (CVE-2019-9512, 9515, 9518).

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tonic::transport::server::Connected;

/// What a connection of HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's header.
const HEADER: usize = 9;
/// Kinds of frames that carry something: headers and what continues them. Resets are counted by the library.
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const CONTINUATION: u8 = 9;
const DATA: u8 = 0;

/// Frames that carry nothing, at once.
const AT_ONCE: f64 = 10_000.0;
/// Of a second, in the long run.
const PER_SECOND: f64 = 500.0;
/// Bytes sent to the peer, for which it may send one that says that it has taken them.
const PER_FRAME_BYTES: f64 = 4096.0;

/// Counts the frames of a connection.
#[derive(Debug)]
struct Counter {
    /// How much of the preface has come; nothing where it is no HTTP/2.
    preface: Option<usize>,
    header: [u8; HEADER],
    /// How much of the header has come.
    n_header: usize,
    /// What is left of the frame that has begun.
    n_payload: usize,
    room: f64,
    since: Instant,
}

impl Counter {
    fn new() -> Self {
        Self { preface: Some(0), header: [0; HEADER], n_header: 0, n_payload: 0, room: AT_ONCE, since: Instant::now() }
    }

    /// Takes bytes that have come; whether the connection may go on.
    fn take(&mut self, mut bytes: &[u8]) -> bool {
        while let Some(seen) = self.preface.filter(|_| !bytes.is_empty()) {
            if seen < PREFACE.len() {
                let n = bytes.len().min(PREFACE.len() - seen);
                let (now, rest) = bytes.split_at(n);
                self.preface = (now == &PREFACE[seen..seen + n]).then_some(seen + n);
                bytes = rest;
                continue;
            }
            let n = bytes.len().min(self.n_payload);
            self.n_payload -= n;
            bytes = &bytes[n..];
            let n = bytes.len().min(HEADER - self.n_header);
            self.header[self.n_header..self.n_header + n].copy_from_slice(&bytes[..n]);
            self.n_header += n;
            bytes = &bytes[n..];
            if self.n_header == HEADER {
                self.n_header = 0;
                let [a, b, c, kind, ..] = self.header;
                self.n_payload = u32::from_be_bytes([0, a, b, c]) as usize;
                let carries = matches!(kind, HEADERS | RESET | CONTINUATION) || (kind == DATA && self.n_payload > 0);
                if !carries && !self.afford() {
                    return false;
                }
            }
        }
        true
    }

    fn afford(&mut self) -> bool {
        if self.room < 1.0 {
            let now = Instant::now();
            let earned = now.saturating_duration_since(self.since).as_secs_f64() * PER_SECOND;
            (self.room, self.since) = ((self.room + earned).min(AT_ONCE), now);
        }
        self.room -= 1.0;
        self.room >= 0.0
    }

    /// So many bytes went to the peer.
    fn sent(&mut self, n_bytes: usize) {
        self.room += n_bytes as f64 / PER_FRAME_BYTES;
    }
}

/// A connection whose frames are counted.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    stream: S,
    counter: Counter,
}

impl<S> Counted<S> {
    /// Counts what is read in the clear.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, counter: Counter::new() }
    }
}

impl<S: Connected> Connected for Counted<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if self.counter.take(&buffer.filled()[before..]) {
            return Poll::Ready(Ok(()));
        }
        tracing::warn!("a connection was closed: it sends frames that carry nothing");
        Poll::Ready(Err(Error::new(ErrorKind::ConnectionAborted, "too many frames that carry nothing")))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        self.counter.sent(written.as_ref().copied().unwrap_or_default());
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices));
        self.counter.sent(written.as_ref().copied().unwrap_or_default());
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PING: u8 = 6;
    const WINDOW: u8 = 8;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    #[tokio::test(start_paused = true)]
    async fn frames_are_told_apart_however_they_come() {
        // Payloads that look like frames.
        let all = [
            PREFACE.to_vec(),
            frame(PING, &[0; 8]),
            frame(DATA, &frame(PING, &[0; 8])),
            frame(HEADERS, &[0; 100]),
            frame(DATA, &[]),
            frame(WINDOW, &[0; 4]),
            frame(RESET, &[0; 4]),
        ]
        .concat();
        for size in 1..=all.len() {
            let mut counter = Counter::new();
            assert!(all.chunks(size).all(|bytes| counter.take(bytes)), "in pieces of {size}");
            assert_eq!(counter.room, AT_ONCE - 3.0, "in pieces of {size}");
            assert_eq!((counter.n_header, counter.n_payload), (0, 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_ends_and_a_trickle_does_not() {
        let ping = frame(PING, &[0; 8]);
        let mut counter = Counter::new();
        assert!(counter.take(PREFACE));
        let n_taken = (0..20_000).take_while(|_| counter.take(&ping)).count();
        assert_eq!(n_taken, AT_ONCE as usize);
        let mut counter = Counter::new();
        assert!(counter.take(PREFACE));
        for _ in 0..50_000 {
            tokio::time::advance(Duration::from_millis(4)).await;
            assert!(counter.take(&ping));
        }
        // Who takes much says often that it has.
        let mut counter = Counter::new();
        assert!(counter.take(PREFACE));
        for _ in 0..50_000 {
            counter.sent(16 << 10);
            assert!(counter.take(&frame(WINDOW, &[0; 4])) && counter.take(&frame(WINDOW, &[0; 4])));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_of_this_protocol_is_left_alone() {
        let mut counter = Counter::new();
        assert!(counter.take(b"GET / HTTP/1.1\r\n\r\n"));
        assert!((0..100_000).all(|_| counter.take(&frame(PING, &[0; 8]))));
    }
}
