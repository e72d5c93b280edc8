//! Which headers a call carries upstream: the caller's own credentials, or
//! the configured defaults, and nothing else of the caller's metadata unless
//! the operator named it.

use std::{
    hash::{BuildHasher, RandomState},
    sync::LazyLock,
};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{
    failure::{Failure, Kind, Violation},
    headers::{self, CREDENTIALS, NO_TOKEN, is_token},
};

/// Takes the headers of a call from its metadata.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// What a call carries that does not say otherwise, in the order of
    /// [`CREDENTIALS`].
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
        for (name, default) in CREDENTIALS.iter().zip(&self.defaults) {
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
                    value.set_sensitive(headers::is_secret(name));
                    headers.insert(name, value);
                }
            }
        }
        if !bad.is_empty() {
            bad.append(&mut missing);
            return Err(Failure::refused(Kind::InvalidRequest(bad)));
        }
        if !missing.is_empty() {
            return Err(Failure::refused(Kind::CredentialsMissing(missing)));
        }
        for name in &self.forward {
            for value in metadata.get_all(name) {
                headers.append(name, value.clone());
            }
        }
        Ok(headers)
    }
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

/// Tells callers apart by their credentials, within this process only.
pub fn principal(headers: &HeaderMap) -> u64 {
    static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    let values = CREDENTIALS.each_ref();
    HASHER.hash_one(values.map(|name| headers.get(name).map(HeaderValue::as_bytes)))
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
        match &failure.kind {
            Kind::InvalidRequest(violations) | Kind::CredentialsMissing(violations) => {
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
            assert!(matches!(failure.kind, Kind::CredentialsMissing(_)));
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
            assert!(matches!(failure.kind, Kind::InvalidRequest(_)), "{bad}");
            assert_eq!(fields(&failure), [name]);
            assert!(
                !format!("{:?}", failure.kind).contains("ret"),
                "{failure:?}"
            );
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
}
