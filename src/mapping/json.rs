//! A view of JSON text that never loses anything.
//!
//! `serde_json::Value` would keep the last of two equal keys, round numbers,
//! refuse `1e400` and stop at 128 levels. Here a value is its own text until
//! somebody asks for what is in it, so any JSON can be passed on. One pass over
//! the document finds where each value begins and ends; what is special in a
//! number or string is left to serde_json.

use std::{borrow::Cow, collections::BTreeMap, fmt, iter};

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// How many levels of objects and arrays are converted to protobuf; what is
/// deeper stays JSON text. An object takes three levels of messages, and
/// protobuf's parsers stop at 100.
const MAX_DEPTH: usize = 16;

/// The text of a body, without a byte order mark. A batch that exists matters
/// more than bytes that are not UTF-8: these are replaced.
pub(crate) fn text_of(mut body: &[u8]) -> Cow<'_, str> {
    while let Some(rest) = body.strip_prefix("\u{feff}".as_bytes()) {
        body = rest;
    }
    match str::from_utf8(body) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(body),
    }
}

/// A valid JSON document.
pub(crate) struct Document<'a> {
    text: &'a str,
    /// Every value in the order of the text, and the names of members among
    /// them.
    values: Vec<Span>,
}

/// Where a value stands in the text.
struct Span {
    begin: usize,
    end: usize,
    /// The index of what follows on this value and all that is in it.
    next: usize,
    has_escape: bool,
}

/// What a document may go on with.
#[derive(Clone, Copy, PartialEq)]
enum Expected {
    Value,
    ElementOrEnd,
    NameOrEnd,
    Name,
    Colon,
    CommaOrEnd,
}

impl<'a> Document<'a> {
    /// Reads a text; `None` where it is not JSON.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        use Expected::*;

        let bytes = text.as_bytes();
        let mut values: Vec<Span> = Vec::with_capacity(64);
        let mut open: Vec<usize> = Vec::new(); // the objects and arrays that have not ended
        let mut expected = Value;
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            (expected, at) = match (expected, byte) {
                (_, b' ' | b'\t' | b'\n' | b'\r') => (expected, at + 1),
                (Colon, b':') => (Value, at + 1),
                (CommaOrEnd, b',') => match bytes[values[*open.last()?].begin] {
                    b'{' => (Name, at + 1),
                    _ => (Value, at + 1),
                },
                (CommaOrEnd | NameOrEnd, b'}') | (CommaOrEnd | ElementOrEnd, b']') => {
                    let index = open.pop()?;
                    if (bytes[values[index].begin] == b'{') != (byte == b'}') {
                        return None;
                    }
                    values[index].end = at + 1;
                    values[index].next = values.len();
                    (CommaOrEnd, at + 1)
                }
                (Value | ElementOrEnd, _) | (Name | NameOrEnd, b'"') => {
                    let index = values.len();
                    let (after, end, has_escape) = match byte {
                        b'{' => (NameOrEnd, at + 1, false),
                        b'[' => (ElementOrEnd, at + 1, false),
                        b'"' => {
                            let (end, has_escape) = end_of_string(text, at)?;
                            let is_name = matches!(expected, Name | NameOrEnd);
                            (if is_name { Colon } else { CommaOrEnd }, end, has_escape)
                        }
                        _ => (CommaOrEnd, end_of_scalar(text, at)?, false),
                    };
                    if matches!(after, NameOrEnd | ElementOrEnd) {
                        open.push(index);
                    }
                    values.push(Span {
                        begin: at,
                        end,
                        next: index + 1,
                        has_escape,
                    });
                    (after, end)
                }
                _ => return None,
            };
        }
        (expected == CommaOrEnd && open.is_empty()).then_some(Document { text, values })
    }

    /// The value that the document is.
    pub(crate) fn root(&self) -> Json<'_> {
        Json {
            document: self,
            index: 0,
        }
    }
}

/// Where a string ends, and whether there is an escape in it.
fn end_of_string(text: &str, begin: usize) -> Option<(usize, bool)> {
    let bytes = text.as_bytes();
    let mut has_escape = false;
    let mut at = begin + 1;
    loop {
        if let Some(chunk) = bytes.get(at..)?.first_chunk() {
            let special = special_bytes(u64::from_le_bytes(*chunk));
            at += special.trailing_zeros() as usize / 8;
            if special == 0 {
                continue;
            }
        }
        match bytes.get(at)? {
            b'"' => break,
            b'\\' => (at, has_escape) = (at + 2, true),
            0..b' ' => return None,
            _ => at += 1,
        }
    }
    let end = at + 1;
    let is_valid = !has_escape || is_json(&text[begin..end]);
    is_valid.then_some((end, has_escape))
}

