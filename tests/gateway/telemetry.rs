//! What operators see: one line for each call, traces, metrics, log levels.

use std::time::{Duration, Instant};

use aep_simulator::Fault;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use prost::Message;
use serde_json::Value;
use tokio::{net::TcpListener, time::timeout};
use tonic::Code;

use crate::support::{
    CREATE, CREDENTIALS, Client, Collector, Gateway, Scripted, Step, attribute, frame, request,
    simulator, with_id,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const TRACEPARENT: (&str, &str) = (
    "traceparent",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
);

const CREATED: &str = r#"{"id":"b1","status":"loading"}"#;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A header of a request, as it stood on the wire.
fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    request
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The access line of the call with this request id.
async fn line(gateway: &Gateway, request_id: &str) -> Value {
    let quoted = format!(r#""request_id":"{request_id}""#);
    gateway.logs(&quoted).await;
    let log = gateway.log();
    let lines = log.lines().filter(|line| line.contains(&quoted));
    let lines: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line["target"] == "access")
        .collect();
    assert_eq!(lines.len(), 1, "{log}");
    lines[0].clone()
}

#[tokio::test]
async fn every_call_has_one_line_however_it_ends() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;

    let answer = gateway
        .raw_with_id("e", &[("x-request-id", "good"), TRACEPARENT])
        .await;
    assert_eq!(answer.code(), Code::Ok);
    let good = line(&gateway, "good").await;
    for (field, value) in [
        ("level", "INFO"),
        ("method", "CreateBatch"),
        ("code", "OK"),
        ("outcome", "APPLIED"),
        ("reason", "CREATED"),
        ("batch_id", upstream.batches()[0]["id"].as_str().unwrap()),
        ("trace_id", TRACE),
    ] {
        assert_eq!(good[field], value, "{field}");
    }
    assert_eq!(good["upstream_requests"], 2); // a lookup and a create
    let (all, upstream_part) = (&good["milliseconds"], &good["upstream_milliseconds"]);
    assert!(all.as_f64() >= upstream_part.as_f64(), "{good}");
    assert!(upstream_part.as_f64() > Some(0.0), "{good}");

    upstream.inject("status-429".parse::<aep_simulator::Injection>().unwrap());
    gateway.raw(&[("x-request-id", "refused")]).await;
    let refused = line(&gateway, "refused").await;
    assert_eq!(refused["level"], "WARN");
    assert_eq!(refused["code"], "RESOURCE_EXHAUSTED");
    assert_eq!(refused["outcome"], "NOT_APPLIED");
    assert_eq!(refused["reason"], "API_RATE_LIMITED");
    assert_eq!(refused["http_status"], 429);

    // The server refuses this one before the service sees it.
    let metadata = [("x-request-id", "garbage")];
    gateway.raw_call(CREATE, &metadata, b"garbage").await;
    let garbage = line(&gateway, "garbage").await;
    assert_eq!(garbage["reason"], "INVALID_FRAMING");
    assert_eq!(garbage["upstream_requests"], 0);

    upstream.inject(Fault::TimeoutAfter);
    let metadata = [&CREDENTIALS[..], &[("x-request-id", "left")]].concat();
    let body = frame(&request());
    let left = gateway.raw_call(CREATE, &metadata, &body);
    assert!(timeout(Duration::from_millis(300), left).await.is_err());
    let left = line(&gateway, "left").await;
    assert_eq!(left["code"], "CANCELLED");
    assert!(left.get("outcome").is_none(), "{left}");
}

