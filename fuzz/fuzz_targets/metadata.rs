//! Any metadata of a call: a line `name: value` for each value. In the two
//! secret headers `%` stands for a secret.
#![no_main]

use aep_batch_gateway::{
    api::methods,
    call::{attempt::Attempt, deadline, idempotency_key, request_id},
    credentials::{self, Credentials},
    failure::Failure,
    headers::{self, CREDENTIALS},
    status::{self, About},
};
use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use tokio::time::Instant;

const SECRET: &str = "hunter2.s3cr3t";

fuzz_target!(|lines: &[u8]| {
    let metadata = metadata(lines);

    let id = request_id::of_call(&metadata);
    assert!(id.len() <= 128 && is_token(&id));
    let attempt = Attempt::of_call(&metadata);
    assert!(!attempt.follows(attempt));

    let now = Instant::now();
    match deadline::of_call(&metadata, now) {
        Ok(Some(deadline)) => assert!(deadline >= now),
        Ok(None) => {}
        Err(failure) => is_harmless(&failure, &id),
    }
    match idempotency_key::of_call(&metadata) {
        Ok(Some(key)) => assert!(!key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic())),
        Ok(None) => {}
        Err(failure) => is_harmless(&failure, &id),
    }

    let defaults = [
        "Bearer hunter2.s3cr3t",
        "hunter2.s3cr3t",
        "demo@AdobeOrg",
        "prod",
    ]
    .map(|value| Some(HeaderValue::from_static(value)));
    for defaults in [[const { None }; 4], defaults] {
        for defaults_are_fixed in [false, true] {
            let credentials = Credentials {
                defaults: defaults.clone(),
                defaults_are_fixed,
                forward: vec![HeaderName::from_static("x-extra")],
            };
            match credentials.headers(&metadata) {
                Ok(headers) => {
                    for name in &CREDENTIALS {
                        assert!(credentials::check(name, &headers[name]).is_ok());
                    }
                    assert!(!format!("{headers:?}").contains(SECRET));
                    let others = metadata.get_all("x-extra").iter().count();
                    assert_eq!(headers.len(), CREDENTIALS.len() + others);
                }
                Err(failure) => is_harmless(&failure, &id),
            }
        }
    }
});

fn metadata(lines: &[u8]) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    for line in lines.split(|&byte| byte == b'\n') {
        let Some(colon) = line.windows(2).position(|two| two == b": ") else {
            continue;
        };
        let Ok(name) = HeaderName::from_bytes(&line[..colon]) else {
            continue;
        };
        let mut value = line[colon + 2..].to_vec();
        if String::from_utf8_lossy(&value).contains(SECRET) {
            continue; // libFuzzer knows the program's constants
        }
        if headers::is_secret(&name) {
            let parts: Vec<_> = value.split(|&byte| byte == b'%').collect();
            value = parts.join(SECRET.as_bytes());
        }
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            let _ = metadata.try_append(name, value);
        }
    }
    metadata
}

fn is_token(value: &HeaderValue) -> bool {
    !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_graphic)
}

fn is_harmless(failure: &Failure, id: &HeaderValue) {
    assert!(!format!("{failure:?}").contains(SECRET));
    let about = About {
        method: methods().last(),
        request_id: Some(id),
        ..About::default()
    };
    let status = status::of_failure(failure, about);
    assert!(!format!("{status:?}").contains(SECRET));
    assert!(!String::from_utf8_lossy(status.details()).contains(SECRET));
}
