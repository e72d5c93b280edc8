//! Every way in which a connection can fail: what is told must be what
//! happened, and what happened stands in the upstream's ledger.

use std::{net::SocketAddr, time::Duration};

use aep_simulator::Fault;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tonic::Code;

use crate::support::{
    Client, Gateway, RawAnswer, Scripted, Step, TlsFront, certificate, request, simulator,
};

/// Certainly not created: may be retried by anyone. A call whose body had begun
/// to leave has headers already, so that no mesh retries it.
#[track_caller]
fn assert_never_sent(answer: &RawAnswer, reason: &str) {
    assert_eq!(answer.reason(), reason, "{:?}", answer.status());
    assert_eq!(answer.code(), Code::Unavailable);
    assert_eq!(answer.outcome(), "NOT_APPLIED");
    assert_eq!(answer.trailers_only, reason != "UPSTREAM_UNPROCESSED");
    assert_eq!(answer.trailers["aep-batch-retry"], "safe");
}

/// Perhaps created: must not be retried by anyone who does not look.
#[track_caller]
fn assert_unknown(answer: &RawAnswer, reason: &str) {
    assert_eq!(answer.reason(), reason, "{:?}", answer.status());
    assert_eq!(answer.code(), Code::Unknown);
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert!(!answer.trailers_only);
}

#[tokio::test]
async fn refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let gateway = Gateway::start(&format!("http://{address}"), &[]).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_CONNECT_FAILED");
}

/// A listener whose queue is full drops what arrives, as a lost route does.
async fn unroutable() -> (SocketAddr, impl Sized) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let listener = socket.listen(1).unwrap();
    let mut queue = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
    {
        queue.push(stream);
    }
    (address, (listener, queue))
}

#[tokio::test]
async fn unroutable_or_silent_at_connect() {
    let (address, _open) = unroutable().await;
    let flags = ["--connect-timeout=200ms"];
    let gateway = Gateway::start(&format!("http://{address}"), &flags).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_CONNECT_TIMEOUT");

    // The caller's own deadline comes first: that is told, and it is not UNKNOWN.
    let flags = ["--connect-timeout=10s"];
    let gateway = Gateway::start(&format!("http://{address}"), &flags).await;
    let answer = gateway.raw(&[("grpc-timeout", "200m")]).await;
    assert_eq!(answer.reason(), "DEADLINE_BEFORE_SENDING");
    assert_eq!(answer.code(), Code::DeadlineExceeded);
    assert_eq!(answer.outcome(), "NOT_APPLIED");
}

#[tokio::test]
async fn dns_failure() {
    // A label of more than 63 characters is refused by the resolver itself.
    let url = format!("http://{}.invalid", "x".repeat(64));
    let gateway = Gateway::start(&url, &[]).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_DNS_FAILED");
}