/// Marks the first byte that is `"`, `\` or a control character, and perhaps
/// some after it, by its highest bit. Looking at eight bytes at once takes a
/// quarter of the time ("Bit Twiddling Hacks: Determine if a word has a zero
/// byte").
fn special_bytes(word: u64) -> u64 {
    const EACH: u64 = u64::MAX / 0xff;
    let zero = |word: u64| word.wrapping_sub(EACH) & !word;
    let control = word.wrapping_sub(EACH * 0x20) & !word;
    (zero(word ^ (EACH * 0x22)) | zero(word ^ (EACH * 0x5c)) | control) & (EACH * 0x80)
}

/// Where a number, `true`, `false` or `null` ends.
fn end_of_scalar(text: &str, begin: usize) -> Option<usize> {
    let rest = text[begin..].bytes();
    let length =
        rest.take_while(|byte| !matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r'));
    let end = begin + length.count();
    is_json(&text[begin..end]).then_some(end)
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// One value of a document.
#[derive(Clone, Copy)]
pub(crate) struct Json<'a> {
    document: &'a Document<'a>,
    index: usize,
}

impl<'a> Json<'a> {
    fn span(self) -> &'a Span {
        &self.document.values[self.index]
    }

    /// The value as it was written.
    pub(crate) fn text(self) -> &'a str {
        let span = self.span();
        &self.document.text[span.begin..span.end]
    }

    pub(crate) fn is_null(self) -> bool {
        self.text() == "null"
    }

    pub(crate) fn is_object(self) -> bool {
        self.text().starts_with('{')
    }

    /// The digits of a number, as they were written.
    pub(crate) fn number(self) -> Option<&'a str> {
        let text = self.text();
        let is_number = text.starts_with(|c: char| c == '-' || c.is_ascii_digit());
        is_number.then_some(text)
    }

    /// `true` or `false`.
    pub(crate) fn boolean(self) -> Option<bool> {
        self.text().parse().ok()
    }

    /// A string. `None` also for one that is no Unicode (a lone surrogate).
    pub(crate) fn string(self) -> Option<String> {
        let content = self.text().strip_prefix('"')?.strip_suffix('"')?;
        match self.span().has_escape {
            false => Some(content.to_owned()),
            true => String::from_utf8(self.unescaped()?).ok(),
        }
    }

    /// The name of a member; what is no Unicode in it is replaced.
    fn name(self) -> Cow<'a, str> {
        let text = self.text();
        match self.span().has_escape {
            false => Cow::Borrowed(&text[1..text.len() - 1]),
            true => {
                let bytes = self.unescaped().unwrap_or_default();
                Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    fn unescaped(self) -> Option<Vec<u8>> {
        Some(
            serde_json::from_str::<Bytes>(self.text())
                .ok()?
                .0
                .into_owned(),
        )
    }

    /// The members of an object, in their order.
    pub(crate) fn object(self) -> Option<Members<'a>> {
        self.is_object().then(|| {
            let mut inside = self.inside();
            let mut members = Vec::with_capacity(16);
            while let (Some(name), Some(value)) = (inside.next(), inside.next()) {
                members.push((name.name(), value));
            }
            members
        })
    }

    /// Visits every name in an object once, with all its values, in their order;
    /// false where it is no object.
    pub(crate) fn each_name(self, mut visit: impl FnMut(&str, &[Json<'a>])) -> bool {
        let Some(mut members) = self.object() else {
            return false;
        };
        // Most objects are small, and no two names in them are equal.
        let is_new = |index: usize| members[..index].iter().all(|m| m.0 != members[index].0);
        if members.len() <= 32 && (0..members.len()).all(is_new) {
            members
                .iter()
                .for_each(|(name, value)| visit(name, &[*value]));
            return true;
        }
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        for same_name in members.chunk_by(|(a, _), (b, _)| a == b) {
            let values: Vec<_> = same_name.iter().map(|(_, value)| *value).collect();
            visit(&same_name[0].0, &values);
        }
        true
    }

    /// The elements of an array.
    pub(crate) fn array(self) -> Option<impl Iterator<Item = Json<'a>>> {
        self.text().starts_with('[').then(|| self.inside())
    }

    /// The values inside of an object or array: names and values of members, or
    /// elements.
    fn inside(self) -> impl Iterator<Item = Json<'a>> {
        let Json { document, index } = self;
        let end = self.span().next;
        let first = Some(index + 1);
        iter::successors(first, move |index| {
            document.values.get(*index).map(|span| span.next)
        })
        .take_while(move |index| *index < end)
        .map(|index| Json { document, index })
    }

    /// The value as `google.protobuf.Value`, with nothing lost: what cannot be
    /// said there is said as text.
    pub(crate) fn to_value(self) -> Value {
        self.to_value_at(0)
    }

    fn to_value_at(self, depth: usize) -> Value {
        let kind = self
            .to_kind(depth)
            .unwrap_or_else(|| Kind::StringValue(self.text().to_owned()));
        Value { kind: Some(kind) }
    }

    fn to_kind(self, depth: usize) -> Option<Kind> {
        Some(match self.text().as_bytes().first()? {
            b'n' => Kind::NullValue(0),
            b't' | b'f' => Kind::BoolValue(self.boolean()?),
            b'"' => Kind::StringValue(self.string()?),
            b'{' if depth < MAX_DEPTH => Kind::StructValue(self.to_struct_at(depth)?),
            b'[' if depth < MAX_DEPTH => Kind::ListValue(ListValue {
                values: (self.array()?)
                    .map(|element| element.to_value_at(depth + 1))
                    .collect(),
            }),
            b'{' | b'[' => return None,
            _ => Kind::NumberValue(exact_double(self.text())?),
        })
    }

    /// An object as `google.protobuf.Struct`, with nothing lost.
    pub(crate) fn to_struct(self) -> Option<Struct> {
        self.to_struct_at(0)
    }

    fn to_struct_at(self, depth: usize) -> Option<Struct> {
        let mut fields = BTreeMap::new();
        let is_object = self.each_name(|name, values| {
            let value = one_or_list(values, |value| value.to_value_at(depth + 1));
            fields.insert(name.to_owned(), value);
        });
        is_object.then_some(Struct { fields })
    }
}

