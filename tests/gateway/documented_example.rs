//! The example of the documentation that this project was created from:
//! "Create a batch" in the Catalog guide.

use aep_batch_gateway::proto::v1::{
    Batch, BatchStatus, CreateBatchRequest, InputFormat, RelatedObject, TagValues,
};
use prost_types::Timestamp;

use crate::support::{CREDENTIALS, Gateway, Scripted};

const ANSWER: &str = r#"{
    "id": "5d01230fc78a4e4f8c0c6b387b4b8d1c",
    "imsOrg": "{ORG_ID}",
    "updated": 1552694873602,
    "status": "loading",
    "created": 1552694873602,
    "relatedObjects": [
        {
            "type": "dataSet",
            "id": "5c8c3c555033b814b69f947f"
        }
    ],
    "version": "1.0.0",
    "tags": {
        "acp_producer": [
            "{CREATED_CLIENT}"
        ],
        "acp_stagePath": [
            "{CREATED_CLIENT}/stage/5d01230fc78a4e4f8c0c6b387b4b8d1c"
        ],
        "use_plan_b_batch_status": [
            "false"
        ]
    },
    "createdUser": "{CREATED_BY}",
    "updatedUser": "{CREATED_BY}",
    "externalId": "5d01230fc78a4e4f8c0c6b387b4b8d1c",
    "createdClient": "{CREATED_CLIENT}",
    "inputFormat": {
        "format": "parquet"
    }
}"#;

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn tag(name: &str, value: &str) -> (String, TagValues) {
    let values = vec![value.to_owned()];
    (name.to_owned(), TagValues { values })
}

#[tokio::test]
async fn the_documented_request_gets_the_documented_answer() {
    let headers = [("content-type", "application/json")];
    let upstream = Scripted::answering("201 Created", &headers, ANSWER).await;
    let gateway = Gateway::start(&upstream.url(), &[]).await;

    let batch = gateway
        .create(CreateBatchRequest {
            dataset_id: "5c8c3c555033b814b69f947f".to_owned(),
            ..Default::default()
        })
        .await
        .unwrap();

    let moment = Some(Timestamp {
        seconds: 1_552_694_873,
        nanos: 602_000_000,
    });
    let expected = Batch {
        id: "5d01230fc78a4e4f8c0c6b387b4b8d1c".to_owned(),
        ims_org: text("{ORG_ID}"),
        created: moment,
        updated: moment,
        status: BatchStatus::Loading.into(),
        related_objects: vec![RelatedObject {
            r#type: text("dataSet"),
            id: text("5c8c3c555033b814b69f947f"),
            ..Default::default()
        }],
        version: text("1.0.0"),
        tags: [
            tag("acp_producer", "{CREATED_CLIENT}"),
            tag(
                "acp_stagePath",
                "{CREATED_CLIENT}/stage/5d01230fc78a4e4f8c0c6b387b4b8d1c",
            ),
            tag("use_plan_b_batch_status", "false"),
        ]
        .into(),
        created_user: text("{CREATED_BY}"),
        updated_user: text("{CREATED_BY}"),
        external_id: text("5d01230fc78a4e4f8c0c6b387b4b8d1c"),
        created_client: text("{CREATED_CLIENT}"),
        input_format: Some(InputFormat {
            format: text("parquet"),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(batch, expected);

    let requests = upstream.requests();
    let [request] = requests.as_slice() else {
        panic!("one request: {requests:?}");
    };
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, r#"{"datasetId":"5c8c3c555033b814b69f947f"}"#);

    let mut lines = head.split("\r\n");
    assert_eq!(
        lines.next(),
        Some("POST /data/foundation/import/batches HTTP/1.1")
    );
    let mut headers: Vec<_> = lines.map(|line| line.split_once(": ").unwrap()).collect();
    headers.retain(|(name, value)| match *name {
        "host" => !value.starts_with("127.0.0.1:"),
        "x-request-id" => value.len() != 36,
        _ => true,
    });
    headers.sort();
    let version = concat!("aep-batch-gateway/", env!("CARGO_PKG_VERSION"));
    let mut documented = vec![
        ("accept", "application/json"),
        ("accept-encoding", "identity"),
        ("content-length", "40"),
        ("content-type", "application/json"),
        ("user-agent", version),
    ];
    documented.extend(CREDENTIALS);
    documented.sort();
    assert_eq!(headers, documented);
}
