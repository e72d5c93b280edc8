//! What is told of a create is never false, whoever answers it with whatever.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use aep_batch_gateway::proto::v1::{CreateBatchRequest, CreateBatchResponse, TagValues};
use aep_simulator::{Fault, Operation, SimulatorOptions};
use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use prost::Message;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::support::{
    CREATE, CREDENTIALS, Client, Gateway, RawAnswer, frame, request, simulator_with,
};

/// What stands in the body of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Body {
    Empty,
    Html,
    /// The API's own error, in the shape that is documented for the status.
    ApiError,
    /// A problem document of somebody else.
    Problem,
    Batch,
    /// The beginning of a batch, with its id.
    CutAfterId,
    /// The beginning of a batch, without its id.
    CutBeforeId,
}

const BODIES: [Body; 7] = [
    Body::Empty,
    Body::Html,
    Body::ApiError,
    Body::Problem,
    Body::Batch,
    Body::CutAfterId,
    Body::CutBeforeId,
];

/// One way to answer a create.
#[derive(Clone, Copy, Debug)]
struct Case {
    status: u16,
    body: Body,
    /// Whether the batch exists when the answer is given.
    processed: bool,
}

/// Said only before a request is processed, by whoever says it.
const REFUSED_BEFORE_PROCESSING: [u16; 23] = [
    307, 308, // sent elsewhere
    400, 411, 413, 414, 415, 417, 422, 431, // cannot be read
    401, 402, 407, 511, // pay or say who you are
    404, 405, 410, 421, 426, 428, 501, 505, // not here, not so
    429, // later
];

impl Case {
    /// Whether an answer like this can be met. The rest contradicts what a
    /// status or a body is proof of.
    fn is_possible(self) -> bool {
        let Case {
            status,
            body,
            processed,
        } = self;
        let has_no_body = matches!(status, 204 | 205 | 304);
        let shows_batch = matches!(body, Body::Batch | Body::CutAfterId);
        let impossible = if has_no_body && body != Body::Empty {
            true // HTTP itself
        } else if processed {
            // The API says of itself that it refused: 403, 409 and 412; and its
            // gateway's 503 is written before the backend is called.
            REFUSED_BEFORE_PROCESSING.contains(&status)
                || (body == Body::ApiError && matches!(status, 403 | 409 | 412 | 503))
        } else {
            // Nobody but the API shows a batch, or says 201.
            status == 201 || ((200..300).contains(&status) && shows_batch)
        };
        !impossible
    }

