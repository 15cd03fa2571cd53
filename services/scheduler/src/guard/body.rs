//! An answer that ends when something happens, whoever writes it.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http_body::Frame;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::HeaderMap;

/// A body until `end` is done, and then the status that it says.
pub(crate) struct Cut {
    inner: Option<Body>,
    end: BoxFuture<'static, Status>,
    broken: Option<Status>,
}

impl Cut {
    pub(crate) fn new(inner: Body, end: BoxFuture<'static, Status>) -> Self {
        Self { inner: Some(inner), end, broken: None }
    }

    /// The same, which ends with a status where whoever writes it breaks off, and not without one.
    pub(crate) fn or_broken(self, status: Status) -> Self {
        Self { broken: Some(status), ..self }
    }
}

impl http_body::Body for Cut {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        match http_body::Body::poll_frame(Pin::new(inner), cx) {
            Poll::Ready(None) => {
                self.inner = None;
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                self.inner = None;
                return Poll::Ready(Some(match self.broken.take() {
                    Some(status) => last(&status),
                    None => Err(error),
                }));
            }
            Poll::Ready(frame) => return Poll::Ready(frame),
            Poll::Pending => {}
        }
        let Poll::Ready(status) = self.end.as_mut().poll(cx) else { return Poll::Pending };
        // Whoever writes the answer learns by it that nobody reads.
        self.inner = None;
        Poll::Ready(Some(last(&status)))
    }
}

fn last(status: &Status) -> Result<Frame<Bytes>, Status> {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))
}
