//! `GetBatch`: the batch as Catalog shows it, NOT_FOUND where there is none, and
//! failures that say that the call may be repeated.

use std::time::Duration;

use aep_batch_gateway::proto::v1::{BatchStatus, GetBatchResponse};
use aep_simulator::{Fault, Injection, Operation, Simulator};
use http::Method;
use prost::Message;
use prost_types::value::Kind;
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    CREDENTIALS, GET, Gateway, RawAnswer, Scripted, Step, frame, get_request, simulator,
    simulator_with_fault, with_id,
};

async fn raw(gateway: &Gateway, id: &str, metadata: &[(&str, &str)]) -> RawAnswer {
    let metadata = [&CREDENTIALS, metadata].concat();
    let body = frame(&get_request(id));
    gateway.raw_call(GET, &metadata, &body).await
}

/// A gateway in front of a scripted Catalog.
async fn before(catalog: &Scripted) -> Gateway {
    let catalog = format!("--catalog-url={}", catalog.url());
    Gateway::start("http://127.0.0.1:9", &[&catalog]).await
}

#[tokio::test]
async fn a_batch_is_what_catalog_shows() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &["--lookup=never"]).await;
    let created = gateway.create(with_id("x")).await.unwrap();
    assert_eq!(gateway.get(&created.id).await.unwrap(), created);

    upstream.patch(
        &created.id,
        &json!({
            "status": "failed",
            "completed": 1_576_741_600_000_i64,
            "errors": [{ "code": "INGEST-1401-400", "description": "bad", "recordCount": 2 }],
            "metrics": { "inputRecordCount": 519, "failedRecordCount": 5 },
            "failedBatchLocation": "https://example.com/failed",
            "sandboxId": "s-1",
            "tags": null,
        }),
    );
    let batch = gateway.get(&created.id).await.unwrap();
    assert_eq!(batch.status(), BatchStatus::Failed);
    assert_eq!(batch.completed.unwrap().seconds, 1_576_741_600);
    assert_eq!(batch.errors[0].code(), "INGEST-1401-400");
    assert_eq!(batch.errors[0].record_count, Some(2));
    assert_eq!(batch.failed_batch_location(), "https://example.com/failed");
    assert_eq!(batch.metrics.unwrap().fields.len(), 2);
    assert!(batch.tags.is_empty());
    let extra = batch.extra.unwrap().fields;
    assert_eq!(extra.len(), 1);
    assert_eq!(
        extra["sandboxId"].kind,
        Some(Kind::StringValue("s-1".into()))
    );

    let requests = upstream.received();
    assert_eq!(requests.len(), 3, "a create and two reads");
    for request in &requests[1..] {
        assert_eq!(request.method, Method::GET);
        let path = format!("/data/foundation/catalog/batches/{}", created.id);
        assert_eq!(request.path, path);
        for (name, value) in CREDENTIALS {
            assert_eq!(request.headers[name], value);
        }
    }
}

#[tokio::test]
async fn what_catalog_does_not_show_is_not_found() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let unknown = raw(&gateway, "unknown", &[]).await;
    unknown.is_failed_read(Code::NotFound, "BATCH_NOT_FOUND", "404");

    let created = gateway.create(with_id("x")).await.unwrap();
    upstream.inject("get:empty".parse::<Injection>().unwrap());
    let empty = raw(&gateway, &created.id, &[]).await;
    empty.is_failed_read(Code::NotFound, "BATCH_NOT_FOUND", "an empty object");

    let catalog = Scripted::answering("200 OK", &[], "[]").await;
    let gateway = before(&catalog).await;
    let empty = raw(&gateway, "b", &[]).await;
    empty.is_failed_read(Code::NotFound, "BATCH_NOT_FOUND", "an empty array");
}

