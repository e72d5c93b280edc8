//! gRPC-Web: what a browser may ask and is told, over HTTP/1.1 and HTTP/2.

use std::time::{Duration, Instant};

use aep_batch_gateway::proto::v1::{CreateBatchRequest, CreateBatchResponse};
use aep_simulator::{Fault, Simulator};
use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Buf;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version};
use prost::Message;
use reqwest::{Client, Method, Response, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{
    Authority, CREATE, CREDENTIALS, Gateway, TlsFolder, frame, request, simulator,
};

const PAGE: &str = "https://app.example.com";
const WEB: &str = "--grpc-web";
const ORIGINS: &str = "--grpc-web-origins=https://app.example.com,http://localhost:3000";

fn http1() -> Client {
    Client::builder().no_proxy().build().unwrap()
}

fn http2() -> Client {
    let client = Client::builder().no_proxy().http2_prior_knowledge();
    client.build().unwrap()
}

/// An answer, taken apart as a browser's library does it.
#[derive(Debug)]
struct Answer {
    headers: HeaderMap,
    message: Option<CreateBatchResponse>,
    trailers: HeaderMap,
}

impl Answer {
    async fn of(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        let headers = response.headers().clone();
        let mut body = response.bytes().await.unwrap();
        if headers[header::CONTENT_TYPE] == "application/grpc-web-text+proto" {
            // Pieces of it may end with padding.
            let four = |four| BASE64_STANDARD.decode(four).unwrap();
            body = body.chunks(4).flat_map(four).collect();
        }
        let mut answer = Answer {
            headers,
            message: None,
            trailers: HeaderMap::new(),
        };
        while body.has_remaining() {
            let kind = body.get_u8();
            let length = body.get_u32() as usize;
            let content = body.split_to(length);
            assert!(answer.trailers.is_empty(), "trailers are the end");
            match kind {
                0 => answer.message = Some(Message::decode(content).unwrap()),
                0x80 => answer.trailers = trailers(std::str::from_utf8(&content).unwrap()),
                _ => panic!("a frame of kind {kind}"),
            }
        }
        let names = answer.trailers.keys_len();
        assert_eq!(names, answer.trailers.len(), "each once: {answer:?}");
        answer
    }

    fn status(&self) -> Status {
        Status::from_header_map(&self.trailers).expect("a grpc-status")
    }

    fn reason(&self) -> String {
        let info = self.status().get_details_error_info().expect("details");
        assert_eq!(info.metadata["outcome"], self.trailers["aep-batch-outcome"]);
        info.reason
    }
}

fn trailers(lines: &str) -> HeaderMap {
    lines
        .split_terminator("\r\n")
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            let name: HeaderName = name.parse().unwrap();
            (name, value.trim().parse::<HeaderValue>().unwrap())
        })
        .collect()
}

/// A call with good credentials, or with others of the same name.
async fn send(
    client: &Client,
    gateway: &Gateway,
    kind: &str,
    message: &CreateBatchRequest,
    more: &[(&'static str, &'static str)],
) -> Response {
    let mut body = frame(message);
    if kind.contains("-text") {
        body = BASE64_STANDARD.encode(body).into();
    }
    let url = format!("http://{}", gateway.listen);
    send_bytes(client, &url, kind, body, more).await
}

async fn send_bytes(
    client: &Client,
    url: &str,
    kind: &str,
    body: Vec<u8>,
    more: &[(&'static str, &'static str)],
) -> Response {
    let mut headers = HeaderMap::new();
    for (name, value) in CREDENTIALS.iter().chain(more) {
        headers.insert(*name, HeaderValue::from_static(value));
    }
    let call = client
        .post(format!("{url}{CREATE}"))
        .headers(headers)
        .header("content-type", kind)
        .header("x-grpc-web", "1")
        .body(body);
    timeout(Duration::from_secs(20), call.send())
        .await
        .unwrap()
        .unwrap()
}

async fn start(flags: &[&str]) -> (Simulator, Gateway) {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[&[WEB], flags].concat()).await;
    (upstream, gateway)
}

