//! Text that came from upstream, made fit to be shown: short, one line, and
//! without the credentials that an upstream may repeat.
//!
//! A response may repeat a credential in another form: with JSON's
//! escapes, in percent-encoding, with HTML's entities, in base64, in pieces, cut
//! off. So what is looked for is every piece of a secret that is long enough to
//! matter, in the text as it came and as it reads without each layer of escapes.

use std::ops::Range;

use http::{HeaderMap, HeaderValue};

use crate::headers::secrets_in;

/// The secrets of one call.
#[derive(Clone, Debug, Default)]
pub struct Secrets([Option<HeaderValue>; 2]);

impl Secrets {
    /// Those in the headers that it carries upstream.
    pub fn of(headers: &HeaderMap) -> Self {
        Secrets(secrets_in(headers).map(|value| value.cloned()))
    }
}

/// Shows upstream text of one call without its secrets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Redactor<'a> {
    secrets: [Option<&'a HeaderValue>; 2],
}

const REDACTED: &str = "[redacted]";

/// How much more of a text is read than is shown, as blanks and secrets shrink.
const READ: usize = 4;

/// How long an id is shown.
const LONGEST_ID: usize = 128;

impl<'a> Redactor<'a> {
    /// Hides the secrets that stand in these request headers.
    pub fn without_secrets_of(headers: &'a HeaderMap) -> Self {
        Redactor {
            secrets: secrets_in(headers),
        }
    }

    /// Hides these secrets.
    pub fn without(secrets: &'a Secrets) -> Self {
        Redactor {
            secrets: secrets.0.each_ref().map(Option::as_ref),
        }
    }

    fn secrets(&self) -> impl Iterator<Item = &'a [u8]> {
        (self.secrets.iter().flatten())
            .filter_map(|value| value.as_bytes().split(|&byte| byte == b' ').next_back())
            .filter(|secret| !secret.is_empty())
    }

    /// At most `longest` bytes of `text`, safe to show.
    pub fn text(&self, text: &str, longest: usize) -> String {
        let text = &text[..text.floor_char_boundary(READ * longest)];
        let text = self.redacted(text);
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
        let beginning = &bytes[..bytes.len().min(READ * longest)];
        self.text(&String::from_utf8_lossy(beginning), longest)
    }

    /// What the API calls the id of a batch, for logs and statuses.
    pub fn id(&self, id: &str) -> String {
        // There is one in each call, and nearly all are hexadecimal: nothing in them is escaped.
        let is_plain = id.len() <= LONGEST_ID && id.bytes().all(is_hex);
        let read = Layer::of(if is_plain { id } else { "" });
        let is_safe = |secret| read.pieces_of(secret).is_empty();
        match is_plain && self.secrets().all(is_safe) {
            true => id.to_owned(),
            false => self.text(id, LONGEST_ID),
        }
    }

    fn redacted(&self, text: &str) -> String {
        let mut hidden = vec![false; text.len()];
        let mut layer = self.secrets().next().map(|_| Layer::of(text));
        while let Some(read) = layer {
            let read = read.with_base64();
            for secret in self.secrets() {
                for found in read.pieces_of(secret) {
                    let begin = read.places[found.start].start;
                    hidden[begin..read.places[found.end - 1].end].fill(true);
                }
            }
            layer = read.without_escapes();
        }
        let mut shown = String::with_capacity(text.len());
        let mut was_hidden = false;
        for (at, c) in text.char_indices() {
            match hidden[at] {
                false => shown.push(c),
                true if !was_hidden => shown.push_str(REDACTED),
                true => {}
            }
            was_hidden = hidden[at];
        }
        shown
    }
}

/// The shortest piece of a secret that is hidden, in bytes. Shorter secrets are hidden as a whole.
const PIECE: usize = 9;

/// The same in base64.
const PIECE_OF_BASE64: usize = 12;

/// The shortest piece that is hidden at the end of a text, which may be cut there.
const PIECE_AT_THE_END: usize = 4;

