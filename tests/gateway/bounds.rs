//! What a peer can make the gateway hold: bounded, whatever it sends and leaves out.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::SendRequest};
use http::Response;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinSet,
    time::timeout,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    CREATE, CREDENTIALS, Client, Gateway, LIST, Scripted, frame, request, simulator, with_id,
};

const GZIP: (&str, &str) = ("grpc-encoding", "gzip");

/// The largest message that is taken, and the prefix that promises it.
const LARGEST: usize = 256 * 1024;
const PROMISE: [u8; 5] = [0, 0, 4, 0, 0];

/// `message`, as gzip has it and without being much smaller.
fn gzip(message: &[u8]) -> Vec<u8> {
    let mut compressed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut compressed, message).unwrap();
    compressed.finish().unwrap()
}

/// In gRPC's framing, marked as compressed.
fn compressed(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u32).to_be_bytes();
    [&[1][..], &length, content].concat()
}

async fn connect(gateway: &Gateway) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Begins a call and does not end it: the answer to come, and what keeps it open.
async fn begin(
    sender: &mut SendRequest<Bytes>,
    metadata: &[(&str, &str)],
    body: Bytes,
) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
    let mut head = http::Request::post(format!("http://localhost{CREATE}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in metadata {
        head = head.header(*name, *value);
    }
    *sender = sender.clone().ready().await.unwrap();
    let (answer, mut stream) = sender.send_request(head.body(()).unwrap(), false).unwrap();
    if !body.is_empty() {
        stream.send_data(body, false).unwrap();
    }
    (answer, stream)
}

/// The code and reason of an answer that has no message.
fn told(answer: &Response<RecvStream>) -> (Code, String) {
    use tonic_types::StatusExt;
    let status = tonic::Status::from_header_map(answer.headers()).expect("Trailers-Only");
    assert_eq!(answer.headers()["aep-batch-outcome"], "NOT_APPLIED");
    let reason = status.get_details_error_info().unwrap().reason;
    (status.code(), reason)
}

#[tokio::test]
async fn a_call_has_one_message() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let one = frame(&request());
    let another = |more: &[u8]| [&one[..], more].concat();
    for body in [&[], &another(&one)[..], &another(&[0]), &another(&PROMISE)] {
        let answer = gateway.raw_call(CREATE, &CREDENTIALS, body).await;
        assert_eq!(answer.code(), Code::Unimplemented, "{body:?}");
        assert_eq!(answer.reason(), "NOT_ONE_MESSAGE");
        assert!(answer.trailers_only);
    }
    // The first byte too many ends the call, whatever would follow.
    let metadata = [&CREDENTIALS[..], &[GZIP]].concat();
    let mut sender = connect(&gateway).await;
    let bomb = compressed(&gzip(&vec![0; LARGEST]));
    let (answer, mut stream) = begin(&mut sender, &metadata, one.clone().into()).await;
    stream.send_data(Bytes::from(vec![1]), false).unwrap();
    let _ = stream.send_data(bomb.repeat(100).into(), false);
    let answer = timeout(Duration::from_secs(5), answer).await.unwrap();
    assert_eq!(told(&answer.unwrap()).1, "NOT_ONE_MESSAGE");
    assert_eq!(upstream.received().len(), 0);

    // Nothing is made before the request has ended: another message could follow.
    let (answer, mut stream) = begin(&mut sender, &CREDENTIALS, one.into()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(upstream.received().len(), 0);
    stream.send_data(Bytes::new(), true).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), 200);
    // Its headers leave before the batch is made.
    let mut body = answer.into_body();
    while body.data().await.is_some() {}
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn broken_messages_are_told_as_such() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let whole = frame(&request());
    let with = |flag: u8| [&[flag], &whole[1..]].concat();
    let (broken, large) = ("INVALID_FRAMING", "MESSAGE_TOO_LARGE");
    let identity = ("grpc-encoding", "identity");
    let cases: [(&[_], Vec<u8>, _, _); 10] = [
        (&[], with(1), Code::Internal, broken),
        (&[identity], with(1), Code::Internal, broken),
        (&[], with(2), Code::Internal, broken),
        (&[GZIP], with(1), Code::Internal, broken),
        (
            &[GZIP],
            compressed(&gzip(&whole[5..])[..20]),
            Code::Internal,
            broken,
        ),
        (&[], whole[..4].to_vec(), Code::Internal, broken),
        (&[], whole[..9].to_vec(), Code::Internal, broken),
        (
            &[],
            [0, 0, 4, 0, 1].to_vec(),
            Code::ResourceExhausted,
            large,
        ),
        (
            &[GZIP],
            compressed(&gzip(&vec![0; LARGEST + 1])),
            Code::ResourceExhausted,
            large,
        ),
        (
            &[GZIP],
            compressed(&gzip(&[0xff; 9])),
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
    ];
    for (metadata, body, code, reason) in cases {
        let metadata = [&CREDENTIALS[..], metadata].concat();
        let answer = gateway.raw_call(CREATE, &metadata, &body).await;
        let shown = &body[..body.len().min(12)];
        assert_eq!(answer.code(), code, "{shown:?}");
        assert_eq!(answer.reason(), reason, "{shown:?}");
        let retry = answer.status().get_details_retry_info();
        assert!(retry.is_none(), "{shown:?}: a repetition would fail too");
    }
    assert_eq!(upstream.received().len(), 0);

    for body in [whole.clone(), compressed(&gzip(&whole[5..]))] {
        let metadata = [&CREDENTIALS[..], &[GZIP]].concat();
        let answer = gateway.raw_call(CREATE, &metadata, &body).await;
        assert_eq!(answer.code(), Code::Ok);
    }
}

