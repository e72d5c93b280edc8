//! A batch in an answer → `Batch`. Total: what a field cannot hold goes to
//! `extra`, and only an answer that names no batch is refused.
//!
//! Adobe's documentation contradicts itself on types: the Batch Ingestion API
//! reference declares instants as integers and shows them as RFC 3339 strings,
//! declares `tags` an object and shows an array, and so on. Both readings are
//! taken where both are harmless.

use std::{collections::BTreeMap, fmt};

use prost_types::{Struct, Timestamp};

use super::json::{Document, Json, first_id, one_or_list, text_of};
use crate::proto::v1::{
    AvailableDates, Batch, BatchError, BatchStatus, InputFormat, RelatedObject, Replay, TagValues,
};

/// Why an answer is not a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// There is no answer.
    Empty,
    /// The answer is not JSON.
    NotJson,
    /// The answer is JSON without a batch id.
    NoId,
    /// The answer is an error.
    IsError,
    /// The answer lists other batches than it was asked for.
    OtherBatches,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ParseError::Empty => "is empty",
            ParseError::NotJson => "is not JSON",
            ParseError::NoId => "names no batch id",
            ParseError::IsError => "is an error",
            ParseError::OtherBatches => "lists other batches than it was asked for",
        })
    }
}

/// Reads the answer to `POST /batches`: a batch (Batch Ingestion API
/// reference), or `["@/batches/{id}"]` (Catalog Service API reference).
pub fn batch_from_json(body: &[u8]) -> Result<Batch, ParseError> {
    let text = text_of(body);
    if text.trim().is_empty() {
        return Err(ParseError::Empty);
    }
    let document = Document::parse(&text).ok_or(ParseError::NotJson)?;
    let batch = batch_of(document.root()).unwrap_or_else(|| Batch {
        id: catalog_reference(document.root()).unwrap_or_default(),
        ..Default::default()
    });
    if batch.id.is_empty() {
        return Err(ParseError::NoId);
    }
    Ok(batch)
}

/// The id in `["@/batches/{id}"]`.
fn catalog_reference(json: Json<'_>) -> Option<String> {
    let mut elements = json.array()?;
    match (elements.next(), elements.next()) {
        (Some(one), None) => {
            let reference = one.string()?;
            reference.strip_prefix("@/batches/").map(str::to_owned)
        }
        _ => None,
    }
}

/// The batch id in an answer that may break off after it: a member `id`, or the
/// reference in Catalog's list. The string must be whole.
pub fn batch_id_in_beginning(body: &[u8]) -> Option<String> {
    let id = first_id(&text_of(body))?;
    let id = id.strip_prefix("@/batches/").unwrap_or(&id);
    (!id.is_empty()).then(|| id.to_owned())
}

/// A batch, with or without an id; `None` where it is no object.
pub(super) fn batch_of(json: Json<'_>) -> Option<Batch> {
    let mut batch = Batch::default();
    let mut extra = BTreeMap::new();
    let is_object = json.each_name(|name, values| {
        let held = read_last(values, |json| read_batch_member(&mut batch, name, json));
        if !held {
            extra.insert(name.to_owned(), one_or_list(values, Json::to_value));
        }
    });
    if !extra.is_empty() {
        batch.extra = Some(Struct { fields: extra });
    }
    is_object.then_some(batch)
}

/// Reads the last value of a member, as most readers of JSON do; false where
/// something is left.
fn read_last<'a>(values: &[Json<'a>], read: impl FnOnce(Json<'a>) -> bool) -> bool {
    values.last().is_some_and(|last| read(*last)) && values.len() == 1
}