/// A text as it reads without some layers of escapes.
struct Layer {
    /// The text, and after it what its base64 stands for.
    bytes: Vec<u8>,
    /// Where in the whole text each byte stands.
    places: Vec<Range<usize>>,
    /// Where the text ends in `bytes`, and where base64 does that ends with the text.
    ends: Vec<usize>,
    /// How many layers of escapes have been taken off.
    depth: usize,
}

impl Layer {
    fn of(text: &str) -> Self {
        Layer {
            bytes: text.as_bytes().to_vec(),
            places: (0..text.len()).map(|at| at..at + 1).collect(),
            ends: vec![text.len()],
            depth: 0,
        }
    }

    /// Adds what its runs of base64 stand for, in each of the four ways in which a run can
    /// be read: nobody knows where it begins.
    fn with_base64(mut self) -> Self {
        let end = self.bytes.len();
        let mut at = 0;
        while at < end {
            let run = self.bytes[at..end].iter().map_while(|&byte| sextet(byte));
            let run: Vec<u8> = run.collect();
            let ends_with_text = at + run.len() == end;
            // Most ids are hexadecimal numbers, which base64 is by a rare chance only.
            let is_id = self.bytes[at..at + run.len()].iter().copied().all(is_hex);
            let ways = match !is_id && (run.len() >= PIECE_OF_BASE64 || ends_with_text) {
                true => 0..4,
                false => 0..0,
            };
            for skipped in ways {
                let groups = run.get(skipped..).unwrap_or_default().chunks(4);
                self.add(b' ', at..at); // no piece goes on from one to the next
                for (i, group) in groups.enumerate() {
                    let first = at + skipped + 4 * i;
                    let last = first + group.len() - 1;
                    let place = self.places[first].start..self.places[last].end;
                    let bits = group
                        .iter()
                        .fold(0, |bits, &six| bits << 6 | u32::from(six));
                    let bits = bits << (8 + 6 * (4 - group.len()));
                    for &byte in &bits.to_be_bytes()[..group.len() * 6 / 8] {
                        self.add(byte, place.clone());
                    }
                }
                if ends_with_text {
                    self.ends.push(self.bytes.len());
                }
            }
            at += run.len() + 1;
        }
        self
    }

    fn add(&mut self, byte: u8, place: Range<usize>) {
        self.bytes.push(byte);
        self.places.push(place);
    }

    /// The same without one more layer of escapes. None: there are none, or too many.
    fn without_escapes(&self) -> Option<Layer> {
        const DEEPEST: usize = 3;
        let bytes = &self.bytes[..self.ends[0]];
        let mut read = Layer {
            bytes: Vec::with_capacity(bytes.len()),
            places: Vec::with_capacity(bytes.len()),
            ends: Vec::new(),
            depth: self.depth + 1,
        };
        let mut at = 0;
        while at < bytes.len() {
            let (byte, length) = unescaped(&bytes[at..]).unwrap_or((bytes[at], 1));
            let last = at + length - 1;
            read.add(byte, self.places[at].start..self.places[last].end);
            at += length;
        }
        read.ends.push(read.bytes.len());
        (read.bytes.len() < bytes.len() && read.depth <= DEEPEST).then_some(read)
    }

    /// Where the pieces of a secret stand in `bytes`.
    fn pieces_of(&self, secret: &[u8]) -> Vec<Range<usize>> {
        if secret.len() < PIECE {
            // By chance, base64 stands for such a few bytes too.
            let windows = self.bytes[..self.ends[0]].windows(secret.len());
            let found = windows.enumerate().filter(|(_, window)| *window == secret);
            return found.map(|(at, window)| at..at + window.len()).collect();
        }
        let mut found = common_pieces(&self.bytes, secret);
        for (i, &end) in self.ends.iter().enumerate() {
            let bytes = &self.bytes[..end];
            let bytes = match i {
                0 => &bytes[..end - unfinished_escape(bytes)],
                _ => bytes,
            };
            let cut = (PIECE_AT_THE_END..PIECE).rev();
            let cut = cut.into_iter().find(|&cut| bytes.ends_with(&secret[..cut]));
            found.extend(cut.map(|cut| bytes.len() - cut..bytes.len()));
        }
        found
    }
}

