//! What a gRPC server owes its clients besides its own service.

use aep_batch_gateway::proto::DESCRIPTOR_SET;
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

    for (path, reason) in [
        ("/aep.ingestion.v1.BatchService/Nothing", "UNSUPPORTED"),
        ("/no.such.Service/CreateBatch", "UNSUPPORTED"),
        ("/", "UNSUPPORTED"),
    ] {
        let answer = gateway.raw_call(path, &CREDENTIALS, &body).await;
        assert_eq!(answer.code(), Code::Unimplemented, "{path}");
        assert_eq!(answer.reason(), reason, "{path}");
        assert_eq!(answer.outcome(), "NOT_CREATED");
    }
    for content_type in ["text/plain", "application/json", "application/grpc-web"] {
        let metadata = [&CREDENTIALS[..], &[("content-type", content_type)]].concat();
        let answer = gateway.raw_call(CREATE, &metadata, &body).await;
        assert_eq!(answer.http_status, 415, "{content_type}");
    }
    let url = format!("http://{}{CREATE}", gateway.listen);
    let http2 = reqwest::Client::builder()
        .http2_prior_knowledge()
        .no_proxy();
    let answer = http2.build().unwrap().get(url).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 405);

    let garbage = [0, 0, 0, 0, 3, 0xff, 0xff, 0xff];
    let answer = gateway.raw_call(CREATE, &CREDENTIALS, &garbage).await;
    assert_eq!(answer.code(), Code::InvalidArgument);
    assert_eq!(answer.outcome(), "NOT_CREATED");

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
    assert_eq!(answer.outcome(), "NOT_CREATED");
    assert!(answer.headers.contains_key("grpc-accept-encoding"));
    assert_eq!(upstream.batches().len(), 1);
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
