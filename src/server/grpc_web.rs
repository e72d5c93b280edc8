//! Translates gRPC-Web, the form of gRPC for browsers, to gRPC and back; decides which web pages
//! may call (CORS, see the Fetch standard).

use std::{
    convert::Infallible,
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header,
};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Limited};
use tokio::time::timeout;
use tonic::body::Body;
use tonic_web::GrpcWebLayer;
use tower::{Layer, ServiceExt, service_fn};

use super::{response, router::is_one_of};
use crate::status::OUTCOME;

/// The settings of gRPC-Web.
#[derive(Debug)]
pub(super) struct Web {
    /// Origins whose pages may call, besides the gateway's own.
    pub(super) origins: Vec<HeaderValue>,
    /// Metadata that pages may send besides [`REQUEST_HEADERS`].
    pub(super) metadata: Vec<HeaderName>,
}

/// The headers that pages may send.
const REQUEST_HEADERS: &str = "authorization, x-api-key, x-gw-ims-org-id, x-sandbox-name, \
    content-type, grpc-timeout, idempotency-key, traceparent, tracestate, x-grpc-web, \
    x-request-id, x-user-agent";

/// The headers that pages may read.
const RESPONSE_HEADERS: &str =
    "aep-batch-outcome, grpc-message, grpc-status, grpc-status-details-bin, x-request-id";

/// How many seconds browsers may cache the response to a preflight.
const MAX_AGE: &str = "600";

impl Web {
    /// Responds to a request over HTTP/1.1 or HTTP/2. `grpc` handles gRPC calls.
    pub(super) async fn respond<F>(
        &self,
        request: Request<Body>,
        grpc: impl FnMut(Request<Body>) -> F,
    ) -> Response<Body>
    where
        F: Future<Output = Response<Body>>,
    {
        let origin = request.headers().get(header::ORIGIN);
        let origin = origin
            .filter(|origin| self.origins.contains(origin))
            .cloned();
        let mut response = match origin {
            Some(_) if is_preflight(&request) => self.preflight(),
            None if is_cross_origin(&request) => response::not_grpc(
                StatusCode::FORBIDDEN,
                "This origin may not call: it is not in --grpc-web-origins.\n",
            ),
            _ => respond_to_call(request, grpc).await,
        };
        self.add_cors_headers(origin, response.headers_mut());
        response
    }

    fn preflight(&self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        for (name, value) in [
            (header::ACCESS_CONTROL_ALLOW_METHODS, "POST"),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        for name in self.metadata.iter().cloned() {
            headers.append(header::ACCESS_CONTROL_ALLOW_HEADERS, name.into());
        }
        response
    }

    fn add_cors_headers(&self, origin: Option<HeaderValue>, headers: &mut HeaderMap) {
        if !self.origins.is_empty() {
            headers.insert(header::VARY, HeaderValue::from_static("origin"));
        }
        if let Some(origin) = origin {
            let exposed = HeaderValue::from_static(RESPONSE_HEADERS);
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }
}

/// Whether the page has another origin. Browsers with Fetch Metadata tell, which also works
/// behind a proxy; otherwise the page's host is compared with the request's.
fn is_cross_origin(request: &Request<Body>) -> bool {
    let headers = request.headers();
    let (Some(origin), false) = (headers.get(header::ORIGIN), is_preflight(request)) else {
        return false;
    };
    if let Some(site) = headers.get("sec-fetch-site") {
        return site != "same-origin" && site != "none";
    }
    let host = match request.uri().authority() {
        Some(authority) => Some(authority.as_str()),
        None => headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok()),
    };
    let origin = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"));
    let (Some(host), Some((scheme, page_host))) = (host, origin) else {
        return true;
    };
    let default_port = if scheme == "https" { ":443" } else { ":80" };
    let host = host.strip_suffix(default_port).unwrap_or(host);
    !page_host.eq_ignore_ascii_case(host)
}

fn is_preflight(request: &Request<Body>) -> bool {
    let asked = header::ACCESS_CONTROL_REQUEST_METHOD;
    request.method() == Method::OPTIONS && request.headers().contains_key(asked)
}

async fn respond_to_call<F>(
    mut request: Request<Body>,
    mut grpc: impl FnMut(Request<Body>) -> F,
) -> Response<Body>
where
    F: Future<Output = Response<Body>>,
{
    let Some(content_type) = web_content_type(&request) else {
        return match request.version() {
            // gRPC itself needs HTTP/2.
            Version::HTTP_2 => grpc(request).await,
            _ => response::not_grpc(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "Over HTTP/1.1 this server supports gRPC-Web only: the content type must be \
                 application/grpc-web or application/grpc-web-text. gRPC needs HTTP/2.\n",
            ),
        };
    };
    if request.version() != Version::HTTP_2 {
        request = request.map(|body| Body::new(DrainedBody(body)));
    }
    // tonic-web knows only these content types, and responds with the accepted one.
    let content_type = HeaderValue::from_static(content_type);
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type.clone());
    headers.insert(header::ACCEPT, content_type);
    let grpc = service_fn(move |request| {
        let response = grpc(request);
        async { Ok::<_, Infallible>(outcome_in_trailers(response::with_trailers(response.await))) }
    });
    let Ok(response) = GrpcWebLayer::new().layer(grpc).oneshot(request).await;
    response
}