/// Where pieces of `secret` stand in `text`: all that have at least `PIECE` bytes.
fn common_pieces(text: &[u8], secret: &[u8]) -> Vec<Range<usize>> {
    // Every piece holds eight bytes that begin at an even place of the longer one. These
    // are looked for among those of the shorter one.
    const GRAM: usize = 8;
    const STEP: usize = PIECE - GRAM + 1;
    let (short, long) = match text.len() < secret.len() {
        true => (text, secret),
        false => (secret, text),
    };
    let gram = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
    let mut grams: Vec<(u64, usize)> = (short.windows(GRAM).enumerate())
        .map(|(at, bytes)| (gram(bytes), at))
        .collect();
    grams.sort_unstable();
    // Most of the longer one's are none of them, which a set of bits tells at once.
    let bit = |gram: u64| {
        let hash = gram.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash / 64) as usize, 1_u64 << (hash % 64))
    };
    let mut bits = [0_u64; 64];
    for &(gram, _) in &grams {
        let (word, bit) = bit(gram);
        bits[word] |= bit;
    }
    let mut found: Vec<Range<usize>> = Vec::new();
    for (in_long, bytes) in long.windows(GRAM).enumerate().step_by(STEP) {
        let gram = gram(bytes);
        let (word, bit) = bit(gram);
        if bits[word] & bit == 0 {
            continue;
        }
        let first = grams.partition_point(|&(other, _)| other < gram);
        for &(_, in_short) in grams[first..]
            .iter()
            .take_while(|&&(other, _)| other == gram)
        {
            let (in_text, in_secret) = match text.len() < secret.len() {
                true => (in_short, in_long),
                false => (in_long, in_short),
            };
            if found.last().is_some_and(|last| last.contains(&in_text)) {
                continue;
            }
            let before = text[..in_text]
                .iter()
                .rev()
                .zip(secret[..in_secret].iter().rev());
            let before = before.take_while(|(a, b)| a == b).count();
            let after = text[in_text..].iter().zip(&secret[in_secret..]);
            let after = after.take_while(|(a, b)| a == b).count();
            if before + after >= PIECE {
                found.push(in_text - before..in_text + after);
            }
        }
    }
    found
}

/// Whether a byte may be one of a hexadecimal id.
fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-')
}

/// What a character of base64 stands for, in the standard alphabet or that for URLs.
fn sextet(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' | b'-' => Some(62),
        b'/' | b'_' => Some(63),
        _ => None,
    }
}

/// The escape that these bytes begin with: what it stands for, and its length. No secret
/// has a byte that is not ASCII, so such bytes need not be right.
fn unescaped(bytes: &[u8]) -> Option<(u8, usize)> {
    let number = |digits: &[u8], radix| {
        let text = str::from_utf8(digits).ok()?;
        let is_digits = digits.iter().all(u8::is_ascii_alphanumeric);
        let number = u32::from_str_radix(text, radix)
            .ok()
            .filter(|_| is_digits)?;
        Some(u8::try_from(number).unwrap_or_default())
    };
    match bytes {
        [b'%', a, b, ..] => Some((number(&[*a, *b], 16)?, 3)),
        [b'\\', b'u', a, b, c, d, ..] => Some((number(&[*a, *b, *c, *d], 16)?, 6)),
        [b'\\', b'x', a, b, ..] => Some((number(&[*a, *b], 16)?, 4)),
        [b'\\', c @ (b'"' | b'\'' | b'\\' | b'/'), ..] => Some((*c, 2)),
        [b'\\', b'b' | b'f' | b'n' | b'r' | b't', ..] => Some((b' ', 2)),
        [b'&', rest @ ..] => {
            let end = rest.iter().take(8).position(|&byte| byte == b';')?;
            let byte = match &rest[..end] {
                [b'#', b'x' | b'X', digits @ ..] => number(digits, 16)?,
                [b'#', digits @ ..] => number(digits, 10)?,
                b"amp" => b'&',
                b"lt" => b'<',
                b"gt" => b'>',
                b"quot" => b'"',
                b"apos" => b'\'',
                b"sol" => b'/',
                b"plus" => b'+',
                b"equals" => b'=',
                _ => return None,
            };
            Some((byte, end + 2))
        }
        _ => None,
    }
}

