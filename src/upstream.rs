//! The REST client: one function for each documented call. Returns what
//! happened, in the words of [`crate::outcome`]; knows nothing of gRPC.
//!
//! Every attempt is ours: the HTTP client follows no redirect, keeps no
//! cookie, decompresses nothing and repeats nothing by itself.

pub mod error_body;
mod handover;
mod proof;
mod response;

use std::{
    error::Error,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use clap::ValueEnum;
use http::{HeaderMap, HeaderValue, Method, header};
use reqwest::{Url, redirect};
use rustix::io::Errno;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::CertificateDer};
use rustls_platform_verifier::Verifier;
use tokio::time::{Instant, error::Elapsed, timeout};
use tower::{Service, layer::layer_fn};

pub use self::handover::{Handover, Sending};
use self::response::Response;
use crate::{
    early_headers::EarlyHeaders,
    mapping::NoBatch,
    outcome::{Failure, NeverSent},
    proto::v1::Batch,
    proxies::Proxies,
    quote::Quote,
    telemetry::{CallRecord, RestCall, RestRequest, Telemetry},
};

/// How long a look-up may take.
const LOOK_UP: Duration = Duration::from_secs(5);

/// The documented members of a batch, which look-ups ask for.
const PROPERTIES: &str = "imsOrg,created,updated,started,completed,status,recordCount,\
    failedRecordCount,size,version,externalId,inputFormat,relatedObjects,tags,createdUser,\
    updatedUser,createdClient,availableDates,errors,metrics,replay,failedBatchLocation";

/// How many batches a look-up lists: Catalog's default ("Filter Catalog data
/// using query parameters"). A filter that holds lists one.
const LISTED: usize = 20;

/// How long an unused connection is kept. Short, because a request that goes
/// out on a connection which the other side is closing has an unknown outcome.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);

const USER_AGENT: &str = concat!("aep-batch-gateway/", env!("CARGO_PKG_VERSION"));

/// Which HTTP version is spoken with the API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum HttpVersion {
    /// HTTP/2 where TLS agrees on it, else HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    #[value(name = "1")]
    Http1,
    /// HTTP/2 only; without TLS by prior knowledge.
    #[value(name = "2")]
    Http2,
}

/// How the API is reached.
#[derive(Clone, Debug)]
pub struct UpstreamOptions {
    /// The base URL of the Batch Ingestion API.
    pub import_url: Url,
    /// The base URL of the Catalog API.
    pub catalog_url: Url,
    /// A certificate authority that is trusted besides the platform's.
    pub extra_ca: Vec<CertificateDer<'static>>,
    /// Which HTTP version is spoken.
    pub http: HttpVersion,
    /// How long a connection may take to come about, TLS included.
    pub connect_timeout: Duration,
    /// How long one request may take in all.
    pub request_timeout: Duration,
    /// The proxies that requests go through.
    pub proxies: Proxies,
    /// How many unused connections are kept.
    pub idle_connections: usize,
}

/// What to do where TLS has no certificate authorities.
pub const NOBODY_TRUSTED: &str = "there are no certificate authorities to trust an https:// API \
    by: install the system's (Debian: ca-certificates), or name some with --upstream-ca-file";

/// The Batch Ingestion API, and the Catalog API for look-ups.
#[derive(Clone, Debug)]
pub struct Upstream {
    client: reqwest::Client,
    batches: Url,
    catalog_batches: Url,
    /// How long one request may take in all.
    longest: Duration,
}

