//! The commands, as a person at a terminal has them.

use std::{path::PathBuf, process::Output};

use aep_batch_gateway::proto::{DESCRIPTOR_SET, v1::batch_service_server::SERVICE_NAME};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tonic::Code;

use crate::support::{CREATE, CREDENTIALS, Gateway, Scripted, frame, request, simulator, with_id};

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

/// As on a machine without certificate authorities.
fn no_authorities() -> [(&'static str, PathBuf); 2] {
    let empty = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("no-authorities");
    std::fs::create_dir_all(&empty).unwrap();
    [
        ("SSL_CERT_FILE", "/dev/null".into()),
        ("SSL_CERT_DIR", empty),
    ]
}

#[tokio::test]
async fn demo_makes_a_call_and_goes_on() {
    // The port of the simulated API: if another program has it, so much the better.
    let _taken = tokio::net::TcpListener::bind("127.0.0.1:8080").await;
    let mut child =
        Gateway::command(&["demo", "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0"])
            // The demo needs neither a proxy nor certificate authorities.
            .env("HTTP_PROXY", "http://127.0.0.1:1")
            .env("ALL_PROXY", "no proxy")
            .envs(no_authorities())
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
    assert!(shown.contains("/_simulator/faults"), "{shown}");
    assert!(!shown.contains(":8080/"), "{shown}");
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
        .body("catalog-response");
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
    let methods = config["methodConfig"].as_array().unwrap();
    let names = methods.iter().map(|method| method["name"][0].clone());
    let expected = ["CreateBatch", "GetBatch", "ListBatches"]
        .map(|method| json!({ "service": SERVICE_NAME, "method": method }));
    assert_eq!(names.collect::<Vec<_>>(), expected);
    for method in methods {
        let retries = &method["retryPolicy"];
        assert_eq!(retries["retryableStatusCodes"], json!(["UNAVAILABLE"]));
        assert_eq!(retries["maxAttempts"], 3);
    }
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
    let mixed = file("mixed.toml", "drain_delay = 'x'\nlog_format = 'xml'\n");
    let output = Gateway::command(&["serve", "--listen=nowhere", "--default-api-key=s3 cret"])
        .env("AEP_GATEWAY_CONFIG", &mixed)
        .env("AEP_GATEWAY_GRPC_WEB", "maybe")
        .output()
        .await
        .unwrap();
    let told = text(&output.stderr);
    assert_eq!(told.lines().count(), 6, "{told}");
    for flag in [
        "--drain-delay",
        "--listen",
        "--grpc-web",
        "--default-api-key",
    ] {
        assert!(told.contains(flag), "{told}");
    }
    assert!(told.contains("[possible values: json, text]"), "{told}");
    assert!(!told.contains("s3 cret"), "{told}");

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
    assert!(text(&output.stdout).contains("- on-retry:"));
    assert!(!text(&output.stdout).contains("s3cret"));
}

#[tokio::test]
async fn certificate_authorities_are_needed_for_tls_alone() {
    let upstream = simulator().await;
    let serve = |import: &str, catalog: &str| {
        let mut command = Gateway::command(&[
            "serve",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--upstream-url",
            import,
            "--catalog-url",
            catalog,
        ]);
        command.envs(no_authorities());
        command
    };
    let (import, catalog) = (upstream.import_url(), upstream.catalog_url());
    let tls = "https://127.0.0.1:1/catalog";

    let gateway = Gateway::spawn(serve(&import, &catalog)).await;
    gateway.create(with_id("e")).await.unwrap();
    assert!(!gateway.log().contains("certificate authorities"));

    let gateway = Gateway::spawn(serve(&import, tls)).await;
    gateway.create(request()).await.unwrap();
    gateway.logs("no trusted CA certificates found").await;

    let mut by_tls = serve(&import, &catalog);
    by_tls.env("HTTP_PROXY", "https://127.0.0.1:1");
    for mut command in [serve(tls, tls), by_tls] {
        let refused = command.output().await.unwrap();
        assert_eq!(refused.status.code(), Some(1));
        let told = text(&refused.stderr);
        assert!(told.contains("no trusted CA certificates found"), "{told}");
        assert!(told.contains("ca-certificates"), "{told}");
        assert!(told.contains("--upstream-ca-file"), "{told}");
    }
}

#[tokio::test]
async fn a_proxy_that_cannot_be_read_is_refused() {
    for name in ["HTTP_PROXY", "https_proxy", "all_proxy"] {
        for value in ["http://u:s3c ret@proxy:1", "http://u:s3cret@proxy:1\n"] {
            for command in ["serve", "config"] {
                let mut command = Gateway::command(&[command, "--listen=nowhere"]);
                let output = command.env(name, value).output().await.unwrap();
                assert_eq!(output.status.code(), Some(2), "{name}");
                let told = text(&output.stderr);
                assert!(told.contains(name) && told.contains("--listen"), "{told}");
                assert!(!told.contains("s3c") && !told.contains("ret@"), "{told}");
            }
        }
    }
}

#[tokio::test]
async fn config_shows_the_proxy_of_each_url() {
    let shown = async |no_proxy: &str| {
        let output = Gateway::command(&["config", "--upstream-url=http://api.example:8080"])
            .env("http_proxy", "http://user:s3cret@proxy:3128")
            .env("HTTPS_PROXY", "proxy2:3128")
            .env("NO_PROXY", no_proxy)
            .output()
            .await
            .unwrap();
        assert!(output.status.success());
        let shown = text(&output.stdout);
        assert!(!shown.contains("s3cret"), "{shown}");
        let lines = shown.lines().filter(|line| line.contains("is reached"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let plain = "# upstream_url is reached through the proxy http://[redacted]@proxy:3128 \
        (http_proxy)";
    let tls = "# catalog_url is reached through the proxy http://proxy2:3128 (HTTPS_PROXY)";
    assert_eq!(shown("").await, [plain, tls]);
    assert_eq!(shown("api.example:9090").await, [plain, tls]);
    let direct = "# upstream_url is reached without a proxy";
    assert_eq!(shown("api.example:8080").await, [direct, tls]);
    let all = [direct, "# catalog_url is reached without a proxy"];
    assert_eq!(shown("*").await, all);
}

#[tokio::test]
async fn a_token_file_that_holds_something_else_is_refused_and_never_quoted() {
    let ims = r#"{"access_token":"s3cret","token_type":"bearer","expires_in":86399}"#;
    for (held, told) in [
        (ims, "contains JSON"),
        ("Bearer s3cret\n", "the word Bearer"),
        ("\u{feff}s3cret s3cret", "contains more than one word"),
    ] {
        let token = file("token-file", held);
        let flag = format!("--default-token-file={}", token.display());
        let output = run(&["serve", &flag, "--callers-are-authenticated"]).await;
        assert_eq!(output.status.code(), Some(2));
        let output = text(&output.stderr);
        assert!(output.contains(told), "{output}");
        assert!(output.contains("it must contain nothing but the access token"));
        assert!(!output.contains("s3cret"), "{output}");
    }

    let upstream = Scripted::answering("201 Created", &[], r#"{"id":"b"}"#).await;
    let token = file("token-file-with-bom", "\u{feff}s3cret \r\n");
    let flag = format!("--default-token-file={}", token.display());
    let gateway = Gateway::start(&upstream.url(), &[&flag, "--callers-are-authenticated"]).await;
    let body = frame(&request());
    let answer = gateway.raw_call(CREATE, &CREDENTIALS[1..], &body).await;
    assert_eq!(answer.code(), Code::Ok);
    let sent = &upstream.requests()[0];
    assert!(sent.contains("authorization: Bearer s3cret\r\n"), "{sent}");
}

#[tokio::test]
async fn a_variable_that_is_not_a_setting_is_reported() {
    let odd = |command: &mut tokio::process::Command| {
        command
            .env("AEP_GATEWAY_LISTN", "s3cret")
            .env("AEP_GATEWAY_REQUEST_TIMEOUTS", "s3cret")
            // Kubernetes makes these for a Service of the name aep-gateway.
            .env("AEP_GATEWAY_SERVICE_HOST", "10.0.0.1")
            .env("AEP_GATEWAY_PORT", "tcp://10.0.0.1:50051")
            .env("AEP_GATEWAY_PORT_50051_TCP_ADDR", "10.0.0.1");
    };
    let told = [
        "AEP_GATEWAY_LISTN is not a setting and has no effect. Did you mean AEP_GATEWAY_LISTEN?",
        "AEP_GATEWAY_REQUEST_TIMEOUTS is not a setting and has no effect. Did you mean \
         AEP_GATEWAY_REQUEST_TIMEOUT?",
    ];
    let mut config = Gateway::command(&["config"]);
    odd(&mut config);
    let output = config.output().await.unwrap();
    assert!(output.status.success());
    let mut lines: Vec<_> = text(&output.stderr).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, told);

    let upstream = simulator().await;
    let mut serve = Gateway::command(&[
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
        "--upstream-url",
        &upstream.import_url(),
    ]);
    odd(&mut serve);
    let gateway = Gateway::spawn(serve).await;
    for line in told {
        gateway.logs(line).await;
    }
    assert_eq!(gateway.log().matches("is not a setting").count(), 2);
    assert!(!gateway.log().contains("s3cret"));
}