/// Moves the outcome from the headers to the trailers.
fn outcome_in_trailers(mut response: Response<Body>) -> Response<Body> {
    let outcome = response.headers_mut().remove(OUTCOME);
    let add_outcome = move |frame: Frame<Bytes>| match frame.into_trailers() {
        Ok(mut trailers) => {
            if let Some(outcome) = outcome.clone() {
                trailers.insert(OUTCOME, outcome);
            }
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    };
    response.map(|body| Body::new(body.map_frame(add_outcome)))
}

/// The content type, if it is one of gRPC-Web: binary or text (base64).
fn web_content_type(request: &Request<Body>) -> Option<&'static str> {
    const BINARY: &str = "application/grpc-web+proto";
    const TEXT: &str = "application/grpc-web-text+proto";
    match request {
        _ if is_one_of(request, &["application/grpc-web", BINARY]) => Some(BINARY),
        _ if is_one_of(request, &["application/grpc-web-text", TEXT]) => Some(TEXT),
        _ => None,
    }
}

/// The body of an HTTP/1.1 request. The part that is not used is read and discarded, up to a
/// limit: a client whose connection closes while it sends cannot read the response.
struct DrainedBody(Body);

const MAX_DISCARDED: usize = 1024 * 1024;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

impl http_body::Body for DrainedBody {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

impl Drop for DrainedBody {
    fn drop(&mut self) {
        let mut rest = Limited::new(mem::take(&mut self.0), MAX_DISCARDED);
        if !rest.is_end_stream() {
            tokio::spawn(timeout(DISCARD_TIMEOUT, async move {
                while let Some(Ok(_)) = rest.frame().await {}
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;
    use crate::{
        call::idempotency_key,
        headers::{CREDENTIALS, REQUEST_ID},
    };

    #[test]
    fn pages_may_send_and_read_what_a_call_needs() {
        let credentials = CREDENTIALS.iter().map(HeaderName::as_str);
        for name in credentials.chain([REQUEST_ID.as_str(), idempotency_key::NAME]) {
            let mut allowed = REQUEST_HEADERS.split(", ");
            assert!(allowed.any(|allowed| allowed == name), "{name}");
        }
        let status = [
            Status::GRPC_STATUS,
            Status::GRPC_MESSAGE,
            Status::GRPC_STATUS_DETAILS,
        ];
        for name in status.iter().chain([&OUTCOME, &REQUEST_ID]) {
            let mut exposed = RESPONSE_HEADERS.split(", ");
            assert!(exposed.any(|exposed| exposed == name), "{name}");
        }
    }
}
