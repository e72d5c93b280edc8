//! Batches that Catalog lists, and whether one of them is the batch that a
//! request asks for.

use super::{
    NoBatch,
    batch::batch_from_members,
    json::{Json, document, object_of},
};
use crate::proto::v1::{Batch, CreateBatchRequest};

/// Reads the answer to Catalog's `GET /batches`: a map of batches by id
/// (Catalog Service API reference), in Catalog's order.
pub fn batches_from_json(body: &[u8]) -> Result<Vec<Batch>, NoBatch> {
    let text = document(body);
    if text.trim().is_empty() {
        return Err(NoBatch::Empty);
    }
    let Some(members) = object_of(&text) else {
        return Err(match Json::parse(&text) {
            Some(_) => NoBatch::NoId,
            None => NoBatch::NotJson,
        });
    };
    members
        .into_iter()
        .map(|(id, json)| {
            let mut batch = batch_from_members(json.object().ok_or(NoBatch::NoId)?);
            batch.id = id.into_owned();
            (!batch.id.is_empty()).then_some(batch).ok_or(NoBatch::NoId)
        })
        .collect()
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
fn bare(dataset: &str) -> &str {
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
        let batches = read(r#"{"a":{"status":"active","x":1},"b":{"id":"other"}}"#).expect("two");
        assert_eq!(batches[0].id, "a");
        assert!(batches[0].extra.is_some());
        assert_eq!(batches[1].id, "b");
        for (odd, expected) in [
            ("", NoBatch::Empty),
            ("<html>", NoBatch::NotJson),
            ("[]", NoBatch::NoId),
            (r#"{"a":1}"#, NoBatch::NoId),
            (r#"{"":{}}"#, NoBatch::NoId),
        ] {
            assert_eq!(read(odd), Err(expected), "{odd}");
        }
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
