//! The responses: the API's own, and what faults make of them.

use std::{
    io::{self, Write},
    time::Duration,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use super::{Fault, Garbling, State, intermediary::Intermediary, new_id, wire::Connection};

pub(super) type Response = http::Response<BoxBody<Bytes, io::Error>>;

/// A connection that ends without a response.
pub(super) type NoResponse = Box<dyn std::error::Error + Send + Sync>;

/// What the API replies when nothing goes wrong.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    /// JSON.
    pub(super) body: String,
    pub(super) location: Option<String>,
}

impl Reply {
    pub(super) fn problem(status: StatusCode, detail: &str) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        let title = title.replace(' ', "") + "Error";
        let body = json!({
            "type": "/placeholder/type/uri",
            "status": status.as_u16(),
            "title": title,
            "detail": detail,
        });
        Reply {
            status,
            body: body.to_string(),
            location: None,
        }
    }
}

/// The response to a request that `process` processes, or what a fault makes of
/// it, before or after that.
pub(super) async fn respond(
    state: &State,
    connection: &Connection,
    fault: Option<&Fault>,
    process: impl FnOnce() -> Reply,
) -> Result<Response, NoResponse> {
    match fault {
        Some(Fault::Delay(delay)) => tokio::time::sleep(*delay).await,
        Some(Fault::Status(status)) => return Ok(api_error(*status)),
        Some(Fault::Proxy(status)) => return Ok(html(*status)),
        Some(Fault::Intermediary(form, false)) => return Ok(of_intermediary(form)),
        Some(Fault::Garbled(garbling, status)) => return Ok(garbled(*garbling, *status)),
        Some(Fault::ResetBefore | Fault::ResetBeforeRead) => {
            connection.reset();
            return Err("reset".into());
        }
        Some(Fault::CloseBefore) => return Err("close".into()),
        Some(Fault::TimeoutBefore) => std::future::pending().await,
        Some(Fault::RefusedStream) => {
            return Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into());
        }
        Some(Fault::Redirect) => {
            let mut response = full(StatusCode::TEMPORARY_REDIRECT, "application/json", "");
            let elsewhere = format!("http://localhost:{}/elsewhere", state.address.port());
            set(&mut response, header::LOCATION, &elsewhere);
            return Ok(response);
        }
        _ => {}
    }

    let reply = process();
    let (status, body) = (reply.status, &*reply.body);
    let good = || full(status, "application/json", body);
    let mut response = match fault {
        Some(Fault::Lost(status)) => return Ok(html(*status)),
        Some(Fault::Intermediary(form, _)) => return Ok(of_intermediary(form)),
        Some(Fault::ResetAfter) => {
            connection.reset();
            return Err("reset".into());
        }
        Some(Fault::CloseAfter) => return Err("close".into()),
        Some(Fault::TimeoutAfter) => std::future::pending().await,
        Some(Fault::HalfResponse) => {
            let mut response = broken(status, &body[..body.floor_char_boundary(body.len() / 2)]);
            set(
                &mut response,
                header::CONTENT_LENGTH,
                &body.len().to_string(),
            );
            response
        }
        Some(Fault::UnfinishedResponse) => broken(status, body),
        Some(Fault::EmptyResponse) => full(status, "application/json", ""),
        Some(Fault::HtmlResponse) => html(StatusCode::OK),
        Some(Fault::GzipResponse) => {
            let mut response = good();
            gzip(&mut response, body);
            response
        }
        Some(Fault::ManyHeadersResponse) => {
            let mut response = good();
            let policy = HeaderValue::from_static("script-src 'self'");
            for _ in 0..120 {
                let name = header::CONTENT_SECURITY_POLICY_REPORT_ONLY;
                response.headers_mut().append(name, policy.clone());
            }
            response
        }
        Some(Fault::Stale) => {
            connection.reset_on_next_request();
            good()
        }
        _ => good(),
    };
    if let Some(location) = reply.location {
        set(&mut response, header::LOCATION, &location);
    }
    Ok(response)
}

