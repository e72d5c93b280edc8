//! The rpcs, from top to bottom: metadata and message in, checks, the REST
//! requests, and a response or a status out.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use prost::Message;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use uuid::Uuid;

use crate::{
    api::Method,
    call::{CallContext, external_id::ExternalId, idempotency_key, request_id},
    create_batch::{BatchCreator, Create, CreatedBatch, IdempotentCreate},
    credentials::{self, Credentials},
    execution::{DedupKey, Executor},
    failure::{Effect, Failure, Kind, Violation},
    headers::REQUEST_ID,
    mapping,
    operations::read::Reader,
    proto::v1::{
        BatchOrigin, CreateBatchRequest, CreateBatchResponse, GetBatchRequest, GetBatchResponse,
        ListBatchesRequest, ListBatchesResponse, batch_service_server::BatchService,
    },
    redact::Secrets,
    status,
    telemetry::{Completion, Telemetry},
};

/// `aep.ingestion.v1.BatchService`.
#[derive(Debug)]
pub struct Gateway {
    /// Which headers calls carry.
    pub credentials: Credentials,
    /// Creates batches.
    pub creator: Arc<BatchCreator>,
    /// Reads batches.
    pub reader: Reader,
    /// Whether a call without an external id gets one.
    pub generate_external_ids: bool,
    /// The calls in flight.
    pub executor: Executor<CreatedBatch>,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
}

#[tonic::async_trait]
impl BatchService for Gateway {
    async fn create_batch(
        &self,
        request: Request<CreateBatchRequest>,
    ) -> Result<Response<CreateBatchResponse>, Status> {
        let (call, metadata, message) = split(request)?;
        let mut external_id = message.external_id.clone();
        let prepared = self.prepare_create(&call, metadata, message, &mut external_id);
        let result = match &prepared {
            Ok((create, dedup)) => {
                let operation = |send_state| {
                    let (creator, create) = (self.creator.clone(), create.clone());
                    async move { creator.create_or_find(&create, send_state).await }
                };
                self.executor.run(&call, dedup.as_ref(), operation).await
            }
            Err(failure) => Err(failure.clone()),
        };
        let completion = create_completion(&call, &result);
        let result = result.map(CreateBatchResponse::from);
        finish(&call, completion, result, external_id.as_deref())
    }

    async fn get_batch(
        &self,
        request: Request<GetBatchRequest>,
    ) -> Result<Response<GetBatchResponse>, Status> {
        self.read(request, Reader::get_batch).await
    }

    async fn list_batches(
        &self,
        request: Request<ListBatchesRequest>,
    ) -> Result<Response<ListBatchesResponse>, Status> {
        self.read(request, Reader::list_batches).await
    }
}

impl Gateway {
    /// A call that changes nothing.
    async fn read<Q, R, F: Future<Output = Result<R, Failure>>>(
        &self,
        request: Request<Q>,
        operation: impl FnOnce(Reader, CallContext, HeaderMap, Q) -> F,
    ) -> Result<Response<R>, Status> {
        let (call, metadata, message) = split(request)?;
        let headers = self.upstream_headers(&call, metadata);
        let result = match headers {
            Ok(headers) => {
                let reading = operation(self.reader.clone(), call.clone(), headers, message);
                self.executor.run_safe(&call, reading).await
            }
            Err(failure) => Err(failure),
        };
        let completion = match &result {
            Ok(_) => Completion::default(),
            Err(failure) => completion_of(failure, call.method()),
        };
        finish(&call, completion, result, None)
    }

    /// The headers that a call carries upstream.
    fn upstream_headers(
        &self,
        call: &CallContext,
        metadata: MetadataMap,
    ) -> Result<HeaderMap, Failure> {
        let mut headers = self.credentials.headers(metadata.as_ref())?;
        call.record.set_secrets(Secrets::of(&headers));
        headers.insert(REQUEST_ID, call.request_id().clone());
        Ok(headers)
    }

    /// Turns a call into a create that can be worked on. `external_id` becomes
    /// what the create is known by.
    fn prepare_create(
        &self,
        call: &CallContext,
        metadata: MetadataMap,
        mut message: CreateBatchRequest,
        external_id: &mut Option<String>,
    ) -> Result<(Arc<Create>, Option<DedupKey>), Failure> {
        let key = self.key(call, metadata.as_ref(), &message);
        let headers = self.upstream_headers(call, metadata)?;
        let key = key?;
        if let Some(Key { id, .. }) = &key {
            message.external_id = Some(id.clone());
            external_id.clone_from(&message.external_id);
        }
        let body = mapping::create_batch_json(&message).map_err(Failure::invalid)?;
        let idempotent = key.map(|key| IdempotentCreate {
            id: ExternalId::new(&key.id, &headers),
            is_new: key.is_new,
            message,
            principal: credentials::principal(&headers),
        });
        let dedup = idempotent.as_ref().map(|idempotent| DedupKey {
            external_id: idempotent.id.clone(),
            request_hash: idempotent.request_hash(&body),
        });
        let create = Create {
            call: call.clone(),
            headers,
            body: body.into(),
            idempotent,
        };
        Ok((Arc::new(create), dedup))
    }

