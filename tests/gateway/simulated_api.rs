//! The simulated API on the wire: what it plays looks like what is played.

use aep_simulator::{Injection, Simulator};
use flate2::read::GzDecoder;
use serde_json::{Value, json};
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

fn inject(api: &Simulator, fault: &str) {
    api.inject(fault.parse::<Injection>().unwrap());
}

async fn create(api: &Simulator, dataset: &str, fault: &str) -> Vec<u8> {
    inject(api, fault);
    let body = format!(r#"{{"datasetId":"{dataset}"}}"#);
    exchange(api, "POST /data/foundation/import/batches", &body).await
}

async fn text(api: &Simulator, fault: &str) -> String {
    String::from_utf8_lossy(&create(api, "d", fault).await).into_owned()
}

#[tokio::test]
async fn intermediaries_respond_before_and_after() {
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
async fn responses_come_in_every_form() {
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
    let answer = create(&api, "d", "gzip-response").await;
    assert!(String::from_utf8_lossy(&answer).contains("content-encoding: gzip\r\n"));
    let id = api.batches()[0]["id"].as_str().unwrap().to_owned();
    assert!(unzipped(&answer).contains(&id));
    assert!(unzipped(&create(&api, "d", "gzip-503").await).contains("503000"));

    let answer = text(&api, "many-headers-response").await;
    assert!(answer.split("\r\n\r\n").next().unwrap().lines().count() > 120);
    let answer = text(&api, "unfinished-response").await;
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

/// The response to a GET of Catalog's batches.
async fn get(api: &Simulator, path: &str) -> String {
    let line = format!("GET /data/foundation/catalog/batches{path}");
    String::from_utf8_lossy(&exchange(api, &line, "").await).into_owned()
}

/// The ids of all batches, in the order of their creation.
fn ids(api: &Simulator) -> Vec<String> {
    let id = |batch: &Value| batch["id"].as_str().unwrap().to_owned();
    api.batches().iter().map(id).collect()
}

#[tokio::test]
async fn catalog_responds_as_documented() {
    let api = simulator().await;
    for _ in 0..3 {
        create(&api, "@/dataSets/d", "delay-0").await;
    }
    let ids = ids(&api);
    for (id, created) in ids.iter().zip(1..) {
        api.patch(id, &json!({ "created": created }));
    }
    // Which of them a list shows, in its order.
    let listed = async |query: &str| {
        let text = get(&api, query).await;
        let place = |id: &String| text.find(&format!("{id}\":{{"));
        let mut shown: Vec<_> = ids.iter().zip(1..).map(|(id, n)| (place(id), n)).collect();
        shown.retain(|(place, _)| place.is_some());
        shown.sort();
        shown
            .into_iter()
            .map(|(_, number)| number)
            .collect::<Vec<i32>>()
    };
    api.patch(&ids[2], &json!({ "status": "active" }));
    for (query, expected) in [
        ("?dataSet=d&orderBy=asc:created", &[1, 2, 3][..]),
        ("?dataSet=other", &[]),
        ("?orderBy=desc:status,desc:created", &[2, 1, 3]),
        ("?status=active,success", &[3]),
        ("?status=loading&orderBy=desc:created", &[2, 1]),
        ("?createdAfter=1&createdBefore=3", &[2]),
        ("?orderBy=desc:created&limit=1&start=1", &[2]),
        ("?orderBy=desc:created&limit=2&offset=1", &[3, 2]),
    ] {
        assert_eq!(listed(query).await, expected, "{query}");
    }
    assert_eq!(listed(&format!("/{},{}", ids[0], ids[2])).await, [3, 1]);
    let one = get(&api, &format!("/{}?properties=status", ids[2])).await;
    assert!(
        one.ends_with(&format!(r#"{{"{}":{{"status":"active"}}}}"#, ids[2])),
        "{one}"
    );
    for limit in ["0", "101", "x"] {
        let refused = get(&api, &format!("?limit={limit}")).await;
        assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    }
    assert!(get(&api, "/unknown").await.starts_with("HTTP/1.1 404 "));
}

#[tokio::test]
async fn a_read_meets_the_faults_of_its_operation() {
    let api = simulator().await;
    create(&api, "d", "delay-0").await;
    let id = &ids(&api)[0];
    let path = format!("/{id}");
    inject(&api, "list:status-503");
    inject(&api, "get:empty");
    let found = get(&api, &path).await;
    assert!(
        found.starts_with("HTTP/1.1 200 ") && found.ends_with("\r\n\r\n{}"),
        "{found}"
    );
    assert!(get(&api, &path).await.contains("relatedObjects"));
    assert!(get(&api, "").await.contains("503000"));
    assert!(get(&api, "").await.contains("relatedObjects"));

    for (fault, holds) in [
        ("status-404", "NotFoundError"),
        ("varnish-503-after", "XID: 32770"),
        ("filter-200", "text/html"),
        ("gzip-response", "content-encoding: gzip"),
        ("empty-response", "content-length: 0"),
        ("html-response", "<html>"),
        ("half-response", "content-length: "),
        ("redirect", "307 "),
    ] {
        inject(&api, &format!("get:{fault}"));
        inject(&api, &format!("list:{fault}"));
        for path in [path.as_str(), ""] {
            let response = get(&api, path).await;
            assert!(response.contains(holds), "{fault} {path}: {response}");
        }
    }
    for fault in ["get:reset-after", "get:close"] {
        inject(&api, fault);
        assert_eq!(get(&api, &path).await, "", "{fault}");
    }
    inject(&api, "get:no-id-response");
    let without_id = get(&api, &path).await;
    assert!(
        without_id.contains(&format!(r#"{{"{id}":{{"#)),
        "{without_id}"
    );
    assert!(
        !without_id.contains(&format!(r#""id":"{id}""#)),
        "{without_id}"
    );
    assert_eq!(api.batches().len(), 1, "reads create nothing");
}

#[tokio::test]
async fn a_batch_is_changed_and_faults_are_listed_over_http() {
    let api = simulator().await;
    create(&api, "d", "delay-0").await;
    let line = format!("PATCH /_simulator/batches/{}", ids(&api)[0]);
    let text =
        async |line: &str, body: &str| String::from_utf8(exchange(&api, line, body).await).unwrap();
    let changed = text(&line, r#"{"status":"failed","errors":[{"code":"106"}]}"#).await;
    assert!(changed.starts_with("HTTP/1.1 200 "), "{changed}");
    assert!(
        get(&api, "?status=failed")
            .await
            .contains(r#""errors":[{"code":"106"}]"#)
    );
    assert!(text(&line, "[]").await.starts_with("HTTP/1.1 400 "));
    let unknown = text("PATCH /_simulator/batches/x", "{}").await;
    assert!(unknown.starts_with("HTTP/1.1 404 "), "{unknown}");

    let names = text("GET /_simulator/faults", "").await;
    for name in [
        "\"filter-201-after\"",
        "\"list:timeout-before\"",
        "\"get:empty\"",
    ] {
        assert!(names.contains(name), "{names}");
    }
    let waiting = text("POST /_simulator/faults", "lookup-503\nreset-after-create").await;
    assert!(
        waiting.contains(r#"["list:status-503","reset-after"]"#),
        "{waiting}"
    );
    let none = text("DELETE /_simulator/faults", "").await;
    assert!(none.ends_with(r#"{"waiting":[]}"#), "{none}");
    assert!(
        text("POST /_simulator/faults", "empty")
            .await
            .starts_with("HTTP/1.1 400 ")
    );
}
