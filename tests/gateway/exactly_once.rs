//! One batch for one external id, however often and wherever the call is
//! repeated.

use std::time::Duration;

use aep_batch_gateway::proto::v1::BatchOrigin;
use aep_simulator::{Fault, Injection, Operation, SimulatorOptions};
use http::StatusCode;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Gateway, request, simulator, simulator_with, with_id};

const RETRY: (&str, &str) = ("grpc-previous-rpc-attempts", "1");

/// The API's own error for the next lookup.
fn list_fault(status: StatusCode) -> Injection {
    Injection {
        operation: Operation::List,
        fault: Fault::Status(status),
    }
}

async fn slow_catalog(catalog_lag: Duration) -> aep_simulator::Simulator {
    let options = SimulatorOptions {
        catalog_lag,
        ..Default::default()
    };
    simulator_with(options).await
}

#[tokio::test]
async fn a_second_call_finds_the_first_one_s_batch() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let other = Gateway::before(&upstream, &[]).await;
    let first = gateway.create_with(with_id("mine"), &[]).await.unwrap();
    assert_eq!(first.origin(), BatchOrigin::Created);
    let batch = first.batch.unwrap();
    assert_eq!(batch.external_id.as_deref(), Some("mine"));
    for gateway in [&gateway, &other] {
        let again = gateway.create_with(with_id("mine"), &[]).await.unwrap();
        assert_eq!(again.origin(), BatchOrigin::Found);
        assert_eq!(again.batch.unwrap(), batch);
    }
    assert_eq!(upstream.batches().len(), 1);

    // Without an external id, or with an empty one, calls are independent.
    gateway.create(request()).await.unwrap();
    gateway.create(with_id("")).await.unwrap();
    assert_eq!(upstream.batches().len(), 3);
}

#[tokio::test]
async fn the_lookup_is_bounded_and_escaped() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let id = "a&limit=9 é/#?%";
    gateway.create(with_id(id)).await.unwrap();
    let again = gateway.create_with(with_id(id), &[]).await.unwrap();
    assert_eq!(again.origin(), BatchOrigin::Found);
    let asked = upstream.received()[0].clone();
    assert_eq!(asked.method, "GET");
    assert!(asked.path.contains("&limit=20&") && asked.path.contains("&properties="));
    assert_eq!(asked.headers["authorization"], "Bearer s3cret-token");
    assert!(!asked.headers.contains_key("content-type"));
}

#[tokio::test]
async fn an_idempotency_key_becomes_the_external_id() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let key = [("idempotency-key", "key-1")];
    let first = gateway.create_with(request(), &key).await.unwrap();
    let again = gateway.create_with(request(), &key).await.unwrap();
    assert_eq!(again.origin(), BatchOrigin::Found);
    assert_eq!(first.batch, again.batch);
    assert_eq!(upstream.batches()[0]["externalId"], "key-1");

    gateway.create_with(with_id("own"), &key).await.unwrap();
    assert_eq!(upstream.batches()[1]["externalId"], "own");
    let answer = gateway.raw(&[key[0], key[0]]).await;
    assert_eq!(answer.reason(), "INVALID_REQUEST");
}

#[tokio::test]
async fn other_content_is_refused_and_the_batch_is_named() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let id = gateway.create(with_id("mine")).await.unwrap().id;
    let mut other = with_id("mine");
    other.dataset_id = "other".to_owned();
    let refused = gateway.create(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "EXTERNAL_ID_TAKEN");
    assert_eq!(info.metadata["batchId"], id);
    assert_eq!(info.metadata["outcome"], "NOT_APPLIED");
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn a_lost_answer_is_recovered() {
    let upstream = slow_catalog(Duration::from_millis(400)).await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for fault in [
        Fault::ResetAfter,
        Fault::CloseAfter,
        Fault::HalfResponse,
        Fault::EmptyResponse,
        Fault::HtmlResponse,
        Fault::Lost(StatusCode::BAD_GATEWAY),
    ] {
        upstream.inject(fault.clone());
        let id = fault.to_string();
        let answer = gateway.create_with(with_id(&id), &[]).await.unwrap();
        assert_eq!(answer.origin(), BatchOrigin::Recovered, "{fault}");
        let batches = upstream.batches();
        let (_, created) = (batches.len(), batches.last().unwrap());
        assert_eq!(answer.batch.unwrap().id, created["id"].as_str().unwrap());
    }
    assert_eq!(upstream.batches().len(), 6);
}