impl Upstream {
    /// A client with the configuration that [`tls`] made.
    pub fn new(
        options: UpstreamOptions,
        tls: ClientConfig,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, reqwest::Error> {
        let mut client = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .redirect(redirect::Policy::none())
            .referer(false)
            // With a limit of 0 the client does not even copy the request.
            .retry(reqwest::retry::never().max_retries_per_request(0))
            .connect_timeout(options.connect_timeout)
            .tls_backend_preconfigured(tls)
            .connector_layer(layer_fn(move |connector| Connector {
                connector: Arc::new(Mutex::new(connector)),
                telemetry: telemetry.clone(),
            }))
            // CDNs add many headers, and some servers write a blank before the colon. Both are
            // harmless here, while a response that is refused leaves its outcome unknown.
            .http1_max_headers(1024)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http2_max_header_list_size(256 * 1024)
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(options.idle_connections)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .http2_keep_alive_timeout(Duration::from_secs(10))
            .http2_keep_alive_while_idle(true);
        let proxies = options.proxies;
        client = match proxies.is_empty() {
            true => client.no_proxy(), // or the client would look for its own
            false => client.proxy(proxies.for_client()),
        };
        client = match options.http {
            HttpVersion::Auto => client,
            HttpVersion::Http1 => client.http1_only(),
            HttpVersion::Http2 => client.http2_prior_knowledge(),
        };
        Ok(Upstream {
            client: client.build()?,
            batches: below(options.import_url, "batches"),
            catalog_batches: below(options.catalog_url, "batches"),
            longest: options.request_timeout,
        })
    }

    /// `POST /batches` (Batch Ingestion API reference, "Create a new batch").
    ///
    /// `headers` are the call's own; `handover` tells, now and to whoever else
    /// holds it, whether the request may have been sent. `first` leaves before.
    pub async fn create_batch(
        &self,
        headers: &HeaderMap,
        body: Bytes,
        handover: &Handover,
        first: Option<&EarlyHeaders>,
        record: &Arc<CallRecord>,
    ) -> Result<Arc<Batch>, Failure> {
        let mut observed = record.request(RestCall::Create, self.batches.host_str());
        let sent = {
            let mut request = request(Method::POST, self.batches.clone(), headers);
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            *request.body_mut() = Some(reqwest::Body::wrap(handover.body(body, first)));
            self.send(request, self.longest, &mut observed)
        };
        let result = match sent.await {
            Ok(Ok(response)) => {
                let quote = Quote::without_secrets_of(headers);
                response.batch(&quote).map(Arc::new)
            }
            Ok(Err(error)) => Err(failure_of(&error, handover)),
            Err(_) if handover.revoke() => Err(Failure::NeverSent(NeverSent::ConnectTimeout)),
            Err(_) => Err(Failure::TimedOut(self.longest)),
        };
        observed.ends(&result);
        result
    }

    /// Catalog's `GET /batches?externalId=…` (Catalog Service API reference,
    /// "List batches"): the batches with this external id, the oldest first.
    ///
    /// A list proves by equality alone. It proves that there is no such batch
    /// only if it shows what it was asked for, and all of it.
    pub async fn find_batches(
        &self,
        headers: &HeaderMap,
        external_id: &str,
        record: &Arc<CallRecord>,
    ) -> Result<Vec<Batch>, Failure> {
        let mut url = self.catalog_batches.clone();
        url.query_pairs_mut()
            .append_pair("externalId", external_id)
            .append_pair("orderBy", "asc:created")
            // Unfiltered lists can reach gigabytes: both are always sent.
            .append_pair("limit", &LISTED.to_string())
            .append_pair("properties", PROPERTIES);

        let request = request(Method::GET, url, headers);
        let mut observed = record.request(RestCall::LookUp, self.catalog_batches.host_str());
        let result = match self.send(request, LOOK_UP, &mut observed).await {
            Ok(Ok(response)) => {
                let quote = Quote::without_secrets_of(headers);
                response.batches(&quote).and_then(|listed| {
                    with_external_id(listed, external_id)
                        .ok_or_else(|| response.unusable(&quote, NoBatch::OtherBatches))
                })
            }
            Ok(Err(error)) => Err(failure_of(&error, &Handover::default())),
            Err(_) => Err(Failure::TimedOut(LOOK_UP)),
        };
        observed.ends(&result);
        result
    }

    /// Sends a request, and waits for the answer, but no longer than that.
    fn send(
        &self,
        mut request: reqwest::Request,
        longest: Duration,
        observed: &mut RestRequest,
    ) -> impl Future<Output = Result<reqwest::Result<Response>, Elapsed>> + Send {
        observed.inject(request.headers_mut());
        let answering = self.client.execute(request);
        timeout(longest, async {
            let mut response = answering.await?;
            observed.answered(response.status());
            Ok(Response::read(&mut response).await)
        })
    }
}

/// How connections to the API are encrypted, for all clients: to read the
/// platform's certificate authorities takes longer than all else at the start.
/// Fails where there are none and the create API needs them.
pub fn tls(options: &UpstreamOptions) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let trusted = || Verifier::new_with_extra_roots(options.extra_ca.clone(), provider);
    let trusted = match options.proxies.need_tls(&options.import_url) {
        true => Some(trusted()?),
        false if options.proxies.need_tls(&options.catalog_url) => trusted()
            .inspect_err(|error| tracing::warn!(%error, "look-ups will fail: {NOBODY_TRUSTED}"))
            .ok(),
        false => None,
    };
    let mut tls = match trusted {
        // Dangerous, because rustls calls every verifier so but its own.
        Some(trusted) => tls
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(trusted)),
        None => tls.with_root_certificates(RootCertStore::empty()),
    }
    .with_no_client_auth();
    let protocols: &[&str] = match options.http {
        HttpVersion::Auto => &["h2", "http/1.1"],
        HttpVersion::Http1 => &["http/1.1"],
        HttpVersion::Http2 => &["h2"],
    };
    tls.alpn_protocols = protocols.iter().map(|&name| name.into()).collect();
    Ok(tls)
}

