//! Logs and metrics. No credential and no text from upstream is in either; no
//! dataset, organization or batch is in a label.

use std::{fmt::Write, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};
use tokio::time::Instant;
use tonic::Code;
use tracing_subscriber::EnvFilter;

use crate::{
    outcome::{Failure, Outcome, Settled},
    proto::v1::{Batch, BatchOrigin},
    status,
};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object to a line.
    Json,
    /// For people.
    Text,
}

/// Sends log lines to standard error from now on.
pub fn start_logs(format: LogFormat, filter: EnvFilter) {
    let logs = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter);
    // Fails where a test has started logs already.
    let _ = match format {
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
        LogFormat::Text => logs.with_ansi(false).try_init(),
    };
}

/// Seconds: 1 ms to 32 s.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandledLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
    grpc_code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AbandonedLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookUpLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: &'static str,
}

/// What is counted, for `/metrics`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    started: Family<MethodLabels, Counter>,
    handled: Family<HandledLabels, Counter>,
    seconds: Family<MethodLabels, Histogram>,
    in_flight: Gauge,
    outcomes: Family<OutcomeLabels, Counter>,
    abandoned: Family<AbandonedLabels, Counter>,
    look_ups: Family<LookUpLabels, Counter>,
    retries: Counter,
    connections: Gauge,
    accepted: Counter,
    refused: Family<RefusedLabels, Counter>,
    tls_not_after: Family<[(&'static str, &'static str); 0], Gauge>,
    tls_reloads: Family<LookUpLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut metrics = Metrics {
            registry: Registry::default(),
            started: Family::default(),
            handled: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS)),
            in_flight: Gauge::default(),
            outcomes: Family::default(),
            abandoned: Family::default(),
            look_ups: Family::default(),
            retries: Counter::default(),
            connections: Gauge::default(),
            accepted: Counter::default(),
            refused: Family::default(),
            tls_not_after: Family::default(),
            tls_reloads: Family::default(),
        };
        for reason in ["limit", "tls", "silent"] {
            let _ = metrics.refused.get_or_create(&RefusedLabels { reason });
        }
        for result in ["ok", "failed"] {
            let _ = metrics.tls_reloads.get_or_create(&LookUpLabels { result });
        }
        let registry = &mut metrics.registry;
        registry.register(
            "grpc_server_started",
            "Calls that were started",
            metrics.started.clone(),
        );
        registry.register(
            "grpc_server_handled",
            "Calls that ended, by code",
            metrics.handled.clone(),
        );
        registry.register(
            "grpc_server_handling_seconds",
            "How long calls took",
            metrics.seconds.clone(),
        );
        registry.register(
            "aep_gateway_calls_in_flight",
            "Calls that have started and not ended",
            metrics.in_flight.clone(),
        );
        registry.register(
            "aep_gateway_creates",
            "Creates that ended, by outcome and reason",
            metrics.outcomes.clone(),
        );
        registry.register(
            "aep_gateway_abandoned_creates",
            "Creates that ended after their caller had left",
            metrics.abandoned.clone(),
        );
        registry.register(
            "aep_gateway_look_ups",
            "Look-ups by external id, by what came of them",
            metrics.look_ups.clone(),
        );
        registry.register(
            "aep_gateway_retries",
            "Requests to the API that were sent again",
            metrics.retries.clone(),
        );
        registry.register(
            "aep_gateway_connections",
            "Connections of callers",
            metrics.connections.clone(),
        );
        registry.register(
            "aep_gateway_accepted_connections",
            "Connections of callers that were accepted",
            metrics.accepted.clone(),
        );
        registry.register(
            "aep_gateway_refused_connections",
            "Connections of callers that were refused, by reason",
            metrics.refused.clone(),
        );
        registry.register(
            "aep_gateway_tls_certificate_not_after_seconds",
            "When the gateway's certificate ends, in Unix time",
            metrics.tls_not_after.clone(),
        );
        registry.register(
            "aep_gateway_tls_reloads",
            "Times that changed certificates were read, by what came of it",
            metrics.tls_reloads.clone(),
        );
        registry.register(
            "aep_gateway_build",
            "The build that is running",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        metrics
    }

    /// The Prometheus text format (OpenMetrics).
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
            let _ = writeln!(text, "# EOF");
        }
        text
    }

    /// Counts a call that begins now; its end is counted however it ends.
    pub fn call(self: &Arc<Self>, service: &'static str, method: &'static str) -> Call {
        let labels = MethodLabels {
            grpc_type: "unary",
            grpc_service: service,
            grpc_method: method,
        };
        self.started.get_or_create(&labels).inc();
        self.in_flight.inc();
        Call {
            metrics: self.clone(),
            labels,
            started: Instant::now(),
            // A call whose future is dropped was cancelled by its caller.
            code: Code::Cancelled,
        }
    }

    /// Counts and logs how a create ended, for its caller.
    pub fn create(&self, request_id: &str, took: Duration, result: &Result<Settled, Failure>) {
        let milliseconds = took.as_secs_f64() * 1e3;
        match result {
            Ok(Settled { batch, origin }) => {
                self.count(Outcome::Created, origin_name(*origin));
                tracing::info!(
                    request_id,
                    batch_id = batch.id,
                    outcome = Outcome::Created.as_str(),
                    reason = origin_name(*origin),
                    milliseconds,
                    "batch created"
                );
            }
            Err(failure) => {
                let row = status::row(failure);
                self.count(row.outcome, row.reason);
                tracing::warn!(
                    request_id,
                    outcome = row.outcome.as_str(),
                    reason = row.reason,
                    code = ?row.code,
                    http_status = http_status(failure),
                    batch_id = batch_id(failure),
                    milliseconds,
                    "create failed"
                );
            }
        }
    }

    /// Counts a look-up.
    pub fn look_up(&self, found: &Result<Vec<Batch>, Failure>) {
        let result = match found {
            Ok(batches) if batches.is_empty() => "nothing",
            Ok(_) => "found",
            Err(_) => "failed",
        };
        self.look_ups.get_or_create(&LookUpLabels { result }).inc();
    }

    /// Counts a request that is sent again.
    pub fn retry(&self) {
        self.retries.inc();
    }

    /// Counts a connection that begins.
    pub fn connection_opened(&self) {
        self.accepted.inc();
        self.connections.inc();
    }

    /// A connection has ended.
    pub fn connection_closed(&self) {
        self.connections.dec();
    }

    /// Counts a connection that is refused: `limit` (there are too many), `tls`
    /// (no handshake, or a client that may not call) or `silent`.
    pub fn connection_refused(&self, reason: &'static str) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    /// When the certificate in force ends, in Unix seconds.
    pub fn tls_not_after(&self, unix_seconds: i64) {
        self.tls_not_after.get_or_create(&[]).set(unix_seconds);
    }

    /// Counts an attempt to use changed certificates.
    pub fn tls_reload(&self, ok: bool) {
        let result = if ok { "ok" } else { "failed" };
        self.tls_reloads
            .get_or_create(&LookUpLabels { result })
            .inc();
    }

    fn count(&self, outcome: Outcome, reason: &'static str) {
        let labels = OutcomeLabels {
            outcome: outcome.as_str(),
            reason,
        };
        self.outcomes.get_or_create(&labels).inc();
    }

    /// Counts and logs how a create ended whose caller had left.
    pub fn abandoned(&self, request_id: &str, result: &Result<Settled, Failure>) {
        let (outcome, reason, batch_id) = match result {
            Ok(Settled { batch, origin }) => {
                let id = Some(batch.id.as_str());
                (Outcome::Created, origin_name(*origin), id)
            }
            Err(failure) => {
                let row = status::row(failure);
                (row.outcome, row.reason, batch_id(failure))
            }
        };
        let labels = AbandonedLabels {
            outcome: outcome.as_str(),
        };
        self.abandoned.get_or_create(&labels).inc();
        let outcome = outcome.as_str();
        tracing::warn!(
            request_id,
            batch_id,
            outcome,
            reason,
            "create ended after its caller had left"
        );
    }
}

