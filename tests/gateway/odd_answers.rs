//! Answers that are written badly, or by somebody in between: what can be read
//! of them is read, and nothing is told that they do not prove.

use std::{io::Write, sync::Arc};

use aep_batch_gateway::proto::v1::BatchOrigin;
use aep_simulator::Fault;
use flate2::{Compression, write::GzEncoder};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{Gateway, Scripted, Step, certificate, request, simulator, with_id};

const BATCH: &str = r#"{"id":"5d01","status":"loading"}"#;
const NO_TOKEN: &str = r#"{"error_code":"403010","message":"Oauth token is missing."}"#;

/// An upstream that answers every request with these bytes, and closes.
async fn raw(answer: impl Into<Vec<u8>>) -> Scripted {
    Scripted::start(vec![vec![Step::ReadRequest, Step::Write(answer.into())]]).await
}

fn zipped(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// Enough good calls that the gateway may repeat some. Then a cache loses the
/// API's answer, and says so as the API would: 503 with `Retry-After`.
#[tokio::test]
async fn a_cache_that_lost_an_answer_gets_the_create_once() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for _ in 0..20 {
        gateway.create(request()).await.unwrap();
    }
    let lost = "varnish-503-after".parse::<Fault>().unwrap();
    upstream.inject(lost.clone());
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert_eq!(answer.reason(), "UPSTREAM_FAILED");
    assert_eq!(upstream.batches().len(), 21);

    upstream.inject(lost);
    let answer = gateway.create_with(with_id("mine"), &[]).await.unwrap();
    assert_eq!(answer.origin(), BatchOrigin::Recovered);
    assert_eq!(upstream.batches().len(), 22);
}

#[tokio::test]
async fn a_whole_batch_needs_no_proper_end_of_the_answer() {
    let chunk = format!("{:x}\r\n{BATCH}\r\n", BATCH.len());
    for answer in [
        // The last chunk is missing.
        format!("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n{chunk}"),
        // More was announced.
        format!("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{BATCH}"),
        // Nothing was announced.
        format!("HTTP/1.0 201 Created\r\n\r\n{BATCH}"),
    ] {
        let upstream = raw(answer.clone()).await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let batch = gateway.create(request()).await.expect(&answer);
        assert_eq!(batch.id, "5d01");
    }
}

#[tokio::test]
async fn a_whole_batch_needs_no_end_of_tls() {
    let (config, ca) = certificate("no_close_notify.pem");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(stream).await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"}") {
            tls.read_buf(&mut request).await.unwrap();
        }
        let answer = format!("HTTP/1.1 201 Created\r\nconnection: close\r\n\r\n{BATCH}");
        tls.write_all(answer.as_bytes()).await.unwrap();
        tls.flush().await.unwrap();
        // Dropped without close_notify.
    });
    let ca = format!("--upstream-ca-file={}", ca.display());
    let gateway = Gateway::start(&format!("https://localhost:{port}"), &[&ca]).await;
    assert_eq!(gateway.create(request()).await.unwrap().id, "5d01");
}

