//! What the simulator answers: the documented calls and errors.

use std::{
    io::{self, Write},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use reqwest::Url;
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use tokio_stream::StreamExt;

use super::{
    Fault, Garbling, Received, State, catalog::Query, intermediary::Intermediary, remember,
    wire::Connection,
};
use crate::call::request_id::new_id;

pub(super) const IMPORT: &str = "/data/foundation/import";
pub(super) const CATALOG: &str = "/data/foundation/catalog";

/// Faults are ordered and the ledger is read here.
const CONTROL: &str = "/_simulator";

/// The tag by which a create orders a fault for itself.
const FAULT_TAG: &str = "simulator/fault";

const LARGEST_REQUEST: usize = 1024 * 1024;

type Answer = Response<BoxBody<Bytes, io::Error>>;

/// A connection that ends without an answer.
type NoAnswer = Box<dyn std::error::Error + Send + Sync>;

pub(super) async fn answer(
    state: Arc<State>,
    connection: Connection,
    request: Request<Incoming>,
) -> Result<Answer, NoAnswer> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, LARGEST_REQUEST).collect().await else {
        return Ok(problem(
            StatusCode::PAYLOAD_TOO_LARGE,
            "The body is too large",
        ));
    };
    let body = body.to_bytes();
    let path = head.uri.path().to_owned();
    if let Some(rest) = path.strip_prefix(CONTROL) {
        return Ok(control(&state, &head.method, rest, &body));
    }
    let received = Received {
        method: head.method.clone(),
        path: head.uri.to_string(),
        headers: head.headers.clone(),
        body: body.clone(),
    };
    remember(&mut state.memory().received, received);

    if let Some(refused) = refuse_headers(&head.headers) {
        return Ok(refused);
    }
    if let Some(path) = path.strip_prefix(CATALOG) {
        return Ok(catalog(&state, &head.method, path, &head.uri));
    }
    match path.strip_prefix(IMPORT) {
        Some("/batches") if head.method == Method::POST => {
            create(&state, &connection, &head.headers, &body).await
        }
        Some("/batches") => Ok(problem(
            StatusCode::METHOD_NOT_ALLOWED,
            "Only POST is allowed",
        )),
        _ => Ok(problem(StatusCode::NOT_FOUND, "No such resource")),
    }
}

/// `POST /_simulator/faults` orders faults, a name to a line; `GET` names all;
/// `GET /_simulator/batches` is the ledger.
fn control(state: &State, method: &Method, path: &str, body: &[u8]) -> Answer {
    match (method.as_str(), path) {
        ("POST", "/faults") => {
            let text = String::from_utf8_lossy(body);
            let faults: Result<Vec<Fault>, String> =
                text.split_whitespace().map(str::parse).collect();
            match faults {
                Ok(faults) => {
                    faults
                        .into_iter()
                        .for_each(|fault| state.memory().order(fault));
                    let waiting: Vec<_> = (state.memory().next_faults.iter())
                        .map(Fault::to_string)
                        .collect();
                    json_answer(StatusCode::OK, &json!({ "waiting": waiting }))
                }
                Err(error) => problem(StatusCode::BAD_REQUEST, &error),
            }
        }
        ("GET", "/faults") => {
            let names: Vec<_> = Fault::names().collect();
            json_answer(StatusCode::OK, &json!({ "names": names }))
        }
        ("DELETE", "/faults") => {
            state.memory().next_faults.clear();
            state.memory().next_look_ups.clear();
            json_answer(StatusCode::OK, &json!({ "waiting": [] }))
        }
        ("GET", "/batches") => {
            let batches = state.memory().ledger.all().cloned().collect();
            json_answer(StatusCode::OK, &Value::Array(batches))
        }
        _ => problem(
            StatusCode::NOT_FOUND,
            "There are POST, GET and DELETE /_simulator/faults, and GET /_simulator/batches",
        ),
    }
}

