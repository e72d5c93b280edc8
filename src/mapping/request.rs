//! `CreateBatchRequest` → the body of `POST /batches`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    failure::Violation,
    proto::v1::{CreateBatchRequest, InputFormat, Replay, TagValues},
};

/// The body of `POST /batches` (Batch Ingestion API reference, schema
/// `IngestBatch`; the two switches: "Partial batch ingestion").
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IngestBatch<'a> {
    dataset_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    external_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    input_format: Option<InputFormatJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<ReplayJson<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tags: BTreeMap<&'a str, &'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    enable_error_diagnostics: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partial_ingestion_percent: Option<Number>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct InputFormatJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_multi_line_json: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delimiter: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quote: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    escape: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    null_marker: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    charset: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    header: Option<bool>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ReplayJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    predecessors: &'a [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    predecessors_by_external_id: &'a [String],
}

/// A number without a fraction is written without one: `5`, as documented.
#[derive(Serialize)]
#[serde(untagged)]
enum Number {
    Whole(u8),
    Fraction(f64),
}

/// The JSON body for a request, or all that is wrong with the request.
pub fn create_batch_json(request: &CreateBatchRequest) -> Result<Vec<u8>, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut refuse = |field: &str, description: &str| {
        violations.push(Violation::new(field, description));
    };

    if request.dataset_id.is_empty() {
        refuse("dataset_id", "is required: the id of a dataset");
    }
    let percentage = request.partial_ingestion_percent;
    if percentage.is_some_and(|percentage| !(0.0..=100.0).contains(&percentage)) {
        refuse(
            "partial_ingestion_percent",
            "must be a percentage from 0 to 100",
        );
    }
    if !violations.is_empty() {
        return Err(violations);
    }

    let body = IngestBatch {
        dataset_id: &request.dataset_id,
        external_id: request.external_id.as_deref(),
        input_format: request.input_format.as_ref().map(input_format_json),
        replay: request.replay.as_ref().map(replay_json),
        tags: (request.tags.iter())
            .map(|(name, TagValues { values })| (name.as_str(), values.as_slice()))
            .collect(),
        enable_error_diagnostics: request.enable_error_diagnostics,
        partial_ingestion_percent: percentage.map(number),
    };
    #[expect(
        clippy::expect_used,
        reason = "all keys are strings, and a Vec takes any write"
    )]
    Ok(serde_json::to_vec(&body).expect("a body that can be written"))
}

fn input_format_json(format: &InputFormat) -> InputFormatJson<'_> {
    InputFormatJson {
        format: format.format.as_deref(),
        is_multi_line_json: format.is_multi_line_json,
        delimiter: format.delimiter.as_deref(),
        quote: format.quote.as_deref(),
        escape: format.escape.as_deref(),
        null_marker: format.null_marker.as_deref(),
        charset: format.charset.as_deref(),
        header: format.header,
    }
}

fn replay_json(replay: &Replay) -> ReplayJson<'_> {
    ReplayJson {
        reason: replay.reason.as_deref(),
        predecessors: &replay.predecessors,
        predecessors_by_external_id: &replay.predecessors_by_external_id,
    }
}

fn number(value: f64) -> Number {
    if value.fract() == 0.0 {
        Number::Whole(value as u8) // 0 to 100: checked above
    } else {
        Number::Fraction(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> CreateBatchRequest {
        CreateBatchRequest {
            dataset_id: "d".to_owned(),
            ..Default::default()
        }
    }

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|&value| value.to_owned()).collect()
    }

    #[test]
    fn a_request_becomes_the_documented_body() {
        let format = |format: InputFormat| CreateBatchRequest {
            input_format: Some(format),
            ..request()
        };
        let table = [
            (request(), r#"{"datasetId":"d"}"#),
            (
                CreateBatchRequest {
                    external_id: Some(String::new()),
                    ..request()
                },
                r#"{"datasetId":"d","externalId":""}"#,
            ),
            (
                format(InputFormat::default()),
                r#"{"datasetId":"d","inputFormat":{}}"#,
            ),
            (
                format(InputFormat {
                    format: Some("json".to_owned()),
                    is_multi_line_json: Some(true),
                    ..Default::default()
                }),
                r#"{"datasetId":"d","inputFormat":{"format":"json","isMultiLineJson":true}}"#,
            ),
            (
                format(InputFormat {
                    format: Some("csv".to_owned()),
                    is_multi_line_json: None,
                    delimiter: Some("\t".to_owned()),
                    quote: Some("\"".to_owned()),
                    escape: Some("\\".to_owned()),
                    null_marker: Some(String::new()),
                    charset: Some("UTF-8".to_owned()),
                    header: Some(false),
                }),
                r#"{"datasetId":"d","inputFormat":{"format":"csv","delimiter":"\t","quote":"\"","escape":"\\","nullMarker":"","charset":"UTF-8","header":false}}"#,
            ),
            (
                format(InputFormat {
                    format: Some("Parquet".to_owned()),
                    ..Default::default()
                }),
                r#"{"datasetId":"d","inputFormat":{"format":"Parquet"}}"#,
            ),
            (
                CreateBatchRequest {
                    replay: Some(Replay {
                        reason: Some("replace".to_owned()),
                        predecessors: strings(&["${batchIdA}"]),
                        predecessors_by_external_id: strings(&["$mine"]),
                        ..Default::default()
                    }),
                    ..request()
                },
                r#"{"datasetId":"d","replay":{"reason":"replace","predecessors":["${batchIdA}"],"predecessorsByExternalId":["$mine"]}}"#,
            ),
            (
                CreateBatchRequest {
                    tags: [
                        (
                            "é😀".to_owned(),
                            TagValues {
                                values: strings(&["1", "2"]),
                            },
                        ),
                        ("empty".to_owned(), TagValues::default()),
                    ]
                    .into(),
                    ..request()
                },
                r#"{"datasetId":"d","tags":{"empty":[],"é😀":["1","2"]}}"#,
            ),
            (
                CreateBatchRequest {
                    enable_error_diagnostics: Some(false),
                    partial_ingestion_percent: Some(5.0),
                    ..request()
                },
                r#"{"datasetId":"d","enableErrorDiagnostics":false,"partialIngestionPercent":5}"#,
            ),
            (
                CreateBatchRequest {
                    partial_ingestion_percent: Some(0.5),
                    ..request()
                },
                r#"{"datasetId":"d","partialIngestionPercent":0.5}"#,
            ),
        ];
        for (request, expected) in table {
            let body = create_batch_json(&request).expect("a good request");
            assert_eq!(String::from_utf8_lossy(&body), expected);
        }
    }

    #[test]
    fn all_that_is_wrong_is_named() {
        let bad = CreateBatchRequest {
            partial_ingestion_percent: Some(f64::NAN),
            ..Default::default()
        };
        let violations = create_batch_json(&bad).expect_err("a bad request");
        let fields: Vec<_> = violations.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["dataset_id", "partial_ingestion_percent"]);
        for percentage in [-0.1, 100.1, f64::INFINITY] {
            let bad = CreateBatchRequest {
                partial_ingestion_percent: Some(percentage),
                ..request()
            };
            assert!(create_batch_json(&bad).is_err(), "{percentage}");
        }
    }
}
