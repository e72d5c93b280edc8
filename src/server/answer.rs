//! The form in which a call's answer leaves.
//!
//! tonic sends every error as Trailers-Only: one HEADERS frame. gRPC clients
//! and meshes may be configured to retry that. A client that has seen
//! Response-Headers is committed and never retries (gRFC A6), and Envoy reads
//! `grpc-status` for retries from headers only. So a failure after which a
//! batch may exist goes out as Response-Headers, then trailers; only failures
//! that are certainly NOT_CREATED stay Trailers-Only.

use http::{Response, header};
use http_body_util::{BodyExt, Empty};
use tonic::{Code, Status, body::Body};

use crate::{outcome::Outcome, status};

/// Gives an answer of `BatchService` its form, and says which code it has.
pub(super) fn shape(response: Response<Body>) -> (Response<Body>, Code) {
    let Some(status) = error_of(&response) else {
        return (response, Code::Ok);
    };
    match response.headers().get(status::OUTCOME) {
        None => refused_by_tonic(response, &status),
        Some(outcome) if outcome == Outcome::NotCreated.as_str() => (response, status.code()),
        Some(_) => (headers_then_trailers(response), status.code()),
    }
}

/// The service never saw the call: tonic refused its message, encoding or
/// method.
fn refused_by_tonic(response: Response<Body>, status: &Status) -> (Response<Body>, Code) {
    let status = status::from_protocol_error(status.code(), status.message());
    let code = status.code();
    let mut refusal: Response<Body> = status.into_http();
    if let Some(encodings) = response.headers().get("grpc-accept-encoding") {
        let headers = refusal.headers_mut();
        headers.insert("grpc-accept-encoding", encodings.clone());
    }
    (refusal, code)
}

/// The error in a Trailers-Only answer.
fn error_of(response: &Response<Body>) -> Option<Status> {
    Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok)
}

fn headers_then_trailers(response: Response<Body>) -> Response<Body> {
    let (mut head, _) = response.into_parts();
    let mut trailers = std::mem::take(&mut head.headers);
    if let Some(content_type) = trailers.remove(header::CONTENT_TYPE) {
        head.headers.insert(header::CONTENT_TYPE, content_type);
    }
    // For access logs, which see response headers more easily than trailers.
    for name in [status::OUTCOME, crate::credentials::REQUEST_ID] {
        if let Some(value) = trailers.get(&name).cloned() {
            head.headers.insert(name, value);
        }
    }
    let body = Empty::<bytes::Bytes>::new();
    let body = body.with_trailers(std::future::ready(Some(Ok(trailers))));
    Response::from_parts(head, Body::new(body))
}
