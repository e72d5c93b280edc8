//! What a gRPC server owes its clients besides its own service.

use std::time::{Duration, Instant};

use aep_batch_gateway::proto::DESCRIPTOR_SET;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_stream::StreamExt;
use tonic::{Code, codec::CompressionEncoding};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{CREATE, CREDENTIALS, Gateway, frame, request, simulator};

#[tokio::test]
async fn health_overall_and_per_service() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let mut client = HealthClient::new(gateway.channel());
    for service in ["", "aep.ingestion.v1.BatchService"] {
        let service = service.to_owned();
        let answer = client.check(HealthCheckRequest { service }).await.unwrap();
        assert_eq!(answer.into_inner().status(), ServingStatus::Serving);
    }
    let service = "no.such.Service".to_owned();
    let answer = client.check(HealthCheckRequest { service }).await;
    assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    assert_eq!(gateway.page("/livez").await.0, 200);
    assert_eq!(gateway.page("/readyz").await.0, 200);
    assert_eq!(gateway.page("/nothing").await.0, 404);
}

/// As health.proto has it.
#[tokio::test]
async fn a_service_that_is_not_here_can_be_watched() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let mut client = HealthClient::new(gateway.channel());
    let service = "no.such.Service".to_owned();
    let watch = client.watch(HealthCheckRequest { service }).await;
    let mut watch = watch.unwrap().into_inner();
    let first = watch.next().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
    let more = timeout(Duration::from_millis(200), watch.next());
    more.await.expect_err("the stream stays open");
    gateway.terminate();
    let begin = Instant::now();
    assert!(gateway.ended().await.0.success());
    assert!(begin.elapsed() < Duration::from_secs(5), "it ends with us");
}

#[tokio::test]
async fn admin_pages_have_heads() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for page in ["livez", "readyz", "metrics", "log-level", "nothing"] {
        let url = format!("http://{}/{page}", gateway.admin);
        let whole = client.get(&url).send().await.unwrap();
        let head = client.head(&url).send().await.unwrap();
        assert_eq!(head.status(), whole.status(), "{page}");
        for name in ["content-type", "content-length"] {
            assert!(head.headers().contains_key(name), "{page}");
            // The metrics grow with each call.
            let same = page == "metrics" || head.headers()[name] == whole.headers()[name];
            assert!(same, "{page}: {name}");
        }
        assert_eq!(head.bytes().await.unwrap().len(), 0, "{page}");
    }
}

#[tokio::test]
async fn reflection_in_both_versions() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    let names = ["aep.ingestion.v1.BatchService", "grpc.health.v1.Health"];

    use v1::server_reflection_request::MessageRequest;
    let ask = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(gateway.channel());
    let asks = tokio_stream::iter([ask]);
    let mut answers = client
        .server_reflection_info(asks)
        .await
        .unwrap()
        .into_inner();
    let answer = format!("{:?}", answers.next().await.unwrap().unwrap());
    assert!(names.iter().all(|name| answer.contains(name)), "{answer}");

    use v1alpha::server_reflection_request::MessageRequest as MessageRequestAlpha;
    let ask = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequestAlpha::FileContainingSymbol(
            names[0].to_owned(),
        )),
    };
    let mut client =
        v1alpha::server_reflection_client::ServerReflectionClient::new(gateway.channel());
    let asks = tokio_stream::iter([ask]);
    let mut answers = client
        .server_reflection_info(asks)
        .await
        .unwrap()
        .into_inner();
    let answer = format!("{:?}", answers.next().await.unwrap().unwrap());
    assert!(answer.contains("FileDescriptorResponse"), "{answer}");
}

#[tokio::test]
async fn reflection_can_be_off() {
    let gateway = Gateway::start("http://127.0.0.1:1", &["--reflection=false"]).await;
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let answer = gateway.raw_call(&path, &[], &[]).await;
        assert_eq!(answer.code(), Code::Unimplemented);
    }
    let health = gateway
        .raw_call("/grpc.health.v1.Health/Check", &[], &[0; 5])
        .await;
    assert_eq!(health.code(), Code::Ok);
}