#[tokio::test]
async fn no_secret_is_logged_at_any_level() {
    for http in ["1", "2"] {
        let upstream = simulator().await;
        let version = format!("--upstream-http={http}");
        let flags = [version.as_str(), "--log-level=trace"];
        let gateway = Gateway::before(&upstream, &flags).await;
        let answer = gateway.raw_with_id("e", &[("x-request-id", "one")]).await;
        assert_eq!(answer.code(), Code::Ok);
        gateway.raw(&[("authorization", "Bearer s3cret-too")]).await;
        gateway.logs(r#""request_id":"one""#).await;
        let log = gateway.log();
        assert!(log.contains("TRACE"), "{log}");
        assert!(!log.contains("s3cret"), "HTTP/{http}");
    }
}

#[tokio::test]
async fn the_log_level_can_be_changed() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    assert_eq!(gateway.page("/log-level").await, (200, "info\n".to_owned()));

    let url = format!("http://{}/log-level", gateway.admin);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let put = async |filter: &str| {
        let answer = client.put(&url).body(filter.to_owned()).send();
        let answer = answer.await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(put("info,access=off\n").await.0, 200);
    gateway.create(request()).await.unwrap();
    gateway
        .counts(
            r#"aep_gateway_outcomes_total{grpc_method="CreateBatch",outcome="APPLIED",reason="CREATED"}"#,
            "1",
        )
        .await;
    assert_eq!(put("debug").await, (200, "debug\n".to_owned()));
    gateway.raw(&[("x-request-id", "seen")]).await;
    line(&gateway, "seen").await;
    assert_eq!(gateway.log().matches("call ended").count(), 1);

    let (status, problem) = put("a=b=c").await;
    assert_eq!(status, 400, "{problem}");
    assert_eq!(put(&"x".repeat(5000)).await.0, 400);
    assert_eq!(gateway.page("/log-level").await.1, "debug\n");
}

#[tokio::test]
async fn a_trace_goes_from_the_caller_through_the_spans_to_the_api() {
    let upstream = Scripted::answering("201 Created", &[], CREATED).await;
    let collector = Collector::start().await;
    let gateway = traced(&upstream.url(), collector.url(), &[]).await;
    let state = ("tracestate", "mesh=1");
    let answer = gateway.raw(&[TRACEPARENT, state]).await;
    assert_eq!(answer.code(), Code::Ok);
    let sent = upstream.requests();
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");

    let spans = collector.spans();
    let [call, rest] = &spans[..] else {
        panic!("{spans:?}");
    };
    let (call, rest) = match call.kind() {
        SpanKind::Server => (call, rest),
        _ => (rest, call),
    };
    assert_eq!(collector.service(), "aep-batch-gateway");
    assert_eq!(call.name, "aep.ingestion.v1.BatchService/CreateBatch");
    assert_eq!(call.kind(), SpanKind::Server);
    assert_eq!(hex(&call.trace_id), TRACE);
    assert_eq!(hex(&call.parent_span_id), "00f067aa0ba902b7");
    assert_eq!(attribute(call, "rpc.response.status_code"), "OK");
    assert_eq!(attribute(call, "aep.outcome"), "APPLIED");
    assert_eq!(attribute(call, "aep.batch_id"), "b1");
    assert_eq!(rest.name, "POST /batches");
    assert_eq!(rest.kind(), SpanKind::Client);
    assert_eq!(rest.parent_span_id, call.span_id);
    assert_eq!(attribute(rest, "http.response.status_code"), "201");

    let parent = format!("00-{TRACE}-{}-01", hex(&rest.span_id));
    assert_eq!(header(&sent[0], "traceparent"), Some(&*parent));
    assert_eq!(header(&sent[0], "tracestate"), Some("mesh=1"));
}

async fn traced(upstream: &str, collector: &str, flags: &[&str]) -> Gateway {
    let mut arguments = vec![
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
    ];
    arguments.extend(["--upstream-url", upstream]);
    arguments.extend(flags);
    let mut command = Gateway::command(&arguments);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
    Gateway::spawn(command).await
}

#[tokio::test]
async fn failures_are_told_in_the_spans_and_what_is_not_sampled_is_not_sent() {
    let refusal = Step::answer("500 Internal Server Error", &[], "{}");
    let upstream = Scripted::start(vec![vec![Step::ReadRequest, refusal]]).await;
    let collector = Collector::start().await;
    let gateway = traced(&upstream.url(), collector.url(), &[]).await;
    let unsampled = TRACEPARENT.1.replace("-01", "-00");
    gateway.raw(&[("traceparent", &unsampled)]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.code(), Code::Unknown);
    let sent = upstream.requests();
    gateway.terminate();
    gateway.ended().await;

    assert!(header(&sent[0], "traceparent").unwrap().ends_with("-00"));
    let spans = collector.spans();
    assert_eq!(spans.len(), 2, "only the second call's");
    let is_error = |span: &Span| span.status.as_ref().unwrap().code() == StatusCode::Error;
    assert!(spans.iter().all(is_error), "{spans:?}");
    let rest = spans.iter().find(|span| span.kind() == SpanKind::Client);
    assert_eq!(attribute(rest.unwrap(), "error.type"), "500");
}

#[tokio::test]
async fn without_a_collector_traces_are_passed_on_as_they_came() {
    let b3 = [
        ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
        ("x-b3-spanid", "e457b5a2e4d86bd1"),
        ("x-b3-sampled", "1"),
    ];
    let upstream = Scripted::answering("201 Created", &[], CREATED).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    gateway.raw(&[TRACEPARENT]).await;
    gateway.raw(&b3).await;
    gateway.raw(&[("traceparent", "garbage")]).await;
    let sent = upstream.requests();
    assert_eq!(header(&sent[0], TRACEPARENT.0), Some(TRACEPARENT.1));
    for (name, value) in b3 {
        assert_eq!(header(&sent[1], name), Some(value));
        assert_eq!(header(&sent[0], name), None);
    }
    let w3c = "00-80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-01";
    assert_eq!(header(&sent[1], "traceparent"), Some(w3c));
    assert_eq!(header(&sent[2], "traceparent"), None);
}

#[tokio::test]
async fn a_collector_that_does_not_answer_holds_nothing_up() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector = format!("http://{}", silent.local_addr().unwrap());
    let upstream = simulator().await;
    let catalog = format!("--catalog-url={}", upstream.catalog_url());
    let gateway = traced(&upstream.import_url(), &collector, &[&catalog]).await;
    let stream = tokio::net::TcpStream::connect(&gateway.listen).await;
    let mut client = Client::over(stream.unwrap()).await.unwrap();
    for _ in 0..3000 {
        // More than the exporter's queue has room for.
        assert_eq!(client.create().await.unwrap().code(), Code::Ok);
    }
    drop(client);
    let begin = Instant::now();
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn spans_go_to_the_collector_and_nowhere_else() {
    let elsewhere = Scripted::answering("200 OK", &[], "").await;
    let url = elsewhere.url();
    let location = [("location", url.as_str())];
    let collector = Scripted::answering("307 Temporary Redirect", &location, "").await;
    let upstream = Scripted::answering("201 Created", &[], CREATED).await;
    let gateway = traced(&upstream.url(), &collector.url(), &[]).await;
    assert_eq!(gateway.raw(&[TRACEPARENT]).await.code(), Code::Ok);
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");
    assert_eq!(collector.requests().len(), 1);
    assert!(elsewhere.requests().is_empty());
}

#[tokio::test]
async fn bad_variables_are_refused() {
    let arguments = ["serve", "--listen=127.0.0.1:0"];
    for (variable, value) in [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "not a URL"),
    ] {
        let mut command = Gateway::command(&arguments);
        if variable == "OTEL_EXPORTER_OTLP_PROTOCOL" {
            command.env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
        }
        let output = command.env(variable, value).output();
        let output = timeout(Duration::from_secs(20), output)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{variable}");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains("OTEL_"), "{told}");
    }
}

