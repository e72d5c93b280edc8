//! Which headers a call carries upstream: the caller's own credentials, or
//! the configured defaults, and nothing else of the caller's metadata unless
//! the operator named it.

use std::{
    hash::{BuildHasher, RandomState},
    sync::LazyLock,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

use crate::outcome::{Failure, Violation};

/// Names the call in logs; sent upstream and back.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The four headers that every call needs ("Getting started with Experience
/// Platform APIs"), in the documentation's order.
pub static NAMES: [HeaderName; 4] = [
    http::header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("x-gw-ims-org-id"),
    HeaderName::from_static("x-sandbox-name"),
];

/// Whether a header's value must never be shown.
pub fn is_secret(name: &HeaderName) -> bool {
    *name == NAMES[0] || *name == NAMES[1]
}

/// Takes the headers of a call from its metadata.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// What a call carries that does not say otherwise, in the order of
    /// [`NAMES`].
    pub defaults: [Option<HeaderValue>; 4],
    /// Whether a call may say otherwise.
    pub defaults_are_fixed: bool,
    /// Further metadata that is passed on.
    pub forward: Vec<HeaderName>,
}

impl Credentials {
    /// The headers that a call with this metadata carries upstream.
    pub fn headers(&self, metadata: &HeaderMap) -> Result<HeaderMap, Failure> {
        // With what a request gets besides, this is enough; more would be copied for nothing.
        let mut headers = HeaderMap::with_capacity(12);
        let mut missing = Vec::new();
        let mut bad = Vec::new();
        for (name, default) in NAMES.iter().zip(&self.defaults) {
            match (single_value(metadata, name), default) {
                (Err(violation), _) => bad.push(violation),
                (Ok(None), None) => missing.push(Violation::new(
                    name.as_str(),
                    "is missing: send it as metadata of the call",
                )),
                (Ok(Some(value)), Some(default)) if self.defaults_are_fixed && value != default => {
                    bad.push(Violation::new(
                        name.as_str(),
                        "is fixed by the gateway's configuration: do not send another value",
                    ));
                }
                (Ok(Some(value)), _) | (Ok(None), Some(value)) => {
                    let mut value = value.clone();
                    value.set_sensitive(is_secret(name));
                    headers.insert(name, value);
                }
            }
        }
        if !bad.is_empty() {
            bad.append(&mut missing);
            return Err(Failure::Invalid(bad));
        }
        if !missing.is_empty() {
            return Err(Failure::NoCredentials(missing));
        }
        for name in &self.forward {
            for value in metadata.get_all(name) {
                headers.append(name, value.clone());
            }
        }
        Ok(headers)
    }
}

/// Metadata with the caller's own key for the call.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// The caller's own key for the call, which becomes its external id where the
/// message has none. Written as a string of structured fields (RFC 9651, with
/// quotes, as the draft of the `Idempotency-Key` header wants it) it is the same
/// key as without.
pub fn idempotency_key(metadata: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut values = metadata.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let key = match (values.next(), value.as_bytes()) {
        (Some(_), _) => Err("is given more than once"),
        (None, [b'"', rest @ ..]) => {
            unquoted(rest).ok_or("must be one string in quotes, or have none")
        }
        (None, plain) if is_token(plain) => Ok(String::from_utf8_lossy(plain).into_owned()),
        _ => Err(NO_TOKEN),
    };
    key.map(Some).map_err(|description| {
        let violation = Violation::new(IDEMPOTENCY_KEY, description);
        Failure::Invalid(vec![violation])
    })
}

/// What follows on the opening quote of a string (RFC 9651, section 4.2.5).
/// Parameters behind the closing one are no part of the key.
fn unquoted(rest: &[u8]) -> Option<String> {
    let mut key = String::new();
    let mut bytes = rest.iter();
    loop {
        match bytes.next()? {
            b'"' => break,
            b'\\' => match bytes.next()? {
                escaped @ (b'"' | b'\\') => key.push(char::from(*escaped)),
                _ => return None,
            },
            byte @ b' '..=b'~' => key.push(char::from(*byte)),
            _ => return None,
        }
    }
    let is_end = matches!(bytes.as_slice().trim_ascii(), [] | [b';', ..]);
    (is_end && !key.is_empty()).then_some(key)
}

