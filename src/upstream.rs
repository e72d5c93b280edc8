//! The REST client: one function for each documented call. Returns what
//! happened, in the words of [`crate::outcome`]; knows nothing of gRPC.
//!
//! Every attempt is ours: the HTTP client follows no redirect, keeps no
//! cookie, decompresses nothing and repeats nothing by itself.

pub mod error_body;
mod handover;

use std::{
    error::Error,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use reqwest::{Proxy, Response, Url, redirect};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::CertificateDer};
use rustls_platform_verifier::Verifier;
use tokio::time::{Instant, error::Elapsed, timeout};
use tower::{Service, layer::layer_fn};

pub use self::handover::{Handover, Sending};
use crate::{
    credentials::REQUEST_ID,
    mapping::{self, NoBatch},
    outcome::{ApiError, Failure, NeverSent, Refusal, UnusableAnswer},
    proto::v1::Batch,
    proxies::Proxies,
    quote::Quote,
    telemetry::{CallRecord, RestCall, RestRequest, Telemetry},
};

/// The most that is read of a 2xx answer. A list of numbers grows eleven times
/// on its way into protobuf when it stands in a field and in `extra`, and gRPC
/// clients take 4 MiB by default.
const LARGEST_ANSWER: usize = 256 * 1024;

/// The most that is read of an error.
const LARGEST_ERROR: usize = 64 * 1024;

/// How long a look-up may take.
const LOOK_UP: Duration = Duration::from_secs(5);

/// The documented members of a batch, which look-ups ask for.
const PROPERTIES: &str = "imsOrg,created,updated,started,completed,status,recordCount,\
    failedRecordCount,size,version,externalId,inputFormat,relatedObjects,tags,createdUser,\
    updatedUser,createdClient,availableDates,errors,metrics,replay";

/// How much of an unusable answer is quoted, in bytes.
const QUOTED: usize = 512;

/// How long an unused connection is kept. Short, because a request that goes
/// out on a connection which the other side is closing has an unknown outcome.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);

const USER_AGENT: &str = concat!("aep-batch-gateway/", env!("CARGO_PKG_VERSION"));

/// Which HTTP version is spoken with the API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/2 where TLS agrees on it, else HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only; without TLS by prior knowledge.
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