#[tokio::test]
async fn tls_failure() {
    let upstream = simulator().await;
    let (config, ca) = certificate("tls_failure.pem");
    let front = TlsFront::start(config, &["http/1.1"], upstream.address()).await;

    let gateway = Gateway::start(&front.url(), &[]).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_TLS_FAILED");

    // No TLS there at all.
    let url = upstream.import_url().replace("http:", "https:");
    let gateway = Gateway::start(&url, &[]).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_TLS_FAILED");
    assert_eq!(upstream.batches().len(), 0);

    // With the authority that signed it, the same place works.
    let flag = format!("--upstream-ca-file={}", ca.display());
    let gateway = Gateway::start(&front.url(), &[&flag]).await;
    gateway.create(request()).await.unwrap();
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn http2_upstream() {
    let upstream = simulator().await;
    let (config, ca) = certificate("http2_upstream.pem");
    let front = TlsFront::start(config, &["h2"], upstream.address()).await;
    let flag = format!("--upstream-ca-file={}", ca.display());
    let tls = Gateway::start(&front.url(), &[&flag]).await;
    let plain = Gateway::start(&upstream.import_url(), &["--upstream-http=2"]).await;
    for gateway in [tls, plain] {
        let before = upstream.batches().len();
        gateway.create(request()).await.unwrap();
        assert_eq!(upstream.batches().len(), before + 1);

        upstream.inject(Fault::RefusedStream);
        assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_UNPROCESSED");
        assert_eq!(upstream.batches().len(), before + 1);

        upstream.inject(Fault::CloseAfter); // here: RST_STREAM with INTERNAL_ERROR
        assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
        upstream.inject(Fault::ResetAfter);
        assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
        assert_eq!(upstream.batches().len(), before + 3);
    }
}

/// An HTTP/2 peer that lets a request come and then says GOAWAY.
async fn goes_away(last_stream: u32) -> Scripted {
    let settings = b"\0\0\0\x04\0\0\0\0\0".to_vec();
    let mut goaway = b"\0\0\x08\x07\0\0\0\0\0".to_vec();
    goaway.extend(last_stream.to_be_bytes());
    goaway.extend(0_u32.to_be_bytes()); // NO_ERROR
    Scripted::start(vec![vec![
        Step::Write(settings),
        Step::Read(24),
        Step::Wait(Duration::from_millis(50)),
        Step::Write(goaway),
        Step::Wait(Duration::from_millis(50)),
    ]])
    .await
}

#[tokio::test]
async fn goaway() {
    // The request is stream 1: above the last one that the peer processes, or not.
    let upstream = goes_away(0).await;
    let gateway = Gateway::start(&upstream.url(), &["--upstream-http=2"]).await;
    assert_never_sent(&gateway.raw(&[]).await, "UPSTREAM_UNPROCESSED");
    let upstream = goes_away(1).await;
    let gateway = Gateway::start(&upstream.url(), &["--upstream-http=2"]).await;
    assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
}

#[tokio::test]
async fn reset_before_the_request_is_read() {
    let script = vec![Step::Reset];
    let upstream = Scripted::start(vec![script]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    // Whether the reset overtakes the request is a race; each side of it has a true answer.
    match answer.reason().as_str() {
        // Its headers may have left: a connection had asked for the body.
        "UPSTREAM_CONNECT_FAILED" => assert_eq!(answer.outcome(), "NOT_APPLIED"),
        _ => assert_unknown(&answer, "CONNECTION_LOST"),
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn reset_in_the_request() {
    let script = vec![Step::Read(20), Step::Reset];
    let upstream = Scripted::start(vec![script]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
}

#[tokio::test]
async fn reset_or_closed_before_an_answer() {
    for (fault, created) in [
        (Fault::ResetBefore, 0),
        (Fault::CloseBefore, 0),
        (Fault::ResetAfter, 1),
        (Fault::CloseAfter, 1),
    ] {
        let upstream = simulator().await;
        let gateway = Gateway::start(&upstream.import_url(), &[]).await;
        upstream.inject(fault.clone());
        assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
        assert_eq!(upstream.batches().len(), created, "{fault}");
        assert_eq!(upstream.received().len(), 1, "{fault}: nothing is repeated");
        gateway.create(request()).await.unwrap(); // and the gateway is well
    }
}

#[tokio::test]
async fn half_an_answer() {
    // The status line says that the batch exists, whatever became of the rest.
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    upstream.inject(Fault::HalfResponse);
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.reason(), "ANSWER_UNUSABLE");
    assert_eq!(answer.outcome(), "APPLIED");
    assert!(!answer.trailers_only);
    assert_eq!(upstream.batches().len(), 1);
    let id = upstream.batches()[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.info("batchId"), Some(id));

    // Half a status line says nothing.
    let script = vec![Step::ReadRequest, Step::Write(b"HTTP/1.1 20".to_vec())];
    let upstream = Scripted::start(vec![script]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");

    // Half of an error is still an error.
    let half = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 100\r\n\r\n{\"title\":".to_vec();
    let upstream = Scripted::start(vec![vec![Step::ReadRequest, Step::Write(half)]]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.reason(), "API_INVALID_REQUEST");
    assert_eq!(answer.outcome(), "NOT_APPLIED");
}

#[tokio::test]
async fn no_http_at_all() {
    let garbage = Step::Write(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    let upstream = Scripted::start(vec![vec![Step::ReadRequest, garbage]]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    assert_unknown(&gateway.raw(&[]).await, "CONNECTION_LOST");
}

#[tokio::test]
async fn silence() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &["--request-timeout=300ms"]).await;
    upstream.inject(Fault::TimeoutAfter);
    assert_unknown(&gateway.raw(&[]).await, "UPSTREAM_TIMEOUT");
    assert_eq!(upstream.batches().len(), 1);
    upstream.inject(Fault::TimeoutBefore);
    assert_unknown(&gateway.raw(&[]).await, "UPSTREAM_TIMEOUT");
    assert_eq!(upstream.batches().len(), 1);
}

async fn connect(gateway: &Gateway) -> Client {
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    Client::over(stream).await.unwrap()
}

#[tokio::test]
async fn a_stale_connection() {
    // The upstream resets a kept connection when the next request is on its way.
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    upstream.inject(Fault::Stale);
    // One connection in, so that all its calls have the same connection out.
    let mut client = connect(&gateway).await;
    assert_eq!(client.create().await.unwrap().code(), Code::Ok);
    let answer = client.create().await.unwrap();
    assert_unknown(&answer, "CONNECTION_LOST");
    assert_eq!(upstream.batches().len(), 1);

    // The upstream has closed it before: a new connection is made, and nothing is told.
    let ok = Step::answer("201 Created", &[], r#"{"id":"b"}"#);
    let upstream = Scripted::start(vec![vec![Step::ReadRequest, ok]]).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let mut client = connect(&gateway).await;
    for calls in 1..=20 {
        assert_eq!(client.create().await.unwrap().code(), Code::Ok);
        assert_eq!(upstream.requests().len(), calls);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
