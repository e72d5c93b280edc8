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
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

const HELD: u8 = 0;
const TAKEN: u8 = 1;
const REVOKED: u8 = 2;

/// Says whether a request has been handed over to a connection.
#[derive(Clone, Debug, Default)]
pub struct Handover(Arc<AtomicU8>);

impl Handover {
    /// A request that has not been handed over, and the body to send with it.
    pub(crate) fn body(&self, bytes: Vec<u8>) -> RevocableBody {
        RevocableBody {
            bytes: Some(bytes.into()),
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

    fn take(&self) -> bool {
        self.0
            .compare_exchange(HELD, TAKEN, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// A request body that goes out once, unless it is revoked before.
#[derive(Debug)]
pub(crate) struct RevocableBody {
    bytes: Option<Bytes>,
    handover: Handover,
}

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
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Revoked>>> {
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
        let body = handover.body(b"{}".to_vec());
        assert_eq!(body.size_hint().exact(), Some(2));
        let sent = body.collect().await.expect("the body").to_bytes();
        assert_eq!(&sent[..], b"{}");
        assert!(!handover.revoke());

        let handover = Handover::default();
        let body = handover.body(b"{}".to_vec());
        assert!(handover.revoke());
        assert!(body.collect().await.is_err());
        assert!(handover.revoke());
    }
}
