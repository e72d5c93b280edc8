//! Any bytes as the body of an error.
#![no_main]

use aep_batch_gateway::{redact::Redactor, upstream::error_body};
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;

/// The seeds repeat it.
const TOKEN: &str = "t0k3n";

fuzz_target!(|body: &[u8]| {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", HeaderValue::from_static("Bearer t0k3n"));
    let without_token = Redactor::without_secrets_of(&headers);
    for (redactor, hides) in [(Redactor::default(), false), (without_token, true)] {
        let error = error_body::read(body, &redactor);
        for text in [error.code, error.title, error.detail, error.report] {
            let Some(text) = text else { continue };
            assert!(!text.is_empty());
            assert!(text.len() <= 1024, "{} bytes", text.len());
            assert!(!text.contains(char::is_control), "{text:?}");
            assert!(!(hides && text.contains(TOKEN)), "{text:?}");
        }
    }
});