/// Names and values of an object, in its order.
pub(crate) type Members<'a> = Vec<(Cow<'a, str>, Json<'a>)>;

/// The string member `id` of an object, or the first string of an array, in a
/// document that may break off after it.
pub(crate) fn first_id(text: &str) -> Option<String> {
    struct Seek<'a>(&'a mut Option<String>);
    impl<'de> Visitor<'de> for Seek<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object or array")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(name) = map.next_key::<Bytes<'de>>()? {
                match &*name.0 {
                    b"id" => *self.0 = Some(map.next_value()?),
                    _ => drop(map.next_value::<IgnoredAny>()?),
                }
            }
            Ok(())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            *self.0 = seq.next_element()?;
            Ok(())
        }
    }
    let mut id = None;
    // Its end, or what follows on the id, may be missing: what was found until then counts.
    let _ = serde_json::Deserializer::from_str(text).deserialize_any(Seek(&mut id));
    id
}

/// The one value, or the list of all where a key occurred more than once.
pub(crate) fn one_or_list<'a>(values: &[Json<'a>], to_value: impl Fn(Json<'a>) -> Value) -> Value {
    match values {
        [value] => to_value(*value),
        values => {
            let values = values.iter().map(|value| to_value(*value)).collect();
            let kind = Some(Kind::ListValue(ListValue { values }));
            Value { kind }
        }
    }
}

/// The double that prints as the same decimal, if there is one.
fn exact_double(text: &str) -> Option<f64> {
    let double: f64 = text.parse().ok()?;
    (double.is_finite() && decimal(text) == decimal(&double.to_string())).then_some(double)
}

/// A decimal as (negative, digits without zeros at the ends, exponent).
fn decimal(text: &str) -> (bool, Cow<'_, str>, i64) {
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (negative, mantissa) = match mantissa.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, mantissa),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = match fraction {
        "" => Cow::Borrowed(whole),
        _ => Cow::Owned(format!("{whole}{fraction}")),
    };
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return (negative, Cow::Borrowed(""), 0);
    }
    // An exponent past i64 belongs to no finite double other than zero.
    let exponent = exponent.parse().unwrap_or(i64::MAX / 2);
    let trailing_zeros = digits.len() - significant.len();
    let exponent = exponent - fraction.len() as i64 + trailing_zeros as i64;
    let significant = significant.trim_start_matches('0').to_owned();
    (negative, Cow::Owned(significant), exponent)
}

