//! One gRPC call: counted, timed, traced, and logged in one line when it ends,
//! however it ends.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderValue};
use opentelemetry::{
    KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use tokio::time::Instant;
use tonic::Code;

use super::{
    BATCH_SERVICE, Telemetry,
    access::AccessLine,
    metrics::{CreateLabels, Method, OutcomeLabel, TraceLabel, code_name},
    rest::{RestCall, RestRequest},
    trace::TraceContext,
};
use crate::{
    credentials,
    outcome::{Failure, Outcome, Settled},
    proto::v1::BatchOrigin,
    quote::{Quote, Secrets},
    status::{self, Row},
};

/// What is known of a call, for all who work on it.
#[derive(Debug)]
pub struct CallRecord {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) trace: TraceContext,
    method: Method,
    request_id: HeaderValue,
    client: Option<Arc<str>>,
    started: Instant,
    received: AtomicU64,
    sent: AtomicU64,
    requests: AtomicU32,
    /// In requests to the API, in microseconds.
    upstream: AtomicU64,
    code: OnceLock<Code>,
    ending: OnceLock<Ending>,
    secrets: OnceLock<Secrets>,
}

/// How a create ended.
#[derive(Debug)]
struct Ending {
    outcome: Outcome,
    reason: &'static str,
    http_status: Option<u16>,
    batch_id: Option<String>,
}

impl Ending {
    /// The API may call anything the id of a batch, a token too. In failures it is
    /// fit to be shown already.
    fn of(result: &Result<Settled, Failure>, quote: Quote<'_>) -> Self {
        match result {
            Ok(Settled { batch, origin }) => Ending {
                outcome: Outcome::Applied,
                reason: origin_name(*origin),
                http_status: None,
                batch_id: Some(quote.id(&batch.id)),
            },
            Err(failure) => {
                let row = status::row(failure);
                Ending {
                    outcome: row.outcome,
                    reason: row.reason,
                    http_status: http_status(failure),
                    batch_id: batch_id(failure).map(str::to_owned),
                }
            }
        }
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
        Failure::Unusable(answer) => Some(answer.status.as_u16()),
        Failure::LookUp(look_up) => http_status(&look_up.cause),
        _ => None,
    }
}

fn batch_id(failure: &Failure) -> Option<&str> {
    match failure {
        Failure::Unusable(answer) => answer.batch_id.as_deref(),
        Failure::ExternalIdTaken { batch_id } => Some(batch_id),
        _ => None,
    }
}

impl CallRecord {
    /// The call's `x-request-id`, the caller's or a new one.
    pub fn request_id(&self) -> &HeaderValue {
        &self.request_id
    }