#[tokio::test]
async fn every_form_of_a_batch_is_understood() {
    for body in [
        r#"{"b":{"id":"b","status":"active","new":1}}"#,
        r#"{"b":{"status":"active","new":1}}"#,
        r#"{"id":"b","status":"active","new":1}"#,
    ] {
        let catalog = Scripted::answering("200 OK", &[], body).await;
        let batch = before(&catalog).await.get("b").await.unwrap();
        assert_eq!(
            (&*batch.id, batch.status()),
            ("b", BatchStatus::Active),
            "{body}"
        );
        assert!(batch.extra.unwrap().fields.contains_key("new"), "{body}");
    }
    let catalog = Scripted::answering("200 OK", &[], r#"{"other":{"id":"other"}}"#).await;
    let answer = raw(&before(&catalog).await, "b", &[]).await;
    answer.is_failed_read(Code::Unavailable, "ANSWER_UNPROVEN", "another batch");
}

#[tokio::test]
async fn every_failure_says_what_happened_and_that_it_may_be_repeated() {
    let table = [
        ("status-400", Code::InvalidArgument, "API_INVALID_REQUEST"),
        ("status-401", Code::Unauthenticated, "API_UNAUTHENTICATED"),
        (
            "status-403",
            Code::PermissionDenied,
            "API_PERMISSION_DENIED",
        ),
        ("status-404", Code::NotFound, "BATCH_NOT_FOUND"),
        ("status-429", Code::ResourceExhausted, "API_RATE_LIMITED"),
        ("status-500", Code::Unavailable, "UPSTREAM_FAILED"),
        ("status-503", Code::Unavailable, "API_UNAVAILABLE"),
        ("gzip-403", Code::PermissionDenied, "API_PERMISSION_DENIED"),
        ("proxy-404", Code::NotFound, "API_NOT_FOUND"),
        ("varnish-503-after", Code::Unavailable, "UPSTREAM_FAILED"),
        ("cloudflare-520", Code::Unavailable, "UPSTREAM_FAILED"),
        ("filter-403", Code::Unavailable, "UPSTREAM_UNPROVEN"),
        ("filter-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("filter-204", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("error-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("problem-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("json-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("portal-302", Code::Unavailable, "UPSTREAM_UNPROVEN"),
        ("portal-307", Code::FailedPrecondition, "API_REDIRECTED"),
        ("empty-response", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("half-response", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("huge-response", Code::Internal, "ANSWER_UNUSABLE"),
        ("reset-after", Code::Unavailable, "CONNECTION_LOST"),
        ("close-after", Code::Unavailable, "CONNECTION_LOST"),
        ("timeout", Code::Unavailable, "UPSTREAM_TIMEOUT"),
    ];
    for (fault, code, reason) in table {
        let upstream = simulator_with_fault(&format!("get:{fault}")).await;
        let timeout = match fault {
            "timeout" => "--request-timeout=500ms",
            _ => "--request-timeout=20s",
        };
        let gateway = Gateway::before(&upstream, &["--lookup=never", timeout]).await;
        let id = gateway.create(with_id("x")).await.unwrap().id;
        let answer = raw(&gateway, &id, &[]).await;
        answer.is_failed_read(code, reason, fault);
        assert!(!format!("{:?}", answer.status()).contains("s3cret"));
    }
    let gateway = Gateway::start("http://127.0.0.1:9", &["--catalog-url=http://127.0.0.1:9"]).await;
    let answer = raw(&gateway, "b", &[]).await;
    answer.is_failed_read(
        Code::Unavailable,
        "UPSTREAM_CONNECT_FAILED",
        "no connection",
    );
}

/// The batch, or a failure; never another batch, an outcome, or a NOT_FOUND that
/// no response with 404 and no empty map of Catalog's stands behind.
#[tokio::test]
async fn no_fault_that_has_a_name_makes_it_lie() {
    let upstream = simulator().await;
    // A reset of an HTTP/2 connection would hit other calls.
    let flags = [
        "--lookup=never",
        "--request-timeout=2s",
        "--upstream-http=1",
    ];
    let gateway = Gateway::before(&upstream, &flags).await;
    let id = gateway.create(with_id("x")).await.unwrap().id;
    let names = Fault::names(Operation::Get).flat_map(|name| {
        let statuses: &[&str] = match name.contains("NNN") {
            true => &["400", "404", "408", "429", "500", "503"],
            false => &[""],
        };
        let name = name.replace("MILLISECONDS", "20");
        statuses
            .iter()
            .map(move |status| name.replace("NNN", status))
    });
    let names: Vec<_> = names.collect();
    assert!(names.len() > 150);
    let mut good = 0;
    for name in &names {
        upstream.inject(format!("get:{name}").parse::<Injection>().unwrap());
        let answer = raw(&gateway, &id, &[]).await;
        assert!(!answer.trailers.contains_key("aep-batch-outcome"), "{name}");
        match answer.code() {
            Code::Ok => {
                let response = GetBatchResponse::decode(&answer.message[5..]).unwrap();
                assert_eq!(response.batch.unwrap().id, id, "{name}");
                good += 1;
            }
            Code::NotFound => assert!(name.contains("404") || name == "empty", "{name}"),
            code => {
                assert!(answer.trailers_only, "{name}: {code}");
                assert_ne!(answer.reason(), "GATEWAY_FAILED", "{name}");
            }
        }
    }
    assert!(good >= 6, "{good}"); // delay, stale, gzip, many headers, unfinished, no id
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn odd_forms_of_a_good_response_are_read() {
    for fault in [
        "gzip-response",
        "many-headers-response",
        "unfinished-response",
        "no-id-response",
        "delay-20",
    ] {
        let upstream = simulator_with_fault(&format!("get:{fault}")).await;
        let gateway = Gateway::before(&upstream, &[]).await;
        let created = gateway.create(with_id("x")).await.unwrap();
        assert_eq!(gateway.get(&created.id).await.unwrap(), created, "{fault}");
    }
}

#[tokio::test]
async fn a_connection_that_is_lost_under_way_is_unavailable() {
    for end in [
        vec![Step::Reset],
        vec![],
        vec![Step::Write(b"HTTP/1.1 200".to_vec())],
    ] {
        let script = [vec![Step::ReadRequest], end.clone()].concat();
        let catalog = Scripted::start(vec![script]).await;
        let answer = raw(&before(&catalog).await, "b", &[]).await;
        answer.is_failed_read(Code::Unavailable, "CONNECTION_LOST", &format!("{end:?}"));
    }
}

#[tokio::test]
async fn a_single_failure_is_repeated_by_the_gateway() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &["--lookup=never"]).await;
    let id = gateway.create(with_id("x")).await.unwrap().id;
    for _ in 0..30 {
        gateway.get(&id).await.unwrap(); // earns the budget
    }
    for fault in [
        "status-500",
        "varnish-503-after",
        "reset-after",
        "html-response",
    ] {
        let before = upstream.received().len();
        upstream.inject(format!("get:{fault}").parse::<Injection>().unwrap());
        assert_eq!(gateway.get(&id).await.unwrap().id, id, "{fault}");
        assert_eq!(upstream.received().len() - before, 2, "{fault}");
        for _ in 0..15 {
            gateway.get(&id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_id_is_one_segment_of_the_path() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for (id, segment) in [
        ("a b/c?d#e", "a%20b%2Fc%3Fd%23e"),
        ("50%2F", "50%252F"),
        ("...", "..."),
        ("é", "%C3%A9"),
    ] {
        let answer = raw(&gateway, id, &[]).await;
        assert_eq!(answer.code(), Code::NotFound, "{id}");
        let path = format!("/data/foundation/catalog/batches/{segment}");
        assert_eq!(last_path(&upstream), path);
    }
    let count = upstream.received().len();
    for id in ["", ".", "..", "a,b", "a\n", &"x".repeat(257)] {
        let answer = raw(&gateway, id, &[]).await;
        answer.is_failed_read(Code::InvalidArgument, "INVALID_REQUEST", id);
        let bad = answer.status().get_details_bad_request().unwrap();
        assert_eq!(bad.field_violations[0].field, "batch_id");
    }
    assert_eq!(upstream.received().len(), count, "nothing was sent");
}

fn last_path(upstream: &Simulator) -> String {
    upstream.received().last().unwrap().path.clone()
}

#[tokio::test]
async fn a_deadline_and_missing_credentials_are_told_without_an_outcome() {
    let upstream = simulator_with_fault("get:delay-5000").await;
    let gateway = Gateway::before(&upstream, &["--lookup=never"]).await;
    let id = gateway.create(with_id("x")).await.unwrap().id;
    let answer = raw(&gateway, &id, &[("grpc-timeout", "1S")]).await;
    assert!(answer.ended_after < Duration::from_secs(4));
    assert_eq!(answer.code(), Code::DeadlineExceeded);
    assert_eq!(answer.reason(), "DEADLINE_AFTER_SENDING");
    assert!(!answer.trailers.contains_key("aep-batch-outcome"));

    let body = frame(&get_request(&id));
    let answer = gateway.raw_call(GET, &CREDENTIALS[1..], &body).await;
    answer.is_failed_read(Code::Unauthenticated, "CREDENTIALS_MISSING", "no token");
}
