//! The admin listener: `/metrics`, `/livez`, `/readyz` and `/log-level`, over
//! plain HTTP.

use std::{collections::VecDeque, convert::Infallible, fmt::Write, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, task::AbortHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry::{LogLevel, Telemetry};

use super::workers::WorkerCheck;

/// The connection limit. Beyond it the oldest is closed, so that a client with many connections
/// cannot keep probes out.
const MAX_CONNECTIONS: usize = 64;

/// How long a request may take to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What the admin pages show and change.
#[derive(Clone)]
pub(super) struct Admin {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) log_level: LogLevel,
    /// The gateway drains: it is no longer ready.
    pub(super) draining: CancellationToken,
    pub(super) workers: WorkerCheck,
}

/// Serves the admin pages until the process ends.
pub(super) async fn serve(listener: TcpListener, admin: Admin) {
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let admin = admin.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let admin = admin.clone();
            async move { Ok::<_, Infallible>(admin.page(request).await) }
        });
        let connection = tokio::spawn(async move {
            // A client that disconnects is not worth a log line.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        connections.retain(|connection| !connection.is_finished());
        if connections.len() == MAX_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
        connections.push_back(connection.abort_handle());
    }
}

type Page = Response<Full<Bytes>>;

impl Admin {
    async fn page(&self, request: Request<Incoming>) -> Page {
        let method = match *request.method() {
            Method::HEAD => &Method::GET, // hyper leaves the body out
            ref method => method,
        };
        match (method, request.uri().path()) {
            (&Method::GET, "/metrics") => self.metrics(request.headers().get(header::ACCEPT)),
            // Liveness never depends on the API: a restart would not help.
            (&Method::GET, "/livez") => match self.workers.all_respond().await {
                true => text(StatusCode::OK, "ok"),
                false => text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "a worker thread does not respond",
                ),
            },
            (&Method::GET, "/readyz") if self.draining.is_cancelled() => {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining")
            }
            (&Method::GET, "/readyz") => text(StatusCode::OK, "ok"),
            (&Method::GET, "/log-level") => text(StatusCode::OK, &self.log_level.get()),
            (&Method::PUT, "/log-level") => self.set_log_level(request).await,
            _ => text(
                StatusCode::NOT_FOUND,
                "Use GET or HEAD on /metrics, /livez, /readyz or /log-level, or PUT on /log-level.",
            ),
        }
    }

    fn metrics(&self, accept: Option<&HeaderValue>) -> Page {
        let metrics = self.telemetry.encode();
        let accept = accept.and_then(|accept| accept.to_str().ok());
        match accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
            true => page(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                metrics,
            ),
            false => page(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                to_text_format(&metrics),
            ),
        }
    }

    async fn set_log_level(&self, request: Request<Incoming>) -> Page {
        const MAX_FILTER: usize = 4096;
        let filter = Limited::new(request.into_body(), MAX_FILTER).collect();
        let filter = match timeout(REQUEST_TIMEOUT, filter).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return text(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the filter did not arrive"),
        };
        let filter = String::from_utf8_lossy(&filter);
        match self.log_level.set(filter.trim()) {
            Ok(()) => {
                tracing::info!(log_level = self.log_level.get(), "log level changed");
                text(StatusCode::OK, &self.log_level.get())
            }
            Err(problem) => text(StatusCode::BAD_REQUEST, &problem),
        }
    }
}

fn text(status: StatusCode, line: &str) -> Page {
    page(status, "text/plain; charset=utf-8", format!("{line}\n"))
}

fn page(status: StatusCode, kind: &'static str, text: String) -> Page {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// Text format 0.0.4: names in comments as in the samples, and no exemplars. New Relic's
/// nri-prometheus and Metricbeat's `prometheus` module ask for it alone and cannot parse
/// OpenMetrics: "unknown metric type info" (newrelic/nri-prometheus#317, elastic/beats#24554).
fn to_text_format(metrics: &str) -> String {
    let mut text = String::with_capacity(metrics.len());
    let mut help = "";
    for line in metrics.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            // The name depends on the type, in the next line.
            ["#", "HELP", _, text] => help = text,
            ["#", "TYPE", name, kind] => {
                let (name, kind) = match kind {
                    "counter" => (format!("{name}_total"), kind),
                    "info" => (format!("{name}_info"), "gauge"),
                    _ => (name.to_owned(), kind),
                };
                let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            }
            ["#", ..] => {}
            _ => {
                text.push_str(line.split(" # {").next().unwrap_or_default());
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format_has_its_own_names_and_no_exemplars() {
        let metrics = "\
# HELP a Some calls.
# TYPE a counter
a_total{b=\"c\"} 1
# HELP s_seconds Time.
# TYPE s_seconds histogram
# UNIT s_seconds seconds
s_seconds_bucket{le=\"0.1\"} 1 # {trace_id=\"x\"} 0.05
# HELP build The build.
# TYPE build info
build_info{version=\"1\"} 1
# EOF
";
        assert_eq!(
            to_text_format(metrics),
            "\
# HELP a_total Some calls.
# TYPE a_total counter
a_total{b=\"c\"} 1
# HELP s_seconds Time.
# TYPE s_seconds histogram
s_seconds_bucket{le=\"0.1\"} 1
# HELP build_info The build.
# TYPE build_info gauge
build_info{version=\"1\"} 1
"
        );
    }
}