/// The caller's `x-request-id`, or a new one where that is missing or odd.
pub fn request_id(metadata: &HeaderMap) -> HeaderValue {
    const LONGEST: usize = 128;
    let mut id = match metadata.get(REQUEST_ID) {
        Some(id) if is_token(id.as_bytes()) && id.len() <= LONGEST => id.clone(),
        #[expect(clippy::expect_used, reason = "a UUID is ASCII")]
        _ => HeaderValue::from_str(&new_id().to_string()).expect("a header value"),
    };
    // It is no secret, but always another: HTTP/2 need not remember it.
    id.set_sensitive(true);
    id
}

/// Tells callers apart by their credentials, within this process only.
pub fn fingerprint(headers: &HeaderMap) -> u64 {
    let values = NAMES.each_ref();
    HASHER.hash_one(values.map(|name| headers.get(name).map(HeaderValue::as_bytes)))
}

/// Tells calls apart by their caller and body, within this process only.
pub fn purpose(caller: u64, body: &[u8]) -> u64 {
    HASHER.hash_one((caller, body))
}

static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// A random UUID. Not by the operating system's generator, which `uuid` would
/// panic without: an id in a log guards nothing.
pub fn new_id() -> Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}

/// The one good value of a header, or what is wrong. The value itself is never
/// quoted: it may be a secret.
fn single_value<'a>(
    metadata: &'a HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'a HeaderValue>, Violation> {
    let mut values = metadata.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Violation::new(name.as_str(), "is given more than once"));
    }
    match check(name, value) {
        Ok(()) => Ok(Some(value)),
        Err(description) => Err(Violation::new(name.as_str(), description)),
    }
}

/// What is wrong with the value of a credential, as the end of a sentence.
pub fn check(name: &HeaderName, value: &HeaderValue) -> Result<(), &'static str> {
    if *name == http::header::AUTHORIZATION {
        let token = match value.as_bytes().split_at_checked("Bearer ".len()) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"Bearer ") => token,
            _ => b"",
        };
        is_token(token)
            .then_some(())
            .ok_or("must be `Bearer ` and an access token")
    } else {
        is_token(value.as_bytes()).then_some(()).ok_or(NO_TOKEN)
    }
}

const NO_TOKEN: &str = "must be visible ASCII characters without blanks";

fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: [(&str, &str); 4] = [
        ("authorization", "Bearer abc.def-_~+/="),
        ("x-api-key", "key"),
        ("x-gw-ims-org-id", "5C1328435BF324E90A49402A@AdobeOrg"),
        ("x-sandbox-name", "prod"),
    ];

    fn metadata(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            let value = HeaderValue::from_bytes(value.as_bytes()).expect(value);
            map.append(*name, value);
        }
        map
    }

    fn fields(failure: &Failure) -> Vec<&str> {
        match failure {
            Failure::Invalid(violations) | Failure::NoCredentials(violations) => {
                violations.iter().map(|v| v.field.as_str()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_four_are_taken_and_nothing_else() {
        let mut sent = metadata(&GOOD);
        sent.insert("cookie", HeaderValue::from_static("a=b"));
        sent.insert("x-envoy-attempt-count", HeaderValue::from_static("1"));
        let headers = Credentials::default().headers(&sent).expect("good");
        assert_eq!(headers.len(), 4);
        for (name, value) in GOOD {
            assert_eq!(headers[name], value);
        }
        assert!(!format!("{headers:?}").contains("abc.def"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (i, (name, _)) in GOOD.iter().enumerate() {
            let mut rest = GOOD.to_vec();
            rest.remove(i);
            let failure = Credentials::default().headers(&metadata(&rest));
            let failure = failure.expect_err("a missing credential");
            assert!(matches!(failure, Failure::NoCredentials(_)));
            assert_eq!(fields(&failure), [*name]);
        }
        let failure = Credentials::default().headers(&HeaderMap::new());
        let all = GOOD.map(|(name, _)| name);
        assert_eq!(fields(&failure.expect_err("nothing")), all);
    }

    #[test]
    fn what_is_malformed_or_repeated_is_named_and_never_quoted() {
        for (name, bad) in [
            ("authorization", "secret"),
            ("authorization", "Basic secret"),
            ("authorization", "Bearer "),
            ("authorization", "Bearer sec ret"),
            ("authorization", "Bearer secrét"),
            ("x-api-key", ""),
            ("x-api-key", "sec\tret"),
            ("x-gw-ims-org-id", "a b"),
            ("x-sandbox-name", "sécret"),
        ] {
            let mut map = metadata(&GOOD);
            map.insert(name, HeaderValue::from_bytes(bad.as_bytes()).expect(bad));
            let failure = Credentials::default().headers(&map).expect_err(bad);
            assert!(matches!(failure, Failure::Invalid(_)), "{bad}");
            assert_eq!(fields(&failure), [name]);
            assert!(!format!("{failure:?}").contains("ret"), "{failure:?}");
        }
        for (name, value) in GOOD {
            let mut map = metadata(&GOOD);
            map.append(name, HeaderValue::from_str(value).expect(value));
            let failure = Credentials::default().headers(&map).expect_err(name);
            assert_eq!(fields(&failure), [name]);
        }
    }

    #[test]
    fn defaults_fill_in_and_can_be_fixed() {
        let mut credentials = Credentials::default();
        credentials.defaults[3] = Some(HeaderValue::from_static("prod"));
        let headers = credentials
            .headers(&metadata(&GOOD[..3]))
            .expect("a default");
        assert_eq!(headers["x-sandbox-name"], "prod");

        let mut other = metadata(&GOOD);
        other.insert("x-sandbox-name", HeaderValue::from_static("dev"));
        let headers = credentials.headers(&other).expect("the caller's own");
        assert_eq!(headers["x-sandbox-name"], "dev");

        credentials.defaults_are_fixed = true;
        let failure = credentials.headers(&other).expect_err("another sandbox");
        assert_eq!(fields(&failure), ["x-sandbox-name"]);
        assert!(credentials.headers(&metadata(&GOOD)).is_ok());
    }

    #[test]
    fn an_idempotency_key_is_the_same_with_quotes_and_without() {
        let key = |value: &str| idempotency_key(&metadata(&[("idempotency-key", value)]));
        for (value, expected) in [
            ("k-1", "k-1"),
            (r#""k-1""#, "k-1"),
            (r#""k 1""#, "k 1"),
            (r#""a\"b\\c""#, r#"a"b\c"#),
            (r#""k-1"; v=2"#, "k-1"),
            (r#"k"1"#, r#"k"1"#),
        ] {
            assert_eq!(key(value).expect(value).as_deref(), Some(expected));
        }
        for odd in [
            r#"""#,
            r#""""#,
            r#""k"#,
            r#""k"1"#,
            r#""a\b""#,
            "\"\u{e9}\"",
            "a b",
            "",
        ] {
            assert_eq!(fields(&key(odd).expect_err(odd)), ["idempotency-key"]);
        }
        assert_eq!(idempotency_key(&HeaderMap::new()).expect("none"), None);
    }

    #[test]
    fn a_request_id_is_kept_or_made() {
        let id = |value: &str| {
            let map = metadata(&[("x-request-id", value)]);
            request_id(&map).to_str().expect("ASCII").to_owned()
        };
        assert_eq!(id("abc-1"), "abc-1");
        for odd in ["", "a b", "é", &"x".repeat(129)] {
            assert_eq!(id(odd).len(), 36, "{odd}");
        }
        assert_ne!(id(""), id(""));
    }
}