#[tokio::test]
async fn what_cannot_be_settled_stays_unknown_and_is_never_sent_again() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    upstream.inject(Fault::ResetBefore);
    let answer = gateway
        .raw_with_id("mine", &[("grpc-timeout", "500m")])
        .await;
    assert_eq!(answer.reason(), "CONNECTION_LOST");
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert_eq!(answer.info("externalId").as_deref(), Some("mine"));
    assert!(!answer.trailers_only);
    let posts = upstream.received();
    let posts = posts.iter().filter(|received| received.method == "POST");
    assert_eq!(posts.count(), 1);

    // This gateway remembers: whoever comes next must be patient, marked or not.
    let answer = gateway
        .raw_with_id("mine", &[("grpc-timeout", "500m")])
        .await;
    assert_eq!(answer.reason(), "DEADLINE_UNSETTLED");
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert_eq!(upstream.batches().len(), 0);
}

#[tokio::test]
async fn equal_calls_at_the_same_time_share_one_create() {
    let upstream = slow_catalog(Duration::from_secs(60)).await;
    let gateway = Gateway::before(&upstream, &[]).await;
    upstream.inject(Fault::Delay(Duration::from_millis(300)));
    let (one, two, three) = tokio::join!(
        gateway.create_with(with_id("mine"), &[]),
        gateway.create_with(with_id("mine"), &[]),
        async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let another = [("authorization", "Bearer another")];
            gateway.create_with(with_id("mine"), &another).await
        },
    );
    let (one, two, three) = (one.unwrap(), two.unwrap(), three.unwrap());
    assert_eq!((&one.batch, &one.batch), (&two.batch, &three.batch));
    assert_eq!(upstream.batches().len(), 1);
    let tokens: Vec<_> = (upstream.received().iter())
        .map(|received| received.headers["authorization"].clone())
        .collect();
    let others = tokens
        .iter()
        .filter(|token| *token == "Bearer another")
        .count();
    assert_eq!(
        others, 1,
        "another caller is told only after its own lookup"
    );
}

#[tokio::test]
async fn what_catalog_does_not_show_yet_is_remembered() {
    let upstream = slow_catalog(Duration::from_secs(60)).await;
    for lookup in ["always", "on-retry", "never"] {
        let gateway = Gateway::before(&upstream, &["--lookup", lookup]).await;
        let first = gateway.create_with(with_id(lookup), &[]).await.unwrap();
        let again = gateway.create_with(with_id(lookup), &[]).await.unwrap();
        assert_eq!(again.origin(), BatchOrigin::Found, "{lookup}");
        assert_eq!(first.batch, again.batch);
    }
    assert_eq!(upstream.batches().len(), 3);
}

