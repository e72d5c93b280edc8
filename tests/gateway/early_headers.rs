//! A create without an external id has its response headers on the caller's
//! connection before the first byte of its body goes upstream. So whenever the
//! gateway dies, a client or mesh that may still send the call again by itself
//! can make no second batch.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use aep_simulator::Fault;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream, UnixStream},
    time::timeout,
};
use tonic::Code;

use crate::support::{CREATE, CREDENTIALS, Client, Gateway, frame, request, simulator, with_id};

#[tokio::test]
async fn whoever_has_the_body_can_be_sure_that_the_caller_has_headers() {
    for _ in 0..10 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let gateway = Gateway::start(&url, &[]).await;
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        let head =
            tokio::spawn(
                async move { client.head(CREATE, &CREDENTIALS, &frame(&request())).await },
            );

        let (mut upstream, _) = listener.accept().await.unwrap();
        let mut read = Vec::new();
        while !read.ends_with(b"}") {
            assert_ne!(upstream.read_buf(&mut read).await.unwrap(), 0);
        }
        // The batch can exist from now on. The gateway is killed before it does anything more.
        gateway.signal("-KILL");
        let head = head.await.unwrap().expect("response headers");
        assert_eq!(head.status, 200);
        assert!(!head.headers.contains_key("grpc-status"));
    }
}

/// A caller that reads no more when it is told so.
struct Stalling {
    stream: UnixStream,
    stalled: Arc<AtomicBool>,
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.stalled.load(Ordering::Relaxed) {
            true => Poll::Pending,
            false => Pin::new(&mut self.stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The caller takes nothing, so its headers cannot leave. Then nothing of the
/// body goes upstream either, however long that lasts.
///
/// A Unix socket, because it holds a fixed number of bytes that nobody reads.
#[tokio::test]
async fn the_body_stays_where_the_headers_cannot_leave() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let path = std::env::temp_dir().join(format!("aep-early-headers-{}", std::process::id()));
    let listen = format!("--listen=unix:{}", path.display());
    let _gateway = Gateway::start(&url, &[&listen]).await;

    let stalled = Arc::new(AtomicBool::new(false));
    let stream = UnixStream::connect(&path).await.unwrap();
    let caller = Stalling {
        stream,
        stalled: stalled.clone(),
    };
    let client = Client::over(caller).await.unwrap();
    let begin = |metadata: Vec<(&'static str, String)>| {
        let mut client = client.clone();
        tokio::spawn(async move {
            let metadata: Vec<_> = metadata.iter().map(|(n, v)| (*n, v.as_str())).collect();
            client.head(CREATE, &metadata, &frame(&request())).await
        })
    };
    let id = |number: usize| ("x-request-id", format!("{number:0128}"));
    begin(vec![id(0)]).await.unwrap().expect("a refusal");
    // More refusals than the socket holds.
    stalled.store(true, Ordering::Relaxed);
    for number in 1..250 {
        begin(vec![id(number)]);
    }
    begin(
        CREDENTIALS
            .map(|(name, value)| (name, value.to_owned()))
            .to_vec(),
    );
    let (mut upstream, _) = listener.accept().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert_ne!(upstream.read_buf(&mut head).await.unwrap(), 0);
    }
    let mut body = [0];
    let read = timeout(Duration::from_millis(300), upstream.read(&mut body)).await;
    assert!(read.is_err(), "the body came before the headers had left");

    // The caller reads again, and all goes on.
    stalled.store(false, Ordering::Relaxed);
    begin(vec![id(0)]);
    let read = timeout(Duration::from_secs(10), upstream.read(&mut body)).await;
    assert_eq!(read.expect("the body").unwrap(), 1);
}

#[tokio::test]
async fn what_fails_before_the_body_leaves_may_be_sent_again() {
    // No connection: nothing has left, so that a mesh may try another gateway.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let gateway = Gateway::start(&url, &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.code(), Code::Unavailable);
    assert!(answer.trailers_only);
    assert_eq!(answer.headers["aep-batch-retry"], "safe");
}

#[tokio::test]
async fn what_may_be_sent_again_says_so_and_nothing_else_does() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for (fault, safe) in [
        (None, false),
        (Some("status-503"), true), // a code of Adobe's API gateway
        (Some("status-429"), false),
        (Some("status-400"), false),
        (Some("status-500"), false),
        (Some("lost-503"), false),
        (Some("reset-after"), false),
        (Some("empty-response"), false),
    ] {
        if let Some(fault) = fault {
            upstream.inject(fault.parse::<Fault>().unwrap());
        }
        let answer = gateway.raw(&[]).await;
        assert!(!answer.trailers_only, "{fault:?}: it was sent");
        assert!(!answer.headers.contains_key("aep-batch-retry"));
        let told = answer.trailers.get("aep-batch-retry");
        assert_eq!(
            told.map(|value| value.as_bytes()),
            safe.then_some(b"safe".as_slice())
        );
    }

    // With an external id it leaves in a form that a mesh retries.
    upstream.inject("status-503".parse::<Fault>().unwrap());
    let answer = gateway.raw_with_id("mine", &[]).await;
    assert!(answer.trailers_only);
    assert_eq!(answer.headers["aep-batch-retry"], "safe");
}

/// Over HTTP/1.1 for a browser, too.
#[tokio::test]
async fn a_page_has_the_headers_before_the_body_leaves() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::start(&url, &["--grpc-web"]).await;
    let mut page = TcpStream::connect(&gateway.listen).await.unwrap();
    let body = frame(&request());
    let mut call = format!(
        "POST {CREATE} HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc-web+proto\r\n\
         content-length: {}\r\n",
        body.len()
    );
    for (name, value) in CREDENTIALS {
        call.push_str(&format!("{name}: {value}\r\n"));
    }
    call.push_str("\r\n");
    page.write_all(call.as_bytes()).await.unwrap();
    page.write_all(&body).await.unwrap();

    let (mut upstream, _) = listener.accept().await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"}") {
        assert_ne!(upstream.read_buf(&mut read).await.unwrap(), 0);
    }
    gateway.signal("-KILL");
    let mut answer = Vec::new();
    let _ = page.read_to_end(&mut answer).await;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{answer:?}");
}

/// Two creates of one external id make one batch in any case, so their headers
/// need not leave before.
#[tokio::test]
async fn a_create_with_an_external_id_takes_its_time() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let answer = gateway.raw_with_id("mine", &[]).await;
    assert_eq!(answer.code(), Code::Ok);
    assert_eq!(answer.headers["aep-batch-outcome"], "APPLIED");
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.trailers["aep-batch-outcome"], "APPLIED");
    assert!(!answer.headers.contains_key("aep-batch-outcome"));
    assert_eq!(gateway.create(with_id("mine")).await.unwrap().id.len(), 32);
}