/// The errors of the API gateway ("Experience Platform troubleshooting guide:
/// Request header errors"). The token `expired` and the key `invalid` are
/// refused, so that a person can see what that looks like.
fn refuse_headers(headers: &HeaderMap) -> Option<Answer> {
    let value = |name: &str| headers.get(name)?.to_str().ok();
    let refuse = |status: StatusCode, code: &str, message: &str| {
        let body = json!({ "error_code": code, "message": message });
        Some(json_answer(status, &body))
    };
    match value("authorization") {
        None => {
            return refuse(StatusCode::FORBIDDEN, "403010", "Oauth token is missing.");
        }
        Some("Bearer expired") => {
            return refuse(
                StatusCode::UNAUTHORIZED,
                "401013",
                "Oauth token is not valid",
            );
        }
        _ => {}
    }
    match value("x-api-key") {
        None => return refuse(StatusCode::FORBIDDEN, "403000", "Api Key is required"),
        Some("invalid") => return refuse(StatusCode::FORBIDDEN, "403003", "Api Key is invalid"),
        _ => {}
    }
    if value("x-gw-ims-org-id").is_none() {
        return refuse(
            StatusCode::BAD_REQUEST,
            "400003",
            "Missing header: x-gw-ims-org-id",
        );
    }
    if value("x-sandbox-name").is_none() {
        return Some(problem(
            StatusCode::BAD_REQUEST,
            "Missing header: x-sandbox-name",
        ));
    }
    None
}

/// `POST /batches`, with the fault that is its turn.
async fn create(
    state: &State,
    connection: &Connection,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Answer, NoAnswer> {
    let media_type = headers.get(header::CONTENT_TYPE).map(|v| v.as_bytes());
    if media_type != Some(b"application/json") {
        let detail = "A valid content-type must be specified";
        return Ok(problem(StatusCode::BAD_REQUEST, detail));
    }
    let request = match ingest_batch(body) {
        Ok(request) => request,
        Err(detail) => return Ok(problem(StatusCode::BAD_REQUEST, &detail)),
    };
    let own = request
        .get("tags")
        .and_then(|tags| tags[FAULT_TAG][0].as_str());
    let fault = match own.map(str::parse::<Fault>) {
        Some(Ok(fault)) => Some(fault),
        Some(Err(error)) => return Ok(problem(StatusCode::BAD_REQUEST, &error)),
        None => {
            let memory = &mut *state.memory();
            memory.fault(&state.options, body)
        }
    };
    let mut latency = state.options.latency;
    if let Some(Fault::Delay(delay)) = fault {
        latency += delay;
    }
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }

    match &fault {
        Some(Fault::Status(status)) => return Ok(api_error(*status)),
        Some(Fault::Proxy(status)) => return Ok(html(*status)),
        Some(Fault::Between(form, false)) => return Ok(between(form)),
        Some(Fault::Garbled(garbling, status)) => return Ok(garbled(*garbling, *status)),
        Some(Fault::ResetBeforeCreate | Fault::ResetBeforeRead) => {
            connection.reset();
            return Err("reset".into());
        }
        Some(Fault::CloseBeforeCreate) => return Err("close".into()),
        Some(Fault::SilenceBeforeCreate) => std::future::pending().await,
        Some(Fault::RefusedStream) => {
            return Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into());
        }
        Some(Fault::Redirect) => {
            let mut answer = empty(StatusCode::TEMPORARY_REDIRECT);
            let elsewhere = format!("http://localhost:{}/elsewhere", state.address.port());
            if let Ok(location) = elsewhere.parse() {
                answer.headers_mut().insert(header::LOCATION, location);
            }
            return Ok(answer);
        }
        _ => {}
    }

    let batch = new_batch(headers, &request);
    let visible = Instant::now() + state.options.catalog_lag;
    state.memory().ledger.add(visible, batch.clone());
    let id = batch["id"].as_str().unwrap_or_default();
    let mut answer = match fault {
        Some(Fault::Lost(status)) => return Ok(html(status)),
        Some(Fault::Between(form, _)) => return Ok(between(form)),
        Some(Fault::ResetAfterCreate) => {
            connection.reset();
            return Err("reset".into());
        }
        Some(Fault::CloseAfterCreate) => return Err("close".into()),
        Some(Fault::SilenceAfterCreate) => std::future::pending().await,
        Some(Fault::HalfAnswer) => half(&batch),
        Some(Fault::EmptyAnswer) => empty(StatusCode::CREATED),
        Some(Fault::HtmlAnswer) => html(StatusCode::OK),
        Some(Fault::NoIdAnswer) => {
            let mut batch = batch.clone();
            if let Value::Object(members) = &mut batch {
                members.remove("id");
            }
            json_answer(StatusCode::CREATED, &batch)
        }
        Some(Fault::HugeAnswer) => {
            let mut batch = batch.clone();
            batch["padding"] = "x".repeat(1024 * 1024).into();
            json_answer(StatusCode::CREATED, &batch)
        }
        Some(Fault::CatalogAnswer) => {
            json_answer(StatusCode::CREATED, &json!([format!("@/batches/{id}")]))
        }
        Some(Fault::GzipAnswer) => {
            let mut answer = json_answer(StatusCode::CREATED, &batch);
            gzip(&mut answer, batch.to_string().as_bytes());
            answer
        }
        Some(Fault::ManyHeadersAnswer) => {
            let mut answer = json_answer(StatusCode::CREATED, &batch);
            let policy = header::HeaderValue::from_static("script-src 'self'");
            for _ in 0..120 {
                let name = header::CONTENT_SECURITY_POLICY_REPORT_ONLY;
                answer.headers_mut().append(name, policy.clone());
            }
            answer
        }
        Some(Fault::UnfinishedAnswer) => broken(batch.to_string().into()),
        Some(Fault::Stale) => {
            connection.reset_on_next_request();
            json_answer(StatusCode::CREATED, &batch)
        }
        _ => json_answer(StatusCode::CREATED, &batch),
    };
    if let Ok(location) = format!("{CATALOG}/batches/{id}").parse() {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    Ok(answer)
}