#[tokio::test]
async fn a_message_has_to_arrive_in_time() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut sender = connect(&gateway).await;
    let whole = frame(&request());
    for part in [&whole[..0], &whole[..3], &whole[..9], &whole] {
        let metadata = [&CREDENTIALS[..], &[("grpc-timeout", "300m")]].concat();
        let (answer, _stream) = begin(&mut sender, &metadata, Bytes::copy_from_slice(part)).await;
        let answer = timeout(Duration::from_secs(5), answer).await.unwrap();
        let expected = (Code::DeadlineExceeded, "DEADLINE_BEFORE_SENDING".to_owned());
        assert_eq!(told(&answer.unwrap()), expected);
    }
    // A byte now and then helps nobody.
    let (answer, mut stream) = begin(&mut sender, &CREDENTIALS, Bytes::new()).await;
    let begun = Instant::now();
    let drops = async {
        for byte in frame(&with_id(&"x".repeat(200))) {
            stream.send_data(vec![byte].into(), false).unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let answer = tokio::select! {
        answer = answer => answer.unwrap(),
        () = drops => panic!("it took the whole message"),
    };
    let expected = (Code::DeadlineExceeded, "MESSAGE_TIMEOUT".to_owned());
    assert_eq!(told(&answer), expected);
    assert!(begun.elapsed() > Duration::from_secs(9));
    assert_eq!(upstream.received().len(), 0);
    gateway.counts("aep_gateway_calls_in_flight", "0").await;
}

#[tokio::test]
async fn who_has_no_credentials_need_not_send_a_message() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let mut sender = connect(&gateway).await;
    let bad_key = [
        &CREDENTIALS[..1],
        &[("x-api-key", "a key")],
        &CREDENTIALS[2..],
    ]
    .concat();
    let bad_timeout = [&CREDENTIALS[..], &[("grpc-timeout", "soon")]].concat();
    for (metadata, reason) in [
        (&CREDENTIALS[1..], "CREDENTIALS_MISSING"),
        (&bad_key, "INVALID_REQUEST"),
        (&bad_timeout, "INVALID_REQUEST"),
    ] {
        for part in [&[][..], &PROMISE] {
            let part = Bytes::copy_from_slice(part);
            let (answer, _stream) = begin(&mut sender, metadata, part).await;
            let answer = timeout(Duration::from_secs(5), answer).await.unwrap();
            assert_eq!(told(&answer.unwrap()).1, reason);
        }
    }
}