/// How a batch came to be known, where failures have their reason.
fn origin_name(origin: BatchOrigin) -> &'static str {
    match origin {
        BatchOrigin::Unspecified | BatchOrigin::Created => "CREATED",
        BatchOrigin::Found => "FOUND",
        BatchOrigin::Recovered => "RECOVERED",
    }
}

fn http_status(failure: &Failure) -> Option<u16> {
    match failure {
        Failure::Refused(refusal) => Some(refusal.status.as_u16()),
        Failure::Redirected { status, .. } => Some(status.as_u16()),
        Failure::Unusable(answer) => Some(answer.status.as_u16()),
        _ => None,
    }
}

fn batch_id(failure: &Failure) -> Option<&str> {
    match failure {
        Failure::Unusable(answer) => answer.batch_id.as_deref(),
        _ => None,
    }
}

/// One call, counted when it ends.
#[derive(Debug)]
pub struct Call {
    metrics: Arc<Metrics>,
    labels: MethodLabels,
    started: Instant,
    code: Code,
}

impl Call {
    /// The call ends with this code.
    pub fn ends(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let Call {
            metrics, labels, ..
        } = self;
        metrics.in_flight.dec();
        let seconds = self.started.elapsed().as_secs_f64();
        metrics.seconds.get_or_create(labels).observe(seconds);
        let labels = HandledLabels {
            grpc_type: labels.grpc_type,
            grpc_service: labels.grpc_service,
            grpc_method: labels.grpc_method,
            grpc_code: code_name(self.code),
        };
        metrics.handled.get_or_create(&labels).inc();
    }
}

/// The names that go-grpc-middleware has made common.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
