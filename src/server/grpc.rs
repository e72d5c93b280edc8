//! One request → the gRPC service that it is for.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::Arc,
};

use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codec::CompressionEncoding, server::NamedService};
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use super::{
    answer,
    observed::{Received, Sent},
    web::Web,
    writes::Writes,
};
use crate::{
    certificates::Peer,
    early_headers::EarlyHeaders,
    proto::{DESCRIPTOR_SET, v1::batch_service_server::BatchServiceServer},
    service::Gateway,
    status,
    telemetry::{self, Call, Telemetry},
};

/// The most that a request message may have. Messages that are still arriving
/// are held in memory, for each stream of each connection.
const LARGEST_MESSAGE: usize = 256 * 1024;

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
    web: Option<Arc<Web>>,
    draining: CancellationToken,
}

impl GrpcServices {
    pub(super) fn new(
        gateway: Gateway,
        health: HealthReporter,
        with_reflection: bool,
        web: Option<Arc<Web>>,
        draining: CancellationToken,
    ) -> Result<Self, tonic_reflection::server::Error> {
        let telemetry = gateway.telemetry.clone();
        let batches = BatchServiceServer::new(gateway)
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(LARGEST_MESSAGE);
        let health = HealthServer::new(HealthService::from_health_reporter(health));
        let mut others = vec![other(health)];
        if with_reflection {
            others.push(other(reflection().build_v1()?));
            // Older grpcurl and Postman know this version only.
            others.push(other(reflection().build_v1alpha()?));
        }
        Ok(GrpcServices {
            batches,
            others: others.into(),
            telemetry,
            web,
            draining,
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
            return at_once(answer::refuse(StatusCode::METHOD_NOT_ALLOWED));
        }
        if !is_grpc(&request) {
            return at_once(answer::refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        let (service, method) = split_path(request.uri().path());
        if service == Batches::NAME {
            let (method, client) = (telemetry::Method::of(method), peer.identity.clone());
            let call = self.telemetry.call(method, request.headers(), client);
            return self.answer_batch_call(connection, request, call);
        }
        if !peer.allowed {
            let identity = peer.identity.as_deref();
            return at_once(status::client_not_allowed(identity, None).into_http());
        }
        match self.others.iter().find(|(name, _)| *name == service) {
            Some((_, other)) => {
                let answering = other.clone().oneshot(request);
                Box::pin(async {
                    let Ok(response) = answering.await;
                    response
                })
            }
            None => at_once(status::unknown_service().into_http()),
        }
    }

    fn answer_batch_call(
        &self,
        connection: &Connection,
        mut request: Request<Body>,
        call: Call,
    ) -> Answer {
        let peer = &connection.peer;
        let record = call.record().clone();
        if !peer.allowed {
            record.refused(&status::CLIENT_NOT_ALLOWED);
            let (identity, id) = (peer.identity.as_deref(), record.request_id());
            let refusal: Response<Body> =
                status::client_not_allowed(identity, Some(id)).into_http();
            return at_once(refusal.map(|body| Body::new(Sent { body, call })));
        }
        let (early_headers, writes) = (EarlyHeaders::default(), connection.writes.clone());
        request.extensions_mut().insert(record.clone());
        request.extensions_mut().insert(early_headers.clone());
        let request = request.map(|body| Received {
            body,
            record: record.clone(),
        });
        let mut answering = self.batches.clone().call(request);
        Box::pin(async move {
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
            response.map(|body| Body::new(Sent { body, call }))
        })
    }
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
        let answering = match services.web.clone() {
            Some(web) => {
                let for_connection = for_connection.clone();
                Box::pin(async move {
                    let (services, connection) = &*for_connection;
                    web.answer(request, |call| services.answer(connection, call))
                        .await
                })
            }
            None => services.answer(connection, request),
        };
        Box::pin(async move {
            let mut response = answering.await;
            if for_connection.0.draining.is_cancelled() {
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

/// tonic itself takes any content type, which would let a web page make calls.
fn is_grpc(request: &Request<Body>) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let kind = content_type.and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    matches!(kind, Some([] | [b'+' | b';', ..]))
}

/// `/package.Service/Method` → service and method.
fn split_path(path: &str) -> (&str, &str) {
    path.strip_prefix('/')
        .and_then(|path| path.split_once('/'))
        .unwrap_or_default()
}
