//! The HTTP client as the gateway wants it: it follows no redirect, keeps no
//! cookie, decompresses nothing and repeats nothing by itself.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use clap::ValueEnum;
use reqwest::{Url, redirect};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::CertificateDer};
use rustls_platform_verifier::Verifier;
use tokio::time::Instant;
use tower::{Service, layer::layer_fn};

use crate::{proxies::Proxies, telemetry::Telemetry};

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
    /// How long opening a connection may take, TLS included.
    pub connect_timeout: Duration,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// The proxies that requests go through.
    pub proxies: Proxies,
    /// How many unused connections are kept.
    pub idle_connections: usize,
}

/// What to do where TLS has no certificate authorities.
pub const NO_TRUSTED_CA: &str = "no trusted CA certificates found for an https:// API: \
    install the system's (Debian: ca-certificates), or name some with --upstream-ca-file";

/// A client with the configuration that [`tls`] made.
pub fn client(
    options: &UpstreamOptions,
    tls: ClientConfig,
    telemetry: Arc<Telemetry>,
) -> Result<reqwest::Client, reqwest::Error> {
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
    let proxies = &options.proxies;
    client = match proxies.is_empty() {
        true => client.no_proxy(), // or the client would look for its own
        false => client.proxy(proxies.clone().for_client()),
    };
    client = match options.http {
        HttpVersion::Auto => client,
        HttpVersion::Http1 => client.http1_only(),
        HttpVersion::Http2 => client.http2_prior_knowledge(),
    };
    client.build()
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
            .inspect_err(|error| tracing::warn!(%error, "lookups will fail: {NO_TRUSTED_CA}"))
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