/// How many bytes at the end may be an escape that is cut off.
fn unfinished_escape(bytes: &[u8]) -> usize {
    const LONGEST: usize = 8;
    let last = &bytes[bytes.len().saturating_sub(LONGEST)..];
    let begin = last.iter().rposition(|byte| b"\\%&".contains(byte));
    let Some(escape) = begin.map(|begin| &last[begin..]) else {
        return 0;
    };
    let is_cut = match escape {
        [b'%', digits @ ..] | [b'\\', b'x', digits @ ..] => digits.len() < 2,
        [b'\\', b'u', digits @ ..] => digits.len() < 4,
        [b'\\', rest @ ..] => rest.is_empty(),
        [_, name @ ..] => !name.contains(&b';'),
        [] => false,
    };
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'#';
    match is_cut && escape[1..].iter().all(is_word) {
        true => escape.len(),
        false => 0,
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
    use base64::{
        Engine,
        prelude::{BASE64_STANDARD as STANDARD, BASE64_URL_SAFE_NO_PAD as URL_SAFE_NO_PAD},
    };
    use proptest::prelude::*;

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
        let quote = Redactor::without_secrets_of(&headers);
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

    /// Every piece of a secret that must not be shown.
    fn shows(text: &str, secret: &str) -> Option<String> {
        let pieces = secret.as_bytes().windows(12.min(secret.len()));
        let mut pieces = pieces.map(|piece| String::from_utf8_lossy(piece).into_owned());
        pieces.find(|piece| text.contains(piece))
    }

    fn json_escaped(text: &str, which: u64) -> String {
        let escaped =
            text.bytes()
                .enumerate()
                .map(|(i, byte)| match (which >> (i % 64) & 1, byte) {
                    (1, b'/') => r"\/".to_owned(),
                    (_, b'"' | b'\\') => format!(r"\{}", byte as char),
                    (1, _) => format!(r"\u{byte:04x}"),
                    _ => (byte as char).to_string(),
                });
        escaped.collect()
    }

    fn percent_encoded(text: &str, which: u64) -> String {
        let encoded = text
            .bytes()
            .enumerate()
            .map(|(i, byte)| match which >> (i % 64) & 3 {
                1 => format!("%{byte:02x}"),
                2 => format!("%{byte:02X}"),
                _ if byte == b'%' => "%25".to_owned(),
                _ => (byte as char).to_string(),
            });
        encoded.collect()
    }

    fn html_escaped(text: &str, which: u64) -> String {
        let escaped =
            text.bytes()
                .enumerate()
                .map(|(i, byte)| match (which >> (i % 64) & 3, byte) {
                    (_, b'&') => "&amp;".to_owned(),
                    (_, b'<') => "&lt;".to_owned(),
                    (_, b'"') => "&quot;".to_owned(),
                    (1, _) => format!("&#{byte};"),
                    (2, _) => format!("&#x{byte:X};"),
                    _ => (byte as char).to_string(),
                });
        escaped.collect()
    }

    /// What can be read in a text: as it is, without escapes, and from base64.
    fn readings(text: &str) -> String {
        let mut readings = text.to_owned();
        let mut layer = Some(Layer::of(text));
        while let Some(read) = layer {
            let read = read.with_base64();
            readings.push('\n');
            readings.push_str(&String::from_utf8_lossy(&read.bytes));
            layer = read.without_escapes();
        }
        readings
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_form_of_a_secret_is_shown(
            secret in prop_oneof!["[A-Za-z0-9._~+/-]{12,80}={0,2}", "[!-$'-\\[\\]-~]{12,40}", "[0-9a-f]{32}"],
            before in "[ -~]{0,40}",
            after in "[ -~]{0,40}",
            which in any::<u64>(),
            cut in 0_usize..12,
        ) {
            let mut headers = HeaderMap::new();
            let bearer = format!("Bearer {secret}");
            headers.insert("authorization", bearer.parse().unwrap());
            let quote = Redactor::without_secrets_of(&headers);
            let piece = &secret[cut.min(secret.len() - 12)..];
            let split: Vec<&str> = [&secret[..secret.len() / 2], &secret[secret.len() / 2..]].into();
            let mut forms = vec![
                secret.clone(),
                piece.to_owned(),
                secret[..secret.len() - cut].to_owned(),
                split.join("\n"),
                json_escaped(&secret, which),
                json_escaped(&json_escaped(&secret, which), 0),
                percent_encoded(&secret, which),
                percent_encoded(&percent_encoded(&secret, which), which),
                html_escaped(&secret, which),
                json_escaped(&html_escaped(&percent_encoded(&secret, which), which), 0),
                serde_json::to_string(&secret).unwrap(),
            ];
            for prefix in ["", "a", "ab", "user:", "Bearer "] {
                let encoded = format!("{prefix}{secret}");
                forms.push(STANDARD.encode(&encoded));
                forms.push(URL_SAFE_NO_PAD.encode(&encoded));
                forms.push(percent_encoded(&STANDARD.encode(&encoded), which));
                forms.push(json_escaped(&STANDARD.encode(format!("{encoded}{after}")), which));
            }
            for form in forms {
                let is_whole = form.len() > secret.len() && !form.contains('\n');
                for text in [format!("{before} {form} {after}"), format!("{before}'{form}"), form] {
                    let shown = readings(&quote.text(&text, 2048));
                    prop_assert_eq!(shows(&shown, &secret), None, "{} -> {}", text, shown);
                    prop_assert!(shown.contains(REDACTED) || !is_whole, "{} -> {}", text, shown);
                }
            }
        }

        #[test]
        fn a_secret_that_is_cut_off_is_not_shown(
            secret in "[A-Za-z0-9._-]{20,60}",
            before in "[ -~]{0,20} ",
            length in 1_usize..200,
        ) {
            let mut headers = HeaderMap::new();
            headers.insert("x-api-key", secret.parse().unwrap());
            let quote = Redactor::without_secrets_of(&headers);
            for form in [secret.clone(), percent_encoded(&secret, 0x5555), json_escaped(&secret, !0)] {
                let text = format!("{before}{form}");
                let text = &text[..length.min(text.len())];
                let shown = quote.text(text, 1024);
                let cut = secret.get(..PIECE_AT_THE_END).unwrap();
                let cut = readings(&shown).contains(cut) && !before.contains(cut);
                prop_assert!(!cut, "{} -> {}", text, shown);
            }
        }

        /// Also if it looks like escapes itself.
        #[test]
        fn no_copy_of_a_secret_is_shown(secret in "[!-~]{1,40}", before in "[ -~]{0,20}") {
            let mut headers = HeaderMap::new();
            headers.insert("x-api-key", secret.parse().unwrap());
            let quote = Redactor::without_secrets_of(&headers);
            let shown = quote.text(&format!("{before}{secret}"), 1024);
            prop_assert!(!shown.contains(&secret) || REDACTED.contains(&secret), "{}", shown);
        }

        #[test]
        fn other_texts_are_shown(text in "[a-z0-9]{1,11}( [a-z0-9%&\\\\]{1,11}){0,20}") {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", "Bearer ABCDEFGHIJKLMNOPQRSTUVWXYZ".parse().unwrap());
            let quote = Redactor::without_secrets_of(&headers);
            prop_assert_eq!(quote.text(&text, 4096), text);
        }

        #[test]
        fn any_text_is_quoted(text in any::<String>(), bytes in any::<Vec<u8>>(), longest in 0_usize..64) {
            let headers = headers();
            let quote = Redactor::without_secrets_of(&headers);
            for shown in [quote.text(&text, longest), quote.bytes(&bytes, longest)] {
                prop_assert!(shown.len() <= longest);
                prop_assert!(!shown.contains(|c: char| c.is_control()));
            }
        }
    }

    #[test]
    fn an_id_is_short_and_one_line() {
        assert_eq!(Redactor::default().id("5d01\n\u{1b}[31m"), "5d01 [31m");
        assert_eq!(
            Redactor::default().id(&"x".repeat(200_000)).len(),
            LONGEST_ID
        );
        let id = "9c2569a41bab42c39b04e66d493762e9";
        let headers = headers();
        assert_eq!(Redactor::without_secrets_of(&headers).id(id), id);
    }

    #[test]
    fn text_becomes_one_short_line() {
        let quote = Redactor::default();
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
