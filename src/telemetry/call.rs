//! One gRPC call: counted, timed, traced, and logged in one line when it ends,
//! however it ends.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderValue};
use opentelemetry::{
    KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tonic::Code;

use super::{
    BATCH_SERVICE, Telemetry,
    access::AccessLine,
    metrics::{OutcomeLabels, ReasonLabels, SUCCESS, TraceLabel},
    trace::TraceContext,
    upstream_request::UpstreamRequest,
};
use crate::{
    api::{Method, Route},
    failure::Effect,
    redact::{Redactor, Secrets},
};

/// What is known of a call, for all who work on it.
#[derive(Debug)]
pub struct CallRecord {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) trace: TraceContext,
    method: &'static Method,
    request_id: HeaderValue,
    client: Option<Arc<str>>,
    started: Instant,
    received: AtomicU64,
    sent: AtomicU64,
    requests: AtomicU32,
    /// In requests to the API, in microseconds.
    upstream: AtomicU64,
    code: OnceLock<Code>,
    completion: OnceLock<Completion>,
    secrets: OnceLock<Secrets>,
    /// What its response takes of a limit on memory.
    held: Mutex<Option<OwnedSemaphorePermit>>,
}

/// How a call ended, as logs, metrics and spans tell it.
#[derive(Clone, Debug, Default)]
pub struct Completion {
    /// What it changed, if it is of a method that can change something.
    pub outcome: Option<Effect>,
    /// Why it failed, or how its batch came to be known.
    pub reason: Option<&'static str>,
    /// The HTTP status of the response that tells of a failure.
    pub http_status: Option<u16>,
    /// The batch, fit to be shown.
    pub batch_id: Option<String>,
}

impl CallRecord {
    /// The method that is called.
    pub fn method(&self) -> &'static Method {
        self.method
    }

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
    pub fn request(self: &Arc<Self>, route: Route, host: Option<&str>) -> UpstreamRequest {
        self.requests.fetch_add(1, Relaxed);
        UpstreamRequest::begin(route, host, self.clone())
    }

    pub(super) fn request_ended(&self, took: Duration) {
        self.upstream.fetch_add(took.as_micros() as u64, Relaxed);
    }

    /// These may be in no log line and no span.
    pub fn set_secrets(&self, secrets: Secrets) {
        let _ = self.secrets.set(secrets); // once for each call
    }

    /// Keeps a part of a limit until the response has left, or the call has ended.
    pub fn hold(&self, permit: Option<OwnedSemaphorePermit>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }

    /// What is kept so, for what leaves.
    pub fn take_held(&self) -> Option<OwnedSemaphorePermit> {
        let held = self.held.lock();
        held.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Shows what the API said, without those.
    pub fn redactor(&self) -> Redactor<'_> {
        self.secrets
            .get()
            .map(Redactor::without)
            .unwrap_or_default()
    }

    /// Records the result that the caller receives.
    pub fn complete(&self, completion: Completion) {
        let labels = ReasonLabels {
            grpc_method: &self.method.name,
            outcome: completion.outcome.map(Effect::as_str).unwrap_or_default(),
            reason: completion.reason.unwrap_or(SUCCESS),
        };
        let outcomes = &self.telemetry.metrics.outcomes;
        outcomes.get_or_create(&labels).inc();
        let _ = self.completion.set(completion); // once for each call
    }

    /// The result that the caller receives, once it is known.
    pub fn completion(&self) -> Option<&Completion> {
        self.completion.get()
    }

    /// The call completed after its caller had disconnected.
    pub fn abandoned(&self, completion: &Completion) {
        let outcome = completion.outcome.map(Effect::as_str).unwrap_or_default();
        let abandoned = &self.telemetry.metrics.abandoned;
        abandoned
            .get_or_create(&OutcomeLabels {
                grpc_method: &self.method.name,
                outcome,
            })
            .inc();
        tracing::warn!(
            request_id = self.shown_request_id(),
            trace_id = self.trace.trace_id(),
            outcome,
            reason = completion.reason,
            batch_id = completion.batch_id,
            "create completed after the client disconnected"
        );
    }

    /// The call ends with this code.
    pub fn set_code(&self, code: Code) {
        let _ = self.code.set(code); // the first holds
    }

    fn shown_request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    fn log(&self, code: Code, took: Duration) {
        let completion = self.completion.get();
        let line = AccessLine {
            method: &self.method.name,
            code: code_name(code),
            outcome: completion.and_then(|c| c.outcome).map(Effect::as_str),
            reason: completion.and_then(|c| c.reason),
            http_status: completion.and_then(|c| c.http_status),
            batch_id: completion.and_then(|c| c.batch_id.as_deref()),
            request_id: self.shown_request_id(),
            trace_id: self.trace.trace_id(),
            client: self.client.as_deref(),
            milliseconds: milliseconds(took),
            upstream_milliseconds: self.upstream.load(Relaxed) as f64 / 1e3,
            upstream_requests: self.requests.load(Relaxed),
        };
        line.write(self.telemetry.log_format, code != Code::Ok);
    }

    fn end_span(&self, code: Code) {
        let (Some(_), Some(context)) = (&self.telemetry.tracer, &self.trace.context) else {
            return;
        };
        let span = context.span();
        if span.is_recording() {
            let name = code_name(code);
            span.set_attribute(KeyValue::new("rpc.response.status_code", name));
            let completion = self.completion.get().cloned().unwrap_or_default();
            for (key, value) in [
                ("aep.outcome", completion.outcome.map(|o| o.as_str().into())),
                ("aep.reason", completion.reason.map(Into::into)),
                ("aep.batch_id", completion.batch_id.map(Into::into)),
            ] {
                if let Some(value) = value {
                    let value: opentelemetry::Value = value;
                    span.set_attribute(KeyValue::new(key, value));
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

/// The name in the gRPC specification.
fn code_name(code: Code) -> &'static str {
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
        method: &'static Method,
        request_id: HeaderValue,
        headers: &HeaderMap,
        client: Option<Arc<str>>,
    ) -> Self {
        let metrics = &telemetry.metrics;
        metrics.method(method).started.inc();
        metrics.calls_in_flight.inc();
        let caller = TraceContext::of_caller(headers);
        let trace = match &telemetry.tracer {
            Some(tracer) if !caller.is_declined => {
                let name = format!("{BATCH_SERVICE}/{}", method.name);
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
            request_id,
            client,
            started: Instant::now(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            upstream: AtomicU64::new(0),
            code: OnceLock::new(),
            completion: OnceLock::new(),
            secrets: OnceLock::new(),
            held: Mutex::default(),
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
