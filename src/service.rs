//! One rpc, from top to bottom: metadata and message in, checks, the REST
//! requests, and a response or a status out.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use prost::Message;
use tokio::time::Instant;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use uuid::Uuid;

use crate::{
    attempts::Attempt,
    create::{CreateCall, Creator, External},
    credentials::{self, Credentials, REQUEST_ID},
    deadline,
    early_headers::EarlyHeaders,
    flights::{Flights, SharedBy, Ticket},
    mapping,
    outcome::{Failure, Outcome, Settled, Violation},
    proto::v1::{
        CreateBatchRequest, CreateBatchResponse, GetBatchRequest, GetBatchResponse,
        ListBatchesRequest, ListBatchesResponse, batch_service_server::BatchService,
    },
    quote::Secrets,
    recent::ExternalId,
    status::{self, CallNames},
    telemetry::{CallRecord, Telemetry},
};

/// `aep.ingestion.v1.BatchService`.
#[derive(Debug)]
pub struct Gateway {
    /// Which headers calls carry.
    pub credentials: Credentials,
    /// Settles creates.
    pub creator: Arc<Creator>,
    /// Whether a call without an external id gets one.
    pub generate_external_ids: bool,
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
        let (arrived, checked) = self.arrive(request)?;
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
            Err(failure) => {
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

    async fn get_batch(
        &self,
        _: Request<GetBatchRequest>,
    ) -> Result<Response<GetBatchResponse>, Status> {
        Err(status::unknown_service())
    }

    async fn list_batches(
        &self,
        _: Request<ListBatchesRequest>,
    ) -> Result<Response<ListBatchesResponse>, Status> {
        Err(status::unknown_service())
    }
}

/// A call that can be made, or why not.
type Checked = Result<(Ticket, Arc<CreateCall>), Failure>;

/// What is known of a call, whether it can be made or not.
struct Arrived {
    record: Arc<CallRecord>,
    early_headers: EarlyHeaders,
    external_id: Option<String>,
    deadline: Option<Instant>,
}

impl Gateway {
    /// Takes a request to pieces. They end here, before the call begins: the
    /// metadata alone would be a sixth of what a call in flight takes.
    fn arrive(&self, request: Request<CreateBatchRequest>) -> Result<(Arrived, Checked), Status> {
        let (metadata, extensions, message) = request.into_parts();
        let metadata = metadata.as_ref();
        // Without them a call could not be made safely: a bug in the server.
        let (Some(record), Some(early_headers)) = (extensions.get(), extensions.get()) else {
            let names = CallNames {
                request_id: &credentials::request_id(metadata),
                external_id: None,
                time_left: None,
            };
            return Err(status::from_failure(&Failure::Panicked, names));
        };
        let mut arrived = Arrived {
            record: Arc::clone(record),
            early_headers: EarlyHeaders::clone(early_headers),
            external_id: message.external_id.clone(),
            deadline: None,
        };
        let checked = self.check(&mut arrived, metadata, message);
        Ok((arrived, checked))
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
        let key = self.key(metadata, &message, record.request_id())?;
        if let Some(Key { id, .. }) = &key {
            message.external_id = Some(id.clone());
            arrived.external_id = Some(id.clone());
        }
        let body = mapping::create_batch_json(&message).map_err(Failure::Invalid)?;
        let external = key.map(|key| External {
            id: external_id(&key.id, &headers),
            is_new: key.is_new,
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
            early_headers: arrived.early_headers.clone(),
        };
        let call = Arc::new(CreateCall {
            headers,
            body: body.into(),
            external,
            attempt: Attempt::of_call(metadata),
            deadline,
            early_headers: arrived.early_headers.clone(),
            record: record.clone(),
        });
        Ok((ticket, call))
    }

    /// What the call is known by: the external id of its message, else its
    /// metadata's key, else one of the gateway's own if that is configured.
    fn key(
        &self,
        metadata: &HeaderMap,
        message: &CreateBatchRequest,
        request_id: &HeaderValue,
    ) -> Result<Option<Key>, Failure> {
        let (id, field) = match &message.external_id {
            Some(id) if !id.is_empty() => (id.clone(), "external_id"),
            _ => match credentials::idempotency_key(metadata)? {
                Some(key) => (key, credentials::IDEMPOTENCY_KEY),
                None if self.generate_external_ids => {
                    return Ok(Some(Key::generated(metadata, message, request_id)));
                }
                None => return Ok(None),
            },
        };
        match mapping::special_character(&id) {
            Some(character) if self.creator.looks_up() => {
                let description = format!(
                    "has {character:?}, which Catalog's filters do not take literally: a batch \
                     with this id could not be looked up"
                );
                Err(Failure::Invalid(vec![Violation::new(field, &description)]))
            }
            _ => Ok(Some(Key { id, is_new: false })),
        }
    }
}

/// What a call is known by.
struct Key {
    id: String,
    /// Nobody can have used it before.
    is_new: bool,
}

impl Key {
    /// A key for a call that brings none. A mesh keeps `x-request-id` when it
    /// tries a call again (Envoy's "x-request-id"), so equal messages with the
    /// same one are the same call. Services pass the id of one request on to
    /// all calls that it leads to, so the message is a part of the key.
    fn generated(
        metadata: &HeaderMap,
        message: &CreateBatchRequest,
        request_id: &HeaderValue,
    ) -> Self {
        /// Chosen at random, once.
        const NAMESPACE: Uuid = Uuid::from_u128(0x7d1c_02b5_66a1_4d0f_9e4e_f2a1_5c3b_8d47);
        let is_callers = metadata.get(REQUEST_ID) == Some(request_id);
        let id = match is_callers {
            true => {
                let mut name = request_id.as_bytes().to_vec();
                name.push(0);
                name.extend(message.encode_to_vec());
                Uuid::new_v5(&NAMESPACE, &name)
            }
            false => credentials::new_id(),
        };
        Key {
            id: id.to_string(),
            is_new: !is_callers,
        }
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

fn answer(settled: Settled, request_id: HeaderValue) -> Response<CreateBatchResponse> {
    let mut metadata = HeaderMap::with_capacity(2);
    let outcome = HeaderValue::from_static(Outcome::Applied.as_str());
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
