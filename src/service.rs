//! One rpc, from top to bottom: metadata and message in, checks, the REST
//! request, and a response or a status out.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    credentials::{self, Credentials, REQUEST_ID},
    deadline,
    in_flight::InFlight,
    mapping,
    outcome::{Failure, Outcome},
    proto::v1::{
        Batch, CreateBatchRequest, CreateBatchResponse, batch_service_server::BatchService,
    },
    status::{self, CallNames},
    telemetry::Metrics,
    upstream::{Handover, Upstream},
};

/// `aep.ingestion.v1.BatchService`.
#[derive(Debug)]
pub struct Gateway {
    /// Which headers calls carry.
    pub credentials: Credentials,
    /// The REST API.
    pub upstream: Upstream,
    /// The creates under way.
    pub in_flight: InFlight,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl BatchService for Gateway {
    async fn create_batch(
        &self,
        request: Request<CreateBatchRequest>,
    ) -> Result<Response<CreateBatchResponse>, Status> {
        let arrived = Instant::now();
        let (metadata, _, message) = request.into_parts();
        let metadata = metadata.as_ref();
        let request_id = credentials::request_id(metadata);

        let result = self.create(metadata, &request_id, &message, arrived).await;

        let shown_id = request_id.to_str().unwrap_or_default();
        self.metrics.create(shown_id, arrived.elapsed(), &result);
        match result {
            Ok(batch) => Ok(created(batch, request_id)),
            Err(failure) => {
                let call = CallNames {
                    request_id: &request_id,
                    external_id: message.external_id.as_deref(),
                };
                Err(status::from_failure(&failure, call))
            }
        }
    }
}

impl Gateway {
    async fn create(
        &self,
        metadata: &HeaderMap,
        request_id: &HeaderValue,
        message: &CreateBatchRequest,
        arrived: Instant,
    ) -> Result<Batch, Failure> {
        let deadline = deadline::of_call(metadata, arrived)?;
        let mut headers = self.credentials.headers(metadata)?;
        headers.insert(REQUEST_ID, request_id.clone());
        let body = mapping::create_batch_json(message).map_err(Failure::Invalid)?;

        let handover = Handover::default();
        let create = {
            let (upstream, handover) = (self.upstream.clone(), handover.clone());
            async move { upstream.create_batch(headers, body, &handover).await }
        };
        (self.in_flight)
            .run(request_id.clone(), handover, deadline, create)
            .await
    }
}

fn created(batch: Batch, request_id: HeaderValue) -> Response<CreateBatchResponse> {
    let mut metadata = HeaderMap::with_capacity(2);
    let outcome = HeaderValue::from_static(Outcome::Created.as_str());
    metadata.insert(status::OUTCOME, outcome);
    metadata.insert(REQUEST_ID, request_id);
    let message = CreateBatchResponse { batch: Some(batch) };
    Response::from_parts(
        MetadataMap::from_headers(metadata),
        message,
        Default::default(),
    )
}