/// The API's own error for a status, in the shape that it is documented in.
fn api_error(status: StatusCode) -> Response {
    let Some((code, message)) = words(status) else {
        return problem(status, "The simulator was told to say so");
    };
    let body = json!({ "error_code": code, "message": message });
    let mut response = json_response(status, &body);
    if status == StatusCode::TOO_MANY_REQUESTS {
        set(&mut response, header::RETRY_AFTER, "2");
    }
    response
}

/// A code and a message of the API gateway for a status.
fn words(status: StatusCode) -> Option<(&'static str, &'static str)> {
    Some(match status.as_u16() {
        401 => ("401013", "Oauth token is not valid"),
        403 => ("403025", "Profile is not valid"),
        429 => ("429050", "Too many requests"),
        503 => ("503000", "Could not validate Api Key"),
        _ => return None,
    })
}

pub(super) fn problem(status: StatusCode, detail: &str) -> Response {
    full(
        status,
        "application/json",
        &Reply::problem(status, detail).body,
    )
}

pub(super) fn json_response(status: StatusCode, body: &Value) -> Response {
    full(status, "application/json", &body.to_string())
}

fn html(status: StatusCode) -> Response {
    let body = format!("<html><body><h1>{status}</h1></body></html>\n");
    full(status, "text/html", &body)
}

fn full(status: StatusCode, media_type: &str, body: &str) -> Response {
    let mut response = Response::new(whole(body.as_bytes()));
    *response.status_mut() = status;
    set(&mut response, header::CONTENT_TYPE, media_type);
    let request_id = header::HeaderName::from_static("x-request-id");
    set(&mut response, request_id, &new_id().to_string());
    response
}

fn set(response: &mut Response, name: header::HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        response.headers_mut().insert(name, value);
    }
}

/// What an intermediary sends, without any header of the API's.
fn of_intermediary(form: &Intermediary) -> Response {
    form.response().map(|body| whole(body.as_bytes()))
}

/// The API's own error, in bytes that are hard to read.
fn garbled(garbling: Garbling, status: StatusCode) -> Response {
    let (code, message) = words(status).unwrap_or(("400000", "The simulator was told to say so"));
    let text = |message: &str, more: &str| {
        format!(r#"{{"error_code":"{code}","message":"{message}"{more}}}"#)
    };
    let mut response = api_error(status);
    let body = match garbling {
        Garbling::Gzip => {
            gzip(&mut response, &text(message, ""));
            return response;
        }
        Garbling::ByteOrderMark => format!("\u{feff}{}", text(message, "")).into_bytes(),
        Garbling::Latin1 => {
            let text = text("L'acc\u{e8}s n'est pas autoris\u{e9}", "");
            text.chars().map(|c| c as u8).collect()
        }
        Garbling::Surrogate => text(&format!(r"{message} \ud83d"), "").into_bytes(),
        Garbling::Overflow => text(message, r#","retryable":1e999"#).into_bytes(),
    };
    *response.body_mut() = whole(&body);
    response
}

fn gzip(response: &mut Response, body: &str) {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail.
    if let Ok(body) = encoder
        .write_all(body.as_bytes())
        .and_then(|()| encoder.finish())
    {
        *response.body_mut() = whole(&body);
    }
    set(response, header::CONTENT_ENCODING, "gzip");
}

fn whole(body: &[u8]) -> BoxBody<Bytes, io::Error> {
    let body = Full::new(Bytes::copy_from_slice(body));
    body.map_err(|never| match never {}).boxed()
}

/// A response of unknown length that does not end as it should.
fn broken(status: StatusCode, body: &str) -> Response {
    let body = Bytes::copy_from_slice(body.as_bytes());
    let frames = tokio_stream::iter([Some(body), None]).then(|frame| async {
        match frame {
            Some(bytes) => Ok(Frame::data(bytes)),
            None => {
                // What went before must have left, or the whole response is lost.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            }
        }
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    *response.status_mut() = status;
    response
}
