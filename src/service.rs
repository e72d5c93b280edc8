//! One rpc, from top to bottom: metadata and message in, checks, the REST
//! requests, and a response or a status out.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    attempts::Attempt,
    create::{CreateCall, Creator, External},
    credentials::{self, Credentials, REQUEST_ID},
    deadline,
    flights::{Commit, Flights, SharedBy, Ticket},
    mapping,
    outcome::{Failure, Outcome, Settled},
    proto::v1::{CreateBatchRequest, CreateBatchResponse, batch_service_server::BatchService},
    quote::{Quote, Secrets},
    recent::ExternalId,
    status::{self, CallNames},
    telemetry::{CallRecord, Method, Telemetry},
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
    pub telemetry: Arc<Telemetry>,
}

#[tonic::async_trait]
impl BatchService for Gateway {
    async fn create_batch(
        &self,
        request: Request<CreateBatchRequest>,
    ) -> Result<Response<CreateBatchResponse>, Status> {
        let (arrived, checked) = self.arrive(request);
        let result = match &checked {
            Ok((ticket, call)) => {
                let settle = |sending| {
                    let (creator, call) = (self.creator.clone(), call.clone());
                    async move { creator.settle(&call, sending).await }
                };
                self.flights.ride(ticket, settle).await
            }
            Err(failure) => Err(failure.clone()),
        };

        let record = &arrived.record;
        record.create_ended(&result);
        match result {
            Ok(settled) => Ok(answer(settled, record.request_id().clone())),
            Err(mut failure) => {
                show_ids(&mut failure, record.quote());
                let call = CallNames {
                    request_id: record.request_id(),
                    external_id: arrived.external_id.as_deref(),
                    time_left: arrived
                        .deadline
                        .map(|deadline| deadline.saturating_duration_since(Instant::now())),
                };
                Err(status::from_failure(&failure, call))
            }
        }
    }
}

/// A call that can be made, or why not.
type Checked = Result<(Ticket, Arc<CreateCall>), Failure>;

/// What is known of a call, whether it can be made or not.
struct Arrived {
    record: Arc<CallRecord>,
    commit: Commit,
    external_id: Option<String>,
    deadline: Option<Instant>,
}

impl Gateway {
    /// Takes a request to pieces. They end here, before the call begins: the
    /// metadata alone would be a sixth of what a call in flight takes.
    fn arrive(&self, request: Request<CreateBatchRequest>) -> (Arrived, Checked) {
        let (metadata, extensions, message) = request.into_parts();
        let metadata = metadata.as_ref();
        let record = extensions.get::<Arc<CallRecord>>().cloned();
        let mut arrived = Arrived {
            record: record.unwrap_or_else(|| self.record(metadata)),
            commit: extensions.get().cloned().unwrap_or_default(),
            external_id: message.external_id.clone().filter(|id| !id.is_empty()),
            deadline: None,
        };
        let checked = self.check(&mut arrived, metadata, message);
        (arrived, checked)
    }

    /// For a call that came another way than through the server.
    fn record(&self, metadata: &HeaderMap) -> Arc<CallRecord> {
        let call = self.telemetry.call(Method::CreateBatch, metadata, None);
        call.record().clone()
    }

    /// Turns what has arrived into a call that can be made.
    fn check(
        &self,
        arrived: &mut Arrived,
        metadata: &HeaderMap,
        mut message: CreateBatchRequest,
    ) -> Checked {
        let record = &arrived.record;
        let deadline = deadline::of_call(metadata, record.started())?;
        arrived.deadline = deadline;
        let mut headers = self.credentials.headers(metadata)?;
        record.keeps_secret(Secrets::of(&headers));
        if arrived.external_id.is_none()
            && let Some(key) = credentials::idempotency_key(metadata)?
        {
            message.external_id = Some(key.clone());
            arrived.external_id = Some(key);
        }
        let body = mapping::create_batch_json(&message).map_err(Failure::Invalid)?;
        let external = arrived.external_id.as_deref().map(|id| External {
            id: external_id(id, &headers),
            message,
            caller: credentials::fingerprint(&headers),
        });
        headers.insert(REQUEST_ID, record.request_id().clone());

        let ticket = Ticket {
            record: record.clone(),
            shared: external.as_ref().map(|external| SharedBy {
                external_id: external.id.clone(),
                purpose: credentials::purpose(external.caller, &body),
            }),
            deadline,
            commit: arrived.commit.clone(),
        };
        let call = Arc::new(CreateCall {
            headers,
            body: body.into(),
            external,
            attempt: Attempt::of_call(metadata),
            deadline,
            record: record.clone(),
        });
        Ok((ticket, call))
    }
}

/// An external id counts within its organization and sandbox.
fn external_id(id: &str, headers: &HeaderMap) -> ExternalId {
    let header = |name| {
        headers
            .get(name)
            .map_or(Vec::new(), |v: &HeaderValue| v.as_bytes().to_vec())
    };
    let [_, _, organization, sandbox] = &credentials::NAMES;
    ExternalId {
        organization: header(organization),
        sandbox: header(sandbox),
        id: id.to_owned(),
    }
}

/// The API may call anything the id of a batch, a token too.
fn show_ids(failure: &mut Failure, quote: Quote<'_>) {
    match failure {
        Failure::ExternalIdTaken { batch_id } => *batch_id = quote.id(batch_id),
        Failure::Unusable(answer) => {
            answer.batch_id = answer.batch_id.as_deref().map(|id| quote.id(id))
        }
        Failure::LookUp(look_up) => show_ids(&mut look_up.cause, quote),
        _ => {}
    }
}

fn answer(settled: Settled, request_id: HeaderValue) -> Response<CreateBatchResponse> {
    let mut metadata = HeaderMap::with_capacity(2);
    let outcome = HeaderValue::from_static(Outcome::Created.as_str());
    metadata.insert(status::OUTCOME, outcome);
    metadata.insert(REQUEST_ID, request_id);
    let message = CreateBatchResponse {
        batch: Some(Arc::unwrap_or_clone(settled.batch).into()),
        origin: settled.origin.into(),
    };
    Response::from_parts(
        MetadataMap::from_headers(metadata),
        message,
        Default::default(),
    )
}
