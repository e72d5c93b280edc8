//! What the gateway sends again by itself, and how seldom.

use aep_simulator::Fault;
use http::StatusCode;
use tonic::Code;

use crate::support::{Gateway, request, simulator};

/// Calls that fill the budget: one retry for ten calls.
async fn warm_up(gateway: &Gateway, calls: usize) {
    for _ in 0..calls {
        gateway.create(request()).await.unwrap();
    }
}

#[tokio::test]
async fn what_certainly_was_not_created_is_sent_again() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &["--upstream-http=2"]).await;
    warm_up(&gateway, 50).await;
    for fault in [
        Fault::RefusedStream,
        Fault::Status(StatusCode::SERVICE_UNAVAILABLE),
    ] {
        upstream.inject(fault.clone());
        let answer = gateway.raw(&[]).await;
        assert_eq!(answer.code(), Code::Ok, "{fault}: {:?}", answer.status());
    }
    assert_eq!(upstream.batches().len(), 52);
    assert_eq!(upstream.received().len(), 54);
    let (_, metrics) = gateway.page("/metrics").await;
    assert!(metrics.contains("aep_gateway_retries_total 2"), "{metrics}");
}

#[tokio::test]
async fn what_may_have_been_created_is_not_sent_again() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    warm_up(&gateway, 50).await;
    for fault in [
        Fault::ResetBefore,
        Fault::ResetAfter,
        Fault::Proxy(StatusCode::SERVICE_UNAVAILABLE),
        Fault::Status(StatusCode::INTERNAL_SERVER_ERROR),
        Fault::Status(StatusCode::BAD_REQUEST),
        Fault::EmptyResponse,
    ] {
        let before = upstream.received().len();
        upstream.inject(fault.clone());
        assert_ne!(gateway.raw(&[]).await.code(), Code::Ok);
        assert_eq!(upstream.received().len(), before + 1, "{fault}");
    }
}

#[tokio::test]
async fn an_outage_is_not_amplified() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let (before, calls) = (100, 300);
    warm_up(&gateway, before).await;
    for _ in 0..2 * calls {
        upstream.inject(Fault::Status(StatusCode::SERVICE_UNAVAILABLE));
    }
    for _ in 0..calls {
        assert_ne!(gateway.raw(&[]).await.code(), Code::Ok);
    }
    // The calls of the last ten seconds count: 7 retries for 100 of them.
    let retries = upstream.received().len() - before - calls;
    let most = (before + calls) * 7 / 100 + 1;
    assert!((1..=most).contains(&retries), "{retries}");
}
