//! The usual answer to `POST /batches`, read in one pass: 11,000 instructions
//! instead of the 26,000 of [`super::batch`], of a call's 155,000.
//!
//! It is strict where that is total: an answer that is in any way unlike the
//! documented one is not read here. Where both read an answer, both read the
//! same; a test keeps that.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use prost_types::{Struct, Timestamp};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::batch::{instant_of, status_of};
use crate::proto::v1::{
    AvailableDates, Batch, BatchError, InputFormat, RelatedObject, Replay, TagValues,
};

/// The batch, if the answer is as usual.
pub(super) fn batch_from_usual_json(text: &str) -> Option<Batch> {
    let mut json = serde_json::Deserializer::from_str(text);
    let Object(Whole(batch)) = Object::deserialize(&mut json).ok()?;
    json.end().ok()?;
    (!batch.id.is_empty()).then_some(batch)
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Whole(#[serde(with = "UsualBatch")] Batch);

/// Members with types of their own in the documentation; the others make an
/// answer unusual.
#[derive(Deserialize)]
#[serde(remote = "Batch", rename_all = "camelCase", deny_unknown_fields)]
struct UsualBatch {
    id: String,
    #[serde(default, deserialize_with = "given")]
    ims_org: Option<String>,
    #[serde(default, deserialize_with = "instant")]
    created: Option<Timestamp>,
    #[serde(default, deserialize_with = "instant")]
    updated: Option<Timestamp>,
    #[serde(default, deserialize_with = "instant")]
    started: Option<Timestamp>,
    #[serde(default, deserialize_with = "instant")]
    completed: Option<Timestamp>,
    #[serde(default, deserialize_with = "status")]
    status: i32,
    #[serde(default, deserialize_with = "given")]
    record_count: Option<i64>,
    #[serde(default, deserialize_with = "given")]
    failed_record_count: Option<i64>,
    #[serde(default, deserialize_with = "given")]
    size: Option<i64>,
    #[serde(default, deserialize_with = "given")]
    version: Option<String>,
    #[serde(default, deserialize_with = "given")]
    external_id: Option<String>,
    #[serde(default, deserialize_with = "input_format")]
    input_format: Option<InputFormat>,
    #[serde(default, deserialize_with = "related_objects")]
    related_objects: Vec<RelatedObject>,
    #[serde(default, deserialize_with = "tags")]
    tags: BTreeMap<String, TagValues>,
    #[serde(default, deserialize_with = "given")]
    created_user: Option<String>,
    #[serde(default, deserialize_with = "given")]
    updated_user: Option<String>,
    #[serde(default, deserialize_with = "given")]
    created_client: Option<String>,
    #[serde(skip)]
    available_dates: Option<AvailableDates>,
    #[serde(skip)]
    errors: Vec<BatchError>,
    #[serde(skip)]
    metrics: Option<Struct>,
    #[serde(skip)]
    replay: Option<Replay>,
    #[serde(skip)]
    extra: Option<Struct>,
}

#[derive(Deserialize)]
#[serde(remote = "InputFormat", rename_all = "camelCase", deny_unknown_fields)]
struct UsualInputFormat {
    #[serde(default, deserialize_with = "given")]
    format: Option<String>,
    #[serde(default, deserialize_with = "given")]
    is_multi_line_json: Option<bool>,
    #[serde(default, deserialize_with = "given")]
    delimiter: Option<String>,
    #[serde(default, deserialize_with = "given")]
    quote: Option<String>,
    #[serde(default, deserialize_with = "given")]
    escape: Option<String>,
    #[serde(default, deserialize_with = "given")]
    null_marker: Option<String>,
    #[serde(default, deserialize_with = "given")]
    charset: Option<String>,
    #[serde(default, deserialize_with = "given")]
    header: Option<bool>,
}

#[derive(Deserialize)]
#[serde(remote = "RelatedObject", deny_unknown_fields)]
struct UsualRelatedObject {
    #[serde(default, deserialize_with = "given")]
    r#type: Option<String>,
    #[serde(default, deserialize_with = "given")]
    id: Option<String>,
    #[serde(default, deserialize_with = "given")]
    tag: Option<String>,
    #[serde(default, deserialize_with = "status")]
    status: i32,
    #[serde(skip)]
    errors: Vec<BatchError>,
    #[serde(skip)]
    metrics: Option<Struct>,
}

/// A value that is not null.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(json: D) -> Result<Option<T>, D::Error> {
    T::deserialize(json).map(Some)
}

/// Milliseconds since the epoch.
fn instant<'de, D: Deserializer<'de>>(json: D) -> Result<Option<Timestamp>, D::Error> {
    let instant = instant_of(i64::deserialize(json)?);
    instant.map(Some).ok_or_else(|| unlike("an instant"))
}

fn status<'de, D: Deserializer<'de>>(json: D) -> Result<i32, D::Error> {
    let status = status_of(<&str>::deserialize(json)?);
    status.map(Into::into).ok_or_else(|| unlike("a status"))
}

fn input_format<'de, D: Deserializer<'de>>(json: D) -> Result<Option<InputFormat>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Format(#[serde(with = "UsualInputFormat")] InputFormat);
    Object::deserialize(json).map(|Object(Format(format))| Some(format))
}

fn related_objects<'de, D: Deserializer<'de>>(json: D) -> Result<Vec<RelatedObject>, D::Error> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Related(#[serde(with = "UsualRelatedObject")] RelatedObject);
    let objects = Vec::deserialize(json)?.into_iter();
    Ok(objects.map(|Object(Related(object))| object).collect())
}

/// What is written as an object: serde would read a struct from an array, too.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        json.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// Lists of strings by name; none is empty, and no name occurs twice.
fn tags<'de, D: Deserializer<'de>>(json: D) -> Result<BTreeMap<String, TagValues>, D::Error> {
    struct TagsVisitor;
    impl<'de> Visitor<'de> for TagsVisitor {
        type Value = BTreeMap<String, TagValues>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tags = BTreeMap::new();
            while let Some((name, values)) = map.next_entry::<String, Vec<String>>()? {
                let is_empty = values.is_empty();
                if is_empty || tags.insert(name, TagValues { values }).is_some() {
                    return Err(unlike("tags"));
                }
            }
            Ok(tags)
        }
    }
    json.deserialize_map(TagsVisitor)
}

/// Nobody sees it: the answer is read again.
fn unlike<E: de::Error>(what: &str) -> E {
    E::custom(what)
}