fn request(method: Method, url: Url, headers: &HeaderMap) -> reqwest::Request {
    let mut request = reqwest::Request::new(method, url);
    request.headers_mut().clone_from(headers);
    let own = request.headers_mut();
    own.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    // Without it any coding is welcome (RFC 9110, section 12.5.3), and some servers then compress.
    own.insert(
        header::ACCEPT_ENCODING,
        HeaderValue::from_static("identity"),
    );
    request
}

/// The batches of a list that have this external id; `None` where there is none
/// and the list does not prove it: it is full, or it shows batches without the
/// member that was asked for.
fn with_external_id(mut listed: Vec<Batch>, external_id: &str) -> Option<Vec<Batch>> {
    let is_answer = listed.len() < LISTED && listed.iter().all(|b| b.external_id.is_some());
    listed.retain(|batch| batch.external_id.as_deref() == Some(external_id));
    listed.sort_by_key(|batch| batch.created.map(|t| (t.seconds, t.nanos)));
    (is_answer || !listed.is_empty()).then_some(listed)
}

/// Counts connections. The HTTP client copies its connector half a dozen times
/// for each request, which is cheap with this one. Sharing it does no harm: it is
/// always ready.
#[derive(Clone)]
struct Connector<C> {
    connector: Arc<Mutex<C>>,
    telemetry: Arc<Telemetry>,
}

impl<C, To> Service<To> for Connector<C>
where
    C: Service<To>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = BoxFuture<Result<C::Response, C::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        lock(&self.connector).poll_ready(cx)
    }

    fn call(&mut self, to: To) -> Self::Future {
        let (began, telemetry) = (Instant::now(), self.telemetry.clone());
        let connecting = lock(&self.connector).call(to);
        Box::pin(async move {
            let result = connecting.await;
            telemetry.upstream_connect(result.is_ok(), began.elapsed());
            result
        })
    }
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn below(mut base: Url, name: &str) -> Url {
    if let Ok(mut path) = base.path_segments_mut() {
        path.pop_if_empty().push(name);
    }
    base
}

/// What an error means for which no status line has arrived.
fn failure_of(error: &reqwest::Error, handover: &Handover) -> Failure {
    let cause = innermost(error);
    if handover.revoke() {
        Failure::NeverSent(if has_no_file_left(error) {
            NeverSent::TooManyFiles
        } else if error.is_dns() {
            NeverSent::Dns(cause)
        } else if find::<rustls::Error>(error).is_some() {
            NeverSent::Tls(cause)
        } else if error.is_timeout() {
            NeverSent::ConnectTimeout
        } else {
            NeverSent::Connect(cause)
        })
    } else if find::<h2::Error>(error).is_some_and(is_unprocessed) {
        Failure::NeverSent(NeverSent::Unprocessed(cause))
    } else {
        Failure::ConnectionLost(cause)
    }
}

/// Whether this process, or the machine, has as many files open as it may have.
fn has_no_file_left(error: &(dyn Error + 'static)) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error())
        .map(Errno::from_raw_os_error)
        .any(|errno| errno == Errno::MFILE || errno == Errno::NFILE)
}

/// Whether the peer declared that it did not process the request (RFC 9113,
/// sections 8.7 and 6.8: REFUSED_STREAM, or a stream above GOAWAY's last one).
fn is_unprocessed(error: &h2::Error) -> bool {
    error.is_remote()
        && (error.is_go_away()
            || (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM)))
}

/// The first cause of type `T`, also inside of an `io::Error`.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

fn innermost(error: &(dyn Error + 'static)) -> String {
    // A reqwest::Error would show the URL.
    causes(error)
        .filter(|cause| !cause.is::<reqwest::Error>())
        .last()
        .map_or_else(|| "no cause is known".to_owned(), |cause| cause.to_string())
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| {
        let inside = error
            .downcast_ref::<std::io::Error>()
            .and_then(|io| io.get_ref());
        match inside {
            Some(inside) => Some(inside as &(dyn Error + 'static)),
            None => error.source(),
        }
    })
}