/// The bytes of a string. serde_json gives a lone surrogate as WTF-8 here, and
/// fails for it everywhere else.
struct Bytes<'a>(Cow<'a, [u8]>);

impl<'de> Deserialize<'de> for Bytes<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl<'de> Visitor<'de> for BytesVisitor {
            type Value = Bytes<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Bytes<'de>, E> {
                Ok(Bytes(Cow::Borrowed(bytes)))
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes<'de>, E> {
                Ok(Bytes(Cow::Owned(bytes.to_vec())))
            }
        }
        deserializer.deserialize_bytes(BytesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    fn value(text: &str) -> Value {
        let document = Document::parse(text).expect("JSON");
        document.root().to_value()
    }

    fn string(text: &str) -> Value {
        Value {
            kind: Some(Kind::StringValue(text.to_owned())),
        }
    }

    #[test]
    fn a_number_that_a_double_cannot_hold_becomes_its_digits() {
        for exact in [
            "0",
            "-0",
            "1",
            "-1.5",
            "0.1",
            "1e3",
            "1E+3",
            "100",
            "1552694873602",
            "1.50",
            "9007199254740992",
            "1e22",
            "5e-324",
            "0.0",
        ] {
            let double = exact.parse::<f64>().expect("a double");
            let expected = Value {
                kind: Some(Kind::NumberValue(double)),
            };
            assert_eq!(value(exact), expected, "{exact}");
        }
        for inexact in [
            "9007199254740993",
            "9223372036854775807",
            "-9223372036854775809",
            "0.1234567890123456789",
            "1e400",
            "1e99999999999999999999",
            "1e-400",
            "123456789012345678901234567890",
        ] {
            assert_eq!(value(inexact), string(inexact));
        }
    }

    #[test]
    fn a_repeated_key_becomes_the_list_of_its_values() {
        let document = Document::parse(r#"{"b":0,"a":1,"a":"two"}"#).expect("JSON");
        let fields = document.root().to_struct().expect("an object").fields;
        assert_eq!(fields["a"], value(r#"[1,"two"]"#));
        assert_eq!(fields["b"], value("0"));
    }

    #[test]
    fn what_is_too_deep_becomes_text_and_no_depth_overflows() {
        let depth = 200_000;
        let text = "[".repeat(depth) + &"]".repeat(depth);
        let mut level = value(&text);
        for _ in 0..MAX_DEPTH {
            match level.kind {
                Some(Kind::ListValue(mut list)) => level = list.values.remove(0),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(level, string(&text[MAX_DEPTH..text.len() - MAX_DEPTH]));
    }

    #[test]
    fn text_that_is_no_unicode_keeps_its_escapes() {
        assert_eq!(value(r#""é😀\u00e9\u0000""#), string("é😀é\0"));
        assert_eq!(value(r#""\ud800""#), string(r#""\ud800""#));
        let document = Document::parse(r#"{"\ud800":1,"x":2}"#).expect("JSON");
        let fields = document.root().to_struct().expect("an object").fields;
        assert_eq!(fields.len(), 2);
    }

    proptest! {
        /// What is JSON, and what is not, is what serde_json says.
        #[test]
        fn json_is_what_serde_json_takes(text in r#"[\[{]?([\[\]{},:"\\u0-9a-f+.eE\- \x01é]|"[a\\"]*"|true|null|"k":|-?[01]+|\{\}|\[\]){0,12}[\]}]?"#) {
            let valid = serde_json::from_str::<&RawValue>(&text).is_ok();
            prop_assert_eq!(Document::parse(&text).is_some(), valid, "{}", text);
        }
    }

    #[test]
    fn strings_end_where_they_end_at_any_length() {
        for length in 0..40 {
            for middle in ["", r#"\""#, r"\\", "é", r"\u0022", r"\ud800"] {
                let string = format!(
                    r#""{}{middle}{}""#,
                    "x".repeat(length),
                    "y".repeat(40 - length)
                );
                let text = format!("[{string},{{{string}:{string}}}]");
                let document = Document::parse(&text).expect(&text);
                let texts = document
                    .values
                    .iter()
                    .map(|span| &text[span.begin..span.end]);
                assert_eq!(texts.filter(|text| *text == string).count(), 3, "{text}");
                let control = text.replacen('x', "\n", 1);
                assert_eq!(
                    Document::parse(&control).is_none(),
                    control != text,
                    "{control}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "{}x", "<html>", "nul", r#"{"a":}"#, "01", "'a'"] {
            assert!(Document::parse(text).is_none(), "{text}");
        }
    }
}
