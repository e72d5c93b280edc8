//! The table of statuses, on the wire: code, outcome, reason, and the form
//! that lets a retry happen only where it is safe.

use std::time::Duration;

use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{CREDENTIALS, Gateway, Scripted};

const PROBLEM: &str = r#"{"type":"/placeholder/type/uri","status":400,"title":"BadRequestError","detail":"A valid content-type must be specified","report":{"id":"r1"}}"#;
const NO_TOKEN: &str = r#"{"error_code":"403010","message":"Oauth token is missing."}"#;
const NO_RIGHT: &str = r#"{"error_code":"403025","message":"Profile is not valid"}"#;
const BAD_TOKEN: &str = r#"{"error_code":"403020","message":"Oauth token missing or invalid"}"#;
const NO_PROFILE: &str = r#"{"error_code":"503020","message":"Could not read the profile"}"#;
const NOT_VALIDATED: &str =
    r#"{"error_code":"503010","message":"Could not validate the oauth token"}"#;
/// Somebody else's problem document.
const CDN: &str = r#"{"type":"https://cdn.example/problems/origin","title":"Origin error","status":503,"instance":"1"}"#;
const HTML: &str = "<html><body>upstream said no</body></html>";

#[tokio::test]
async fn every_answer_has_its_status() {
    use Code::*;
    let no: &[(&str, &str)] = &[];
    let later: &[(&str, &str)] = &[("retry-after", "7")];
    let located: &[(&str, &str)] = &[("location", "/catalog/batches/5d01")];
    #[rustfmt::skip]
    let table = [
        ("400", no, PROBLEM, InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("411", no, "", InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("413", no, HTML, InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("414", no, "", InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("415", no, "", InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("422", no, CDN, InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("431", no, "", InvalidArgument, "NOT_APPLIED", "API_INVALID_REQUEST"),
        ("401", no, "", Unauthenticated, "NOT_APPLIED", "API_UNAUTHENTICATED"),
        ("403", no, NO_TOKEN, Unauthenticated, "NOT_APPLIED", "API_UNAUTHENTICATED"),
        ("403", no, BAD_TOKEN, Unauthenticated, "NOT_APPLIED", "API_UNAUTHENTICATED"),
        ("403", no, NO_RIGHT, PermissionDenied, "NOT_APPLIED", "API_PERMISSION_DENIED"),
        ("403", no, NO_PROFILE, Unavailable, "NOT_APPLIED", "API_UNAVAILABLE"),
        ("403", no, PROBLEM, PermissionDenied, "NOT_APPLIED", "API_PERMISSION_DENIED"),
        ("403", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("403", no, CDN, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("403", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("404", no, "", NotFound, "NOT_APPLIED", "API_NOT_FOUND"),
        ("409", no, PROBLEM, AlreadyExists, "NOT_APPLIED", "API_CONFLICT"),
        ("412", no, PROBLEM, FailedPrecondition, "NOT_APPLIED", "API_PRECONDITION_FAILED"),
        ("409", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("412", no, CDN, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("405", no, "", Unimplemented, "NOT_APPLIED", "API_NOT_IMPLEMENTED"),
        ("501", no, "", Unimplemented, "NOT_APPLIED", "API_NOT_IMPLEMENTED"),
        ("429", no, "", ResourceExhausted, "NOT_APPLIED", "API_RATE_LIMITED"),
        ("402", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("407", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("410", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("417", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("421", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("426", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("428", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("505", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("511", no, HTML, FailedPrecondition, "NOT_APPLIED", "API_REFUSED"),
        ("503", no, NOT_VALIDATED, Unavailable, "NOT_APPLIED", "API_UNAVAILABLE"),
        ("500", no, NOT_VALIDATED, Unavailable, "NOT_APPLIED", "API_UNAVAILABLE"),
        ("503", later, HTML, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("503", later, CDN, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("503", later, PROBLEM, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("503", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("503", no, "", Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("503", later, r#"{"error_code":"503","message":"down"}"#, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("408", later, "", Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("499", later, "", Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("500", later, PROBLEM, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("502", later, HTML, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("504", later, "", Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("522", later, HTML, Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("599", later, "", Unknown, "UNKNOWN", "UPSTREAM_FAILED"),
        ("406", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("416", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("425", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("444", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("451", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("460", no, HTML, Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("600", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("999", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("307", no, "", FailedPrecondition, "NOT_APPLIED", "API_REDIRECTED"),
        ("308", no, "", FailedPrecondition, "NOT_APPLIED", "API_REDIRECTED"),
        ("300", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("301", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("302", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("303", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("305", no, "", Unknown, "UNKNOWN", "UPSTREAM_UNPROVEN"),
        ("201", no, "", Unknown, "APPLIED", "ANSWER_UNUSABLE"),
        ("201", no, "{}", Unknown, "APPLIED", "ANSWER_UNUSABLE"),
        ("201", no, HTML, Unknown, "APPLIED", "ANSWER_UNUSABLE"),
        ("200", located, "", Unknown, "APPLIED", "ANSWER_UNUSABLE"),
        ("200", no, HTML, Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("200", no, NO_TOKEN, Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("200", no, "{}", Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("200", no, r#"{"id":"b","error":"blocked"}"#, Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("202", no, "[]", Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("204", no, "", Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
        ("206", no, CDN, Unknown, "UNKNOWN", "ANSWER_UNPROVEN"),
    ];
    for (status, headers, body, code, outcome, reason) in table {
        let upstream = Scripted::answering(status, headers, body).await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let answer = gateway.raw(&[]).await;

        let what = format!("{status} {body}: {answer:?}");
        assert_eq!(answer.code(), code, "{what}");
        assert_eq!(answer.outcome(), outcome, "{what}");
        assert_eq!(answer.reason(), reason, "{what}");
        assert_eq!(answer.info("httpStatus").as_deref(), Some(status), "{what}");
        assert!(!answer.trailers_only, "it was sent: {what}");
        assert_eq!(upstream.requests().len(), 1, "{what}");
        assert!(answer.status().get_details_request_info().is_some());
        let retry = answer.status().get_details_retry_info();
        let may_retry = matches!(code, Unavailable | ResourceExhausted);
        assert_eq!(retry.is_some(), may_retry, "{what}");
    }
}

#[tokio::test]
async fn what_must_not_be_repeated_has_headers_first() {
    let upstream = Scripted::answering("502", &[], HTML).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[("x-request-id", "mine")]).await;
    assert!(!answer.trailers_only);
    assert_eq!(answer.http_status, 200);
    assert_eq!(answer.headers["content-type"], "application/grpc");
    assert!(!answer.headers.contains_key("grpc-status"));
    assert!(answer.message.is_empty());
    assert_eq!(answer.trailers["grpc-status"], "2");
    assert_eq!(answer.trailers["aep-batch-outcome"], "UNKNOWN");
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert!(answer.trailers.contains_key("grpc-status-details-bin"));
    assert_eq!(answer.told_twice(), [""; 0]);
}

#[tokio::test]
async fn the_api_s_own_words_are_told() {
    let headers = [("x-request-id", "theirs")];
    let upstream = Scripted::answering("400", &headers, PROBLEM).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(
        answer.status().message(),
        "The API responded with HTTP 400: A valid content-type must be specified. No batch was created."
    );
    assert_eq!(
        answer.info("upstreamTitle").as_deref(),
        Some("BadRequestError")
    );
    assert_eq!(
        answer.info("upstreamReport").as_deref(),
        Some(r#"{"id":"r1"}"#)
    );
    assert_eq!(answer.info("upstreamRequestId").as_deref(), Some("theirs"));

    let upstream = Scripted::answering("403", &[], NO_TOKEN).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.info("upstreamErrorCode").as_deref(), Some("403010"));
    assert!(
        answer
            .status()
            .message()
            .contains("(403010): Oauth token is missing")
    );
}

#[tokio::test]
async fn a_rate_limit_says_when_to_come_back() {
    let upstream = Scripted::answering("429", &[("retry-after", "7")], "").await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    let status = answer.status();
    let retry = status.get_details_retry_info().unwrap();
    assert_eq!(retry.retry_delay, Some(Duration::from_secs(7)));
    assert!(status.get_details_quota_failure().is_some());
    // A pushback would order a retry whatever the client's service config says.
    assert!(!answer.trailers.contains_key("grpc-retry-pushback-ms"));

    let upstream = Scripted::answering("503", &[("retry-after", "9")], NOT_VALIDATED).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.code(), Code::Unavailable);
    assert_eq!(answer.trailers["grpc-retry-pushback-ms"], "9000");
    // A client that waited 9 s would miss its deadline, and with it this answer.
    let answer = gateway.raw(&[("grpc-timeout", "3S")]).await;
    assert_eq!(answer.code(), Code::Unavailable);
    assert_eq!(answer.trailers["grpc-retry-pushback-ms"], "-1");
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = Scripted::answering("201", &[], r#"{"id":"b"}"#).await;
    let upstream = Scripted::answering("307", &[("location", &elsewhere.url())], "").await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.reason(), "API_REDIRECTED");
    assert_eq!(answer.info("redirectHost").as_deref(), Some("127.0.0.1"));
    assert_eq!(upstream.requests().len(), 1);
    assert_eq!(elsewhere.requests().len(), 0);
}

#[tokio::test]
async fn a_created_batch_is_named_even_if_its_answer_is_lost() {
    let location = [("location", "/data/foundation/catalog/batches/5d01")];
    let upstream = Scripted::answering("201", &location, "").await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.outcome(), "APPLIED");
    assert_eq!(answer.info("batchId").as_deref(), Some("5d01"));
    assert_eq!(answer.info("location").as_deref(), Some(location[0].1));
}

#[tokio::test]
async fn the_metadata_of_an_error_stays_small_whatever_the_api_says() {
    let long = "é\u{1f600}\\\"".repeat(100_000);
    let problem = serde_json::json!({
        "status": 400, "title": long, "detail": long, "report": { "x": long }, "code": long,
    });
    let id = "i".repeat(5000);
    let headers = [("x-request-id", id.as_str()), ("location", id.as_str())];
    let request_id = "r".repeat(128);
    for (status, body) in [
        ("400", problem.to_string()),
        ("400", long.clone()),
        ("500", long.clone()),
        ("429", problem.to_string()),
        ("201", long.clone()),
        ("302", String::new()),
    ] {
        let upstream = Scripted::answering(status, &headers, &body).await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let answer = gateway.raw(&[("x-request-id", &request_id)]).await;
        let size = answer.metadata_size();
        assert!(size < 8192, "{status}: {size}");
        assert!(answer.code() != Code::Ok);
    }
}

#[tokio::test]
async fn credentials_that_the_api_repeats_are_redacted() {
    let echo: String = CREDENTIALS
        .iter()
        .map(|(name, value)| format!("{name}: {value}\n"))
        .collect();
    let problem = serde_json::json!({ "title": echo, "status": 400, "detail": echo }).to_string();
    for (status, body) in [("400", &problem), ("500", &echo), ("200", &echo)] {
        let upstream = Scripted::answering(status, &[("location", "/s3cret-key")], body).await;
        let gateway = Gateway::start(&upstream.url(), &["--log-level=trace"]).await;
        let answer = gateway.raw(&[]).await;
        let status = answer.status();
        let details = status.get_error_details();
        let shown = format!("{status:?} {details:?}");
        assert!(shown.contains("[redacted]"), "{shown}");
        assert!(
            shown.contains("5C1328435BF324E90A49402A@AdobeOrg"),
            "{shown}"
        );
        assert!(!shown.contains("s3cret"), "{shown}");
        gateway.terminate();
        let (_, log) = gateway.ended().await;
        assert!(!log.contains("s3cret"), "{log}");
    }
}
