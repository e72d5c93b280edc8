//! Deadlines, callers who leave, and too many calls at once.

use std::time::{Duration, Instant};

use aep_batch_gateway::proto::v1::batch_service_client::BatchServiceClient;
use aep_simulator::Fault;
use tokio::time::timeout;
use tonic::Code;

use crate::support::{Gateway, Scripted, Step, request, simulator};

#[tokio::test]
async fn a_deadline_after_sending_is_told_as_such_every_time() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    for _ in 0..20 {
        upstream.inject(Fault::Delay(Duration::from_millis(300)));
        let answer = gateway.raw(&[("grpc-timeout", "50m")]).await;
        assert_eq!(answer.code(), Code::DeadlineExceeded);
        assert_eq!(answer.reason(), "DEADLINE_AFTER_SENDING");
        assert_eq!(answer.outcome(), "UNKNOWN");
        assert!(!answer.trailers_only);
    }
}

#[tokio::test]
async fn what_envoy_will_wait_is_a_deadline_too() {
    const ENVOY: &str = "x-envoy-expected-rq-timeout-ms";
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    for (metadata, code) in [
        (&[(ENVOY, "50")][..], Code::DeadlineExceeded),
        (
            &[(ENVOY, "50"), ("grpc-timeout", "9S")],
            Code::DeadlineExceeded,
        ),
        (
            &[(ENVOY, "9000"), ("grpc-timeout", "50m")],
            Code::DeadlineExceeded,
        ),
        (&[(ENVOY, "9000")], Code::Ok),
        (&[(ENVOY, "0")], Code::Ok),
        (&[(ENVOY, "soon")], Code::Ok),
    ] {
        upstream.inject(Fault::Delay(Duration::from_millis(300)));
        let answer = gateway.raw(metadata).await;
        assert_eq!(answer.code(), code, "{metadata:?}");
        if code != Code::Ok {
            assert_eq!(answer.reason(), "DEADLINE_AFTER_SENDING");
            assert!(!answer.trailers_only, "Envoy would retry it");
        }
    }
    let answer = gateway
        .raw(&[(ENVOY, "9000"), ("grpc-timeout", "soon")])
        .await;
    assert_eq!(answer.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_deadline_that_is_over_sends_nothing() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    for over in ["0n", "1n"] {
        let answer = gateway.raw(&[("grpc-timeout", over)]).await;
        assert_eq!(answer.reason(), "DEADLINE_BEFORE_SENDING");
        assert_eq!(answer.outcome(), "NOT_APPLIED");
        assert!(answer.trailers_only);
    }
    assert_eq!(upstream.received().len(), 0);
}

#[tokio::test]
async fn a_batch_whose_caller_left_is_in_the_log() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;

    upstream.inject(Fault::Delay(Duration::from_millis(300)));
    let mut client = BatchServiceClient::new(gateway.channel());
    let mut call = tonic::Request::new(request());
    for (name, value) in crate::support::CREDENTIALS {
        call.metadata_mut().insert(name, value.parse().unwrap());
    }
    let left = timeout(Duration::from_millis(100), client.create_batch(call)).await;
    assert!(left.is_err());
    gateway
        .logs("create completed after the client disconnected")
        .await;
    let id = upstream.batches()[0]["id"].as_str().unwrap().to_owned();
    assert!(gateway.log().contains(&id));

    upstream.inject(Fault::Delay(Duration::from_millis(300)));
    let answer = gateway.raw(&[("grpc-timeout", "50m")]).await;
    assert_eq!(answer.code(), Code::DeadlineExceeded);
    while upstream.batches().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let id = upstream.batches()[1]["id"].as_str().unwrap().to_owned();
    gateway.logs(&id).await;

    let (_, metrics) = gateway.page("/metrics").await;
    for line in [
        r#"aep_gateway_abandoned_calls_total{grpc_method="CreateBatch",outcome="APPLIED"} 2"#,
        r#"grpc_method="CreateBatch",grpc_code="Canceled"} 1"#,
        r#"grpc_method="CreateBatch",grpc_code="DeadlineExceeded"} 1"#,
        "aep_gateway_calls_in_flight 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_caller_who_leaves_before_anything_is_sent_leaves_nothing() {
    // The upstream takes the connection but no TLS handshake ends: nothing can be sent.
    let upstream = Scripted::start(vec![vec![Step::Stall]]).await;
    let url = upstream.url().replace("http:", "https:");
    let gateway = Gateway::start(&url, &["--connect-timeout=10s"]).await;
    let left = timeout(Duration::from_millis(200), gateway.create(request())).await;
    assert!(left.is_err());
    let begin = Instant::now();
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success());
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "nothing was in flight"
    );
    assert!(!log.contains("after the client disconnected"), "{log}");
}

#[tokio::test]
async fn past_the_limit_calls_fail_fast_and_may_be_retried() {
    let upstream = simulator().await;
    let flags = ["--max-in-flight=2"];
    let gateway = Gateway::start(&upstream.import_url(), &flags).await;
    upstream.inject(Fault::Delay(Duration::from_secs(1)));
    upstream.inject(Fault::Delay(Duration::from_secs(1)));
    let (first, second, third) = tokio::join!(gateway.raw(&[]), gateway.raw(&[]), async {
        while upstream.received().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gateway.raw(&[]).await
    });
    assert_eq!((first.code(), second.code()), (Code::Ok, Code::Ok));
    assert_eq!(third.code(), Code::Unavailable);
    assert_eq!(third.reason(), "GATEWAY_OVERLOADED");
    assert!(third.trailers_only);
    assert_eq!(upstream.received().len(), 2);
}