/// Puts one member of the answer where it belongs; false where that place does
/// not hold all of it.
fn read_batch_member(batch: &mut Batch, name: &str, json: Json<'_>) -> bool {
    match name {
        "id" => read_id(&mut batch.id, json),
        "imsOrg" => put(&mut batch.ims_org, json.string()),
        "created" => put(&mut batch.created, instant(json, Unit::Milliseconds)),
        "updated" => put(&mut batch.updated, instant(json, Unit::Milliseconds)),
        "started" => put(&mut batch.started, instant(json, Unit::Milliseconds)),
        "completed" => put(&mut batch.completed, instant(json, Unit::Milliseconds)),
        "status" => read_status(&mut batch.status, json),
        "recordCount" => put(&mut batch.record_count, integer(json)),
        "failedRecordCount" => put(&mut batch.failed_record_count, integer(json)),
        "size" => put(&mut batch.size, integer(json)),
        "version" => put(&mut batch.version, json.string()),
        "externalId" => put(&mut batch.external_id, json.string()),
        "inputFormat" => read_message(&mut batch.input_format, json, read_input_format),
        "relatedObjects" => read_list(&mut batch.related_objects, json, read_related_object),
        "tags" => read_tags(&mut batch.tags, json),
        "createdUser" => put(&mut batch.created_user, json.string()),
        "updatedUser" => put(&mut batch.updated_user, json.string()),
        "createdClient" => put(&mut batch.created_client, json.string()),
        "availableDates" => read_message(&mut batch.available_dates, json, read_available_dates),
        "errors" => read_list(&mut batch.errors, json, read_error),
        "metrics" => put(&mut batch.metrics, json.to_struct()),
        "replay" => read_message(&mut batch.replay, json, read_replay),
        "failedBatchLocation" => put(&mut batch.failed_batch_location, json.string()),
        _ => false,
    }
}

/// An id that is no string still names the batch.
fn read_id(id: &mut String, json: Json<'_>) -> bool {
    let string = json.string();
    let held = string.is_some();
    *id = string.unwrap_or_else(|| match json.is_null() {
        true => String::new(),
        false => json.text().to_owned(),
    });
    held
}

fn read_input_format(format: &mut InputFormat, name: &str, json: Json<'_>) -> bool {
    match name {
        "format" => put(&mut format.format, json.string()),
        "isMultiLineJson" => put(&mut format.is_multi_line_json, boolean(json)),
        "delimiter" => put(&mut format.delimiter, json.string()),
        "quote" => put(&mut format.quote, json.string()),
        "escape" => put(&mut format.escape, json.string()),
        "nullMarker" => put(&mut format.null_marker, json.string()),
        "charset" => put(&mut format.charset, json.string()),
        "header" => put(&mut format.header, boolean(json)),
        _ => false,
    }
}

fn read_related_object(object: &mut RelatedObject, name: &str, json: Json<'_>) -> bool {
    match name {
        "type" => put(&mut object.r#type, json.string()),
        "id" => put(&mut object.id, json.string()),
        "tag" => put(&mut object.tag, json.string()),
        "status" => read_status(&mut object.status, json),
        "errors" => read_list(&mut object.errors, json, read_error),
        "metrics" => put(&mut object.metrics, json.to_struct()),
        _ => false,
    }
}

fn read_error(error: &mut BatchError, name: &str, json: Json<'_>) -> bool {
    match name {
        "code" => put(&mut error.code, string_or_number(json)),
        "description" => put(&mut error.description, json.string()),
        "rows" => read_strings(&mut error.rows, json),
        "recordCount" => put(&mut error.record_count, integer(json)),
        _ => false,
    }
}

fn read_available_dates(dates: &mut AvailableDates, name: &str, json: Json<'_>) -> bool {
    match name {
        "startDate" => put(&mut dates.start_date, instant(json, Unit::Seconds)),
        "endDate" => put(&mut dates.end_date, instant(json, Unit::Seconds)),
        _ => false,
    }
}

fn read_replay(replay: &mut Replay, name: &str, json: Json<'_>) -> bool {
    match name {
        "reason" => put(&mut replay.reason, json.string()),
        "predecessors" => read_strings(&mut replay.predecessors, json),
        "predecessorsByExternalId" => read_strings(&mut replay.predecessors_by_external_id, json),
        "predecessorListingType" => put(&mut replay.predecessor_listing_type, json.string()),
        _ => false,
    }
}

/// An object of arrays (schema), of plain values ("Partial batch ingestion"),
/// or an array of such objects (the reference's example).
fn read_tags(tags: &mut BTreeMap<String, TagValues>, json: Json<'_>) -> bool {
    tags.clear();
    let held = match json.array() {
        Some(objects) => objects.fold(true, |held, object| read_tag_object(tags, object) & held),
        None => read_tag_object(tags, json),
    };
    // A tag without values would be a map entry without a value on the wire, which
    // protobuf.js cannot read (its issue 1828): a Node client would lose the answer.
    let all = tags.len();
    tags.retain(|_, tag| !tag.values.is_empty());
    held && tags.len() == all
}

fn read_tag_object(tags: &mut BTreeMap<String, TagValues>, json: Json<'_>) -> bool {
    read_object(json, |name, json| {
        let first = !tags.contains_key(name);
        let TagValues { values } = tags.entry(name.to_owned()).or_default();
        let held = match json.array() {
            Some(_) => read_strings(values, json),
            None => match string_or_number(json).or(json.boolean().map(|b| b.to_string())) {
                Some(value) => {
                    values.push(value);
                    true
                }
                None => false,
            },
        };
        held && first
    })
}

/// Reads the members of an object; false where something of it is left.
fn read_object(json: Json<'_>, mut read: impl FnMut(&str, Json<'_>) -> bool) -> bool {
    let mut held = true;
    let is_object = json.each_name(|name, values| {
        held &= read_last(values, |json| read(name, json));
    });
    is_object && held
}

