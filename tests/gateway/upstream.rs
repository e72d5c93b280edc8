//! How the API is reached: proxies, and what the HTTP client does not do.

use aep_batch_gateway::proto::v1::Batch;
use aep_simulator::Simulator;
use tonic::{Code, Status};

use crate::support::{Gateway, Scripted, Step, request, simulator};

#[tokio::test]
async fn the_proxy_of_the_environment_is_used() {
    let answer = r#"{"id":"through-the-proxy"}"#;
    let proxy = Scripted::answering("201 Created", &[], answer).await;
    let mut command = Gateway::command(&[
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
        "--upstream-url=http://api.invalid/import",
    ]);
    command.env("HTTP_PROXY", proxy.url());
    let gateway = Gateway::spawn(command).await;
    let batch = gateway.create(request()).await.unwrap();
    assert_eq!(batch.id, "through-the-proxy");
    let asked = proxy.requests()[0].clone();
    assert!(
        asked.starts_with("POST http://api.invalid/import/batches HTTP/1.1"),
        "{asked}"
    );
}

async fn create_past_a_dead_proxy(upstream: &Simulator, no_proxy: &str) -> Result<Batch, Status> {
    let mut command = Gateway::command(&[
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
        "--upstream-url",
        &upstream.import_url(),
    ]);
    command.env("HTTP_PROXY", "http://127.0.0.1:1");
    command.env("NO_PROXY", no_proxy);
    let gateway = Gateway::spawn(command).await;
    gateway.create(request()).await
}

#[tokio::test]
async fn no_proxy_is_honoured_too() {
    let upstream = simulator().await;
    let host_and_port = upstream.address().to_string();
    for no_proxy in ["127.0.0.1", "127.0.0.0/8", "*", &host_and_port] {
        let batch = create_past_a_dead_proxy(&upstream, no_proxy).await;
        assert!(batch.is_ok(), "{no_proxy}: {batch:?}");
    }
    for no_proxy in ["", "127.0.0.2", "127.0.0.1:1"] {
        let refused = create_past_a_dead_proxy(&upstream, no_proxy).await;
        let refused = refused.expect_err(no_proxy);
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    }
}

#[tokio::test]
async fn cookies_are_not_kept_and_broken_gzip_is_no_answer() {
    let set_cookie = [("set-cookie", "a=b"), ("content-type", "application/json")];
    let compressed = [("content-encoding", "gzip")];
    let upstream = Scripted::start(vec![
        vec![
            Step::ReadRequest,
            Step::answer("201", &set_cookie, r#"{"id":"b"}"#),
        ],
        vec![
            Step::ReadRequest,
            Step::answer("201", &compressed, "\u{1f}\u{8b}"),
        ],
    ])
    .await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    gateway.create(request()).await.unwrap();
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.reason(), "ANSWER_UNUSABLE");
    for asked in upstream.requests() {
        assert!(!asked.contains("cookie"), "{asked}");
    }
}