#[tokio::test]
async fn a_caller_who_leaves_within_its_message_has_cancelled_the_call() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let mut sender = connect(&gateway).await;
    let (_answer, mut stream) = begin(&mut sender, &CREDENTIALS, PROMISE.to_vec().into()).await;
    gateway.counts("aep_gateway_calls_in_flight", "1").await;
    stream.send_reset(h2::Reason::CANCEL);
    gateway.logs(r#""code":"CANCELLED""#).await;
    gateway.counts("aep_gateway_calls_in_flight", "0").await;
}

/// The memory that the chart grants, in KiB.
fn granted() -> u64 {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/chart/aep-batch-gateway");
    let values = fs::read_to_string(chart.join("values.yaml")).unwrap();
    let limits = values.split_once("  limits:\n    memory: ").unwrap().1;
    limits.split_once("Mi\n").unwrap().0.parse::<u64>().unwrap() * 1024
}

/// A gateway that gets no more memory than in the chart.
async fn with_granted_memory(upstream: &str, flags: &[&str]) -> Gateway {
    let mut command = Command::new("sh");
    let limit = format!("ulimit -v {}; exec \"$0\" \"$@\"", granted());
    let program = env!("CARGO_BIN_EXE_aep-batch-gateway");
    command.args(["-c", &limit, program, "serve", "--upstream-url", upstream]);
    command.args(["--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"]);
    command
        .args(flags)
        .env("NO_PROXY", "127.0.0.1")
        .kill_on_drop(true);
    Gateway::spawn(command).await
}

/// The most that it has had in memory, in KiB.
fn peak(gateway: &Gateway) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", gateway.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let words = line.unwrap().split_whitespace().next();
    words.unwrap().parse().unwrap()
}

const MOST: u64 = 150 * 1000 * 1000 / 1024;

/// Honest calls of others are answered meanwhile, also those that come in two pieces.
async fn honest_calls(gateway: &Gateway) {
    for _ in 0..16 {
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        let answer = client.create().await.unwrap();
        assert_eq!(answer.code(), Code::Ok, "{answer:?}");

        let mut sender = connect(gateway).await;
        let (answer, mut stream) = begin(&mut sender, &CREDENTIALS, Bytes::new()).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        stream.send_data(frame(&request()).into(), true).unwrap();
        let mut body = answer.await.unwrap().into_body();
        while body.data().await.is_some() {}
        let trailers = body.trailers().await.unwrap().expect("not refused");
        assert_eq!(trailers["grpc-status"], "0");
    }
}

/// 10 connections with 250 calls each, of which the last byte never comes.
async fn attacked_over_http2(metadata: &[(&str, &str)], body: &[u8]) -> u64 {
    let upstream = simulator().await;
    let gateway = with_granted_memory(&upstream.import_url(), &[]).await;
    let body = Bytes::copy_from_slice(body);
    let mut answers = JoinSet::new();
    for _ in 0..10 {
        let mut sender = connect(&gateway).await;
        for _ in 0..250 {
            let (answer, stream) = begin(&mut sender, metadata, body.clone()).await;
            answers.spawn(async move {
                let answer = answer.await;
                drop(stream);
                answer
            });
        }
    }
    honest_calls(&gateway).await;
    let mut told_so = std::collections::HashMap::new();
    while let Some(answer) = timeout(Duration::from_secs(20), answers.join_next())
        .await
        .unwrap()
    {
        *told_so.entry(told(&answer.unwrap().unwrap())).or_insert(0) += 1;
    }
    honest_calls(&gateway).await;
    let expected = [
        (Code::DeadlineExceeded, "MESSAGE_TIMEOUT".to_owned()),
        (Code::Unavailable, "GATEWAY_OVERLOADED".to_owned()),
    ];
    assert!(
        told_so.keys().all(|told| expected.contains(told)),
        "{told_so:?}"
    );
    assert_eq!(upstream.batches().len(), 64);
    eprintln!("peak {} KiB, {told_so:?}", peak(&gateway));
    peak(&gateway)
}

