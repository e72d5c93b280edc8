//! One rpc, from top to bottom: metadata and message in, checks, the REST
//! requests, and a response or a status out.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    attempts::Attempt,
    create::{CreateCall, Creator},
    credentials::{self, Credentials, REQUEST_ID},
    deadline,
    flights::{Commit, Flights, Ticket},
    mapping,
    outcome::{Failure, Outcome, Settled},
    proto::v1::{CreateBatchRequest, CreateBatchResponse, batch_service_server::BatchService},
    recent::ExternalId,
    status::{self, CallNames},
    telemetry::Metrics,
};

/// `aep.ingestion.v1.BatchService`.
#[derive(Debug)]
pub struct Gateway {
    /// Which headers calls carry.
    pub credentials: Credentials,
    /// Settles creates.
    pub creator: Arc<Creator>,
    /// The calls under way.
    pub flights: Flights,
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
        let (metadata, extensions, mut message) = request.into_parts();
        let metadata = metadata.as_ref();
        let commit = extensions.get::<Commit>().cloned().unwrap_or_default();
        let request_id = credentials::request_id(metadata);

        let call = Arrived {
            metadata,
            request_id: &request_id,
            at: arrived,
            commit,
        };
        let result = self.create(call, &mut message).await;

        let shown_id = request_id.to_str().unwrap_or_default();
        self.metrics.create(shown_id, arrived.elapsed(), &result);
        match result {
            Ok(settled) => Ok(answer(settled, request_id)),
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

/// What a call says besides its message.
struct Arrived<'a> {
    metadata: &'a HeaderMap,
    request_id: &'a HeaderValue,
    at: Instant,
    commit: Commit,
}

impl Gateway {
    async fn create(
        &self,
        arrived: Arrived<'_>,
        message: &mut CreateBatchRequest,
    ) -> Result<Settled, Failure> {
        let (metadata, request_id) = (arrived.metadata, arrived.request_id);
        let deadline = deadline::of_call(metadata, arrived.at)?;
        let mut headers = self.credentials.headers(metadata)?;
        if message.external_id.as_deref().is_none_or(str::is_empty)
            && let Some(key) = credentials::idempotency_key(metadata)?
        {
            message.external_id = Some(key);
        }
        let body = mapping::create_batch_json(message).map_err(Failure::Invalid)?;
        let external_id = external_id(message, &headers);
        let caller = credentials::fingerprint(&headers);
        headers.insert(REQUEST_ID, request_id.clone());

        let ticket = Ticket {
            request_id: request_id.clone(),
            purpose: credentials::purpose(caller, &body),
            external_id: external_id.clone(),
            deadline,
            commit: arrived.commit,
        };
        let call = Arc::new(CreateCall {
            headers,
            message: message.clone(),
            body: body.into(),
            external_id,
            attempt: Attempt::of_call(metadata),
            caller,
            deadline,
        });
        self.flights
            .ride(&ticket, |sending| {
                let (creator, call) = (self.creator.clone(), call.clone());
                async move { creator.settle(&call, sending).await }
            })
            .await
    }
}

/// An external id counts within its organization and sandbox.
fn external_id(message: &CreateBatchRequest, headers: &HeaderMap) -> Option<ExternalId> {
    let id = message.external_id.clone().filter(|id| !id.is_empty())?;
    let header = |name| {
        headers
            .get(name)
            .map_or(Vec::new(), |v: &HeaderValue| v.as_bytes().to_vec())
    };
    let [_, _, organization, sandbox] = credentials::NAMES;
    Some(ExternalId {
        organization: header(organization),
        sandbox: header(sandbox),
        id,
    })
}

fn answer(settled: Settled, request_id: HeaderValue) -> Response<CreateBatchResponse> {
    let mut metadata = HeaderMap::with_capacity(2);
    let outcome = HeaderValue::from_static(Outcome::Created.as_str());
    metadata.insert(status::OUTCOME, outcome);
    metadata.insert(REQUEST_ID, request_id);
    let message = CreateBatchResponse {
        batch: Some(settled.batch),
        origin: settled.origin.into(),
    };
    Response::from_parts(
        MetadataMap::from_headers(metadata),
        message,
        Default::default(),
    )
}