impl UpstreamOptions {
    /// Whether TLS is spoken on the way to this URL.
    fn needs_tls(&self, url: &Url) -> bool {
        let proxy = self.proxies.of(url).map(|proxy| proxy.url());
        [Some(url), proxy]
            .into_iter()
            .flatten()
            .any(|url| url.scheme() == "https")
    }
}

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
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(options.idle_connections)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .http2_keep_alive_timeout(Duration::from_secs(10))
            .http2_keep_alive_while_idle(true);
        let proxies = options.proxies;
        client = match proxies.is_empty() {
            true => client.no_proxy(), // or the client would look for its own
            false => client.proxy(Proxy::custom(move |url| {
                proxies.of(url).map(|proxy| proxy.url().clone())
            })),
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
    /// holds it, whether the request may have been sent.
    pub async fn create_batch(
        &self,
        headers: &HeaderMap,
        body: Bytes,
        handover: &Handover,
        record: &Arc<CallRecord>,
    ) -> Result<Arc<Batch>, Failure> {
        let mut observed = record.request(RestCall::Create, self.batches.host_str());
        let sent = {
            let mut request = request(Method::POST, self.batches.clone(), headers);
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            *request.body_mut() = Some(reqwest::Body::wrap(handover.body(body)));
            self.send(request, self.longest, &mut observed)
        };
        let result = match sent.await {
            Ok(Ok(answer)) => {
                let quote = Quote::without_secrets_of(headers);
                answer.outcome(&quote, |body| mapping::batch_from_json(body).map(Arc::new))
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
            .append_pair("limit", "2")
            .append_pair("properties", PROPERTIES);

        let request = request(Method::GET, url, headers);
        let mut observed = record.request(RestCall::LookUp, self.catalog_batches.host_str());
        let result = match self.send(request, LOOK_UP, &mut observed).await {
            Ok(Ok(answer)) => {
                let quote = Quote::without_secrets_of(headers);
                answer.outcome(&quote, mapping::batches_from_json)
            }
            Ok(Err(error)) => Err(failure_of(&error, &Handover::default())),
            Err(_) => Err(Failure::TimedOut(LOOK_UP)),
        };
        observed.ends(&result);
        let mut batches = result?;
        // Should Catalog ever ignore the filter, it lists other batches.
        batches.retain(|batch| {
            batch
                .external_id
                .as_deref()
                .is_none_or(|id| id == external_id)
        });
        batches.sort_by_key(|batch| batch.created.map(|t| (t.seconds, t.nanos)));
        Ok(batches)
    }

    /// Sends a request, and waits for the answer, but no longer than that.
    fn send(
        &self,
        mut request: reqwest::Request,
        longest: Duration,
        observed: &mut RestRequest,
    ) -> impl Future<Output = Result<reqwest::Result<Answer>, Elapsed>> + Send {
        observed.inject(request.headers_mut());
        let answering = self.client.execute(request);
        timeout(longest, async {
            let mut response = answering.await?;
            observed.answered(response.status());
            Ok(Answer::of(&mut response).await)
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
    let trusted = match options.needs_tls(&options.import_url) {
        true => Some(trusted()?),
        false if options.needs_tls(&options.catalog_url) => trusted()
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
    let json = HeaderValue::from_static("application/json");
    request.headers_mut().clone_from(headers);
    request.headers_mut().insert(header::ACCEPT, json);
    request
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

/// An answer as it came.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    /// As much of it as is read of such an answer.
    body: Vec<u8>,
    end: BodyEnd,
}

enum BodyEnd {
    Complete,
    TooLarge,
    Broken,
}

impl Answer {
    async fn of(response: &mut Response) -> Self {
        let status = response.status();
        let headers = mem::take(response.headers_mut());
        let mut body = Vec::new();
        let largest = match status.is_success() {
            true => LARGEST_ANSWER,
            false => LARGEST_ERROR,
        };
        let end = loop {
            if status.is_redirection() {
                break BodyEnd::Complete; // it says nothing
            }
            match response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() > largest => {
                    body.extend_from_slice(&chunk[..largest - body.len()]);
                    break BodyEnd::TooLarge;
                }
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => break BodyEnd::Complete,
                Err(_) => break BodyEnd::Broken,
            }
        };
        Answer {
            status,
            headers,
            body,
            end,
        }
    }

    /// What happened is decided by the status; the body, even half of one, only
    /// explains.
    fn outcome<T>(
        self,
        quote: &Quote<'_>,
        read: impl FnOnce(&[u8]) -> Result<T, NoBatch>,
    ) -> Result<T, Failure> {
        let Answer {
            status,
            headers,
            body,
            end,
        } = self;
        if status.is_redirection() {
            let host = redirect_host(&headers, quote);
            return Err(Failure::Redirected { status, host });
        }
        let request_id = || header_text(&headers, &REQUEST_ID, quote);
        if !status.is_success() {
            let error = match body.is_empty() {
                true => ApiError::default(),
                false => error_body::read(&body, quote),
            };
            return Err(Failure::Refused(Box::new(Refusal {
                status,
                error,
                retry_after: retry_after(&headers),
                request_id: request_id(),
            })));
        }
        let problem = match end {
            BodyEnd::Complete => match read(&body) {
                Ok(answer) => return Ok(answer),
                Err(no_batch) => no_batch.to_string(),
            },
            BodyEnd::TooLarge => format!("is larger than {LARGEST_ANSWER} bytes"),
            BodyEnd::Broken => "is incomplete".to_owned(),
        };
        let location = header_text(&headers, &header::LOCATION, quote);
        let batch_id = location.as_deref().and_then(batch_id_of).map(str::to_owned);
        Err(Failure::Unusable(Box::new(UnusableAnswer {
            status,
            problem,
            beginning: quote.bytes(&body[..body.len().min(4 * QUOTED)], QUOTED),
            location,
            batch_id,
            request_id: request_id(),
        })))
    }
}

/// What an error means for which no status line has arrived.
fn failure_of(error: &reqwest::Error, handover: &Handover) -> Failure {
    let cause = innermost(error);
    if handover.revoke() {
        Failure::NeverSent(if error.is_dns() {
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

/// `Retry-After`: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let delay = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(value)
            .ok()?
            .duration_since(std::time::SystemTime::now())
            .unwrap_or_default(),
    };
    Some(delay.min(LONGEST))
}

fn header_text(
    headers: &HeaderMap,
    name: &header::HeaderName,
    quote: &Quote<'_>,
) -> Option<String> {
    Some(quote.bytes(headers.get(name)?.as_bytes(), QUOTED))
}

fn redirect_host(headers: &HeaderMap, quote: &Quote<'_>) -> Option<String> {
    let location = header_text(headers, &header::LOCATION, quote)?;
    Some(Url::parse(&location).ok()?.host_str()?.to_owned())
}

/// `…/batches/{id}` → `{id}`.
fn batch_id_of(location: &str) -> Option<&str> {
    let (_, id) = location.split_once("/batches/")?;
    let id = id.split(['?', '#']).next()?.trim_end_matches('/');
    (!id.is_empty() && !id.contains('/')).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_in_both_forms() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", value.parse().expect("a value"));
            retry_after(&headers)
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("99999999999"), Some(Duration::from_secs(86400)));
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = std::time::SystemTime::now() + Duration::from_secs(60);
        let delay = of(&httpdate::fmt_http_date(soon)).expect("a date");
        assert!((58..=60).contains(&delay.as_secs()), "{delay:?}");
        for odd in ["", "-1", "soon"] {
            assert_eq!(of(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_batch_id_in_a_location() {
        for (location, id) in [
            ("/data/foundation/catalog/batches/5d01", Some("5d01")),
            ("https://host/batches/5d01/?x=1", Some("5d01")),
            ("/batches/", None),
            ("/batches/5d01/files", None),
            ("/other", None),
        ] {
            assert_eq!(batch_id_of(location), id, "{location}");
        }
    }
}
