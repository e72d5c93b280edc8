//! The documented operations, and the control endpoints.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use url::Url;

use super::{
    Fault, Injection, Operation, Received, State,
    catalog::Query,
    new_id, remember,
    response::{NoResponse, Reply, Response, json_response, problem, respond},
    wire::Connection,
};

pub(super) const IMPORT: &str = "/data/foundation/import";
pub(super) const CATALOG: &str = "/data/foundation/catalog";

/// Where faults are injected, and the ledger is read and changed.
const CONTROL: &str = "/_simulator";

/// The tag by which a create names its own fault.
const FAULT_TAG: &str = "simulator/fault";

const LARGEST_REQUEST: usize = 1024 * 1024;

pub(super) async fn handle(
    state: Arc<State>,
    connection: Connection,
    request: Request<Incoming>,
) -> Result<Response, NoResponse> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, LARGEST_REQUEST).collect().await else {
        let detail = "The body is too large";
        return Ok(problem(StatusCode::PAYLOAD_TOO_LARGE, detail));
    };
    let body = body.to_bytes();
    let path = head.uri.path();
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
    let (resource, method) = match path.strip_prefix(CATALOG) {
        Some(path) => (path.strip_prefix("/batches"), Method::GET),
        None => (
            path.strip_prefix(IMPORT).filter(|path| *path == "/batches"),
            Method::POST,
        ),
    };
    match resource {
        None => Ok(problem(StatusCode::NOT_FOUND, "No such resource")),
        Some(_) if head.method != method => {
            let detail = format!("Only {method} is simulated");
            Ok(problem(StatusCode::METHOD_NOT_ALLOWED, &detail))
        }
        Some(_) if method == Method::POST => {
            create(&state, &connection, &head.headers, &body).await
        }
        Some(id) => read(&state, &connection, id.trim_start_matches('/'), &head.uri).await,
    }
}

/// `POST /_simulator/faults` injects faults, one name on each line; `GET` lists
/// all names, `DELETE` removes what was injected. `GET /_simulator/batches` is
/// the ledger, and `PATCH /_simulator/batches/{id}` changes a batch in it.
fn control(state: &State, method: &Method, path: &str, body: &[u8]) -> Response {
    let mut memory = state.memory();
    match (method.as_str(), path) {
        ("POST", "/faults") => {
            let text = String::from_utf8_lossy(body);
            let faults: Result<Vec<Injection>, _> =
                text.split_whitespace().map(str::parse).collect();
            match faults {
                Ok(faults) => memory.next_faults.extend(faults),
                Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
            }
            let waiting: Vec<_> = memory
                .next_faults
                .iter()
                .map(Injection::to_string)
                .collect();
            json_response(StatusCode::OK, &json!({ "waiting": waiting }))
        }
        ("GET", "/faults") => {
            let names: Vec<_> = Injection::names().collect();
            json_response(StatusCode::OK, &json!({ "names": names }))
        }
        ("DELETE", "/faults") => {
            memory.next_faults.clear();
            json_response(StatusCode::OK, &json!({ "waiting": [] }))
        }
        ("GET", "/batches") => {
            let batches = memory.ledger.all().cloned().collect();
            json_response(StatusCode::OK, &Value::Array(batches))
        }
        ("PATCH", path) if path.starts_with("/batches/") => {
            let id = path.trim_start_matches("/batches/");
            let Ok(changes @ Value::Object(_)) = serde_json::from_slice(body) else {
                return problem(StatusCode::BAD_REQUEST, "The body must be a JSON object");
            };
            match memory.ledger.patch(id, &changes) {
                Some(batch) => json_response(StatusCode::OK, batch),
                None => problem(StatusCode::NOT_FOUND, "The batch is not found"),
            }
        }
        _ => problem(
            StatusCode::NOT_FOUND,
            "There are POST, GET and DELETE /_simulator/faults, GET /_simulator/batches, and \
             PATCH /_simulator/batches/{id}",
        ),
    }
}

/// The errors of the API gateway ("Experience Platform troubleshooting guide:
/// Request header errors"). The token `expired` and the key `invalid` are
/// refused, so that a person can see what that looks like.
fn refuse_headers(headers: &HeaderMap) -> Option<Response> {
    let value = |name: &str| headers.get(name)?.to_str().ok();
    let refuse = |status: StatusCode, code: &str, message: &str| {
        let body = json!({ "error_code": code, "message": message });
        Some(json_response(status, &body))
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

/// `POST /batches`.
async fn create(
    state: &State,
    connection: &Connection,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Response, NoResponse> {
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
        None => state.next_fault(Operation::Create, body),
    };
    let latency = state.options.latency;
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    respond(state, connection, fault.as_ref(), || {
        let mut batch = new_batch(headers, &request);
        let visible = Instant::now() + state.options.catalog_lag;
        state.memory().ledger.add(visible, batch.clone());
        let id = batch["id"].as_str().unwrap_or_default().to_owned();
        edit(&mut batch, fault.as_ref());
        Reply {
            status: StatusCode::CREATED,
            body: match fault {
                Some(Fault::CatalogResponse) => json!([format!("@/batches/{id}")]).to_string(),
                _ => batch.to_string(),
            },
            location: Some(format!("{CATALOG}/batches/{id}")),
        }
    })
    .await
}

/// What a fault makes of a batch that is shown.
fn edit(batch: &mut Value, fault: Option<&Fault>) {
    match (fault, batch) {
        (Some(Fault::NoIdResponse), Value::Object(members)) => drop(members.remove("id")),
        (Some(Fault::HugeResponse), batch) => batch["padding"] = "x".repeat(1024 * 1024).into(),
        _ => {}
    }
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

/// Catalog's `GET /batches` with its filters, and `GET /batches/{id}`, also with
/// several ids: a map by id.
async fn read(
    state: &State,
    connection: &Connection,
    ids: &str,
    uri: &Uri,
) -> Result<Response, NoResponse> {
    let url = Url::parse("http://simulator").and_then(|base| base.join(&uri.to_string()));
    let Ok(url) = url else {
        return Ok(problem(StatusCode::BAD_REQUEST, "The URL is bad"));
    };
    let query = match Query::of(&url) {
        Ok(query) => query,
        Err(detail) => return Ok(problem(StatusCode::BAD_REQUEST, &detail)),
    };
    let operation = match ids {
        "" => Operation::List,
        _ => Operation::Get,
    };
    let fault = state.next_fault(operation, uri.to_string().as_bytes());
    respond(state, connection, fault.as_ref(), || {
        let ledger = &state.memory().ledger;
        let batches = match operation {
            Operation::Get => decoded(ids)
                .split(',')
                .filter_map(|id| ledger.with_id(id))
                .collect(),
            _ => ledger.visible(query.external_id()),
        };
        if operation == Operation::Get && batches.is_empty() && fault != Some(Fault::Empty) {
            return Reply::problem(StatusCode::NOT_FOUND, "The batch is not found");
        }
        Reply {
            status: StatusCode::OK,
            body: match fault {
                Some(Fault::Empty) => "{}".to_owned(),
                _ => query.response(batches.into_iter(), |batch| edit(batch, fault.as_ref())),
            },
            location: None,
        }
    })
    .await
}

/// A segment of a path without percent-encoding.
fn decoded(segment: &str) -> String {
    let escaped = segment.replace('+', "%2B").replace('&', "%26");
    let pairs = Url::parse(&format!("http://simulator?={escaped}"));
    let value = pairs
        .ok()
        .and_then(|url| Some(url.query_pairs().next()?.1.into_owned()));
    value.unwrap_or_default()
}
