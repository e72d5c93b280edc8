//! A view of JSON text that never loses anything.
//!
//! `serde_json::Value` would keep the last of two equal keys, round numbers,
//! refuse `1e400` and stop at 128 levels. Here a value is its own text until
//! somebody asks for what is in it, so any JSON can be passed on.

use std::{borrow::Cow, fmt};

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// How many levels of objects and arrays are converted to protobuf; what is
/// deeper stays JSON text. An object takes three levels of messages, and
/// protobuf's parsers stop at 100.
const MAX_DEPTH: usize = 16;

/// The text of a document, without a byte order mark.
pub(crate) fn document(mut body: &[u8]) -> Cow<'_, str> {
    while let Some(rest) = body.strip_prefix("\u{feff}".as_bytes()) {
        body = rest;
    }
    text_of(body)
}

/// The text of a document, or of a name in it. A batch that exists matters more
/// than bytes that are not UTF-8: these are replaced.
fn text_of(body: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(body) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(body),
    }
}

/// One valid JSON value, as it was written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Json<'a>(&'a str);

impl<'a> Json<'a> {
    /// Reads a document; `None` where it is not JSON.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let value: &RawValue = serde_json::from_str(text).ok()?;
        Some(Json(value.get()))
    }

    /// The value as it was written.
    pub(crate) fn text(self) -> &'a str {
        self.0
    }

    pub(crate) fn is_null(self) -> bool {
        self.0 == "null"
    }

    pub(crate) fn is_object(self) -> bool {
        self.0.starts_with('{')
    }

    /// The digits of a number, as they were written.
    pub(crate) fn number(self) -> Option<&'a str> {
        self.0
            .starts_with(|c: char| c == '-' || c.is_ascii_digit())
            .then_some(self.0)
    }

    /// `true` or `false`.
    pub(crate) fn boolean(self) -> Option<bool> {
        self.0.parse().ok()
    }

    /// A string. `None` also for one that is no Unicode (a lone surrogate).
    pub(crate) fn string(self) -> Option<String> {
        let content = self.0.strip_prefix('"')?.strip_suffix('"')?;
        if !content.contains('\\') {
            return Some(content.to_owned());
        }
        let bytes = serde_json::from_str::<Bytes>(self.0).ok()?.0;
        String::from_utf8(bytes.into_owned()).ok()
    }

    /// The members of an object, in their order.
    pub(crate) fn object(self) -> Option<Members<'a>> {
        self.is_object().then(|| object_of(self.0)).flatten()
    }

    /// The elements of an array.
    pub(crate) fn array(self) -> Option<Vec<Json<'a>>> {
        if !self.0.starts_with('[') {
            return None;
        }
        Some(serde_json::from_str::<Elements<'a>>(self.0).ok()?.0)
    }

    /// The value as `google.protobuf.Value`, with nothing lost: what cannot be
    /// said there is said as text.
    pub(crate) fn to_value(self) -> Value {
        self.to_value_at(0)
    }

    fn to_value_at(self, depth: usize) -> Value {
        let kind = self
            .to_kind(depth)
            .unwrap_or_else(|| Kind::StringValue(self.0.to_owned()));
        Value { kind: Some(kind) }
    }

    fn to_kind(self, depth: usize) -> Option<Kind> {
        Some(match self.0.as_bytes().first()? {
            b'n' => Kind::NullValue(0),
            b't' | b'f' => Kind::BoolValue(self.boolean()?),
            b'"' => Kind::StringValue(self.string()?),
            b'{' if depth < MAX_DEPTH => Kind::StructValue(self.to_struct_at(depth)?),
            b'[' if depth < MAX_DEPTH => Kind::ListValue(ListValue {
                values: (self.array()?.iter())
                    .map(|element| element.to_value_at(depth + 1))
                    .collect(),
            }),
            b'{' | b'[' => return None,
            _ => Kind::NumberValue(exact_double(self.0)?),
        })
    }

    /// An object as `google.protobuf.Struct`, with nothing lost.
    pub(crate) fn to_struct(self) -> Option<Struct> {
        self.to_struct_at(0)
    }

    fn to_struct_at(self, depth: usize) -> Option<Struct> {
        let mut members = self.object()?;
        group_by_name(&mut members);
        let fields = members
            .chunk_by(|a, b| a.0 == b.0)
            .map(|same_name| {
                let values = same_name.iter().map(|(_, value)| *value);
                let value = one_or_list(values, |value| value.to_value_at(depth + 1));
                (same_name[0].0.clone().into_owned(), value)
            })
            .collect();
        Some(Struct { fields })
    }
}

/// Names and values of an object, in its order.
pub(crate) type Members<'a> = Vec<(Cow<'a, str>, Json<'a>)>;

/// Puts equal names next to each other, in their order.
pub(crate) fn group_by_name(members: &mut Members<'_>) {
    members.sort_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
}

/// Reads a document that is an object, as [`Json::object`] does; `None` where it
/// is something else, or not JSON.
pub(crate) fn object_of(text: &str) -> Option<Members<'_>> {
    Some(serde_json::from_str::<Object<'_>>(text).ok()?.0)
}

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
pub(crate) fn one_or_list<'a>(
    mut values: impl ExactSizeIterator<Item = Json<'a>>,
    to_value: impl Fn(Json<'a>) -> Value,
) -> Value {
    match (values.len(), values.next()) {
        (1, Some(value)) => to_value(value),
        (_, first) => Value {
            kind: Some(Kind::ListValue(ListValue {
                values: first.into_iter().chain(values).map(to_value).collect(),
            })),
        },
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

struct Object<'a>(Members<'a>);

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;
        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Object<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some((name, value)) = map.next_entry::<Bytes<'de>, &'de RawValue>()? {
                    let name = match name.0 {
                        Cow::Borrowed(name) => text_of(name),
                        Cow::Owned(name) => text_of(&name).into_owned().into(),
                    };
                    members.push((name, Json(value.get())));
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(ObjectVisitor)
    }
}

struct Elements<'a>(Vec<Json<'a>>);

impl<'de> Deserialize<'de> for Elements<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementsVisitor;
        impl<'de> Visitor<'de> for ElementsVisitor {
            type Value = Elements<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Elements<'de>, A::Error> {
                let mut elements = Vec::new();
                while let Some(value) = seq.next_element::<&'de RawValue>()? {
                    elements.push(Json(value.get()));
                }
                Ok(Elements(elements))
            }
        }
        deserializer.deserialize_seq(ElementsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        Json::parse(text).expect("JSON").to_value()
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
        let object = Json::parse(r#"{"b":0,"a":1,"a":"two"}"#).expect("JSON");
        let fields = object.to_struct().expect("an object").fields;
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
        let object = Json::parse(r#"{"\ud800":1,"x":2}"#).expect("JSON");
        assert_eq!(object.to_struct().expect("an object").fields.len(), 2);
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "{}x", "<html>", "nul", r#"{"a":}"#, "01", "'a'"] {
            assert!(Json::parse(text).is_none(), "{text}");
        }
    }
}
