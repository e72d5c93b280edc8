//! `ListBatches`: filters, order, and walks through the pages that neither skip
//! nor repeat while batches are added and change.

use aep_batch_gateway::proto::v1::{Batch, BatchStatus, ListBatchesRequest};
use aep_simulator::{Injection, Simulator};
use prost_types::{Timestamp, value::Kind};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    CREDENTIALS, Gateway, LIST, RawAnswer, Scripted, Step, frame, request, simulator,
    simulator_with_fault,
};

/// A gateway in front of a simulator with batches of these times of creation, in
/// milliseconds; with their ids.
async fn with_batches(times: &[i64]) -> (Simulator, Gateway, Vec<String>) {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut ids = Vec::new();
    for time in times {
        ids.push(add(&upstream, &gateway, *time).await);
    }
    (upstream, gateway, ids)
}

async fn add(upstream: &Simulator, gateway: &Gateway, created: i64) -> String {
    let id = gateway.create(request()).await.unwrap().id;
    upstream.patch(&id, &json!({ "created": created }));
    id
}

fn ids(batches: &[Batch]) -> Vec<&str> {
    batches.iter().map(|batch| batch.id.as_str()).collect()
}

/// All pages of a walk; `between` happens after each of them.
async fn walk(
    gateway: &Gateway,
    mut request: ListBatchesRequest,
    mut between: impl AsyncFnMut(&[String]),
) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let page = gateway.list(request.clone()).await.unwrap();
        assert!(page.batches.len() <= request.page_size as usize);
        seen.extend(page.batches.into_iter().map(|batch| batch.id));
        if page.next_page_token.is_empty() {
            return seen;
        }
        request.page_token = page.next_page_token;
        between(&seen).await;
    }
}

async fn raw(gateway: &Gateway, message: &ListBatchesRequest) -> RawAnswer {
    gateway.raw_call(LIST, &CREDENTIALS, &frame(message)).await
}

#[tokio::test]
async fn batches_come_newest_first_with_all_that_catalog_shows() {
    let (upstream, gateway, created) = with_batches(&[2000, 3000, 1000]).await;
    let changes = json!({ "status": "failed", "sandboxId": "s-1", "metrics": { "n": 1 } });
    upstream.patch(&created[1], &changes);
    let page = gateway.list(Default::default()).await.unwrap();
    assert_eq!(ids(&page.batches), [&created[1], &created[0], &created[2]]);
    assert_eq!(page.next_page_token, "");
    let newest = &page.batches[0];
    assert_eq!(newest.status(), BatchStatus::Failed);
    assert_eq!(
        newest.created,
        Some(Timestamp {
            seconds: 3,
            nanos: 0
        })
    );
    assert_eq!(newest.metrics.as_ref().unwrap().fields.len(), 1);
    // A list asks for the documented members, or it might reach gigabytes.
    assert_eq!(newest.extra, None);

    let path = upstream.received().last().unwrap().path.clone();
    let query = path
        .strip_prefix("/data/foundation/catalog/batches?")
        .unwrap();
    assert!(
        query.starts_with("limit=20&orderBy=desc%3Acreated&properties=imsOrg%2C"),
        "{path}"
    );
}

#[tokio::test]
async fn the_order_and_every_member_of_the_response_are_kept() {
    let body = r#"{"b":{"created":1,"new":{"x":[null]}},"ä":{"id":"ä"},"a":{"created":2}}"#;
    let catalog = Scripted::answering("200 OK", &[], body).await;
    let catalog_flag = format!("--catalog-url={}", catalog.url());
    let gateway = Gateway::start("http://127.0.0.1:9", &[&catalog_flag]).await;
    let page = gateway.list(Default::default()).await.unwrap();
    assert_eq!(ids(&page.batches), ["b", "ä", "a"]);
    let extra = page.batches[0].extra.as_ref().unwrap();
    assert!(matches!(
        extra.fields["new"].kind,
        Some(Kind::StructValue(_))
    ));
}