    fn text(self, id: &str) -> String {
        let Case { status, body, .. } = self;
        let coded = |code: &str, message: &str| json!({ "error_code": code, "message": message });
        let batch = format!(r#"{{"imsOrg":"x","id":"{id}","status":"loading","created":1}}"#);
        match body {
            Body::Empty => String::new(),
            Body::Html => format!("<html><body><h1>{status}</h1></body></html>"),
            Body::ApiError => match status {
                401 => coded("401013", "Oauth token is not valid").to_string(),
                403 => coded("403010", "Oauth token is missing.").to_string(),
                429 => coded("429001", "Service usage limit reached").to_string(),
                503 => coded("503010", "Could not validate the oauth token").to_string(),
                _ => json!({
                    "type": "/placeholder/type/uri",
                    "status": status,
                    "title": "Error",
                    "detail": "The API says so",
                })
                .to_string(),
            },
            Body::Problem => json!({
                "type": "https://problems.cdn.invalid/origin",
                "status": status,
                "title": "Error",
                "instance": "15.5e2a1702",
            })
            .to_string(),
            Body::Batch => batch,
            Body::CutAfterId => batch[..batch.len() - 20].to_owned(),
            Body::CutBeforeId => batch[..8].to_owned(),
        }
    }
}

/// An API that answers each create as its number says, and shows in Catalog
/// what it made.
struct Answers {
    address: SocketAddr,
    /// The ids that were made, by the number of the case.
    ledger: Arc<Mutex<HashMap<usize, Vec<String>>>>,
}

impl Answers {
    async fn start(cases: Vec<Case>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ledger = Arc::new(Mutex::new(HashMap::new()));
        let (cases, shared) = (Arc::new(cases), ledger.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (cases, ledger) = (cases.clone(), shared.clone());
                let service = hyper::service::service_fn(move |request| {
                    answer(request, cases.clone(), ledger.clone())
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        Answers { address, ledger }
    }
}

async fn answer(
    request: Request<Incoming>,
    cases: Arc<Vec<Case>>,
    ledger: Arc<Mutex<HashMap<usize, Vec<String>>>>,
) -> Result<Response<BoxBody<Bytes, io::Error>>, Infallible> {
    let (head, body) = request.into_parts();
    let whole = |status: u16, text: String| {
        let body = http_body_util::Full::new(Bytes::from(text));
        let body = body.map_err(|never| match never {}).boxed();
        Response::builder().status(status).body(body).unwrap()
    };
    if head.method == Method::GET {
        let query = head.uri.query().unwrap_or_default();
        let asked = query.split('&').find_map(|pair| {
            let (_, number) = pair.split_once("case-")?;
            number.parse::<usize>().ok()
        });
        let number = asked.unwrap();
        let ledger = ledger.lock().unwrap();
        let made = ledger.get(&number).into_iter().flatten();
        let external_id = format!("case-{number}");
        let batches = made.map(|id| (id.clone(), json!({ "externalId": external_id })));
        let batches: serde_json::Map<String, Value> = batches.collect();
        return Ok(whole(200, Value::Object(batches).to_string()));
    }
    let body = body.collect().await.unwrap().to_bytes();
    let message: Value = serde_json::from_slice(&body).unwrap();
    let number = message["tags"]["case"][0].as_str().unwrap();
    let number: usize = number.parse().unwrap();
    let case = cases[number];
    let id = format!("{number:032}");
    if case.processed {
        let mut ledger = ledger.lock().unwrap();
        ledger.entry(number).or_default().push(id.clone());
    }
    let text = case.text(&id);
    let mut answer = match case.body {
        Body::CutAfterId | Body::CutBeforeId => {
            let frames = tokio_stream::iter([Some(Bytes::from(text)), None]);
            let cut = StreamBody::new(frames.then(async |beginning| {
                if beginning.is_none() {
                    // What went before must have left, or the whole answer is lost.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let beginning = beginning.ok_or(io::ErrorKind::ConnectionReset)?;
                Ok(Frame::data(beginning))
            }));
            let answer = Response::builder().status(case.status);
            answer
                .header(header::CONTENT_LENGTH, 500)
                .body(cut.boxed())
                .unwrap()
        }
        _ => whole(case.status, text),
    };
    let media_type = match case.body {
        Body::Html => "text/html",
        Body::Problem => "application/problem+json",
        _ => "application/json",
    };
    let media_type = header::HeaderValue::from_static(media_type);
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    Ok(answer)
}

/// What is false in what was told; `None` if nothing is.
fn lie(answer: &RawAnswer, made: &[String]) -> Option<&'static str> {
    if made.len() > 1 {
        return Some("two batches");
    }
    let retried = answer.trailers_only && answer.code() == Code::Unavailable;
    match answer.code() {
        Code::Ok => {
            let message = CreateBatchResponse::decode(&answer.message[5..]).unwrap();
            let id = message.batch.unwrap().id;
            (!made.contains(&id)).then_some("OK, but that batch was not made")
        }
        _ => match answer.outcome() {
            "NOT_APPLIED" => (!made.is_empty()).then_some("NOT_APPLIED, but it was made"),
            "APPLIED" if made.is_empty() => Some("APPLIED, but it was not made"),
            "APPLIED" | "UNKNOWN" => retried.then_some("a mesh would send it again"),
            _ => Some("no outcome"),
        },
    }
}

/// With an external id every batch can be found, and so be told.
fn unsettled(answer: &RawAnswer, made: &[String], with_id: bool) -> Option<&'static str> {
    let is_untold = with_id && !made.is_empty() && answer.code() != Code::Ok;
    is_untold.then_some("its batch is not told")
}

/// Makes one call for each message, 400 at a time.
async fn call_all(gateway: &Gateway, messages: Vec<CreateBatchRequest>) -> Vec<RawAnswer> {
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let client = Client::over(stream).await.unwrap();
    let at_a_time = Arc::new(Semaphore::new(400));
    let mut calls = JoinSet::new();
    for (number, message) in messages.into_iter().enumerate() {
        let (mut client, at_a_time) = (client.clone(), at_a_time.clone());
        calls.spawn(async move {
            let _permit = at_a_time.acquire().await.unwrap();
            let answer = client.call(CREATE, &CREDENTIALS, &frame(&message)).await;
            (number, answer.unwrap())
        });
    }
    let mut answers = calls.join_all().await;
    answers.sort_by_key(|(number, _)| *number);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

fn message(number: usize, tag: &str, with_id: bool) -> CreateBatchRequest {
    let values = vec![number.to_string()];
    CreateBatchRequest {
        external_id: with_id.then(|| format!("case-{number}")),
        tags: [(tag.to_owned(), TagValues { values })].into(),
        ..request()
    }
}

fn cases(statuses: impl IntoIterator<Item = u16>) -> Vec<Case> {
    let mut cases = Vec::new();
    for status in statuses {
        for body in BODIES {
            for processed in [false, true] {
                let case = Case {
                    status,
                    body,
                    processed,
                };
                cases.extend(case.is_possible().then_some(case));
            }
        }
    }
    cases
}

/// Makes a call for each case; how often what was told.
async fn told(cases: Vec<Case>, with_id: bool, request_timeout: &str) -> BTreeMap<String, u32> {
    let api = Answers::start(cases.clone()).await;
    let url = |name: &str| format!("http://{}/data/foundation/{name}", api.address);
    let catalog = format!("--catalog-url={}", url("catalog"));
    let timeout = format!("--request-timeout={request_timeout}");
    let flags = [&catalog, &timeout, "--log-level=error"];
    let gateway = Gateway::start(&url("import"), &flags).await;
    let messages = (0..cases.len()).map(|number| message(number, "case", with_id));
    let answers = call_all(&gateway, messages.collect()).await;

    let ledger = api.ledger.lock().unwrap();
    let mut told: BTreeMap<String, u32> = BTreeMap::new();
    let mut lies = Vec::new();
    for (number, (case, answer)) in cases.iter().zip(&answers).enumerate() {
        let made = ledger.get(&number).map_or(&[][..], Vec::as_slice);
        let lie = lie(answer, made).or(unsettled(answer, made, with_id));
        lies.extend(lie.map(|lie| format!("{case:?}: {lie}")));
        let name = match answer.code() {
            Code::Ok => "OK",
            _ => answer.outcome(),
        };
        *told.entry(name.to_owned()).or_default() += 1;
    }
    let first = &lies[..lies.len().min(20)];
    assert!(lies.is_empty(), "{} lies: {first:#?}", lies.len());
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn no_status_with_any_body_makes_it_lie() {
    let told = told(cases(200..600), false, "20s").await;
    // To say UNKNOWN to everything would be no lie either.
    assert!(told["OK"] >= 90 && told["NOT_APPLIED"] >= 150, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_an_external_id_every_batch_is_told() {
    // Unknown outcomes take their time here, so these are some of each kind.
    let statuses = [
        200, 201, 202, 204, 302, 303, 307, 400, 401, 403, 408, 409, 412, 429, 444, 499, 500, 502,
        503, 504, 520, 599,
    ];
    let told = told(cases(statuses), true, "2s").await;
    assert!(told["OK"] >= 100 && told["NOT_APPLIED"] >= 30, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_that_has_a_name_makes_it_lie() {
    let names = Fault::names(Operation::Create).flat_map(|name| {
        let statuses: &[&str] = match name.contains("NNN") {
            true => &[
                "400", "403", "408", "409", "429", "500", "502", "503", "504",
            ],
            false => &[""],
        };
        let name = name.replace("MILLISECONDS", "20");
        statuses
            .iter()
            .map(move |status| name.replace("NNN", status))
    });
    // Whoever says these two has not passed the request on.
    let names: Vec<_> = names
        .filter(|name| !["lost-400", "lost-429"].contains(&&**name))
        .collect();
    for with_id in [false, true] {
        let upstream = simulator_with(SimulatorOptions {
            catalog_lag: Duration::from_millis(100),
            ..Default::default()
        })
        .await;
        // A reset of an HTTP/2 connection would hit all calls.
        let flags = [
            "--request-timeout=2s",
            "--upstream-http=1",
            "--log-level=error",
        ];
        let gateway = Gateway::before(&upstream, &flags).await;
        let messages = names.iter().enumerate().map(|(number, name)| {
            let mut message = message(number, "call", with_id);
            let values = vec![name.clone()];
            let tag = "simulator/fault".to_owned();
            message.tags.insert(tag, TagValues { values });
            message
        });
        let answers = call_all(&gateway, messages.collect()).await;

        let mut ledger: HashMap<String, Vec<String>> = HashMap::new();
        for batch in upstream.batches() {
            let call = batch["tags"]["call"][0].as_str().unwrap().to_owned();
            let id = batch["id"].as_str().unwrap().to_owned();
            ledger.entry(call).or_default().push(id);
        }
        let mut lies = Vec::new();
        for (number, (name, answer)) in names.iter().zip(&answers).enumerate() {
            let made = ledger.get(&number.to_string());
            let made = made.map_or(&[][..], Vec::as_slice);
            let lie = lie(answer, made).or(unsettled(answer, made, with_id));
            lies.extend(lie.map(|lie| format!("{name}: {lie}")));
        }
        assert!(
            lies.is_empty(),
            "with_id {with_id}, {} lies: {lies:#?}",
            lies.len()
        );
        assert!(ledger.len() > 70 && answers.len() - ledger.len() > 70);
    }
}
