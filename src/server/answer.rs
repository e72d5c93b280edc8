//! The form in which a call's answer leaves.
//!
//! tonic sends every error as Trailers-Only: one HEADERS frame. gRPC clients
//! and meshes may be configured to retry that. A client that has seen
//! Response-Headers is committed and never retries (gRFC A6), and Envoy reads
//! `grpc-status` for retries from headers only. So a failure after which a
//! batch may exist goes out as Response-Headers, then trailers; only failures
//! that are certainly NOT_APPLIED stay Trailers-Only.
//!
//! A create without an external id gets its Response-Headers before it is sent,
//! and one that takes its time gets them then: should this process, its node or
//! the connection die from then on, the client does not retry what may exist.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::Full;
use tonic::{Code, Status, body::Body};

use super::arrival::Refusal;
use crate::{
    credentials::REQUEST_ID,
    outcome::Outcome,
    status::{self, CallNames},
    telemetry::CallRecord,
};

/// Gives an answer of `BatchService` its form.
pub(super) fn shape(response: Response<Body>, record: &CallRecord) -> Response<Body> {
    let (response, code) = tell(response, record);
    let outcome = response.headers().get(status::OUTCOME);
    let may_be_repeated = outcome.is_some_and(|o| o == Outcome::NotApplied.as_str());
    match code == Code::Ok || may_be_repeated {
        true => response,
        false => headers_then_trailers(response),
    }
}

/// Gives a Trailers-Only answer trailers of its own, where these are a part of
/// the body.
pub(super) fn with_trailers(response: Response<Body>) -> Response<Body> {
    match response.headers().contains_key(Status::GRPC_STATUS) {
        true => headers_then_trailers(response),
        false => response,
    }
}

/// The answer to a call that no service sees.
pub(super) fn of_refusal(
    refusal: Refusal,
    request_id: &HeaderValue,
    record: Option<&CallRecord>,
) -> Response<Body> {
    let status = match refusal {
        Refusal::Failed(failure) => {
            let call = CallNames {
                request_id,
                external_id: None,
                time_left: None,
            };
            let status = status::from_failure(&failure, call);
            if let Some(record) = record {
                record.create_ended(&Err(failure));
                record.answered(status.code());
            }
            status
        }
        Refusal::Protocol(row, what) => {
            if let Some(record) = record {
                record.refused(row);
            }
            status::from_protocol_error(row, what, Some(request_id))
        }
        // Nobody hears it, most likely: counted as cancelled, like every call without an answer.
        Refusal::Gone => {
            let row = &status::INVALID_FRAMING;
            status::from_protocol_error(row, "The request broke off", Some(request_id))
        }
    };
    status.into_http()
}

/// An answer that is no gRPC, for who does not speak it: a sentence.
pub(super) fn refuse(status: StatusCode, sentence: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::from(sentence)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Makes sure that a failure tells its outcome, and that the record has the
/// code.
fn tell(response: Response<Body>, record: &CallRecord) -> (Response<Body>, Code) {
    let (response, code) = match error_of(&response) {
        None => (response, Code::Ok),
        Some(status) if response.headers().contains_key(status::OUTCOME) => {
            (response, status.code())
        }
        Some(status) => refused_by_tonic(response, &status, record),
    };
    record.answered(code);
    (response, code)
}

/// The service never saw the call: tonic refused its message, encoding or
/// method.
fn refused_by_tonic(
    response: Response<Body>,
    status: &Status,
    record: &CallRecord,
) -> (Response<Body>, Code) {
    let row = status::protocol_row(status.code());
    record.refused(row);
    let id = record.request_id();
    let status = status::from_protocol_error(row, status.message(), Some(id));
    let mut refusal: Response<Body> = status.into_http();
    if let Some(encodings) = response.headers().get("grpc-accept-encoding") {
        let headers = refusal.headers_mut();
        headers.insert("grpc-accept-encoding", encodings.clone());
    }
    (refusal, row.code)
}

/// The error in a Trailers-Only answer.
fn error_of(response: &Response<Body>) -> Option<Status> {
    Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok)
}

/// Nothing stands in both: Connect joins them, and would tell it twice.
fn headers_then_trailers(response: Response<Body>) -> Response<Body> {
    let (mut head, _) = response.into_parts();
    let mut trailers = std::mem::take(&mut head.headers);
    if let Some(content_type) = trailers.remove(header::CONTENT_TYPE) {
        head.headers.insert(header::CONTENT_TYPE, content_type);
    }
    let body = LateBody::Trailers(Some(trailers));
    Response::from_parts(head, Body::new(body))
}

/// The beginning of an answer whose end is not known yet: the headers that
/// make a client stay. `written` is polled as soon as they are queued.
pub(super) fn begin(
    answering: Answering,
    written: Written,
    record: Arc<CallRecord>,
) -> Response<Body> {
    let request_id = record.request_id().clone();
    let waiting = LateBody::Waiting(answering, Some(written), record);
    let mut response = Response::new(Body::new(waiting));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE);
    headers.insert(REQUEST_ID, request_id);
    response
}

/// Ends when the headers of an answer have left.
pub(super) type Written = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A call that the service is answering.
pub(super) type Answering =
    Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// A body without a length: a length of 0 could make a proxy think that no
/// trailers follow.
enum LateBody {
    /// The service has not answered yet; then its answer follows.
    Waiting(Answering, Option<Written>, Arc<CallRecord>),
    /// The message and trailers of a success, and its outcome.
    Message(Body, Option<HeaderValue>),
    /// Trailers alone: a failure.
    Trailers(Option<HeaderMap>),
}

impl http_body::Body for LateBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            match &mut *self {
                LateBody::Waiting(answering, written, record) => {
                    if let Some(waiting) = written
                        && waiting.as_mut().poll(cx).is_ready()
                    {
                        *written = None;
                    }
                    let Ok(response) = ready!(answering.as_mut().poll(cx));
                    let (response, code) = tell(response, record);
                    let (mut head, body) = response.into_parts();
                    // The early headers have told both.
                    for told in [header::CONTENT_TYPE, REQUEST_ID] {
                        head.headers.remove(told);
                    }
                    *self = match code {
                        Code::Ok => {
                            LateBody::Message(body, head.headers.get(status::OUTCOME).cloned())
                        }
                        _ => LateBody::Trailers(Some(head.headers)),
                    };
                }
                LateBody::Message(body, outcome) => {
                    let mut frame = ready!(Pin::new(body).poll_frame(cx));
                    if let Some(Ok(frame)) = &mut frame
                        && let Some(trailers) = frame.trailers_mut()
                        && let Some(outcome) = outcome.take()
                    {
                        trailers.insert(status::OUTCOME, outcome);
                    }
                    return Poll::Ready(frame);
                }
                LateBody::Trailers(trailers) => {
                    let frame = trailers
                        .take()
                        .map(|trailers| Ok(Frame::trailers(trailers)));
                    return Poll::Ready(frame);
                }
            }
        }
    }
}
