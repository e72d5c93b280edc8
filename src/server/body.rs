//! The body of a response: counts its bytes, and ends the call with it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use super::{arrival::Open, response::code_of};
use crate::telemetry::Call;

/// A response's body. The call ends with it.
pub(super) struct CountedResponse<B> {
    pub(super) body: B,
    /// The call's metrics, log line and span.
    pub(super) call: Option<Call>,
    pub(super) _open: Option<Open>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for CountedResponse<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(Ok(frame)), Some(call)) = (&mut frame, &self.call) {
            if let Some(data) = frame.data_mut() {
                call.record().sent(data.len());
                if let Some(permit) = call.record().take_held() {
                    *data = Bytes::from_owner(Held(std::mem::take(data), permit));
                }
            }
            if let Some(code) = frame.trailers_ref().and_then(code_of) {
                call.record().set_code(code);
            }
        }
        Poll::Ready(frame)
    }

    // Trailers-Only must stay Trailers-Only: the HEADERS frame ends the stream.
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Data with what it takes of a limit, until it has left: h2 may keep a message long after it
/// was polled.
struct Held(
    Bytes,
    #[expect(dead_code, reason = "until this is dropped")] OwnedSemaphorePermit,
);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
