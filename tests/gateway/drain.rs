//! SIGTERM: health tells first, calls in flight finish, the end comes in time.

use std::time::{Duration, Instant};

use aep_simulator::Fault;
use tokio::{net::TcpStream, task::JoinSet};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{Client, Gateway, simulator};

const HEALTH_CHECK_FAIL: &str = "x-envoy-immediate-health-check-fail";

#[tokio::test]
async fn health_flips_and_calls_in_flight_finish() {
    let upstream = simulator().await;
    let flags = ["--drain-delay=1500ms"];
    let gateway = Gateway::start(&upstream.import_url(), &flags).await;
    let mut health = HealthClient::new(gateway.channel());
    let service = String::new();
    let watch = health.watch(HealthCheckRequest { service }).await.unwrap();
    let mut watch = watch.into_inner();
    let first = watch.next().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    let early = gateway.raw(&[]).await;
    assert!(!early.headers.contains_key(HEALTH_CHECK_FAIL));

    upstream.inject(Fault::Delay(Duration::from_millis(800)));
    let (answer, ()) = tokio::join!(gateway.raw(&[]), async {
        while upstream.received().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gateway.terminate();
        let told = watch.next().await.unwrap().unwrap();
        assert_eq!(told.status(), ServingStatus::NotServing);
        assert_eq!(gateway.page("/readyz").await.0, 503);
        assert_eq!(gateway.page("/livez").await.0, 200);
        let healthy = Gateway::command(&["healthcheck", "--address", &gateway.admin]);
        assert!(!{ healthy }.status().await.unwrap().success());
        // Callers who have not heard yet are served: the delay is theirs.
        let late = gateway.raw(&[]).await;
        assert_eq!(late.code(), Code::Ok);
        assert_eq!(late.headers[HEALTH_CHECK_FAIL], "true");
        let refused = gateway.raw(&[("x-api-key", "")]).await;
        assert!(refused.trailers_only);
        assert_eq!(refused.headers[HEALTH_CHECK_FAIL], "true");
    });
    assert_eq!(answer.code(), Code::Ok);
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");
    assert!(log.contains("stopped"), "{log}");
}

#[tokio::test]
async fn the_end_comes_in_time_and_everyone_is_answered() {
    let upstream = simulator().await;
    let flags = ["--drain-timeout=500ms"];
    let gateway = Gateway::start(&upstream.import_url(), &flags).await;

    let _silent = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut health = HealthClient::new(gateway.channel());
    let service = String::new();
    let _watch = health.watch(HealthCheckRequest { service }).await.unwrap();
    upstream.inject(Fault::TimeoutAfter);
    let begin = Instant::now();
    let (answer, ()) = tokio::join!(gateway.raw(&[]), async {
        while upstream.batches().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gateway.terminate();
    });
    assert_eq!(answer.reason(), "GATEWAY_STOPPED");
    assert_eq!(answer.outcome(), "UNKNOWN");
    assert!(!answer.trailers_only);
    let (status, log) = gateway.ended().await;
    assert!(status.success());
    assert!(begin.elapsed() < Duration::from_secs(4));
    assert!(log.contains("drain timeout"), "{log}");
}

#[tokio::test]
async fn a_create_whose_caller_left_is_finished_before_the_end() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    upstream.inject(Fault::Delay(Duration::from_millis(500)));
    let answer = gateway.raw(&[("grpc-timeout", "50m")]).await;
    assert_eq!(answer.code(), Code::DeadlineExceeded);
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success());
    let id = upstream.batches()[0]["id"].as_str().unwrap().to_owned();
    assert!(log.contains(&id), "{log}");
}

#[tokio::test]
async fn no_access_line_is_lost_at_the_end() {
    const CALLERS: usize = 8;
    const CALLS: usize = 25;
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        callers.spawn(async move {
            for _ in 0..CALLS {
                assert_eq!(client.create().await.unwrap().code(), Code::Ok);
            }
        });
    }
    callers.join_all().await;
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success(), "{log}");
    let lines = log.lines().filter(|line| line.contains("call ended"));
    assert_eq!(lines.count(), CALLERS * CALLS);
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for signals in [["-TERM", "-TERM"], ["-TERM", "-INT"], ["-INT", "-INT"]] {
        let upstream = simulator().await;
        let gateway = Gateway::start(&upstream.import_url(), &[]).await;
        upstream.inject(Fault::TimeoutAfter);
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        let call = tokio::spawn(async move { client.create().await });
        while upstream.batches().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        gateway.signal(signals[0]);
        gateway.logs("draining").await;
        gateway.signal(signals[1]);
        let begin = Instant::now();
        let (status, log) = gateway.ended().await;
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("second stop signal"), "{log}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{log}");
        assert!(call.await.unwrap().is_err());
    }
}

#[tokio::test]
async fn sighup_ends_nothing() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    gateway.signal("-HUP");
    gateway.logs("SIGHUP").await;
    assert_eq!(gateway.raw(&[]).await.code(), Code::Ok);
    gateway.terminate();
    gateway.signal("-HUP");
    assert!(gateway.ended().await.0.success());
}
