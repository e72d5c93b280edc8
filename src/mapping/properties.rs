//! What goes in through the mapping comes out: properties of random values.

use std::collections::BTreeMap;

use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
};
use prost::Message;
use prost_types::Timestamp;
use serde_json::{Map, Value, json};

use super::{batch_from_json, create_batch_json, json::Document};
use crate::proto::v1::{
    AvailableDates, Batch, BatchError, BatchStatus, CreateBatchRequest, InputFormat, RelatedObject,
    Replay, TagValues,
};

fn input_format() -> impl Strategy<Value = InputFormat> {
    let text = || option::of(".*");
    (
        (text(), option::of(any::<bool>()), text(), text()),
        (text(), text(), text(), option::of(any::<bool>())),
    )
        .prop_map(|(a, b)| InputFormat {
            format: a.0,
            is_multi_line_json: a.1,
            delimiter: a.2,
            quote: a.3,
            escape: b.0,
            null_marker: b.1,
            charset: b.2,
            header: b.3,
        })
}

fn replay() -> impl Strategy<Value = Replay> {
    (option::of(".*"), vec(".*", 0..3), vec(".*", 0..3)).prop_map(|(reason, ids, external)| {
        Replay {
            predecessor_listing_type: reason.clone(),
            reason,
            predecessors: ids,
            predecessors_by_external_id: external,
        }
    })
}

/// Tags of which each has at least so many values.
fn tags(least: usize) -> impl Strategy<Value = BTreeMap<String, TagValues>> {
    let values = vec(".*", least..3).prop_map(|values| TagValues { values });
    btree_map(".*", values, 0..4)
}

fn request() -> impl Strategy<Value = CreateBatchRequest> {
    (
        ".+",
        option::of(".*"),
        option::of(input_format()),
        option::of(replay()),
        tags(0),
        option::of(any::<bool>()),
        // Halves: serde_json, which reads the body back here, rounds long fractions.
        option::of((0..=200).prop_map(|halves| f64::from(halves) / 2.0)),
    )
        .prop_map(|fields| CreateBatchRequest {
            dataset_id: fields.0,
            external_id: fields.1,
            input_format: fields.2,
            replay: fields.3,
            tags: fields.4,
            enable_error_diagnostics: fields.5,
            partial_ingestion_percent: fields.6,
        })
}

fn instant() -> impl Strategy<Value = Timestamp> {
    (-62_135_596_800..253_402_300_800_i64, 0..1000).prop_map(|(seconds, milliseconds)| Timestamp {
        seconds,
        nanos: milliseconds * 1_000_000,
    })
}

fn error() -> impl Strategy<Value = BatchError> {
    let text = || option::of(".*");
    (text(), text(), vec(".*", 0..3), option::of(any::<i64>())).prop_map(|fields| BatchError {
        code: fields.0,
        description: fields.1,
        rows: fields.2,
        record_count: fields.3,
    })
}

fn related_object() -> impl Strategy<Value = RelatedObject> {
    let text = || option::of(".*");
    (text(), text(), text(), 1..=18, vec(error(), 0..2)).prop_map(|fields| RelatedObject {
        r#type: fields.0,
        id: fields.1,
        tag: fields.2,
        status: fields.3,
        errors: fields.4,
        metrics: None,
    })
}

fn batch() -> impl Strategy<Value = Batch> {
    let text = || option::of(".*");
    let count = || option::of(any::<i64>());
    let time = || option::of(instant());
    (
        (".+", text(), text(), text(), text(), text(), text()),
        (time(), time(), time(), time()),
        (1..=18, count(), count(), count()),
        (option::of(input_format()), vec(related_object(), 0..3)),
        (tags(1), vec(error(), 0..3), option::of(replay())),
    )
        .prop_map(|(texts, times, numbers, objects, lists)| Batch {
            id: texts.0,
            ims_org: texts.1,
            version: texts.2,
            external_id: texts.3,
            created_user: texts.4,
            updated_user: texts.5,
            failed_batch_location: texts.6.clone(),
            created_client: texts.6,
            created: times.0,
            updated: times.1,
            started: times.2,
            completed: times.3,
            status: numbers.0,
            record_count: numbers.1,
            failed_record_count: numbers.2,
            size: numbers.3,
            input_format: objects.0,
            related_objects: objects.1,
            tags: lists.0,
            errors: lists.1,
            replay: lists.2,
            available_dates: Some(AvailableDates {
                start_date: Some(Timestamp::default()),
                end_date: None,
            }),
            metrics: None,
            extra: None,
        })
}

/// An object without the members that are null.
fn object(members: Value) -> Value {
    match members {
        Value::Object(members) => members.into_iter().filter(|(_, v)| !v.is_null()).collect(),
        other => other,
    }
}

fn milliseconds(time: &Option<Timestamp>) -> Option<i64> {
    time.map(|t| t.seconds * 1000 + i64::from(t.nanos) / 1_000_000)
}

fn word(status: i32) -> String {
    let status = BatchStatus::try_from(status).expect("a status");
    let name = status.as_str_name();
    name.trim_start_matches("BATCH_STATUS_")
        .to_ascii_lowercase()
}

fn format_json(format: &InputFormat) -> Value {
    object(json!({
        "format": format.format,
        "isMultiLineJson": format.is_multi_line_json,
        "delimiter": format.delimiter,
        "quote": format.quote,
        "escape": format.escape,
        "nullMarker": format.null_marker,
        "charset": format.charset,
        "header": format.header,
    }))
}

fn replay_json(replay: &Replay) -> Value {
    object(json!({
        "reason": replay.reason,
        "predecessors": replay.predecessors,
        "predecessorsByExternalId": replay.predecessors_by_external_id,
        "predecessorListingType": replay.predecessor_listing_type,
    }))
}