#[test]
fn the_descriptors_are_complete() {
    use prost::Message;
    let set = prost_types::FileDescriptorSet::decode(DESCRIPTOR_SET).unwrap();
    let names: Vec<_> = set.file.iter().map(|file| file.name()).collect();
    assert_eq!(
        names,
        [
            "google/protobuf/any.proto",
            "google/rpc/status.proto",
            "google/protobuf/duration.proto",
            "google/rpc/error_details.proto",
            "google/protobuf/struct.proto",
            "google/protobuf/timestamp.proto",
            "aep/ingestion/v1/batch_service.proto",
        ]
    );
    let api = set.file.last().unwrap();
    assert!(api.source_code_info.is_some());
    let details = "google/rpc/error_details.proto".to_owned();
    assert!(
        api.dependency.contains(&details),
        "grpcui decodes them then"
    );
}

#[tokio::test]
async fn what_is_no_call_of_ours_is_refused_cleanly() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let body = frame(&request());

    // Of another service nobody knows what its calls may change.
    for (path, outcome) in [
        (
            "/aep.ingestion.v1.BatchService/Nothing",
            Some("NOT_APPLIED"),
        ),
        ("/no.such.Service/CreateBatch", None),
        ("/", None),
    ] {
        let answer = gateway.raw_call(path, &CREDENTIALS, &body).await;
        assert_eq!(answer.code(), Code::Unimplemented, "{path}");
        assert_eq!(answer.reason(), "UNSUPPORTED", "{path}");
        let told = answer.trailers.get("aep-batch-outcome");
        assert_eq!(told.map(|told| told.to_str().unwrap()), outcome, "{path}");
    }
    for content_type in [
        "text/plain",
        "application/json",
        "application/grpc-web",
        "application/grpc+json",
        "application/grpc+thrift",
        "application/grpcx",
        "",
    ] {
        let metadata = [&CREDENTIALS[..], &[("content-type", content_type)]].concat();
        let answer = gateway.raw_call(CREATE, &metadata, &body).await;
        assert_eq!(answer.http_status, 415, "{content_type}");
        let told = String::from_utf8(answer.message).unwrap();
        assert!(told.contains("must be application/grpc"), "{told}");
    }
    let url = format!("http://{}{CREATE}", gateway.listen);
    let http2 = reqwest::Client::builder()
        .http2_prior_knowledge()
        .no_proxy();
    let answer = http2.build().unwrap().get(url).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 405);
    assert!(answer.text().await.unwrap().contains("POST"));

    let garbage = [0, 0, 0, 0, 3, 0xff, 0xff, 0xff];
    let answer = gateway.raw_call(CREATE, &CREDENTIALS, &garbage).await;
    assert_eq!(answer.code(), Code::InvalidArgument);
    assert_eq!(answer.outcome(), "NOT_APPLIED");

    let mut large = request();
    large.dataset_id = "x".repeat(5 * 1024 * 1024);
    let answer = gateway.create(large).await.unwrap_err();
    assert_eq!(answer.code(), Code::ResourceExhausted);

    assert_eq!(upstream.received().len(), 0);
    let (_, metrics) = gateway.page("/metrics").await;
    assert!(metrics.contains(r#"grpc_method="other",grpc_code="Unimplemented"} 1"#));
    assert!(!metrics.contains("Nothing"));
}

#[tokio::test]
async fn a_compressed_request_is_taken() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    let mut client = aep_batch_gateway::proto::v1::batch_service_client::BatchServiceClient::new(
        gateway.channel(),
    )
    .send_compressed(CompressionEncoding::Gzip);
    let mut call = tonic::Request::new(request());
    for (name, value) in CREDENTIALS {
        call.metadata_mut().insert(name, value.parse().unwrap());
    }
    client.create_batch(call).await.unwrap();

    let metadata = [&CREDENTIALS[..], &[("grpc-encoding", "snappy")]].concat();
    let mut body = frame(&request());
    body[0] = 1;
    let answer = gateway.raw_call(CREATE, &metadata, &body).await;
    assert_eq!(answer.code(), Code::Unimplemented);
    assert_eq!(answer.outcome(), "NOT_APPLIED");
    assert!(answer.headers.contains_key("grpc-accept-encoding"));
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn content_types_are_read_as_http_has_them() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    for content_type in [
        "application/grpc",
        "application/grpc+proto",
        "Application/gRPC",
        "APPLICATION/GRPC+PROTO",
        "application/grpc;charset=utf-8",
        "application/grpc ; charset=utf-8",
    ] {
        let answer = gateway.raw(&[("content-type", content_type)]).await;
        assert_eq!(answer.code(), Code::Ok, "{content_type}");
    }
}

