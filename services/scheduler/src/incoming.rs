//! Connections as they come in: so many at once, and none that says nothing.

use std::io::{Error, ErrorKind, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// What every client of HTTP/2 says first, in bytes; a handshake of TLS is longer.
const FIRST_BYTES: usize = 24;

/// Connections of a port: at most `max` at once, each with its first bytes within `patience`.
pub(crate) fn connections(
    incoming: TcpIncoming,
    max: usize,
    patience: Duration,
) -> impl Stream<Item = Result<Connection>> {
    let room = Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS)));
    incoming.filter_map(move |accepted| {
        let permit = Arc::clone(&room).try_acquire_owned();
        let connection = match (accepted, permit) {
            (Ok(stream), Ok(permit)) => {
                let deadline = Some(Box::pin(sleep(patience)));
                Some(Ok(Connection { stream, read: 0, deadline, _permit: permit }))
            }
            (Err(error), _) => Some(Err(error)),
            // There is no room: it is closed, and whoever it was tries again.
            (Ok(_), Err(_)) => {
                tracing::warn!(max, "a connection was closed: there are as many as allowed");
                None
            }
        };
        std::future::ready(connection)
    })
}

/// A connection that breaks if its first bytes do not come in time. Afterwards pings of the protocol see to it that somebody is there.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    read: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
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
