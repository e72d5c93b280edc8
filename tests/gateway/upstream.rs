//! How the API is reached: proxies, and what the HTTP client does not do.

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

#[tokio::test]
async fn no_proxy_is_honoured_too() {
    let upstream = simulator().await;
    let mut command = Gateway::command(&[
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
        "--upstream-url",
        &upstream.import_url(),
    ]);
    command.env("HTTP_PROXY", "http://127.0.0.1:1");
    command.env("NO_PROXY", "127.0.0.1");
    let gateway = Gateway::spawn(command).await;
    gateway.create(request()).await.unwrap();
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
