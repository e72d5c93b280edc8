//! A call's own secrets, in whatever form the API or a proxy gives them back, are in
//! no status, no detail, no log line and no span.

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tonic::Code;

use crate::support::{
    CREATE, Client, Collector, Gateway, Scripted, Step, attribute, frame, request,
};

const TOKEN: &str = "eyT0ken/With+every.Kind~of_char-in-it/0123456789==";
const KEY: &str = "k3y/5f0c9a7e4d2b8e6a1f3c";

fn metadata() -> [(&'static str, String); 4] {
    [
        ("authorization", format!("Bearer {TOKEN}")),
        ("x-api-key", KEY.to_owned()),
        (
            "x-gw-ims-org-id",
            "5C1328435BF324E90A49402A@AdobeOrg".to_owned(),
        ),
        ("x-sandbox-name", "prod".to_owned()),
    ]
}

/// Both secrets in every form that we have heard of.
fn forms() -> Vec<String> {
    let mut forms = Vec::new();
    for secret in [TOKEN, KEY] {
        let each = |form: fn(u8) -> String| secret.bytes().map(form).collect::<String>();
        forms.extend([
            secret.to_owned(),
            secret.replace('/', r"\/"),
            each(|byte| format!(r"\u{byte:04x}")),
            each(|byte| format!(r"\\u{byte:04X}")),
            each(|byte| match byte.is_ascii_alphanumeric() {
                true => (byte as char).to_string(),
                false => format!("%{byte:02x}"),
            }),
            each(|byte| format!("%{byte:02X}")),
            each(|byte| format!("%25{byte:02x}")),
            each(|byte| format!("&#{byte};")),
            each(|byte| format!("&#x{byte:x};")),
            secret[3..19].to_owned(),
            format!("{}\n{}", &secret[..12], &secret[12..]),
        ]);
        for before in ["", ":", "a:", "Bearer "] {
            let text = format!("{before}{secret}");
            forms.push(BASE64_STANDARD.encode(&text));
            forms.push(BASE64_STANDARD.encode(&text).replace('/', r"\/"));
            forms.push(BASE64_URL_SAFE_NO_PAD.encode(&text));
        }
    }
    forms
}

/// Fails if a part of this form is shown. The first and last characters of base64 stand
/// for what is beside the secret too.
fn assert_hidden(shown: &str, form: &str, place: &str) {
    let line = form.replace('\n', " ");
    let is_shown = |part: &[u8]| {
        let part = String::from_utf8_lossy(part);
        shown.contains(&*part) || shown.contains(&*part.replace('\\', r"\\"))
    };
    let part = line
        .as_bytes()
        .windows(16.min(line.len()))
        .find(|part| is_shown(part));
    let part = part.map(String::from_utf8_lossy);
    assert_eq!(part, None, "{place}: {form} in {shown}");
}

/// Answers of the API that hold this text, and where.
fn answers(form: &str) -> Vec<(&'static str, Step)> {
    let line = form.replace('\n', "");
    let json = json!({ "error_code": "403010", "message": form }).to_string();
    let report = json!({ "title": form, "status": 400, "report": { "a": [form] } }).to_string();
    let raw = format!(r#"{{"error_code":"403010","message":"{line}"}}"#);
    let html = format!("<html><p>{form}</p></html>");
    let cut = format!("<html>{}", &form[..form.len() - 3]);
    let location = [("location", line.as_str())];
    let host = format!("https://{line}/x");
    let batch = format!("https://platform.adobe.io/batches/{line}");
    vec![
        ("message", Step::answer("403 Forbidden", &[], &json)),
        ("report", Step::answer("400 Bad Request", &[], &report)),
        ("raw message", Step::answer("401 Unauthorized", &[], &raw)),
        ("page", Step::answer("502 Bad Gateway", &[], &html)),
        ("cut page", Step::answer("500 Oh", &[], &cut)),
        ("answer", Step::answer("201 Created", &[], &html)),
        ("location", Step::answer("201 Created", &location, "{}")),
        (
            "batch",
            Step::answer("201 Created", &[("location", &batch)], ""),
        ),
        (
            "redirect",
            Step::answer("307 Elsewhere", &[("location", &host)], ""),
        ),
        (
            "request id",
            Step::answer("404 No", &[("x-request-id", &line)], "{}"),
        ),
    ]
}

/// Has the API answer with each form in each place, and looks at all that is shown.
async fn assert_none_is_shown(forms: &[String], log_level: &str) {
    let answers: Vec<_> = forms
        .iter()
        .flat_map(|form| answers(form).into_iter().map(move |answer| (form, answer)))
        .collect();
    let scripts = answers
        .iter()
        .map(|(_, (_, step))| vec![Step::ReadRequest, step.clone()]);
    let upstream = Scripted::start(scripts.collect()).await;
    let flags = [log_level, "--upstream-http=1"];
    let gateway = Gateway::start(&upstream.url(), &flags).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut client = Client::over(stream).await.unwrap();
    let metadata = metadata();
    let metadata = metadata
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    for (form, (place, _)) in &answers {
        let answer = client
            .call(CREATE, &metadata, &frame(&request()))
            .await
            .unwrap();
        assert_ne!(answer.code(), Code::Ok, "{place}");
        let status = answer.status();
        let details = String::from_utf8_lossy(status.details()).into_owned();
        let shown = format!("{}\n{details}\n{answer:?}", status.message());
        assert_hidden(&shown, form, place);
    }
    gateway.terminate();
    let (_, log) = gateway.ended().await;
    assert_eq!(log.matches("call failed").count(), answers.len());
    for form in forms {
        assert_hidden(&log, form, "log");
    }
}

#[tokio::test]
async fn no_form_of_a_secret_is_told_or_logged() {
    assert_none_is_shown(&forms(), "--log-level=info").await;
}

#[tokio::test]
async fn libraries_log_no_secret_that_the_api_gives_back() {
    let forms = [TOKEN.to_owned(), BASE64_STANDARD.encode(KEY)];
    assert_none_is_shown(&forms, "--log-level=trace").await;
}

#[tokio::test]
async fn the_id_of_a_batch_is_whatever_the_api_says_but_no_line_shows_all_of_it() {
    let long = "x".repeat(200_000);
    let ids = [
        TOKEN,
        KEY,
        &BASE64_STANDARD.encode(TOKEN),
        "a\nb\u{1b}[31m\u{202e}",
        &long,
    ];
    let scripts = ids.iter().map(|id| {
        let batch = json!({ "id": id, "status": "loading" }).to_string();
        vec![Step::ReadRequest, Step::answer("201 Created", &[], &batch)]
    });
    let upstream = Scripted::start(scripts.collect()).await;
    let collector = Collector::start().await;
    let mut command = Gateway::command(&[
        "serve",
        "--listen=127.0.0.1:0",
        "--admin-listen=127.0.0.1:0",
        "--upstream-url",
        &upstream.url(),
    ]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url());
    let gateway = Gateway::spawn(command).await;
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let mut client = Client::over(stream).await.unwrap();
    let metadata = metadata();
    let metadata = metadata
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    for id in ids {
        let answer = client
            .call(CREATE, &metadata, &frame(&request()))
            .await
            .unwrap();
        assert_eq!(answer.code(), Code::Ok);
        let is_told = answer
            .message
            .windows(id.len())
            .any(|part| part == id.as_bytes());
        assert!(is_told, "the answer keeps its id");
    }
    gateway.terminate();
    let (_, log) = gateway.ended().await;
    let lines = log.lines().filter(|line| line.contains("call ended"));
    let lines: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), ids.len(), "{log}");
    let spans = collector.spans();
    let calls = spans
        .iter()
        .filter(|span| span.name.ends_with("CreateBatch"));
    let shown: Vec<_> = lines
        .iter()
        .map(|line| line["batch_id"].as_str().unwrap().to_owned())
        .chain(calls.map(|span| attribute(span, "aep.batch_id")))
        .collect();
    assert_eq!(shown.len(), 2 * ids.len());
    for id in shown {
        assert!(id.len() <= 128, "{id}");
        assert!(!id.contains(|c: char| c.is_control()), "{id:?}");
        for secret in ids[..3].iter() {
            assert_hidden(&id, secret, "id");
        }
    }
}