#[tokio::test]
async fn messages_that_never_end_are_bounded() {
    let body = [&PROMISE[..], &[b'x'; LARGEST - 1]].concat();
    assert!(attacked_over_http2(&CREDENTIALS, &body).await < MOST);
}

#[tokio::test]
async fn compressed_messages_that_never_end_are_bounded() {
    let mut body = [&PROMISE[..], &[b'x'; LARGEST - 1]].concat();
    body[0] = 1;
    let metadata = [&CREDENTIALS[..], &[GZIP]].concat();
    assert!(attacked_over_http2(&metadata, &body).await < MOST);
}

#[tokio::test]
async fn small_messages_that_never_end_are_bounded() {
    let mut body = [&PROMISE[..], &[b'x'; 15 * 1024]].concat();
    body[2..5].copy_from_slice(&[0, 0x3d, 0]);
    assert!(attacked_over_http2(&CREDENTIALS, &body).await < MOST);
}

/// A field that goes into no table.
fn field(name: &str, value: &str) -> Vec<u8> {
    let length = match value.len() {
        short @ ..127 => vec![short as u8],
        long => vec![
            0x7f,
            ((long - 127) % 128) as u8 | 0x80,
            ((long - 127) / 128) as u8,
        ],
    };
    [
        &[0, name.len() as u8],
        name.as_bytes(),
        &length,
        value.as_bytes(),
    ]
    .concat()
}

/// By hand: a library would take too long to code so much.
#[tokio::test]
async fn metadata_without_a_message_is_bounded() {
    let upstream = simulator().await;
    let gateway = with_granted_memory(&upstream.import_url(), &[]).await;
    let mut fields = vec![0x83, 0x86]; // POST, http
    let names: Vec<_> = (0..30).map(|n| format!("x-{n}")).collect();
    let value = "x".repeat(980);
    fields.extend(field(":path", CREATE));
    fields.extend(field("content-type", "application/grpc"));
    fields.extend(
        CREDENTIALS
            .iter()
            .flat_map(|(name, value)| field(name, value)),
    );
    fields.extend(names.iter().flat_map(|name| field(name, &value)));
    let frame_of = |kind, flags, stream: u32, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    let (first, second) = fields.split_at(16 * 1024);
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame_of(4, 0, 0, &[]));
    for stream in (1..500).step_by(2) {
        sent.extend(frame_of(1, 0, stream, first));
        sent.extend(frame_of(9, 4, stream, second));
    }
    let mut connections = Vec::new();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
        stream.write_all(&sent).await.unwrap();
        connections.push(stream);
    }
    // Of 2,500 calls.
    let refused = r#"aep_gateway_outcomes_total{grpc_method="CreateBatch",outcome="NOT_APPLIED",reason="GATEWAY_OVERLOADED"}"#;
    while gateway.metric(refused).await.parse::<u32>().unwrap() < 1000 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    honest_calls(&gateway).await;
    gateway.counts("aep_gateway_calls_in_flight", "0").await;
    eprintln!("peak {} KiB", peak(&gateway));
    assert!(peak(&gateway) < MOST);
}

