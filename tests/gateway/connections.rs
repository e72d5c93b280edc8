//! Connections: how many, how long, and what becomes of silent ones.

use std::time::{Duration, Instant};

use aep_simulator::Fault;
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinSet,
    time::timeout,
};
use tonic::Code;

use crate::support::{
    Authority, CREATE, CREDENTIALS, Client, Gateway, TlsFolder, frame, request, simulator,
};

#[tokio::test]
async fn an_old_connection_is_told_to_go_away_and_its_calls_finish() {
    let upstream = simulator().await;
    let flags = ["--max-connection-age=300ms"];
    let gateway = Gateway::before(&upstream, &flags).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    let begin = Instant::now();
    let connection = tokio::spawn(connection);

    upstream.inject(Fault::Delay(Duration::from_millis(1000)));
    let mut head = http::Request::post(format!("http://{}{CREATE}", gateway.listen))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in CREDENTIALS {
        head = head.header(name, value);
    }
    let (answer, mut sender) = client.send_request(head.body(()).unwrap(), false).unwrap();
    sender
        .send_data(Bytes::from(frame(&request())), true)
        .unwrap();
    let mut body = answer.await.unwrap().into_body();
    while body.data().await.is_some() {}
    let trailers = body.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    assert!(begin.elapsed() > Duration::from_millis(900));
    // The last call is over, so the connection ends: it was told to go away.
    let ended = timeout(Duration::from_secs(5), connection).await.unwrap();
    ended.unwrap().unwrap();
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
}

#[tokio::test]
async fn more_connections_than_there_may_be_are_closed_at_once() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &["--max-connections=1"]).await;
    let first = TcpStream::connect(&gateway.listen).await.unwrap();
    gateway.page("/livez").await; // it has been accepted by now
    let mut second = TcpStream::connect(&gateway.listen).await.unwrap();
    let closed = timeout(Duration::from_secs(5), second.read(&mut [0; 1])).await;
    assert_eq!(closed.unwrap().unwrap(), 0);
    drop(first);
    let begin = Instant::now();
    while TcpStream::connect(&gateway.listen).await.is_err() {}
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_connection_that_does_not_begin_in_time_is_closed() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let ca = Authority::new("ca");
    let folder = TlsFolder::new("slow", &ca.issue(&["localhost"]), &ca);
    let flags = folder.mtls();
    let tls_gateway = Gateway::before(&upstream, &flags.each_ref().map(String::as_str)).await;

    let mut silent = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut idle = Client::over(TcpStream::connect(&gateway.listen).await.unwrap())
        .await
        .unwrap();
    // The first bytes of a ClientHello; then a byte now and then.
    let mut slow = TcpStream::connect(&tls_gateway.listen).await.unwrap();
    let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    slow.write_all(&hello).await.unwrap();

    let begin = Instant::now();
    let (mut one, mut other) = ([0; 100], [0; 100]);
    let both = async {
        tokio::join!(
            async { while silent.read(&mut one).await.unwrap() > 0 {} },
            async {
                let pause = Duration::from_millis(500);
                while timeout(pause, slow.read(&mut other)).await.is_err() {
                    slow.write_all(&[0]).await.unwrap();
                }
            }
        )
    };
    timeout(Duration::from_secs(15), both)
        .await
        .expect("closed");
    assert!(begin.elapsed() > Duration::from_secs(9));
    let silent = r#"aep_gateway_refused_connections_total{reason="silent"}"#;
    gateway.counts(silent, "1").await;
    tls_gateway.counts(silent, "1").await;
    tls_gateway.counts("aep_gateway_connections", "0").await;
    // One that speaks HTTP/2 may be idle.
    assert_eq!(idle.create().await.unwrap().code(), Code::Ok);
}

#[tokio::test]
async fn a_connection_that_says_nothing_does_not_delay_the_end() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let _silent = TcpStream::connect(&gateway.listen).await.unwrap();
    gateway.counts("aep_gateway_connections", "1").await;
    let begin = Instant::now();
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success() && !log.contains("drain timeout"), "{log}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{log}");
}

#[tokio::test]
async fn metadata_of_16_kib_is_taken_and_more_refused_cleanly() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut client = Client::over(stream).await.unwrap();
    for (size, taken) in [(16, true), (20, true), (40, false)] {
        let token = format!("Bearer {}", "x".repeat(size * 1024));
        let metadata = [&CREDENTIALS[1..], &[("authorization", token.as_str())]].concat();
        let answer = client.call(CREATE, &metadata, &frame(&request())).await;
        let answer = answer.unwrap();
        match taken {
            true => assert_eq!(answer.code(), Code::Ok, "{size} KiB"),
            false => assert_eq!(answer.http_status, 431, "{size} KiB"),
        }
    }
    // The connection and its other calls are none the worse for it.
    assert_eq!(client.create().await.unwrap().code(), Code::Ok);
    assert_eq!(upstream.batches().len(), 3);
}

