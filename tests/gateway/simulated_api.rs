//! The simulated API on the wire: what it plays looks like what is played.

use aep_batch_gateway::simulator::Simulator;
use flate2::read::GzDecoder;
use std::io::Read;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{CREDENTIALS, simulator};

/// The bytes that answer one request.
async fn exchange(api: &Simulator, line: &str, body: &str) -> Vec<u8> {
    let mut text = format!(
        "{line} HTTP/1.1\r\nhost: api\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n",
        body.len()
    );
    for (name, value) in CREDENTIALS {
        text += &format!("{name}: {value}\r\n");
    }
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    stream
        .write_all((text + "\r\n" + body).as_bytes())
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

async fn create(api: &Simulator, dataset: &str, fault: &str) -> Vec<u8> {
    api.meet(fault.parse().unwrap());
    let body = format!(r#"{{"datasetId":"{dataset}"}}"#);
    exchange(api, "POST /data/foundation/import/batches", &body).await
}

async fn text(api: &Simulator, fault: &str) -> String {
    String::from_utf8_lossy(&create(api, "d", fault).await).into_owned()
}

#[tokio::test]
async fn somebody_in_between_answers_before_and_after() {
    let api = simulator().await;
    for (fault, line, holds, made) in [
        (
            "varnish-503",
            "503 Service Unavailable",
            "retry-after: 5\r\n",
            0,
        ),
        (
            "varnish-503-after",
            "503 Service Unavailable",
            "XID: 32770",
            1,
        ),
        ("nginx-499-after", "499 ", "server: nginx\r\n", 1),
        (
            "envoy-503-overloaded",
            "503 ",
            "x-envoy-overloaded: true\r\n",
            0,
        ),
        ("alb-561", "561 ", "server: awselb/2.0\r\n", 0),
        ("cloudflare-520-after", "520 ", "cf-ray: ", 1),
        (
            "cdn-problem-503-after",
            "503 ",
            "application/problem+json\r\n",
            1,
        ),
        ("filter-204-after", "204 No Content", "204", 1),
        (
            "portal-302",
            "302 Found",
            "location: https://login.invalid",
            0,
        ),
    ] {
        let before = api.batches().len();
        let answer = text(&api, fault).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {line}")), "{answer}");
        assert!(answer.contains(holds), "{fault}: {answer}");
        assert!(
            !answer.contains("x-request-id"),
            "that is the API's: {answer}"
        );
        assert_eq!(api.batches().len() - before, made, "{fault}");
    }
}

#[tokio::test]
async fn answers_come_in_every_form() {
    let api = simulator().await;
    let body_of = |answer: &[u8]| {
        let at = answer
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        answer[at + 4..].to_vec()
    };
    let unzipped = |answer: &[u8]| {
        let mut text = String::new();
        let body = body_of(answer);
        GzDecoder::new(&*body).read_to_string(&mut text).unwrap();
        text
    };
    let answer = create(&api, "d", "gzip-answer").await;
    assert!(String::from_utf8_lossy(&answer).contains("content-encoding: gzip\r\n"));
    let id = api.batches()[0]["id"].as_str().unwrap().to_owned();
    assert!(unzipped(&answer).contains(&id));
    assert!(unzipped(&create(&api, "d", "gzip-503").await).contains("503000"));

    let answer = text(&api, "many-headers-answer").await;
    assert!(answer.split("\r\n\r\n").next().unwrap().lines().count() > 120);
    let answer = text(&api, "unfinished-answer").await;
    assert!(
        answer.contains("transfer-encoding: chunked\r\n"),
        "{answer}"
    );
    assert!(answer.ends_with("}\r\n"), "{answer}"); // and not with 0\r\n\r\n

    assert!(body_of(&create(&api, "d", "bom-403").await).starts_with(b"\xef\xbb\xbf{"));
    let latin1 = body_of(&create(&api, "d", "latin1-403").await);
    assert!(String::from_utf8(latin1).is_err());
    assert!(text(&api, "surrogate-403").await.contains(r"\ud83d"));
    assert!(text(&api, "overflow-403").await.contains(":1e999"));
}

#[tokio::test]
async fn catalog_answers_as_documented() {
    let api = simulator().await;
    for _ in 0..3 {
        create(&api, "@/dataSets/d", "delay-0").await;
    }
    let get = async |path: &str| {
        let line = format!("GET /data/foundation/catalog/batches{path}");
        String::from_utf8(exchange(&api, &line, "").await).unwrap()
    };
    let batches = api.batches();
    let id = |number: usize| batches[number]["id"].as_str().unwrap();
    assert_eq!(get("?dataSet=d").await.matches("relatedObjects").count(), 3);
    assert!(get("?limit=0").await.starts_with("HTTP/1.1 400 "));
    let two = get(&format!("/{},{}", id(0), id(2))).await;
    assert!(
        two.contains(id(0)) && two.contains(id(2)) && !two.contains(id(1)),
        "{two}"
    );
    assert!(get("/unknown").await.starts_with("HTTP/1.1 404 "));
    let names = String::from_utf8(exchange(&api, "GET /_simulator/faults", "").await).unwrap();
    assert!(names.contains("\"filter-201-after\""), "{names}");
}
