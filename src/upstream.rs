//! The REST client: one function for each documented call. Returns what
//! happened, in the words of [`crate::failure`]; knows nothing of gRPC.

mod catalog;
pub mod error_body;
mod ingestion;
mod proof;
mod response;
mod send_guard;

use std::{error::Error, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, header};
use reqwest::Url;
use rustix::io::Errno;
use rustls::ClientConfig;
use tokio::{
    sync::Semaphore,
    time::{error::Elapsed, timeout},
};

use self::response::Response;
pub use self::{response::MAX_READ_BYTES, send_guard::SendGuard};
use crate::{
    api::{Route, Safety},
    call::CallContext,
    failure::{Failure, Kind, NotSent},
    http_client::{self, UpstreamOptions},
    redact::Redactor,
    telemetry::{Telemetry, UpstreamRequest},
};

/// The Batch Ingestion API, and the Catalog API.
#[derive(Clone, Debug)]
pub struct Upstream {
    client: reqwest::Client,
    batches: Url,
    catalog_batches: Url,
    /// How long one request may take.
    request_timeout: Duration,
    /// What responses to reads may take of [`MAX_READ_BYTES`].
    read_bytes: Arc<Semaphore>,
}

impl Upstream {
    /// A client with the configuration that [`http_client::tls`] made.
    pub fn new(
        options: &UpstreamOptions,
        tls: ClientConfig,
        telemetry: Arc<Telemetry>,
        read_bytes: Arc<Semaphore>,
    ) -> Result<Self, reqwest::Error> {
        Ok(Upstream {
            client: http_client::client(options, tls, telemetry)?,
            batches: below(&options.import_url, "batches"),
            catalog_batches: below(&options.catalog_url, "batches"),
            request_timeout: options.request_timeout,
            read_bytes,
        })
    }

    /// Sends a request that changes nothing, and reads its response.
    async fn read<T>(
        &self,
        call: &CallContext,
        headers: &HeaderMap,
        (route, url): (Route, Url),
        longest: Duration,
        read: impl FnOnce(&Response, &Redactor<'_>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut observed = call.record.request(route, url.host_str());
        let request = request(Method::GET, url, headers);
        let sent = self.send(request, Safety::Safe, longest, &mut observed);
        let result = match sent.await {
            Ok(Ok(mut response)) => {
                let result = read(&response, &Redactor::without_secrets_of(headers));
                if result.is_ok() {
                    call.record.hold(response.held.take()); // until the caller has it
                }
                result
            }
            Ok(Err(error)) => Err(failure_of(&error, !error.is_connect(), Failure::transient)),
            Err(_) => Err(Failure::transient(Kind::UpstreamTimeout(longest))),
        };
        observed.completed(&result);
        result
    }

    /// Sends a request, and waits for the response, but no longer than that.
    fn send(
        &self,
        mut request: reqwest::Request,
        safety: Safety,
        longest: Duration,
        observed: &mut UpstreamRequest,
    ) -> impl Future<Output = Result<reqwest::Result<Response>, Elapsed>> + Send {
        observed.inject(request.headers_mut());
        let response = self.client.execute(request);
        let read_bytes = self.read_bytes.clone();
        timeout(longest, async move {
            let mut response = response.await?;
            observed.responded(response.status());
            Ok(Response::read(&mut response, safety, &read_bytes).await)
        })
    }
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

fn below(base: &Url, name: &str) -> Url {
    let mut url = base.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().push(name);
    }
    url
}

/// What an error means for which no status line has arrived. `lost` says what
/// it means that a request was sent and has no response.
fn failure_of(error: &reqwest::Error, may_be_sent: bool, lost: fn(Kind) -> Failure) -> Failure {
    if !may_be_sent {
        not_sent(error)
    } else if is_unprocessed(error) {
        Failure::transient(Kind::NotSent(NotSent::Unprocessed(innermost(error))))
    } else {
        lost(Kind::ConnectionLost(innermost(error)))
    }
}

/// What an error means for a request of which nothing was sent.
fn not_sent(error: &reqwest::Error) -> Failure {
    let cause = innermost(error);
    Failure::transient(Kind::NotSent(if has_no_file_left(error) {
        NotSent::TooManyFiles
    } else if error.is_dns() {
        NotSent::Dns(cause)
    } else if find::<rustls::Error>(error).is_some() {
        NotSent::Tls(cause)
    } else if error.is_timeout() {
        NotSent::ConnectTimeout
    } else {
        NotSent::Connect(cause)
    }))
}

/// Whether this process, or the machine, has as many files open as are allowed.
fn has_no_file_left(error: &(dyn Error + 'static)) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error())
        .map(Errno::from_raw_os_error)
        .any(|errno| errno == Errno::MFILE || errno == Errno::NFILE)
}

/// Whether the peer declared that it did not process the request (RFC 9113,
/// sections 8.7 and 6.8: REFUSED_STREAM, or a stream above GOAWAY's last one).
fn is_unprocessed(error: &reqwest::Error) -> bool {
    find::<h2::Error>(error).is_some_and(|error| {
        error.is_remote()
            && (error.is_go_away()
                || (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM)))
    })
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
