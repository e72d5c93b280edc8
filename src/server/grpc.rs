//! One request → the gRPC service that it is for.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::Arc,
};

use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts,
};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codec::CompressionEncoding, server::NamedService};
use tonic_health::{pb::health_server::HealthServer, server::HealthReporter};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use super::{
    answer,
    arrival::{self, Bounds, LARGEST_MESSAGE, Open, Refusal},
    health::Health,
    observed::Sent,
    web::Web,
    writes::Writes,
};
use crate::{
    certificates::Peer,
    credentials::{self, Credentials},
    early_headers::EarlyHeaders,
    proto::{DESCRIPTOR_SET, v1::batch_service_server::BatchServiceServer},
    service::Gateway,
    status,
    telemetry::{self, Call, Telemetry},
};

/// The most that a question about the schema may have.
const LARGEST_QUESTION: usize = 4 * 1024;

/// Tells an Envoy that checks health to send no more calls here, before its next
/// check would.
const HEALTH_CHECK_FAIL: HeaderName =
    HeaderName::from_static("x-envoy-immediate-health-check-fail");

type Batches = BatchServiceServer<Gateway>;
type OtherService = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// The gRPC services of this server.
pub(super) struct GrpcServices {
    batches: Batches,
    /// Health and reflection, by name.
    others: Arc<[(&'static str, OtherService)]>,
    telemetry: Arc<Telemetry>,
    credentials: Arc<Credentials>,
    options: Options,
}

/// What is there besides the services themselves.
pub(super) struct Options {
    pub(super) with_reflection: bool,
    pub(super) web: Option<Arc<Web>>,
    pub(super) bounds: Bounds,
    /// No longer ready.
    pub(super) draining: CancellationToken,
    /// Streams that would last for ever end.
    pub(super) ending: CancellationToken,
}

impl GrpcServices {
    pub(super) fn new(
        gateway: Gateway,
        health: HealthReporter,
        options: Options,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let telemetry = gateway.telemetry.clone();
        let credentials = Arc::new(gateway.credentials.clone());
        let batches = BatchServiceServer::new(gateway)
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(LARGEST_MESSAGE);
        let health = HealthServer::new(Health::new(health, options.ending.clone()));
        let mut others = vec![other(health)];
        if options.with_reflection {
            let v1 = reflection().build_v1()?;
            others.push(other(v1.max_decoding_message_size(LARGEST_QUESTION)));
            // Older grpcurl and Postman know this version only.
            let v1alpha = reflection().build_v1alpha()?;
            others.push(other(v1alpha.max_decoding_message_size(LARGEST_QUESTION)));
        }
        Ok(GrpcServices {
            batches,
            others: others.into(),
            telemetry,
            credentials,
            options,
        })
    }

    /// The services for one connection.
    pub(super) fn for_connection(
        self: Arc<Self>,
        peer: Peer,
        writes: Arc<Writes>,
    ) -> ServicesForConnection {
        ServicesForConnection(Arc::new((self, Connection { peer, writes })))
    }

    /// Takes a request to pieces now, so that only little waits until it is answered.
    fn answer(&self, connection: &Connection, request: Request<Body>) -> Answer {
        let peer = &connection.peer;
        if request.method() != Method::POST {
            return at_once(answer::refuse(
                StatusCode::METHOD_NOT_ALLOWED,
                "This is a gRPC server: every call is a POST.\n",
            ));
        }
        if !is_grpc(&request) {
            return at_once(answer::refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "This is a gRPC server: the content type must be application/grpc or \
                 application/grpc+proto. gRPC-Web needs --grpc-web.\n",
            ));
        }
        let (service, method) = split_path(request.uri().path());
        if service == Batches::NAME {
            let (method, client) = (telemetry::Method::of(method), peer.identity.clone());
            let call = self.telemetry.call(method, request.headers(), client);
            return self.answer_batch_call(connection, request, method, call);
        }
        if !peer.authorized {
            let identity = peer.identity.as_deref();
            return at_once(status::client_not_allowed(identity, None).into_http());
        }
        match self.others.iter().find(|(name, _)| *name == service) {
            Some((name, other)) => self.answer_other(name, other.clone(), request),
            None => at_once(status::unknown_service().into_http()),
        }
    }

    fn answer_batch_call(
        &self,
        connection: &Connection,
        request: Request<Body>,
        method: telemetry::Method,
        call: Call,
    ) -> Answer {
        let peer = &connection.peer;
        let record = call.record().clone();
        if !peer.authorized {
            record.refused(&status::CLIENT_NOT_ALLOWED);
            let (identity, id) = (peer.identity.as_deref(), record.request_id());
            let refusal = status::client_not_allowed(identity, Some(id)).into_http();
            return at_once(sent(refusal, Some(call), None));
        }
        let (mut head, body) = request.into_parts();
        let mut open = match self.options.bounds.open(&head.headers) {
            Ok(open) => open,
            Err(refusal) => {
                let refusal = answer::of_refusal(refusal, record.request_id(), Some(&record));
                return at_once(sent(refusal, Some(call), None));
            }
        };
        let (early_headers, writes) = (EarlyHeaders::default(), connection.writes.clone());
        head.extensions.insert(record.clone());
        head.extensions.insert(early_headers.clone());
        let (mut batches, credentials) = (self.batches.clone(), self.credentials.clone());
        // If not, tonic says why, and needs no message for that.
        let has_message =
            method == telemetry::Method::CreateBatch && arrival::can_read(&head.headers);
        Box::pin(async move {
            let mut message = Full::default();
            if has_message {
                let check = || credentials.headers(&head.headers).map(drop);
                let received = |bytes| record.received(bytes);
                let arrived =
                    arrival::message(body, &head, &mut open, record.started(), received, check);
                message = match arrived.await {
                    Ok(message) => message,
                    Err(refusal) => {
                        let id = record.request_id();
                        let refusal = answer::of_refusal(refusal, id, Some(&record));
                        return sent(refusal, Some(call), None);
                    }
                };
            }
            let mut answering = batches.call(Request::from_parts(head, message));
            let response = tokio::select! {
                biased;
                Ok(response) = &mut answering => answer::shape(response, &record),
                () = early_headers.requested() => {
                    let written = async move {
                        writes.all_left().await;
                        early_headers.set_written();
                    };
                    answer::begin(answering, Box::pin(written), record)
                }
            };
            sent(response, Some(call), Some(open))
        })
    }

    /// A call of health or reflection.
    fn answer_other(&self, name: &str, other: OtherService, request: Request<Body>) -> Answer {
        let (head, body) = request.into_parts();
        let refuse = |refusal: Refusal, head: &Parts| {
            let id = credentials::request_id(&head.headers);
            answer::of_refusal(refusal, &id, None)
        };
        let mut open = match self.options.bounds.open_other(&head.headers) {
            Ok(open) => open,
            Err(refusal) => return at_once(refuse(refusal, &head)),
        };
        let has_one_message = name == HealthServer::<Health>::NAME;
        Box::pin(async move {
            let mut message = body;
            if has_one_message {
                let begin = Instant::now();
                let arrived = arrival::message(message, &head, &mut open, begin, |_| {}, || Ok(()));
                message = match arrived.await {
                    Ok(message) => Body::new(message),
                    Err(refusal) => return refuse(refusal, &head),
                };
            }
            let Ok(response) = other.oneshot(Request::from_parts(head, message)).await;
            sent(response, None, Some(open))
        })
    }
}

fn sent(response: Response<Body>, call: Option<Call>, open: Option<Open>) -> Response<Body> {
    response.map(|body| {
        Body::new(Sent {
            body,
            call,
            _open: open,
        })
    })
}

/// An answer to come. Thousands of calls may wait for theirs.
type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

fn at_once(response: Response<Body>) -> Answer {
    Box::pin(ready(response))
}

/// What the calls of a connection have in common.
struct Connection {
    /// Who is at its other end.
    peer: Peer,
    writes: Arc<Writes>,
}

/// [`GrpcServices`] for one connection.
pub(super) struct ServicesForConnection(Arc<(Arc<GrpcServices>, Connection)>);

impl hyper::service::Service<Request<Incoming>> for ServicesForConnection {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let for_connection = self.0.clone();
        let (services, connection) = &*self.0;
        let request = request.map(Body::new);
        let answering = match services.options.web.clone() {
            Some(web) => {
                let for_connection = for_connection.clone();
                Box::pin(async move {
                    let (services, connection) = &*for_connection;
                    web.answer(request, |call| services.answer(connection, call))
                        .await
                })
            }
            None if request.version() != Version::HTTP_2 => at_once(answer::refuse(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "This is a gRPC server: it speaks HTTP/2, without TLS by prior knowledge. \
                 gRPC-Web over HTTP/1.1 needs --grpc-web.\n",
            )),
            None => services.answer(connection, request),
        };
        Box::pin(async move {
            let mut response = answering.await;
            if for_connection.0.options.draining.is_cancelled() {
                let headers = response.headers_mut();
                headers.insert(HEALTH_CHECK_FAIL, HeaderValue::from_static("true"));
            }
            Ok(response)
        })
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

fn other<S>(service: S) -> (&'static str, OtherService)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    (S::NAME, BoxCloneSyncService::new(service))
}

/// tonic itself takes any content type, which would let a web page make calls, and would
/// take another message format for protobuf.
fn is_grpc(request: &Request<Body>) -> bool {
    is_one_of(request, &["application/grpc", "application/grpc+proto"])
}

/// Whether a request's content type is one of these, with or without parameters.
pub(super) fn is_one_of(request: &Request<Body>, kinds: &[&str]) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kinds.iter().any(|known| kind.eq_ignore_ascii_case(known))
}

/// `/package.Service/Method` → service and method.
fn split_path(path: &str) -> (&str, &str) {
    path.strip_prefix('/')
        .and_then(|path| path.split_once('/'))
        .unwrap_or_default()
}
