//! Answers that the documentation contradicts: the call succeeds and nothing
//! is lost.

use aep_batch_gateway::proto::v1::BatchStatus;
use aep_simulator::Fault;
use prost_types::{Timestamp, value::Kind};

use crate::support::{Gateway, Scripted, request, simulator};

#[tokio::test]
async fn an_answer_with_the_types_of_the_api_s_published_description() {
    // The types of the description's own examples, not of its schemas.
    let answer = r#"{
        "id": "01EQ1C48TR4GD4FE7NH2522TCQ",
        "created": "2022-11-09T18:45:31.256Z",
        "status": "active",
        "recordCount": 57,
        "size": "1,342,576",
        "errors": [{"code": 405, "rows": ["13-26"], "description": "HTTP 405"}],
        "availableDates": {"startDate": "2022-12-09T18:45:31.256Z"},
        "metrics": [{"failedRecordCount": "0,"}],
        "tags": [{"acme_workflow": ["BufferedPromotionWorkflow"]}],
        "inputFormat": {"format": "CSV", "header": "true"},
        "new": {"number": 9007199254740993}
    }"#;
    let upstream = Scripted::answering("201", &[], answer).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;
    let batch = gateway.create(request()).await.unwrap();

    let created = Timestamp {
        seconds: 1_668_019_531,
        nanos: 256_000_000,
    };
    assert_eq!(batch.created, Some(created));
    assert_eq!(batch.status(), BatchStatus::Active);
    assert_eq!(batch.size, Some(1_342_576));
    assert_eq!(batch.errors[0].code.as_deref(), Some("405"));
    assert_eq!(
        batch.tags["acme_workflow"].values,
        ["BufferedPromotionWorkflow"]
    );
    assert_eq!(batch.input_format.as_ref().unwrap().header, Some(true));
    let extra = batch.extra.unwrap().fields;
    assert_eq!(extra.keys().collect::<Vec<_>>(), ["metrics", "new"]);
    let Some(Kind::StructValue(new)) = &extra["new"].kind else {
        panic!("{extra:?}");
    };
    let digits = Kind::StringValue("9007199254740993".to_owned());
    assert_eq!(new.fields["number"].kind, Some(digits));
}

#[tokio::test]
async fn the_form_that_catalog_documents() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    upstream.inject(Fault::CatalogResponse);
    let batch = gateway.create(request()).await.unwrap();
    assert_eq!(batch.id, upstream.batches()[0]["id"].as_str().unwrap());
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_bounded() {
    let upstream = simulator().await;
    let gateway = Gateway::start(&upstream.import_url(), &[]).await;
    upstream.inject(Fault::HugeResponse);
    let answer = gateway.raw(&[]).await;
    assert_eq!(answer.outcome(), "APPLIED");
    let id = upstream.batches()[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.info("batchId"), Some(id));
}

#[tokio::test]
async fn the_largest_answer_fits_into_what_clients_take() {
    // Numbers grow most on their way into protobuf, most of all where they stand twice.
    let numbers = "0,".repeat(128 * 1024 - 40);
    for answer in [
        format!(r#"{{"id":"b","x":[{numbers}0]}}"#),
        format!(r#"{{"id":"b","metrics":0,"metrics":{{"a":[{numbers}0]}}}}"#),
        format!(r#"{{"id":"b","relatedObjects":[0,{{"metrics":{{"a":[{numbers}0]}}}}]}}"#),
    ] {
        let upstream = Scripted::answering("201", &[], &answer).await;
        let gateway = Gateway::start(&upstream.url(), &[]).await;
        let batch = gateway.create(request()).await.unwrap();
        assert_eq!(batch.id, "b");
    }
}
