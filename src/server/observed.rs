//! The body of an answer, watched: how much leaves, and when the call has ended.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::arrival::Open;
use crate::telemetry::Call;

/// An answer's body. The call ends with it.
pub(super) struct Sent<B> {
    pub(super) body: B,
    /// Where the call is counted.
    pub(super) call: Option<Call>,
    pub(super) _open: Option<Open>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Sent<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(data), Some(call)) = (data(&frame), &self.call) {
            call.record().sent(data.len());
        }
        Poll::Ready(frame)
    }

    // An answer without a body must stay one: its HEADERS frame ends the stream.
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn data<D, E>(frame: &Option<Result<Frame<D>, E>>) -> Option<&D> {
    frame.as_ref()?.as_ref().ok()?.data_ref()
}
