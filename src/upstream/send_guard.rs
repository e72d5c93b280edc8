//! The moment from which a request may have been sent, made decidable.
//!
//! A request body is in one of three states. It is *pending* until a connection
//! asks for it, which happens after the connection took the request and before
//! a byte of the body leaves. From then on it counts as *sent*. Until then it
//! can be *cancelled*, and then no connection ever gets it: a POST without its
//! body cannot create anything. So giving up on a call never needs a guess.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;

use crate::call::early_headers::EarlyHeaders;

const PENDING: u8 = 0;
const SENT: u8 = 1;
const CANCELLED: u8 = 2;

/// Says whether a request may have been sent.
#[derive(Clone, Debug, Default)]
pub struct SendGuard {
    state: Arc<AtomicU8>,
    /// Notified when it is sent.
    notify: Arc<Notify>,
}

impl SendGuard {
    /// A request that notifies this when it is sent.
    pub fn notifying(notify: Arc<Notify>) -> Self {
        SendGuard {
            state: Arc::default(),
            notify,
        }
    }

    /// The body to send. With `first`, these headers are on the caller's
    /// connection before a byte of the body leaves.
    pub(crate) fn body(
        &self,
        bytes: impl Into<Bytes>,
        first: Option<&EarlyHeaders>,
    ) -> CancellableBody {
        CancellableBody {
            bytes: Some(bytes.into()),
            first: first.map(|headers| Box::pin(headers.send()) as Waiting),
            guard: self.clone(),
        }
    }

    /// Cancels the request. True: it was not sent, and never will be.
    pub fn cancel(&self) -> bool {
        match self.change(CANCELLED) {
            Ok(_) => true,
            Err(state) => state == CANCELLED,
        }
    }

    /// Whether it may have been sent.
    pub fn is_sent(&self) -> bool {
        self.state.load(Ordering::Acquire) == SENT
    }

    fn set_sent(&self) -> bool {
        let is_sent = self.change(SENT).is_ok();
        if is_sent {
            self.notify.notify_waiters();
        }
        is_sent
    }

    fn change(&self, to: u8) -> Result<u8, u8> {
        (self.state).compare_exchange(PENDING, to, Ordering::AcqRel, Ordering::Acquire)
    }
}

/// A request body that goes out once, unless it is cancelled before.
pub(crate) struct CancellableBody {
    bytes: Option<Bytes>,
    /// What must happen first.
    first: Option<Waiting>,
    guard: SendGuard,
}

type Waiting = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// The request was cancelled before a connection took its body.
#[derive(Debug)]
pub(crate) struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was cancelled")
    }
}

impl std::error::Error for Cancelled {}

impl Body for CancellableBody {
    type Data = Bytes;
    type Error = Cancelled;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cancelled>>> {
        if let Some(first) = &mut self.first {
            ready!(first.as_mut().poll(cx));
            self.first = None;
        }
        let Some(bytes) = self.bytes.take() else {
            return Poll::Ready(None);
        };
        Poll::Ready(Some(match self.guard.set_sent() {
            true => Ok(Frame::data(bytes)),
            false => Err(Cancelled),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_body_is_sent_or_cancelled_but_never_both() {
        let guard = SendGuard::default();
        let body = guard.body(b"{}".to_vec(), None);
        assert_eq!(body.size_hint().exact(), Some(2));
        let sent = body.collect().await.expect("the body").to_bytes();
        assert_eq!(&sent[..], b"{}");
        assert!(!guard.cancel());

        let guard = SendGuard::default();
        let body = guard.body(b"{}".to_vec(), None);
        assert!(guard.cancel());
        assert!(body.collect().await.is_err());
        assert!(guard.cancel());
    }

    #[tokio::test(start_paused = true)]
    async fn the_callers_headers_leave_first() {
        let (guard, headers) = (SendGuard::default(), EarlyHeaders::default());
        let body = guard.body(b"{}".to_vec(), Some(&headers));
        let mut sent = std::pin::pin!(body.collect());
        let waits = tokio::time::timeout(Duration::from_secs(1), sent.as_mut());
        assert!(waits.await.is_err(), "the headers have not left");
        headers.requested().await;
        assert!(!guard.is_sent());
        headers.set_written();
        assert_eq!(&sent.await.expect("the body").to_bytes()[..], b"{}");

        // While it waits for them it can still be cancelled.
        let (guard, headers) = (SendGuard::default(), EarlyHeaders::default());
        let body = guard.body(b"{}".to_vec(), Some(&headers));
        assert!(guard.cancel());
        headers.set_written();
        assert!(body.collect().await.is_err());
    }
}
