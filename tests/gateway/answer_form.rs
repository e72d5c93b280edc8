//! The form of an answer decides who may retry the call.

use std::time::Duration;

use aep_simulator::Fault;
use tonic::Code;

use crate::support::{Gateway, RawAnswer, simulator};

/// Whether the client was made to stay while the API was still at work.
fn came_early(answer: &RawAnswer) -> bool {
    answer.headers_after + Duration::from_millis(150) < answer.ended_after
}

#[tokio::test]
async fn a_call_that_was_sent_and_takes_its_time_gets_its_headers_early() {
    let upstream = simulator().await;
    let flags = ["--request-timeout=800ms"];
    let gateway = Gateway::before(&upstream, &flags).await;

    upstream.inject(Fault::Delay(Duration::from_millis(500)));
    let answer = gateway.raw(&[("x-request-id", "mine")]).await;
    assert!(came_early(&answer), "{answer:?}");
    assert_eq!(answer.code(), Code::Ok);
    assert_eq!(answer.headers["content-type"], "application/grpc");
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert_eq!(answer.outcome(), "APPLIED");
    assert!(!answer.message.is_empty());
    assert_eq!(answer.told_twice(), [""; 0]);

    upstream.inject(Fault::TimeoutAfter);
    let answer = gateway.raw(&[("x-request-id", "mine")]).await;
    assert!(came_early(&answer), "{answer:?}");
    assert_eq!(answer.reason(), "UPSTREAM_TIMEOUT");
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert_eq!(answer.told_twice(), [""; 0]);

    let (_, metrics) = gateway.page("/metrics").await;
    for line in [
        r#"grpc_method="CreateBatch",grpc_code="OK"} 1"#,
        r#"grpc_method="CreateBatch",grpc_code="Unknown"} 1"#,
        "aep_gateway_calls_in_flight 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_call_that_was_not_sent_may_still_be_retried() {
    // The upstream takes the connection, but no TLS handshake ends.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start(&url, &["--connect-timeout=400ms"]).await;
    let answer = gateway.raw(&[]).await;
    assert!(answer.ended_after > Duration::from_millis(300));
    assert!(answer.trailers_only);
    assert_eq!(answer.reason(), "UPSTREAM_CONNECT_TIMEOUT");
}

#[tokio::test]
async fn no_answer_says_that_it_has_no_body_and_then_sends_trailers() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    upstream.inject(Fault::ResetAfter);
    let answer = gateway.raw(&[]).await;
    assert!(!answer.trailers_only);
    assert!(!answer.headers.contains_key("content-length"));
}
