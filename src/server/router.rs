//! Routes a request to its gRPC service, and makes its [`CallContext`].

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::Arc,
};

use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, codec::CompressionEncoding, server::NamedService};
use tonic_health::{pb::health_server::HealthServer, server::HealthReporter};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use super::{
    arrival::{self, Bounds, MAX_MESSAGE, Open, Refusal},
    body::CountedResponse,
    grpc_web::Web,
    health::Health,
    response,
    writes::Writes,
};
use crate::{
    api::Method as Rpc,
    call::{CallContext, deadline, request_id},
    certificates::Peer,
    credentials::Credentials,
    failure::{Failure, Kind, Reason},
    proto::{DESCRIPTOR_SET, v1::batch_service_server::BatchServiceServer},
    service::Gateway,
    status::{self, About},
    telemetry::{Call, Telemetry},
};

/// The largest request message of reflection, in bytes.
const MAX_REFLECTION_MESSAGE: usize = 4 * 1024;

/// Makes an Envoy with active health checks stop sending calls at once, not after its next check.
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

/// What the services of all workers share.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) with_reflection: bool,
    pub(super) web: Option<Arc<Web>>,
    pub(super) bounds: Bounds,
    /// The gateway drains: it is no longer ready, but still serves calls.
    pub(super) draining: CancellationToken,
    /// Ends endless streams.
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
            .max_decoding_message_size(MAX_MESSAGE);
        let health = HealthServer::new(Health::new(health, options.ending.clone()));
        let mut others = vec![other(health)];
        if options.with_reflection {
            let v1 = reflection().build_v1()?;
            others.push(other(v1.max_decoding_message_size(MAX_REFLECTION_MESSAGE)));
            // Older grpcurl and Postman know this version only.
            let v1alpha = reflection().build_v1alpha()?;
            others.push(other(
                v1alpha.max_decoding_message_size(MAX_REFLECTION_MESSAGE),
            ));
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

    /// Splits a request now, so that only what is needed is kept until there is a response.
    fn route(&self, connection: &Connection, request: Request<Body>) -> ResponseFuture {
        let peer = &connection.peer;
        if request.method() != Method::POST {
            return at_once(response::not_grpc(
                StatusCode::METHOD_NOT_ALLOWED,
                "This is a gRPC server: every call is a POST.\n",
            ));
        }
        if !is_grpc(&request) {
            return at_once(response::not_grpc(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "This is a gRPC server: the content type must be application/grpc or \
                 application/grpc+proto. gRPC-Web needs --grpc-web.\n",
            ));
        }
        let (service, method) = split_path(request.uri().path());
        if service == Batches::NAME {
            let method = Rpc::named(method);
            return self.call_batch_service(connection, request, method);
        }
        if !peer.authorized {
            return at_once(refused(&not_allowed(peer), &request));
        }
        match self.others.iter().find(|(name, _)| *name == service) {
            Some((name, other)) => self.call_other(name, other.clone(), request),
            None => {
                let unknown = "The service is not known".to_owned();
                let failure = Failure::refused(Kind::RefusedByServer(Reason::Unsupported, unknown));
                at_once(refused(&failure, &request))
            }
        }
    }

    fn call_batch_service(
        &self,
        connection: &Connection,
        request: Request<Body>,
        method: &'static Rpc,
    ) -> ResponseFuture {
        let (mut head, body) = request.into_parts();
        let (id, client) = (
            request_id::of_call(&head.headers),
            connection.peer.identity.clone(),
        );
        let counted = self.telemetry.call(method, id, &head.headers, client);
        let record = counted.record().clone();
        let deadline = deadline::of_call(&head.headers, record.started());
        let known_deadline = deadline.as_ref().ok().copied().flatten();
        let call = CallContext::new(record, &head.headers, known_deadline);
        let opened = deadline.and_then(|_| match connection.peer.authorized {
            true => self.options.bounds.open(&head.headers),
            false => Err(not_allowed(&connection.peer)),
        });
        let mut open = match opened {
            Ok(open) => open,
            Err(failure) => {
                return at_once(counting(
                    response::refused(&failure, &call),
                    Some(counted),
                    None,
                ));
            }
        };
        head.extensions.insert(call.clone());
        let (mut batches, credentials) = (self.batches.clone(), self.credentials.clone());
        let writes = connection.writes.clone();
        // Otherwise tonic refuses the call, which needs no message.
        let has_message = method.is_known() && arrival::can_read(&head.headers);
        Box::pin(async move {
            let mut message = Full::default();
            if has_message {
                let check = || credentials.headers(&head.headers).map(drop);
                let received = |bytes| call.record.received(bytes);
                let times = (call.record.started(), call.deadline);
                let arrived = arrival::message(body, &head, &mut open, times, received, check);
                message = match arrived.await {
                    Ok(message) => message,
                    Err(Refusal::Failed(failure)) => {
                        let refusal = response::refused(&failure, &call);
                        return counting(refusal, Some(counted), None);
                    }
                    // Most likely nobody receives it: counted as cancelled, like every call
                    // without a response.
                    Err(Refusal::Gone) => {
                        let refusal = status::of_call(&ended_early(), &call, None).into_http();
                        return counting(refusal, Some(counted), None);
                    }
                };
            }
            let mut pending = batches.call(Request::from_parts(head, message));
            let early_headers = call.early_headers.clone();
            let response = tokio::select! {
                biased;
                Ok(response) = &mut pending => response::finalize(response, &call),
                () = early_headers.requested() => {
                    let written = async move {
                        writes.all_written().await;
                        early_headers.set_written();
                    };
                    response::early(pending, Box::pin(written), call)
                }
            };
            counting(response, Some(counted), Some(open))
        })
    }

    /// A call of health or reflection.
    fn call_other(
        &self,
        name: &str,
        other: OtherService,
        request: Request<Body>,
    ) -> ResponseFuture {
        let begin = Instant::now();
        let deadline = deadline::of_call(request.headers(), begin);
        let bounds = &self.options.bounds;
        let opened = deadline.and_then(|d| Ok((d, bounds.open_other(request.headers())?)));
        let (deadline, mut open) = match opened {
            Ok(opened) => opened,
            Err(failure) => return at_once(refused(&failure, &request)),
        };
        let has_one_message = name == HealthServer::<Health>::NAME;
        Box::pin(async move {
            let (head, mut message) = request.into_parts();
            if has_one_message {
                let times = (begin, deadline);
                let arrived = arrival::message(message, &head, &mut open, times, |_| {}, || Ok(()));
                message = match arrived.await {
                    Ok(message) => Body::new(message),
                    Err(refusal) => {
                        let failure = match refusal {
                            Refusal::Failed(failure) => failure,
                            Refusal::Gone => ended_early(),
                        };
                        return refused(&failure, &Request::from_parts(head, ()));
                    }
                };
            }
            let Ok(response) = other.oneshot(Request::from_parts(head, message)).await;
            counting(response, None, Some(open))
        })
    }
}