#[tokio::test]
async fn a_caller_without_rights_hears_nothing_of_another_s_batch() {
    let upstream = slow_catalog(Duration::from_secs(60)).await;
    let gateway = Gateway::before(&upstream, &[]).await;
    gateway.create(with_id("mine")).await.unwrap();
    let expired = [("authorization", "Bearer expired")];
    let refused = gateway.create_with(with_id("mine"), &expired).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_retry_waits_for_a_first_try_in_another_gateway() {
    let upstream = simulator().await;
    let first = Gateway::before(&upstream, &[]).await;
    let second = Gateway::before(&upstream, &[]).await;
    upstream.inject(Fault::Delay(Duration::from_millis(800)));
    let (left, found) = tokio::join!(
        first.raw_with_id("mine", &[("grpc-timeout", "200m")]),
        async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let retry = [("x-envoy-attempt-count", "2")];
            second.create_with(with_id("mine"), &retry).await.unwrap()
        }
    );
    assert_eq!(left.reason(), "DEADLINE_AFTER_SENDING");
    assert_eq!(found.origin(), BatchOrigin::Found);
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn a_failed_lookup_sends_nothing() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for (status, code, reason) in [
        (500, Code::Unavailable, "LOOKUP_FAILED"),
        (404, Code::Unavailable, "LOOKUP_FAILED"),
        (403, Code::PermissionDenied, "LOOKUP_FORBIDDEN"),
        (401, Code::Unauthenticated, "API_UNAUTHENTICATED"),
        (429, Code::ResourceExhausted, "API_RATE_LIMITED"),
    ] {
        let fault = list_fault(StatusCode::from_u16(status).unwrap());
        upstream.inject(fault.clone());
        let answer = gateway.raw_with_id("mine", &[]).await;
        assert_eq!(answer.code(), code, "{status}");
        assert_eq!(answer.reason(), reason);
        assert_eq!(answer.outcome(), "NOT_APPLIED");

        if status == 500 {
            continue; // may pass: a retry goes on looking, see below
        }
        upstream.inject(fault);
        let answer = gateway.raw_with_id("tried elsewhere", &[RETRY]).await;
        assert_eq!(answer.code(), Code::Unknown, "{status}");
        assert_eq!(answer.reason(), "LOOKUP_UNSETTLED");
        assert!(!answer.trailers_only);
    }
    let fault = list_fault(StatusCode::INTERNAL_SERVER_ERROR);
    upstream.inject(fault);
    let deadline = ("grpc-timeout", "500m");
    let answer = gateway
        .raw_with_id("tried elsewhere", &[RETRY, deadline])
        .await;
    assert_eq!(answer.reason(), "DEADLINE_UNSETTLED");
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert!(
        upstream
            .received()
            .iter()
            .all(|received| received.method == "GET")
    );
}

#[tokio::test]
async fn lookups_can_be_spared() {
    let upstream = simulator().await;
    let count = |method: &str| {
        let received = upstream.received();
        received
            .iter()
            .filter(|received| received.method == method)
            .count()
    };
    let gateway = Gateway::before(&upstream, &["--lookup=on-retry"]).await;
    gateway.create(with_id("a")).await.unwrap();
    assert_eq!((count("GET"), count("POST")), (0, 1));
    upstream.inject(Fault::ResetAfter);
    let answer = gateway.create_with(with_id("b"), &[]).await.unwrap();
    assert_eq!(answer.origin(), BatchOrigin::Recovered);
    assert_eq!((count("GET"), count("POST")), (1, 2));

    let gateway = Gateway::before(&upstream, &["--lookup=never"]).await;
    upstream.inject(Fault::ResetAfter);
    let lost = gateway.create(with_id("c")).await.unwrap_err();
    assert_eq!(lost.code(), Code::Unknown);
    assert_eq!((count("GET"), count("POST")), (1, 3));
}

#[tokio::test]
async fn a_client_s_next_try_waits_for_tries_that_the_mesh_made_between() {
    // Try 1 ends here without a batch; Envoy's second try of the same client try is
    // made elsewhere and lasts; the client's next try comes here, counted anew.
    let upstream = simulator().await;
    let here = Gateway::before(&upstream, &[]).await;
    let elsewhere = Gateway::before(&upstream, &["--request-timeout=500ms"]).await;
    upstream.inject(Fault::Status(StatusCode::SERVICE_UNAVAILABLE));
    let first = [("x-envoy-attempt-count", "1")];
    let refused = here.create_with(with_id("mine"), &first).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    upstream.inject(Fault::Delay(Duration::from_millis(400)));
    let second = [("x-envoy-attempt-count", "2")];
    let third = [RETRY, ("x-envoy-attempt-count", "1")];
    let (second, third) = tokio::join!(elsewhere.create_with(with_id("mine"), &second), async {
        while upstream
            .received()
            .iter()
            .filter(|r| r.method == "POST")
            .count()
            < 2
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        here.create_with(with_id("mine"), &third).await
    });
    assert_eq!(second.unwrap().batch, third.unwrap().batch);
    assert_eq!(upstream.batches().len(), 1);
}
