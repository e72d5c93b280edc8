//! `x-request-id`: names a call in logs, and is sent upstream and back.

use http::{HeaderMap, HeaderValue};
use uuid::Uuid;

use crate::headers::{REQUEST_ID, is_token};

/// The caller's `x-request-id`, or a new one where that is missing or odd.
pub fn of_call(metadata: &HeaderMap) -> HeaderValue {
    const LONGEST: usize = 128;
    let mut id = match metadata.get(REQUEST_ID) {
        Some(id) if is_token(id.as_bytes()) && id.len() <= LONGEST => id.clone(),
        #[expect(clippy::expect_used, reason = "a UUID is ASCII")]
        _ => HeaderValue::from_str(&new_id().to_string()).expect("a header value"),
    };
    // Not secret: marked sensitive so that HPACK does not index a value that never repeats.
    id.set_sensitive(true);
    id
}

/// A random UUID. Not by the operating system's generator, which `uuid` would
/// panic without: an id in a log guards nothing.
pub fn new_id() -> Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_kept_or_made() {
        let id = |value: &str| {
            let value = HeaderValue::from_bytes(value.as_bytes()).expect(value);
            let metadata = HeaderMap::from_iter([(REQUEST_ID, value)]);
            of_call(&metadata).to_str().expect("ASCII").to_owned()
        };
        assert_eq!(id("abc-1"), "abc-1");
        for odd in ["", "a b", "é", &"x".repeat(129)] {
            assert_eq!(id(odd).len(), 36, "{odd}");
        }
        assert_ne!(id(""), id(""));
    }
}
