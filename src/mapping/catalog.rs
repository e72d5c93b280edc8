//! Batches as Catalog shows them, and whether one of them is the batch that a
//! request asks for.

use std::sync::LazyLock;

use prost::Message;
use prost_types::{FileDescriptorSet, Value, value::Kind};

use super::{
    ParseError,
    batch::batch_of,
    json::{Document, Json, text_of},
};
use crate::{
    failure::Violation,
    proto::{
        DESCRIPTOR_SET,
        v1::{Batch, CreateBatchRequest},
    },
};

/// The value of Catalog's `properties`: the documented members of a batch, which
/// are the fields of `Batch`. Without it Catalog returns all there is, which
/// "may exceed 3 GB" ("Filter Catalog data using query parameters").
pub fn properties() -> &'static str {
    static PROPERTIES: LazyLock<String> = LazyLock::new(|| {
        let set = FileDescriptorSet::decode(DESCRIPTOR_SET).unwrap_or_default();
        let messages = set.file.iter().flat_map(|file| &file.message_type);
        let batch = messages.filter(|message| message.name() == "Batch");
        // The id is the key in Catalog's map, and `extra` is the gateway's own.
        let names: Vec<_> = batch
            .flat_map(|batch| batch.field.iter().map(|field| field.json_name()))
            .filter(|name| !matches!(*name, "id" | "extra"))
            .collect();
        names.join(",")
    });
    &PROPERTIES
}

/// Checks an id that becomes a segment of the path `/batches/{id}`.
pub fn check_batch_id(id: &str) -> Result<(), Vec<Violation>> {
    const LONGEST: usize = 256;
    let problem = match id {
        "" => "is required: the id of a batch",
        "." | ".." => "is not the id of a batch",
        _ if id.len() > LONGEST => "is longer than 256 bytes",
        _ if id.contains(char::is_control) => "must not contain control characters",
        // "View multiple objects" of the Catalog guide.
        _ if id.contains(',') => "must not contain ',', which separates ids in Catalog's paths",
        _ => return Ok(()),
    };
    Err(vec![Violation::new("batch_id", problem)])
}

/// Reads the answer to Catalog's `GET /batches/{id}`: a map that holds the batch
/// under its id. `None` if there is no such batch: Catalog's reference documents
/// a 404 for that, and an empty object or array are understood too.
pub fn batch_with_id(body: &[u8], id: &str) -> Result<Option<Batch>, ParseError> {
    let text = text_of(body);
    let document = document_of(&text)?;
    let root = document.root();
    if root
        .array()
        .is_some_and(|mut elements| elements.next().is_none())
    {
        return Ok(None);
    }
    let members = root.object().ok_or(ParseError::NoId)?;
    if members.is_empty() {
        return Ok(None);
    }
    if let Some((_, json)) = members.iter().rfind(|(key, _)| key == id)
        && json.is_object()
    {
        return batch_under(id, *json).map(Some);
    }
    let own_id = members.iter().rfind(|(name, _)| name == "id");
    if own_id.is_some_and(|(_, json)| json.string().as_deref() == Some(id)) {
        return Ok(batch_of(root));
    }
    Err(match members.iter().all(|(_, json)| json.is_object()) {
        true => ParseError::OtherBatches,
        false => ParseError::NoId,
    })
}

/// Reads the answer to Catalog's `GET /batches`: a map of batches by id
/// (Catalog Service API reference), in Catalog's order.
pub fn batches_from_json(body: &[u8]) -> Result<Vec<Batch>, ParseError> {
    let text = text_of(body);
    let document = document_of(&text)?;
    let members = document.root().object().ok_or(ParseError::NoId)?;
    let batches = members.iter().map(|(id, json)| batch_under(id, *json));
    batches.collect()
}

fn document_of(text: &str) -> Result<Document<'_>, ParseError> {
    match text.trim() {
        "" => Err(ParseError::Empty),
        text => Document::parse(text).ok_or(ParseError::NotJson),
    }
}

/// The batch that stands under this key. Its own id may be missing; another one
/// is kept in `extra`.
fn batch_under(id: &str, json: Json<'_>) -> Result<Batch, ParseError> {
    let mut batch = batch_of(json).ok_or(ParseError::NoId)?;
    if id.is_empty() {
        return Err(ParseError::NoId);
    }
    if batch.id != id {
        let own_id = std::mem::replace(&mut batch.id, id.to_owned());
        if !own_id.is_empty() {
            let kind = Some(Kind::StringValue(own_id));
            let extra = &mut batch.extra.get_or_insert_default().fields;
            extra.entry("id".to_owned()).or_insert(Value { kind });
        }
    }
    Ok(batch)
}