#[tokio::test]
async fn a_batch_that_breaks_off_after_its_id_is_named() {
    for (status, body, id) in [
        ("200 OK", r#"{"id":"5d01","status":"loa"#, Some("5d01")),
        (
            "200 OK",
            r#"{"tags":{"id":["x"]},"id":"5d01""#,
            Some("5d01"),
        ),
        ("200 OK", r#"["@/batches/5d01""#, Some("5d01")),
        ("200 OK", r#"{"id":"5d0"#, None),
        ("200 OK", r#"{"tags":{"id":"x"},"#, None),
        ("201 Created", r#"{"id":"5d0"#, None),
    ] {
        let upstream = raw(format!(
            "HTTP/1.1 {status}\r\ncontent-length: 999\r\n\r\n{body}"
        ))
        .await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let answer = gateway.raw(&[]).await;
        let (reason, outcome) = match (status, id) {
            ("200 OK", None) => ("ANSWER_UNPROVEN", "UNKNOWN"),
            _ => ("ANSWER_UNUSABLE", "APPLIED"),
        };
        assert_eq!(answer.reason(), reason, "{body}");
        assert_eq!(answer.outcome(), outcome, "{body}");
        assert_eq!(answer.info("batchId").as_deref(), id, "{body}");
        assert!(!answer.trailers_only);
    }
}

#[tokio::test]
async fn nothing_asks_for_compression_and_gzip_is_read_all_the_same() {
    let answer = |status: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    };
    let upstream = raw(answer("201 Created", &zipped(BATCH.as_bytes()))).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    assert_eq!(gateway.create(request()).await.unwrap().id, "5d01");
    assert!(upstream.requests()[0].contains("accept-encoding: identity\r\n"));

    let upstream = raw(answer("403 Forbidden", &zipped(NO_TOKEN.as_bytes()))).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let refused = gateway.raw(&[]).await;
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(refused.info("upstreamErrorCode").as_deref(), Some("403010"));

    // 64 MiB of blanks are 64 KiB of gzip.
    let bomb = zipped(&vec![b' '; 64 * 1024 * 1024]);
    let upstream = raw(answer("201 Created", &bomb)).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let bounded = gateway.raw(&[]).await;
    assert_eq!(bounded.outcome(), "APPLIED");
    assert!(bounded.status().message().contains("is larger than"));
}

#[tokio::test]
async fn the_code_of_a_badly_written_error_is_seen() {
    for body in [
        b"\xef\xbb\xbf{\"error_code\":\"403010\",\"message\":\"no\"}".as_slice(),
        b"{\"error_code\":\"403010\",\"message\":\"jet\xe9n\"}",
        br#"{"error_code":"403010","message":"\ud83d"}"#,
        br#"{"error_code":"403010","message":"no","time":1e999}"#,
    ] {
        let head = format!(
            "HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let upstream = raw([head.as_bytes(), body].concat()).await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let answer = gateway.raw(&[]).await;
        assert_eq!(answer.code(), Code::Unauthenticated, "{answer:?}");
        assert_eq!(answer.outcome(), "NOT_APPLIED");
    }
}

#[tokio::test]
async fn many_headers_and_a_blank_before_a_colon_harm_nothing() {
    let headers: String = (0..500).map(|i| format!("x-cdn-{i} : {i}\r\n")).collect();
    let length = BATCH.len();
    let upstream = raw(format!(
        "HTTP/1.1 201 Created\r\n{headers}content-length: {length}\r\n\r\n{BATCH}"
    ))
    .await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    assert_eq!(gateway.create(request()).await.unwrap().id, "5d01");
}

#[tokio::test]
async fn an_id_that_catalog_does_not_take_literally_is_refused() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for (id, character) in [
        ("store 7, week 31", "','"),
        ("!important", "'!'"),
        ("a*b", "'*'"),
    ] {
        for lookup in ["always", "on-retry"] {
            let gateway = Gateway::before(&upstream, &["--lookup", lookup]).await;
            let answer = gateway.raw_with_id(id, &[]).await;
            assert_eq!(answer.code(), Code::InvalidArgument, "{id}");
            let bad = answer.status().get_details_bad_request().unwrap();
            assert_eq!(bad.field_violations[0].field, "external_id");
            assert!(bad.field_violations[0].description.contains(character));
            assert_eq!(answer.outcome(), "NOT_APPLIED");
            assert!(answer.trailers_only);
        }
    }
    let answer = gateway.raw(&[("idempotency-key", "a,b")]).await;
    let bad = answer.status().get_details_bad_request().unwrap();
    assert_eq!(bad.field_violations[0].field, "idempotency-key");
    assert_eq!(upstream.received().len(), 0, "nothing was sent");

    // Without lookups there is no filter.
    let gateway = Gateway::before(&upstream, &["--lookup=never"]).await;
    let batch = gateway.create(with_id("!a,b*")).await.unwrap();
    assert_eq!(batch.external_id.as_deref(), Some("!a,b*"));
}

#[tokio::test]
async fn a_key_is_the_same_in_quotes_and_without() {
    let upstream = simulator().await;
    let one = Gateway::before(&upstream, &[]).await;
    let other = Gateway::before(&upstream, &[]).await;
    let quoted = [("idempotency-key", r#""k-1""#)];
    let first = one.create_with(request(), &quoted).await.unwrap();
    let plain = [("idempotency-key", "k-1")];
    let again = other.create_with(request(), &plain).await.unwrap();
    assert_eq!(again.origin(), BatchOrigin::Found);
    assert_eq!(first.batch, again.batch);
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn a_dataset_named_by_its_reference_is_the_same_dataset() {
    // Catalog shows the bare id.
    let lookup = r#"{"5d01":{"externalId":"mine","relatedObjects":[{"type":"dataSet","id":"5c8c3c555033b814b69f947f"}]}}"#;
    let catalog = Scripted::answering("200", &[], lookup).await;
    let upstream = Scripted::answering("201", &[], BATCH).await;
    let flag = format!("--catalog-url={}", catalog.url());
    let gateway = Gateway::start(&upstream.url(), &[&flag]).await;
    let mut message = with_id("mine");
    message.dataset_id = format!("@/dataSets/{}", message.dataset_id);
    let answer = gateway.create_with(message, &[]).await.unwrap();
    assert_eq!(answer.origin(), BatchOrigin::Found);
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_lookup_proves_by_equality_alone() {
    let batch = |number: usize, external_id: &str| {
        format!(r#""b{number}":{{"created":{number},"externalId":"{external_id}"}}"#)
    };
    let others = |count: usize| (0..count).map(|n| batch(n, "other"));
    let list = |batches: Vec<String>| format!("{{{}}}", batches.join(","));
    let mine_among_others = others(19).chain([batch(19, "mine")]).collect();
    for (lookup, expected) in [
        ("{}".to_owned(), Code::Ok),
        (list(others(2).collect()), Code::Ok),
        (list(vec![batch(0, "MINE"), batch(1, "mine ")]), Code::Ok),
        // A full list may go on with the batch that is looked for.
        (list(others(20).collect()), Code::Unavailable),
        // It does not show what it was asked for.
        (r#"{"b":{"status":"active"}}"#.to_owned(), Code::Unavailable),
        (r#"{"b":{"externalId":7}}"#.to_owned(), Code::Unavailable),
        (
            r#"{"error":{"code":"blocked"}}"#.to_owned(),
            Code::Unavailable,
        ),
        (NO_TOKEN.to_owned(), Code::Unavailable),
        ("<html>blocked</html>".to_owned(), Code::Unavailable),
    ] {
        let catalog = Scripted::answering("200", &[], &lookup).await;
        let upstream = Scripted::answering("201", &[], BATCH).await;
        let flag = format!("--catalog-url={}", catalog.url());
        let gateway = Gateway::start(&upstream.url(), &[&flag]).await;
        let answer = gateway.raw_with_id("mine", &[]).await;
        assert_eq!(answer.code(), expected, "{lookup}");
        let created = usize::from(expected == Code::Ok);
        assert_eq!(upstream.requests().len(), created, "{lookup}");
        if expected != Code::Ok {
            assert_eq!(answer.reason(), "LOOKUP_FAILED");
        }
    }
    let catalog = Scripted::answering("200", &[], &list(mine_among_others)).await;
    let upstream = Scripted::answering("201", &[], BATCH).await;
    let flag = format!("--catalog-url={}", catalog.url());
    let gateway = Gateway::start(&upstream.url(), &[&flag]).await;
    let found = gateway.create_with(with_id("mine"), &[]).await.unwrap();
    assert_eq!(found.origin(), BatchOrigin::Found);
    assert_eq!(found.batch.unwrap().id, "b19");
}

#[tokio::test]
async fn a_call_without_an_external_id_can_get_one() {
    let upstream = simulator().await;
    let flags = ["--generate-external-ids"];
    let gateway = Gateway::before(&upstream, &flags).await;

    // Nobody names the call: its id is random, and nobody needs to look for it first.
    for _ in 0..2 {
        gateway.create(request()).await.unwrap();
    }
    let made = upstream.batches();
    assert_ne!(made[0]["externalId"], made[1]["externalId"]);
    assert_ne!(made[0]["externalId"], made[0]["id"]);
    assert!(upstream.received().iter().all(|r| r.method == "POST"));

    // A lost answer is settled by the lookup.
    upstream.inject(Fault::ResetAfter);
    let recovered = gateway.create_with(request(), &[]).await.unwrap();
    assert_eq!(recovered.origin(), BatchOrigin::Recovered);
    assert_eq!(upstream.batches().len(), 3);

    // A mesh keeps the request id when it tries a call again, elsewhere.
    let named = [("x-request-id", "6ba7b810-9dad-11d1-80b4-00c04fd430c8")];
    let first = gateway.create_with(request(), &named).await.unwrap();
    let elsewhere = Gateway::before(&upstream, &flags).await;
    let again = elsewhere.create_with(request(), &named).await.unwrap();
    assert_eq!(again.origin(), BatchOrigin::Found);
    assert_eq!(first.batch, again.batch);
    // Another message under the same request id is another call.
    let mut other = request();
    other.dataset_id = "other".to_owned();
    let other = elsewhere.create_with(other, &named).await.unwrap();
    assert_eq!(other.origin(), BatchOrigin::Created);

    // The caller's own id stays.
    let own = gateway.create(with_id("own")).await.unwrap();
    assert_eq!(own.external_id.as_deref(), Some("own"));

    // What stays unknown tells the id, so that the caller can look for it.
    upstream.inject(Fault::TimeoutBefore);
    let unknown = gateway.raw(&[("grpc-timeout", "300m")]).await;
    assert_eq!(unknown.outcome(), "UNKNOWN");
    assert_eq!(unknown.info("externalId").unwrap().len(), 36);
}