#[tokio::test]
async fn a_batch_in_every_form() {
    let (upstream, gateway) = start(&[]).await;
    let (binary, text) = (
        "application/grpc-web+proto",
        "application/grpc-web-text+proto",
    );
    for client in [http1(), http2()] {
        for (kind, told) in [
            ("application/grpc-web", binary),
            ("application/grpc-web+proto", binary),
            ("application/grpc-web+proto; charset=utf-8", binary),
            ("application/grpc-web-text", text),
            ("application/grpc-web-text+proto", text),
        ] {
            let more = [("x-request-id", "mine")];
            let answer = send(&client, &gateway, kind, &request(), &more).await;
            let answer = Answer::of(answer).await;
            assert_eq!(answer.headers["content-type"], told);
            assert_eq!(answer.headers["x-request-id"], "mine");
            assert_eq!(answer.trailers["aep-batch-outcome"], "APPLIED");
            assert!(!answer.headers.contains_key("aep-batch-outcome"), "once");
            assert_eq!(answer.status().code(), Code::Ok);
            let id = answer.message.unwrap().batch.unwrap().id;
            assert_eq!(upstream.batches().last().unwrap()["id"], id.as_str());
        }
    }
    // gRPC goes on as ever beside it.
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
}

#[tokio::test]
async fn a_batch_inside_tls() {
    let authority = Authority::new("web");
    let folder = TlsFolder::new("web", &authority.issue(&["localhost"]), &authority);
    let flags = folder.tls();
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let (_upstream, gateway) = start(&flags).await;
    let certificate = reqwest::Certificate::from_pem(authority.pem().as_bytes()).unwrap();
    let port = gateway.listen.rsplit(':').next().unwrap();
    let url = format!("https://localhost:{port}");
    let kind = "application/grpc-web";
    for (http1_only, version) in [(false, Version::HTTP_2), (true, Version::HTTP_11)] {
        let client = Client::builder()
            .no_proxy()
            .tls_certs_only([certificate.clone()]);
        let client = match http1_only {
            true => client.http1_only(),
            false => client, // what ALPN says
        };
        let client = client.build().unwrap();
        let answer = send_bytes(&client, &url, kind, frame(&request()), &[]).await;
        assert_eq!(answer.version(), version);
        assert_eq!(Answer::of(answer).await.status().code(), Code::Ok);
    }
}

#[tokio::test]
async fn every_failure_tells_its_details_in_trailers() {
    let (upstream, gateway) = start(&[]).await;
    for client in [http1(), http2()] {
        for kind in ["application/grpc-web+proto", "application/grpc-web-text"] {
            for (fault, more, code, reason, outcome) in [
                (
                    None,
                    &[("x-sandbox-name", "")][..],
                    Code::InvalidArgument,
                    "INVALID_REQUEST",
                    "NOT_APPLIED",
                ),
                (
                    Some(Fault::Status(StatusCode::NOT_FOUND)),
                    &[],
                    Code::NotFound,
                    "API_NOT_FOUND",
                    "NOT_APPLIED",
                ),
                (
                    Some(Fault::ResetAfter),
                    &[],
                    Code::Unknown,
                    "CONNECTION_LOST",
                    "UNKNOWN",
                ),
                (
                    // Long enough for headers to leave before the end.
                    Some(Fault::Delay(Duration::from_millis(600))),
                    &[("grpc-timeout", "300m")],
                    Code::DeadlineExceeded,
                    "DEADLINE_AFTER_SENDING",
                    "UNKNOWN",
                ),
            ] {
                fault.into_iter().for_each(|fault| upstream.inject(fault));
                let answer = send(&client, &gateway, kind, &request(), more).await;
                let answer = Answer::of(answer).await;
                assert_eq!(answer.status().code(), code);
                assert_eq!(answer.reason(), reason);
                assert_eq!(answer.trailers["aep-batch-outcome"], outcome);
                assert_eq!(answer.message, None);
                // Connect joins both, and would tell what stands in both twice.
                let told = |name| answer.headers.contains_key(name);
                assert!(!answer.trailers.keys().any(told), "{answer:?}");
                let id = HeaderName::from_static("x-request-id");
                assert!(told(&id) || answer.trailers.contains_key(&id), "{answer:?}");
            }
        }
    }
}