    /// When the call arrived.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Bytes of the request's body have arrived.
    pub fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Relaxed);
    }

    /// Bytes of the answer's body have left.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Relaxed);
    }

    /// A request to the API begins, at this host.
    pub fn request(self: &Arc<Self>, call: RestCall, host: Option<&str>) -> RestRequest {
        self.requests.fetch_add(1, Relaxed);
        RestRequest::begin(call, host, self.clone())
    }

    pub(super) fn request_ended(&self, took: Duration) {
        self.upstream.fetch_add(took.as_micros() as u64, Relaxed);
    }

    /// What may be in no line and no span.
    pub fn keeps_secret(&self, secrets: Secrets) {
        let _ = self.secrets.set(secrets); // once for each call
    }

    /// Shows what the API said, without those.
    pub fn quote(&self) -> Quote<'_> {
        self.secrets.get().map(Quote::without).unwrap_or_default()
    }

    /// The call's create ended so, for its caller.
    pub fn create_ended(&self, result: &Result<Settled, Failure>) {
        self.ended(Ending::of(result, self.quote()));
    }

    /// The call was refused before the service saw it, and is answered so.
    pub fn refused(&self, row: &Row) {
        self.ended(Ending {
            outcome: row.outcome,
            reason: row.reason,
            http_status: None,
            batch_id: None,
        });
        self.answered(row.code);
    }

    fn ended(&self, ending: Ending) {
        if self.method == Method::CreateBatch {
            let labels = CreateLabels {
                outcome: ending.outcome.as_str(),
                reason: ending.reason,
            };
            let creates = &self.telemetry.metrics.creates;
            creates.get_or_create(&labels).inc();
        }
        let _ = self.ending.set(ending); // once for each call
    }

    /// The call's create ended so after its caller had left.
    pub fn abandoned(&self, result: &Result<Settled, Failure>) {
        let ending = Ending::of(result, self.quote());
        let outcome = ending.outcome.as_str();
        let abandoned = &self.telemetry.metrics.abandoned;
        abandoned.get_or_create(&OutcomeLabel { outcome }).inc();
        tracing::warn!(
            request_id = self.shown_request_id(),
            trace_id = self.trace.trace_id(),
            outcome,
            reason = ending.reason,
            batch_id = ending.batch_id,
            "create ended after its caller had left"
        );
    }

    /// The call is answered with this code.
    pub fn answered(&self, code: Code) {
        let _ = self.code.set(code); // the first holds
    }

    fn shown_request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    fn log(&self, code: Code, took: Duration) {
        let ending = self.ending.get();
        let line = AccessLine {
            method: self.method.as_str(),
            code: code_name(code),
            outcome: ending.map(|ending| ending.outcome.as_str()),
            reason: ending.map(|ending| ending.reason),
            http_status: ending.and_then(|ending| ending.http_status),
            batch_id: ending.and_then(|ending| ending.batch_id.as_deref()),
            request_id: self.shown_request_id(),
            trace_id: self.trace.trace_id(),
            client: self.client.as_deref(),
            milliseconds: milliseconds(took),
            upstream_milliseconds: self.upstream.load(Relaxed) as f64 / 1e3,
            upstream_requests: self.requests.load(Relaxed),
        };
        line.write(code != Code::Ok);
    }

    fn end_span(&self, code: Code) {
        let (Some(_), Some(context)) = (&self.telemetry.tracer, &self.trace.context) else {
            return;
        };
        let span = context.span();
        if span.is_recording() {
            let name = status_name(code);
            span.set_attribute(KeyValue::new("rpc.response.status_code", name));
            if let Some(ending) = self.ending.get() {
                span.set_attribute(KeyValue::new("aep.outcome", ending.outcome.as_str()));
                span.set_attribute(KeyValue::new("aep.reason", ending.reason));
                if let Some(id) = &ending.batch_id {
                    span.set_attribute(KeyValue::new("aep.batch_id", id.clone()));
                }
            }
            // The codes for which a server is to blame (OpenTelemetry's
            // "Semantic conventions for gRPC").
            if let Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss = code
            {
                span.set_attribute(KeyValue::new("error.type", name));
                span.set_status(Status::error(""));
            }
        }
        span.end();
    }
}

/// Bytes of a body, less what frames its one message (the gRPC over HTTP/2
/// protocol).
fn message_size(body: &AtomicU64) -> f64 {
    const PREFIX: u64 = 5;
    body.load(Relaxed).saturating_sub(PREFIX) as f64
}

fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// As OpenTelemetry has it: the name in the gRPC specification.
fn status_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A call, until its answer has left or its caller has.
#[derive(Debug)]
pub struct Call(Arc<CallRecord>);

impl Call {
    pub(super) fn begin(
        telemetry: Arc<Telemetry>,
        method: Method,
        headers: &HeaderMap,
        client: Option<Arc<str>>,
    ) -> Self {
        let metrics = &telemetry.metrics;
        metrics.method(method).started.inc();
        metrics.calls_in_flight.inc();
        let caller = TraceContext::of_caller(headers);
        let trace = match &telemetry.tracer {
            Some(tracer) if !caller.is_declined => {
                let name = format!("{BATCH_SERVICE}/{}", method.as_str());
                let attributes = [
                    KeyValue::new("rpc.system.name", "grpc"),
                    KeyValue::new("rpc.method", name.clone()),
                ];
                let parent = caller.context.clone().unwrap_or_default();
                let span = tracer
                    .span_builder(name)
                    .with_kind(SpanKind::Server)
                    .with_attributes(attributes)
                    .start_with_context(tracer, &parent);
                caller.at(parent.with_span(span))
            }
            _ => caller,
        };
        Call(Arc::new(CallRecord {
            trace,
            method,
            request_id: credentials::request_id(headers),
            client,
            started: Instant::now(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            upstream: AtomicU64::new(0),
            code: OnceLock::new(),
            ending: OnceLock::new(),
            secrets: OnceLock::new(),
            telemetry,
        }))
    }

    /// What is known of it.
    pub fn record(&self) -> &Arc<CallRecord> {
        &self.0
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let record = &self.0;
        let took = record.started.elapsed();
        // A call without an answer was cancelled by its caller.
        let code = record.code.get().copied().unwrap_or(Code::Cancelled);
        let metrics = &record.telemetry.metrics;
        let method = metrics.method(record.method);
        metrics.calls_in_flight.dec();
        method.handled(code).inc();
        method.received.observe(message_size(&record.received));
        method.sent.observe(message_size(&record.sent));
        let exemplar = record
            .trace
            .sampled_id()
            .map(|trace_id| TraceLabel { trace_id });
        method.seconds.observe(took.as_secs_f64(), exemplar, None);
        record.log(code, took);
        record.end_span(code);
    }
}
