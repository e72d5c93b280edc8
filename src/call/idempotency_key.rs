//! The caller's own key for a call: the metadata `idempotency-key`.

use http::HeaderMap;

use crate::{
    failure::{Failure, Kind, Violation},
    headers::{NO_TOKEN, is_token},
};

/// Metadata with the caller's own key for the call.
pub const NAME: &str = "idempotency-key";

/// The caller's own key for the call, which becomes its external id where the
/// message has none. Written as a string of structured fields (RFC 9651, with
/// quotes, as the draft of the `Idempotency-Key` header wants it) it is the same
/// key as without.
pub fn of_call(metadata: &HeaderMap) -> Result<Option<String>, Failure> {
    let mut values = metadata.get_all(NAME).iter();
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
        let violation = Violation::new(NAME, description);
        Failure::refused(Kind::InvalidRequest(vec![violation]))
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn key(value: &str) -> Result<Option<String>, Failure> {
        let value = HeaderValue::from_bytes(value.as_bytes()).expect(value);
        of_call(&HeaderMap::from_iter([(
            NAME.parse().expect("a name"),
            value,
        )]))
    }

    #[test]
    fn a_key_is_the_same_with_quotes_and_without() {
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
            let Kind::InvalidRequest(violations) = key(odd).expect_err(odd).kind else {
                panic!("{odd}");
            };
            assert_eq!(violations[0].field, NAME);
        }
        assert_eq!(of_call(&HeaderMap::new()).expect("none"), None);
    }
}
