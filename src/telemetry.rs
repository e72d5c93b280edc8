//! What operators see of the gateway: metrics, log lines and traces. No
//! credential and no text from upstream is in any of them; no dataset,
//! organization or batch is in a label.

mod access;
mod b3;
mod call;
mod log_queue;
mod logs;
mod metrics;
mod process;
mod throttle;
mod trace;
mod upstream_request;

use std::{fmt::Write, ops::Range, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue};
use opentelemetry_sdk::trace::SdkTracer;
use prometheus_client::{encoding::text, registry::Registry};

use self::metrics::{Metrics, ReasonLabel, ResultLabel};
pub use self::{
    call::{Call, CallRecord, Completion},
    log_queue::write_last_lines,
    logs::{LogFilter, LogFormat, LogLevel, start_logs},
    throttle::Throttle,
    trace::Tracing,
    upstream_request::UpstreamRequest,
};
use crate::{api::Method, failure::Failure, proto::v1::Batch};

/// The service whose calls are counted.
const BATCH_SERVICE: &str = crate::proto::v1::batch_service_server::SERVICE_NAME;

/// What is counted and traced in this process.
#[derive(Debug)]
pub struct Telemetry {
    metrics: Metrics,
    registry: Registry,
    tracer: Option<SdkTracer>,
    log_format: LogFormat,
}

impl Default for Telemetry {
    /// Without traces.
    fn default() -> Self {
        Self::new(None, LogFormat::Text)
    }
}

impl Telemetry {
    /// All at zero. Without a tracer, traces are only passed on.
    pub fn new(tracer: Option<SdkTracer>, log_format: LogFormat) -> Self {
        let mut registry = Registry::default();
        Telemetry {
            metrics: Metrics::new(&mut registry),
            registry,
            tracer,
            log_format,
        }
    }

    /// The Prometheus text format (OpenMetrics).
    pub fn encode(&self) -> String {
        let mut page = String::new();
        if text::encode(&mut page, &self.registry).is_err() {
            page.clear();
            let _ = writeln!(page, "# EOF");
        }
        page
    }

    /// A call begins. `client`: the identity in the caller's certificate.
    pub fn call(
        self: &Arc<Self>,
        method: &'static Method,
        request_id: HeaderValue,
        headers: &HeaderMap,
        client: Option<Arc<str>>,
    ) -> Call {
        Call::begin(self.clone(), method, request_id, headers, client)
    }

    /// How many calls may be in flight.
    pub fn set_max_in_flight(&self, most: usize) {
        self.metrics.max_in_flight.set(most as i64);
    }

    /// A call is worked on, until what this returns is dropped.
    pub fn execution_in_flight(self: &Arc<Self>) -> ExecutionInFlight {
        self.metrics.executions_in_flight.inc();
        ExecutionInFlight(self.clone())
    }

    /// Counts a lookup.
    pub fn lookup(&self, found: &Result<Vec<Batch>, Failure>) {
        let result = match found {
            Ok(batches) if batches.is_empty() => "nothing",
            Ok(_) => "found",
            Err(_) => "failed",
        };
        let lookups = &self.metrics.lookups;
        lookups.get_or_create(&ResultLabel { result }).inc();
    }

    /// Counts a request that is sent again.
    pub fn retry(&self) {
        self.metrics.retries.inc();
    }

    /// Counts a connection to the API that was opened, or could not be.
    pub fn upstream_connect(&self, ok: bool, took: Duration) {
        let result = if ok { "ok" } else { "failed" };
        let connects = &self.metrics.connects;
        connects.get_or_create(&ResultLabel { result }).inc();
        self.metrics.connect_seconds.observe(took.as_secs_f64());
    }

    /// How many connections of callers may be open.
    pub fn set_max_connections(&self, most: usize) {
        self.metrics.max_connections.set(most as i64);
    }

    /// Counts a caller's connection, which is open until what this returns is
    /// dropped.
    pub fn connection(self: &Arc<Self>) -> OpenConnection {
        self.metrics.accepted_connections.inc();
        self.metrics.connections.inc();
        OpenConnection(self.clone())
    }

    /// Counts a connection that is closed before it has made a call: `limit`,
    /// `silent` or `tls`.
    pub fn connection_refused(&self, reason: &'static str) {
        let refused = &self.metrics.refused_connections;
        refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// From when to when the certificate in force holds, in Unix seconds.
    pub fn tls_validity(&self, validity: &Range<i64>) {
        let metrics = &self.metrics;
        metrics
            .tls_not_before
            .get_or_create(&[])
            .set(validity.start);
        metrics.tls_not_after.get_or_create(&[]).set(validity.end);
    }

    /// Counts an attempt to use changed certificates.
    pub fn tls_reload(&self, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        let reloads = &self.metrics.tls_reloads;
        reloads.get_or_create(&ResultLabel { result }).inc();
    }

    /// Says whether the gateway is ready.
    pub fn set_ready(&self, ready: bool) {
        self.metrics.ready.set(ready.into());
    }
}

/// A call that is worked on.
#[derive(Debug)]
pub struct ExecutionInFlight(Arc<Telemetry>);

impl Drop for ExecutionInFlight {
    fn drop(&mut self) {
        self.0.metrics.executions_in_flight.dec();
    }
}

/// A caller's connection that has not ended.
#[derive(Debug)]
pub struct OpenConnection(Arc<Telemetry>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}