#[tokio::test]
async fn every_filter_holds() {
    let (upstream, gateway, created) = with_batches(&[1000, 2000, 3000, 4000]).await;
    let dataset = |id: &str| json!([{ "type": "dataSet", "id": id }]);
    for (index, changes) in [
        json!({ "status": "active", "relatedObjects": dataset("d1"), "externalId": "x y&z" }),
        json!({ "status": "success", "relatedObjects": dataset("d1") }),
        json!({ "status": "failed", "relatedObjects": dataset("d2") }),
    ]
    .iter()
    .enumerate()
    {
        upstream.patch(&created[index], changes);
    }
    let text = |text: &str| Some(text.to_owned());
    let at = |seconds, nanos| Some(Timestamp { seconds, nanos });
    let none = ListBatchesRequest::default();
    let statuses = |statuses: &[BatchStatus]| ListBatchesRequest {
        statuses: statuses.iter().map(|status| *status as i32).collect(),
        ..Default::default()
    };
    for (request, expected) in [
        (none.clone(), &[3, 2, 1, 0][..]),
        (
            ListBatchesRequest {
                dataset_id: text("d1"),
                ..none.clone()
            },
            &[1, 0],
        ),
        (
            ListBatchesRequest {
                dataset_id: text("@/dataSets/d2"),
                ..none.clone()
            },
            &[2],
        ),
        (
            ListBatchesRequest {
                external_id: text("x y&z"),
                ..none.clone()
            },
            &[0],
        ),
        (
            ListBatchesRequest {
                external_id: text("unknown"),
                ..none.clone()
            },
            &[],
        ),
        (statuses(&[BatchStatus::Failed]), &[2]),
        (
            statuses(&[BatchStatus::Active, BatchStatus::Success]),
            &[1, 0],
        ),
        (statuses(&[BatchStatus::Deleted]), &[]),
        (
            ListBatchesRequest {
                created_after: at(2, 0),
                ..none.clone()
            },
            &[3, 2],
        ),
        (
            ListBatchesRequest {
                created_after: at(1, 999_000_000),
                ..none.clone()
            },
            &[3, 2, 1],
        ),
        (
            ListBatchesRequest {
                created_before: at(2, 0),
                ..none.clone()
            },
            &[0],
        ),
        (
            ListBatchesRequest {
                created_before: at(2, 1_000_000),
                ..none.clone()
            },
            &[1, 0],
        ),
        (
            ListBatchesRequest {
                dataset_id: text("d1"),
                created_after: at(1, 0),
                created_before: at(3, 0),
                ..statuses(&[BatchStatus::Active, BatchStatus::Success])
            },
            &[1],
        ),
        (
            ListBatchesRequest {
                created_after: at(3, 0),
                created_before: at(1, 0),
                ..none
            },
            &[],
        ),
    ] {
        let page = gateway.list(request.clone()).await.unwrap();
        let expected: Vec<_> = expected.iter().map(|index| &*created[*index]).collect();
        assert_eq!(ids(&page.batches), expected, "{request:?}");
    }
}

#[tokio::test]
async fn a_walk_returns_each_batch_once_while_batches_are_added() {
    // Many share a millisecond.
    let times: Vec<_> = (0..45).map(|number| 1000 + number / 4).collect();
    let (upstream, gateway, created) = with_batches(&times).await;
    for page_size in [1, 7, 20, 44, 45, 100] {
        let request = ListBatchesRequest {
            page_size,
            ..Default::default()
        };
        let mut seen = walk(&gateway, request, async |seen| {
            for time in [1_000_000, 1011, 1005] {
                if seen.len() < 20 {
                    add(&upstream, &gateway, time).await;
                }
            }
        })
        .await;
        seen.retain(|id| created.contains(id));
        let expected: Vec<_> = created.iter().rev().cloned().collect();
        // Catalog documents no order within a millisecond.
        let time = |id: &String| created.iter().position(|known| known == id).unwrap() / 4;
        assert!(seen.is_sorted_by(|a, b| time(a) >= time(b)));
        seen.sort_by_key(|id| expected.iter().position(|known| known == id));
        assert_eq!(seen, expected, "pages of {page_size}");
    }
}

#[tokio::test]
async fn a_walk_returns_each_batch_once_while_statuses_change() {
    let times: Vec<_> = (0..40).map(|number| 1000 + number / 4).collect();
    let (upstream, gateway, created) = with_batches(&times).await;
    let request = ListBatchesRequest {
        statuses: vec![BatchStatus::Loading as i32],
        page_size: 6,
        ..Default::default()
    };
    // What has been seen leaves the list, and one of what is to come.
    let mut left = Vec::new();
    let mut seen = walk(&gateway, request, async |seen| {
        let to_come = created
            .iter()
            .find(|id| !seen.contains(id) && !left.contains(*id));
        left.extend(to_come.cloned());
        for id in seen.iter().chain(&left) {
            upstream.patch(id, &json!({ "status": "loaded" }));
        }
    })
    .await;
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count, "nothing twice");
    for id in &created {
        assert!(seen.contains(id) || left.contains(id), "{id} was skipped");
    }
    assert!(left.len() > 3);
}

#[tokio::test]
async fn a_page_may_have_another_size_and_no_other_filter() {
    let (_upstream, gateway, created) = with_batches(&[1000, 2000, 3000, 4000]).await;
    let mut request = ListBatchesRequest {
        page_size: 1,
        ..Default::default()
    };
    request.page_token = gateway.list(request.clone()).await.unwrap().next_page_token;
    request.page_size = 2;
    let page = gateway.list(request.clone()).await.unwrap();
    assert_eq!(ids(&page.batches), [&created[2], &created[1]]);

    request.external_id = Some("x".to_owned());
    let answer = raw(&gateway, &request).await;
    answer.is_failed_read(Code::InvalidArgument, "INVALID_REQUEST", "another filter");
    let bad = answer.status().get_details_bad_request().unwrap();
    assert_eq!(bad.field_violations[0].field, "page_token");
}