/// The response to a call of another service that was refused before it saw it.
fn refused<B>(failure: &Failure, request: &Request<B>) -> Response<Body> {
    let id = request_id::of_call(request.headers());
    let about = About {
        request_id: Some(&id),
        ..About::default()
    };
    status::of_failure(failure, about).into_http()
}

fn not_allowed(peer: &Peer) -> Failure {
    let message = match peer.identity.as_deref() {
        Some(name) => format!(
            "The client certificate names {name}: it must name one of --tls-allowed-clients, and \
             no other"
        ),
        None => "The client certificate names no URI and no host".to_owned(),
    };
    Failure::refused(Kind::RefusedByServer(Reason::ClientNotAllowed, message))
}

fn ended_early() -> Failure {
    let message = "The request ended early".to_owned();
    Failure::refused(Kind::RefusedByServer(Reason::InvalidFraming, message))
}

fn counting(response: Response<Body>, call: Option<Call>, open: Option<Open>) -> Response<Body> {
    response.map(|body| {
        Body::new(CountedResponse {
            body,
            call,
            _open: open,
        })
    })
}

/// A pending response. Boxed: thousands of calls may wait for theirs.
type ResponseFuture = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;

fn at_once(response: Response<Body>) -> ResponseFuture {
    Box::pin(ready(response))
}

/// What the calls of a connection share.
struct Connection {
    /// The client.
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
        let pending = match services.options.web.clone() {
            Some(web) => {
                let for_connection = for_connection.clone();
                Box::pin(async move {
                    let (services, connection) = &*for_connection;
                    web.respond(request, |call| services.route(connection, call))
                        .await
                })
            }
            None if request.version() != Version::HTTP_2 => at_once(response::not_grpc(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "This is a gRPC server: it needs HTTP/2, without TLS by prior knowledge. \
                 gRPC-Web over HTTP/1.1 needs --grpc-web.\n",
            )),
            None => services.route(connection, request),
        };
        Box::pin(async move {
            let mut response = pending.await;
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

/// tonic accepts any content type, which would let web pages make calls, and would parse other
/// message formats as protobuf.
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
