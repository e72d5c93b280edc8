//! The form of a call's response: Trailers-Only, or headers then trailers.
//!
//! tonic sends every error as Trailers-Only: one HEADERS frame. gRPC clients
//! and meshes may be configured to retry that. A client that has seen
//! Response-Headers is committed and never retries (gRFC A6), and Envoy reads
//! `grpc-status` for retries from headers only. So a failure of a call that is not
//! idempotent, and may have changed something, is sent as Response-Headers, then
//! trailers; only failures that may be retried stay Trailers-Only.
//!
//! A create without an external id gets its Response-Headers before it is sent
//! upstream, any other slow create after a while: if this process, its node or the
//! connection dies after that, the client does not retry what may exist.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::Full;
use tonic::{Code, Status, body::Body};

use crate::{
    api::Safety,
    call::CallContext,
    failure::{Effect, Failure},
    headers::REQUEST_ID,
    service::completion_of,
    status,
};

/// Puts a response of `BatchService` into its final form.
pub(super) fn finalize(response: Response<Body>, call: &CallContext) -> Response<Body> {
    let response = with_failure(response, call);
    let completion = call.record.completion();
    let effect = completion.and_then(|completion| completion.outcome);
    let may_be_retried = call.method().safety != Safety::NotIdempotent
        || effect.is_none_or(|effect| effect == Effect::NotApplied);
    match may_be_retried || code_of(response.headers()).is_none() {
        true => response,
        false => headers_then_trailers(response),
    }
}

/// Turns Trailers-Only into headers and trailers, for protocols that send trailers in the body.
pub(super) fn with_trailers(response: Response<Body>) -> Response<Body> {
    match response.headers().contains_key(Status::GRPC_STATUS) {
        true => headers_then_trailers(response),
        false => response,
    }
}

/// The response to a call of `BatchService` that was refused before the service saw it.
pub(super) fn refused(failure: &Failure, call: &CallContext) -> Response<Body> {
    let status = status::of_call(failure, call, None);
    call.record.complete(completion_of(failure, call.method()));
    call.record.set_code(status.code());
    status.into_http()
}

/// A plain-text HTTP response, for clients that do not use gRPC.
pub(super) fn not_grpc(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::from(text)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Replaces a failure that tonic produced by one with our details, and records the code of a
/// response without a body.
fn with_failure(response: Response<Body>, call: &CallContext) -> Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()) else {
        return response; // its code is in the trailers
    };
    if call.record.completion().is_some() {
        call.record.set_code(status.code());
        return response;
    }
    // The service never saw the call: tonic refused its message, encoding or method.
    let mut refusal = refused(&status::refused_by_tonic(&status), call);
    if let Some(encodings) = response.headers().get("grpc-accept-encoding") {
        let headers = refusal.headers_mut();
        headers.insert("grpc-accept-encoding", encodings.clone());
    }
    refusal
}

/// The code in headers or trailers.
pub(super) fn code_of(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get(Status::GRPC_STATUS)?;
    Some(Code::from_bytes(code.as_bytes()))
}

/// No field is in both: Connect merges them, and would show it twice.
fn headers_then_trailers(response: Response<Body>) -> Response<Body> {
    let (mut head, _) = response.into_parts();
    let mut trailers = std::mem::take(&mut head.headers);
    if let Some(content_type) = trailers.remove(header::CONTENT_TYPE) {
        head.headers.insert(header::CONTENT_TYPE, content_type);
    }
    let body = DeferredBody::Trailers(Some(trailers));
    Response::from_parts(head, Body::new(body))
}

/// A response whose headers are sent before its result is known; from then on clients do not
/// retry. `written` is first polled when the headers are queued.
pub(super) fn early(pending: Pending, written: Written, call: CallContext) -> Response<Body> {
    let request_id = call.request_id().clone();
    let pending = DeferredBody::Pending(pending, Some(written), call);
    let mut response = Response::new(Body::new(pending));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE);
    headers.insert(REQUEST_ID, request_id);
    response
}

/// Completes when the headers of a response are written.
pub(super) type Written = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The pending response of the service.
pub(super) type Pending = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// A body of unknown length: with length 0, a proxy might not expect trailers.
enum DeferredBody {
    /// The service has not responded yet.
    Pending(Pending, Option<Written>, CallContext),
    /// The message and trailers of a success, and its outcome.
    Message(Body, Option<HeaderValue>),
    /// The trailers of a failure.
    Trailers(Option<HeaderMap>),
}

impl http_body::Body for DeferredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            match &mut *self {
                DeferredBody::Pending(pending, written, call) => {
                    if let Some(waiting) = written
                        && waiting.as_mut().poll(cx).is_ready()
                    {
                        *written = None;
                    }
                    let Ok(response) = ready!(pending.as_mut().poll(cx));
                    let (mut head, body) = with_failure(response, call).into_parts();
                    // The early headers have both.
                    for sent in [header::CONTENT_TYPE, REQUEST_ID] {
                        head.headers.remove(sent);
                    }
                    *self = match code_of(&head.headers) {
                        None => {
                            DeferredBody::Message(body, head.headers.get(status::OUTCOME).cloned())
                        }
                        Some(_) => DeferredBody::Trailers(Some(head.headers)),
                    };
                }
                DeferredBody::Message(body, outcome) => {
                    let mut frame = ready!(Pin::new(body).poll_frame(cx));
                    if let Some(Ok(frame)) = &mut frame
                        && let Some(trailers) = frame.trailers_mut()
                        && let Some(outcome) = outcome.take()
                    {
                        trailers.insert(status::OUTCOME, outcome);
                    }
                    return Poll::Ready(frame);
                }
                DeferredBody::Trailers(trailers) => {
                    let frame = trailers
                        .take()
                        .map(|trailers| Ok(Frame::trailers(trailers)));
                    return Poll::Ready(frame);
                }
            }
        }
    }
}