/// Reads an object into a message; what is no object leaves it unset.
fn read_message<T: Default>(
    place: &mut Option<T>,
    json: Json<'_>,
    read: impl Fn(&mut T, &str, Json<'_>) -> bool,
) -> bool {
    let mut message = T::default();
    let held = read_object(json, |name, json| read(&mut message, name, json));
    *place = json.is_object().then_some(message);
    held
}

/// Reads an array of objects; an element that is no object leaves an empty
/// message in its place.
fn read_list<T: Default>(
    list: &mut Vec<T>,
    json: Json<'_>,
    read: impl Fn(&mut T, &str, Json<'_>) -> bool,
) -> bool {
    list.clear();
    let Some(elements) = json.array() else {
        return false;
    };
    let mut held = true;
    for element in elements {
        let mut item = T::default();
        held &= read_object(element, |name, json| read(&mut item, name, json));
        list.push(item);
    }
    held
}

/// Reads an array of strings; a number is taken as its digits.
fn read_strings(list: &mut Vec<String>, json: Json<'_>) -> bool {
    let Some(elements) = json.array() else {
        return false;
    };
    let mut held = true;
    for element in elements {
        let string = string_or_number(element);
        held &= string.is_some();
        list.extend(string);
    }
    held
}

fn read_status(status: &mut i32, json: Json<'_>) -> bool {
    let known = json.string().and_then(|word| status_of(&word));
    *status = known.unwrap_or(BatchStatus::Unspecified).into();
    known.is_some()
}

/// The words of the batch ingestion overview and troubleshooting guide, in the
/// order of [`BatchStatus`]'s numbers from 1 on.
const STATUS_WORDS: [&str; 18] = [
    "loading",
    "loaded",
    "staging",
    "staged",
    "processing",
    "queued",
    "retrying",
    "stalled",
    "active",
    "success",
    "failed",
    "failure",
    "aborted",
    "abandoned",
    "inactive",
    "archived",
    "retained",
    "deleted",
];

fn status_of(word: &str) -> Option<BatchStatus> {
    let index = STATUS_WORDS.iter().position(|known| *known == word)?;
    BatchStatus::try_from(index as i32 + 1).ok()
}

/// The word for a status; `None` for one that has none.
pub(super) fn status_word(status: i32) -> Option<&'static str> {
    let index = usize::try_from(status).ok()?.checked_sub(1)?;
    STATUS_WORDS.get(index).copied()
}

fn put<T>(place: &mut Option<T>, value: Option<T>) -> bool {
    *place = value;
    place.is_some()
}

fn string_or_number(json: Json<'_>) -> Option<String> {
    json.number().map(str::to_owned).or_else(|| json.string())
}

/// `true` or `"true"`.
fn boolean(json: Json<'_>) -> Option<bool> {
    json.boolean().or_else(|| json.string()?.parse().ok())
}

/// `1342576`, `"1342576"` or `"1,342,576"`.
fn integer(json: Json<'_>) -> Option<i64> {
    if let Some(number) = json.number() {
        return number.parse().ok().or_else(|| whole(number));
    }
    let text = json.string()?;
    let (first, groups) = text.split_once(',').unwrap_or((&text, ""));
    let grouped = groups.is_empty()
        || (first.trim_start_matches('-').len() <= 3
            && groups.split(',').all(|group| group.len() == 3));
    let digits: String = text.chars().filter(|&c| c != ',').collect();
    (grouped && !text.starts_with('+') && !text.ends_with(','))
        .then(|| digits.parse().ok())
        .flatten()
}

/// A whole number that is written with a fraction or an exponent, like `5.0`.
fn whole(number: &str) -> Option<i64> {
    const EXACT: f64 = (1_i64 << 53) as f64;
    let double: f64 = number.parse().ok()?;
    (double.fract() == 0.0 && double.abs() < EXACT).then_some(double as i64)
}

#[derive(Clone, Copy)]
enum Unit {
    Seconds,
    Milliseconds,
}

/// A Unix time, or an RFC 3339 string. `None` outside of the years 1 to 9999,
/// which a `Timestamp` cannot hold.
fn instant(json: Json<'_>, unit: Unit) -> Option<Timestamp> {
    let Some(number) = json.number() else {
        return rfc3339(&json.string()?).filter(is_valid);
    };
    let number = number.parse().ok().or_else(|| whole(number))?;
    instant_of(match unit {
        Unit::Seconds => i64::checked_mul(number, 1000)?,
        Unit::Milliseconds => number,
    })
}

/// The instant of a Unix time in milliseconds.
pub(super) fn instant_of(milliseconds: i64) -> Option<Timestamp> {
    let instant = Timestamp {
        seconds: milliseconds.div_euclid(1000),
        nanos: (milliseconds.rem_euclid(1000) * 1_000_000) as i32,
    };
    is_valid(&instant).then_some(instant)
}

fn is_valid(instant: &Timestamp) -> bool {
    const YEAR_1: i64 = -62_135_596_800;
    const YEAR_10000: i64 = 253_402_300_800;
    (YEAR_1..YEAR_10000).contains(&instant.seconds)
}

fn rfc3339(text: &str) -> Option<Timestamp> {
    // prost's parser is more lenient: it takes a date alone, and drops digits past the ninth.
    let complete = text.len() >= "2022-11-09T18:45:31Z".len() && text.as_bytes()[10] == b'T';
    let fraction = text.split_once('.').map_or("", |(_, rest)| rest);
    let digits = fraction.chars().take_while(char::is_ascii_digit).count();
    (complete && digits <= 9)
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use prost_types::Value;

    use super::*;

    fn batch(text: &str) -> Batch {
        batch_from_json(text.as_bytes()).expect(text)
    }

    /// The batch for an answer with an id and one more member.
    fn with(member: &str) -> Batch {
        batch(&format!(r#"{{"id":"b",{member}}}"#))
    }

    fn extra(batch: &Batch, name: &str) -> Option<Value> {
        batch.extra.as_ref()?.fields.get(name).cloned()
    }

    fn json(text: &str) -> Value {
        Document::parse(text).expect(text).root().to_value()
    }

    fn at(seconds: i64, nanos: i32) -> Option<Timestamp> {
        Some(Timestamp { seconds, nanos })
    }

    #[test]
    fn instants() {
        let table = [
            ("1552694873602", at(1_552_694_873, 602_000_000)),
            ("0", at(0, 0)),
            ("-1", at(-1, 999_000_000)),
            ("1.552694873602e12", at(1_552_694_873, 602_000_000)),
            (
                r#""2022-11-09T18:45:31.256Z""#,
                at(1_668_019_531, 256_000_000),
            ),
            (r#""2022-11-09T19:45:31+01:00""#, at(1_668_019_531, 0)),
            ("253402300799999", at(253_402_300_799, 999_000_000)),
            ("253402300800000", None),
            ("-62135596800001", None),
            ("9223372036854775807", None),
            ("1e400", None),
            ("0.5", None),
            (r#""2022-11-09""#, None),
            (r#""2022-11-09T18:45:31.1234567891Z""#, None),
            (r#""ééééééééééééééééééééé""#, None),
            (r#""yesterday""#, None),
            ("null", None),
            ("{}", None),
        ];
        for (text, expected) in table {
            let batch = with(&format!(r#""created":{text}"#));
            assert_eq!(batch.created, expected, "{text}");
            let kept = expected.is_none().then(|| json(text));
            assert_eq!(extra(&batch, "created"), kept, "{text}");
        }
        let dates = with(r#""availableDates":{"startDate":1337,"endDate":"2022-11-09T18:45:31Z"}"#);
        let read = dates.available_dates.expect("dates");
        assert_eq!(read.start_date, at(1337, 0));
        assert_eq!(read.end_date, at(1_668_019_531, 0));
        assert_eq!(dates.extra, None);
    }

    #[test]
    fn counts() {
        let table = [
            ("57", Some(57)),
            ("9223372036854775807", Some(i64::MAX)),
            ("57.0", Some(57)),
            (r#""1,342,576""#, Some(1_342_576)),
            (r#""-12""#, Some(-12)),
            ("9223372036854775808", None),
            ("57.5", None),
            (r#""1,34""#, None),
            (r#""1,""#, None),
            (r#""+1""#, None),
            (r#""""#, None),
            ("true", None),
        ];
        for (text, expected) in table {
            let batch = with(&format!(r#""size":{text}"#));
            assert_eq!(batch.size, expected, "{text}");
            let kept = expected.is_none().then(|| json(text));
            assert_eq!(extra(&batch, "size"), kept, "{text}");
        }
    }

    #[test]
    fn statuses() {
        for (index, word) in STATUS_WORDS.into_iter().enumerate() {
            let batch = with(&format!(r#""status":"{word}""#));
            let name = format!("BATCH_STATUS_{}", word.to_ascii_uppercase());
            assert_eq!(batch.status().as_str_name(), name);
            assert_eq!(batch.extra, None);
            assert_eq!(status_word(index as i32 + 1), Some(word));
        }
        for odd in [i32::MIN, -1, 0, 19, i32::MAX] {
            assert_eq!(status_word(odd), None);
            assert!(BatchStatus::try_from(odd).is_err() || odd == 0);
        }
        for odd in [r#""melting""#, "7", "null"] {
            let batch = with(&format!(r#""status":{odd}"#));
            assert_eq!(batch.status(), BatchStatus::Unspecified);
            assert_eq!(extra(&batch, "status"), Some(json(odd)));
        }
    }

    #[test]
    fn tags_in_each_documented_form() {
        let expected: BTreeMap<_, _> = [("a", vec!["1", "2"]), ("b", vec!["true"])]
            .into_iter()
            .map(|(name, values)| {
                let values = values.into_iter().map(str::to_owned).collect();
                (name.to_owned(), TagValues { values })
            })
            .collect();
        for form in [
            r#"{"a":["1","2"],"b":["true"]}"#,
            r#"[{"a":["1","2"]},{"b":["true"]}]"#,
            r#"{"a":["1","2"],"b":true}"#,
            r#"{"a":["1",2],"b":"true"}"#,
        ] {
            let batch = with(&format!(r#""tags":{form}"#));
            assert_eq!(batch.tags, expected, "{form}");
            assert_eq!(batch.extra, None, "{form}");
        }
        for form in [
            r#"{"a":{"nested":1}}"#,
            r#"{"a":[["x"]]}"#,
            r#"{"a":null}"#,
            r#"{"a":[],"b":["x"]}"#,
            r#"[{"a":["1"]},{"a":["2"]}]"#,
            r#""a""#,
        ] {
            let batch = with(&format!(r#""tags":{form}"#));
            assert_eq!(extra(&batch, "tags"), Some(json(form)), "{form}");
            assert!(batch.tags.values().all(|tag| !tag.values.is_empty()));
        }
    }

    #[test]
    fn documented_contradictions_are_read_both_ways() {
        for code in [r#""405""#, "405"] {
            let batch = with(&format!(
                r#""errors":[{{"code":{code},"rows":["13-26",7]}}]"#
            ));
            assert_eq!(batch.errors[0].code.as_deref(), Some("405"));
            assert_eq!(batch.errors[0].rows, ["13-26", "7"]);
            assert_eq!(batch.extra, None);
        }
        for header in ["true", r#""true""#] {
            let batch = with(&format!(
                r#""inputFormat":{{"header":{header},"format":"CSV"}}"#
            ));
            let format = batch.input_format.expect("a format");
            assert_eq!(format.header, Some(true));
            assert_eq!(format.format(), "CSV");
            assert_eq!(batch.extra, None);
        }
        let metrics = r#"[{"failedRecordCount":"0,"}]"#;
        let batch = with(&format!(r#""metrics":{metrics}"#));
        assert_eq!(batch.metrics, None);
        assert_eq!(extra(&batch, "metrics"), Some(json(metrics)));
    }

    #[test]
    fn what_is_held_in_part_is_kept_whole() {
        for (name, value) in [
            ("inputFormat", r#"{"format":7,"header":true}"#),
            ("inputFormat", r#"{"format":"csv","new":[1]}"#),
            ("inputFormat", r#"{"format":"csv","format":"json"}"#),
            (
                "relatedObjects",
                r#"[{"type":"dataSet"},7,{"id":"x","status":"odd"}]"#,
            ),
            ("relatedObjects", r#"[{"errors":[{"new":{"deep":null}}]}]"#),
            ("errors", r#"[{"code":{}}]"#),
            ("errors", "{}"),
            ("replay", r#"{"predecessors":[{}]}"#),
            ("availableDates", r#"{"startDate":"soon"}"#),
            ("availableDates", "null"),
            ("version", "2"),
            ("imsOrg", "null"),
            ("neverSeen", r#"{"x":9007199254740993}"#),
        ] {
            let batch = with(&format!(r#""{name}":{value}"#));
            assert_eq!(extra(&batch, name), Some(json(value)), "{name} {value}");
        }
        assert_eq!(with(r#""inputFormat":"csv""#).input_format, None);
        let objects = with(r#""relatedObjects":[{"type":"dataSet"},7,{"id":"x","new":1}]"#);
        assert_eq!(objects.related_objects.len(), 3);
        assert_eq!(objects.related_objects[2].id.as_deref(), Some("x"));
    }

    #[test]
    fn a_repeated_key_keeps_every_value() {
        let batch = with(r#""version":"1","version":"2""#);
        assert_eq!(batch.version.as_deref(), Some("2"));
        assert_eq!(extra(&batch, "version"), Some(json(r#"["1","2"]"#)));
    }

    #[test]
    fn any_answer_with_an_id_is_a_batch() {
        for (answer, id) in [
            (r#"{"id":"b"}"#, "b"),
            ("\u{feff} {\"id\":\"b\"}\n", "b"),
            (r#"{"id":123}"#, "123"),
            (r#"{"id":{"oid":"b"}}"#, r#"{"oid":"b"}"#),
            (r#"{"id":"\u00e9😀"}"#, "é😀"),
            (r#"["@/batches/b"]"#, "b"),
        ] {
            assert_eq!(batch(answer).id, id, "{answer}");
        }
        assert_eq!(extra(&batch(r#"{"id":123}"#), "id"), Some(json("123")));
        let not_utf8 = b"{\"id\":\"b\",\"version\":\"\xff\"}";
        assert_eq!(batch_from_json(not_utf8).expect("a batch").id, "b");
        let deep = format!(
            r#"{{"id":"b","x":{}1{}}}"#,
            "[".repeat(9999),
            "]".repeat(9999)
        );
        assert_eq!(batch(&deep).id, "b");
    }

    #[test]
    fn an_answer_without_an_id_is_none() {
        for (answer, expected) in [
            ("", ParseError::Empty),
            (" \n", ParseError::Empty),
            ("<html>", ParseError::NotJson),
            (r#"{"id":"b""#, ParseError::NotJson),
            ("{}", ParseError::NoId),
            (r#"{"id":""}"#, ParseError::NoId),
            (r#"{"id":null}"#, ParseError::NoId),
            ("[]", ParseError::NoId),
            (r#"["@/batches/"]"#, ParseError::NoId),
            (r#"["@/batches/a","@/batches/b"]"#, ParseError::NoId),
            (r#""b""#, ParseError::NoId),
        ] {
            assert_eq!(
                batch_from_json(answer.as_bytes()),
                Err(expected),
                "{answer}"
            );
        }
    }
}