#[tokio::test]
async fn headers_come_before_a_slow_answer() {
    let (upstream, gateway) = start(&[]).await;
    for client in [http1(), http2()] {
        upstream.inject(Fault::Delay(Duration::from_secs(2)));
        let begin = Instant::now();
        let kind = "application/grpc-web+proto";
        let answer = send(&client, &gateway, kind, &request(), &[]).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "a browser stays");
        let answer = Answer::of(answer).await;
        assert!(begin.elapsed() > Duration::from_millis(1900));
        assert_eq!(answer.status().code(), Code::Ok);
        assert_eq!(answer.trailers["aep-batch-outcome"], "APPLIED");
        assert!(answer.message.is_some());
    }
}

#[tokio::test]
async fn what_is_too_large_or_no_message_is_refused() {
    let (upstream, gateway) = start(&[]).await;
    let large = frame(&CreateBatchRequest {
        dataset_id: "d".repeat(300 * 1024),
        ..request()
    });
    let mut promised = frame(&request());
    promised[1] = 0xff; // a length of 4 GB
    let text = |bytes: &[u8]| BASE64_STANDARD.encode(bytes).into_bytes();
    let (too_large, bad) = ("MESSAGE_TOO_LARGE", "INVALID_FRAMING");
    let url = format!("http://{}", gateway.listen);
    for client in [http1(), http2()] {
        for (kind, body, reason) in [
            ("application/grpc-web", large.clone(), too_large),
            ("application/grpc-web", promised.clone(), too_large),
            ("application/grpc-web", b"\0\0\0\0\x09short".to_vec(), bad),
            ("application/grpc-web-text", text(&large), too_large),
            ("application/grpc-web-text", text(&promised), too_large),
            ("application/grpc-web-text", b"no base64!".to_vec(), bad),
            ("application/grpc-web-text", text(b"\0\0\0\0\x09short"), bad),
            (
                "application/grpc-web-text",
                text(&frame(&request()))[1..].to_vec(),
                bad,
            ),
        ] {
            let shown = String::from_utf8_lossy(&body[..10]).into_owned();
            let answer = send_bytes(&client, &url, kind, body, &[]).await;
            let answer = Answer::of(answer).await;
            assert_eq!(answer.reason(), reason, "{kind} {shown}");
            assert_eq!(answer.trailers["aep-batch-outcome"], "NOT_APPLIED");
        }
    }
    assert!(upstream.received().is_empty());
}

/// What browsers ask before a page of another origin may call.
async fn preflight(client: &Client, gateway: &Gateway, origin: &'static str) -> Response {
    client
        .request(
            Method::OPTIONS,
            format!("http://{}{CREATE}", gateway.listen),
        )
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization,content-type,x-grpc-web",
        )
        .send()
        .await
        .unwrap()
}

fn has_cors(headers: &HeaderMap) -> bool {
    headers
        .keys()
        .any(|name| name.as_str().starts_with("access-control-"))
}

#[tokio::test]
async fn no_page_may_call_unless_its_origin_is_named() {
    let kind = "application/grpc-web";
    for (flags, strangers) in [
        (&[][..], &[PAGE, "null"][..]),
        (
            &[ORIGINS],
            &[
                "https://evil.example.com",
                "http://app.example.com",
                "https://app.example.com.evil",
                "null",
            ],
        ),
    ] {
        let (upstream, gateway) = start(flags).await;
        for client in [http1(), http2()] {
            let before = upstream.received().len();
            for &origin in strangers {
                let asked = preflight(&client, &gateway, origin).await;
                assert!(!asked.status().is_success(), "{origin}");
                assert!(!has_cors(asked.headers()), "{origin}");
                let answer = send(&client, &gateway, kind, &request(), &[("origin", origin)]).await;
                assert!(!has_cors(answer.headers()), "{origin}");
                assert_eq!(answer.status(), 403, "{origin}");
            }
            assert_eq!(upstream.received().len(), before);
            let answer = send(&client, &gateway, kind, &request(), &[]).await;
            assert!(!has_cors(answer.headers()));
            Answer::of(answer).await; // The headers come before anything is sent.
        }
    }
}