#[tokio::test]
async fn grpc_web_messages_that_never_end_are_bounded() {
    let upstream = simulator().await;
    let gateway = with_granted_memory(&upstream.import_url(), &["--grpc-web"]).await;
    let mut call = format!(
        "POST {CREATE} HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc-web+proto\r\n\
         content-length: {}\r\n",
        PROMISE.len() + LARGEST
    );
    for (name, value) in CREDENTIALS {
        call += &format!("{name}: {value}\r\n");
    }
    let call = [(call + "\r\n").as_bytes(), &PROMISE, &[b'x'; LARGEST - 1]].concat();
    let call: std::sync::Arc<[u8]> = call.into();
    let mut connections = JoinSet::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let call = call.clone();
        connections.spawn(async move {
            let _ = stream.write_all(&call).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        });
    }
    honest_calls(&gateway).await;
    let all = async {
        while let Some(answer) = connections.join_next().await {
            let answer = answer.unwrap();
            let refused = ["MESSAGE_TIMEOUT", "GATEWAY_OVERLOADED"];
            // Percent or not, the reason stands in the details; the sentence is readable.
            assert!(
                answer.contains("NOT_APPLIED") || answer.is_empty(),
                "{refused:?} {answer}"
            );
        }
    };
    timeout(Duration::from_secs(40), all).await.unwrap();
    eprintln!("peak {} KiB", peak(&gateway));
    assert!(peak(&gateway) < MOST);
}

/// Also by who holds all its connections and says half of what it wants.
#[tokio::test]
async fn the_admin_listener_always_answers() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut held = Vec::new();
    for part in [
        "",
        "GET /liv",
        "PUT /log-level HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n",
    ] {
        for _ in 0..300 {
            let mut stream = TcpStream::connect(&gateway.admin).await.unwrap();
            stream.write_all(part.as_bytes()).await.unwrap();
            held.push(stream);
        }
        assert_eq!(gateway.page("/livez").await.0, 200);
    }
    let files: u32 = gateway.metric("process_open_fds").await.parse().unwrap();
    assert!(files < 150, "{files}");
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
    // A body that does not come is not waited for.
    let mut last = held.pop().unwrap();
    let mut answer = String::new();
    let told = timeout(Duration::from_secs(15), last.read_to_string(&mut answer));
    let _ = told.await.unwrap();
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408 "),
        "{answer}"
    );
}

#[tokio::test]
async fn large_pages_that_nobody_takes_are_bounded() {
    let body = format!(
        r#"{{"b":{{"created":1,"x":"{}"}}}}"#,
        "x".repeat(800 * 1024)
    );
    let catalog = Scripted::answering("200 OK", &[], &body).await;
    let catalog_flag = format!("--catalog-url={}", catalog.url());
    let gateway = Gateway::start("http://127.0.0.1:9", &[&catalog_flag]).await;
    let mut sender = connect(&gateway).await;
    let mut untaken = Vec::new();
    let mut refused = 0;
    for _ in 0..60 {
        let mut head = http::Request::post(format!("http://localhost{LIST}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in CREDENTIALS {
            head = head.header(name, value);
        }
        sender = sender.ready().await.unwrap();
        let (answer, mut body) = sender.send_request(head.body(()).unwrap(), false).unwrap();
        body.send_data(Bytes::from_static(&[0; 5]), true).unwrap();
        let answer = answer.await.unwrap();
        match answer.headers().get("grpc-status") {
            None => untaken.push(answer),
            Some(status) => {
                assert_eq!(status, "14");
                refused += 1;
            }
        }
    }
    // 16 MiB, of which each takes what it has beyond 64 KiB.
    assert_eq!((untaken.len(), refused), (22, 38));
    let page = gateway.list(Default::default()).await.unwrap_err();
    assert_eq!(page.code(), Code::Unavailable);
    let info = page.get_details_error_info().unwrap();
    assert_eq!(info.reason, "GATEWAY_OVERLOADED");
    drop(untaken);
    gateway.counts("aep_gateway_calls_in_flight", "0").await;
    assert_eq!(
        gateway
            .list(Default::default())
            .await
            .unwrap()
            .batches
            .len(),
        1
    );
}