    /// What the call is known by: the external id of its message, else its
    /// metadata's key, else one of the gateway's own if that is configured.
    fn key(
        &self,
        call: &CallContext,
        metadata: &HeaderMap,
        message: &CreateBatchRequest,
    ) -> Result<Option<Key>, Failure> {
        let (id, field) = match &message.external_id {
            Some(id) if !id.is_empty() => (id.clone(), "external_id"),
            _ => match idempotency_key::of_call(metadata)? {
                Some(key) => (key, idempotency_key::NAME),
                None if self.generate_external_ids => {
                    return Ok(Some(Key::generated(metadata, message, call.request_id())));
                }
                None => return Ok(None),
            },
        };
        match mapping::special_character(&id) {
            Some(character) if self.creator.uses_lookups() => {
                let description = format!(
                    "has {character:?}, which Catalog's filters do not take literally: a batch \
                     with this id could not be looked up"
                );
                Err(Failure::invalid(vec![Violation::new(field, &description)]))
            }
            _ => Ok(Some(Key { id, is_new: false })),
        }
    }
}

/// Splits the request, so that its metadata is dropped before the call is
/// awaited; kept, it would be a sixth of a call's memory.
fn split<T>(request: Request<T>) -> Result<(CallContext, MetadataMap, T), Status> {
    let (metadata, mut extensions, message) = request.into_parts();
    match extensions.remove() {
        Some(call) => Ok((call, metadata, message)),
        None => {
            debug_assert!(false, "the server puts a CallContext into every request");
            let failure = Failure::refused(Kind::Internal);
            Err(status::of_failure(&failure, status::About::default()))
        }
    }
}

/// What a create is known by.
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
            false => request_id::new_id(),
        };
        Key {
            id: id.to_string(),
            is_new: !is_callers,
        }
    }
}

/// How a create is told in logs, metrics and spans. The API may call anything
/// the id of a batch, a token too; in failures it is fit to be shown already.
pub fn create_completion(call: &CallContext, result: &Result<CreatedBatch, Failure>) -> Completion {
    match result {
        Ok(CreatedBatch { batch, origin }) => Completion {
            outcome: Some(Effect::Applied),
            // Where failures have their reason, batches have how they came to be known.
            reason: Some(match origin {
                BatchOrigin::Unspecified | BatchOrigin::Created => "CREATED",
                BatchOrigin::Found => "FOUND",
                BatchOrigin::Recovered => "RECOVERED",
            }),
            http_status: None,
            batch_id: Some(call.record.redactor().id(&batch.id)),
        },
        Err(failure) => completion_of(failure, call.method()),
    }
}

/// How a failed call is told in logs, metrics and spans.
pub fn completion_of(failure: &Failure, method: &Method) -> Completion {
    Completion {
        outcome: status::outcome(failure, method),
        reason: Some(failure.reason().as_str()),
        http_status: failure.http_status().map(|status| status.as_u16()),
        batch_id: failure.batch_id().map(str::to_owned),
    }
}

impl From<CreatedBatch> for CreateBatchResponse {
    fn from(created: CreatedBatch) -> Self {
        CreateBatchResponse {
            batch: Some(Arc::unwrap_or_clone(created.batch).into()),
            origin: created.origin.into(),
        }
    }
}

/// Records the result of a call, and makes its response or status. Where a
/// success changed something, it says so.
fn finish<T>(
    call: &CallContext,
    completion: Completion,
    result: Result<T, Failure>,
    external_id: Option<&str>,
) -> Result<Response<T>, Status> {
    let outcome = completion.outcome;
    call.record.complete(completion);
    let message = result.map_err(|failure| status::of_call(&failure, call, external_id))?;
    let mut metadata = HeaderMap::with_capacity(2);
    if let Some(outcome) = outcome {
        metadata.insert(status::OUTCOME, HeaderValue::from_static(outcome.as_str()));
    }
    metadata.insert(REQUEST_ID, call.request_id().clone());
    Ok(Response::from_parts(
        MetadataMap::from_headers(metadata),
        message,
        Default::default(),
    ))
}