#[tokio::test]
async fn a_connection_has_a_limit_of_calls_and_says_so() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    stream
        .write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])
        .await
        .unwrap(); // SETTINGS
    let mut settings = [0; 128];
    let read = stream.read(&mut settings).await.unwrap();
    let streams = [0, 3, 0, 0, 1, 0]; // SETTINGS_MAX_CONCURRENT_STREAMS = 256
    assert!(settings[..read].windows(6).any(|it| it == streams));
}

#[tokio::test]
async fn pings_are_answered() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let (_client, mut connection) = h2::client::handshake(stream).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    tokio::spawn(connection);
    for _ in 0..100 {
        let pong = timeout(Duration::from_secs(5), pings.ping(h2::Ping::opaque()));
        pong.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_connection_may_last_for_ever() {
    let upstream = simulator().await;
    let flags = ["--max-connection-age=18446744073709551615s"];
    let gateway = Gateway::before(&upstream, &flags).await;
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
    assert!(!gateway.log().contains("panicked"), "{}", gateway.log());
}

/// The system takes connections for a gateway that has no time now, so a burst need not
/// wait for a second try of TCP's.
#[tokio::test]
async fn a_thousand_clients_can_connect_at_once() {
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let clients = most.trim().parse::<usize>().unwrap().min(1000);
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    gateway.signal("-STOP");
    let mut connects = JoinSet::new();
    for _ in 0..clients {
        let connect = TcpStream::connect(gateway.listen.clone());
        connects.spawn(timeout(Duration::from_millis(900), connect));
    }
    let connected = connects.join_all().await;
    gateway.signal("-CONT");
    let mut served = 0;
    for stream in connected {
        let mut stream = stream.expect("no second try").unwrap();
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await
            .unwrap();
        let mut settings = [0; 9];
        let answered = timeout(Duration::from_secs(10), stream.read_exact(&mut settings));
        served += usize::from(answered.await.unwrap().is_ok());
    }
    assert_eq!(served, clients);
}

/// A gateway that may open so many files.
async fn with_files(upstream: &str, soft: u32, hard: &str) -> Gateway {
    let mut command = Command::new("sh");
    let limits = format!("ulimit -Sn {soft}; ulimit -Hn {hard}; exec \"$0\" \"$@\"");
    let program = env!("CARGO_BIN_EXE_aep-batch-gateway");
    command.args(["-c", &limits, program, "serve", "--upstream-url", upstream]);
    command.args(["--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"]);
    Gateway::spawn({
        command.env("NO_PROXY", "127.0.0.1").kill_on_drop(true);
        command
    })
    .await
}

#[tokio::test]
async fn as_many_files_may_be_open_as_the_system_allows() {
    let upstream = simulator().await;
    let gateway = with_files(&upstream.import_url(), 100, "500").await;
    assert_eq!(gateway.metric("process_max_fds").await, "500");
    // Which is less than the flags want, so there are fewer connections.
    gateway.logs("fewer connections are accepted").await;
    assert_eq!(gateway.metric("aep_gateway_max_connections").await, "150");
    let mut connections = Vec::new();
    for _ in 0..600 {
        connections.push(TcpStream::connect(&gateway.listen).await.unwrap());
    }
    gateway.counts("aep_gateway_connections", "150").await;
    assert_eq!(gateway.page("/livez").await.0, 200);
    let refused = r#"aep_gateway_refused_connections_total{reason="limit"}"#;
    gateway.counts(refused, "450").await;
    let log = gateway.log();
    let lines = log.matches("connection limit reached").count();
    assert!((1..20).contains(&lines), "{log}");
    drop(connections);
    gateway.counts("aep_gateway_connections", "0").await;
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
}

#[tokio::test]
async fn connections_that_cannot_be_accepted_are_counted() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut caller = Client::over(stream).await.unwrap();
    // It is accepted when it has an answer, and has made no connection to the API.
    let refused = caller.call(CREATE, &[], &frame(&request())).await.unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let pid = Pid::from_raw(gateway.pid().try_into().unwrap());
    let none_more = Rlimit {
        current: Some(1),
        maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
    };
    let before = prlimit(pid, Resource::Nofile, none_more).unwrap();
    let _waiting = TcpStream::connect(&gateway.listen).await.unwrap();
    gateway.logs("cannot accept connections").await;
    // Nor can one be made to the API, which is not the API's fault.
    let answer = caller.create().await.unwrap();
    assert_eq!(answer.reason(), "GATEWAY_OVERLOADED", "{answer:?}");
    assert!(
        answer
            .status()
            .message()
            .contains("no file descriptor left")
    );
    tokio::time::sleep(Duration::from_millis(300)).await; // some ten tries
    prlimit(pid, Resource::Nofile, before).unwrap();
    let name = r#"aep_gateway_refused_connections_total{reason="accept"}"#;
    let count: u32 = gateway.metric(name).await.parse().unwrap();
    let lines = gateway.log().matches("cannot accept connections").count();
    assert!(count > 3 && lines < 3, "{count} {lines}");
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
}
