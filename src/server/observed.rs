//! The bodies of a call, watched: how much comes and goes, and when the call
//! has ended.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};

use crate::telemetry::{Call, CallRecord};

/// A request's body.
pub(super) struct Received<B> {
    pub(super) body: B,
    pub(super) record: Arc<CallRecord>,
}

impl<B: Body + Unpin> Body for Received<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = data(&frame) {
            self.record.received(data.remaining());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body. The call ends with it.
pub(super) struct Sent<B> {
    pub(super) body: B,
    pub(super) call: Call,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Sent<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(data) = data(&frame) {
            self.call.record().sent(data.len());
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