#[tokio::test]
async fn everything_that_is_wrong_is_named() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let before_1970 = Some(Timestamp {
        seconds: -1,
        nanos: 0,
    });
    let bad = ListBatchesRequest {
        dataset_id: Some(String::new()),
        statuses: vec![BatchStatus::Active as i32, 0, 99],
        external_id: Some("a*".to_owned()),
        created_after: before_1970,
        created_before: before_1970,
        page_size: 101,
        page_token: "garbage".to_owned(),
    };
    let answer = raw(&gateway, &bad).await;
    answer.is_failed_read(Code::InvalidArgument, "INVALID_REQUEST", "all of it");
    let bad = answer.status().get_details_bad_request().unwrap();
    let fields: Vec<_> = bad.field_violations.iter().map(|bad| &*bad.field).collect();
    let expected = [
        "dataset_id",
        "external_id",
        "statuses[1]",
        "statuses[2]",
        "created_after",
        "created_before",
        "page_size",
        "page_token",
    ];
    assert_eq!(fields, expected);
    assert!(upstream.received().is_empty(), "nothing was sent");
}

#[tokio::test]
async fn every_failure_says_what_happened_and_that_it_may_be_repeated() {
    for (fault, code, reason) in [
        ("status-401", Code::Unauthenticated, "API_UNAUTHENTICATED"),
        (
            "status-403",
            Code::PermissionDenied,
            "API_PERMISSION_DENIED",
        ),
        ("status-429", Code::ResourceExhausted, "API_RATE_LIMITED"),
        ("status-500", Code::Unavailable, "UPSTREAM_FAILED"),
        ("status-503", Code::Unavailable, "API_UNAVAILABLE"),
        ("proxy-404", Code::NotFound, "API_NOT_FOUND"),
        ("maintenance-503", Code::Unavailable, "UPSTREAM_FAILED"),
        ("portal-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("error-200", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("half-response", Code::Unavailable, "ANSWER_UNPROVEN"),
        ("huge-response", Code::Internal, "ANSWER_UNUSABLE"),
        ("reset", Code::Unavailable, "CONNECTION_LOST"),
        ("timeout", Code::Unavailable, "UPSTREAM_TIMEOUT"),
    ] {
        let upstream = simulator_with_fault(&format!("list:{fault}")).await;
        let timeout = match fault {
            "timeout" => "--request-timeout=500ms",
            _ => "--request-timeout=20s",
        };
        let gateway = Gateway::before(&upstream, &[timeout]).await;
        gateway.create(request()).await.unwrap();
        let answer = raw(&gateway, &Default::default()).await;
        answer.is_failed_read(code, reason, fault);
    }
    let catalog = Scripted::start(vec![vec![Step::ReadRequest, Step::Reset]]).await;
    let catalog = format!("--catalog-url={}", catalog.url());
    let gateway = Gateway::start("http://127.0.0.1:9", &[&catalog]).await;
    let answer = raw(&gateway, &Default::default()).await;
    answer.is_failed_read(Code::Unavailable, "CONNECTION_LOST", "a reset");
}

#[tokio::test]
async fn odd_forms_of_a_good_response_are_read() {
    let (upstream, gateway, created) = with_batches(&[2000, 1000]).await;
    for fault in [
        "gzip-response",
        "many-headers-response",
        "unfinished-response",
    ] {
        upstream.inject(format!("list:{fault}").parse::<Injection>().unwrap());
        let page = gateway.list(Default::default()).await.unwrap();
        assert_eq!(ids(&page.batches), [&created[0], &created[1]], "{fault}");
    }
    upstream.inject("list:empty".parse::<Injection>().unwrap());
    let page = gateway.list(Default::default()).await.unwrap();
    assert_eq!((page.batches.len(), &*page.next_page_token), (0, ""));
}

#[tokio::test]
async fn an_error_that_a_proxy_tells_with_200_is_no_list() {
    for body in [
        r#"{"fault":{"faultstring":"no backend"}}"#,
        r#"{"error":{"code":"x"}}"#,
        r#"{"error_code":"403010","message":"Oauth token is missing."}"#,
    ] {
        let catalog = Scripted::answering("200 OK", &[], body).await;
        let catalog_flag = format!("--catalog-url={}", catalog.url());
        let gateway = Gateway::start("http://127.0.0.1:9", &[&catalog_flag]).await;
        let answer = raw(&gateway, &ListBatchesRequest::default()).await;
        assert_eq!(answer.code(), Code::Unavailable, "{body}");
        assert_eq!(answer.reason(), "ANSWER_UNPROVEN", "{body}");
    }
}