#[tokio::test]
async fn pages_of_named_origins_may_call() {
    let flags = [ORIGINS, "--forward-metadata=x-custom"];
    let (_upstream, gateway) = start(&flags).await;
    for client in [http1(), http2()] {
        for origin in [PAGE, "http://localhost:3000"] {
            let asked = preflight(&client, &gateway, origin).await;
            assert_eq!(asked.status(), 204);
            let headers = asked.headers();
            assert_eq!(headers["access-control-allow-origin"], origin);
            assert_eq!(headers["access-control-allow-methods"], "POST");
            assert_eq!(headers["vary"], "origin");
            assert!(!headers.contains_key("access-control-allow-credentials"));
            let allowed: Vec<_> = headers
                .get_all("access-control-allow-headers")
                .iter()
                .flat_map(|line| line.to_str().unwrap().split(", "))
                .collect();
            for (name, _) in CREDENTIALS {
                assert!(allowed.contains(&name), "{name}");
            }
            for name in [
                "content-type",
                "x-grpc-web",
                "x-user-agent",
                "grpc-timeout",
                "x-custom",
            ] {
                assert!(allowed.contains(&name), "{name}");
            }

            for (more, http) in [
                (&[("origin", origin)][..], 200),
                (&[("origin", origin), ("x-sandbox-name", "")], 200),
                (&[("origin", origin), ("content-type", "text/plain")], 415),
            ] {
                let kind = more.iter().find(|(name, _)| *name == "content-type");
                let kind = kind.map_or("application/grpc-web", |(_, kind)| kind);
                let more: Vec<_> = more
                    .iter()
                    .filter(|(name, _)| *name != "content-type")
                    .copied()
                    .collect();
                let answer = send(&client, &gateway, kind, &request(), &more).await;
                assert_eq!(answer.status(), http);
                let headers = answer.headers();
                assert_eq!(headers["access-control-allow-origin"], origin);
                assert_eq!(headers["vary"], "origin");
                let exposed = headers["access-control-expose-headers"].to_str().unwrap();
                for name in [
                    "grpc-status",
                    "grpc-message",
                    "grpc-status-details-bin",
                    "aep-batch-outcome",
                    "x-request-id",
                ] {
                    assert!(exposed.split(", ").any(|read| read == name), "{name}");
                }
            }
        }
    }
}

/// Those of the gateway's own origin, whatever a proxy made of its name.
#[tokio::test]
async fn own_pages_may_call() {
    let (_upstream, gateway) = start(&[]).await;
    let own = format!("http://{}", gateway.listen);
    let own: &'static str = own.leak();
    for client in [http1(), http2()] {
        for (more, status) in [
            (&[("origin", own)][..], 200),
            (&[("origin", own), ("sec-fetch-site", "same-origin")], 200),
            (&[("origin", PAGE), ("sec-fetch-site", "same-origin")], 200),
            (&[("origin", own), ("sec-fetch-site", "cross-site")], 403),
            (&[("origin", own), ("sec-fetch-site", "same-site")], 403),
        ] {
            let kind = "application/grpc-web";
            let answer = send(&client, &gateway, kind, &request(), more).await;
            assert_eq!(answer.status(), status, "{more:?}");
        }
    }
}

#[tokio::test]
async fn it_is_off_unless_it_is_switched_on() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for kind in ["application/grpc-web", "application/grpc-web-text"] {
        let answer = send(&http2(), &gateway, kind, &request(), &[]).await;
        assert_eq!(answer.status(), 415);
    }
    assert_eq!(preflight(&http2(), &gateway, PAGE).await.status(), 405);
    let url = format!("http://{}{CREATE}", gateway.listen);
    let answer = http1().post(url).send().await.unwrap();
    assert_eq!(answer.status(), 505);
    let told = answer.text().await.unwrap();
    assert!(
        told.contains("HTTP/2") && told.contains("--grpc-web"),
        "{told}"
    );
    assert!(upstream.received().is_empty());
}

