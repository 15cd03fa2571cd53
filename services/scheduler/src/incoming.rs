//! Connections as they come in: so many at once, in all and from one address, and none that says nothing.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// What every client of HTTP/2 says first, in bytes; a handshake of TLS is longer.
const FIRST_BYTES: usize = 24;
/// Wait after a connection that the system has no room for: whoever it was waits in line meanwhile.
const NO_ROOM_WAIT: Duration = Duration::from_millis(100);
/// Files that are kept for what is no connection: the database, blobs, a log. Of few files half.
const OTHER_FILES: u64 = 512;

/// How many connections there may be with the files that the system lets this process have, of which it takes as many as it
/// may first.
pub(crate) fn most(asked: usize) -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return asked };
    let files = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    let room = usize::try_from(files - OTHER_FILES.min(files / 2)).unwrap_or(asked);
    if room < asked {
        tracing::warn!(files, asked, room, "fewer connections than asked for: the system allows no more files");
    }
    room.min(asked)
}

/// Connections of a port: at most `max` at once, of which one address has half at most, each with its first bytes within `patience`.
pub(crate) fn connections(
    incoming: TcpIncoming,
    max: usize,
    patience: Duration,
) -> impl Stream<Item = Result<Connection>> {
    let room = Arc::new(Room { max, taken: Mutex::default() });
    incoming.filter_map(move |accepted| {
        let accepted = accepted.map(|stream| {
            let peer = stream.peer_addr().ok()?.ip().to_canonical();
            let Some(seat) = room.take(peer) else {
                // It is closed, and whoever it was tries again.
                tracing::warn!(%peer, max, "a connection was closed: there are as many as allowed");
                return None;
            };
            Some(Connection { stream, read: 0, deadline: Some(Box::pin(sleep(patience))), _seat: seat })
        });
        async move {
            match accepted {
                Ok(connection) => connection.map(Ok),
                // The port stands, and so do the connections that are there: one that did not come about ends nothing.
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken in");
                    sleep(NO_ROOM_WAIT).await;
                    None
                }
            }
        }
    })
}

/// How many connections stand.
#[derive(Debug)]
struct Room {
    max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: BTreeMap<IpAddr, usize>,
}

impl Room {
    /// A seat for a connection from an address, given back when it is dropped.
    fn take(self: &Arc<Self>, peer: IpAddr) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.by_peer.get(&peer).copied().unwrap_or_default();
        // Nobody keeps all others out.
        if taken.all >= self.max || own >= self.max.div_ceil(2) {
            return None;
        }
        taken.all += 1;
        taken.by_peer.insert(peer, own + 1);
        Some(Seat { room: Arc::clone(self), peer })
    }
}

/// A connection that is counted.
#[derive(Debug)]
struct Seat {
    room: Arc<Room>,
    peer: IpAddr,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.room.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        let left = taken.by_peer.get(&self.peer).copied().unwrap_or_default().saturating_sub(1);
        match left {
            0 => taken.by_peer.remove(&self.peer),
            left => taken.by_peer.insert(self.peer, left),
        };
    }
}

/// A connection that breaks if its first bytes do not come in time. Afterwards pings of the protocol see to it that somebody is there.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    read: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    _seat: Seat,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let Some(deadline) = &mut self.deadline else { return polled };
        match polled {
            Poll::Ready(done) => {
                self.read += buffer.filled().len() - before;
                if self.read >= FIRST_BYTES {
                    self.deadline = None;
                }
                Poll::Ready(done)
            }
            Poll::Pending => deadline
                .as_mut()
                .poll(cx)
                .map(|()| Err(Error::new(ErrorKind::TimedOut, "the peer did not say what it wants in time"))),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
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
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_half_of_the_room_at_most() {
        let room = Arc::new(Room { max: 5, taken: Mutex::default() });
        let [one, two] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        let mut of_one: Vec<Seat> = (0..5).filter_map(|_| room.take(one)).collect();
        assert_eq!(of_one.len(), 3);
        let of_two: Vec<Seat> = (0..5).filter_map(|_| room.take(two)).collect();
        assert_eq!(of_two.len(), 2);
        of_one.pop();
        assert!(room.take(two).is_some(), "there is room again");
        drop((of_one, of_two));
        let taken = room.taken.lock().unwrap();
        assert_eq!((taken.all, taken.by_peer.len()), (0, 0));
    }
}