/// A call on a connection of its own, byte by byte. `authority` is the field.
async fn call_by_hand(mut stream: impl AsyncRead + AsyncWrite + Unpin, authority: &[u8]) -> u8 {
    let frame_of = |kind, flags, stream, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let mut fields = vec![0x83, 0x86]; // POST, http
    fields.extend(authority);
    let path = [(":path", CREATE), ("content-type", "application/grpc")];
    for (name, value) in path.iter().chain(&CREDENTIALS) {
        for text in [&[0], name.as_bytes(), value.as_bytes()] {
            if text != [0] {
                fields.push(text.len() as u8);
            }
            fields.extend(text);
        }
    }
    let mut call = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    call.extend(frame_of(4, 0, 0, &[]));
    call.extend(frame_of(1, 4, 1, &fields));
    call.extend(frame_of(0, 1, 1, &frame(&request())));
    stream.write_all(&call).await.unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream
            .read_exact(&mut vec![0; length as usize])
            .await
            .unwrap();
        // The end of the answer, or RST_STREAM.
        let [.., kind, flags, _, _, _, stream] = head;
        if stream == 1 && (kind == 3 || kind == 1 && flags & 1 != 0) {
            return kind;
        }
    }
}

#[tokio::test]
async fn a_unix_socket_may_be_called_by_its_path() {
    let upstream = simulator().await;
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("called.sock");
    let listen = format!("--listen=unix:{}", path.display());
    let gateway = Gateway::before(&upstream, &[&listen]).await;
    let authorities: [&[u8]; 5] = [
        b"\x41\x09localhost",
        b"\x41\x0c/tmp/gw.sock",
        b"\x40\x0a:authority\x0dtmp%2Fgw.sock", // gRPC's C core
        b"\x41\x89\x61\x34\xd6\xc4\xde\x17\x41\xc9\xd7", // /tmp/gw.sock, by Huffman
        b"\x41\x8c\x54\x58\x53\x4d\x6a\x8b\x0c\xde\x17\x41\xc9\xd7", // %2Ftmp%2Fgw.sock
    ];
    for authority in authorities {
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        let answer = timeout(Duration::from_secs(5), call_by_hand(stream, authority));
        assert_eq!(answer.await.unwrap(), 1, "{authority:x?}");
    }
    assert_eq!(upstream.batches().len(), authorities.len());
    drop(gateway);
}

#[tokio::test]
async fn a_malformed_request_is_in_the_log() {
    let gateway = Gateway::start("http://127.0.0.1:1", &[]).await;
    for (authority, answer) in [
        (b"\x41\x15gateway.ingestion.svc", 1),
        (b"\x41\x15outbound|50051||a.svc", 3),
        (b"\x41\x15extension/gateway/abc", 3),
    ] {
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        assert_eq!(call_by_hand(stream, authority).await, answer);
    }
    gateway.logs("PROTOCOL_ERROR").await;
    let log = gateway.log();
    assert_eq!(log.matches("PROTOCOL_ERROR").count(), 1, "{log}");
}

#[tokio::test]
async fn a_unix_socket() {
    let upstream = simulator().await;
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("gateway.sock");
    let listen = format!("--listen=unix:{}", path.display());
    // A socket that a killed process left behind is no obstacle.
    drop(std::os::unix::net::UnixListener::bind(&path));
    let gateway = Gateway::start(&upstream.import_url(), &[&listen]).await;
    gateway.create(request()).await.unwrap();

    let second = Gateway::command(&["serve", &listen, "--admin-listen=127.0.0.1:0"])
        .output()
        .await
        .unwrap();
    assert!(!second.status.success());
    let told = String::from_utf8(second.stderr).unwrap();
    assert!(told.starts_with("error: cannot listen on unix:"), "{told}");

    gateway.terminate();
    assert!(gateway.ended().await.0.success());
    assert!(!path.exists());
}