/// The names and labels of every line of `/metrics`.
async fn series(gateway: &Gateway) -> Vec<String> {
    let (_, metrics) = gateway.page("/metrics").await;
    let lines = metrics.lines().filter(|line| !line.starts_with('#'));
    let mut series: Vec<_> = lines
        .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
        .collect();
    series.sort();
    series
}

#[tokio::test]
async fn callers_cannot_make_series() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let call = async |number: u32| {
        let mut message = with_id(&format!("e{number}"));
        message.dataset_id = format!("{number:024x}");
        let body = frame(&message);
        let (org, sandbox) = (format!("org{number}@AdobeOrg"), format!("s{number}"));
        let mut metadata = CREDENTIALS.to_vec();
        metadata[2].1 = &org;
        metadata[3].1 = &sandbox;
        gateway.raw_call(CREATE, &metadata, &body).await;
        let path = format!("/aep.ingestion.v1.BatchService/Method{number}");
        gateway.raw_call(&path, &metadata, &body).await;
        let path = format!("/some.Service{number}/Method");
        gateway.raw_call(&path, &metadata, &body).await;
    };
    call(0).await;
    let before = series(&gateway).await;
    for number in 1..50 {
        call(number).await;
    }
    assert_eq!(series(&gateway).await, before);
    assert_eq!(upstream.batches().len(), 50);
}

#[tokio::test]
async fn metrics_come_in_the_format_that_is_asked_for() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    gateway.raw(&[TRACEPARENT]).await;
    let sizes = "grpc_server_call_rcvd_total_compressed_message_size_bytes_count\
        {grpc_type=\"unary\",grpc_service=\"aep.ingestion.v1.BatchService\",grpc_method=\"CreateBatch\"}";
    gateway.counts(sizes, "1").await;
    let size = request().encoded_len() as f64;
    gateway
        .counts(&sizes.replace("_count", "_sum"), &format!("{size:?}"))
        .await;

    let url = format!("http://{}/metrics", gateway.admin);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async |accept: &str| {
        let answer = client.get(&url).header("accept", accept).send();
        let answer = answer.await.unwrap();
        let kind = answer.headers()["content-type"]
            .to_str()
            .unwrap()
            .to_owned();
        (kind, answer.text().await.unwrap())
    };
    let (kind, text) = get("application/openmetrics-text;version=1.0.0,*/*;q=0.1").await;
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    assert!(text.ends_with("# EOF\n"));
    let exemplar = format!("# {{trace_id=\"{TRACE}\"}}");
    assert!(text.contains(&exemplar), "{text}");
    let (kind, text) = get("*/*").await;
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    assert!(!text.contains("trace_id") && !text.contains("# EOF"));
    assert!(text.contains("# TYPE grpc_server_handled_total counter"));
}