/// Checks a body against the documented schema `IngestBatch`.
fn ingest_batch(body: &[u8]) -> Result<Map<String, Value>, String> {
    let request = match serde_json::from_slice(body) {
        Ok(Value::Object(request)) => request,
        Ok(_) => return Err("The body must be a JSON object".to_owned()),
        Err(error) => return Err(format!("The body is not JSON: {error}")),
    };
    match request.get("datasetId") {
        Some(Value::String(id)) if !id.is_empty() => {}
        _ => return Err("datasetId is required".to_owned()),
    }
    for (name, value) in &request {
        let fits = match name.as_str() {
            "datasetId" | "externalId" => value.is_string(),
            "inputFormat" | "replay" | "tags" => value.is_object(),
            "enableErrorDiagnostics" => value.is_boolean(),
            "partialIngestionPercent" => value.is_number(),
            _ => return Err(format!("Unrecognized field {name}")),
        };
        if !fits {
            return Err(format!("{name} has a wrong type"));
        }
    }
    Ok(request)
}

/// A batch as the documentation shows it.
fn new_batch(headers: &HeaderMap, request: &Map<String, Value>) -> Value {
    let id = new_id().simple().to_string();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64);
    let header = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    // Catalog shows the id alone ("Create a dataset": "@/dataSets/{id}").
    let dataset = request["datasetId"].as_str().unwrap_or_default();
    let bare_dataset = dataset.strip_prefix("@/dataSets/").unwrap_or(dataset);
    let client = header("x-api-key");
    let mut tags = json!({
        "acp_producer": [client],
        "acp_stagePath": [format!("{client}/stage/{id}")],
        "use_plan_b_batch_status": ["false"],
    });
    if let (Some(tags), Some(Value::Object(own))) = (tags.as_object_mut(), request.get("tags")) {
        tags.extend(own.clone());
    }
    let mut batch = json!({
        "id": id,
        "imsOrg": header("x-gw-ims-org-id"),
        "updated": now,
        "status": "loading",
        "created": now,
        "relatedObjects": [{ "type": "dataSet", "id": bare_dataset }],
        "version": "1.0.0",
        "tags": tags,
        "createdUser": "simulator@AdobeID",
        "updatedUser": "simulator@AdobeID",
        "externalId": request.get("externalId").cloned().unwrap_or_else(|| id.clone().into()),
        "createdClient": client,
        "inputFormat": { "format": "parquet" },
    });
    for name in ["inputFormat", "replay"] {
        if let Some(value) = request.get(name) {
            batch[name] = value.clone();
        }
    }
    batch
}

/// `GET /batches` with its filters, and `GET /batches/{id}`, also with several
/// ids: a map by id.
fn catalog(state: &State, method: &Method, path: &str, uri: &http::Uri) -> Answer {
    if method != Method::GET {
        return problem(StatusCode::METHOD_NOT_ALLOWED, "Only GET is simulated");
    }
    let Ok(mut url) = Url::parse("http://simulator").and_then(|base| base.join(&uri.to_string()))
    else {
        return problem(StatusCode::BAD_REQUEST, "The URL is bad");
    };
    let ids = match path.strip_prefix("/batches") {
        Some("") => None,
        Some(rest) => Some(rest.trim_start_matches('/')),
        None => return problem(StatusCode::NOT_FOUND, "No such resource"),
    };
    if let Some(ids) = ids {
        url.query_pairs_mut().append_pair("batch", ids);
    }
    let query = match Query::of(&url) {
        Ok(query) => query,
        Err(detail) => return problem(StatusCode::BAD_REQUEST, &detail),
    };
    let mut memory = state.memory();
    if let Some(status) = memory.next_look_ups.pop_front() {
        return api_error(status);
    }
    let visible = memory.ledger.visible(query.external_id());
    let found = query.answer(visible.into_iter());
    if ids.is_some() && found == "{}" {
        return problem(StatusCode::NOT_FOUND, "The batch is not found");
    }
    full(StatusCode::OK, "application/json", found)
}

