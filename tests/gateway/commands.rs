//! The commands, as a person at a terminal has them.

use std::{path::PathBuf, process::Output};

use aep_batch_gateway::proto::{DESCRIPTOR_SET, v1::batch_service_server::SERVICE_NAME};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::{Gateway, request};

async fn run(arguments: &[&str]) -> Output {
    Gateway::command(arguments).output().await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn file(name: &str, content: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[tokio::test]
async fn demo_makes_a_call_and_goes_on() {
    let mut child =
        Gateway::command(&["demo", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"])
            .env("HTTP_PROXY", "http://127.0.0.1:1") // the demo needs no proxy
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut shown = String::new();
    while let Some(line) = lines.next_line().await.unwrap() {
        shown.push_str(&line);
        shown.push('\n');
        if line.starts_with("Serving") {
            break;
        }
    }
    let first: Value = serde_json::from_str(shown.lines().next().unwrap()).unwrap();
    let listen = first["listen"].as_str().unwrap();
    assert!(shown.contains("BATCH_STATUS_LOADING"), "{shown}");
    assert!(shown.contains("grpcurl -plaintext"), "{shown}");
    assert!(shown.contains(&format!(
        "{listen} aep.ingestion.v1.BatchService/CreateBatch"
    )));

    let admin = first["admin"].as_str().unwrap();
    let health = run(&["healthcheck", "--address", admin]).await;
    assert_eq!(text(&health.stdout), "ok\n");
    assert!(health.status.success());
}

#[tokio::test]
async fn simulate_serves_the_rest_api() {
    let mut child = Gateway::command(&["simulate", "--listen=127.0.0.1:0", "--fault=status-429"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.next_line().await.unwrap().unwrap();
    let first: Value = serde_json::from_str(&first).unwrap();
    let gateway = Gateway::start(first["upstream_url"].as_str().unwrap(), &[]).await;
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.reason(), "API_RATE_LIMITED");

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let listen = first["listen"].as_str().unwrap();
    let control = format!("http://{listen}/_simulator");
    let ordered = client
        .post(format!("{control}/faults"))
        .body("catalog-answer");
    assert!(ordered.send().await.unwrap().status().is_success());
    let id = gateway.create(request()).await.unwrap().id;
    let ledger = client
        .get(format!("{control}/batches"))
        .send()
        .await
        .unwrap();
    assert!(ledger.text().await.unwrap().contains(&id));

    let mut found = client.get(format!(
        "{}/batches?externalId={id}&limit=1&properties=status",
        first["catalog_url"].as_str().unwrap()
    ));
    for (name, value) in crate::support::CREDENTIALS {
        found = found.header(name, value);
    }
    let found = found.send().await.unwrap().text().await.unwrap();
    assert_eq!(found, format!(r#"{{"{id}":{{"status":"loading"}}}}"#));
}

#[tokio::test]
async fn healthcheck_of_nobody_fails() {
    let output = run(&["healthcheck", "--address=127.0.0.1:1"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: "));
}

#[tokio::test]
async fn descriptor_writes_the_descriptors() {
    assert_eq!(run(&["descriptor"]).await.stdout, DESCRIPTOR_SET);
}

#[tokio::test]
async fn descriptor_writes_a_service_config_that_retries_what_is_safe() {
    let written = run(&["descriptor", "--service-config"]).await.stdout;
    let config: Value = serde_json::from_slice(&written).unwrap();
    let [method] = &config["methodConfig"].as_array().unwrap()[..] else {
        panic!("{config}");
    };
    let name = json!([{ "service": SERVICE_NAME }]);
    assert_eq!(method["name"], name);
    let retries = &method["retryPolicy"];
    assert_eq!(retries["retryableStatusCodes"], json!(["UNAVAILABLE"]));
    assert_eq!(retries["maxAttempts"], 3);
}

#[tokio::test]
async fn bad_configuration_is_refused_with_every_problem() {
    for command in ["serve", "demo", "config"] {
        let output = run(&[command, "--listen=nowhere", "--request-timeout=soon"]).await;
        assert_eq!(output.status.code(), Some(2));
        let told = text(&output.stderr);
        assert!(
            told.contains("--listen") && told.contains("--request-timeout"),
            "{told}"
        );
    }
    let bad = file("bad.toml", "listen = 1\nlisten_adress = 'x'\n[table]\n");
    let output = run(&["serve", "--config", bad.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stderr);
    assert!(
        told.contains("listen_adress") && told.contains("table"),
        "{told}"
    );

    let secret = file("secret.toml", "default_api_key = s3cret\n");
    let output = run(&["serve", "--config", secret.to_str().unwrap()]).await;
    let told = text(&output.stderr);
    assert!(
        told.contains("line 1") && !told.contains("s3cret"),
        "{told}"
    );

    let output = run(&["serve", "--default-token-file=/nowhere"]).await;
    assert!(text(&output.stderr).contains("--callers-are-authenticated"));
}

#[tokio::test]
async fn flags_win_over_the_environment_and_that_over_the_file() {
    let settings = file(
        "settings.toml",
        "listen = '127.0.0.1:1'\nrequest_timeout = '1s'\nmax_in_flight = 7\n\
         forward_metadata = ['x-a', 'x-b']\ndefault_api_key = 's3cret'\n",
    );
    let output = Gateway::command(&["config", "--listen=127.0.0.1:3"])
        .env("AEP_GATEWAY_CONFIG", &settings)
        .env("AEP_GATEWAY_LISTEN", "127.0.0.1:2")
        .env("AEP_GATEWAY_REQUEST_TIMEOUT", "2s")
        .output()
        .await
        .unwrap();
    let shown = text(&output.stdout);
    for line in [
        r#"listen = "127.0.0.1:3" # flag"#,
        r#"request_timeout = "2s" # environment"#,
        r#"max_in_flight = "7" # file"#,
        r#"forward_metadata = "x-a,x-b" # file"#,
        r#"default_api_key = "[redacted]" # file"#,
        r#"upstream_http = "auto" # default"#,
        "# default_org_id is not set",
    ] {
        assert!(
            shown.lines().any(|shown| shown == line),
            "{line} is not in {shown}"
        );
    }
    assert!(!shown.contains("s3cret"));
    let parsed: toml::Table = shown.parse().unwrap();
    assert_eq!(parsed["listen"].as_str(), Some("127.0.0.1:3"));
}

#[tokio::test]
async fn help_shows_no_secret() {
    let output = Gateway::command(&["serve", "--help"])
        .env("AEP_GATEWAY_DEFAULT_API_KEY", "s3cret")
        .output()
        .await
        .unwrap();
    assert!(text(&output.stdout).contains("AEP_GATEWAY_DEFAULT_API_KEY"));
    assert!(!text(&output.stdout).contains("s3cret"));
}
