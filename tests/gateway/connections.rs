//! Connections: how many, how long, and what becomes of silent ones.

use std::time::{Duration, Instant};

use aep_batch_gateway::simulator::Fault;
use bytes::Bytes;
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tonic::Code;

use crate::support::{CREDENTIALS, Gateway, frame, request, simulator};

#[tokio::test]
async fn an_old_connection_is_told_to_go_away_and_its_calls_finish() {
    let upstream = simulator().await;
    let flags = ["--max-connection-age=300ms"];
    let gateway = Gateway::before(&upstream, &flags).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    let begin = Instant::now();
    let connection = tokio::spawn(connection);

    upstream.meet(Fault::Delay(Duration::from_millis(1000)));
    let path = "/aep.ingestion.v1.BatchService/CreateBatch";
    let mut head = http::Request::post(format!("http://{}{path}", gateway.listen))
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
async fn a_connection_that_says_nothing_is_closed() {
    let upstream = simulator().await;
    let gateway = Gateway::before(&upstream, &[]).await;
    let mut silent = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut idle = {
        let stream = TcpStream::connect(&gateway.listen).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        client
    };
    let mut greeting = Vec::new();
    let read = timeout(Duration::from_secs(15), silent.read_to_end(&mut greeting)).await;
    read.expect("closed within 10 s").unwrap();
    idle = idle
        .ready()
        .await
        .expect("one that speaks HTTP/2 may be idle");
    drop(idle);
}