/// The API's own error for a status, in the shape that it is documented in.
fn api_error(status: StatusCode) -> Answer {
    let Some((code, message)) = words(status) else {
        return problem(status, "The simulator was told to say so");
    };
    let body = json!({ "error_code": code, "message": message });
    let mut answer = json_answer(status, &body);
    if status == StatusCode::TOO_MANY_REQUESTS {
        let seconds = header::HeaderValue::from_static("2");
        answer.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    answer
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

fn problem(status: StatusCode, detail: &str) -> Answer {
    let title = status.canonical_reason().unwrap_or("Error");
    let title = title.replace(' ', "") + "Error";
    let body = json!({
        "type": "/placeholder/type/uri",
        "status": status.as_u16(),
        "title": title,
        "detail": detail,
    });
    json_answer(status, &body)
}

fn json_answer(status: StatusCode, body: &Value) -> Answer {
    full(status, "application/json", body.to_string())
}

fn html(status: StatusCode) -> Answer {
    let body = format!("<html><body><h1>{status}</h1></body></html>\n");
    full(status, "text/html", body)
}

fn empty(status: StatusCode) -> Answer {
    full(status, "application/json", String::new())
}

fn full(status: StatusCode, media_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(whole(body.as_bytes()));
    *answer.status_mut() = status;
    let media_type = header::HeaderValue::from_static(media_type);
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    let id = new_id().to_string();
    if let Ok(id) = id.parse() {
        answer.headers_mut().insert("x-request-id", id);
    }
    answer
}

/// What somebody in between answers, without any header of the API's.
fn between(form: &Intermediary) -> Answer {
    form.answer().map(|body| whole(body.as_bytes()))
}

/// The API's own error, in bytes that are hard to read.
fn garbled(garbling: Garbling, status: StatusCode) -> Answer {
    let (code, message) = words(status).unwrap_or(("400000", "The simulator was told to say so"));
    let text = |message: &str, more: &str| {
        format!(r#"{{"error_code":"{code}","message":"{message}"{more}}}"#)
    };
    let mut answer = api_error(status);
    let body = match garbling {
        Garbling::Gzip => {
            gzip(&mut answer, text(message, "").as_bytes());
            return answer;
        }
        Garbling::ByteOrderMark => format!("\u{feff}{}", text(message, "")).into_bytes(),
        Garbling::Latin1 => {
            let text = text("L'acc\u{e8}s n'est pas autoris\u{e9}", "");
            text.chars().map(|c| c as u8).collect()
        }
        Garbling::Surrogate => text(&format!(r"{message} \ud83d"), "").into_bytes(),
        Garbling::Overflow => text(message, r#","retryable":1e999"#).into_bytes(),
    };
    *answer.body_mut() = whole(&body);
    answer
}

fn gzip(answer: &mut Answer, body: &[u8]) {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing to memory does not fail.
    if let Ok(body) = encoder.write_all(body).and_then(|()| encoder.finish()) {
        *answer.body_mut() = whole(&body);
    }
    let encoding = header::HeaderValue::from_static("gzip");
    (answer.headers_mut()).insert(header::CONTENT_ENCODING, encoding);
}

fn whole(body: &[u8]) -> BoxBody<Bytes, io::Error> {
    let body = Full::new(Bytes::copy_from_slice(body));
    body.map_err(|never| match never {}).boxed()
}

/// An answer that breaks off in its middle.
fn half(batch: &Value) -> Answer {
    let text = Bytes::from(batch.to_string());
    let length = text.len();
    let mut answer = broken(text.slice(..length / 2));
    (answer.headers_mut()).insert(header::CONTENT_LENGTH, length.into());
    answer
}

/// An answer of unknown length that does not end as it should.
fn broken(body: Bytes) -> Answer {
    let frames = tokio_stream::iter([Some(body), None]).then(|frame| async {
        match frame {
            Some(bytes) => Ok(Frame::data(bytes)),
            None => {
                // What went before must have left, or the whole answer is lost.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            }
        }
    });
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    *answer.status_mut() = StatusCode::CREATED;
    answer
}