/// The character for which Catalog's filter does not take an external id
/// literally ("Filter Catalog data using query parameters: Using simple
/// filters"): a comma separates values of which any matches, and a `!` before
/// them means "not". An asterisk is a wildcard for names and tags; nothing says
/// that it is none for external ids. No escape is documented for any of them.
pub fn special_character(external_id: &str) -> Option<char> {
    match external_id.starts_with('!') {
        true => Some('!'),
        false => external_id.chars().find(|c| matches!(c, ',' | '*')),
    }
}

/// Whether a batch is what the request asks for, as far as both show it: the
/// dataset, the members of the input format, the values of tags of the same
/// name, and what the batch replaces. What Catalog does not show is not
/// compared, nor how a format's name is written.
pub fn is_same_content(request: &CreateBatchRequest, batch: &Batch) -> bool {
    let mut datasets = batch
        .related_objects
        .iter()
        .filter(|object| object.r#type.as_deref() == Some("dataSet"))
        .filter_map(|object| object.id.as_deref().map(bare))
        .peekable();
    let dataset = datasets.peek().is_none() || datasets.any(|id| id == bare(&request.dataset_id));

    let format = match (&request.input_format, &batch.input_format) {
        (Some(asked), Some(shown)) => {
            let word = |word: &Option<String>| word.as_ref().map(|w| w.to_ascii_lowercase());
            agree(&word(&asked.format), &word(&shown.format))
                && agree(&asked.is_multi_line_json, &shown.is_multi_line_json)
                && agree(&asked.delimiter, &shown.delimiter)
                && agree(&asked.quote, &shown.quote)
                && agree(&asked.escape, &shown.escape)
                && agree(&asked.null_marker, &shown.null_marker)
                && agree(&asked.charset, &shown.charset)
                && agree(&asked.header, &shown.header)
        }
        _ => true,
    };
    let tags = request.tags.iter().all(|(name, asked)| {
        let shown = batch.tags.get(name);
        shown.is_none_or(|shown| shown == asked)
    });
    let replay = match (&request.replay, &batch.replay) {
        (Some(asked), Some(shown)) => {
            let lists = |asked: &[String], shown: &[String]| shown.is_empty() || asked == shown;
            agree(&asked.reason, &shown.reason) && lists(&asked.predecessors, &shown.predecessors)
        }
        _ => true,
    };
    dataset && format && tags && replay
}

/// The id in a reference as Catalog gives it, like `@/dataSets/5c8c…` ("Create
/// a dataset using the Catalog API"); an id alone is itself.
pub(super) fn bare(dataset: &str) -> &str {
    dataset.strip_prefix("@/dataSets/").unwrap_or(dataset)
}

fn agree<T: PartialEq>(asked: &Option<T>, shown: &Option<T>) -> bool {
    match (asked, shown) {
        (Some(asked), Some(shown)) => asked == shown,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{InputFormat, TagValues};

    #[test]
    fn a_map_of_batches() {
        let read = |text: &str| batches_from_json(text.as_bytes());
        assert_eq!(read("{}"), Ok(Vec::new()));
        let batches = read(r#"{"b":{"status":"active","x":1},"ä":{},"a":{"id":"other"}}"#);
        let batches = batches.expect("three");
        let ids: Vec<_> = batches.iter().map(|batch| batch.id.as_str()).collect();
        assert_eq!(ids, ["b", "ä", "a"], "in Catalog's order");
        let extra = |batch: &Batch| {
            let fields = batch.extra.clone().unwrap_or_default().fields;
            fields.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(extra(&batches[0]), ["x"]);
        assert_eq!(extra(&batches[2]), ["id"]);
        for (odd, expected) in [
            ("", ParseError::Empty),
            ("<html>", ParseError::NotJson),
            ("[]", ParseError::NoId),
            ("7", ParseError::NoId),
            (r#"{"a":1}"#, ParseError::NoId),
            (r#"{"":{}}"#, ParseError::NoId),
        ] {
            assert_eq!(read(odd), Err(expected), "{odd}");
        }
    }

    #[test]
    fn one_batch_by_its_id() {
        let read = |text: &str, id: &str| {
            let found = batch_with_id(text.as_bytes(), id);
            found.map(|batch| batch.map(|batch| batch.version().to_owned()))
        };
        for (text, id) in [
            (r#"{"a":{"version":"1"}}"#, "a"),
            (r#"{"a":{"id":"a","version":"1"}}"#, "a"),
            (r#"{"b":{"version":"2"},"a":{"version":"1"}}"#, "a"),
            (r#"{"id":"a","version":"1"}"#, "a"),
            (r#"{"id":{"version":"1"}}"#, "id"),
        ] {
            assert_eq!(read(text, id), Ok(Some("1".to_owned())), "{text}");
        }
        for none in ["{}", " [ ] "] {
            assert_eq!(read(none, "a"), Ok(None), "{none}");
        }
        for (odd, expected) in [
            ("", ParseError::Empty),
            ("<html>", ParseError::NotJson),
            (r#"{"b":{}}"#, ParseError::OtherBatches),
            (r#"{"id":"b"}"#, ParseError::NoId),
            (r#"{"a":1}"#, ParseError::NoId),
            (r#"{"message":"a"}"#, ParseError::NoId),
            (r#"["@/batches/a"]"#, ParseError::NoId),
        ] {
            assert_eq!(read(odd, "a"), Err(expected), "{odd}");
        }
    }

    #[test]
    fn ids_that_no_path_can_hold_are_refused() {
        for good in ["01E8", "a b/c?d#e%2F", "...", "é"] {
            assert_eq!(check_batch_id(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a,b", "a\n", &"x".repeat(257)] {
            let violations = check_batch_id(bad).expect_err(bad);
            assert_eq!(violations[0].field, "batch_id");
        }
    }

    #[test]
    fn the_documented_members_are_asked_for() {
        let expected = "imsOrg,created,updated,started,completed,status,recordCount,\
            failedRecordCount,size,version,externalId,inputFormat,relatedObjects,tags,createdUser,\
            updatedUser,createdClient,availableDates,errors,metrics,replay,failedBatchLocation";
        assert_eq!(properties(), expected);
    }

    #[test]
    fn ids_that_a_filter_takes_otherwise_are_known() {
        for (id, special) in [
            ("store 7, week 31", Some(',')),
            ("!important", Some('!')),
            ("a*", Some('*')),
            ("!a,b*", Some('!')),
            ("really!", None),
            ("a~b=c<d>e&f?g/h%2C \u{e9}", None),
            ("", None),
        ] {
            assert_eq!(special_character(id), special, "{id}");
        }
    }

    #[test]
    fn content_is_compared_where_both_show_it() {
        let mut request = CreateBatchRequest {
            dataset_id: "d".to_owned(),
            ..Default::default()
        };
        let batch = |text: &str| {
            let text = format!(r#"{{"b":{text}}}"#);
            let mut batches = batches_from_json(text.as_bytes()).expect(&text);
            batches.remove(0)
        };
        let other_dataset = batch(r#"{"relatedObjects":[{"type":"dataSet","id":"other"}]}"#);
        assert!(!is_same_content(&request, &other_dataset));
        let reference = batch(r#"{"relatedObjects":[{"type":"dataSet","id":"@/dataSets/d"}]}"#);
        assert!(is_same_content(&request, &reference));
        request.dataset_id = "@/dataSets/d".to_owned();
        assert!(is_same_content(&request, &reference));
        assert!(!is_same_content(&request, &other_dataset));
        let same = batch(
            r#"{"relatedObjects":[{"type":"dataSet","id":"d"},{"type":"batch","id":"x"}],
                "inputFormat":{"format":"json"},"tags":{"t":["1"],"own":["2"]}}"#,
        );
        assert!(is_same_content(&request, &same));
        assert!(is_same_content(&request, &batch("{}")));

        let format = |format: &str| {
            Some(InputFormat {
                format: Some(format.to_owned()),
                ..Default::default()
            })
        };
        request.input_format = format("JSON");
        assert!(is_same_content(&request, &same));
        request.input_format = format("csv");
        assert!(!is_same_content(&request, &same));
        request.input_format = None;

        let tag = |value: &str| TagValues {
            values: vec![value.to_owned()],
        };
        request.tags = [("t".to_owned(), tag("1")), ("new".to_owned(), tag("3"))].into();
        assert!(is_same_content(&request, &same));
        request.tags = [("t".to_owned(), tag("2"))].into();
        assert!(!is_same_content(&request, &same));
    }
}
