//! What a call must say of itself, and what of it goes upstream.

use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{CREDENTIALS, Gateway, RawAnswer, request, simulator};

const CREATE: &str = "/aep.ingestion.v1.BatchService/CreateBatch";

fn fields(answer: &RawAnswer) -> Vec<String> {
    let details = answer.status().get_details_bad_request().unwrap();
    let violations = details.field_violations.into_iter();
    violations.map(|violation| violation.field).collect()
}

#[tokio::test]
async fn what_is_missing_malformed_or_repeated_is_named_and_nothing_is_sent() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let body = crate::support::frame(&request());

    for missing in 0..4 {
        let mut rest = CREDENTIALS.to_vec();
        let (name, _) = rest.remove(missing);
        let answer = gateway.raw_call(CREATE, &rest, &body).await;
        assert_eq!(answer.code(), Code::Unauthenticated, "{name}");
        assert_eq!(answer.reason(), "CREDENTIALS_MISSING");
        assert_eq!(fields(&answer), [name]);
        assert!(answer.status().message().contains(name));
    }
    for bad in ["Basic s3cret", "Bearer", "s3cret", ""] {
        let mut metadata = CREDENTIALS;
        metadata[0].1 = bad;
        let answer = gateway.raw_call(CREATE, &metadata, &body).await;
        assert_eq!(answer.code(), Code::InvalidArgument, "{bad}");
        assert_eq!(answer.reason(), "INVALID_REQUEST");
        assert_eq!(fields(&answer), ["authorization"]);
        assert!(!format!("{answer:?}").contains("s3cret"));
    }
    for (name, value) in CREDENTIALS {
        let answer = gateway.raw(&[(name, value)]).await;
        assert_eq!(answer.code(), Code::InvalidArgument, "{name}");
        assert_eq!(fields(&answer), [name]);
    }
    let answer = gateway.raw(&[("grpc-timeout", "soon")]).await;
    assert_eq!(answer.code(), Code::InvalidArgument);
    assert_eq!(fields(&answer), ["grpc-timeout"]);

    let message = aep_batch_gateway::proto::v1::CreateBatchRequest::default();
    let body = crate::support::frame(&message);
    let answer = gateway.raw_call(CREATE, &CREDENTIALS, &body).await;
    assert_eq!(answer.code(), Code::InvalidArgument);
    assert_eq!(fields(&answer), ["dataset_id"]);
    assert!(answer.trailers_only);

    assert_eq!(upstream.received().len(), 0);
}

#[tokio::test]
async fn nothing_else_is_passed_on_unless_it_is_configured() {
    let upstream = simulator().await;
    let metadata = [
        ("cookie", "a=b"),
        ("x-custom", "1"),
        ("x-custom", "2"),
        ("x-envoy-attempt-count", "1"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-request-id", "mine"),
    ];
    let names = |i: usize| -> Vec<String> {
        let headers = &upstream.received()[i].headers;
        let mut names: Vec<_> = headers.keys().map(ToString::to_string).collect();
        names.sort();
        names
    };
    let usual = [
        "accept",
        "accept-encoding",
        "authorization",
        "content-length",
        "content-type",
        "host",
        "user-agent",
        "x-api-key",
        "x-gw-ims-org-id",
        "x-request-id",
        "x-sandbox-name",
    ];

    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let answer = gateway.raw(&metadata).await;
    assert_eq!(answer.code(), Code::Ok);
    assert_eq!(names(0), usual);
    assert_eq!(upstream.received()[0].headers["x-request-id"], "mine");
    assert_eq!(answer.headers["x-request-id"], "mine");
    assert_eq!(answer.trailers["aep-batch-outcome"], "APPLIED");

    let flags = ["--forward-metadata=x-custom,x-absent"];
    let gateway = Gateway::start(&upstream.import_url(), &flags).await;
    gateway.raw(&metadata).await;
    let custom: Vec<_> = upstream.received()[1]
        .headers
        .get_all("x-custom")
        .iter()
        .map(|value| value.to_str().unwrap().to_owned())
        .collect();
    assert_eq!(custom, ["1", "2"]);
    assert_eq!(names(1).len(), usual.len() + 1);
}

#[tokio::test]
async fn defaults_fill_in() {
    let upstream = simulator().await;
    let token = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("default_token");
    std::fs::write(&token, "s3cret-file\n").unwrap();
    let token = format!("--default-token-file={}", token.display());
    let flags = [
        token.as_str(),
        "--callers-are-authenticated",
        "--default-api-key=s3cret-default",
        "--default-org-id=org@AdobeOrg",
        "--default-sandbox-name=prod",
        "--log-level=trace",
    ];
    let gateway = Gateway::start(&upstream.import_url(), &flags).await;
    let body = crate::support::frame(&request());
    let answer = gateway.raw_call(CREATE, &[], &body).await;
    assert_eq!(answer.code(), Code::Ok);
    let own = [("x-sandbox-name", "dev")];
    assert_eq!(gateway.raw_call(CREATE, &own, &body).await.code(), Code::Ok);

    let received = upstream.received();
    assert_eq!(received[0].headers["authorization"], "Bearer s3cret-file");
    assert_eq!(received[0].headers["x-api-key"], "s3cret-default");
    assert_eq!(received[0].headers["x-sandbox-name"], "prod");
    assert_eq!(received[1].headers["x-sandbox-name"], "dev");
    assert!(!gateway.log().contains("s3cret"), "{}", gateway.log());
}

#[tokio::test]
async fn a_large_value_is_taken_and_a_larger_one_refused_cleanly() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let body = crate::support::frame(&request());
    let mut metadata = CREDENTIALS;
    let token = format!("Bearer {}", "t".repeat(16 * 1024));
    metadata[0].1 = &token;
    let answer = gateway.raw_call(CREATE, &metadata, &body).await;
    assert_eq!(answer.code(), Code::Ok);

    let token = format!("Bearer {}", "t".repeat(40 * 1024));
    metadata[0].1 = &token;
    let answer = gateway.raw_call(CREATE, &metadata, &body).await;
    assert_eq!(answer.http_status, 431);
}
