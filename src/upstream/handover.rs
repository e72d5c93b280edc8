//! The moment from which a request may have been sent, made decidable.
//!
//! A request body stands in one of three states. It is *held* until a
//! connection asks for it, which happens after the connection took the request
//! and before a byte of the body leaves. From then on it is *taken*. Until
//! then it can be *revoked*, and then no connection ever gets it: a POST
//! without its body cannot create anything. Whoever gives a call up therefore
//! never has to guess.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::early_headers::EarlyHeaders;

const HELD: u8 = 0;
const TAKEN: u8 = 1;
const REVOKED: u8 = 2;

/// Says whether a request has been handed over to a connection.
#[derive(Clone, Debug, Default)]
pub struct Handover(Arc<AtomicU8>);

impl Handover {
    /// A request that has not been handed over, and the body to send with it.
    /// With `first`, these headers are on the caller's connection before a byte
    /// of the body is handed over.
    pub(crate) fn body(
        &self,
        bytes: impl Into<Bytes>,
        first: Option<&EarlyHeaders>,
    ) -> RevocableBody {
        RevocableBody {
            bytes: Some(bytes.into()),
            first: first.map(|headers| Box::pin(headers.send()) as Waiting),
            handover: self.clone(),
        }
    }

    /// Calls the request back. True: it was not sent, and never will be.
    pub fn revoke(&self) -> bool {
        match (self.0).compare_exchange(HELD, REVOKED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(state) => state == REVOKED,
        }
    }

    fn is_taken(&self) -> bool {
        self.0.load(Ordering::Acquire) == TAKEN
    }

    fn take(&self) -> bool {
        self.0
            .compare_exchange(HELD, TAKEN, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// What of a call may be upstream, over all of its attempts.
#[derive(Clone, Debug, Default)]
pub struct Sending(Arc<Mutex<SendingState>>);

#[derive(Debug, Default)]
struct SendingState {
    called_back: bool,
    earlier_try_is_open: bool,
    /// The last attempt and when it began, unless it is known that it created
    /// nothing.
    attempt: Option<(Handover, Instant)>,
}

impl Sending {
    /// Begins an attempt; `None` where the call has been called back.
    pub fn begin(&self) -> Option<Handover> {
        let mut state = self.state();
        if state.called_back {
            return None;
        }
        let (handover, _) = state.attempt.insert((Handover::default(), Instant::now()));
        Some(handover.clone())
    }

    /// The last attempt certainly created nothing.
    pub fn nothing_was_created(&self) {
        self.state().attempt = None;
    }

    /// For how long something may be upstream that creates a batch, if so.
    pub fn upstream_for(&self) -> Option<Duration> {
        let state = self.state();
        let (attempt, began) = state.attempt.as_ref()?;
        attempt.is_taken().then(|| began.elapsed())
    }

    /// Whether an earlier try of the same call may still create the batch.
    pub fn earlier_try_is_open(&self) -> bool {
        self.state().earlier_try_is_open
    }

    /// Says whether an earlier try may still create the batch.
    pub fn set_earlier_try_is_open(&self, is_open: bool) {
        self.state().earlier_try_is_open = is_open;
    }

    /// Calls the call back. True: nothing of it was sent that may have created
    /// anything, and nothing will be.
    pub fn call_back(&self) -> bool {
        let mut state = self.state();
        let not_sent = match &state.attempt {
            Some((attempt, _)) => attempt.revoke(),
            None => true,
        };
        state.called_back |= not_sent;
        not_sent
    }

    fn state(&self) -> MutexGuard<'_, SendingState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request body that goes out once, unless it is revoked before.
pub(crate) struct RevocableBody {
    bytes: Option<Bytes>,
    /// What must be over first.
    first: Option<Waiting>,
    handover: Handover,
}

type Waiting = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// The request was called back before a connection took its body.
#[derive(Debug)]
pub(crate) struct Revoked;

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was called back")
    }
}

impl std::error::Error for Revoked {}

impl Body for RevocableBody {
    type Data = Bytes;
    type Error = Revoked;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Revoked>>> {
        if let Some(first) = &mut self.first {
            ready!(first.as_mut().poll(cx));
            self.first = None;
        }
        let Some(bytes) = self.bytes.take() else {
            return Poll::Ready(None);
        };
        Poll::Ready(Some(match self.handover.take() {
            true => Ok(Frame::data(bytes)),
            false => Err(Revoked),
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
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_body_is_taken_or_revoked_but_never_both() {
        let handover = Handover::default();
        let body = handover.body(b"{}".to_vec(), None);
        assert_eq!(body.size_hint().exact(), Some(2));
        let sent = body.collect().await.expect("the body").to_bytes();
        assert_eq!(&sent[..], b"{}");
        assert!(!handover.revoke());

        let handover = Handover::default();
        let body = handover.body(b"{}".to_vec(), None);
        assert!(handover.revoke());
        assert!(body.collect().await.is_err());
        assert!(handover.revoke());
    }

    #[tokio::test(start_paused = true)]
    async fn the_callers_headers_leave_first() {
        let (handover, headers) = (Handover::default(), EarlyHeaders::default());
        let body = handover.body(b"{}".to_vec(), Some(&headers));
        let mut sent = std::pin::pin!(body.collect());
        let waits = tokio::time::timeout(Duration::from_secs(1), sent.as_mut());
        assert!(waits.await.is_err(), "the headers have not left");
        headers.requested().await;
        assert!(!handover.is_taken());
        headers.set_written();
        assert_eq!(&sent.await.expect("the body").to_bytes()[..], b"{}");

        // Who waits for them can still be called back.
        let (handover, headers) = (Handover::default(), EarlyHeaders::default());
        let body = handover.body(b"{}".to_vec(), Some(&headers));
        assert!(handover.revoke());
        headers.set_written();
        assert!(body.collect().await.is_err());
    }

    #[tokio::test]
    async fn a_call_is_called_back_or_may_be_upstream() {
        let sending = Sending::default();
        let first = sending.begin().expect("not called back");
        first
            .body(Vec::new(), None)
            .collect()
            .await
            .expect("the body");
        assert!(
            !sending.call_back(),
            "the first attempt may have created something"
        );
        sending.nothing_was_created();
        let second = sending.begin().expect("not called back");
        assert!(sending.call_back(), "the second was not sent");
        assert!(second.body(Vec::new(), None).collect().await.is_err());
        assert!(sending.begin().is_none());
    }
}