#[tokio::test]
async fn http1_is_for_grpc_web_alone() {
    let (upstream, gateway) = start(&[]).await;
    for kind in [
        "application/grpc",
        "application/grpc+proto",
        "application/json",
        "text/plain",
    ] {
        let answer = send(&http1(), &gateway, kind, &request(), &[]).await;
        assert_eq!(answer.status(), 415, "{kind}");
        assert!(answer.text().await.unwrap().contains("gRPC-Web"), "{kind}");
    }
    let url = format!("http://{}{CREATE}", gateway.listen);
    let answer = http1().get(&url).send().await.unwrap();
    assert_eq!(answer.status(), 415);
    let answer = http1()
        .get(url)
        .header("content-type", "application/grpc-web");
    assert_eq!(answer.send().await.unwrap().status(), 405);
    assert!(upstream.received().is_empty());
}

/// The bytes of a call over HTTP/1.1.
fn http1_call() -> Vec<u8> {
    let body = frame(&request());
    let mut head = format!(
        "POST {CREATE} HTTP/1.1\r\nhost: gateway\r\ncontent-length: {}\r\n\
         content-type: application/grpc-web\r\n",
        body.len()
    );
    for (name, value) in CREDENTIALS {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    [head.as_bytes(), b"\r\n", &body].concat()
}

/// All that comes until the connection ends.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = timeout(Duration::from_secs(15), stream.read_to_end(&mut bytes));
    read.await.expect("the connection ends").unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn a_connection_that_stops_talking_is_closed() {
    let (_upstream, gateway) = start(&[]).await;
    let mut all = Vec::new();
    for begun in [
        "",
        "PRI * HTTP/2.0\r\n",
        "POST / HTTP/1.1\r\n",
        "POST / HTTP/1.1\r\nhost: gateway\r\nx: y",
    ] {
        let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        all.push(tokio::spawn(rest(stream)));
    }
    for stream in all {
        assert_eq!(stream.await.unwrap(), "");
    }
}

#[tokio::test]
async fn an_old_connection_ends_after_its_call() {
    let (upstream, gateway) = start(&["--max-connection-age=300ms"]).await;
    let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
    upstream.inject(Fault::Delay(Duration::from_secs(1)));
    let begin = Instant::now();
    stream.write_all(&http1_call()).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.contains("grpc-status:0"), "{answer}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn an_http1_connection_serves_one_call() {
    let (upstream, gateway) = start(&[]).await;
    let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let begin = Instant::now();
    let twice = http1_call().repeat(2);
    stream.write_all(&twice).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.contains("connection: close"), "{answer}");
    assert_eq!(answer.matches("grpc-status:0").count(), 1, "{answer}");
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn a_drain_lets_calls_finish_and_silent_connections_go() {
    let (upstream, gateway) = start(&[]).await;
    let silent = TcpStream::connect(&gateway.listen).await.unwrap();
    upstream.inject(Fault::Delay(Duration::from_millis(800)));
    let mut busy = TcpStream::connect(&gateway.listen).await.unwrap();
    busy.write_all(&http1_call()).await.unwrap();
    while upstream.received().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let begin = Instant::now();
    gateway.terminate();
    let answer = rest(busy).await;
    assert!(answer.contains("grpc-status:0"), "{answer}");
    rest(silent).await;
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "nobody was waited for"
    );
    assert!(!log.contains("drain timeout"), "{log}");
}

#[tokio::test]
async fn a_batch_whose_caller_left_is_in_the_log() {
    let (upstream, gateway) = start(&[]).await;
    upstream.inject(Fault::Delay(Duration::from_millis(500)));
    let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
    stream.write_all(&http1_call()).await.unwrap();
    while upstream.received().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(stream);
    gateway
        .logs("create completed after the client disconnected")
        .await;
    let id = upstream.batches()[0]["id"].as_str().unwrap().to_owned();
    gateway.logs(&id).await;
}
