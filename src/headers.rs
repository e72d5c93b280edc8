//! The headers that calls carry, and which of them are secret.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Names the call in logs; sent upstream and back.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The four headers that every call needs ("Getting started with Experience
/// Platform APIs"), in the documentation's order.
pub static CREDENTIALS: [HeaderName; 4] = [
    http::header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("x-gw-ims-org-id"),
    HeaderName::from_static("x-sandbox-name"),
];

/// Whether a header's value must never be shown.
pub fn is_secret(name: &HeaderName) -> bool {
    CREDENTIALS[..2].contains(name)
}

/// The secret ones of these headers.
pub fn secrets_in(headers: &HeaderMap) -> [Option<&HeaderValue>; 2] {
    let [token, key, ..] = &CREDENTIALS;
    [token, key].map(|name| headers.get(name))
}

/// What a value that is no token lacks, as the end of a sentence.
pub const NO_TOKEN: &str = "must be visible ASCII characters without blanks";

/// Whether a value is visible ASCII without blanks.
pub fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic)
}
