//! Text that came from upstream, made fit to be shown: short, one line, and
//! without the credentials that an upstream may repeat.

use http::HeaderMap;

use crate::credentials;

/// Quotes upstream text for one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quote<'a> {
    headers: Option<&'a HeaderMap>,
}

const REDACTED: &str = "[redacted]";

impl<'a> Quote<'a> {
    /// Hides the secrets that stand in these request headers.
    pub fn without_secrets_of(headers: &'a HeaderMap) -> Self {
        Quote {
            headers: Some(headers),
        }
    }

    fn secrets(&self) -> impl Iterator<Item = &'a str> {
        (self.headers.into_iter().flatten())
            .filter(|(name, _)| credentials::is_secret(name))
            .filter_map(|(_, value)| value.to_str().ok()?.split(' ').next_back())
            .filter(|secret| !secret.is_empty())
    }

    /// At most `longest` bytes of `text`, safe to show.
    pub fn text(&self, text: &str, longest: usize) -> String {
        let mut text = text.to_owned();
        for secret in self.secrets() {
            text = text.replace(secret, REDACTED);
        }
        let mut quoted = String::with_capacity(text.len().min(longest));
        for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
            if word.is_empty() {
                continue;
            }
            if !quoted.is_empty() {
                quoted.push(' ');
            }
            quoted.push_str(&without_tokens(word));
            if quoted.len() >= longest {
                break;
            }
        }
        quoted.truncate(quoted.floor_char_boundary(longest));
        quoted
    }

    /// The beginning of a body, whatever it is.
    pub fn bytes(&self, bytes: &[u8], longest: usize) -> String {
        self.text(&String::from_utf8_lossy(bytes), longest)
    }
}

/// Hides what looks like a JSON Web Token, also one of somebody else.
fn without_tokens(word: &str) -> String {
    const SHORTEST: usize = 24;
    let is_token_char = |c: char| c.is_ascii_alphanumeric() || "-_.=+/~".contains(c);
    let mut rest = word;
    let mut shown = String::new();
    while let Some(start) = rest.find("eyJ") {
        let (before, token) = rest.split_at(start);
        let end = token.find(|c| !is_token_char(c)).unwrap_or(token.len());
        shown.push_str(before);
        shown.push_str(if end < SHORTEST {
            &token[..end]
        } else {
            REDACTED
        });
        rest = &token[end..];
    }
    shown + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", "Bearer t0k.en".parse().expect("a value"));
        headers.insert("x-api-key", "k3y".parse().expect("a value"));
        headers.insert("x-sandbox-name", "prod".parse().expect("a value"));
        headers
    }

    #[test]
    fn secrets_are_hidden() {
        let headers = headers();
        let quote = Quote::without_secrets_of(&headers);
        for (text, expected) in [
            (
                "token t0k.en, key k3y in prod",
                "token [redacted], key [redacted] in prod",
            ),
            ("Bearer t0k.en", "Bearer [redacted]"),
            (
                r#"{"sent":"eyJhbGciOiJSUzI1NiJ9.eyJpZCI6.abc_-1"}"#,
                r#"{"sent":"[redacted]"}"#,
            ),
            ("eyJ is short", "eyJ is short"),
        ] {
            assert_eq!(quote.text(text, 100), expected);
        }
    }

    #[test]
    fn text_becomes_one_short_line() {
        let quote = Quote::default();
        for (text, expected) in [
            (
                "<html>\r\n  <b>\u{1b}[31mno\0</b>",
                "<html> <b> [31mno </b>",
            ),
            ("0123456789abc", "0123456789"),
            ("ééééééé", "ééééé"),
            ("", ""),
        ] {
            assert_eq!(quote.text(text, 10.max(expected.len())), expected);
        }
        assert_eq!(quote.bytes(b"a\xffb", 10), "a\u{fffd}b");
    }
}