fn error_json(error: &BatchError) -> Value {
    object(json!({
        "code": error.code,
        "description": error.description,
        "rows": error.rows,
        "recordCount": error.record_count,
    }))
}

fn related_json(related: &RelatedObject) -> Value {
    object(json!({
        "type": related.r#type,
        "id": related.id,
        "tag": related.tag,
        "status": word(related.status),
        "errors": related.errors.iter().map(error_json).collect::<Vec<_>>(),
    }))
}

fn tags_json(tags: &BTreeMap<String, TagValues>) -> Value {
    tags.iter()
        .map(|(name, tag)| (name.clone(), json!(tag.values)))
        .collect()
}

/// The batch as Adobe documents it.
fn batch_json(batch: &Batch) -> Value {
    object(json!({
        "id": batch.id,
        "imsOrg": batch.ims_org,
        "version": batch.version,
        "externalId": batch.external_id,
        "createdUser": batch.created_user,
        "updatedUser": batch.updated_user,
        "createdClient": batch.created_client,
        "created": milliseconds(&batch.created),
        "updated": milliseconds(&batch.updated),
        "started": milliseconds(&batch.started),
        "completed": milliseconds(&batch.completed),
        "status": word(batch.status),
        "recordCount": batch.record_count,
        "failedRecordCount": batch.failed_record_count,
        "size": batch.size,
        "inputFormat": batch.input_format.as_ref().map(format_json),
        "relatedObjects": batch.related_objects.iter().map(related_json).collect::<Vec<_>>(),
        "tags": tags_json(&batch.tags),
        "errors": batch.errors.iter().map(error_json).collect::<Vec<_>>(),
        "replay": batch.replay.as_ref().map(replay_json),
        "failedBatchLocation": batch.failed_batch_location,
        "availableDates": { "startDate": 0 },
    }))
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(24, 64, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(".*", inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// Names that a batch has, and others.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::sample::select(vec![
            "imsOrg",
            "created",
            "status",
            "size",
            "inputFormat",
            "relatedObjects",
            "tags",
            "availableDates",
            "errors",
            "metrics",
            "replay",
        ])
        .prop_map(str::to_owned),
        "[a-z]{1,8}",
    ]
}

proptest! {
    /// A batch in its documented form comes out as it went in.
    #[test]
    fn a_documented_batch_comes_out(batch in batch()) {
        let text = batch_json(&batch).to_string();
        prop_assert_eq!(batch_from_json(text.as_bytes()), Ok(batch), "{}", text);
    }

    /// A request's body says what the request says, and nothing else.
    #[test]
    fn a_request_comes_out(request in request()) {
        let body = create_batch_json(&request).expect("a good request");
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        let mut expected = object(json!({
            "datasetId": request.dataset_id,
            "externalId": request.external_id,
            "inputFormat": request.input_format.as_ref().map(format_json),
            "enableErrorDiagnostics": request.enable_error_diagnostics,
        }));
        if let Some(replay) = &request.replay {
            let mut replay = replay_json(replay);
            let members = replay.as_object_mut().expect("an object");
            members.remove("predecessorListingType"); // output only
            members.retain(|_, value| value != &json!([]));
            expected["replay"] = replay;
        }
        if !request.tags.is_empty() {
            expected["tags"] = tags_json(&request.tags);
        }
        let mut body = body;
        let percentage = body.as_object_mut().and_then(|b| b.remove("partialIngestionPercent"));
        prop_assert_eq!(percentage.and_then(|p| p.as_f64()), request.partial_ingestion_percent);
        prop_assert_eq!(body, expected);
    }

    /// Whatever an answer holds, a batch with an id is read, and what its fields
    /// do not hold is in `extra`, whole; and clients can decode it.
    #[test]
    fn any_answer_with_an_id_is_read_and_nothing_is_lost(
        id in ".+",
        members in btree_map(name(), any_json(), 0..8),
    ) {
        let mut answer: Map<String, Value> = members.into_iter().collect();
        answer.insert("id".to_owned(), id.clone().into());
        let text = Value::Object(answer.clone()).to_string();
        let batch = batch_from_json(text.as_bytes()).expect("a batch");
        prop_assert_eq!(&batch.id, &id);

        let extra = batch.extra.clone().unwrap_or_default().fields;
        for (name, value) in &answer {
            let text = value.to_string();
            let kept = Document::parse(&text).expect("JSON").root().to_value();
            match extra.get(name) {
                Some(extra) => prop_assert_eq!(extra, &kept),
                None => prop_assert!(is_held(&batch, name, value), "{} {}", name, text),
            }
        }
        let decoded = Batch::decode(&batch.encode_to_vec()[..]).expect("within protobuf's depth");
        // NaN, which is not equal to itself, cannot come from JSON.
        prop_assert_eq!(decoded, batch);
    }
}

/// Whether a member of a random answer is one that a field may hold whole.
fn is_held(batch: &Batch, name: &str, value: &Value) -> bool {
    match name {
        "id" => true,
        "imsOrg" => value.as_str() == batch.ims_org.as_deref(),
        "created" => value.is_number() && batch.created.is_some(),
        "size" => (value.is_number() || value.is_string()) && batch.size.is_some(),
        "metrics" => value.is_object() && batch.metrics.is_some(),
        "inputFormat" | "availableDates" | "replay" => *value == json!({}),
        "relatedObjects" | "errors" => value
            .as_array()
            .is_some_and(|list| list.iter().all(|element| *element == json!({}))),
        "tags" => match value {
            Value::Array(list) => list.iter().all(Value::is_object),
            value => value.is_object(),
        },
        _ => false,
    }
}
