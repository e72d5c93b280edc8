//! Any bytes as the response to `POST /batches`, and to Catalog's `GET /batches`
//! and `GET /batches/{id}`.
#![no_main]

use aep_batch_gateway::{
    mapping::{batch_from_json, batch_with_id, batches_from_json},
    proto::v1::{Batch, BatchOrigin, CreateBatchResponse},
};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use serde_json::Value;

fuzz_target!(|body: &[u8]| {
    let text = String::from_utf8_lossy(body);
    let json = serde_json::from_str(text.trim_start_matches('\u{feff}'));
    // `None` also where serde_json reads less than the gateway, such as 1e400.
    let object = match &json {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    };

    let batch = batch_from_json(body);
    let id = object.and_then(|object| object.get("id"));
    if id.is_some_and(|id| !id.is_null() && id != "") {
        assert!(batch.is_ok(), "an answer with an id was refused");
    }
    if let Ok(batch) = batch {
        assert!(!batch.id.is_empty());
        can_be_sent(batch, body.len());
    }

    let batches = batches_from_json(body);
    let is_map = |(id, batch): (&String, &Value)| !id.is_empty() && batch.is_object();
    if object.is_some_and(|object| object.iter().all(is_map)) {
        assert!(batches.is_ok(), "a map of batches was refused");
    }
    for (number, batch) in batches.into_iter().flatten().enumerate() {
        if number < 4 {
            let found = batch_with_id(body, &batch.id).expect("a batch of the list");
            assert_eq!(found.expect("a batch of the list").id, batch.id);
        }
        can_be_sent(batch, body.len());
    }
});

/// gRPC clients take 4 MiB by default, and the gateway takes answers of
/// 256 KiB: protobuf may have 16 bytes for each byte of an answer. Asked of
/// every answer, so that small inputs show what a large one would do.
fn can_be_sent(batch: Batch, length: usize) {
    const FIXED: usize = 512;
    let response = CreateBatchResponse {
        batch: Some(Box::new(batch)),
        origin: BatchOrigin::Created.into(),
    };
    let bytes = response.encode_to_vec();
    assert!(
        bytes.len() <= 16 * length + FIXED,
        "{length} bytes of JSON became {} of protobuf",
        bytes.len()
    );
    // Fails for more than 100 levels of messages.
    let decoded = CreateBatchResponse::decode(bytes.as_slice()).expect("what was encoded");
    assert!(decoded == response, "protobuf lost something");
}
